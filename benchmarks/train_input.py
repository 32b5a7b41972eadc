"""How fast training is fed, and what training makes of it, side by side on the same pictures and cores in one run.

    python -m benchmarks.train_input --folder COCO [--config FILE.yaml] [--tables NAMES] [--seconds N] [--output FILE]

COCO is a folder with `images/` and `annotations/person_keypoints_train.json`. Three tables:

input     samples/s of Ray tasks as `train` has them, against the plain PyTorch DataLoader that people write after the
          authors' (a worker for each core; each sample reads and decodes its picture, cuts the person out, normalises,
          and renders five heatmaps for each joint by OpenCV's GaussianBlur); the loader's crops alone, and the plain
          function that makes ours, tell what each part of that costs. In turns, median of the turns.
training  samples/s of `train` with --ranks workers, from their wait for the first batch to their last step, so that all
          of their input is made in that time; against 1 / (input alone + forward, backward and step alone), the latter
          in as many plain processes at once, of as many threads, which don't speak with each other; and the same where
          they do, to average their gradients
order     how well persons are shuffled, over an epoch of COCO's size with 1,000 pictures in a shard: pairs in a batch
          that come from one picture, and from how many shards a batch comes; against a shuffle of everybody
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from jobs import shard, train
from jobs.start_ray import start_ray
from jobs.train_feed import recipe_of, sample_batches
from jobs.train_start import averaging, new_network
from jobs.train_task import TrainTask, Worker
from pipeline import samples, training
from pipeline.coco import Person, parse_annotations
from pipeline.config import ShardConfig, TrackingConfig, TrainConfig, load_config
from pipeline.mixture import TrainingSet
from pipeline.model.directory import ModelSpec
from pipeline.model.targets import KERNELS, PEAK, STRIDE
from pipeline.pose.augment import Augmentation, sample_generator, training_sample
from pipeline.pose.skeleton import COCO17
from pipeline.shards import open_shards

OFF = TrackingConfig(enabled=False)
BATCH_SIZE = 32
AVERAGED = "the same, gradients averaged"
ALONE_SHARE = 1 / 3  # of --seconds: what runs alone is steady sooner than a training
COCO_PICTURES, COCO_PERSONS = 56_599, 149_813  # of train2017 with keypoints
PICTURES_PER_SHARD = 1000
IMAGES_PER_SHARD = 50  # so that the small set has enough shards for several tasks
together: Any  # the barrier of the processes that measure steps


def main() -> int:
    """Print the tables; write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--config", help="train's settings, for the network and the crop's size")
    parser.add_argument("--seconds", type=float, default=20, help="of each training; what runs alone takes a third")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each; medians are told")
    parser.add_argument("--tables", default="input,training,order")
    parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="of the DataLoader; threads too")
    parser.add_argument("--ranks", type=int, default=1, help="workers of `train`, who share the threads")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.workers)
    with tempfile.TemporaryDirectory() as work, start_ray():
        task = open_task(options, Path(work))
        tables = {"input": lambda: measure_input(task, options), "order": measure_order,
                  "training": lambda: measure_training(task, options, Path(work))}
        found = {name: tables[name]() for name in options.tables.split(",")}
    for name, table in found.items():
        print(f"\n{name}")
        for line, values in table.items():
            print(f"  {line:58} " + "  ".join(f"{what} {value:.2f}" for what, value in values.items()))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))
    return 0


def open_task(options: argparse.Namespace, work: Path) -> TrainTask:
    """What a worker of `train` would be given for the folder's pictures, sharded."""
    shards = work / "shards"
    shard.run(ShardConfig(images=str(options.folder / "images"), output=str(shards), annotated_only=True,
                          annotations=str(options.folder / "annotations" / "person_keypoints_train.json"),
                          images_per_shard=IMAGES_PER_SHARD, tracking=OFF))
    config = load_config(TrainConfig, files=list(filter(None, [options.config])), flags={
        "data": str(shards), "output": str(work / "model"), "val": None, "workers": options.ranks,
        "threads": max(1, options.workers // options.ranks),
        "tracking": OFF.model_dump()})
    data = open_shards(str(shards))
    one = TrainingSet(data, 1.0, tuple(samples.trainable_counts(data)), tuple(range(COCO17.num_joints)))
    return TrainTask(config, (one,), None, {"precision": config.precision}, {}, None)


# --- input --------------------------------------------------------------------------------------------------------


def measure_input(task: TrainTask, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """samples/s of each way, in turns."""
    persons = annotated_persons(options.folder)
    spec = new_network(task)[1]
    ways: dict[str, Callable[[], Iterator[int]]] = {
        "authors' loader: five heatmap sets on the CPU": lambda: loader(persons, spec, options.workers, heatmaps=True),
        "their loader without heatmaps": lambda: loader(persons, spec, options.workers, heatmaps=False),
        "train's input: Ray tasks": lambda: ray_input(task, spec)}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.turns):
        for name, way in ways.items():
            speeds[name].append(speed(way(), options.seconds * ALONE_SHARE))
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    theirs = next(iter(medians.values()))
    return {name: {"samples/s": median, "times": median / theirs} for name, median in medians.items()}


def speed(batches: Iterator[int], seconds: float, *, count: int | None = None) -> float:
    """samples/s of a stream of batches' sizes, once it runs; for so many seconds, or of `count` batches."""
    for _ in range(2 * torch.get_num_threads()):
        next(batches)
    began, taken = time.perf_counter(), 0
    for number in itertools.count():
        if number == count or (count is None and time.perf_counter() - began > seconds):
            break
        taken += next(batches)
    return taken / (time.perf_counter() - began)


def ray_input(task: TrainTask, spec: ModelSpec) -> Iterator[int]:
    """What a worker of `train` takes from its tasks."""
    return (len(batch["slot"]) for batch in sample_batches(fed_worker(task, spec)))


def fed_worker(task: TrainTask, spec: ModelSpec) -> Worker:
    """A rank that is only fed."""
    nothing: Any = None
    return Worker(task, 0, 1, torch.device("cpu"), spec, nothing, nothing, nothing, 0, (0,))


def loader(persons: Sequence[tuple[Path, Person]], spec: ModelSpec, workers: int, *, heatmaps: bool) -> Iterator[int]:
    """Batches of a DataLoader without end."""
    dataset = PlainSamples(persons, spec, heatmaps=heatmaps)
    while True:
        for batch in DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=workers):
            yield len(batch[0])


def annotated_persons(folder: Path) -> list[tuple[Path, Person]]:
    """(picture, person) of everybody who is trained on."""
    path = folder / "annotations" / "person_keypoints_train.json"
    images = parse_annotations(path.read_bytes(), source=str(path)).images
    return [(folder / "images" / name, person) for name, image in images.items() for person in image.persons
            if not person.iscrowd and any(visible > 0 for visible in (person.keypoints or ())[2::3])]


class PlainSamples(Dataset[tuple[torch.Tensor, ...]]):
    """What the authors' JointsDataset does for a sample, written from its description (docs/mspn.md)."""

    def __init__(self, persons: Sequence[tuple[Path, Person]], spec: ModelSpec, *, heatmaps: bool) -> None:
        self.persons, self.spec, self.heatmaps = persons, spec, heatmaps

    def __len__(self) -> int:
        return len(self.persons)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        path, person = self.persons[index]
        picture = np.asarray(cv2.imread(str(path)), np.uint8)
        sample = training_sample(
            picture, person.box_xywh, np.array(person.keypoints, np.float64).reshape(-1, 3),
            skeleton=COCO17, input_size_wh=self.spec.input_size_wh, padding_wh=self.spec.box_padding_wh,
            augmentation=Augmentation(), generator=sample_generator(0, int(time.perf_counter_ns()), index))
        image = torch.from_numpy(sample.crop.transpose(2, 0, 1)).float().div(255)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.spec.mean, self.spec.std))
        image = image.sub_(mean).div_(std)
        if not self.heatmaps:
            return image, torch.from_numpy(sample.visible)
        sets = [rendered(sample.joints_xy, sample.visible, self.spec.input_size_wh, kernel) for kernel in KERNELS]
        return image, torch.from_numpy(sample.visible), torch.from_numpy(np.stack(sets))


def rendered(joints_xy: npt.NDArray[np.float32], visible: npt.NDArray[np.int8], size_wh: tuple[int, int],
             kernel: int) -> npt.NDArray[np.float32]:
    """The heatmaps [K, h, w] of one kernel, joint by joint as the authors render them: a one, blurred, its peak 255."""
    maps = np.zeros((len(joints_xy), size_wh[1] // STRIDE, size_wh[0] // STRIDE), np.float32)
    for heatmap, (x, y), seen in zip(maps, joints_xy, visible, strict=True):
        if seen < 1:
            continue
        heatmap[int(y / STRIDE), int(x / STRIDE)] = 1
        heatmap[:] = cv2.GaussianBlur(heatmap, (kernel, kernel), 0)
        heatmap *= PEAK / heatmap.max()
    return maps


# --- training -----------------------------------------------------------------------------------------------------


def measure_training(task: TrainTask, options: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """samples/s of the input alone, of the network alone, of both as `train` runs them, and the share of the limit."""
    spec = new_network(task)[1]
    seconds = options.seconds * ALONE_SHARE
    alone = {"input alone": lambda: speed(ray_input(task, spec), seconds),
             "forward, backward and step alone": lambda: processes_speed(task, options.ranks, seconds)}
    samples_each = task.config.optimiser.batch_size_per_worker * options.ranks
    runs: dict[str, list[float]] = {name: [] for name in (*alone, *[AVERAGED] * (options.ranks > 1), "train")}
    for turn in range(options.turns):
        for name, measure in alone.items():
            runs[name].append(measure())
        per_second = runs["forward, backward and step alone"][-1] / samples_each
        if options.ranks > 1:
            meeting = Meeting(work / f"meeting-{turn}", max(20, int(seconds * per_second)))
            runs[AVERAGED].append(processes_speed(task, options.ranks, seconds, meeting))
        iterations = max(60, int(options.seconds * per_second))
        runs["train"].append(train_speed(task, iterations, work / f"model-{turn}"))
    medians = {name: statistics.median(each) for name, each in runs.items()}
    table = {name: {"samples/s": median} for name, median in medians.items()}
    of_input, *of_network, _ = (1 / median for median in medians.values())
    shares = ("share of 1 / (input + network)", "with averaged gradients")
    return table | {name: {"share": medians["train"] * (of_input + each)}
                    for name, each in zip(shares, of_network, strict=False)}


@dataclass(frozen=True)
class Meeting:
    """Where processes meet that average their gradients (a file that isn't there yet), and how many steps they do."""

    place: Path
    steps: int


def processes_speed(task: TrainTask, ranks: int, seconds: float, meeting: Meeting | None = None) -> float:
    """samples/s of as many processes together as there are ranks; they begin to count at the same time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(ranks, context, initializer=_share, initargs=(context.Barrier(ranks),)) as pool:
        return sum(pool.map(step_speed, [task] * ranks, [seconds] * ranks, [meeting] * ranks))


def _share(barrier: Any) -> None:
    global together
    together = barrier


def step_speed(task: TrainTask, seconds: float, meeting: Meeting | None) -> float:
    """samples/s of steps on one batch that is in memory, in a process of `processes_speed`."""
    torch.set_num_threads(task.config.threads or 1)
    network, spec = new_network(task)
    network = network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = training.make_optimiser(network, weight_decay=task.config.optimiser.weight_decay)
    one = task.sets[0]
    recipe = recipe_of(task, spec)
    blocks = samples.turn_samples(one.dataset, samples.Turn(0, 0, 0, 0), recipe)
    arrays = {name: values[:task.config.optimiser.batch_size_per_worker] for name, values in next(blocks).items()}
    batch = training.as_batch(arrays, torch.device("cpu"))

    rank = together.wait()
    if meeting is not None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting.place}", rank=rank,
                                             world_size=together.parties)
    wrapped = network if meeting is None else averaging(network)

    def steps() -> Iterator[int]:
        for iteration in itertools.count(1):
            training.train_step(wrapped, optimiser, batch, iteration=iteration, rate=1e-4, spec=spec,
                                bfloat16=task.config.precision == "bfloat16")
            yield len(batch.crops)

    together.wait()
    return speed(steps(), seconds, count=None if meeting is None else meeting.steps)


def train_speed(task: TrainTask, iterations: int, output: Path) -> float:
    """samples/s of `train` over all of its iterations, as its own metrics have them."""
    tracking = TrackingConfig(uri=f"sqlite:///{output.parent}/mlflow.db")
    optimiser = task.config.optimiser.model_copy(update={"iterations": iterations, "warmup_iterations": 1})
    result = train.run(task.config.model_copy(update={
        "output": str(output), "tracking": tracking, "optimiser": optimiser, "validate_every": iterations}))
    from mlflow import MlflowClient

    history = MlflowClient(str(tracking.uri)).get_metric_history(result["run_id"], "samples_per_second")
    ends = [0, *(each.step for each in history)]
    spent = [(end - start) / each.value for start, end, each in zip(ends, ends[1:], history, strict=False)]
    return iterations / sum(spent)


# --- order --------------------------------------------------------------------------------------------------------


def measure_order() -> dict[str, dict[str, float]]:
    """Pairs of one picture, and shards, in a batch: as `train` orders, as windows merely shuffled, as all shuffled."""
    generator = np.random.default_rng(0)
    persons = 1 + generator.poisson(COCO_PERSONS / COCO_PICTURES - 1, COCO_PICTURES)
    parts = [persons[start:start + PICTURES_PER_SHARD].tolist()
             for start in range(0, COCO_PICTURES, PICTURES_PER_SHARD)]
    ours = [(part, picture) for part in samples.shard_order(len(parts), seed=0, epoch=0)
            for window in samples.person_order(parts[part], seed=0, epoch=0, part=part) for picture, _ in window]
    window = samples.WINDOW_PICTURES * COCO_PERSONS // COCO_PICTURES
    shuffled = [ours[start + index] for start in range(0, len(ours), window)
                for index in generator.permutation(len(ours[start:start + window]))]
    everybody = [ours[index] for index in generator.permutation(len(ours))]
    return {"train's order": batch_counts(ours), f"windows of {samples.WINDOW_PICTURES} pictures, merely shuffled":
            batch_counts(shuffled), "everybody shuffled": batch_counts(everybody)}


def batch_counts(order: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Means over the batches of an epoch."""
    batches = [order[start:start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
    pairs = [sum(count * (count - 1) // 2 for count in Counter(batch).values()) for batch in batches]
    return {"pairs of one picture": statistics.mean(pairs),
            "shards in a batch": statistics.mean(len({part for part, _ in batch}) for batch in batches)}


if __name__ == "__main__":
    sys.exit(main())
