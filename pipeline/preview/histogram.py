"""Histograms of scores whose range nobody knows before the last part has been read."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FINEST = 0.01  # the narrowest bin; wider ones are FINEST times a power of two while data comes
HALF = 1024  # fine bins on each side of 0
STEPS = (1, 2, 5, 10, 20, 50, 100)  # fine bins in one that is shown
MIN_BINS, MAX_BINS = 10, 32  # shown


@dataclass(frozen=True)
class Bins:
    """Histograms with equal bins, as they are shown: `counts` int [K, n], `low` and `high` their outer edges."""

    counts: Array
    low: float
    high: float


class ScoreHistograms:
    """K histograms of one scale that grow with their data, in 16 KB each.

    When a value is too far out, two bins become one. So the counts follow from the values alone, not from their order
    or from how they come divided. Values that aren't finite are left out.
    """

    def __init__(self, num_histograms: int) -> None:
        self._counts = np.zeros((num_histograms, 2 * HALF), np.int64)
        self._level = 0  # bins are FINEST * 2 ** level wide
        self._sums = np.zeros(num_histograms)
        self._numbers = np.zeros(num_histograms, np.int64)

    def add(self, values: Array) -> None:
        """Count values [n, K], one column for each histogram."""
        values = np.asarray(values, np.float64)
        finite = np.isfinite(values)
        known = np.where(finite, values, 0.0)
        self._sums += known.sum(axis=0)
        self._numbers += finite.sum(axis=0)
        self._make_room(float(np.abs(known).max(initial=0.0)))
        bins = HALF + np.floor(known / FINEST / 2**self._level).astype(np.int64)
        bins += 2 * HALF * np.arange(len(self._counts))
        self._counts += np.bincount(bins[finite], minlength=self._counts.size).reshape(self._counts.shape)

    def _make_room(self, reach: float) -> None:
        while reach / FINEST / 2**self._level >= HALF:
            pairs = self._counts.reshape(len(self._counts), HALF, 2).sum(axis=-1)
            self._counts = np.pad(pairs, ((0, 0), (HALF // 2, HALF // 2)))
            self._level += 1

    def means(self) -> tuple[float | None, ...]:
        """The mean of each histogram's values; None without any."""
        return tuple(float(total / number) if number else None
                     for total, number in zip(self._sums, self._numbers, strict=True))

    def share_below(self, limit: float) -> tuple[float | None, ...]:
        """The share of each one's values below a limit, which is taken down to a bin's edge; None without any."""
        end = HALF + int(np.clip(round(limit / FINEST) >> self._level, -HALF, HALF))
        below = self._counts[:, :end].sum(axis=1)
        return tuple(float(few / number) if number else None
                     for few, number in zip(below, self._numbers, strict=True))

    def bins(self) -> Bins:
        """10 to 32 bins that reach from the lowest to the highest value of all; their edges are round numbers."""
        used = np.flatnonzero(self._counts.any(axis=0)) - HALF
        first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, round(1 / FINEST))
        missing = max(0, MIN_BINS - (end - first))  # where all values are nearly the same
        first, end = first - missing // 2, end + missing - missing // 2
        step = next((one for one in STEPS if _num_bins(first, end, one) <= MAX_BINS), STEPS[-1])
        low, num_bins = first // step, _num_bins(first, end, step)
        fine = self._counts[:, HALF + max(-HALF, low * step):HALF + (low + num_bins) * step]
        before = max(0, -HALF - low * step)
        padded = np.pad(fine, ((0, 0), (before, num_bins * step - before - fine.shape[1])))
        width = FINEST * 2**self._level * step
        return Bins(padded.reshape(len(fine), num_bins, step).sum(axis=2), low * width, (low + num_bins) * width)


def _num_bins(first: int, end: int, step: int) -> int:
    return -(-end // step) - first // step
