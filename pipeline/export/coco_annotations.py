"""COCO keypoint annotations, as `shard --annotations`, pycocotools and most trainers read them; and CVAT's archive.

The inverse is `pipeline.coco.parse_annotations`. Coordinates go out as they are: COCO's joints too are pixels counted
from 0, its boxes too are measured from the picture's corner.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.coco import PERSON_CATEGORY, category_json
from pipeline.errors import DataError
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
    person_rows,
    picture_batches,
    picture_starts,
    visibility,
)
from pipeline.pose.skeleton import Skeleton

CVAT_ANNOTATIONS = "annotations/person_keypoints_default.json"  # COCO's name; `default` is CVAT's only subset
CVAT_LABELS = "labels.json"  # a name without "_", which CVAT's importer doesn't take for annotations
TEMPLATE_ROWS = 1000  # enough for a mean pose
CVAT_CANVAS = 100.0  # side of the square in which CVAT has a skeleton drawn


def write_coco_annotations(table: pa.Table, skeleton: Skeleton, options: ExportOptions) -> Exported:
    """A COCO keypoints file: images, annotations (keypoints x, y, v; bbox; area; score), the category.

    A joint with v = 0 has x = y = 0. `area` is the box's, since there is no outline. `score` is the person's, which
    COCO's own files don't have and readers pass over. A picture keeps its image_id; one without gets the next free
    number, in the order of the keys. Two pictures with one image_id are a DataError.
    """
    rows = exported_rows(table, options)
    data = text.encoded(_document(rows, skeleton, options, for_cvat=False))
    return Exported(data, pictures=len(picture_starts(rows)), persons=count_persons(rows))


def write_cvat(table: pa.Table, skeleton: Skeleton, options: ExportOptions) -> Exported:
    """What CVAT imports as "COCO Keypoints 1.0": the same annotations, with the score as an attribute, in a .zip.

    Beside them `labels.json`, the label with its skeleton for the `Raw` tab of CVAT's label editor.
    """
    rows = exported_rows(table, options)
    labels = json.dumps(_cvat_labels(rows, skeleton), indent=1)
    data = text.archive([(CVAT_ANNOTATIONS, _document(rows, skeleton, options, for_cvat=True)),
                         (CVAT_LABELS, [labels])])
    return Exported(data, pictures=len(picture_starts(rows)), persons=count_persons(rows))


def _document(rows: pa.Table, skeleton: Skeleton, options: ExportOptions, *, for_cvat: bool) -> Iterator[str]:
    image_ids = _image_ids(rows)
    yield f'{{"info": {json.dumps({"description": options.model})}, "licenses": [],\n"images": '
    yield from text.listed(_images(rows, image_ids, options))
    yield ',\n"annotations": '
    yield from text.listed(_annotations(rows, image_ids, skeleton, options, for_cvat=for_cvat))
    yield f',\n"categories": {json.dumps([category_json(skeleton)])}}}\n'


def _images(rows: pa.Table, image_ids: npt.NDArray[np.int64], options: ExportOptions) -> Iterator[pa.Array]:
    first = 0
    for batch in picture_batches(rows):
        ids = image_ids[first:first + batch.pictures.num_rows]
        first += len(ids)
        width, height = batch.sizes_wh.astype(np.int64).T
        names = text.strings(picture_address(options.image_prefix, key) for key in batch.keys)
        yield text.objects({"id": text.numbers(ids), "file_name": names, "width": text.numbers(width),
                            "height": text.numbers(height)})


def _annotations(rows: pa.Table, image_ids: npt.NDArray[np.int64], skeleton: Skeleton, options: ExportOptions, *,
                 for_cvat: bool) -> Iterator[pa.Array]:
    first_picture, first_person = 0, 1
    for batch in picture_batches(rows):
        ids = image_ids[first_picture:first_picture + batch.pictures.num_rows]
        fields = {"id": text.numbers(first_person + np.arange(batch.persons.num_rows)),
                  "image_id": text.numbers(np.repeat(ids, np.diff(batch.offsets))),
                  **_person_fields(batch, skeleton, options)}
        if for_cvat:
            fields["attributes"] = text.objects({"score": fields.pop("score")})
        first_picture += len(ids)
        first_person += batch.persons.num_rows
        yield text.objects(fields)


def _person_fields(batch: PictureBatch, skeleton: Skeleton, options: ExportOptions) -> dict[str, text.Text]:
    boxes = box_array(batch.persons)
    joints = joint_array(batch.persons, skeleton)
    visible = visibility(joints, options)
    xy = np.where(visible[..., None] > 0, joints[..., :2], np.float32(0))
    triples = [piece for joint in range(skeleton.num_joints)
               for piece in (*map(text.numbers, xy[:, joint].T), text.numbers(visible[:, joint]))]
    return {"category_id": str(PERSON_CATEGORY), "iscrowd": "0",
            "bbox": text.lists([text.numbers(side) for side in boxes.T]),
            "area": text.numbers(boxes[:, 2] * boxes[:, 3]),
            "num_keypoints": text.numbers((visible > 0).sum(axis=1)),
            "keypoints": text.lists(triples),
            "score": text.numbers(batch.persons["score"].to_numpy())}


def _image_ids(rows: pa.Table) -> npt.NDArray[np.int64]:
    """One for each picture: its own, or the next number above all that are there."""
    own = rows["image_id"].take(pa.array(picture_starts(rows)))
    ids = own.fill_null(0).to_numpy().copy()
    missing = own.is_null().to_numpy()
    _refuse_twice(ids[~missing])
    ids[missing] = ids[~missing].max(initial=0) + 1 + np.arange(missing.sum())
    return np.asarray(ids, np.int64)


def _refuse_twice(ids: npt.NDArray[np.int64]) -> None:
    found, counts = np.unique(ids, return_counts=True)
    if len(found) < len(ids):
        raise DataError(f"{len(ids) - len(found)} pictures have an image_id that another one has too, e.g. "
                        f"{found[counts > 1][:3].tolist()}, and COCO tells pictures apart by it. Export to another "
                        "format, or annotate a shard dataset whose pictures have ids of their own.")


# --- CVAT's label --------------------------------------------------------------------------------------------


def _cvat_labels(rows: pa.Table, skeleton: Skeleton) -> list[dict[str, Any]]:
    """The one label, as CVAT's `Raw` tab takes it: a skeleton whose points have the joints' names."""
    points = [{"name": joint, "type": "points", "attributes": []} for joint in skeleton.joints]
    score = {"name": "score", "input_type": "text", "mutable": False, "values": [""], "default_value": ""}
    return [{"name": category_json(skeleton)["name"], "type": "skeleton", "attributes": [score], "sublabels": points,
             "svg": _skeleton_svg(skeleton, _template(rows, skeleton))}]


def _template(rows: pa.Table, skeleton: Skeleton) -> npt.NDArray[np.float64]:
    """Where to draw each joint in CVAT's square [K, 2]: its mean place in the first boxes; a circle without any."""
    turns = np.linspace(0, 2 * np.pi, skeleton.num_joints, endpoint=False)
    shares = np.stack([0.5 + 0.4 * np.sin(turns), 0.5 - 0.4 * np.cos(turns)], axis=1)
    persons = person_rows(rows.slice(0, TEMPLATE_ROWS))
    boxes, joints = box_array(persons)[:, None], joint_array(persons, skeleton)[..., :2]
    places = (joints - boxes[..., :2]) / boxes[..., 2:]
    if persons.num_rows and np.isfinite(places).all():
        shares = places.mean(axis=0)
    return np.round(CVAT_CANVAS * np.clip(shares, 0.02, 0.98), 2)


def _skeleton_svg(skeleton: Skeleton, places: npt.NDArray[np.float64]) -> str:
    lines = [_edge(edge, places) for edge in skeleton.edges]
    nodes = [f'<circle r="0.75" cx="{x}" cy="{y}" data-type="element node" data-element-id="{number}" '
             f'data-node-id="{number}" data-label-name={quoteattr(joint)}></circle>'
             for number, (joint, (x, y)) in enumerate(zip(skeleton.joints, places, strict=True), start=1)]
    return "".join([*lines, *nodes])


def _edge(edge: Sequence[int], places: npt.NDArray[np.float64]) -> str:
    (x1, y1), (x2, y2) = places[list(edge)]
    return (f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" data-type="edge" data-node-from="{edge[0] + 1}" '
            f'data-node-to="{edge[1] + 1}"></line>')
