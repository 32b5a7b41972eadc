"""Several datasets in one stream of batches: shares, order, joints of one set under another's names."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipeline import mixture, samples
from pipeline.errors import ConfigError, DataError
from pipeline.model.loss import mspn_loss
from pipeline.pose.augment import Augmentation, sample_generator, training_sample
from pipeline.pose.skeleton import COCO17, skeleton_from_category

LSP14 = skeleton_from_category({"name": "lsp", "keypoints": [
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "right_wrist", "right_elbow",
    "right_shoulder", "left_shoulder", "left_elbow", "left_wrist", "neck", "head_top"]})


def blocks(number: int, *, size: int, start: int = 0) -> Iterator[samples.Arrays]:
    """An endless stream, whose sample of slot s is 1000 * number + s."""
    for first in itertools.count(start, size):
        slots = np.arange(first, first + size)
        yield {"slot": slots, "who": 1000 * number + slots}


def batches(*sizes: int, positions: tuple[int, ...] = (0, 0), count: int = 12) -> list[samples.Arrays]:
    streams = [blocks(number, size=size, start=positions[number]) for number, size in enumerate(sizes)]
    mixed = mixture.mixed_batches(streams, [0.75, 0.25], batch_size=6, positions=positions)
    return list(itertools.islice(mixed, count))


def test_every_stretch_of_samples_holds_the_sets_in_proportion() -> None:
    sets = mixture.next_sets((0, 0), (0.7, 0.3), 1000)
    for start in range(0, 990, 7):
        assert abs(sets[start:start + 10].count(1) - 3) <= 1
    assert sets.count(1) == 300


def test_a_share_is_the_weighted_number_of_persons() -> None:
    def one(weight: float, *counts: int) -> mixture.TrainingSet:
        return mixture.TrainingSet(None, weight, counts, ())  # type: ignore[arg-type]

    assert mixture.set_shares([one(1.0, 100, 200), one(1.0, 100)]) == [0.75, 0.25]
    assert mixture.set_shares([one(1.0, 100, 200), one(3.0, 100)]) == [0.5, 0.5]


def test_batches_are_the_same_whatever_the_blocks_and_each_sample_comes_once() -> None:
    cut = [[batch["who"].tolist() for batch in batches(*sizes)] for sizes in ((1, 1), (5, 3), (64, 64), (7, 100))]
    assert all(each == cut[0] for each in cut)
    everyone = [who for batch in cut[0] for who in batch]
    assert sorted(everyone) == [*range(54), *range(1000, 1018)]


def test_batches_go_on_the_same_from_any_position() -> None:
    positions: tuple[int, ...] = (0, 0)
    whole = batches(5, 3)
    for done, batch in enumerate(whole):
        rest = batches(4, 9, positions=positions, count=len(whole) - done)
        assert [each["who"].tolist() for each in rest] == [each["who"].tolist() for each in whole[done:]]
        positions = mixture.positions_after(positions, batch)
    assert positions == (54, 18)


def test_the_positions_after_a_batch_pass_over_slots_that_were_left_out() -> None:
    batch = {"slot": np.array([4, 7, 90]), "set": np.array([0, 0, 2])}
    assert mixture.positions_after((3, 50, 80), batch) == (8, 50, 91)


def test_a_set_too_small_for_a_place_in_each_batch_has_its_turn_in_some() -> None:
    mixed = mixture.mixed_batches([blocks(0, size=5), blocks(1, size=5)], [0.95, 0.05], batch_size=4, positions=(0, 0))
    some = list(itertools.islice(mixed, 10))
    assert all(batch["who"].shape == batch["set"].shape == (4,) for batch in some)
    assert [who for batch in some for who in batch["who"] if who >= 1000] == [1000, 1001]
    assert all((batch["who"] >= 1000).tolist() == (batch["set"] == 1).tolist() for batch in some)


def test_a_stream_that_ends_ends_the_batches_without_a_shorter_one() -> None:
    stream = itertools.islice(blocks(0, size=5), 3)
    batches = [batch["who"].tolist() for batch in mixture.mixed_batches([stream], [1.0], batch_size=4, positions=(0,))]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]  # 12, 13 and 14 are left out


def test_in_a_large_batch_too_each_sets_samples_are_in_their_places_and_in_order() -> None:
    streams = [blocks(number, size=50) for number in range(3)]
    batch = next(mixture.mixed_batches(streams, [0.5, 0.3, 0.2], batch_size=200, positions=(0, 0, 0)))
    assert (batch["who"] // 1000 == batch["set"]).all()
    for number, count in enumerate((100, 60, 40)):
        assert batch["slot"][batch["set"] == number].tolist() == list(range(count))


# --- joints -------------------------------------------------------------------------------------------------------


def test_joints_are_matched_by_name_and_those_that_a_set_lacks_are_said() -> None:
    indices = mixture.joint_indices(COCO17, LSP14, labelled=None, uri="lsp")
    assert dict(zip(COCO17.joints, indices, strict=True)) == {
        "nose": -1, "left_eye": -1, "right_eye": -1, "left_ear": -1, "right_ear": -1,
        "left_shoulder": 9, "right_shoulder": 8, "left_elbow": 10, "right_elbow": 7, "left_wrist": 11, "right_wrist": 6,
        "left_hip": 3, "right_hip": 2, "left_knee": 4, "right_knee": 1, "left_ankle": 5, "right_ankle": 0}
    text = mixture.joints_text(COCO17, LSP14, indices)
    assert text == ("it doesn't have nose, left_eye, right_eye, left_ear, right_ear, which take no part in its loss; "
                    "its neck, head_top aren't learnt")
    assert mixture.joints_text(COCO17, COCO17, tuple(range(17))) is None


def test_a_list_of_labelled_joints_leaves_the_others_out() -> None:
    indices = mixture.joint_indices(COCO17, COCO17, labelled=["left_hip", "right_hip"], uri="lsp")
    assert [index for index in indices if index >= 0] == [11, 12]
    with pytest.raises(ConfigError, match=r"data lsp: `joints` names \['left_hib'\]"):
        mixture.joint_indices(COCO17, COCO17, labelled=["left_hib"], uri="lsp")


def test_a_set_without_any_of_the_models_joints_is_refused() -> None:
    hand = skeleton_from_category({"name": "hand", "keypoints": ["thumb", "index"]})
    with pytest.raises(ConfigError, match=r"data hands has none of the model's joints.*thumb"):
        mixture.joint_indices(COCO17, hand, labelled=None, uri="hands")


def test_keypoints_of_another_set_come_in_the_models_order_and_an_absent_joint_is_minus_one() -> None:
    joints = mixture.joint_indices(COCO17, LSP14, labelled=None, uri="lsp")
    own = [value for joint in range(14) for value in (10.0 * joint, 5.0, 2)]
    keypoints = samples._keypoints({"keypoints": own}, joints)
    assert keypoints[5].tolist() == [90, 5, 2]  # left shoulder, LSP's joint 9
    assert keypoints[0].tolist() == [0, 0, -1]
    with pytest.raises(DataError, match="none of its labelled joints"):
        samples._keypoints({"keypoints": [*(0, 0, 0) * 12, *(1, 1, 2) * 2]}, joints)


@pytest.mark.parametrize("seed", range(6))
def test_an_absent_joint_stays_absent_through_the_augmentation(seed: int) -> None:
    keypoints = np.tile([50.0, 60.0, 2.0], (17, 1))
    keypoints[:5] = (0, 0, -1)
    keypoints[9] = (-500, -500, 2)
    sample = training_sample(
        np.zeros((120, 100, 3), np.uint8), (10, 10, 80, 100), keypoints, skeleton=COCO17, input_size_wh=(96, 128),
        augmentation=Augmentation(half_body_probability=0.0), padding_wh=(1.09, 1.135),
        generator=sample_generator(seed, 0, 1))
    assert (sample.visible[:5] == -1).all()
    assert sorted(sample.visible[5:].tolist()) == [0] + [2] * 11  # the joint far outside is not labelled
    assert (sample.joints_xy[:5] == 0).all()


@pytest.mark.parametrize("occluded", ["suppress", "supervise"])
def test_a_joint_that_the_data_do_not_have_takes_no_part_in_the_loss(occluded: str) -> None:
    chance = torch.Generator().manual_seed(0)
    heads = [[torch.randn((2, 5, 8, 6), generator=chance, requires_grad=True) for _ in range(4)] for _ in range(2)]
    targets = torch.rand((2, 5, 5, 8, 6), generator=chance) * 255
    visible = torch.tensor([[2, 1, 0, 2, -1], [-1, 2, 2, 2, 2]], dtype=torch.int8)
    mspn_loss(heads, targets, visible, ohkm_joints=5, occluded=occluded).total.backward()  # type: ignore[arg-type]
    for head in itertools.chain(*heads):
        assert head.grad is not None
        assert (head.grad[visible < 0] == 0).all()
        assert (head.grad[visible == 2] != 0).all()
