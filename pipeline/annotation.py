"""One unit of pictures -> what became of each: joints, nobody there, or a reason for refusal.

Only what is about the picture or its boxes becomes a refusal. Trouble with the store passes through: the unit is then
not committed, and a later run does it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.images import PictureRefused, Pixels, decode_picture
from pipeline.prediction import CroppedPersons, Predictor
from pipeline.rows import NO_PERSON, OK, REJECTED, AnnotatedPicture, Boxes

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PictureToAnnotate:
    """One picture of a unit.

    picture  the row's values so far: key, image_id, etag, sha256, width, height (None: not known yet)
    read     gives its bytes; may refuse with what is about the object
    boxes    its persons, given (width, height)
    """

    picture: dict[str, Any]
    read: Callable[[], bytes]
    boxes: Callable[[int, int], Boxes]


def annotate_pictures(pictures: Iterable[PictureToAnnotate], predictor: Predictor, *,
                      decode: Callable[[bytes], Pixels] = decode_picture) -> list[AnnotatedPicture]:
    """What became of each picture, in their order. Persons of many pictures share a batch; each is decoded once.

    decode  bytes -> uint8 [H, W, 3] BGR, upright; or PictureRefused
    """
    opened: list[tuple[AnnotatedPicture, CroppedPersons | None]] = []

    def crops() -> Iterator[Array]:
        for picture in pictures:
            opened.append(_open(picture, predictor, decode))
            persons = opened[-1][1]
            if persons is not None:
                yield from persons.crops
                # the crops went into a batch; the regions are all that is needed later
                opened[-1] = (opened[-1][0], replace(persons, crops=persons.crops[:0]))

    joints, scores = predictor.predict_crops(crops())
    return list(_with_joints(opened, joints, scores, predictor))


def usable_boxes(boxes: Boxes, width: int, height: int) -> Boxes:
    """The boxes that can be cropped: finite, of positive size, and with some part inside the picture."""
    x, y, w, h = boxes.xywh.T
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(boxes.xywh).all(axis=1) & np.isfinite(boxes.scores) & (w > 0) & (h > 0)
        usable &= (x < width) & (y < height) & (x + w > 0) & (y + h > 0)
    return Boxes(boxes.ids[usable], boxes.xywh[usable], boxes.scores[usable])


def annotated_boxes(persons: Sequence[dict[str, Any]] | None) -> Boxes:
    """The annotations' own boxes of every person who isn't a crowd (`persons` of a shard row), each with score 1."""
    each = [person for person in persons or () if not person["iscrowd"]]
    if not each:
        return Boxes.none()
    return Boxes(np.array([person["annotation_id"] for person in each], np.int64),
                 np.array([person["box_xywh"] for person in each], np.float64), np.ones(len(each)))


def whole_image_box(width: int, height: int) -> Boxes:
    """One box that is the picture."""
    return Boxes(np.zeros(1, np.int64), np.array([[0.0, 0.0, width, height]]), np.ones(1))


def strongest_boxes(boxes: Boxes, *, min_score: float, max_persons: int | None) -> Boxes:
    """Those of at least `min_score`, at most `max_persons` of them by score, in their own order."""
    order = np.argsort(-boxes.scores, kind="stable")
    order = np.sort(order[boxes.scores[order] >= min_score][:max_persons])
    return Boxes(boxes.ids[order], boxes.xywh[order], boxes.scores[order])


def _open(task: PictureToAnnotate, predictor: Predictor,
          decode: Callable[[bytes], Pixels]) -> tuple[AnnotatedPicture, CroppedPersons | None]:
    try:
        data = task.read()
        picture = task.picture | {"sha256": hashlib.sha256(data).hexdigest()}
        image_bgr = decode(data)
    except (PictureRefused, *storage.ABOUT_THE_OBJECT) as error:
        return AnnotatedPicture(task.picture, REJECTED, storage.reason_of(error), str(error)), None
    height, width = image_bgr.shape[:2]
    picture |= {"width": width, "height": height}
    given = task.boxes(width, height)
    boxes = usable_boxes(given, width, height)
    refused = len(given.ids) - len(boxes.ids)
    if refused and not len(boxes.ids):
        found = f"none of its {refused} boxes has a finite, positive size and a part inside {width}x{height} pixels"
        return AnnotatedPicture(picture, REJECTED, "bad_boxes", found, boxes_refused=refused), None
    if not len(boxes.ids):
        return AnnotatedPicture(picture, NO_PERSON), None
    persons = predictor.crop_persons(image_bgr, boxes.xywh)
    return AnnotatedPicture(picture, OK, boxes=boxes, boxes_refused=refused), persons


def _with_joints(opened: Sequence[tuple[AnnotatedPicture, CroppedPersons | None]], joints: Array, scores: Array,
                 predictor: Predictor) -> Iterator[AnnotatedPicture]:
    start = 0
    for picture, persons in opened:
        if persons is None:
            yield picture
            continue
        of_picture = slice(start, start + len(picture.boxes.ids))
        start = of_picture.stop
        yield replace(picture, joints_xy=predictor.to_picture(joints[of_picture], persons),
                      joint_scores=scores[of_picture])
