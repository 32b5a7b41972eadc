"""Decoding, held against the authors' answers, hand arithmetic, and a slow second reading of each definition."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.model.decode import decode_heatmaps, flip_average
from pipeline.model.settings import ARCHITECTURES, Decoding
from pipeline.model.targets import draw_gaussians
from pipeline.pose.crop import joints_to_image
from pipeline.pose.skeleton import COCO17

SIZE = (192, 256)
OFFICIAL, MMPOSE = Decoding(), Decoding(variant="mmpose")


@pytest.fixture(scope="module")
def excerpt() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "decode.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "golden" / "decode.npz") as archive:
        return dict(archive)


def expect_the_authors(golden: dict[str, np.ndarray], blur_kernel: int) -> None:
    heatmaps, decoding = torch.from_numpy(golden["averaged"]), Decoding(blur_kernel=blur_kernel)
    joints, scores = decode_heatmaps(heatmaps, SIZE, decoding=decoding)
    placed = joints_to_image(joints.numpy(), golden["centers"], 200.0 * golden["scales"], SIZE)
    np.testing.assert_allclose(placed, golden[f"kps_k{blur_kernel}"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(scores, golden[f"kp_scores_k{blur_kernel}"][..., 0], rtol=0, atol=1e-6)
    if blur_kernel == 5:
        np.testing.assert_allclose(joints, golden["kps_in_crop_pixels_k5"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("blur_kernel", [5, 9])
def test_joints_and_scores_are_the_authors(excerpt: dict[str, np.ndarray], blur_kernel: int) -> None:
    expect_the_authors(excerpt, blur_kernel)


@pytest.mark.parametrize("blur_kernel", [5, 9])
def test_all_golden_joints_and_scores_are_the_authors(golden: dict[str, np.ndarray], blur_kernel: int) -> None:
    expect_the_authors(golden, blur_kernel)


def test_the_flip_average_is_the_authors_to_the_bit(golden: dict[str, np.ndarray]) -> None:
    heatmaps, flipped = (torch.from_numpy(golden[name]) for name in ("heatmaps", "heatmaps_of_flipped_image"))
    assert np.array_equal(flip_average(heatmaps, flipped, COCO17.flip_order), golden["averaged"])


def test_without_the_flip_test_joints_are_the_authors_too(golden: dict[str, np.ndarray]) -> None:
    joints, _ = decode_heatmaps(torch.from_numpy(golden["heatmaps"]), SIZE, decoding=OFFICIAL)
    placed = joints_to_image(joints.numpy(), golden["centers"], 200.0 * golden["scales"], SIZE)
    np.testing.assert_allclose(placed, golden["kps_noflip_k5"], rtol=0, atol=1e-3)


def test_the_two_ways_differ_as_was_measured_on_the_originals(golden: dict[str, np.ndarray]) -> None:
    maps = torch.from_numpy(golden["averaged"][:6])  # the last two are noise alone
    official, mmpose = (decode_heatmaps(maps, SIZE, decoding=decoding)[0] for decoding in (OFFICIAL, MMPOSE))
    differences = (mmpose - official).abs()
    # measured on the reference maps: mean 0.67, median 1.0, largest 3 crop pixels
    assert differences.mean().item() == pytest.approx(0.67, abs=0.01)
    assert differences.median().item() == 1
    assert differences.max().item() == 3


def one_map(cells: dict[tuple[int, int], float], *, width: int = 8, height: int = 8) -> torch.Tensor:
    """A map [1, 1, h, w] with the given values at (x, y)."""
    heatmaps = torch.zeros(1, 1, height, width)
    for (x, y), value in cells.items():
        heatmaps[0, 0, y, x] = value
    return heatmaps


def decoded(heatmaps: torch.Tensor, decoding: Decoding) -> tuple[list[float], float]:
    size_wh = (4 * heatmaps.shape[3], 4 * heatmaps.shape[2])
    joints, scores = decode_heatmaps(heatmaps, size_wh, decoding=decoding)
    assert joints.dtype == scores.dtype == torch.float32
    return joints[0, 0].tolist(), scores[0, 0].item()


def test_the_official_peak_moves_a_quarter_cell_towards_the_second_highest() -> None:
    # blurred, (4, 4) is highest with 100·36/256 + 50·24/256, and (5, 4) second with 100·24/256 + 50·36/256
    joint, score = decoded(one_map({(4, 4): 100, (5, 4): 50}), OFFICIAL)
    assert joint == [4 * 4.25 + 2, 4 * 4 + 2]
    assert score == pytest.approx(100 / 255 + 0.5)


def test_of_tied_cells_the_first_in_reading_order_wins() -> None:
    # around a lone peak its four neighbours tie for the second place: the one above is read first
    joint, _ = decoded(one_map({(4, 4): 255}), OFFICIAL)
    assert joint == [4 * 4 + 2, 4 * 3.75 + 2]


def test_cells_that_tie_do_so_whatever_the_peak_as_no_sum_is_rounded() -> None:
    maps = torch.zeros(500, 1, 9, 9)
    maps[:, 0, 4, 4] = torch.from_numpy(np.random.default_rng(0).uniform(1, 255, 500).astype(np.float32))
    joints, _ = decode_heatmaps(maps, (36, 36), decoding=Decoding(blur_kernel=9))
    assert (joints[:, 0] == torch.tensor([4 * 4 + 2, 4 * 3.75 + 2])).all()


@pytest.mark.parametrize("value", [0, -3])
def test_an_empty_or_negative_map_ends_in_the_first_corner(value: float) -> None:
    joint, score = decoded(torch.full((1, 1, 8, 8), float(value)), OFFICIAL)
    assert joint == [2, 2]
    assert score == pytest.approx(value / 255 + 0.5)


def test_an_official_joint_stays_inside_of_the_map() -> None:
    joint, _ = decoded(one_map({(0, 0): 200, (7, 0): 10}), OFFICIAL)
    assert joint[0] >= 2
    assert joint[1] == 2
    # the blur's second-highest cell is the one outside, beside the last
    around = {(7, 4): 100.0, (6, 4): -50.0, (7, 3): -50.0, (7, 5): -50.0}
    assert decoded(one_map(around), OFFICIAL)[0] == [4 * 7 + 2, 4 * 4 + 2]
    assert decoded(one_map({(y, x): value for (x, y), value in around.items()}), OFFICIAL)[0] == [4 * 4 + 2, 4 * 7 + 2]


def test_mmposes_inner_peak_moves_by_the_signs_of_the_differences_and_half_a_cell() -> None:
    joint, score = decoded(one_map({(4, 3): 100, (5, 3): 50, (4, 2): 20}), MMPOSE)
    assert joint == [4 * (4 + 0.25 + 0.5), 4 * (3 - 0.25 + 0.5)]
    assert score == pytest.approx(100 / 255 + 0.5)


@pytest.mark.parametrize("cell", [(0, 4), (1, 4), (7, 4), (4, 0), (4, 1), (4, 7)])
def test_mmposes_outer_peak_gets_no_offset_at_all(cell: tuple[int, int]) -> None:
    joint, _ = decoded(one_map({cell: 100}), MMPOSE)
    assert joint == [4 * cell[0], 4 * cell[1]]


@pytest.mark.parametrize("value", [0, -3])
def test_mmposes_empty_or_negative_map_gets_the_cell_before_the_first(value: float) -> None:
    joint, score = decoded(torch.full((1, 1, 8, 8), float(value)), MMPOSE)
    assert joint == [-4, -4]
    assert score == pytest.approx(value / 255 + 0.5)


def noisy_maps() -> torch.Tensor:
    draws = np.random.RandomState(11)
    maps = draws.normal(0, 20, (6, 5, 24, 16)) + 255 * cv2.GaussianBlur(np.eye(24)[:, :16], (9, 9), 0)
    return torch.from_numpy(maps.astype(np.float32))


def official_by_loop(heatmap: np.ndarray, kernel: int) -> tuple[list[float], float]:
    """The authors' get_results, step by step."""
    height, width = heatmap.shape
    padded = cv2.GaussianBlur(np.pad(heatmap.astype(np.float64), 10), (kernel, kernel), 0)
    first = np.unravel_index(padded.argmax(), padded.shape)
    padded[first] = 0
    second = np.unravel_index(padded.argmax(), padded.shape)
    x, y = first[1] - 10, first[0] - 10
    dx, dy = second[1] - first[1], second[0] - first[0]
    distance = np.hypot(dx, dy)
    if distance > 1e-3:
        x, y = x + 0.25 * dx / distance, y + 0.25 * dy / distance
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    return [4 * x + 2, 4 * y + 2], heatmap[round(y), round(x)] / 255 + 0.5


def mmpose_by_loop(heatmap: np.ndarray, kernel: int) -> tuple[list[float], float]:
    """MMPose's MegviiHeatmap.decode, step by step."""
    height, width = heatmap.shape
    radius = kernel // 2
    blurred = cv2.GaussianBlur(np.pad(heatmap.astype(np.float64), radius), (kernel, kernel), 0)
    blurred = blurred[radius:-radius, radius:-radius]
    blurred = blurred * (heatmap.max() / blurred.max())
    y, x = np.unravel_index(blurred.argmax(), blurred.shape)
    score = blurred.max() / 255 + 0.5
    if blurred.max() <= 0:
        return [-4, -4], score
    place = np.array([x, y], dtype=np.float64)
    if 1 < x < width - 1 and 1 < y < height - 1:
        differences = [blurred[y, x + 1] - blurred[y, x - 1], blurred[y + 1, x] - blurred[y - 1, x]]
        place += 0.25 * np.sign(differences) + 0.5
    return list(4 * place), score


@pytest.mark.parametrize("blur_kernel", [5, 9, 11])
@pytest.mark.parametrize(("variant", "by_loop"), [("official", official_by_loop), ("mmpose", mmpose_by_loop)])
def test_a_batch_agrees_with_a_slow_reading_of_the_definition(variant: str, by_loop, blur_kernel: int) -> None:
    maps = torch.cat([noisy_maps(), noisy_maps() - 200])  # also maps with hardly anything positive
    joints, scores = decode_heatmaps(maps, (64, 96), decoding=Decoding(variant=variant, blur_kernel=blur_kernel))
    for heatmap, joint, score in zip(maps.flatten(0, 1), joints.flatten(0, 1), scores.flatten(), strict=True):
        expected_joint, expected_score = by_loop(heatmap.numpy(), blur_kernel)
        np.testing.assert_allclose(joint, expected_joint, rtol=0, atol=1e-4)
        assert score.item() == pytest.approx(expected_score, abs=1e-5)


def test_mirroring_back_swaps_sides_and_columns() -> None:
    heatmaps, flipped = torch.zeros(1, 2, 1, 3), torch.tensor([[[[1.0, 2, 3]], [[4.0, 5, 6]]]])
    averaged = flip_average(heatmaps, flipped, (1, 0))
    assert averaged.tolist() == [[[[3, 2.5, 2]], [[1.5, 1, 0.5]]]]


def test_half_precision_maps_are_averaged_in_float32() -> None:
    maps = torch.full((1, 1, 2, 2), 200.0, dtype=torch.bfloat16)
    averaged = flip_average(maps, maps + 1, (0,))
    assert averaged.dtype == torch.float32
    assert averaged[0, 0, 0, 0].item() == 200.5  # bfloat16 would keep 200


def test_decoding_leaves_the_heatmaps_as_they_are() -> None:
    maps = noisy_maps().double()
    before = maps.clone()
    decode_heatmaps(maps, (64, 96), decoding=OFFICIAL)
    decode_heatmaps(maps, (64, 96), decoding=MMPOSE)
    assert torch.equal(maps, before)


@pytest.mark.parametrize("wrong", [{"blur_kernel": 4}, {"blur_kernel": 21}, {"variant": "udp"}, {"shift": 1}])
def test_a_decoding_that_nobody_defined_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Decoding(**wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("decoding", [OFFICIAL, MMPOSE])
def test_a_gpu_decodes_as_the_cpu_does(excerpt: dict[str, np.ndarray], decoding: Decoding) -> None:
    maps = torch.from_numpy(excerpt["averaged"])
    for ours, theirs in zip(decode_heatmaps(maps.cuda(), SIZE, decoding=decoding),
                            decode_heatmaps(maps, SIZE, decoding=decoding), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-4)


# --- HRNet's way, and the hourglass's -----------------------------------------------------------------------------

HRNET, HOURGLASS = Decoding(variant="hrnet", blur_kernel=1), Decoding(variant="hourglass", blur_kernel=1)


def hrnet_by_loop(heatmap: np.ndarray) -> tuple[list[float], float]:
    """`get_final_preds` for one map, as it is described: cells and score."""
    height, width = heatmap.shape
    y, x = divmod(int(heatmap.argmax()), width)
    score = heatmap[y, x]
    if score <= 0:
        return [0.0, 0.0], score
    offset = [0.0, 0.0]
    if 1 < x < width - 1 and 1 < y < height - 1:
        offset = [0.25 * np.sign(heatmap[y, x + 1] - heatmap[y, x - 1]),
                  0.25 * np.sign(heatmap[y + 1, x] - heatmap[y - 1, x])]
    return [x + offset[0], y + offset[1]], score


def hourglass_by_loop(heatmap: np.ndarray) -> tuple[list[float], float]:
    """`HeatmapParser` for one map, as it is described: cells and score."""
    height, width = heatmap.shape
    heatmap = np.minimum(heatmap, 1)
    y, x = divmod(int(heatmap.argmax()), width)
    if heatmap[y, x] <= 0:
        return [0.0, 0.0], 0.0
    right, left = heatmap[y, min(x + 1, width - 1)], heatmap[y, max(x - 1, 0)]
    below, above = heatmap[min(y + 1, height - 1), x], heatmap[max(y - 1, 0), x]
    return [x + (0.25 if right > left else -0.25) + 0.5, y + (0.25 if below > above else -0.25) + 0.5], heatmap[y, x]


@pytest.mark.parametrize(("decoding", "by_loop"), [(HRNET, hrnet_by_loop), (HOURGLASS, hourglass_by_loop)])
def test_every_peak_is_found_as_a_loop_finds_it(decoding: Decoding, by_loop: Callable[..., object]) -> None:
    draws = np.random.RandomState(5)
    maps = draws.uniform(-0.5, 1.3, (200, 6, 8, 7)).astype(np.float32).round(1)  # ties, at the border and inside
    maps[0], maps[1] = 0, -1
    joints, scores = decode_heatmaps(torch.from_numpy(maps), (28, 32), decoding=decoding)
    for person, joint in np.ndindex(200, 6):
        cells, score = by_loop(maps[person, joint])
        assert (joints[person, joint] / 4).tolist() == cells, (person, joint)
        assert scores[person, joint].item() == pytest.approx(score, abs=1e-7)


def test_a_peak_at_the_middle_of_a_gaussian_is_its_joint_to_half_a_cell() -> None:
    joints = torch.tensor([[[24.0, 40.0], [26.5, 41.0], [33.0, 47.9]]])
    for name, decoding, off in (("hrnet", HRNET, 2.0), ("hourglass", HOURGLASS, 3.0)):
        maps, _ = draw_gaussians(joints, torch.full((1, 3), 2), (64, 96), ARCHITECTURES[name].loss)
        assert (decode_heatmaps(maps, (64, 96), decoding=decoding)[0] - joints).abs().max() <= off


def test_hrnets_mirrored_maps_go_one_cell_to_the_right_and_the_first_column_stays() -> None:
    maps = torch.arange(5.0).expand(1, 1, 2, 5)
    back = flip_average(torch.zeros_like(maps), maps, (0,), shift=HRNET.flip_shift) * 2
    assert back[0, 0, 0].tolist() == [4, 4, 3, 2, 1]  # mirrored back: 4 3 2 1 0
    assert HOURGLASS.flip_shift == OFFICIAL.flip_shift == MMPOSE.flip_shift == 0


def test_the_threshold_for_low_scores_is_a_fifth_of_a_full_peak_on_each_scale() -> None:
    full = {OFFICIAL: 255.0, MMPOSE: 255.0, HRNET: 1.0, HOURGLASS: 1.0}
    for decoding, peak in full.items():
        maps = one_map({(4, 4): peak / 5})
        assert decoded(maps, decoding)[1] == pytest.approx(decoding.low_score, abs=1e-6)
