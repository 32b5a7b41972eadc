"""Keypoint dataset and annotations -> the ten COCO numbers and PCK: read both, compare, print, log."""

import hashlib
import json
import logging
import sys
from dataclasses import asdict
from typing import Any

from pipeline import storage, tracking
from pipeline.config import EvaluateConfig, locations
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import Evaluation, evaluate_keypoints, evaluation_metrics, format_evaluation, joint_metrics
from pipeline.keypoints import MODEL_FOLDER, KeypointMetadata, read_keypoints
from pipeline.model.settings import SPEC_FILE

logger = logging.getLogger("jobs.evaluate")


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate the keypoints; gives the numbers, what they were measured on, and the run that keeps them."""
    config = locations(config, "keypoints", "annotations")
    truth, digest = _read_annotations(config.annotations)
    table, metadata = read_keypoints(config.keypoints)
    run_id = _models_own_run(config, metadata)
    with tracking.open_run(config.tracking, name="evaluate", run_id=run_id) as tracked:
        evaluation = evaluate_keypoints(table, truth, skeleton=metadata.skeleton)
        print(format_evaluation(evaluation), file=sys.stderr)
        tracked.log_dataset("annotations", config.annotations, digest=digest, context="evaluation")
        # under names of their own: a training run has an `ap` of its validation in the loop
        metrics = evaluation_metrics(evaluation) | joint_metrics(evaluation, metadata.skeleton)
        tracked.log_metrics({f"evaluate/{name}": value for name, value in metrics.items()})
    about = {"keypoints": config.keypoints, "complete": metadata.complete, "model": metadata.model,
             "run_id": tracked.run_id}
    return _result(evaluation) | about


def _read_annotations(uri: str) -> tuple[dict[str, Any], str]:
    """The parsed file and its SHA-256."""
    try:
        data = storage.read_object(uri)
    except storage.ObjectMissing:
        raise ConfigError(f"--annotations {uri}: there is no such object.") from None
    try:
        truth = json.loads(data)
    except ValueError as error:
        raise DataError(f"{uri} is not JSON: {error}.") from None
    if not isinstance(truth, dict):
        raise DataError(f"{uri}: expected a COCO keypoint file (an object), found {type(truth).__name__}.")
    if missing := [name for name in ("images", "annotations", "categories") if name not in truth]:
        raise DataError(f"{uri}: not a COCO keypoint file: it has no {', '.join(missing)}.")
    return truth, hashlib.sha256(data).hexdigest()


def _models_own_run(config: EvaluateConfig, metadata: KeypointMetadata) -> str | None:
    """The run that trained the model, if model.json names one that this tracking server knows."""
    run_id = metadata.model.get("run_id") or _model_source(config.keypoints).get("run_id")
    if run_id is None or not tracking.knows_run(run_id, tracking=config.tracking):
        return None
    logger.info("the numbers go to the model's own run %s", run_id)
    return str(run_id)


def _model_source(keypoints: str) -> dict[str, Any]:
    try:
        spec = json.loads(storage.read_object(storage.join(keypoints, MODEL_FOLDER, SPEC_FILE)))
    except storage.ObjectMissing:
        return {}
    source: dict[str, Any] = spec.get("source") or {}
    return source


def _result(evaluation: Evaluation) -> dict[str, Any]:
    numbers = {name.lower(): value for name, value in evaluation.coco.items()}
    return numbers | {"pck": evaluation.pck, "pck_reason": evaluation.pck_reason, "counts": evaluation.counts,
                      "joints": [asdict(joint) for joint in evaluation.joints]}
