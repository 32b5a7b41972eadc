"""Skeletons over pictures, and contact sheets."""

import numpy as np
import pytest

from pipeline.drawing import COLOURS, contact_sheet, draw_persons, draw_picture, joint_side
from pipeline.pose.skeleton import COCO17, Skeleton
from tests.test_evaluation import keypoint_rows

ARM = Skeleton("arm", ("left_wrist", "left_elbow", "right_wrist"), ((0, 1),), (), (0.1, 0.1, 0.1), (0, 1, 2))
GREY = np.full((100, 200, 3), 127, np.uint8)


@pytest.mark.parametrize(("name", "side"), [
    ("left_wrist", "left"), ("RightElbow", "right"), ("nose", "middle"), ("l_knee", "left"), ("pelvis", "middle"),
    ("bright_spot", "middle"),
])  # fmt: skip
def test_a_joints_side_follows_from_its_name(name, side):
    assert joint_side(name) == side


def test_limbs_and_joints_have_the_colour_of_their_side():
    joints_xy = np.array([[[20.0, 50.0], [120.0, 50.0], [160.0, 80.0]]])

    drawn = draw_persons(GREY, joints_xy, np.ones((1, 3)), ARM, low_score=0.7)

    np.testing.assert_allclose(drawn[50, 70], COLOURS["left"], atol=30)  # the edges of a thin line are smoothed
    np.testing.assert_allclose(drawn[80, 160], COLOURS["right"], atol=30)


def test_a_joint_with_a_low_score_is_hollow_and_its_limb_faded():
    joints_xy = np.array([[[20.0, 50.0], [120.0, 50.0], [160.0, 80.0]]])

    drawn = draw_persons(GREY, joints_xy, np.array([[1.0, 0.55, 0.55]]), ARM, low_score=0.7)

    assert tuple(drawn[80, 160]) == (127, 127, 127)
    blue = int(drawn[50, 70, 0])
    assert 127 < blue < COLOURS["left"][0]


def test_drawing_leaves_the_picture_as_it_was_and_joints_that_do_not_exist_out():
    image = GREY.copy()

    joints_xy = np.array([[[20.0, 50.0], [np.nan, np.nan], [1e9, 1e9]]])
    drawn = draw_persons(image, joints_xy, np.ones((1, 3)), ARM, low_score=0.7)

    assert (image == GREY).all()
    assert tuple(drawn[50, 20]) == COLOURS["left"]
    assert tuple(drawn[50, 70]) == (127, 127, 127)


def test_a_picture_without_persons_is_drawn_as_it_is():
    drawn = draw_persons(GREY, np.zeros((0, 3, 2)), np.zeros((0, 3)), ARM, low_score=0.7)
    assert (drawn == GREY).all()


def test_large_pictures_are_shrunk_and_the_joints_with_them():
    image = np.zeros((1440, 2880, 3), np.uint8)
    points = [400.0, 400.0, 1.0, 2400.0, 400.0, 1.0, 400.0, 1200.0, 1.0]
    table = keypoint_rows([{"person_index": 0, "score": 1.0, "keypoints": points}], ARM)

    drawn = draw_picture(image, table, ARM, low_score=0.7)

    assert drawn.shape == (360, 720, 3)
    assert tuple(drawn[100, 350]) == COLOURS["left"]


def test_a_contact_sheet_fits_each_picture_whole_into_its_tile():
    red = np.full((10, 40, 3), (0, 0, 255), np.uint8)

    sheet = contact_sheet([red] * 5, columns=4, tile_wh=(40, 20))

    assert sheet.shape == (40, 160, 3)
    assert tuple(sheet[10, 20]) == (0, 0, 255)
    assert tuple(sheet[2, 20]) == tuple(sheet[30, 100]) != (0, 0, 255)


def test_the_colours_are_the_same_for_every_skeleton():
    assert {joint_side(name) for name in COCO17.joints} == set(COLOURS)
