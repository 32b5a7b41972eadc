"""How alike two poses are, and which of several that are nearly the same stays; by hand arithmetic."""

import math

import numpy as np

from pipeline.pose.oks import pose_oks, suppress_poses

SIGMAS = (0.1, 0.05)
POSE = np.array([[10.0, 10.0], [20.0, 10.0]])


def moved(*dx: float) -> np.ndarray:
    """POSE with each joint moved to the right, one pose for each number."""
    return np.stack([POSE + np.array([step, 0]) for step in dx])


def test_a_pose_is_wholly_like_itself_and_less_the_further_it_is_moved() -> None:
    oks = pose_oks(POSE, moved(0, 2, 4), 100.0, np.array([100.0, 100, 300]), sigmas=SIGMAS)
    # exp(-d^2 / (2 (2 sigma)^2 area)): 4 / (2 x 0.04 x 100) and 4 / (2 x 0.01 x 100); of areas 100 and 300 the mean
    assert oks[0] == 1
    assert math.isclose(oks[1], (math.exp(-0.5) + math.exp(-2)) / 2)
    assert math.isclose(oks[2], (math.exp(-1) + math.exp(-4)) / 2)


def test_of_poses_that_are_nearly_the_same_the_best_stays() -> None:
    poses, areas = np.concatenate([moved(0, 1, 30)]), np.full(3, 100.0)
    kept = suppress_poses(poses, areas, np.array([0.5, 0.9, 0.1]), sigmas=SIGMAS, threshold=0.7)
    assert kept.tolist() == [1, 2]  # the indices ascend, though the best is looked at first
    same = suppress_poses(poses, areas, np.array([0.5, 0.9, 0.1]), sigmas=SIGMAS, threshold=1.0)
    assert same.tolist() == [0, 1, 2]


def test_of_equal_poses_the_first_stays_and_a_threshold_of_1_suppresses_nobody() -> None:
    copies, areas, scores = moved(*[0.0] * 40), np.full(40, 100.0), np.full(40, 0.5)
    assert suppress_poses(copies, areas, scores, sigmas=SIGMAS, threshold=0.9).tolist() == [0]
    assert suppress_poses(copies, areas, scores, sigmas=SIGMAS, threshold=1.0).tolist() == list(range(40))


def test_a_pose_without_area_is_like_itself_alone() -> None:
    assert pose_oks(POSE, moved(0, 1), 0.0, np.zeros(2), sigmas=SIGMAS).tolist() == [1, 0]


def test_nobody_suppresses_nobody() -> None:
    assert suppress_poses(np.empty((0, 2, 2)), np.empty(0), np.empty(0), sigmas=SIGMAS, threshold=0.9).tolist() == []
