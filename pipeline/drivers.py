"""Signs of life that drivers leave at a run's output, for people and for `status`: advisory, never a lock.

Each sign is an object of its own under `_drivers/`, and a driver removes its older ones. The time in it is the
driver's own clock. Nothing depends on these objects: trouble with them is a warning.
"""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage

logger = logging.getLogger("pipeline.drivers")
FOLDER = "_drivers"
INTERVAL_S = 30.0
ALIVE_S = 4 * INTERVAL_S  # late by more than this: gone, or its clock is wrong


@dataclass(frozen=True)
class Sign:
    """A driver's newest sign of life. `at` and `began` are seconds since 1970, `progress` is what it had done."""

    driver: str
    host: str
    pid: int
    began: float
    at: float
    progress: dict[str, Any] = field(default_factory=dict)

    def age_s(self) -> float:
        """Seconds since it was left; a little below 0 where that clock is ahead of ours."""
        return time.time() - self.at

    def alive(self) -> bool:
        """Whether the driver is probably still at work."""
        return abs(self.age_s()) < ALIVE_S


def signs_of_life(output: str) -> list[Sign]:
    """Each driver's newest sign at this output, the oldest first."""
    newest: dict[str, Sign] = {}
    for found in storage.list_objects(storage.join(output, FOLDER)):
        try:
            sign = Sign(**json.loads(storage.read_object(found.uri)))
        except (storage.StorageError, ValueError, TypeError):  # removed meanwhile, or of another program
            continue
        if sign.driver not in newest or newest[sign.driver].at < sign.at:
            newest[sign.driver] = sign
    return sorted(newest.values(), key=lambda sign: sign.at)


class Heartbeat:
    """Leaves a sign every `interval_s` while the block runs, and none once it has ended, unless its process was killed.

    progress  gives what goes into each sign; called by a thread
    """

    def __init__(self, output: str, progress: Callable[[], dict[str, Any]], *, interval_s: float = INTERVAL_S) -> None:
        self.driver = uuid.uuid4().hex[:12]
        self._place, self._progress, self._interval_s = storage.join(output, FOLDER), progress, interval_s
        self._began = time.time()
        self._last: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def __enter__(self) -> "Heartbeat":
        self._leave_sign()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._remove_last()

    def _beat(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._leave_sign()

    def _leave_sign(self) -> None:
        sign = Sign(self.driver, os.uname().nodename, os.getpid(), self._began, time.time(), self._progress())
        name = storage.join(self._place, f"{self.driver}-{time.time_ns()}.json")
        try:
            storage.put_if_absent(name, json.dumps(vars(sign)).encode())
        except storage.StorageError as error:
            logger.warning("no sign of life could be left, which harms nothing: %s", error)
            return
        self._remove_last()
        self._last = name

    def _remove_last(self) -> None:
        if self._last is None:
            return
        try:
            storage.remove_own(self._last)
        except storage.StorageError as error:
            logger.warning("an old sign of life could not be removed, which harms nothing: %s", error)
        self._last = None
