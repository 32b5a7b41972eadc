"""One iteration, the schedule, the state in a file, and the order in which persons are trained on."""

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline import mixture, samples, shards, training
from pipeline.coco import parse_annotations
from pipeline.errors import ConfigError, DataError
from pipeline.images import decode_picture, read_header
from pipeline.model.directory import ModelSpec, normalise_crops
from pipeline.model.loss import mspn_loss
from pipeline.model.mspn import MSPN
from pipeline.model.targets import draw_targets
from pipeline.pose.augment import Augmentation
from pipeline.pose.skeleton import COCO17
from pipeline.shard_plan import DROPPED
from tests.worlds import TINY, write_pictures

SPEC = ModelSpec(network=TINY, skeleton=COCO17.to_json())
AUTHORS = training.Schedule(peak=4e-3, iterations=96_000, warmup_iterations=2400, warmup_factor=0.1)
pytestmark = pytest.mark.usefixtures("one_thread")


# --- schedule and optimiser ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("iteration", "rate"), [
    (1, 4.015e-4), (2, 4.03e-4), (100, 5.5e-4), (1200, 2.2e-3), (2399, 3.9985e-3), (2400, 4e-3),
    (2401, 3.99995726e-3), (10_000, 3.67521368e-3), (48_000, 2.05128205e-3), (95_999, 4.27350427e-8), (96_000, 0.0)])
def test_the_rate_is_the_authors_on_eight_gpus(iteration: int, rate: float) -> None:
    # golden lr_schedule.npz, gpus8: their make_lr_scheduler on MAX_ITER 96000
    assert training.learning_rate(iteration, AUTHORS) == pytest.approx(rate, rel=1e-7)


def test_the_rate_is_the_authors_on_one_gpu(shared: Path) -> None:
    schedule = training.Schedule(peak=5e-4, iterations=768_000, warmup_iterations=2400, warmup_factor=0.1)
    for iteration, rate in np.load(shared / "golden" / "lr_schedule.npz")["gpus1_first"]:
        assert training.learning_rate(int(iteration), schedule) == pytest.approx(rate, rel=1e-9)


def test_a_warm_up_that_does_not_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warmup_iterations is 2400, but must be less than.* 100"):
        training.Schedule(peak=4e-3, iterations=100, warmup_iterations=2400, warmup_factor=0.1)


@pytest.mark.parametrize(("iteration", "rate"), [
    (1, 1.499e-5),     # 5e-3 * (0.001 + 0.999 * 1 / 500)
    (250, 2.5025e-3),  # 5e-3 * (0.001 + 0.999 / 2)
    (499, 4.99001e-3), (500, 5e-3), (99_450, 5e-3), (99_451, 5e-4), (117_000, 5e-4), (117_001, 5e-5), (122_850, 5e-5)])
def test_with_steps_the_rate_falls_after_each_of_them_as_mmposes(iteration: int, rate: float) -> None:
    # 0.x: 585 iterations an epoch, 5e-3, times 0.1 after epochs 170 and 200 of 210; warm-up 500 from times 0.001
    schedule = training.Schedule(peak=5e-3, iterations=122_850, warmup_iterations=500, warmup_factor=0.001,
                                 decay_at=(99_450, 117_000), decay_factor=0.1)
    assert training.learning_rate(iteration, schedule) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize("decay_at", [(20,), (100,), (40, 40), (60, 40), (40, 120)])
def test_steps_that_do_not_ascend_between_warm_up_and_end_are_refused(decay_at: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"decay_at is .* must ascend from .* 20, to .* 100.*in proportion"):
        training.Schedule(peak=5e-3, iterations=100, warmup_iterations=20, warmup_factor=0.001, decay_at=decay_at)


def test_a_step_is_adam_with_l2_on_every_parameter_written_by_hand() -> None:
    torch.manual_seed(0)
    network, batch, rate = MSPN(TINY).train(), random_batch(), 1e-3
    loss = mspn_loss(network(normalise_crops(batch.crops, SPEC)),
                     draw_targets(batch.joints_xy, batch.visible, (64, 64)), batch.visible)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    gradients = torch.autograd.grad(loss.total, list(network.parameters()))

    torch.manual_seed(0)
    stepped = MSPN(TINY).train()
    step(stepped, training.make_optimiser(stepped, weight_decay=1e-5), batch, 1, rate)

    # Adam's first step (Kingma & Ba 2015) with bias correction is rate * g / (|g| + eps), g with the L2 term in it
    for parameter, old, gradient in zip(stepped.parameters(), before, gradients, strict=True):
        decayed = gradient + 1e-5 * old
        expected = old - rate * decayed / (decayed.abs() + 1e-8)
        assert_close_where_the_gradient_is_clear(parameter.detach(), expected, decayed)


def test_scaled_heatmaps_are_the_untrained_ones_times_the_factor() -> None:
    torch.manual_seed(0)
    network, images = MSPN(TINY).eval(), torch.randn(1, 3, 64, 64)
    before = network(images)
    training.scale_heatmaps(network, 8.0)
    for stage, scaled in zip(before, network(images), strict=True):
        for heatmaps, times_8 in zip(stage, scaled, strict=True):
            torch.testing.assert_close(times_8, 8 * heatmaps)


def test_a_report_names_each_heads_share_of_the_loss() -> None:
    network = MSPN(TINY).train()
    report = step(network, training.make_optimiser(network, weight_decay=0.0), random_batch(), 7, 0.0)
    assert report.heads.shape == (1, 4)
    assert float(report.heads.sum()) == pytest.approx(float(report.loss), rel=1e-6)
    assert not report.loss.requires_grad  # reports are kept for a while, and activations mustn't be with them
    assert not report.heads.requires_grad


# --- the state in a file ------------------------------------------------------------------------------------------


def test_two_iterations_and_two_more_after_a_restart_are_four_bit_for_bit(tmp_path: Path) -> None:
    data = made_shards(tmp_path, num_shards=3)
    unbroken = Run(data)
    unbroken.train(4)

    first = Run(data)
    first.train(2)
    saved, random = first.state(), torch.get_rng_state()
    torch.manual_seed(99)
    second = Run(data)
    second.load(saved)
    assert torch.equal(torch.get_rng_state(), random)
    second.train(2)

    assert second.iteration == unbroken.iteration == 4
    for name, tensor in unbroken.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name]), name
    assert not torch.equal(first.network.top.conv.conv.weight, second.network.top.conv.conv.weight)


def test_a_state_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    network = MSPN(TINY)
    optimiser = training.make_optimiser(network, weight_decay=0.0)
    path = tmp_path / "state.pt"
    newest = training.STATE_VERSION
    torch.save({"version": newest + 1}, path)
    with pytest.raises(DataError, match=f"version {newest + 1}; this program reads up to {newest}"):
        training.load_state(path.read_bytes(), network, optimiser)


def test_a_rank_goes_on_where_it_was_and_other_ranks_share_what_was_done() -> None:
    state = training.TrainingState(iteration=10, positions=((80, 8), (82, 10)))
    assert [training.positions_of(state, rank=rank, world=2) for rank in range(2)] == [(80, 8), (82, 10)]
    assert [training.positions_of(state, rank=rank, world=3) for rank in range(3)] == [(54, 6)] * 3


# --- the order ----------------------------------------------------------------------------------------------------

COUNTS = [5, 0, 3, 7, 1, 4, 6]  # persons in each shard


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_shard_comes_once_in_each_epoch_over_all_ranks(world: int) -> None:
    turns = [turn for rank in range(world) for turn in itertools.islice(
        samples.rank_turns(COUNTS, seed=3, rank=rank, world=world), 40)]
    for epoch in range(3):
        assert sorted(turn.part for turn in turns if turn.epoch == epoch) == [0, 2, 3, 4, 5, 6]


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    orders = {tuple(samples.shard_order(20, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_a_pictures_persons_lie_as_far_apart_as_they_can() -> None:
    (window,) = samples.person_order([4] * 100, seed=0, epoch=0, part=0)
    places: dict[int, list[int]] = {}
    for place, (picture, _) in enumerate(window):
        places.setdefault(picture, []).append(place)
    gaps = [second - first for each in places.values() for first, second in itertools.pairwise(each)]
    assert len(window) == 400
    assert min(gaps) > 60  # 100 on the average, of 400 places
    assert len({tuple(person for picture, person in window if picture == number) for number in range(100)}) > 10


def test_a_shards_persons_come_once_and_a_picture_lies_in_one_window() -> None:
    counts = [1 + index % 3 for index in range(700)]
    windows = samples.person_order(counts, seed=0, epoch=2, part=1)
    pictures = [{picture for picture, _ in window} for window in windows]
    assert sorted(person for window in windows for person in window) == [
        (picture, person) for picture, count in enumerate(counts) for person in range(count)]
    assert [len(each) for each in pictures] == [256, 256, 188]
    assert sum(map(len, pictures)) == 700


@pytest.mark.parametrize("position", [0, 1, 6, 20, 63, 200])
def test_a_stream_goes_on_the_same_from_any_position(tmp_path: Path, position: int) -> None:
    data = made_shards(tmp_path, num_shards=4)
    whole = list(itertools.islice(stream(data), position + 30))
    assert list(itertools.islice(stream(data, position=position), 30)) == whole[position:]


def test_each_person_comes_once_in_each_epoch_over_two_ranks(tmp_path: Path) -> None:
    data = made_shards(tmp_path, num_shards=4)
    total = sum(samples.trainable_counts(data))
    both = [list(itertools.islice(stream(data, rank=rank, world=2), 3 * total)) for rank in range(2)]
    epochs = [sorted(who for each in both for epoch, who in each if epoch == number) for number in range(2)]
    assert len(set(epochs[0])) == total == len(epochs[0])
    assert epochs[1] == epochs[0]


def test_another_seed_gives_another_order_and_other_crops(tmp_path: Path) -> None:
    data = made_shards(tmp_path, num_shards=1)
    recipe = replace(RECIPE, augmentation=Augmentation())
    first, again, other = (next(samples.turn_samples(data, samples.Turn(0, 0, 0, 0), replace(recipe, seed=seed)))
                           for seed in (0, 0, 1))
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["annotation_id"] != other["annotation_id"]).any()
    assert (first["crop"] != other["crop"]).any()


def test_a_recipes_margin_keeps_joints_that_the_crop_cuts_off(tmp_path: Path) -> None:
    data = made_shards(tmp_path, num_shards=1)
    tight = replace(RECIPE, padding_wh=(0.5, 0.5))
    cut, kept, whole = (next(samples.turn_samples(data, samples.Turn(0, 0, 0, 0), recipe))["visible"] > 0
                        for recipe in (tight, replace(tight, margin_px=64), replace(RECIPE, padding_wh=(9.0, 9.0))))
    assert (kept == whole).all()  # a box of twice the crop's sides reaches half of them, 32 px, beyond it
    assert cut.sum() < kept.sum()


def test_more_ranks_than_shards_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"7 workers need .* has 6.*--images-per-shard"):
        next(samples.rank_turns(COUNTS, seed=0, rank=0, world=7))


def test_data_without_anybody_to_train_on_are_refused(tmp_path: Path) -> None:
    data = made_shards(tmp_path, num_shards=1)
    empty = replace(data, parts=tuple(replace(part, counts=part.counts | {"trainable": 0}) for part in data.parts))
    with pytest.raises(DataError, match="no person to train on"):
        samples.trainable_counts(empty)


def test_a_picture_that_does_not_decode_leaves_its_slots_out_and_nothing_else(tmp_path: Path) -> None:
    data = made_shards(tmp_path, num_shards=2)
    broken = made_shards(tmp_path, num_shards=2, broken="000003.jpg")
    lost = {who for _, who in stream_epoch(data)} - {who for _, who in stream_epoch(broken)}
    good = [(slot, who) for slot, who in stream_epoch(data) if who not in lost]
    assert lost
    assert stream_epoch(broken) == good


def test_a_shard_of_which_nobody_can_be_cropped_is_refused_where_all_of_it_was_tried(tmp_path: Path) -> None:
    data = made_shards(tmp_path, num_shards=12, broken="000003.jpg")
    [number] = [number for number, part in enumerate(data.parts)
                if shards.read_part(data, part)["key"].to_pylist() == ["000003.jpg"]]
    named = f"none of the {samples.trainable_counts(data)[number]} persons in {data.parts[number].name} can be cropped"
    with pytest.raises(DataError, match=named):
        list(samples.turn_samples(data, samples.Turn(0, number, 50, 0), RECIPE))
    assert list(samples.turn_samples(data, samples.Turn(0, number, 51, 1), RECIPE)) == []


def test_a_shards_samples_come_in_blocks_of_bounded_size_and_each_picture_is_decoded_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(samples, "BLOCK_SAMPLES", 5)
    monkeypatch.setattr(samples, "decode_picture", lambda data: (decoded.append(data), decode_picture(data))[1])
    data = made_shards(tmp_path, num_shards=1)
    (count,) = samples.trainable_counts(data)
    sizes = [len(block["crop"]) for block in samples.turn_samples(data, samples.Turn(0, 0, 0, 0), RECIPE)]
    assert sizes == [5] * (count // 5) + [count % 5] * (count % 5 > 0)
    assert len(decoded) == len(set(decoded)) == 12


def test_crowds_unlabelled_persons_and_those_of_refused_pictures_are_not_trained_on(tmp_path: Path) -> None:
    data = made_shards(tmp_path, num_shards=1)
    table = shards.read_part(data, data.parts[0])
    rows = [row | {"size": row["bytes"] and len(row["bytes"])} for row in table.to_pylist()]
    refused = rows[3] | {"bytes": None, "reason": "corrupt", "error": "cut off"}
    crowd, unlabelled, blank = (rows[number]["persons"][0] for number in (4, 5, 6))
    crowd["iscrowd"], unlabelled["keypoints"], blank["keypoints"] = True, None, [1.0, 1.0, 0.0] * 17
    part = write_part(Path(data.uri), 9, [*rows[:3], refused, *rows[4:]])
    found = [block["annotation_id"] for block in samples.turn_samples(
        replace(data, parts=(part,)), samples.Turn(0, 0, 0, 0), RECIPE)]
    theirs = {person["annotation_id"] for person in (*refused["persons"], crowd, unlabelled, blank)}
    assert len(theirs) > 3
    assert sum(map(len, found)) == part.counts["trainable"]
    assert not theirs & set(np.concatenate(found).tolist())


def test_the_digest_of_data_follows_their_rows_and_not_their_place(tmp_path: Path) -> None:
    data = made_shards(tmp_path, num_shards=2)
    dropped = [{"part": None, "key": "b.jpg", "why": "asked"}, {"part": "p", "key": "a.jpg", "why": "asked"}]

    def digest(rows: list[dict[str, Any]], **changes: Any) -> str:
        return samples.dataset_digest(replace(data, dropped=pa.Table.from_pylist(rows, DROPPED), **changes))

    plain = digest([])
    assert digest([], uri="s3://elsewhere", version=7, json={}) == plain
    assert digest(dropped) == digest(dropped[::-1]) != plain
    first, second = data.parts
    others = [digest(dropped[:1]), digest([dropped[0] | {"part": "p"}]), digest([], parts=(first,)),
              digest([], parts=(first, replace(second, sha256="0" * 64)))]
    assert len({plain, digest(dropped), *others}) == 6


def test_a_task_is_as_large_for_a_stream_that_goes_on_within_a_shard() -> None:
    counts = [600, 600, 600]
    turns = samples.rank_turns(counts, seed=0, rank=0, world=1, position=590)
    groups = samples.group_turns(turns, counts, num_samples=1000)
    assert [[turn.skip for turn in group] for group in groups] == [[590, 0], [0]]  # 10 + 600, 600


def test_tiny_shards_share_a_task_until_it_is_worth_one() -> None:
    turns = samples.rank_turns([200, 300, 100], seed=0, rank=0, world=1)
    groups = samples.group_turns(turns, [200, 300, 100], num_samples=2000)
    sizes = [sum([200, 300, 100][turn.part] for turn in group) for group in groups]
    assert all(size >= 512 for size in sizes[:-1])
    assert 2000 <= sum(sizes) < 2300


# --- small worlds -------------------------------------------------------------------------------------------------

RECIPE = samples.SampleRecipe(COCO17, (64, 64), (1.09, 1.135), None, seed=0)


def random_batch() -> training.TrainingBatch:
    chance = torch.Generator().manual_seed(1)
    return training.TrainingBatch(
        torch.randint(0, 256, (3, 64, 64, 3), generator=chance, dtype=torch.uint8),
        torch.rand((3, 17, 2), generator=chance) * 63, torch.randint(0, 3, (3, 17), generator=chance),
        torch.tensor([500, 501, 502]))


def step(network: MSPN, optimiser: torch.optim.Optimizer, batch: training.TrainingBatch, iteration: int,
         rate: float) -> training.StepReport:
    return training.train_step(network, optimiser, batch, iteration=iteration, rate=rate, spec=SPEC)


def assert_close_where_the_gradient_is_clear(found: torch.Tensor, expected: torch.Tensor,
                                             gradient: torch.Tensor) -> None:
    # biases before batch norms have gradients of rounding errors alone, and Adam makes a step of either sign of them
    clear = gradient.abs() > 1e-3 * gradient.abs().max().clamp_min(1.0)
    torch.testing.assert_close(found[clear], expected[clear], rtol=0, atol=1e-5)


def made_shards(folder: Path, *, num_shards: int, broken: str | None = None) -> shards.ShardDataset:
    """A shard dataset of 12 made pictures, written without Ray; `broken` is truncated."""
    world = write_pictures(folder / "pictures")
    annotations = parse_annotations((world / "annotations.json").read_bytes(), source="made")
    output = folder / f"shards-{num_shards}-{broken}"
    (output / shards.FOLDER).mkdir(parents=True, exist_ok=True)
    rows = [made_row(world / "images" / name, image) for name, image in sorted(annotations.images.items())]
    for row in rows:
        if row["key"] == broken:
            row["bytes"] = row["bytes"][:len(row["bytes"]) // 2]
    parts = [write_part(output, index, rows[index::num_shards]) for index in range(num_shards)]
    (output / shards.version_name(1)).write_bytes(shards.dataset_json(
        parts, version=1, skeleton=COCO17, source={}, counts={}))
    return shards.open_shards(str(output))


def made_row(path: Path, image: Any) -> dict[str, Any]:
    planned = {"key": path.name, "etag": "1", "size": path.stat().st_size}
    return shards.shard_row(planned, image, path.read_bytes, read_header, max_bytes=10**9)


def write_part(output: Path, index: int, rows: list[dict[str, Any]]) -> shards.ShardPart:
    data = shards.part_bytes(rows)
    name = f"part-{index:07d}-00000000.parquet"
    (output / shards.FOLDER / name).write_bytes(data)
    return shards.ShardPart(name, hashlib.sha256(data).hexdigest(), shards.count_rows(rows))


def blocks_of(data: shards.ShardDataset, *, rank: int = 0, world: int = 1, position: int = 0) -> Any:
    turns = samples.rank_turns(samples.trainable_counts(data), seed=0, rank=rank, world=world, position=position)
    return ((turn, block) for turn in turns for block in samples.turn_samples(data, turn, RECIPE))


def stream(data: shards.ShardDataset, **place: int) -> Any:
    """(epoch, annotation id) of one rank, person by person."""
    return ((turn.epoch, int(who)) for turn, block in blocks_of(data, **place) for who in block["annotation_id"])


def stream_epoch(data: shards.ShardDataset) -> list[tuple[int, int]]:
    """(slot, annotation id) of epoch 0."""
    first = itertools.takewhile(lambda each: each[0].epoch == 0, blocks_of(data))
    return [(int(slot), int(who)) for _, block in first
            for slot, who in zip(block["slot"], block["annotation_id"], strict=True)]


class Run:
    """Training without Ray: what a rank of one does."""

    def __init__(self, data: shards.ShardDataset) -> None:
        torch.manual_seed(0)
        self.data, self.network = data, MSPN(TINY).train()
        self.optimiser = training.make_optimiser(self.network, weight_decay=1e-5)
        self.iteration, self.positions = 0, (0,)

    def train(self, iterations: int) -> None:
        schedule = training.Schedule(1e-2, 8, 2, 0.1)
        blocks = (block for _, block in blocks_of(self.data, position=self.positions[0]))
        batches = mixture.mixed_batches([blocks], [1.0], batch_size=5, positions=self.positions)
        for batch in itertools.islice(batches, iterations):
            self.iteration += 1
            self.positions = mixture.positions_after(self.positions, batch)
            step(self.network, self.optimiser, training.as_batch(batch, torch.device("cpu")), self.iteration,
                 training.learning_rate(self.iteration, schedule))

    def state(self) -> bytes:
        return training.state_bytes(self.network, self.optimiser,
                                    training.TrainingState(self.iteration, (self.positions,)))

    def load(self, data: bytes) -> None:
        state = training.load_state(data, self.network, self.optimiser)
        self.iteration, self.positions = state.iteration, state.positions[0]
