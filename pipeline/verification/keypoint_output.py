"""A keypoint dataset but for its parts' rows: the run that wrote it, how it was sealed, what is stored beside."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.errors import DataError
from pipeline.verification.finding import MOVE, RESTORE, WRITER, Finding, Tell, some
from pipeline.verification.keypoint_part import FOLDER
from pipeline.verification.reading import copy_of, read_json, read_parquet, read_stored, wrong_keys
from pipeline.verification.run import PART_NAME, SHA256, Run, read_run

JOB, SUCCESS, PARTS, MODEL = "_job.json", "_SUCCESS", "_parts", "_model"
MODEL_FILES = ("model.json", "model.safetensors")  # in the order in which the model's digest goes over them
LIST_COLUMNS = pa.schema([("unit", pa.int32()), ("part", pa.string()), ("size", pa.int64()), ("sha256", pa.string())])
UNITS_PER_BOX_FILE = 100
BOX_COLUMNS = pa.schema([("key", pa.string()), ("box_id", pa.int64()), *((side, pa.float64()) for side in "xywh"),
                         ("score", pa.float64())])
# the first outputs had one file for all units
FIRST_BOX_COLUMNS = pa.schema([("image_id", pa.int64()), ("box_id", pa.int64()), ("xywh", pa.list_(pa.float64(), 4)),
                               ("score", pa.float64())])

# What `_SUCCESS` must have; the first ones had neither version nor list.
_SUCCESS_KEYS = {"job": str, "units": int, "counts": {"reasons": dict}}
_LISTING_KEYS = {"version": int, "parts": {"object": str, "sha256": str}}


@dataclass(frozen=True)
class Output:
    """A keypoint dataset.

    run       what it was to hold; None: that can't be read, and nothing else can be judged
    stored    size of each object in the place, by its name
    sealed    whether the run has ended, so that each unit has its part
    success   what `_SUCCESS` says, if it can be read
    listed    the list of parts, row i that of unit i; None: there is none, or it can't be used
    findings  what is wrong so far
    """

    uri: str
    run: Run | None
    stored: Mapping[str, int]
    sealed: bool
    success: Mapping[str, Any] | None
    listed: pa.Table | None
    findings: tuple[Finding, ...]

    @property
    def num_committed(self) -> int:
        """How many of the planned units have their part."""
        return 0 if self.run is None else sum(self.run.wrote(name) for name in _in_folder(self.stored))

    @property
    def unfinished(self) -> str:
        """What to say of a run that hasn't ended; empty: it has."""
        if self.sealed or self.run is None:
            return ""
        return (f"unfinished: {self.num_committed} of {self.run.units} units committed, and no {SUCCESS}; run the "
                "annotate command again")


def is_keypoint_dataset(uri: str) -> bool:
    """Whether `annotate` wrote here, also where its `_job.json` is gone. A place with both kinds is a DataError."""
    shards = any(storage.exists(storage.join(uri, name)) for name in ("dataset-000001.json", "_job-000001.json"))
    if not storage.exists(storage.join(uri, JOB)):
        return not shards and (storage.exists(storage.join(uri, SUCCESS))
                               or any(True for _ in storage.list_objects(storage.join(uri, FOLDER))))
    if shards:
        raise DataError(f"{uri} holds both a keypoint dataset ({JOB}) and a shard dataset. Each needs a place of its "
                        "own: move one elsewhere.")
    return True


def open_output(uri: str) -> Output:
    """The dataset, and what is wrong before any part is read. A newer format is a DataError."""
    stored = {found.name: found.size for found in storage.list_objects(uri)}
    findings: list[Finding] = []
    run = read_run(uri, JOB, "what the run was begun with", findings.append)
    sealed = SUCCESS in stored
    if run is None:
        return Output(uri, None, stored, sealed, None, None, tuple(findings))
    success = _read_success(uri, run, findings.append) if sealed else None
    listed = _read_list(uri, run, success, findings.append) if success else None
    _check_model(uri, run, findings.append)
    _check_boxes(uri, run, stored, findings.append)
    findings += _foreign_parts(uri, stored, run)
    return Output(uri, run, stored, sealed, success, listed, tuple(findings))


def _in_folder(stored: Mapping[str, int]) -> Iterator[str]:
    return (name.removeprefix(f"{FOLDER}/") for name in stored if name.startswith(f"{FOLDER}/"))


# --- how it was sealed --------------------------------------------------------------------------------------------


def _read_success(uri: str, run: Run, tell: Tell) -> dict[str, Any] | None:
    values = read_json(uri, SUCCESS, _SUCCESS_KEYS, "what ends a run", tell)
    if values is None:
        return None
    if {"version", "parts"} & values.keys() and (problems := list(wrong_keys(_LISTING_KEYS, values))):
        tell(Finding("keys", SUCCESS, "its version and its list of parts", some(problems), RESTORE))
        return None
    if values["job"] != run.digest:
        tell(Finding("source", SUCCESS, f"job {run.digest} ({JOB})", values["job"], RESTORE))
    for name, expected, found in (("units", run.units, values["units"]),
                                  ("pictures", run.pictures, values["counts"].get("pictures"))):
        if found != expected:
            tell(Finding("counts", SUCCESS, f"the plan's {expected} {name} ({JOB})", str(found), RESTORE))
    return values


def _read_list(uri: str, run: Run, success: Mapping[str, Any], tell: Tell) -> pa.Table | None:
    """The list of parts that `_SUCCESS` names by its SHA-256; outputs of older programs have none."""
    if "parts" not in success:
        return None
    name, sha256 = success["parts"]["object"], success["parts"]["sha256"]
    if not SHA256.fullmatch(sha256) or name != f"{PARTS}/{sha256[:16]}.parquet":
        tell(Finding("keys", SUCCESS, f"the list of parts as {PARTS}/<first 16 digits of its SHA-256>.parquet",
                     f"{name!r}, {sha256!r}", RESTORE))
        return None
    data = read_stored(uri, name, f"the list of parts that {SUCCESS} names", tell, sha256=sha256, told_by=SUCCESS)
    table = None if data is None else read_parquet(data, name, LIST_COLUMNS, tell)
    if table is None:
        return None
    rows = zip(table["unit"].to_pylist(), table["part"].to_pylist(), strict=True)
    complete = list(rows) == [(unit, run.part_name(unit)) for unit in range(run.units)]
    if not complete or table["size"].null_count or table["sha256"].null_count:
        tell(Finding("plan", name, f"the part of each of the {run.units} units in their order, its size and SHA-256",
                     "other rows" if not complete else "NULL", WRITER))
        return None
    return table


# --- what is stored beside ----------------------------------------------------------------------------------------


def _check_model(uri: str, run: Run, tell: Tell) -> None:
    expected = "the model that the run was begun with"
    files = [read_stored(uri, f"{MODEL}/{name}", expected, tell) for name in MODEL_FILES]
    content = hashlib.sha256()
    for data in files:
        content.update(data or b"")
    if None not in files and content.hexdigest() != run.intent.get("model"):
        tell(Finding("damaged", MODEL, f"{' and '.join(MODEL_FILES)} of digest {run.intent.get('model')} ({JOB})",
                     content.hexdigest(), RESTORE))


def _check_boxes(uri: str, run: Run, stored: Mapping[str, int], tell: Tell) -> None:
    """Detections, or the detector, are frozen beside the rows. The files that detections came in are not there."""
    boxes = run.intent.get("boxes")
    kind, digest = (boxes.get("kind"), str(boxes.get("digest"))) if isinstance(boxes, dict) else (None, "")
    if kind == "detect":
        read_stored(uri, f"_detector/{digest[:16]}.onnx", "the detector that made the boxes", tell, sha256=digest,
                    told_by=JOB)
    if kind != "detections":
        return
    first, folder = f"_boxes/{digest[:16]}.parquet", f"_boxes/{digest[:16]}-{run.plan_digest[:8]}"
    names = [f"{folder}/boxes-{number:07d}.parquet" for number in range(-(-run.units // UNITS_PER_BOX_FILE))]
    for name in [first] if first in stored else names:
        data = read_stored(uri, name, "the detections that the boxes came from", tell)
        if data is not None:
            read_parquet(data, name, FIRST_BOX_COLUMNS if name == first else BOX_COLUMNS, tell)


def _foreign_parts(uri: str, stored: Mapping[str, int], run: Run) -> Iterator[Finding]:
    foreign = [name for name in _in_folder(stored) if not run.wrote(name)]
    by_size: dict[int, list[str]] = defaultdict(list)
    for name in _in_folder(stored) if foreign else ():
        if run.wrote(name):
            by_size[stored[f"{FOLDER}/{name}"]].append(f"{FOLDER}/{name}")
    for name in sorted(foreign):
        path = f"{FOLDER}/{name}"
        own = {storage.stored_sha256(storage.join(uri, each)): each for each in by_size.get(stored[path], ())}
        yield copy_of(uri, path, own) or Finding(
            "foreign", path, f"only parts of job {run.digest[:8]}, units 0 to {run.units - 1}", _whose(name, run), MOVE)


def _whose(name: str, run: Run) -> str:
    match = PART_NAME.fullmatch(name)
    if match is None:
        return "another name"
    return f"unit {int(match[1])}" if match[2] == run.digest[:8] else f"a part of job {match[2]}"
