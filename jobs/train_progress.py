"""What is known of a training on its way: losses and times every few iterations, and how good the network is."""

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch

from jobs.train_task import Worker, gather, schedule_of
from pipeline import tracking, training
from pipeline.evaluation import evaluation_metrics, joint_metrics
from pipeline.model.network import PoseNetwork
from pipeline.pose.skeleton import Skeleton
from pipeline.prediction import Predictor
from pipeline.samples import Arrays
from pipeline.shards import ShardDataset
from pipeline.validation import (
    PREVIEWS,
    ValidatedPicture,
    evaluate_pictures,
    preview_sheet,
    rank_shares,
    validate_part,
)

logger = logging.getLogger("jobs.train")
REPORT_EVERY = 20  # iterations between metrics, as the authors log, and between looks for a loss that isn't finite
PROGRESS_EVERY_S = 10


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
        named["gradient_norm"] = float(torch.stack([report.gradient_norm for report in self.reports]).mean())
        return {"loss": sum(map(sum, heads)), "learning_rate": training.learning_rate(self.worker.iteration, schedule),
                "samples_per_second": per_second, "input_wait_share": self.waited_s / seconds, **named}

    def _line(self, metrics: dict[str, float]) -> None:
        self.last_line = time.monotonic()
        if self.worker.rank != 0 or not metrics:
            return
        optimiser = self.worker.task.config.optimiser
        left = (optimiser.iterations - self.worker.iteration) * optimiser.batch_size_per_worker * self.worker.world
        logger.info("iteration %d of %d: loss %.4g, rate %.2e, %.1f samples/s, %.0f %% waiting for input, %s left",
                    self.worker.iteration, optimiser.iterations, metrics["loss"], metrics["learning_rate"],
                    metrics["samples_per_second"], 100 * metrics["input_wait_share"],
                    _time_text(left / metrics["samples_per_second"]))


def _time_text(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


# --- validation ---------------------------------------------------------------------------------------------------


def validate(worker: Worker, run: tracking.Run) -> dict[str, float]:
    """The COCO numbers and PCK of rank 0's network, on every rank; {} without validation data.

    The pictures are dealt to the ranks, so each person is predicted once; rank 0 evaluates what comes of them. Where it
    can't, its error ends the worker, and so the others, who wait for it, are ended by Ray Train.
    """
    task = worker.task
    if task.val is None:
        return {}
    predictor = Predictor((_network_of_rank0(worker), worker.spec), backend="plain",
                          precision=task.intent["precision"])
    mine = _validate_share(worker, task.val, predictor)
    predicted = gather(worker, [replace(picture, data=None) for picture in mine])
    metrics: dict[str, float] = {}
    if worker.rank == 0:
        evaluation = evaluate_pictures(list(chain.from_iterable(predicted)), predictor.skeleton)
        metrics = evaluation_metrics(evaluation)
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        logger.info("validation after iteration %d: %s", worker.iteration, numbers)
        _log_validation(worker, run, metrics | joint_metrics(evaluation, predictor.skeleton), mine)
    return dict(gather(worker, metrics)[0])


def _validate_share(worker: Worker, val: ShardDataset, predictor: Predictor) -> list[ValidatedPicture]:
    """The rank's pictures; those of rank 0 alone keep some bytes, to be drawn."""
    most = worker.task.config.validate_persons
    most_of_part = None if most is None else math.ceil(most / len(val.parts))
    shares = rank_shares(val.parts, rank=worker.rank, world=worker.world, most_persons=most_of_part)
    return [picture for share in shares
            for picture in validate_part(val, share, predictor, most_persons=most_of_part,
                                         keep_bytes=PREVIEWS if worker.rank == 0 else 0)]


def _network_of_rank0(worker: Worker) -> PoseNetwork:
    """A copy of what becomes the model, with rank 0's batch norm statistics, which are those that are saved."""
    network = copy.deepcopy(worker.result)
    if worker.world > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)
    return network


def _log_validation(worker: Worker, run: tracking.Run, numbers: dict[str, float],
                    pictures: Sequence[ValidatedPicture]) -> None:
    run.log_metrics({f"val_{name}": value for name, value in numbers.items()}, step=worker.iteration)
    some = [picture for picture in pictures if picture.data is not None][:PREVIEWS]
    sheet = preview_sheet(some, Skeleton.from_json(worker.spec.skeleton), low_score=worker.spec.decoding.low_score)
    if sheet is not None:
        run.log_picture(f"validation/iteration-{worker.iteration:07d}.jpg", sheet)
