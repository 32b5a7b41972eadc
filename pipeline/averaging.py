"""The exponential average of a network's weights over training: smoother than the newest ones, and often better.

It knows a network; not how it is trained, or what its average is used for.
"""

import copy
from typing import Any

import torch

from pipeline.model.network import PoseNetwork


class WeightAverage:
    """A network that follows another: after each step, average = d * average + (1 - d) * weights.

    d is `decay`, but (1 + n) / (10 + n) while that is less, n updates having been before: TensorFlow's warm-up, without
    which 1,000 steps at 0.9998 still hold four fifths of the random weights at the beginning.

    Batch norms' statistics are averaged like the weights. The mean of a convolution's output is linear in its weights,
    so averaged means belong to averaged weights; those of the newest weights don't. Counters are copied.
    """

    def __init__(self, network: PoseNetwork, *, decay: float) -> None:
        assert 0 < decay < 1, decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    def update(self, network: PoseNetwork) -> None:
        """Take a step towards the network."""
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, newest = self.network.state_dict(), network.state_dict()
        real = [name for name, tensor in averages.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([averages[name] for name in real], [newest[name] for name in real], weight)
        for name in averages.keys() - set(real):
            averages[name].copy_(newest[name])
        self.updates += 1

    def restart(self, network: PoseNetwork) -> None:
        """Begin at the network's weights, as if nothing had been before."""
        self.network.load_state_dict(network.state_dict())
        self.updates = 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types, for `load_state_dict`."""
        return {"network": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        self.network.load_state_dict(state["network"])
        self.updates = state["updates"]
