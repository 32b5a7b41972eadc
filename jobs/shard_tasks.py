"""The Ray tasks that write shards: one shard a task, a bounded number at once, and what happens when one dies."""

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline import shards, storage
from pipeline.ahead import map_ahead
from pipeline.coco import AnnotatedImage
from pipeline.images import PictureHeader, PictureLimits
from pipeline.isolation import open_decoder
from pipeline.shard_listing import locator
from pipeline.units import FrozenJob

logger = logging.getLogger("jobs.shard")
PROGRESS_EVERY_S = 5
CAREFUL_RETRIES = 3  # of a unit whose decoders run apart: what ends its process then is the machine


@dataclass(frozen=True)
class ShardTask:
    """What a task needs to know to write one shard.

    full            decode each picture, and don't only look at its header
    threads         objects read at once
    decode_seconds  a picture that takes longer hangs
    isolated        read pictures in a child process: one of them has killed or hung the task's own
    decoder         the module that reads them
    """

    images: str
    output: str
    limits: PictureLimits
    full: bool
    threads: int
    decode_seconds: float = 60.0
    isolated: bool = False
    decoder: str = "pipeline.images"


class ShardWriter:
    """Keeps a bounded number of tasks running; a task that kills its process is tried again, with care."""

    def __init__(self, task: ShardTask, job: FrozenJob, *, at_once: int, total: int) -> None:
        import ray

        self.task, self.job, self.at_once, self.total = task, job, at_once, total
        self.remote = ray.remote(num_cpus=1, max_retries=1)(write_shard)
        self.running: dict[Any, tuple[int, Any]] = {}
        self.done = 0
        self.began = self.last = time.monotonic()

    def submit(self, unit: int, planned: pa.Table, images: dict[str, AnnotatedImage | None]) -> None:
        """Start a shard's task, when there is room for it."""
        while len(self.running) >= self.at_once:
            self._wait_for_one()
        work = (self.job, unit, planned, images)
        self.running[self.remote.remote(self.task, *work)] = (unit, work)

    def finish(self) -> None:
        """Wait for all."""
        while self.running:
            self._wait_for_one()

    def _wait_for_one(self) -> None:
        import ray

        ready, _ = ray.wait(list(self.running), num_returns=1)
        unit, work = self.running.pop(ready[0])
        try:
            ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except ray.exceptions.RayError as error:
            if work is None:
                raise OSError(f"shard {unit} could not be written: {error}. What is written stays; run again."
                              ) from error
            logger.warning("shard %d: its process has ended twice (%s); once more, with the pictures read in a process "
                           "of their own", unit, type(error).__name__)
            careful = self.remote.options(max_retries=CAREFUL_RETRIES)
            self.running[careful.remote(replace(self.task, isolated=True), *work)] = (unit, None)
            return
        self.done += 1
        now = time.monotonic()
        if now - self.last >= PROGRESS_EVERY_S or self.done == self.total:
            self.last = now
            logger.info("%d of %d shards, %.0f s", self.done, self.total, now - self.began)


def write_shard(task: ShardTask, job: FrozenJob, unit: int, planned: pa.Table,
                images: dict[str, AnnotatedImage | None]) -> None:
    """Read one shard's pictures, several at once, and commit its part."""
    locate = locator(task.images)
    neighbours = [locate(key) for key in planned["key"].slice(0, 3).to_pylist()]

    with open_decoder(task.limits, isolated=task.isolated, seconds=task.decode_seconds,
                      decoder=task.decoder) as decoder:
        def examine(data: bytes) -> PictureHeader:
            header = decoder.read_header(data)
            if task.full:
                decoder.decode(data)
            return header

        def row(one: dict[str, Any]) -> dict[str, Any]:
            return shards.shard_row(
                one, images.get(one["key"]), examine=examine, max_bytes=task.limits.max_bytes,
                read=lambda: storage.read_object(locate(one["key"]), etag=one["etag"], neighbours=neighbours))

        rows = list(map_ahead(row, planned.to_pylist(), threads=task.threads))
    storage.put_if_absent(storage.join(task.output, shards.FOLDER, job.part_name(unit)), shards.part_bytes(rows))
