"""From a person's box to the network's input, and joints back to the picture: the one definition for training
and inference. It knows boxes, matrices and pixels; not what a network does with them.

Pixel centres are at integers and half sizes are W/2, as the authors of MSPN have it (not "UDP"). Coordinates
are (x, y), sizes (width, height), in pixels and float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Region:
    """The upright rectangle of a picture that a crop shows: its centre and size, float64 [2], in pixels."""

    center_xy: Floats
    size_wh: Floats


@dataclass(frozen=True)
class CroppedPersons:
    """The persons of one picture as the network sees them.

    crops       uint8 [n, H, W, 3] BGR
    centers_xy  float64 [n, 2], sizes_wh float64 [n, 2]: the region of each crop, in picture pixels
    """

    crops: Pixels
    centers_xy: Floats
    sizes_wh: Floats


def crop_persons(image_bgr: Pixels, boxes_xywh: Floats, input_size_wh: tuple[int, int], *,
                 padding_wh: tuple[float, float]) -> CroppedPersons:
    """The crops of `boxes_xywh` float64 [n, 4] (picture pixels) from a uint8 [H, W, 3] picture."""
    regions = [region_for_box(box, input_size_wh, padding_wh=padding_wh) for box in boxes_xywh]
    crops = np.empty((len(regions), input_size_wh[1], input_size_wh[0], 3), np.uint8)
    for region, crop in zip(regions, crops, strict=True):
        crop_person(image_bgr, crop_matrix(region, input_size_wh), input_size_wh, into=crop)
    return CroppedPersons(crops, np.array([region.center_xy for region in regions]).reshape(-1, 2),
                          np.array([region.size_wh for region in regions]).reshape(-1, 2))


def region_for_box(
    box_xywh: Sequence[float] | Floats, input_size_wh: tuple[int, int], *, padding_wh: tuple[float, float]
) -> Region:
    """The region around a box: padded by a factor on each side length, then grown to the input's aspect.

    padding_wh is (1.09, 1.135) as the authors test, (1.25, 1.25) in MMPose. The box may leave the picture.
    A box that isn't finite, has a negative side, or no extent at all is refused with DataError.
    """
    x, y, width, height = (float(value) for value in box_xywh)
    if not np.isfinite([x, y, width, height]).all() or min(width, height) < 0 or max(width, height) <= 0:
        raise DataError(f"box (x, y, width, height) = {(x, y, width, height)} has no positive finite extent")
    padded = np.array([width * padding_wh[0], height * padding_wh[1]])
    return Region(np.array([x + width / 2, y + height / 2]), fit_aspect(padded, input_size_wh))


def fit_aspect(size_wh: Floats, input_size_wh: tuple[int, int]) -> Floats:
    """The smallest size with the input's aspect that holds size_wh [2]; one of its sides is unchanged."""
    width, height = size_wh
    aspect = input_size_wh[0] / input_size_wh[1]
    if width > aspect * height:
        return np.array([width, width / aspect])
    return np.array([aspect * height, height])


def crop_matrix(region: Region, input_size_wh: tuple[int, int], *, rotation_deg: float = 0.0) -> Floats:
    """The affine matrix [2, 3] that takes picture pixels to crop pixels.

    The region's centre lands on (W/2, H/2) and its width on W; a positive angle turns what is seen
    counter-clockwise. [kR | t] with k = W / width, R = [[cos, sin], [-sin, cos]].
    (The authors solve for it from three float32 points: up to 2.5e-3 px away for a box of 9 px, else 4e-5.)
    """
    scale = input_size_wh[0] / region.size_wh[0]
    angle = np.deg2rad(rotation_deg)
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    shift = np.array(input_size_wh) / 2 - turn @ region.center_xy
    return np.concatenate([turn, shift[:, None]], axis=1)


def crop_person(image_bgr: Pixels, matrix: Floats, input_size_wh: tuple[int, int], *,
                into: Pixels | None = None) -> Pixels:
    """The crop uint8 [H, W, 3] that the matrix [2, 3] cuts from a picture: bilinear, black outside of it.

    into  where to put it, contiguous uint8 [H, W, 3]
    """
    crop = cv2.warpAffine(image_bgr, matrix, input_size_wh, dst=into, flags=cv2.INTER_LINEAR)
    return np.asarray(crop, dtype=np.uint8)


def joints_to_crop(joints_xy: npt.NDArray[np.floating], matrix: Floats) -> Floats:
    """Where joints [..., 2] of the picture are in the crop that the matrix [2, 3] cuts; float64."""
    joints: Floats = np.asarray(joints_xy, dtype=np.float64) @ matrix[:, :2].T + matrix[:, 2]
    return joints


def joints_to_image(
    joints_xy: npt.NDArray[np.floating],
    centers_xy: npt.NDArray[np.floating],
    sizes_wh: npt.NDArray[np.floating],
    input_size_wh: tuple[int, int],
) -> Floats:
    """Where joints [N, K, 2] of upright crops are in their pictures, float64 [N, K, 2].

    centers_xy and sizes_wh [N, 2] are the crops' regions. Inverse of `joints_to_crop` without rotation.
    """
    sizes = np.asarray(sizes_wh, dtype=np.float64)[:, None]
    corners = np.asarray(centers_xy, dtype=np.float64)[:, None] - sizes / 2
    joints: Floats = np.asarray(joints_xy, dtype=np.float64) / np.array(input_size_wh) * sizes + corners
    return joints
