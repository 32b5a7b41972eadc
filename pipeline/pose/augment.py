"""One training sample from one annotated person: the region, what chance does to it, the crop and its joints.

All chance comes from thirteen uniform numbers drawn at once from the sample's own generator, so a sample depends
on (seed, epoch, annotation id) alone: not on the worker, the order, or what became of the sample before it.
"""

from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.pose.crop import (
    Floats,
    Pixels,
    Region,
    crop_matrix,
    crop_person,
    fit_aspect,
    joints_to_crop,
    region_for_box,
)
from pipeline.pose.skeleton import Skeleton

LEAST_CHANCE = 2.0**-54  # half the smallest step of a drawn number, in place of 0: no normal number belongs to that


@dataclass(frozen=True)
class Augmentation:
    """What chance does to a sample. The defaults are the authors' for COCO (their config and JointsDataset).

    base_scale              factor on both sides of the box, instead of the padding at test time
    extend_wh               each side grows by up to this share of itself, uniformly
    center_jitter           the box's centre moves by up to this share of the box's sides, uniformly in both
                            directions, with center_jitter_probability (MMPose's)
    half_body_probability   of showing only the upper or lower joints, where half_body_min_joints are labelled
    half_body_upper         ids of the upper joints; None: the skeleton's own
    upper_body_probability  of preferring the upper ones; theirs, and MMPose's, is P(normal < 0.5)
    half_body_taken_from    a half is taken if it has so many labelled joints
    half_body_needs         with fewer in either there is no half body
    half_body_center        the middle of the chosen joints' "extent", or their "mean" (MMPose's)
    half_body_scale         factor on both sides of the chosen joints' extent
    half_body_extend_wh     as extend_wh, of that extent
    scale_range             factor on the region, uniform; theirs is 0.8 times (0.75, 1.25)
    scale_sigma             instead of uniform: normal about the middle of scale_range, cut off at its ends (MMPose's)
    rotation_deg            the largest angle, uniform in both directions, with rotation_probability
    rotation_sigma_deg      instead of uniform: normal about 0, cut off at rotation_deg (MMPose's)
    flip_probability        of mirroring
    """

    base_scale: float = 1.05
    extend_wh: tuple[float, float] = (0.6, 0.8)
    center_jitter: float = 0.0
    center_jitter_probability: float = 0.0
    half_body_probability: float = 0.3
    half_body_min_joints: int = 4
    half_body_upper: tuple[int, ...] | None = None
    upper_body_probability: float = 0.6915
    half_body_taken_from: int = 4
    half_body_needs: int = 3
    half_body_center: Literal["extent", "mean"] = "extent"
    half_body_scale: float = 1.0
    half_body_extend_wh: tuple[float, float] = (0.6, 0.8)
    scale_range: tuple[float, float] = (0.6, 1.0)
    scale_sigma: float | None = None
    rotation_deg: float = 45.0
    rotation_sigma_deg: float | None = None
    rotation_probability: float = 0.5
    flip_probability: float = 0.5


@dataclass(frozen=True)
class Draws:
    """The uniform numbers in [0, 1) that decide a sample, in the order in which they are drawn.

    A new one goes to the end: all samples of older programs stay what they were.
    """

    width: float
    height: float
    half_body: float
    upper_body: float
    half_width: float
    half_height: float
    scale: float
    rotate: float
    angle: float
    flip: float
    jitter: float
    jitter_x: float
    jitter_y: float


@dataclass(frozen=True)
class TrainingSample:
    """A person as the network trains on it.

    crop       uint8 [H, W, 3] BGR
    joints_xy  float32 [K, 2] in crop pixels, zero where visible is 0
    visible    int8 [K]: -1 a joint that the data don't have, 0 not labelled or outside of the crop (and its margin, if
               there is one), 1 occluded, 2 visible
    """

    crop: Pixels
    joints_xy: npt.NDArray[np.float32]
    visible: npt.NDArray[np.int8]


def sample_generator(seed: int, epoch: int, annotation_id: int) -> np.random.Generator:
    """The generator of one sample: the same on any machine, another for another seed, epoch or annotation."""
    return seeded_generator(seed, epoch, annotation_id)


def seeded_generator(*numbers: int) -> np.random.Generator:
    """The generator that some 64-bit numbers stand for: the same on any machine, another for any other numbers."""
    # Two words for each number: seeds of varying length could coincide.
    words = np.array(numbers, dtype="<i8").view("<u4")
    return np.random.default_rng(np.random.SeedSequence(words.tolist()))


def training_sample(
    image_bgr: Pixels,
    box_xywh: tuple[float, float, float, float] | Floats,
    keypoints: Floats,
    *,
    skeleton: Skeleton,
    input_size_wh: tuple[int, int],
    augmentation: Augmentation | None,
    padding_wh: tuple[float, float],
    generator: np.random.Generator,
    margin_px: int = 0,
) -> TrainingSample:
    """The sample of one person; keypoints float64 [K, 3] are (x, y, v) in the picture's pixels, v -1 where the data
    don't have the joint at all.

    Without augmentation: the region that inference crops, with padding_wh. With it: padding_wh is not used.
    Joints up to margin_px outside of the crop count as those inside.
    A box without extent is refused with DataError.
    """
    if augmentation is None:
        region = region_for_box(box_xywh, input_size_wh, padding_wh=padding_wh)
        matrix, flipped = crop_matrix(region, input_size_wh), False
    else:
        draws = Draws(*generator.random(len(fields(Draws))).tolist())
        region = augmented_region(
            box_xywh, keypoints, skeleton=skeleton, input_size_wh=input_size_wh,
            augmentation=augmentation, draws=draws,
        )  # fmt: skip
        flipped = draws.flip < augmentation.flip_probability
        matrix = augmented_matrix(
            region,
            image_bgr.shape[1],
            input_size_wh,
            rotation_deg=rotation(augmentation, draws),
            flipped=flipped,
        )
    joints_xy, visible = _joints_in_crop(keypoints, matrix, input_size_wh, margin_px)
    if flipped:
        joints_xy, visible = flip_joints(joints_xy, visible, skeleton=skeleton)
    return TrainingSample(crop_person(image_bgr, matrix, input_size_wh), joints_xy, visible)


def augmented_region(
    box_xywh: tuple[float, float, float, float] | Floats,
    keypoints: Floats,
    *,
    skeleton: Skeleton,
    input_size_wh: tuple[int, int],
    augmentation: Augmentation,
    draws: Draws,
) -> Region:
    """The region of a training sample: the box grown and moved by chance, or half a body, then scaled by chance."""
    padding_wh = (
        augmentation.base_scale * (1 + augmentation.extend_wh[0] * draws.width),
        augmentation.base_scale * (1 + augmentation.extend_wh[1] * draws.height),
    )
    region = region_for_box(box_xywh, input_size_wh, padding_wh=padding_wh)
    if draws.jitter < augmentation.center_jitter_probability:
        away = augmentation.center_jitter * (2 * np.array([draws.jitter_x, draws.jitter_y]) - 1)
        region = Region(region.center_xy + away * np.array(box_xywh[2:], np.float64), region.size_wh)
    num_labelled = int((keypoints[:, 2] > 0).sum())
    if num_labelled >= augmentation.half_body_min_joints and draws.half_body < augmentation.half_body_probability:
        half = half_body_region(
            keypoints,
            upper_body=skeleton.upper_body if augmentation.half_body_upper is None else augmentation.half_body_upper,
            input_size_wh=input_size_wh,
            prefer_upper=draws.upper_body < augmentation.upper_body_probability,
            growth_wh=(
                augmentation.half_body_scale * (1 + augmentation.half_body_extend_wh[0] * draws.half_width),
                augmentation.half_body_scale * (1 + augmentation.half_body_extend_wh[1] * draws.half_height),
            ),
            taken_from=augmentation.half_body_taken_from,
            needs=augmentation.half_body_needs,
            center=augmentation.half_body_center,
        )
        region = half or region
    return Region(region.center_xy, region.size_wh * scale_factor(augmentation, draws))


def half_body_region(
    keypoints: Floats,
    *,
    upper_body: tuple[int, ...],
    input_size_wh: tuple[int, int],
    prefer_upper: bool,
    growth_wh: tuple[float, float],
    taken_from: int = 4,
    needs: int = 3,
    center: Literal["extent", "mean"] = "extent",
) -> Region | None:
    """The region of the upper or lower labelled joints of keypoints [K, 3], or None where they are fewer than needed.

    The upper is taken if it is preferred and has `taken_from` joints; else the lower if that has so many; else the
    upper. Its extent grows by the factors growth_wh, around its own middle or the mean of the joints.
    """
    labelled = keypoints[:, 2] > 0
    is_upper = np.isin(np.arange(len(keypoints)), upper_body)
    upper, lower = keypoints[labelled & is_upper, :2], keypoints[labelled & ~is_upper, :2]
    take_upper = (prefer_upper and len(upper) >= taken_from) or len(lower) < taken_from
    chosen = upper if take_upper else lower
    if len(chosen) < needs:
        return None
    least, most = chosen.min(axis=0), chosen.max(axis=0)
    if not (most > least).any():
        return None
    middle = chosen.mean(axis=0) if center == "mean" else (least + most) / 2
    return Region(middle, fit_aspect((most - least) * growth_wh, input_size_wh))


def scale_factor(augmentation: Augmentation, draws: Draws) -> float:
    """The factor on the region that the draws give."""
    low, high = augmentation.scale_range
    if augmentation.scale_sigma is None:
        return low + (high - low) * draws.scale
    return _clipped_normal(draws.scale, low, high, sigma=augmentation.scale_sigma)


def rotation(augmentation: Augmentation, draws: Draws) -> float:
    """The angle in degrees that the draws give."""
    if draws.rotate >= augmentation.rotation_probability:
        return 0.0
    most = augmentation.rotation_deg
    if augmentation.rotation_sigma_deg is None:
        return most * (2 * draws.angle - 1)
    return _clipped_normal(draws.angle, -most, most, sigma=augmentation.rotation_sigma_deg)


def _clipped_normal(uniform: float, low: float, high: float, *, sigma: float) -> float:
    """The normal number that belongs to a uniform one in [0, 1), about the middle of low and high, cut off at them."""
    normal = NormalDist((low + high) / 2, sigma).inv_cdf(max(uniform, LEAST_CHANCE))
    return min(max(normal, low), high)


def augmented_matrix(
    region: Region, image_width: int, input_size_wh: tuple[int, int], *, rotation_deg: float, flipped: bool
) -> Floats:
    """The matrix [2, 3] from the picture to the crop, with the mirroring of the whole picture inside it.

    The authors mirror the picture (x to W - 1 - x), then turn and cut; this is the same without the copy.
    """
    if not flipped:
        return crop_matrix(region, input_size_wh, rotation_deg=rotation_deg)
    center_xy = np.array([image_width - 1 - region.center_xy[0], region.center_xy[1]])
    matrix = crop_matrix(Region(center_xy, region.size_wh), input_size_wh, rotation_deg=rotation_deg)
    mirror = np.array([[-1.0, 0.0, image_width - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    product: Floats = matrix @ mirror
    return product


def flip_joints(
    joints_xy: npt.NDArray[np.float32], visible: npt.NDArray[np.int8], *, skeleton: Skeleton
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Joints [K, 2] and visibilities [K] of a mirrored picture under their new names: left is right now."""
    order = list(skeleton.flip_order)
    return joints_xy[order], visible[order]


def _joints_in_crop(
    keypoints: Floats, matrix: Floats, input_size_wh: tuple[int, int], margin_px: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    joints_xy = joints_to_crop(keypoints[:, :2], matrix)
    last_pixel = np.array(input_size_wh) - 1
    inside = ((joints_xy >= -margin_px) & (joints_xy <= last_pixel + margin_px)).all(axis=1)
    visible = np.where(inside | (keypoints[:, 2] < 0), keypoints[:, 2], 0).astype(np.int8)
    return np.where(visible[:, None] > 0, joints_xy, 0).astype(np.float32), visible
