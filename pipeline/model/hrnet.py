"""HRNet, the high-resolution network (Sun et al. 2019, arXiv 1902.09212), as its authors released it.

    images --stem--> 1/4 --layer1--> 1/4 --stage2--> 1/4, 1/8 --stage3--> ..., 1/16 --stage4--> ..., 1/32
    Resolutions are kept, not recovered: each is a branch, they run side by side, and each module's end gives every
    branch the sum of all. A stage begins with one branch more; the last module keeps the finest alone.

A module's name is its part of the state-dict key, and the keys are the authors': renaming one breaks every
published weight file. This file knows nothing of losses, devices, files or processes.
"""

import re
from collections.abc import Iterator, Mapping
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model.network import NetworkConfig, PoseNetwork, check_tensors
from pipeline.model.settings import HRNetSettings

EXPANSION = 4  # a bottleneck gives out four times its width (He et al. 2016)


class HRNetConfig(HRNetSettings, NetworkConfig):
    """Which HRNet, for which joints."""

    def channels(self, num_branches: int) -> list[int]:
        """Channels of the branches, fine to coarse: 32, 64, 128, 256."""
        return [self.width * 2 ** branch for branch in range(num_branches)]


class HRNet(PoseNetwork):
    """The whole network, freshly initialised as the authors do.

    images    [B, 3, H, W] normalised, H and W multiples of 32 (not only the configured size)
    heatmaps  [B, K, H/4, W/4], 0 to 1 where trained with the authors' targets
    """

    config: HRNetConfig

    def __init__(self, config: HRNetConfig) -> None:
        super().__init__(config)
        stem, (one, two, three, four) = config.stem_channels, (config.channels(count) for count in range(1, 5))
        self.conv1, self.bn1 = _conv(3, stem, 3, stride=2), nn.BatchNorm2d(stem)
        self.conv2, self.bn2 = _conv(stem, stem, 3, stride=2), nn.BatchNorm2d(stem)
        self.layer1 = nn.Sequential(*(Bottleneck(stem if index == 0 else stem * EXPANSION, stem)
                                      for index in range(config.bottlenecks)))
        self.transition1 = _transition([stem * EXPANSION], two)
        self.stage2 = _stage(two, config.modules[0], config.blocks, num_outputs=2)
        self.transition2 = _transition(two, three)
        self.stage3 = _stage(three, config.modules[1], config.blocks, num_outputs=3)
        self.transition3 = _transition(three, four)
        self.stage4 = _stage(four, config.modules[2], config.blocks, num_outputs=1)
        self.final_layer = nn.Conv2d(one[0], config.num_joints, 1)
        initialise(self)

    def forward(self, images: Tensor) -> list[list[Tensor]]:
        """All heatmaps, for training. There is one stage with one head: [[heatmaps [B, K, H/4, W/4]]]."""
        return [[self.predict(images)]]

    def predict(self, images: Tensor) -> Tensor:
        """The heatmaps [B, K, H/4, W/4]."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        x = functional.relu(self.bn2(self.conv2(x)), inplace=True)
        features = [self.layer1(x)]
        for transition, stage in ((self.transition1, self.stage2), (self.transition2, self.stage3),
                                  (self.transition3, self.stage4)):
            # a new branch begins from the coarsest of before
            features = stage([step(features[min(branch, len(features) - 1)]) for branch, step in enumerate(transition)])
        heatmaps: Tensor = self.final_layer(features[0])
        return heatmaps

    @property
    def heads(self) -> list[list[str]]:
        """Names of the modules that give out the heatmaps, in forward's order: the last convolution alone."""
        return [["final_layer"]]

    def recomputed(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """Blocks whose activations may be computed again in the backward pass, and which of their methods."""
        return ((module, ("forward",)) for module in self.modules() if isinstance(module, BasicBlock | Bottleneck))


class Bottleneck(nn.Module):
    """ResNet's bottleneck; projects its input where that has another number of channels."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        out_channels = width * EXPANSION
        self.conv1, self.bn1 = _conv(in_channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, out_channels, 1), nn.BatchNorm2d(out_channels)
        projects = in_channels != out_channels
        self.downsample = _conv_bn(in_channels, out_channels, 1, relu=False) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> [B, 4 width, h, w]."""
        inner = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        inner = functional.relu(self.bn2(self.conv2(inner)), inplace=True)
        identity = x if self.downsample is None else self.downsample(x)
        return functional.relu(self.bn3(self.conv3(inner)) + identity)


class BasicBlock(nn.Module):
    """ResNet's block of two 3×3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, channels, 3), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] -> the same shape."""
        inner = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(inner)) + x)


class HighResolutionModule(nn.Module):
    """The branches side by side, each on its own resolution, and then each output as the sum of all of them."""

    def __init__(self, channels: list[int], num_blocks: int, *, num_outputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(width) for _ in range(num_blocks)))
                                      for width in channels)
        self.fuse_layers = nn.ModuleList(nn.ModuleList(_resample(channels, source, target)
                                                       for source in range(len(channels)))
                                         for target in range(num_outputs))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Features [B, c, h, w] of the branches, fine to coarse -> as many of the same shapes as there are outputs."""
        features = [branch(x) for branch, x in zip(self.branches, features, strict=True)]
        return [functional.relu(reduce(torch.add, map(_call, layers.children(), features)))
                for layers in self.fuse_layers]


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def _resample(channels: list[int], source: int, target: int) -> nn.Module:
    """One branch's features in another's shape: smaller by 3×3 convolutions of stride 2, larger by repetition."""
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(*_conv_bn(channels[source], channels[target], 1, relu=False),
                             nn.Upsample(scale_factor=2 ** (source - target), mode="nearest"))
    halvings = [_conv_bn(channels[source], channels[source], 3, stride=2) for _ in range(target - source - 1)]
    return nn.Sequential(*halvings, _conv_bn(channels[source], channels[target], 3, stride=2, relu=False))


def _stage(channels: list[int], num_modules: int, num_blocks: int, *, num_outputs: int) -> nn.Sequential:
    """Modules one after the other; only the last may give out fewer branches than it takes."""
    return nn.Sequential(*(HighResolutionModule(channels, num_blocks, num_outputs=len(channels))
                           for _ in range(num_modules - 1)),
                         HighResolutionModule(channels, num_blocks, num_outputs=num_outputs))


def _transition(before: list[int], after: list[int]) -> nn.ModuleList:
    """Each branch's way into a stage: as it is, or by a convolution to its channels; the last, new one by stride 2."""
    kept = [nn.Identity() if old == new else _conv_bn(old, new, 3) for old, new in zip(before, after, strict=False)]
    return nn.ModuleList([*kept, nn.Sequential(_conv_bn(before[-1], after[-1], 3, stride=2))])


def _conv(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)


def _conv_bn(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, relu: bool = True) -> nn.Sequential:
    layers = (_conv(in_channels, out_channels, kernel, stride=stride), nn.BatchNorm2d(out_channels))
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


def initialise(network: HRNet) -> None:
    """Draw all weights anew from torch's global generator, as the authors do.

    Convolutions: normal, standard deviation 0.001, bias 0. Batch norms: weight 1, bias 0.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        # on the meta device, where files are loaded from, torch takes 3 s to learn normal numbers: none there
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=0.001)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def load_trunk(network: HRNet, state_dict: Mapping[str, Tensor], *, colour: str = "RGB") -> None:
    """Begin everything but the head from the authors' ImageNet classifier (`hrnet_w32-36af842e.pth`, and W48's).

    colour  channel order of the network's input; the classifier's is RGB, so "BGR" mirrors the first convolution
    What the classifier alone has is left out: its heads, and the coarser outputs of its last module. Any other entry
    that is missing, left over or of another shape is refused with DataError; only batch norms' counters may be absent.
    """
    assert colour in ("BGR", "RGB"), colour
    ours = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("final_layer.")}
    last = len(network.stage4) - 1
    heads = re.compile(rf"(incre_modules|downsamp_modules|final_layer|classifier|stage4\.{last}\.fuse_layers\.[123])\.")
    found = {name: tensor for name, tensor in state_dict.items() if not heads.match(name)}
    expected = {name: tensor for name, tensor in ours.items()
                if name in found or not name.endswith("num_batches_tracked")}
    check_tensors(found, expected, source="the HRNet classifier's state dict")
    with torch.no_grad():
        for name in expected:
            ours[name].copy_(found[name].flip(1) if name == "conv1.weight" and colour == "BGR" else found[name])
