"""Two processes of torch.distributed on one machine, each with half of a batch: what tests compare with one process."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from pipeline.model.loss import mspn_loss
from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.model.recompute import recompute_activations
from pipeline.model.sync_batch_norm import SynchronisedBatchNorm2d, synchronise_batch_norms
from pipeline.model.targets import draw_targets

WORLD = 2
CONFIG = MSPNConfig(num_joints=17, num_stages=2, input_size_wh=(64, 64), blocks=(1, 1, 1, 1), widths=(4, 4, 4, 4),
                    stem_channels=4, upsample_channels=8)


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


def synchronised_ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks with synchronised batch norms had from its half: `one_pass`, plain and recomputed."""
    multiprocessing.spawn(_rank, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(WORLD)]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    mine = tuple(each.chunk(WORLD)[rank] for each in whole_batch())
    found = {}
    for way, recomputed in (("plain", False), ("recomputed", True)):
        network = new_network()
        synchronise_batch_norms(network)
        if recomputed:
            recompute_activations(network)
        found[way] = one_pass(DistributedDataParallel(network, forward_sync_buffers=False), mine)
    found["bfloat16"] = SynchronisedBatchNorm2d(3)(mine[0].bfloat16()).detach()
    torch.save(found, Path(folder, f"rank-{rank}.pt"))
    distributed.destroy_process_group()
