"""Object storage -> shard dataset, by Ray tasks: list, compare with what is there, freeze the plan, read each shard's
pictures, write, seal. Into an existing dataset it adds what is new or changed, as the next version.

One object under the prefix becomes one row; one that can't be taken keeps its row, with its reason.
"""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.record import record_run
from jobs.shard_tasks import ShardTask, ShardWriter
from jobs.start_ray import num_cpus, refuse_unshared, start_ray
from pipeline import shard_plan, shards, storage
from pipeline import shard_versions as versions
from pipeline.coco import AnnotatedImage, Annotations, parse_annotations
from pipeline.config import ShardConfig, locations
from pipeline.errors import ConfigError, DataError
from pipeline.hash_buckets import HASH, HashBuckets
from pipeline.images import PictureLimits
from pipeline.inventory import read_keys
from pipeline.outputs import SHARDS, refuse_other_kind
from pipeline.rows import ROW_VERSION
from pipeline.shard_listing import Listing, locator
from pipeline.shard_plan import Bounds
from pipeline.units import (
    UNITS_PER_PLAN_FILE,
    FrozenJob,
    committed_units,
    freeze_job,
    open_job,
    read_units,
    refuse_other_intent,
)
from pipeline.words import counted, ranked

logger = logging.getLogger("jobs.shard")
PICTURES_PER_PLAN_FILE = 1_000_000
# settings that datasets of older programs were made without, and what they did
ADDED_SETTINGS = {"accept_truncated": False, "max_pixels": 128_000_000, "duplicates": "keep"}
# the same picture may come, go and come back: its part must not be that of an earlier version
VERSION_KEY = "dataset_version"


@dataclass(frozen=True)
class AnnotationFile:
    """The annotations, and the SHA-256 of their file."""

    annotations: Annotations
    sha256: str

    @property
    def images(self) -> dict[str, AnnotatedImage]:
        """The annotated pictures by name."""
        return self.annotations.images


def run(config: ShardConfig) -> dict[str, Any]:
    """Shard the pictures, or add to a dataset what it lacks; gives the counts, and where the dataset is."""
    config = locations(config, "images", "output", "annotations")
    _refuse_wrong_command(config)
    annotations = _read_annotations(config.annotations)
    base = _newest(config.output)
    if not base.version:
        refuse_other_kind(config.output, SHARDS)
    job = _unfinished_job(config, annotations, base)
    written = 0 if job is None else _finish(config, job, annotations, base)
    if job is None or config.drop is not None:
        base = _newest(config.output)
        job = freeze_next(config, annotations, base)
        if job is None:
            logger.info("%s has all of it; nothing was written", config.output)
            return _result(config.output, written=0)
        written = _finish(config, job, annotations, base)
    result = _result(config.output, written=written)
    record_run(config.tracking, "shard", params={**job.input, "output": config.output, **job.intent},
               counts=result["counts"], dataset=(config.output, job.digest))
    return result


def _finish(config: ShardConfig, job: FrozenJob, annotations: AnnotationFile | None, base: shards.ShardDataset) -> int:
    """Write what is missing of the version after `base`, and seal it; how many shards were written."""
    written = _write_missing_parts(config, job, annotations, base.version)
    _seal(config.output, job, annotations, base)
    return written


def _newest(output: str) -> shards.ShardDataset:
    version = shards.newest_version(output)
    return shards.open_shards(output, version) if version else versions.NO_VERSION


def _refuse_wrong_command(config: ShardConfig) -> None:
    if (config.images is None) == (config.drop is None):
        raise ConfigError("Give --images with what to shard; or --drop with the keys to take out of the dataset, and "
                          "no --images: taking out and adding are two runs.")
    if config.annotated_only and config.annotations is None:
        raise ConfigError("annotated_only=true needs --annotations, which say what is annotated.")
    if config.images is not None:
        storage.refuse_overlap(config.images, config.output)


def _read_annotations(uri: str | None) -> AnnotationFile | None:
    if uri is None:
        return None
    try:
        data = storage.read_object(uri)
    except storage.ObjectMissing:
        raise ConfigError(f"--annotations {uri}: there is no such object.") from None
    return AnnotationFile(parse_annotations(data, source=uri), hashlib.sha256(data).hexdigest())


# --- freezing -----------------------------------------------------------------------------------------------------


def _input(config: ShardConfig) -> dict[str, Any]:
    return {"images": config.images, "annotations": config.annotations}


def _intent(config: ShardConfig, annotations: AnnotationFile | None, version: int) -> dict[str, Any]:
    """All that can change a row or its place."""
    names = ("images_per_shard", "bytes_per_shard", "include", "annotated_only", "limit", "seed", "validate_pictures",
             *ADDED_SETTINGS)
    return {name: getattr(config, name) for name in names} | {
        "annotations_sha256": annotations and annotations.sha256, "row_version": ROW_VERSION, VERSION_KEY: version}


def _unfinished_job(config: ShardConfig, annotations: AnnotationFile | None,
                    base: shards.ShardDataset) -> FrozenJob | None:
    """The job of the next version that an earlier run has frozen, if there is one and this command may finish it."""
    version = base.version + 1
    job = open_job(config.output, versions.job_name(version))
    if job is None:
        return None
    if job.num_units and config.drop is not None:
        raise DataError(f"{config.output}: the run that adds version {version} isn't finished. Finish it by its own "
                        "command, then drop.")
    if job.num_units:  # one without units only takes rows out: nothing that a setting could change
        refuse_other_intent(job, config.output, input=_input(config), intent=_intent(config, annotations, version),
                            added={**ADDED_SETTINGS, VERSION_KEY: version})
    logger.info("continuing version %d, which an earlier run began; run again for what came since", version)
    return job


def freeze_next(config: ShardConfig, annotations: AnnotationFile | None,
                base: shards.ShardDataset) -> FrozenJob | None:
    """Freeze the job of the version after `base`; None where there is nothing to do."""
    if not base.version and config.drop is not None:
        raise DataError(f"{config.output} holds no shard dataset to drop anything from.")
    if not base.version:
        storage.prove_put_if_absent(config.output)  # before a listing that may take an hour
    else:
        _refuse_other_settings(config, annotations, base)
    job = _freeze_drop(config, base) if config.drop is not None else _freeze_growth(config, annotations, base)
    if job is not None and base.version:
        changes = ", ".join(f"{number} {change}" for change, number in job.about["changes"].items())
        logger.info("version %d: %s", base.version + 1, changes)
    return job


def _refuse_other_settings(config: ShardConfig, annotations: AnnotationFile | None, base: shards.ShardDataset) -> None:
    """A dataset grows by the settings with which it was made; the annotations may have grown too."""
    if config.drop is not None:
        return  # what is taken out doesn't depend on settings
    before = versions.open_version_job(config.output, base.version)
    if before.input["annotations"] and annotations is None:
        raise ConfigError(f"{config.output} was made with --annotations {before.input['annotations']}. Give them, or "
                          "what they have become, or choose a new --output.")
    if base.skeleton is not None and annotations is not None and annotations.annotations.skeleton != base.skeleton:
        raise ConfigError(f"{config.annotations} has another skeleton than {config.output} version {base.version}. "
                          "Choose a new --output.")
    same = {"annotations": before.input["annotations"]}
    refuse_other_intent(
        before, config.output, input={**_input(config), **same}, added={**ADDED_SETTINGS, VERSION_KEY: base.version},
        intent={**_intent(config, annotations, base.version),
                "annotations_sha256": before.intent["annotations_sha256"]})


def _freeze_growth(config: ShardConfig, annotations: AnnotationFile | None,
                   base: shards.ShardDataset) -> FrozenJob | None:
    """Freeze what is to be taken, in shards, and what no longer counts."""
    images = annotations.images if annotations else {}
    listing = Listing(str(config.images), include=config.include, limit=config.limit, annotated=images,
                      annotated_only=config.annotated_only)
    with HashBuckets(shard_plan.LISTED) as fresh:
        gone = _compare(config, listing, annotations, base, into=fresh)
        num_taken = int(fresh.rows.sum())
        logger.info("%d objects listed under %s, %d to take", listing.count, config.images, num_taken)
        if not num_taken and not len(gone):
            return None
        if base.version:
            storage.prove_put_if_absent(config.output)
        num_removed = _name_removed(gone)
        changed = len(gone) - num_removed
        intent = _intent(config, annotations, base.version + 1)
        job = freeze_job(
            config.output, shard_plan.assign_shards(fresh, Bounds(config.images_per_shard, config.bytes_per_shard)),
            input=_input(config), intent=intent, name=versions.job_name(base.version + 1),
            dropped=gone if base.version else None, accept_winner=not base.version,
            about={"changes": {"new": num_taken - changed, "changed": changed, "removed": num_removed},
                   "listed": listing.count, "annotated_not_listed": len(images) - listing.num_annotated},
            units_per_file=max(1, min(UNITS_PER_PLAN_FILE, PICTURES_PER_PLAN_FILE // config.images_per_shard)))
    refuse_other_intent(job, config.output, input=_input(config), intent=intent)
    return job


def _compare(config: ShardConfig, listing: Listing, annotations: AnnotationFile | None, base: shards.ShardDataset, *,
             into: HashBuckets) -> pa.Table:
    """Put what is to be taken into `into`; the rows of `base` (shard_plan.DROPPED) that no longer count."""
    with HashBuckets(shard_plan.LISTED) as listed, HashBuckets(shard_plan.LIVE) as live:
        shard_plan.spread(listing.tables(), listed, seed=config.seed)
        known = versions.rows_to_compare(base, _changed_annotations(annotations, base))
        shard_plan.spread(known, live, seed=config.seed)
        dropped = [shard_plan.DROPPED.empty_table()]
        for take, drop in shard_plan.compare(listed, live, left_out=versions.left_out(base), source=str(config.images),
                                             look_again=versions.look_again_at(locator(str(config.images)))):
            into.add(take.drop_columns(HASH), take[HASH].to_numpy())
            dropped.append(drop)
    return pa.concat_tables(dropped)


def _name_removed(gone: pa.Table) -> int:
    """Say which pictures are no longer listed; how many there are."""
    removed = gone.filter(pc.equal(gone["why"], shard_plan.REMOVED))["key"]
    if len(removed):
        names = ", ".join(removed.slice(0, 5).to_pylist())
        logger.info("%d no longer listed, and dropped: %s%s", len(removed), names, ", ..." if len(removed) > 5 else "")
    return len(removed)


def _changed_annotations(annotations: AnnotationFile | None,
                         base: shards.ShardDataset) -> dict[str, AnnotatedImage] | None:
    """The annotations, if they aren't those that the version was made with."""
    if not base.version or (annotations and annotations.sha256) == base.json["source"]["annotations_sha256"]:
        return None
    return annotations.images if annotations else {}


def _freeze_drop(config: ShardConfig, base: shards.ShardDataset) -> FrozenJob | None:
    """A version without some keys: their rows no longer count, and they stay out of all later versions."""
    rows = versions.find_rows(base, read_keys(str(config.drop), flag="--drop"), source=str(config.drop))
    if not len(rows):
        return None
    storage.prove_put_if_absent(config.output)
    before = versions.open_version_job(config.output, base.version)
    intent = {**before.intent, VERSION_KEY: base.version + 1}
    return freeze_job(config.output, [], input=before.input, intent=intent, dropped=rows,
                      accept_winner=False, name=versions.job_name(base.version + 1),
                      about={"changes": {"dropped on request": len(rows)}})


# --- writing ------------------------------------------------------------------------------------------------------


def _write_missing_parts(config: ShardConfig, job: FrozenJob, annotations: AnnotationFile | None,
                         base_version: int) -> int:
    """One Ray task for each shard that isn't there yet; how many were written."""
    earlier = [versions.open_version_job(config.output, version) for version in range(1, base_version + 1)]
    missing = sorted(set(range(job.num_units))
                     - committed_units(config.output, shards.FOLDER, job, earlier=earlier))
    logger.info("%d of %d shards are there; writing %d", job.num_units - len(missing), job.num_units, len(missing))
    if not missing:
        return 0
    task = ShardTask(images=str(config.images), output=config.output, threads=config.ray.threads,
                     full=config.validate_pictures == "full",
                     limits=PictureLimits(max_pixels=config.max_pixels, accept_truncated=config.accept_truncated))
    with start_ray():
        refuse_unshared(inputs=[task.images], outputs=[config.output])
        writer = ShardWriter(task, job, at_once=config.ray.tasks or 2 * num_cpus(), total=len(missing))
        for unit, planned in read_units(config.output, job, missing):
            images = {key: annotations.images.get(key) for key in planned["key"].to_pylist()} if annotations else {}
            writer.submit(unit, planned, images)
        writer.finish()
    return len(missing)


# --- sealing ------------------------------------------------------------------------------------------------------


def _seal(output: str, job: FrozenJob, annotations: AnnotationFile | None, base: shards.ShardDataset) -> None:
    source = base.json.get("source", {}) | {
        **job.input, "plan": job.plan, "job": job.digest, "annotations_sha256": job.intent["annotations_sha256"],
        "listed": job.about.get("listed"), "annotated_not_listed": job.about.get("annotated_not_listed")}
    skeleton = base.skeleton
    if annotations is not None:
        source["annotation_counts"], skeleton = annotations.annotations.counts, annotations.annotations.skeleton
    versions.seal(output, base.version + 1, job, base, source=source, skeleton=skeleton,
                  keep_copies=job.intent.get("duplicates") != "once")


def _result(output: str, *, written: int) -> dict[str, Any]:
    dataset = shards.open_shards(output)
    counts = dataset.json["counts"]
    reasons = f" ({ranked(counts['reasons'])})" if counts["reasons"] else ""
    logger.info("%s version %d: %s = %d pictures + %d refused + %d that are no pictures%s; %s (%d trainable); %s",
                output, dataset.version, counted(counts["rows"], "row"), counts["pictures"], counts["refused"],
                counts.get("not_pictures", 0), reasons, counted(counts["persons"], "person"), counts["trainable"],
                counted(counts.get("duplicates", 0), "duplicate"))
    return {"job": "shard", "output": output, "dataset_version": dataset.version, "shards": len(dataset.parts),
            "shards_written": written, "changes": dataset.json.get("changes"), "counts": counts}
