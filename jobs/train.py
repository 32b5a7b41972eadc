"""Shard datasets -> a model directory, by Ray Train: freeze, train on every worker, validate, put the model, register.

Each worker is fed by its own Ray Data pipeline, which decodes a picture once, cuts its persons out, and hands over
uint8 crops and joints. Checkpoints lie under `<output>/_checkpoints`; the same command goes on from the last one,
whatever ended the run before. `model.json`, put last, makes the output a model directory.
"""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jobs.promote import open_frozen_set, promote, refuse_unpromotable
from jobs.start_ray import THREAD_WAITS, refuse_unshared, start_ray, warn_of_cpus
from jobs.train_intent import (
    described_inputs,
    one_or_all,
    open_inputs,
    refuse_other_model,
    refuse_other_run,
    resolved_intent,
    tell_if_init_moved,
    trains_on_gpus,
)
from jobs.train_run import adopt_run, is_unended, known_run, open_training_run
from jobs.train_start import try_start
from jobs.train_task import INIT_FOLDER, TrainTask, augmentation_of, schedule_of
from jobs.train_worker import train_worker
from pipeline import checkpoints, model_registry, samples, storage, tracking
from pipeline.checkpoints import Checkpoint
from pipeline.config import TrainConfig, locations
from pipeline.errors import ConfigError, DataError
from pipeline.metrics_buffer import store_waiting, stored_metrics
from pipeline.mixture import TrainingSet
from pipeline.model.compiling import why_not_compile
from pipeline.model.directory import ModelSpec, model_digest, read_spec
from pipeline.model.settings import SPEC_FILE
from pipeline.model_reference import download_model, put_model
from pipeline.outputs import TRAINING, refuse_other_kind
from pipeline.patience import waited_out
from pipeline.promotion import refuse_reserved_alias
from pipeline.provenance import code_version
from pipeline.shards import ShardDataset
from pipeline.units import FrozenJob, freeze_job, open_job

logger = logging.getLogger("jobs.train")
RAY_TRAIN = "_ray_train"  # what Ray Train writes under the output: a marker by which workers prove that they see it
MAX_FAILURES = 3  # of worker groups between checkpoints; each restart costs 20 s and what came after the last one
RESIZE_EVERY_S = 60.0  # Ray Train looks so often whether there is room for more workers; all start anew then
WORKER_ENVIRONMENT = {
    **THREAD_WAITS,
    # Ray Data deals whole CPUs to the ranks' pipelines, and says of one without any that it may hang; each has a task
    # at a time even then
    "RAY_DATA_STARVATION_WARNING_DELAY_S": "inf",
    # Ray Train shows what pycocotools prints, though that is redirected
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


def run(config: TrainConfig) -> dict[str, Any]:
    """Train; says where the model is, how good it is, and under which name it was registered."""
    config = locations(config, "data", "output", "val", "trunk")
    config = config.model_copy(update={"tracking": tracking.located(config.tracking),
                                       "promotion": locations(config.promotion, "data")})
    _refuse_contradictions(config)
    uris = [*(one.uri for one in config.data), *filter(None, [config.val])]
    for uri in uris:
        storage.refuse_overlap(uri, config.output)
    refuse_other_kind(config.output, TRAINING)
    job = open_job(config.output)
    if job is not None:
        tell_if_init_moved(config, job)
    sets, val = open_inputs(config, {} if job is None else job.input)
    refuse_unpromotable(config, sets[0].dataset)
    assert sets[0].dataset.skeleton is not None
    augmentation_of(config, sets[0].dataset.skeleton)  # refuses joints that aren't the data's
    inputs = described_inputs(config, sets, val)
    if storage.exists(storage.join(config.output, SPEC_FILE)):
        refuse_other_model(config, job, inputs, sets)
        logger.info("%s holds the finished model; nothing was trained", config.output)
        _send_unsent(config, job)
    else:
        if job is None:
            storage.prove_put_if_absent(config.output)
        with start_ray():
            refuse_unshared(inputs=uris, outputs=[config.output])
            _train(config, job, inputs, sets, val)
    return _result(config)


def _refuse_contradictions(config: TrainConfig) -> None:
    """What would else come out only when Ray is up, or when the model is whole."""
    if config.keep == "best" and config.val is None:
        raise ConfigError("keep is best, but without --val nothing says which checkpoint that is. Give --val, or leave "
                          "keep=last.")
    if config.register_as is not None:
        model_registry.refuse_bad_name(config.register_as)
        refuse_reserved_alias(config.alias)
        if not config.tracking.enabled:
            raise ConfigError(f"--register {config.register_as} needs MLflow: leave out tracking.enabled=false.")
    schedule_of(config, world=1)  # refuses a warm-up that doesn't end, and steps that never come


def _train(config: TrainConfig, job: FrozenJob | None, inputs: dict[str, Any], sets: tuple[TrainingSet, ...],
           val: ShardDataset | None) -> None:
    """Everything between an open Ray and the model directory."""
    intent = _begun_intent(config, sets) if job is None else resolved_intent(config, job, sets)
    if job is not None:
        refuse_other_run(config, job, inputs, intent)
    with open_training_run(config, job) as run:
        if job is None:
            job = freeze_job(config.output, (), input=inputs, intent=intent, about={"run_id": run.run_id})
            refuse_other_run(config, job, inputs, intent)
        _log_begin(run, config, job)
        run_id = adopt_run(run, config.output, job)
        _fit(TrainTask(config, sets, val, intent, _source(config, job, run_id), run_id))


def _begun_intent(config: TrainConfig, sets: tuple[TrainingSet, ...]) -> dict[str, Any]:
    """What a new run is to freeze. Refuses what no worker could begin with, while another command can still follow.

    The model to begin from is put beside the run, where every worker finds the same one.
    """
    _refuse_uncompilable(config)
    assert sets[0].dataset.skeleton is not None
    with tempfile.TemporaryDirectory() as folder:
        init = try_start(config, sets[0].dataset.skeleton, into=Path(folder))
        intent = resolved_intent(config, None, sets, {} if init is None else init.intent)
        _refuse_too_many_workers(intent["workers"], sets, config)
        if init is not None:
            put_model(init.directory, storage.join(config.output, INIT_FOLDER))
            logger.info("begins from %s, digest %s", intent["init_reference"], intent["init_digest"][:12])
    return intent


def _refuse_uncompilable(config: TrainConfig) -> None:
    """Refuse (ConfigError) to compile where a machine such as workers get lacks what that takes."""
    if config.compile is None:
        return
    import ray

    gpu = trains_on_gpus(config)
    look = ray.remote(num_cpus=0 if gpu else 1, num_gpus=1 if gpu else 0)(why_not_compile)
    if problem := ray.get(look.remote()):
        raise ConfigError(f"compile={config.compile} needs a compiler on each worker's machine, and on one {problem}, "
                          "or leave compile out.")


def _refuse_too_many_workers(workers: str, sets: Sequence[TrainingSet], config: TrainConfig) -> None:
    for one in sets:
        next(samples.rank_turns(one.counts, seed=config.seed, rank=0, world=_num_workers(workers)[1],
                                uri=one.dataset.uri))


def _num_workers(workers: str) -> tuple[int, int]:
    """(least, most) of a number or MIN:MAX."""
    least, _, most = workers.partition(":")
    return int(least), int(most or least)


def _source(config: TrainConfig, job: FrozenJob, run_id: str | None) -> dict[str, Any]:
    elsewhere = ("seed", "joints")
    recipe = {name: value for name, value in job.intent.items() if name not in elsewhere}
    return {"job": job.digest, "run_id": run_id, **job.input, "seed": config.seed, "recipe": recipe,
            **code_version()}


def _log_begin(run: tracking.Run, config: TrainConfig, job: FrozenJob) -> None:
    data = [one.uri for one in config.data]
    run.log_params(config.model_dump(mode="json", exclude={"tracking"}) | {"data": one_or_all(data)} | job.intent)
    code = code_version()
    run.log_params({"packages": code["packages"]})
    revision = code["git_revision"]
    run.set_tags({"job": job.digest, "output": config.output} | ({"git_revision": revision} if revision else {}))
    digests = job.input["data_digest"]
    for number, (uri, digest) in enumerate(zip(data, digests if len(data) > 1 else [digests], strict=True), start=1):
        run.log_dataset("train" if number == 1 else f"train_{number}", uri, digest=digest, context="training")
    if config.val is not None:
        run.log_dataset("val", config.val, digest=job.input["val_digest"], context="validation")
    if run.url:
        logger.info("followed at %s", run.url)


def _fit(task: TrainTask) -> None:
    """Run Ray Train to the end of the schedule, from the output's last checkpoint if there is one.

    Who trains on spot machines loses more than a few of them: failures count only until the next checkpoint.
    """
    import ray.train

    while True:
        begun_from = waited_out(partial(checkpoints.list_checkpoints, task.config.output))
        try:
            answer = _trainer(task).fit().return_value
            break
        except ray.train.TrainingFailedError as error:
            reached, was_away = _reached(task.config.output)
            if reached[-1:] == begun_from[-1:] and not was_away:
                raise _plain(error) from None
            logger.warning("the workers failed %d times, but %s: training goes on from there", MAX_FAILURES + 1,
                           "the store was away" if was_away else f"got on to iteration {reached[-1].iteration}")
    if answer is not None:
        raise DataError(answer)


def _reached(output: str) -> tuple[list[Checkpoint], bool]:
    """The checkpoints, and whether the store that has them had to be waited for."""
    try:
        return checkpoints.list_checkpoints(output), False
    except storage.StorageError:
        return waited_out(partial(checkpoints.list_checkpoints, output)), True


def _trainer(task: TrainTask) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    least, most = _num_workers(task.intent["workers"])
    use_gpu = trains_on_gpus(task.config)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if task.config.device == "auto" and not use_gpu:
        warn_of_cpus("--set device=cuda")
    if not use_gpu and cpus < least:
        logger.warning("%d workers need as many CPUs, but Ray has %d: training waits until there are more", least, cpus)
    filesystem, path = storage.arrow_filesystem(task.config.output)
    return TorchTrainer(
        train_worker, train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=most if least == most else (least, most), use_gpu=use_gpu,
                                               elastic_resize_monitor_interval_s=RESIZE_EVERY_S),
        run_config=ray.train.RunConfig(
            name=RAY_TRAIN, storage_path=path, storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
            logging_config=ray.train.LoggingConfig(log_level="WARNING")))


def _plain(error: Exception) -> Exception:
    """The first cause that is ours and says what to do; else that training failed, and what Ray Train says."""
    causes = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    for cause in causes:
        while cause is not None:
            if isinstance(cause, ConfigError | DataError | OSError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    return OSError(f"training failed {MAX_FAILURES + 1} times without another checkpoint; those that there are stay, "
                   f"and the same command goes on from the last one. {error}")


def _send_unsent(config: TrainConfig, job: FrozenJob | None) -> None:
    """Give MLflow what it lacks of a run at whose end it couldn't be reached; a warning where it still can't."""
    if job is None or not config.tracking.enabled:
        return
    unsent = stored_metrics(config.output)
    if not unsent and not is_unended(config.output):
        return
    try:
        with open_training_run(config, job) as run:
            if known_run(config.output, job) is None:
                _log_begin(run, config, job)
            adopt_run(run, config.output, job)
            run.log_later(unsent)
            run.flush(now=True)
    except tracking.TrackingError as error:
        logger.warning("MLflow doesn't know the end of the run, and %d of its metrics stay beside the output: %s",
                       len(unsent), error)
        return
    store_waiting(config.output, run.waiting_metrics())


def _result(config: TrainConfig) -> dict[str, Any]:
    """What the output itself says; registers the model if asked to, once for each name."""
    with tempfile.TemporaryDirectory() as folder:
        directory = download_model(config.output, Path(folder))
        spec, digest = _with_run(read_spec(directory), config.output), model_digest(directory)
        registered = _register(config, directory, spec) if config.register_as else None
        promotion = None
        if config.promote and registered:
            promotion = _promote(config, directory, spec, registered["reference"])
    source = spec.source
    return {"job": "train", "output": config.output, "iterations": source["iterations"], "samples": source["samples"],
            "AP": source["evaluation"].get("ap"), "evaluation": source["evaluation"], "best": source.get("best"),
            "model_digest": digest, "run_id": source["run_id"], "registered": registered, "promotion": promotion}


def _with_run(spec: ModelSpec, output: str) -> ModelSpec:
    """The specification of a model that was put without MLflow, with the run that its training has got since."""
    job = open_job(output)
    if job is None or spec.source["run_id"] is not None:
        return spec
    return spec.model_copy(update={"source": spec.source | {"run_id": known_run(output, job)}})


def _register(config: TrainConfig, directory: Path, spec: ModelSpec) -> dict[str, Any]:
    marker = storage.join(config.output, f"_registered-{config.register_as}.json")
    if storage.exists(marker):
        return dict(json.loads(storage.read_object(marker)))
    with _whole_without_mlflow(config, "registered"):
        registered = model_registry.register_model_directory(
            directory, str(config.register_as), tracking=config.tracking, run_id=spec.source["run_id"],
            alias=config.alias)
    storage.put_if_absent(marker, json.dumps(registered).encode())
    return registered


def _promote(config: TrainConfig, directory: Path, spec: ModelSpec, reference: str) -> dict[str, Any]:
    """Let the alias mean the registered model if it deserves it; decided once for each name and alias.

    Not again by the same command later: the alias may by then have gone on to a better one.
    """
    marker = storage.join(config.output, f"_promotion-{config.register_as}-{config.promote}.json")
    if storage.exists(marker):
        return dict(json.loads(storage.read_object(marker)))
    rules = config.promotion
    # --val as it was when this model was trained, unless another set is named
    data = (open_frozen_set(rules.data, rules.version) if rules.data is not None
            else open_frozen_set(str(config.val), rules.version or spec.source["val_version"]))
    with _whole_without_mlflow(config, f"compared with @{config.promote}"):
        candidate = model_registry.registered_version(reference, tracking=config.tracking)
        assert candidate is not None
        decided = dataclasses.asdict(promote(candidate, str(config.promote), data, rules=rules,
                                             settings=config.tracking,
                                             expected=model_registry.file_sha256(directory)))
    storage.put_if_absent(marker, json.dumps(decided).encode())
    return decided


@contextlib.contextmanager
def _whole_without_mlflow(config: TrainConfig, done: str) -> Iterator[None]:
    """Of an MLflow that fails after the training: say that nothing is lost, and what to do."""
    try:
        yield
    except tracking.TrackingError as error:
        raise tracking.TrackingError(f"The model is whole, at {config.output}, but not {done}: {error} The same "
                                     "command goes on there once MLflow answers; nothing is trained again.") from None
