"""Keypoint rows in other tools' formats: pure functions from a table to the bytes of a file.

`FORMATS` is where another format is added. It knows nothing of storage or pictures.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError, DataError
from pipeline.pose.skeleton import Skeleton
from pipeline.rows import OK

PERSON_CATEGORY = 1  # COCO's id of "person", the only category with keypoints
NUM_SAMPLE_KEYS = 3  # how many keys an error names


def joint_array(table: pa.Table, skeleton: Skeleton) -> npt.NDArray[np.float32]:
    """The joint columns of n rows as [n, K, 3] float32: x, y (picture pixels), score; NaN for NULL."""
    columns = [table[f"{joint}_{part}"] for joint in skeleton.columns() for part in ("x", "y", "score")]
    flat = [np.asarray(column.to_numpy(), dtype=np.float32) for column in columns]
    return np.stack(flat, axis=1).reshape(table.num_rows, skeleton.num_joints, 3)


def person_rows(table: pa.Table) -> pa.Table:
    """The rows that hold a person: status ok. One without a score is a DataError."""
    persons = table.filter(pc.equal(table["status"], OK))
    num_unscored = persons["score"].null_count
    if num_unscored:
        keys = persons.filter(pc.is_null(persons["score"]))["key"].slice(0, NUM_SAMPLE_KEYS).to_pylist()
        raise DataError(f"{num_unscored} person rows have status ok but no score, e.g. of {keys}; "
                        "`verify` says whether the keypoint dataset is whole.")
    return persons


def coco_results(table: pa.Table, *, skeleton: Skeleton) -> list[dict[str, Any]]:
    """The official COCO results list, one entry for each person: image_id, category_id, keypoints, score.

    keypoints  [x, y, joint score] * K, float32 in its shortest decimal form; a joint that is NULL is 0, 0, 0.
    Ordered by (image_id, score), both descending, as the authors of MSPN write it.
    Persons in pictures without an image_id can't be named in this format and are a DataError.
    """
    persons = person_rows(table)
    _refuse_unnamed(persons)
    image_ids = persons["image_id"].to_numpy()
    scores = persons["score"].to_numpy()
    keypoints = _shortest_decimals(np.nan_to_num(joint_array(persons, skeleton)))
    return [
        {"image_id": int(image_ids[row]), "category_id": PERSON_CATEGORY,
         "keypoints": keypoints[row].ravel().tolist(), "score": float(scores[row])}
        for row in np.lexsort((-scores, -image_ids))
    ]


def _refuse_unnamed(persons: pa.Table) -> None:
    unnamed = persons.filter(pc.is_null(persons["image_id"]))
    if unnamed.num_rows:
        keys = unnamed["key"].slice(0, NUM_SAMPLE_KEYS).to_pylist()
        raise DataError(
            f"{unnamed.num_rows} of {persons.num_rows} person rows have no image_id, which COCO needs, "
            f"e.g. {keys}. Annotate a shard dataset made with --annotations, or read the Parquet itself.")


def _shortest_decimals(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """float64 numbers that print as the float32 do: 12.3 rather than 12.300000190734863, half the file."""
    return values.astype("U32").astype(np.float64)


def _coco_results_file(table: pa.Table, skeleton: Skeleton) -> bytes:
    return json.dumps(coco_results(table, skeleton=skeleton), allow_nan=False).encode()


FORMATS: dict[str, Callable[[pa.Table, Skeleton], bytes]] = {
    "coco-results": _coco_results_file,  # what pycocotools' loadRes and the COCO servers read
}


def export_keypoints(table: pa.Table, to: str, *, skeleton: Skeleton) -> bytes:
    """The bytes of the file in the format named `to`; ConfigError where there is none of that name."""
    if to not in FORMATS:
        raise ConfigError(f"there is no export format {to!r}; known: {', '.join(sorted(FORMATS))}.")
    return FORMATS[to](table, skeleton)
