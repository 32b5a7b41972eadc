"""The authors' augmentation and MMPose's: their numbers where they can be compared, and what must hold for any draw."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.pose.augment import (
    Augmentation,
    Draws,
    TrainingSample,
    augmented_matrix,
    augmented_region,
    flip_joints,
    half_body_region,
    rotation,
    sample_generator,
    scale_factor,
    training_sample,
)
from pipeline.pose.crop import Region, crop_matrix, crop_person, joints_to_crop, region_for_box
from pipeline.pose.skeleton import COCO17, MPII16

SIZE = (192, 256)
PADDING = (1.09, 1.135)
AUTHORS = Augmentation()
STILL = Augmentation(
    base_scale=1.0,
    extend_wh=(0.0, 0.0),
    half_body_probability=0.0,
    scale_range=(1.0, 1.0),
    rotation_probability=0.0,
    flip_probability=0.0,
)
MIDDLE = Draws(*[0.5] * 13)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "flip_halfbody.npz") as archive:
        return dict(archive)


def keypoints(**joints: tuple[float, float, int]) -> np.ndarray:
    """COCO-17 keypoints [17, 3], zero but for the named joints."""
    array = np.zeros((17, 3))
    for name, joint in joints.items():
        array[COCO17.joints.index(name)] = joint
    return array


def sample(
    picture: np.ndarray,
    joints: np.ndarray,
    *,
    augmentation: Augmentation | None = AUTHORS,
    box: tuple[float, float, float, float] = (60.0, 40.0, 90.0, 150.0),
    key: tuple[int, int, int] = (0, 0, 0),
) -> TrainingSample:
    return training_sample(
        picture,
        box,
        joints,
        skeleton=COCO17,
        input_size_wh=SIZE,
        augmentation=augmentation,
        padding_wh=PADDING,
        generator=sample_generator(*key),
    )


PICTURE = cv2.resize(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8), (320, 240))
FACE = keypoints(nose=(105.0, 115.0, 2), left_eye=(115.0, 115.0, 2), right_eye=(95.0, 115.0, 1))


def test_half_bodies_are_the_authors_for_their_draws(golden: dict[str, np.ndarray]) -> None:
    joints = np.concatenate([golden["joints"], golden["visibility"]], axis=2)
    for index, seed, *expected in golden["half_body"]:
        random = np.random.RandomState(int(seed))  # theirs: randn decides the half, then rand for each side
        region = half_body_region(
            joints[int(index)],
            upper_body=COCO17.upper_body,
            input_size_wh=SIZE,
            prefer_upper=random.randn() < 0.5,
            growth_wh=(1 + 0.6 * random.rand(), 1 + 0.8 * random.rand()),
        )
        assert region is not None
        found = [*region.center_xy, *(region.size_wh / 200)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)  # theirs are float32


def test_flipped_joints_are_the_authors(golden: dict[str, np.ndarray]) -> None:
    width = int(golden["width"])
    # A region whose mirror image is the input itself: crop pixels are the mirrored picture's pixels.
    region = Region(np.array([width - 1 - 96.0, 128.0]), np.array(SIZE, float))
    matrix = augmented_matrix(region, width, SIZE, rotation_deg=0.0, flipped=True)
    for joints, visible, flipped, flipped_visible in zip(
        golden["joints"],
        golden["visibility"],
        golden["flipped_joints"],
        golden["flipped_visibility"],
        strict=True,
    ):
        found_xy, found_visible = flip_joints(
            joints_to_crop(joints, matrix).astype(np.float32), visible[:, 0].astype(np.uint8), skeleton=COCO17
        )
        np.testing.assert_allclose(found_xy, flipped, atol=1e-4)
        np.testing.assert_array_equal(found_visible, flipped_visible[:, 0])


def test_without_augmentation_a_sample_is_what_inference_crops() -> None:
    found = sample(PICTURE, FACE, augmentation=None)
    matrix = crop_matrix(region_for_box((60.0, 40.0, 90.0, 150.0), SIZE, padding_wh=PADDING), SIZE)
    np.testing.assert_array_equal(found.crop, crop_person(PICTURE, matrix, SIZE))
    np.testing.assert_allclose(found.joints_xy[:3], joints_to_crop(FACE[:3, :2], matrix), rtol=1e-6)
    assert found.visible[:5].tolist() == [2, 2, 1, 0, 0]


def test_shapes_and_types_are_those_of_the_contract() -> None:
    found = sample(PICTURE, FACE)
    assert (found.crop.shape, found.crop.dtype) == ((256, 192, 3), np.uint8)
    assert (found.joints_xy.shape, found.joints_xy.dtype) == ((17, 2), np.float32)
    assert (found.visible.shape, found.visible.dtype) == ((17,), np.int8)


def test_the_box_grows_by_the_authors_factors() -> None:
    joints = keypoints()
    for draw, grown in ((0.0, (1.0, 1.0)), (0.5, (1.3, 1.4))):
        region = augmented_region(
            (0.0, 0.0, 60.0, 100.0),
            joints,
            skeleton=COCO17,
            input_size_wh=SIZE,
            augmentation=AUTHORS,
            draws=replace(MIDDLE, width=draw, height=draw, scale=0.25),
        )
        height = max(100 * 1.05 * grown[1], 60 * 1.05 * grown[0] / 0.75)
        # 0.8 * uniform(0.75, 1.25) at a quarter: 0.7
        np.testing.assert_allclose(region.size_wh, [0.7 * 0.75 * height, 0.7 * height])
        np.testing.assert_allclose(region.center_xy, [30, 50])


@pytest.mark.parametrize(("num_labelled", "taken"), [(3, False), (4, True)])
def test_half_bodies_need_more_than_three_labelled_joints(num_labelled: int, taken: bool) -> None:
    joints = keypoints()
    joints[:num_labelled] = [(10.0 * i, 7.0 * i, 2) for i in range(num_labelled)]
    region = augmented_region(
        (0.0, 0.0, 300.0, 400.0),
        joints,
        skeleton=COCO17,
        input_size_wh=SIZE,
        augmentation=AUTHORS,
        draws=replace(MIDDLE, half_body=0.29),
    )
    assert (region.size_wh[0] < 100) == taken


def half(joints: np.ndarray, *, prefer_upper: bool) -> Region | None:
    return half_body_region(
        joints,
        upper_body=COCO17.upper_body,
        input_size_wh=SIZE,
        prefer_upper=prefer_upper,
        growth_wh=(1.0, 1.0),
    )


def test_the_lower_half_is_knees_and_ankles() -> None:
    joints = keypoints()
    joints[:, 2] = 2
    joints[13:, :2] = [(10, 20), (40, 20), (10, 60), (40, 60)]
    region = half(joints, prefer_upper=False)
    assert region is not None
    np.testing.assert_allclose(region.center_xy, [25, 40])
    np.testing.assert_allclose(region.size_wh, [30, 40])


def test_a_half_with_too_few_joints_gives_way_to_the_other_and_both_to_none() -> None:
    joints = keypoints()
    joints[:4] = [(0, 0, 2), (30, 0, 2), (0, 40, 2), (30, 40, 1)]
    joints[13:16] = [(100, 100, 2), (110, 100, 2), (100, 120, 2)]  # three: not more than three
    only_upper = half(joints, prefer_upper=False)
    assert only_upper is not None
    np.testing.assert_allclose(only_upper.center_xy, [15, 20])
    joints[2:4] = 0
    assert half(joints, prefer_upper=True) is None


def test_joints_on_one_point_make_no_half() -> None:
    joints = keypoints()
    joints[:6] = (50, 50, 2)
    assert half(joints, prefer_upper=True) is None


@pytest.mark.parametrize(("rotate", "angle", "expected"), [(0.5, 0.9, 0), (0.49, 0.0, -45), (0.49, 0.75, 22.5)])
def test_the_angle_follows_from_its_two_draws(rotate: float, angle: float, expected: float) -> None:
    assert rotation(AUTHORS, replace(MIDDLE, rotate=rotate, angle=angle)) == expected


def test_joints_land_where_their_pixels_go() -> None:
    y, x = np.mgrid[0:240, 0:320]
    for key in range(60):
        for joint in ("left_wrist", "nose"):
            at = np.array([101.3, 122.6])
            spot = 255 * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 18)
            picture = np.repeat(spot[..., None], 3, axis=2).astype(np.uint8)
            found = sample(picture, keypoints(**{joint: (*at, 2)}), key=(0, 0, key))
            weights = found.crop[..., 0].astype(float)
            rows, columns = np.mgrid[0:256, 0:192]
            center = [(weights * columns).sum() / weights.sum(), (weights * rows).sum() / weights.sum()]
            (labelled,) = np.flatnonzero(found.visible)
            assert COCO17.joints[labelled] in (joint, joint.replace("left", "right"))
            np.testing.assert_allclose(found.joints_xy[labelled], center, atol=0.3)


def test_mirroring_in_the_matrix_is_mirroring_the_picture() -> None:
    region = region_for_box((60.0, 40.0, 90.0, 150.0), SIZE, padding_wh=PADDING)
    matrix = augmented_matrix(region, PICTURE.shape[1], SIZE, rotation_deg=17.0, flipped=True)
    mirrored = Region(np.array([PICTURE.shape[1] - 1, 0]) + region.center_xy * [-1, 1], region.size_wh)
    expected = crop_person(np.ascontiguousarray(PICTURE[:, ::-1]), crop_matrix(mirrored, SIZE, rotation_deg=17.0), SIZE)
    difference = np.abs(crop_person(PICTURE, matrix, SIZE).astype(int) - expected)
    assert difference.max() <= 1  # rounding of equal numbers
    assert (difference == 0).mean() > 0.99


def test_a_flip_swaps_left_and_right_and_a_second_restores_them() -> None:
    joints = np.arange(32, dtype=np.float32).reshape(16, 2)
    visible = np.arange(16, dtype=np.uint8) % 3
    once = flip_joints(joints, visible, skeleton=MPII16)
    assert once[0][0].tolist() == joints[5].tolist()  # the right ankle is where the left one was
    assert once[1][0] == visible[5]
    twice = flip_joints(*once, skeleton=MPII16)
    np.testing.assert_array_equal(twice[0], joints)
    np.testing.assert_array_equal(twice[1], visible)


@pytest.mark.parametrize(
    ("x", "visible"), [(-0.01, 0), (0.0, 2), (191.0, 2), (191.01, 0)]
)  # the authors' bounds: x < 0 or x > W - 1
def test_joints_outside_of_the_crop_are_not_labelled(x: float, visible: int) -> None:
    found = sample(
        np.zeros((256, 192, 3), np.uint8),
        keypoints(nose=(x, 100.0, 2)),
        augmentation=STILL,
        box=(0.0, 0.0, 192.0, 256.0),
    )
    assert found.visible[0] == visible
    assert found.joints_xy[0].tolist() == ([0.0, 0.0] if visible == 0 else [x, 100.0])


@pytest.mark.parametrize(("x", "y", "visible"), [
    (-30.0, -30.0, 2), (-30.01, 0.0, 0), (0.0, -30.01, 0), (221.0, 285.0, 2), (221.01, 0.0, 0), (0.0, 285.01, 0)])
def test_joints_up_to_a_margin_outside_of_the_crop_count_and_keep_their_place(x: float, y: float, visible: int) -> None:
    found = training_sample(
        np.zeros((256, 192, 3), np.uint8), (0.0, 0.0, 192.0, 256.0), keypoints(nose=(x, y, 2)), skeleton=COCO17,
        input_size_wh=SIZE, augmentation=STILL, padding_wh=PADDING, generator=sample_generator(0, 0, 0), margin_px=30)
    assert found.visible[0] == visible
    assert found.joints_xy[0].tolist() == [x * (visible > 0), y * (visible > 0)]


def test_equal_keys_give_equal_samples_and_others_another() -> None:
    first, again = sample(PICTURE, FACE, key=(1, 2, 3)), sample(PICTURE, FACE, key=(1, 2, 3))
    np.testing.assert_array_equal(first.crop, again.crop)
    np.testing.assert_array_equal(first.joints_xy, again.joints_xy)
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not np.array_equal(sample(PICTURE, FACE, key=other).joints_xy, first.joints_xy)


def test_generators_of_neighbouring_and_huge_keys_are_distinct() -> None:
    keys = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 2**32 + 5), (2**32, 1, 5), (0, 0, -1), (0, 0, 2**63 - 1)]
    assert len({sample_generator(*key).random() for key in keys}) == len(keys)


def test_over_many_samples_chance_has_the_authors_distribution() -> None:
    flips, angles, scales = [], [], []
    for annotation_id in range(2000):
        found = sample(np.zeros((4, 320, 3), np.uint8), FACE, key=(0, 0, annotation_id))
        left, right = found.joints_xy[1], found.joints_xy[2]
        flips.append(found.visible[1] == 1)  # the right eye was occluded; after a flip it is the left one
        across = left - right
        angles.append(-np.rad2deg(np.arctan2(across[1], across[0])))
        scales.append(192 * 20 / np.hypot(*across))  # the region's width: the eyes are 20 px apart
    assert np.mean(flips) == pytest.approx(0.5, abs=0.04)
    turned = np.abs(angles) > 1e-3
    assert np.mean(turned) == pytest.approx(0.5, abs=0.04)
    assert np.max(np.abs(angles)) <= 45
    assert np.mean(np.array(angles)[turned]) == pytest.approx(0, abs=3)
    assert np.std(np.array(angles)[turned]) == pytest.approx(90 / 12**0.5, abs=1.5)
    # The box is 90x150: its region's height is 1.05 * max(150 * U(1, 1.8), 120 * U(1, 1.6)) * U(0.6, 1)
    assert min(scales) >= 0.75 * 150 * 1.05 * 0.6
    assert max(scales) <= 0.75 * 150 * 1.8 * 1.05
    uniform = np.random.default_rng(1).random((100_000, 3))
    heights = np.maximum(150 * (1 + 0.8 * uniform[:, 0]), 120 * (1 + 0.6 * uniform[:, 1]))
    expected = 0.75 * 1.05 * heights * (0.6 + 0.4 * uniform[:, 2])
    assert np.mean(scales) == pytest.approx(expected.mean(), rel=0.02)
    assert np.std(scales) == pytest.approx(expected.std(), rel=0.06)


def test_a_box_without_extent_is_refused() -> None:
    with pytest.raises(DataError, match="extent"):
        sample(PICTURE, FACE, box=(5.0, 5.0, 0.0, 0.0))


# --- what MMPose does otherwise -----------------------------------------------------------------------------------

BODY = keypoints(nose=(0.0, 0.0, 2), left_eye=(60.0, 0.0, 2), right_eye=(0.0, 40.0, 2), left_ear=(10.0, 10.0, 1),
                 right_ear=(20.0, 10.0, 2), left_elbow=(30.0, 30.0, 2),
                 left_hip=(100.0, 100.0, 2), right_hip=(130.0, 100.0, 1), left_knee=(100.0, 190.0, 2))


def region_of(joints: np.ndarray, augmentation: Augmentation, **draws: float) -> Region:
    """The region of the box (0, 0, 60, 100) when chance is in the middle but for these draws."""
    return augmented_region((0.0, 0.0, 60.0, 100.0), joints, skeleton=COCO17, input_size_wh=SIZE,
                            augmentation=augmentation, draws=replace(MIDDLE, **draws))


def test_a_half_body_can_be_centred_on_the_joints_mean_and_grow_by_a_fixed_factor() -> None:
    mmpose = replace(STILL, half_body_probability=0.3, half_body_min_joints=9, half_body_upper=tuple(range(11)),
                     half_body_taken_from=3, half_body_needs=2, half_body_center="mean", half_body_scale=1.5,
                     half_body_extend_wh=(0.0, 0.0))
    upper = region_of(BODY, mmpose, half_body=0.29, upper_body=0.69)
    # six joints: x 0 60 0 10 20 30, y 0 0 40 10 10 30; their extent 60x40 is wider than 3:4, so 60x80, times 1.5
    np.testing.assert_allclose(upper.center_xy, [20, 15])
    np.testing.assert_allclose(upper.size_wh, [90, 120])
    lower = region_of(BODY, mmpose, half_body=0.29, upper_body=0.70)
    # both hips and a knee: 30x90 is narrower than 3:4, so 67.5x90, times 1.5
    np.testing.assert_allclose(lower.center_xy, [110, 130])
    np.testing.assert_allclose(lower.size_wh, [101.25, 135])
    whole = region_of(BODY, mmpose, half_body=0.30)
    eight = region_of(BODY * (np.arange(17) != 0)[:, None], mmpose, half_body=0.0)
    for region in (whole, eight):
        np.testing.assert_allclose(region.center_xy, [30, 50])


def test_which_half_is_taken_follows_from_its_least_numbers() -> None:
    joints = keypoints(nose=(0.0, 0.0, 2), left_eye=(30.0, 0.0, 2), left_knee=(0.0, 50.0, 2), right_knee=(0.0, 90.0, 2),
                       left_ankle=(30.0, 90.0, 2))
    least = {"upper_body": COCO17.upper_body, "input_size_wh": SIZE, "growth_wh": (1.0, 1.0)}
    lower = half_body_region(joints, prefer_upper=True, taken_from=3, needs=2, **least)
    upper = half_body_region(joints, prefer_upper=False, taken_from=4, needs=2, **least)
    assert lower is not None
    assert upper is not None
    assert (lower.center_xy.tolist(), upper.center_xy.tolist()) == ([15, 70], [15, 0])
    assert half_body_region(joints, prefer_upper=False, taken_from=4, needs=3, **least) is None


@pytest.mark.parametrize(("jitter", "x", "y", "center"), [
    (0.29, 0.0, 0.0, (18, 30)), (0.29, 0.5, 0.75, (30, 60)), (0.29, 1.0, 0.5, (42, 50)), (0.3, 0.0, 0.0, (30, 50))])
def test_a_jittered_centre_moves_by_a_share_of_the_boxs_sides(
        jitter: float, x: float, y: float, center: tuple[float, float]) -> None:
    jittered = replace(STILL, base_scale=1.25, center_jitter=0.2, center_jitter_probability=0.3)
    region = region_of(keypoints(), jittered, jitter=jitter, jitter_x=x, jitter_y=y)
    np.testing.assert_allclose(region.center_xy, center)
    np.testing.assert_allclose(region.size_wh, [93.75, 125])  # 60x100 is narrower than 3:4, so 75x100, times 1.25


@pytest.mark.parametrize(("draw", "deviations"), [
    (0.0, -2), (0.022, -2), (0.15865525, -1), (0.5, 0), (0.69146246, 0.5), (0.9, 1.2815516), (0.98, 2)])
def test_normal_angles_and_scales_are_the_quantiles_of_their_draws(draw: float, deviations: float) -> None:
    # quantiles of the normal distribution from its table; cut off at two deviations for angles, at one for scales
    normal = replace(AUTHORS, rotation_deg=80.0, rotation_sigma_deg=40.0, scale_range=(0.5, 1.5), scale_sigma=0.5)
    draws = replace(MIDDLE, rotate=0.0, angle=draw, scale=draw)
    assert rotation(normal, draws) == pytest.approx(40 * deviations, abs=1e-5)
    assert scale_factor(normal, draws) == pytest.approx(1 + 0.5 * np.clip(deviations, -1, 1), abs=1e-6)


def test_the_first_ten_draws_stay_what_they_were_before_there_were_more() -> None:
    draws = Draws(*sample_generator(1, 2, 3).random(13))
    first_ten = sample_generator(1, 2, 3).random(10)
    assert [draws.width, draws.height, draws.half_body, draws.upper_body, draws.half_width, draws.half_height,
            draws.scale, draws.rotate, draws.angle, draws.flip] == first_ten.tolist()
