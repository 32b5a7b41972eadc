"""A network as docs/architectures.md asks for it: a plain ResNet with deconvolutions (Xiao et al. 2018, 1804.06208)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model.network import NetworkConfig, PoseNetwork
from pipeline.model.settings import BELOW, NetworkSettings, SizeWH
from pipeline.settings import Count


class SimpleSettings(NetworkSettings):
    """Which one."""

    architecture: Literal["simple"] = Field("simple", description=BELOW)
    input_size_wh: SizeWH = (192, 256)
    width: Count = 64


class SimpleConfig(SimpleSettings, NetworkConfig):
    """Which one, for which joints."""


class SimpleBaseline(PoseNetwork):
    """Down to 1/32 by blocks, back up to 1/4 by three deconvolutions; one head."""

    def __init__(self, config: SimpleConfig) -> None:
        super().__init__(config)
        width = config.width
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, stride=4, padding=3, bias=False), nn.BatchNorm2d(width)
        self.layers = nn.Sequential(*(Block(width) for _ in range(3)))
        self.deconv_layers = nn.Sequential(*(layer for _ in range(3) for layer in (
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())))
        self.final_layer = nn.Conv2d(width, config.num_joints, 1)

    def forward(self, images: Tensor) -> list[list[Tensor]]:
        """One stage with one head."""
        return [[self.predict(images)]]

    def predict(self, images: Tensor) -> Tensor:
        """The heatmaps [B, K, H/4, W/4]."""
        x = functional.relu(self.bn1(self.conv1(images)))
        heatmaps: Tensor = self.final_layer(self.deconv_layers(self.layers(x)))
        return heatmaps

    @property
    def heads(self) -> list[list[str]]:
        """The last convolution."""
        return [["final_layer"]]

    def recomputed(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """The blocks."""
        return ((module, ("forward",)) for module in self.layers)


class Block(nn.Module):
    """Halves; the identity is halved by its mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, h, w] -> [B, width, h/2, w/2]."""
        inner = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(inner + functional.avg_pool2d(x, 2))
