"""What each of `train`'s workers does: open, feed, step, look, validate, keep, and at last put the model.

Every rank walks through the same iterations, so that each collective call meets its like on the other ranks. Batches
come from the rank's own Ray Data pipeline, whose tasks decode a picture once and cut out all its persons.
"""

import contextlib
import copy
import io
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pipeline import samples, storage, tracking, training
from pipeline.config import TrainConfig
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import evaluation_metrics
from pipeline.model.directory import ModelSpec, load_model, save_model
from pipeline.model.mspn import MSPN, MSPNConfig, load_trunk
from pipeline.model_reference import download_model, put_model
from pipeline.pose.augment import Augmentation
from pipeline.pose.skeleton import Skeleton
from pipeline.prediction import Predictor
from pipeline.samples import Arrays
from pipeline.shards import ShardDataset
from pipeline.validation import PREVIEWS, ValidatedPicture, evaluate_pictures, preview_sheet, validate_part

logger = logging.getLogger("jobs.train")
STATE_FILE = "state.pt"
INIT_FOLDER = "_init"
REPORT_EVERY = 20  # iterations between metrics, as the authors log, and between looks for a loss that isn't finite
PROGRESS_EVERY_S = 10
TASKS_AHEAD = 1000  # planned at once: half a million samples; each is a small object in Ray's store
MAX_FEEDERS = 8  # tasks for each rank at once: about 4,000 samples/s
PREFETCH_BLOCKS = 4
STORE_BYTES = 1 << 30  # of Ray's object store for each rank: 7,000 crops


@dataclass(frozen=True)
class TrainTask:
    """What every worker is given. `source` is what model.json will say of the model's origin."""

    config: TrainConfig
    data: ShardDataset
    val: ShardDataset | None
    intent: dict[str, Any]
    counts: list[int]  # trainable persons in each shard of `data`
    source: dict[str, Any]
    run_id: str | None


@dataclass
class Worker:
    """What a rank holds while it trains."""

    task: TrainTask
    rank: int
    world: int
    device: torch.device
    spec: ModelSpec
    network: MSPN
    wrapped: torch.nn.Module  # the network, or the wrapper that averages gradients over the ranks
    optimiser: torch.optim.Optimizer
    iteration: int  # done
    position: int  # next slot in the rank's stream


def schedule_of(config: TrainConfig, *, world: int) -> training.Schedule:
    """The rate grows with the number of workers, and so with the whole batch, as the authors have it."""
    optimiser = config.optimiser
    return training.Schedule(optimiser.learning_rate_per_worker * world, optimiser.iterations,
                             optimiser.warmup_iterations, optimiser.warmup_factor)


def train_worker(settings: dict[str, Any]) -> str | None:
    """One rank's training, from the last checkpoint to the model directory; what went wrong, if all ranks agree."""
    import ray.train

    task: TrainTask = settings["task"]
    _log_from_worker()
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.set_num_threads(task.config.threads or _threads())
    try:
        worker = _open_worker(task, rank, world)
    except (ConfigError, DataError) as error:
        return str(error)  # it is the same on all ranks, and no restart would mend it
    failure = None
    with _worker_run(task, rank) as run:
        failure = _train(worker, run)
    return failure


def _train(worker: Worker, run: tracking.Run) -> str | None:
    """The rank's iterations. Metrics are looked at together every few of them, so that none waits for a number."""
    config, schedule = worker.task.config, schedule_of(worker.task.config, world=worker.world)
    batches = samples.cut_batches(_blocks(worker), config.optimiser.batch_size_per_worker)
    progress = Progress(worker, run)
    evaluation: dict[str, float] = {}
    while worker.iteration < schedule.iterations:
        progress.took(_step(worker, progress.waited(batches), schedule))
        due = worker.iteration % config.validate_every == 0 or worker.iteration == schedule.iterations
        if due or worker.iteration % REPORT_EVERY == 0:
            failures = [found for found in _gather(worker, training.divergence(progress.reports)) if found]
            if failures:
                return str(failures[0])
            progress.log_metrics()
        if due:
            evaluation = _validate(worker, run)
            _keep(worker, evaluation)
            progress.restart()
    if worker.task.val is not None and not evaluation:
        evaluation = _validate(worker, run)
    _put(worker, evaluation)
    return None


def _step(worker: Worker, batch: Arrays, schedule: training.Schedule) -> training.StepReport:
    loss = worker.task.config.loss
    worker.iteration += 1
    worker.position = int(batch["slot"][-1]) + 1
    return training.train_step(
        worker.wrapped, worker.optimiser, training.as_batch(batch, worker.device), iteration=worker.iteration,
        rate=training.learning_rate(worker.iteration, schedule), spec=worker.spec, ohkm_joints=loss.ohkm_joints,
        occluded=loss.occluded, bfloat16=worker.task.intent["precision"] == "bfloat16")


# --- opening ------------------------------------------------------------------------------------------------------


def _log_from_worker() -> None:
    """Our own lines with their time; of Ray Data and Ray Train what is a warning."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers, logger.propagate = [lines], False
    logger.setLevel(logging.INFO)
    # Ray Train sets the root to INFO, and logs each report there; Ray Data warns that there is no progress bar
    for noisy, level in ((None, logging.WARNING), ("ray.data", logging.WARNING),
                         ("ray.data._internal.progress", logging.ERROR)):
        logging.getLogger(noisy).setLevel(level)


def _threads() -> int:
    """This worker's share of its machine's cores. Ray sets OMP_NUM_THREADS=1 for a worker of one CPU."""
    import ray.train

    return max(1, (os.cpu_count() or 1) // int(ray.train.get_context().get_local_world_size()))


def _open_worker(task: TrainTask, rank: int, world: int) -> Worker:
    import ray.train.torch

    device = ray.train.torch.get_device()
    network, spec = new_network(task)
    # half as fast again on CPUs
    network = network.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = training.make_optimiser(network, weight_decay=task.config.optimiser.weight_decay)
    state = _restore(network, optimiser) or training.TrainingState(0, (0,) * world)
    if rank == 0 and state.iteration:
        logger.info("going on after iteration %d", state.iteration)
    # as the authors: each rank keeps its own batch norm statistics, and rank 0's are saved
    wrapped = network if world == 1 else torch.nn.parallel.DistributedDataParallel(network, forward_sync_buffers=False)
    return Worker(task, rank, world, device, spec, network, wrapped, optimiser, state.iteration,
                  training.position_of(state, rank=rank, world=world))


def new_network(task: TrainTask) -> tuple[MSPN, ModelSpec]:
    """The network before its first iteration, the same on every rank, and the specification of what it becomes."""
    config, skeleton = task.config, task.data.skeleton
    assert skeleton is not None
    torch.manual_seed(config.seed)
    asked = MSPNConfig(num_joints=skeleton.num_joints, **config.network.model_dump())
    if config.init is not None:
        return _initial_model(task, asked)
    network = MSPN(asked)
    training.scale_heatmaps(network, config.heatmap_scale)
    if config.trunk is not None:
        weights = torch.load(io.BytesIO(storage.read_object(config.trunk)), map_location="cpu", weights_only=True)
        load_trunk(network, weights, colour="BGR")
    return network, ModelSpec(network=asked, skeleton=skeleton.to_json())


def _initial_model(task: TrainTask, asked: MSPNConfig) -> tuple[MSPN, ModelSpec]:
    """The model of `init`, whose architecture is taken unless the settings give one."""
    assert task.data.skeleton is not None
    with tempfile.TemporaryDirectory() as folder:
        network, spec = load_model(download_model(storage.join(task.config.output, INIT_FOLDER), Path(folder)))
    other = "network" in task.config.model_fields_set and network.config != asked
    if other or tuple(spec.skeleton["joints"]) != task.data.skeleton.joints:
        raise ConfigError(f"init {task.config.init}: it is {network.config} for the joints of {spec.skeleton['name']}, "
                          f"but asked for is {asked} for those of {task.data.skeleton.name}. Leave `network` out, or "
                          "begin from another model.")
    return network, spec


def _restore(network: MSPN, optimiser: torch.optim.Optimizer) -> training.TrainingState | None:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return training.load_state(Path(folder, STATE_FILE).read_bytes(), network, optimiser)


def _worker_run(task: TrainTask, rank: int) -> contextlib.AbstractContextManager[tracking.Run]:
    """The driver's run, continued by rank 0; the others keep nothing."""
    settings = task.config.tracking
    if rank != 0 or task.run_id is None:
        settings = settings.model_copy(update={"enabled": False})
    return tracking.open_run(settings, name="train", run_id=task.run_id, system_metrics=True)


# --- feeding ------------------------------------------------------------------------------------------------------


def _blocks(worker: Worker) -> Iterator[Arrays]:
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
    settings = task.config.augmentation
    augmentation = Augmentation(**settings.model_dump(exclude={"enabled"})) if settings.enabled else None
    return samples.SampleRecipe(task.data.skeleton, spec.input_size_wh, spec.box_padding_wh, augmentation,
                                task.config.seed)


# --- what is known on the way -------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Losses and times since the last metrics. Rank 0 logs; the numbers are its own, the speed that of all ranks."""

    worker: Worker
    run: tracking.Run
    reports: list[training.StepReport] = field(default_factory=list)
    waited_s: float = 0.0
    began: float = field(default_factory=time.monotonic)
    last_line: float = field(default_factory=time.monotonic)

    def waited(self, batches: Iterator[Arrays]) -> Arrays:
        """The next batch, and the time that it took to come."""
        asked = time.monotonic()
        batch = next(batches)
        self.waited_s += time.monotonic() - asked
        return batch

    def took(self, report: training.StepReport) -> None:
        """One iteration was done."""
        self.reports.append(report)
        if time.monotonic() - self.last_line > PROGRESS_EVERY_S:
            self._line(self._metrics())

    def log_metrics(self) -> None:
        """Log what has gathered, and begin anew."""
        metrics = self._metrics()
        if self.worker.rank == 0:
            self.run.log_metrics(metrics, step=self.worker.iteration)
        if self.worker.iteration % (REPORT_EVERY * 10) == 0 or time.monotonic() - self.last_line > PROGRESS_EVERY_S / 2:
            self._line(metrics)
        self.restart()

    def restart(self) -> None:
        """Forget what has gathered; the time from now on counts."""
        self.reports, self.waited_s, self.began = [], 0.0, time.monotonic()

    def _metrics(self) -> dict[str, float]:
        if not self.reports:
            return {}
        optimiser = self.worker.task.config.optimiser
        seconds = max(time.monotonic() - self.began, 1e-6)
        heads = torch.stack([report.heads for report in self.reports]).mean(dim=0).tolist()
        schedule = schedule_of(self.worker.task.config, world=self.worker.world)
        per_second = len(self.reports) * optimiser.batch_size_per_worker * self.worker.world / seconds
        named = {f"loss_stage{stage}_unit{unit}": value
                 for stage, units in enumerate(heads) for unit, value in enumerate(units, start=1)}
        return {"loss": sum(map(sum, heads)), "learning_rate": training.learning_rate(self.worker.iteration, schedule),
                "samples_per_second": per_second, "input_wait_share": self.waited_s / seconds, **named}

    def _line(self, metrics: dict[str, float]) -> None:
        self.last_line = time.monotonic()
        if self.worker.rank != 0 or not metrics:
            return
        optimiser = self.worker.task.config.optimiser
        left = (optimiser.iterations - self.worker.iteration) * optimiser.batch_size_per_worker * self.worker.world
        logger.info("iteration %d of %d: loss %.1f, rate %.2e, %.1f samples/s, %.0f %% waiting for input, %s left",
                    self.worker.iteration, optimiser.iterations, metrics["loss"], metrics["learning_rate"],
                    metrics["samples_per_second"], 100 * metrics["input_wait_share"],
                    _time_text(left / metrics["samples_per_second"]))


def _time_text(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _gather(worker: Worker, value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    values = [value] * worker.world
    if worker.world > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def _validate(worker: Worker, run: tracking.Run) -> dict[str, float]:
    """The COCO numbers and PCK of rank 0's network, on every rank; {} without validation data.

    The shards are dealt to the ranks, so each person is predicted once, and what comes of them is evaluated together.
    """
    task = worker.task
    if task.val is None:
        return {}
    predictor = Predictor((_network_of_rank0(worker), worker.spec), backend="plain",
                          precision=task.intent["precision"])
    most = task.config.validate_persons
    mine = [picture for part in task.val.parts[worker.rank::worker.world]
            for picture in validate_part(task.val, part, predictor, keep_bytes=PREVIEWS,
                                         most_persons=most and -(-most // len(task.val.parts)))]
    pictures = [picture for each in _gather(worker, _with_few_bytes(mine)) for picture in each]
    evaluation = evaluate_pictures(pictures, predictor.skeleton)
    if worker.rank == 0:
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in evaluation_metrics(evaluation).items())
        logger.info("validation after iteration %d: %s", worker.iteration, numbers)
        _log_validation(worker, run, evaluation_metrics(evaluation), pictures)
    return evaluation_metrics(evaluation)


def _network_of_rank0(worker: Worker) -> MSPN:
    """A copy of the network with rank 0's batch norm statistics, which are those that are saved."""
    network = copy.deepcopy(worker.network)
    if worker.world > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)
    return network


def _with_few_bytes(pictures: Iterable[ValidatedPicture]) -> list[ValidatedPicture]:
    kept = 0
    few = []
    for picture in pictures:
        kept += picture.data is not None
        few.append(picture if kept <= PREVIEWS else replace(picture, data=None))
    return few


def _log_validation(worker: Worker, run: tracking.Run, numbers: dict[str, float],
                    pictures: Sequence[ValidatedPicture]) -> None:
    run.log_metrics({f"val_{name}": value for name, value in numbers.items()}, step=worker.iteration)
    some = [picture for picture in pictures if picture.data is not None][:PREVIEWS]
    sheet = preview_sheet(some, Skeleton.from_json(worker.spec.skeleton))
    if sheet is not None:
        run.log_picture(f"validation/iteration-{worker.iteration:07d}.jpg", sheet)


# --- what is kept -------------------------------------------------------------------------------------------------


def _keep(worker: Worker, evaluation: dict[str, float]) -> None:
    """A checkpoint, and Ray Train's word on it. All ranks wait for it here."""
    import ray.train

    positions = tuple(_gather(worker, worker.position))
    name = f"iteration-{worker.iteration:07d}"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if worker.rank == 0:
            state = training.TrainingState(worker.iteration, positions)
            Path(folder, STATE_FILE).write_bytes(training.state_bytes(worker.network, worker.optimiser, state))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"iteration": worker.iteration, **evaluation}, checkpoint=checkpoint, checkpoint_dir_name=name)


def _put(worker: Worker, evaluation: dict[str, float]) -> None:
    """The model directory, from rank 0. The other ranks' word is needed for the number of samples."""
    num_samples = sum(_gather(worker, worker.position))
    if worker.rank != 0:
        return
    source = worker.task.source | {"iterations": worker.iteration, "samples": num_samples, "evaluation": evaluation}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "model"), worker.network, worker.spec.model_copy(update={"source": source}))
        put_model(Path(folder, "model"), worker.task.config.output)
