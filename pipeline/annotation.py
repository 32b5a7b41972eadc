"""One unit of pictures -> what became of each: joints, nobody there, or a reason for refusal.

Only what is about the picture or its boxes becomes a refusal. Trouble with the store passes through: the unit is then
not committed, and a later run does it.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.ahead import map_ahead
from pipeline.images import REASONS, PictureRefused, Pixels, decode_picture
from pipeline.pose.crop import CroppedPersons
from pipeline.pose.oks import suppress_poses
from pipeline.pose.skeleton import Skeleton
from pipeline.prediction import Predictor
from pipeline.rows import NO_PERSON, OK, REJECTED, AnnotatedPicture, Boxes, person_scores

Array = np.ndarray[Any, Any]
CropPersons = Callable[[Array, Array], CroppedPersons]  # of a picture, by boxes float64 [n, 4]
Opened = tuple[AnnotatedPicture, CroppedPersons | None]  # before the network: what it has to see, if anything


# Of a box's numbers. Pictures have 65,535 pixels a side at most, and up to a million float32 tells joints apart to 0.06
LARGEST_PX, SMALLEST_PX = 1e6, 1e-3


@dataclass(frozen=True)
class PictureToAnnotate:
    """One picture of a unit.

    picture  the row's values so far: key, image_id, etag, sha256, width, height (None: not known yet)
    read     gives its bytes; may refuse with what is about the object
    boxes    its persons, given (width, height)
    earlier  what an earlier run of the same intent made of the picture of this key; copied, if it is still the same.
             Its etag is None where it isn't of this very object
    """

    picture: dict[str, Any]
    read: Callable[[], bytes]
    boxes: Callable[[int, int], Boxes]
    earlier: AnnotatedPicture | None = None


@dataclass(frozen=True)
class DecodedPicture:
    """A picture that has to be looked at: the row's values, with sha256, width and height; uint8 [H, W, 3] BGR."""

    picture: dict[str, Any]
    image_bgr: Pixels


def decode_unless_known(task: PictureToAnnotate,
                        decode: Callable[[bytes], Pixels]) -> DecodedPicture | AnnotatedPicture:
    """The picture, decoded; or what became of it: refused now, or the same as an earlier run has seen."""
    if (kept := _unchanged(task)) is not None:
        return kept
    picture = task.picture
    try:
        data = task.read()
        # a shard's pictures were checked with the shard: hashing them again would take a fifth of decoding's time
        picture = picture | {"sha256": picture["sha256"] or hashlib.sha256(data).hexdigest()}
        if (kept := _unchanged(replace(task, picture=picture))) is not None:
            return kept
        image_bgr = decode(data)
    except (PictureRefused, *storage.ABOUT_THE_OBJECT) as error:
        return AnnotatedPicture(picture, REJECTED, storage.reason_of(error), str(error))
    height, width = image_bgr.shape[:2]
    return DecodedPicture(picture | {"width": width, "height": height}, image_bgr)


def annotate_pictures(pictures: Iterable[PictureToAnnotate], predictor: Predictor, *,
                      decoders: int = 1, oks_nms: float | None = None) -> list[AnnotatedPicture]:
    """What became of each picture, in their order. Persons of many pictures share a batch; each is decoded once.

    decoders  threads that decode and crop while the network runs; 1: the caller's, in turns. They change no row.
    oks_nms   a person whose pose is more like a better one's than this OKS is left out

    What an earlier run made of the same bytes with the same boxes is copied; of the same object with the same ETag it
    isn't even read.
    """
    opened = open_pictures(pictures, predictor.crop_persons, decode=decode_picture, threads=decoders)
    return annotate_opened(opened, predictor, oks_nms=oks_nms)


def open_pictures(pictures: Iterable[PictureToAnnotate], crop: CropPersons, *, decode: Callable[[bytes], Pixels],
                  threads: int) -> Iterator[Opened]:
    """Each picture decoded and its persons cropped, in order, by so many threads; 1: the caller's.

    decode  bytes -> uint8 [H, W, 3] BGR, upright; or PictureRefused
    """
    if threads == 1:
        return (_open(picture, crop, decode) for picture in pictures)
    # bytes that come as a stream, as a shard's may, are taken from it in its order
    return map_ahead(lambda picture: _open(picture, crop, decode), map(_read_now, pictures), threads=threads)


def annotate_opened(pictures: Iterable[Opened], predictor: Predictor, *,
                    oks_nms: float | None = None) -> list[AnnotatedPicture]:
    """`annotate_pictures` from where pictures are opened."""
    opened: list[Opened] = []

    def crops() -> Iterator[Array]:
        for one in pictures:
            opened.append(one)
            persons = opened[-1][1]
            if persons is not None:
                yield from persons.crops
                # the crops went into a batch; the regions are all that is needed later (a slice would hold them all)
                opened[-1] = (opened[-1][0], replace(persons, crops=persons.crops[:0].copy()))

    joints, scores = predictor.predict_crops(crops())
    annotated = _with_joints(opened, joints, scores, predictor)
    return [one if oks_nms is None else _suppressed(one, predictor.skeleton, oks_nms) for one in annotated]


def usable_boxes(boxes: Boxes, width: int, height: int) -> Boxes:
    """The boxes that can be cropped: finite, no number beyond LARGEST_PX, sides from SMALLEST_PX on, and with some part
    inside the picture. They are never clipped."""
    x, y, w, h = boxes.xywh.T
    with np.errstate(invalid="ignore"):  # NaN is neither
        usable = (np.abs(boxes.xywh) <= LARGEST_PX).all(axis=1) & np.isfinite(boxes.scores)
        usable &= (w >= SMALLEST_PX) & (h >= SMALLEST_PX)
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
    order = np.sort(order[~(boxes.scores[order] < min_score)][:max_persons])  # NaN stays, to be refused and counted
    return Boxes(boxes.ids[order], boxes.xywh[order], boxes.scores[order])


def read_ahead(pictures: Iterable[PictureToAnnotate], *, threads: int) -> Iterator[PictureToAnnotate]:
    """The same pictures, whose bytes are read by threads, some ahead of who asks for them."""
    return map_ahead(_read_now, pictures, threads=threads)


def _read_now(task: PictureToAnnotate) -> PictureToAnnotate:
    if _unchanged(task) is not None:
        return task
    try:
        data = task.read()
    except (PictureRefused, storage.StorageError) as error:
        return replace(task, read=functools.partial(_raise, error))
    return replace(task, read=lambda: data)


def _raise(error: Exception) -> bytes:
    raise error


def _open(task: PictureToAnnotate, crop: CropPersons, decode: Callable[[bytes], Pixels]) -> Opened:
    decoded = decode_unless_known(task, decode)
    if isinstance(decoded, AnnotatedPicture):
        return decoded, None
    opened = judge_boxes(decoded.picture, task.boxes(decoded.picture["width"], decoded.picture["height"]))
    return opened, crop(decoded.image_bgr, opened.boxes.xywh) if opened.status == OK else None


def judge_boxes(picture: dict[str, Any], given: Boxes) -> AnnotatedPicture:
    """A picture that could be decoded, before its joints are known; `picture` has its upright width and height."""
    width, height = picture["width"], picture["height"]
    boxes = usable_boxes(given, width, height)
    refused = len(given.ids) - len(boxes.ids)
    if len(boxes.ids):
        return AnnotatedPicture(picture, OK, boxes=boxes, boxes_refused=refused)
    if not refused:
        return AnnotatedPicture(picture, NO_PERSON)
    found = (f"none of its {refused} boxes has numbers of at most {LARGEST_PX:,.0f}, sides of at least {SMALLEST_PX:g} "
             f"and a part inside {width}x{height} pixels")
    return AnnotatedPicture(picture, REJECTED, "bad_boxes", found, boxes_refused=refused)


def _unchanged(task: PictureToAnnotate) -> AnnotatedPicture | None:
    """What the earlier run made of this picture, if it would be made of it again, as far as can be told by now."""
    earlier = task.earlier
    if earlier is None or not _same_bytes(task.picture, earlier.picture) or _may_change(earlier.reason):
        return None
    picture = task.picture | {"sha256": task.picture["sha256"] or earlier.picture["sha256"]}
    if earlier.picture["width"] is None or earlier.picture["height"] is None:  # nobody has seen its boxes
        return replace(earlier, picture=picture, reused=True) if earlier.status == REJECTED else None
    now = judge_boxes(picture | {name: earlier.picture[name] for name in ("width", "height")},
                      task.boxes(earlier.picture["width"], earlier.picture["height"]))
    if (now.status, now.reason) != (earlier.status, earlier.reason) or not _had_boxes(earlier, now.boxes):
        return None
    return replace(earlier, picture=now.picture, error=now.error, boxes_refused=now.boxes_refused, reused=True)


def _same_bytes(picture: dict[str, Any], earlier: dict[str, Any]) -> bool:
    if picture["sha256"] and earlier["sha256"]:
        return bool(picture["sha256"] == earlier["sha256"])
    return picture["etag"] is not None and bool(picture["etag"] == earlier["etag"])


def _may_change(reason: str | None) -> bool:
    return reason is not None and REASONS.get(reason, ("", True))[1]


def _had_boxes(earlier: AnnotatedPicture, boxes: Boxes) -> bool:
    """Whether these are the boxes that it was given, or those that it kept of them: both give the rows that it has."""
    return boxes.digest() in (earlier.boxes.digest(), earlier.digest_before)


def _with_joints(opened: Sequence[Opened], joints: Array, scores: Array,
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


def _suppressed(picture: AnnotatedPicture, skeleton: Skeleton, threshold: float) -> AnnotatedPicture:
    """Without the poses that a better one makes superfluous; what an earlier run made is done with."""
    if picture.joints_xy is None or picture.joint_scores is None or picture.reused:
        return picture
    boxes = picture.boxes
    kept = suppress_poses(picture.joints_xy, boxes.xywh[:, 2:].prod(axis=1),
                          person_scores(boxes.scores, picture.joint_scores), sigmas=skeleton.sigmas,
                          threshold=threshold)
    return replace(picture, boxes=Boxes(boxes.ids[kept], boxes.xywh[kept], boxes.scores[kept]),
                   joints_xy=picture.joints_xy[kept], joint_scores=picture.joint_scores[kept],
                   suppressed=len(boxes.ids) - len(kept), digest_before=boxes.digest())
