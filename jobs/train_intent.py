"""What a training is of: the datasets that it reads, all that can change its model, whether it is the same again."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jobs.start_ray import num_cpus, num_gpus
from pipeline import samples, storage
from pipeline.config import DataConfig, TrainConfig
from pipeline.errors import ConfigError, DataError
from pipeline.mixture import TrainingSet, joint_indices, joints_text
from pipeline.model.directory import model_digest
from pipeline.model.settings import ARCHITECTURES, InferenceConfig
from pipeline.model_reference import find_model
from pipeline.shards import ShardDataset, open_shards
from pipeline.units import FrozenJob, refuse_other_intent

logger = logging.getLogger("jobs.train")
# Which model `init` meant when the run began, and what the settings leave to that model
LEFT_TO_INIT = ("init_reference", "init_digest", "heatmap_scale", "network", "loss", "inference")


def open_inputs(config: TrainConfig, begun: dict[str, Any]) -> tuple[tuple[TrainingSet, ...], ShardDataset | None]:
    """The datasets, at the versions with which the run began where it is the same run."""
    uris = [one.uri for one in config.data]
    pinned = begun if begun.get("data") == one_or_all(uris) else {}
    versions = pinned.get("data_version") or [None] * len(uris)
    datasets = [_open_data(uri, version) for uri, version in
                zip(uris, versions if isinstance(versions, list) else [versions], strict=True)]
    sets = tuple(_training_set(one, dataset, datasets[0]) for one, dataset in zip(config.data, datasets, strict=True))
    val = None if config.val is None else _open_data(config.val, pinned.get("val_version"))
    _refuse_other_joints(datasets[0], val)
    return sets, val


def _training_set(one: DataConfig, dataset: ShardDataset, first: ShardDataset) -> TrainingSet:
    assert first.skeleton is not None
    assert dataset.skeleton is not None
    joints = joint_indices(first.skeleton, dataset.skeleton, labelled=one.joints, uri=one.uri)
    text = joints_text(first.skeleton, dataset.skeleton, joints)
    if text:
        logger.info("data %s: %s", one.uri, text)
    return TrainingSet(dataset, one.weight, tuple(samples.trainable_counts(dataset)), joints)


def _open_data(uri: str, version: int | None) -> ShardDataset:
    dataset = open_shards(uri, version)
    if dataset.skeleton is None:
        raise ConfigError(f"{uri} was sharded without --annotations: there are no joints to learn.")
    return dataset


def _refuse_other_joints(data: ShardDataset, val: ShardDataset | None) -> None:
    if val is not None and val.skeleton != data.skeleton:
        raise ConfigError(f"--data {data.uri} and --val {val.uri} have different joints: "
                          f"{data.skeleton} and {val.skeleton}.")


def refuse_other_model(config: TrainConfig, job: FrozenJob | None, inputs: dict[str, Any],
                       sets: Sequence[TrainingSet]) -> None:
    """Refuse (ConfigError) a finished model that was trained otherwise, or elsewhere."""
    if job is None:
        raise ConfigError(f"{config.output} holds a model that was not trained there. Choose another --output.")
    refuse_other_run(config, job, inputs, resolved_intent(config, job, sets))


def refuse_other_run(config: TrainConfig, job: FrozenJob, inputs: dict[str, Any], intent: dict[str, Any]) -> None:
    """Refuse (ConfigError) to go on with a run that was begun otherwise; each difference is named."""
    defaults = TrainConfig.model_validate({"data": "-", "output": "-"}).model_dump(mode="json")
    refuse_other_intent(job, config.output, input=inputs, intent=_as_it_began(intent, job.intent, defaults))


def _as_it_began(intent: dict[str, Any], frozen: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The intent less settings that the program that began the run didn't have, where they have their defaults."""
    known = {}
    for name, value in intent.items():
        if name not in frozen and value == defaults.get(name):
            continue
        nested = isinstance(value, dict) and isinstance(frozen.get(name), dict)
        known[name] = _as_it_began(value, frozen[name], defaults.get(name, {})) if nested else value
    return known


def one_or_all(values: Sequence[Any]) -> Any:
    """One dataset's value by itself, as runs on one dataset have always had it."""
    return values[0] if len(values) == 1 else list(values)


def described_inputs(config: TrainConfig, sets: Sequence[TrainingSet], val: ShardDataset | None) -> dict[str, Any]:
    """Address, version and digest of what is read, as the frozen job and model.json have it."""
    inputs = {"data": one_or_all([one.dataset.uri for one in sets]),
              "data_version": one_or_all([one.dataset.version for one in sets]),
              "data_digest": one_or_all([samples.dataset_digest(one.dataset) for one in sets])}
    if val is None:
        return inputs | {"val": None}
    return inputs | {"val": config.val, "val_version": val.version, "val_digest": samples.dataset_digest(val)}


def resolved_intent(config: TrainConfig, job: FrozenJob | None, sets: Sequence[TrainingSet],
                    init: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """All that can change the model, with `auto` resolved: as it was when the run began, or as the cluster is now.

    init  of a run that hasn't begun: which model it begins from, and what the settings leave to that one
    """
    frozen = {} if job is None else job.intent
    intent = config.model_dump(mode="json", include={
        "workers", "seed", "precision", "compile", "sync_batch_norm", "trunk", "init", "heatmap_scale", "network",
        "optimiser", "loss", "augmentation", "inference", "validate_every", "validate_persons", "keep"})
    if config.workers == "auto":
        intent["workers"] = frozen.get("workers") or _workers_at_hand(config)
    if config.precision == "auto":
        intent["precision"] = frozen.get("precision") or ("bfloat16" if trains_on_gpus(config) else "float32")
    if config.init is not None:
        left_to_it = init or {name: frozen[name] for name in LEFT_TO_INIT if name in frozen}
        intent |= {name: value for name, value in left_to_it.items() if not _asks_for(config, name)}
    if config.trunk is not None:
        intent["trunk_sha256"] = storage.stored_sha256(config.trunk)
    if any(one != DataConfig(uri=one.uri) for one in config.data):
        intent["sets"] = [one.model_dump(mode="json", exclude={"uri"}) for one in config.data]
    skeleton = sets[0].dataset.skeleton
    return intent | {"joints": list(skeleton.joints) if skeleton else []}


def default_inference(config: TrainConfig) -> InferenceConfig:
    """What nobody has to ask for: that of the network's authors."""
    return ARCHITECTURES[config.network.architecture].inference


def _asks_for(config: TrainConfig, name: str) -> bool:
    if name == "inference":
        return config.inference != default_inference(config)
    return name in ("network", "loss") and name in config.model_fields_set


def tell_if_init_moved(config: TrainConfig, job: FrozenJob) -> None:
    """A warning where `init` no longer means the model from which the run began; the run goes on with its own copy.

    That is right for an alias that has moved on: else no run could be resumed after a promotion.
    """
    digest = job.intent.get("init_digest")
    if digest is None or config.init is None or config.init != job.intent["init"]:
        return  # begun by an earlier program, or refused with the difference
    begun = f"{job.intent['init_reference']} of digest {digest[:12]}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = find_model(config.init, settings=config.tracking, into=Path(folder), asked_by="init")
            reference, now = model.reference, model_digest(model.directory)
    except (ConfigError, DataError, OSError) as error:
        logger.warning("the run began from %s and has its own copy; what init is now can't be seen: %s", begun, error)
        return
    if now != digest:
        logger.warning("init %s means another model now, %s of digest %s. This run began from %s, and goes on with its "
                       "own copy of that", config.init, reference, now[:12], begun)


def trains_on_gpus(config: TrainConfig) -> bool:
    """What `device` means on the cluster at hand. Refuses (ConfigError) to guess where there is neither CPU nor GPU."""
    if config.device != "auto":
        return config.device == "cuda"
    if num_gpus():
        return True
    num_cpus()  # refuses where there is neither
    return False


def _workers_at_hand(config: TrainConfig) -> str:
    """One for each GPU that is there, or one on CPUs. Refuses (ConfigError) to guess how many GPUs are yet to come."""
    if trains_on_gpus(config) and not num_gpus():
        raise ConfigError("workers=auto is one for each GPU that the cluster has, and it has none yet. Give --workers; "
                          "the learning rate follows their number.")
    return str(num_gpus() if trains_on_gpus(config) else 1)
