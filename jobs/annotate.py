"""Pictures -> a keypoint dataset, by a Ray Data actor pool: freeze, annotate each missing unit, count, seal.

One unit becomes one object, put if absent: that it exists is the commit. So the same command again does only what is
missing, whatever ended the run before.
"""

import contextlib
import dataclasses
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.annotate_pool import UnitTask, annotate_units, pool_sizes
from jobs.progress import Progress, RejectionBudget
from jobs.record import record_run
from jobs.start_ray import (
    actor_threads,
    native_precision,
    num_cpus,
    num_gpus,
    refuse_unshared,
    start_ray,
    warn_of_cpus,
)
from pipeline import annotation_input as inputs
from pipeline import drivers, keypoints, storage
from pipeline.annotation_seal import SUCCESS, count_parts, seal, sealed_counts
from pipeline.boxes import AskedBoxes, BoxChoice, choose_boxes, refuse_unservable
from pipeline.config import AnnotateConfig, AnnotationConfig, locations
from pipeline.errors import ConfigError, DataError
from pipeline.exclusion import Exclusion
from pipeline.inventory import read_keys
from pipeline.model_reference import FoundModel, find_model, put_model
from pipeline.outputs import KEYPOINTS, TRAINING, kind_at, kind_of, refuse_other_kind
from pipeline.patience import PAUSES_S
from pipeline.reuse import earlier_parts, open_earlier, refuse_computed_otherwise
from pipeline.rows import ROW_VERSION
from pipeline.unit_annotator import FAILED, Receipt
from pipeline.units import FrozenJob, committed_units, freeze_job, open_job, refuse_if_begun_again, refuse_other_intent
from pipeline.words import counted, ranked

logger = logging.getLogger("jobs.annotate")
FAILURES_IN_A_ROW = 20  # of the service, without a unit in between that went well: it is down, and asking on is no use


def run(config: AnnotateConfig) -> dict[str, Any]:
    """Annotate the input; gives the counts, and where the dataset is."""
    config = locations(config, "input", "output", "reuse", "exclude", "detector")
    for other in filter(None, (config.input, config.reuse)):
        storage.refuse_overlap(other, config.output)
    begun = open_job(config.output)
    if begun is None or kind_of(begun) != KEYPOINTS:
        refuse_other_kind(config.output, KEYPOINTS)
    with tempfile.TemporaryDirectory() as folder:
        model = find_model(config.model, settings=config.tracking, into=Path(folder))
        trained_by = model.run_id
        if begun is None:
            refuse_early(config)
        with start_ray():
            refuse_unshared(inputs=[config.input], outputs=[config.output])
            job = freeze(config, model)
            if (counts := sealed_counts(config.output, job)) is not None:
                _refuse_lost_parts(config.output, job)
                logger.info("%s is complete; nothing was done", config.output)
                if config.tracking.enabled and not storage.exists(_recorded(config.output, job)):
                    _record(config, job, counts, {}, trained_by)  # who sealed it died before MLflow knew
                return _result(config.output, job, counts, committed=0)
            done = _annotate_missing_units(config, job)
    counts = _seal(config, job)
    result = _result(config.output, job, counts, committed=done.get("committed", 0))
    _record(config, job, result["counts"], done, trained_by)
    return result


def _record(config: AnnotateConfig, job: FrozenJob, counts: dict[str, Any], done: dict[str, Any],
            trained_by: str | None) -> None:
    """Tell MLflow: what was read and written by digest, by which model, and what this run did of it in which time."""
    model = {"model_ref": config.model, "model_name": job.about["model"]["name"],
             "model_version": job.about["model"]["version"], "model_run_id": trained_by}
    speed = {name: done[name] for name in ("seconds", "persons_per_s", "pictures_per_s") if name in done}
    given = {"given": job.about.get("given", {})}
    run_id = record_run(config.tracking, "annotate", counts=counts | speed | given, dataset=(config.output, job.digest),
                        read=(config.input, job.plan["digest"]),
                        params={"input": config.input, "output": config.output, **model, **job.intent})
    if run_id is not None:
        storage.put_if_absent(_recorded(config.output, job), json.dumps({"version": 1, "run_id": run_id}).encode())


def _recorded(output: str, job: FrozenJob) -> str:
    """The object that says which MLflow run knows of the job."""
    return storage.join(output, "_mlflow", f"{job.digest[:16]}.json")


# --- freezing -----------------------------------------------------------------------------------------------------


def freeze(config: AnnotateConfig, model: FoundModel,
           choose: Callable[[Iterator[pa.Table]], Iterable[pa.Table]] = iter) -> FrozenJob:
    """The run's plan and intent: those that stand at the output, or new ones, frozen there now.

    choose  which of the input's units (tables of pictures) the plan has; all, unless it is told otherwise
    """
    job = open_job(config.output)
    reused = open_earlier(config.reuse) if config.reuse else None
    exclude = Exclusion(read_keys(config.exclude, flag="--exclude") if config.exclude else ())
    # an input that has grown since is another input: an unfinished run goes on with the version it began with
    source = inputs.describe_input(config.input, exclude.keys, frozen=None if job is None else job.input)
    if job is None:
        storage.prove_put_if_absent(config.output)
    asked = _asked_boxes(config)
    whole = choose is iter and config.limit is None
    with choose_boxes(asked, source, config.output, job, reused=reused, whole=whole) as boxes:
        intent = _intent(config, model.directory, boxes.choice, job or reused)
        if reused is not None:
            refuse_computed_otherwise(str(config.reuse), reused, intent)
        if reused is not None and job is None and config.backend == "auto":
            _refuse_missing_backend(str(config.reuse), intent["backend"])
        if job is None:
            units = inputs.plan_units(source, pictures_per_unit=config.pictures_per_unit, limit=config.limit,
                                      exclude=exclude)
            put_model(model.directory, storage.join(config.output, keypoints.MODEL_FOLDER))
            about = {"model": {"name": model.name, "version": model.version, "digest": intent["model"]}}
            job = freeze_job(config.output, choose(units), input=source, intent=intent, about=about | boxes.about,
                             before_commit=lambda job: {"given": exclude.counts() | boxes.freeze(job)})
            _tell_planned(config, job, exclude)
        refuse_other_intent(job, config.output, input=source, intent=intent)
        if sealed_counts(config.output, job) is None:
            boxes.freeze(job)  # a run that an earlier program began has its boxes in another form
    return job


def refuse_early(config: AnnotationConfig) -> None:
    """Refuse what would else come out only when Ray is up: an input or boxes that aren't there."""
    inputs.refuse_nothing(config.input)
    kind = kind_at(config.input)
    if kind in (KEYPOINTS, TRAINING):
        raise ConfigError(f"--input {config.input} holds {kind}, and no pictures. Give a place of pictures or shards.")
    refuse_unservable(_asked_boxes(config), inputs.describe_input(config.input))


def _asked_boxes(config: AnnotationConfig) -> AskedBoxes:
    return AskedBoxes(**{name.name: getattr(config, name.name) for name in dataclasses.fields(AskedBoxes)})


def _tell_planned(config: AnnotateConfig, job: FrozenJob, exclude: Exclusion) -> None:
    logger.info("%s planned in %s", counted(job.plan["pictures"], "picture"), counted(job.num_units, "unit"))
    if exclude.keys:
        logger.info("%s left out by --exclude %s", counted(exclude.counts()["excluded"], "picture"), config.exclude)
    if doubt := exclude.doubt():
        logger.warning("--exclude %s: %s", config.exclude, doubt)


def _intent(config: AnnotateConfig, model: Path, choice: BoxChoice, before: FrozenJob | None) -> dict[str, Any]:
    """All that can change a row, with `auto` resolved: as `before` had it, the run that goes on or whose rows are
    copied, else by the cluster at hand."""
    from pipeline.model.directory import model_digest

    def resolve(name: str, at_hand: Callable[[], Any]) -> Any:
        if (asked := getattr(config, name)) not in (None, "auto"):
            return asked
        return (before.intent.get(name) if before else None) or at_hand()

    given = ("batch_size", "flip", "deterministic", "limit", "pictures_per_unit", "max_pixels")
    backend = resolve("backend", _backend_at_hand)
    resolved = {"backend": backend, "threads": resolve("threads", actor_threads),
                "precision": resolve("precision", lambda: native_precision(gpu=backend == "cuda"))}
    _refuse_compiling(config, backend)
    # what came later is there only where it is asked for, so that older outputs go on
    added = {name: value for name in ("oks_nms", "compile", "accept_truncated")
             if (value := getattr(config, name)) is not None and value is not False}
    return {name: getattr(config, name) for name in given} | added | resolved | {
        "boxes": choice.intent(), "model": model_digest(model), "row_version": ROW_VERSION}


def _backend_at_hand() -> str:
    from pipeline.model.inference import cpu_backend

    if num_gpus():
        return "cuda"
    if num_cpus():
        warn_of_cpus("--set backend=cuda --set actors=N")
    return cpu_backend()


def _refuse_missing_backend(reuse: str, backend: str) -> None:
    """Refuse (ConfigError) the backend of the reused run where it isn't here."""
    from pipeline.model.inference import has_openvino

    missing = {"cuda": not num_gpus(), "openvino": not has_openvino()}
    if missing.get(backend):
        remedy = ("run where there are GPUs, or give --set backend=cuda --set actors=N if the cluster starts them"
                  if backend == "cuda" else "pip install '.[openvino]', on every node")
        raise ConfigError(f"--reuse {reuse}: its rows were computed by backend {backend}, which isn't here, and others "
                          f"give other bits: {remedy}; or leave --reuse out, to compute all anew.")


def _refuse_compiling(config: AnnotateConfig, backend: str) -> None:
    able = {"cuda"} if config.compile == "reduce-overhead" else {"cpu", "cuda"}
    if config.compile is not None and backend not in able:
        raise ConfigError(f"compile={config.compile} is for backend {' or '.join(sorted(able))}, and this run's is "
                          f"{backend}. Set backend, or leave compile out.")


# --- annotating ---------------------------------------------------------------------------------------------------


def _annotate_missing_units(config: AnnotateConfig, job: FrozenJob) -> dict[str, Any]:
    """Every unit without a part, through the actor pool; what this run has done (`Progress.so_far`), {} if nothing.

    Refuses (OSError) to go on when units are left that none of its passes could do.
    """
    missing = missing_units(config.output, job)
    logger.info("%d of %s committed; annotating %d", job.num_units - len(missing), counted(job.num_units, "unit"),
                len(missing))
    if not missing:
        return {}
    done = sorted(set(range(job.num_units)).difference(missing))
    missing = _in_an_order_of_our_own(config.output, missing)
    progress = Progress(len(missing), budget=_budget(config, job), output=config.output)
    with (drivers.Heartbeat(config.output, progress.so_far), progress.telling_of_silence(),
          progress.counting(keypoints.counts_of_parts(config.output, map(job.part_name, done)))):
        missing = _pass_after_pass(config, job, missing, progress)
    if missing:
        _refuse_units_left(job, missing, progress)
    return progress.so_far()


def _budget(config: AnnotateConfig, job: FrozenJob) -> RejectionBudget:
    return RejectionBudget(job.plan["pictures"], config.max_rejected_share, config.max_rejected)


def missing_units(output: str, job: FrozenJob) -> list[int]:
    """The units without a part, ascending, from one listing. Refuses (DataError) an output that was begun again."""
    refuse_if_begun_again(output, job)
    return sorted(set(range(job.num_units)) - committed_units(output, keypoints.FOLDER, job))


def _in_an_order_of_our_own(output: str, units: list[int]) -> list[int]:
    """Ascending; shuffled, with a warning, where another driver is at work: then few units are begun by both."""
    others = [sign for sign in drivers.signs_of_life(output) if sign.alive()]
    if not others:
        return units
    logger.warning("another driver is at work here, or was %.0f s ago: %s, process %d. Rows are safe, but units that "
                   "both begin are paid for twice; if that isn't meant, stop one of them.", others[-1].age_s(),
                   others[-1].host, others[-1].pid)
    return random.sample(units, len(units))


def _pass_after_pass(config: AnnotateConfig, job: FrozenJob, units: list[int], progress: Progress) -> list[int]:
    """The units, and after a pause those again that the service made fail; the units that are left at the end."""
    pauses = iter(PAUSES_S)
    while True:
        before = len(progress.answered)
        _pass(config, job, units, progress)
        if len(progress.answered) > before:
            pauses = iter(PAUSES_S)
        missing = missing_units(config.output, job)
        passing = [unit for unit in missing if unit in progress.failed and progress.failed[unit].passing]
        pause_s = next(pauses, None)
        if not passing or pause_s is None:
            return missing
        logger.warning("%s could not be done: %s; once more in %.0f s", counted(len(passing), "unit"),
                       progress.failed[passing[0]].failure, pause_s)
        time.sleep(pause_s)
        # those last that may fail again; those never that will
        units = [unit for unit in missing if unit not in progress.failed] + passing


def _pass(config: AnnotateConfig, job: FrozenJob, units: list[int], progress: Progress) -> None:
    """The units once through the pool, and those that ended their process twice once more, with care."""
    for unit in units:
        progress.failed.pop(unit, None)
    if not _take_receipts(_receipts(config, job, units), progress):
        return
    if crashed := _unanswered(config, job, units, progress):
        logger.warning("%s ended the process each time; once more, with the pictures decoded in processes of their own",
                       counted(len(crashed), "unit"))
        if _take_receipts(_receipts(config, job, crashed, careful=True), progress):
            for unit in _unanswered(config, job, crashed, progress):
                progress.add(Receipt(unit, FAILED, failure=f"unit {unit} ended its process each time, also with its "
                                     "pictures decoded apart. What Ray says of its workers tells why; often, memory."))


def _unanswered(config: AnnotateConfig, job: FrozenJob, units: list[int], progress: Progress) -> list[int]:
    return sorted(set(missing_units(config.output, job)).intersection(units) - progress.failed.keys())


def _take_receipts(receipts: Generator[Receipt], progress: Progress) -> bool:
    """Count them all; False if the service failed so often in a row that the rest was left."""
    in_a_row = 0
    with contextlib.closing(receipts):  # while Ray is up; Ray Data's own end of it prints a traceback later
        for receipt in receipts:
            progress.add(receipt)
            # a damaged shard says nothing of the service
            in_a_row = 0 if receipt.outcome != FAILED else in_a_row + receipt.passing
            if in_a_row == FAILURES_IN_A_ROW:
                return False
    return True


def _receipts(config: AnnotateConfig, job: FrozenJob, units: list[int], *,
              careful: bool = False) -> Generator[Receipt]:
    earlier: dict[int, list[str]] = {}
    if config.reuse:
        earlier = dict(earlier_parts(config.reuse, open_earlier(config.reuse), config.output, job, sorted(units)))
    tasks = [UnitTask(unit, tuple(earlier.get(unit, ()))) for unit in units]
    pool = pool_sizes(job, actors=config.actors, detectors=config.detectors, decoders=config.decoders)
    return annotate_units(config.output, job, tasks, pool=pool, reuse=config.reuse, careful=careful)


def _refuse_units_left(job: FrozenJob, missing: list[int], progress: Progress) -> None:
    reasons = [progress.failed[unit].failure for unit in missing if unit in progress.failed]
    more = [f"and {len(reasons) - 3} more"] if len(reasons) > 3 else []
    raise OSError(f"{len(missing)} of {job.num_units} units are not annotated; what is committed stays. "
                  "Run the same command again to continue.\n" + "\n".join(f"  {one}" for one in reasons[:3] + more))


# --- sealing ------------------------------------------------------------------------------------------------------


def _seal(config: AnnotateConfig, job: FrozenJob) -> dict[str, Any]:
    """Put `_SUCCESS`, when the parts' own counts say that every planned picture has its row; the counts."""
    counts, parts = count_parts(config.output, job)
    _budget(config, job).check(counts)
    seal(config.output, job, counts, parts)
    return counts


def _refuse_lost_parts(output: str, job: FrozenJob) -> None:
    if missing := missing_units(output, job):
        raise DataError(f"{output} has {SUCCESS}, but {len(missing)} of its parts are gone since, the first of them "
                        f"{job.part_name(missing[0])}. Put them back, or remove {SUCCESS} and run again, to make them.")


def _result(output: str, job: FrozenJob, counts: dict[str, Any], *, committed: int) -> dict[str, Any]:
    reasons = f" ({ranked(counts['reasons'])})" if counts["reasons"] else ""
    logger.info("%s: %d planned = %d ok + %d without people + %d rejected%s; %s", output, job.plan["pictures"],
                counts["ok"], counts["no_person"], counts["rejected"], reasons, counted(counts["persons"], "person"))
    return {"job": "annotate", "output": output, "digest": job.digest, "units": job.num_units,
            "units_annotated": committed, "counts": counts, "given": job.about.get("given", {})}
