"""The Ray Data actor pool of `annotate`: units in, receipts out. A unit that ends its actor twice gives none."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from jobs.start_ray import num_cpus, num_gpus
from pipeline.annotation_input import BoxChoice
from pipeline.unit_annotator import Receipt, UnitAnnotator
from pipeline.units import FrozenJob

ACTOR_RESTARTS = 4
DECODER = "pipeline.images"


@dataclass(frozen=True)
class UnitTask:
    """A unit to annotate, and the parts of the reused output that may hold its pictures."""

    unit: int
    earlier_parts: tuple[str, ...] = ()


def annotate_units(output: str, job: FrozenJob, choice: BoxChoice, tasks: Iterable[UnitTask], *,
                   actors: int | None, reuse: str | None, careful: bool = False) -> Iterator[Receipt]:
    """Annotate the units in an actor pool; their receipts, as they come. `careful`: decode in processes apart.

    A unit that ended its actor twice, as a picture can on which the decoder crashes, has no receipt.
    Raises OSError if the pool itself could not go on.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a unit that kills its process costs itself; it stays uncommitted
    rows = [{"task": json.dumps(asdict(task))} for task in tasks]
    gpu, threads = job.intent["backend"] == "cuda", job.intent["threads"]
    actors = actors or (max(1, num_gpus()) if gpu else max(1, num_cpus() // threads))
    # the unit is the row: nothing that Ray merges or splits can break what belongs together
    receipts = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        AnnotatingActor, batch_size=1,
        fn_constructor_kwargs={"output": output, "job": job, "choice": choice, "careful": careful,
                               "decoder": DECODER, "reuse": reuse},
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(rows))),
        # less than a whole CPU for each thread: actors that take every CPU leave none to Ray Data, which then waits
        num_cpus=0.9 * threads, num_gpus=1 if gpu else 0,
        max_restarts=ACTOR_RESTARTS, max_task_retries=1)
    try:
        for batch in receipts.iter_batches(batch_size=None):
            yield from (Receipt(**json.loads(text)) for text in batch["receipt"])
    except ray.exceptions.RayError as error:
        raise OSError(f"the actors that annotate {output} could not go on; what is committed stays, and the "
                      f"same command continues. {error}") from error


class AnnotatingActor:
    """One UnitAnnotator in an actor of its own."""

    def __init__(self, **settings: Any) -> None:
        self.annotator = UnitAnnotator(**settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Annotate and commit one unit (`task` [1], JSON of a UnitTask); its receipt."""
        task = UnitTask(**json.loads(batch["task"][0]))
        receipt = self.annotator.annotate(task.unit, task.earlier_parts)
        return {"receipt": [json.dumps(asdict(receipt))]}
