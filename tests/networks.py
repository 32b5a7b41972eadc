"""What the tests of every network need: weights that answer something, and the work counted."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.model.network import PoseNetwork
from tests.published import Keys, made_weights

Network = TypeVar("Network", bound=PoseNetwork)


def keys_of(network: PoseNetwork) -> Keys:
    """Names and shapes of the network's state dict, in order."""
    return [(name, list(tensor.shape)) for name, tensor in network.state_dict().items()]


def drawn(network: Network, *, seed: int = 1) -> Network:
    """The same network with weights that keep every layer's output near 1, in evaluation mode."""
    network.load_state_dict(made_weights(keys_of(network), seed))
    return network.eval()


def gmacs(function: Callable[[Tensor], object], *, size_wh: tuple[int, int]) -> float:
    """10⁹ multiplications of one picture's convolutions, on the meta device; a FLOP counter counts each twice."""
    width, height = size_wh
    with FlopCounterMode(display=False) as counter:
        function(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() / 2e9


def assert_rounded(ours: Tensor, answers: np.ndarray) -> None:
    """Our float64 numbers are those that were rounded to the given float32: half of the last of 24 bits apart."""
    np.testing.assert_allclose(ours.numpy(), answers, rtol=1.001 * 2 ** -24, atol=1e-12)
