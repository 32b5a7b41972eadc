"""How alike two poses are, and which of several that are nearly the same stays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def pose_oks(joints_xy: Array, others_xy: Array, area: float, other_areas: Array, *, sigmas: Sequence[float]) -> Array:
    """float64 [n]: the object keypoint similarity of a pose [K, 2] with each of the others [n, K, 2].

    All joints count. COCO's (https://cocodataset.org/#keypoints-eval) between two predictions, as `oks_iou` of HRNet's
    lib/nms/nms.py (leoxiaobin/deep-high-resolution-net.pytorch): the area is the mean of both.
    """
    squared = ((others_xy.astype(np.float64) - joints_xy) ** 2).sum(axis=-1)
    variances = (2 * np.asarray(sigmas, np.float64)) ** 2
    areas = (area + other_areas)[:, None] / 2 + np.spacing(1)
    return np.asarray(np.exp(-squared / (2 * variances * areas)).mean(axis=1))


def suppress_poses(joints_xy: Array, areas: Array, scores: Array, *, sigmas: Sequence[float],
                   threshold: float) -> Array:
    """The indices of the poses [n, K, 2] that stay, ascending: none has an OKS above `threshold` with a better one.

    areas, scores  [n]; of equal scores the first is the better one
    """
    left, kept = np.argsort(-scores, kind="stable"), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        oks = pose_oks(joints_xy[best], joints_xy[left], areas[best], areas[left], sigmas=sigmas)
        left = left[oks <= threshold]
    return np.array(sorted(kept), np.int64)
