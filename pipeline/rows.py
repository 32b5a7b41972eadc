"""The rows of the three datasets that we write, each column with its unit. Columns are only ever added.

Coordinates are pixels of the stored picture after its EXIF orientation, x to the right, y down, pixel centres at
integers. What does not exist is NULL, never NaN or 0.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.pose.skeleton import Skeleton

ROW_VERSION = 1
OK, NO_PERSON, REJECTED = "ok", "no_person", "rejected"
PICTURE = ("key", "image_id", "etag", "sha256", "width", "height")  # what is known of a picture, whatever became of it

# One planned picture. `sha256` is known for a shard dataset alone, and so is `part`, the shard that holds the picture.
PLAN_SCHEMA = pa.schema([
    ("unit", pa.int32()), ("key", pa.string()), ("etag", pa.string()), ("size", pa.int64()),
    ("sha256", pa.string()), ("part", pa.string())])

PERSON = pa.struct([
    ("annotation_id", pa.int64()), ("box_xywh", pa.list_(pa.float64(), 4)), ("area", pa.float64()),
    ("iscrowd", pa.bool_()), ("num_keypoints", pa.int32()),
    ("keypoints", pa.list_(pa.float64()))])  # x, y, v for each joint; NULL: a box without keypoints

# One object under the prefix. `persons`: NULL where no annotation speaks of the picture, [] where it has no person.
SHARD_SCHEMA = pa.schema([
    ("key", pa.string()), ("etag", pa.string()), ("sha256", pa.string()), ("size", pa.int64()),
    ("image_id", pa.int64()), ("width", pa.int32()), ("height", pa.int32()),
    ("bytes", pa.binary()), ("persons", pa.list_(PERSON)), ("reason", pa.string()), ("error", pa.string())])

KEYPOINT_FIXED = (
    ("key", pa.string()), ("image_id", pa.int64()), ("etag", pa.string()), ("sha256", pa.string()),
    ("width", pa.int32()), ("height", pa.int32()),
    ("status", pa.string()), ("reason", pa.string()), ("error", pa.string()),
    ("person_index", pa.int32()), ("box_id", pa.int64()),
    ("box_x", pa.float64()), ("box_y", pa.float64()), ("box_w", pa.float64()), ("box_h", pa.float64()),
    ("box_score", pa.float64()), ("score", pa.float64()))


@dataclass(frozen=True)
class Boxes:
    """The persons of one picture: `ids` int64 [n], `xywh` float64 [n, 4] in picture pixels, `scores` float64 [n]."""

    ids: np.ndarray[Any, Any]
    xywh: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]

    @staticmethod
    def none() -> "Boxes":
        """No person."""
        return Boxes(np.empty(0, np.int64), np.empty((0, 4)), np.empty(0))

    def digest(self) -> str:
        """The first 16 hex digits of the SHA-256 over ids, sides and scores in their order."""
        values = ((self.ids, "<i8"), (self.xywh, "<f8"), (self.scores, "<f8"))
        return hashlib.sha256(b"".join(one.astype(kind).tobytes() for one, kind in values)).hexdigest()[:16]


@dataclass(frozen=True)
class AnnotatedPicture:
    """What became of one picture. `joints_xy` float32 [n, K, 2] in picture pixels, `joint_scores` float32 [n, K]."""

    picture: dict[str, Any]  # the values of PICTURE
    status: str
    reason: str | None = None
    error: str | None = None
    boxes: Boxes = field(default_factory=Boxes.none)
    joints_xy: np.ndarray[Any, Any] | None = None
    joint_scores: np.ndarray[Any, Any] | None = None
    boxes_refused: int = 0
    suppressed: int = 0  # persons left out beside a better one of nearly the same pose
    digest_before: str | None = None  # of the boxes with those of the persons that were left out
    reused: bool = False  # copied from an earlier run's output


def person_scores(box_scores: np.ndarray[Any, Any], joint_scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float64 [n]: the box's score times the mean of the joints' [n, K], as in the authors' test.py."""
    return np.asarray(box_scores * joint_scores.astype(np.float64).mean(axis=1))


def joint_columns(skeleton: Skeleton) -> list[str]:
    """`<joint>_x`, `<joint>_y`, `<joint>_score` of each joint, in their order."""
    return [f"{column}_{value}" for column in skeleton.columns() for value in ("x", "y", "score")]


def prediction_columns(skeleton: Skeleton) -> dict[str, str]:
    """What a registered model answers with: each column and its numpy type."""
    numbers = [*(f"box_{side}" for side in "xywh"), "score", *joint_columns(skeleton)]
    return {"picture_index": "int64", "person_index": "int64"} | dict.fromkeys(numbers, "float64")


def keypoint_schema(skeleton: Skeleton) -> pa.Schema:
    """The columns of a keypoint dataset: the fixed ones, x, y and score of each joint, and the job that wrote it."""
    joints = [(column, pa.float32()) for column in joint_columns(skeleton)]
    return pa.schema([*KEYPOINT_FIXED, *joints, ("job", pa.string())])


def keypoint_table(pictures: Sequence[AnnotatedPicture], skeleton: Skeleton, *, job: str) -> pa.Table:
    """Keypoint rows sorted by (key, person_index): one for each person, and one for a picture without any."""
    ordered = sorted(pictures, key=lambda picture: picture.picture["key"].encode())
    fixed = [row for picture in ordered for row in _fixed_values(picture)]
    names = [name for name, _ in KEYPOINT_FIXED]
    columns = [pa.array([row[name] for row in fixed], kind) for name, kind in KEYPOINT_FIXED]
    joints = _joint_columns(ordered, skeleton.num_joints)
    schema = keypoint_schema(skeleton)
    table = pa.table([*columns, *joints, pa.array([job] * len(fixed), pa.string())], names=schema.names)
    assert schema.names[:len(names)] == names
    return table.cast(schema)


def pictures_of_table(table: pa.Table, skeleton: Skeleton) -> Iterator[AnnotatedPicture]:
    """The inverse of `keypoint_table`, from rows sorted as it sorts them; what isn't in rows (`boxes_refused`,
    `suppressed`, `digest_before`) has its default."""
    fixed = table.select([name for name, _ in KEYPOINT_FIXED]).to_pylist()
    joints = np.stack([table[name].to_numpy().astype(np.float32) for name in joint_columns(skeleton)], -1)
    joints = joints.reshape(len(fixed), skeleton.num_joints, 3)
    start = 0
    while start < len(fixed):
        end = start + 1
        while end < len(fixed) and fixed[end]["key"] == fixed[start]["key"]:
            end += 1
        yield _picture_of_rows(fixed[start:end], joints[start:end])
        start = end


def _picture_of_rows(rows: Sequence[dict[str, Any]], joints: np.ndarray[Any, Any]) -> AnnotatedPicture:
    first = rows[0]
    picture = {name: first[name] for name in PICTURE}
    if first["status"] != OK:
        return AnnotatedPicture(picture, first["status"], first["reason"], first["error"])
    boxes = Boxes(np.array([row["box_id"] for row in rows], np.int64),
                  np.array([[row[f"box_{side}"] for side in "xywh"] for row in rows], np.float64),
                  np.array([row["box_score"] for row in rows], np.float64))
    return AnnotatedPicture(picture, OK, boxes=boxes, joints_xy=joints[..., :2], joint_scores=joints[..., 2])


def count_rows(pictures: Sequence[AnnotatedPicture]) -> dict[str, Any]:
    """How many pictures, of which status and reason, and how many persons."""
    reasons: dict[str, int] = {}
    for picture in pictures:
        if picture.reason is not None:
            reasons[picture.reason] = reasons.get(picture.reason, 0) + 1
    statuses = [picture.status for picture in pictures]
    return {"pictures": len(pictures), "persons": sum(len(picture.boxes.ids) for picture in pictures),
            OK: statuses.count(OK), NO_PERSON: statuses.count(NO_PERSON), REJECTED: statuses.count(REJECTED),
            "boxes_refused": sum(picture.boxes_refused for picture in pictures),
            "suppressed": sum(picture.suppressed for picture in pictures),
            "reasons": dict(sorted(reasons.items()))}


def _fixed_values(picture: AnnotatedPicture) -> list[dict[str, Any]]:
    common = {**picture.picture, "status": picture.status, "reason": picture.reason, "error": picture.error}
    if picture.status != OK:
        return [common | dict.fromkeys(name for name, _ in KEYPOINT_FIXED if name not in common)]
    assert picture.joint_scores is not None
    boxes = picture.boxes
    scores = person_scores(boxes.scores, picture.joint_scores)
    return [common | {"person_index": index, "box_id": int(boxes.ids[index]),
                      **{f"box_{side}": float(value) for side, value in zip("xywh", boxes.xywh[index], strict=True)},
                      "box_score": float(boxes.scores[index]), "score": float(scores[index])}
            for index in range(len(boxes.ids))]


def _joint_columns(pictures: Sequence[AnnotatedPicture], num_joints: int) -> list[pa.Array]:
    blocks, present = [np.empty((0, num_joints, 3), np.float32)], []
    for picture in pictures:
        if picture.status == OK:
            assert picture.joints_xy is not None
            assert picture.joint_scores is not None
            blocks.append(np.concatenate([picture.joints_xy, picture.joint_scores[..., None]], -1).astype(np.float32))
            present += [True] * len(picture.boxes.ids)
        else:
            blocks.append(np.zeros((1, num_joints, 3), np.float32))
            present.append(False)
    values = np.concatenate(blocks).reshape(len(present), num_joints * 3)
    absent = ~np.array(present, bool)
    return [pa.array(np.ascontiguousarray(values[:, i]), mask=absent) for i in range(num_joints * 3)]
