"""What of a person lies in the picture: for tools that refuse all of a picture for one number that is outside."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.export.persons import BOX_COLUMNS, ExportOptions, PictureBatch, box_array, visibility
from pipeline.rows import OK


def cut_boxes(boxes_xywh: npt.NDArray[np.float64], sizes_wh: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The part of each box [n, 4] that is in its picture; a width or height of 0: none is."""
    near = np.clip(boxes_xywh[:, :2], 0, sizes_wh)
    far = np.clip(boxes_xywh[:, :2] + boxes_xywh[:, 2:], 0, sizes_wh)
    return np.concatenate([near, far - near], axis=1)


def inside_batch(batch: PictureBatch) -> tuple[PictureBatch, npt.NDArray[np.float64]]:
    """The same pictures with the persons whose boxes touch them, and these boxes [n, 4], cut at the picture's edge."""
    boxes = cut_boxes(box_array(batch.persons), batch.person_sizes_wh)
    kept = (boxes[:, 2:] > 0).all(axis=1)
    kept_before = np.concatenate([[0], np.cumsum(kept)])
    inside = replace(batch, persons=batch.persons.filter(pa.array(kept)),
                     offsets=kept_before[batch.offsets].astype(np.int32))
    return inside, boxes[kept]


def visibility_inside(joints: npt.NDArray[np.float32], sizes_wh: npt.NDArray[np.float64],
                      options: ExportOptions) -> npt.NDArray[np.uint8]:
    """COCO's v of joints [n, K, 3], as `visibility`; 0 also for a joint that isn't in its picture, 0..W by 0..H."""
    xy = joints[..., :2]
    is_inside = ((xy >= 0) & (xy <= sizes_wh[:, None])).all(axis=-1)
    return np.where(is_inside, visibility(joints, options), 0).astype(np.uint8)


def count_outside(rows: pa.Table) -> int:
    """How many persons `inside_batch` leaves out."""
    persons = rows.select(["status", "width", "height", *BOX_COLUMNS]).filter(pc.equal(rows["status"], OK))
    sizes = np.stack([persons[side].to_numpy() for side in ("width", "height")], axis=1)
    return int((cut_boxes(box_array(persons), sizes)[:, 2:] <= 0).any(axis=1).sum())
