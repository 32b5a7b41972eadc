"""What every export format starts from: the rows it tells of, in batches of whole pictures, as arrays.

It knows the columns of a keypoint dataset and no other tool's format.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.pose.skeleton import Skeleton
from pipeline.rows import NO_PERSON, OK, joint_columns

NUM_SAMPLE_KEYS = 3  # how many keys an error names
ROWS_PER_BATCH = 10_000  # some 20 MB of text in the wordiest format
BOX_COLUMNS = ["box_x", "box_y", "box_w", "box_h"]
HIDDEN, VISIBLE = 1, 2  # COCO's v; 0: not labelled

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ExportOptions:
    """What the formats can be told.

    min_score       a joint with at least this score is visible (COCO's v = 2)
    low_joints      what the others are: hidden (v = 1, with their place) or absent (as if not there)
    image_prefix    goes before each key where the file names pictures; None: keys as they are
    empty_pictures  whether pictures in which nobody was found are named too
    model           who made the rows, for formats that say so
    """

    min_score: float = 0.7
    low_joints: Literal["hidden", "absent"] = "hidden"
    image_prefix: str | None = None
    empty_pictures: bool = True
    model: str = ""


@dataclass(frozen=True)
class Exported:
    """A file, and what it holds. `left_out`: persons that the format can't hold."""

    data: bytes
    pictures: int
    persons: int
    left_out: int = 0


@dataclass(frozen=True)
class PictureBatch:
    """Some whole pictures: P rows of `pictures` (key, image_id, width, height), n rows of `persons` in their order.

    offsets  int32 [P + 1]; picture i has the persons offsets[i] to offsets[i + 1]
    """

    pictures: pa.Table
    persons: pa.Table
    offsets: npt.NDArray[np.int32]

    @property
    def keys(self) -> list[str]:
        """The pictures' keys."""
        return list(self.pictures["key"].to_pylist())

    @property
    def sizes_wh(self) -> npt.NDArray[np.float64]:
        """The pictures' sizes in pixels [P, 2]."""
        return _columns(self.pictures, ["width", "height"])

    @property
    def person_sizes_wh(self) -> npt.NDArray[np.float64]:
        """The size of each person's picture [n, 2]."""
        return np.repeat(self.sizes_wh, np.diff(self.offsets), axis=0)


def joint_array(table: pa.Table, skeleton: Skeleton) -> npt.NDArray[np.float32]:
    """The joint columns of n rows as [n, K, 3] float32: x, y (picture pixels), score; NaN for NULL."""
    flat = [np.asarray(table[name].to_numpy(), dtype=np.float32) for name in joint_columns(skeleton)]
    return np.stack(flat, axis=1).reshape(table.num_rows, skeleton.num_joints, 3)


def box_array(table: pa.Table) -> npt.NDArray[np.float64]:
    """The boxes of n rows as [n, 4] float64: x, y, width, height in picture pixels."""
    return _columns(table, BOX_COLUMNS)


def visibility(joints: Array, options: ExportOptions) -> npt.NDArray[np.uint8]:
    """COCO's v for joints [n, K, 3]: 2 from `min_score` on, below it 1 or 0 by `low_joints`, 0 for what is NULL."""
    low = HIDDEN if options.low_joints == "hidden" else 0
    seen = np.where(joints[..., 2] >= options.min_score, VISIBLE, low)
    return np.where(np.isnan(joints).any(axis=-1), 0, seen).astype(np.uint8)


def person_rows(table: pa.Table) -> pa.Table:
    """The rows that hold a person: status ok. One without a score is a DataError."""
    persons = table.filter(pc.equal(table["status"], OK))
    _refuse_null(persons, "score")
    return persons


def count_persons(rows: pa.Table) -> int:
    """How many rows hold a person."""
    return int(pc.sum(pc.equal(rows["status"], OK)).as_py() or 0)


def exported_rows(table: pa.Table, options: ExportOptions) -> pa.Table:
    """The rows of persons and, unless `empty_pictures` is false, of pictures without any; never of rejected ones.

    A row without the picture's size, or a person without a score, is a DataError.
    """
    statuses = [OK, NO_PERSON] if options.empty_pictures else [OK]
    rows = table.filter(pc.is_in(table["status"], pa.array(statuses)))
    for column in ("width", "height"):
        _refuse_null(rows, column)
    person_rows(rows.select(["key", "status", "score"]))
    return rows


def picture_starts(rows: pa.Table) -> npt.NDArray[np.int64]:
    """The rows at which another picture begins, in rows sorted by key."""
    if not rows.num_rows:
        return np.empty(0, np.int64)
    keys = rows["key"].combine_chunks()
    changes = pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1))
    return np.concatenate([[0], 1 + np.flatnonzero(np.asarray(changes.to_numpy(zero_copy_only=False)))])


def picture_batches(rows: pa.Table) -> Iterator[PictureBatch]:
    """All pictures of rows sorted by key, some 10,000 rows at a time."""
    bounds = np.append(picture_starts(rows), rows.num_rows)
    first = 0
    while first < len(bounds) - 1:
        fitting = int(np.searchsorted(bounds, bounds[first] + ROWS_PER_BATCH, side="right")) - 1
        last = max(first + 1, fitting)
        yield _batch(rows.slice(bounds[first], bounds[last] - bounds[first]), bounds[first:last + 1] - bounds[first])
        first = last


def _batch(rows: pa.Table, bounds: npt.NDArray[np.int64]) -> PictureBatch:
    is_person = pc.equal(rows["status"], OK)
    persons_before = np.concatenate([[0], np.cumsum(is_person.to_numpy())])
    pictures = rows.select(["key", "image_id", "width", "height"]).take(pa.array(bounds[:-1]))
    return PictureBatch(pictures, rows.filter(is_person), persons_before[bounds].astype(np.int32))


def _columns(table: pa.Table, names: list[str]) -> npt.NDArray[np.float64]:
    return np.stack([np.asarray(table[name].to_numpy(), np.float64) for name in names], axis=1)


def _refuse_null(rows: pa.Table, column: str) -> None:
    num_nulls = rows[column].null_count
    if num_nulls:
        keys = rows.filter(pc.is_null(rows[column]))["key"].slice(0, NUM_SAMPLE_KEYS).to_pylist()
        raise DataError(f"{num_nulls} rows that should have a {column} have none, e.g. of {keys}: the keypoint dataset "
                        "is not as `annotate` writes it. Annotate again into another --output.")
