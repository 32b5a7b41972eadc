"""Freezing millions of boxes from Parquet: seconds and memory of the driver, and what one unit then reads.

    python -m benchmarks.boxes --boxes 5000000
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.planning import resident_mb

BOXES_PER_PICTURE, PICTURES_PER_UNIT, ROWS_PER_FILE = 4, 500, 500_000
INPUT = {"kind": "prefix", "uri": "/pictures"}


def main() -> int:
    """Print one line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--boxes", type=int, default=5_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_boxes(Path(folder, "boxes"), options.boxes)
        print(json.dumps(freeze(Path(folder), options.boxes // BOXES_PER_PICTURE)))
    return 0


def write_boxes(folder: Path, count: int) -> None:
    """Files of boxes by key, of which every fifth picture isn't planned."""
    folder.mkdir()
    values = np.random.default_rng(0)
    for start in range(0, count, ROWS_PER_FILE):
        rows = min(ROWS_PER_FILE, count - start)
        keys = [key(index // BOXES_PER_PICTURE * 5 // 4) for index in range(start, start + rows)]
        sides = {name: values.uniform(1, 400, rows) for name in "xywh"}
        pq.write_table(pa.table({"key": keys, **sides, "score": values.uniform(0, 1, rows)}),
                       folder / f"{start:09d}.parquet")


def key(index: int) -> str:
    """A picture's name; names in a row are not neighbours by hash."""
    return f"camera-{index % 40:02d}/2026-11-22/{index:012d}.jpg"


def plan(pictures: int) -> Iterator[pa.Table]:
    """The units of so many pictures."""
    for start in range(0, pictures, PICTURES_PER_UNIT):
        keys = [key(index) for index in range(start, min(start + PICTURES_PER_UNIT, pictures))]
        yield pa.table({"key": keys, "etag": keys})


def freeze(folder: Path, pictures: int) -> dict[str, float]:
    """Plan, freeze, read one unit."""
    from pipeline.boxes import AskedBoxes, choose_boxes
    from pipeline.frozen_boxes import read_unit_boxes
    from pipeline.units import freeze_job

    output = str(folder / "out")
    base, began = resident_mb("VmRSS"), time.monotonic()
    with choose_boxes(AskedBoxes(str(folder / "boxes")), INPUT, output) as chosen:
        read = time.monotonic()
        intent = {"boxes": chosen.choice.intent()}
        job = freeze_job(output, plan(pictures), input=INPUT, intent=intent, before_commit=chosen.freeze)
    frozen, peak = time.monotonic(), resident_mb("VmHWM")
    boxes = read_unit_boxes(output, job, str(chosen.choice.digest), job.num_units // 2)
    return {"pictures": pictures, "units": job.num_units, "seconds_to_digest": round(read - began, 1),
            "seconds_to_freeze_with_plan": round(frozen - read, 1), "mb_above_base": round(peak - base),
            "frozen_mb": round(sum(path.stat().st_size for path in Path(output, "_boxes").rglob("*.parquet")) / 1e6),
            "boxes_of_a_unit": sum(len(one.ids) for one in boxes.values()),
            "ms_to_read_a_unit": round((time.monotonic() - frozen) * 1000, 1)}


if __name__ == "__main__":
    sys.exit(main())
