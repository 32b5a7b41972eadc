"""What a person is made of: joints, which are drawn connected, which change places in a mirror.

Joints are numbered from 0 everywhere; COCO's own `skeleton` lists, which count from 1, are turned on reading.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DataError

# Columns of a keypoint table that no joint may shadow; a joint `j` has the columns j_x, j_y and j_score.
FIXED_COLUMNS = frozenset(
    ("key", "image_id", "etag", "sha256", "width", "height", "status", "reason", "error", "person_index",
     "box_id", "box_x", "box_y", "box_w", "box_h", "box_score", "score", "job")
)  # fmt: skip
UNKNOWN_SIGMA = 0.079  # the sigma of COCO's shoulders, about the mean of its body joints
LOWER_BODY_WORDS = frozenset({"knee", "ankle", "foot", "feet", "heel", "toe", "shin", "calf"})
MIRRORED_WORDS = {"left": "right", "right": "left", "l": "r", "r": "l"}


@dataclass(frozen=True)
class Skeleton:
    """The joints of one kind of person, in the order in which every array holds them.

    edges       pairs of joint ids that are drawn connected
    flip_pairs  pairs of joint ids that change places in a mirror, each joint in one pair at most
    sigmas      one for each joint, as pycocotools' `kpt_oks_sigmas`
    upper_body  the joint ids that a half-body crop counts as upper
    Refused with DataError: ids out of range, repeated or empty names, a joint in two pairs, a sigma that
    isn't positive.
    """

    name: str
    joints: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    flip_pairs: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...]
    upper_body: tuple[int, ...]

    def __post_init__(self) -> None:
        self._refuse_bad_names()
        self._refuse_bad_ids()
        if len(self.sigmas) != self.num_joints or not all(sigma > 0 for sigma in self.sigmas):
            raise DataError(
                f"skeleton {self.name!r}: sigmas must be {self.num_joints} positive numbers, one for each "
                f"joint, but they are {list(self.sigmas)}"
            )

    def _refuse_bad_names(self) -> None:
        if not self.joints or "" in self.joints:
            raise DataError(f"skeleton {self.name!r} needs joints with names, but has {list(self.joints)}")
        twice = sorted({joint for joint in self.joints if self.joints.count(joint) > 1})
        if twice:
            raise DataError(f"skeleton {self.name!r}: joints {twice} occur more than once; rename them")

    def _refuse_bad_ids(self) -> None:
        ids = [joint for pair in (*self.edges, *self.flip_pairs) for joint in pair] + list(self.upper_body)
        outside = sorted({joint for joint in ids if not 0 <= joint < self.num_joints})
        if outside:
            raise DataError(
                f"skeleton {self.name!r} has joints 0 to {self.num_joints - 1}, but an edge, a flip pair or "
                f"the upper body refers to {outside}"
            )
        paired = [joint for pair in self.flip_pairs for joint in pair]
        if len(set(paired)) != len(paired):
            raise DataError(f"skeleton {self.name!r}: a joint is in two flip pairs: {list(self.flip_pairs)}")

    @property
    def num_joints(self) -> int:
        """How many joints there are (K)."""
        return len(self.joints)

    @property
    def flip_order(self) -> tuple[int, ...]:
        """The permutation that swaps the pairs: mirrored joint j is the unmirrored joint flip_order[j]."""
        partner = {a: b for pair in self.flip_pairs for a, b in (pair, pair[::-1])}
        return tuple(partner.get(joint, joint) for joint in range(self.num_joints))

    def columns(self) -> tuple[str, ...]:
        """The joints' names as column names: lower case, every character but a-z and 0-9 a `_`.

        Refused with DataError: two joints that come out the same, and one whose `_x`, `_y` or `_score`
        would be a fixed column of the keypoint table.
        """
        columns = tuple(re.sub(r"[^a-z0-9]", "_", joint.lower()) for joint in self.joints)
        for index, (joint, column) in enumerate(zip(self.joints, columns, strict=True)):
            if column in columns[:index]:
                other = self.joints[columns.index(column)]
                raise DataError(
                    f"skeleton {self.name!r}: joints {other!r} and {joint!r} would both be column "
                    f"{column!r}; rename one in the annotations' category"
                )
            taken = FIXED_COLUMNS & {f"{column}_x", f"{column}_y", f"{column}_score"}
            if taken:
                raise DataError(
                    f"skeleton {self.name!r}: joint {joint!r} would hit the fixed columns {sorted(taken)}; "
                    "rename it in the annotations' category"
                )
        return columns

    def to_json(self) -> dict[str, Any]:
        """The skeleton as JSON has it; `from_json` is the inverse."""
        return {
            "name": self.name,
            "joints": list(self.joints),
            "edges": [list(edge) for edge in self.edges],
            "flip_pairs": [list(pair) for pair in self.flip_pairs],
            "sigmas": list(self.sigmas),
            "upper_body": list(self.upper_body),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Skeleton":
        """The skeleton that `to_json` wrote. Unknown keys are ignored, missing ones a DataError."""
        try:
            return cls(
                name=str(data["name"]),
                joints=tuple(str(joint) for joint in data["joints"]),
                edges=_id_pairs(data["edges"]),
                flip_pairs=_id_pairs(data["flip_pairs"]),
                sigmas=tuple(float(sigma) for sigma in data["sigmas"]),
                upper_body=tuple(int(joint) for joint in data["upper_body"]),
            )
        except KeyError as error:
            raise DataError(f"a skeleton needs the key {error}, but has only {sorted(data)}") from None
        except DataError:
            raise
        except (TypeError, ValueError) as error:
            raise DataError(f"a skeleton's JSON is misshapen: {error}") from None


def _id_pairs(pairs: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(first), int(second)) for first, second in pairs)


COCO17 = Skeleton(
    name="coco17",
    joints=(
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
        "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip",
        "left_knee", "right_knee", "left_ankle", "right_ankle",
    ),
    edges=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8),
        (7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
    flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
    # COCO's own, https://cocodataset.org/#keypoints-eval
    sigmas=(
        0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072,
        0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089,
    ),
    upper_body=tuple(range(13)),  # with the hips, as the authors of MSPN have it
)  # fmt: skip

_COCO_SIGMAS = dict(zip(COCO17.joints, COCO17.sigmas, strict=True))


def _sigma_of(joint: str) -> float:
    return _COCO_SIGMAS.get("_".join(joint_words(joint)), UNKNOWN_SIGMA)


def joint_words(joint: str) -> list[str]:
    """A joint's name as lower-case words: `LeftElbow`, `left-elbow` and `leftelbow` are all left, elbow."""
    words = re.findall(r"[Ll]eft|[Rr]ight|[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+", joint)
    return [word.lower() for word in words]


_MPII_JOINTS = (
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis", "thorax",
    "upper_neck", "head_top", "right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow",
    "left_wrist",
)  # fmt: skip

MPII16 = Skeleton(
    name="mpii16",
    joints=_MPII_JOINTS,
    edges=(
        (0, 1), (1, 2), (2, 6), (3, 6), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9),
        (10, 11), (11, 12), (12, 7), (7, 13), (13, 14), (14, 15),
    ),
    flip_pairs=((0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13)),
    # MPII scores by PCKh and publishes no sigmas: these are COCO's where COCO has the joint
    sigmas=tuple(_sigma_of(joint) for joint in _MPII_JOINTS),
    upper_body=tuple(range(7, 16)),
)  # fmt: skip


def skeleton_from_category(category: Mapping[str, Any]) -> Skeleton:
    """The skeleton that an entry of a COCO file's `categories` describes.

    Exactly COCO's 17 names in COCO's order give COCO17, MPII's 16 give MPII16. For any others: flip pairs
    from left/right or l/r in the names, sigmas from the COCO joint of the same name and 0.079 for the rest,
    upper body all but knees, ankles and feet. Edges are only drawn, and public files err in them: they count
    from 1 as in COCO, from 0 where a 0 occurs, and a list that doesn't fit the joints counts as none.
    A category that names no joints, or whose `skeleton` isn't a list of pairs, is a DataError.
    """
    joints = _joint_names(category)
    known = {skeleton.joints: skeleton for skeleton in (COCO17, MPII16)}
    return known.get(joints) or Skeleton(
        name=str(category.get("name", "person")),
        joints=joints,
        edges=_edges(category),
        flip_pairs=_flip_pairs(joints),
        sigmas=tuple(_sigma_of(joint) for joint in joints),
        upper_body=tuple(i for i, joint in enumerate(joints) if not LOWER_BODY_WORDS & set(joint_words(joint))),
    )


def _joint_names(category: Mapping[str, Any]) -> tuple[str, ...]:
    joints = category.get("keypoints")
    if not isinstance(joints, list) or not joints or not all(isinstance(joint, str) for joint in joints):
        raise DataError(
            f"category {category.get('name')!r}: `keypoints` must be the list of its joints' names, "
            f"but is {joints!r:.200}"
        )
    return tuple(joints)


def _edges(category: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    listed = category.get("skeleton") or []
    try:
        edges = _id_pairs(listed)
    except (TypeError, ValueError):
        raise DataError(
            f"category {category.get('name')!r}: `skeleton` must be a list of pairs of joint numbers "
            f"(counted from 1), but is {listed!r:.200}"
        ) from None
    numbers = {number for edge in edges for number in edge}
    first = 0 if 0 in numbers else 1  # ExLPose and converted Human3.6M files count from 0
    if not all(0 <= number - first < len(category["keypoints"]) for number in numbers):
        return ()  # CrowdPose's 14 joints come with the edges of COCO's 17
    return tuple((a - first, b - first) for a, b in edges)


def _flip_pairs(joints: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    ids = {tuple(joint_words(joint)): joint_id for joint_id, joint in enumerate(joints)}
    pairs = []
    for words, joint_id in ids.items():
        partner = ids.get(tuple(MIRRORED_WORDS.get(word, word) for word in words))
        if partner is not None and partner > joint_id:
            pairs.append((joint_id, partner))
    return tuple(pairs)
