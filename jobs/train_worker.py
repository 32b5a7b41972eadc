"""What each of `train`'s workers does: open, feed, step, look, validate, keep, and at last put the model.

Every rank walks through the same iterations, so that each collective call meets its like on the other ranks. Batches
come from the rank's own Ray Data pipeline.
"""

import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.train_checkpoints import Keeper
from jobs.train_feed import sample_batches
from jobs.train_progress import REPORT_EVERY, Progress, validate
from jobs.train_start import open_worker
from jobs.train_task import TrainTask, Worker, gather, schedule_of
from pipeline import checkpoints, tracking, training
from pipeline.checkpoints import STATE_FILE, Checkpoint
from pipeline.cores import usable_cores
from pipeline.divergence import divergence, divergence_text, not_finite
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.metrics_buffer import store_waiting, stored_metrics
from pipeline.mixture import positions_after
from pipeline.model.directory import add_to_source, save_model
from pipeline.model_reference import FILES, download_model, put_model
from pipeline.patience import waited_out
from pipeline.samples import Arrays

logger = logging.getLogger("jobs.train")


def train_worker(settings: dict[str, Any]) -> str | None:
    """One rank's training, from the last checkpoint to the model directory; what went wrong, if all ranks agree."""
    import ray.train

    task: TrainTask = settings["task"]
    _log_from_worker()
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.set_num_threads(task.config.threads or _threads())
    try:
        worker = open_worker(task, rank, world)
    except (ConfigError, DataError) as error:
        return str(error)  # it is the same on all ranks, and no restart would mend it
    with _worker_run(task, rank) as run:
        failure = _train(worker, run)
    where = _store_unsent(worker, run)
    if where and task.config.tracking.enabled:
        logger.warning("what MLflow lacks is in %s; the same command sends it once MLflow is back", where)
    elif where:
        logger.info("the numbers are in %s; the same command with tracking.enabled=true sends them to MLflow", where)
    return failure


def _store_unsent(worker: Worker, run: tracking.Run) -> str | None:
    """Keep beside the output what MLflow doesn't have; a later worker, or the same command, sends it."""
    if worker.rank != 0:
        return None
    return store_waiting(worker.task.config.output, run.waiting_metrics())


def _train(worker: Worker, run: tracking.Run) -> str | None:
    """The rank's iterations. Metrics are looked at together every few of them, so that none waits for a number."""
    config, schedule = worker.task.config, schedule_of(worker.task.config, world=worker.world)
    batches = sample_batches(worker)
    progress, keeper = Progress(worker, run), Keeper(worker)
    evaluation: dict[str, float] = {}
    while worker.iteration < schedule.iterations:
        progress.took(_step(worker, progress.waited(batches), schedule))
        due = worker.iteration % config.validate_every == 0 or worker.iteration == schedule.iterations
        if not due and worker.iteration % REPORT_EVERY:
            continue
        if failure := _divergence(worker, progress.reports, look_inside=due):
            return f"{failure} {keeper.last_good()}"
        progress.log_metrics()
        leaves = keeper.machine_leaves()
        if due:
            evaluation = validate(worker, run)
        if due or leaves:
            if failure := _keep(worker, evaluation if due else {}, keeper):
                return failure
            _store_unsent(worker, run)
            progress.restart()
    if worker.task.val is not None and not evaluation:
        evaluation = validate(worker, run)
    return _put(worker, evaluation)


def _step(worker: Worker, batch: Arrays, schedule: training.Schedule) -> training.StepReport:
    optimiser = worker.task.config.optimiser
    worker.iteration += 1
    worker.positions = positions_after(worker.positions, batch)
    report = training.train_step(
        worker.wrapped, worker.optimiser, training.as_batch(batch, worker.device), iteration=worker.iteration,
        rate=training.learning_rate(worker.iteration, schedule), spec=worker.spec,
        bfloat16=worker.task.intent["precision"] == "bfloat16", accumulate=optimiser.accumulate,
        clip_norm=optimiser.clip_norm)
    if worker.average is not None:
        worker.average.update(worker.network)
    return report


def _divergence(worker: Worker, reports: Sequence[training.StepReport], *, look_inside: bool) -> str | None:
    """What is wrong with any rank's numbers, or with the network that is about to be kept; the same on every rank."""
    uris = [one.dataset.uri for one in worker.task.sets]
    if failure := divergence_text(gather(worker, divergence(reports)), uris):
        return failure
    if not look_inside:
        return None
    found = (not_finite(worker.network, iteration=worker.iteration)
             or not_finite(worker.result, iteration=worker.iteration))
    return next(filter(None, gather(worker, found)), None)


def _keep(worker: Worker, evaluation: dict[str, float], keeper: Keeper) -> str | None:
    """A checkpoint, and word of it to Ray Train. All ranks wait for it here; what to stop with, on all of them."""
    import ray.train

    positions = tuple(gather(worker, worker.positions))
    failure = keeper.keep(lambda: _checkpoint_files(worker, positions, evaluation))
    # without the checkpoint itself: Ray Train would list it in a file that a kill can leave half-written
    ray.train.report({"iteration": worker.iteration, **evaluation})
    return failure


def _checkpoint_files(worker: Worker, positions: tuple[tuple[int, ...], ...],
                      evaluation: dict[str, float]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        _save(worker, Path(folder, "model"), _source(worker, sum(map(sum, positions)), evaluation))
        files = {name: Path(folder, "model", name).read_bytes() for name in FILES}
    state = training.TrainingState(worker.iteration, positions)
    return files | {STATE_FILE: training.state_bytes(worker.network, worker.optimiser, state, worker.average)}


def _put(worker: Worker, evaluation: dict[str, float]) -> str | None:
    """The model directory, from rank 0; why the store didn't take it. The other ranks tell the number of samples."""
    num_samples = sum(map(sum, gather(worker, worker.positions)))
    if worker.rank != 0:
        return None
    try:
        waited_out(lambda: _put_model(worker, num_samples, evaluation))
    except StorageError as error:
        return f"The model could not be put, and the same command puts it from the last checkpoint: {error}"
    return None


def _put_model(worker: Worker, num_samples: int, evaluation: dict[str, float]) -> None:
    config = worker.task.config
    best = _best(worker, evaluation)
    about = {"best": best and {"iteration": best.iteration, "ap": best.ap}, "run_id": worker.task.run_id}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "model")
        if config.keep == "best" and best is not None and best.iteration != worker.iteration:
            directory.mkdir()
            add_to_source(download_model(best.uri, directory), about)
        else:
            _save(worker, directory, _source(worker, num_samples, evaluation) | about)
        put_model(directory, config.output)


def _best(worker: Worker, evaluation: dict[str, float]) -> Checkpoint | None:
    """The best of the checkpoints and of what the worker holds, which a full disk may have kept from being one."""
    output = worker.task.config.output
    now = Checkpoint(checkpoints.checkpoint_uri(output, worker.iteration), worker.iteration, evaluation.get("ap"))
    return checkpoints.best_checkpoint([now, *checkpoints.list_checkpoints(output)])


def _source(worker: Worker, num_samples: int, evaluation: dict[str, float]) -> dict[str, Any]:
    return worker.task.source | {"iterations": worker.iteration, "samples": num_samples, "evaluation": evaluation}


def _save(worker: Worker, directory: Path, source: dict[str, Any]) -> None:
    save_model(directory, worker.result, worker.spec.model_copy(update={"source": source}))


# --- the process --------------------------------------------------------------------------------------------------


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
    """This worker's share of the cores that it may use. Ray sets OMP_NUM_THREADS=1 for a worker of one CPU."""
    import ray.train

    return max(1, usable_cores() // int(ray.train.get_context().get_local_world_size()))


@contextlib.contextmanager
def _worker_run(task: TrainTask, rank: int) -> Iterator[tracking.Run]:
    """The driver's run, continued by rank 0, also while MLflow doesn't answer; without MLflow its numbers wait as well.
    The others keep nothing."""
    settings = task.config.tracking
    if rank != 0 or task.run_id is None:
        settings = settings.model_copy(update={"enabled": False})
    with tracking.open_run(settings, name="train", run_id=task.run_id, system_metrics=True, must_answer=False,
                           numbers_wait=rank == 0) as run:
        if rank == 0:
            run.log_later(waited_out(lambda: stored_metrics(task.config.output)))
        yield run
