"""Two processes of torch.distributed on one machine, each with its own samples: what tests compare with one process."""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from pipeline import training
from pipeline.checkpoints import keep_checkpoint
from pipeline.errors import DataError
from pipeline.model.compiling import compile_forward
from pipeline.model.directory import ModelSpec
from pipeline.model.loss import mspn_loss
from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.model.recompute import recompute_activations
from pipeline.model.sync_batch_norm import SynchronisedBatchNorm2d, synchronise_batch_norms
from pipeline.model.targets import draw_targets
from pipeline.pose.skeleton import COCO17

WORLD = 2
CONFIG = MSPNConfig(num_joints=17, num_stages=1, input_size_wh=(64, 64), blocks=(1, 1, 1, 1), widths=(4, 4, 4, 4),
                    stem_channels=4, upsample_channels=8)
SPEC = ModelSpec(network=CONFIG, skeleton=COCO17.to_json())


def whole_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Six images float64 [6, 3, 64, 64], the second half much brighter; their joints and visibilities."""
    chance = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 64, 64, generator=chance, dtype=torch.float64)
    images[3:] = 3 * images[3:] + 2
    return (images, torch.rand((6, 17, 2), generator=chance) * 63, torch.randint(0, 3, (6, 17), generator=chance))


def new_network() -> MSPN:
    """The same on each rank, in float64, so that what differs by rounding is told from what differs."""
    torch.manual_seed(0)
    return MSPN(CONFIG).double().train()


def one_pass(network: torch.nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Heatmaps, then gradients and state after one forward and backward pass."""
    images, joints_xy, visible = batch
    heatmaps = network(images)
    mspn_loss(heatmaps, draw_targets(joints_xy, visible, (64, 64)), visible).total.backward()
    plain = network.module if isinstance(network, DistributedDataParallel) else network
    return {"heatmaps": torch.stack([unit for stage in heatmaps for unit in stage]).detach(),
            "gradients": {name: each.grad for name, each in plain.named_parameters()}, "state": plain.state_dict()}


def norm_of(x: Tensor, norm: torch.nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What the norm gives out for x, and the gradient of x where those of the output are its squares."""
    x = x.detach().requires_grad_()
    y = norm(x)
    (y.float() ** 3 / 3).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def synchronised_ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks with synchronised batch norms had from its half: `one_pass`, plain and recomputed."""
    return _on_ranks(_synchronised, folder)


def compiled_ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks has after a step in two pieces, in float32: `state_dict`, plain and compiled."""
    return _on_ranks(_compiled, folder)


def failing_ranks(folder: Path) -> list[dict[str, str | None]]:
    """What each of two ranks says, by what fails.

    diverged  after four iterations, when rank 1's images are NaN in the third. In iteration i rank 0 trains on the
              persons 10i0 and 10i1, rank 1 on 20i0 and 20i1
    damaged   when it is to go on with a training none of whose checkpoints can be read
    """
    keep_checkpoint(str(folder), 100, {"state.pt": b"no state"}, keep_newest=1)
    return _on_ranks(partial(_failing, output=str(folder)), folder)


def _on_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    multiprocessing.spawn(_rank, args=(work, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(WORLD)]


def _rank(rank: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    torch.save(work(rank), Path(folder, f"rank-{rank}.pt"))
    distributed.destroy_process_group()
    os._exit(0)  # what Ray and MLflow leave running can abort a process that ends by itself


def _synchronised(rank: int) -> dict[str, Any]:
    mine = tuple(each.chunk(WORLD)[rank] for each in whole_batch())
    found: dict[str, Any] = {}
    for way, recomputed in (("plain", False), ("recomputed", True)):
        network = new_network()
        synchronise_batch_norms(network)
        if recomputed:
            recompute_activations(network)
        found[way] = one_pass(DistributedDataParallel(network, forward_sync_buffers=False), mine)
    return found | {"bfloat16": norm_of(mine[0].bfloat16(), SynchronisedBatchNorm2d(3))}


def _compiled(rank: int) -> dict[str, Any]:
    chance = torch.Generator().manual_seed(rank)
    batch = training.TrainingBatch(
        torch.randint(0, 256, (4, 64, 64, 3), generator=chance, dtype=torch.uint8),
        torch.rand((4, 17, 2), generator=chance) * 63, torch.randint(0, 3, (4, 17), generator=chance), torch.arange(4))
    found = {}
    for way in ("plain", "compiled"):
        network = new_network().float()
        wrapped = DistributedDataParallel(network, forward_sync_buffers=False)
        if way == "compiled":
            compile_forward(wrapped, "default")
        training.train_step(wrapped, torch.optim.SGD(network.parameters()), batch, iteration=1, rate=1e-4,
                            spec=SPEC, accumulate=2)
        found[way] = network.state_dict()
    return found


def _failing(rank: int, output: str) -> dict[str, str | None]:
    return {"diverged": _diverging(rank), "damaged": _restoring(rank, output)}


def _diverging(rank: int) -> str | None:
    from jobs import train_worker  # takes seconds in each process: not for those who only compute

    network = new_network().float()
    wrapped = DistributedDataParallel(network, forward_sync_buffers=False)
    optimiser = training.make_optimiser(network, weight_decay=0.0)
    reports = []
    for iteration in range(1, 5):
        factor = math.nan if (rank, iteration) == (1, 3) else 1.0
        spoiling = network.register_forward_pre_hook(lambda _, images, factor=factor: images[0] * factor)
        ids = torch.tensor([0, 1]) + 1000 * (rank + 1) + 10 * iteration
        batch = training.TrainingBatch(torch.full((2, 64, 64, 3), 128, dtype=torch.uint8),
                                       torch.full((2, 17, 2), 30.0), torch.full((2, 17), 2), ids)
        reports.append(training.train_step(wrapped, optimiser, batch, iteration=iteration, rate=1e-4, spec=SPEC))
        spoiling.remove()
    sets = [SimpleNamespace(dataset=SimpleNamespace(uri="shards"))]
    worker = SimpleNamespace(rank=rank, world=WORLD, task=SimpleNamespace(sets=sets))
    return train_worker._divergence(cast(Any, worker), reports, look_inside=False)


def _restoring(rank: int, output: str) -> str:
    from jobs.train_checkpoints import restore

    task = cast(Any, SimpleNamespace(config=SimpleNamespace(output=output)))
    network = new_network()
    try:
        restore(task, network, training.make_optimiser(network, weight_decay=0.0), None, rank=rank, world=WORLD)
    except DataError as error:
        return str(error)
    return "restored"
