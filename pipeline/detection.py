"""A person detector: uint8 pictures -> boxes, by an ONNX file with YOLOX's published layout. No files, no runs.

Letterbox, grids and suppression are YOLOX's own (Megvii-BaseDetection/YOLOX, yolox/data/data_augment.py `preproc` and
yolox/utils/demo_utils.py `demo_postprocess`, Apache-2.0); the numbers are checked against boxes of real pictures.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import cv2
import numpy as np

from pipeline.errors import ConfigError, DataError
from pipeline.onnx_header import input_shape
from pipeline.rows import Boxes

Array = np.ndarray[Any, Any]

STRIDES = (8, 16, 32)
BORDER = 114  # grey, around a picture that isn't square
PERSON = 0  # of COCO's 80 classes, as YOLOX counts them
OPENCV, ONNXRUNTIME = "opencv", "onnxruntime"
BATCH = 8  # pictures at once, where the file leaves the batch free


@dataclass(frozen=True)
class DetectorInput:
    """What a detector file wants: uint8-valued float32 [batch, 3, height, width] BGR; batch None: any number."""

    batch: int | None
    height: int
    width: int


def detector_input(data: bytes, *, source: str) -> DetectorInput:
    """The input of a detector file; DataError, naming the file, where it isn't YOLOX's."""
    shape = input_shape(data, source=source)
    if len(shape) == 4 and shape[1] == 3 and shape[2] and shape[3] and not (shape[2] % 32 or shape[3] % 32):
        return DetectorInput(shape[0], shape[2], shape[3])
    raise DataError(f"{source}: its input is {list(shape)}, but YOLOX's is [batch, 3, height, width] with sides that "
                    "are fixed multiples of 32. Export YOLOX by its tools/export_onnx.py.")


def choose_backend(asked: str) -> str:
    """`auto` resolved: onnxruntime where it is installed, which takes half of OpenCV's time (benchmarks/RESULTS.md)."""
    installed = importlib.util.find_spec("onnxruntime") is not None
    if asked == ONNXRUNTIME and not installed:
        raise ConfigError("detector_backend onnxruntime: it is not installed. pip install '.[detect]', on every node, "
                          "or set detector_backend to opencv.")
    return (ONNXRUNTIME if installed else OPENCV) if asked == "auto" else asked


class Detector:
    """A loaded detector.

    data     the ONNX file; source: its name for messages
    backend  what runs it: OPENCV or ONNXRUNTIME; bits depend on it
    score    boxes below it are left out
    nms_iou  a box that overlaps a better one by more is left out
    threads  of this process, for the network
    """

    def __init__(self, data: bytes, *, source: str, backend: str, score: float, nms_iou: float, threads: int) -> None:
        self.input = detector_input(data, source=source)
        self.score, self.nms_iou, self.source = score, nms_iou, source
        self._forward = _open_network(data, backend, threads, source)
        self._grids = box_grids(self.input.height, self.input.width)

    def detect(self, images: Iterable[Array]) -> Iterator[Boxes]:
        """The persons of each uint8 [H, W, 3] BGR picture, the best first; ids count from 0.

        The stream is cut into batches as it comes. A file of fixed batch gets just that many: OpenCV takes more
        without a word, and answers wrongly.
        """
        size_wh = self.input.width, self.input.height
        boxed = ((letterbox(image, size_wh), letterbox_ratio(image, size_wh)) for image in images)
        while batch := list(islice(boxed, self.input.batch or BATCH)):
            outputs = self._run(np.stack([pixels for pixels, _ in batch]))
            for output, (_, ratio) in zip(outputs, batch, strict=True):
                yield self._persons(output, ratio)

    def _run(self, pixels: Array) -> Array:
        """[n, cells of all grids, 5 + classes] for uint8 [n, height, width, 3] of n pictures, n at most the batch."""
        missing = (self.input.batch or len(pixels)) - len(pixels)
        blob = np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0))).transpose(0, 3, 1, 2).astype(np.float32)
        outputs = self._forward(blob)
        if outputs.ndim != 3 or outputs.shape[:2] != (len(blob), len(self._grids)) or outputs.shape[2] < 6:
            raise DataError(f"{self.source}: it answers {list(outputs.shape)}, but YOLOX would answer "
                            f"[{len(blob)}, {len(self._grids)}, 85]. Export YOLOX by its tools/export_onnx.py, without "
                            "--decode_in_inference.")
        return outputs[:len(pixels)]

    def _persons(self, output: Array, ratio: float) -> Boxes:
        xywh, scores = decode_boxes(output, self._grids)
        found = np.flatnonzero((scores >= self.score) & np.isfinite(xywh).all(axis=1))
        kept = found[suppress_boxes(xywh[found], scores[found], self.nms_iou)]
        return Boxes(np.arange(len(kept)), xywh[kept] / ratio, scores[kept])


def letterbox_ratio(image: Array, size_wh: tuple[int, int]) -> float:
    """Input pixels for each of the picture's."""
    return float(min(size_wh[0] / image.shape[1], size_wh[1] / image.shape[0]))


def letterbox(image: Array, size_wh: tuple[int, int]) -> Array:
    """The picture scaled to fit, at the top left of a grey uint8 [height, width, 3]."""
    ratio = letterbox_ratio(image, size_wh)
    width, height = (max(1, int(side * ratio)) for side in (image.shape[1], image.shape[0]))
    boxed = np.full((size_wh[1], size_wh[0], 3), BORDER, np.uint8)
    boxed[:height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return boxed


def box_grids(height: int, width: int) -> Array:
    """float64 [n, 3]: x and y in cells, and stride of each answer; row by row, the finest grid first."""
    grids = []
    for stride in STRIDES:
        y, x = np.mgrid[:height // stride, :width // stride]
        grids.append(np.stack([x.ravel(), y.ravel(), np.full(x.size, stride)], -1))
    return np.concatenate(grids).astype(np.float64)


def decode_boxes(output: Array, grids: Array) -> tuple[Array, Array]:
    """Boxes xywh float64 [n, 4] in input pixels, and scores float64 [n] that they are persons.

    output  [n, 5 + classes]: the box's centre in cells from its own cell, log of width and height in strides,
            objectness, a score for each class
    """
    output = output.astype(np.float64)
    cells, stride = grids[:, :2], grids[:, 2:]
    with np.errstate(over="ignore"):
        wh = np.exp(output[:, 2:4]) * stride
    return np.concatenate([(output[:, :2] + cells) * stride - wh / 2, wh], -1), output[:, 4] * output[:, 5 + PERSON]


def suppress_boxes(xywh: Array, scores: Array, iou: float) -> Array:
    """The indices of the boxes that stay, the best first: none overlaps a better one that stays by more than `iou`."""
    left, kept = np.argsort(-scores, kind="stable"), []
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], -1)
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        left = left[box_ious(corners[best], corners[left]) <= iou]
    return np.array(kept, np.int64)


def box_ious(corners: Array, others: Array) -> Array:
    """Intersection over union of one box (x0, y0, x1, y1) with each of the others [n, 4]."""
    sides = np.minimum(corners[2:], others[:, 2:]) - np.maximum(corners[:2], others[:, :2])
    common = np.maximum(sides, 0).prod(axis=1)
    area, areas = (corners[2:] - corners[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(axis=1)
    return np.asarray(common / np.maximum(area + areas - common, np.finfo(np.float64).tiny))


def _open_network(data: bytes, backend: str, threads: int, source: str) -> Callable[[Array], Array]:
    try:
        return {OPENCV: _open_opencv, ONNXRUNTIME: _open_onnxruntime}[backend](data, threads)
    except ImportError as error:
        raise DataError(f"This run was begun with {backend}, which is not installed here ({error}). "
                        "pip install '.[detect]' on every node.") from None
    except Exception as error:  # each library has its own kinds
        raise DataError(f"{source}: {backend} can't load it: {error}") from None


def _open_opencv(data: bytes, threads: int) -> Callable[[Array], Array]:
    cv2.setNumThreads(threads)
    network = cv2.dnn.readNetFromONNX(np.frombuffer(data, np.uint8))

    def forward(blob: Array) -> Array:
        network.setInput(blob)
        return np.array(network.forward())  # its own memory is written again by the next call

    return forward


def _open_onnxruntime(data: bytes, threads: int) -> Callable[[Array], Array]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # actors share cores
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda blob: np.asarray(session.run(None, {name: blob})[0])
