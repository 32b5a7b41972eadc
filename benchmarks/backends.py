"""What each way to compute heatmaps costs and changes: speed, keypoints moved, and AP, against the network as it is.

    python -m benchmarks.backends --data SHARDS --model DIR [--output FILE] [--threads N]

SHARDS is a shard dataset with annotations, all of whose persons are annotated by each backend and precision that this
machine offers. Moved: the share of joints more than 0.5 px of the picture away from those of the plain float32 path.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.evaluation import evaluation_metrics
from pipeline.model.directory import load_model
from pipeline.model.inference import CPU, CUDA, OPENVINO, PLAIN, has_openvino
from pipeline.prediction import Predictor
from pipeline.shards import open_shards
from pipeline.validation import ValidatedPicture, evaluate_pictures, validate_part

MOVED_PX = 0.5
BATCH_SIZE = 32
REPETITIONS = 5


def main() -> int:
    """Print the table; write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    predictors = {name: open_predictor(options.model, *name, options.threads) for name in ways()}
    found = {name: annotate(predictor, options.data) for name, predictor in predictors.items()}
    seconds = time_side_by_side(predictors)
    plain = (PLAIN, "float32")
    rows = [describe(name, pictures, found[plain], seconds[name], seconds[plain], predictors[name])
            for name, pictures in found.items()]
    print(f"{'backend':10} {'precision':9} {'ms/crop':>8} {'times':>6} {'moved':>8} {'AP':>8} {'change':>8}")
    for row in rows:
        print(f"{row['backend']:10} {row['precision']:9} {row['ms/crop']:8.1f} {row['times']:6.2f} {row['moved']:8.4%} "
              f"{row['ap']:8.4f} {row['ap'] - rows[0]['ap']:+8.4f}")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))
    return 0


def ways() -> list[tuple[str, str]]:
    """(backend, precision) to compare; the first is what the others are compared with."""
    backends = [CPU, *([OPENVINO] if has_openvino() else []), *([CUDA] if torch.cuda.is_available() else [])]
    return [(PLAIN, "float32"), *((backend, precision) for backend in backends
                                  for precision in ("float32", "bfloat16"))]


def open_predictor(model: Path, backend: str, precision: str, threads: int) -> Predictor:
    """With the flip test, as `annotate` has it."""
    return Predictor(load_model(model), backend=backend, precision=precision, batch_size=BATCH_SIZE, threads=threads)


def annotate(predictor: Predictor, data: str) -> list[ValidatedPicture]:
    """All annotated persons of the dataset."""
    dataset = open_shards(data)
    return [picture for part in dataset.parts for picture in validate_part(dataset, part, predictor)]


def time_side_by_side(predictors: dict[tuple[str, str], Predictor]) -> dict[tuple[str, str], float]:
    """Seconds for a full batch of crops without the flip test, medians; all in turns."""
    width, height = next(iter(predictors.values())).spec.input_size_wh
    images = torch.rand(BATCH_SIZE, 3, height, width)
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in predictors}
    for _ in range(REPETITIONS):
        for name, predictor in predictors.items():
            placed = images.to(predictor.device)
            began = time.perf_counter()
            with torch.inference_mode():
                predictor._heatmaps(placed).cpu()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def describe(name: tuple[str, str], pictures: list[ValidatedPicture], plain: list[ValidatedPicture], seconds: float,
             plain_s: float, predictor: Predictor) -> dict[str, Any]:
    """One row of the table."""
    distances = np.linalg.norm(joints_of(pictures) - joints_of(plain), axis=-1)
    metrics = evaluation_metrics(evaluate_pictures(pictures, predictor.skeleton))
    return {"backend": name[0], "precision": name[1], "ms/crop": seconds * 1000 / BATCH_SIZE,
            "times": plain_s / seconds, "moved": float((distances > MOVED_PX).mean()), "ap": metrics["ap"],
            "joints": distances.size}


def joints_of(pictures: list[ValidatedPicture]) -> np.ndarray[Any, Any]:
    """[N, K, 2] of all persons."""
    return np.concatenate([picture.predicted.joints_xy for picture in pictures
                           if picture.predicted.joints_xy is not None])


if __name__ == "__main__":
    sys.exit(main())
