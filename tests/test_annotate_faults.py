"""What fails while `annotate` runs, without Ray: the store, a shard, memory, one picture.

Of it nothing becomes a row that isn't about a picture, nothing keeps other units from being done, and nothing goes
without its reason.
"""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import annotate, shard
from pipeline import storage
from pipeline.config import AnnotateConfig, ShardConfig
from pipeline.errors import DataError, ObjectMissing, StorageError
from pipeline.shards import open_shards, read_part_columns
from pipeline.unit_annotator import UnitAnnotator, failure_receipt
from pipeline.units import committed_units, open_job
from tests.fault_proxy import SLOW_DOWN, Fault, FaultProxy, denied
from tests.s3 import S3Server
from tests.worlds import NO_TRACKING, rows, write_pictures, write_tiny_model

pytestmark = pytest.mark.usefixtures("without_ray")
COUNT = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> Path:
    """A folder with `in/images` (24 made pictures), `shards` (one for each), `boxes.parquet` and `model`."""
    folder = tmp_path_factory.mktemp("world")
    images = write_pictures(folder / "in", count=COUNT) / "images"
    names = sorted(path.name for path in images.iterdir())
    pq.write_table(pa.table({"key": names, **{side: [20.0] * COUNT for side in "xywh"}}), folder / "boxes.parquet")
    shard.run(ShardConfig(images=str(images), output=str(folder / "shards"), images_per_shard=1, tracking=NO_TRACKING))
    write_tiny_model(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request has one attempt; there is one pause, which takes no time."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(annotate, "PAUSES_S", (0.0,))


def run(world: Path, output: Path | str, **settings: object) -> dict[str, Any]:
    return annotate.run(AnnotateConfig(**{
        "input": str(world / "in" / "images"), "model": str(world / "model"), "output": str(output), "backend": "cpu",
        "boxes": "whole-image", "tracking": NO_TRACKING, "pictures_per_unit": 1, "max_rejected_share": 1, **settings}))


def freeze_only(world: Path, output: Path | str, **settings: object) -> None:
    """As `run`, but ended before the first unit."""
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(annotate, "_annotate_missing_units", end)
        with pytest.raises(KeyboardInterrupt):
            run(world, output, **settings)


def committed(output: Path | str) -> int:
    job = open_job(str(output))
    assert job is not None
    return len(committed_units(str(output), "keypoints", job))


# --- the service --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(world: Path, s3: S3Server) -> dict[str, Any]:
    """The settings of a run over the pictures in a bucket, with boxes from a file."""
    bucket = s3.create_bucket("annotate-faults")
    s3.upload_folder(world / "in" / "images", f"{bucket}/in")
    return {"input": f"{bucket}/in", "boxes": str(world / "boxes.parquet"), "pictures_per_unit": 8}


@pytest.fixture(scope="module")
def undisturbed(world: Path, asked: dict[str, Any]) -> str:
    """What that run gives where nothing fails."""
    run(world, world / "undisturbed", **asked)
    return str(world / "undisturbed")


@pytest.mark.parametrize(("fault", "folder"), [
    (SLOW_DOWN, "/in/"), (denied("ExpiredToken"), "/in/"), (SLOW_DOWN, "/out/_plan/"), (SLOW_DOWN, "/out/_boxes/")],
    ids=lambda value: getattr(value, "code", value))
def test_while_the_store_fails_nothing_is_rejected_and_then_the_rows_are_those_of_an_undisturbed_run(
        world: Path, asked: dict[str, Any], undisturbed: str, bucket: str, faulty_s3: FaultProxy, fault: Fault,
        folder: str) -> None:
    freeze_only(world, f"{bucket}/out", **asked)
    faulty_s3.fail("GET", fault, path=folder, times=10_000)
    with pytest.raises(OSError, match=f"3 of 3 units are not annotated(.|\n)*{folder}"):
        run(world, f"{bucket}/out", **asked)
    assert committed(f"{bucket}/out") == 0
    faulty_s3.forget()
    run(world, f"{bucket}/out", **asked)
    assert set(rows(undisturbed)["status"].to_pylist()) == {"ok"}
    assert rows(f"{bucket}/out").equals(rows(undisturbed))


def test_a_pass_that_the_service_ended_is_followed_by_one_that_begins_with_what_was_left(
        world: Path, tmp_path: Path, asked: dict[str, Any], faulty_s3: FaultProxy) -> None:
    freeze_only(world, tmp_path / "out", input=asked["input"])
    faulty_s3.fail("GET", SLOW_DOWN, path="/in/", times=annotate.FAILURES_IN_A_ROW + 2)
    run(world, tmp_path / "out", input=asked["input"])
    read = [path.rpartition("/")[2] for path in faulty_s3.asked("GET") if "/in/" in path]
    names = sorted(path.name for path in (world / "in" / "images").iterdir())
    # the twenty failures; those left, of which two fail; the twenty; the two, for which there is a pause again
    assert read == names[:20] + names[20:] + names[:20] + names[20:22]


@pytest.mark.parametrize(("error", "passing"), [
    (StorageError("503"), True), (MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory."), True),
    (OSError(28, "No space left on device"), True), (ObjectMissing("a shard"), False), (DataError("damaged"), False),
    (AssertionError("our own mistake"), False)], ids=lambda value: type(value).__name__)
def test_what_is_about_the_service_or_memory_is_tried_again_later(error: Exception, passing: bool) -> None:
    receipt = failure_receipt(7, error)
    assert (receipt.outcome, receipt.passing) == ("failed", passing)
    assert receipt.failure.startswith("unit 7: ")
    assert str(error) in receipt.failure


def test_memory_that_torch_cannot_have_is_tried_again_later() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert failure_receipt(7, raised.value).passing


# --- units that can't be done -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("damage", "said"), [("flipped", "is damaged"), ("gone", "there is no such file")])
def test_shards_that_are_damaged_or_gone_keep_no_other_from_being_annotated(
        world: Path, tmp_path: Path, damage: str, said: str) -> None:
    shutil.copytree(world / "shards", tmp_path / "shards")
    freeze_only(world, tmp_path / "out", input=str(tmp_path / "shards"))
    for part in sorted((tmp_path / "shards" / "shards").iterdir())[:annotate.FAILURES_IN_A_ROW]:
        data = part.read_bytes()
        part.unlink()
        if damage == "flipped":
            part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(OSError, match=rf"20 of 24 units are not annotated(.|\n)*{said}(.|\n)*and 17 more"):
        run(world, tmp_path / "out", input=str(tmp_path / "shards"))
    assert committed(tmp_path / "out") == COUNT - 20
    shutil.copytree(world / "shards", tmp_path / "shards", dirs_exist_ok=True)
    assert run(world, tmp_path / "out", input=str(tmp_path / "shards"))["units_annotated"] == 20


@pytest.mark.parametrize("careful", [False, True])
def test_an_error_that_nobody_expects_fails_its_unit_with_its_reason(
        world: Path, tmp_path: Path, careful: bool) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"fail ")
    freeze_only(world, tmp_path / "out", input=str(tmp_path / "in"))
    job = open_job(str(tmp_path / "out"))
    assert job is not None
    receipt = UnitAnnotator(str(tmp_path / "out"), job, decoder="tests.crashing_decoder").annotate(0, careful=careful)
    assert (receipt.outcome, receipt.passing) == ("failed", False)
    assert "a bug in the decoder" in receipt.failure


def test_a_unit_that_ends_its_process_each_time_is_named(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = annotate.annotate_units
    monkeypatch.setattr(annotate, "annotate_units", lambda *given, **more: (
        receipt for receipt in whole(*given, **more) if receipt.unit != 5))
    monkeypatch.setattr(annotate, "missing_units", lambda *_: [5])
    with pytest.raises(OSError, match=r"1 of 24 units are not annotated(.|\n)*unit 5 ended its process each time"):
        run(world, tmp_path / "out")


# --- pictures that can't be read ----------------------------------------------------------------------------------


def test_a_listed_picture_in_a_bucket_that_is_not_there_is_a_missing_one(
        world: Path, tmp_path: Path, s3: S3Server) -> None:
    good = str(world / "in" / "images" / "000001.jpg")
    (tmp_path / "list.csv").write_text(f"uri\n{good}\ns3://there-is-no-such-bucket/x.jpg\ns3://A/y.jpg\n")
    counts = run(world, tmp_path / "out", input=str(tmp_path / "list.csv"), pictures_per_unit=3)["counts"]
    assert (counts["ok"], counts["reasons"]) == (1, {"missing": 2})


def test_a_line_that_can_be_no_picture_is_refused_before_anything_is_planned(world: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri\n/a.jpg\ngs://b/c.jpg\n")
    with pytest.raises(DataError, match=r"list\.csv: entry 2 .*gs://b/c\.jpg"):
        run(world, tmp_path / "out", input=str(tmp_path / "list.csv"))
    assert not (tmp_path / "out" / "_job.json").exists()


@pytest.mark.parametrize("listed", [False, True])
def test_an_object_larger_than_any_picture_is_refused_unread(world: Path, tmp_path: Path, listed: bool) -> None:
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "film.mp4").open("wb") as film:
        film.truncate(1 << 40)  # all holes; nobody has the memory to read it
    (tmp_path / "list.csv").write_text(f"uri\n{tmp_path}/in/film.mp4\n")
    run(world, tmp_path / "out", input=str(tmp_path / ("list.csv" if listed else "in")))
    row = rows(str(tmp_path / "out")).to_pylist()[0]
    assert (row["status"], row["reason"]) == ("rejected", "too_large_bytes")
    assert row["error"] == "1099511627776 bytes, and the limit is 100000000"


def test_a_shard_that_cannot_be_read_now_is_the_services_matter(
        world: Path, s3: S3Server, bucket: str, faulty_s3: FaultProxy) -> None:
    s3.upload_folder(world / "shards", f"{bucket}/shards")
    faulty_s3.fail("GET", SLOW_DOWN, path="/shards/shards/", times=1000)
    dataset = open_shards(f"{bucket}/shards")
    with pytest.raises(StorageError) as raised:
        read_part_columns(dataset, dataset.parts[0], ["key"])
    assert not isinstance(raised.value, storage.ABOUT_THE_OBJECT)
