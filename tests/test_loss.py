"""The loss, held against the authors' numbers, hand arithmetic, and a plain loop written from its definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.model.loss import coarse_loss, hard_joints_loss, mspn_loss, taught_loss
from pipeline.model.settings import ARCHITECTURES, CoarseToFineLoss, GaussianLoss
from pipeline.model.targets import draw_gaussians, draw_targets


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "golden" / "loss.npz") as archive:
        return dict(archive)


def in_double(golden: dict[str, np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    heatmaps, targets = (torch.from_numpy(golden[name]).double() for name in ("preds", "labels"))
    return heatmaps, targets, torch.from_numpy(golden["valids"])[..., 0]


def units(heatmaps: Tensor) -> list[list[Tensor]]:
    return [list(stage) for stage in heatmaps]


def test_value_and_gradients_are_the_authors(golden: dict[str, np.ndarray]) -> None:
    heatmaps, targets, visible = in_double(golden)
    heatmaps.requires_grad_()
    total = mspn_loss(units(heatmaps), targets, visible).total
    total.backward()
    assert total.item() == pytest.approx(float(golden["total_loss_2stage_fp64"]), rel=1e-12)
    for gradient, name in ((heatmaps.grad[1, 3], "grad_last"), (heatmaps.grad[0, 0], "grad_first")):
        expected = golden[name]  # kept in float32
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


def test_a_single_stage_learns_the_narrower_kernels(golden: dict[str, np.ndarray]) -> None:
    heatmaps, targets, visible = in_double(golden)
    total = mspn_loss(units(heatmaps[1:]), targets, visible).total
    assert total.item() == pytest.approx(float(golden["total_loss_1stage_fp64"]), rel=1e-12)


def test_each_head_by_itself_is_the_authors_and_mmposes(golden: dict[str, np.ndarray]) -> None:
    heatmaps, targets, visible = in_double(golden)
    coarse = [coarse_loss(heatmaps[0, unit], targets[:, unit], visible).item() for unit in (0, 3)]
    hard = [hard_joints_loss(heatmaps[stage, 3], targets[:, 3 + stage], visible).item() for stage in (0, 1)]
    supervised = coarse_loss(heatmaps[0, 0], targets[:, 0], visible, occluded="supervise").item()
    np.testing.assert_allclose(coarse, golden["plain_unit"], rtol=1e-12)
    np.testing.assert_allclose(hard, golden["ohkm_unit"], rtol=1e-12)
    np.testing.assert_allclose(hard, golden["mmpose_ohkm_unit"], rtol=1e-12)
    np.testing.assert_allclose(0.25 * supervised, golden["mmpose_plain_unit"][0], rtol=1e-12)


def one_cell(*values: float) -> Tensor:
    """One person's maps [1, K, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def test_occluded_joints_are_driven_to_zero_or_supervised_as_asked() -> None:
    heatmaps, targets = one_cell(3, 3, 3), one_cell(5, 5, 5)
    visible = torch.tensor([[2, 1, 0]])
    # (3-5)² for the visible one, (3-0)² for the others; or (3-5)² for the labelled ones; a mean over all three
    assert coarse_loss(heatmaps, targets, visible).item() == pytest.approx((4 + 9 + 9) / 3)
    assert coarse_loss(heatmaps, targets, visible, occluded="supervise").item() == pytest.approx((4 + 4) / 3)


def test_only_the_hardest_labelled_joints_count_and_eight_always_divides() -> None:
    heatmaps, targets = one_cell(1, 2, 3, 9), one_cell(0, 0, 0, 0)
    visible = torch.tensor([[1, 2, 2, 0]])
    assert hard_joints_loss(heatmaps, targets, visible).item() == pytest.approx((1 + 4 + 9) / 8)
    assert hard_joints_loss(heatmaps, targets, visible, ohkm_joints=2).item() == pytest.approx((9 + 4) / 2)


def test_a_person_without_labelled_joints_costs_nothing_on_the_finest_head() -> None:
    assert hard_joints_loss(one_cell(7, 7), one_cell(0, 0), torch.tensor([[0, 0]])).item() == 0


def test_all_heads_agree_with_a_plain_loop_over_persons_joints_and_cells() -> None:
    draws = np.random.RandomState(3)
    heatmaps, targets = draws.uniform(0, 255, (3, 4, 2, 5, 3, 2)), draws.uniform(0, 255, (2, 5, 5, 3, 2))
    visible = draws.randint(0, 3, (2, 5))
    terms = mspn_loss(units(torch.from_numpy(heatmaps)), torch.from_numpy(targets), torch.from_numpy(visible),
                      ohkm_joints=3)
    expected = [[head_by_loop(stage, unit, heatmaps, targets, visible) for unit in range(4)] for stage in range(3)]
    np.testing.assert_allclose(terms.heads, expected, rtol=1e-12)
    assert terms.total.item() == pytest.approx(np.sum(expected))


def head_by_loop(stage: int, unit: int, heatmaps: np.ndarray, targets: np.ndarray, visible: np.ndarray) -> float:
    errors = []
    for person in range(2):
        errors.append([])
        for joint in range(5):
            target = targets[person, unit + (stage == 2), joint]
            if unit < 3:
                target = target if visible[person, joint] == 2 else 0 * target
            error = ((heatmaps[stage, unit, person, joint] - target) ** 2).mean()
            errors[-1].append(error if unit < 3 or visible[person, joint] > 0 else 0)
    if unit < 3:
        return float(np.mean(errors)) / 4
    return float(np.mean([sum(sorted(person)[-3:]) / 3 for person in errors]))


def test_half_precision_heatmaps_are_compared_in_float32() -> None:
    heatmaps = torch.full((1, 1, 8, 8), -200.0, dtype=torch.float16, requires_grad=True)
    targets = torch.full((1, 1, 8, 8), 255.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = coarse_loss(heatmaps, targets, torch.tensor([[2]]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == 455**2  # 207025, which float16 can't hold
    assert torch.isfinite(heatmaps.grad).all()


# --- one Gaussian for all heads -----------------------------------------------------------------------------------


def test_a_gaussians_loss_is_hrnets_mean_over_all_joints_times_a_half() -> None:
    draws = np.random.RandomState(4)
    heatmaps, joints = draws.uniform(-1, 2, (3, 5, 24, 16)), draws.uniform(0, 63, (3, 5, 2))
    visible = np.array([[2, 1, 0, 2, -1], [0, 0, 0, 0, 0], [1, 2, 2, 1, 2]])
    loss = GaussianLoss()
    targets, _ = draw_gaussians(torch.from_numpy(joints), torch.from_numpy(visible), (64, 96), loss)
    found = taught_loss([[torch.from_numpy(heatmaps)]], torch.from_numpy(joints), torch.from_numpy(visible), (64, 96),
                        loss)
    weight = (visible > 0)[..., None, None]
    per_joint = [0.5 * np.mean((heatmaps[:, k] * weight[:, k] - targets.numpy()[:, k] * weight[:, k]) ** 2)
                 for k in range(5)]
    assert found.total.item() == pytest.approx(np.mean(per_joint), rel=1e-12)
    assert found.heads.shape == (1, 1)


def test_stacks_are_averaged_and_joints_without_a_label_learn_emptiness_as_the_hourglass_has_it() -> None:
    loss = ARCHITECTURES["hourglass"].loss
    ones = [[torch.ones(2, 3, 16, 16)], [torch.full((2, 3, 16, 16), 3.0)]]
    nobody, absent = torch.zeros(2, 3), torch.full((2, 3), -1)
    joints = torch.zeros(2, 3, 2)
    terms = taught_loss(ones, joints, nobody, (64, 64), loss)
    assert terms.heads.flatten().tolist() == [1 / 2, 9 / 2]  # mean squares of stacks, halved by their mean
    assert taught_loss(ones, joints, absent, (64, 64), loss).total == 0


def test_each_kind_of_loss_draws_its_own_targets() -> None:
    heads = [[torch.zeros(1, 9, 16, 16)] * 4]
    joints, visible = torch.full((1, 9, 2), 30.0), torch.full((1, 9), 2)
    coarse = taught_loss(heads, joints, visible, (64, 64), CoarseToFineLoss(ohkm_joints=4))
    targets = draw_targets(joints, visible, (64, 64))
    assert torch.equal(coarse.heads, mspn_loss(heads, targets, visible, ohkm_joints=4).heads)
    assert taught_loss(heads, joints, visible, (64, 64), GaussianLoss()).total < coarse.total / 1000
