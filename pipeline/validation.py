"""How good a network is on an annotated shard dataset: predict its persons as `annotate` does, and evaluate.

Several processes can each take a share of the pictures; what they predict is put together and evaluated once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.annotation import PictureToAnnotate, annotate_pictures, annotated_boxes
from pipeline.annotation_input import bytes_of
from pipeline.coco import AnnotatedImage, Person, coco_json
from pipeline.drawing import contact_sheet, draw_persons
from pipeline.errors import DataError
from pipeline.evaluation import Evaluation, evaluate_keypoints
from pipeline.images import decode_picture
from pipeline.patience import waited_out
from pipeline.pose.skeleton import Skeleton
from pipeline.prediction import Predictor
from pipeline.rows import PICTURE, AnnotatedPicture, keypoint_table
from pipeline.shards import ShardDataset, ShardPart, read_chosen

JOB = "validation"
COLUMNS = (*PICTURE, "bytes", "persons", "reason", "error")
PREVIEWS = 8


@dataclass(frozen=True)
class ValidatedPicture:
    """One annotated picture: what was predicted, what is true. `data` are its bytes, kept for a few pictures alone."""

    predicted: AnnotatedPicture
    truth: AnnotatedImage
    data: bytes | None


@dataclass(frozen=True)
class PartShare:
    """What one of several processes takes of a part: from `start` up to `end`, of 0 to 1, all its work in order."""

    part: ShardPart
    start: Fraction = Fraction(0)
    end: Fraction = Fraction(1)


def rank_shares(parts: Sequence[ShardPart], *, rank: int, world: int, most_persons: int | None = None,
                ) -> list[PartShare]:
    """What a rank takes of some parts, with as much work for each rank as the parts' counts tell.

    The parts lie end to end, each as long as its work, and are cut into `world` equal lengths: every picture is in one
    of them, and a part is read by neighbouring ranks alone.

    most_persons  as `validate_part` is given it
    """
    works = [_part_work(part, most_persons) for part in parts]
    first, last = (Fraction(sum(works) * edge, world) for edge in (rank, rank + 1))
    shares = []
    for part, work, end in zip(parts, works, accumulate(works), strict=True):
        inside = [min(max(edge - end + work, Fraction(0)), Fraction(work)) / work for edge in (first, last)]
        if inside[0] < inside[1]:
            shares.append(PartShare(part, *inside))
    return shares


def _part_work(part: ShardPart, most_persons: int | None) -> int:
    """About how many pictures are decoded and persons predicted; more than 0, so that a part is somebody's."""
    work = 1 + int(part.counts["rows"]) + int(part.counts["persons"])
    return work if most_persons is None else min(work, 2 * most_persons)


def validate_part(dataset: ShardDataset, share: PartShare, predictor: Predictor, *, most_persons: int | None = None,
                  keep_bytes: int = 0) -> list[ValidatedPicture]:
    """A shard's pictures that have annotations, or a share of them: each person with its own box, crowds left out.

    A picture that was refused when it was sharded counts, without anybody found on it, as it does after `annotate`.

    A store that is away is waited for (`pipeline.patience`).

    most_persons  of the whole part: stop once the pictures taken hold so many persons
    keep_bytes    of how many pictures with persons the bytes are kept, for `preview_sheet`

    The file is read whole, since its SHA-256 is the whole file's; in memory is what is stored, then the share alone.
    """
    def choose(rows: list[dict[str, Any]]) -> set[str]:
        return _keys_of_share(_first_rows(rows, most_persons), share)

    rows = waited_out(lambda: read_chosen(dataset, share.part, COLUMNS, choose))
    predicted = annotate_pictures([_to_annotate(row) for row in rows], predictor)
    kept = {row["key"] for row in [row for row in rows if row["persons"] and row["bytes"]][:keep_bytes]}
    return [ValidatedPicture(picture, _truth(row), row["bytes"] if row["key"] in kept else None)
            for row, picture in zip(rows, predicted, strict=True)]


def evaluate_pictures(pictures: Sequence[ValidatedPicture], skeleton: Skeleton) -> Evaluation:
    """The ten COCO numbers and PCK. DataError without any annotated picture."""
    if not pictures:
        raise DataError("The --val data have no annotated picture. Shard them with --annotations.")
    table = keypoint_table([picture.predicted for picture in pictures], skeleton, job=JOB)
    return evaluate_keypoints(table, coco_json([picture.truth for picture in pictures], skeleton), skeleton=skeleton)


def preview_sheet(pictures: Sequence[ValidatedPicture], skeleton: Skeleton, *,
                  low_score: float) -> npt.NDArray[np.uint8] | None:
    """Pictures whose bytes were kept, uint8 BGR: left as predicted, right as annotated; None where there is none."""
    drawn = []
    for picture in pictures:
        if picture.data is None or picture.predicted.joints_xy is None or picture.predicted.joint_scores is None:
            continue
        image_bgr = decode_picture(picture.data)
        true_xy, true_scores = _true_joints(picture.truth.persons, skeleton)
        drawn += [draw_persons(image_bgr, picture.predicted.joints_xy, picture.predicted.joint_scores, skeleton,
                               low_score=low_score),
                  draw_persons(image_bgr, true_xy, true_scores, skeleton, low_score=low_score)]
    return contact_sheet(drawn) if drawn else None


def _keys_of_share(rows: Sequence[Mapping[str, Any]], share: PartShare) -> set[str]:
    """Of a part's rows the pictures whose work begins in the share."""
    works = [1 + _num_persons(row) for row in rows]
    begins = (Fraction(end - work, sum(works)) for work, end in zip(works, accumulate(works), strict=True))
    return {row["key"] for row, begin in zip(rows, begins, strict=True) if share.start <= begin < share.end}


def _first_rows(rows: Sequence[dict[str, Any]], most_persons: int | None) -> list[dict[str, Any]]:
    """The annotated pictures; an image_id is needed to evaluate them."""
    chosen: list[dict[str, Any]] = []
    num_persons = 0
    for row in rows:
        if row["persons"] is None or row["image_id"] is None:
            continue
        if most_persons is not None and num_persons >= most_persons:
            break
        num_persons += _num_persons(row)
        chosen.append(row)
    return chosen


def _num_persons(row: Mapping[str, Any]) -> int:
    return sum(not person["iscrowd"] for person in row["persons"])


def _to_annotate(row: dict[str, Any]) -> PictureToAnnotate:
    picture = {name: row[name] for name in PICTURE}
    boxes = annotated_boxes(row["persons"])
    return PictureToAnnotate(picture, lambda: bytes_of(row), lambda width, height: boxes)


def _truth(row: dict[str, Any]) -> AnnotatedImage:
    persons = tuple(Person(**person | {
        "box_xywh": tuple(person["box_xywh"]),
        "keypoints": None if person["keypoints"] is None else tuple(person["keypoints"])}) for person in row["persons"])
    return AnnotatedImage(row["image_id"], row["key"], row["width"], row["height"], persons)


def _true_joints(persons: Sequence[Person], skeleton: Skeleton) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """joints_xy [n, K, 2], NaN where not labelled, and scores [n, K] that draw labelled joints as sure."""
    flat = [person.keypoints for person in persons if person.keypoints is not None and not person.iscrowd]
    joints = np.array(flat, np.float64).reshape(-1, skeleton.num_joints, 3)
    labelled = joints[..., 2] > 0
    return np.where(labelled[..., None], joints[..., :2], np.nan), labelled.astype(np.float64) + 0.5
