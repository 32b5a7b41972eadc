"""Who makes the boxes: annotations, the picture itself, files of detections, or a detector; chosen, frozen, given out.

A choice is made and frozen once, by the driver; an actor knows it from the job's intent and asks for one unit's boxes.
"""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from pipeline import shards, storage
from pipeline.annotation import annotated_boxes, strongest_boxes, whole_image_box
from pipeline.box_files import KEY, BoxFiles, find_box_files, json_box_tables, read_box_tables, read_pieces
from pipeline.detection import choose_backend, detector_input
from pipeline.errors import ConfigError
from pipeline.frozen_boxes import (
    PICTURE_SCHEMA,
    SpreadBoxes,
    are_frozen,
    count_frozen,
    freeze_boxes,
    read_unit_boxes,
)
from pipeline.rows import AnnotatedPicture, Boxes
from pipeline.units import FrozenJob, read_units

logger = logging.getLogger("jobs.annotate")
ANNOTATED, WHOLE_IMAGE, DETECTIONS, DETECT = "annotated", "whole-image", "detections", "detect"
DETECTOR_FOLDER = "_detector"

BoxSource = Callable[[dict[str, Any], int, int], Boxes]  # (row, width, height) -> its persons


@dataclass(frozen=True)
class AskedBoxes:
    """What the user said of boxes: the settings of `annotate` by their names."""

    boxes: str | None = None
    min_box_score: float = 0.0
    max_persons: int | None = None
    detector: str | None = None
    detector_score: float = 0.1
    detector_nms: float = 0.65
    detector_backend: str = "auto"


@dataclass(frozen=True)
class BoxChoice:
    """Who makes the boxes, and the digest of what they come from; `detector`: its settings, where there is one."""

    kind: str
    digest: str | None = None
    min_score: float = 0.0
    max_persons: int | None = None
    detector: Mapping[str, Any] = field(default_factory=dict)  # score, nms, backend

    def intent(self) -> dict[str, Any]:
        """What of it can change a row; `of_intent` is the inverse."""
        return {"kind": self.kind, "digest": self.digest, "min_score": self.min_score,
                "max_persons": self.max_persons, **self.detector}

    @classmethod
    def of_intent(cls, boxes: Mapping[str, Any]) -> "BoxChoice":
        """The choice that a frozen job was begun with."""
        detector = {name: boxes[name] for name in ("score", "nms", "backend") if name in boxes}
        return cls(boxes["kind"], boxes["digest"], boxes["min_score"], boxes["max_persons"], detector)

    def strongest(self, boxes: Boxes) -> Boxes:
        """Those of a picture's boxes, from files or a detector, that the choice takes."""
        return strongest_boxes(boxes, min_score=self.min_score, max_persons=self.max_persons)


@dataclass(frozen=True)
class ChosenBoxes:
    """A choice, and what the driver does about it.

    about   for `_job.json`: where the boxes come from; can change no row
    freeze  puts what is missing of the boxes or the detector beside a job's plan; gives back, of a job that begins with
            boxes from files, how many of them are of planned pictures, and how many of others
    """

    choice: BoxChoice
    about: dict[str, Any] = field(default_factory=dict)
    freeze: Callable[[FrozenJob], dict[str, int]] = lambda job: {}


def refuse_unservable(asked: AskedBoxes, source: dict[str, Any]) -> None:
    """Refuse (ConfigError) boxes that this input can't have, as far as one look tells: before files are read."""
    _refuse_half_a_detector(asked)
    if asked.boxes in (None, ANNOTATED):
        _chosen_annotations(asked, source, _annotations_sha256(source))
    elif asked.boxes == DETECT:
        _detector_bytes(storage.normalise(str(asked.detector)), "", None)
    elif asked.boxes != WHOLE_IMAGE:
        find_box_files(str(asked.boxes))


def _refuse_half_a_detector(asked: AskedBoxes) -> None:
    if (asked.detector is None) != (asked.boxes != DETECT):
        raise ConfigError("--boxes detect needs --detector FILE, an ONNX file with YOLOX's layout." if
                          asked.detector is None else "--detector is for --boxes detect: give both, or neither.")


@contextlib.contextmanager
def choose_boxes(asked: AskedBoxes, source: dict[str, Any], output: str, begun: FrozenJob | None = None, *,
                 reused: FrozenJob | None = None, whole: bool = True) -> Iterator[ChosenBoxes]:
    """Who makes the boxes of a run over this input (`source`) into this output; `begun`: the run that stands there.

    reused  the run whose rows are copied: what `auto` means is what it meant there
    whole   the plan has the whole input

    Files whose state is the one that `begun` was begun with are not read again, and once it has kept its boxes, files
    that are gone are not missed.
    Refuses (ConfigError) a choice that this input can't serve: annotated boxes without annotations, boxes by image_id
    without a shard dataset that has image ids, `detect` without a detector and the reverse.
    """
    _refuse_half_a_detector(asked)
    if asked.boxes == DETECT:
        yield _chosen_detector(asked, output, begun, reused)
        return
    if asked.boxes == WHOLE_IMAGE:
        yield ChosenBoxes(BoxChoice(WHOLE_IMAGE))
        return
    annotations = _annotations_sha256(source)
    if asked.boxes in (None, ANNOTATED):
        yield _chosen_annotations(asked, source, annotations)
        return
    files = _files_unless_kept(str(asked.boxes), output, begun)
    if files is None:
        digest = begun.intent["boxes"]["digest"] if begun else None
        yield ChosenBoxes(BoxChoice(DETECTIONS, digest, asked.min_box_score, asked.max_persons))
        return
    if files.by != KEY and not annotations:
        raise ConfigError(f"--boxes {asked.boxes}: these boxes name pictures by image_id, which only a shard dataset "
                          "made with --annotations has. Give Parquet with a column `key`.")
    with contextlib.ExitStack() as resources:
        yield _chosen_files(files, asked, source, output, begun, resources, whole=whole)


def unit_box_source(output: str, job: FrozenJob, unit: int, *,
                    detected: Mapping[str, Boxes] = MappingProxyType({})) -> BoxSource:
    """The function that gives the boxes of a unit's pictures: (row, width, height) -> Boxes.

    detected  with a detector: what it found, by key. For a picture that it could not look at the function raises
              StorageError: nobody may say of that one that it has no persons.
    """
    choice = BoxChoice.of_intent(job.intent["boxes"])
    if choice.kind == ANNOTATED:
        return lambda row, width, height: annotated_boxes(row.get("persons"))
    if choice.kind == WHOLE_IMAGE:
        return lambda row, width, height: whole_image_box(width, height)
    if choice.kind == DETECT:
        return lambda row, width, height: choice.strongest(_detected(row["key"], detected))
    assert choice.digest is not None
    frozen = read_unit_boxes(output, job, choice.digest, unit)
    return lambda row, width, height: choice.strongest(frozen.get(row["key"], Boxes.none()))


def earlier_box_source(earlier: Mapping[str, AnnotatedPicture]) -> BoxSource:
    """Of each picture the boxes that an earlier run gave it: for one that only asks whether the picture is the same."""
    return lambda row, width, height: earlier[row["key"]].boxes


def detector_uri(output: str, digest: str) -> str:
    """Where a run keeps its detector."""
    return storage.join(output, DETECTOR_FOLDER, f"{digest[:16]}.onnx")


def _detected(key: str, detected: Mapping[str, Boxes]) -> Boxes:
    if key not in detected:
        raise storage.StorageError(f"{key}: the detector could not look at this picture, though it can be decoded now")
    return detected[key]


def _chosen_annotations(asked: AskedBoxes, source: dict[str, Any], annotations: str | None) -> ChosenBoxes:
    if annotations:
        return ChosenBoxes(BoxChoice(ANNOTATED, annotations))
    if asked.boxes is None:
        raise ConfigError(f"{source['uri']} comes without annotated persons: say who makes the boxes by --boxes "
                          "whole-image, --boxes detect, or --boxes with the URI of detections.")
    raise ConfigError(f"--boxes annotated: {source['uri']} is no shard dataset with annotations. "
                      "Shard it with --annotations, or choose other boxes.")


def _annotations_sha256(source: dict[str, Any]) -> str | None:
    if "version" not in source:  # only a shard dataset has versions, and annotations
        return None
    dataset = shards.open_shards_once(source["uri"], source["version"])
    found: str | None = dataset.json["source"]["annotations_sha256"]
    return found


# --- a detector ---------------------------------------------------------------------------------------------------


def _chosen_detector(asked: AskedBoxes, output: str, begun: FrozenJob | None,
                     reused: FrozenJob | None) -> ChosenBoxes:
    assert asked.detector is not None
    uri = storage.normalise(asked.detector)
    data = _detector_bytes(uri, output, begun)
    detector_input(data, source=uri)
    digest = hashlib.sha256(data).hexdigest()
    settings = {"score": asked.detector_score, "nms": asked.detector_nms,
                "backend": _detector_backend(asked.detector_backend, begun, reused)}
    choice = BoxChoice(DETECT, digest, asked.min_box_score, asked.max_persons, settings)

    def freeze(job: FrozenJob) -> dict[str, int]:
        storage.put_if_absent(detector_uri(output, digest), data)
        return {}

    return ChosenBoxes(choice, {"detector": {"name": uri.rpartition("/")[2], "digest": digest}}, freeze)


def _detector_bytes(uri: str, output: str, begun: FrozenJob | None) -> bytes:
    """The detector's file; where it is gone, the one that the run was begun with and has kept, if it had that name."""
    try:
        return storage.read_object(uri)
    except storage.ObjectMissing:
        if begun is None or begun.about.get("detector", {}).get("name") != uri.rpartition("/")[2]:
            raise ConfigError(f"--detector {uri}: there is no such file.") from None
        logger.warning("--detector %s is gone; the run goes on with the one that it has kept", uri)
        return storage.read_object(detector_uri(output, begun.intent["boxes"]["digest"]))


def _detector_backend(asked: str, begun: FrozenJob | None, reused: FrozenJob | None) -> str:
    """`auto` resolved: as the run was begun, else as the one whose rows are copied had it, else what is here."""
    before, there = (one.intent["boxes"].get("backend") if one is not None and asked == "auto" else None
                     for one in (begun, reused))
    return str(before or choose_backend(there or asked))


# --- files of boxes -----------------------------------------------------------------------------------------------


def _files_unless_kept(asked: str, output: str, begun: FrozenJob | None) -> BoxFiles | None:
    """The files with boxes; None where they are gone, and the run that was begun with them has kept what it needs."""
    try:
        return find_box_files(asked)
    except ConfigError:
        uri = storage.normalise(asked)
        if (begun is None or begun.about.get("boxes", {}).get("uri") != uri
                or not are_frozen(output, begun, begun.intent["boxes"]["digest"])):
            raise
        logger.warning("--boxes %s is gone; the run goes on with the boxes that it has kept", uri)
        return None


def _chosen_files(files: BoxFiles, asked: AskedBoxes, source: dict[str, Any], output: str, begun: FrozenJob | None,
                  resources: contextlib.ExitStack, *, whole: bool) -> ChosenBoxes:
    spread = functools.cache(lambda: _spread(files, resources))
    about = {} if begun is None else begun.about.get("boxes", {})
    unread = about.get("uri") == files.uri and about.get("state") == files.state()
    digest = begun.intent["boxes"]["digest"] if begun is not None and unread else spread()[1]

    def freeze(job: FrozenJob) -> dict[str, int]:
        if not are_frozen(output, job, digest):
            freeze_boxes(output, job, digest, spread()[0], _planned_pictures(output, job, source, files.by),
                         source=files.uri, whole=whole)
        if begun is not None:
            return {}
        planned = count_frozen(output, job, digest)
        return {"boxes_of_planned": planned, "boxes_of_unknown": len(spread()[0]) - planned}

    choice = BoxChoice(DETECTIONS, digest, asked.min_box_score, asked.max_persons)
    return ChosenBoxes(choice, {"boxes": {"uri": files.uri, "state": files.state()}}, freeze)


def _spread(files: BoxFiles, resources: contextlib.ExitStack) -> tuple[SpreadBoxes, str]:
    """All boxes of the files, and the digest of them: of a JSON that of its bytes."""
    if files.is_json:
        content = hashlib.sha256()
        tables = json_box_tables(_noting(read_pieces(files.objects[0]), content), files.uri)
        return resources.enter_context(SpreadBoxes(tables)), content.hexdigest()
    boxes = resources.enter_context(SpreadBoxes(read_box_tables(files)))
    return boxes, boxes.digest()


def _noting(pieces: Iterable[bytes], content: "hashlib._Hash") -> Iterator[bytes]:
    for piece in pieces:
        content.update(piece)
        yield piece


def _planned_pictures(output: str, job: FrozenJob, source: dict[str, Any], by: str) -> Iterator[pa.Table]:
    """The plan's pictures (PICTURE_SCHEMA), each by what the boxes call it; without an image id none can be meant."""
    dataset = None if by == KEY else shards.open_shards_once(source["uri"], source["version"])
    parts = {} if dataset is None else {part.name: part for part in dataset.parts}
    for unit, table in read_units(output, job, range(job.num_units)):
        if dataset is not None:
            ids = shards.read_part_columns(dataset, parts[table["part"][0].as_py()], ["key", "image_id"])
            table = table.select(["key"]).join(ids, "key")
            table = table.filter(table["image_id"].is_valid())
        yield pa.table([table[by].cast(pa.string()), table["key"], pa.array([unit] * len(table), pa.int64())],
                       schema=PICTURE_SCHEMA)
