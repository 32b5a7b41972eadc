"""What each way to compute heatmaps costs and changes: speed, keypoints moved, and AP, against the network as it is.

    python -m benchmarks.backends --data SHARDS --model DIR [--boxes N] [--output FILE] [--threads N]

SHARDS is a shard dataset with annotations, all of whose persons are annotated by each backend and precision that this
machine offers. Moved: the share of joints more than 0.5 px of the picture away from those of the plain float32 path.
With few persons AP jumps when one of them crosses a threshold: --boxes N annotates each N times, in boxes that are
shifted and scaled by some percent; AP is the mean then, and its change comes with the standard error of N.
"""

import argparse
import json
import statistics
import sys
import time
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from pipeline.evaluation import evaluation_metrics
from pipeline.model.directory import load_model
from pipeline.model.inference import CPU, CUDA, OPENVINO, PLAIN, has_openvino
from pipeline.prediction import Predictor
from pipeline.shards import open_shards
from pipeline.validation import PartShare, ValidatedPicture, evaluate_pictures, validate_part

Runs = list[list[ValidatedPicture]]
MOVED_PX = 0.5
BATCH_SIZE = 32
REPETITIONS = 5


def main() -> int:
    """Print the table; write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--boxes", type=int, default=1, metavar="N")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    predictors = {name: open_predictor(options.model, *name, options.threads) for name in ways()}
    found = {name: [annotate(predictor, options.data, seed) for seed in range(options.boxes)]
             for name, predictor in predictors.items()}
    seconds = time_side_by_side(predictors)
    plain = (PLAIN, "float32")
    rows = [describe(name, runs, found[plain], seconds[name], seconds[plain], predictors[name])
            for name, runs in found.items()]
    print(f"{'backend':10} {'precision':9} {'ms/crop':>8} {'times':>6} {'moved':>8} {'AP':>8} {'change':>8} {'+-':>7}")
    for row in rows:
        print(f"{row['backend']:10} {row['precision']:9} {row['ms/crop']:8.1f} {row['times']:6.2f} {row['moved']:8.4%} "
              f"{row['ap']:8.4f} {row['change']:+8.4f} {row['error']:7.4f}")
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


def annotate(predictor: Predictor, data: str, seed: int) -> list[ValidatedPicture]:
    """All annotated persons of the dataset; of a seed above 0 in other boxes, the same for each predictor."""
    dataset, crop = open_shards(data), predictor.crop_persons
    with mock.patch.object(predictor, "crop_persons", lambda image, boxes: crop(image, jittered(boxes, seed))):
        return [picture for part in dataset.parts for picture in validate_part(dataset, PartShare(part), predictor)]


def jittered(boxes_xywh: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """The boxes [n, 4], each moved by some 3 % of its sides, which become some 4 % longer or shorter."""
    if not seed:
        return boxes_xywh
    drawn = np.random.default_rng([seed, zlib.crc32(boxes_xywh.tobytes())]).normal(size=(2, len(boxes_xywh), 2))
    sides = boxes_xywh[:, 2:] * np.exp(0.04 * drawn[0])
    centers = boxes_xywh[:, :2] + boxes_xywh[:, 2:] * (0.5 + 0.03 * drawn[1])
    return np.concatenate([centers - sides / 2, sides], axis=1)


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


def describe(name: tuple[str, str], runs: Runs, plain: Runs, seconds: float, plain_s: float,
             predictor: Predictor) -> dict[str, Any]:
    """One row of the table."""
    distances = np.linalg.norm(joints_of(runs) - joints_of(plain), axis=-1)
    aps = [evaluation_metrics(evaluate_pictures(run, predictor.skeleton))["ap"] for run in runs]
    changes = [ap - evaluation_metrics(evaluate_pictures(run, predictor.skeleton))["ap"]
               for ap, run in zip(aps, plain, strict=True)]
    error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else float("nan")
    return {"backend": name[0], "precision": name[1], "ms/crop": seconds * 1000 / BATCH_SIZE,
            "times": plain_s / seconds, "moved": float((distances > MOVED_PX).mean()), "ap": statistics.mean(aps),
            "change": statistics.mean(changes), "error": error, "joints": distances.size}


def joints_of(runs: Runs) -> np.ndarray[Any, Any]:
    """[N, K, 2] of all persons, as often as they were annotated."""
    return np.concatenate([picture.predicted.joints_xy for run in runs for picture in run
                           if picture.predicted.joints_xy is not None])


if __name__ == "__main__":
    sys.exit(main())
