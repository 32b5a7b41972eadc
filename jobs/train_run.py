"""The run in MLflow that a training is logged to: one for all commands at its output, whichever of them reach MLflow.

It is the one with which the training began (`_job.json`) or, where that was without MLflow, the one that a later
command opened (`_run.json`, put if absent).
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from pipeline import storage, tracking
from pipeline.config import TrainConfig
from pipeline.metrics_buffer import FOLDER
from pipeline.units import FrozenJob

RUN_FILE = "_run.json"
UNENDED = "unended"  # beside unsent metrics: MLflow doesn't know yet that the run has ended


@contextlib.contextmanager
def open_training_run(config: TrainConfig, job: FrozenJob | None) -> Iterator[tracking.Run]:
    """The training's run, a new one while it has none; it ends with the block. The null run where tracking is off."""
    run_id = None if job is None else known_run(config.output, job)
    with tracking.open_run(config.tracking, name=f"train {Path(config.output).name}", run_id=run_id, ends=True) as run:
        yield run
    if run.ended:
        storage.remove_own(_sign(config.output))


def is_unended(output: str) -> bool:
    """Whether the training's run may still say RUNNING in MLflow, though nobody works on it."""
    return storage.exists(_sign(output))


def adopt_run(run: tracking.Run, output: str, job: FrozenJob) -> str | None:
    """Make an open run the training's, if it has none; the id of its run, None where it still has none."""
    if run.run_id is None:
        return known_run(output, job)
    storage.put_if_absent(_sign(output), run.run_id.encode())
    if job.about["run_id"] is None:
        storage.put_if_absent(storage.join(output, RUN_FILE), json.dumps({"run_id": run.run_id}).encode())
    return known_run(output, job)


def known_run(output: str, job: FrozenJob) -> str | None:
    """The id of the training's run; None while there is none."""
    if (begun_with := job.about["run_id"]) is not None:
        return str(begun_with)
    try:
        return str(json.loads(storage.read_object(storage.join(output, RUN_FILE)))["run_id"])
    except storage.ObjectMissing:
        return None


def _sign(output: str) -> str:
    return storage.join(output, FOLDER, UNENDED)
