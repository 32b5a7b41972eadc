"""One iteration of training: learning rate, normalise, draw targets, forward, loss, step; and its state in a file.

It knows tensors and a network; not where batches come from, how many workers there are, or Ray.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.averaging import WeightAverage
from pipeline.errors import ConfigError, DataError
from pipeline.model.directory import ModelSpec, normalise_crops
from pipeline.model.loss import LossTerms, taught_loss
from pipeline.model.network import PoseNetwork

BETAS = (0.9, 0.999)  # the authors' Adam
EPSILON = 1e-8
STATE_VERSION = 2  # 2: the average of the weights


@dataclass(frozen=True)
class Schedule:
    """The authors' learning rate (their make_lr_scheduler): warm-up from a share of the peak, then linear to 0.

    decay_at  instead of linear: after each of these iterations the rate is multiplied by decay_factor (MMPose's)
    Refused with ConfigError: steps that don't ascend, or don't lie between the warm-up's end and the last iteration.
    """

    peak: float
    iterations: int
    warmup_iterations: int
    warmup_factor: float
    decay_at: tuple[int, ...] = ()
    decay_factor: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup_iterations >= self.iterations:
            raise ConfigError(f"optimiser.warmup_iterations is {self.warmup_iterations}, but must be less than "
                              f"optimiser.iterations, {self.iterations}.")
        bounds = (self.warmup_iterations, *self.decay_at, self.iterations)
        if self.decay_at and not all(earlier < later for earlier, later in pairwise(bounds)):
            raise ConfigError(f"optimiser.decay_at is {list(self.decay_at)}, but must ascend from "
                              f"optimiser.warmup_iterations, {self.warmup_iterations}, to optimiser.iterations, "
                              f"{self.iterations}. With another number of iterations, change it in proportion.")


@dataclass(frozen=True)
class TrainingBatch:
    """Samples on the network's device.

    crops      uint8 [B, H, W, 3] BGR
    joints_xy  float32 [B, K, 2] in crop pixels
    visible    [B, K]: -1 a joint that the data don't have, 0 not labelled, 1 occluded, 2 visible
    ids        int64 [B], the persons' annotation ids, to name them in an error
    sets       int64 [B], the dataset of each, by its place among several; None: there is one
    """

    crops: Tensor
    joints_xy: Tensor
    visible: Tensor
    ids: Tensor
    sets: Tensor | None = None


@dataclass(frozen=True)
class StepReport:
    """What an iteration gave, still on the device, so that reading it doesn't hold the next one up.

    loss   scalar, the total before the step
    heads  [S, heads of a stage], each head's share of it: stage by stage, coarse to fine
    gradient_norm  scalar, of all gradients as one vector before they were clipped, averaged over the ranks; not finite
                   where one of them, or one's square, isn't
    """

    iteration: int
    loss: Tensor
    heads: Tensor
    ids: Tensor
    gradient_norm: Tensor
    sets: Tensor | None = None


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands: after `iteration` iterations; of each rank the next slot in each dataset's stream."""

    iteration: int
    positions: tuple[tuple[int, ...], ...]


# --- schedule and optimiser ---------------------------------------------------------------------------------------


def learning_rate(iteration: int, schedule: Schedule) -> float:
    """The rate of an iteration, counted from 1: with linear decay exactly 0 at the last one."""
    warmup = schedule.warmup_iterations
    if iteration < warmup:
        return schedule.peak * (schedule.warmup_factor + (1 - schedule.warmup_factor) * iteration / warmup)
    if schedule.decay_at:
        return schedule.peak * schedule.decay_factor ** sum(iteration > step for step in schedule.decay_at)
    return schedule.peak * (1 - (iteration - warmup) / (schedule.iterations - warmup))


def make_optimiser(network: nn.Module, *, weight_decay: float) -> torch.optim.Adam:
    """The authors' Adam: weight decay as L2 on all parameters, also biases and batch norms. Each step sets its rate."""
    return torch.optim.Adam(network.parameters(), lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay)


def scale_heatmaps(network: PoseNetwork, factor: float) -> None:
    """Multiply an untrained network's heatmaps, by the weights of the heads' last layers (batch norms: 1 at first).

    Targets reach 255, untrained heatmaps have a deviation of 1, and Adam moves a weight by the learning rate at most:
    the authors' 96,000 iterations get there, some hundred don't, and all joints' scores then stay near 0.5.
    """
    with torch.no_grad():
        for name in chain.from_iterable(network.heads):
            *_, last = (module for module in network.get_submodule(name).modules() if list(module.parameters(False)))
            for parameter in last.parameters():
                parameter.mul_(factor)


# --- one iteration ------------------------------------------------------------------------------------------------


def train_step(network: nn.Module, optimiser: torch.optim.Optimizer, batch: TrainingBatch, *, iteration: int,
               rate: float, spec: ModelSpec, bfloat16: bool = False, channels_last: bool = True, accumulate: int = 1,
               clip_norm: float | None = None) -> StepReport:
    """One step of the optimiser on one batch. The network (or its distributed wrapper) is in training mode.

    spec           how the network sees crops, and with which loss it is taught
    bfloat16       the network under autocast; targets and loss are float32 always
    channels_last  the memory format of the images; the network should have the same
    accumulate     the batch goes through in so many equal pieces, whose gradients add up to the whole batch's: less
                   memory, the same step but for rounding. Batch norms see the pieces, though: each normalises by its
                   own statistics, and the running ones move once for each
    clip_norm      longer gradients, all together one vector, are shortened to this length (Pascanu et al. 2013)
    """
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    losses = []
    for piece, synchronised in _pieces(network, batch, accumulate):
        with synchronised:
            loss = _loss(network, piece, spec, bfloat16=bfloat16, channels_last=channels_last)
            (loss.total / accumulate).backward()  # type: ignore[no-untyped-call]
        losses.append(loss)
    norm = nn.utils.get_total_norm([each.grad for each in network.parameters() if each.grad is not None])
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(network.parameters(), clip_norm, norm)
    optimiser.step()
    total, heads = (torch.stack(values).mean(dim=0).detach() for values in zip(*losses, strict=True))
    return StepReport(iteration, total, heads, batch.ids, norm, batch.sets)


def _loss(network: nn.Module, batch: TrainingBatch, spec: ModelSpec, *, bfloat16: bool,
          channels_last: bool) -> LossTerms:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = normalise_crops(batch.crops, spec).to(memory_format=layout)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        heatmaps = network(images)
    return taught_loss(heatmaps, batch.joints_xy, batch.visible, spec.input_size_wh, spec.loss)


def _pieces(network: nn.Module, batch: TrainingBatch, count: int,
            ) -> Iterator[tuple[TrainingBatch, contextlib.AbstractContextManager[None]]]:
    """Equal pieces of a batch, each with what it is computed in: the ranks' gradients meet after the last alone."""
    assert len(batch.crops) % count == 0, (len(batch.crops), count)
    apart = getattr(network, "no_sync", contextlib.nullcontext)
    taught = (batch.crops, batch.joints_xy, batch.visible, batch.ids)
    for index, part in enumerate(zip(*(each.chunk(count) for each in taught), strict=True), start=1):
        yield TrainingBatch(*part), apart() if index < count else contextlib.nullcontext()


def as_batch(arrays: Mapping[str, npt.NDArray[Any] | Tensor], device: torch.device) -> TrainingBatch:
    """A block of `pipeline.samples` on a device."""
    def tensor(name: str) -> Tensor:
        value = arrays[name]
        return (value if isinstance(value, Tensor) else torch.tensor(value)).to(device, non_blocking=True)

    return TrainingBatch(tensor("crop"), tensor("joints_xy"), tensor("visible"), tensor("annotation_id"),
                         tensor("set") if "set" in arrays else None)


# --- the state in a file ------------------------------------------------------------------------------------------


def state_bytes(network: PoseNetwork, optimiser: torch.optim.Optimizer, state: TrainingState,
                average: WeightAverage | None = None) -> bytes:
    """All that a run needs to go on, as torch.save writes it: tensors and plain types. `load_state` is the inverse."""
    sink = io.BytesIO()
    torch.save({"version": STATE_VERSION, "iteration": state.iteration,
                "positions": [list(each) for each in state.positions],
                "network": network.state_dict(), "optimiser": optimiser.state_dict(),
                "average": None if average is None else average.state_dict(),
                "random": torch.get_rng_state()}, sink)
    return sink.getvalue()


def load_state(data: bytes, network: PoseNetwork, optimiser: torch.optim.Optimizer,
               average: WeightAverage | None = None) -> TrainingState:
    """Put a network, its optimiser and its average back to where `state_bytes` saw them; where that was.

    A state without an average begins one at its weights. Nothing is unpickled but tensors and plain types. A newer
    version is refused with DataError.
    """
    values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if values["version"] > STATE_VERSION:
        raise DataError(f"The checkpoint has version {values['version']}; this program reads up to {STATE_VERSION}. "
                        "Update it.")
    network.load_state_dict(values["network"])
    optimiser.load_state_dict(values["optimiser"])
    if average is not None and values.get("average") is not None:
        average.load_state_dict(values["average"])
    elif average is not None:
        average.restart(network)
    torch.set_rng_state(values["random"])
    # one dataset's position was a number at first
    positions = tuple((each,) if isinstance(each, int) else tuple(each) for each in values["positions"])
    return TrainingState(values["iteration"], positions)


def positions_of(state: TrainingState, *, rank: int, world: int) -> tuple[int, ...]:
    """Where a rank's streams go on. With another number of ranks than before, all go on from the mean positions."""
    if len(state.positions) == world:
        return state.positions[rank]
    return tuple(sum(of_set) // world for of_set in zip(*state.positions, strict=True))
