"""Skeletons over pictures, and contact sheets: pixels and joints in, pixels out."""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.export import joint_array
from pipeline.pose.skeleton import Skeleton, joint_words

Image = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
Colour = tuple[int, int, int]

# blue, orange and near-white stay apart for colour-blind eyes, and on photographs; BGR
COLOURS: dict[str, Colour] = {"left": (255, 160, 40), "right": (10, 140, 255), "middle": (235, 240, 235)}
OUTLINE: Colour = (20, 20, 20)
WHITE: Colour = (255, 255, 255)
FADED = 0.35  # opacity of what is drawn to a joint with a low score
SUBPIXEL_BITS = 4  # OpenCV draws at sixteenths of a pixel
MAX_SIDE = 720  # of the pictures in the page; two cards side by side on a usual screen
JPEG_QUALITY = 85


def draw_picture(image_bgr: Image, persons: pa.Table, skeleton: Skeleton, *,
                 low_score: float, chosen: int | None = None) -> Image:
    """The picture, at most 720 px on its longer side, with the persons of these rows drawn on it.

    persons  keypoint rows of this picture; each gets its number, the one with person_index `chosen` its box
             and score too
    low_score  as of `draw_persons`
    """
    smaller, scale = shrunk(image_bgr), _shrinking(image_bgr)
    joints = joint_array(persons, skeleton)
    # pixel centres are at integers, so that the picture's edge is at -0.5
    joints_xy = (joints[..., :2] + 0.5) * scale - 0.5
    drawn = draw_persons(smaller, joints_xy, joints[..., 2], skeleton, low_score=low_score)
    for xy, row in zip(joints_xy, persons.to_pylist(), strict=True):
        label = str(row["person_index"])
        if row["person_index"] == chosen:
            _draw_box(drawn, [row[f"box_{side}"] * scale for side in "xywh"])
            label += f": {row['score']:.2f}"
        _draw_label(drawn, xy, label)
    return drawn


def shrunk(image_bgr: Image) -> Image:
    """The picture, at most 720 px on its longer side."""
    height, width = image_bgr.shape[:2]
    scale = _shrinking(image_bgr)
    size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(image_bgr, size_wh, interpolation=cv2.INTER_AREA), np.uint8)


def _shrinking(image_bgr: Image) -> float:
    height, width = image_bgr.shape[:2]
    return float(min(1.0, MAX_SIDE / max(height, width)))


def draw_persons(image_bgr: Image, joints_xy: Array, joint_scores: Array, skeleton: Skeleton, *,
                 low_score: float) -> Image:
    """A copy of the picture with the skeletons of n persons.

    image_bgr uint8 [H, W, 3]; joints_xy [n, K, 2] in its pixels; joint_scores [n, K]. A joint that is NaN is
    left out. Left is blue, right orange, what belongs to neither is white. Joints below `low_score` are
    hollow, and limbs to them faded. Lines are scaled with the picture, and thinner for small persons.
    """
    faded, image = image_bgr.copy(), image_bgr.copy()
    people = [(_drawable(xy, image), scores, _thickness(xy, image))
              for xy, scores in zip(joints_xy, joint_scores, strict=True)]
    for xy, scores, thickness in people:
        unsure = [not sure for sure in _sure_limbs(scores, skeleton, low_score)]
        _draw_limbs(faded, xy, skeleton, thickness, unsure)
    image = np.asarray(cv2.addWeighted(faded, FADED, image, 1 - FADED, 0), np.uint8)
    for xy, scores, thickness in people:
        _draw_limbs(image, xy, skeleton, thickness, _sure_limbs(scores, skeleton, low_score))
        _draw_joints(image, xy, skeleton, thickness, scores >= low_score)
    return image


def joint_side(name: str) -> str:
    """"left", "right" or "middle", by the joint's name."""
    sides = {"left": "left", "l": "left", "right": "right", "r": "right"}
    return next((sides[word] for word in joint_words(name) if word in sides), "middle")


def contact_sheet(images_bgr: Sequence[Image], *, columns: int = 4,
                  tile_wh: tuple[int, int] = (320, 240)) -> Image:
    """The pictures [h, w, 3] uint8 BGR side by side in rows of tiles, each fitted whole into its own."""
    width, height = tile_wh
    num_rows = max(1, math.ceil(len(images_bgr) / columns))
    sheet = np.full((num_rows * height, columns * width, 3), OUTLINE, np.uint8)
    for index, image in enumerate(images_bgr):
        scale = min(width / image.shape[1], height / image.shape[0])
        w, h = max(1, int(image.shape[1] * scale)), max(1, int(image.shape[0] * scale))
        top = index // columns * height + (height - h) // 2
        left = index % columns * width + (width - w) // 2
        sheet[top : top + h, left : left + w] = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
    return sheet


def jpeg_bytes(image_bgr: Image) -> bytes:
    """The picture as a JPEG file."""
    encoded, data = cv2.imencode(".jpg", image_bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert encoded
    return data.tobytes()


def _drawable(joints_xy: Array, image: Image) -> Array:
    """Joints that OpenCV's 32 bits can hold: far outside the picture is outside enough."""
    reach = 4 * max(image.shape[:2])
    return np.clip(joints_xy, -reach, reach)


def _thickness(joints_xy: Array, image: Image) -> int:
    seen = _seen(joints_xy)
    extent = float(np.ptp(seen, axis=0).max()) if len(seen) else 0.0
    by_picture = float(max(image.shape[:2])) / 220
    return max(1, round(min(by_picture, extent / 40)))


def _seen(joints_xy: Array) -> Array:
    return joints_xy[~np.isnan(joints_xy).any(axis=1)]


def _sure_limbs(scores: Array, skeleton: Skeleton, low_score: float) -> list[bool]:
    return [bool(min(scores[a], scores[b]) >= low_score) for a, b in skeleton.edges]


def _draw_limbs(image: Image, joints_xy: Array, skeleton: Skeleton, thickness: int,
                shown: Sequence[bool]) -> None:
    limbs = [edge for edge, show in zip(skeleton.edges, shown, strict=True) if show]
    sides = [{joint_side(skeleton.joints[joint]) for joint in edge} - {"middle"} for edge in limbs]
    colours = [COLOURS[side.pop()] if len(side) == 1 else COLOURS["middle"] for side in sides]
    # dark below, then colour: legible on bright and dark clothes alike
    for width, paints in ((thickness + 2, [OUTLINE] * len(limbs)), (thickness, colours)):
        for (a, b), paint in zip(limbs, paints, strict=True):
            if not np.isnan(joints_xy[[a, b]]).any():
                cv2.line(image, _fixed(joints_xy[a]), _fixed(joints_xy[b]), paint, width, cv2.LINE_AA,
                         SUBPIXEL_BITS)


def _draw_joints(image: Image, joints_xy: Array, skeleton: Skeleton, thickness: int, sure: Array) -> None:
    one = 1 << SUBPIXEL_BITS
    radius = (thickness + 1) * one
    for joint, name in enumerate(skeleton.joints):
        if np.isnan(joints_xy[joint]).any():
            continue
        center, colour = _fixed(joints_xy[joint]), COLOURS[joint_side(name)]
        if sure[joint]:
            cv2.circle(image, center, radius + one, OUTLINE, -1, cv2.LINE_AA, SUBPIXEL_BITS)
        cv2.circle(image, center, radius, colour, -1 if sure[joint] else 1, cv2.LINE_AA, SUBPIXEL_BITS)


def _draw_box(image: Image, box_xywh: Sequence[float]) -> None:
    x, y, w, h = box_xywh
    for colour, thickness in ((OUTLINE, 3), (COLOURS["middle"], 1)):
        corners = (round(x), round(y)), (round(x + w), round(y + h))
        cv2.rectangle(image, *corners, colour, thickness, cv2.LINE_AA)


def _draw_label(image: Image, joints_xy: Array, text: str) -> None:
    """The text above a person's highest joint, kept inside the picture."""
    seen = _seen(joints_xy)
    if not len(seen):
        return
    scale = max(image.shape[:2]) / 1200
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    x, y = seen[seen[:, 1].argmin()] + (-width / 2, -3 * height / 2)
    left = int(np.clip(x, 2, max(2, image.shape[1] - width - 4)))
    bottom = int(np.clip(y, height + 4, max(height + 4, image.shape[0] - 6)))
    cv2.rectangle(image, (left - 3, bottom - height - 4), (left + width + 3, bottom + 4), OUTLINE, -1)
    cv2.putText(image, text, (left, bottom), cv2.FONT_HERSHEY_SIMPLEX, scale, WHITE, 1, cv2.LINE_AA)


def _fixed(point_xy: Array) -> tuple[int, int]:
    x, y = np.round(np.asarray(point_xy, np.float64) * (1 << SUBPIXEL_BITS)).astype(int)
    return int(x), int(y)
