"""What a skeleton promises: pairs, permutations, column names, and how a COCO category becomes one."""

import json

import pytest

from pipeline.errors import DataError
from pipeline.pose.skeleton import COCO17, MPII16, Skeleton, skeleton_from_category


def category(*joints: str, skeleton: object = ()) -> dict[str, object]:
    return {"id": 1, "name": "thing", "keypoints": list(joints), "skeleton": skeleton}


def test_coco17_is_cocos_own_joints_and_sigmas() -> None:
    assert COCO17.num_joints == 17
    assert COCO17.joints[0] == "nose"
    assert COCO17.joints[16] == "right_ankle"
    # pycocotools, Params.setKpParams: these numbers, divided by 10
    expected = [26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]
    assert COCO17.sigmas == pytest.approx([thousandths / 1000 for thousandths in expected])
    assert COCO17.upper_body == tuple(range(13))


def test_mpii16_flips_the_pairs_that_its_authors_list() -> None:
    assert MPII16.num_joints == 16
    assert MPII16.flip_pairs == ((0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13))
    assert MPII16.upper_body == (7, 8, 9, 10, 11, 12, 13, 14, 15)
    assert MPII16.sigmas[0] == 0.089  # COCO's ankle
    assert MPII16.sigmas[9] == 0.079  # head top: not a joint of COCO's


@pytest.mark.parametrize("skeleton", [COCO17, MPII16])
def test_flipping_twice_is_the_identity_and_swaps_left_with_right(skeleton: Skeleton) -> None:
    order = skeleton.flip_order
    assert [order[order[joint]] for joint in range(skeleton.num_joints)] == list(range(skeleton.num_joints))
    for joint, name in enumerate(skeleton.joints):
        swapped = name.replace("left", "?").replace("right", "left").replace("?", "right")
        assert skeleton.joints[order[joint]] == swapped


@pytest.mark.parametrize("skeleton", [COCO17, MPII16])
def test_every_joint_is_drawn_and_edges_never_join_left_limb_to_right_limb(skeleton: Skeleton) -> None:
    assert {joint for edge in skeleton.edges for joint in edge} == set(range(skeleton.num_joints))
    limbs = {"elbow", "wrist", "knee", "ankle"}
    for a, b in skeleton.edges:
        names = {skeleton.joints[a], skeleton.joints[b]}
        if any(name.split("_")[-1] in limbs for name in names):
            assert len({name.split("_")[0] for name in names}) == 1


def test_json_brings_back_the_same_skeleton() -> None:
    assert Skeleton.from_json(json.loads(json.dumps(MPII16.to_json()))) == MPII16


def test_json_with_an_unknown_key_is_read_and_without_a_known_one_is_refused() -> None:
    assert Skeleton.from_json({**COCO17.to_json(), "from_the_future": 1}) == COCO17
    without = {key: value for key, value in COCO17.to_json().items() if key != "sigmas"}
    with pytest.raises(DataError, match="sigmas"):
        Skeleton.from_json(without)


def test_columns_are_lower_case_with_underscores() -> None:
    skeleton = skeleton_from_category(category("Left Elbow", "Head-top", "x9"))
    assert skeleton.columns() == ("left_elbow", "head_top", "x9")


def test_joints_whose_columns_coincide_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"'Left Elbow' and 'left-elbow'.*'left_elbow'"):
        skeleton_from_category(category("Left Elbow", "left-elbow")).columns()


def test_a_joint_that_hits_a_fixed_column_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"'Box'.*box_x"):
        skeleton_from_category(category("nose", "Box")).columns()


def test_exact_coco_names_give_coco17_and_another_order_does_not() -> None:
    assert skeleton_from_category(category(*COCO17.joints)) is COCO17
    reordered = skeleton_from_category(category(*reversed(COCO17.joints)))
    assert reordered.joints == COCO17.joints[::-1]
    assert reordered.sigmas == COCO17.sigmas[::-1]


@pytest.mark.parametrize(
    ("left", "right"),
    [("left_knee", "right_knee"), ("LeftKnee", "RightKnee"), ("l-knee", "r-knee"), ("LKnee", "RKnee"),
     ("Left knee", "Right knee"), ("leftknee", "rightknee"), ("knee left", "knee right")],
)  # fmt: skip
def test_sides_are_found_however_they_are_written(left: str, right: str) -> None:
    skeleton = skeleton_from_category(category("neck", right, left))
    assert skeleton.flip_pairs == ((1, 2),)
    assert skeleton.upper_body == (0,)


def test_edges_count_from_one_unless_a_zero_shows_that_they_do_not() -> None:
    for listed in ([[1, 2], [2, 3]], [[0, 1], [1, 2]]):
        assert skeleton_from_category(category("a", "b", "c", skeleton=listed)).edges == ((0, 1), (1, 2))


def test_edges_that_do_not_fit_the_joints_are_not_drawn() -> None:
    assert skeleton_from_category(category("a", "b", skeleton=[[1, 2], [2, 17]])).edges == ()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"name": "cat"}, "keypoints"),
        ({"name": "cat", "keypoints": []}, "keypoints"),
        ({"name": "cat", "keypoints": ["a", 3]}, "keypoints"),
        ({"name": "cat", "keypoints": ["a", "a"]}, "more than once"),
        ({"name": "cat", "keypoints": ["a", "b"], "skeleton": [[1, 2, 3]]}, "pairs"),
    ],
)
def test_a_category_that_makes_no_skeleton_is_refused(broken: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        skeleton_from_category(broken)
