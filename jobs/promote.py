"""A registered model -> behind an alias, if it deserves it: compare files, try it, measure it and the champion, move.

`train --promote` ends with the same. The rules are in pipeline/promotion.py, what they mean in docs/promotion.md.
A refusal is no failure: the alias stays, and the result says why.
"""

import dataclasses
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.start_ray import actor_threads, node_cpus, num_gpus, refuse_unshared, start_ray
from pipeline import model_registry, promotion, tracking
from pipeline.config import PromoteConfig, PromotionConfig, TrackingConfig, TrainConfig, locations
from pipeline.errors import ConfigError, DataError
from pipeline.model.directory import load_model
from pipeline.model.inference import CUDA, cpu_backend
from pipeline.model_reference import FILES, download_model
from pipeline.model_registry import RegisteredVersion
from pipeline.pose.skeleton import Skeleton
from pipeline.prediction import Predictor
from pipeline.promotion import Promotion, PromotionRefused
from pipeline.shards import ShardDataset, open_shards
from pipeline.validation import PartShare, ValidatedPicture, evaluate_pictures, validate_part

logger = logging.getLogger("jobs.promote")
PROGRESS_EVERY_S = 10
ACTOR_RESTARTS = 2


def run(config: PromoteConfig) -> dict[str, Any]:
    """Let the alias mean the model if it deserves it; gives what was decided, and why."""
    config = locations(config, "data", "directory")
    settings = tracking.located(config.tracking)
    promotion.refuse_reserved_alias(config.alias)
    candidate = model_registry.registered_version(config.model, tracking=settings)
    if candidate is None:
        raise ConfigError(f"--model {config.model} is no registered version. Give models:/name/3.")
    if config.force:
        return _result(_move_unasked(candidate, config.alias, settings))
    if config.data is None:
        raise ConfigError("--data is needed: the annotated shard dataset on which both models are measured.")
    data = open_frozen_set(config.data, config.version)
    with tempfile.TemporaryDirectory() as folder:
        expected = (model_registry.noted_sha256(candidate, tracking=settings) if config.directory is None
                    else model_registry.file_sha256(download_model(config.directory, Path(folder))))
    return _result(promote(candidate, config.alias, data, expected=expected, rules=config, settings=settings))


def _result(decided: Promotion) -> dict[str, Any]:
    return {"job": "promote", "promotion": dataclasses.asdict(decided)}


def open_frozen_set(uri: str, version: int | None) -> ShardDataset:
    """The set to measure on; ConfigError without annotations."""
    data = open_shards(uri, version)
    if data.skeleton is None:
        raise ConfigError(f"{uri} was sharded without --annotations: no AP can be measured on it.")
    return data


def refuse_unpromotable(config: TrainConfig, data: ShardDataset) -> None:
    """Refuse (ConfigError), before anything is trained, a `train --promote` that could only fail at its end.

    data  what is trained on: the set to measure on must have its joints
    """
    if config.promote is None:
        return
    promotion.refuse_reserved_alias(config.promote)
    if config.register_as is None:
        raise ConfigError(f"--promote {config.promote} needs --register: an alias belongs to a registered model.")
    if config.alias == config.promote:
        raise ConfigError(f"alias={config.alias} would move as soon as the model is registered, before --promote looks "
                          "at it. Leave alias out.")
    measured_on = config.promotion.data or config.val
    if measured_on is None:
        raise ConfigError(f"--promote {config.promote} needs data to measure on: --val, or --set promotion.data=URI.")
    frozen = open_frozen_set(measured_on, config.promotion.version)
    if frozen.skeleton is None or data.skeleton is None or frozen.skeleton.joints != data.skeleton.joints:
        raise ConfigError(f"{measured_on}, on which the model is to be measured, has other joints than --data.")


# --- one promotion ------------------------------------------------------------------------------------------------


def promote(candidate: RegisteredVersion, alias: str, data: ShardDataset, *, expected: Mapping[str, str],
            rules: PromotionConfig, settings: TrackingConfig) -> Promotion:
    """Let the alias mean the candidate if it deserves it, and tell MLflow; a refusal is a loud warning.

    expected  SHA-256 of each file of its model directory
    Refused with ConfigError: data without annotated persons, or of other joints than the candidate's.

    MLflow can't move an alias on a condition. It is read again just before it is moved, and another champion than the
    one that was measured is a refusal. What remains are the milliseconds between: two candidates that both pass in
    them were both compared with the same champion, and the later one has the alias though it may be worse than the
    other. It isn't worse than their common champion by more than the tolerance.
    """
    settings = tracking.located(settings)
    champion = model_registry.version_behind(candidate.name, alias, tracking=settings)
    decided = Promotion(alias, False, "", candidate.reference, champion.reference if champion else None,
                        tolerance=rules.tolerance, data=tracking.without_credentials(data.uri),
                        data_version=data.version)
    if champion == candidate:
        decided = dataclasses.replace(decided, why=f"it is @{alias} already")
        logger.info("%s is @%s already; nothing was done", candidate.reference, alias)
        return decided
    try:
        with tempfile.TemporaryDirectory() as folder:
            models = _deserving_models(candidate, champion, alias, data, expected, settings, Path(folder))
            ap, champion_ap = [*_measure(models, data, rules), None][:2]
        decided = dataclasses.replace(decided, ap=ap, champion_ap=champion_ap)
        why = promotion.refuse_worse(decided.ap, decided.champion_ap, tolerance=rules.tolerance,
                                     champion=decided.champion, data=f"{decided.data} version {data.version}")
        _refuse_moved_alias(candidate.name, alias, champion, settings)
    except PromotionRefused as refusal:
        decided = dataclasses.replace(decided, why=str(refusal))
        logger.warning("WARNING: @%s was not moved to %s and stays %s: %s", alias, candidate.reference,
                       decided.champion or "unset", refusal)
    else:
        model_registry.move_alias(candidate, alias, tracking=settings)
        decided = dataclasses.replace(decided, moved=True, why=why)
        logger.info("@%s is %s now: %s", alias, candidate.reference, why)
    _record(candidate, decided, settings)
    return decided


def _deserving_models(candidate: RegisteredVersion, champion: RegisteredVersion | None, alias: str, data: ShardDataset,
                      expected: Mapping[str, str], settings: TrackingConfig, folder: Path) -> list[Path]:
    """The model directories as MLflow gives them, the candidate's first, once all is right but AP."""
    mine = _downloaded(candidate, settings, folder)
    promotion.refuse_other_files(model_registry.file_sha256(mine), expected, candidate.reference)
    skeleton = _loaded_skeleton(mine, candidate)
    if data.skeleton is None or skeleton.joints != data.skeleton.joints:
        raise ConfigError(f"{data.uri} has other joints than {candidate.reference}. Give --data annotated with its "
                          f"own: {', '.join(skeleton.joints)}.")
    models = [mine]
    if champion is not None:
        models.append(_champions_directory(champion, alias, settings, folder))
        theirs = _loaded_skeleton(models[-1], champion).joints
        promotion.refuse_other_joints(skeleton.joints, theirs, champion.reference, alias)
    picture = promotion.trial_picture(data)
    logger.info("trying %s in a fresh process", candidate.reference)
    answer = promotion.predict_in_fresh_process(candidate.reference, str(settings.uri), picture)
    promotion.refuse_bad_answer(answer, skeleton, len(picture.boxes_xywh), candidate.reference)
    return models


def _downloaded(version: RegisteredVersion, settings: TrackingConfig, folder: Path) -> Path:
    try:
        return model_registry.resolve_model(version.reference, tracking=settings, into=folder)
    except (tracking.TrackingError, ConfigError, DataError) as error:
        raise PromotionRefused(f"{version.reference} can't be downloaded: {error}") from None


def _champions_directory(champion: RegisteredVersion, alias: str, settings: TrackingConfig, folder: Path) -> Path:
    try:
        directory = _downloaded(champion, settings, folder)
        _loaded_skeleton(directory, champion)
    except PromotionRefused as error:
        raise PromotionRefused(
            f"there is nothing to compare with, since the present @{alias} is broken: {error} Mend it, or move the "
            f"alias to a version that works (python -m jobs promote --model models:/{champion.name}/N --alias {alias} "
            "--set force=true).") from None
    return directory


def _loaded_skeleton(directory: Path, version: RegisteredVersion) -> Skeleton:
    """The joints of a model directory that loads as a whole."""
    try:
        return Skeleton.from_json(load_model(directory)[1].skeleton)
    except DataError as error:
        raise PromotionRefused(f"{version.reference} can't be loaded: {error}") from None


def _refuse_moved_alias(name: str, alias: str, champion: RegisteredVersion | None, settings: TrackingConfig) -> None:
    now = model_registry.version_behind(name, alias, tracking=settings)
    if now != champion:
        raise PromotionRefused(
            f"@{alias} became {now.reference if now else 'unset'} while this model was measured against "
            f"{champion.reference if champion else 'none'}. Run `python -m jobs promote` to measure it against that.")


def _move_unasked(candidate: RegisteredVersion, alias: str, settings: TrackingConfig) -> Promotion:
    """Move the alias without a look at the model: back to an earlier version, say."""
    champion = model_registry.version_behind(candidate.name, alias, tracking=settings)
    model_registry.move_alias(candidate, alias, tracking=settings)
    decided = Promotion(alias, champion != candidate, "moved by force: nothing was checked", candidate.reference,
                        champion.reference if champion else None)
    logger.warning("@%s is %s now, moved by force: nothing was checked", alias, candidate.reference)
    _record(candidate, decided, settings)
    return decided


def _record(candidate: RegisteredVersion, decided: Promotion, settings: TrackingConfig) -> None:
    """Tags on the model version; tags and metrics on the run that made it. The decision stands without them."""
    said = {"why": decided.why, "candidate": decided.candidate, "before": decided.champion, "ap": decided.ap,
            "before_ap": decided.champion_ap, "tolerance": decided.tolerance, "data": decided.data,
            "data_version": decided.data_version}
    tags: dict[str, Any] = {f"promotion.{decided.alias}": "moved" if decided.moved else "refused"}
    tags |= {f"promotion.{decided.alias}.{name}": value for name, value in said.items() if value is not None}
    try:
        model_registry.tag_version(candidate, tags, tracking=settings)
        if candidate.run_id is None or not tracking.knows_run(candidate.run_id, tracking=settings):
            return
        with tracking.open_run(settings, name="promote", run_id=candidate.run_id) as run:
            run.set_tags(tags)
            run.log_metrics({"promotion/ap": decided.ap, f"promotion/{decided.alias}_ap": decided.champion_ap})
    except tracking.TrackingError as error:
        logger.warning("the promotion is not noted in MLflow: %s", error)


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """What every actor is given: the models as their files, the set, and how the networks run."""

    models: Sequence[Mapping[str, bytes]]
    data: ShardDataset
    backend: str
    precision: str
    threads: int


def _measure(models: Sequence[Path], data: ShardDataset, rules: PromotionConfig) -> list[float | None]:
    """AP of each model, by the code of training's validation, on the same persons and with the same settings.

    The joints' sigmas are the dataset's for all of them.
    """
    pictures: list[list[ValidatedPicture]] = [[] for _ in models]
    with start_ray():
        refuse_unshared(inputs=[data.uri], outputs=[])
        began = last = time.monotonic()
        persons = len(models) * sum(int(part.counts["persons"]) for part in data.parts)
        logger.info("measuring the model%s on %s version %d: %d shards, up to %d persons in all; the first shard will "
                    "tell how long that takes", " and the champion" if len(models) > 1 else "", data.uri, data.version,
                    len(data.parts), persons)
        for done, of_shard in enumerate(_validated_shards(models, data, rules), start=1):
            for mine, new in zip(pictures, of_shard, strict=True):
                mine += new
            now = time.monotonic()
            if done == 1 or now - last > PROGRESS_EVERY_S:
                last = now
                left_s = (now - began) / done * (len(data.parts) - done)
                logger.info("%d of %d shards, about %.0f s left", done, len(data.parts), left_s)
    assert data.skeleton is not None
    evaluations = [evaluate_pictures(mine, data.skeleton) for mine in pictures]
    return [evaluation.coco["AP"] for evaluation in evaluations]


def _validated_shards(models: Sequence[Path], data: ShardDataset,
                      rules: PromotionConfig) -> Iterator[list[list[ValidatedPicture]]]:
    """For each shard, in their order, and each model: its pictures, by an actor pool; an actor has all the models."""
    import ray
    from ray.util import ActorPool

    gpus = num_gpus()
    threads = rules.threads or actor_threads()
    actors = gpus or max(1, sum(cpus // threads for cpus in node_cpus()))
    measurement = ray.put(Measurement(
        [{name: (directory / name).read_bytes() for name in FILES} for directory in models],
        dataclasses.replace(data, json={}), CUDA if gpus else cpu_backend(), rules.precision, threads))
    remote = ray.remote(num_cpus=1 if gpus else threads, num_gpus=1 if gpus else 0, max_restarts=ACTOR_RESTARTS,
                        max_task_retries=ACTOR_RESTARTS)(ModelValidator)
    pool: Any = ActorPool([remote.remote() for _ in range(min(actors, len(data.parts)))])
    try:
        yield from pool.map(lambda actor, part: actor.validate.remote(measurement, part), range(len(data.parts)))
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except ray.exceptions.RayError as error:
        raise OSError(f"the actors that measure the models could not go on: {error}. Run the command again.") from error


class ModelValidator:
    """Some models, loaded in an actor of its own by its first shard: a restarted actor loads them again."""

    def __init__(self) -> None:
        self.predictors: list[Predictor] = []

    def validate(self, measurement: Measurement, part: int) -> list[list[ValidatedPicture]]:
        """One shard's annotated pictures, as each model predicts them."""
        self.predictors = self.predictors or [_predictor(files, measurement) for files in measurement.models]
        data = measurement.data
        return [validate_part(data, PartShare(data.parts[part]), predictor) for predictor in self.predictors]


def _predictor(files: Mapping[str, bytes], measurement: Measurement) -> Predictor:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        return Predictor(Path(folder), backend=measurement.backend, precision=measurement.precision,
                         threads=measurement.threads)
