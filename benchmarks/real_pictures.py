"""The whole line on real pictures, from a folder and again from a bucket, and whether both give the same rows.

    python -m benchmarks.real_pictures --data FOLDER --output build/real

FOLDER is like COCO's: `images/`, `annotations/person_keypoints_{train,val}.json`. A small MSPN is trained on 64
persons, without augmentation, until it knows them; then the val pictures are annotated with it, from the folder and
from `s3://` on a local S3 server. Every step is a command line, printed as it runs.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.keypoints import read_keypoints
from tests.s3 import S3Server, s3_server

# the first 26 of these train pictures of coco17_mini have 64 persons with keypoints
TRAIN_PICTURES = ("--include", "*[0-4].jpg", "--limit", "26")
RECIPE = "benchmarks/real_pictures.yaml"


def main() -> int:
    """Run it all; 0 if the rows are equal and the trained persons are known (AP >= 0.90)."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args()
    output = options.output.resolve()
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{output}/mlflow.db")
    output.mkdir(parents=True)
    known = train_and_evaluate(options.data.resolve(), output)
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder)) as server:
        os.environ.update(server.environment)
        bucket = annotate_from_bucket(server, options.data.resolve(), output)
        equal = compare(str(output / "val-keypoints"), f"{bucket}/val-keypoints")
    return 0 if equal and known >= 0.9 else 1


def train_and_evaluate(data: Path, output: Path) -> float:
    """Shard, train, annotate, evaluate, preview from the folder; the AP on the persons trained on."""
    shard(str(data), str(output), "train", *TRAIN_PICTURES)
    shard(str(data), str(output), "val")
    job("train", "--data", f"{output}/train-shards", "--val", f"{output}/train-shards", "--output", f"{output}/model",
        "--config", RECIPE, "--register", "pose-real")
    known: dict[str, Any] = {}
    for split in ("train", "val"):
        annotate(str(output), split, f"{output}/model")
        known[split] = job("evaluate", "--keypoints", f"{output}/{split}-keypoints", "--annotations",
                           str(data / "annotations" / f"person_keypoints_{split}.json"))
        job("preview", "--keypoints", f"{output}/{split}-keypoints", "--output", f"{output}/{split}-preview")
    print(f"AP on the persons trained on: {known['train']['ap']:.3f}; on val, which it has not seen: "
          f"{known['val']['ap']:.3f}")
    return float(known["train"]["ap"])


def annotate_from_bucket(server: S3Server, data: Path, output: Path) -> str:
    """The val pictures once more, with the same model, everything on the S3 server; the bucket's URI."""
    bucket = server.create_bucket("pose")
    server.upload_folder(data, f"{bucket}/data")
    server.upload_folder(output / "model", f"{bucket}/model")
    shard(f"{bucket}/data", bucket, "val")
    annotate(bucket, "val", f"{bucket}/model")
    return bucket


def compare(here: str, there: str) -> bool:
    """Whether two keypoint datasets have the same rows, all columns but `etag`, floats bit by bit."""
    first, second = (sorted_rows(uri) for uri in (here, there))
    equal = bool(first.equals(second))
    print(f"{first.num_rows} rows from the folder and {second.num_rows} from the bucket compared, "
          f"{first.num_columns} columns: {'equal' if equal else 'NOT EQUAL'}")
    return equal


def sorted_rows(uri: str) -> pa.Table:
    """The rows of a keypoint dataset by (key, person_index), without `etag`, which is the store's own."""
    return read_keypoints(uri)[0].drop_columns(["etag"]).combine_chunks()


def shard(data: str, output: str, split: str, *more: str) -> None:
    """Shard one split's annotated pictures."""
    job("shard", "--images", f"{data}/images", "--annotations", f"{data}/annotations/person_keypoints_{split}.json",
        "--output", f"{output}/{split}-shards", "--images-per-shard", "16", "--set", "annotated_only=true", *more)


def annotate(output: str, split: str, model: str) -> None:
    """Annotate one split with its annotated boxes."""
    job("annotate", "--input", f"{output}/{split}-shards", "--model", model, "--output", f"{output}/{split}-keypoints")


def job(*arguments: str) -> dict[str, Any]:
    """Run one job as its user would; its result."""
    print("$ python -m jobs", shlex.join(arguments), flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "jobs", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    print(f"  {time.monotonic() - began:.0f} s: {json.dumps({k: v for k, v in result.items() if k != 'joints'})}")
    return result


if __name__ == "__main__":
    sys.exit(main())
