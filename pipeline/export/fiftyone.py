"""FiftyOne: one JSON file as its `Dataset.to_json` writes it, for `Dataset.from_json`. Nothing in it is bound to one of
FiftyOne's versions, unlike its own dataset folders, which hold the database's documents.

Coordinates are shares of the picture's width and height, x / W without half a pixel, as FiftyOne's own COCO importer
makes them and its exporter turns them back.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.coco import category_json
from pipeline.export import text
from pipeline.export.addresses import picture_address
from pipeline.export.persons import (
    Exported,
    ExportOptions,
    PictureBatch,
    box_array,
    count_persons,
    exported_rows,
    joint_array,
    picture_batches,
    picture_starts,
    visibility,
)
from pipeline.pose.skeleton import Skeleton

PERSONS, POSES = "persons", "poses"  # the fields of a sample: boxes and joints; one person has one `index` in both
NAN = '{"$numberDouble": "NaN"}'  # how FiftyOne writes the place and confidence of an absent point
_FIELD = "fiftyone.core.fields.EmbeddedDocumentField(fiftyone.core.labels.{})"


def write_fiftyone(table: pa.Table, skeleton: Skeleton, options: ExportOptions) -> Exported:
    """A JSON file with a sample for each picture: `persons` (Detections) and `poses` (Keypoints).

    A box's confidence is the person's score, a point's is the joint's; neither is a probability. `visible` of a point
    is COCO's v, as FiftyOne's COCO importer keeps it. Relative file names are completed by `rel_dir` of `from_json`.
    """
    rows = exported_rows(table, options)
    samples = text.listed(_samples(batch, skeleton, options) for batch in picture_batches(rows))
    data = text.encoded(_document(samples, skeleton, options))
    return Exported(data, pictures=len(picture_starts(rows)), persons=count_persons(rows))


def _document(samples: Iterator[str], skeleton: Skeleton, options: ExportOptions) -> Iterator[str]:
    about: dict[str, Any] = {
        "name": "poses", "media_type": "image",
        "sample_fields": {PERSONS: _FIELD.format("Detections"), POSES: _FIELD.format("Keypoints")},
        "info": {"model": options.model},
        "default_skeleton": {"labels": list(skeleton.joints), "edges": [list(edge) for edge in skeleton.edges]}}
    yield json.dumps(about)[:-1] + ',\n"samples": '
    yield from samples
    yield "}\n"


def _samples(batch: PictureBatch, skeleton: Skeleton, options: ExportOptions) -> pa.Array:
    width, height = (text.numbers(side) for side in batch.sizes_wh.astype(np.int64).T)
    category = json.dumps(category_json(skeleton)["name"])
    labels = {"label": category, "index": text.numbers(batch.persons["person_index"].to_numpy())}
    boxes = text.gathered(_detections(batch, labels), batch.offsets, ", ")
    poses = text.gathered(_keypoints(batch, labels, skeleton, options), batch.offsets, ", ")
    return text.objects({
        "filepath": text.strings(picture_address(options.image_prefix, key) for key in batch.keys),
        "tags": "[]",
        "metadata": text.objects({"_cls": '"ImageMetadata"', "width": width, "height": height}),
        PERSONS: text.objects({"_cls": '"Detections"', "detections": text.lists([boxes])}),
        POSES: text.objects({"_cls": '"Keypoints"', "keypoints": text.lists([poses])})})


def _detections(batch: PictureBatch, labels: dict[str, text.Text]) -> pa.Array:
    box = box_array(batch.persons) / np.tile(batch.person_sizes_wh, 2)
    return text.objects({"_cls": '"Detection"', **labels, "bounding_box": _vector(box),
                         "confidence": text.numbers(batch.persons["score"].to_numpy())})


def _keypoints(batch: PictureBatch, labels: dict[str, text.Text], skeleton: Skeleton,
               options: ExportOptions) -> pa.Array:
    joints = joint_array(batch.persons, skeleton)
    visible = visibility(joints, options)
    places = joints[..., :2].astype(np.float64) / batch.person_sizes_wh[:, None]
    ids = range(skeleton.num_joints)
    points = [text.lists([_present(places[:, joint, axis], visible[:, joint]) for axis in (0, 1)]) for joint in ids]
    scores = [_present(joints[:, joint, 2], visible[:, joint]) for joint in ids]
    return text.objects({"_cls": '"Keypoint"', **labels, "points": text.lists(points),
                         "confidence": text.lists(scores), "visible": _vector(visible)})


def _vector(values: npt.NDArray[Any]) -> pa.Array:
    return text.lists([text.numbers(column) for column in values.T])


def _present(values: npt.NDArray[Any], visible: npt.NDArray[np.uint8]) -> pa.Array:
    is_present = visible > 0
    zero = values.dtype.type(0)  # np.where would widen float32 to float64, and print 0.8 as 0.800000011920929
    return pc.if_else(pa.array(is_present), text.numbers(np.where(is_present, values, zero)), pa.scalar(NAN))
