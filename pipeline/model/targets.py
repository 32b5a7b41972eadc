"""The maps that the heads learn: a Gaussian around each joint, in five widths, drawn where the network is.

A drawn sample is a megabyte, its joints are some hundred bytes: joints travel, maps are drawn on the device.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.model.settings import GaussianLoss, TargetPeak

KERNELS = (15, 11, 9, 7, 5)  # the authors' blur sizes in cells, wide to narrow
PEAK = 255.0
STRIDE = 4  # input pixels for each cell of a heatmap

# OpenCV's own tables for small kernels. Its formula, used from 11 on, would give other numbers.
FIXED_TAPS = {
    1: (1,),
    3: (1, 2, 1),
    5: (1, 4, 6, 4, 1),
    7: (8, 28, 56, 72, 56, 28, 8),
    9: (4, 13, 30, 51, 60, 51, 30, 13, 4),
}


def draw_targets(joints_xy: Tensor, visible: Tensor, input_size_wh: tuple[int, int], *,
                 peak: TargetPeak = "maximum") -> Tensor:
    """The targets [B, 5, K, H/4, W/4] float32 on the joints' device, one for each of KERNELS; 0 to 255.

    joints_xy  [B, K, 2] in input pixels
    visible    [B, K]: a joint of 0 or -1 gets an empty map, and so does one outside of the input
    peak       what is 255: "maximum", the map's highest cell, as the authors have it; "joint", the joint's own cell,
               as MMPose has it, and then up to 333 beside it, where the border mirrors the blur

    A 1 in the joint's cell (its pixel / 4, cut off), blurred as OpenCV's GaussianBlur does with its default
    border (reflect-101), scaled to its peak of 255. Blur and border act on rows and on
    columns by themselves: each map is the outer product of two looked-up rows; no loop, no convolution.
    """
    width, height = input_size_wh[0] // STRIDE, input_size_wh[1] // STRIDE
    cells = (joints_xy / STRIDE).floor().long()
    size = torch.tensor((width, height), device=cells.device)
    drawn = (visible >= 1) & ((cells >= 0) & (cells < size)).all(dim=-1)
    x, y = cells.clamp_min(0).minimum(size - 1).unbind(dim=-1)
    across = _profiles(width, peak, joints_xy.device)[:, x].transpose(0, 1)  # [B, 5, K, w]
    down = _profiles(height, peak, joints_xy.device)[:, y].transpose(0, 1)
    down = down * (PEAK * drawn)[:, None, :, None]
    return down[..., :, None] * across[..., None, :]


def draw_gaussians(joints_xy: Tensor, visible: Tensor, input_size_wh: tuple[int, int],
                   shape: GaussianLoss) -> tuple[Tensor, Tensor]:
    """One target for all heads [B, K, H/4, W/4] float32, 0 to 1, and which joints take part in the loss [B, K].

    joints_xy  [B, K, 2] in input pixels, also outside of the input
    visible    [B, K]: a joint of 1 or 2 is drawn; one of -1 never takes part
    shape      how wide, around which cell (a position in the map is the pixel / 4), and what of unlabelled joints:
               "ignore": they take no part, nor do those whose Gaussian is wholly outside (HRNet's `generate_target`;
               by one cell at the upper and left border it takes part, with an empty map)
               "empty": they learn an empty map, as do those whose own cell is outside (the hourglass's)
    """
    size = torch.tensor([side // STRIDE for side in input_size_wh], device=joints_xy.device)
    places = joints_xy / STRIDE
    cells = (places + 0.5 if shape.center == "nearest" else places).long()  # towards 0, as theirs do
    low, high = (-shape.radius - 1, shape.radius) if shape.unlabelled == "ignore" else (0, 0)
    drawn = (visible >= 1) & ((cells >= low) & (cells < size + high)).all(dim=-1)
    across, down = (_gaussian_profiles(cells[..., axis], int(size[axis]), shape) for axis in (0, 1))
    maps = (down * drawn[..., None])[..., :, None] * across[..., None, :]
    return maps, drawn if shape.unlabelled == "ignore" else visible >= 0


def _gaussian_profiles(cells: Tensor, length: int, shape: GaussianLoss) -> Tensor:
    """[B, K, length] float32: a Gaussian of peak 1 around each cell [B, K], 0 from `radius` on."""
    away = torch.arange(length, device=cells.device) - cells[..., None]
    return (-away.square() / (2 * shape.sigma**2)).exp() * (away.abs() <= shape.radius)


def gaussian_taps(kernel: int) -> npt.NDArray[np.float64]:
    """OpenCV's Gaussian of an odd size and sigma 0 (chosen by size), float64 [kernel], sum 1."""
    assert kernel % 2 == 1, kernel
    sigma = 0.3 * ((kernel - 1) / 2 - 1) + 0.8
    around = np.arange(-(kernel // 2), kernel // 2 + 1)
    taps = np.array(FIXED_TAPS.get(kernel, np.exp(-(around**2) / (2 * sigma**2))), dtype=np.float64)
    return np.asarray(taps / taps.sum())


@lru_cache(maxsize=32)
def _profiles(length: int, peak: TargetPeak, device: torch.device) -> Tensor:
    """[5, length, length] float32: row c is a blurred 1 in cell c, its highest value (or that in cell c) 1."""
    profiles = np.stack([_blurred_deltas(length, kernel) for kernel in KERNELS])
    joints_own = profiles.diagonal(axis1=1, axis2=2)[..., None]
    profiles = profiles / (joints_own if peak == "joint" else profiles.max(axis=-1, keepdims=True))
    with torch.inference_mode(mode=False):  # it is kept, and may be asked for next by training
        return torch.from_numpy(profiles.astype(np.float32)).to(device)


def _blurred_deltas(length: int, kernel: int) -> npt.NDArray[np.float64]:
    """Row c: what blurring leaves of a 1 in cell c of a row of zeros."""
    cells = np.arange(length)
    blurred = np.zeros((length, length))
    for shift, tap in enumerate(gaussian_taps(kernel), start=-(kernel // 2)):
        blurred[_reflected(cells + shift, length), cells] += tap
    return blurred


def _reflected(index: npt.NDArray[np.int_], length: int) -> npt.NDArray[np.int_]:
    """reflect-101: -1 is cell 1, `length` is cell length - 2, and on from wall to wall."""
    period = max(2 * (length - 1), 1)
    index = index % period
    return np.minimum(index, period - index) if length > 1 else index
