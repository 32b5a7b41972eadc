"""What fails around a training, and inside it: which checkpoints stay, what is said, and how the run goes on."""

import http.server
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from jobs import shard, train
from pipeline import checkpoints, patience, training
from pipeline.config import ShardConfig, TrackingConfig, TrainConfig, load_config
from pipeline.errors import DataError
from pipeline.metrics_buffer import stored_metrics
from pipeline.tracking import TrackingError
from tests.fault_proxy import RESET, Fault, FaultProxy, Logged
from tests.s3 import S3Server
from tests.worlds import NO_TRACKING, write_pictures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TINY = {"num_stages": 1, "input_size_wh": (64, 64), "blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 4),
        "stem_channels": 4, "upsample_channels": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, local_ray: None, without_ray: None) -> Path:
    """A shard dataset of 12 made pictures in three shards."""
    folder = write_pictures(tmp_path_factory.mktemp("world"))
    shard.run(ShardConfig(images=str(folder / "images"), annotations=str(folder / "annotations.json"),
                          output=str(folder / "shards"), images_per_shard=4, tracking=NO_TRACKING))
    return folder


def config(world: Path, output: Path | str, *, iterations: int = 8, **settings: Any) -> TrainConfig:
    optimiser = {"iterations": iterations, "warmup_iterations": 1, "batch_size_per_worker": 4}
    return load_config(TrainConfig, flags={
        "data": str(world / "shards"), "output": str(output), "workers": 1, "validate_every": 2, "threads": 1,
        "network": TINY, "optimiser": optimiser, "tracking": NO_TRACKING.model_dump(), **settings})


def kept(output: Path | str) -> list[int]:
    return [each.iteration for each in checkpoints.list_checkpoints(str(output))]


class PatchedWorker:
    """`train_worker` in its own process, with some of what it calls replaced."""

    def __init__(self, **replaced: Any) -> None:
        self.replaced = replaced

    def __call__(self, settings: dict[str, Any]) -> str | None:
        from jobs import train_worker

        with ExitStack() as patches:
            for name, instead in self.replaced.items():
                patches.enter_context(mock.patch.object(train_worker, name, instead))
            return train_worker.train_worker(settings)


# --- which weights ------------------------------------------------------------------------------------------------


def aps_by_hand(worker: Any, run: Any) -> dict[str, float]:
    return {"ap": {2: 0.5, 4: 0.9, 6: 0.1, 8: 0.2}[worker.iteration]}


@pytest.mark.endurance
def test_the_best_checkpoint_outlives_newer_ones_and_becomes_the_model_if_asked_for(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train_worker", PatchedWorker(validate=aps_by_hand))
    val = str(world / "shards")
    last = train.run(config(world, tmp_path / "last", val=val, keep_checkpoints=1))
    best = train.run(config(world, tmp_path / "best", val=val, keep_checkpoints=1, keep="best"))

    assert kept(tmp_path / "best") == kept(tmp_path / "last") == [4, 8]
    assert last["best"] == best["best"] == {"iteration": 4, "ap": 0.9}
    assert (last["iterations"], last["AP"], last["samples"]) == (8, 0.2, 32)
    assert (best["iterations"], best["AP"], best["samples"]) == (4, 0.9, 16)
    for result, iteration in ((last, 8), (best, 4)):
        checkpoint = checkpoints.checkpoint_uri(result["output"], iteration)
        weights = [Path(folder, "model.safetensors").read_bytes() for folder in (result["output"], checkpoint)]
        assert weights[0] == weights[1]
    assert train.run(config(world, tmp_path / "best", val=val, keep="best")) == best


# --- workers ------------------------------------------------------------------------------------------------------


def broken_off_after_each_checkpoint(settings: dict[str, Any]) -> str | None:
    from jobs import train_worker

    keep = train_worker._keep

    def keep_and_break_off(worker: Any, *others: Any) -> Any:
        failure = keep(worker, *others)
        if worker.iteration < 6:
            raise OSError("broken off")
        return failure

    with mock.patch.object(train_worker, "_keep", keep_and_break_off):
        return train_worker.train_worker(settings)


def broken_off_at_once(settings: dict[str, Any]) -> None:
    raise OSError("broken off")


@pytest.mark.endurance
def test_failures_count_only_until_the_next_checkpoint_also_in_a_bucket(
        world: Path, s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    s3.upload_folder(world / "shards", f"{bucket}/shards")
    wanted = config(world, f"{bucket}/model", data=f"{bucket}/shards", iterations=6)
    monkeypatch.setattr(train, "MAX_FAILURES", 0)
    monkeypatch.setattr(train, "train_worker", broken_off_at_once)
    with pytest.raises(OSError, match="broken off"):
        train.run(wanted)

    monkeypatch.setattr(train, "train_worker", broken_off_after_each_checkpoint)
    result = train.run(wanted)

    assert "got on to iteration 2: training goes on from there" in caplog.text
    assert "got on to iteration 4: training goes on from there" in caplog.text
    assert (result["iterations"], result["samples"], result["AP"]) == (6, 24, None)
    assert kept(f"{bucket}/model") == [4, 6]


# --- numbers ------------------------------------------------------------------------------------------------------


def diverging_after(iteration: int) -> Callable[..., float]:
    def rate(at: int, schedule: training.Schedule) -> float:
        return 1e30 if at > iteration else 1e-3
    return rate


class DivergingWorker:
    """A rate that is far too large from an iteration on."""

    def __call__(self, settings: dict[str, Any]) -> str | None:
        from jobs import train_worker

        with mock.patch.object(training, "learning_rate", diverging_after(4)):
            return train_worker.train_worker(settings)


def test_what_diverges_is_never_kept_and_the_message_says_how_to_go_on(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train_worker", DivergingWorker())
    with pytest.raises(DataError) as error:
        train.run(config(world, tmp_path / "diverged", iterations=40, validate_every=2))

    good = checkpoints.checkpoint_uri(str(tmp_path / "diverged"), 4)
    assert "training has diverged" in str(error.value)
    assert f"--set init={good}" in str(error.value)
    assert kept(tmp_path / "diverged") == [2, 4]
    assert not (tmp_path / "diverged" / "model.json").exists()

    monkeypatch.undo()
    result = train.run(config(world, tmp_path / "again", iterations=2, init=good))
    assert result["iterations"] == 2
    begun = [Path(folder, "model.safetensors").read_bytes() for folder in (tmp_path / "again" / "_init", good)]
    assert begun[0] == begun[1]


@pytest.mark.endurance
def test_a_run_that_diverges_before_its_first_checkpoint_says_that_there_is_none(world: Path, tmp_path: Path) -> None:
    optimiser = {"iterations": 4, "warmup_iterations": 0, "batch_size_per_worker": 4, "learning_rate_per_worker": 1e30}
    with pytest.raises(DataError, match=r"training has diverged.*There is no checkpoint yet"):
        train.run(config(world, tmp_path / "model", optimiser=optimiser))
    assert kept(tmp_path / "model") == []


# --- the store ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own, with room for some checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class ImpatientWorker:
    """A worker that doesn't wait for room."""

    def __call__(self, settings: dict[str, Any]) -> str | None:
        from jobs import train_worker

        with mock.patch.object(patience, "PATIENCE_S", 0.0):
            return train_worker.train_worker(settings)


def test_a_full_disk_costs_checkpoints_then_the_run_and_with_room_the_same_command_goes_on(
        world: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train_worker", ImpatientWorker())
    wanted = config(world, small_disk / "model", iterations=40, keep_checkpoints=200)
    with pytest.raises(DataError, match=r"3 checkpoints in a row could not be kept.*Make room there") as error:
        train.run(wanted)
    there = kept(small_disk / "model")
    assert f"The last good checkpoint is {checkpoints.checkpoint_uri(str(small_disk / 'model'), there[-1])}" in str(
        error.value)
    assert 4 <= there[-1] < 34
    assert sorted(path.name for path in (small_disk / "model" / "_checkpoints").iterdir()) == [
        f"iteration-{iteration:07d}" for iteration in there]

    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    result = train.run(wanted)
    assert result["iterations"] == 40
    assert result["samples"] == 160
    assert kept(small_disk / "model")[:len(there)] == there


class Outage:
    """A store that is away for some seconds, from when so many shards have been read on."""

    def __init__(self, *, after_reads: int, seconds: float) -> None:
        self.after_reads, self.seconds, self.began = after_reads, seconds, 0.0

    def __call__(self, request: Logged) -> Fault | None:
        if request.kind == "GET" and "/shards/part-" in request.path:
            self.after_reads -= 1
        if self.after_reads < 0 and not self.began:
            self.began = time.monotonic()
        return RESET if self.began and time.monotonic() - self.began < self.seconds else None


def test_a_bucket_that_is_away_while_data_are_read_costs_time_and_no_worker(
        world: Path, s3: S3Server, bucket: str, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    s3.upload_folder(world / "shards", f"{bucket}/shards")
    outage = Outage(after_reads=20, seconds=8)
    monkeypatch.setattr(s3_proxy, "judge", outage)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.endpoint)
    for name, value in (("AWS_ENDPOINT_URL", s3_proxy.endpoint), ("AWS_MAX_ATTEMPTS", "2")):
        monkeypatch.setitem(train.WORKER_ENVIRONMENT, name, value)
    monkeypatch.setattr(train, "MAX_FAILURES", 0)

    result = train.run(config(world, f"{bucket}/model", data=f"{bucket}/shards", iterations=600, validate_every=300))

    assert outage.began
    assert (result["iterations"], result["samples"]) == (600, 2400)
    assert "training goes on from there" not in caplog.text
    printed = "".join(capfd.readouterr())
    assert "the store is away, and asked again in 10 s" in printed
    assert "the store is back after" in printed


# --- MLflow -------------------------------------------------------------------------------------------------------


class TrackingServer:
    """As much of MLflow's REST interface as a run needs; it can go away, and come back at the same address."""

    def __init__(self) -> None:
        self.losses: list[int] = []
        self.statuses: list[str] = []
        self.params: set[str] = set()
        self.created = self.asked = 0
        self._server = self._listen(0)
        self.port = self._server.server_port

    def go_away(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def come_back(self) -> None:
        self._server = self._listen(self.port)

    def _listen(self, port: int) -> http.server.ThreadingHTTPServer:
        kept = self

        class Answers(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
                kept.losses += [int(each["step"]) for each in asked.get("metrics", ()) if each["key"] == "loss"]
                kept.statuses += [asked["status"]] if "status" in asked else []
                kept.params |= {each["key"] for each in asked.get("params", ())}
                kept.created += self.path.endswith("/runs/create")
                kept.asked += 1
                info = {"run_id": f"r{max(kept.created, 1)}", "experiment_id": "7", "status": "RUNNING"}
                experiment = {"experiment_id": "7", "name": "pose", "lifecycle_stage": "active"}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"experiment": experiment, "run": {"info": info, "data": {}},
                                             "run_info": info}).encode())

            do_GET = do_POST = answer  # noqa: N815 - the names that http.server calls

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Answers)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


def test_an_mlflow_that_goes_away_costs_no_number(world: Path, tmp_path: Path) -> None:
    server, output = TrackingServer(), tmp_path / "model"
    tracked = TrackingConfig(uri=f"http://127.0.0.1:{server.port}").model_dump()
    wanted = config(world, output, iterations=300, validate_every=10, tracking=tracked)

    def leave_at_the_first_checkpoint() -> None:
        while not kept(output):
            time.sleep(0.02)
        server.go_away()

    leaving = threading.Thread(target=leave_at_the_first_checkpoint)
    leaving.start()
    result = train.run(wanted)
    leaving.join()
    assert result["iterations"] == 300
    assert (output / "model.json").exists()
    sent = set(server.losses)
    unsent = {each.step for each in stored_metrics(str(output)) if each.name == "loss"}
    assert len(unsent) > 5
    assert sent | unsent == set(range(10, 301, 10))

    with pytest.raises(TrackingError, match=r"The model is whole, at .*model, but not registered"):
        train.run(wanted.model_copy(update={"register_as": "pose-test"}))
    server.come_back()
    assert train.run(wanted) == result
    server.go_away()
    assert set(server.losses) == set(range(10, 301, 10))
    assert server.statuses[-1] == "FINISHED"
    assert stored_metrics(str(output)) == []


def test_an_mlflow_that_is_not_there_stops_the_job_before_anything_is_trained(world: Path, tmp_path: Path) -> None:
    server = TrackingServer()
    server.go_away()
    tracked = TrackingConfig(uri=f"http://127.0.0.1:{server.port}").model_dump()
    with pytest.raises(TrackingError, match=r"Start the server or .*tracking.enabled=false"):
        train.run(config(world, tmp_path / "model", tracking=tracked))
    assert not (tmp_path / "model" / "_job.json").exists()
