"""The person detector: letterbox, grids and suppression by hand, whole detectors on pictures."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.detection import (
    ONNXRUNTIME,
    OPENCV,
    Detector,
    box_grids,
    box_ious,
    decode_boxes,
    detector_input,
    letterbox,
    letterbox_ratio,
    suppress_boxes,
)
from pipeline.errors import DataError
from pipeline.images import decode_picture
from pipeline.onnx_header import input_shape
from tests.made_detector import detector_bytes

BACKENDS = [OPENCV, pytest.param(ONNXRUNTIME, marks=pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed"))]


def made(backend: str = OPENCV, *, batch: int | None = 1, score: float = 0.5) -> Detector:
    return Detector(detector_bytes(batch), source="made", backend=backend, score=score, nms_iou=0.5, threads=1)


def picture(*bright_xywh: tuple[int, int, int, int], size_wh: tuple[int, int] = (64, 64),
            value: int = 255) -> np.ndarray:
    image = np.zeros((size_wh[1], size_wh[0], 3), np.uint8)
    for x, y, w, h in bright_xywh:
        image[y:y + h, x:x + w] = value
    return image


def test_a_wide_picture_lies_at_the_top_left_of_grey() -> None:
    boxed = letterbox(np.full((100, 200, 3), 7, np.uint8), (64, 64))
    assert letterbox_ratio(np.empty((100, 200, 3)), (64, 64)) == 0.32
    assert boxed.shape == (64, 64, 3)
    assert (boxed[:32] == 7).all()
    assert (boxed[32:] == 114).all()


def test_a_line_of_pixels_keeps_one_row() -> None:
    assert (letterbox(np.full((1, 5000, 3), 7, np.uint8), (64, 64))[0] == 7).all()


def test_the_grids_go_from_fine_to_coarse_and_row_by_row() -> None:
    grids = box_grids(416, 416)
    assert len(grids) == 52**2 + 26**2 + 13**2 == 3549
    assert grids[53].tolist() == [1, 1, 8]
    assert grids[52**2].tolist() == [0, 0, 16]
    assert grids[-1].tolist() == [12, 12, 32]


def test_a_box_is_its_cells_place_and_its_sides_are_powers_of_e() -> None:
    output = np.array([[0.5, 0.25, math.log(2), math.log(3), 0.8, 0.5, 0.9]])
    xywh, scores = decode_boxes(output, np.array([[3, 4, 16]]))
    # centre (3.5 x 16, 4.25 x 16) = (56, 68); sides (2 x 16, 3 x 16)
    np.testing.assert_allclose(xywh, [[56 - 16, 68 - 24, 32, 48]])
    np.testing.assert_allclose(scores, [0.4])


def test_overlap_is_the_common_area_by_the_joint_one() -> None:
    ious = box_ious(np.array([0.0, 0, 10, 10]), np.array([[5.0, 0, 15, 10], [0, 0, 10, 10], [10, 0, 20, 10]]))
    np.testing.assert_allclose(ious, [50 / 150, 1, 0])


def test_of_boxes_that_overlap_the_best_stays_and_those_next_to_a_dropped_one_too() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [4, 0, 10, 10], [8, 0, 10, 10], [50, 50, 5, 5]])
    # 0 and 1, and 1 and 2, share 60 of 140; 0 and 2 share 20 of 180
    assert suppress_boxes(boxes, np.array([0.9, 0.8, 0.7, 0.1]), 0.4).tolist() == [0, 2, 3]
    assert suppress_boxes(boxes, np.array([0.8, 0.9, 0.7, 0.1]), 0.4).tolist() == [1, 3]
    assert suppress_boxes(boxes, np.array([0.8, 0.9, 0.7, 0.1]), 0.5).tolist() == [1, 0, 2, 3]
    assert suppress_boxes(boxes[:0], np.empty(0), 0.5).tolist() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bright_cell_is_found_in_the_pictures_own_pixels(backend: str) -> None:
    found, = made(backend).detect([picture((80, 40, 40, 40), size_wh=(320, 160))])  # scaled by 1/5 to the cell 16, 8
    np.testing.assert_allclose(found.xywh, [[80, 40, 40, 40]])
    np.testing.assert_allclose(found.scores, [1], rtol=1e-5)
    assert found.ids.tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 2, None])
def test_pictures_in_a_batch_keep_their_own_boxes(backend: str, batch: int | None) -> None:
    images = [picture(), picture((8, 16, 8, 8)), picture((0, 0, 8, 8), (40, 8, 8, 8))]
    found = list(made(backend, batch=batch).detect(images))
    assert [sorted(one.xywh.tolist()) for one in found] == [
        [], [[8, 16, 8, 8]], [[0, 0, 8, 8], [40, 8, 8, 8]]]


def test_the_best_box_comes_first_and_weak_ones_are_left_out() -> None:
    image = picture((0, 0, 8, 8), value=200) + picture((16, 0, 8, 8), value=250) + picture((32, 0, 8, 8), value=100)
    found, = made().detect([image])
    assert found.xywh[:, 0].tolist() == [16, 0]
    np.testing.assert_allclose(found.scores, [250 / 255, 200 / 255], rtol=1e-5)


def test_the_shape_of_the_input_is_read_from_the_file() -> None:
    assert input_shape(detector_bytes(1), source="made") == (1, 3, 64, 64)
    assert detector_input(detector_bytes(None, side=96), source="made").batch is None


@pytest.mark.parametrize("data", [b"", b"no picture and no network", detector_bytes()[:40], b"\x08\x07"])
def test_what_is_no_onnx_file_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(DataError, match=r"boxes/d\.onnx is no ONNX file"):
        detector_input(data, source="boxes/d.onnx")


def test_a_network_of_another_layout_is_refused() -> None:
    with pytest.raises(DataError, match=r"its input is \[1, 3, 50, 50\]"):
        detector_input(detector_bytes(side=50), source="d.onnx")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_published_yolox_finds_the_annotated_persons_of_real_pictures(backend: str, shared: Path) -> None:
    data, truth = shared / "data" / "coco17_mini", {}
    document = json.loads((data / "annotations" / "person_keypoints_val.json").read_text())
    names = {image["id"]: image["file_name"] for image in document["images"][:12]}
    for one in document["annotations"]:
        # the data's README: recall 0.79 at IoU 0.5 and score 0.3; of large persons nearly all
        if one["image_id"] in names and not one["iscrowd"] and one["area"] > 96**2:
            truth.setdefault(names[one["image_id"]], []).append(one["bbox"])
    network = (shared / "models" / "yolox_nano_416.onnx").read_bytes()
    detector = Detector(network, source="yolox", backend=backend, score=0.3, nms_iou=0.45, threads=1)
    images = [decode_picture((data / "images" / name).read_bytes()) for name in truth]
    hits = []
    for boxes, found in zip(truth.values(), detector.detect(images), strict=True):
        corners = np.concatenate([found.xywh[:, :2], found.xywh[:, :2] + found.xywh[:, 2:]], -1)
        hits += [box_ious(np.array([x, y, x + w, y + h]), corners).max(initial=0) > 0.5 for x, y, w, h in boxes]
    assert len(hits) >= 10
    assert np.mean(hits) >= 0.85
