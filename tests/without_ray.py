"""The jobs as their users run them, but in one process: what Ray would do at once is done one after the other."""

import contextlib
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs import annotate, annotate_pool, plan, promote, shard, shard_tasks
from pipeline.config import PromotionConfig
from pipeline.model import inference
from pipeline.model_reference import FILES
from pipeline.shards import ShardDataset
from pipeline.unit_annotator import Receipt
from pipeline.units import FrozenJob
from pipeline.validation import ValidatedPicture


class InlineWriter:
    """ShardWriter without Ray: a task is a call."""

    def __init__(self, task: shard_tasks.ShardTask, job: Any, **_: object) -> None:
        self.task, self.job = task, job

    def submit(self, unit: int, planned: Any, images: Any) -> None:
        """Write the shard now."""
        shard_tasks.write_shard(self.task, self.job, unit, planned, images)

    def finish(self) -> None:
        """Nothing is left to wait for."""


def annotate_inline(output: str, job: FrozenJob, tasks: Iterable[annotate_pool.UnitTask], *,
                    pool: annotate_pool.PoolSizes, reuse: str | None, careful: bool = False) -> Generator[Receipt]:
    """annotate_units without Ray: an actor is an object."""
    settings: dict[str, Any] = {"output": output, "job": job, "careful": careful, "reuse": reuse}
    decoding = annotate_pool.DecodingActor(**settings) if pool.decoders else None
    annotating = annotate_pool.AnnotatingActor(**settings)
    for task in tasks:
        batch = pa.table({"task": [json.dumps(asdict(task))]})
        receipt = annotating(decoding(batch) if decoding else batch)["receipt"][0].as_py()
        yield Receipt(**json.loads(receipt))


def validate_inline(models: Sequence[Path], data: ShardDataset,
                    rules: PromotionConfig) -> Iterator[list[list[ValidatedPicture]]]:
    """_validated_shards without Ray: an actor is an object."""
    files = [{name: (directory / name).read_bytes() for name in FILES} for directory in models]
    measurement = promote.Measurement(files, data, inference.CPU, rules.precision, threads=1)
    validator = promote.ModelValidator()
    return (validator.validate(measurement, part) for part in range(len(data.parts)))


# (module, name in it, what stands there instead)
WITHOUT_RAY: list[tuple[Any, str, Any]] = [
    *((module, name, instead) for module in (annotate, plan, shard) for name, instead in (
        ("start_ray", contextlib.nullcontext), ("refuse_unshared", lambda **_: None))),
    *((module, "num_cpus", lambda: 1) for module in (annotate, plan, shard)),
    (annotate, "actor_threads", lambda: 1),
    (shard, "ShardWriter", InlineWriter),
    *((module, "num_gpus", lambda: 0) for module in (annotate, annotate_pool, plan)),
    *((module, "annotate_units", annotate_inline) for module in (annotate, plan)),
    (annotate_pool, "was_restarted", lambda: False),
    (annotate_pool, "node_cpus", lambda: [1]),
    (annotate_pool, "node_gpus", lambda: [0]),
    (promote, "start_ray", contextlib.nullcontext),
    (promote, "refuse_unshared", lambda **_: None),
    (promote, "_validated_shards", validate_inline),
    (annotate, "native_precision", lambda *, gpu: inference.native_precision("cuda" if gpu else "cpu")),
    (plan, "num_nodes", lambda: 1),
]
