"""How far a run of `annotate` is: for people, in one line that is renewed on a terminal, or as log lines elsewhere."""

import logging
import sys
import time
from typing import Any

from jobs.metrics import RunMetrics
from pipeline.errors import DataError
from pipeline.unit_annotator import COMMITTED, FAILED, Receipt
from pipeline.units import total_counts

logger = logging.getLogger("jobs.annotate")
LOG_EVERY_S = 10.0
SHOW_EVERY_S = 0.5


class Progress:
    """Adds up receipts, tells people, and stops the run (DataError) when too many pictures are refused.

    units   to be done by this run
    budget  pictures that may be rejected
    output  the run's, by which Ray's metrics name it
    """

    def __init__(self, units: int, *, budget: float, output: str) -> None:
        self._metrics = RunMetrics(output)
        self.units, self.budget = units, budget
        self.answered: set[int] = set()  # units with a receipt that says more than that they failed
        self.failed: dict[int, Receipt] = {}
        self.failures_in_a_row = 0
        self.counts: dict[str, Any] = {}
        self.committed = 0
        self._terminal = sys.stderr.isatty()
        self._told = time.monotonic()
        self._began = self._began_units = time.time()

    def add(self, receipt: Receipt) -> None:
        """Count one unit's receipt."""
        if receipt.outcome == FAILED:
            self.failed[receipt.unit] = receipt
            self.failures_in_a_row += 1
            return
        self.failures_in_a_row = 0
        if not self.answered:
            self._began_units = receipt.began  # before that, the pool started
        self.failed.pop(receipt.unit, None)
        self.answered.add(receipt.unit)
        if receipt.outcome == COMMITTED:
            self.committed += 1
            self.counts = total_counts([self.counts, receipt.counts])
        self._metrics.tell(self.so_far())
        refuse_too_many_rejected(self.counts, self.budget)
        self._tell()

    def so_far(self) -> dict[str, Any]:
        """What this run has done: units of units, pictures, persons, rejected, persons/s, seconds left."""
        seconds = max(time.time() - self._began_units, 1e-3)
        done = len(self.answered)
        return {"units_done": done, "units": self.units, "seconds": round(time.time() - self._began, 1),
                **{name: self.counts.get(name, 0) for name in ("pictures", "persons", "rejected", "reused")},
                "persons_per_s": round(self.counts.get("computed", 0) / seconds, 2),
                "seconds_left": round(seconds / done * (self.units - done)) if done else None}

    def _tell(self) -> None:
        now, last = time.monotonic(), len(self.answered) == self.units
        if now - self._told < (SHOW_EVERY_S if self._terminal else LOG_EVERY_S) and not last:
            return
        self._told = now
        values = self.so_far()
        left = values["seconds_left"]
        copied = f" ({values['reused']} copied)" if values["reused"] else ""
        line = (f"{values['units_done']} of {values['units']} units, {values['pictures']} pictures{copied}, "
                f"{values['persons_per_s']:.1f} persons/s, {values['rejected']} rejected, "
                f"about {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        if self._terminal:
            print(f"\r{line}\x1b[K", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            logger.info("%s", line)


def refuse_too_many_rejected(counts: dict[str, Any], budget: float) -> None:
    """End the run (DataError) once more pictures were rejected than the budget allows, with the commonest reasons."""
    if counts.get("rejected", 0) > budget:
        reasons = sorted(counts["reasons"].items(), key=lambda item: -item[1])[:3]
        raise DataError(f"{counts['rejected']} pictures were rejected, more than the {budget:g} that "
                        f"max_rejected_share allows; commonest: {', '.join(f'{name} {n}' for name, n in reasons)}. "
                        "What is committed stays; mend the input, or allow more by --set max_rejected_share=1.")
