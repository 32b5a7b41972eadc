"""Several shard datasets in one stream of batches: which of the model's joints each has, and its share of a batch.

Each set has its own stream of samples (`pipeline.samples`). A batch takes the sets in turn, each in proportion, so that
any stretch of batches holds them as the whole training does; it follows from the streams' positions alone.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConfigError
from pipeline.pose.skeleton import Skeleton
from pipeline.samples import Arrays
from pipeline.shards import ShardDataset

logger = logging.getLogger("pipeline.mixture")


@dataclass(frozen=True)
class TrainingSet:
    """One dataset to train on.

    weight  how often one of its persons comes, against those of the other sets
    counts  trainable persons in each of its shards
    joints  for each of the model's joints its index among the dataset's own, -1: the dataset doesn't have it
    """

    dataset: ShardDataset
    weight: float
    counts: tuple[int, ...]
    joints: tuple[int, ...]


def joint_indices(skeleton: Skeleton, own: Skeleton, *, labelled: Sequence[str] | None, uri: str) -> tuple[int, ...]:
    """For each joint of the model's skeleton its index among a dataset's own, by name; -1 where it has none.

    labelled  the joints that the dataset really has labels of, where its list says more; None: all that it lists
    Refused with ConfigError: a name in `labelled` that isn't among its joints, and a dataset that shares no joint.
    """
    unknown = sorted(set(labelled or ()) - set(own.joints))
    if unknown:
        raise ConfigError(f"data {uri}: `joints` names {unknown}, but the dataset's joints are {list(own.joints)}.")
    usable = set(own.joints if labelled is None else labelled)
    indices = tuple(own.joints.index(joint) if joint in usable else -1 for joint in skeleton.joints)
    if max(indices) < 0:
        raise ConfigError(f"data {uri} has none of the model's joints: it has {sorted(usable)}, and the model, by the "
                          f"first --data, {list(skeleton.joints)}. Joints are matched by their names.")
    return indices


def joints_text(skeleton: Skeleton, own: Skeleton, indices: Sequence[int]) -> str | None:
    """What of a dataset's joints the model doesn't learn, and the other way round; None where they are the same."""
    absent = [joint for joint, index in zip(skeleton.joints, indices, strict=True) if index < 0]
    unused = [joint for index, joint in enumerate(own.joints) if index not in indices]
    parts = [f"it doesn't have {', '.join(absent)}, which take no part in its loss" if absent else "",
             f"its {', '.join(unused)} aren't learnt" if unused else ""]
    return "; ".join(filter(None, parts)) or None


def set_shares(sets: Sequence[TrainingSet]) -> list[float]:
    """Each set's share of all samples: its persons times its weight, of the sum over the sets."""
    persons = [one.weight * sum(one.counts) for one in sets]
    return [number / sum(persons) for number in persons]


def next_sets(positions: Sequence[int], shares: Sequence[float], num_samples: int) -> list[int]:
    """From which set each of the next samples comes: always the one that is furthest behind its share.

    positions  how far each set's stream is
    """
    taken = list(positions)
    chosen = []
    for _ in range(num_samples):
        total = sum(taken) + 1
        behind = [share * total - count for share, count in zip(shares, taken, strict=True)]
        chosen.append(max(range(len(taken)), key=behind.__getitem__))
        taken[chosen[-1]] += 1
    return chosen


class SampleQueue:
    """A stream of blocks of samples, of which any number is taken, in order."""

    def __init__(self, blocks: Iterable[Arrays]) -> None:
        self.blocks = iter(blocks)
        self.held: list[Arrays] = []

    def take(self, num_samples: int) -> Arrays:
        """The next samples; StopIteration where the stream ends before."""
        while sum(len(block["slot"]) for block in self.held) < num_samples or not self.held:
            self.held.append(next(self.blocks))
        whole = _joined(self.held)
        self.held = [{name: values[num_samples:] for name, values in whole.items()}]
        return {name: values[:num_samples] for name, values in whole.items()}


def mixed_batches(streams: Sequence[Iterable[Arrays]], shares: Sequence[float], *, batch_size: int,
                  positions: Sequence[int]) -> Iterator[Arrays]:
    """Batches of exactly `batch_size` from the sets' streams, which begin at `positions`; a rest is left out.

    Each has what `pipeline.samples.turn_samples` gives, and `set` int64 [n], the set of each sample.
    """
    queues = [SampleQueue(stream) for stream in streams]
    while True:
        chosen = np.array(next_sets(positions, shares, batch_size))
        try:
            taken = [queue.take(int((chosen == index).sum())) for index, queue in enumerate(queues)]
        except StopIteration:
            return
        # what comes set by set goes where its turn is
        place = np.argsort(np.argsort(chosen, kind="stable"), kind="stable")
        batch = _joined(taken) if len(taken) == 1 else {name: values[place] for name, values in _joined(taken).items()}
        yield batch | {"set": chosen}
        positions = positions_after(positions, batch | {"set": chosen})


def positions_after(positions: Sequence[int], batch: Arrays) -> tuple[int, ...]:
    """How far the sets' streams are once a batch has been taken from them."""
    of_set = [batch["slot"][batch["set"] == index] for index in range(len(positions))]
    return tuple(int(slots[-1]) + 1 if len(slots) else before for slots, before in zip(of_set, positions, strict=True))


def _joined(blocks: Sequence[Arrays]) -> Arrays:
    if len(blocks) == 1:
        return blocks[0]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
