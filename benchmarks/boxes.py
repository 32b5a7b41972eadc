"""Freezing millions of boxes from files: seconds and memory of the driver, and what one unit then reads.

    python -m benchmarks.boxes --boxes 5000000
    python -m benchmarks.boxes --boxes 5000000 --kind json

Parquet names pictures by key, a COCO detections JSON by image id, which a shard dataset has.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.planning import resident_mb

BOXES_PER_PICTURE, PICTURES_PER_UNIT, ROWS_PER_FILE = 4, 500, 500_000
PREFIX = {"kind": "prefix", "uri": "/pictures"}


def main() -> int:
    """Print one line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--boxes", type=int, default=5_000_000)
    parser.add_argument("--kind", choices=("parquet", "json"), default="parquet")
    options = parser.parse_args()
    pictures = options.boxes // BOXES_PER_PICTURE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.kind == "json":
            write_json(folder / "boxes.json", options.boxes)
            source, boxes = write_shards(folder / "shards", pictures), folder / "boxes.json"
        else:
            write_boxes(folder / "boxes", options.boxes)
            source, boxes = PREFIX, folder / "boxes"
        megabytes = sum(path.stat().st_size for path in [*folder.glob("boxes.json"), *folder.glob("boxes/*")]) / 1e6
        print(json.dumps({"kind": options.kind, "mb": round(megabytes), **freeze(folder, boxes, source, pictures)}))
    return 0


def write_boxes(folder: Path, count: int) -> None:
    """Files of boxes by key, of which every fifth picture isn't planned."""
    folder.mkdir()
    values = np.random.default_rng(0)
    for start in range(0, count, ROWS_PER_FILE):
        rows = min(ROWS_PER_FILE, count - start)
        keys = [key(boxed_picture(index)) for index in range(start, start + rows)]
        sides = {name: values.uniform(1, 400, rows) for name in "xywh"}
        pq.write_table(pa.table({"key": keys, **sides, "score": values.uniform(0, 1, rows)}),
                       folder / f"{start:09d}.parquet")


def write_json(path: Path, count: int) -> None:
    """The same as one COCO detections JSON, by image id."""
    values = np.random.default_rng(0)
    with path.open("w") as file:
        for index in range(count):
            *box, score = values.uniform(0, 400, 5).round(3).tolist()
            entry = {"image_id": boxed_picture(index), "category_id": 1, "bbox": box, "score": score / 400}
            file.write(("," if index else "[") + json.dumps(entry))
        file.write("]")


def write_shards(folder: Path, pictures: int) -> dict[str, Any]:
    """A shard dataset of so many pictures, without a byte of them, as a unit each; what names it as an input."""
    from pipeline import shards
    from pipeline.rows import SHARD_SCHEMA

    parts = []
    (folder / shards.FOLDER).mkdir(parents=True)
    for start in range(0, pictures, PICTURES_PER_UNIT):
        rows = [{**dict.fromkeys(SHARD_SCHEMA.names), "key": key(index), "image_id": index}
                for index in range(start, min(start + PICTURES_PER_UNIT, pictures))]
        pq.write_table(pa.Table.from_pylist(rows, SHARD_SCHEMA), folder / shards.FOLDER / part_name(start))
        parts.append(shards.ShardPart(part_name(start), "", {}))
    (folder / shards.version_name(1)).write_bytes(shards.dataset_json(
        parts, version=1, skeleton=None, source={"annotations_sha256": "0" * 64}, counts={}))
    return {"kind": "shards", "uri": str(folder), "version": 1}


def part_name(first: int) -> str:
    """The shard of the unit that begins with this picture."""
    return f"part-{first // PICTURES_PER_UNIT:07d}-00000000.parquet"


def boxed_picture(box: int) -> int:
    """Which picture a box is of."""
    return box // BOXES_PER_PICTURE * 5 // 4


def key(index: int) -> str:
    """A picture's name; names in a row are not neighbours by hash."""
    return f"camera-{index % 40:02d}/2026-11-22/{index:012d}.jpg"


def plan(pictures: int) -> Iterator[pa.Table]:
    """The units of so many pictures."""
    for start in range(0, pictures, PICTURES_PER_UNIT):
        keys = [key(index) for index in range(start, min(start + PICTURES_PER_UNIT, pictures))]
        yield pa.table({"key": keys, "etag": keys, "part": [part_name(start)] * len(keys)})


def freeze(folder: Path, boxes: Path, source: dict[str, Any], pictures: int) -> dict[str, float]:
    """Plan, freeze, read one unit."""
    from pipeline.boxes import AskedBoxes, choose_boxes
    from pipeline.frozen_boxes import read_unit_boxes
    from pipeline.units import freeze_job

    output = str(folder / "out")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: writing what is read took memory too
    base, began = resident_mb("VmRSS"), time.monotonic()
    with choose_boxes(AskedBoxes(str(boxes)), source, output) as chosen:
        read, read_mb = time.monotonic(), resident_mb("VmHWM")
        intent = {"boxes": chosen.choice.intent()}
        job = freeze_job(output, plan(pictures), input=source, intent=intent, before_commit=chosen.freeze)
    frozen, peak = time.monotonic(), resident_mb("VmHWM")
    found = read_unit_boxes(output, job, str(chosen.choice.digest), job.num_units // 2)
    return {"pictures": pictures, "units": job.num_units, "seconds_to_digest": round(read - began, 1),
            "mb_above_base_to_digest": round(read_mb - base),
            "seconds_to_freeze_with_plan": round(frozen - read, 1), "mb_above_base": round(peak - base),
            "frozen_mb": round(sum(path.stat().st_size for path in Path(output, "_boxes").rglob("*.parquet")) / 1e6),
            "boxes_of_a_unit": sum(len(one.ids) for one in found.values()),
            "ms_to_read_a_unit": round((time.monotonic() - frozen) * 1000, 1)}


if __name__ == "__main__":
    sys.exit(main())
