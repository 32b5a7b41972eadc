"""What every pose network is to training, inference and files, which don't ask which one it is."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from pydantic import Field, ValidationError
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError
from pipeline.model.settings import NetworkSettings


class NetworkConfig(NetworkSettings):
    """A network's settings and its joints: enough to build it. Bad values are refused with ConfigError."""

    num_joints: int = Field(ge=1)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r})"
                              for e in error.errors())
            raise ConfigError(f"{type(self).__name__.removesuffix('Config')}: {found}") from None


class PoseNetwork(nn.Module):
    """Images to heatmaps. Names of modules are state-dict keys, and those are the authors' of each network.

    images    [B, 3, H, W] normalised; H and W multiples of the config's `side_multiple`
    heatmaps  [B, K, H/4, W/4]
    """

    config: NetworkConfig

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, images: Tensor) -> list[list[Tensor]]:
        """All heatmaps, for training: of each stage its heads', coarse to fine."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> Tensor:
        """The last stage's finest heatmaps; nothing is computed that they don't need."""
        raise NotImplementedError

    @property
    def heads(self) -> list[list[str]]:
        """The names of the modules that give the heatmaps, in `forward`'s order: convolutions, or ones with a norm."""
        raise NotImplementedError

    def foldable(self) -> Iterator[tuple[str, str]]:
        """(convolution, batch norm) by name, where the norm alone reads what the convolution gives."""
        for parent, module in self.named_modules():
            names = list(module.named_children())
            for (first, conv), (second, norm) in pairwise(names):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    yield f"{parent}.{first}".lstrip("."), f"{parent}.{second}".lstrip(".")

    def recomputed(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """The blocks whose activations can be computed again for the backward pass, each with its methods."""
        raise NotImplementedError


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse with DataError, naming each entry, unless both have the same names and shapes.

    Partly loaded weights look like a network and annotate like noise: there is no lenient way.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
                 for name, tensor in expected.items() if name in found and found[name].shape != tensor.shape]
    problems = [_listed(kind, names) for kind, names in
                (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)) if names]
    if problems:
        raise DataError(f"{source} doesn't hold the network's weights: {'; '.join(problems)}. "
                        "Nothing was loaded: take the file that belongs to this network.")


def _listed(kind: str, names: list[str], *, most: int = 20) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {kind}: {', '.join(names[:most])}{rest}"
