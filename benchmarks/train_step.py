"""What each option of a training step costs and saves: samples/s and memory, against plain float32, contiguous.

    python -m benchmarks.train_step [--network small|resnet50] [--stages N] [--batch N] [--only NAMES] [--output FILE]

Random samples at 256x192, on a GPU if there is one. Each way has processes of its own, so that its memory is its own;
they take turns, so that a busy machine is busy for all of them, and medians are told. Times: samples/s over plain's in
the same round; processor: the seconds of all its threads for a sample, against plain's, which hardly depends on what
else the machine does. Memory is that of one worker:
on a CPU the growth of its resident size from before the network was made to its peak in the steps that are timed, what
the compiler leaves in the process included; on a GPU torch.cuda.max_memory_allocated. With two workers each has half
of the threads and a whole batch; they aren't measured where they would share a GPU.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from jobs.start_ray import THREAD_WAITS
from pipeline import training
from pipeline.averaging import WeightAverage
from pipeline.cores import usable_cores
from pipeline.model.compiling import compile_forward, why_not_compile
from pipeline.model.directory import ModelSpec
from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.model.recompute import recompute_activations
from pipeline.model.sync_batch_norm import synchronise_batch_norms
from pipeline.pose.skeleton import COCO17

# small: that of real_pictures.yaml
NETWORKS: dict[str, dict[str, Any]] = {
    "small": {"blocks": (1, 1, 1, 1), "widths": (16, 32, 64, 128), "stem_channels": 16, "upsample_channels": 32},
    "resnet50": {}}
Answers = list[tuple[float, float]]  # of each process of a way; of steps: seconds, and the processor's seconds
WARM_UP = 2  # steps; what compiles does it there


@dataclass(frozen=True)
class Way:
    """How a step is done. All but the first are channels last, as `train` always is."""

    name: str
    channels_last: bool = True
    bfloat16: bool = False
    accumulate: int = 1
    clip_norm: float | None = None
    average: bool = False
    recompute: bool = False
    compiled: bool = False
    workers: int = 1
    synchronised: bool = False


WAYS = (Way("plain", channels_last=False), Way("channels_last"), Way("bfloat16", bfloat16=True),
        Way("accumulate=2", accumulate=2), Way("accumulate=4", accumulate=4), Way("clip_norm", clip_norm=1.0),
        Way("ema_decay", average=True), Way("checkpoint_activations", recompute=True),
        Way("checkpoint + bfloat16", recompute=True, bfloat16=True), Way("compile", compiled=True),
        Way("compile + bfloat16", compiled=True, bfloat16=True), Way("2 workers", workers=2),
        Way("2 workers + sync_batch_norm", workers=2, synchronised=True))


@dataclass(frozen=True)
class Size:
    """What all ways have in common."""

    network: MSPNConfig
    batch: int
    steps: int  # timed at once
    threads: int  # of all workers of a way


def main() -> int:
    """Print the table; write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="small")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="samples of each worker; a multiple of 4")
    parser.add_argument("--steps", type=int, default=2, help="timed at once")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", help="names of ways, with commas; plain is always measured")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ.update(THREAD_WAITS)  # as `train`'s workers have it; before these import torch
    network = MSPNConfig(num_joints=COCO17.num_joints, num_stages=options.stages, **NETWORKS[options.network])
    size = Size(network, options.batch, options.steps, options.threads)
    rows = measure(offered(options.only), size, options.repetitions)
    print(f"{'way':28} {'samples/s':>9} {'times':>6} {'processor':>9} {'MB':>7} {'of plain':>8}")
    for row in rows:
        print(f"{row['way']:28} {row['samples/s']:9.2f} {row['times']:6.2f} {row['processor']:9.2f} "
              f"{row['bytes'] / 1e6:7.0f} {row['of_plain']:8.2f}")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))
    return 0


def offered(only: str | None) -> list[Way]:
    """The ways to compare, plain first: those that this machine offers, or the named ones of them."""
    names = {way.name for way in WAYS} if only is None else {WAYS[0].name, *map(str.strip, only.split(","))}
    if unknown := names - {way.name for way in WAYS}:
        sys.exit(f"--only: no way is called {', '.join(unknown)}; there are: {'; '.join(way.name for way in WAYS)}.")
    gpus, why_not = torch.cuda.device_count(), why_not_compile()
    if why_not:
        print(f"compile isn't measured: {why_not}.", file=sys.stderr)
    return [way for way in WAYS if way.name in names and not (way.compiled and why_not)
            and (way.workers == 1 or gpus == 0 or gpus >= way.workers)]


def measure(ways: list[Way], size: Size, repetitions: int) -> list[dict[str, Any]]:
    """A row for each way."""
    with tempfile.TemporaryDirectory() as folder:
        groups = [open_group(way, size, Path(folder, f"meeting-{index}")) for index, way in enumerate(ways)]
        rounds = [[ask(group, "step") for group in groups] for _ in range(repetitions)]
        memory = [max(used for used, _ in ask(group, "memory")) for group in groups]
        for group in groups:
            ask(group, "end")
    plain = [each[0] for each in rounds]
    return [describe(way, size, list(own), plain) | {"bytes": used, "of_plain": used / memory[0]}
            for way, own, used in zip(ways, zip(*rounds, strict=True), memory, strict=True)]


def describe(way: Way, size: Size, own: list[Answers], plain: list[Answers]) -> dict[str, Any]:
    """A row's speed: medians over the rounds, each compared with the plain way's in the same round."""
    wall = [max(each for each, _ in answers) / way.workers for answers in own]
    busy = [sum(each for _, each in answers) / way.workers for answers in own]
    plain_wall, plain_busy = zip(*(answers[0] for answers in plain), strict=True)
    return {"way": way.name, "device": device_of(0).type,
            "samples/s": size.batch * size.steps / statistics.median(wall),
            "times": statistics.median(map(truediv, plain_wall, wall)),
            "processor": statistics.median(map(truediv, busy, plain_busy))}


def open_group(way: Way, size: Size, meeting: Path) -> list[Connection]:
    """The connections to a way's processes, once they have done their first steps."""
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    group = []
    for rank in range(way.workers):
        here, there = context.Pipe()
        # a daemon ends with this process, however that ends
        context.Process(target=_work, args=(way, size, rank, meeting, there), daemon=True).start()
        there.close()
        group.append(here)
    for connection in group:
        connection.recv()
    print(f"{way.name} is ready after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return group


def ask(group: list[Connection], what: str) -> Answers:
    """Each process's answer; they work at the same time."""
    for connection in group:
        connection.send(what)
    return [connection.recv() for connection in group]


# --- a process ----------------------------------------------------------------------------------------------------


def _work(way: Way, size: Size, rank: int, meeting: Path, asked: Connection) -> None:
    device = device_of(rank)
    torch.set_num_threads(max(1, size.threads // way.workers))
    if way.workers > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{meeting}",
                                       rank=rank, world_size=way.workers)
    before = memory_of(device)[0]
    step = open_step(way, size, device)
    for _ in range(WARM_UP):
        step()
    forget_peak(device)
    asked.send(None)
    while (what := asked.recv()) != "end":
        asked.send(timed(step, size.steps, device) if what == "step" else (memory_of(device)[1] - before, 0.0))
    asked.send((0.0, 0.0))


def device_of(rank: int) -> torch.device:
    """The rank's GPU, or the CPU where there is none."""
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def open_step(way: Way, size: Size, device: torch.device) -> Callable[[], object]:
    """One step of this way on random samples, as `train` does it."""
    torch.manual_seed(0)
    spec = ModelSpec(network=size.network, skeleton=COCO17.to_json())
    network = MSPN(size.network).to(device).train()
    if way.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = training.make_optimiser(network, weight_decay=1e-5)
    average = WeightAverage(network, decay=0.9998) if way.average else None
    if way.synchronised:
        synchronise_batch_norms(network)
    if way.recompute:
        recompute_activations(network)
    wrapped = network if way.workers == 1 else DistributedDataParallel(network, forward_sync_buffers=False)
    if way.compiled:
        compile_forward(wrapped, "default")
    batch = random_batch(size, device)

    def step() -> None:
        training.train_step(wrapped, optimiser, batch, iteration=1, rate=1e-5, spec=spec,
                            bfloat16=way.bfloat16, channels_last=way.channels_last,
                            accumulate=way.accumulate, clip_norm=way.clip_norm)
        if average is not None:
            average.update(network)

    return step


def random_batch(size: Size, device: torch.device) -> training.TrainingBatch:
    """Noise with joints anywhere."""
    (width, height), joints = size.network.input_size_wh, size.network.num_joints
    crops = torch.randint(0, 256, (size.batch, height, width, 3), dtype=torch.uint8)
    return training.TrainingBatch(
        crops.to(device), (torch.rand(size.batch, joints, 2) * torch.tensor((width, height))).to(device),
        torch.randint(0, 3, (size.batch, joints)).to(device), torch.arange(size.batch).to(device))


def timed(step: Callable[[], object], count: int, device: torch.device) -> tuple[float, float]:
    """Seconds for so many steps, and the processor's seconds of all threads."""
    began, began_busy = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, time.process_time() - began_busy


def memory_of(device: torch.device) -> tuple[int, int]:
    """(now, at the peak) in bytes: what torch has allocated on the GPU, or what is resident of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak(device: torch.device) -> None:
    """The peak begins anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5): VmHWM becomes VmRSS


if __name__ == "__main__":
    sys.exit(main())
