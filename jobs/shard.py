"""Object storage -> shard dataset, by Ray tasks: list, plan, freeze, read each shard's pictures, write, seal.

One object under the prefix becomes one row; one that can't be taken keeps its row, with its reason.
"""

import fnmatch
import functools
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

from jobs.record import record_run
from jobs.start_ray import num_cpus, start_ray
from pipeline import shards, storage
from pipeline.coco import AnnotatedImage, Annotations, parse_annotations
from pipeline.config import ShardConfig, locations
from pipeline.errors import ConfigError, DataError
from pipeline.images import PictureLimits
from pipeline.pose.skeleton import Skeleton
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

logger = logging.getLogger("jobs.shard")
JOB = "_job-000001.json"


def run(config: ShardConfig) -> dict[str, Any]:
    """Shard the pictures; gives the counts, and where the dataset is."""
    config = locations(config, "images", "output", "annotations")
    storage.refuse_overlap(config.images, config.output)
    annotations, annotations_sha256 = _read_annotations(config.annotations)
    inputs = {"images": config.images, "annotations": config.annotations}
    intent = _intent(config, annotations_sha256)
    job = open_job(config.output, JOB)
    if job is not None:
        refuse_other_intent(job, config.output, input=inputs, intent=intent)
    if shards.newest_version(config.output):
        logger.info("%s is complete; nothing was written", config.output)
        return _result(config.output, written=0)
    storage.prove_put_if_absent(config.output)
    if job is None:
        job = freeze_job(config.output, _plan(config, annotations), input=inputs, intent=intent, name=JOB)
        refuse_other_intent(job, config.output, input=inputs, intent=intent)
    written = _write_missing_parts(config, job, annotations)
    _seal(config.output, job, annotations, annotations_sha256)
    result = _result(config.output, written=written)
    record_run(config.tracking, "shard", params={**inputs, "output": config.output, **intent},
               counts=result["counts"], dataset=(config.output, job.digest))
    return result


def _read_annotations(uri: str | None) -> tuple[Annotations | None, str | None]:
    if uri is None:
        return None, None
    try:
        data = storage.read_object(uri)
    except storage.ObjectMissing:
        raise ConfigError(f"--annotations {uri}: there is no such object.") from None
    return parse_annotations(data, source=uri), hashlib.sha256(data).hexdigest()


def _intent(config: ShardConfig, annotations_sha256: str | None) -> dict[str, Any]:
    """All that can change a row or its place."""
    names = ("images_per_shard", "bytes_per_shard", "include", "annotated_only", "limit", "seed", "validate_pictures")
    return {name: getattr(config, name) for name in names} | {
        "annotations_sha256": annotations_sha256, "row_version": ROW_VERSION}


def _plan(config: ShardConfig, annotations: Annotations | None) -> Iterator[list[dict[str, Any]]]:
    wanted = list(_wanted(config, annotations, storage.list_objects(config.images)))
    if not wanted:
        raise DataError(f"{config.images}: nothing to shard is there. Check the prefix, --include and the annotations.")
    logger.info("%d objects listed under %s", len(wanted), config.images)
    groups = shards.assign_shards(wanted, seed=config.seed, max_pictures=config.images_per_shard,
                                  max_bytes=config.bytes_per_shard)
    for group in groups:
        yield [{"key": found.name, "etag": found.etag, "size": found.size} for found in group]


def _wanted(config: ShardConfig, annotations: Annotations | None,
            listed: Iterable[storage.StoredObject]) -> Iterator[storage.StoredObject]:
    count = 0
    for found in listed:
        named = config.include is None or fnmatch.fnmatch(found.name, config.include)
        annotated = not config.annotated_only or (annotations is not None and found.name in annotations.images)
        if named and annotated and (config.limit is None or count < config.limit):
            count += 1
            yield found


def _write_missing_parts(config: ShardConfig, job: FrozenJob, annotations: Annotations | None) -> int:
    """One Ray task for each shard that isn't there yet; how many were written."""
    missing = sorted(set(range(job.num_units)) - committed_units(config.output, shards.FOLDER, job))
    logger.info("%d of %d shards are there; writing %d", job.num_units - len(missing), job.num_units, len(missing))
    if not missing:
        return 0
    import ray

    with start_ray():
        task = ray.remote(num_cpus=1, max_retries=3)(write_shard)
        at_once = config.ray.tasks or 2 * num_cpus()
        running: dict[Any, int] = {}
        began = last = time.monotonic()
        for done, unit in enumerate(missing):
            while len(running) >= at_once:
                _wait_for_one(running)
            planned = read_unit(config.output, job, unit)
            images = {row["key"]: annotations.images.get(row["key"]) for row in planned} if annotations else {}
            running[task.remote(config, job, unit, planned, images)] = unit
            if time.monotonic() - last > 5:
                last = time.monotonic()
                logger.info("%d of %d shards, %.0f s", done - len(running), len(missing), last - began)
        while running:
            _wait_for_one(running)
    return len(missing)


def _wait_for_one(running: dict[Any, int]) -> None:
    import ray

    ready, _ = ray.wait(list(running), num_returns=1)
    unit = running.pop(ready[0])
    try:
        ray.get(ready[0])
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except ray.exceptions.RayError as error:
        raise OSError(f"shard {unit} could not be written: {error}. What is written stays; run again.") from error


def write_shard(config: ShardConfig, job: FrozenJob, unit: int, planned: list[dict[str, Any]],
                images: dict[str, AnnotatedImage | None]) -> None:
    """Read one shard's pictures and commit its part."""
    full = config.validate_pictures == "full"
    rows = [shards.shard_row(row, images.get(row["key"]), functools.partial(_read, config.images, row),
                             limits=PictureLimits(), full=full) for row in planned]
    storage.put_if_absent(storage.join(config.output, shards.FOLDER, job.part_name(unit)), shards.part_bytes(rows))


def _read(images: str, row: dict[str, Any]) -> bytes:
    return storage.read_object(storage.join(images, row["key"]), etag=row["etag"])


def _seal(output: str, job: FrozenJob, annotations: Annotations | None, annotations_sha256: str | None) -> None:
    """Write `dataset-000001.json`, last: from the parts themselves, never from a process's counters."""
    counts = [shards.part_counts(footer) for footer in part_footers(output, shards.FOLDER, job)]
    names = [job.part_name(unit) for unit in range(job.num_units)]
    parts = [shards.ShardPart(name, storage.stored_sha256(storage.join(output, shards.FOLDER, name)), count)
             for name, count in zip(names, counts, strict=True)]
    total = total_counts(counts)
    if total["rows"] != job.plan["pictures"]:
        raise DataError(f"{output}: {job.plan['pictures']} objects were planned, but the parts have "
                        f"{total['rows']} rows.")
    skeleton: Skeleton | None = annotations.skeleton if annotations else None
    source = {**job.input, "annotations_sha256": annotations_sha256, "plan": job.plan, "job": job.digest,
              "annotation_counts": annotations.counts if annotations else None}
    data = shards.dataset_json(parts, version=1, skeleton=skeleton, source=source, counts=total)
    storage.put_if_absent(storage.join(output, shards.version_name(1)), data)


def _result(output: str, *, written: int) -> dict[str, Any]:
    dataset = shards.open_shards(output)
    counts = dataset.json["counts"]
    logger.info("%s version %d: %d objects listed = %d rows; %d pictures, %d persons (%d trainable), %d refused %s",
                output, dataset.version, dataset.json["source"]["plan"]["pictures"], counts["rows"],
                counts["pictures"], counts["persons"], counts["trainable"], counts["refused"], counts["reasons"] or "")
    return {"job": "shard", "output": output, "dataset_version": dataset.version, "shards": len(dataset.parts),
            "shards_written": written, "counts": counts}
