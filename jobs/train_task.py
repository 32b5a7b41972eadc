"""What each of `train`'s workers is given and holds, and how the ranks hear from each other."""

from dataclasses import dataclass
from typing import Any

import torch

from pipeline import training
from pipeline.averaging import WeightAverage
from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.mixture import TrainingSet
from pipeline.model.directory import ModelSpec
from pipeline.model.network import PoseNetwork
from pipeline.pose.augment import Augmentation
from pipeline.pose.skeleton import Skeleton
from pipeline.shards import ShardDataset

INIT_FOLDER = "_init"


@dataclass(frozen=True)
class TrainTask:
    """What every worker is given. `source` is what model.json will say of the model's origin."""

    config: TrainConfig
    sets: tuple[TrainingSet, ...]
    val: ShardDataset | None
    intent: dict[str, Any]
    source: dict[str, Any]
    run_id: str | None

    @property
    def skeleton(self) -> Skeleton:
        """The model's joints: those of the first dataset."""
        skeleton = self.sets[0].dataset.skeleton
        assert skeleton is not None
        return skeleton


@dataclass
class Worker:
    """What a rank holds while it trains."""

    task: TrainTask
    rank: int
    world: int
    device: torch.device
    spec: ModelSpec
    network: PoseNetwork
    wrapped: torch.nn.Module  # the network, or the wrapper that averages gradients over the ranks
    optimiser: torch.optim.Optimizer
    iteration: int  # done
    positions: tuple[int, ...]  # next slot in the rank's stream of each dataset
    average: WeightAverage | None = None  # of the network's weights, where the settings want one

    @property
    def result(self) -> PoseNetwork:
        """The network that is validated and becomes the model: the average, where there is one."""
        return self.network if self.average is None else self.average.network


def schedule_of(config: TrainConfig, *, world: int) -> training.Schedule:
    """The rate grows with the number of workers, and so with the whole batch, as the authors have it."""
    optimiser = config.optimiser
    return training.Schedule(optimiser.learning_rate_per_worker * world, optimiser.iterations,
                             optimiser.warmup_iterations, optimiser.warmup_factor, optimiser.decay_at,
                             optimiser.decay_factor)


def augmentation_of(config: TrainConfig, skeleton: Skeleton) -> Augmentation | None:
    """What chance is to do to a sample of these joints; None: nothing.

    Refused with ConfigError: an upper body of joints that the data don't have.
    """
    settings = config.augmentation
    if not settings.enabled:
        return None
    upper = settings.half_body_upper
    unknown = sorted(set(upper or ()) - set(skeleton.joints))
    if unknown:
        raise ConfigError(f"augmentation.half_body_upper names {', '.join(unknown)}, but the data have the joints "
                          f"{', '.join(skeleton.joints)}. Name some of these, or give null for the skeleton's own.")
    ids = None if upper is None else tuple(skeleton.joints.index(joint) for joint in upper)
    return Augmentation(**settings.model_dump(exclude={"enabled", "half_body_upper"}), half_body_upper=ids)


def gather(worker: Worker, value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    values = [value] * worker.world
    if worker.world > 1:
        torch.distributed.all_gather_object(values, value)
    return values
