"""The inverses of the export formats, each written from its tool's documentation: a file's bytes -> persons by picture.

They share no code with the writers. What a format doesn't hold is None.
"""

import io
import json
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from pipeline.coco import parse_annotations

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ReadPerson:
    """One person: box [4] and joints [K, 2] in pixels, v [K] or None, joint scores [K] or None (NaN: absent)."""

    box_xywh: Array
    joints_xy: Array
    visible: Array | None
    joint_scores: Array | None
    score: float | None


People = dict[str, list[ReadPerson]]
Sizes = dict[str, tuple[int, int]]


def members(data: bytes) -> dict[str, bytes]:
    """The files of a .zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def read_coco_annotations(data: bytes, sizes: Sizes) -> People:
    """https://cocodataset.org/#format-data, by the reader that `shard --annotations` uses."""
    scores = {entry["id"]: entry.get("score") for entry in json.loads(data)["annotations"]}
    people: People = {}
    for name, image in parse_annotations(data, source="file").images.items():
        assert (image.width, image.height) == sizes[name]
        triples = [np.reshape(person.keypoints, (-1, 3)) for person in image.persons]
        people[name] = [ReadPerson(np.array(person.box_xywh), points[:, :2], points[:, 2], None,
                                   scores[person.annotation_id])
                        for person, points in zip(image.persons, triples, strict=True)]
    return people


def read_cvat(data: bytes, sizes: Sizes) -> People:
    """https://docs.cvat.ai/docs/manual/advanced/formats/format-coco-keypoints/"""
    return read_coco_annotations(members(data)["annotations/person_keypoints_default.json"], sizes)


def read_label_studio(data: bytes, sizes: Sizes) -> People:
    """https://labelstud.io/guide/predictions.html and .../tags/keypointlabels.html: percent of the picture."""
    people: People = {}
    joints = _label_studio_joints(members(data)["interface.xml"].decode())
    for task in json.loads(members(data)["tasks.json"]):
        key = task["data"]["key"]
        (prediction,) = task["predictions"]
        people[key] = [_label_studio_person(region, prediction["result"], joints, sizes[key])
                       for region in prediction["result"] if region["type"] == "rectanglelabels"]
    return people


def _label_studio_joints(interface: str) -> list[str]:
    import xml.etree.ElementTree as ElementTree

    labels = ElementTree.fromstring(interface).findall("KeyPointLabels/Label")
    return [label.attrib["value"] for label in labels]


def _label_studio_person(box: dict[str, Any], regions: list[dict[str, Any]], joints: list[str],
                         size_wh: tuple[int, int]) -> ReadPerson:
    assert (box["original_width"], box["original_height"]) == size_wh
    points = np.full((len(joints), 3), np.nan)
    for region in regions:
        if region.get("parentID") == box["id"]:
            value = region["value"]
            points[joints.index(value["keypointlabels"][0])] = [
                value["x"] * size_wh[0] / 100, value["y"] * size_wh[1] / 100, region["score"]]
    sides = np.array([box["value"][side] for side in ("x", "y", "width", "height")]) * np.tile(size_wh, 2) / 100
    return ReadPerson(sides, points[:, :2], None, points[:, 2], box["score"])


def read_fiftyone(data: bytes, sizes: Sizes) -> People:
    """https://docs.voxel51.com/user_guide/using_datasets.html#keypoints: shares of the picture, NaN where absent."""
    people: People = {}
    for sample in json.loads(data, object_hook=lambda entry: float(entry.get("$numberDouble", "nan"))
                             if set(entry) == {"$numberDouble"} else entry)["samples"]:
        size = sizes[sample["filepath"]]
        assert (sample["metadata"]["width"], sample["metadata"]["height"]) == size
        people[sample["filepath"]] = [
            ReadPerson(np.array(box["bounding_box"]) * np.tile(size, 2), np.array(pose["points"]) * size,
                       np.array(pose["visible"]), np.array(pose["confidence"]), box["confidence"])
            for box, pose in zip(sample["persons"]["detections"], sample["poses"]["keypoints"], strict=True)
            if box["index"] == pose["index"]]
    return people


def read_yolo_pose(data: bytes, sizes: Sizes) -> People:
    """https://docs.ultralytics.com/datasets/pose/: class, centre and size of the box, x y v of each joint."""
    files = members(data)
    num_joints, _ = yaml.safe_load(files.pop("dataset.yaml"))["kpt_shape"]
    key_of = {f"labels/{key.rpartition('.')[0]}.txt": key for key in sizes}
    return {key_of[name]: [_yolo_person(line.split(), num_joints, sizes[key_of[name]])
                           for line in text.decode().splitlines()] for name, text in files.items()}


def _yolo_person(columns: list[str], num_joints: int, size_wh: tuple[int, int]) -> ReadPerson:
    assert columns[0] == "0"
    centre, extent = (np.array(columns[at:at + 2], float) * size_wh for at in (1, 3))
    points = np.array(columns[5:], float).reshape(num_joints, 3)
    return ReadPerson(np.concatenate([centre - extent / 2, extent]), points[:, :2] * size_wh, points[:, 2], None, None)


READERS = {"coco-annotations": read_coco_annotations, "cvat": read_cvat, "label-studio": read_label_studio,
           "fiftyone": read_fiftyone, "yolo-pose": read_yolo_pose}
