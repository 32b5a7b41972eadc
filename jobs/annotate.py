"""Pictures -> a keypoint dataset, by a Ray Data actor pool: freeze, annotate each missing unit, count, seal.

One unit becomes one object, put if absent: that it exists is the commit. So the same command again does only what is
missing, whatever ended the run before.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.record import record_run
from jobs.start_ray import num_cpus, num_gpus, refuse_unshared, start_ray
from pipeline import annotation_input as inputs
from pipeline import keypoints, storage
from pipeline.config import AnnotateConfig, locations
from pipeline.errors import DataError
from pipeline.model_reference import FoundModel, download_model, find_model, put_model
from pipeline.rows import ROW_VERSION
from pipeline.units import (
    FrozenJob,
    committed_units,
    freeze_job,
    open_job,
    part_footers,
    read_unit,
    refuse_other_intent,
    total_counts,
)

logger = logging.getLogger("jobs.annotate")
MODEL_FOLDER = "_model"
SUCCESS = "_SUCCESS"
PROGRESS_EVERY_S = 5
ACTOR_RESTARTS = 4
DECODER = "pipeline.images"


def run(config: AnnotateConfig) -> dict[str, Any]:
    """Annotate the input; gives the counts, and where the dataset is."""
    config = locations(config, "input", "output")
    storage.refuse_overlap(config.input, config.output)
    with tempfile.TemporaryDirectory() as folder:
        model = find_model(config.model, settings=config.tracking, into=Path(folder))
        with start_ray():
            refuse_unshared(inputs=[config.input], outputs=[config.output])
            job, choice = _freeze(config, model)
            if storage.exists(storage.join(config.output, SUCCESS)):
                logger.info("%s is complete; nothing was done", config.output)
                return _result(config.output, job, units_done=0)
            done = _annotate_missing_units(config, job, choice)
    result = _seal(config, job, units_done=done)
    record_run(config.tracking, "annotate", counts=result["counts"], dataset=(config.output, job.digest),
               params={"input": config.input, "output": config.output, "model_ref": config.model, **job.intent})
    return result


# --- freezing -----------------------------------------------------------------------------------------------------


def _freeze(config: AnnotateConfig, model: FoundModel) -> tuple[FrozenJob, inputs.BoxChoice]:
    """The run's plan and intent: those that stand at the output, or new ones, frozen there now."""
    job = open_job(config.output)
    # an input that has grown since is another input: an unfinished run goes on with the version it began with
    source = job.input if job is not None and job.input["uri"] == config.input else inputs.describe_input(config.input)
    if job is None:
        storage.prove_put_if_absent(config.output)
    choice = inputs.choose_boxes(config.boxes, source, config.output,
                                 min_score=config.min_box_score, max_persons=config.max_persons)
    intent = _intent(config, model.directory, choice, {} if job is None else job.intent)
    if job is None:
        units = inputs.plan_units(source, pictures_per_unit=config.pictures_per_unit, limit=config.limit)
        put_model(model.directory, storage.join(config.output, MODEL_FOLDER))
        about = {"model": {"name": model.name, "version": model.version, "digest": intent["model"]}}
        job = freeze_job(config.output, units, input=source, intent=intent, about=about)
        logger.info("%d pictures planned in %d units", job.plan["pictures"], job.num_units)
    refuse_other_intent(job, config.output, input=source, intent=intent)
    return job, choice


def _intent(config: AnnotateConfig, model: Path, choice: inputs.BoxChoice, frozen: dict[str, Any]) -> dict[str, Any]:
    """All that can change a row, with `auto` resolved: by the frozen run, else by the cluster at hand."""
    from pipeline.model.directory import model_digest

    given = ("batch_size", "flip", "deterministic", "limit", "pictures_per_unit", "max_pixels")
    resolved = {
        "backend": config.backend if config.backend != "auto" else "cuda" if num_gpus() else "cpu",
        "precision": config.precision if config.precision != "auto" else "float32",
        # one thread for each actor keeps two cores busy with decoding and network at once
        "threads": config.threads or (1 if num_cpus() <= 4 else 4)}
    automatic = [name for name in resolved if getattr(config, name) in (None, "auto")]
    resolved |= {name: frozen[name] for name in automatic if name in frozen}
    return {name: getattr(config, name) for name in given} | resolved | {
        "boxes": choice.intent(), "model": model_digest(model), "row_version": ROW_VERSION}


# --- annotating ---------------------------------------------------------------------------------------------------


def _annotate_missing_units(config: AnnotateConfig, job: FrozenJob, choice: inputs.BoxChoice) -> int:
    """Every unit without a part, through the actor pool; how many were committed."""
    done = committed_units(config.output, keypoints.FOLDER, job)
    missing = sorted(set(range(job.num_units)) - done)
    logger.info("%d of %d units are committed; annotating %d", len(done), job.num_units, len(missing))
    if not missing:
        return 0
    progress = Progress(len(missing), budget=config.max_rejected_share * job.plan["pictures"])
    for receipt in _receipts(config, job, choice, missing):
        progress.add(receipt)
    crashed = sorted(set(missing) - progress.answered - committed_units(config.output, keypoints.FOLDER, job))
    if crashed:
        logger.warning("%d units ended their process each time; once more, with the pictures decoded in processes of "
                       "their own", len(crashed))
        for receipt in _receipts(config, job, choice, crashed, careful=True):
            progress.add(receipt)
    left = len(missing) - len(committed_units(config.output, keypoints.FOLDER, job) - done)
    if left:
        reasons = "\n".join(f"  {failure}" for failure in progress.failures[:3])
        raise OSError(f"{left} of {job.num_units} units are not annotated; what is committed stays. "
                      f"Run the same command again to continue.\n{reasons}".rstrip())
    return len(missing)


def _receipts(config: AnnotateConfig, job: FrozenJob, choice: inputs.BoxChoice, missing: list[int], *,
              careful: bool = False) -> Iterator[dict[str, Any]]:
    """Annotate the units in an actor pool; what each came to, as they end. A unit that ended its actor twice, as a
    picture can on which the decoder crashes, has none. `careful`: decode in processes apart."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a unit that kills its process costs itself; it stays uncommitted
    gpu = job.intent["backend"] == "cuda"
    actors = config.actors or (max(1, num_gpus()) if gpu else max(1, num_cpus() // job.intent["threads"]))
    # the unit is the row: nothing that Ray merges or splits can break what belongs together
    units = ray.data.from_items([{"unit": unit} for unit in missing], override_num_blocks=len(missing))
    receipts = units.map_batches(
        UnitAnnotator, batch_size=1, fn_constructor_args=(config.output, job, asdict(choice), careful, DECODER),
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(missing))),
        # less than a whole CPU for each thread: actors that take every CPU leave none to Ray Data, which then waits
        num_cpus=0.9 * job.intent["threads"], num_gpus=1 if gpu else 0,
        max_restarts=ACTOR_RESTARTS, max_task_retries=1)
    try:
        for batch in receipts.iter_batches(batch_size=None):
            for i in range(len(batch["unit"])):
                yield {name: values[i] for name, values in batch.items()}
    except ray.exceptions.RayError as error:
        raise OSError(f"the actors that annotate {config.output} could not go on; what is committed stays, and the "
                      f"same command continues. {error}") from error


class UnitAnnotator:
    """An actor that holds the model and turns a unit's number into the unit's committed part."""

    def __init__(self, output: str, job: FrozenJob, choice: dict[str, Any], careful: bool, decoder: str) -> None:
        import torch

        from pipeline.model.directory import model_digest
        from pipeline.prediction import Predictor

        self.output, self.job, self.careful, self.decoder = output, job, careful, decoder
        intent = job.intent
        if intent["backend"] == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"{output} was begun on GPUs, but this actor on {os.uname().nodename} has none. "
                               "Continue it where there are GPUs, or choose a new --output.")
        torch.use_deterministic_algorithms(intent["deterministic"])
        with tempfile.TemporaryDirectory() as folder:
            model = download_model(storage.join(output, MODEL_FOLDER), Path(folder))
            if model_digest(model) != intent["model"]:
                raise RuntimeError(f"{output}/{MODEL_FOLDER} is not the model that this run was begun with. "
                                   "Restore it, or choose a new --output.")
            self.predictor = Predictor(model, device=intent["backend"], precision=intent["precision"],
                                       flip=intent["flip"], batch_size=intent["batch_size"],
                                       threads=intent["threads"])
        self.boxes = inputs.box_source(inputs.BoxChoice(**choice))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Annotate and commit one unit (`unit` int [1]); what it came to, or why the store failed."""
        unit = int(batch["unit"][0])
        try:
            counts, failure = self._annotate(unit), ""
        except (storage.StorageError, DataError) as error:
            counts, failure = {}, f"unit {unit}: {error}"
        return {"unit": [unit], "failure": [failure], "counts": [json.dumps(counts)]}

    def _annotate(self, unit: int) -> dict[str, Any]:
        from pipeline.annotation import annotate_pictures
        from pipeline.images import PictureLimits
        from pipeline.isolation import open_decoder
        from pipeline.rows import count_rows

        planned = read_unit(self.output, self.job, unit)
        limits = PictureLimits(max_pixels=self.job.intent["max_pixels"])
        with open_decoder(limits, isolated=self.careful, decoder=self.decoder) as decoder:
            pictures = annotate_pictures(inputs.pictures_of_unit(self.job.input, planned, self.boxes), self.predictor,
                                         decode=decoder.decode)
        data = keypoints.part_bytes(pictures, self.predictor.skeleton, job=self.job.digest,
                                    model={**self.job.about["model"], "source": self.predictor.spec.source})
        storage.put_if_absent(storage.join(self.output, keypoints.FOLDER, self.job.part_name(unit)), data)
        return count_rows(pictures)


class Progress:
    """Log lines with what is done and how long the rest takes; stops the run when too many pictures are refused."""

    def __init__(self, units: int, *, budget: float) -> None:
        self.units, self.budget = units, budget
        self.done = 0
        self.answered: set[int] = set()
        self.failures: list[str] = []
        self.counts: dict[str, Any] = {}
        self.began = self.last = time.monotonic()

    def add(self, receipt: dict[str, Any]) -> None:
        """Count one unit's receipt."""
        self.done += 1
        self.answered.add(int(receipt["unit"]))
        if receipt["failure"]:
            self.failures.append(receipt["failure"])
        self.counts = total_counts([self.counts, json.loads(receipt["counts"])])
        refuse_too_many_rejected(self.counts, self.budget)
        now = time.monotonic()
        if now - self.last >= PROGRESS_EVERY_S or self.done == self.units:
            self.last = now
            seconds = now - self.began
            logger.info("%d of %d units, %d pictures, %.1f persons/s, %d rejected, about %.0f s left",
                        self.done, self.units, self.counts.get("pictures", 0),
                        self.counts.get("persons", 0) / seconds, self.counts.get("rejected", 0),
                        seconds / self.done * (self.units - self.done))


def refuse_too_many_rejected(counts: dict[str, Any], budget: float) -> None:
    """End the run (DataError) once more pictures were rejected than the budget allows, with the commonest reasons."""
    if counts.get("rejected", 0) > budget:
        reasons = sorted(counts["reasons"].items(), key=lambda item: -item[1])[:3]
        raise DataError(f"{counts['rejected']} pictures were rejected, more than the {budget:g} that "
                        f"max_rejected_share allows; commonest: {', '.join(f'{name} {n}' for name, n in reasons)}. "
                        "What is committed stays; mend the input, or allow more by --set max_rejected_share=1.")


# --- sealing ------------------------------------------------------------------------------------------------------


def _seal(config: AnnotateConfig, job: FrozenJob, *, units_done: int) -> dict[str, Any]:
    """Put `_SUCCESS`, when the parts' own counts say that every planned picture has its row."""
    counts = _counts_of_parts(config.output, job)
    refuse_too_many_rejected(counts, config.max_rejected_share * job.plan["pictures"])
    accounted = counts["ok"] + counts["no_person"] + counts["rejected"]
    if not accounted == counts["pictures"] == job.plan["pictures"]:
        raise DataError(f"{config.output}: {job.plan['pictures']} pictures were planned, but the parts account for "
                        f"{accounted}; _SUCCESS is not written.")
    success = {"job": job.digest, "units": job.num_units, "counts": counts}
    storage.put_if_absent(storage.join(config.output, SUCCESS), json.dumps(success, indent=1).encode())
    return _result(config.output, job, units_done=units_done)


def _counts_of_parts(output: str, job: FrozenJob) -> dict[str, Any]:
    names = map(job.part_name, range(job.num_units))
    return total_counts(keypoints.pose_metadata(footer)["counts"]
                        for footer in part_footers(output, keypoints.FOLDER, names))


def _result(output: str, job: FrozenJob, *, units_done: int) -> dict[str, Any]:
    counts = json.loads(storage.read_object(storage.join(output, SUCCESS)))["counts"]
    logger.info("%s: %d planned = %d ok + %d without people + %d rejected %s; %d persons", output,
                job.plan["pictures"], counts["ok"], counts["no_person"], counts["rejected"],
                counts["reasons"] or "", counts["persons"])
    return {"job": "annotate", "output": output, "digest": job.digest, "units": job.num_units,
            "units_annotated": units_done, "counts": counts}
