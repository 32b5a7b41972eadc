"""How far a run of `annotate` is: for people, in one line that is renewed on a terminal, or as log lines elsewhere;
and when too many of its pictures are refused for it to go on."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from jobs.metrics import RunMetrics
from pipeline.errors import DataError
from pipeline.shards import NOT_A_PICTURE
from pipeline.unit_annotator import COMMITTED, FAILED, Receipt
from pipeline.units import total_counts
from pipeline.words import clock, counted, ranked

logger = logging.getLogger("jobs.annotate")
LOG_EVERY_S = 10.0
SHOW_EVERY_S = 0.5
QUIET_S = 60.0


@dataclass(frozen=True)
class RejectionBudget:
    """How many of the planned pictures may be rejected: a share, and a number. What is no picture at all by its bytes
    (`not_a_picture`) is counted apart, unless nothing else is there."""

    planned: int
    share: float
    most: int | None = None

    def check(self, counts: dict[str, Any]) -> None:
        """End the run (DataError) once more were rejected than that, with the commonest reasons."""
        reasons = {name: n for name, n in counts.get("reasons", {}).items() if name != NOT_A_PICTURE}
        rejected = sum(reasons.values())
        limits = {"max_rejected_share": self.share * self.planned,
                  "max_rejected": self.planned if self.most is None else self.most}
        name, limit = min(limits.items(), key=lambda item: item[1])
        if rejected > limit:
            more = 1 if name == "max_rejected_share" else rejected
            raise DataError(f"{counted(rejected, 'picture')} rejected, more than the {int(limit)} of {self.planned} "
                            f"that {name} allows; commonest: {ranked(reasons, 3)}. What is committed stays, and each "
                            "row says why (`preview` shows some). Mend the input, or allow more by "
                            f"--set {name}={more}.")
        if self.share < 1 and counts.get("reasons", {}).get(NOT_A_PICTURE, 0) == self.planned:
            raise DataError(f"none of the {self.planned} objects is a picture. Check --input; what is committed stays.")


class Progress:
    """Adds up receipts, tells people, and stops the run (DataError) when too many pictures are refused.

    units   to be done by this run
    budget  of rejected pictures; those of parts that stood before count too (`counting`)
    output  the run's, by which Ray's metrics name it
    """

    def __init__(self, units: int, *, budget: RejectionBudget, output: str) -> None:
        self._metrics = RunMetrics(output)
        self.units, self.budget = units, budget
        self.answered: set[int] = set()  # units with a receipt that says more than that they failed
        self.failed: dict[int, Receipt] = {}
        self.counts: dict[str, Any] = {}
        self._earlier: dict[str, Any] = {}  # of parts that this run didn't make
        self.committed = 0
        self._terminal = sys.stderr.isatty()
        self._told = time.monotonic()
        self._began = self._began_units = self._last = time.time()  # `_last`: the last receipt

    def add(self, receipt: Receipt) -> None:
        """Count one unit's receipt."""
        self._last = time.time()
        if receipt.outcome == FAILED:
            self.failed[receipt.unit] = receipt
            return
        if not self.answered:
            self._began_units = receipt.began  # before that, the pool started
        self.failed.pop(receipt.unit, None)
        self.answered.add(receipt.unit)
        if receipt.outcome == COMMITTED:
            self.committed += 1
            self.counts = total_counts([self.counts, receipt.counts])
        self._metrics.tell(self.so_far())
        self.budget.check(total_counts([self._earlier, self.counts]))
        self._tell()

    def counting(self, earlier: Iterable[dict[str, Any]]) -> AbstractContextManager[None]:
        """While the block runs, count the parts that stood before; a thread reads them, and nobody waits for it."""
        def count(ended: threading.Event) -> None:
            try:
                for counts in earlier:
                    if ended.is_set():
                        return
                    self._earlier = total_counts([self._earlier, counts])
            except (OSError, ValueError) as error:  # the store, or a part that is damaged: sealing will say so
                logger.warning("what earlier runs rejected counts only at the end: %s", error)

        return _beside(count, name="counting parts")

    def telling_of_silence(self) -> AbstractContextManager[None]:
        """While the block runs, say so each minute in which no unit was done: the first ones take long."""
        def watch(ended: threading.Event) -> None:
            while not ended.wait(max(QUIET_S / 60, self._told + QUIET_S - time.monotonic())):
                if time.monotonic() - self._told >= QUIET_S:
                    silent_s, self._told = time.time() - self._last, time.monotonic()
                    self._show(f"{len(self.answered)} of {counted(self.units, 'unit')}; no unit was done for "
                               f"{clock(silent_s)}", last=False)

        return _beside(watch, name="telling of silence")

    def so_far(self) -> dict[str, Any]:
        """What this run has done: units of units, pictures, persons, rejected, persons/s, seconds left."""
        seconds = max(time.time() - self._began_units, 1e-3)
        done = len(self.answered)
        return {"units_done": done, "units": self.units, "committed": self.committed,
                "seconds": round(time.time() - self._began, 1),
                **{name: self.counts.get(name, 0) for name in ("pictures", "persons", "rejected", "reused")},
                "persons_per_s": round(self.counts.get("computed", 0) / seconds, 2),
                "pictures_per_s": round(self.counts.get("pictures", 0) / seconds, 2),
                "seconds_left": round(seconds / done * (self.units - done)) if done else None}

    def _tell(self) -> None:
        now, last = time.monotonic(), len(self.answered) == self.units
        if now - self._told < (SHOW_EVERY_S if self._terminal else LOG_EVERY_S) and not last:
            return
        self._told = now
        values = self.so_far()
        copied = f" ({values['reused']} copied)" if values["reused"] else ""
        time_text = f"done in {clock(values['seconds'])}" if last else f"about {clock(values['seconds_left'])} left"
        self._show(f"{values['units_done']} of {counted(values['units'], 'unit')}, "
                   f"{counted(values['pictures'], 'picture')}{copied}, {values['persons_per_s']:.1f} persons/s, "
                   f"{values['rejected']} rejected, {time_text}", last=last)

    def _show(self, line: str, *, last: bool) -> None:
        if self._terminal:
            print(f"\r{line}\x1b[K", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            logger.info("%s", line)


@contextmanager
def _beside(work: Callable[[threading.Event], None], *, name: str) -> Iterator[None]:
    """While the block runs, a thread works; it is given the event that the block has ended, and is waited for."""
    ended = threading.Event()
    thread = threading.Thread(target=work, args=(ended,), daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
