"""What fails while `annotate` runs, without Ray: the store, a shard, memory, one picture.

Of it nothing becomes a row that isn't about a picture, nothing keeps other units from being done, and nothing goes
without its reason.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import annotate, shard
from jobs.progress import Progress, RejectionBudget
from pipeline import storage
from pipeline.config import AnnotateConfig, ShardConfig
from pipeline.errors import ConfigError, DataError, ObjectMissing, StorageError
from pipeline.images import decode_picture
from pipeline.keypoints import read_keypoints
from pipeline.model.directory import ModelSpec, save_model
from pipeline.model.mspn import MSPN
from pipeline.model.settings import Decoding
from pipeline.pose.skeleton import COCO17
from pipeline.prediction import Predictor
from pipeline.shards import open_shards, read_part_columns
from pipeline.unit_annotator import Receipt, UnitAnnotator, failure_receipt
from pipeline.units import committed_units, open_job
from tests.fault_proxy import SLOW_DOWN, Fault, FaultProxy, denied
from tests.s3 import S3Server
from tests.worlds import NO_TRACKING, TINY, rows, write_pictures, write_tiny_model

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
    read = [path.rpartition("/")[2] for path in faulty_s3.asked("GET") if "/in/" in path and path.endswith(".jpg")]
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
        world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, said: str) -> None:
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
    assert "once more" not in caplog.text  # which would end in the same way
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


def test_a_unit_that_the_service_failed_and_that_then_ends_its_process_is_done_with_care(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, careful_calls = annotate.annotate_units, []

    def troubled(output: str, job: Any, tasks: Any, *, careful: bool = False, **options: Any) -> Any:
        careful_calls.append(careful)
        if len(careful_calls) == 1:
            return (Receipt(task.unit, "failed", failure="503", passing=True) for task in tasks)
        return whole(output, job, tasks if careful else (), careful=careful, **options)

    monkeypatch.setattr(annotate, "annotate_units", troubled)
    assert run(world, tmp_path / "out", limit=1)["counts"]["ok"] == 1
    assert careful_calls == [False, False, True]


@pytest.mark.parametrize(("successes", "goes_on"), [(1, True), (0, False)])
def test_only_failures_of_the_service_in_a_row_end_a_pass(successes: int, goes_on: bool) -> None:
    failed = [Receipt(unit, "failed", failure="503", passing=True) for unit in range(19)]
    receipts = failed + [Receipt(40, "there")] * successes + failed
    progress = Progress(41, budget=RejectionBudget(41, 1.0), output="out")
    assert annotate._take_receipts((receipt for receipt in receipts), progress) is goes_on


# --- an annotator and its job -------------------------------------------------------------------------------------


def annotator(world: Path, output: Path, **settings: object) -> UnitAnnotator:
    """An annotator of a run that has just been frozen."""
    freeze_only(world, output, **settings)
    job = open_job(str(output))
    assert job is not None
    return UnitAnnotator(str(output), job)


def test_an_annotator_computes_as_the_job_was_frozen(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    told: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", told.append)
    predictor = annotator(world, tmp_path / "out", flip=False, batch_size=3, threads=2, deterministic=True).predictor
    assert (predictor.flip, predictor.batch_size, torch.get_num_threads(), told) == (False, 3, 2, [True])
    monkeypatch.setattr("pipeline.model.inference.why_not_compile", lambda: "There is none here")
    with pytest.raises(ConfigError, match="compile=default needs a compiler"):
        annotator(world, tmp_path / "compiled", compile="default")


def test_rows_are_those_of_the_precision_that_the_job_was_frozen_with(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "out", precision="bfloat16", limit=1)
    row = rows(str(tmp_path / "out")).to_pylist()[0]
    image = decode_picture((world / "in" / "images" / row["key"]).read_bytes())
    whole = np.array([[0.0, 0.0, row["width"], row["height"]]])
    rough, exact = (Predictor(world / "model", backend="cpu", precision=precision).predict_persons(image, whole)
                    for precision in ("bfloat16", "float32"))
    found = [row[f"{joint}_score"] for joint in COCO17.columns()]
    np.testing.assert_allclose(found, rough.joint_scores[0], rtol=1e-7)
    assert np.abs(found - exact.joint_scores[0]).max() > 1e-6


def test_an_annotator_without_the_jobs_gpu_refuses_to_begin(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DataError, match="was begun on GPUs"):
        annotator(world, tmp_path / "out", backend="cuda", precision="float32")


def test_scores_are_told_with_the_scale_of_the_model_that_gave_them(world: Path, tmp_path: Path) -> None:
    decoding = Decoding(variant="hrnet")
    spec = ModelSpec(network=TINY, skeleton=COCO17.to_json(), decoding=decoding, source={"file": "given.pth"})
    save_model(tmp_path / "model", MSPN(TINY), spec)
    run(world, tmp_path / "out", model=str(tmp_path / "model"), limit=1)
    metadata = read_keypoints(str(tmp_path / "out"))[1]
    assert metadata.low_score == 0.2  # HRNet's maps have peaks of 1
    assert metadata.json["scores"]["joint"] == decoding.score_meaning
    assert metadata.model["source"] == {"file": "given.pth"}


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


def test_pictures_that_went_or_changed_after_the_plan_are_rejected_as_such(world: Path, place: str) -> None:
    for name in ("a", "b", "c"):
        storage.put_if_absent(f"{place}/in/{name}.jpg", (world / "in" / "images" / "000001.jpg").read_bytes())
    asked = {"input": f"{place}/in", "pictures_per_unit": 3}
    freeze_only(world, f"{place}/out", **asked)
    for name in ("a", "b"):
        storage.remove_own(f"{place}/in/{name}.jpg")
    storage.put_if_absent(f"{place}/in/b.jpg", b"another")
    run(world, f"{place}/out", **asked)
    assert rows(f"{place}/out")["reason"].to_pylist() == ["missing", "changed", None]


def test_a_picture_of_more_pixels_than_the_run_allows_is_rejected(world: Path, tmp_path: Path) -> None:
    assert run(world, tmp_path / "out", max_pixels=9, limit=1)["counts"]["reasons"] == {"too_large_pixels": 1}


def test_a_shard_that_cannot_be_read_now_is_the_services_matter(
        world: Path, s3: S3Server, bucket: str, faulty_s3: FaultProxy) -> None:
    s3.upload_folder(world / "shards", f"{bucket}/shards")
    faulty_s3.fail("GET", SLOW_DOWN, path="/shards/shards/", times=1000)
    dataset = open_shards(f"{bucket}/shards")
    with pytest.raises(StorageError) as raised:
        read_part_columns(dataset, dataset.parts[0], ["key"])
    assert not isinstance(raised.value, storage.ABOUT_THE_OBJECT)
