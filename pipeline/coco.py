"""COCO keypoint files: annotations to persons and back, detections to boxes. It reads bytes that someone else
fetched, and knows neither where they came from nor what becomes of the persons.

What an entry with a flaw becomes is fixed here, and each such entry is counted; only what isn't COCO's format
at all is refused. Coordinates are the picture's own pixels, float64 exactly as written.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pipeline.errors import DataError
from pipeline.json_array import iterate_array, refuse_constant
from pipeline.pose.skeleton import COCO17, MPII16, Skeleton, skeleton_from_category

PERSON_CATEGORY = 1  # COCO's id of "person", in results lists too
INT64 = range(-(2**63), 2**63)

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Person:
    """One annotated person. keypoints is flat (x, y, v) * K with v in {0, 1, 2}, or None: none annotated."""

    annotation_id: int
    box_xywh: tuple[float, float, float, float]
    area: float
    iscrowd: bool
    num_keypoints: int
    keypoints: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """One entry of `images` with its persons, in the file's order. Width and height as stated, if stated."""

    image_id: int
    file_name: str
    width: int | None
    height: int | None
    persons: tuple[Person, ...]


@dataclass(frozen=True)
class Annotations:
    """A whole annotation file: pictures by file name, and the skeleton of the one category with keypoints.

    counts  how many entries met each of the fates that `parse_annotations` lists; every fate is always there.
    """

    skeleton: Skeleton
    images: dict[str, AnnotatedImage]
    counts: dict[str, int]


@dataclass(frozen=True)
class Detection:
    """One box that a detector found; index is its place in the detections file."""

    index: int
    image_id: int
    box_xywh: tuple[float, float, float, float]
    score: float


def parse_annotations(data: bytes, *, source: str) -> Annotations:
    """The pictures and persons of a COCO keypoint file; source is its name for messages.

    Kept, and counted: `images`, `persons`, and among the persons `crowds` (iscrowd),
    `persons_without_keypoints` (none given, or all zero: keypoints is None), `boxes_outside_picture` (wholly,
    by the stated size; boxes are never clipped), `areas_from_boxes` (no area given: width times height).
    Left out, and counted: `images_with_repeated_id`, `images_with_repeated_name`,
    `annotations_with_repeated_id` (the first of each counts), `annotations_of_other_categories`,
    `annotations_without_image` (no image has the id), `persons_without_box` (none given, or without extent).
    Refused with DataError, naming source, entry and flaw: what isn't JSON or lacks the three lists; ids that
    aren't integers; boxes or keypoints of the wrong length or not finite; visibilities other than 0, 1, 2;
    no category with keypoints, or several.

    Memory peaks at about 3.2 times the file's size: 800 MB for 250 MB with 150,000 persons.
    """
    document = _load(data, source)
    if not isinstance(document, dict):
        _refuse(source, f"is a JSON {type(document).__name__}, not an object", "A results list? Use it as boxes.")
    category = _keypoint_category(_entries(document, "categories", source), source)
    skeleton = _skeleton(category, source)
    counts = dict.fromkeys(FATES, 0)
    images = _images(_entries(document, "images", source), counts, source)
    persons = _persons(_entries(document, "annotations", source), images, category, skeleton, counts, source)
    counts["images"] = len(images)
    return Annotations(
        skeleton=skeleton,
        images={
            image["file_name"]: AnnotatedImage(image_id, **image, persons=tuple(persons[image_id]))
            for image_id, image in images.items()
        },
        counts=counts,
    )


FATES = (
    "images",
    "persons",
    "crowds",
    "persons_without_keypoints",
    "boxes_outside_picture",
    "areas_from_boxes",
    "images_with_repeated_id",
    "images_with_repeated_name",
    "annotations_with_repeated_id",
    "annotations_of_other_categories",
    "annotations_without_image",
    "persons_without_box",
)


def coco_json(images: Iterable[AnnotatedImage], skeleton: Skeleton) -> dict[str, Any]:
    """A COCO keypoint file's content, as `json.dump` takes it; the inverse of `parse_annotations`.

    Persons without keypoints get zeros, as in COCO's own files (pycocotools asks for them).
    """
    images = list(images)
    return {
        "images": [_image_json(image) for image in images],
        "annotations": [
            _person_json(person, image.image_id, skeleton.num_joints) for image in images for person in image.persons
        ],
        "categories": [category_json(skeleton)],
    }


def category_json(skeleton: Skeleton) -> dict[str, Any]:
    """The entry of `categories` that describes a skeleton; `skeleton_from_category` reads it."""
    return {
        "id": PERSON_CATEGORY,
        "name": "person" if skeleton in (COCO17, MPII16) else skeleton.name,
        "keypoints": list(skeleton.joints),
        "skeleton": [[a + 1, b + 1] for a, b in skeleton.edges],  # COCO counts from 1
    }


def parse_detections(pieces: Iterable[bytes], *, source: str) -> Iterator[Detection]:
    """The person boxes of a COCO results list, in the file's order; the file comes in pieces, and isn't held.

    Entries of other categories than 1 are left out. No threshold, no suppression; boxes without extent stay.
    Refused with DataError, naming the entry: ids that aren't integers, boxes or scores that aren't finite.
    """
    for index, entry in enumerate(iterate_array(pieces, source=source, expected=DETECTIONS)):
        where = f"{source}: entry {index}"
        _require_object(entry, where)
        if _integer(entry, "category_id", where) == PERSON_CATEGORY:
            image_id = _integer(entry, "image_id", where)
            yield Detection(index, image_id, _box(entry, where), _number(entry, "score", where))


DETECTIONS = ("detections are a list of objects with image_id, category_id, bbox and score (annotations are for shard "
              "--annotations)")


# The document


def _load(data: bytes, source: str) -> Any:
    try:
        return json.loads(data, parse_constant=refuse_constant, object_hook=_without_outlines)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not JSON: {error}. Expected a COCO file; {len(data)} bytes were read.") from None


def _without_outlines(entry: dict[str, Any]) -> dict[str, Any]:
    """Drops what nobody here reads before the next entry is parsed.

    With `_SharedFloats` this lowers the peak for COCO's train2017 (216 MB) from 1640 MB to 700.
    """
    entry.pop("segmentation", None)
    return entry


def _entries(document: Entry, key: str, source: str) -> list[Entry]:
    entries = document.get(key)
    if not isinstance(entries, list):
        _refuse(
            source,
            f"`{key}` must be a list, but is {_type_name(document, key)}",
            "A COCO keypoint file has images, annotations and categories.",
        )
    for index, entry in enumerate(entries):
        _require_object(entry, f"{source}: {key}[{index}]")
    return entries


def _keypoint_category(categories: list[Entry], source: str) -> dict[str, Any]:
    with_keypoints = [category for category in categories if category.get("keypoints")]
    if len(with_keypoints) != 1:
        names = [category.get("name") for category in with_keypoints or categories]
        _refuse(
            source,
            f"needs one category with `keypoints`, but {len(with_keypoints)} have them (categories {names})",
            "Leave one such category in the file." if with_keypoints else "Name its joints in `keypoints`.",
        )
    return dict(with_keypoints[0])


def _skeleton(category: Entry, source: str) -> Skeleton:
    try:
        return skeleton_from_category(category)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


# Images and persons


def _images(entries: list[Entry], counts: dict[str, int], source: str) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    names: set[str] = set()
    for index, entry in enumerate(entries):
        where = f"{source}: images[{index}] ({entry.get('file_name')!r:.80})"
        image_id, image = _integer(entry, "id", where), _image(entry, where)
        if image_id in images:
            counts["images_with_repeated_id"] += 1
        elif image["file_name"] in names:
            counts["images_with_repeated_name"] += 1
        else:
            images[image_id] = image
            names.add(image["file_name"])
    return images


def _image(entry: Entry, where: str) -> dict[str, Any]:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        _refuse(where, f"`file_name` must be a name, but is {_type_name(entry, 'file_name')}")
    return {"file_name": name, "width": _side(entry, "width", where), "height": _side(entry, "height", where)}


def _persons(
    entries: list[Entry],
    images: Mapping[int, Entry],
    category: Entry,
    skeleton: Skeleton,
    counts: dict[str, int],
    source: str,
) -> dict[int, list[Person]]:
    persons: dict[int, list[Person]] = {image_id: [] for image_id in images}
    category_id = _integer(category, "id", f"{source}: category {category.get('name')!r}")
    seen: set[int] = set()
    for index, entry in enumerate(entries):
        where = f"{source}: annotations[{index}] (id {entry.get('id')!r:.40})"
        fate = _fate(entry, category_id, images, seen, where)
        if fate != "persons":
            counts[fate] += 1
            continue
        person = _person(entry, skeleton, where)
        seen.add(person.annotation_id)
        image_id = entry["image_id"]
        persons[image_id].append(person)
        for count in ("persons", *_remarks(person, entry, images[image_id])):
            counts[count] += 1
    return persons


def _fate(entry: Entry, category_id: int, images: Mapping[int, Entry], seen: set[int], where: str) -> str:
    """`persons`, or why the annotation is left out."""
    if _integer(entry, "category_id", where) != category_id:
        return "annotations_of_other_categories"
    if _integer(entry, "image_id", where) not in images:
        return "annotations_without_image"
    if _integer(entry, "id", where) in seen:
        return "annotations_with_repeated_id"
    if entry.get("bbox") is None:
        return "persons_without_box"
    _, _, width, height = _box(entry, where)
    return "persons" if min(width, height) > 0 else "persons_without_box"


def _person(entry: Entry, skeleton: Skeleton, where: str) -> Person:
    box = _box(entry, where)
    keypoints = _keypoints(entry, skeleton, where)
    labelled = sum(v > 0 for v in keypoints[2::3]) if keypoints else 0
    return Person(
        annotation_id=entry["id"],
        box_xywh=box,
        area=box[2] * box[3] if entry.get("area") is None else _number(entry, "area", where),
        iscrowd=bool(_integer({"iscrowd": 0, **entry}, "iscrowd", where)),
        num_keypoints=_integer({"num_keypoints": labelled, **entry}, "num_keypoints", where),
        keypoints=keypoints,
    )


def _remarks(person: Person, entry: Entry, image: Entry) -> list[str]:
    """The counts that a kept person adds to."""
    remarks = {
        "crowds": person.iscrowd,
        "persons_without_keypoints": person.keypoints is None,
        "areas_from_boxes": entry.get("area") is None,
        "boxes_outside_picture": _is_outside(person.box_xywh, image["width"], image["height"]),
    }
    return [name for name, applies in remarks.items() if applies]


def _is_outside(box_xywh: tuple[float, float, float, float], width: int | None, height: int | None) -> bool:
    x, y, box_width, box_height = box_xywh
    beyond = (width is not None and x >= width) or (height is not None and y >= height)
    return beyond or x + box_width <= 0 or y + box_height <= 0


def _keypoints(entry: Entry, skeleton: Skeleton, where: str) -> tuple[float, ...] | None:
    if not entry.get("keypoints"):
        return None
    flat = _numbers(entry, "keypoints", 3 * skeleton.num_joints, where)
    if not set(flat[2::3]) <= {0.0, 1.0, 2.0}:
        _refuse(where, f"visibilities must be 0, 1 or 2, but are {sorted(set(flat[2::3]))}")
    return flat if any(flat) else None


# Values


def _integer(entry: Entry, key: str, where: str) -> int:
    value = entry.get(key)
    if isinstance(value, bool) and key == "iscrowd":
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value not in INT64:
        _refuse(where, f"`{key}` must be an integer of 64 bits, but is {_type_name(entry, key)}")
    return value


def _side(entry: Entry, key: str, where: str) -> int | None:
    value = entry.get(key)
    if value is None:
        return None
    number = _number(entry, key, where)
    if number <= 0 or number != int(number):
        _refuse(where, f"`{key}` must be a positive number of pixels, but is {value!r:.80}")
    return int(number)


def _number(entry: Entry, key: str, where: str) -> float:
    value = entry.get(key)
    if not _is_finite(value):
        _refuse(where, f"`{key}` must be a finite number, but is {_type_name(entry, key)}")
    return float(value)  # type: ignore[arg-type]  # _is_finite has looked


def _box(entry: Entry, where: str) -> tuple[float, float, float, float]:
    x, y, width, height = _numbers(entry, "bbox", 4, where)
    return x, y, width, height


def _numbers(entry: Entry, key: str, length: int, where: str) -> tuple[float, ...]:
    values = entry.get(key)
    if not isinstance(values, list) or len(values) != length or not _are_finite(values):
        _refuse(where, f"`{key}` must be {length} finite numbers, but is {_type_name(entry, key)}")
    return tuple(map(_FLOATS.__getitem__, values))


def _are_finite(values: list[Any]) -> bool:
    """As `_is_finite` for each, at half the time or less, which COCO's nine million numbers make seconds.

    JSON has no NaN, with which comparisons would not tell.
    """
    return {*map(type, values)} <= {int, float} and min(values) > -1e300 and max(values) < 1e300


class _SharedFloats(dict[float, float]):
    """Number -> float64, one object for each small whole number: most of COCO's keypoints are such."""

    def __missing__(self, value: float) -> float:
        return float(value)


_FLOATS = _SharedFloats((number, float(number)) for number in range(4096))


def _is_finite(value: object) -> bool:
    # An integer that no float64 can hold is refused like an infinity.
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def _require_object(entry: object, where: str) -> None:
    if not isinstance(entry, dict):
        _refuse(where, f"must be an object, but is {entry!r:.80}")


def _type_name(entry: Entry, key: str) -> str:
    if key not in entry:
        return f"missing (there are {sorted(map(str, entry))[:12]})"
    value = entry[key]
    if isinstance(value, list):
        return f"a list of {len(value)}: {value!r:.120}"
    return f"{value!r:.80} ({type(value).__name__})"


def _refuse(where: str, flaw: str, remedy: str = "") -> NoReturn:
    raise DataError(f"{where}: {flaw}. {remedy}".rstrip())


# Writing


def _image_json(image: AnnotatedImage) -> dict[str, Any]:
    sizes = {"width": image.width, "height": image.height}
    known = {key: value for key, value in sizes.items() if value is not None}
    return {"id": image.image_id, "file_name": image.file_name, **known}


def _person_json(person: Person, image_id: int, num_joints: int) -> dict[str, Any]:
    return {
        "id": person.annotation_id,
        "image_id": image_id,
        "category_id": PERSON_CATEGORY,
        "bbox": [_short(value) for value in person.box_xywh],
        "area": _short(person.area),
        "iscrowd": int(person.iscrowd),
        "num_keypoints": person.num_keypoints,
        "keypoints": [_short(value) for value in person.keypoints or (0.0,) * (3 * num_joints)],
    }


def _short(value: float) -> float | int:
    """The same number, as an integer where it is one: as COCO's own files have it, and shorter."""
    return int(value) if float(value).is_integer() else value
