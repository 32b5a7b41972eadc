"""A training is one run in MLflow, whichever of its commands could reach MLflow, and it ends there too."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobs import train, train_worker
from jobs.train_task import TrainTask, Worker
from pipeline.config import TrackingConfig, TrainConfig, load_config
from pipeline.metrics_buffer import stored_metrics
from pipeline.model.directory import ModelSpec, read_spec, save_model
from pipeline.model.mspn import MSPN
from pipeline.model_reference import put_model
from pipeline.pose.skeleton import COCO17
from tests.test_train_failures import TINY as SMALL
from tests.test_train_failures import TrackingServer
from tests.test_training import made_shards
from tests.worlds import NO_TRACKING, TINY


@pytest.fixture
def server() -> Iterator[TrackingServer]:
    """An MLflow that is there, unless it is told to go away."""
    server = TrackingServer()
    yield server
    server.go_away()


class Training:
    """The job whose only worker, in this process, logs a loss in each of the steps that it is told."""

    def __init__(self, folder: Path, server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.output, self.server, self.patches = str(folder / "model"), server, monkeypatch
        self.data = made_shards(folder, num_shards=1).uri
        monkeypatch.setattr(train, "start_ray", nullcontext)
        monkeypatch.setattr(train, "refuse_unshared", lambda **_: None)

    def run(self, *steps: int, tracked: bool, finish: bool = True,
            at_the_end: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The command. Where it doesn't `finish` it breaks off with OSError."""
        def fit(task: TrainTask) -> None:
            with train_worker._worker_run(task, 0) as run:
                for step in steps:
                    run.log_metrics({"loss": 1.0}, step=step)
            train_worker._store_unsent(cast(Worker, SimpleNamespace(rank=0, task=task)), run)
            if not finish:
                raise OSError("broken off")
            self._put_model(task)
            at_the_end()

        self.patches.setattr(train, "_fit", fit)
        return train.run(self._config(tracked=tracked))

    def break_off(self, *steps: int, tracked: bool) -> None:
        """The command, broken off after these steps."""
        with pytest.raises(OSError, match="broken off"):
            self.run(*steps, tracked=tracked, finish=False)

    def _config(self, *, tracked: bool) -> TrainConfig:
        tracking = TrackingConfig(uri=f"http://127.0.0.1:{self.server.port}") if tracked else NO_TRACKING
        return load_config(TrainConfig, flags={
            "data": self.data, "output": self.output, "workers": 1, "device": "cpu", "precision": "float32",
            "network": SMALL, "tracking": tracking.model_dump()})

    def _put_model(self, task: TrainTask) -> None:
        directory = Path(self.output).with_name("made")
        save_model(directory, MSPN(TINY), ModelSpec(network=TINY, skeleton=COCO17.to_json(), source=task.source | {
            "iterations": 4, "samples": 16, "evaluation": {}}))
        put_model(directory, self.output)


@pytest.fixture
def training(tmp_path: Path, server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> Training:
    """A training that has not begun."""
    return Training(tmp_path, server, monkeypatch)


def test_one_that_began_without_mlflow_gets_one_run_with_all_its_numbers(
        training: Training, server: TrackingServer) -> None:
    training.break_off(1, 2, tracked=False)
    training.break_off(3, tracked=True)
    result = training.run(4, tracked=True)

    assert server.created == 1
    assert server.losses == [1, 2, 3, 4]
    assert {"seed", "optimiser.iterations"} <= server.params
    assert result["run_id"] == read_spec(Path(training.output)).source["run_id"] == "r1"
    assert stored_metrics(training.output) == []


def test_what_is_logged_while_it_goes_on_without_mlflow_is_sent_later(
        training: Training, server: TrackingServer) -> None:
    training.break_off(1, tracked=True)
    training.break_off(2, tracked=False)
    training.break_off(3, tracked=False)
    assert [each.step for each in stored_metrics(training.output)] == [2, 3]
    result = training.run(4, tracked=True)
    assert (server.created, server.losses, result["run_id"]) == (1, [1, 2, 3, 4], "r1")


def test_one_that_was_finished_without_mlflow_is_told_to_it_by_the_same_command_once(
        training: Training, server: TrackingServer) -> None:
    assert training.run(1, 2, tracked=False)["run_id"] is None

    assert training.run(tracked=True)["run_id"] == "r1"
    asked = server.asked
    assert training.run(tracked=True)["run_id"] == "r1"

    assert server.asked == asked
    assert (server.created, server.losses, server.statuses) == (1, [1, 2], ["FINISHED"])
    assert "seed" in server.params


def test_a_run_whose_end_alone_did_not_arrive_is_ended_by_the_same_command(
        training: Training, server: TrackingServer, caplog: pytest.LogCaptureFixture) -> None:
    result = training.run(1, tracked=True, at_the_end=server.go_away)
    assert "It lacks 0 metrics, the end of the run" in caplog.text
    assert (server.losses, server.statuses) == ([1], [])

    server.come_back()
    assert training.run(tracked=True) == result
    assert server.statuses[-1] == "FINISHED"
    asked = server.asked
    assert training.run(tracked=True) == result
    assert server.asked == asked
