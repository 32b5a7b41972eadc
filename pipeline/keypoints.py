"""Keypoint datasets: a part written, its metadata read back, the whole read as one table.

It knows the form of the output, and neither how rows are computed nor by whom.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import DataError
from pipeline.pose.skeleton import Skeleton
from pipeline.rows import ROW_VERSION, AnnotatedPicture, count_rows, keypoint_table
from pipeline.units import open_job, total_counts

FOLDER = "keypoints"
FRAME = "pixels of the stored picture after its EXIF orientation; x right, y down; pixel centres at integers"
SCORES = {
    "joint": "value of the averaged heatmap at the joint / 255 + 0.5, about 0.5 to 1.5; not a probability",
    "person": "box_score times the mean of the joints' scores",
}


@dataclass(frozen=True)
class KeypointMetadata:
    """What a keypoint dataset says of itself. `json`: the parts' `pose` metadata, with the job's `input` added."""

    skeleton: Skeleton
    counts: dict[str, Any]
    model: dict[str, Any]
    json: dict[str, Any]


def part_bytes(pictures: Sequence[AnnotatedPicture], skeleton: Skeleton, *, job: str, model: dict[str, Any],
               detector: dict[str, Any] | None = None) -> bytes:
    """One unit's Parquet file: its rows, and under the metadata key `pose` everything that is needed to read them.

    detector  name and digest of what made the boxes, where it was a detector
    """
    pose = {"version": ROW_VERSION, "counts": count_rows(pictures), "skeleton": skeleton.to_json(),
            "coordinate_frame": FRAME, "scores": SCORES, "model": model, "job": job,
            **({"detector": detector} if detector else {})}
    table = keypoint_table(pictures, skeleton, job=job)
    table = table.replace_schema_metadata({"pose": json.dumps(pose, sort_keys=True)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def pose_metadata(footer: pq.FileMetaData) -> dict[str, Any]:
    """The `pose` entry of a part's Parquet metadata; a newer version is refused by name (DataError)."""
    pose: dict[str, Any] = json.loads(footer.metadata[b"pose"])
    if pose["version"] > ROW_VERSION:
        raise DataError(f"The keypoint rows have version {pose['version']}; this program reads up to {ROW_VERSION}. "
                        "Update it.")
    return pose


def read_keypoints(uri: str, *, without: Collection[str] = ()) -> tuple[pa.Table, KeypointMetadata]:
    """The rows that are committed so far, sorted by (key, person_index), and what they say of themselves.

    Columns that are named in `without` are not read.
    Refuses (DataError) a place without any part, and parts of a newer version.
    """
    uri = storage.normalise(uri)
    job = open_job(uri)
    filesystem, path = storage.arrow_filesystem(storage.join(uri, FOLDER))
    parts = [found.name for found in storage.list_objects(storage.join(uri, FOLDER))]
    if job is None or not parts:
        raise DataError(f"{uri} holds no keypoint dataset (expected _job.json and {FOLDER}/part-*.parquet). "
                        "Give the --output of an annotate run that has committed at least one unit.")
    fragments = ds.dataset([f"{path}/{name}" for name in parts], filesystem=filesystem, format="parquet")
    poses = [pose_metadata(fragment.metadata) for fragment in fragments.get_fragments()]
    table = fragments.to_table(columns=[name for name in fragments.schema.names if name not in without])
    table = table.sort_by([("key", "ascending"), ("person_index", "ascending")])
    first = poses[0]
    metadata = KeypointMetadata(Skeleton.from_json(first["skeleton"]),
                                total_counts(pose["counts"] for pose in poses), first["model"],
                                {**first, "input": job.input})
    return table, metadata
