"""Units that one process decodes and another annotates, without Ray: the rows of one that does both."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import annotate, shard
from pipeline import storage, unit_decoder
from pipeline.config import AnnotateConfig, ShardConfig
from pipeline.prediction import Predictor
from pipeline.rows import AnnotatedPicture, Boxes
from pipeline.unit_decoder import DecodedUnit, UnitDecoder, carry
from pipeline.units import open_job
from tests.fault_proxy import SLOW_DOWN, FaultProxy
from tests.made_detector import detector_bytes
from tests.s3 import S3Server
from tests.worlds import NO_TRACKING, write_pictures, write_tiny_model

pytestmark = pytest.mark.usefixtures("without_ray")
CROP_BYTES = 64 * 64 * 3  # of the tiny model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `in/images`, `shards`, `model`, `detector.onnx` and `boxes.parquet`.

    Eight pictures: two persons each, but for one without boxes, one whose only box is empty, and a broken one.
    """
    folder = tmp_path_factory.mktemp("world")
    pictures = write_pictures(folder / "in", count=8) / "images"
    names = sorted(path.name for path in pictures.iterdir())
    (pictures / names[2]).write_bytes((pictures / names[2]).read_bytes()[:200])
    persons = [name for name in names if name not in (names[3], names[4])]
    count = 2 * len(persons)
    pq.write_table(pa.table({
        "key": [*persons, *persons, names[4]], "x": np.linspace(2, 40, count + 1), "y": [5.0] * (count + 1),
        "w": [40.0] * count + [0.0], "h": [60.0] * (count + 1)}), folder / "boxes.parquet")
    shard.run(ShardConfig(images=str(pictures), annotations=str(folder / "in" / "annotations.json"),
                          output=str(folder / "shards"), images_per_shard=4, tracking=NO_TRACKING))
    write_tiny_model(folder / "model")
    (folder / "detector.onnx").write_bytes(detector_bytes())
    return folder


def run(world: Path, output: Path | str, **settings: object) -> dict[str, Any]:
    return annotate.run(AnnotateConfig(**{
        "input": str(world / "in" / "images"), "model": str(world / "model"), "output": str(output), "backend": "cpu",
        "boxes": str(world / "boxes.parquet"), "tracking": NO_TRACKING, "pictures_per_unit": 5, "max_rejected_share": 1,
        **settings}))


DETECT = {"boxes": "detect", "detector_score": 0.5, "max_persons": 3, "detector_backend": "opencv"}


def detecting(world: Path, output: Path, **settings: object) -> dict[str, Any]:
    return run(world, output, **DETECT, detector=str(world / "detector.onnx"), **settings)


def parts(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "keypoints").iterdir()}


@pytest.fixture
def crops(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many persons are cropped by decoders, and how many by annotators."""
    done = {"decoder": 0, "annotator": 0}
    crop, own_crop = unit_decoder.crop_persons, Predictor.crop_persons

    def noting(image: Any, boxes: Any, *given: Any, **more: Any) -> Any:
        done["decoder"] += len(boxes)
        return crop(image, boxes, *given, **more)

    def noting_own(self: Predictor, image: Any, boxes: Any) -> Any:
        done["annotator"] += len(boxes)
        return own_crop(self, image, boxes)

    monkeypatch.setattr(unit_decoder, "crop_persons", noting)
    monkeypatch.setattr(Predictor, "crop_persons", noting_own)
    return done


@pytest.mark.parametrize("settings", [
    {"threads": 1}, {"threads": 3}, {"accept_truncated": True}, {"oks_nms": 0.9}, {"input": "shards", "boxes": None}],
    ids=str)
def test_whoever_decodes_the_parts_are_the_same_bytes(
        world: Path, tmp_path: Path, crops: dict[str, int], settings: dict[str, Any]) -> None:
    if "input" in settings:
        settings = settings | {"input": str(world / settings["input"])}
    alone = run(world, tmp_path / "alone", **settings)
    both = run(world, tmp_path / "both", decoders=1, **settings)
    assert parts(tmp_path / "alone") == parts(tmp_path / "both")
    assert crops["decoder"] == crops["annotator"] > 0
    assert alone["counts"] == both["counts"]


def test_the_pictures_are_of_every_kind(world: Path, tmp_path: Path) -> None:
    counts = run(world, tmp_path / "out", decoders=1)["counts"]
    assert (counts["ok"], counts["no_person"], counts["persons"]) == (5, 1, 10)
    assert counts["reasons"] == {"bad_boxes": 1, "truncated": 1}


@pytest.mark.parametrize("bytes_per_unit", [0, 3 * CROP_BYTES])
def test_what_a_unit_cannot_carry_is_opened_by_the_annotator(
        world: Path, tmp_path: Path, crops: dict[str, int], monkeypatch: pytest.MonkeyPatch,
        bytes_per_unit: int) -> None:
    run(world, tmp_path / "whole", decoders=1)
    assert crops == {"decoder": 10, "annotator": 0}
    monkeypatch.setattr(unit_decoder, "UNIT_BYTES", bytes_per_unit)
    run(world, tmp_path / "out", decoders=1)
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")
    assert crops["annotator"] == (10 if bytes_per_unit == 0 else 6)  # of each unit two persons have come along


def test_a_unit_carries_no_more_than_its_bound_and_opens_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_decoder, "UNIT_BYTES", 5 * 12)

    def opened() -> Any:
        for index in range(3):
            picture = AnnotatedPicture({"key": f"{index}"}, "ok", boxes=Boxes(
                np.arange(2), np.ones((2, 4)), np.ones(2)))
            yield picture, unit_decoder.crop_persons(
                np.full((4, 4, 3), index, np.uint8), np.ones((2, 4)), (2, 2), padding_wh=(1, 1))
        pytest.fail("a fourth picture was asked for")

    unit = carry(opened(), crop_shape=(2, 2, 3), to_the_end=False)
    again = DecodedUnit.from_buffers(*unit.to_buffers()).opened()
    assert list(again) == ["0", "1"]
    assert again["1"][1] is not None
    assert again["1"][1].crops.tolist() == np.full((2, 2, 2, 3), 1).tolist()


# --- a detector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["UNIT_BYTES", "WAITING_BYTES"])
def test_boxes_that_a_detector_finds_are_the_same_when_the_annotator_has_to_crop(
        world: Path, tmp_path: Path, crops: dict[str, int], monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    persons = detecting(world, tmp_path / "whole")["counts"]["persons"]
    assert crops == {"decoder": persons, "annotator": 0}
    monkeypatch.setattr(unit_decoder, bound, 0)
    detecting(world, tmp_path / "out")
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")
    assert crops["annotator"] == persons


# --- what is done already -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [run, detecting])
def test_what_an_earlier_run_has_seen_is_copied_and_read_by_nobody(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    shutil.copytree(world / "in" / "images", tmp_path / "in")
    asked = {"input": str(tmp_path / "in")} | ({} if make is detecting else {"decoders": 1})
    make(world, tmp_path / "old", **asked)
    shutil.copy(tmp_path / "in" / "000001.jpg", tmp_path / "in" / "zz.jpg")
    read, whole = [], storage.read_object
    monkeypatch.setattr(storage, "read_object", lambda uri, **more: read.append(Path(uri).name) or whole(uri, **more))
    result = make(world, tmp_path / "new", reuse=str(tmp_path / "old"), **asked)
    assert [name for name in read if name.endswith(".jpg")] == ["zz.jpg"]
    assert result["counts"]["pictures"] == 9
    make(world, tmp_path / "scratch", **asked)
    assert parts(tmp_path / "new") == parts(tmp_path / "scratch")


@pytest.mark.parametrize("folder", ["_plan", "_boxes"])
def test_a_committed_unit_is_not_read_and_a_store_that_fails_fails_the_unit(
        world: Path, s3: S3Server, bucket: str, faulty_s3: FaultProxy, monkeypatch: pytest.MonkeyPatch,
        folder: str) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    run(world, f"{bucket}/out")
    job = open_job(f"{bucket}/out")
    assert job is not None
    decoder = UnitDecoder(f"{bucket}/out", job)
    faulty_s3.fail("GET", SLOW_DOWN, path=f"/out/{folder}/", times=100)
    done = decoder.decode(0)
    assert (done.pictures, done.failure) == ({}, None)
    s3.client().delete_object(Bucket=bucket[5:], Key=f"out/keypoints/{job.part_name(0)}")
    failure = decoder.decode(0).failure
    assert failure is not None
    assert (failure.unit, failure.outcome, failure.passing) == (0, "failed", True)
