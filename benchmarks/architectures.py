"""MSPN beside the networks that it is compared with: what each costs, and what each learns in equal training.

    python -m benchmarks.architectures cost [--only NAMES] [--backends NAMES] [--output FILE]
    python -m benchmarks.architectures train --coco FOLDER --lspet FOLDER --output DIR [--iterations N] [--only NAMES]

cost   networks of full size at one input size: parameters, multiplications of `predict`, and persons/s of the bare
       heatmaps (no flip test), in turns: on a CPU by the processor's seconds of all threads, which hardly depend on
       what else the machine does; on a GPU by the clock.
train  a small network of each kind, of equal multiplications, by the jobs: the same persons in the same order, the
       same augmentation, batches and learning rate (Adam's steps don't grow with a loss); its own loss, targets,
       colours, padding and decoding. The same command goes on where it was.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.real_pictures import job
from pipeline.model.architectures import config_of, make_network
from pipeline.model.inference import (
    CPU,
    CUDA,
    OPENVINO,
    PLAIN,
    Heatmaps,
    fast_heatmaps,
    has_openvino,
    native_precision,
    plain_heatmaps,
)
from pipeline.model.settings import (
    ARCHITECTURES,
    HourglassSettings,
    HRNetSettings,
    MSPNSettings,
    NetworkSettings,
    RSNSettings,
)

NUM_JOINTS = 17
REFERENCE = "MSPN, 2 stages"
RESNET_50 = (3, 4, 6, 3)
SIZE_WH = (192, 256)
FULL: dict[str, NetworkSettings] = {
    "MSPN, 1 stage": MSPNSettings(num_stages=1),
    REFERENCE: MSPNSettings(num_stages=2),
    "MSPN, 4 stages": MSPNSettings(num_stages=4),
    "RSN-18": RSNSettings(),
    "RSN-50": RSNSettings(blocks=RESNET_50),
    "RSN-50, 2 stages": RSNSettings(blocks=RESNET_50, num_stages=2),
    "HRNet-W32": HRNetSettings(),
    "HRNet-W48": HRNetSettings(width=48),
    "Hourglass, 1 stack": HourglassSettings(input_size_wh=SIZE_WH, num_stacks=1),
    "Hourglass, 2 stacks": HourglassSettings(input_size_wh=SIZE_WH, num_stacks=2),
    "Hourglass, 8 stacks": HourglassSettings(input_size_wh=SIZE_WH, num_stacks=8),
}
BATCH = 8
BACKENDS = (PLAIN, CPU, OPENVINO, CUDA)

SMALL_WH = (96, 128)
# 0.33 to 0.34 GMAC: the hourglass's beginning, which has no width of its own, takes 0.26 of them
SMALL: dict[str, NetworkSettings] = {
    "mspn": MSPNSettings(input_size_wh=SMALL_WH, blocks=(1, 2, 2, 2), widths=(28, 56, 112, 224), stem_channels=40,
                         upsample_channels=96),
    "rsn": RSNSettings(input_size_wh=SMALL_WH, num_stages=2, blocks=(1, 2, 2, 2), widths=(44, 88, 176, 352),
                       stem_channels=40, upsample_channels=96),
    "hrnet": HRNetSettings(input_size_wh=SMALL_WH, width=24, modules=(1, 2, 2), blocks=2, bottlenecks=1,
                           stem_channels=32),
    "hourglass": HourglassSettings(input_size_wh=SMALL_WH, num_stacks=2, width=64, depth=3),
}
RECIPE = "benchmarks/architectures.yaml"
# heatmaps up to 255 take more iterations than there are, unless they begin higher (jobs/demo.yaml); those up to 1 don't
HEATMAP_SCALES = {"coarse-to-fine": 8.0, "gaussian": 1.0}
NO_TRACKING = ("--set", "tracking.enabled=false")
# folder's option, split, file of annotations, pictures in a shard; LSPET's own joints to train on, COCO's to evaluate
SPLITS = (("coco", "train", "train", 50), ("coco", "val", "val", 50), ("lspet", "train", "train", 500),
          ("lspet", "val", "val_as_coco17", 100))


def main() -> int:
    """Print one of the tables; write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    cost = parts.add_parser("cost")
    cost.add_argument("--only", help=f"names with semicolons of: {'; '.join(FULL)}")
    cost.add_argument("--rounds", type=int, default=3)
    cost.add_argument("--threads", type=int, default=1)
    cost.add_argument("--backends", default=";".join(BACKENDS), help="those of them that are here; the default is all")
    cost.add_argument("--output", type=Path)
    train = parts.add_parser("train")
    train.add_argument("--coco", type=Path, required=True)
    train.add_argument("--lspet", type=Path, required=True)
    train.add_argument("--output", type=Path, required=True)
    train.add_argument("--iterations", type=int, default=500)
    train.add_argument("--rate", type=float, default=0.001, help="of each worker, at its peak")
    train.add_argument("--only", help=f"names with semicolons of: {'; '.join(SMALL)}")
    options = parser.parse_args()
    return print_costs(options) if options.part == "cost" else print_trainings(options)


def chosen(networks: dict[str, NetworkSettings], only: str | None) -> dict[str, NetworkSettings]:
    """The named ones; ends the program where one isn't known."""
    names = list(networks) if only is None else [name.strip() for name in only.split(";")]
    if unknown := set(names) - networks.keys():
        sys.exit(f"--only: unknown are {', '.join(sorted(unknown))}; there are: {'; '.join(networks)}.")
    return {name: networks[name] for name in names}


# --- cost ---------------------------------------------------------------------------------------------------------


def size_of(settings: NetworkSettings) -> dict[str, float]:
    """Parameters, and multiplications of `predict` for one crop (two operations each, as torch counts)."""
    config = config_of(settings, num_joints=NUM_JOINTS)
    width, height = settings.input_size_wh
    with torch.device("meta"):
        network, image = make_network(config).eval(), torch.empty(1, 3, height, width)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network.predict(image)
    return {"parameters": sum(each.numel() for each in network.parameters()),
            "macs": counter.get_total_flops() / 2}


def print_costs(options: argparse.Namespace) -> int:
    """A row for each network and way to compute it."""
    torch.set_num_threads(options.threads)
    networks, ways = chosen(FULL, options.only), ways_here(options.backends.split(";"))
    passes = {(name, way): open_pass(settings, way, options.threads)
              for name, settings in networks.items() for way in ways}
    seconds = time_in_turns(passes, options.rounds)
    rows = [describe(name, way, settings, seconds) for name, settings in networks.items() for way in ways]
    print(f"{'network':20} {'parameters':>12} {'GMAC':>6} {'backend':9} {'precision':9} {'persons/s':>9} {'times':>6}")
    for row in rows:
        print(f"{row['network']:20} {row['parameters']:12,} {row['macs'] / 1e9:6.2f} {row['backend']:9} "
              f"{row['precision']:9} {row['persons/s']:9.2f} {row['times']:6.2f}")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))
    return 0


Way = tuple[str, str]  # backend, precision
Pass = Callable[[], float]  # a batch through a network; its seconds
Seconds = dict[tuple[str, Way], list[float]]  # of each network and way, by round


def ways_here(backends: Collection[str]) -> list[Way]:
    """The network as it is in float32, and the other backends in the precision that this machine computes natively."""
    if unknown := set(backends) - set(BACKENDS):
        sys.exit(f"--backends: unknown are {', '.join(sorted(unknown))}; there are: {'; '.join(BACKENDS)}.")
    here = {PLAIN: True, CPU: True, OPENVINO: has_openvino(), CUDA: torch.cuda.is_available()}
    return [(backend, "float32" if backend == PLAIN else native_precision(backend))
            for backend in BACKENDS if backend in backends and here[backend]]


def open_pass(settings: NetworkSettings, way: Way, threads: int) -> Pass:
    """A pass of a batch through a network with random weights, which has been done once."""
    began, (backend, precision) = time.monotonic(), way
    network = make_network(config_of(settings, num_joints=NUM_JOINTS)).eval()
    heatmaps: Heatmaps = (plain_heatmaps(network, precision) if backend == PLAIN else
                          fast_heatmaps(network, backend, precision, batch_size=BATCH, threads=threads))
    width, height = settings.input_size_wh
    images = torch.rand(BATCH, 3, height, width, device=CUDA if backend == CUDA else CPU)
    clock = time.perf_counter if backend == CUDA else time.process_time

    @torch.inference_mode()
    def seconds() -> float:
        before = clock()
        heatmaps(images).cpu()  # waits for a GPU
        return clock() - before

    seconds()
    print(f"{settings.architecture} by {backend} is ready after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return seconds


def time_in_turns(passes: dict[tuple[str, Way], Pass], rounds: int) -> Seconds:
    """Each pass once in each round."""
    measured = [{name: seconds() for name, seconds in passes.items()} for _ in range(rounds)]
    return {name: [one[name] for one in measured] for name in passes}


def describe(name: str, way: Way, settings: NetworkSettings, seconds: Seconds) -> dict[str, Any]:
    """One row: the median of the rounds; times: of the reference's persons/s in the same round and way, if it ran."""
    own = seconds[name, way]
    reference = seconds.get((REFERENCE, way), [float("nan")] * len(own))
    return {"network": name, **size_of(settings), "backend": way[0], "precision": way[1],
            "persons/s": BATCH / statistics.median(own), "times": statistics.median(map(truediv, reference, own))}


# --- train --------------------------------------------------------------------------------------------------------


def print_trainings(options: argparse.Namespace) -> int:
    """A row for each network, and RESULTS.md's numbers in OUTPUT/architectures.json."""
    output = options.output.resolve()
    for name, split, annotations, most in SPLITS:
        shard(getattr(options, name), output / f"{name}-{split}", annotations, most)
    networks = chosen(SMALL, options.only)
    rows = [learn(name, settings, output, options) for name, settings in networks.items()]
    print(f"{'network':10} {'parameters':>10} {'GMAC':>6} {'COCO: AP':>9} {'AP50':>6} {'PCK':>6} "
          f"{'LSPET: AP':>10} {'PCK':>6}")
    for row in rows:
        coco, lspet = row["coco"], row["lspet"]
        print(f"{row['network']:10} {row['parameters']:10,} {row['macs'] / 1e9:6.2f} "
              f"{coco['ap']:9.3f} {coco['ap50']:6.3f} {coco['pck']:6.3f} {lspet['ap']:10.3f} {lspet['pck']:6.3f}")
    (output / "architectures.json").write_text(json.dumps(rows, indent=1))
    return 0


def shard(folder: Path, output: Path, annotations: str, most: int) -> None:
    """The annotated pictures of a folder like COCO's."""
    job("shard", "--images", f"{folder}/images", "--annotations", annotations_of(folder, annotations), "--output",
        str(output), "--images-per-shard", str(most), "--set", "annotated_only=true", *NO_TRACKING)


def annotations_of(folder: Path, name: str) -> str:
    """The file's place."""
    return f"{folder}/annotations/person_keypoints_{name}.json"


def train(settings: NetworkSettings, model: Path, options: argparse.Namespace) -> None:
    """Train on both sets, COCO's persons three times as often as LSPET's."""
    scale = HEATMAP_SCALES[ARCHITECTURES[settings.architecture].loss.kind]
    changes = {"network": settings.model_dump(), "heatmap_scale": scale,
               "validate_every": max(1, options.iterations // 4), "optimiser.iterations": options.iterations,
               "optimiser.warmup_iterations": options.iterations // 20,
               "optimiser.learning_rate_per_worker": options.rate}
    job("train", "--config", RECIPE, "--data", f"{{uri: {model.parent}/coco-train, weight: 3}}", "--data",
        f"{model.parent}/lspet-train", "--output", str(model), *assignments(changes))


def assignments(changes: dict[str, Any]) -> Iterable[str]:
    """The settings as a command line has them."""
    for name, value in changes.items():
        yield from ("--set", f"{name}={json.dumps(value)}")


def learn(name: str, settings: NetworkSettings, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train a network, annotate the val pictures of both sets in their annotated boxes, evaluate."""
    model = output / f"{name}-{options.iterations}-{options.rate}"
    train(settings, model, options)
    evaluations = {}
    for folder, split, annotations, _ in SPLITS:
        if split == "val":
            keypoints = f"{model}-{folder}"
            job("annotate", "--input", f"{output}/{folder}-val", "--model", str(model), "--output", keypoints,
                "--set", "precision=float32", *NO_TRACKING)
            evaluations[folder] = job("evaluate", "--keypoints", keypoints, "--annotations",
                                      annotations_of(getattr(options, folder), annotations), *NO_TRACKING)
    return {"network": name, **size_of(settings), "iterations": options.iterations, "rate": options.rate} | evaluations


if __name__ == "__main__":
    sys.exit(main())
