"""A small shard dataset, written literally: three versions, three parts, nothing of it by the code that shards.

Part A, run 1: a.jpg with two persons, b.txt, which is no picture.   Part B, run 1: c.jpg, d.jpg.
Part C, run 2: c.jpg as it was changed, e.jpg (the bytes of a.jpg again), f.jpg, which is truncated.
Version 2 drops B's c.jpg, and z.jpg on request. Version 3 was written by a run without units: it drops B's d.jpg too,
so that B is left out.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage

PERSON = pa.struct([("annotation_id", pa.int64()), ("box_xywh", pa.list_(pa.float64(), 4)), ("area", pa.float64()),
                    ("iscrowd", pa.bool_()), ("num_keypoints", pa.int32()), ("keypoints", pa.list_(pa.float64()))])
SHARD = {"key": pa.string(), "etag": pa.string(), "sha256": pa.string(), "size": pa.int64(), "image_id": pa.int64(),
         "width": pa.int32(), "height": pa.int32(), "bytes": pa.binary(), "persons": pa.list_(PERSON),
         "reason": pa.string(), "error": pa.string()}
PLAN = pa.schema([("unit", pa.int32()), ("key", pa.string()), ("etag", pa.string()), ("size", pa.int64()),
                  ("sha256", pa.string()), ("part", pa.string())])
DROPPED = pa.schema([("part", pa.string()), ("key", pa.string()), ("why", pa.string())])
SKELETON = {"name": "fish", "joints": ["head", "tail"]}

Row = dict[str, Any]


def person(*keypoints: float, crowd: bool = False) -> Row:
    return {"annotation_id": 1, "box_xywh": [1.0, 2.0, 3.0, 4.0], "area": 12.0, "iscrowd": crowd,
            "num_keypoints": None, "keypoints": list(keypoints) or None}


def picture(key: str, data: bytes, persons: list[Row] | None = None) -> Row:
    return {"key": key, "etag": f"etag of {key}", "sha256": hashlib.sha256(data).hexdigest(), "size": len(data),
            "image_id": None, "width": 8, "height": 6, "bytes": data, "persons": persons, "reason": None, "error": None}


def refused(key: str, size: int, reason: str) -> Row:
    return {**dict.fromkeys(SHARD), "key": key, "etag": f"etag of {key}", "size": size, "reason": reason,
            "error": f"{key}: {reason}"}


def counts(rows: int, pictures: int, size: int, persons: int = 0, trainable: int = 0, *, refused: int = 0,
           reasons: dict[str, int] | None = None, **more: int) -> Row:
    return {"rows": rows, "pictures": pictures, "refused": refused, "reasons": reasons or {}, "bytes": size,
            "persons": persons, "trainable": trainable, **more}


@dataclass
class World:
    """The dataset before it is written; a test damages it here (then digests fit), or its files (then they don't)."""

    rows: dict[str, list[Row]] = field(default_factory=lambda: {
        "A": [picture("a.jpg", b"a" * 10, [person(1, 2, 2, 0, 0, 0), person(crowd=True)]),
              refused("b.txt", 3, "not_a_picture")],
        "B": [picture("c.jpg", b"c" * 20), picture("d.jpg", b"d" * 30, [])],
        "C": [picture("c.jpg", b"C" * 25, [person(0, 0, 0, 0, 0, 0)]), picture("e.jpg", b"a" * 10),
              refused("f.jpg", 9, "truncated")]})
    metadata: dict[str, Row] = field(default_factory=lambda: {
        "A": counts(2, 1, 10, 2, 1, refused=1, reasons={"not_a_picture": 1}),
        "B": counts(2, 2, 50),
        "C": counts(3, 2, 35, 1, refused=1, reasons={"truncated": 1}, not_pictures=0)})
    live: dict[int, dict[str, Row]] = field(default_factory=lambda: {
        1: {"A": counts(2, 1, 10, 2, 1, refused=1, reasons={"not_a_picture": 1}), "B": counts(2, 2, 50)},
        2: {"A": counts(2, 1, 10, 2, 1, refused=1, reasons={"not_a_picture": 1}), "B": counts(1, 1, 30),
            "C": counts(3, 2, 35, 1, refused=1, reasons={"truncated": 1}, not_pictures=0)},
        3: {"A": counts(2, 1, 10, 2, 1, refused=0, reasons={"not_a_picture": 1}, not_pictures=1),
            "C": counts(3, 2, 35, 1, refused=1, reasons={"truncated": 1}, not_pictures=0)}})
    totals: dict[int, Row] = field(default_factory=lambda: {
        1: counts(4, 3, 60, 2, 1, refused=1, reasons={"not_a_picture": 1}),
        2: counts(6, 4, 75, 3, 1, refused=1, reasons={"truncated": 1}, not_pictures=1, duplicates=1),
        3: counts(5, 3, 45, 3, 1, refused=1, reasons={"truncated": 1, "not_a_picture": 1}, not_pictures=1,
                  duplicates=1)})
    dropped: dict[int, list[tuple[str | None, str, str]]] = field(default_factory=lambda: {
        2: [("B", "c.jpg", "changed"), (None, "z.jpg", "request")],
        3: [("B", "c.jpg", "changed"), ("B", "d.jpg", "removed"), (None, "z.jpg", "request")]})
    runs: dict[int, str] = field(default_factory=lambda: {1: "AB", 2: "C", 3: ""})  # the parts of a run's units
    columns: dict[str, pa.DataType] = field(default_factory=lambda: dict(SHARD))
    edit_json: Callable[[str, Row], None] = lambda name, values: None
    # what was planned stays as it is above, whatever a test does to the rows
    planned: dict[str, list[Row]] = field(init=False)

    def __post_init__(self) -> None:
        self.planned = {part: [{name: row[name] for name in ("key", "etag", "size")} for row in rows]
                        for part, rows in self.rows.items()}

    def names(self) -> dict[str, str]:
        """What the objects are called: parts A, B, C, and the folders of the runs' plans, plan1 to plan3."""
        names = {}
        for run, parts in self.runs.items():
            names[f"plan{run}"] = f"_plan/{plan_digest(self, run)[:16]}"
            for unit, part in enumerate(parts):
                names[part] = f"shards/part-{unit:07d}-{job_digest(self, run)[:8]}.parquet"
        return names

    def files(self) -> dict[str, bytes]:
        """Name -> bytes of all objects of the dataset."""
        names, files = self.names(), {}
        for part, rows in self.rows.items():
            files[names[part]] = part_file(rows, self.columns, self.metadata[part])
        for run, parts in self.runs.items():
            if parts:
                files[f"{names[f'plan{run}']}/plan-0000000.parquet"] = plan_file(self, run)
            about = {"version": 1, "digest": job_digest(self, run), "plan": plan_json(self, run),
                     "intent": {"seed": 0, "run": run}, "input": {"images": "in"}, "about": {}}
            files[f"_job-{run:06d}.json"] = self._json(f"_job-{run:06d}.json", about)
        for version in self.live:
            files |= self._version(version, files)
        return files

    def _version(self, version: int, files: dict[str, bytes]) -> dict[str, bytes]:
        names, written = self.names(), {}
        dropped = f"dropped-{version:06d}.parquet" if version in self.dropped else None
        if dropped:
            rows = [(part and names.get(part, part).removeprefix("shards/"), key, why)
                    for part, key, why in self.dropped[version]]
            written[dropped] = parquet(pa.Table.from_pylist(
                [dict(zip(DROPPED.names, row, strict=True)) for row in rows], DROPPED))
        values = {
            "version": 1, "dataset_version": version, "counts": self.totals[version],
            "source": {"images": "in", "annotations": None, "annotations_sha256": None,
                       "plan": plan_json(self, version), "job": job_digest(self, version)},
            "skeleton": SKELETON, "dropped": dropped,
            "dropped_sha256": dropped and hashlib.sha256(written[dropped]).hexdigest(),
            "parts": [{"name": names[part].removeprefix("shards/"), "counts": count,
                       "sha256": hashlib.sha256(files[names[part]]).hexdigest()}
                      for part, count in self.live[version].items()]}
        return written | {f"dataset-{version:06d}.json": self._json(f"dataset-{version:06d}.json", values)}

    def _json(self, name: str, values: Row) -> bytes:
        self.edit_json(name, values)
        return json.dumps(values).encode()


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def part_file(rows: list[Row], columns: dict[str, pa.DataType], count: Row) -> bytes:
    schema = pa.schema(list(columns.items()), {"shard": json.dumps({"version": 1, "counts": count})})
    return parquet(pa.Table.from_pylist(rows, schema))


def plan_file(world: World, run: int) -> bytes:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, PLAN) as writer:
        for unit, part in enumerate(world.runs[run]):
            writer.write_table(pa.Table.from_pylist([{"unit": unit, **row} for row in world.planned[part]], PLAN))
    return sink.getvalue().to_pybytes()


def plan_digest(world: World, run: int) -> str:
    lines = [json.dumps([unit, row["key"], row["size"], row["etag"]]) + "\n"
             for unit, part in enumerate(world.runs[run]) for row in world.planned[part]]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def plan_json(world: World, run: int) -> Row:
    return {"digest": plan_digest(world, run), "units": len(world.runs[run]),
            "pictures": sum(len(world.planned[part]) for part in world.runs[run])}


def job_digest(world: World, run: int) -> str:
    frozen = {"plan": plan_digest(world, run), "intent": {"seed": 0, "run": run}}
    return hashlib.sha256(json.dumps(frozen, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_files(place: str, files: dict[str, bytes]) -> None:
    """Put each object; the place must not have it yet."""
    for name, data in files.items():
        if storage.is_remote(place):
            assert storage.put_if_absent(storage.join(place, name), data)
            continue
        path = Path(place, name)  # a plain write: a thousand times fsync would be most of the tests' time
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
