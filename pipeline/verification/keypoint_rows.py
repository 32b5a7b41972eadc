"""The rules that the rows of a keypoint dataset keep by themselves, and what they count up to.

Whole columns at a time: a part has thousands of rows and dozens of columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.verification.counts import REASONS
from pipeline.verification.finding import some

COLUMNS = pa.schema([
    ("key", pa.string()), ("image_id", pa.int64()), ("etag", pa.string()), ("sha256", pa.string()),
    ("width", pa.int32()), ("height", pa.int32()),
    ("status", pa.string()), ("reason", pa.string()), ("error", pa.string()),
    ("person_index", pa.int32()), ("box_id", pa.int64()),
    ("box_x", pa.float64()), ("box_y", pa.float64()), ("box_w", pa.float64()), ("box_h", pa.float64()),
    ("box_score", pa.float64()), ("score", pa.float64()), ("job", pa.string())])
PICTURE = ("image_id", "etag", "sha256", "width", "height", "status", "reason", "error")
PERSON = ("person_index", "box_id")
NUMBERS = ("box_x", "box_y", "box_w", "box_h", "box_score", "score")
STATUSES = ("ok", "no_person", "rejected")
SCORE_TOLERANCE = 1e-6  # relative: the order in which a mean is summed is nobody's contract

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Rows:
    """A part's rows. `joints`: the joints as their columns name them; None: not known, and not looked at."""

    table: pa.Table
    joints: Sequence[str] | None

    def valid(self, name: str) -> Mask:
        """Which rows aren't NULL there."""
        return np.asarray(pc.is_valid(self.table[name]).to_numpy(), bool)

    def equal(self, name: str, value: str) -> Mask:
        """Which rows have this text there."""
        return np.asarray(pc.fill_null(pc.equal(self.table[name], value), False).to_numpy(), bool)

    def numbers(self, name: str) -> Floats:
        """The column as float64, NaN where it is NULL."""
        return np.asarray(self.table[name].cast(pa.float64()).to_numpy(), np.float64)

    def unlike_before(self, name: str) -> Mask:
        """Which rows have another value there than the row before; the first one has."""
        column = self.table[name].combine_chunks()
        unlike = np.ones(len(column), bool)
        if len(column):
            both_null = pc.and_(pc.is_null(column[1:]), pc.is_null(column[:-1]))
            unlike[1:] = ~np.asarray(pc.or_kleene(pc.equal(column[1:], column[:-1]), both_null).fill_null(False), bool)
        return unlike

    def name(self, index: int) -> str:
        """A row as findings name it."""
        key = self.table["key"][index].as_py()
        return f"row {index}" if key is None else f"{key!r} in row {index}"


def joint_columns(joint: str) -> tuple[str, str, str]:
    """The names of a joint's columns, of which the skeleton gives the column's beginning."""
    return f"{joint}_x", f"{joint}_y", f"{joint}_score"


def broken_rules(rows: Rows, job: str) -> Iterator[tuple[str, str]]:
    """Each rule that rows break, and which rows: what was expected, what was found."""
    for claim, broken in (*_picture_rules(rows, job), *_order_rules(rows)):
        if broken.any():
            yield claim, f"otherwise: {_named(rows, broken)}"
    for claim, cells in _person_rules(rows):
        if found := {name: broken for name, broken in cells if broken.any()}:
            everywhere = np.logical_or.reduce(list(found.values()))
            yield claim, f"otherwise: {some(list(found))} of {_named(rows, everywhere)}"


def _named(rows: Rows, broken: Mask) -> str:
    indices = np.flatnonzero(broken).tolist()
    return some([rows.name(index) for index in indices[:3]], len(indices))


# --- rules --------------------------------------------------------------------------------------------------------


def _picture_rules(rows: Rows, job: str) -> Iterator[tuple[str, Mask]]:
    ok, no_person, rejected = (rows.equal("status", status) for status in STATUSES)
    width, height = rows.numbers("width"), rows.numbers("height")
    sized = (width > 0) & (height > 0)
    unsized = ~rows.valid("width") & ~rows.valid("height")
    yield "a key in each row", ~rows.valid("key")
    yield f"job {job} in each row", ~rows.equal("job", job)
    yield f"a status of {', '.join(STATUSES)}", ~(ok | no_person | rejected)
    yield "a reason exactly where the status is rejected", rows.valid("reason") != rejected
    yield "a reason that is known", rows.valid("reason") & ~np.logical_or.reduce(
        [rows.equal("reason", reason) for reason in REASONS])
    yield "an error exactly where the status is rejected", rows.valid("error") != rejected
    yield "a sha256 of each picture that was not rejected", (ok | no_person) & ~rows.valid("sha256")
    yield "a positive width and height, or none of a rejected picture", ~(sized | rejected & unsized)
    yield "a box of positive width and height", ok & ((rows.numbers("box_w") <= 0) | (rows.numbers("box_h") <= 0))
    yield "the score to be box_score times the mean of the joints' scores", ok & _wrong_scores(rows)


def _wrong_scores(rows: Rows) -> Mask:
    if not rows.joints:
        return np.zeros(len(rows.table), bool)
    scores = [rows.numbers(joint_columns(joint)[2]) for joint in rows.joints]
    boxes = rows.numbers("box_score")
    with np.errstate(invalid="ignore"):  # NaN and infinity have a rule of their own
        apart = np.abs(rows.numbers("score") - boxes * np.mean(scores, axis=0))
        wrong: Mask = apart > SCORE_TOLERANCE * np.abs(boxes) * np.mean(np.abs(scores), axis=0)
    return wrong


def _order_rules(rows: Rows) -> Iterator[tuple[str, Mask]]:
    """Rules of the rows of one picture, which stand one behind the other."""
    first = rows.unlike_before("key")
    starts = np.flatnonzero(first)
    lengths = np.diff(np.append(starts, len(first)))
    position = np.arange(len(first)) - np.repeat(starts, lengths)
    ok = rows.equal("status", "ok")
    alone = rows.equal("status", "no_person") | rows.equal("status", "rejected")
    yield "rows sorted by the bytes of their keys", _descends(rows)
    yield "person_index 0, 1, ... for the persons of a picture", ok & (rows.numbers("person_index") != position)
    yield "one row of a picture without persons", alone & (np.repeat(lengths, lengths) > 1)
    for name in PICTURE:
        yield f"the same {name} in all rows of a picture", ~first & rows.unlike_before(name)


def _descends(rows: Rows) -> Mask:
    keys = rows.table["key"].combine_chunks()
    descends = np.zeros(len(keys), bool)
    if len(keys):  # Arrow compares text by its bytes
        descends[1:] = np.asarray(pc.fill_null(pc.less(keys[1:], keys[:-1]), False), bool)
    return descends


def _person_rules(rows: Rows) -> Iterator[tuple[str, Iterator[tuple[str, Mask]]]]:
    """Rules of many columns, each with the rows that break it in each column."""
    ok = rows.equal("status", "ok")
    absent = rows.equal("status", "no_person") | rows.equal("status", "rejected")
    joints = [name for joint in rows.joints or () for name in joint_columns(joint)]
    known = {*COLUMNS.names, *joints}
    yield "a finite box, score and joints of each person", (
        (name, ok & ~np.isfinite(rows.numbers(name))) for name in (*NUMBERS, *joints))
    yield "a box_id of each person", iter([("box_id", ok & ~rows.valid("box_id"))])
    yield "NULL where there is no person", (
        (name, absent & rows.valid(name)) for name in (*PERSON, *NUMBERS, *joints))
    yield "no NaN", (
        (name, rows.valid(name) & np.isnan(rows.numbers(name))) for name, kind in
        zip(rows.table.schema.names, rows.table.schema.types, strict=True)
        if pa.types.is_floating(kind) and name not in known)


# --- counts -------------------------------------------------------------------------------------------------------


def distinct_pictures(table: pa.Table) -> pa.Table:
    """The first row of each key, NULL left out: columns key, etag, sha256, status, reason."""
    keys = table["key"].combine_chunks()
    indices = np.asarray(pc.fill_null(keys.dictionary_encode().indices, -1))
    values, first = np.unique(indices, return_index=True)
    return table.select(["key", "etag", "sha256", "status", "reason"]).take(pa.array(np.sort(first[values >= 0])))


def count_pictures(table: pa.Table, pictures: pa.Table) -> tuple[dict[str, int], dict[str, int]]:
    """How many pictures, persons and of each status; and how many of each reason."""
    statuses = pictures["status"].to_pylist()
    counts = {"pictures": len(pictures), "persons": pc.sum(pc.equal(table["status"], "ok")).as_py() or 0}
    counts |= {status: statuses.count(status) for status in STATUSES}
    reasons = pc.value_counts(pictures["reason"].drop_null())
    return counts, {one["values"]: one["counts"] for one in reasons.to_pylist()}
