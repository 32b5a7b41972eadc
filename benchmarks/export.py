"""How long an export takes, how much memory, and how large the file is, for each format.

    python -m benchmarks.export [--persons N] [--formats FORMAT ...]

A made keypoint dataset (COCO's 17 joints, 2.5 persons a picture on average, in units of 500 pictures) on the local
disk; each format is a process of its own. `plain` is COCO's annotations by a dict for each person and json.dumps:
what the columns of text are there to avoid.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.export import NOT_EXPORTED, run
from pipeline import keypoints, storage, units
from pipeline.config import ExportConfig
from pipeline.export import FORMATS, joint_array, person_rows
from pipeline.export.persons import box_array
from pipeline.pose.skeleton import COCO17
from pipeline.rows import AnnotatedPicture, Boxes

PLAIN = "plain"
PERSONS_PER_PICTURE = (1, 2, 3, 4)
PICTURES_PER_UNIT = 500
PREFIXED = ("label-studio", "fiftyone")


def main() -> int:
    """Make the dataset, export it in each format, print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--persons", type=int, default=200_000)
    parser.add_argument("--formats", nargs="+", default=[*FORMATS, PLAIN])
    parser.add_argument("--only", nargs=2, metavar=("FORMAT", "DATASET"), help="what each process does")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(*options.only)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(f"{folder}/keypoints", options.persons)
        print("| format | s | s of CPU | MB of memory above the start | MB of file |\n|---|---|---|---|---|")
        for to in options.formats:
            command = [sys.executable, "-m", "benchmarks.export", "--only", to, f"{folder}/keypoints"]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print("| {to} | {seconds:.1f} | {cpu:.1f} | {peak_mb:.0f} | {file_mb:.0f} |".format(**result), flush=True)
    return 0


def measure(to: str, dataset: str) -> dict[str, Any]:
    """Seconds, of the clock and of the CPU; peak of resident memory beyond the imports'; the file's size."""
    before_mb = _peak_mb()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    if to == PLAIN:
        num_bytes = len(plain_annotations(dataset))
    else:
        with tempfile.TemporaryDirectory() as folder:
            extra = {"image_prefix": "s3://bucket/"} if to in PREFIXED else {}
            num_bytes = run(ExportConfig(keypoints=dataset, to=to, output=f"{folder}/file", **extra))["bytes"]
    return {"to": to, "seconds": time.perf_counter() - begun, "cpu": time.process_time() - begun_cpu,
            "peak_mb": _peak_mb() - before_mb, "file_mb": num_bytes / 1e6}


def plain_annotations(dataset: str) -> bytes:
    """The annotations of COCO's file, a dict for each person."""
    table, metadata = keypoints.read_keypoints(dataset, without=NOT_EXPORTED)
    persons = person_rows(table)
    joints = joint_array(persons, metadata.skeleton).astype("U32").astype(float)
    joints[..., 2] = np.where(joints[..., 2] >= 0.7, 2, 1)
    rows = zip(persons["image_id"].to_pylist(), box_array(persons).tolist(), persons["score"].to_pylist(), strict=True)
    return json.dumps([
        {"id": number + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0, "bbox": box, "area": box[2] * box[3],
         "num_keypoints": len(joints[number]), "keypoints": joints[number].ravel().tolist(), "score": score}
        for number, (image_id, box, score) in enumerate(rows)]).encode()


def make_dataset(output: str, num_persons: int) -> None:
    """A committed keypoint dataset with about so many persons."""
    num_pictures = int(num_persons / np.mean(PERSONS_PER_PICTURE))
    bounds = range(0, num_pictures, PICTURES_PER_UNIT)
    plan = [pa.Table.from_pylist([{"key": _key(number), "etag": "e", "size": 1} for number in
                                  range(first, min(first + PICTURES_PER_UNIT, num_pictures))]) for first in bounds]
    job = units.freeze_job(output, plan, intent={}, input={"kind": "prefix", "uri": "/nowhere"})
    for unit, first in enumerate(bounds):
        pictures = make_pictures(range(first, min(first + PICTURES_PER_UNIT, num_pictures)))
        data = keypoints.part_bytes(pictures, COCO17, job=job.digest, model={"name": "made", "version": "1"})
        storage.put_if_absent(storage.join(output, keypoints.FOLDER, job.part_name(unit)), data)


def make_pictures(numbers: Sequence[int]) -> list[AnnotatedPicture]:
    """Pictures of 640 x 480 with 1 to 4 persons, their joints anywhere in them."""
    pictures = []
    for number in numbers:
        random, many = np.random.default_rng(number), PERSONS_PER_PICTURE[number % len(PERSONS_PER_PICTURE)]
        boxes = random.uniform([0, 0, 20, 20], [500, 380, 140, 100], (many, 4))
        picture = {"key": _key(number), "image_id": number, "etag": f"{number:032x}", "sha256": f"{number:064x}",
                   "width": 640, "height": 480}
        pictures.append(AnnotatedPicture(
            picture, "ok", boxes=Boxes(np.arange(many), boxes, np.ones(many)),
            joints_xy=random.uniform(0, [640, 480], (many, 17, 2)).astype(np.float32),
            joint_scores=random.uniform(0.5, 1.5, (many, 17)).astype(np.float32)))
    return pictures


def _key(number: int) -> str:
    return f"folder-{number // 1000:04d}/{number:012d}.jpg"


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    sys.exit(main())
