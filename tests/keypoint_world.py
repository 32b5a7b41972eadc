"""A small keypoint dataset, written literally: three units of pictures, nothing of it by the code that annotates.

Unit 0: a.jpg with two persons, b.jpg without any.   Unit 1: c.jpg with one person, d.txt, which is no picture.
Unit 2: e.jpg with one person. The joints are "Head" and "tail-fin".
"""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.shard_world import parquet

FIXED = {"key": pa.string(), "image_id": pa.int64(), "etag": pa.string(), "sha256": pa.string(), "width": pa.int32(),
         "height": pa.int32(), "status": pa.string(), "reason": pa.string(), "error": pa.string(),
         "person_index": pa.int32(), "box_id": pa.int64(), "box_x": pa.float64(), "box_y": pa.float64(),
         "box_w": pa.float64(), "box_h": pa.float64(), "box_score": pa.float64(), "score": pa.float64()}
JOINTS = {f"{joint}_{value}": pa.float32() for joint in ("head", "tail_fin") for value in ("x", "y", "score")}
COLUMNS = {**FIXED, **JOINTS, "job": pa.string()}
PLAN = pa.schema([("unit", pa.int32()), ("key", pa.string()), ("etag", pa.string()), ("size", pa.int64()),
                  ("sha256", pa.string()), ("part", pa.string())])
LIST = pa.schema([("unit", pa.int32()), ("part", pa.string()), ("size", pa.int64()), ("sha256", pa.string())])
BOXES = pa.schema([("key", pa.string()), ("box_id", pa.int64()), ("x", pa.float64()), ("y", pa.float64()),
                   ("w", pa.float64()), ("h", pa.float64()), ("score", pa.float64())])
FIRST_BOXES = pa.schema([("image_id", pa.int64()), ("box_id", pa.int64()), ("xywh", pa.list_(pa.float64(), 4)),
                         ("score", pa.float64())])
MODEL = {"_model/model.json": b'{"version": 1}', "_model/model.safetensors": b"weights"}
MODEL_DIGEST = hashlib.sha256(b'{"version": 1}weights').hexdigest()

Row = dict[str, Any]


def picture(key: str, status: str = "ok", **values: Any) -> Row:
    return {**dict.fromkeys(COLUMNS), "key": key, "etag": f"etag of {key}", "sha256": sha_of(key), "width": 8,
            "height": 6, "status": status, **values}


def person(key: str, index: int = 0, **values: Any) -> Row:
    """A person whose joints' scores have the mean 0.75, in a box of score 0.5."""
    return picture(key, person_index=index, box_id=7, box_x=1.0, box_y=2.0, box_w=3.0, box_h=4.0, box_score=0.5,
                   score=0.375, head_x=1.5, head_y=2.5, head_score=0.5, tail_fin_x=3.5, tail_fin_y=5.5,
                   tail_fin_score=1.0, **values)


def sha_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def counts(pictures: int, persons: int, ok: int, no_person: int = 0, rejected: int = 0, **more: Any) -> Row:
    return {"pictures": pictures, "persons": persons, "ok": ok, "no_person": no_person, "rejected": rejected,
            "boxes_refused": 0, "reasons": {}, **more}


@dataclass
class KeypointWorld:
    """The dataset before it is written; a test damages it here (then digests fit), or its files (then they don't).

    listed  whether `_SUCCESS` names a list of parts, as that of older programs does not
    edit    changes the JSON of "_job.json", "_SUCCESS" or "pose 0" (to 2), or the rows of "list"
    """

    rows: list[list[Row]] = field(default_factory=lambda: [
        [person("a.jpg"), person("a.jpg", 1), picture("b.jpg", "no_person")],
        [person("c.jpg"), picture("d.txt", "rejected", sha256=None, width=None, height=None, reason="not_a_picture",
                                  error="d.txt: not_a_picture")],
        [person("e.jpg")]])
    counts: list[Row] = field(default_factory=lambda: [
        counts(2, 2, 1, no_person=1, boxes_refused=2), counts(2, 1, 1, rejected=1, reasons={"not_a_picture": 1}),
        counts(1, 1, 1)])
    total: Row = field(default_factory=lambda: counts(5, 4, 3, 1, 1, boxes_refused=2, reasons={"not_a_picture": 1}))
    intent: Row = field(default_factory=lambda: {"flip": True, "model": MODEL_DIGEST, "boxes": {"kind": "annotated"}})
    columns: dict[str, pa.DataType] = field(default_factory=lambda: dict(COLUMNS))
    listed: bool = True
    sealed: bool = True
    units_per_file: int = 2
    edit: Callable[[str, Any], object] = lambda name, values: None
    # what was planned stays as it is above, whatever a test does to the rows; the digests of a shard dataset's alone
    planned: list[list[Row]] = field(init=False)

    def __post_init__(self) -> None:
        self.planned = [[{"unit": unit, "key": key, "etag": f"etag of {key}", "size": 9,
                          "sha256": sha_of(key) if unit == 0 else None} for key in sorted({row["key"] for row in rows})]
                        for unit, rows in enumerate(self.rows)]

    @property
    def digest(self) -> str:
        frozen = {"plan": self.plan_digest, "intent": self.intent}
        return hashlib.sha256(json.dumps(frozen, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def plan_digest(self) -> str:
        lines = [json.dumps([row["unit"], row["key"], row["size"], row["sha256"] or row["etag"]]) + "\n"
                 for rows in self.planned for row in rows]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def part(self, unit: int) -> str:
        return f"keypoints/part-{unit:07d}-{self.digest[:8]}.parquet"

    def plan(self, number: int) -> str:
        return f"_plan/{self.plan_digest[:16]}/plan-{number:07d}.parquet"

    def files(self) -> dict[str, bytes]:
        """Name -> bytes of all objects of the dataset."""
        files = dict(MODEL) | {self.part(unit): self._part_file(unit) for unit in range(len(self.rows))}
        for number in range(-(-len(self.planned) // self.units_per_file)):
            units = self.planned[number * self.units_per_file:][:self.units_per_file]
            files[self.plan(number)] = grouped([pa.Table.from_pylist(rows, PLAN) for rows in units])
        files["_job.json"] = self._json("_job.json", {
            "version": 1, "digest": self.digest, "intent": self.intent, "input": {"kind": "prefix"}, "about": {},
            "plan": {"digest": self.plan_digest, "units": len(self.planned), "units_per_file": self.units_per_file,
                     "pictures": sum(map(len, self.planned))}})
        return files | (self._seal(files) if self.sealed else {})

    def _seal(self, files: dict[str, bytes]) -> dict[str, bytes]:
        success: Row = {"job": self.digest, "units": len(self.rows), "counts": self.total}
        if not self.listed:
            return {"_SUCCESS": self._json("_SUCCESS", success)}
        rows = [{"unit": unit, "part": self.part(unit).removeprefix("keypoints/"), "size": len(files[self.part(unit)]),
                 "sha256": hashlib.sha256(files[self.part(unit)]).hexdigest()} for unit in range(len(self.rows))]
        self.edit("list", rows)
        data = parquet(pa.Table.from_pylist(rows, LIST))
        sha256 = hashlib.sha256(data).hexdigest()
        success |= {"version": 1, "parts": {"object": f"_parts/{sha256[:16]}.parquet", "sha256": sha256}}
        return {f"_parts/{sha256[:16]}.parquet": data, "_SUCCESS": self._json("_SUCCESS", success)}

    def _part_file(self, unit: int) -> bytes:
        pose = {"version": 1, "counts": self.counts[unit], "skeleton": {"joints": ["Head", "tail-fin"]},
                "coordinate_frame": "pixels", "model": {"name": "fish", "digest": MODEL_DIGEST}, "job": self.digest}
        schema = pa.schema(list(self.columns.items()), {"pose": self._json(f"pose {unit}", pose)})
        rows = [{**row, "job": row["job"] or self.digest} for row in self.rows[unit]]
        return parquet(pa.Table.from_pylist(rows, schema))

    def _json(self, name: str, values: Row) -> bytes:
        values = copy.deepcopy(values)  # what is edited is the JSON, and not the world
        self.edit(name, values)
        return json.dumps(values).encode()


def grouped(tables: list[pa.Table]) -> bytes:
    """A Parquet file with a row group for each table."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()
