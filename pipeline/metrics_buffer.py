"""Metrics that wait until MLflow can be reached: bounded in memory, and as lines of JSON beside a training's output.

The file is for a process that ends before MLflow is back: the next one sends what is in it. It knows no MLflow.
"""

import json
import logging
import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice

from pipeline import storage
from pipeline.errors import StorageError

logger = logging.getLogger("pipeline.tracking")
FOLDER = "_metrics"
MAX_WAITING = 200_000  # values, some 50 MB; the authors' 96,000 iterations have 60,000


@dataclass(frozen=True)
class LoggedMetric:
    """One number of a run: `time_ms` is when it was logged, since 1970."""

    name: str
    value: float
    step: int
    time_ms: int


@dataclass
class MetricsBuffer:
    """The metrics that wait, in order. Where there are too many the oldest are dropped, and counted."""

    most: int = MAX_WAITING
    waiting: deque[LoggedMetric] = field(default_factory=deque)
    dropped: int = 0

    def add(self, metrics: Iterable[LoggedMetric]) -> None:
        """Let some more wait."""
        self.waiting.extend(metrics)
        while len(self.waiting) > self.most:
            self.waiting.popleft()
            self.dropped += 1

    def first(self, count: int) -> list[LoggedMetric]:
        """The oldest ones, which still wait until `forget`."""
        return list(islice(self.waiting, count))

    def forget(self, count: int) -> None:
        """The oldest ones have been sent."""
        for _ in range(count):
            self.waiting.popleft()


def metrics_lines(metrics: Iterable[LoggedMetric]) -> bytes:
    """A line of JSON for each; `read_metrics_lines` is the inverse."""
    return b"".join(json.dumps(asdict(metric)).encode() + b"\n" for metric in metrics)


def read_metrics_lines(lines: bytes) -> list[LoggedMetric]:
    """The metrics of some lines, in their order."""
    return [LoggedMetric(**json.loads(line)) for line in lines.splitlines()]


# --- beside an output ---------------------------------------------------------------------------------------------


def store_waiting(output: str, waiting: Iterable[LoggedMetric]) -> str | None:
    """Let the files of unsent metrics beside an output hold exactly these; the file, or None where none wait.

    A store that can't take them is a warning: they are still in memory.
    """
    lines = metrics_lines(waiting)
    try:
        older = _files(output)
        # a name of its own: what is there is removed only when the new one is
        uri = storage.join(output, FOLDER, f"unsent-{uuid.uuid4().hex[:12]}.jsonl")
        if lines:
            storage.put_if_absent(uri, lines)
        for each in older:
            storage.remove_own(each)
    except StorageError as error:
        logger.warning("metrics that MLflow didn't take could not be stored beside the output either: %s", error)
        return None
    return uri if lines else None


def stored_metrics(output: str) -> list[LoggedMetric]:
    """The metrics that were left beside an output, each once."""
    found = [metric for uri in _files(output) for metric in read_metrics_lines(storage.read_object(uri))]
    return list(dict.fromkeys(found))


def _files(output: str) -> list[str]:
    return [found.uri for found in storage.list_objects(storage.join(output, FOLDER))
            if found.name.startswith("unsent-")]
