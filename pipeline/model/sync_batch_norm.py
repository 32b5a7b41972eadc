"""Batch norms over the batches of all processes: with N of them as one process does with the N batches in one.

Megvii's own MSPN runs had them (RSN's issue 7); the released code hasn't. torch's SyncBatchNorm is for GPUs alone; the
one here computes the same by any backend of torch.distributed, so that it can be used, and tested, on CPUs.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

CHANNELWISE = (0, 2, 3)


def synchronise_batch_norms(network: nn.Module) -> None:
    """Make a network's batch norms, in training, take their statistics from all processes; in place.

    Parameters and buffers stay the same tensors under the same names, so an optimiser made before goes on with them.
    On a GPU they become torch's SyncBatchNorm. Every process must hold equally many samples.
    """
    if next(network.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            network.set_submodule(name, _synchronised(module))


def _synchronised(plain: nn.BatchNorm2d) -> "SynchronisedBatchNorm2d":
    found = SynchronisedBatchNorm2d(plain.num_features, plain.eps, plain.momentum)
    found.weight, found.bias = plain.weight, plain.bias
    found.running_mean, found.running_var = plain.running_mean, plain.running_var
    found.num_batches_tracked = plain.num_batches_tracked
    return found.train(plain.training)


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d whose batch, in training, is that of all processes; in evaluation or alone, a BatchNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> the same shape and dtype; B, h and w are alike in all processes."""
        if not self.training or not distributed.is_initialized():
            return super().forward(x)
        y: Tensor
        y, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        if self.track_running_stats:
            self._track(mean, var * (count / (count - 1)))
        return y

    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        """One step of the running statistics, as BatchNorm2d takes it."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_var, self.momentum)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, over the processes' samples as if they were one batch's.

    Returns also mean and biased var [C] of them all, and how many values each channel has.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, int]:
        mean, var = _joint_statistics(x)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count = eps, x.numel() // x.shape[1] * distributed.get_world_size()
        ctx.mark_non_differentiable(mean, var)
        y = functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        return y, mean, var, ctx.count

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        """Ioffe & Szegedy 2015, sec. 3, with the two sums over all processes.

        The gradients of weight and bias are this process's own: averaging them is the distributed wrapper's.
        """
        x, weight, mean, var = ctx.saved_tensors
        # as if mean and var were constants; they aren't, which is what the two sums are for
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, mean, var, None, None, False, ctx.eps, [True, True, True])
        sums = torch.stack([dweight, dbias])
        distributed.all_reduce(sums)
        along_x, along_1 = sums / ctx.count
        inverse = (var + ctx.eps).rsqrt()
        slope = weight * inverse * inverse * along_x
        offset = weight * inverse * along_1 - slope * mean
        dx = dx - (x * slope[:, None, None] + offset[:, None, None]).to(dx.dtype)
        return dx, dweight, dbias, None


def _joint_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of all processes' values: of equally many, so the means' mean, and the variances'
    plus that of the means (Chan et al. 1979). float32, float64 where x is."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(exact, dim=CHANNELWISE, correction=0)
    mine = torch.stack([mean, var])
    each = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(each, mine)
    means, variances = torch.stack(each).unbind(dim=1)
    mean = means.mean(dim=0)
    return mean, (variances + (means - mean).square()).mean(dim=0)
