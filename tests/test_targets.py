"""Targets, held against the authors' maps and OpenCV's own blur (tests/golden/README.md)."""

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pipeline.model.settings import ARCHITECTURES, GaussianLoss, TargetPeak
from pipeline.model.targets import KERNELS, draw_gaussians, draw_targets, gaussian_taps

SIZE = (192, 256)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "targets.npz") as archive:
        return dict(archive)


def drawn(x: float, y: float, *, visible: int = 2, size_wh: tuple[int, int] = SIZE,
          peak: TargetPeak = "maximum") -> torch.Tensor:
    """The five maps of one joint."""
    return draw_targets(torch.tensor([[[x, y]]]), torch.tensor([[visible]]), size_wh, peak=peak)[0, :, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_are_the_authors_for_all_kernels_and_borders(golden: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    joints = torch.from_numpy(golden["joints_xy_in_crop"]).to(dtype)
    targets = draw_targets(joints, torch.from_numpy(golden["visibility"])[..., 0], SIZE)
    assert targets.dtype == torch.float32
    np.testing.assert_allclose(targets, golden["heatmaps"], rtol=0, atol=1e-4)


def test_taps_are_opencvs(golden: dict[str, np.ndarray]) -> None:
    for kernel in KERNELS:
        np.testing.assert_allclose(gaussian_taps(kernel), golden[f"gauss1d_{kernel}"], rtol=0, atol=1e-15)


def test_the_narrowest_map_is_255_then_170_then_42_and_a_half() -> None:
    narrowest = drawn(96, 128)[-1]
    assert narrowest[32, 24:28].tolist() == [255, 170, 42.5, 0]


@pytest.mark.parametrize(("x", "y"), [(0, 0), (3.9, 255.9), (191.9, 4), (100, 7)])
def test_every_map_peaks_at_255_also_at_the_border(x: float, y: float) -> None:
    assert drawn(x, y).amax(dim=(1, 2)).tolist() == pytest.approx([255] * 5, abs=1e-4)


@pytest.mark.parametrize(("x", "y", "visible"), [
    (96, 128, 0), (-0.5, 9, 2), (192, 9, 2), (96, 256, 2), (9, -9, 1), (-5000, 9, 2), (9, 5000, 2)])
def test_joints_that_are_unlabelled_or_outside_get_empty_maps(x: float, y: float, visible: int) -> None:
    assert not drawn(x, y, visible=visible).any()


def test_occluded_joints_are_drawn_as_visible_ones() -> None:
    assert torch.equal(drawn(50, 60, visible=1), drawn(50, 60, visible=2))


@pytest.mark.parametrize("size_wh", [(32, 32), (32, 64), (160, 96)])
def test_maps_narrower_than_the_kernel_are_what_opencv_draws_too(size_wh: tuple[int, int]) -> None:
    for cell_x, cell_y in ((0, 0), (3, 7), (7, 1), (4, 4)):
        maps = drawn(4 * cell_x + 1, 4 * cell_y + 3, size_wh=size_wh)
        delta = np.zeros((size_wh[1] // 4, size_wh[0] // 4), dtype=np.float32)
        delta[cell_y, cell_x] = 1
        for target, kernel in zip(maps, KERNELS, strict=True):
            blurred = cv2.GaussianBlur(delta, (kernel, kernel), 0)
            np.testing.assert_allclose(target, 255 * blurred / blurred.max(), rtol=0, atol=1e-3)


def test_mmposes_targets_are_opencvs_blur_by_the_value_in_the_joints_cell(golden: dict[str, np.ndarray]) -> None:
    joints, visible = golden["joints_xy_in_crop"], golden["visibility"][..., 0]
    targets = draw_targets(torch.from_numpy(joints), torch.from_numpy(visible), SIZE, peak="joint").numpy()
    above = dict.fromkeys(KERNELS, 0)
    for person, joint in np.argwhere(visible > 0):
        if not ((joints[person, joint] >= 0) & (joints[person, joint] < SIZE)).all():
            continue
        x, y = (joints[person, joint] / 4).astype(int)
        delta = np.zeros((64, 48), np.float32)
        delta[y, x] = 1
        for target, kernel in zip(targets[person, :, joint], KERNELS, strict=True):
            blurred = cv2.GaussianBlur(delta, (kernel, kernel), 0)
            np.testing.assert_allclose(target, 255 * blurred / blurred[y, x], rtol=0, atol=1e-3)
            assert target[y, x] == 255
            above[kernel] += target.max() > 255.01
    # measured on MMPose's own function: up to 333, and 5 to 13 joints, by kernel
    assert targets.max() == pytest.approx(333, abs=0.5)
    assert (min(above.values()), max(above.values())) == (5, 13)


def test_one_cell_from_a_corner_mmposes_narrowest_map_is_higher_in_the_corner() -> None:
    # taps 1 4 6 4 1: mirrored at the border, cell 0 gets 4 + 4 and cell 1 gets 6 + 1; both ways 64 / 49
    narrowest = drawn(5, 6, peak="joint")[-1]
    assert narrowest[1, 1] == 255
    assert narrowest[0, 0] == pytest.approx(255 * 64 / 49)
    assert drawn(5, 6, peak="maximum")[-1, 1, 1] == pytest.approx(255 * 49 / 64)


def test_away_from_the_border_both_peaks_give_the_same_maps() -> None:
    assert torch.equal(drawn(96, 128, peak="joint"), drawn(96, 128, peak="maximum"))


def test_targets_asked_for_during_inference_can_be_trained_on_later() -> None:
    with torch.inference_mode():
        drawn(11, 12, size_wh=(64, 32))
    heatmaps = torch.zeros(5, 8, 16, requires_grad=True)
    (heatmaps * drawn(11, 12, size_wh=(64, 32))).sum().backward()
    assert heatmaps.grad is not None


@pytest.mark.gpu
def test_a_gpu_draws_what_the_cpu_draws(golden: dict[str, np.ndarray]) -> None:
    joints, visible = (torch.from_numpy(golden[name]) for name in ("joints_xy_in_crop", "visibility"))
    targets = draw_targets(joints.cuda(), visible[..., 0].cuda(), SIZE)
    assert targets.is_cuda
    torch.testing.assert_close(targets.cpu(), draw_targets(joints, visible[..., 0], SIZE), rtol=0, atol=1e-4)


# --- one Gaussian for all heads -----------------------------------------------------------------------------------

HRNET, HOURGLASS = (ARCHITECTURES[name].loss for name in ("hrnet", "hourglass"))
PLACES = [*itertools.product((-40.0, -29.9, -26.1, -5.9, -1.0, 0.0, 1.9, 2.0, 47.3, 61.9, 62.0, 87.9, 90.0), repeat=2)]


def by_loop(x: float, y: float, visible: int, shape: GaussianLoss, *, width: int,
            height: int) -> tuple[np.ndarray, bool]:
    """One joint's map and whether it counts, cell by cell, as the authors' dataset classes are described."""
    half = 0.5 if shape.center == "nearest" else 0.0
    mu_x, mu_y = int(x / 4 + half), int(y / 4 + half)
    r, target = shape.radius, np.zeros((height, width))
    if shape.unlabelled == "ignore":  # HRNet's generate_target
        drawn = visible > 0 and not (mu_x - r >= width or mu_y - r >= height or mu_x + r + 1 < 0 or mu_y + r + 1 < 0)
    else:  # the hourglass's GenerateHeatmap
        drawn = visible > 0 and 0 <= mu_x < width and 0 <= mu_y < height
    for j, i in itertools.product(range(height), range(width)) if drawn else ():
        if abs(i - mu_x) <= r and abs(j - mu_y) <= r:
            target[j, i] = np.exp(-((i - mu_x) ** 2 + (j - mu_y) ** 2) / (2 * shape.sigma**2))
    return target, drawn if shape.unlabelled == "ignore" else visible >= 0


@pytest.mark.parametrize("shape", [HRNET, HOURGLASS, GaussianLoss(sigma=3, radius=9)], ids=str)
def test_gaussians_are_those_of_a_loop_over_cells_also_beyond_the_border(shape: GaussianLoss) -> None:
    joints, visible = torch.tensor([PLACES] * 4), torch.arange(-1, 3)[:, None].expand(4, len(PLACES))
    maps, counted = draw_gaussians(joints, visible, (64, 96), shape)
    assert maps.dtype == torch.float32
    for person, joint in itertools.product(range(4), range(len(PLACES))):
        target, counts = by_loop(*PLACES[joint], int(visible[person, joint]), shape, width=16, height=24)
        np.testing.assert_allclose(maps[person, joint], target, rtol=1e-5, atol=1e-7)
        assert counted[person, joint] == counts, PLACES[joint]


def test_a_peak_is_1_in_the_nearest_cell_or_in_the_one_that_holds_the_joint() -> None:
    joints, visible = torch.tensor([[[30.0, 50.0]]]), torch.tensor([[2]])
    [nearest, held] = [draw_gaussians(joints, visible, (64, 96), shape)[0][0, 0] for shape in (HRNET, HOURGLASS)]
    assert (nearest[13, 8], held[12, 7]) == (1, 1)  # 30 / 4 = 7.5, 50 / 4 = 12.5
    assert (nearest == 1).sum() == (held == 1).sum() == 1
    assert ((nearest > 0).sum(), (held > 0).sum()) == (13 * 13, 9 * 9)


def test_samples_keep_joints_as_far_outside_as_their_gaussian_reaches() -> None:
    for x in np.arange(-60, 60, 0.5):  # the joint that is furthest outside, and still counts, is within the margin
        counted = draw_gaussians(torch.tensor([[[x, 30.0]]]), torch.tensor([[2]]), (64, 96), HRNET)[1]
        assert not counted or x >= -HRNET.margin_px
    assert (HOURGLASS.margin_px, ARCHITECTURES["mspn"].loss.margin_px) == (0, 0)
