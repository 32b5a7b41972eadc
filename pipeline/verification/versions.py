"""The JSON files of a shard dataset: its versions (`dataset-00000N.json`), and the runs that wrote them.

Each is read for itself: its keys, its sums, its digests. What one says against the other is the chain's.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import DataError
from pipeline.verification.counts import add_counts, count_differences
from pipeline.verification.finding import FOLDER, FORMAT, RESTORE, WRITER, Finding, Tell, some

DATASET, JOB, DROPPED = "dataset-{:06d}.json", "_job-{:06d}.json", "dropped-{:06d}.parquet"
DROPPED_NAME = re.compile(r"dropped-\d{6}\.parquet")
PART_NAME = re.compile(r"part-(\d{7})-([0-9a-f]{8})\.parquet")
UNITS_PER_PLAN_FILE = 1000  # where a plan doesn't say
_SHA256 = re.compile("[0-9a-f]{64}")

# What must be there, and of which kind; other keys may be there too.
_PLAN_KEYS = {"digest": str, "units": int, "pictures": int}
_PART_KEYS = {"name": str, "sha256": str, "counts": dict}
_DATASET_KEYS = {"version": int, "dataset_version": int, "counts": dict, "parts": [_PART_KEYS],
                 "source": {"plan": _PLAN_KEYS, "job": str}}
_JOB_KEYS = {"version": int, "digest": str, "plan": _PLAN_KEYS, "intent": dict, "input": dict}


@dataclass(frozen=True)
class Run:
    """The run that wrote a version: its digest, and its plan's. `dropped`: rows that the plan drops; None: no list."""

    digest: str
    plan_digest: str
    units: int
    pictures: int
    units_per_file: int
    dropped: int | None

    def __str__(self) -> str:
        return (f"job {self.digest[:16]}... with {self.pictures} pictures in {self.units} units, "
                f"plan {self.plan_digest[:16]}...")

    def part_name(self, unit: int) -> str:
        """The part of a unit."""
        return f"part-{unit:07d}-{self.digest[:8]}.parquet"

    def wrote(self, name: str) -> bool:
        """Whether a part of this name is one of its units'."""
        match = PART_NAME.fullmatch(name)
        return match is not None and match[2] == self.digest[:8] and int(match[1]) < self.units


@dataclass(frozen=True)
class Version:
    """What one `dataset-00000N.json` says. `sha256` and `counts` are by part; `total` counts the dataset."""

    name: str
    run: Run
    sha256: dict[str, str]
    counts: dict[str, Mapping[str, Any]]
    total: Mapping[str, Any]
    num_joints: int | None
    dropped: str | None
    dropped_sha256: str | None


def read_version(uri: str, number: int, tell: Tell) -> Version | None:
    """The version, and what is wrong with its JSON told; None: it can't be used. A newer format is a DataError."""
    name = DATASET.format(number)
    values = _read_json(uri, name, _DATASET_KEYS, tell)
    if values is None:
        return None
    if problems := list(_wrong_values(values, number)):
        tell(Finding("keys", name, "the values of a version", some(problems), WRITER))
        return None
    entries = list(_distinct(name, values["parts"], tell))
    if wrong := _wrong_sums(values["counts"], entries):
        tell(Finding("counts", name, "the sums of its parts' counts", wrong, WRITER))
    plan, skeleton = values["source"]["plan"], values.get("skeleton")
    # the same names and digests again in each version: one copy of each is enough
    return Version(name, _run(values["source"]["job"], plan),
                   {sys.intern(part["name"]): sys.intern(part["sha256"]) for part in entries},
                   {sys.intern(part["name"]): part["counts"] for part in entries}, values["counts"],
                   len(skeleton["joints"]) if skeleton else None, values.get("dropped"), values.get("dropped_sha256"))


def read_run(uri: str, number: int, tell: Tell) -> Run | None:
    """The run that wrote (or is to write) this version, from its own file; what is wrong with it is told."""
    name = JOB.format(number)
    values = _read_json(uri, name, _JOB_KEYS, tell)
    if values is None:
        return None
    plan = values["plan"]
    if problems := list(_wrong_digests(values["digest"], plan)):
        tell(Finding("keys", name, "the values of a run", some(problems), RESTORE))
        return None
    frozen = json.dumps({"plan": plan["digest"], "intent": values["intent"]}, sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(frozen.encode()).hexdigest() != values["digest"]:
        tell(Finding("damaged", name, f"the plan and the intent of digest {values['digest']}", "others", RESTORE))
    return _run(values["digest"], plan)


def _run(digest: str, plan: Mapping[str, Any]) -> Run:
    return Run(digest, plan["digest"], plan["units"], plan["pictures"],
               plan.get("units_per_file", UNITS_PER_PLAN_FILE), plan.get("dropped"))


def _read_json(uri: str, name: str, keys: Mapping[str, Any], tell: Tell) -> dict[str, Any] | None:
    try:
        values = json.loads(storage.read_object(storage.join(uri, name)))
    except storage.ObjectMissing:
        tell(Finding("missing", name, "each version and its run, from 1 on", "no such object", RESTORE))
        return None
    except (ValueError, RecursionError) as error:
        tell(Finding("unreadable", name, "JSON", str(error), RESTORE))
        return None
    if isinstance(values, dict) and isinstance(values.get("version"), int) and values["version"] > FORMAT:
        raise DataError(f"{uri}/{name} is of format {values['version']}; this program checks up to {FORMAT}. "
                        "Update it.")
    if problems := list(_wrong_keys(keys, values, "")):
        tell(Finding("keys", name, "the keys of its format", some(problems), RESTORE))
        return None
    result: dict[str, Any] = values
    return result


def _wrong_keys(expected: Any, found: Any, where: str) -> Iterator[str]:
    """Each key that is missing or of another kind, such as `source.plan.units: missing`."""
    kind = expected if isinstance(expected, type) else type(expected)
    if not issubclass(type(found), kind) or type(found) is bool:
        yield f"{where or 'the whole'}: {type(found).__name__} instead of {kind.__name__}"
    elif isinstance(expected, list):
        for index, each in enumerate(found):
            yield from _wrong_keys(expected[0], each, f"{where}[{index}]")
    elif isinstance(expected, dict):
        for key, value in expected.items():
            inner = f"{where}.{key}".lstrip(".")
            if key in found:
                yield from _wrong_keys(value, found[key], inner)
            else:
                yield f"{inner}: missing"


def _wrong_values(values: Mapping[str, Any], number: int) -> Iterator[str]:
    """What the kinds of the keys alone do not say."""
    if values["dataset_version"] != number:
        yield f"dataset_version: {values['dataset_version']} instead of {number}"
    for index, part in enumerate(values["parts"]):
        if not PART_NAME.fullmatch(part["name"]) or not _SHA256.fullmatch(part["sha256"]):
            yield f"parts[{index}]: no part's name and SHA-256, but {part['name']!r}, {part['sha256']!r}"
    yield from _wrong_digests(values["source"]["job"], values["source"]["plan"])
    if (skeleton := values.get("skeleton")) is not None:
        yield from _wrong_keys({"joints": [str]}, skeleton, "skeleton")
    for key, form in (("dropped", DROPPED_NAME), ("dropped_sha256", _SHA256)):
        value = values.get(key)
        if value is not None and not (isinstance(value, str) and form.fullmatch(value)):
            yield f"{key}: {value!r}"


def _wrong_digests(job: str, plan: Mapping[str, Any]) -> Iterator[str]:
    for name, digest in (("job", job), ("plan", plan["digest"])):
        if not _SHA256.fullmatch(digest):
            yield f"{name}: digest {digest!r} instead of a SHA-256"
    if plan["units"] < 0 or plan["pictures"] < 0:
        yield f"plan: {plan['units']} units, {plan['pictures']} pictures"


def _distinct(name: str, parts: Sequence[dict[str, Any]], tell: Tell) -> Iterator[dict[str, Any]]:
    """The entries, each name and each content once: a part holds its keys, so that no two are equal."""
    names: set[str] = set()
    contents: dict[str, str] = {}
    for part in parts:
        again = f"{FOLDER}/{part['name']}"
        if part["name"] in names:
            tell(Finding("doubled", again, f"to be named once in {name}", "more than one entry", WRITER))
        elif part["sha256"] in contents:
            tell(Finding("doubled", again, "a content of its own",
                         f"that of {FOLDER}/{contents[part['sha256']]}, which {name} names too", WRITER))
        else:
            yield part
        names.add(part["name"])
        contents.setdefault(part["sha256"], part["name"])


def _wrong_sums(total: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    try:
        return count_differences(total, add_counts([part["counts"] for part in entries]))
    except (KeyError, TypeError, AttributeError) as error:
        return f"a part that lacks some of its counts ({error!r})"
