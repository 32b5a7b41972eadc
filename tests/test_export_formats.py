"""Each export format, read back: what comes back exactly, what is lost, and by how much at most."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import evaluate_keypoints
from pipeline.export import FORMATS, ExportOptions, export_keypoints, persons, text
from pipeline.export.addresses import picture_address
from pipeline.export.yolo_pose import label_path
from pipeline.pose.skeleton import COCO17, Skeleton
from tests.export_readers import READERS, ReadPerson, members
from tests.test_evaluation import TORSO3, keypoint_rows

PICTURE_FORMATS = sorted(READERS)  # all but coco-results, which names no pictures
AS_THEY_ARE = ExportOptions(image_prefix="")
SIZES = {"a.jpg": (640, 480), "b/c.jpg": (4000, 3000), "d.png": (333, 777)}
FLOAT64_STEPS = 4 * np.finfo(np.float64).eps  # a product, a quotient and their inverses, half a step each


def person(key: str, index: int = 0, **more: Any) -> dict[str, Any]:
    """A row of status ok: TORSO3 inside a box of 20 x 10, joint scores 1.2, 0.9 and 0.5."""
    width, height = SIZES.get(key, (100, 50))
    return {"key": key, "person_index": index, "width": width, "height": height, "score": 0.8,
            "box_x": 10.0, "box_y": 20.0, "box_w": 20.0, "box_h": 10.0,
            "keypoints": [12.3, 21.0, 1.2, 15.0, 22.5, 0.9, 29.75, 29.0, 0.5]} | more


def table_of(*rows: dict[str, Any], skeleton: Skeleton = TORSO3) -> pa.Table:
    return keypoint_rows(list(rows), skeleton)


def made_people(num_pictures: int = 30, seed: int = 0) -> pa.Table:
    """Pictures of random sizes with 0 to 3 persons; joints and boxes anywhere, up to a fifth outside the picture."""
    random, rows = np.random.default_rng(seed), []
    for key in (f"{number:04}.jpg" for number in range(num_pictures)):
        width, height = (int(side) for side in random.integers(200, 5000, 2))
        picture = {"key": key, "width": width, "height": height}
        many = int(random.integers(0, 4))
        rows += [picture | {"status": "no_person", "person_index": None}] * (many == 0)
        for index in range(many):
            near, extent = np.multiply([random.uniform(-0.2, 0.8, 2), random.uniform(0.25, 0.6, 2)], [width, height])
            joints_xy = random.uniform(-0.2, 1.2, (17, 2)) * [width, height]
            joints = np.column_stack([joints_xy, random.uniform(0.4, 1.5, 17)])
            rows.append(picture | {"person_index": index, "score": float(random.uniform(0.3, 1.4)),
                                   **dict(zip(("box_x", "box_y", "box_w", "box_h"), [*near, *extent], strict=True)),
                                   "keypoints": joints.astype(np.float32)})
    return keypoint_rows(rows, COCO17)


def sizes_of(table: pa.Table) -> dict[str, tuple[int, int]]:
    return {row["key"]: (row["width"], row["height"]) for row in table.select(["key", "width", "height"]).to_pylist()}


def written_and_read(table: pa.Table, to: str, options: ExportOptions = AS_THEY_ARE) -> list[tuple[Any, ReadPerson]]:
    """Each person's row beside what the file says of it; the file names each picture, and each person once."""
    skeleton = COCO17 if "nose_x" in table.column_names and "left_eye_x" in table.column_names else TORSO3
    read = READERS[to](export_keypoints(table, to, skeleton=skeleton, options=options).data, sizes_of(table))
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]
    assert sorted(read) == sorted({row["key"] for row in table.to_pylist()})
    assert sum(map(len, read.values())) == len(rows)
    return [(row, read[row["key"]][row["person_index"]]) for row in rows]


def joints_of(row: dict[str, Any], skeleton: Skeleton = COCO17) -> np.ndarray[Any, Any]:
    return np.array([[row[f"{joint}_{part}"] for part in ("x", "y", "score")] for joint in skeleton.columns()])


def box_of(row: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.array([row[f"box_{side}"] for side in "xywh"])


def size_of(row: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.array([row["width"], row["height"]])


def is_inside(joints: np.ndarray[Any, Any], size_wh: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ((joints[:, :2] >= 0) & (joints[:, :2] <= size_wh)).all(axis=1)


def cut(box_xywh: np.ndarray[Any, Any], size_wh: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    (left, top), (right, bottom) = np.clip([box_xywh[:2], box_xywh[:2] + box_xywh[2:]], 0, size_wh)
    return np.array([left, top, right - left, bottom - top])


# --- what comes back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["coco-annotations", "cvat"])
def test_cocos_annotations_hold_joints_boxes_and_person_scores_exactly(to):
    for row, read in written_and_read(made_people(), to):
        joints = joints_of(row)
        np.testing.assert_array_equal(read.joints_xy.astype(np.float32), joints[:, :2].astype(np.float32))
        np.testing.assert_array_equal(read.visible, np.where(joints[:, 2].astype(np.float32) >= np.float32(0.7), 2, 1))
        np.testing.assert_array_equal(read.box_xywh, box_of(row))
        if to == "coco-annotations":
            assert read.score == row["score"]


@pytest.mark.parametrize("to", ["label-studio", "fiftyone"])
def test_relative_coordinates_come_back_as_the_same_float32_and_scores_exactly(to):
    for row, read in written_and_read(made_people(), to):
        joints, size = joints_of(row), size_of(row)
        held = is_inside(joints, size) if to == "label-studio" else np.full(len(joints), True)
        box = cut(box_of(row), size) if to == "label-studio" else box_of(row)
        np.testing.assert_array_equal(read.joints_xy[held].astype(np.float32), joints[held, :2].astype(np.float32))
        np.testing.assert_array_equal(read.joint_scores[held].astype(np.float32), joints[held, 2].astype(np.float32))
        np.testing.assert_allclose(read.box_xywh, box, rtol=FLOAT64_STEPS)
        assert np.isnan(read.joints_xy[~held]).all()
        assert read.score == row["score"]


def test_yolos_joints_come_back_within_half_a_millionth_of_the_pictures_side():
    for row, read in written_and_read(made_people(), "yolo-pose"):
        joints, size = joints_of(row), size_of(row)
        inside, bound = is_inside(joints, size), 0.5e-6 * size + 1e-9
        assert (abs(read.joints_xy - joints[:, :2])[inside] <= bound).all()
        assert (read.joints_xy[~inside] == 0).all()
        np.testing.assert_array_equal(read.visible > 0, inside)
        assert (abs(read.box_xywh - cut(box_of(row), size)) <= np.tile(2 * bound, 2)).all()


def test_the_annotations_are_a_truth_against_which_the_same_rows_have_an_ap_of_1():
    table = table_of(person("a.jpg", image_id=7), person("b/c.jpg", image_id=9), person("b/c.jpg", 1, image_id=9,
                     box_x=60.0, keypoints=[62.0, 21.0, 1.2, 65.0, 22.5, 0.9, 79.0, 29.0, 0.8]))

    truth = json.loads(export_keypoints(table, "coco-annotations", skeleton=TORSO3).data)

    assert evaluate_keypoints(table, truth, skeleton=TORSO3).coco["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("to", sorted(FORMATS))
def test_a_file_depends_neither_on_the_size_of_batches_nor_on_the_time(to, monkeypatch):
    table = made_people()
    table = table.set_column(table.column_names.index("image_id"), "image_id",
                             pa.array([int(key[:4]) for key in table["key"].to_pylist()]))
    options = ExportOptions(image_prefix="")
    once = export_keypoints(table, to, skeleton=COCO17, options=options).data

    monkeypatch.setattr(persons, "ROWS_PER_BATCH", 2)
    monkeypatch.setattr("pipeline.export.results.ROWS_PER_BATCH", 2)

    assert export_keypoints(table, to, skeleton=COCO17, options=options).data == once


# --- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "visible"), [
    (ExportOptions(), [2, 2, 1]),
    (ExportOptions(min_score=1.0), [2, 1, 1]),
    (ExportOptions(low_joints="absent"), [2, 2, 0]),
])
@pytest.mark.parametrize("to", ["coco-annotations", "yolo-pose", "fiftyone"])
def test_a_joint_is_visible_from_min_score_on_and_below_it_hidden_or_absent(to, options, visible):
    ((_, read),) = written_and_read(table_of(person("a.jpg")), to, options)

    assert read.visible.tolist() == visible


@pytest.mark.parametrize("to", PICTURE_FORMATS)
def test_an_absent_joint_has_no_place(to):
    options = ExportOptions(image_prefix="", low_joints="absent")

    ((_, read),) = written_and_read(table_of(person("a.jpg")), to, options)

    assert not np.nan_to_num(read.joints_xy[2]).any()


@pytest.mark.parametrize("to", PICTURE_FORMATS)
def test_a_joint_that_is_null_is_absent_whatever_the_options(to):
    ((_, read),) = written_and_read(table_of(person("a.jpg", keypoints=[12.0, 21.0, 1.2])), to)

    assert read.joints_xy[0] == pytest.approx([12.0, 21.0], abs=1e-3)
    assert not np.nan_to_num(read.joints_xy[1:]).any()


@pytest.mark.parametrize("to", PICTURE_FORMATS)
@pytest.mark.parametrize(("empty_pictures", "keys"), [(True, ["a.jpg", "d.png"]), (False, ["a.jpg"])])
def test_pictures_without_people_are_named_unless_told_otherwise_and_rejected_ones_never(to, empty_pictures, keys):
    table = table_of(person("a.jpg"), {"key": "b/c.jpg", "status": "rejected", "reason": "corrupt"},
                     {"key": "d.png", "status": "no_person", "width": 333, "height": 777})
    options = ExportOptions(image_prefix="", empty_pictures=empty_pictures)

    exported = export_keypoints(table, to, skeleton=TORSO3, options=options)

    assert sorted(READERS[to](exported.data, SIZES)) == keys
    assert (exported.pictures, exported.persons, exported.left_out) == (len(keys), 1, 0)


@pytest.mark.parametrize("to", PICTURE_FORMATS)
def test_a_dataset_without_anybody_is_a_file_without_anybody(to):
    exported = export_keypoints(table_of(), to, skeleton=TORSO3, options=AS_THEY_ARE)

    assert READERS[to](exported.data, {}) == {}
    assert exported.persons == exported.pictures == 0


@pytest.mark.parametrize(("prefix", "address"), [
    (None, "a b/ü#1.jpg"), ("/data/", "/data/a b/ü#1.jpg"), ("s3://bucket/", "s3://bucket/a b/ü#1.jpg"),
    ("https://host/", "https://host/a%20b/%C3%BC%231.jpg"),
    ("/data/local-files/?d=in/", "/data/local-files/?d=in/a%20b/%C3%BC%231.jpg"),
])
def test_the_prefix_goes_before_the_key_which_is_escaped_in_web_addresses(prefix, address):
    assert picture_address(prefix, "a b/ü#1.jpg") == address


# --- each format's own -----------------------------------------------------------------------------------------


def test_a_picture_without_an_image_id_gets_the_next_free_number():
    table = table_of(person("a.jpg"), person("b/c.jpg", image_id=9), person("d.png"))

    document = json.loads(export_keypoints(table, "coco-annotations", skeleton=TORSO3).data)

    assert [(image["file_name"], image["id"]) for image in document["images"]] == [
        ("a.jpg", 10), ("b/c.jpg", 9), ("d.png", 11)]
    assert [(entry["id"], entry["image_id"]) for entry in document["annotations"]] == [(1, 10), (2, 9), (3, 11)]


def test_two_pictures_with_one_image_id_are_refused_by_coco_alone():
    table = table_of(person("a.jpg", image_id=9), person("b/c.jpg", image_id=9))

    with pytest.raises(DataError, match=r"1 pictures have an image_id that another one has too, e\.g\. \[9\]"):
        export_keypoints(table, "coco-annotations", skeleton=TORSO3)
    assert export_keypoints(table, "yolo-pose", skeleton=TORSO3).persons == 2


def test_cvats_label_has_a_point_and_a_node_for_each_joint_and_a_line_for_each_edge():
    table = keypoint_rows([person("a.jpg", keypoints=np.ones((17, 3)))], COCO17)

    (label,) = json.loads(members(export_keypoints(table, "cvat", skeleton=COCO17).data)["labels.json"])

    assert [point["name"] for point in label["sublabels"]] == list(COCO17.joints)
    assert label["name"] == "person"
    assert label["svg"].count("<circle ") == 17
    assert label["svg"].count("<line ") == 19
    assert 'data-node-from="16" data-node-to="14"' in label["svg"]  # COCO's first edge, counted from 1


def test_where_nobody_is_cvats_label_shows_the_joints_in_a_circle_apart_from_each_other():
    table = table_of(person("a.jpg", status="no_person", person_index=None))
    (label,) = json.loads(members(export_keypoints(table, "cvat", skeleton=TORSO3).data)["labels.json"])
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', label["svg"])]
    assert len({(x, y) for x, y in places if 0 <= x <= 100 and 0 <= y <= 100}) == 3


def test_yolos_dataset_names_joints_and_mirror():
    files = members(export_keypoints(keypoint_rows([], COCO17), "yolo-pose", skeleton=COCO17).data)

    dataset = yaml.safe_load(files["dataset.yaml"])

    # https://github.com/ultralytics/ultralytics/blob/main/ultralytics/cfg/datasets/coco-pose.yaml
    assert dataset["kpt_shape"] == [17, 3]
    assert dataset["flip_idx"] == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    assert dataset["names"] == {0: "person"}


@pytest.mark.parametrize("to", ["yolo-pose", "label-studio"])
def test_a_person_whose_box_is_outside_of_the_picture_is_left_out_and_counted(to):
    table = table_of(person("a.jpg"), person("a.jpg", 1, box_x=700.0), {"key": "d.png", "status": "no_person",
                                                                       "width": 333, "height": 777})

    exported = export_keypoints(table, to, skeleton=TORSO3, options=AS_THEY_ARE)

    assert (exported.pictures, exported.persons, exported.left_out) == (2, 1, 1)
    assert {key: len(people) for key, people in READERS[to](exported.data, SIZES).items()} == {"a.jpg": 1, "d.png": 0}


@pytest.mark.parametrize(("key", "path"), [
    ("a.jpg", "labels/a.txt"), ("b.c/d.e.jpg", "labels/b.c/d.e.txt"), ("s3://bucket/a.jpg", "labels/bucket/a.txt"),
    ("/data/a.jpg", "labels/data/a.txt"),
    # Ultralytics replaces the last /images/ of the whole path
    ("train/images/a.jpg", "images/train/labels/a.txt"),
])
def test_yolos_labels_lie_where_ultralytics_looks_for_them(key, path):
    assert label_path(key) == path


def test_two_keys_with_one_label_file_are_refused_with_both():
    with pytest.raises(DataError, match=r"'d\.jpg' and 'd\.png' would both have the labels labels/d\.txt"):
        export_keypoints(table_of(person("d.jpg"), person("d.png")), "yolo-pose", skeleton=TORSO3)


def test_a_key_that_would_leave_the_folder_is_refused():
    with pytest.raises(DataError, match=r"'\.\./a\.jpg' has a step `\.\.`"):
        export_keypoints(table_of(person("../a.jpg")), "yolo-pose", skeleton=TORSO3)


def test_label_studio_needs_addresses():
    with pytest.raises(ConfigError, match=r"'a\.jpg' is none\. Give --set image_prefix="):
        export_keypoints(table_of(person("a.jpg")), "label-studio", skeleton=TORSO3)

    assert export_keypoints(table_of(person("s3://bucket/a.jpg")), "label-studio", skeleton=TORSO3).persons == 1


@pytest.mark.parametrize("column", ["width", "score"])
def test_a_person_without_size_or_score_is_refused_with_its_key(column):
    with pytest.raises(DataError, match=rf"1 rows that should have a {column} have none, e\.g\. of \['a\.jpg'\]"):
        export_keypoints(table_of(person("a.jpg", **{column: None})), "yolo-pose", skeleton=TORSO3)


# --- text by columns -------------------------------------------------------------------------------------------


def test_every_number_reads_back_as_itself():
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    singles = np.concatenate([bits[np.isfinite(bits)], np.float32([0, -0.0, 12.3, 1e-5, 16777216])])
    doubles = np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-500, 500).clip(-300, 300)

    assert (np.array([json.loads(text_) for text_ in text.numbers(singles).to_pylist()], np.float32) == singles).all()
    assert (np.array([json.loads(text_) for text_ in text.numbers(doubles).to_pylist()]) == doubles).all()


def test_objects_and_lists_are_jsons_own():
    names = ['a "quoted" name', "ü\n", "c"]

    lines = text.objects({"name": text.strings(names), "at": text.lists([text.numbers(np.arange(3)), "0.5"])})

    assert [json.loads(line) for line in lines.to_pylist()] == [
        {"name": name, "at": [number, 0.5]} for number, name in enumerate(names)]


def test_each_format_has_its_row_in_the_documentation():
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()

    assert all(f"`{to}`" in page for to in FORMATS)
