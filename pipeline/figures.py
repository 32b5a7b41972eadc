"""Pictures that the project makes itself, for its demo and its tests: drawn people whose joints are known.

Whatever tells left from right survives mirroring, as with real people: face, chest and feet show where a person
faces, and what is farther away is darker. (A mark on each left limb would be on the right one after a flip.)
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.coco import AnnotatedImage, Person, coco_json
from pipeline.figure_bodies import HEAD, SHOULDER, Body, random_body
from pipeline.pose.skeleton import COCO17

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]
Colour = tuple[float, float, float]  # BGR

MAX_PERSONS = 5
SIDES = (200, 480)  # of a picture, in pixels
SUBPIXEL_BITS = 4
OCCLUDER = 255  # its label; persons' parts have 1 to 254
# In the order in which they would be listed; a body part's label is its place here and which person it is of.
PARTS = ("torso", "head", "left arm", "right arm", "left forearm", "right forearm",
         "left thigh", "right thigh", "left shank", "right shank")  # fmt: skip
# The parts on which each of COCO's joints can be seen.
PARTS_OF_JOINT: tuple[tuple[int, ...], ...] = (
    (1,), (1,), (1,), (1,), (1,), (0, 2), (0, 3), (2, 4), (3, 5), (4,), (5,),
    (0, 6), (0, 7), (6, 8), (7, 9), (8,), (9,),
)  # fmt: skip
SKIN = ((178, 205, 240), (140, 180, 225), (105, 145, 200), (70, 105, 160), (45, 70, 110))
HAIR = ((25, 25, 30), (30, 45, 75), (60, 100, 150), (120, 175, 215), (140, 140, 145), (40, 60, 140))


@dataclass(frozen=True)
class MadePicture:
    """A JPEG, its size, and the persons in it as an annotator would note them."""

    jpeg: bytes
    width: int
    height: int
    persons: tuple[Person, ...]


@dataclass(frozen=True)
class Look:
    """A person's colours, and how wide the limbs are (in body heights)."""

    skin: Colour
    hair: Colour
    shirt: Colour
    trousers: Colour
    shoes: Colour
    width: float
    long_sleeves: bool
    long_legs: bool


@dataclass(frozen=True)
class Figure:
    """A body at its place: pixels per body height, and where the middle of its hips is."""

    body: Body
    look: Look
    size: float
    origin: Floats

    def pixels(self, points: Floats) -> Floats:
        """Where points [..., 3] of the body are in the picture, [..., 2]."""
        return np.asarray(points)[..., :2] * self.size + self.origin


@dataclass(frozen=True)
class Shape:
    """A convex polygon [N, 2] in pixels, its colour, and how wide its darker rim is (0: none)."""

    polygon: Floats
    colour: Colour
    rim_px: float = 0.0


def make_picture(index: int, *, seed: int) -> MadePicture:
    """Picture number `index` of the endless series that a seed stands for; equal arguments give equal bytes."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, index]))
    width, height = (int(side) for side in generator.integers(*SIDES, 2))
    canvas = _background(generator, width, height)
    labels = np.zeros((height, width), np.uint8)
    figures = list(_place_figures(generator, width, height))
    for number, figure in enumerate(figures):
        _draw_figure(canvas, labels, figure, first_label=1 + number * len(PARTS))
    _draw_occluders(generator, canvas, labels, figures)
    persons = [
        _person(figure, labels, first_label=1 + number * len(PARTS), annotation_id=index * 10 + number)
        for number, figure in enumerate(figures)
    ]
    jpeg = _photograph(generator, canvas)
    return MadePicture(jpeg, width, height, tuple(person for person in persons if person is not None))


def write_made_dataset(directory: Path, *, num_pictures: int, seed: int, first_id: int = 1) -> None:
    """Writes `images/*.jpg` and `annotations.json` (COCO keypoints) with pictures first_id, first_id + 1, ...

    Sets of one seed with disjoint ids have different pictures: as for training and validation.
    """
    (directory / "images").mkdir(parents=True, exist_ok=True)
    images = []
    for image_id in range(first_id, first_id + num_pictures):
        made = make_picture(image_id, seed=seed)
        name = f"{image_id:06d}.jpg"
        (directory / "images" / name).write_bytes(made.jpeg)
        images.append(AnnotatedImage(image_id, name, made.width, made.height, made.persons))
    (directory / "annotations.json").write_text(json.dumps(coco_json(images, COCO17)))


# Who is where


def _place_figures(generator: np.random.Generator, width: int, height: int) -> Iterator[Figure]:
    """One to five figures, the farther (higher) ones first, so that nearer ones are drawn over them."""
    count = int(generator.choice(MAX_PERSONS, p=(0.42, 0.28, 0.15, 0.1, 0.05))) + 1
    largest = min(1.05 * height, 1.6 * width) * (1.0 if count == 1 else 0.85 if count == 2 else 0.7)
    sizes = np.sort(generator.uniform(0.5, 1.0, count)) * largest
    columns = generator.permutation((np.arange(count) + generator.uniform(0.2, 0.8, count)) / count)
    for size, column in zip(sizes, columns, strict=True):
        row = generator.normal(0.5, 0.07) + 0.06 * size / height
        yield Figure(
            random_body(generator),
            _random_look(generator),
            float(size),
            np.array([column * width, row * height]),
        )


def _random_look(generator: np.random.Generator) -> Look:
    return Look(
        skin=_varied(generator, SKIN[generator.integers(len(SKIN))]),
        hair=_varied(generator, HAIR[generator.integers(len(HAIR))]),
        shirt=_random_colour(generator),
        trousers=_random_colour(generator, darker=0.75),
        shoes=_random_colour(generator, darker=0.5),
        width=float(generator.uniform(0.85, 1.2)),
        long_sleeves=bool(generator.random() < 0.5),
        long_legs=bool(generator.random() < 0.65),
    )


def _random_colour(generator: np.random.Generator, *, darker: float = 1.0) -> Colour:
    hsv = np.array([[generator.uniform((0, 40, 70), (180, 230, 245))]]).astype(np.uint8)
    blue, green, red = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(float) * darker
    return float(blue), float(green), float(red)


def _soft_colour(generator: np.random.Generator) -> Colour:
    grey = generator.uniform(60, 225)
    blue, green, red = np.clip(grey + generator.normal(0, 22, 3), 0, 255)
    return float(blue), float(green), float(red)


def _varied(generator: np.random.Generator, colour: Sequence[float]) -> Colour:
    blue, green, red = np.clip(np.array(colour) * generator.uniform(0.88, 1.1, 3), 0, 255)
    return float(blue), float(green), float(red)


# A figure


def _draw_figure(canvas: Pixels, labels: Pixels, figure: Figure, *, first_label: int) -> None:
    for part, shapes in _parts(figure):
        for shape in shapes:
            _fill(canvas, labels, shape, first_label + part)


def _parts(figure: Figure) -> list[tuple[int, list[Shape]]]:
    """The body's parts with their shapes, the farthest first."""
    joints = figure.body.joints
    parts = [(0.0, 0, _torso(figure)), (float(figure.body.head[2]) + 0.02, 1, _head(figure))]
    for side in (0, 1):
        shoulder, elbow, wrist, hip, knee, ankle = (joints[first + side] for first in (5, 7, 9, 11, 13, 15))
        toe = figure.body.toes[side]
        parts += [
            (_depth(shoulder, elbow), 2 + side, _upper_arm(figure, shoulder, elbow)),
            (_depth(elbow, wrist) + 0.01, 4 + side, _forearm(figure, elbow, wrist)),
            (_depth(hip, knee) - 0.005, 6 + side, _thigh(figure, hip, knee)),
            (_depth(knee, ankle), 8 + side, _shank(figure, knee, ankle, toe)),
        ]
    return [(part, shapes) for _, part, shapes in sorted(parts, key=lambda entry: entry[0])]


def _depth(*points: Floats) -> float:
    return sum(float(point[2]) for point in points) / len(points)


def _torso(figure: Figure) -> list[Shape]:
    joints, look, width = figure.body.joints, figure.look, 0.042 * figure.look.width
    seat = _outlined(figure, _hull(figure, joints[11:13], [width * 1.15] * 2), look.trousers, 0.0)
    corners = [*joints[5:7], *(0.82 * joints[11:13] + 0.18 * figure.body.neck)]
    shirt = _outlined(figure, _hull(figure, corners, [width] * 2 + [width * 1.1] * 2), look.shirt, 0.0)
    return [seat, shirt, *_chest(figure)]


def _chest(figure: Figure) -> list[Shape]:
    """A collar and a row of buttons in front, a plain back."""
    body, look = figure.body, figure.look
    if body.ahead[2] < 0.2:
        return []
    front = body.neck + 0.05 * body.ahead
    collar = np.array([front + 0.03 * _across(body), front - 0.03 * _across(body), front - 0.22 * body.neck])
    buttons = _hull(figure, [front - 0.25 * body.neck, front - 0.85 * body.neck], [0.007, 0.007])
    return [Shape(figure.pixels(collar), look.skin), Shape(buttons, _shaded(look.shirt, 0.55))]


def _across(body: Body) -> Floats:
    across: Floats = (body.joints[5] - body.joints[6]) / (2 * SHOULDER)
    return across


def _head(figure: Figure) -> list[Shape]:
    body, look, face = figure.body, figure.look, figure.body.joints[:5]
    middle = figure.pixels(body.head)
    neck = _outlined(figure, _hull(figure, [body.neck, body.head], [0.032, 0.032]), _shaded(look.skin, 0.9), 0.0)
    ears = [
        Shape(_disc(figure, face[ear], 0.02), _shaded(look.skin, 0.85))
        for ear in (3, 4)
        if _is_on_near_side(figure, ear)
    ]
    head = _outlined(figure, _ellipse(middle, figure.size * HEAD * np.array([1.0, 1.16])), look.hair, 0.0)
    if body.ahead[2] < -0.3:
        return [neck, head, *ears]
    forward = body.ahead[:2] * figure.size
    skin = middle + 0.024 * forward + np.array([0.0, 0.024]) * figure.size
    visage = Shape(_ellipse(skin, figure.size * HEAD * np.array([0.84, 0.92])), look.skin)
    return [neck, head, visage, *ears, *_features(figure)]


def _features(figure: Figure) -> list[Shape]:
    body, look, face = figure.body, figure.look, figure.body.joints[:5]
    shapes = []
    for eye in (1, 2):
        if _is_on_near_side(figure, eye):
            shapes.append(Shape(_disc(figure, face[eye], 0.017), (245.0, 245.0, 245.0)))
            shapes.append(Shape(_disc(figure, face[eye] + 0.004 * body.ahead, 0.009), (35.0, 25.0, 20.0)))
    if _is_on_near_side(figure, 0):
        shapes.append(Shape(_disc(figure, face[0], 0.014), _shaded(look.skin, 0.72)))
        mouth = body.head + HEAD * (0.82 * body.ahead + np.array([0.0, 0.55, 0.0]))
        ends = [mouth + 0.022 * _across(body), mouth - 0.022 * _across(body)]
        shapes.append(Shape(_hull(figure, ends, [0.006, 0.006]), (70.0, 60.0, 150.0)))
    return shapes


def _is_on_near_side(figure: Figure, joint: int) -> bool:
    """Whether the head itself leaves one of its five joints in view; the nose stands out, ears are at its side."""
    least = {0: -0.3, 1: 0.05, 2: 0.05, 3: -0.4, 4: -0.4}[joint] * HEAD
    return bool(figure.body.joints[joint, 2] - figure.body.head[2] > least)


def _upper_arm(figure: Figure, shoulder: Floats, elbow: Floats) -> list[Shape]:
    width = figure.look.width
    polygon = _hull(figure, [shoulder, elbow], [0.036 * width, 0.029 * width])
    return [_outlined(figure, polygon, figure.look.shirt, _depth(shoulder, elbow))]


def _forearm(figure: Figure, elbow: Floats, wrist: Floats) -> list[Shape]:
    look, depth = figure.look, _depth(elbow, wrist)
    polygon = _hull(figure, [elbow, wrist], [0.028 * look.width, 0.021 * look.width])
    sleeve = look.shirt if look.long_sleeves else look.skin
    hand = _disc(figure, wrist + 0.18 * (wrist - elbow), 0.026 * look.width)
    return [_outlined(figure, hand, look.skin, depth), _outlined(figure, polygon, sleeve, depth)]


def _thigh(figure: Figure, hip: Floats, knee: Floats) -> list[Shape]:
    width = figure.look.width
    polygon = _hull(figure, [hip, knee], [0.052 * width, 0.038 * width])
    return [_outlined(figure, polygon, figure.look.trousers, _depth(hip, knee))]


def _shank(figure: Figure, knee: Floats, ankle: Floats, toe: Floats) -> list[Shape]:
    look, depth = figure.look, _depth(knee, ankle)
    polygon = _hull(figure, [knee, ankle], [0.037 * look.width, 0.024 * look.width])
    foot = _hull(figure, [ankle, toe], [0.026 * look.width, 0.02 * look.width])
    leg = look.trousers if look.long_legs else look.skin
    return [_outlined(figure, foot, look.shoes, depth), _outlined(figure, polygon, leg, depth)]


# Shapes


def _hull(figure: Figure, points: Sequence[Floats] | Floats, radii: Sequence[float]) -> Floats:
    """The convex hull of discs around points of the body, as a polygon in pixels."""
    rims = [_disc(figure, point, radius) for point, radius in zip(points, radii, strict=True)]
    return _convex(np.concatenate(rims))


def _disc(figure: Figure, point: Floats, radius: float) -> Floats:
    return _ellipse(figure.pixels(point), np.full(2, radius * figure.size))


def _ellipse(center: Floats, radii: Floats) -> Floats:
    rim: Floats = center + radii * _CIRCLE
    return rim


_CIRCLE = np.stack([f(np.linspace(0, 2 * np.pi, 16, endpoint=False)) for f in (np.cos, np.sin)], axis=1)


def _convex(points: Floats) -> Floats:
    hull: Floats = np.asarray(cv2.convexHull(points.astype(np.float32)), dtype=np.float64)[:, 0]
    return hull


def _outlined(figure: Figure, polygon: Floats, colour: Colour, depth: float) -> Shape:
    """The polygon with a darker rim; what is farther away is darker."""
    shade = min(max(1.0 + 0.9 * depth, 0.75), 1.12)
    return Shape(polygon, _shaded(colour, shade), 0.4 + 0.006 * figure.size)


def _shaded(colour: Colour, factor: float) -> Colour:
    blue, green, red = (min(255.0, channel * factor) for channel in colour)
    return blue, green, red


def _fill(canvas: Pixels, labels: Pixels, shape: Shape, label: int) -> None:
    outer = _fixed_point(shape.polygon)
    cv2.fillConvexPoly(labels, outer, label, cv2.LINE_8, SUBPIXEL_BITS)
    if shape.rim_px:  # two fillings: an antialiased line around takes OpenCV 5.0 ten times as long
        cv2.fillConvexPoly(canvas, outer, _shaded(shape.colour, 0.6), cv2.LINE_AA, SUBPIXEL_BITS)
        outer = _fixed_point(_shrunk(shape.polygon, shape.rim_px))
    cv2.fillConvexPoly(canvas, outer, shape.colour, cv2.LINE_AA, SUBPIXEL_BITS)


def _fixed_point(polygon: Floats) -> npt.NDArray[np.int32]:
    points: npt.NDArray[np.int32] = np.rint(polygon * 2**SUBPIXEL_BITS).astype(np.int32)
    return points


def _shrunk(polygon: Floats, rim_px: float) -> Floats:
    middle = polygon.sum(axis=0) / len(polygon)
    spokes = polygon - middle
    reach = np.hypot(spokes[:, 0], spokes[:, 1])[:, None]
    shrunk: Floats = middle + spokes * np.maximum(1 - rim_px / np.maximum(reach, 1), 0.5)
    return shrunk


# Around the figures


def _background(generator: np.random.Generator, width: int, height: int) -> Pixels:
    """A wall and a floor in soft colours, shapes, and sticks that resemble limbs."""
    corners = np.array([_soft_colour(generator) for _ in range(4)]).reshape(2, 2, 3)
    coarse = cv2.resize(corners, (10, 10)) + generator.normal(0, 7, (10, 10, 3))
    coarse[generator.integers(5, 9) :] *= generator.uniform(0.6, 0.9)  # the floor
    smooth = cv2.resize(np.clip(coarse, 0, 255).astype(np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    canvas: Pixels = np.asarray(smooth, dtype=np.uint8)
    unseen = np.zeros((height, width), np.uint8)
    for _ in range(generator.integers(2, 9)):
        colour = _soft_colour(generator) if generator.random() < 0.6 else _random_colour(generator)
        _fill(canvas, unseen, Shape(_random_clutter(generator, width, height), colour), 0)
    return canvas


def _random_clutter(generator: np.random.Generator, width: int, height: int) -> Floats:
    center = generator.uniform(0, 1, 2) * (width, height)
    kind = generator.random()
    if kind < 0.35:
        return _ellipse(center, generator.uniform(0.02, 0.15, 2) * min(width, height))
    if kind < 0.6:
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * generator.uniform(0.03, 0.2, 2)
        return center + corners * min(width, height)
    return _stick(center, generator.uniform(0, np.pi), generator.uniform(0.1, 0.35, 1)[0] * height, height * 0.015)


def _stick(center: Floats, angle: float, length: float, radius: float) -> Floats:
    half = length / 2 * np.array([np.cos(angle), np.sin(angle)])
    return _convex(np.concatenate([_ellipse(center + end, np.full(2, radius)) for end in (half, -half)]))


def _draw_occluders(generator: np.random.Generator, canvas: Pixels, labels: Pixels, figures: Sequence[Figure]) -> None:
    """In front of about a third of the figures: a table, a post or a bush."""
    for figure in figures:
        if generator.random() > 0.35:
            continue
        joint = figure.body.joints[generator.integers(5, 17)]
        center = figure.pixels(joint) + generator.normal(0, 0.04, 2) * figure.size
        kind = generator.random()
        if kind < 0.35:
            polygon = _stick(center, np.pi / 2 + generator.normal(0, 0.1), 1.2 * figure.size, 0.02 * figure.size)
        elif kind < 0.7:
            extent = generator.uniform((0.08, 0.04), (0.25, 0.1)) * figure.size
            polygon = center + np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * extent
        else:
            polygon = _ellipse(center, generator.uniform(0.04, 0.12, 2) * figure.size)
        _fill(canvas, labels, _outlined(figure, polygon, _random_colour(generator), 0.0), OCCLUDER)


def _photograph(generator: np.random.Generator, canvas: Pixels) -> bytes:
    """The canvas as a JPEG, with a sensor's noise and often a little blur."""
    blur = generator.uniform(0.1, 0.9)
    picture = cv2.GaussianBlur(canvas, (3, 3), blur) if generator.random() < 0.6 else canvas
    grain = generator.integers(0, int(generator.integers(2, 18)), canvas.shape[:2], dtype=np.uint8)
    quality = int(generator.integers(75, 96))
    grainy = cv2.add(picture, cv2.merge([grain] * 3))
    _, jpeg = cv2.imencode(".jpg", grainy, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return bytes(jpeg.tobytes())


# What an annotator notes


def _person(figure: Figure, labels: Pixels, *, first_label: int, annotation_id: int) -> Person | None:
    """The annotation, or None where nothing of the figure is to be seen."""
    mine = (labels >= first_label) & (labels < first_label + len(PARTS))
    if not mine.any():
        return None
    rows, columns = np.flatnonzero(mine.any(axis=1)), np.flatnonzero(mine.any(axis=0))
    box = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    keypoints = [_keypoint(figure, labels, joint, first_label) for joint in range(COCO17.num_joints)]
    return Person(
        annotation_id=annotation_id,
        box_xywh=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
        area=float(mine.sum()),
        iscrowd=False,
        num_keypoints=sum(v > 0 for _, _, v in keypoints),
        keypoints=tuple(value for keypoint in keypoints for value in keypoint),
    )


def _keypoint(figure: Figure, labels: Pixels, joint: int, first_label: int) -> tuple[float, float, float]:
    """(x, y, v): 2 where the joint's own parts are on top, 1 where it is hidden, all 0 outside the picture."""
    x, y = (round(float(value), 2) for value in figure.pixels(figure.body.joints[joint]))
    column, row = round(x), round(y)
    if not (0 <= column < labels.shape[1] and 0 <= row < labels.shape[0]):
        return 0.0, 0.0, 0.0
    seen = int(labels[row, column]) - first_label in PARTS_OF_JOINT[joint] and _faces_viewer(figure, joint)
    return x, y, 2.0 if seen else 1.0


def _faces_viewer(figure: Figure, joint: int) -> bool:
    """Whether the body's own bulk leaves the joint in view: far eyes, shoulders and hips are behind it."""
    if joint < 5:
        return _is_on_near_side(figure, joint)
    depth = figure.body.joints[joint, 2] - (figure.body.neck[2] if joint in (5, 6) else 0.0)
    return bool(joint not in (5, 6, 11, 12) or depth > -0.06)
