"""Tell MLflow of a job that has ended. The job's output is whole without it, so trouble there is only a warning."""

import logging
from collections.abc import Mapping
from typing import Any

from pipeline import tracking
from pipeline.config import TrackingConfig

logger = logging.getLogger("jobs.record")


def record_run(settings: TrackingConfig, name: str, *, params: Mapping[str, Any], counts: Mapping[str, Any],
               dataset: tuple[str, str] | None = None, read: tuple[str, str] | None = None) -> str | None:
    """One MLflow run with a job's settings, its counts (nested ones as `a.b`), and (uri, digest) of what it wrote
    (`dataset`) and of what it read. Its id; None where there is none: tracking is off, or MLflow isn't there."""
    try:
        with tracking.open_run(settings, name=name) as run:
            run.log_params(params)
            run.log_metrics(dict(_numbers(counts)))
            if read is not None:
                run.log_dataset("input", read[0], digest=read[1], context="input")
            if dataset is not None:
                run.log_dataset(name, dataset[0], digest=dataset[1], context=name)
        return run.run_id
    except (tracking.TrackingError, ValueError) as error:
        logger.warning("the run is not in MLflow: %s", error)
        return None


def _numbers(counts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    nested = [_numbers(value, f"{prefix}{name}.") for name, value in counts.items() if isinstance(value, Mapping)]
    plain = [(f"{prefix}{name}", float(value)) for name, value in counts.items() if not isinstance(value, Mapping)]
    return plain + [pair for pairs in nested for pair in pairs]
