"""An earlier run's output as a source of rows: which of its parts a new unit may need, and what they say of a picture.

A row is copied where it would be computed the same: same bytes, same boxes, same intent otherwise. Whether bytes and
boxes are the same is decided picture by picture (`annotation`); here is what is decided for the whole run.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import keypoints, storage
from pipeline.annotation_input import LIST
from pipeline.annotation_seal import sealed_counts
from pipeline.boxes import DETECT
from pipeline.errors import ConfigError
from pipeline.hash_buckets import Hashes, name_hashes
from pipeline.images import REASONS
from pipeline.pose.skeleton import Skeleton
from pipeline.rows import AnnotatedPicture, pictures_of_table
from pipeline.units import FrozenJob, committed_units, open_job, read_units

# What may differ: which pictures there are, how they are cut into units, and boxes, which are compared one by one
MAY_DIFFER = frozenset({"limit", "pictures_per_unit", "boxes"})


class EarlierPictures:
    """The rows of an earlier output, read part by part as units ask for them.

    source  the input of the run that asks. Of another place's objects an etag says nothing (on a disk it is size and
            time alone): pictures from there come without theirs, so that their bytes decide.
    """

    def __init__(self, output: str, source: Mapping[str, Any]) -> None:
        self.output = output
        earlier = open_earlier(output).input
        self.lists = earlier["kind"] == source["kind"] == LIST
        self.same_place = (earlier["kind"], earlier["uri"]) == (source["kind"], source["uri"])

    def of_parts(self, names: Iterable[str]) -> dict[str, AnnotatedPicture]:
        """By key, what became of each picture of these parts."""
        found: dict[str, AnnotatedPicture] = {}
        for name in names:
            data = storage.read_object(storage.join(self.output, keypoints.FOLDER, name))
            table = pq.read_table(pa.BufferReader(data))
            pose = json.loads(table.schema.metadata[b"pose"])
            pictures = pictures_of_table(table, Skeleton.from_json(pose["skeleton"]))
            found |= {picture.picture["key"]: self._comparable(keypoints.with_suppressed(picture, pose))
                      for picture in pictures}
        return found

    def _comparable(self, picture: AnnotatedPicture) -> AnnotatedPicture:
        same = _is_whole(picture.picture["key"]) if self.lists else self.same_place
        return picture if same else replace(picture, picture=picture.picture | {"etag": None})


def _is_whole(uri: str) -> bool:
    return storage.is_remote(uri) or uri.startswith("/")  # a relative path is another file elsewhere


def open_earlier(output: str) -> FrozenJob:
    """The run at `output`. Refuses (ConfigError) a place without one."""
    job = open_job(output)
    if job is None:
        raise ConfigError(f"--reuse {output}: no annotate run was begun there. Give the --output of one.")
    return job


def refuse_computed_otherwise(output: str, job: FrozenJob, intent: Mapping[str, Any]) -> None:
    """Refuse (ConfigError) to copy rows of `job`, at `output`, into a run of another intent, with the differences."""
    before, now = _comparable(job.intent), _comparable(intent)
    differences = [f"  {name}: {json.dumps(before.get(name))} there, now {json.dumps(now.get(name))}"
                   for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if differences:
        raise ConfigError(f"--reuse {output}: none of its rows can be copied, since they were computed otherwise:\n"
                          + "\n".join(differences) + "\nRepeat its settings, or leave --reuse out.")


def _comparable(intent: Mapping[str, Any]) -> dict[str, Any]:
    same = {name: value for name, value in intent.items() if name not in MAY_DIFFER}
    boxes = intent["boxes"]  # a detector's are known only once they have been computed
    return same | ({"boxes": boxes} if boxes["kind"] == DETECT else {"boxes": "each compared"})


def earlier_parts(earlier_output: str, earlier: FrozenJob, output: str, job: FrozenJob,
                  units: Sequence[int]) -> Iterator[tuple[int, list[str]]]:
    """For each unit, in their order, the committed parts of the earlier run that may hold one of its pictures.

    12 bytes of memory for each picture that the earlier run planned.
    """
    committed = sorted(committed_units(earlier_output, keypoints.FOLDER, earlier))
    hashes, homes = _homes(earlier_output, earlier, committed)
    for unit, table in read_units(output, job, units):
        wanted = _hashes(table)
        first, last = np.searchsorted(hashes, wanted, "left"), np.searchsorted(hashes, wanted, "right")
        found = {int(home) for a, b in zip(first, last, strict=True) for home in homes[a:b]}
        yield unit, [earlier.part_name(home) for home in sorted(found)]


class KnownPictures:
    """Which planned pictures an earlier run has committed, as far as plans tell: for a forecast, before any is read.

    Boxes are not looked at, and a picture that only its bytes would show to be the same isn't known. 8 bytes of memory
    for each of its pictures, and 8 more where it knew their SHA-256. `num_changeable`: how many of them were rejected
    for a reason that can change; 0 until that run has ended.
    """

    def __init__(self, output: str) -> None:
        job = open_earlier(output)
        committed = sorted(committed_units(output, keypoints.FOLDER, job))
        found: dict[str, list[Hashes]] = {name: [np.empty(0, np.uint64)] for name in ("sha256", "etag")}
        for _, table in read_units(output, job, committed):
            for name, hashes in found.items():
                hashes.append(_identity_hashes(table.filter(table[name].is_valid()), name))
        self._known = {name: np.sort(np.concatenate(hashes)) for name, hashes in found.items()}
        reasons = (sealed_counts(output, job) or {}).get("reasons", {})
        self.num_changeable = sum(count for reason, count in reasons.items() if REASONS[reason][1])

    def among(self, planned: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """bool [n]: those of the same key, and of the same SHA-256 where both plans know it, else of the same ETag."""
        by_sha256 = np.zeros(len(planned), bool)
        if "sha256" in planned.column_names and len(self._known["sha256"]):
            by_sha256 = np.asarray(planned["sha256"].is_valid().to_numpy(), bool)
        known = np.zeros(len(planned), bool)
        for name, which in (("sha256", by_sha256), ("etag", ~by_sha256)):
            if which.any():
                known[which] = _are_in(self._known[name], _identity_hashes(planned.filter(pa.array(which)), name))
        return known


def _identity_hashes(table: pa.Table, name: str) -> Hashes:
    return name_hashes((f"{same} {key}" for same, key in zip(table[name].to_pylist(), table["key"].to_pylist(),
                                                            strict=True)), 0)


def _are_in(known: Hashes, wanted: Hashes) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of `wanted` are in `known`, which is sorted."""
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return known[places] == wanted if len(known) else np.zeros(len(wanted), bool)


def _homes(output: str, job: FrozenJob, units: Sequence[int]) -> tuple[Hashes, np.ndarray[Any, np.dtype[np.int32]]]:
    """The keys' hashes in order, uint64 [n], and the unit of each, int32 [n]."""
    hashes, homes = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
    for unit, table in read_units(output, job, units):
        hashes.append(_hashes(table))
        homes.append(np.full(len(table), unit, np.int32))
    all_hashes = np.concatenate(hashes)
    order = np.argsort(all_hashes, kind="stable")
    return all_hashes[order], np.concatenate(homes)[order]


def _hashes(table: pa.Table) -> Hashes:
    return name_hashes(table["key"].to_pylist(), 0)
