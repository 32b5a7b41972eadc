"""A rank's samples: Ray tasks decode a picture once, cut out all its persons, and hand over uint8 crops and joints."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from jobs.train_task import TrainTask, Worker, augmentation_of
from pipeline import samples
from pipeline.errors import DataError, StorageError
from pipeline.mixture import TrainingSet, mixed_batches, set_shares
from pipeline.model.directory import ModelSpec
from pipeline.samples import Arrays

TASKS_AHEAD = 1000  # planned at once: half a million samples; each is a small object in Ray's store
MAX_FEEDERS = 8  # tasks for each rank at once: about 4,000 samples/s
PREFETCH_BLOCKS = 4
STORE_BYTES = 1 << 30  # of Ray's object store for each rank: 7,000 crops
LOOP_PAUSE_S = 0.1  # two blocks of 64 samples wait at each feeder meanwhile: a quarter of a second's work


def sample_batches(worker: Worker) -> Iterator[Arrays]:
    """The rank's batches from its positions on, endless, made by Ray tasks ahead of their use."""
    shares = set_shares(worker.task.sets)
    streams = [_sample_blocks(worker, index, share) for index, share in enumerate(shares)]
    return mixed_batches(streams, shares, batch_size=worker.task.config.optimiser.batch_size_per_worker,
                         positions=worker.positions)


def _sample_blocks(worker: Worker, index: int, share: float) -> Iterator[Arrays]:
    """The rank's endless stream of one dataset's samples."""
    task, one = worker.task, worker.task.sets[index]
    turns = samples.rank_turns(one.counts, seed=task.config.seed, rank=worker.rank, world=worker.world,
                               position=worker.positions[index])
    optimiser = task.config.optimiser
    while True:
        missing = math.ceil((optimiser.iterations - worker.iteration) * optimiser.batch_size_per_worker * share)
        num_samples = min(max(missing, 1), TASKS_AHEAD * samples.SAMPLES_PER_TASK)
        groups = samples.group_turns(turns, one.counts, num_samples=num_samples)
        yield from _made_by_tasks(worker, one, groups, share)


def _made_by_tasks(worker: Worker, one: TrainingSet, groups: Sequence[Sequence[samples.Turn]],
                   share: float) -> Iterator[Arrays]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # Ray Data ends a pipeline of which nobody takes anything for half an hour, as happens while a network is validated
    context.execution_no_progress_timeout_s = -1
    context.raise_original_map_exception = True  # else of an error of ours only its text arrives
    context.custom_execution_callback_classes = [_pausing_callback()]
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=STORE_BYTES)
    rows = ray.data.from_items([{"turns": samples.turns_text(group)} for group in groups],
                               override_num_blocks=len(groups))
    num_feeders = math.ceil(_num_feeders(worker) * share)
    feeders = ray.data.TaskPoolStrategy(size=min(num_feeders, len(groups)))
    made = rows.map_batches(samples.task_samples, batch_size=1, compute=feeders,  # type: ignore[arg-type]
                            num_cpus=_cpus_of_feeder(worker),
                            fn_kwargs={"data": replace(one.dataset, json={}),
                                       "recipe": replace(recipe_of(worker.task, worker.spec), joints=one.joints)})
    try:
        yield from made.iter_batches(batch_size=None, prefetch_batches=PREFETCH_BLOCKS)
    except ray.exceptions.RayTaskError as error:
        raise _own_error(error) from None


def _own_error(error: Any) -> Exception:
    """What a task has raised, if it is ours, without the lines that Ray Data adds to it."""
    cause: Exception = error.cause
    return type(cause)(str(cause).splitlines()[0]) if isinstance(cause, DataError | StorageError) else error


def _pausing_callback() -> Any:
    """Let Ray Data's loop, a thread of this process, sleep a little each time round.

    It waits for whichever task has a block, and so for nothing while blocks wait for the network: on a busy machine it
    then took a quarter of a core for each dataset, and the interpreter's lock from the thread that trains.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pause(ExecutionCallback):
        """A moment's sleep after each round."""

        def on_execution_step(self, executor: Any) -> None:
            """Ray Data calls this after each round of its loop."""
            time.sleep(LOOP_PAUSE_S)

    return Pause


def _num_feeders(worker: Worker) -> int:
    """The rank's tasks at once, one for each CPU of its share."""
    return int(min(max(_free_cpus(worker), 1), MAX_FEEDERS))


def _cpus_of_feeder(worker: Worker) -> float:
    """A whole CPU for each task of one dataset. Those of several share them, so that all can run at any time: a rank
    waits for each dataset in turn, while full tasks of the others keep their CPUs."""
    free = _free_cpus(worker)
    if free <= 0:
        return 0  # the workers have taken all CPUs, as elastic ones do: tasks that waited for one would never run
    return round(min(max(free, 0.1), 1) / len(worker.task.sets), 3)


def _free_cpus(worker: Worker) -> float:
    """The rank's share of the CPUs that the workers leave; they may be fewer than there will be."""
    import ray

    return (float(ray.cluster_resources().get("CPU", 1)) - worker.world) / worker.world


def recipe_of(task: TrainTask, spec: ModelSpec) -> samples.SampleRecipe:
    """How the settings want a person to become a sample of this model."""
    return samples.SampleRecipe(task.skeleton, spec.input_size_wh, spec.box_padding_wh,
                                augmentation_of(task.config, task.skeleton), task.config.seed,
                                margin_px=spec.loss.margin_px)
