"""RSN, the residual steps network (Cai et al. 2020, arXiv 2003.04030): MSPN with another block in its trunks.

Nothing else differs, neither the way up, nor what stages hand over, nor loss, crop and decoding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model.mspn import MSPN, ConvBNReLU, MultiStageConfig
from pipeline.model.settings import RSNSettings

BRANCHES = 4
WIDTH_OF_64 = 26  # a branch has 26 channels for each 64 that its block takes


class RSNConfig(RSNSettings, MultiStageConfig):
    """Which RSN, for which joints."""

    expansion = 1


class RSN(MSPN):
    """MSPN's line of stages with residual steps blocks; arguments and answers as MSPN's."""

    @property
    def block(self) -> type[nn.Module]:
        """What the trunks are made of."""
        return ResidualSteps


class ResidualSteps(nn.Module):
    """Four branches of one to four 3×3 convolutions, each fed by its own one before and by the branch beside it.

    Branch i's output has seen i convolutions more than its input, so that one block mixes many sizes of what is seen.
    The stride is on the first 1×1 convolution; `projects` allows the identity to be one, where the shape changes.
    """

    def __init__(self, in_channels: int, width: int, *, stride: int, projects: bool) -> None:
        super().__init__()
        branch = in_channels * WIDTH_OF_64 // 64
        self.conv_bn_relu1 = ConvBNReLU(in_channels, BRANCHES * branch, 1, stride=stride)
        for row, column in _steps():
            self.add_module(_step_name(row, column), ConvBNReLU(branch, branch, 3))
        self.conv_bn_relu3 = ConvBNReLU(BRANCHES * branch, width, 1, relu=False)
        changes = projects and (stride != 1 or in_channels != width)
        self.downsample = ConvBNReLU(in_channels, width, 1, stride=stride, relu=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> [B, width, h / stride, w / stride]."""
        identity = x if self.downsample is None else self.downsample(x)
        parts = self.conv_bn_relu1(x).chunk(BRANCHES, dim=1)
        done: dict[tuple[int, int], Tensor] = {}
        for row, column in _steps():
            before = parts[row - 1] if column == 1 else done[row, column - 1]
            beside = done.get((row - 1, column))
            step = self.get_submodule(_step_name(row, column))
            done[row, column] = step(before if beside is None else before + beside)
        ends = torch.cat([done[row, row] for row in range(1, BRANCHES + 1)], dim=1)
        return functional.relu(self.conv_bn_relu3(ends) + identity)


def _steps() -> list[tuple[int, int]]:
    """(branch, convolution in it), from 1, in an order in which each follows what it is fed by."""
    return [(row, column) for row in range(1, BRANCHES + 1) for column in range(1, row + 1)]


def _step_name(row: int, column: int) -> str:
    return f"conv_bn_relu2_{row}_{column}"
