"""The Ray Data actor pools of `annotate`: units in, receipts out. A unit that ends its actor twice gives none."""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from jobs.start_ray import NO_CORES, node_cpus, num_gpus
from pipeline.boxes import DETECT
from pipeline.errors import ConfigError
from pipeline.unit_annotator import Receipt, UnitAnnotator
from pipeline.unit_detector import DetectedUnit, UnitDetector
from pipeline.units import FrozenJob

logger = logging.getLogger("jobs.annotate")
# More than a spot machine is taken away in a weekend; a unit is tried twice whatever this is. Bounded, so that what
# ends an actor at its start doesn't do so for ever
ACTOR_RESTARTS = 50
DECODER = "pipeline.images"


@dataclass(frozen=True)
class UnitTask:
    """A unit to annotate, and the parts of the reused output that may hold its pictures."""

    unit: int
    earlier_parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class PoolSizes:
    """How many actors annotate, and how many detect before them (0: nobody); what each takes of the cluster."""

    annotators: int
    detectors: int
    cpus: float  # of each
    gpus: int  # of each that annotates


def annotate_units(output: str, job: FrozenJob, tasks: Iterable[UnitTask], *, pool: PoolSizes, reuse: str | None,
                   careful: bool = False) -> Iterator[Receipt]:
    """Annotate the units in an actor pool; their receipts, as they come. `careful`: decode in processes apart.

    Where a detector makes the boxes, it has a pool of its own, before the annotators'.
    A unit that ended its actor twice, as a picture can on which the decoder crashes, has no receipt.
    Raises OSError if the pools themselves could not go on.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a unit that kills its process costs itself; it stays uncommitted
    rows = [{"task": json.dumps(asdict(task))} for task in tasks]
    settings = {"output": output, "job": job, "careful": careful, "decoder": DECODER, "reuse": reuse}
    # the unit is the row: nothing that Ray merges or splits can break what belongs together
    units = ray.data.from_items(rows, override_num_blocks=len(rows))
    if pool.detectors:
        units = _through_actors(units, DetectingActor, settings, actors=min(pool.detectors, len(rows)),
                                num_cpus=pool.cpus)
    receipts = _through_actors(units, AnnotatingActor, settings, actors=min(pool.annotators, len(rows)),
                               num_cpus=pool.cpus, num_gpus=pool.gpus)
    try:
        for batch in receipts.iter_batches(batch_size=None):
            yield from (Receipt(**json.loads(text)) for text in batch["receipt"])
    except ray.exceptions.RayError as error:
        raise OSError(f"the actors that annotate {output} could not go on; what is committed stays, and the "
                      f"same command continues. {error}") from error


def pool_sizes(job: FrozenJob, *, actors: int | None, detectors: int | None) -> PoolSizes:
    """How many actors there are; `actors`, `detectors`: as the user says, otherwise as many as there are cores for."""
    threads, detecting = job.intent["threads"], job.intent["boxes"]["kind"] == DETECT
    nodes = node_cpus()
    slots = sum(cpus // threads for cpus in nodes)
    if actors is None and not sum(nodes):
        raise ConfigError(NO_CORES)
    if sum(nodes) and not slots:
        logger.warning("each actor takes %d threads, and no node of the cluster has so many cores: this waits for one "
                       "that has. Otherwise set threads to fewer, in a new --output.", threads)
    if job.intent["backend"] == "cuda":
        annotators = actors or max(1, num_gpus())
        found = detectors or max(1, slots - annotators)
    else:
        # a small detector takes 20 ms of a core for a picture, a pose network on a CPU 100 ms and more for a person
        annotators = actors or max(1, slots - slots // 4 if detecting else slots)
        found = detectors or max(1, slots // 4)
    found = found if detecting else 0
    # less than a whole CPU for each thread: actors that take every CPU leave none to Ray Data, which then waits
    cpus = 0.9 * threads * min(1.0, slots / (annotators + found)) if detecting and slots else 0.9 * threads
    return PoolSizes(annotators, found, cpus, 1 if job.intent["backend"] == "cuda" else 0)


def _through_actors(units: Any, actor: type, settings: dict[str, Any], *, actors: int, num_cpus: float,
                    num_gpus: int = 0) -> Any:
    import ray

    return units.map_batches(
        actor, batch_size=1, fn_constructor_kwargs=settings, compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=ACTOR_RESTARTS, max_task_retries=1)


class DetectingActor:
    """One UnitDetector in an actor of its own."""

    def __init__(self, **settings: Any) -> None:
        self.detector = UnitDetector(**settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Detect on one unit (`task` [1], JSON of a UnitTask): the same task, and JSON of a DetectedUnit."""
        task = UnitTask(**json.loads(batch["task"][0]))
        detected = self.detector.detect(task.unit, task.earlier_parts)
        return {"task": [batch["task"][0]], "detected": [json.dumps(detected.to_json())]}


class AnnotatingActor:
    """One UnitAnnotator in an actor of its own."""

    def __init__(self, **settings: Any) -> None:
        self.annotator = UnitAnnotator(**settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Annotate and commit one unit (`task` [1], and `detected` [1] behind a DetectingActor); its receipt."""
        task = UnitTask(**json.loads(batch["task"][0]))
        detected = DetectedUnit.from_json(json.loads(batch["detected"][0])) if "detected" in batch else DetectedUnit()
        receipt = detected.failure or self.annotator.annotate(task.unit, task.earlier_parts, detected.boxes)
        return {"receipt": [json.dumps(asdict(receipt))]}
