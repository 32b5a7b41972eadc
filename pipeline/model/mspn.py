"""MSPN, the multi-stage pose network (Li et al. 2019, arXiv 1901.00148), as its authors released it.

    images --Stem--> 1/4 --Stage 0--> --Stage 1--> ... --Stage S-1--> heatmaps
    Stage: a ResNet-50 trunk goes down to 1/32, four units come back up to 1/4; each unit has a heatmap head.
    Between stages: the finest features, and two skips for each resolution, added to the next trunk's layers.

A module's name is its part of the state-dict key, and the keys are the authors': renaming one breaks every
published weight file. This file knows nothing of losses, devices, files or processes.
"""

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model.network import NetworkConfig, PoseNetwork, check_tensors
from pipeline.model.settings import MSPNSettings, MultiStageSettings

EXPANSION = 4  # a bottleneck gives out four times its width (He et al. 2016)

Skips = list[tuple[Tensor, Tensor]]  # two for each of a trunk's layers, fine to coarse


class MultiStageConfig(MultiStageSettings, NetworkConfig):
    """What `MSPN` is built from, and RSN."""

    expansion: ClassVar[int]

    @property
    def trunk_channels(self) -> tuple[int, ...]:
        """Channels that the trunk's four layers give out, fine to coarse; MSPN's: 256, 512, 1024, 2048."""
        return tuple(width * self.expansion for width in self.widths)


class MSPNConfig(MSPNSettings, MultiStageConfig):
    """Which MSPN, for which joints."""

    expansion = EXPANSION


class MSPN(PoseNetwork):
    """The whole network, freshly initialised as the authors do.

    images    [B, 3, H, W] normalised, H and W multiples of 32 (not only the configured size)
    heatmaps  [B, K, H/4, W/4], 0 to 255 where trained with the authors' targets
    """

    config: MultiStageConfig

    def __init__(self, config: MultiStageConfig) -> None:
        super().__init__(config)
        self.top = Stem(config)
        for index in range(config.num_stages):
            stage = Stage(config, self.block, is_last=index == config.num_stages - 1)
            self.add_module(f"stage{index}", stage)
        initialise(self)

    @property
    def block(self) -> type[nn.Module]:
        """What the trunks are made of."""
        return Bottleneck

    @property
    def stages(self) -> list["Stage"]:
        """The stages in order. (Their keys are stage0, stage1, ..., which a ModuleList can't give.)"""
        return [module for module in self.children() if isinstance(module, Stage)]

    def forward(self, images: Tensor) -> list[list[Tensor]]:
        """All heatmaps, for training: of each stage its four units', coarse to fine, all [B, K, H/4, W/4]."""
        x, skips, heatmaps = self.top(images), None, []
        for stage in self.stages:
            features, merged = stage(x, skips)
            heatmaps.append(stage.upsample.heatmaps(merged))
            if not stage.is_last:
                x, skips = stage.upsample.hand_over(features, merged)
        return heatmaps

    def predict(self, images: Tensor) -> Tensor:
        """The last stage's finest heatmaps [B, K, H/4, W/4]; none of the other 4S - 1 heads is computed."""
        x, skips = self.top(images), None
        for stage in self.stages[:-1]:
            x, skips = stage.upsample.hand_over(*stage(x, skips))
        _, merged = self.stages[-1](x, skips)
        return self.stages[-1].upsample.up4.heatmap(merged[-1])

    @property
    def heads(self) -> list[list[str]]:
        """Each unit's last convolution with its batch norm."""
        return [[f"stage{stage}.upsample.up{unit}.res_conv2" for unit in (1, 2, 3, 4)]
                for stage in range(self.config.num_stages)]

    def recomputed(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """The stem, the trunks' blocks, and the units' ways up, out and over."""
        for module in self.modules():
            if isinstance(module, Stem | self.block):
                yield module, ("forward",)
            if isinstance(module, UpsampleUnit):
                yield module, ("forward", "heatmap", "skips")


class Stage(nn.Module):
    """Down to 1/32 and back up to 1/4. All but the last also hand features over to the next."""

    def __init__(self, config: MultiStageConfig, block: type[nn.Module], *, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self.downsample = Downsample(config, block)
        self.upsample = Upsample(config, is_last_stage=is_last)

    def forward(self, x: Tensor, skips: Skips | None) -> tuple[list[Tensor], list[Tensor]]:
        """The trunk's four features, fine to coarse, and the upsample units' four, coarse to fine."""
        features = self.downsample(x, skips)
        return features, self.upsample(features)


class ConvBNReLU(nn.Module):
    """Convolution, batch norm and (usually) ReLU; padded so that only the stride changes the size.

    The convolution has a bias though batch norm makes it idle: the authors' files hold one.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *,
                 stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> [B, out, h / stride, w / stride]."""
        x = self.bn(self.conv(x))
        return functional.relu(x, inplace=True) if self.relu else x


class Stem(nn.Module):
    """The first quartering, once for the whole network: [B, 3, H, W] -> [B, stem, H/4, W/4]."""

    def __init__(self, config: MultiStageConfig) -> None:
        super().__init__()
        self.conv = ConvBNReLU(3, config.stem_channels, 7, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        """As ResNet begins: a 7×7 convolution and a 3×3 maximum, stride 2 each."""
        return functional.max_pool2d(self.conv(images), 3, stride=2, padding=1)


class Bottleneck(nn.Module):
    """ResNet's bottleneck with the stride on the 3×3; `projects` where its input has another shape."""

    def __init__(self, in_channels: int, width: int, *, stride: int, projects: bool) -> None:
        super().__init__()
        out_channels = width * EXPANSION
        self.conv_bn_relu1 = ConvBNReLU(in_channels, width, 1)
        self.conv_bn_relu2 = ConvBNReLU(width, width, 3, stride=stride)
        self.conv_bn_relu3 = ConvBNReLU(width, out_channels, 1, relu=False)
        projection = ConvBNReLU(in_channels, out_channels, 1, stride=stride, relu=False) if projects else None
        self.downsample = projection

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> [B, 4 width, h / stride, w / stride]."""
        identity = x if self.downsample is None else self.downsample(x)
        return functional.relu(self.conv_bn_relu3(self.conv_bn_relu2(self.conv_bn_relu1(x))) + identity)


class Downsample(nn.Module):
    """ResNet-50's four layers (by default), which also take the previous stage's skips."""

    def __init__(self, config: MultiStageConfig, block: type[nn.Module]) -> None:
        super().__init__()
        channels = (config.stem_channels, *config.trunk_channels)
        for index, (num_blocks, width) in enumerate(zip(config.blocks, config.widths, strict=True)):
            first = block(channels[index], width, stride=1 if index == 0 else 2, projects=True)
            rest = [block(channels[index + 1], width, stride=1, projects=False) for _ in range(num_blocks - 1)]
            self.add_module(f"layer{index + 1}", nn.Sequential(first, *rest))

    def forward(self, x: Tensor, skips: Skips | None) -> list[Tensor]:
        """Features of strides 4, 8, 16 and 32. The sum with the skips is what the next layer takes."""
        features = []
        for index, layer in enumerate(self.children()):
            x = layer(x)
            if skips is not None:
                skip1, skip2 = skips[index]
                x = x + skip1 + skip2  # after the layer's last ReLU, and without another one
            features.append(x)
        return features


class UpsampleUnit(nn.Module):
    """One resolution on the way up: merges the coarser unit's output into the trunk's feature; has a head."""

    def __init__(self, level: int, config: MultiStageConfig, *, is_last_stage: bool) -> None:
        super().__init__()
        channels, in_channels = config.upsample_channels, config.trunk_channels[4 - level]
        self.u_skip = ConvBNReLU(in_channels, channels, 1, relu=False)
        if level > 1:
            self.up_conv = ConvBNReLU(channels, channels, 1, relu=False)
        if not is_last_stage:
            self.skip1 = ConvBNReLU(in_channels, in_channels, 1)
            self.skip2 = ConvBNReLU(channels, in_channels, 1)
        if not is_last_stage and level == 4:
            self.cross_conv = ConvBNReLU(channels, config.stem_channels, 1)
        self.res_conv1 = ConvBNReLU(channels, channels, 1)
        self.res_conv2 = ConvBNReLU(channels, config.num_joints, 3, relu=False)

    def forward(self, feature: Tensor, coarser: Tensor | None) -> Tensor:
        """The trunk's feature [B, in, h, w] and the coarser unit's output merged: [B, channels, h, w]."""
        merged = self.u_skip(feature)
        if coarser is not None:
            # to the feature's own size, so that an input of any size works
            merged = merged + self.up_conv(_resized(coarser, merged))
        return functional.relu(merged)

    def heatmap(self, merged: Tensor) -> Tensor:
        """The head: [B, channels, h, w] -> [B, K, h, w]. There is a batch norm on the heatmaps themselves."""
        heatmap: Tensor = self.res_conv2(self.res_conv1(merged))
        return heatmap

    def skips(self, feature: Tensor, merged: Tensor) -> tuple[Tensor, Tensor]:
        """What the next stage's layer of this resolution adds: two [B, in, h, w]."""
        return self.skip1(feature), self.skip2(merged)


class Upsample(nn.Module):
    """The four units on the way up: up1 at 1/32, up2, up3, and up4 at 1/4."""

    def __init__(self, config: MultiStageConfig, *, is_last_stage: bool) -> None:
        super().__init__()
        self.up1 = UpsampleUnit(1, config, is_last_stage=is_last_stage)
        self.up2 = UpsampleUnit(2, config, is_last_stage=is_last_stage)
        self.up3 = UpsampleUnit(3, config, is_last_stage=is_last_stage)
        self.up4 = UpsampleUnit(4, config, is_last_stage=is_last_stage)

    @property
    def units(self) -> tuple[UpsampleUnit, ...]:
        """up1 to up4, coarse to fine."""
        return self.up1, self.up2, self.up3, self.up4

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The trunk's features (fine to coarse) merged upwards: four [B, channels, h, w], coarse to fine."""
        merged: list[Tensor] = []
        for unit, feature in zip(self.units, reversed(features), strict=True):
            merged.append(unit(feature, merged[-1] if merged else None))
        return merged

    def heatmaps(self, merged: list[Tensor]) -> list[Tensor]:
        """Each unit's heatmaps at the finest unit's size: four [B, K, H/4, W/4], coarse to fine."""
        return [_resized(unit.heatmap(x), merged[-1]) for unit, x in zip(self.units, merged, strict=True)]

    def hand_over(self, features: list[Tensor], merged: list[Tensor]) -> tuple[Tensor, Skips]:
        """The next stage's input [B, stem, H/4, W/4] and its skips, fine to coarse."""
        skips = [unit.skips(feature, x) for unit, feature, x
                 in zip(reversed(self.units), features, reversed(merged), strict=True)]
        return self.up4.cross_conv(merged[-1]), skips


def _resized(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return functional.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


def initialise(network: MSPN) -> None:
    """Draw all weights anew from torch's global generator, as the authors do.

    The trunks' convolutions: normal, variance 2 / (k² · out) (He et al. 2015, fan-out). All others, and all
    biases of convolutions: PyTorch's defaults. Batch norms: weight 1, bias 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.reset_parameters()
    for stage in network.stages:
        for module in stage.downsample.modules():
            # on the meta device, where files are loaded from, torch takes 3 s to learn normal numbers: none there
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def load_trunk(network: MSPN, resnet50_state_dict: Mapping[str, Tensor], *, colour: str = "BGR") -> None:
    """Begin the stem and every stage's trunk from an ImageNet classifier with torchvision's key names.

    colour  channel order of the network's input; torchvision's is RGB, so "BGR" mirrors the first convolution
    The convolutions' biases, of which ResNet has none, become 0, and the classifier (`fc.`) is left out. Any
    other key that is missing, left over or of another shape is refused with DataError (so a trunk that isn't
    a ResNet-50's is, too); only batch norms' counters, which old files lack, may be absent.
    """
    assert colour in ("BGR", "RGB"), colour
    found = {name: tensor for name, tensor in resnet50_state_dict.items() if not name.startswith("fc.")}
    trunk = {key: tensor for key, tensor in network.state_dict().items()
             if key.startswith("top.") or ".downsample.layer" in key}
    names = {key: _torchvision_name(key) for key in trunk if not key.endswith("conv.bias")}
    # counters came with PyTorch 0.4.1; the averages don't depend on them
    counters = {name for name in names.values() if name.endswith("num_batches_tracked")}
    expected = {name: trunk[key] for key, name in names.items() if name in found or name not in counters}
    check_tensors(found, expected, source="the ResNet-50 state dict")
    with torch.no_grad():
        for key, tensor in trunk.items():
            value = found.get(names.get(key, ""), torch.zeros_like(tensor))
            tensor.copy_(value.flip(1) if key == "top.conv.conv.weight" and colour == "BGR" else value)


def _torchvision_name(key: str) -> str:
    """`layer1.0.bn2.bias` for `stage1.downsample.layer1.0.conv_bn_relu2.bn.bias`, and so on."""
    name = re.sub(r"^stage\d+\.downsample\.", "", key)
    name = re.sub(r"^top\.conv\.(conv|bn)\.", r"\g<1>1.", name)
    name = re.sub(r"conv_bn_relu(\d)\.(conv|bn)\.", r"\2\1.", name)
    return name.replace("downsample.conv.", "downsample.0.").replace("downsample.bn.", "downsample.1.")
