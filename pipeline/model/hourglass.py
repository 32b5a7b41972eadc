"""Stacked Hourglass (Newell et al. 2016, arXiv 1603.06937), as its authors released it for PyTorch.

    images --pre--> 1/4 --hourglass 0--> features --> heatmaps 0
                     +-----------------------+-------------+--> 1/4 --hourglass 1--> ... --> heatmaps S-1
    Hourglass: halve, go down by the same again, come back up, add what was kept at this size. The next stack sees
    features and heatmaps of the one before, at 1/4 alone.

A module's name is its part of the state-dict key, and the keys are the authors': renaming one breaks every
published weight file. This file knows nothing of losses, devices, files or processes.
"""

from collections import OrderedDict
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from pipeline.model.network import NetworkConfig, PoseNetwork
from pipeline.model.settings import HourglassSettings

STEM_CHANNELS, PRE_CHANNELS = 64, 128  # at 1/2 and, before the first hourglass, at 1/4


class HourglassConfig(HourglassSettings, NetworkConfig):
    """Which Stacked Hourglass, for which joints."""


class StackedHourglass(PoseNetwork):
    """The whole network, initialised with PyTorch's defaults, as the authors' is.

    images    [B, 3, H, W], RGB from 0 to 1, H and W multiples of 4 · 2^depth (not only the configured size)
    heatmaps  [B, K, H/4, W/4], 0 to 1 where trained with the authors' targets
    """

    config: HourglassConfig

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__(config)
        width, stacks, merges = config.width, range(config.num_stacks), range(config.num_stacks - 1)
        self.pre = nn.Sequential(
            Conv(3, STEM_CHANNELS, 7, stride=2, bn_relu=True), Residual(STEM_CHANNELS, PRE_CHANNELS),
            nn.MaxPool2d(2), Residual(PRE_CHANNELS, PRE_CHANNELS), Residual(PRE_CHANNELS, width))
        self.hgs = nn.ModuleList(nn.Sequential(Hourglass(config.depth, width)) for _ in stacks)
        self.features = nn.ModuleList(nn.Sequential(Residual(width, width), Conv(width, width, 1, bn_relu=True))
                                      for _ in stacks)
        self.outs = nn.ModuleList(Conv(width, config.num_joints, 1) for _ in stacks)
        self.merge_features = nn.ModuleList(_merge(width, width) for _ in merges)
        self.merge_preds = nn.ModuleList(_merge(config.num_joints, width) for _ in merges)

    def forward(self, images: Tensor) -> list[list[Tensor]]:
        """All heatmaps, for training: each stack's, all [B, K, H/4, W/4]."""
        x, heatmaps = self.pre(images), []
        for stack, (hourglass, to_features, out) in enumerate(zip(self.hgs, self.features, self.outs, strict=True)):
            features = to_features(hourglass(x))
            heatmaps.append([out(features)])
            if stack < len(self.merge_preds):
                x = x + self.merge_preds[stack](heatmaps[-1][0]) + self.merge_features[stack](features)
        return heatmaps

    def predict(self, images: Tensor) -> Tensor:
        """The last stack's heatmaps [B, K, H/4, W/4]. They need all those before."""
        heatmaps: Tensor = self(images)[-1][-1]
        return heatmaps

    @property
    def heads(self) -> list[list[str]]:
        """Names of the modules that give out the heatmaps, in forward's order: one for each stack."""
        return [[f"outs.{stack}"] for stack in range(self.config.num_stacks)]

    def foldable(self) -> Iterator[tuple[str, str]]:
        """Names of each convolution and the batch norm that alone reads its output."""
        yield from super().foldable()
        for name, module in self.named_modules():
            if isinstance(module, Residual):
                yield from ((f"{name}.conv{index}.conv", f"{name}.bn{index + 1}") for index in (1, 2))

    def recomputed(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """Blocks whose activations may be computed again in the backward pass, and which of their methods."""
        return ((module, ("forward",)) for module in self.modules() if isinstance(module, Residual))


class Conv(nn.Module):
    """A convolution, padded so that only the stride changes the size; perhaps with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *,
                 stride: int = 1, bn_relu: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)
        self.bn = nn.BatchNorm2d(out_channels) if bn_relu else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> [B, out, h / stride, w / stride]."""
        x = self.conv(x)
        return x if self.bn is None else functional.relu(self.bn(x), inplace=True)


class Residual(nn.Module):
    """The pre-activation bottleneck (He et al. 2016, arXiv 1603.05027), half as wide inside."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        inner = out_channels // 2
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), Conv(in_channels, inner, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(inner), Conv(inner, inner, 3)
        self.bn3, self.conv3 = nn.BatchNorm2d(inner), Conv(inner, out_channels, 1)
        self.skip_layer = Conv(in_channels, out_channels, 1)
        self.projects = in_channels != out_channels
        # where it is idle it is still in the authors' files; without this, workers would wait for its gradient
        self.skip_layer.requires_grad_(self.projects)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> [B, out, h, w]."""
        inner = self.conv1(functional.relu(self.bn1(x), inplace=True))
        inner = self.conv2(functional.relu(self.bn2(inner), inplace=True))
        inner = self.conv3(functional.relu(self.bn3(inner), inplace=True))
        identity: Tensor = self.skip_layer(x) if self.projects else x
        y: Tensor = identity + inner
        return y


class Hourglass(nn.Module):
    """Halves `depth` times and comes back, adding at each size what a residual kept."""

    def __init__(self, depth: int, channels: int) -> None:
        super().__init__()
        self.up1 = Residual(channels, channels)
        self.low1 = Residual(channels, channels)
        self.low2 = Hourglass(depth - 1, channels) if depth > 1 else Residual(channels, channels)
        self.low3 = Residual(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] -> the same shape; h and w are multiples of 2^depth."""
        low = self.low3(self.low2(self.low1(functional.max_pool2d(x, 2))))
        kept: Tensor = self.up1(x)
        return kept + functional.interpolate(low, scale_factor=2, mode="nearest")


def _merge(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=Conv(in_channels, out_channels, 1)))
