"""The annotate job as its users run it, on Ray: its rows, a driver that is killed, a picture that kills its actor."""

import logging
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from jobs import annotate, annotate_pool
from pipeline import storage
from pipeline.config import AnnotateConfig
from pipeline.units import committed_units, open_job, read_unit
from tests.made_detector import detector_bytes
from tests.s3 import S3Server
from tests.without_ray import WITHOUT_RAY
from tests.worlds import NO_TRACKING, rows, write_pictures, write_tiny_model

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `in` (made pictures) and `model`."""
    folder = tmp_path_factory.mktemp("world")
    write_pictures(folder / "in")
    write_tiny_model(folder / "model")
    return folder


def config(world: Path, output: str, **settings: object) -> AnnotateConfig:
    return AnnotateConfig(**{"input": str(world / "in" / "images"), "model": str(world / "model"), "output": output,
                             "boxes": "whole-image", "tracking": NO_TRACKING, "pictures_per_unit": 1, **settings})


def test_a_pool_of_actors_gives_the_rows_that_one_process_gives(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = annotate.run(config(world, str(tmp_path / "pool"), actors=2, threads=1))
    for module, name, instead in WITHOUT_RAY:
        monkeypatch.setattr(module, name, instead)
    annotate.run(config(world, str(tmp_path / "one"), threads=1))
    assert result["units_annotated"] == 12
    assert metric("ray_pose_annotate_pictures", str(tmp_path / "pool"), last=12) == 12
    assert rows(str(tmp_path / "pool")).equals(rows(str(tmp_path / "one")))
    assert not list((tmp_path / "pool" / "_drivers").iterdir())


def test_workers_have_no_lower_priority_than_who_started_ray() -> None:
    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) <= max(os.nice(0), 0)  # Ray's own would be 15


def test_actors_that_decode_for_others_give_the_rows_that_one_process_gives(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = annotate.run(config(world, str(tmp_path / "pools"), actors=1, decoders=2, threads=1))
    for module, name, instead in WITHOUT_RAY:
        monkeypatch.setattr(module, name, instead)
    annotate.run(config(world, str(tmp_path / "one"), threads=1))
    assert result["units_annotated"] == 12
    assert rows(str(tmp_path / "pools")).equals(rows(str(tmp_path / "one")))


def metric(name: str, output: str, *, last: float) -> float | None:
    """What Ray's Prometheus endpoint says of a run, once it says the last value, or after a minute."""
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    until, value = time.monotonic() + 60, None
    while value != last and time.monotonic() < until:
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        found = [line for line in text.splitlines() if line.startswith(f"{name}{{") and f'"{output}"' in line]
        value = float(found[-1].rpartition(" ")[2]) if found else None
        time.sleep(0.5)
    return value


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_without_reading_finished_units_again(
        world: Path, tmp_path: Path, s3: S3Server, bucket: str) -> None:
    s3.upload_folder(world / "in", f"{bucket}/in")
    asked = config(world, f"{bucket}/out", input=f"{bucket}/in/images", actors=1)
    committed = kill_when_half_done(asked, s3)
    job = open_job(f"{bucket}/out")
    assert job is not None
    finished = {read_unit(f"{bucket}/out", job, unit)[0]["key"] for unit in committed}
    asked_before = len(s3.requests("GET"))
    annotate.run(asked)
    read_again = {path.split("?")[0].rpartition("/")[2] for path in s3.requests("GET")[asked_before:]}
    assert 0 < len(committed) < 12
    assert not finished & read_again
    unbroken = asked.model_copy(update={"output": str(tmp_path / "unbroken")})
    annotate.run(unbroken)
    assert rows(f"{bucket}/out").equals(rows(str(tmp_path / "unbroken")))


def kill_when_half_done(asked: AnnotateConfig, s3: S3Server) -> set[int]:
    """Run the command in a process of its own, SIGKILL it between two commits; the units that it had committed."""
    settings = [f"{name}={value}" for name, value in
                (("pictures_per_unit", 1), ("actors", 1), ("tracking.enabled", "false"))]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", "annotate", "--input", asked.input, "--model", asked.model,
         "--output", asked.output, "--boxes", "whole-image", *(f"--set={setting}" for setting in settings)],
        cwd=Path(__file__).parents[1], env={**os.environ, **s3.environment}, stdout=subprocess.DEVNULL)
    parts = storage.join(asked.output, "keypoints")
    until = time.monotonic() + 120
    while not list(storage.list_objects(parts)):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    job = open_job(asked.output)
    assert job is not None
    return committed_units(asked.output, "keypoints", job)


@pytest.mark.slow
@pytest.mark.parametrize("decoders", [0, 1])
def test_a_picture_that_kills_its_decoder_is_rejected_and_all_others_are_annotated(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoders: int) -> None:
    pictures = write_pictures(tmp_path / "in", count=5) / "images"
    (pictures / "000003-culprit.jpg").write_bytes(b"abort ")
    monkeypatch.setattr(annotate_pool, "DECODER", "tests.crashing_decoder")
    result = annotate.run(AnnotateConfig(
        input=str(pictures), model=str(world / "model"), output=str(tmp_path / "out"), boxes="whole-image",
        pictures_per_unit=2, max_rejected_share=1, actors=1, decoders=decoders, tracking=NO_TRACKING))
    assert result["counts"]["ok"] == 5
    assert result["counts"]["reasons"] == {"decoder_crash": 1}


@pytest.mark.slow
def test_where_many_pictures_kill_their_decoder_not_each_costs_its_actor(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pictures = write_pictures(tmp_path / "in", count=5) / "images"
    for number in range(30):
        (pictures / f"000001-culprit-{number:02d}.jpg").write_bytes(f"tell {tmp_path}/deaths".encode())
    monkeypatch.setattr(annotate_pool, "DECODER", "tests.crashing_decoder")
    with caplog.at_level(logging.WARNING, logger="jobs.annotate"):
        result = annotate.run(config(world, str(tmp_path / "out"), input=str(pictures), max_rejected_share=1, actors=1))
    assert result["counts"]["ok"] == 5
    assert result["counts"]["reasons"] == {"decoder_crash": 30}
    assert "ended their process" not in caplog.text  # all in one pass
    # each culprit once in a process of its own; with every 21st of them an actor has died
    assert len((tmp_path / "deaths").read_text()) == 30 + 2


@pytest.mark.slow
def test_a_detectors_pool_before_the_annotators_gives_the_rows_of_one_process_and_survives_a_crash(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = write_pictures(tmp_path / "in", count=7) / "images"
    (tmp_path / "detector.onnx").write_bytes(detector_bytes())
    asked = config(world, str(tmp_path / "pool"), input=str(pictures), boxes="detect", pictures_per_unit=2, threads=1,
                   detector=str(tmp_path / "detector.onnx"), detector_score=0.5, max_persons=2, max_rejected_share=1)
    (pictures / "000003-culprit.jpg").write_bytes(b"abort ")
    with monkeypatch.context() as patches:
        patches.setattr(annotate_pool, "DECODER", "tests.crashing_decoder")
        result = annotate.run(asked)
    assert result["counts"]["reasons"] == {"decoder_crash": 1}
    for module, name, instead in WITHOUT_RAY:
        monkeypatch.setattr(module, name, instead)
    annotate.run(asked.model_copy(update={"output": str(tmp_path / "one")}))
    pool, one = (rows(str(tmp_path / name), without=("reason", "error", "job")) for name in ("pool", "one"))
    assert pool.num_rows == 15
    assert pool.drop_columns(["sha256"]).equals(one.drop_columns(["sha256"]))
