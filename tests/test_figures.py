"""Made pictures: the same again for the same seed, and annotated as they are drawn."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.coco import Person, parse_annotations
from pipeline.figure_bodies import LEFT, Pose, posed_body, random_body
from pipeline.figures import SIDES, MadePicture, make_picture, write_made_dataset
from pipeline.images import decode_picture
from pipeline.pose.skeleton import COCO17

HANGING = (0.0, 0.0, 0.0, 0.0)
UPRIGHT = Pose(HANGING, HANGING, HANGING, HANGING)


@pytest.fixture(scope="module")
def made() -> list[MadePicture]:
    return [make_picture(index, seed=0) for index in range(60)]


@pytest.fixture(scope="module")
def persons(made: list[MadePicture]) -> list[Person]:
    return [person for picture in made for person in picture.persons]


def keypoints(person: Person) -> np.ndarray:
    return np.array(person.keypoints).reshape(17, 3)


def joint(name: str) -> int:
    return COCO17.joints.index(name)


def test_the_same_index_and_seed_give_the_same_picture_and_others_another() -> None:
    assert make_picture(3, seed=5) == make_picture(3, seed=5)
    assert len({make_picture(index, seed=seed).jpeg for index in (0, 1) for seed in (0, 1)}) == 4


def test_pictures_have_the_stated_size_and_one_to_five_persons(made: list[MadePicture]) -> None:
    for picture in made:
        assert decode_picture(picture.jpeg).shape == (picture.height, picture.width, 3)
        assert SIDES[0] <= min(picture.width, picture.height)
        assert max(picture.width, picture.height) < SIDES[1]
    assert {len(picture.persons) for picture in made} == {1, 2, 3, 4, 5}


def test_labelled_joints_are_inside_and_others_are_zero(made: list[MadePicture]) -> None:
    for picture in made:
        for x, y, v in np.concatenate([keypoints(person) for person in picture.persons]):
            assert v in (0, 1, 2)
            assert -0.5 <= x <= picture.width - 0.5
            assert -0.5 <= y <= picture.height - 0.5
            assert v > 0 or (x, y) == (0, 0)


def test_all_three_visibilities_occur_and_most_joints_are_seen(persons: list[Person]) -> None:
    visible = np.concatenate([keypoints(person)[:, 2] for person in persons])
    assert 0.6 < (visible == 2).mean() < 0.95
    assert (visible == 1).mean() > 0.05
    assert (visible == 0).mean() > 0.005


def test_every_seen_joint_is_inside_its_persons_box(persons: list[Person]) -> None:
    for person in persons:
        x, y, width, height = person.box_xywh
        seen = keypoints(person)[keypoints(person)[:, 2] == 2]
        assert ((seen[:, :2] >= np.array([x, y]) - 0.5) & (seen[:, :2] <= [x + width, y + height])).all()


def test_boxes_and_areas_are_those_of_visible_pixels(made: list[MadePicture]) -> None:
    for picture in made:
        for person in picture.persons:
            x, y, width, height = person.box_xywh
            assert min(x, y) >= 0
            assert x + width <= picture.width
            assert y + height <= picture.height
            assert 0 < person.area <= width * height
            assert person.num_keypoints == (keypoints(person)[:, 2] > 0).sum()


def test_annotation_ids_differ_across_pictures(persons: list[Person]) -> None:
    assert len({person.annotation_id for person in persons}) == len(persons)


def test_who_faces_the_viewer_has_the_left_hand_on_the_right() -> None:
    front, back = (posed_body(UPRIGHT, yaw_deg=yaw, elevation_deg=0).joints for yaw in (0, 180))
    for name in ("eye", "ear", "shoulder", "wrist", "hip", "ankle"):
        left, right = joint(f"left_{name}"), joint(f"right_{name}")
        assert front[left, 0] > 0 > front[right, 0]
        assert back[left, 0] < 0 < back[right, 0]


def test_a_quarter_turn_faces_right_with_the_right_side_near() -> None:
    body = posed_body(UPRIGHT, yaw_deg=90, elevation_deg=0)
    np.testing.assert_allclose(body.ahead, [1, 0, 0], atol=1e-9)
    assert body.joints[joint("right_hip"), 2] > 0 > body.joints[joint("left_hip"), 2]
    assert body.joints[joint("nose"), 0] > body.head[0]


def test_an_upright_body_is_stacked_from_head_to_ankles() -> None:
    y = posed_body(UPRIGHT, yaw_deg=0, elevation_deg=0).joints[:, 1]
    order = ["left_eye", "left_shoulder", "left_elbow", "left_hip", "left_knee", "left_ankle"]
    heights = [y[joint(name)] for name in order]
    assert heights == sorted(heights)  # y points down


def test_a_raised_arm_is_above_the_head_on_its_own_side() -> None:
    raised = (160.0, 0.0, 170.0, 0.0)
    body = posed_body(Pose(raised, HANGING, HANGING, HANGING), yaw_deg=0, elevation_deg=0)
    wrist = body.joints[joint("left_wrist")]
    assert wrist[1] < body.head[1]
    assert wrist[0] * LEFT > 0


def test_limbs_keep_their_lengths_in_any_pose() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        joints = random_body(generator).joints
        for side in ("left", "right"):
            thigh = joints[joint(f"{side}_hip")] - joints[joint(f"{side}_knee")]
            forearm = joints[joint(f"{side}_elbow")] - joints[joint(f"{side}_wrist")]
            assert np.linalg.norm(thigh) == pytest.approx(0.235)
            assert np.linalg.norm(forearm) == pytest.approx(0.15)


def test_a_written_dataset_is_coco_and_made_of_the_same_pictures(tmp_path: Path) -> None:
    write_made_dataset(tmp_path, num_pictures=4, seed=7, first_id=11)
    data = (tmp_path / "annotations.json").read_bytes()
    annotations = parse_annotations(data, source="annotations.json")
    assert annotations.skeleton is COCO17
    assert list(annotations.images) == ["000011.jpg", "000012.jpg", "000013.jpg", "000014.jpg"]
    for image in annotations.images.values():
        made = make_picture(image.image_id, seed=7)
        assert (tmp_path / "images" / image.file_name).read_bytes() == made.jpeg
        assert image.persons == made.persons
    assert annotations.counts["persons"] == sum(len(image.persons) for image in annotations.images.values())
    required = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "num_keypoints", "keypoints"}
    assert all(required <= set(entry) for entry in json.loads(data)["annotations"])


def test_joints_are_drawn_where_they_are_said_to_be() -> None:
    """Eyes that are seen are dark spots in white; away from occlusion their pixels tell."""
    dark = []
    for index in range(40):
        made = make_picture(index, seed=1)
        grey = cv2.cvtColor(decode_picture(made.jpeg), cv2.COLOR_BGR2GRAY).astype(int)
        for person in made.persons:
            for x, y, v in keypoints(person)[1:3]:
                if v == 2 and person.box_xywh[3] > 250:
                    around = grey[round(y) - 5 : round(y) + 6, round(x) - 5 : round(x) + 6]
                    dark.append(grey[round(y), round(x)] < around.max() - 60)
    assert len(dark) > 10
    assert np.mean(dark) > 0.9
