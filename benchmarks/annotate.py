"""How fast `annotate` is, beside the loop that people write today, the bare forward, and bare decoding and cropping.

    python -m benchmarks.annotate --data ../shared/data/coco17_mini [--model DIR] [--output DIR] [--only PART ...]

FOLDER is like COCO's: `images/` and `annotations/person_keypoints_val.json`. Side by side in one run, all on all cores:

    network  the job with a 1-stage ResNet-50 MSPN at 256x192 (random weights, unless --model), flip test, annotated
             boxes, in float32 and, where the processor has it, in bfloat16, against (a) the plain loop: decode, crop,
             eager float32 and flip for each picture's persons, the authors' decoding in NumPy, person by person;
             (b) as many processes as the job has actors, with the same backend and precision, on resident crops
    null     the job without a network on the same pictures many times, against (c) as many plain processes that decode
             and crop them
    persons  the job with 1 to 30 boxes in each picture, in units of as many persons
    memory   the resident memory of the job's processes over 20,000 pictures without a network

The job's time is told twice: whole, and without the start of its pool (up to the first unit's begin).
"""

import argparse
import itertools
import json
import logging
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs import annotate, shard
from jobs.annotate_pool import annotate_units
from jobs.start_ray import start_ray
from pipeline.annotation import annotated_boxes
from pipeline.config import AnnotateConfig, ShardConfig, TrackingConfig
from pipeline.cores import usable_cores
from pipeline.model.directory import ModelSpec, load_model, normalise_crops, save_model
from pipeline.model.inference import DTYPES, cpu_backend, native_precision
from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.pose.skeleton import COCO17
from pipeline.prediction import Predictor
from pipeline.shards import iterate_part, open_shards
from pipeline.unit_annotator import Receipt

NO_TRACKING = TrackingConfig(enabled=False)
REPETITIONS = 3
PLAIN_PERSONS = 48  # of the plain loop, which takes a quarter of a second for each
BARE_SECONDS = 20.0
CROPS_RESIDENT = 64
NETWORK_PICTURES, NETWORK_PICTURES_PER_SHARD = 310, 16  # many units for each actor, as a job of millions has
NULL_PICTURES = 12_000
MEMORY_PICTURES = 20_000
PERSONS = (1, 3, 10, 30)
PERSONS_EACH, PERSONS_PER_UNIT = 480, 60  # for each number of persons a picture
PARTS = ("network", "null", "persons", "memory")


@dataclass(frozen=True)
class Run:
    """One run of the job. seconds: whole, and from the first unit's begin to the last one's end."""

    pictures: int
    persons: int
    seconds: float
    working_s: float


def main() -> int:
    """Measure, print tables, and write what was measured to OUTPUT/annotate.json."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    output = options.output or Path(tempfile.mkdtemp(prefix="annotate-"))
    output.mkdir(parents=True, exist_ok=True)
    model = options.model or made_model(output / "model")
    pictures, boxes = read_pictures(options.data, output)
    measured: dict[str, Any] = {"cores": usable_cores(), "backend": cpu_backend()}
    with start_ray():
        for part in options.only:
            measured[part] = globals()[f"measure_{part}"](output, model, pictures, boxes)
            print(json.dumps({part: measured[part]}, indent=1))
    (output / "annotate.json").write_text(json.dumps(measured, indent=1))
    return 0


def made_model(directory: Path) -> Path:
    """One stage, ResNet-50, random weights."""
    torch.manual_seed(0)
    config = MSPNConfig(num_joints=17, num_stages=1)
    save_model(directory, MSPN(config), ModelSpec(network=config, skeleton=COCO17.to_json()))
    return directory


Boxes = list[np.ndarray[Any, Any]]


def read_pictures(data: Path, output: Path) -> tuple[list[bytes], Boxes]:
    """The bytes of all val pictures, and their annotated boxes, float64 [n, 4] each."""
    made = str(output / "val-shards")
    shard.run(ShardConfig(images=str(data / "images"), annotations=str(data / "annotations/person_keypoints_val.json"),
                          output=made, images_per_shard=20, annotated_only=True, tracking=NO_TRACKING))
    dataset = open_shards(made)
    rows = [row for part in dataset.parts for row in iterate_part(dataset, part)]
    return [row["bytes"] for row in rows], [annotated_boxes(row["persons"]).xywh for row in rows]


# --- network ------------------------------------------------------------------------------------------------------


def measure_network(output: Path, model: Path, pictures: Sequence[bytes], boxes: Boxes) -> dict[str, Any]:
    """Persons/s of the job, the plain loop and the bare forward, medians; one after the other, several times."""
    actors, source = usable_cores(), repeated_pictures(output, NETWORK_PICTURES, NETWORK_PICTURES_PER_SHARD)
    found: dict[str, list[float]] = {}
    for number in range(REPETITIONS):
        found.setdefault("plain", []).append(plain_loop(model, pictures, boxes))
        for precision in dict.fromkeys(("float32", native_precision(cpu_backend()))):
            bare = in_processes(actors, bare_forward, model, precision, pictures[:12], boxes[:12])
            run = run_job(output / f"{precision}-{number}", model, source, boxes=None, precision=precision)
            for name, speed in (("bare", bare), ("job", run.persons / run.seconds),
                                ("job, pool start not counted", run.persons / run.working_s)):
                found.setdefault(f"{name}, {precision}", []).append(speed)
        print({name: round(values[-1], 2) for name, values in found.items()}, file=sys.stderr)
    return {"persons/s": {name: round(statistics.median(values), 2) for name, values in found.items()},
            "of plain": ratios(found, "plain"),
            "of bare": {name: ratio for precision in DTYPES if f"bare, {precision}" in found
                        for name, ratio in ratios(found, f"bare, {precision}").items() if precision in name}}


def ratios(found: dict[str, list[float]], of: str) -> dict[str, float]:
    """The medians of ratios that were measured side by side."""
    return {name: round(statistics.median(a / b for a, b in zip(values, found[of], strict=True)), 3)
            for name, values in found.items()}


def run_job(output: Path, model: Path, source: str, *, boxes: str | None, **settings: Any) -> Run:
    """annotate within a Ray that is running."""
    receipts: list[Receipt] = []

    def noting(*arguments: Any, **options: Any) -> Iterator[Receipt]:
        for receipt in annotate_units(*arguments, **options):
            receipts.append(receipt)
            yield receipt

    setattr(annotate, "annotate_units", noting)  # noqa: B010
    began = time.monotonic()
    result = annotate.run(AnnotateConfig(input=source, model=str(model), output=str(output), boxes=boxes,
                                         tracking=NO_TRACKING, **settings))
    seconds = time.monotonic() - began
    began = min(receipt.began - receipt.decoding_s for receipt in receipts)
    working = max(receipt.ended for receipt in receipts) - began
    return Run(result["counts"]["pictures"], result["counts"]["persons"], seconds, working)


def plain_loop(model: Path, pictures: Sequence[bytes], boxes: Boxes) -> float:
    """Persons/s of what people write: one picture after the other, its persons one batch, all cores for torch."""
    torch.set_num_threads(usable_cores())
    network, spec = load_model(model)
    predictor = Predictor((network, spec), backend="plain")
    began, persons = time.monotonic(), 0
    for data, some in zip(pictures, boxes, strict=True):
        if not len(some):
            continue
        crops = normalise_crops(torch.from_numpy(crops_of(predictor, data, some)), spec)
        with torch.no_grad():
            maps = network.predict(crops).numpy()
            flipped = network.predict(crops.flip(-1)).numpy()[..., ::-1][:, predictor.skeleton.flip_order]
        for heatmaps in (maps + flipped) / 2:
            decode_in_numpy(heatmaps)
        persons += len(some)
        if persons >= PLAIN_PERSONS:
            break
    return persons / (time.monotonic() - began)


def decode_in_numpy(heatmaps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[K, h, w] -> [K, 3] x, y, score: blur, highest cell, a quarter towards the second, as the authors' test.py."""
    num_joints, height, width = heatmaps.shape
    joints = np.zeros((num_joints, 3))
    for joint in range(num_joints):
        bordered = np.zeros((height + 20, width + 20))
        bordered[10:-10, 10:-10] = heatmaps[joint] / 255 + 0.5
        blurred = cv2.GaussianBlur(bordered, (5, 5), 0)
        y, x = np.unravel_index(blurred.argmax(), blurred.shape)
        blurred[y, x] = 0
        second_y, second_x = np.unravel_index(blurred.argmax(), blurred.shape)
        dx, dy = float(second_x - x), float(second_y - y)
        length = (dx * dx + dy * dy) ** 0.5
        at_x, at_y = x - 10 + 0.25 * dx / max(length, 1e-3), y - 10 + 0.25 * dy / max(length, 1e-3)
        at_x, at_y = min(max(at_x, 0), width - 1), min(max(at_y, 0), height - 1)
        joints[joint] = at_x * 4 + 2, at_y * 4 + 2, bordered[round(at_y) + 10, round(at_x) + 10]
    return joints


def bare_forward(model: Path, precision: str, pictures: Sequence[bytes], boxes: Boxes, ready: Any) -> float:
    """Crops/s of forward passes alone, with flip, on crops that are there already; one thread."""
    predictor = Predictor(model, backend=cpu_backend(), precision=precision, threads=1)
    crops = np.concatenate([crops_of(predictor, data, some) for data, some in zip(pictures, boxes, strict=True)])
    batch = np.concatenate([crops] * -(-CROPS_RESIDENT // len(crops)))[:predictor.batch_size]
    images = normalise_crops(torch.from_numpy(batch), predictor.spec)
    with torch.inference_mode():
        predictor._heatmaps(images)
        ready.wait()
        began, done = time.monotonic(), 0
        while time.monotonic() - began < BARE_SECONDS:
            predictor._heatmaps(images)
            predictor._heatmaps(images.flip(-1))
            done += len(images)
        return done / (time.monotonic() - began)


def crops_of(predictor: Predictor, data: bytes, boxes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The crops of a picture's persons."""
    return predictor.crop_persons(decoded(data), boxes).crops


def decoded(data: bytes) -> np.ndarray[Any, Any]:
    """The pixels, as people read them."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image


def in_processes(number: int, work: Callable[..., float], *arguments: Any) -> float:
    """The sum of what the work gives in so many processes, which begin together."""
    context = multiprocessing.get_context("spawn")
    with multiprocessing.Manager() as manager, ProcessPoolExecutor(number, mp_context=context) as pool:
        ready = manager.Barrier(number)
        return sum(pool.map(work, *map(itertools.repeat, arguments), [ready] * number))


# --- without a network --------------------------------------------------------------------------------------------


def measure_null(output: Path, model: Path, pictures: Sequence[bytes], boxes: Boxes) -> dict[str, Any]:
    """Pictures/s of the job without a network, and of processes that decode and crop, medians."""
    source, actors = repeated_pictures(output, NULL_PICTURES), usable_cores()
    found: dict[str, list[float]] = {"bare": [], "job": [], "job, pool start not counted": []}
    for number in range(REPETITIONS):
        found["bare"].append(in_processes(actors, decode_and_crop, model, pictures, boxes))
        run = run_job(output / f"null-{number}", model, source, boxes=None, backend="null")
        found["job"].append(run.pictures / run.seconds)
        found["job, pool start not counted"].append(run.pictures / run.working_s)
        print({name: round(values[-1], 1) for name, values in found.items()}, file=sys.stderr)
    return {"pictures/s": {name: statistics.median(values) for name, values in found.items()},
            "persons a picture": sum(map(len, boxes)) / len(boxes), "of bare": ratios(found, "bare")}


def decode_and_crop(model: Path, pictures: Sequence[bytes], boxes: Boxes, ready: Any) -> float:
    """Pictures/s of decoding and cropping alone, from memory; one thread."""
    cv2.setNumThreads(1)
    predictor = Predictor(model, backend="null", threads=1)
    ready.wait()
    began, done = time.monotonic(), 0
    while time.monotonic() - began < BARE_SECONDS / 2:
        for data, some in zip(pictures, boxes, strict=True):
            crops_of(predictor, data, some)
        done += len(pictures)
    return done / (time.monotonic() - began)


def repeated_pictures(output: Path, number: int, images_per_shard: int = 500) -> str:
    """A shard dataset of the val pictures and their annotations, each many times under other names."""
    place = output / f"repeated-{number}"
    if (place / "shards" / "dataset-000001.json").exists():
        return str(place / "shards")
    dataset = open_shards(str(output / "val-shards"))
    rows = [row for part in dataset.parts for row in iterate_part(dataset, part)]
    repeated = [(row, f"{copy:04d}-{row['key']}", copy * 1_000_000 + i)
                for copy in range(-(-number // len(rows))) for i, row in enumerate(rows)][:number]
    write_annotated(place, [(name, number, row["bytes"], row["width"], row["height"],
                             annotated_boxes(row["persons"]).xywh) for row, name, number in repeated],
                    images_per_shard)
    return str(place / "shards")


def write_annotated(place: Path, pictures: Sequence[tuple[str, int, bytes, int, int, np.ndarray[Any, Any]]],
                    images_per_shard: int) -> None:
    """Pictures (name, id, bytes, width, height, boxes) as a folder with annotations, sharded at `place`/shards."""
    (place / "images").mkdir(parents=True)
    ids = itertools.count(1)
    for name, _, data, *_ in pictures:
        (place / "images" / name).write_bytes(data)
    (place / "annotations.json").write_text(json.dumps({
        "images": [{"id": number, "file_name": name, "width": width, "height": height}
                   for name, number, _, width, height, _ in pictures],
        "annotations": [{"id": next(ids), "image_id": number, "category_id": 1, "bbox": box.tolist(), "iscrowd": 0,
                         "area": float(box[2] * box[3]), "num_keypoints": 0, "keypoints": [0] * 51}
                        for _, number, _, _, _, boxes in pictures for box in boxes],
        "categories": [{"id": 1, "name": "person", "keypoints": list(COCO17.joints), "skeleton": []}]}))
    shard.run(ShardConfig(images=str(place / "images"), annotations=str(place / "annotations.json"),
                          output=str(place / "shards"), images_per_shard=images_per_shard, tracking=NO_TRACKING))


# --- persons in each picture, and memory --------------------------------------------------------------------------


def measure_persons(output: Path, model: Path, pictures: Sequence[bytes], boxes: Boxes) -> dict[str, Any]:
    """Persons/s, pool start not counted, by the number of persons in each picture; medians."""
    found: dict[int, list[float]] = {persons: [] for persons in PERSONS}
    for number, persons in itertools.product(range(REPETITIONS), PERSONS):
        place = output / f"persons-{persons}"
        if not place.exists():
            write_with_boxes(place, pictures, persons)
        run = run_job(place / f"out-{number}", model, str(place / "images"), boxes=str(place / "boxes.parquet"),
                      pictures_per_unit=PERSONS_PER_UNIT // persons)
        found[persons].append(run.persons / run.working_s)
        print(persons, round(found[persons][-1], 2), file=sys.stderr)
    medians = {persons: round(statistics.median(values), 2) for persons, values in found.items()}
    return {"persons/s": medians, "slowest of fastest": round(min(medians.values()) / max(medians.values()), 3)}


def write_with_boxes(place: Path, pictures: Sequence[bytes], persons: int) -> None:
    """Pictures as a folder, each with so many boxes, drawn at random, in `boxes.parquet`."""
    (place / "images").mkdir(parents=True)
    rows = []
    for number, data in enumerate(itertools.islice(itertools.cycle(pictures), PERSONS_EACH // persons)):
        name = f"{number:06d}.jpg"
        (place / "images" / name).write_bytes(data)
        height, width = decoded(data).shape[:2]
        for x, y, w, h in np.random.default_rng(number).uniform(size=(persons, 4)).tolist():
            rows.append({"key": name, "x": x * width * 0.6, "y": y * height * 0.5, "w": width * (0.1 + 0.3 * w),
                         "h": height * (0.2 + 0.3 * h)})
    pq.write_table(pa.Table.from_pylist(rows), place / "boxes.parquet")


def measure_memory(output: Path, model: Path, pictures: Sequence[bytes], boxes: Boxes) -> dict[str, Any]:
    """MB of all processes of the job, in the four quarters of the time in which its units were done."""
    source, samples, ended = repeated_pictures(output, MEMORY_PICTURES), [], threading.Event()

    def sample() -> None:
        while not ended.wait(1.0):
            samples.append((time.monotonic(), resident_mb()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        run = run_job(output / "memory", model, source, boxes=None, backend="null")
        began = time.monotonic() - run.working_s
    finally:
        ended.set()
        thread.join()
    quarters = [statistics.mean(part) for part in np.array_split([mb for when, mb in samples if when > began], 4)]
    return {"MB by quarters": [round(mb) for mb in quarters], "grown": round(quarters[-1] / quarters[0] - 1, 4)}


def resident_mb() -> float:
    """Of this process and all below it, each page that processes share counted once for each."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 1e6


if __name__ == "__main__":
    sys.exit(main())
