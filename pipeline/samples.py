"""Which person is trained on when, and how a shard's pictures become samples. Needs numpy alone, no torch and no Ray.

Each rank has one endless stream: for epoch 0, 1, 2, ... the shards in that epoch's order, dealt to the ranks in turn;
within a shard all its trainable persons, shuffled. So every person comes once in each epoch over all ranks, and what
comes follows from (data, seed, rank, number of ranks): not from speed, threads, retries or restarts. A person's place
in the stream is its *slot*; a run goes on from the slot after the last one that it trained on.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import ConfigError, DataError
from pipeline.images import PictureRefused, decode_picture
from pipeline.patience import waited_out
from pipeline.pose.augment import Augmentation, TrainingSample, sample_generator, seeded_generator, training_sample
from pipeline.pose.skeleton import Skeleton
from pipeline.shards import ShardDataset, is_trainable, read_part

logger = logging.getLogger("pipeline.samples")

# Persons are shuffled among so many pictures of a shard: about 100 MB of crops, ready after a second. A batch of one
# network step is far smaller.
WINDOW_PICTURES = 256
BLOCK_SAMPLES = 64  # handed over together: 9 MB of crops at 192x256
SAMPLES_PER_TASK = 512  # a Ray task costs some 30 ms: tiny shards are taken several at a time

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Turn:
    """One shard in a rank's stream: its first `skip` persons are left out, the next one has slot `slot`."""

    epoch: int
    part: int
    slot: int
    skip: int


@dataclass(frozen=True)
class SampleRecipe:
    """How a person becomes a sample. `augmentation` None: cropped as at test time, with `padding_wh`.

    joints  for each joint of the skeleton its index among the dataset's own, -1: the dataset doesn't have it;
            None: they are the same
    margin_px  joints so far outside of the crop are taught as well
    """

    skeleton: Skeleton
    input_size_wh: tuple[int, int]
    padding_wh: tuple[float, float]
    augmentation: Augmentation | None
    seed: int
    joints: tuple[int, ...] | None = None
    margin_px: int = 0


# --- the order ----------------------------------------------------------------------------------------------------


def shard_order(num_parts: int, *, seed: int, epoch: int) -> list[int]:
    """The order of the shards in an epoch."""
    order: list[int] = seeded_generator(seed, epoch).permutation(num_parts).tolist()
    return order


def rank_turns(counts: Sequence[int], *, seed: int, rank: int, world: int, position: int = 0,
               uri: str = "the data") -> Iterator[Turn]:
    """One rank's endless stream from a position on; whole shards before it are skipped by their counts alone.

    counts    trainable persons in each shard; shards without any are never read
    position  the slot of the first person wanted
    Refused with ConfigError: more ranks than shards with persons, since a rank would have nothing to do.
    """
    filled = [part for part, count in enumerate(counts) if count]
    if len(filled) < world:
        raise ConfigError(f"{world} workers need at least as many shards with annotated persons, but {uri} has "
                          f"{len(filled)}. Give fewer --workers, or shard again with a smaller --images-per-shard.")
    slot, epoch = 0, 0
    while True:
        for index in shard_order(len(filled), seed=seed, epoch=epoch)[rank::world]:
            part = filled[index]
            if slot + counts[part] > position:
                skip = max(position - slot, 0)
                yield Turn(epoch, part, slot + skip, skip)
            slot += counts[part]
        epoch += 1


def person_order(persons_per_picture: Sequence[int], *, seed: int, epoch: int,
                 part: int) -> list[list[tuple[int, int]]]:
    """A shard's persons as (picture, person) in the order of training, in windows that are decoded one by one.

    Pictures are shuffled, and then the persons of each `WINDOW_PICTURES` of them, so that a picture is decoded once
    for all its persons. Each picture's n persons come at equal distances, an n-th of the window apart, from a random
    place on: merely shuffled, each 32 persons of COCO would hold a pair from one picture (benchmarks/train_input.py).
    """
    generator = seeded_generator(seed, epoch, part)
    pictures = generator.permutation([index for index, count in enumerate(persons_per_picture) if count])
    windows = []
    for start in range(0, len(pictures), WINDOW_PICTURES):
        places: dict[tuple[int, int], float] = {}
        for picture in pictures[start:start + WINDOW_PICTURES].tolist():
            count = persons_per_picture[picture]
            first = generator.random()
            places |= {(picture, person): (first + turn / count) % 1
                       for turn, person in enumerate(generator.permutation(count).tolist())}
        windows.append(sorted(places, key=places.__getitem__))
    return windows


def group_turns(turns: Iterator[Turn], counts: Sequence[int], *, num_samples: int) -> list[list[Turn]]:
    """The next turns of a stream that hold `num_samples` persons, in groups that are worth a task each."""
    groups: list[list[Turn]] = []
    in_group, total = SAMPLES_PER_TASK, 0
    while total < num_samples:
        turn = next(turns)
        if in_group >= SAMPLES_PER_TASK:
            groups.append([])
            in_group = 0
        groups[-1].append(turn)
        in_group += counts[turn.part] - turn.skip
        total += counts[turn.part] - turn.skip
    return groups


def trainable_counts(dataset: ShardDataset) -> list[int]:
    """How many persons of each shard are trained on; DataError where there is none at all."""
    counts = [int(part.counts["trainable"]) for part in dataset.parts]
    if not sum(counts):
        raise DataError(f"{dataset.uri} has no person to train on (none with a labelled joint that isn't a crowd). "
                        "Shard with --annotations that have keypoints.")
    return counts


def dataset_digest(dataset: ShardDataset) -> str:
    """What identifies a shard dataset's live content, wherever it lies: SHA-256 over its parts and dropped rows."""
    digest = hashlib.sha256()
    parts = [(part.name, part.sha256) for part in dataset.parts]
    dropped = zip(dataset.dropped["part"].to_pylist(), dataset.dropped["key"].to_pylist(), strict=True)
    for line in map(repr, [*parts, *sorted((part or "", key) for part, key in dropped)]):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


# --- samples ------------------------------------------------------------------------------------------------------


def turn_samples(dataset: ShardDataset, turn: Turn, recipe: SampleRecipe) -> Iterator[Arrays]:
    """The samples of one turn, in blocks of at most `BLOCK_SAMPLES`, in the stream's order.

    Each block: crop uint8 [n, H, W, 3] BGR; joints_xy float32 [n, K, 2] in crop pixels; visible int8 [n, K];
    annotation_id, slot int64 [n]. A person who can't be cropped (the picture doesn't decode, the box has no extent, no
    labelled joint is the skeleton's) is left out with a warning, and its slot with it; DataError where no person of a
    whole shard can be. A store that is away is waited for (`pipeline.patience`).
    """
    part = dataset.parts[turn.part]
    table = waited_out(lambda: read_part(dataset, part, ["key", "bytes", "reason", "persons"]))
    persons = _trainable_persons(table)
    windows = person_order([len(each) for each in persons], seed=recipe.seed, epoch=turn.epoch, part=turn.part)
    slot, taken = turn.slot - turn.skip, 0
    for window in windows:
        wanted = {slot + index: who for index, who in enumerate(window) if slot + index >= turn.slot}
        slot += len(window)
        for block in _window_blocks(table, persons, wanted, recipe, turn.epoch):
            taken += len(block["slot"])
            yield block
    if not taken and not turn.skip:
        raise DataError(f"{dataset.uri}: none of the {slot - turn.slot} persons in {part.name} can be cropped. Check "
                        "its pictures with `shard --set validate=full`.")


def turns_text(turns: Sequence[Turn]) -> str:
    """Some turns as one string, to travel to a task; `task_samples` reads it."""
    return json.dumps([astuple(turn) for turn in turns])


def task_samples(rows: Mapping[str, Any], data: ShardDataset, recipe: SampleRecipe) -> Iterator[Arrays]:
    """What a task makes of a batch of one row: the samples of its `turns`, block by block.

    It stands here, and not with the worker, so that a process that only makes samples never imports torch.
    """
    for turn in json.loads(str(rows["turns"][0])):
        yield from turn_samples(data, Turn(*turn), recipe)


def _trainable_persons(table: pa.Table) -> list[list[dict[str, Any]]]:
    """Of each row the persons that are trained on; a refused picture has none."""
    rows = zip(table["reason"].to_pylist(), table["persons"].to_pylist(), strict=True)
    return [[person for person in persons or () if is_trainable(person)] if reason is None else []
            for reason, persons in rows]


def _window_blocks(table: pa.Table, persons: Sequence[Sequence[Mapping[str, Any]]],
                   wanted: Mapping[int, tuple[int, int]], recipe: SampleRecipe, epoch: int) -> Iterator[Arrays]:
    """The samples of `wanted` (slot -> (picture, person)) in blocks, each picture decoded once."""
    of_picture: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    for slot, (picture, person) in wanted.items():
        of_picture.setdefault(picture, []).append((slot, persons[picture][person]))
    samples: dict[int, tuple[int, TrainingSample]] = {}
    for picture, each in of_picture.items():
        samples |= _picture_samples(table, picture, each, recipe, epoch)
    slots = sorted(samples)
    for start in range(0, len(slots), BLOCK_SAMPLES):
        some = slots[start:start + BLOCK_SAMPLES]
        yield _block(some, [samples.pop(slot) for slot in some])


def _picture_samples(table: pa.Table, picture: int, persons: Sequence[tuple[int, Mapping[str, Any]]],
                     recipe: SampleRecipe, epoch: int) -> dict[int, tuple[int, TrainingSample]]:
    """slot -> (annotation id, sample), of those persons of one picture who can be cropped."""
    key = table["key"][picture].as_py()
    try:
        image_bgr = decode_picture(table["bytes"][picture].as_py())
    except PictureRefused as error:
        logger.warning("%s: %d persons are left out: the picture is %s: %s", key, len(persons), error.reason, error)
        return {}
    samples = {}
    for slot, person in persons:
        annotation_id = int(person["annotation_id"])
        try:
            samples[slot] = (annotation_id, _person_sample(image_bgr, person, recipe, epoch))
        except DataError as error:
            logger.warning("%s: person %d is left out: %s", key, annotation_id, error)
    return samples


def _person_sample(image_bgr: npt.NDArray[np.uint8], person: Mapping[str, Any], recipe: SampleRecipe,
                   epoch: int) -> TrainingSample:
    return training_sample(
        image_bgr, tuple(person["box_xywh"]), _keypoints(person, recipe.joints),
        skeleton=recipe.skeleton, input_size_wh=recipe.input_size_wh, padding_wh=recipe.padding_wh,
        augmentation=recipe.augmentation, margin_px=recipe.margin_px,
        generator=sample_generator(recipe.seed, epoch, int(person["annotation_id"])))


def _keypoints(person: Mapping[str, Any], joints: tuple[int, ...] | None) -> npt.NDArray[np.float64]:
    """The person's keypoints [K, 3] in the skeleton's order; (0, 0, -1) is a joint that the dataset doesn't have."""
    own = np.array(person["keypoints"], np.float64).reshape(-1, 3)
    if joints is None:
        return own
    keypoints = np.vstack([own, (0.0, 0.0, -1.0)])[list(joints)]
    if not (keypoints[:, 2] > 0).any():
        raise DataError("none of its labelled joints is the model's")
    return keypoints


def _block(slots: Sequence[int], samples: Sequence[tuple[int, TrainingSample]]) -> Arrays:
    return {"crop": np.stack([sample.crop for _, sample in samples]),
            "joints_xy": np.stack([sample.joints_xy for _, sample in samples]),
            "visible": np.stack([sample.visible for _, sample in samples]),
            "annotation_id": np.array([annotation_id for annotation_id, _ in samples], np.int64),
            "slot": np.array(slots, np.int64)}
