"""What a person detector finds of annotated persons, at what speed, and what that does to AP.

    python -m benchmarks.detector --data ../shared/data/coco17_mini --detector yolox_nano_416.onnx
        [--model DIR [--known SHARDS]]

FOLDER is like COCO's: `images/`, `annotations/person_keypoints_val.json`. Recall is the share of annotated persons who
aren't crowds with a detection of IoU 0.5 and more; "with keypoints" are those that AP counts. A model that was trained
on some of these pictures (benchmarks/detector.yaml) knows those of a shard dataset: AP is told of them alone then.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.annotation import PictureToAnnotate, annotate_pictures
from pipeline.detection import ONNXRUNTIME, OPENCV, Detector, box_ious, suppress_boxes
from pipeline.evaluation import evaluate_keypoints
from pipeline.images import decode_picture
from pipeline.rows import Boxes, keypoint_table
from pipeline.shards import open_shards, read_columns

SCORES, NMS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5), (0.45, 0.65)
IOU = 0.5
TIMED_PICTURES, ROUNDS = 20, 5


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--detector", required=True, type=Path)
    parser.add_argument("--model", type=Path, help="a model directory: AP with detected beside annotated boxes")
    parser.add_argument("--known", help="a shard dataset: AP of its pictures alone")
    parser.add_argument("--no-speed", action="store_true")
    options = parser.parse_args()
    truth = json.loads((options.data / "annotations" / "person_keypoints_val.json").read_text())
    pictures = {one["id"]: (options.data / "images" / one["file_name"]).read_bytes() for one in truth["images"]}
    if not options.no_speed:
        compare_speed(options.detector, list(pictures.values())[:TIMED_PICTURES])
    detector = open_detector(options.detector, ONNXRUNTIME if has_onnxruntime() else OPENCV, nms=1.0, threads=1)
    images = (decode_picture(data) for data in pictures.values())
    found = dict(zip(pictures, detector.detect(images), strict=True))
    report_recall(truth, found)
    if options.model:
        some = pictures if options.known is None else {image: pictures[image] for image in known(options.known)}
        report_ap(options.model, truth, some, found)
    return 0


def has_onnxruntime() -> bool:
    """Whether the optional package is here."""
    return importlib.util.find_spec("onnxruntime") is not None


def open_detector(file: Path, backend: str, *, nms: float, threads: int) -> Detector:
    """The detector with everything that it finds at all."""
    return Detector(file.read_bytes(), source=str(file), backend=backend, score=min(SCORES), nms_iou=nms,
                    threads=threads)


# --- speed --------------------------------------------------------------------------------------------------------


def compare_speed(file: Path, pictures: list[bytes]) -> None:
    """Milliseconds of the process's CPU for a picture, side by side: letterbox, network, suppression."""
    images = [decode_picture(data) for data in pictures]
    for threads in (1, 2):
        detectors = {backend: open_detector(file, backend, nms=0.65, threads=threads)
                     for backend in (ONNXRUNTIME, OPENCV) if backend != ONNXRUNTIME or has_onnxruntime()}
        spent: dict[str, list[tuple[float, float]]] = {backend: [] for backend in detectors}
        for _ in range(ROUNDS):
            for backend, detector in detectors.items():
                wall, cpu = time.perf_counter(), time.process_time()
                list(detector.detect(images))
                spent[backend].append((time.perf_counter() - wall, time.process_time() - cpu))
        for backend, times in spent.items():
            wall, cpu = np.median(np.array(times), axis=0) / len(images) * 1000
            print(f"{backend}, {threads} threads: {cpu:.1f} ms of CPU a picture, {wall:.1f} ms of wall time")


# --- recall -------------------------------------------------------------------------------------------------------


def report_recall(truth: dict[str, Any], found: Mapping[int, Boxes]) -> None:
    """A line for each score and overlap."""
    persons = [one for one in truth["annotations"] if not one["iscrowd"]]
    with_keypoints = [one for one in persons if one["num_keypoints"]]
    print(f"{len(found)} pictures, {len(persons)} persons, {len(with_keypoints)} of them with keypoints\n"
          f"{'nms':>5} {'score':>6} {'boxes':>6} {'recall':>7} {'with keypoints':>15}")
    for nms in NMS:
        for score in SCORES:
            kept = {image: strongest(boxes, score, nms) for image, boxes in found.items()}
            print(f"{nms:>5} {score:>6} {sum(len(boxes.ids) for boxes in kept.values()):>6} "
                  f"{recall(persons, kept):>7.3f} {recall(with_keypoints, kept):>15.3f}")


def strongest(boxes: Boxes, score: float, nms: float) -> Boxes:
    """What a detector with this threshold and this suppression would have given."""
    above = np.flatnonzero(boxes.scores >= score)
    kept = above[suppress_boxes(boxes.xywh[above], boxes.scores[above], nms)]
    return Boxes(boxes.ids[kept], boxes.xywh[kept], boxes.scores[kept])


def recall(persons: list[dict[str, Any]], found: Mapping[int, Boxes]) -> float:
    """The share of persons with a box of IoU 0.5 and more."""
    corners = {image: np.concatenate([boxes.xywh[:, :2], boxes.xywh[:, :2] + boxes.xywh[:, 2:]], -1)
               for image, boxes in found.items()}
    hits = []
    for person in persons:
        x, y, w, h = person["bbox"]
        hits.append(box_ious(np.array([x, y, x + w, y + h]), corners[person["image_id"]]).max(initial=0) >= IOU)
    return float(np.mean(hits))


# --- AP -----------------------------------------------------------------------------------------------------------


def known(shards: str) -> list[int]:
    """The image ids of a shard dataset."""
    dataset = open_shards(shards)
    return [image for _, table in read_columns(dataset, ["key", "image_id"]) for image in table["image_id"].to_pylist()]


def report_ap(model: Path, truth: dict[str, Any], pictures: Mapping[int, bytes], found: Mapping[int, Boxes]) -> None:
    """AP and AR of these pictures with annotated boxes, and with the detector's."""
    from pipeline.prediction import Predictor

    truth = {**truth, "images": [one for one in truth["images"] if one["id"] in pictures],
             "annotations": [one for one in truth["annotations"] if one["image_id"] in pictures]}
    predictor = Predictor(model)
    print(f"{'boxes':>28} {'persons':>8} {'AP':>6} {'AP50':>6} {'AR':>6}")
    choices: dict[str, tuple[Callable[[int], Boxes], float | None]] = {
        "annotated": (lambda image: annotated(truth, image), None)}
    for score, oks_nms in ((0.3, None), (0.1, None), (0.1, 0.9), (0.01, None)):
        name = f"detected, score {score}" + (f", OKS-NMS {oks_nms}" if oks_nms else "")
        choices[name] = (lambda image, score=score: strongest(found[image], score, 0.65)), oks_nms  # type: ignore[misc]
    for name, (boxes, oks_nms) in choices.items():
        annotated_pictures = annotate_pictures(_tasks(pictures, boxes), predictor, oks_nms=oks_nms)
        table = keypoint_table(annotated_pictures, predictor.skeleton, job="benchmark")
        numbers = evaluate_keypoints(table, truth, skeleton=predictor.skeleton).coco
        persons = sum(len(one.boxes.ids) for one in annotated_pictures)
        line = " ".join(f"{numbers[which]:>6.3f}" for which in ("AP", "AP50", "AR"))
        print(f"{name:>28} {persons:>8} {line}", flush=True)


def annotated(truth: dict[str, Any], image: int) -> Boxes:
    """The annotations' own boxes."""
    each = [one for one in truth["annotations"] if one["image_id"] == image and not one["iscrowd"]]
    return Boxes(np.array([one["id"] for one in each], np.int64),
                 np.array([one["bbox"] for one in each], np.float64).reshape(-1, 4), np.ones(len(each)))


def _tasks(pictures: Mapping[int, bytes], boxes: Callable[[int], Boxes]) -> Iterator[PictureToAnnotate]:
    for image, data in pictures.items():
        row = {"key": str(image), "image_id": image, "etag": None, "sha256": None, "width": None, "height": None}
        yield PictureToAnnotate(row, lambda data=data: data,  # type: ignore[misc]
                                lambda width, height, image=image: boxes(image))  # type: ignore[misc]


if __name__ == "__main__":
    sys.exit(main())
