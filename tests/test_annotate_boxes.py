"""Whole annotate runs, without Ray, whose boxes come from files or from a detector."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import annotate, shard
from pipeline import boxes as box_module
from pipeline import keypoints, unit_decoder
from pipeline.boxes import unit_box_source
from pipeline.config import AnnotateConfig, ShardConfig
from pipeline.detection import Detector
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.images import decode_picture
from pipeline.prediction import Predictor
from pipeline.units import open_job
from pipeline.verification.keypoint_output import open_output
from tests.fault_proxy import SLOW_DOWN, FaultProxy
from tests.made_detector import detector_bytes
from tests.worlds import NO_TRACKING, rows, write_pictures, write_tiny_model

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `in/images` (six made pictures), `model`, `detector.onnx` and `boxes.parquet` (two for each)."""
    folder = tmp_path_factory.mktemp("world")
    pictures = write_pictures(folder / "in", count=6)
    write_tiny_model(folder / "model")
    (folder / "detector.onnx").write_bytes(detector_bytes())
    write_boxes(folder / "boxes.parquet", [path.name for path in sorted((pictures / "images").iterdir())])
    return folder


def write_boxes(path: Path, names: list[str], first_x: float = 5) -> None:
    """Two boxes for each picture, the second one without width."""
    count = len(names)
    pq.write_table(pa.table({
        "key": [*names, *names], "x": [first_x] * 2 * count, "y": [5.0] * 2 * count,
        "w": [40.0] * count + [0.0] * count, "h": [60.0] * 2 * count, "score": [0.9] * 2 * count}), path)


def config(world: Path, output: Path | str, **settings: object) -> AnnotateConfig:
    return AnnotateConfig(**{
        "input": str(world / "in" / "images"), "model": str(world / "model"), "output": str(output),
        "boxes": str(world / "boxes.parquet"), "tracking": NO_TRACKING, "actors": 1, "pictures_per_unit": 4,
        "backend": "cpu", "max_rejected_share": 1, **settings})


def detecting(world: Path, output: Path | str, **settings: object) -> AnnotateConfig:
    return config(world, output, **{"boxes": "detect", "detector": str(world / "detector.onnx"), "detector_score": 0.5,
                                    "max_persons": 3, "detector_backend": "opencv", **settings})


def parts(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "keypoints").iterdir()}


def lose_a_part(output: Path) -> None:
    sorted((output / "keypoints").iterdir())[0].unlink()
    (output / "_SUCCESS").unlink()


# --- files --------------------------------------------------------------------------------------------------------


def test_a_plain_prefix_is_annotated_with_boxes_by_key(world: Path, tmp_path: Path) -> None:
    result = annotate.run(config(world, tmp_path / "out"))
    assert (result["counts"]["persons"], result["counts"]["boxes_refused"]) == (6, 6)
    assert rows(str(tmp_path / "out"))["box_x"].to_pylist() == [5.0] * 6
    assert open_output(str(tmp_path / "out")).findings == ()


def test_a_run_goes_on_without_reading_boxes_again_as_long_as_their_files_are_the_same(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(world / "boxes.parquet", tmp_path / "boxes.parquet")
    asked = config(world, tmp_path / "out", boxes=str(tmp_path / "boxes.parquet"))
    annotate.run(asked)
    before = parts(tmp_path / "out")
    lose_a_part(tmp_path / "out")
    with monkeypatch.context() as patches:
        patches.setattr(box_module, "read_box_tables", None)
        annotate.run(asked)
    assert parts(tmp_path / "out") == before
    write_boxes(tmp_path / "boxes.parquet", ["000001.jpg"], first_x=6)
    with pytest.raises(ConfigError, match="boxes: begun with"):
        annotate.run(asked)


def test_a_run_goes_on_when_its_boxes_are_gone_and_it_has_kept_them(
        world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(world / "boxes.parquet", tmp_path / "boxes.parquet")
    asked = config(world, tmp_path / "out", boxes=str(tmp_path / "boxes.parquet"))
    annotate.run(asked)
    before = parts(tmp_path / "out")
    lose_a_part(tmp_path / "out")
    (tmp_path / "boxes.parquet").unlink()
    annotate.run(asked)
    assert parts(tmp_path / "out") == before
    assert "boxes.parquet is gone; the run goes on" in caplog.text
    with pytest.raises(ConfigError, match="boxes: begun with"):
        annotate.run(asked.model_copy(update={"min_box_score": 0.5}))
    with pytest.raises(ConfigError, match="nothing is there"):
        annotate.run(asked.model_copy(update={"output": str(tmp_path / "other")}))


def test_boxes_of_planned_and_of_unknown_pictures_are_counted(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_boxes(tmp_path / "b.parquet", ["000001.jpg", "000003.jpg", "nobody.jpg"])
    told: dict[str, Any] = {}
    monkeypatch.setattr(annotate, "record_run", lambda *_, counts, **more: told.update(counts))
    result = annotate.run(config(world, tmp_path / "out", boxes=str(tmp_path / "b.parquet")))
    assert result["given"] == {"boxes_of_planned": 4, "boxes_of_unknown": 2}
    assert told["given"] == result["given"] == open_job(str(tmp_path / "out")).about["given"]  # type: ignore[union-attr]
    assert annotate.run(config(world, tmp_path / "out", boxes=str(tmp_path / "b.parquet")))["given"] == result["given"]


def test_boxes_that_were_frozen_by_a_driver_that_died_are_counted_all_the_same(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(world, tmp_path / "out")
    annotate.run(asked)
    (tmp_path / "out" / "_job.json").unlink()
    monkeypatch.setattr(box_module, "freeze_boxes", None)
    assert annotate.run(asked)["given"] == {"boxes_of_planned": 12, "boxes_of_unknown": 0}


def test_boxes_of_which_none_is_of_a_planned_picture_are_refused_with_an_example_of_each(
        world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_boxes(tmp_path / "b.parquet", ["images/000001.jpg"])
    asked = config(world, tmp_path / "out", boxes=str(tmp_path / "b.parquet"))
    with pytest.raises(DataError, match=r"b\.parquet: none of the 2 boxes .*'images/000001\.jpg'.*'00000\d\.jpg'"):
        annotate.run(asked)
    assert not (tmp_path / "out" / "_job.json").exists()
    result = annotate.run(asked.model_copy(update={"limit": 1}))  # boxes may well be of others
    assert result["counts"]["no_person"] == 1
    assert "none of the 2 boxes" in caplog.text


def test_no_box_at_all_says_that_nobody_is_there(world: Path, tmp_path: Path) -> None:
    write_boxes(tmp_path / "b.parquet", [])
    result = annotate.run(config(world, tmp_path / "out", boxes=str(tmp_path / "b.parquet")))
    assert (result["counts"]["no_person"], result["given"]) == (6, {"boxes_of_planned": 0, "boxes_of_unknown": 0})


def test_a_run_that_was_begun_before_boxes_were_kept_by_unit_goes_on(world: Path, tmp_path: Path) -> None:
    shard.run(ShardConfig(images=str(world / "in" / "images"), annotations=str(world / "in" / "annotations.json"),
                          output=str(tmp_path / "shards"), images_per_shard=4, tracking=NO_TRACKING))
    image_id = json.loads((world / "in" / "annotations.json").read_text())["images"][0]["id"]
    (tmp_path / "d.json").write_text(json.dumps(
        [{"image_id": image_id, "category_id": 1, "bbox": [5, 5, 40, 60], "score": 0.5}]))
    asked = config(world, tmp_path / "out", input=str(tmp_path / "shards"), boxes=str(tmp_path / "d.json"))
    annotate.run(asked)
    before = parts(tmp_path / "out")
    lose_a_part(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "_boxes")
    job = json.loads((tmp_path / "out" / "_job.json").read_text())
    assert job["intent"]["boxes"] == {"kind": "detections", "min_score": 0.0, "max_persons": None,
                                      "digest": hashlib.sha256((tmp_path / "d.json").read_bytes()).hexdigest()}
    del job["about"]["boxes"]
    (tmp_path / "out" / "_job.json").write_text(json.dumps(job))
    annotate.run(asked)
    assert parts(tmp_path / "out") == before
    assert rows(str(tmp_path / "out")).filter(pa.compute.field("status") == "ok").num_rows == 1


# --- a detector ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detected(world: Path, without_ray: None) -> tuple[Path, dict[str, Any]]:
    """A finished run with the detector, and its result."""
    return world / "detected", annotate.run(detecting(world, world / "detected"))


def test_each_detection_is_a_row_and_the_metadata_names_the_detector(
        world: Path, detected: tuple[Path, dict[str, Any]]) -> None:
    output, result = detected
    detector = Detector(detector_bytes(), source="made", backend="opencv", score=0.5, nms_iou=0.65, threads=1)
    images = sorted((world / "in" / "images").iterdir())
    alone = detector.detect(decode_picture(path.read_bytes()) for path in images)
    expected = [[path.name, *box] for path, boxes in zip(images, alone, strict=True) for box in boxes.xywh[:3].tolist()]
    table, metadata = keypoints.read_keypoints(str(output))
    found = table.filter(pa.compute.field("status") == "ok").select(["key", "box_x", "box_y", "box_w", "box_h"])
    assert [list(row.values()) for row in found.to_pylist()] == expected
    assert result["counts"]["persons"] == len(expected) > 12
    digest = hashlib.sha256(detector_bytes()).hexdigest()
    assert metadata.json["detector"] == {"name": "detector.onnx", "digest": digest}
    assert (output / "_detector" / f"{digest[:16]}.onnx").read_bytes() == detector_bytes()
    assert open_output(str(output)).findings == ()


def test_a_run_goes_on_with_the_detector_that_it_has_kept(
        world: Path, detected: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    again = annotate.run(detecting(world, detected[0], detector=str(tmp_path / "gone" / "detector.onnx")))
    assert (again["units_annotated"], again["digest"]) == (0, detected[1]["digest"])
    with pytest.raises(ConfigError, match="no such file"):
        annotate.run(detecting(world, detected[0], detector=str(tmp_path / "gone" / "another.onnx")))


@pytest.mark.parametrize("settings", [{"detector_score": 0.4}, {"detector_nms": 0.5}, {"boxes": "whole-image"}])
def test_another_detection_into_the_same_output_is_refused(
        world: Path, detected: tuple[Path, dict[str, Any]], settings: dict[str, object]) -> None:
    asked = detecting(world, detected[0], **settings)
    if asked.boxes != "detect":
        asked = asked.model_copy(update={"detector": None})
    with pytest.raises(ConfigError, match="boxes: begun with"):
        annotate.run(asked)


def test_a_picture_that_the_detector_cannot_decode_is_rejected_with_its_reason(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "in", tmp_path / "in")
    next((tmp_path / "in" / "images").iterdir()).write_bytes(b"no picture")
    result = annotate.run(detecting(world, tmp_path / "out", input=str(tmp_path / "in" / "images")))
    assert (result["counts"]["ok"], result["counts"]["reasons"]) == (5, {"not_a_picture": 1})


def test_only_what_an_earlier_run_has_not_seen_goes_through_detector_and_network(
        world: Path, detected: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = tmp_path / "in"
    shutil.copytree(world / "in" / "images", pictures)
    names = sorted(path.name for path in pictures.iterdir())
    shutil.copy(pictures / names[0], pictures / "new.jpg")
    looked: list[int] = []
    run, crop = Detector._run, unit_decoder.crop_persons
    monkeypatch.setattr(Detector, "_run", lambda self, pixels: looked.append(len(pixels)) or run(self, pixels))
    monkeypatch.setattr(unit_decoder, "crop_persons", lambda *given, **more: looked.append(-1) or crop(*given, **more))
    monkeypatch.setattr(Predictor, "crop_persons", None)  # nothing is opened twice
    result = annotate.run(detecting(world, tmp_path / "out", input=str(pictures), reuse=str(detected[0])))
    assert looked == [1, -1]  # one picture through the detector, its persons cropped once
    assert result["counts"]["pictures"] == 7
    old = rows(str(detected[0]), without=("etag", "job"))
    assert rows(str(tmp_path / "out"), without=("etag", "job")).slice(0, len(old)).equals(old)


def test_of_a_picture_that_the_detector_could_not_look_at_nobody_says_that_it_is_empty(
        detected: tuple[Path, dict[str, Any]]) -> None:
    job = open_job(str(detected[0]))
    assert job is not None
    with pytest.raises(StorageError, match=r"a\.jpg: the detector could not look"):
        unit_box_source(str(detected[0]), job, 0)({"key": "a.jpg"}, 9, 9)


def test_trouble_with_the_store_in_the_detector_leaves_the_unit_for_later(
        world: Path, bucket: str, faulty_s3: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(annotate, "PAUSES_S", (0.0,))
    faulty_s3.fail("GET", SLOW_DOWN, path="/out/_plan/")  # which the first unit's detector reads
    result = annotate.run(detecting(world, f"{bucket}/out"))
    assert len([path for path in faulty_s3.asked("GET") if "/out/_plan/" in path]) > 2  # of two units, one twice
    assert result["counts"]["ok"] == 6


# --- poses that are nearly the same -------------------------------------------------------------------------------


def test_of_persons_with_nearly_the_same_pose_the_best_one_stays_if_that_is_asked_for(
        world: Path, tmp_path: Path) -> None:
    names = [path.name for path in sorted((world / "in" / "images").iterdir())]
    path = tmp_path / "twice.parquet"
    pq.write_table(pa.table({
        "key": names * 3, "x": np.repeat([5.0, 5.0, 60.0], 6), "y": [5.0] * 18, "w": [40.0] * 18, "h": [60.0] * 18,
        "score": np.repeat([0.8, 0.9, 0.5], 6)}), path)
    plain = annotate.run(config(world, tmp_path / "plain", boxes=str(path)))
    result = annotate.run(config(world, tmp_path / "out", boxes=str(path), oks_nms=0.9))
    assert (plain["counts"]["persons"], plain["counts"]["suppressed"]) == (18, 0)
    assert (result["counts"]["persons"], result["counts"]["suppressed"]) == (12, 6)
    table = rows(str(tmp_path / "out"))
    assert table["box_score"].to_pylist() == [0.9, 0.5] * 6
    assert table["person_index"].to_pylist() == [0, 1] * 6
    with pytest.raises(ConfigError, match=r"oks_nms: begun with null, now 0\.9"):
        annotate.run(config(world, tmp_path / "plain", boxes=str(path), oks_nms=0.9))
