"""The export formats, read by the tools' own libraries: `pip install '.[tools]'`, or each in an environment of its own.

A library that isn't there is a skip with its name. docs/export.md says which versions have been read with.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from pipeline.export import ExportOptions, export_keypoints
from pipeline.pose.skeleton import COCO17
from tests.export_readers import members
from tests.test_export_formats import box_of, is_inside, joints_of, made_people

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def people() -> pa.Table:
    """Thirty pictures with 0 to 3 persons, joints and boxes also outside of the picture."""
    return made_people()


def exported(table: pa.Table, to: str, **options: Any) -> bytes:
    return export_keypoints(table, to, skeleton=COCO17, options=ExportOptions(**options)).data


def unpacked(data: bytes, folder: Path) -> Path:
    for name, content in members(data).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def persons_of(table: pa.Table, key: str) -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if row["key"] == key and row["status"] == "ok"]


def test_pycocotools_loads_the_annotations_and_finds_each_persons_joints(people, tmp_path):
    from pycocotools.coco import COCO

    path = tmp_path / "annotations.json"
    path.write_bytes(exported(people, "coco-annotations"))

    coco = COCO(str(path))

    (category,) = coco.loadCats(coco.getCatIds(catNms=["person"]))
    assert category["keypoints"] == list(COCO17.joints)
    assert [16, 14] in category["skeleton"]
    for image in coco.dataset["images"]:
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"], iscrowd=False))
        for row, annotation in zip(persons_of(people, image["file_name"]), annotations, strict=True):
            assert annotation["keypoints"][0::3] == joints_of(row)[:, 0].astype(np.float32).astype(str).astype(
                float).tolist()


def test_datumaro_imports_what_cvat_is_given(people, tmp_path):
    datumaro = pytest.importorskip("datumaro", reason="needs datumaro, whose importer CVAT's is a fork of")
    folder = unpacked(exported(people, "cvat"), tmp_path)
    (folder / "images").mkdir()  # datumaro wants the folder, CVAT doesn't

    dataset = datumaro.Dataset.import_from(str(folder), "coco_person_keypoints")

    for item in dataset:
        skeletons = sorted((one for one in item.annotations if one.type == datumaro.AnnotationType.points),
                           key=lambda points: points.attributes["score"])
        rows = sorted(persons_of(people, f"{item.id}.jpg"), key=lambda row: row["score"])
        assert item.subset == "default"
        for row, points in zip(rows, skeletons, strict=True):
            joints = joints_of(row)
            np.testing.assert_allclose(np.reshape(points.points, (-1, 2)), joints[:, :2], atol=0.005)  # two decimals
            assert [one.value for one in points.visibility] == np.where(joints[:, 2] >= 0.7, 2, 1).tolist()
            assert float(points.attributes["score"]) == row["score"]
    assert len(dataset) == len(set(people["key"].to_pylist()))


def test_label_studio_finds_no_fault_with_the_predictions(people):
    interface = pytest.importorskip("label_studio_sdk.label_interface", reason="needs label-studio-sdk")
    files = members(exported(people, "label-studio", image_prefix="s3://bucket/"))

    known = interface.LabelInterface(files["interface.xml"].decode())

    known.validate()
    for task in json.loads(files["tasks.json"]):
        assert known.validate_task({"data": task["data"]})
        assert known.validate_prediction(task["predictions"][0], return_errors=True) == []


def test_label_studios_own_import_of_coco_gives_the_same_percentages(people, tmp_path):
    coco = pytest.importorskip("label_studio_sdk.converter.imports.coco", reason="needs label-studio-sdk")
    (tmp_path / "coco.json").write_bytes(exported(people, "coco-annotations", empty_pictures=False))

    coco.convert_coco_to_ls(str(tmp_path / "coco.json"), str(tmp_path / "theirs.json"), image_root_url="s3://bucket")

    theirs = {task["data"]["image"]: _places(task["annotations"]) for task in
              json.loads((tmp_path / "theirs.json").read_text())}
    ours = {task["data"]["image"]: _places(task["predictions"]) for task in json.loads(
        members(exported(people, "label-studio", empty_pictures=False, image_prefix="s3://bucket/"))["tasks.json"])}
    assert theirs.keys() == ours.keys()
    for address, places in theirs.items():
        in_picture = [xy for xy in places if 0 <= min(xy) <= max(xy) <= 100]
        np.testing.assert_allclose(np.sort(ours[address], axis=0), np.sort(in_picture, axis=0), rtol=1e-6)


def _places(predictions: list[dict[str, Any]]) -> list[list[float]]:
    return [[region["value"]["x"], region["value"]["y"]] for one in predictions for region in one["result"]
            if region["type"] == "keypointlabels"]


def test_fiftyone_reads_each_sample_and_the_skeleton(people):
    fiftyone = pytest.importorskip("fiftyone", reason="needs fiftyone")
    from fiftyone.core.odm import get_field_kwargs
    from fiftyone.core.odm.dataset import DatasetDocument

    document = json.loads(exported(people, "fiftyone", low_joints="absent"))

    skeleton = DatasetDocument.default_skeleton.to_python(document["default_skeleton"])
    assert skeleton.labels == list(COCO17.joints)
    kinds = {name: get_field_kwargs(kind)["embedded_doc_type"] for name, kind in document["sample_fields"].items()}
    assert kinds == {"persons": fiftyone.Detections, "poses": fiftyone.Keypoints}
    for sample in map(fiftyone.Sample.from_dict, document["samples"]):
        size = np.array([sample.metadata.width, sample.metadata.height])
        for row, box, pose in zip(persons_of(people, Path(sample.filepath).name), sample.persons.detections,
                                  sample.poses.keypoints, strict=True):
            joints, low = joints_of(row), joints_of(row)[:, 2] < 0.7
            np.testing.assert_allclose(np.array(pose.points) * size, np.where(low[:, None], np.nan, joints[:, :2]))
            np.testing.assert_allclose(pose.confidence, np.where(low, np.nan, joints[:, 2]), rtol=1e-6)
            np.testing.assert_allclose(np.array(box.bounding_box) * np.tile(size, 2), box_of(row))
            assert box.confidence == row["score"]


def test_fiftyones_own_import_of_coco_gives_the_same_points(people):
    fiftyone = pytest.importorskip("fiftyone", reason="needs fiftyone")
    from fiftyone.utils.coco import COCOObject

    coco = json.loads(exported(people, "coco-annotations"))
    size_of = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    theirs = [COCOObject.from_anno_dict(entry).to_keypoints(size_of[entry["image_id"]], classes_map={1: "person"})
              for entry in coco["annotations"]]
    ours = [pose for sample in json.loads(exported(people, "fiftyone"))["samples"]
            for pose in fiftyone.Sample.from_dict(sample).poses.keypoints]

    for their, our in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(our.points, their.points, rtol=1e-6)
        assert (our.label, our["visible"]) == (their.label, their["visible"])


def test_fiftyone_makes_a_dataset_of_the_file(people, tmp_path):
    fiftyone = pytest.importorskip("fiftyone", reason="needs fiftyone")
    (tmp_path / "fiftyone.json").write_bytes(exported(people, "fiftyone"))

    try:
        dataset = fiftyone.Dataset.from_json(str(tmp_path / "fiftyone.json"), rel_dir=str(tmp_path))
    except fiftyone.core.config.FiftyOneConfigError as error:
        pytest.skip(f"needs the database of fiftyone: {error}")

    assert dataset.count("persons.detections") == sum(people["person_index"].is_valid().to_pylist())


@pytest.fixture
def yolo_folder(people: pa.Table, tmp_path: Path) -> Path:
    """The archive unpacked, with pictures of the right sizes in images/."""
    folder = unpacked(exported(people, "yolo-pose"), tmp_path)
    (folder / "images").mkdir()
    for row in people.to_pylist():
        cv2.imwrite(str(folder / "images" / row["key"]), np.zeros((row["height"], row["width"], 3), np.uint8))
    return folder


def test_ultralytics_accepts_the_dataset_and_each_label_file(people, yolo_folder):
    ultralytics = pytest.importorskip("ultralytics.data.utils", reason="needs ultralytics and torchvision")

    dataset = ultralytics.check_det_dataset(str(yolo_folder / "dataset.yaml"), autodownload=False)

    assert Path(dataset["train"]) == yolo_folder / "images"
    images = sorted(map(str, (yolo_folder / "images").iterdir()))
    num_persons = 0
    for image, labels in zip(images, ultralytics.img2label_paths(images), strict=True):
        found = ultralytics.verify_image_label(
            (image, labels, "", True, len(dataset["names"]), *dataset["kpt_shape"], False))
        assert found[0] == image, found[-1]
        _, boxes, (height, width), _, keypoints, missing, *_ = found
        num_persons += len(boxes)
        assert missing == 0
        for row, points in zip(persons_of(people, Path(image).name), keypoints, strict=True):
            joints, size = joints_of(row), np.array([width, height])
            inside = is_inside(joints, size)
            # six decimals, and the float32 that Ultralytics reads them into
            np.testing.assert_allclose((points[:, :2] * size)[inside], joints[inside, :2], atol=5000 * 6e-7)
            np.testing.assert_array_equal(points[:, 2], np.where(inside, np.where(joints[:, 2] >= 0.7, 2, 1), 0))
    assert num_persons == people["person_index"].length() - people["person_index"].null_count
