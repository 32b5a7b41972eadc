"""Which pictures the page shows: candidates of each kind, kept while the data streams by, and how they are dealt.

A picture's place in the draw is a hash of seed and key. So the same dataset and seed give the same pictures, whatever
the parts' sizes and the order in which they come.
"""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

WORST, BEST, RANDOM = "worst", "best", "random"
QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")
# how many persons a picture has, from and to
GROUPS: dict[str, tuple[int, float]] = {
    "nobody": (0, 0), "1 person": (1, 1), "2-3 persons": (2, 3), "4-9 persons": (4, 9), "10 or more": (10, np.inf)}
TURN = (WORST, RANDOM, BEST, *QUARTERS, *GROUPS, WORST, RANDOM)


class Candidate(NamedTuple):
    """A picture that could be shown, and where its rows are. Of two, the one with the lower `rank` is taken.

    rank          a score, its negative, or a place in the draw
    person_index  the person on whose account it was chosen (its row's); -1: no one in particular
    """

    rank: float
    key: str
    person_index: int
    part: str
    score: float = 0.0


class Lowest:
    """The `size` candidates of the lowest rank among all that were offered."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: list[Candidate] = []

    def offer(self, ranks: Array, candidate: Callable[[int], Candidate]) -> None:
        """Look at n candidates with these ranks [n]; `candidate` makes the i-th, and is called for few.

        Those of one rank come in the order of their keys, as they do in a part.
        """
        possible = np.argsort(ranks, kind="stable")[:self._size]
        if len(self._kept) == self._size:
            possible = possible[ranks[possible] <= self._kept[-1].rank]
        for number in possible.tolist():
            bisect.insort(self._kept, candidate(number))
        del self._kept[self._size:]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Those that are kept, by rank."""
        return tuple(self._kept)


def quarters(persons: Sequence[Candidate]) -> dict[str, tuple[Candidate, ...]]:
    """Persons drawn by chance, cut in four by their score; each quarter in the order of the draw."""
    scores = np.array([person.score for person in persons])
    bounds = np.quantile(scores, (0.25, 0.5, 0.75)) if len(scores) else np.zeros(3)
    cut = np.searchsorted(bounds, scores, side="right")
    return {name: tuple(person for person, own in zip(persons, cut, strict=True) if own == number)
            for number, name in enumerate(QUARTERS)}


def deal(strata: Mapping[str, Iterable[Candidate]], number: int) -> dict[str, list[Candidate]]:
    """So many pictures, none twice, dealt in turns: two to `worst` and `random`, one to each other of the strata.

    A stratum that has no picture left is passed over; fewer come out where there aren't enough.
    """
    waiting = {name: iter(candidates) for name, candidates in strata.items()}
    dealt: dict[str, list[Candidate]] = {name: [] for name in strata}
    taken: set[str] = set()
    while waiting:
        for name in TURN:
            if len(taken) == number:
                return dealt
            if name not in waiting:
                continue
            candidate = next((one for one in waiting[name] if one.key not in taken), None)
            if candidate is None:
                del waiting[name]
            else:
                taken.add(candidate.key)
                dealt[name].append(candidate)
    return dealt
