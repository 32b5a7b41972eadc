"""What the network and its loss do, found by running them rather than by reading them: for pictures and tests.

It needs no data and no memory: the network runs on torch's meta device, the loss on maps of a single cell.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.model.architectures import make_network
from pipeline.model.loss import OHKM_JOINTS, UNITS, mspn_loss
from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.model.network import NetworkConfig, PoseNetwork
from pipeline.model.targets import KERNELS

Shape = tuple[int, ...]


class Passage(NamedTuple):
    """The shapes [C, H, W] that a module takes (its first argument) and gives."""

    takes: Shape
    gives: Shape


class Lesson(NamedTuple):
    """What a head learns: the target's kernel in cells, the weight of its loss, and the number of joints that
    count where only the hardest do (None: all)."""

    kernel: int
    weight: float
    hardest: int | None


class Seen(NamedTuple):
    """A network, its modules' passages by name, the names of the modules that `predict` calls, all heatmaps' shape."""

    network: PoseNetwork
    passages: dict[str, Passage]
    predicting: set[str]
    heatmap: Shape


class Facts(NamedTuple):
    """All that is drawn: the network, its modules' passages, its heads' lessons (stage by stage, coarse to fine),
    the names of the modules that `predict` calls, and the shape of all heatmaps."""

    network: MSPN
    passages: dict[str, Passage]
    lessons: list[list[Lesson]]
    predicting: set[str]
    heatmap: Shape


def facts_of(config: MSPNConfig) -> Facts:
    """Build the network without data and watch it."""
    seen = look_at(config)
    assert isinstance(seen.network, MSPN)
    return Facts(seen.network, seen.passages, lessons(config.num_stages), seen.predicting, seen.heatmap)


def look_at(config: NetworkConfig) -> Seen:
    """Any network, built and run without data."""
    with torch.device("meta"):
        network = make_network(config).eval()
        images = torch.empty(1, 3, *config.input_size_wh[::-1])
    with torch.inference_mode():
        with _watched(network) as passages:
            heatmap = network(images)[-1][-1].shape
        with _watched(network) as predicting:
            network.predict(images)
    return Seen(network, passages, set(predicting), tuple(heatmap[1:]))


@contextmanager
def _watched(network: nn.Module) -> Iterator[dict[str, Passage]]:
    """The passages of all modules that are called inside the block, by name, in the order of their ends."""
    passages: dict[str, Passage] = {}

    def note(name: str, _: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            passages[name] = Passage(tuple(arguments[0].shape[1:]), tuple(output.shape[1:]))

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in network.named_modules()]
    try:
        yield passages
    finally:
        for hook in hooks:
            hook.remove()


def lessons(num_stages: int) -> list[list[Lesson]]:
    """What `mspn_loss` teaches each head, stage by stage, coarse to fine, found by asking it.

    Heads that answer 0 pay only for the target that they learn: one target of 1 after the other tells which that
    is and what it weighs. An error of a single joint then tells whether all joints count or only the hardest.
    """
    num_joints = OHKM_JOINTS + 1
    silent = [[torch.zeros(1, num_joints, 1, 1)] * UNITS] * num_stages
    visible = torch.full((1, num_joints), 2)

    def shares(targets: Tensor) -> Tensor:
        return mspn_loss(silent, targets, visible).heads

    each_kernel = torch.eye(len(KERNELS)).view(len(KERNELS), 1, len(KERNELS), 1, 1, 1).expand(
        -1, -1, -1, num_joints, -1, -1)
    weights, kernels = torch.stack([shares(targets) for targets in each_kernel]).max(dim=0)
    one_joint = torch.zeros(1, len(KERNELS), num_joints, 1, 1)
    one_joint[:, :, 0] = 1
    counting = (weights / shares(one_joint)).round().int()
    return [[Lesson(KERNELS[kernels[s, u]], float(weights[s, u]),
                    int(counting[s, u]) if counting[s, u] < num_joints else None)
             for u in range(UNITS)] for s in range(num_stages)]
