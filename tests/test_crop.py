"""Crops and their inverses, held against what the authors' code answered (tests/golden/README.md)."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.pose.crop import (
    Region,
    crop_matrix,
    crop_person,
    crop_persons,
    fit_aspect,
    joints_to_crop,
    joints_to_image,
    region_for_box,
)

SIZE = (192, 256)
AUTHORS_PADDING = (1.09, 1.135)
TINY_BOX = 4  # 7x9 px: the authors' float32 arithmetic is 2.5e-3 px off there


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "crop.npz") as archive:
        return dict(archive)


def test_regions_are_the_authors(golden: dict[str, np.ndarray]) -> None:
    for box, center, scale in zip(golden["boxes_xywh"], golden["center"], golden["scale"], strict=True):
        region = region_for_box(box, SIZE, padding_wh=AUTHORS_PADDING)
        np.testing.assert_allclose(region.center_xy, center, rtol=1e-6)
        np.testing.assert_allclose(region.size_wh, 200 * scale, rtol=1e-6)  # their unit is 200 px


def test_matrices_are_the_authors(golden: dict[str, np.ndarray]) -> None:
    for index, (box, expected) in enumerate(zip(golden["boxes_xywh"], golden["matrices"], strict=True)):
        matrix = crop_matrix(region_for_box(box, SIZE, padding_wh=AUTHORS_PADDING), SIZE)
        np.testing.assert_allclose(matrix, expected, rtol=0, atol=3e-3 if index == TINY_BOX else 1e-4)


def test_rotated_matrices_are_the_authors(golden: dict[str, np.ndarray]) -> None:
    region = region_for_box(golden["boxes_xywh"][0], SIZE, padding_wh=AUTHORS_PADDING)
    for angle, expected in zip(golden["rotations_deg"], golden["rotated_matrices"], strict=True):
        matrix = crop_matrix(region, SIZE, rotation_deg=angle)
        np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-4)


def test_points_land_where_the_authors_put_them(golden: dict[str, np.ndarray]) -> None:
    region = region_for_box(golden["boxes_xywh"][0], SIZE, padding_wh=AUTHORS_PADDING)
    points = joints_to_crop(golden["points_xy"], crop_matrix(region, SIZE))
    np.testing.assert_allclose(points, golden["points_in_crop_xy"], rtol=0, atol=1e-4)


def test_crop_pixels_are_the_authors_but_for_rounding(golden: dict[str, np.ndarray]) -> None:
    for index, expected in zip(golden["crop_boxes"], golden["crops_every_third"], strict=True):
        region = region_for_box(golden["boxes_xywh"][index], SIZE, padding_wh=AUTHORS_PADDING)
        crop = crop_person(golden["picture_bgr"], crop_matrix(region, SIZE), SIZE)
        difference = np.abs(crop[::3, ::3].astype(int) - expected)
        assert difference.max() <= 1
        assert (difference == 0).mean() > 0.999


def test_whole_reference_crops_are_reproduced(shared: Path) -> None:
    with np.load(shared / "golden" / "affine_val.npz") as reference:
        for box, expected in zip(reference["boxes_xywh"], reference["crop_bgr_uint8"], strict=True):
            matrix = crop_matrix(region_for_box(box, SIZE, padding_wh=AUTHORS_PADDING), SIZE)
            difference = np.abs(crop_person(reference["image_bgr"], matrix, SIZE).astype(int) - expected)
            assert difference.max() <= 1
            assert (difference == 0).mean() > 0.997


def test_a_crop_of_the_pictures_own_size_is_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (256, 192, 3), dtype=np.uint8)
    region = Region(np.array([96.0, 128.0]), np.array([192.0, 256.0]))
    np.testing.assert_array_equal(crop_person(picture, crop_matrix(region, SIZE), SIZE), picture)


def test_what_is_outside_of_the_picture_is_black() -> None:
    white = np.full((100, 100, 3), 255, dtype=np.uint8)
    region = region_for_box((-75, 0, 75, 100), SIZE, padding_wh=(1.0, 1.0))  # all but its right edge is outside
    crop = crop_person(white, crop_matrix(region, SIZE), SIZE)
    assert crop.shape == (256, 192, 3)
    assert crop[:, :188].max() == 0


def test_a_picture_wider_than_sixteen_bits_is_cropped_at_its_far_end() -> None:
    picture = np.zeros((40, 70_000, 3), dtype=np.uint8)
    picture[20, 69_990] = 255
    region = Region(np.array([69_990.0, 20.0]), np.array([30.0, 40.0]))
    crop = crop_person(picture, crop_matrix(region, SIZE), SIZE)
    assert crop[128, 96].tolist() == [255, 255, 255]


def test_the_crops_of_a_pictures_persons_are_each_ones_own_and_of_nobody_none() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    boxes = np.array([[10.0, 20.0, 30.0, 60.0], [50.0, 5.0, 60.0, 40.0]])
    several = crop_persons(picture, boxes, SIZE, padding_wh=AUTHORS_PADDING)
    for index, box in enumerate(boxes):
        region = region_for_box(box, SIZE, padding_wh=AUTHORS_PADDING)
        np.testing.assert_array_equal(several.crops[index], crop_person(picture, crop_matrix(region, SIZE), SIZE))
        assert several.centers_xy[index].tolist() == region.center_xy.tolist()
        assert several.sizes_wh[index].tolist() == region.size_wh.tolist()
    nobody = crop_persons(picture, boxes[:0], SIZE, padding_wh=AUTHORS_PADDING)
    assert (nobody.crops.shape, nobody.centers_xy.shape, nobody.sizes_wh.shape) == ((0, 256, 192, 3), (0, 2), (0, 2))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((30.0, 40.0), (30.0, 40.0)), ((60.0, 40.0), (60.0, 80.0)), ((30.0, 80.0), (60.0, 80.0))],
)
def test_the_shorter_side_grows_until_the_aspect_fits(size: tuple[float, float], expected: tuple[float, float]) -> None:
    np.testing.assert_allclose(fit_aspect(np.array(size), SIZE), expected)


def test_a_positive_angle_turns_the_right_end_upwards() -> None:
    region = Region(np.array([50.0, 50.0]), np.array([192.0, 256.0]))
    matrix = crop_matrix(region, SIZE, rotation_deg=90)
    np.testing.assert_allclose(joints_to_crop(np.array([60.0, 50.0]), matrix), [96, 118], atol=1e-9)


def test_joints_come_back_from_the_crop() -> None:
    generator = np.random.default_rng(0)
    boxes = generator.uniform(1, 500, (20, 4))
    joints = generator.uniform(-100, 900, (20, 17, 2))
    regions = [region_for_box(box, SIZE, padding_wh=(1.25, 1.25)) for box in boxes]
    in_crops = np.stack(
        [joints_to_crop(one, crop_matrix(region, SIZE)) for one, region in zip(joints, regions, strict=True)]
    )
    centers = np.stack([region.center_xy for region in regions])
    sizes = np.stack([region.size_wh for region in regions])
    np.testing.assert_allclose(joints_to_image(in_crops, centers, sizes, SIZE), joints, rtol=0, atol=1e-9)


@pytest.mark.parametrize("box", [
    (0, 0, 0, 0), (0, 0, -5, 10), (0, 0, 5, -1), (0, 0, 5, float("nan")), (float("inf"), 0, 5, 5)])
def test_a_box_without_extent_is_refused(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(DataError, match="no positive finite extent"):
        region_for_box(box, SIZE, padding_wh=AUTHORS_PADDING)


def test_a_line_is_a_box_since_the_aspect_gives_it_extent() -> None:
    for line in ((10, 10, 0, 40), (10, 10, 30, 0)):
        region = region_for_box(line, SIZE, padding_wh=(1.0, 1.0))
        np.testing.assert_allclose(region.size_wh, (30, 40))
