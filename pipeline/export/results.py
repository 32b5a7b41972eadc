"""COCO's results list: what pycocotools' loadRes and the COCO servers read."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.coco import PERSON_CATEGORY
from pipeline.errors import DataError
from pipeline.export import text
from pipeline.export.persons import (
    NUM_SAMPLE_KEYS,
    ROWS_PER_BATCH,
    Exported,
    ExportOptions,
    joint_array,
    person_rows,
)
from pipeline.pose.skeleton import Skeleton


def write_coco_results(table: pa.Table, skeleton: Skeleton, options: ExportOptions) -> Exported:
    """The official COCO results list, one entry for each person: image_id, category_id, keypoints, score.

    keypoints  [x, y, joint score] * K, float32 in its shortest decimal form; a joint that is NULL is 0, 0, 0.
    Ordered by (image_id, score), both descending, as the authors of MSPN write it.
    Persons in pictures without an image_id can't be named in this format and are a DataError.
    """
    persons = person_rows(table)
    _refuse_unnamed(persons)
    image_ids = persons["image_id"].to_numpy()
    order = np.lexsort((-persons["score"].to_numpy(), -image_ids))
    data = text.encoded(text.listed(_entries(persons, order, skeleton)))
    return Exported(data, pictures=len(np.unique(image_ids)), persons=persons.num_rows)


def coco_results(table: pa.Table, *, skeleton: Skeleton) -> list[dict[str, Any]]:
    """The same list as values."""
    entries: list[dict[str, Any]] = json.loads(write_coco_results(table, skeleton, ExportOptions()).data)
    return entries


def _entries(persons: pa.Table, order: Any, skeleton: Skeleton) -> Iterator[pa.Array]:
    for start in range(0, len(order), ROWS_PER_BATCH):
        rows = persons.take(order[start:start + ROWS_PER_BATCH])
        keypoints = np.nan_to_num(joint_array(rows, skeleton)).reshape(rows.num_rows, 3 * skeleton.num_joints)
        yield text.objects({
            "image_id": text.numbers(rows["image_id"].to_numpy()),
            "category_id": str(PERSON_CATEGORY),
            "keypoints": text.lists([text.numbers(column) for column in keypoints.T]),
            "score": text.numbers(rows["score"].to_numpy())})


def _refuse_unnamed(persons: pa.Table) -> None:
    unnamed = persons.filter(pc.is_null(persons["image_id"]))
    if unnamed.num_rows:
        keys = unnamed["key"].slice(0, NUM_SAMPLE_KEYS).to_pylist()
        raise DataError(
            f"{unnamed.num_rows} of {persons.num_rows} person rows have no image_id, which COCO needs, "
            f"e.g. {keys}. Annotate a shard dataset made with --annotations, or read the Parquet itself.")
