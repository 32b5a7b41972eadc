"""Label Studio: tasks with predictions to begin from, and the labelling interface that they fit.

Coordinates are percent of the picture's width and height, 100 x / W without half a pixel, as Label Studio's own
converter makes them of COCO's files and turns them back. It knows nothing of Label Studio's server.
"""

import json
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.coco import category_json
from pipeline.errors import ConfigError
from pipeline.export import text
from pipeline.export.addresses import picture_address
from pipeline.export.inside import count_outside, inside_batch, visibility_inside
from pipeline.export.persons import (
    Exported,
    ExportOptions,
    PictureBatch,
    count_persons,
    exported_rows,
    joint_array,
    picture_batches,
    picture_starts,
)
from pipeline.pose.skeleton import Skeleton

TASKS, INTERFACE = "tasks.json", "interface.xml"
POINT_PERCENT = 0.5  # the width at which a joint is drawn


def write_label_studio(table: pa.Table, skeleton: Skeleton, options: ExportOptions) -> Exported:
    """A .zip with `tasks.json` (one task for each picture, its persons as a prediction) and `interface.xml`.

    A person is a rectangle with its score, a joint a key point with its score, whose parent is the rectangle. Label
    Studio refuses whatever is beyond 100 percent. So boxes are cut at the picture's edge, a joint that is absent or
    outside of the picture is left out, and so is a person whose box is wholly outside, which is counted.
    Pictures that it can't fetch, since there is neither an `image_prefix` nor a whole URI, are a ConfigError.
    """
    rows = exported_rows(table, options)
    _refuse_no_address(rows, options)
    tasks = text.listed(_tasks(batch, skeleton, options) for batch in picture_batches(rows))
    data = text.archive([(INTERFACE, [interface(skeleton)]), (TASKS, tasks)])
    left_out = count_outside(rows)
    return Exported(data, pictures=len(picture_starts(rows)), persons=count_persons(rows) - left_out,
                    left_out=left_out)


def interface(skeleton: Skeleton) -> str:
    """The labelling interface (XML): one rectangle label, one key point label for each joint."""
    joints = "\n".join(f"    <Label value={quoteattr(joint)}/>" for joint in skeleton.joints)
    return (f'<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
            f'  <RectangleLabels name="box" toName="image">\n    <Label value={quoteattr(_category(skeleton))}/>\n'
            f'  </RectangleLabels>\n  <KeyPointLabels name="joint" toName="image">\n{joints}\n  </KeyPointLabels>\n'
            '</View>\n')


def _category(skeleton: Skeleton) -> str:
    return str(category_json(skeleton)["name"])


def _refuse_no_address(rows: pa.Table, options: ExportOptions) -> None:
    key = rows["key"][0].as_py() if rows.num_rows else ""
    if options.image_prefix is None and key and "://" not in key:
        raise ConfigError(f"Label Studio fetches pictures by their address, and {key!r} is none. Give --set "
                          "image_prefix=s3://bucket/prefix/ (with a cloud storage in the project), "
                          "https://host/folder/, or /data/local-files/?d=folder/.")


def _tasks(batch: PictureBatch, skeleton: Skeleton, options: ExportOptions) -> pa.Array:
    addresses = text.strings(picture_address(options.image_prefix, key) for key in batch.keys)
    inside, boxes = inside_batch(batch)
    regions = text.joined(",\n   ", [_rectangles(inside, boxes, skeleton), *_points(inside, skeleton, options)])
    results = text.lists([text.gathered(regions, inside.offsets, ",\n   ")])
    predictions = text.objects({"model_version": json.dumps(options.model), "result": results})
    return text.objects({"data": text.objects({"image": addresses, "key": text.strings(batch.keys)}),
                         "predictions": text.lists([predictions])})


def _rectangles(batch: PictureBatch, boxes_xywh: npt.NDArray[np.float64], skeleton: Skeleton) -> pa.Array:
    sizes = batch.person_sizes_wh
    x, y, width, height = (100 * boxes_xywh / np.tile(sizes, 2)).T
    value = {"x": text.numbers(x), "y": text.numbers(y), "width": text.numbers(width), "height": text.numbers(height),
             "rotation": "0", "rectanglelabels": json.dumps([_category(skeleton)])}
    return text.objects({"id": text.joined("", ['"person-', _person_numbers(batch), '"']),
                         **_region("rectanglelabels", "box", value, sizes),
                         "score": text.numbers(batch.persons["score"].to_numpy())})


def _points(batch: PictureBatch, skeleton: Skeleton, options: ExportOptions) -> list[pa.Array]:
    """For each joint a column with each person's key point."""
    joints = joint_array(batch.persons, skeleton)
    sizes = batch.person_sizes_wh
    present = visibility_inside(joints, sizes, options) > 0
    places = 100 * joints[..., :2].astype(np.float64) / sizes[:, None]
    numbers = _person_numbers(batch)
    return [_point(name, numbers, places[:, joint], joints[:, joint, 2], present[:, joint], sizes)
            for joint, name in enumerate(skeleton.joints)]


def _person_numbers(batch: PictureBatch) -> pa.Array:
    return text.numbers(batch.persons["person_index"].to_numpy())


def _point(joint: str, numbers: pa.Array, percent_xy: npt.NDArray[np.float64], scores: npt.NDArray[np.float32],
           present: npt.NDArray[np.bool_], sizes_wh: npt.NDArray[np.float64]) -> pa.Array:
    """One joint's key point for each person; NULL where it is absent."""
    x, y = np.where(present[:, None], percent_xy, 0.0).T
    value = {"x": text.numbers(x), "y": text.numbers(y), "width": json.dumps(POINT_PERCENT),
             "keypointlabels": json.dumps([joint])}
    name = json.dumps(joint)[1:-1]
    points = text.objects({"id": text.joined("", ['"person-', numbers, f'-{name}"']),
                           "parentID": text.joined("", ['"person-', numbers, '"']),
                           **_region("keypointlabels", "joint", value, sizes_wh),
                           "score": text.numbers(np.where(present, scores, np.float32(0)))})
    return pc.if_else(pa.array(present), points, pa.scalar(None, pa.string()))


def _region(kind: str, control: str, value: dict[str, text.Text],
            sizes_wh: npt.NDArray[np.float64]) -> dict[str, text.Text]:
    width, height = (text.numbers(side) for side in sizes_wh.astype(np.int64).T)
    return {"type": json.dumps(kind), "from_name": json.dumps(control), "to_name": json.dumps("image"),
            "original_width": width, "original_height": height, "image_rotation": "0",
            "value": text.objects(value)}
