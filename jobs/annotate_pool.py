"""The Ray Data actor pools of `annotate`: units in, receipts out. A unit that ends its actor twice gives none.

What an actor had in hand when its process ended it does again with care, and some units more: so a picture that kills
the decoder costs one restart, and where there are many of them, not each does.
"""

import itertools
import json
import logging
import warnings
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.start_ray import NO_CORES, node_cpus, node_gpus, num_gpus
from pipeline.boxes import DETECT
from pipeline.errors import ConfigError
from pipeline.freed_memory import keep_freed_memory
from pipeline.unit_annotator import Receipt, UnitAnnotator
from pipeline.unit_decoder import UNIT_BYTES, DecodedUnit, UnitDecoder
from pipeline.units import FrozenJob

logger = logging.getLogger("jobs.annotate")
# Of actors: without bound, since one that has used up its restarts is not replaced, and when all have, Ray Data waits.
# A unit is tried twice whatever this is. Where actors end at each start nothing moves, and Ray Data gives up after
# half an hour
RESTARTS = -1
UNITS_IN_HAND = 2  # of an actor, the one at work and the next: Ray Data's own default
CAREFUL_UNITS = 20  # after a restart: where one picture kills, more may; care costs a unit 0.7 s, a restart 4 and more
DECODER = "pipeline.images"


@dataclass(frozen=True)
class UnitTask:
    """A unit to annotate, and the parts of the reused output that may hold its pictures."""

    unit: int
    earlier_parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class PoolSizes:
    """How many actors annotate, how many decode for them (0: nobody); what each takes of the cluster.

    decoders  that read, decode and crop; where a detector makes the boxes, it is in these
    cpus      of each; of an annotator with a GPU that others decode for: none
    gpus      of each that annotates
    """

    annotators: int
    decoders: int
    cpus: float
    gpus: int


def annotate_units(output: str, job: FrozenJob, tasks: Iterable[UnitTask], *, pool: PoolSizes, reuse: str | None,
                   careful: bool = False) -> Generator[Receipt]:
    """Annotate the units in an actor pool; their receipts, as they come. `careful`: decode all in processes apart.

    Where others decode, they have a pool of their own, before the annotators'; with care only those that detect have.
    A unit that ended its actor twice, as a picture can on which the decoder crashes, has no receipt.
    Raises OSError if the pools themselves could not go on.
    """
    import ray
    from ray.data.exceptions import ExecutionTimeoutError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a unit that kills its process costs itself; it stays uncommitted
    rows = [{"task": json.dumps(asdict(task))} for task in tasks]
    settings = {"output": output, "job": job, "careful": careful, "decoder": DECODER, "reuse": reuse}
    # the unit is the row: nothing that Ray merges or splits can break what belongs together
    units = ray.data.from_items(rows, override_num_blocks=len(rows))
    decoders = 0 if careful and not _detecting(job) else pool.decoders
    if decoders:
        # two units for each annotator, one for each decoder. Ray's own bound is half of all nodes' object stores, and
        # what waits lies on those that decode alone, which would spill it to their disks
        units.context.execution_options.resource_limits = ray.data.ExecutionResources(
            object_store_memory=UNIT_BYTES * (2 * pool.annotators + decoders))
        units = _through_actors(units, DecodingActor, settings, actors=min(decoders, len(rows)), num_cpus=pool.cpus)
    # no core then: those that decode come first, and could take the last one of the machine that has the GPU
    needs_no_core = decoders and pool.gpus
    receipts = _through_actors(units, AnnotatingActor, settings, actors=min(pool.annotators, len(rows)),
                               num_cpus=0 if needs_no_core else pool.cpus, num_gpus=pool.gpus)
    try:
        for batch in receipts.iter_batches(batch_size=None):
            yield from (Receipt(**json.loads(text)) for text in batch["receipt"])
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        raise OSError(f"the actors that annotate {output} could not go on; what is committed stays, and the "
                      f"same command continues. {error}") from error


def pool_sizes(job: FrozenJob, *, actors: int | None, detectors: int | None = None,
               decoders: int | None = None) -> PoolSizes:
    """How many actors there are; `actors`, `detectors`, `decoders`: as the user says, otherwise as fit in the nodes."""
    threads, nodes = job.intent["threads"], node_cpus()
    slots = sum(cpus // threads for cpus in nodes)
    if actors is None and not sum(nodes):
        raise ConfigError(NO_CORES)
    if sum(nodes) and not slots:
        logger.warning("each actor takes %d threads, and no node of the cluster has so many cores: this waits for one "
                       "that has. Otherwise set threads to fewer, in a new --output.", threads)
    asked = detectors if _detecting(job) else decoders
    if job.intent["backend"] == "cuda":
        return PoolSizes(actors or max(1, num_gpus()), _decoders_beside_gpus(job, slots) if asked is None else asked,
                         0.9 * threads, 1)
    # a small detector takes 20 ms of a core for a picture, a pose network on a CPU 100 ms and more for a person
    ahead = asked or (max(1, slots // 4) if _detecting(job) else 0)
    annotators = actors or max(1, slots - ahead)
    # less than a whole CPU for each thread: actors that take every CPU leave none to Ray Data, which then waits
    cpus = 0.9 * threads * min(1.0, slots / (annotators + ahead)) if ahead and slots else 0.9 * threads
    return PoolSizes(annotators, ahead, cpus, 0)


def _decoders_beside_gpus(job: FrozenJob, slots: int) -> int:
    if _detecting(job):
        return max(1, slots)
    # a GPU's own machine decodes for it, until there are others; then these cores would lie idle, were they not counted
    apart = any(cpus >= job.intent["threads"] and not gpus for cpus, gpus in zip(node_cpus(), node_gpus(), strict=True))
    return slots if apart else 0


def _detecting(job: FrozenJob) -> bool:
    return bool(job.intent["boxes"]["kind"] == DETECT)


def _through_actors(units: Any, actor: type, settings: dict[str, Any], *, actors: int, num_cpus: float,
                    num_gpus: int = 0) -> Any:
    import ray

    # Arrow: the other formats copy what a row holds, or read it as something else
    return units.map_batches(
        actor, batch_size=1, batch_format="pyarrow", fn_constructor_kwargs=settings,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=UNITS_IN_HAND), num_cpus=num_cpus,
        num_gpus=num_gpus, max_restarts=RESTARTS, max_task_retries=1)


def was_restarted() -> bool:
    """Whether this actor's process has ended before."""
    import ray

    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Ray's own of what it uses itself
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _care(always: bool) -> Iterator[bool]:
    """For each unit that comes to this actor, whether to decode it in processes apart."""
    careful = itertools.repeat(True) if always else itertools.repeat(True, CAREFUL_UNITS if was_restarted() else 0)
    return itertools.chain(careful, itertools.repeat(False))


class DecodingActor:
    """One UnitDecoder in an actor of its own."""

    def __init__(self, *, careful: bool, **settings: Any) -> None:
        keep_freed_memory()
        self.decoder, self.care = UnitDecoder(**settings), _care(careful)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Decode one unit (`task` [1], JSON of a UnitTask): the same task, and a DecodedUnit as two buffers."""
        task = _task_of(batch)
        unit = self.decoder.decode(task.unit, task.earlier_parts, careful=next(self.care))
        about, crops = unit.to_buffers()
        return pa.table({"task": batch["task"], "decoded": [about], "crops": _one_binary(crops)})


class AnnotatingActor:
    """One UnitAnnotator in an actor of its own."""

    def __init__(self, *, careful: bool, **settings: Any) -> None:
        keep_freed_memory()
        self.annotator, self.care = UnitAnnotator(**settings), _care(careful)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Annotate and commit one unit (`task` [1], and behind a DecodingActor what it gives); its receipt."""
        task, decoded, careful = _task_of(batch), _decoded_of(batch), next(self.care)
        receipt = decoded.failure or self.annotator.annotate(task.unit, task.earlier_parts, decoded.opened(),
                                                             decoded.found, careful=careful)
        return pa.table({"receipt": [json.dumps(asdict(replace(receipt, decoding_s=decoded.seconds)))]})


def _task_of(batch: pa.Table) -> UnitTask:
    return UnitTask(**json.loads(batch["task"][0].as_py()))


def _decoded_of(batch: pa.Table) -> DecodedUnit:
    if "crops" not in batch.column_names:
        return DecodedUnit()
    return DecodedUnit.from_buffers(batch["decoded"][0].as_py(), _memory_of(batch["crops"].chunk(0)))


def _one_binary(values: np.ndarray[Any, Any]) -> pa.Array:
    """One row that is the array's memory; `_memory_of` is the inverse. Neither copies."""
    ends = np.array([0, values.nbytes], np.int64)
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(values.reshape(-1))])


def _memory_of(row: pa.Array) -> pa.Buffer:
    _, ends, data = row.buffers()  # a scalar's as_buffer() copies: 0.4 s of 270 MB
    start, end = np.frombuffer(ends, np.int64)[row.offset:row.offset + 2].tolist()
    return data.slice(start, end - start)
