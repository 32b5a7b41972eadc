"""A rank's samples: Ray tasks decode a picture once, cut out all its persons, and hand over uint8 crops and joints."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from jobs.train_task import TrainTask, Worker, augmentation_of
from pipeline import samples
from pipeline.model.directory import ModelSpec
from pipeline.samples import Arrays

TASKS_AHEAD = 1000  # planned at once: half a million samples; each is a small object in Ray's store
MAX_FEEDERS = 8  # tasks for each rank at once: about 4,000 samples/s
PREFETCH_BLOCKS = 4
STORE_BYTES = 1 << 30  # of Ray's object store for each rank: 7,000 crops


def sample_blocks(worker: Worker) -> Iterator[Arrays]:
    """The rank's stream of samples from its position on, endless, made by Ray tasks ahead of their use."""
    task = worker.task
    turns = samples.rank_turns(task.counts, seed=task.config.seed, rank=worker.rank, world=worker.world,
                               position=worker.position)
    optimiser = task.config.optimiser
    while True:
        missing = (optimiser.iterations - worker.iteration) * optimiser.batch_size_per_worker
        num_samples = min(max(missing, 1), TASKS_AHEAD * samples.SAMPLES_PER_TASK)
        yield from _made_by_tasks(worker, samples.group_turns(turns, task.counts, num_samples=num_samples))


def _made_by_tasks(worker: Worker, groups: Sequence[Sequence[samples.Turn]]) -> Iterator[Arrays]:
    import ray.data

    task = worker.task
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=STORE_BYTES)
    rows = ray.data.from_items([{"turns": samples.turns_text(group)} for group in groups],
                               override_num_blocks=len(groups))
    feeders = ray.data.TaskPoolStrategy(size=min(_num_feeders(worker), len(groups)))
    made = rows.map_batches(samples.task_samples, batch_size=1, compute=feeders,  # type: ignore[arg-type]
                            fn_kwargs={"data": replace(task.data, json={}), "recipe": recipe_of(task, worker.spec)})
    yield from made.iter_batches(batch_size=None, prefetch_batches=PREFETCH_BLOCKS)


def _num_feeders(worker: Worker) -> int:
    """The rank's share of the CPUs that the workers leave; they may be fewer than there will be."""
    import ray

    free = ray.cluster_resources().get("CPU", 1) - worker.world
    return int(min(max(free // worker.world, 1), MAX_FEEDERS))


def recipe_of(task: TrainTask, spec: ModelSpec) -> samples.SampleRecipe:
    """How the settings want a person to become a sample of this model."""
    assert task.data.skeleton is not None
    return samples.SampleRecipe(task.data.skeleton, spec.input_size_wh, spec.box_padding_wh,
                                augmentation_of(task.config, task.data.skeleton), task.config.seed)
