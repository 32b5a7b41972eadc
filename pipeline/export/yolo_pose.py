"""Ultralytics' pose dataset: a text file for each picture, and the YAML that names joints and mirror.

Coordinates are shares of the picture's width and height, x / W without half a pixel, as Ultralytics' own converter
makes them of COCO's files and as its published weights were trained.
"""

import posixpath
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import yaml

from pipeline.coco import category_json
from pipeline.errors import DataError
from pipeline.export import text
from pipeline.export.addresses import relative_path
from pipeline.export.inside import count_outside, inside_batch, visibility_inside
from pipeline.export.persons import (
    Exported,
    ExportOptions,
    PictureBatch,
    count_persons,
    exported_rows,
    joint_array,
    picture_batches,
    picture_starts,
)
from pipeline.pose.skeleton import Skeleton

DECIMALS = 6  # half a millionth of the picture's side at most is lost: 0.002 px of 4000
DATASET = "dataset.yaml"
_HEAD = """\
# Put the pictures into images/ beside this file, under their keys. `val` has the same pictures: name others, that
# nobody has trained on, before you believe a number.
"""


def write_yolo_pose(table: pa.Table, skeleton: Skeleton, options: ExportOptions) -> Exported:
    """A .zip with `labels/<key without its ending>.txt` and `dataset.yaml`: `0 cx cy w h x1 y1 v1 ...`, six decimals.

    Ultralytics refuses a whole picture for one number below 0 or above 1. So boxes are cut at the picture's edge, a
    joint outside of the picture is `0 0 0`, and a person whose box is wholly outside is left out, and counted.
    Two keys that differ in their ending alone would have one label file and are a DataError.
    """
    rows = exported_rows(table, options)
    left_out = count_outside(rows)
    data = text.archive(_files(rows, skeleton, options))
    return Exported(data, pictures=len(picture_starts(rows)), persons=count_persons(rows) - left_out,
                    left_out=left_out)


def label_path(key: str) -> str:
    """Where Ultralytics looks for the labels of `images/<key>`: its last `/images/` is `/labels/`."""
    path = "/labels/".join(f"/images/{relative_path(key)}".rsplit("/images/", 1))
    return posixpath.splitext(path)[0].lstrip("/") + ".txt"


def _files(rows: pa.Table, skeleton: Skeleton, options: ExportOptions) -> Iterator[tuple[str, list[str]]]:
    yield DATASET, [_HEAD, yaml.safe_dump(_dataset(skeleton), sort_keys=False, default_flow_style=None)]
    keys_of: dict[str, str] = {}
    for batch in picture_batches(rows):
        for key, lines in zip(batch.keys, _labels(batch, skeleton, options).to_pylist(), strict=True):
            path = label_path(key)
            file = posixpath.normpath(path)  # where it lies once it is unpacked
            if file in keys_of:
                raise DataError(f"The pictures {keys_of[file]!r} and {key!r} would both have the labels {file}, since "
                                "YOLO leaves the ending out. Rename one, or export to another format.")
            keys_of[file] = key
            yield path, [lines]


def _dataset(skeleton: Skeleton) -> dict[str, Any]:
    name = category_json(skeleton)["name"]
    return {"train": "images", "val": "images", "kpt_shape": [skeleton.num_joints, 3],
            "flip_idx": list(skeleton.flip_order), "names": {0: name}, "kpt_names": {0: list(skeleton.joints)}}


def _labels(batch: PictureBatch, skeleton: Skeleton, options: ExportOptions) -> pa.Array:
    """One text for each picture, a line for each person that is inside."""
    inside, boxes = inside_batch(batch)
    sizes = inside.person_sizes_wh
    shares = np.concatenate([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], axis=1) / np.tile(sizes, 2)
    values = np.concatenate([shares, _joint_shares(inside, skeleton, options)], axis=1)
    lines = text.joined(" ", ["0", *(text.numbers(column) for column in np.round(values, DECIMALS).T)])
    return text.gathered(text.joined("", [lines, "\n"]), inside.offsets, "")


def _joint_shares(batch: PictureBatch, skeleton: Skeleton, options: ExportOptions) -> npt.NDArray[np.float64]:
    """x, y (shares of the picture) and v of each joint, [n, 3 K]; 0, 0, 0 for one that can't be named."""
    joints = joint_array(batch.persons, skeleton)
    sizes = batch.person_sizes_wh
    visible = visibility_inside(joints, sizes, options)[..., None]
    triples = np.concatenate([joints[..., :2].astype(np.float64) / sizes[:, None], visible], axis=-1)
    return np.where(visible > 0, triples, 0.0).reshape(len(triples), 3 * skeleton.num_joints)
