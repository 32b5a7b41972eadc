"""One planned unit -> its pictures decoded and its persons cropped, for the annotator that comes next.

What an actor of the decoder pool does, without Ray. Where a detector makes the boxes it is asked here, so that each
picture is decoded once. What a unit carries is bounded: the annotator opens by itself whatever is left.
"""

import hashlib
import pickle
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import annotation_input as inputs
from pipeline import keypoints, storage
from pipeline.annotation import (
    CropPersons,
    Opened,
    PictureToAnnotate,
    decode_unless_known,
    judge_boxes,
    open_pictures,
    usable_boxes,
)
from pipeline.boxes import DETECT, BoxChoice, detector_uri, earlier_box_source, unit_box_source
from pipeline.detection import Detector
from pipeline.errors import DataError
from pipeline.images import Pixels
from pipeline.isolation import open_decoder
from pipeline.model.directory import ModelSpec, read_spec
from pipeline.model.settings import SPEC_FILE
from pipeline.pose.crop import crop_persons
from pipeline.reuse import EarlierPictures
from pipeline.rows import OK, AnnotatedPicture, Boxes
from pipeline.unit_annotator import Receipt, failure_receipt, limits_of
from pipeline.units import FrozenJob, read_unit

Array = np.ndarray[Any, Any]

# Of crops that one unit carries. 500 pictures of COCO with 3.6 persons each have 270 MB at 256x192, 600 at 384x288. A
# machine's object store is 30 % of its memory, and holds two or three units of each of its actors
UNIT_BYTES = 512 << 20
# Of decoded pictures that wait for the detector's answer: 8 at most, of COCO 7 MB, of 128 megapixels 3 GB
WAITING_BYTES = 256 << 20


@dataclass(frozen=True)
class DecodedUnit:
    """What became of a unit's pictures as far as the network; a picture that isn't here is left to the annotator.

    pictures  by key, in the plan's order; without their crops
    crops     uint8 [n, H, W, 3], of all pictures' persons in their order
    found     of those left, by key: the persons that the detector found, where one makes the boxes
    failure   why the unit could not be looked at
    seconds   that it took
    """

    pictures: Mapping[str, Opened] = field(default_factory=dict)
    crops: Array = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))
    found: Mapping[str, Boxes] = field(default_factory=dict)
    failure: Receipt | None = None
    seconds: float = 0.0

    def opened(self) -> dict[str, Opened]:
        """The pictures with their crops, which share the memory of all."""
        whole: dict[str, Opened] = {}
        start = 0
        for key, (picture, persons) in self.pictures.items():
            if persons is not None:
                end = start + len(persons.centers_xy)
                persons, start = replace(persons, crops=self.crops[start:end]), end
            whole[key] = picture, persons
        return whole

    def to_buffers(self) -> tuple[bytes, Array]:
        """For the way to another process of ours: all but the crops, and the crops as they are."""
        return pickle.dumps((replace(self, crops=self.crops[:0].copy()), self.crops.shape)), self.crops

    @classmethod
    def from_buffers(cls, about: bytes, crops: Any) -> "DecodedUnit":
        """The inverse of `to_buffers`; `crops`, any buffer, isn't copied."""
        unit, shape = pickle.loads(about)
        assert isinstance(unit, cls)
        return replace(unit, crops=np.frombuffer(crops, np.uint8).reshape(shape))


class UnitDecoder:
    """Holds what a run needs before its network: the model's specification, the detector if there is one.

    Arguments as UnitAnnotator's; DataError if one can't be loaded. That the specification is the model's own is for the
    annotator to check, which has the weights that its digest covers.
    """

    def __init__(self, output: str, job: FrozenJob, *, decoder: str = "pipeline.images",
                 reuse: str | None = None) -> None:
        self.output, self.job, self.decoder = output, job, decoder
        self.spec = _read_spec(output)
        self.boxes = BoxChoice.of_intent(job.intent["boxes"])
        self.detector = _open_detector(output, self.boxes, job) if self.boxes.kind == DETECT else None
        self.earlier = EarlierPictures(reuse, job.input) if reuse else None

    def decode(self, unit: int, earlier_parts: Sequence[str] = (), *, careful: bool = False) -> DecodedUnit:
        """One unit; nothing of it if it is committed already. The arguments are as for `UnitAnnotator.annotate`."""
        began = time.monotonic()
        try:
            if storage.exists(storage.join(self.output, keypoints.FOLDER, self.job.part_name(unit))):
                return DecodedUnit()
            with open_decoder(limits_of(self.job.intent), isolated=careful, decoder=self.decoder) as decoder:
                threads = 1 if careful else self.job.intent["threads"]
                opened = self._opened(unit, earlier_parts, decoder.decode, threads=threads)
                width, height = self.spec.input_size_wh
                decoded = carry(opened, crop_shape=(height, width, 3), to_the_end=self.detector is not None)
            return replace(decoded, seconds=time.monotonic() - began)
        except Exception as error:
            return DecodedUnit(failure=failure_receipt(unit, error))

    def _opened(self, unit: int, earlier_parts: Sequence[str], decode: Callable[[bytes], Pixels], *,
                threads: int) -> Iterator[Opened]:
        earlier = self.earlier.of_parts(earlier_parts) if self.earlier else {}
        boxes = earlier_box_source(earlier) if self.detector else unit_box_source(self.output, self.job, unit)
        tasks = inputs.pictures_of_unit(self.job.input, read_unit(self.output, self.job, unit), boxes, earlier,
                                        max_bytes=limits_of(self.job.intent).max_bytes)
        if self.detector:
            return open_by_detector(tasks, self.detector, self._crop, decode=decode, choose=self.boxes.strongest)
        return open_pictures(tasks, self._crop, decode=decode, threads=threads)

    def _crop(self, image_bgr: Array, boxes_xywh: Array) -> Any:
        return crop_persons(image_bgr, boxes_xywh, self.spec.input_size_wh, padding_wh=self.spec.box_padding_wh)


def carry(opened: Iterable[Opened], *, crop_shape: tuple[int, int, int], to_the_end: bool) -> DecodedUnit:
    """The opened pictures as one unit of at most UNIT_BYTES of crops; those whose crops find no room are left.

    to_the_end  go on after that, for what a detector finds; otherwise nothing more is opened
    """
    # one array from the beginning, for one copy less; memory is taken only as it is written
    crops = np.empty((UNIT_BYTES // int(np.prod(crop_shape)), *crop_shape), np.uint8)
    pictures: dict[str, Opened] = {}
    found: dict[str, Boxes] = {}
    used = 0
    for picture, persons in opened:
        key = picture.picture["key"]
        count = len(picture.boxes.ids)
        if picture.status != OK or picture.reused:
            pictures[key] = picture, None
        elif persons is not None and used + count <= len(crops):
            crops[used:used + count] = persons.crops
            used += count
            pictures[key] = picture, replace(persons, crops=persons.crops[:0].copy())
        elif to_the_end:
            found[key] = picture.boxes
        else:
            break
    return DecodedUnit(pictures, crops[:used], found)


def open_by_detector(tasks: Iterable[PictureToAnnotate], detector: Detector, crop: CropPersons, *,
                     decode: Callable[[bytes], Pixels], choose: Callable[[Boxes], Boxes]) -> Iterator[Opened]:
    """As `open_pictures`, with the boxes that the detector finds and `choose` takes.

    A picture whose pixels could not wait for its boxes (WAITING_BYTES) comes with them and without crops.
    """
    waiting: deque[AnnotatedPicture | tuple[dict[str, Any], Pixels | None]] = deque()

    def images() -> Iterator[Pixels]:
        for task in tasks:
            one = decode_unless_known(task, decode)
            if isinstance(one, AnnotatedPicture):
                waiting.append(one)
                continue
            held = sum(other[1].nbytes for other in waiting if isinstance(other, tuple) and other[1] is not None)
            waiting.append((one.picture, one.image_bgr if held + one.image_bgr.nbytes <= WAITING_BYTES else None))
            yield one.image_bgr

    for boxes in detector.detect(images()):
        while isinstance(one := waiting.popleft(), AnnotatedPicture):
            yield one, None
        yield _open_found(*one, choose(usable_boxes(boxes, one[0]["width"], one[0]["height"])), crop)
    yield from ((one, None) for one in waiting if isinstance(one, AnnotatedPicture))


def _open_found(picture: dict[str, Any], image_bgr: Pixels | None, boxes: Boxes, crop: CropPersons) -> Opened:
    opened = judge_boxes(picture, boxes)
    if image_bgr is None or opened.status != OK:
        return opened, None
    return opened, crop(image_bgr, opened.boxes.xywh)


def _read_spec(output: str) -> ModelSpec:
    uri = storage.join(output, keypoints.MODEL_FOLDER, SPEC_FILE)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / SPEC_FILE).write_bytes(storage.read_object(uri))
        return read_spec(Path(folder))


def _open_detector(output: str, choice: BoxChoice, job: FrozenJob) -> Detector:
    assert choice.digest is not None
    uri = detector_uri(output, choice.digest)
    data = storage.read_object(uri)
    if hashlib.sha256(data).hexdigest() != choice.digest:
        raise DataError(f"{uri} is not the detector that this run was begun with. "
                        "Restore it, or choose a new --output.")
    settings = choice.detector
    return Detector(data, source=uri, backend=settings["backend"], score=settings["score"], nms_iou=settings["nms"],
                    threads=job.intent["threads"])
