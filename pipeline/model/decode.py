"""From heatmaps to joints in crop pixels, for a whole batch on the device: the published ways.

A checkpoint's published accuracy was reached with its own way; the model directory says which.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.model.settings import Decoding
from pipeline.model.targets import PEAK, gaussian_taps

AROUND = 10  # cells of zeros that the authors put around a map before they blur it
QUARTER = 0.25  # of a cell, towards the second peak (Newell et al. 2016, sec. 3.1)
BASE_SCORE = 0.5  # the authors' joint score is 0.5 for an empty map, 1.5 for a full peak
SAME_PEAK = 1e-3  # cells: peaks nearer than this give no direction


def flip_average(heatmaps: Tensor, flipped: Tensor, flip_order: Sequence[int], *, shift: int = 0) -> Tensor:
    """The mean of a crop's heatmaps and its mirror image's, mirrored back.

    heatmaps, flipped  [B, K, h, w], half precision is averaged in float32
    flip_order         the permutation that gives left joints' maps to right ones (`Skeleton.flip_order`)
    shift              cells by which what was mirrored back goes to the right; the first columns stay as well
    """
    order = torch.tensor(flip_order, device=flipped.device)
    back = _at_least_float32(flipped).flip(-1)[:, order]
    if shift:
        back = torch.cat([back[..., :shift], back[..., :-shift]], dim=-1)
    return (_at_least_float32(heatmaps) + back) * 0.5


def decode_heatmaps(heatmaps: Tensor, input_size_wh: tuple[int, int], *,
                    decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Joints in crop pixels, and their scores.

    heatmaps  [B, K, h, w] float, the network's finest ones, or their flip average: 0 to 255, or 0 to 1 where the
              targets were such (hrnet, hourglass)
    Returns   joints_xy [B, K, 2] float32, scores [B, K] float32, both on the heatmaps' device.

    Computed in float64 whatever the heatmaps' type: the blur's taps are n/16 or n/256 (up to size 9), so
    that its sums are exact, cells that tie do so in any order of summation, and the first one in reading
    order wins, as for the authors. In float32 rounding would choose. (MMPose itself blurs in float32: where
    both neighbours of a peak tie, it may move a quarter cell and we don't.)
    """
    maps = heatmaps.double()
    cells, scores = VARIANTS[decoding.variant](maps, decoding.blur_kernel)
    stride = torch.tensor((input_size_wh[0] / maps.shape[3], input_size_wh[1] / maps.shape[2]),
                          dtype=maps.dtype, device=maps.device)
    return (cells * stride).float(), scores.float()


def _decode_official(maps: Tensor, blur_kernel: int) -> tuple[Tensor, Tensor]:
    """Corner-based cells [B, K, 2] and scores [B, K] as `get_results` of the authors' test.py.

    The second-highest cell gives the direction of the quarter offset. The score is the unblurred map's value
    at the refined place. Maps without a positive value end in the first corner, with the score from there.
    """
    height, width = maps.shape[2:]
    blurred = _blur(maps, blur_kernel)
    peak, index = _highest_xy(blurred, blur_kernel)
    blurred.flatten(2).scatter_(2, index[..., None], 0)
    away = _highest_xy(blurred, blur_kernel)[0] - peak
    distance = torch.linalg.vector_norm(away, dim=-1, keepdim=True)
    offset = torch.where(distance > SAME_PEAK, QUARTER * away / distance.clamp_min(SAME_PEAK), 0)
    last_cell = torch.tensor((width - 1, height - 1), dtype=maps.dtype, device=maps.device)
    cells = (peak + offset).clamp_min(0).minimum(last_cell)
    x, y = cells.round().long().unbind(dim=-1)  # half to even, as Python rounds
    values = maps.flatten(2).gather(2, (y * width + x)[..., None])[..., 0]
    return cells + 0.5, values / PEAK + BASE_SCORE


def _highest_xy(blurred: Tensor, blur_kernel: int) -> tuple[Tensor, Tensor]:
    """The map's cell [B, K, 2] of the highest value, and its index into the flattened blurred map [B, K].

    Without a positive value it is the first cell of the zeros around, which this spares itself to lay out.
    """
    index = blurred.flatten(2).argmax(dim=2)  # on ties the first in reading order
    value = blurred.flatten(2).gather(2, index[..., None])
    cells = _cells_xy(index, blurred.shape[3]).to(blurred.dtype) - blur_kernel // 2
    return torch.where(value > 0, cells, -AROUND), index


def _decode_mmpose(maps: Tensor, blur_kernel: int) -> tuple[Tensor, Tensor]:
    """Cells [B, K, 2] and scores [B, K] as MMPose's MegviiHeatmap codec.

    The signs of the central differences give a quarter offset in each axis, and half a cell goes on top, both
    for inner peaks alone: one in the outer cells stays at its cell's corner. The score is the unblurred
    maximum. Maps without a positive value get the cell (-1, -1).
    """
    height, width = maps.shape[2:]
    radius = blur_kernel // 2
    inside = _blur(maps, blur_kernel)[..., radius:radius + height, radius:radius + width]
    highest = inside.amax(dim=(2, 3), keepdim=True)
    # the map's own maximum again; where blurring leaves nothing, an empty map
    scale = torch.where(highest == 0, 0, maps.amax(dim=(2, 3), keepdim=True) / highest)
    blurred = (inside * scale).flatten(2)
    score, index = blurred.max(dim=2).values, blurred.argmax(dim=2)
    cells = _cells_xy(index, width).to(maps.dtype)
    x, y = cells.unbind(dim=-1)
    inner = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
    middle = torch.where(inner, index, width + 1)  # any cell with four neighbours, where the peak hasn't
    beside = torch.stack((middle + 1, middle - 1, middle + width, middle - width), dim=2)
    right, left, below, above = blurred.gather(2, beside).unbind(dim=2)
    offset = QUARTER * torch.stack((right - left, below - above), dim=-1).sign() + 0.5
    cells = cells + offset * inner[..., None]
    return torch.where((score > 0)[..., None], cells, -1), score / PEAK + BASE_SCORE


def _decode_hrnet(maps: Tensor, _: int) -> tuple[Tensor, Tensor]:
    """Cells [B, K, 2] and scores [B, K] as HRNet's `get_final_preds`.

    The signs of the central differences give a quarter offset, unless either coordinate is in the outer cells. The
    score is the maximum itself. Maps without a positive value get the cell (0, 0).
    """
    height, width = maps.shape[2:]
    score, index = maps.flatten(2).max(dim=2).values, maps.flatten(2).argmax(dim=2)
    cells = torch.where((score > 0)[..., None], _cells_xy(index, width), 0)
    x, y = cells.unbind(dim=-1)
    inner = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
    slopes = _slopes(maps, cells)
    return cells + QUARTER * slopes.sign() * inner[..., None], score


def _decode_hourglass(maps: Tensor, _: int) -> tuple[Tensor, Tensor]:
    """Cells [B, K, 2] and scores [B, K] as the hourglass's HeatmapParser, of maps cut off at 1.

    A quarter offset in each axis, to the right and down only where that neighbour is truly higher; at the border the
    cell itself is the neighbour. Half a cell on top. The score is the maximum. Maps without a positive value get the
    cell (0, 0) and a score of 0.
    """
    maps = maps.clamp_max(1)
    score, index = maps.flatten(2).max(dim=2).values, maps.flatten(2).argmax(dim=2)
    cells = _cells_xy(index, maps.shape[3])
    refined = cells + torch.where(_slopes(maps, cells) > 0, QUARTER, -QUARTER) + 0.5
    return torch.where((score > 0)[..., None], refined, 0), score.clamp_min(0)


def _slopes(maps: Tensor, cells: Tensor) -> Tensor:
    """[B, K, 2]: the right neighbour less the left, the lower less the upper; outside, the cell itself is one."""
    height, width = maps.shape[2:]
    x, y = cells.unbind(dim=-1)

    def values(x: Tensor, y: Tensor) -> Tensor:
        index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        return maps.flatten(2).gather(2, index[..., None])[..., 0]

    return torch.stack((values(x + 1, y) - values(x - 1, y), values(x, y + 1) - values(x, y - 1)), dim=-1)


VARIANTS: Final = {"official": _decode_official, "mmpose": _decode_mmpose, "hrnet": _decode_hrnet,
                   "hourglass": _decode_hourglass}


def _blur(maps: Tensor, kernel: int) -> Tensor:
    """Maps [B, K, h, w] blurred amid zeros: [B, K, h + kernel - 1, w + kernel - 1], all that isn't zero."""
    return _blur_columns(_blur_columns(maps, kernel).mT, kernel).mT.contiguous()


def _blur_columns(maps: Tensor, kernel: int) -> Tensor:
    padded = functional.pad(maps, (0, 0, kernel - 1, kernel - 1))
    height = maps.shape[2] + kernel - 1
    blurred = torch.zeros_like(padded[:, :, :height])
    for shift, tap in enumerate(gaussian_taps(kernel).tolist()):
        blurred.add_(padded[:, :, shift:shift + height], alpha=tap)
    return blurred


def _cells_xy(index: Tensor, width: int) -> Tensor:
    """Positions [..., 2] (x, y) of indices [...] into flattened rows of a width."""
    return torch.stack((index % width, index // width), dim=-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
