"""What each of `train`'s workers does: open, feed, step, look, validate, keep, and at last put the model.

Every rank walks through the same iterations, so that each collective call meets its like on the other ranks. Batches
come from the rank's own Ray Data pipeline.
"""

import contextlib
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from jobs.train_feed import sample_batches
from jobs.train_progress import REPORT_EVERY, Progress, validate
from jobs.train_start import open_worker
from jobs.train_task import STATE_FILE, TrainTask, Worker, gather, schedule_of
from pipeline import tracking, training
from pipeline.errors import ConfigError, DataError
from pipeline.mixture import positions_after
from pipeline.model.directory import save_model
from pipeline.model_reference import put_model
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
    failure = None
    with _worker_run(task, rank) as run:
        failure = _train(worker, run)
    return failure


def _train(worker: Worker, run: tracking.Run) -> str | None:
    """The rank's iterations. Metrics are looked at together every few of them, so that none waits for a number."""
    config, schedule = worker.task.config, schedule_of(worker.task.config, world=worker.world)
    batches = sample_batches(worker)
    progress = Progress(worker, run)
    evaluation: dict[str, float] = {}
    while worker.iteration < schedule.iterations:
        progress.took(_step(worker, progress.waited(batches), schedule))
        due = worker.iteration % config.validate_every == 0 or worker.iteration == schedule.iterations
        if due or worker.iteration % REPORT_EVERY == 0:
            failures = [found for found in gather(worker, training.divergence(progress.reports)) if found]
            if failures:
                return str(failures[0])
            progress.log_metrics()
        if due:
            evaluation = validate(worker, run)
            _keep(worker, evaluation)
            progress.restart()
    if worker.task.val is not None and not evaluation:
        evaluation = validate(worker, run)
    _put(worker, evaluation)
    return None


def _step(worker: Worker, batch: Arrays, schedule: training.Schedule) -> training.StepReport:
    loss, optimiser = worker.task.config.loss, worker.task.config.optimiser
    worker.iteration += 1
    worker.positions = positions_after(worker.positions, batch)
    report = training.train_step(
        worker.wrapped, worker.optimiser, training.as_batch(batch, worker.device), iteration=worker.iteration,
        rate=training.learning_rate(worker.iteration, schedule), spec=worker.spec, ohkm_joints=loss.ohkm_joints,
        occluded=loss.occluded, target_peak=loss.target_peak, bfloat16=worker.task.intent["precision"] == "bfloat16",
        accumulate=optimiser.accumulate, clip_norm=optimiser.clip_norm)
    if worker.average is not None:
        worker.average.update(worker.network)
    return report


def _keep(worker: Worker, evaluation: dict[str, float]) -> None:
    """A checkpoint, and Ray Train's word on it. All ranks wait for it here."""
    import ray.train

    positions = tuple(gather(worker, worker.positions))
    name = f"iteration-{worker.iteration:07d}"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if worker.rank == 0:
            state = training.TrainingState(worker.iteration, positions)
            Path(folder, STATE_FILE).write_bytes(training.state_bytes(worker.network, worker.optimiser, state,
                                                                      worker.average))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"iteration": worker.iteration, **evaluation}, checkpoint=checkpoint, checkpoint_dir_name=name)


def _put(worker: Worker, evaluation: dict[str, float]) -> None:
    """The model directory, from rank 0. The other ranks' word is needed for the number of samples."""
    num_samples = sum(map(sum, gather(worker, worker.positions)))
    if worker.rank != 0:
        return
    source = worker.task.source | {"iterations": worker.iteration, "samples": num_samples, "evaluation": evaluation}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "model"), worker.result, worker.spec.model_copy(update={"source": source}))
        put_model(Path(folder, "model"), worker.task.config.output)


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
    """This worker's share of its machine's cores. Ray sets OMP_NUM_THREADS=1 for a worker of one CPU."""
    import ray.train

    return max(1, (os.cpu_count() or 1) // int(ray.train.get_context().get_local_world_size()))


def _worker_run(task: TrainTask, rank: int) -> contextlib.AbstractContextManager[tracking.Run]:
    """The driver's run, continued by rank 0; the others keep nothing."""
    settings = task.config.tracking
    if rank != 0 or task.run_id is None:
        settings = settings.model_copy(update={"enabled": False})
    return tracking.open_run(settings, name="train", run_id=task.run_id, system_metrics=True)
