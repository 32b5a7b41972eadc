"""Whether one part of a shard dataset is what its version, its plan and its own rows say.

What is wrong becomes a `Finding` and never an exception, so that one look names everything.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.verification.counts import REASONS, Row, count_differences, count_rows, is_picture
from pipeline.verification.finding import RESTORE, WRITER, Finding, some
from pipeline.verification.keys import Hashes, hash_keys, no_hashes
from pipeline.verification.plan import compare_keys
from pipeline.verification.reading import read_parquet, read_stored, refuse_newer
from pipeline.verification.versions import FOLDER

COLUMNS = pa.schema([
    ("key", pa.string()), ("etag", pa.string()), ("sha256", pa.string()), ("size", pa.int64()),
    ("image_id", pa.int64()), ("width", pa.int32()), ("height", pa.int32()), ("bytes", pa.binary()),
    ("persons", pa.list_(pa.struct([
        ("annotation_id", pa.int64()), ("box_xywh", pa.list_(pa.float64(), 4)), ("area", pa.float64()),
        ("iscrowd", pa.bool_()), ("num_keypoints", pa.int32()), ("keypoints", pa.list_(pa.float64()))]))),
    ("reason", pa.string()), ("error", pa.string())])


@dataclass(frozen=True)
class PartToCheck:
    """A part of the dataset at `uri`, and what it has to be.

    version   the JSON of the version that is checked
    named_by  the newest JSON that names the part, and the SHA-256 that it gives; None: no version names the part
    counts    of its live rows, as `version` gives them; None: it leaves the part out, so that no row may be live
    planned   its unit in the plan (columns key, etag, size); None: there is no plan to compare with
    dropped   keys of its rows that do not count; None: not known, so that nothing about live rows can be said
    """

    uri: str
    name: str
    version: str
    named_by: str | None
    sha256: str | None
    counts: Mapping[str, Any] | None
    planned: pa.Table | None
    dropped: frozenset[str] | None
    dropped_name: str
    num_joints: int | None
    count_duplicates: bool = False

    @property
    def object(self) -> str:
        """Its name relative to the dataset."""
        return f"{FOLDER}/{self.name}"


@dataclass(frozen=True)
class PartReport:
    """What a part is: small, so that the reports of a million parts fit into one process.

    rows            all its rows; None: they could not be read
    key_hashes      uint64 [n], distinct: the first 8 bytes of the SHA-256 of each live key
    picture_hashes  uint64 [n]: the first 8 bytes of each live picture's SHA-256, where duplicates are counted
    """

    name: str
    findings: tuple[Finding, ...]
    rows: int | None = None
    key_hashes: Hashes = field(default_factory=no_hashes)
    picture_hashes: Hashes = field(default_factory=no_hashes)


def check_stored_part(part: PartToCheck) -> PartReport:
    """The part, read once and whole, and checked. What makes its rows unreadable is the only finding then.

    Trouble with the store passes through as StorageError.
    """
    findings: list[Finding] = []
    data = read_stored(part.uri, part.object, _why(part.named_by), findings.append, sha256=part.sha256,
                       told_by=part.named_by)
    return PartReport(part.name, tuple(findings)) if data is None else _check_bytes(part, data)


def missing_part(name: str, named_by: str | None) -> Finding:
    """The finding for a part that isn't there, though a version names it, or only a plan."""
    return Finding("missing", name, _why(named_by), "no such object", RESTORE)


def _why(named_by: str | None) -> str:
    return f"the part that {named_by or 'the plan'} names"


def _check_bytes(part: PartToCheck, data: bytes) -> PartReport:
    findings: list[Finding] = []
    table = read_parquet(data, part.object, COLUMNS, findings.append)
    if table is None:
        return PartReport(part.name, tuple(findings))
    return _check_rows(part, _rows(table), _metadata(table.schema))


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as dicts, with the length and SHA-256 of `bytes` instead of the bytes themselves."""
    rows: list[dict[str, Any]] = table.select([name for name in COLUMNS.names if name != "bytes"]).to_pylist()
    for row, stored in zip(rows, table["bytes"], strict=True):
        data = stored.as_buffer() if stored.is_valid else None
        row["num_bytes"] = None if data is None else data.size
        row["bytes_sha256"] = None if data is None else hashlib.sha256(data).hexdigest()
    return rows


def _metadata(schema: pa.Schema) -> Any:
    try:
        return json.loads((schema.metadata or {})[b"shard"])
    except (KeyError, ValueError):
        return None


def _check_rows(part: PartToCheck, rows: Sequence[Row], metadata: Any) -> PartReport:
    findings = [*_broken_rules(part, rows), *_against_plan(part, rows), *_against_metadata(part, rows, metadata),
                *_unknown_drops(part, rows)]
    if part.dropped is None:
        return PartReport(part.name, tuple(findings), len(rows))
    live = [row for row in rows if row["key"] not in part.dropped]
    if part.counts is None:
        return PartReport(part.name, (*findings, *_lost(part, live)), len(rows))
    if wrong := count_differences(part.counts, count_rows(live)):
        findings.append(Finding("counts", part.object, f"what {part.version} says of its live rows", wrong, WRITER))
    keys = {row["key"] for row in live if row["key"] is not None}
    shas = [row["bytes_sha256"] for row in live if row["bytes_sha256"]] if part.count_duplicates else []
    return PartReport(part.name, tuple(findings), len(rows), hash_keys(keys),
                      np.array([int(sha[:16], 16) for sha in shas], np.uint64))


# --- the rules of a row -------------------------------------------------------------------------------------------


def _positive(value: int | None) -> bool:
    return value is not None and value > 0


def _is_box(box: Sequence[float] | None) -> bool:
    return box is not None and len(box) == 4 and all(side is not None and math.isfinite(side) for side in box)


RULES: tuple[tuple[str, Callable[[Row], bool]], ...] = (
    ("a key in each row", lambda row: row["key"] is not None),
    ("a reason exactly where there are no bytes", lambda row: (row["reason"] is None) == is_picture(row)),
    ("a reason that is known", lambda row: row["reason"] is None or row["reason"] in REASONS),
    ("an error exactly where there is a reason", lambda row: (row["error"] is None) == (row["reason"] is None)),
    ("sha256 to be that of the bytes", lambda row: not is_picture(row) or row["sha256"] == row["bytes_sha256"]),
    ("size to be the number of bytes", lambda row: not is_picture(row) or row["size"] == row["num_bytes"]),
    ("a positive width and height of each picture",
     lambda row: not is_picture(row) or (_positive(row["width"]) and _positive(row["height"]))),
    ("a box of 4 numbers for each person",
     lambda row: all(person is not None and _is_box(person["box_xywh"]) for person in row["persons"] or ())),
)


def _broken_rules(part: PartToCheck, rows: Sequence[Row]) -> Iterator[Finding]:
    for claim, holds in (*RULES, _keypoint_rule(part.num_joints)):
        if broken := [_name(number, row) for number, row in enumerate(rows) if not holds(row)]:
            yield Finding("row", part.object, claim, f"otherwise: {some(broken)}", WRITER)
    if not _is_sorted(rows):
        yield Finding("row", part.object, "rows sorted by the bytes of their keys", "another order", WRITER)


def _keypoint_rule(num_joints: int | None) -> tuple[str, Callable[[Row], bool]]:
    def holds(row: Row) -> bool:
        lengths = [len(person["keypoints"]) for person in row["persons"] or () if person and person["keypoints"]]
        return all(length % 3 == 0 and num_joints in (None, length // 3) for length in lengths)

    joints = "" if num_joints is None else f" for each of the skeleton's {num_joints} joints"
    return f"keypoints as x, y, v{joints}", holds


def _is_sorted(rows: Sequence[Row]) -> bool:
    keys = [row["key"].encode() for row in rows if row["key"] is not None]
    return keys == sorted(keys)


def _name(number: int, row: Row) -> str:
    return f"row {number}" if row["key"] is None else repr(row["key"])


# --- against the plan and what is dropped -------------------------------------------------------------------------


def _against_plan(part: PartToCheck, rows: Sequence[Row]) -> Iterator[Finding]:
    keys = [row["key"] for row in rows if row["key"] is not None]
    doubled = [repr(key) for key, count in Counter(keys).items() if count > 1]
    if doubled:
        yield Finding("doubled", part.object, "each key once", f"more than once: {some(doubled)}", WRITER)
    if part.planned is None:
        return
    planned = {row["key"]: (row["etag"], row["size"]) for row in part.planned.to_pylist()}
    changed = [row["key"] for row in rows
               if row["key"] in planned and planned[row["key"]] != (row["etag"], row["size"])]
    yield from compare_keys(part.object, planned, keys, changed=changed, change="etag or size")
    same_rows = not doubled and set(keys) == planned.keys()
    if same_rows and keys != list(planned) and _is_sorted(rows):
        yield Finding("plan", part.object, "its rows in the plan's order", "another order", WRITER)


def _unknown_drops(part: PartToCheck, rows: Sequence[Row]) -> Iterator[Finding]:
    if unknown := sorted((part.dropped or frozenset()) - {row["key"] for row in rows}):
        yield Finding("dropped", part.dropped_name, f"only keys that {part.object} has",
                      f"others: {some([repr(key) for key in unknown])}", WRITER)


def _lost(part: PartToCheck, rows: Sequence[Row]) -> Iterator[Finding]:
    if rows:
        names = [_name(number, row) for number, row in enumerate(rows)]
        yield Finding("lost", part.object, f"to be named by {part.version}, or each row to be dropped by name",
                      f"neither for {some(names)}", WRITER)


def _against_metadata(part: PartToCheck, rows: Sequence[Row], metadata: Any) -> Iterator[Finding]:
    refuse_newer(metadata, f"{part.uri}/{part.object}")
    said = metadata.get("counts") if isinstance(metadata, dict) else None
    if wrong := count_differences(said, count_rows(rows)):
        yield Finding("counts", part.object, "its metadata `shard` to count its rows", wrong, WRITER)
