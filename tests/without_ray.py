"""The jobs as their users run them, but in one process: what Ray would do at once is done one after the other."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from jobs import annotate, annotate_pool, shard, shard_tasks
from pipeline.annotation_input import BoxChoice
from pipeline.unit_annotator import Receipt, UnitAnnotator
from pipeline.units import FrozenJob


class InlineWriter:
    """ShardWriter without Ray: a task is a call."""

    def __init__(self, task: shard_tasks.ShardTask, job: Any, **_: object) -> None:
        self.task, self.job = task, job

    def submit(self, unit: int, planned: Any, images: Any) -> None:
        """Write the shard now."""
        shard_tasks.write_shard(self.task, self.job, unit, planned, images)

    def finish(self) -> None:
        """Nothing is left to wait for."""


def annotate_inline(output: str, job: FrozenJob, choice: BoxChoice, tasks: Iterable[annotate_pool.UnitTask], *,
                    actors: int | None, reuse: str | None, careful: bool = False) -> Iterator[Receipt]:
    """annotate_units without Ray: an actor is an object."""
    annotator = UnitAnnotator(output, job, choice, careful=careful, reuse=reuse)
    for task in tasks:
        yield annotator.annotate(task.unit, task.earlier_parts)


# (module, name in it, what stands there instead)
WITHOUT_RAY: list[tuple[Any, str, Any]] = [
    *((module, name, instead) for module in (annotate, shard) for name, instead in (
        ("start_ray", contextlib.nullcontext), ("num_cpus", lambda: 1), ("refuse_unshared", lambda **_: None))),
    (shard, "ShardWriter", InlineWriter),
    (annotate, "num_gpus", lambda: 0),
    (annotate, "annotate_units", annotate_inline),
]
