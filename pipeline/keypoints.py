"""Keypoint datasets: a part written, its metadata read back, the whole read as one table or part by part.

It knows the form of the output, and neither how rows are computed nor by whom. What is read are the parts that the
frozen job names: another job's part among them would double persons.
"""

import json
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.ahead import THREADS, map_ahead
from pipeline.errors import DataError
from pipeline.model.settings import Decoding
from pipeline.pose.skeleton import Skeleton
from pipeline.rows import ROW_VERSION, AnnotatedPicture, count_rows, keypoint_schema, keypoint_table
from pipeline.units import FrozenJob, open_job, part_footers, total_counts

logger = logging.getLogger("pipeline.keypoints")
FOLDER = "keypoints"
SUCCESS = "_SUCCESS"
MODEL_FOLDER = "_model"
BYTES_AHEAD = 256_000_000  # of parts that are read before they are needed
FRAME = "pixels of the stored picture after its EXIF orientation; x right, y down; pixel centres at integers"
MEGVII = Decoding()
PERSON_SCORE = "box_score times the mean of the joints' scores"


@dataclass(frozen=True)
class KeypointMetadata:
    """What a keypoint dataset says of itself. `json`: the parts' `pose` metadata, with the job's `input` added.

    complete  whether the run has ended, and each unit's part is there
    """

    skeleton: Skeleton
    counts: dict[str, Any]
    model: dict[str, Any]
    json: dict[str, Any]
    complete: bool

    @property
    def low_score(self) -> float:
        """Joints with a score below it are hardly to be trusted; datasets that don't say so have the authors' scale."""
        return float(self.json.get("low_score", MEGVII.low_score))


def part_bytes(pictures: Sequence[AnnotatedPicture], skeleton: Skeleton, *, job: str, model: dict[str, Any],
               detector: dict[str, Any] | None = None, decoding: Decoding = MEGVII) -> bytes:
    """One unit's Parquet file: its rows, and under the metadata key `pose` everything that is needed to read them.

    decoding  the model's, which says what joints' scores mean
    detector  name and digest of what made the boxes, where it was a detector
    """
    pose = {"version": ROW_VERSION, "counts": count_rows(pictures), "skeleton": skeleton.to_json(),
            "coordinate_frame": FRAME, "low_score": decoding.low_score,
            "scores": {"joint": decoding.score_meaning, "person": PERSON_SCORE}, "model": model, "job": job,
            **({"detector": detector} if detector else {}), **suppressed_json(pictures)}
    table = keypoint_table(pictures, skeleton, job=job)
    table = table.replace_schema_metadata({"pose": json.dumps(pose, sort_keys=True)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def suppressed_json(pictures: Iterable[AnnotatedPicture]) -> dict[str, Any]:
    """What `pose` says of pictures of which persons were left out: by key, how many, and the digest of all boxes, by
    which a later run knows whether they are still the same. {} where there are none; `with_suppressed` reads it."""
    found = {picture.picture["key"]: {"persons": picture.suppressed, "boxes": picture.digest_before}
             for picture in pictures if picture.suppressed}
    return {"suppressed": found} if found else {}


def with_suppressed(picture: AnnotatedPicture, pose: dict[str, Any]) -> AnnotatedPicture:
    """A picture of a part's rows with what the part's metadata says of the persons that were left out."""
    found = pose.get("suppressed", {}).get(picture.picture["key"])
    return replace(picture, suppressed=found["persons"], digest_before=found["boxes"]) if found else picture


def pose_metadata(footer: pq.FileMetaData) -> dict[str, Any]:
    """The `pose` entry of a part's Parquet metadata; a newer version is refused by name (DataError)."""
    pose: dict[str, Any] = json.loads(footer.metadata[b"pose"])
    if pose["version"] > ROW_VERSION:
        raise DataError(f"The keypoint rows have version {pose['version']}; this program reads up to {ROW_VERSION}. "
                        "Update it.")
    return pose


@dataclass(frozen=True)
class KeypointParts:
    """A keypoint dataset's parts that are committed so far, by name, ordered; `metadata` is the first part's own."""

    uri: str
    names: tuple[str, ...]
    largest_bytes: int
    metadata: KeypointMetadata


def open_keypoints(uri: str) -> KeypointParts:
    """The parts that are committed so far, from one listing; of them only the first one's footer is read.

    What is no part of the job is left out, with a warning; there is one too where parts are missing.
    Refuses (DataError) a place without any part, and parts of a newer version.
    """
    uri = storage.normalise(uri)
    job = open_job(uri)
    listed = list(storage.list_objects(storage.join(uri, FOLDER)))
    parts = [found for found in listed if job is not None and job.unit_of(found.name) is not None]
    if job is None or not parts:
        raise DataError(f"{uri} holds no keypoint dataset (expected _job.json and {FOLDER}/part-*.parquet). "
                        "Give the --output of an annotate run that has committed at least one unit.")
    first, _ = _stored_part(uri, parts[0].name, columns=[])
    metadata = KeypointMetadata(Skeleton.from_json(first["skeleton"]), first["counts"], first["model"],
                                {**first, "input": job.input}, complete=_is_complete(uri, job, len(parts)))
    _warn_of_foreign(job, [found.uri for found in listed if job.unit_of(found.name) is None])
    return KeypointParts(uri, tuple(part.name for part in parts), max(part.size for part in parts), metadata)


def _is_complete(uri: str, job: FrozenJob, num_parts: int) -> bool:
    ended = storage.exists(storage.join(uri, SUCCESS))
    if ended and num_parts == job.num_units:
        return True
    remedy = "`verify` names each that is gone." if ended else "The annotate command again goes on with it."
    logger.warning("%s is not complete: %d of %d parts are there, %s %s. %s", uri, num_parts, job.num_units,
                   "with" if ended else "without", SUCCESS, remedy)
    return False


def _warn_of_foreign(job: FrozenJob, foreign: Sequence[str]) -> None:
    if foreign:
        logger.warning("%s is no part of job %s, and is left out (%d such objects). `verify` names each: remove them, "
                       "other readers take them for rows.", foreign[0], job.digest[:8], len(foreign))


def read_parts(parts: KeypointParts, names: Iterable[str], columns: Sequence[str] | None = None,
               ) -> Iterator[tuple[str, dict[str, Any], pa.Table]]:
    """Name, counts and rows of the named parts, in their order; some are read ahead, in bounded memory.

    columns  of the rows; None: all
    Refuses (DataError) a part that can't be read, and one of a newer version.
    """
    threads = max(1, min(THREADS, BYTES_AHEAD // max(1, 2 * parts.largest_bytes)))
    found = map_ahead(lambda name: (name, *_stored_part(parts.uri, name, columns)), names, threads=threads)
    for name, pose, table in found:
        yield name, pose["counts"], table


def counts_of_parts(uri: str, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The counts of the named parts, in their order, by their own metadata; several are read ahead."""
    return (pose_metadata(footer)["counts"] for footer in part_footers(uri, FOLDER, names))


def _stored_part(uri: str, name: str, columns: Sequence[str] | None) -> tuple[dict[str, Any], pa.Table]:
    place = storage.join(uri, FOLDER, name)
    remedy = "`verify` says what is wrong with it."
    with storage.arrow_file(place, remedy=remedy) as stored, pq.ParquetFile(stored) as file:
        pose = pose_metadata(file.metadata)
        return pose, file.read(None if columns is None else list(columns))


def read_keypoints(uri: str, *, without: Collection[str] = ()) -> tuple[pa.Table, KeypointMetadata]:
    """The rows that are committed so far, sorted by (key, person_index), and what they say of themselves.

    Columns that are named in `without` are not read. Refused and warned of as by `open_keypoints` and `read_parts`.
    """
    parts = open_keypoints(uri)
    columns = [name for name in keypoint_schema(parts.metadata.skeleton).names if name not in without]
    _, counts, tables = zip(*read_parts(parts, parts.names, columns), strict=True)
    table = pa.concat_tables(tables).sort_by([("key", "ascending"), ("person_index", "ascending")])
    return table, replace(parts.metadata, counts=total_counts(counts))
