"""Whether one part of a keypoint dataset is what its list, its unit in the plan and its own rows say."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipeline.verification.counts import differences
from pipeline.verification.finding import RESTORE, WRITER, Finding, Tell, some
from pipeline.verification.keypoint_rows import (
    COLUMNS,
    Rows,
    broken_rules,
    count_pictures,
    distinct_pictures,
    joint_columns,
)
from pipeline.verification.keys import Hashes, hash_keys, no_hashes
from pipeline.verification.plan import compare_keys
from pipeline.verification.reading import has_columns, read_parquet, read_stored, refuse_newer, wrong_format

FOLDER = "keypoints"
EACH_UNIT = "the part of each planned unit"
NOT_IN_ROWS = ("boxes_refused", "suppressed")  # counts of what no row tells; the first parts may lack them
_POSE_KEYS = {"version": int, "counts": {"reasons": dict}, "skeleton": {"joints": [str]}, "coordinate_frame": str,
              "model": dict, "job": str}


@dataclass(frozen=True)
class KeypointPart:
    """A unit's part of the dataset at `uri`, and what it has to be.

    job           the digest that each row has
    model         the digest of the model that made it; None: not known
    planned       its unit in the plan (columns key, etag, sha256); None: there is no plan to compare with
    size, sha256  as the list of parts gives them
    listed_in     that list; None: there is none
    """

    uri: str
    name: str
    job: str
    model: str | None
    planned: pa.Table | None
    size: int | None = None
    sha256: str | None = None
    listed_in: str | None = None

    @property
    def object(self) -> str:
        """Its name relative to the dataset."""
        return f"{FOLDER}/{self.name}"


@dataclass(frozen=True)
class KeypointReport:
    """What a part is: small, so that the reports of a million parts fit into one process.

    rows             all its rows; None: they could not be read
    key_hashes       uint64 [n], distinct: the first 8 bytes of the SHA-256 of each key
    counts, reasons  what its rows count up to
    not_in_rows      what its metadata counts of NOT_IN_ROWS
    about            SHA-256 over what all parts have to say alike: skeleton, coordinate frame, model; None: unknown
    """

    name: str
    findings: tuple[Finding, ...]
    rows: int | None = None
    key_hashes: Hashes = field(default_factory=no_hashes)
    counts: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    not_in_rows: Mapping[str, int] = field(default_factory=dict)
    about: str | None = None


def missing_part(name: str) -> Finding:
    """The finding for a part that isn't there, though the run has ended."""
    return Finding("missing", f"{FOLDER}/{name}", EACH_UNIT, "no such object", RESTORE)


def check_stored_keypoints(part: KeypointPart) -> KeypointReport:
    """The part, read once and whole, and checked. What makes its rows unreadable is the only finding then.

    Trouble with the store passes through as StorageError; a newer format is a DataError.
    """
    findings: list[Finding] = []
    data = read_stored(part.uri, part.object, EACH_UNIT, findings.append, sha256=part.sha256,
                       told_by=part.listed_in)
    table = None if data is None else read_parquet(data, part.object, COLUMNS, findings.append)
    if data is None or table is None:
        return KeypointReport(part.name, tuple(findings))
    if part.size not in (None, len(data)):
        findings.append(Finding("source", part.object, f"{part.size} bytes ({part.listed_in})", str(len(data)), WRITER))
    return _check_table(part, table, findings)


def _check_table(part: KeypointPart, table: pa.Table, findings: list[Finding]) -> KeypointReport:
    pose = _metadata(part, table.schema, findings.append)
    joints = None if pose is None else _joints(part, table.schema, pose, findings.append)
    findings += [Finding("row", part.object, expected, found, WRITER)
                 for expected, found in broken_rules(Rows(table, joints), part.job)]
    pictures = distinct_pictures(table)
    findings += _against_plan(part, pictures)
    counts, reasons = count_pictures(table, pictures)
    report = KeypointReport(part.name, (), len(table), hash_keys(pictures["key"].to_pylist()), counts, reasons)
    if pose is None:
        return replace(report, findings=tuple(findings))
    findings += _against_metadata(part, pose["counts"], counts, reasons)
    told = {name: pose["counts"].get(name, 0) for name in NOT_IN_ROWS}
    return replace(report, findings=tuple(findings), about=_about(pose),
                   not_in_rows={name: count for name, count in told.items() if _is_count(count)})


# --- its metadata -------------------------------------------------------------------------------------------------


def _metadata(part: KeypointPart, schema: pa.Schema, tell: Tell) -> dict[str, Any] | None:
    """The JSON under `pose`; None, and a finding told, where it isn't what it has to be."""
    try:
        pose = json.loads((schema.metadata or {})[b"pose"])
    except (KeyError, ValueError, RecursionError):
        pose = None
    refuse_newer(pose, f"{part.uri}/{part.object}")
    if problems := list(wrong_format(_POSE_KEYS, pose)):
        tell(Finding("keys", part.object, "the keys of its metadata `pose`", some(problems), WRITER))
        return None
    assert isinstance(pose, dict)
    for name, expected, found in (("job", part.job, pose["job"]), ("model", part.model, pose["model"].get("digest"))):
        if expected is not None and found != expected:
            tell(Finding("source", part.object, f"its metadata `pose` to name {name} {expected}", str(found), WRITER))
    return pose


def _joints(part: KeypointPart, schema: pa.Schema, pose: Mapping[str, Any], tell: Tell) -> list[str] | None:
    """How the columns name the joints; None, and a finding told, where they lack some."""
    joints = [re.sub("[^a-z0-9]", "_", joint.lower()) for joint in pose["skeleton"]["joints"]]
    columns = pa.schema([(name, pa.float32()) for joint in joints for name in joint_columns(joint)])
    return joints if has_columns(schema, part.object, columns, tell) else None


def _about(pose: Mapping[str, Any]) -> str:
    alike = json.dumps([pose["skeleton"], pose["coordinate_frame"], pose["model"]], sort_keys=True)
    return hashlib.sha256(alike.encode()).hexdigest()


def _against_metadata(part: KeypointPart, said: Mapping[str, Any], counts: Mapping[str, int],
                      reasons: Mapping[str, int]) -> Iterator[Finding]:
    if wrong := differences(said, counts, reasons):
        yield Finding("counts", part.object, "its metadata `pose` to count its rows", wrong, WRITER)
    for name in NOT_IN_ROWS:
        if not _is_count(said.get(name, 0)):
            yield Finding("counts", part.object, f"a number of {name}", repr(said[name]), WRITER)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


# --- its plan -----------------------------------------------------------------------------------------------------


def _against_plan(part: KeypointPart, pictures: pa.Table) -> Iterator[Finding]:
    if part.planned is None:
        return
    planned = {row["key"]: row for row in part.planned.to_pylist()}
    if len(planned) < len(part.planned):
        yield Finding("doubled", part.object, "each key once in its unit of the plan",
                      f"{len(part.planned)} rows of {len(planned)} keys", WRITER)
    rows = pictures.to_pylist()
    changed = [row["key"] for row in rows if row["key"] in planned and _differ(row, planned[row["key"]])]
    yield from compare_keys(part.object, planned, [row["key"] for row in rows], changed=changed,
                            change="etag or sha256")


def _differ(row: Mapping[str, Any], planned: Mapping[str, Any]) -> bool:
    """Whether both know an etag, or both a SHA-256, and they aren't the same."""
    return any(None not in (row[name], planned[name]) and row[name] != planned[name] for name in ("etag", "sha256"))
