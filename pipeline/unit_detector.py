"""One planned unit -> the boxes that a detector finds on its pictures, for the annotator that comes next.

What an actor of the detector pool does, without Ray. The annotator reads and decodes the pictures again, and it alone
says what became of each: a picture that can't be looked at here simply gets no answer.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline import annotation_input as inputs
from pipeline import keypoints, storage
from pipeline.annotation import DecodedPicture, PictureToAnnotate, decode_unless_known, usable_boxes
from pipeline.boxes import BoxChoice, detector_uri, earlier_box_source
from pipeline.detection import Detector
from pipeline.errors import DataError
from pipeline.images import Pixels
from pipeline.isolation import open_decoder
from pipeline.reuse import EarlierPictures
from pipeline.rows import Boxes
from pipeline.unit_annotator import FAILURES, Receipt, failure_receipt, limits_of
from pipeline.units import FrozenJob, read_unit


@dataclass(frozen=True)
class DetectedUnit:
    """What the detector found on a unit's pictures, by key; `failure`: why the unit could not be looked at.

    None: the picture is the one that an earlier run has seen. Not there: refused, by storage or decoder.
    """

    boxes: Mapping[str, Boxes | None] = field(default_factory=dict)
    failure: Receipt | None = None

    def to_json(self) -> dict[str, Any]:
        """For the way to the annotator; `from_json` is the inverse, bit by bit."""
        boxes = {key: None if found is None else np.column_stack([found.xywh, found.scores]).tolist()
                 for key, found in self.boxes.items()}
        return {"boxes": boxes, "failure": None if self.failure is None else asdict(self.failure)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DetectedUnit":
        """What `to_json` wrote."""
        boxes = {key: None if rows is None else _boxes_of_rows(rows) for key, rows in values["boxes"].items()}
        return cls(boxes, None if values["failure"] is None else Receipt(**values["failure"]))


class UnitDetector:
    """Holds the detector that the run keeps. Arguments as UnitAnnotator's; DataError if it can't be loaded."""

    def __init__(self, output: str, job: FrozenJob, *, careful: bool = False, decoder: str = "pipeline.images",
                 reuse: str | None = None) -> None:
        self.output, self.job, self.careful, self.decoder = output, job, careful, decoder
        self.detector = _open_detector(output, job)
        self.earlier = EarlierPictures(reuse) if reuse else None

    def detect(self, unit: int, earlier_parts: Sequence[str] = ()) -> DetectedUnit:
        """The boxes of one unit; none if it is committed already."""
        try:
            if storage.exists(storage.join(self.output, keypoints.FOLDER, self.job.part_name(unit))):
                return DetectedUnit()
            earlier = self.earlier.of_parts(earlier_parts) if self.earlier else {}
            planned = read_unit(self.output, self.job, unit)
            with open_decoder(limits_of(self.job.intent), isolated=self.careful, decoder=self.decoder) as decoder:
                tasks = inputs.pictures_of_unit(self.job.input, planned, earlier_box_source(earlier), earlier)
                return DetectedUnit(detect_pictures(tasks, self.detector, decode=decoder.decode))
        except FAILURES as error:
            return DetectedUnit(failure=failure_receipt(unit, error))


def detect_pictures(tasks: Iterable[PictureToAnnotate], detector: Detector, *,
                    decode: Callable[[bytes], Pixels]) -> dict[str, Boxes | None]:
    """The persons of each picture, by key: None for one that is unchanged, nothing for one that is refused."""
    found: dict[str, Boxes | None] = {}
    decoded: list[dict[str, Any]] = []

    def images() -> Iterator[Pixels]:
        for task in tasks:
            one = decode_unless_known(task, decode)
            if isinstance(one, DecodedPicture):
                decoded.append(one.picture)
                yield one.image_bgr
            elif one.reused:
                found[one.picture["key"]] = None

    for index, boxes in enumerate(detector.detect(images())):
        picture = decoded[index]
        found[picture["key"]] = usable_boxes(boxes, picture["width"], picture["height"])
    return found


def _open_detector(output: str, job: FrozenJob) -> Detector:
    choice = BoxChoice.of_intent(job.intent["boxes"])
    assert choice.digest is not None
    uri = detector_uri(output, choice.digest)
    data = storage.read_object(uri)
    if hashlib.sha256(data).hexdigest() != choice.digest:
        raise DataError(f"{uri} is not the detector that this run was begun with. "
                        "Restore it, or choose a new --output.")
    settings = choice.detector
    return Detector(data, source=uri, backend=settings["backend"], score=settings["score"], nms_iou=settings["nms"],
                    threads=job.intent["threads"])


def _boxes_of_rows(rows: Sequence[Sequence[float]]) -> Boxes:
    values = np.array(rows, np.float64).reshape(-1, 5)
    return Boxes(np.arange(len(values)), values[:, :4], values[:, 4])
