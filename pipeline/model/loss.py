"""What training minimises: MSPN's coarse-to-fine loss over all heads (Li et al. 2019, sec. 3.3), or one Gaussian's.

It knows heatmaps, joints and visibilities; not where they come from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.model.settings import CoarseToFineLoss, GaussianLoss, Occluded
from pipeline.model.targets import KERNELS, draw_gaussians, draw_targets

COARSE_WEIGHT = 0.25  # of each plain head
OHKM_JOINTS = 8  # the authors' number of hard joints
UNITS = 4


class LossTerms(NamedTuple):
    """total  scalar, what is minimised: the sum of heads.
    heads  [S, heads of a stage], each one's weighted share of it: stage by stage, coarse to fine.
    """

    total: Tensor
    heads: Tensor


def taught_loss(heatmaps: list[list[Tensor]], joints_xy: Tensor, visible: Tensor, input_size_wh: tuple[int, int],
                settings: CoarseToFineLoss | GaussianLoss) -> LossTerms:
    """The loss that the settings say, of all heads, against targets that are drawn here.

    heatmaps   of each stage, of each head (coarse to fine) [B, K, H/4, W/4]: what a network's forward gives
    joints_xy  [B, K, 2] in input pixels; visible [B, K] as in `mspn_loss`
    """
    if settings.kind == "gaussian":
        targets, counted = draw_gaussians(joints_xy, visible, input_size_wh, settings)
        return gaussian_loss(heatmaps, targets, counted, weight=settings.weight)
    targets = draw_targets(joints_xy, visible, input_size_wh, peak=settings.target_peak)
    return mspn_loss(heatmaps, targets, visible, ohkm_joints=settings.ohkm_joints, occluded=settings.occluded)


def gaussian_loss(heatmaps: list[list[Tensor]], targets: Tensor, counted: Tensor, *, weight: float) -> LossTerms:
    """The mean over heads, persons, joints and cells of squared errors, times a weight (HRNet's 0.5).

    targets  [B, K, h, w] for every head
    counted  [B, K]: joints that take part; those that don't still count in the mean's divisor
    """
    terms = torch.stack([torch.stack([(_joint_errors(head, targets) * counted).mean() for head in stage])
                         for stage in heatmaps])
    heads = weight * terms / terms.numel()
    return LossTerms(heads.sum(), heads)


def mspn_loss(heatmaps: list[list[Tensor]], targets: Tensor, visible: Tensor, *,
              ohkm_joints: int = OHKM_JOINTS, occluded: Occluded = "suppress") -> LossTerms:
    """The loss over all 4S heads, a mean over the batch; float32 under autocast, float64 where heatmaps are.

    heatmaps  of each stage, of each unit (coarse to fine) [B, K, h, w]: what the network's forward gives
    targets   [B, 5, K, h, w], kernels wide to narrow, peak 255 (`draw_targets`)
    visible   [B, K]: -1 a joint that the data don't have, 0 not labelled, 1 labelled but occluded, 2 visible; one of
              -1 takes no part in any term
    occluded  what the three coarse heads of each stage learn of joints that aren't visible:
              "suppress"   the authors': an empty map, for occluded and for unlabelled joints
              "supervise"  MMPose's: occluded joints as visible ones; unlabelled ones are left out

    Coarse heads: mean squared error, a quarter each. Finest head: the mean of the ohkm_joints largest errors
    of a person's labelled joints (divided by ohkm_joints also where fewer are labelled). The last stage
    learns the four narrower kernels, all others the four wider.
    """
    assert targets.shape[:3] == (len(visible), len(KERNELS), visible.shape[1]), (targets.shape, visible.shape)
    terms = []
    for stage, (*coarse, finest) in enumerate(heatmaps):
        first = 1 if stage == len(heatmaps) - 1 else 0
        kernels = targets[:, first:first + UNITS].unbind(dim=1)
        for head, target in zip(coarse, kernels[:-1], strict=True):
            terms.append(COARSE_WEIGHT * coarse_loss(head, target, visible, occluded=occluded))
        terms.append(hard_joints_loss(finest, kernels[-1], visible, ohkm_joints=ohkm_joints))
    heads = torch.stack(terms).view(len(heatmaps), UNITS)
    return LossTerms(heads.sum(), heads)


def coarse_loss(heatmaps: Tensor, targets: Tensor, visible: Tensor, *,
                occluded: Occluded = "suppress") -> Tensor:
    """Mean squared error of one head [B, K, h, w]; `occluded` as in `mspn_loss`."""
    if occluded == "suppress":
        return (_joint_errors(heatmaps, targets * (visible > 1)[..., None, None]) * (visible >= 0)).mean()
    assert occluded == "supervise", occluded
    return (_joint_errors(heatmaps, targets) * (visible > 0)).mean()


def hard_joints_loss(heatmaps: Tensor, targets: Tensor, visible: Tensor, *,
                     ohkm_joints: int = OHKM_JOINTS) -> Tensor:
    """Online hard keypoint mining (Chen et al. 2018, sec. 3.3) on one head [B, K, h, w]; batch mean."""
    errors = _joint_errors(heatmaps, targets) * (visible > 0)
    hardest = errors.topk(min(ohkm_joints, errors.shape[1]), dim=1, sorted=False).values
    return hardest.sum(dim=1).mean() / ohkm_joints


def _joint_errors(heatmaps: Tensor, targets: Tensor) -> Tensor:
    """Each joint's mean squared error [B, K], in the targets' float32: float16 doesn't hold the square of 255."""
    return (heatmaps - targets).square().mean(dim=(2, 3))
