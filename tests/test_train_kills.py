"""A training whose workers and driver are killed ends with the bits of one that nobody disturbed."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jobs import shard
from pipeline import checkpoints
from pipeline.config import ShardConfig
from tests.worlds import NO_TRACKING, write_pictures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NETWORK = {"num_stages": 1, "input_size_wh": [64, 64], "blocks": [1, 1, 1, 1], "widths": [8, 8, 16, 16],
           "stem_channels": 8, "upsample_channels": 16}
ITERATIONS, EVERY = 200, 10
WORKERS = 3  # from three on it matters in which order the gradients of all are summed up
WAIT_S = 600


@dataclass
class Ended:
    """A run that has ended: its last line on stdout, what people read, and where it was tracked."""

    code: int
    result: dict[str, Any]
    log: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> Path:
    """A shard dataset of 12 made pictures in six shards."""
    folder = write_pictures(tmp_path_factory.mktemp("world"))
    shard.run(ShardConfig(images=str(folder / "images"), annotations=str(folder / "annotations.json"),
                          output=str(folder / "shards"), images_per_shard=2, tracking=NO_TRACKING))
    return folder


@pytest.fixture(scope="module")
def unbroken(world: Path) -> Ended:
    """The same training without any kill."""
    return finish(start(world, "unbroken"))


@pytest.fixture(autouse=True)
def family() -> Iterator[None]:
    """Whatever a killed driver has left is ended."""
    before = {process.pid for process in psutil.process_iter()}
    yield
    for process in psutil.process_iter(["cmdline", "environ"]):
        if process.pid not in before and (process.info["environ"] or {}).get("POSE_TEST") == str(os.getpid()):
            with contextlib.suppress(psutil.Error):
                process.kill()


def test_a_killed_worker_changes_no_bit(world: Path, unbroken: Ended) -> None:
    run = start(world, "worker")
    kill_when(run, world / "worker", iteration=3 * EVERY, victims=train_workers)
    ended = finish(run)

    assert ended.code == 0
    assert "going on after iteration" in ended.log
    assert_same_training(world, ended, unbroken)


def test_a_killed_driver_changes_no_bit_and_the_same_command_continues_its_tracked_run(
        world: Path, unbroken: Ended) -> None:
    run = start(world, "driver")
    kill_when(run, world / "driver", iteration=5 * EVERY, victims=lambda driver: [driver])
    assert finish(run).code == -9
    assert not (world / "driver" / "model.json").exists()
    begun = json.loads((world / "driver" / "_job.json").read_text())["about"]["run_id"]

    ended = finish(start(world, "driver"))

    assert ended.code == 0
    assert "going on after iteration" in ended.log
    assert ended.result["run_id"] == begun
    assert tracked(world).get_run(begun).info.status == "FINISHED"
    assert_same_training(world, ended, unbroken)


def assert_same_training(world: Path, ended: Ended, unbroken: Ended) -> None:
    """Every loss that was logged, as often as it was, and the weights."""
    expected = logged_losses(world, unbroken)
    assert sorted(expected) == list(range(EVERY, ITERATIONS + 1, EVERY))
    assert all(len(values) == len({name for name, _ in values}) == 5 for values in expected.values())
    assert logged_losses(world, ended) == expected
    weights = [Path(each.result["output"], "model.safetensors").read_bytes() for each in (ended, unbroken)]
    assert weights[0] == weights[1]


def logged_losses(world: Path, ended: Ended) -> dict[int, set[tuple[str, float]]]:
    """By iteration; what was logged twice, before a kill and after it, is one if it is equal."""
    client = tracked(world)
    names = [name for name in client.get_run(ended.result["run_id"]).data.metrics if name.startswith("loss")]
    assert len(names) == 5
    found: dict[int, set[tuple[str, float]]] = {}
    for name in names:
        for metric in client.get_metric_history(ended.result["run_id"], name):
            found.setdefault(metric.step, set()).add((name, metric.value))
    return found


def tracked(world: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{world}/mlflow.db")


# --- runs ---------------------------------------------------------------------------------------------------------


def start(world: Path, name: str) -> "subprocess.Popen[str]":
    """The command, as people give it."""
    settings = {"data": str(world / "shards"), "output": str(world / name), "workers": WORKERS, "threads": 1,
                "validate_every": EVERY, "network": NETWORK,
                "optimiser": {"iterations": ITERATIONS, "warmup_iterations": 10, "batch_size_per_worker": 4},
                "tracking": {"uri": f"sqlite:///{world}/mlflow.db"}}
    (world / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    with (world / f"{name}.log").open("w") as log:
        return subprocess.Popen([sys.executable, "-m", "jobs", "train", "--config", str(world / f"{name}.yaml")],
                                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                                env={**os.environ, "POSE_TEST": str(os.getpid())})


def finish(run: "subprocess.Popen[str]") -> Ended:
    try:
        stdout, _ = run.communicate(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        run.kill()
        raise
    log = Path(str(run.args[-1])).with_suffix(".log").read_text()  # type: ignore[index]
    return Ended(run.returncode, json.loads(stdout.splitlines()[-1]) if run.returncode == 0 else {}, log)


def kill_when(run: "subprocess.Popen[str]", output: Path, *, iteration: int,
              victims: Callable[[psutil.Process], list[psutil.Process]]) -> None:
    """SIGKILL, as soon as a checkpoint of that iteration is there."""
    deadline = time.monotonic() + WAIT_S
    while not any(each.iteration >= iteration for each in checkpoints.list_checkpoints(str(output))):
        assert run.poll() is None, output.with_suffix(".log").read_text()
        assert time.monotonic() < deadline, output.with_suffix(".log").read_text()
        time.sleep(0.02)
    killed = victims(psutil.Process(run.pid))
    assert killed
    killed[0].kill()


def train_workers(driver: psutil.Process) -> list[psutil.Process]:
    return [process for process in driver.children(recursive=True)
            if any("TrainWorker" in part for part in process.cmdline()[:1])]
