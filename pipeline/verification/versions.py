"""The versions of a shard dataset (`dataset-00000N.json`), each read for itself: its keys, its sums, its digests.

What one says against another, or against the run that wrote it, is the chain's.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.verification.counts import add_counts, count_differences
from pipeline.verification.finding import WRITER, Finding, Tell, some
from pipeline.verification.reading import read_json, wrong_keys
from pipeline.verification.run import PART_NAME, PLAN_KEYS, SHA256, Run, run_of, wrong_digests

FOLDER = "shards"
DATASET, JOB, DROPPED = "dataset-{:06d}.json", "_job-{:06d}.json", "dropped-{:06d}.parquet"
EACH_VERSION = "each version and its run, from 1 on"
DROPPED_NAME = re.compile(r"dropped-\d{6}\.parquet")

# What must be there, and of which kind; other keys may be there too.
_PART_KEYS = {"name": str, "sha256": str, "counts": dict}
_DATASET_KEYS = {"version": int, "dataset_version": int, "counts": dict, "parts": [_PART_KEYS],
                 "source": {"plan": PLAN_KEYS, "job": str}}


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
    values = read_json(uri, name, _DATASET_KEYS, EACH_VERSION, tell)
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
    return Version(name, run_of(values["source"]["job"], plan),
                   {sys.intern(part["name"]): sys.intern(part["sha256"]) for part in entries},
                   {sys.intern(part["name"]): part["counts"] for part in entries}, values["counts"],
                   len(skeleton["joints"]) if skeleton else None, values.get("dropped"), values.get("dropped_sha256"))


def _wrong_values(values: Mapping[str, Any], number: int) -> Iterator[str]:
    """What the kinds of the keys alone do not say."""
    if values["dataset_version"] != number:
        yield f"dataset_version: {values['dataset_version']} instead of {number}"
    for index, part in enumerate(values["parts"]):
        if not PART_NAME.fullmatch(part["name"]) or not SHA256.fullmatch(part["sha256"]):
            yield f"parts[{index}]: no part's name and SHA-256, but {part['name']!r}, {part['sha256']!r}"
    yield from wrong_digests(values["source"]["job"], values["source"]["plan"])
    if (skeleton := values.get("skeleton")) is not None:
        yield from wrong_keys({"joints": [str]}, skeleton, "skeleton")
    for key, form in (("dropped", DROPPED_NAME), ("dropped_sha256", SHA256)):
        value = values.get(key)
        if value is not None and not (isinstance(value, str) and form.fullmatch(value)):
            yield f"{key}: {value!r}"


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
