"""Activations that aren't kept for the backward pass but computed again in it: less memory, a third more time.

The authors' RUN_EFFICIENT does so around each convolution, and updates each batch norm's statistics twice by it.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pipeline.model.network import PoseNetwork


def recompute_activations(network: PoseNetwork) -> None:
    """Make a network keep only what goes into its blocks, and compute the rest again in the backward pass; in place.

    Outputs, gradients and batch norm statistics are those of the plain network, bit for bit. Names of weights stay, a
    deep copy is such a network too, and without gradients nothing differs.
    """
    for module, methods in network.recomputed():
        for method in methods:
            _recompute(module, method)


def _recompute(module: nn.Module, method: str) -> None:
    # a partial of module and plain function, not a closure: a deep copy must call the copied module
    setattr(module, method, partial(_recomputed, module, getattr(type(module), method)))


def _recomputed(module: nn.Module, plain: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(module, *inputs)
    # nothing in the network is random, so no generator's state is kept
    return checkpoint(plain, module, *inputs, use_reentrant=False, preserve_rng_state=False,
                      context_fn=lambda: (contextlib.nullcontext(), _without_statistics(module)))


@contextlib.contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    """Running statistics that are those of before at the end: the first pass has moved them already."""
    # copies move instead. To switch tracking off isn't possible: checkpoint counts the tensors that a pass saves
    kept = [(norm, dict(norm.named_buffers())) for norm in module.modules() if isinstance(norm, _BatchNorm)]
    try:
        for norm, buffers in kept:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())
        yield
    finally:
        for norm, buffers in kept:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
