"""One unit of pictures, without Ray: boxes, batches, joints in picture pixels, rows."""

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import keypoints
from pipeline.annotation import (
    PictureToAnnotate,
    annotate_pictures,
    annotated_boxes,
    strongest_boxes,
    usable_boxes,
    whole_image_box,
)
from pipeline.figures import make_picture
from pipeline.images import decode_picture
from pipeline.pose.skeleton import COCO17
from pipeline.prediction import Predictor
from pipeline.rows import NO_PERSON, OK, REJECTED, AnnotatedPicture, Boxes
from pipeline.storage import ObjectMissing, StorageError
from tests.worlds import write_tiny_model


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    model = write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    return Predictor(model, backend="cpu", batch_size=4, threads=1)


def boxes(*xywh: Iterable[float], scores: Iterable[float] | None = None) -> Boxes:
    values = np.array(list(xywh), np.float64).reshape(-1, 4)
    return Boxes(np.arange(len(values)), values, np.ones(len(values)) if scores is None else np.array(list(scores)))


def task(key: str, persons: Boxes, read: Any = None) -> PictureToAnnotate:
    data = make_picture(0, seed=0).jpeg
    picture = {"key": key, "image_id": 1, "etag": "e", "sha256": None, "width": None, "height": None}
    return PictureToAnnotate(picture, read or (lambda: data), lambda width, height: persons)


def annotate(predictor: Predictor, *tasks: PictureToAnnotate, decoders: int = 1) -> list[AnnotatedPicture]:
    return annotate_pictures(tasks, predictor, decoders=decoders)


def test_each_picture_gets_the_joints_of_its_own_persons(predictor: Predictor) -> None:
    two, none, one = boxes((10, 10, 50, 90), (60, 20, 40, 80)), Boxes.none(), boxes((5, 5, 70, 70))
    together = annotate(predictor, task("a", two), task("b", none), task("c", one))
    assert [picture.status for picture in together] == [OK, NO_PERSON, OK]
    alone = annotate(predictor, task("c", one))[0]
    np.testing.assert_allclose(together[2].joints_xy, alone.joints_xy, atol=1e-3)
    assert together[0].joints_xy is not None
    assert together[0].joints_xy.shape == (2, 17, 2)


def test_persons_of_many_pictures_share_a_batch(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = Predictor._predict_batch
    monkeypatch.setattr(Predictor, "_predict_batch",
                        lambda self, crops: sizes.append(len(crops)) or plain(self, crops))
    annotate(predictor, *(task(f"{i}", boxes((10, 10, 50, 90), (60, 20, 40, 80))) for i in range(5)))
    assert sizes == [4, 4, 2]


def test_joints_move_with_the_picture(predictor: Predictor) -> None:
    image = decode_picture(make_picture(1, seed=0).jpeg)
    shifted = np.pad(image, ((30, 0), (20, 0), (0, 0)))
    here = predictor.predict_persons(image, np.array([[40.0, 40.0, 60.0, 100.0]]))
    # the crop lies inside both pictures, so that the network sees the same pixels
    there = predictor.predict_persons(shifted, np.array([[60.0, 70.0, 60.0, 100.0]]))
    np.testing.assert_allclose(there.joints_xy - here.joints_xy, np.broadcast_to([20.0, 30.0], (1, 17, 2)), atol=0.01)


@pytest.mark.parametrize("decoders", [1, 2])
def test_a_refused_picture_does_not_disturb_its_neighbours(predictor: Predictor, decoders: int) -> None:
    def missing() -> bytes:
        raise ObjectMissing("b: gone")

    some = boxes((10, 10, 50, 90))
    broken, gone, whole = annotate(predictor, task("a", some, lambda: b"no picture"), task("b", some, missing),
                                   task("c", some), decoders=decoders)
    assert (broken.status, broken.reason) == (REJECTED, "not_a_picture")
    assert (gone.status, gone.reason, gone.error) == (REJECTED, "missing", "b: gone")
    assert whole.status == OK


def test_trouble_with_the_store_is_not_swallowed(predictor: Predictor) -> None:
    def read() -> bytes:
        raise StorageError("503 SlowDown")

    with pytest.raises(StorageError, match="SlowDown"):
        annotate(predictor, task("a", boxes((0, 0, 5, 5)), read))


def test_boxes_that_cannot_be_cropped_are_left_out_and_counted(predictor: Predictor) -> None:
    given = boxes((10, 10, 50, 90), (0, 0, 0, 10), (np.nan, 0, 5, 5), (5000, 5, 10, 10), (-20, -20, 10, 10))
    picture = annotate(predictor, task("a", given))[0]
    assert picture.boxes.ids.tolist() == [0]
    assert picture.boxes_refused == 4


def test_a_picture_with_only_such_boxes_is_rejected(predictor: Predictor) -> None:
    picture = annotate(predictor, task("a", boxes((0, 0, 0, 10))))[0]
    assert (picture.status, picture.reason) == (REJECTED, "bad_boxes")


@pytest.mark.parametrize("box", [
    (0, 0, 1e39, 1e39), (0, 0, 1.7e308, 5), (-1e300, -1e300, 1e301, 1e301), (-2e6, 0, 2.1e6, 50), (5, 5, 1e-300, 50)])
def test_a_box_beyond_all_pictures_or_of_next_to_no_size_is_refused(
        predictor: Predictor, box: tuple[float, ...]) -> None:
    picture = annotate(predictor, task("a", boxes(box, (10, 10, 50, 90))))[0]
    assert (picture.boxes.ids.tolist(), picture.boxes_refused) == ([1], 1)


@pytest.mark.parametrize("box", [(-9e5, -9e5, 1e6, 1e6), (5, 5, 1e6, 1e-3)])
def test_boxes_at_the_bounds_have_joints_in_numbers(predictor: Predictor, box: tuple[float, ...]) -> None:
    picture = annotate(predictor, task("a", boxes(box)))[0]
    assert picture.joints_xy is not None
    assert np.isfinite(picture.joints_xy).all()
    assert np.isfinite(picture.joint_scores).all()


def test_a_box_that_reaches_over_the_border_is_kept_as_it_is() -> None:
    over = boxes((-5, -5, 20, 20))
    assert usable_boxes(over, 10, 10).xywh.tolist() == [[-5, -5, 20, 20]]


def test_a_box_that_only_touches_the_picture_from_outside_is_refused() -> None:
    touching = boxes((10, 0, 5, 5), (0, 20, 5, 5), (-5, 0, 5, 5), (0, -5, 5, 5), (9, 19, 5, 5))
    assert usable_boxes(touching, 10, 20).ids.tolist() == [4]


def test_the_digest_of_boxes_stays_as_old_outputs_have_it() -> None:
    two = boxes((1, 2, 3, 4), (5, 6, 7, 8), scores=[0.5, 0.25])
    content = struct.pack("<2q8d2d", 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0.5, 0.25)
    assert two.digest() == hashlib.sha256(content).hexdigest()[:16]


def test_annotated_boxes_are_all_but_the_crowds_also_without_keypoints() -> None:
    persons = [{"annotation_id": 7, "box_xywh": [1, 2, 3, 4], "iscrowd": False, "keypoints": None},
               {"annotation_id": 8, "box_xywh": [1, 2, 3, 4], "iscrowd": True, "keypoints": None}]
    chosen = annotated_boxes(persons)
    assert (chosen.ids.tolist(), chosen.scores.tolist()) == ([7], [1.0])
    assert len(annotated_boxes(None).ids) == 0


def test_the_strongest_boxes_keep_their_order() -> None:
    given = boxes(*[(i, 0, 1, 1) for i in range(4)], scores=[0.3, 0.9, 0.1, 0.5])
    assert strongest_boxes(given, min_score=0.2, max_persons=2).ids.tolist() == [1, 3]
    assert strongest_boxes(given, min_score=0.2, max_persons=None).ids.tolist() == [0, 1, 3]
    assert strongest_boxes(given, min_score=0.5, max_persons=None).ids.tolist() == [1, 3]


def test_the_whole_image_is_one_box() -> None:
    assert whole_image_box(640, 480).xywh.tolist() == [[0, 0, 640, 480]]


# --- rows ---------------------------------------------------------------------------------------------------------


def read_part(pictures: list[AnnotatedPicture]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    data = keypoints.part_bytes(pictures, COCO17, job="j0b", model={"name": "m"})
    file = pq.ParquetFile(pa.BufferReader(data))
    return file.read().to_pylist(), keypoints.pose_metadata(file.metadata)


def person(key: str, x: float) -> AnnotatedPicture:
    picture = {"key": key, "image_id": None, "etag": "e", "sha256": "s", "width": 10, "height": 10}
    return AnnotatedPicture(picture, OK, boxes=boxes((1, 2, 3, 4), scores=[0.5]),
                            joints_xy=np.full((1, 17, 2), x, np.float32),
                            joint_scores=np.linspace(0, 1, 17, dtype=np.float32)[None])


def test_rows_are_sorted_by_the_bytes_of_their_keys() -> None:
    rows, _ = read_part([person("ä", 1), person("b", 2), person("B", 3)])
    assert [row["key"] for row in rows] == ["B", "b", "ä"]
    assert [row["nose_x"] for row in rows] == [3.0, 2.0, 1.0]


def test_a_persons_score_is_the_boxs_times_the_mean_of_the_joints() -> None:
    rows, _ = read_part([person("a", 1)])
    assert rows[0]["score"] == pytest.approx(0.5 * 0.5)
    assert rows[0]["right_ankle_score"] == 1.0


def test_what_does_not_exist_is_null() -> None:
    picture = {"key": "a", "image_id": None, "etag": "e", "sha256": None, "width": None, "height": None}
    rows, _ = read_part([AnnotatedPicture(picture, REJECTED, "corrupt", "broken"), person("b", 1)])
    absent = {name for name, value in rows[0].items() if value is None}
    assert {"nose_x", "left_ankle_score", "box_x", "box_score", "score", "person_index", "width"} <= absent
    assert not any(value != value for value in rows[0].values())  # no NaN


def test_a_parts_metadata_says_how_to_read_it() -> None:
    _, pose = read_part([person("a", 1), person("b", 1)])
    assert pose["counts"] == {"pictures": 2, "persons": 2, "ok": 2, "no_person": 0, "rejected": 0,
                              "boxes_refused": 0, "suppressed": 0, "reasons": {}}
    assert pose["skeleton"]["joints"][0] == "nose"
    assert pose["model"] == {"name": "m"}


def test_a_dataset_with_rows_of_a_newer_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keypoints, "ROW_VERSION", 2)
    data = keypoints.part_bytes([person("a", 1)], COCO17, job="j", model={})
    monkeypatch.setattr(keypoints, "ROW_VERSION", 1)
    with pytest.raises(ValueError, match="version 2"):
        keypoints.pose_metadata(pq.ParquetFile(pa.BufferReader(data)).metadata)


def test_an_empty_unit_is_still_a_readable_part(tmp_path: Path) -> None:
    rows, pose = read_part([])
    assert rows == []
    assert pose["counts"]["pictures"] == 0


def test_threads_that_decode_change_no_row_and_no_order(predictor: Predictor) -> None:
    tasks = [task(f"{number:02d}", boxes((10 + number, 10, 50, 90))) for number in range(9)]
    alone, threads = (annotate_pictures(tasks, predictor, decoders=decoders) for decoders in (1, 4))
    assert [picture.picture["key"] for picture in threads] == [f"{number:02d}" for number in range(9)]
    for one, other in zip(alone, threads, strict=True):
        np.testing.assert_array_equal(one.joints_xy, other.joints_xy)
