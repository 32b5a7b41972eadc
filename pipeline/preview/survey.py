"""One pass over a keypoint dataset, part by part, in memory that doesn't grow with it: what the page counts, and the
candidates for the pictures that it shows.

It knows nothing of storage or pictures.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.export.persons import person_rows, picture_starts
from pipeline.hash_buckets import name_hashes
from pipeline.pose.skeleton import Skeleton
from pipeline.preview.histogram import ScoreHistograms
from pipeline.preview.strata import BEST, GROUPS, RANDOM, WORST, Candidate, Lowest, quarters
from pipeline.rows import NO_PERSON, OK, REJECTED

Array = npt.NDArray[Any]

NUM_PER_REASON = 3  # rejected pictures that are shown of each reason
NUM_DRAWN = 2000  # persons drawn by chance, from which the quarters are cut: their bounds are right to about 2 %


@dataclass(frozen=True)
class _Pictures:
    """P pictures of one part, in order: first rows, keys, status, numbers of persons, places in the draw, all [P]."""

    part: str
    starts: Array
    keys: pa.ChunkedArray
    status: Array
    num_persons: Array
    draw: npt.NDArray[np.uint64]

    def candidate(self, picture: int, rank: float, person_index: int = -1, score: float = 0.0) -> Candidate:
        return Candidate(rank, self.keys[picture].as_py(), person_index, self.part, score)


@dataclass(frozen=True)
class _Persons:
    """n persons: their picture's number in `_Pictures`, person_index and score [n]."""

    pictures: Array
    indices: Array
    scores: Array


class Survey:
    """What is known of a keypoint dataset after some of its parts; in the end it follows from rows and seed alone.

    person_scores, joint_scores  histograms: of all persons, of each joint
    persons_per_picture          number of persons -> how many pictures have so many; rejected ones don't count

    A million persons with 17 joints, in 800 parts on a local disk: 8 s of CPU, 44 MB of memory above the start; the
    whole table takes 10 s and 1,369 MB (benchmarks/preview.py).
    """

    def __init__(self, skeleton: Skeleton, *, num_pictures: int, seed: int) -> None:
        self._joints = [f"{column}_score" for column in skeleton.columns()]
        self._seed = seed
        # as many as are shown of all: then enough are left, whichever of them others take
        self._pictures = {name: Lowest(num_pictures) for name in (WORST, BEST, *GROUPS)}
        self._drawn_persons = Lowest(max(NUM_DRAWN, 100 * num_pictures))
        self._rejected: dict[str, Lowest] = {}
        self.person_scores = ScoreHistograms(1)
        self.joint_scores = ScoreHistograms(skeleton.num_joints)
        self.persons_per_picture: Counter[int] = Counter()

    @property
    def columns(self) -> list[str]:
        """The columns that it needs."""
        return ["key", "status", "reason", "person_index", "score", *self._joints]

    def add(self, part: str, rows: pa.Table) -> None:
        """Take a part's rows, sorted by (key, person_index); a person without a score is a DataError."""
        persons = person_rows(rows)
        pictures = _pictures(part, rows, self._seed)
        self.person_scores.add(persons["score"].to_numpy()[:, None])
        self.joint_scores.add(np.stack([persons[name].to_numpy() for name in self._joints], axis=1))
        self._count_persons(pictures)
        self._offer_pictures(pictures)
        self._offer_rejected(pictures, rows["reason"])
        self._offer_persons(pictures, _Persons(np.repeat(np.arange(len(pictures.keys)), pictures.num_persons),
                                               persons["person_index"].to_numpy(), persons["score"].to_numpy()))

    def strata(self) -> dict[str, tuple[Candidate, ...]]:
        """The candidates of each kind, the first to be taken first."""
        kept = {name: lowest.candidates for name, lowest in self._pictures.items()}
        drawn = self._drawn_persons.candidates
        return kept | {RANDOM: drawn} | quarters(drawn)

    def rejected(self) -> dict[str, tuple[Candidate, ...]]:
        """Some rejected pictures of each reason."""
        return {reason: lowest.candidates for reason, lowest in sorted(self._rejected.items())}

    def _count_persons(self, pictures: _Pictures) -> None:
        numbers, counts = np.unique(pictures.num_persons[pictures.status != REJECTED], return_counts=True)
        self.persons_per_picture.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))

    def _offer_pictures(self, pictures: _Pictures) -> None:
        for name, (fewest, most) in GROUPS.items():
            status = OK if fewest else NO_PERSON
            among = np.flatnonzero((pictures.status == status)
                                   & (pictures.num_persons >= fewest) & (pictures.num_persons <= most))
            self._offer_draw(self._pictures[name], pictures, among)

    def _offer_rejected(self, pictures: _Pictures, reasons: pa.ChunkedArray) -> None:
        rejected = np.flatnonzero(pictures.status == REJECTED)
        own = np.array(reasons.take(pa.array(pictures.starts[rejected])).fill_null("").to_pylist(), object)
        for reason in set(own):
            lowest = self._rejected.setdefault(reason, Lowest(NUM_PER_REASON))
            self._offer_draw(lowest, pictures, rejected[own == reason])

    def _offer_draw(self, lowest: Lowest, pictures: _Pictures, among: Array) -> None:
        ranks = pictures.draw[among].astype(np.float64)
        lowest.offer(ranks, lambda i: pictures.candidate(among[i], ranks[i]))

    def _offer_persons(self, pictures: _Pictures, persons: _Persons) -> None:
        draw = _mixed(pictures.draw[persons.pictures], persons.indices)
        _offer(self._drawn_persons, pictures, persons, draw)
        # one person of each picture, so that a crowd's many don't fill the places
        for name, ranks in ((WORST, persons.scores), (BEST, -persons.scores)):
            _offer(self._pictures[name], pictures, persons, ranks, among=_first_of_each(persons.pictures, ranks))


def _pictures(part: str, rows: pa.Table, seed: int) -> _Pictures:
    starts = picture_starts(rows)
    first = rows.select(["key", "status"]).take(pa.array(starts))
    status = np.array(first["status"].to_pylist(), object)
    num_rows = np.diff(np.append(starts, rows.num_rows))
    return _Pictures(part, starts, first["key"], status, np.where(status == OK, num_rows, 0),
                     name_hashes(first["key"].to_pylist(), seed))


def _offer(lowest: Lowest, pictures: _Pictures, persons: _Persons, ranks: Array, *, among: Array | None = None) -> None:
    among = np.arange(len(ranks)) if among is None else among

    def candidate(number: int) -> Candidate:
        person = among[number]
        return pictures.candidate(persons.pictures[person], float(ranks[person]), int(persons.indices[person]),
                                  float(persons.scores[person]))

    lowest.offer(ranks[among], candidate)


def _mixed(draw: npt.NDArray[np.uint64], indices: Array) -> Array:
    """A place in the draw for each person of a picture (splitmix64's last steps, Steele et al. 2014)."""
    value = draw + np.uint64(0x9E3779B97F4A7C15) * (indices.astype(np.uint64) + np.uint64(1))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)), np.float64)


def _first_of_each(groups: Array, values: Array) -> Array:
    """The number of the lowest value in each group; `groups` ascends."""
    order = np.lexsort((values, groups))
    return np.asarray(order[np.flatnonzero(np.diff(groups[order], prepend=-1))])
