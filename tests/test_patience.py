"""A store that is away is waited for, where giving up would cost a training; not for ever, and not in vain."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch

from jobs import train, train_feed, train_worker
from jobs.train_checkpoints import Keeper, restore
from jobs.train_progress import validate
from jobs.train_task import TrainTask, Worker
from pipeline import checkpoints, patience, samples, shards, storage, tracking, training
from pipeline.errors import DataError, ObjectMissing, StorageError
from pipeline.model.directory import ModelSpec
from pipeline.model.mspn import MSPN
from pipeline.pose.skeleton import COCO17
from tests.fault_proxy import RESET, FaultProxy
from tests.s3 import S3Server
from tests.test_training import blocks_of, made_shards
from tests.worlds import TINY


@pytest.fixture
def flaky(faulty_s3: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """A store of which each request is made once, and which is asked again after a hundredth of a second."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(patience, "PAUSES_S", (0.001, 0.01))
    return faulty_s3


def task(output: str) -> TrainTask:
    return cast(TrainTask, SimpleNamespace(config=SimpleNamespace(output=output, keep_checkpoints=2)))


def restored(output: str) -> training.TrainingState | None:
    network = MSPN(TINY)
    return restore(task(output), network, training.make_optimiser(network, weight_decay=0.0), None, rank=0, world=1)


def keep_one(output: str, iteration: int) -> None:
    network = MSPN(TINY)
    state = training.state_bytes(network, training.make_optimiser(network, weight_decay=0.0),
                                 training.TrainingState(iteration, ((iteration,),)))
    checkpoints.keep_checkpoint(output, iteration, {"state.pt": state}, keep_newest=2)


# --- the rule -----------------------------------------------------------------------------------------------------


def test_it_ends_with_what_the_store_said_once_patience_does(
        flaky: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 2.0)
    flaky.fail("GET", RESET, times=1000)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"x: 1 attempts failed"):
        patience.waited_out(lambda: storage.read_object(f"{bucket}/x"))
    assert len(flaky.asked("GET")) > 2
    assert time.monotonic() - began < 20


def test_pauses_grow_to_a_minute_and_end_within_a_quarter_of_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def away() -> None:
        raise StorageError("away")

    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: 5e3 + sum(slept), sleep=slept.append))
    with pytest.raises(StorageError, match="away"):
        patience.waited_out(away)
    assert slept == [10] + [60] * 14  # another minute would be the 910th second


def test_what_was_asked_for_is_given_once_the_store_is_back_and_it_is_said_how_long_it_was_away(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    slept: list[float] = []
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: 5e3 + sum(slept), sleep=slept.append))
    assert patience.waited_out(lambda: 7) == 7
    assert not caplog.text
    answers = Mock(side_effect=[StorageError("away"), StorageError("away"), None])
    assert patience.waited_out(answers) is None
    assert slept == [10, 60]
    assert "asked again in 60 s: away" in caplog.text
    assert "the store is back after 70 s" in caplog.text


def test_what_is_about_the_object_is_not_waited_for(flaky: FaultProxy, bucket: str) -> None:
    with pytest.raises(ObjectMissing):
        patience.waited_out(lambda: storage.read_object(f"{bucket}/x"))
    assert len(flaky.asked("GET")) == 1


# --- who keeps to it ----------------------------------------------------------------------------------------------


def test_a_store_that_is_away_for_a_while_costs_no_sample(
        flaky: FaultProxy, s3: S3Server, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = made_shards(tmp_path, num_shards=2)
    expected = [block["annotation_id"].tolist() for block in epoch(made)]
    s3.upload_folder(Path(made.uri), f"{bucket}/shards")
    data = shards.open_shards(f"{bucket}/shards")
    flaky.fail("GET", RESET, path="part-", times=3)

    assert [block["annotation_id"].tolist() for block in epoch(data)] == expected

    assert caplog.text.count("the store is away, and asked again") == 3
    assert caplog.text.count("the store is back after") == 1


def test_a_validation_waits_for_its_pictures(flaky: FaultProxy, s3: S3Server, bucket: str, tmp_path: Path) -> None:
    made = made_shards(tmp_path, num_shards=2)
    s3.upload_folder(Path(made.uri), f"{bucket}/shards")
    expected = validated(made)
    data = shards.open_shards(f"{bucket}/shards")
    flaky.fail("GET", RESET, path="part-", times=2)
    assert validated(data) == expected
    assert "ap" in expected


def validated(data: shards.ShardDataset) -> dict[str, float]:
    torch.manual_seed(0)
    about = SimpleNamespace(val=data, intent={"precision": "float32"}, config=SimpleNamespace(validate_persons=None))
    worker = SimpleNamespace(task=about, rank=0, world=1, iteration=4, result=MSPN(TINY),
                             spec=ModelSpec(network=TINY, skeleton=COCO17.to_json()))
    return validate(cast(Worker, worker), tracking.Run())


def epoch(data: shards.ShardDataset) -> list[samples.Arrays]:
    blocks = []
    for turn, block in blocks_of(data):
        if turn.epoch > 0:
            break
        blocks.append(block)
    return blocks


def test_a_run_goes_on_from_its_checkpoint_once_the_store_is_back(flaky: FaultProxy, bucket: str) -> None:
    keep_one(bucket, 100)
    flaky.fail("LIST", RESET, times=2)
    flaky.fail("GET", RESET, path="state.pt", times=2)
    found = restored(bucket)
    assert found is not None
    assert found.iteration == 100


def test_workers_that_begin_without_a_store_end_with_what_it_said(
        flaky: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)
    flaky.fail("LIST", RESET, times=1000)
    with pytest.raises(DataError, match="1 attempts failed"):
        restored(bucket)


def test_the_last_checkpoint_that_may_be_lost_is_waited_for(flaky: FaultProxy, bucket: str) -> None:
    keeper = Keeper(cast(Worker, SimpleNamespace(task=task(bucket), rank=0, world=1, iteration=100)))
    flaky.fail("PUT", RESET, times=5)
    # one attempt each, until a third loss would end the run: then as many as it takes
    assert [keeper.keep(lambda: {"state.pt": b"state"}) for _ in range(3)] == [None] * 3
    assert len(flaky.asked("PUT")) == 6
    assert [each.iteration for each in checkpoints.list_checkpoints(bucket)] == [100]


def test_a_disk_without_room_for_the_files_costs_the_checkpoint_and_not_the_worker(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def no_room() -> dict[str, bytes]:
        raise OSError(28, "No space left on device", "/tmp/model")

    keeper = Keeper(cast(Worker, SimpleNamespace(task=task(str(tmp_path)), rank=0, world=1, iteration=100)))
    assert keeper.keep(no_room) is None
    assert "the checkpoint after iteration 100 could not be kept" in caplog.text


def test_the_model_is_put_once_the_store_is_back_and_else_the_same_command_puts_it(
        flaky: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(output=bucket, keep="last")
    worker = cast(Worker, SimpleNamespace(
        task=SimpleNamespace(config=config, source={}, run_id="r1"), rank=0, world=1, iteration=4, positions=(16,),
        result=MSPN(TINY), spec=ModelSpec(network=TINY, skeleton=COCO17.to_json())))
    flaky.fail("PUT", RESET, times=2)
    with monkeypatch.context() as impatient:
        impatient.setattr(patience, "PATIENCE_S", 0.0)
        said = train_worker._put(worker, {})
    assert said is not None
    assert "the same command puts it from the last checkpoint: s3://" in said
    assert not storage.exists(f"{bucket}/model.json")

    assert train_worker._put(worker, {}) is None
    assert json.loads(storage.read_object(f"{bucket}/model.json"))["source"] == {
        "iterations": 4, "samples": 16, "evaluation": {}, "best": None, "run_id": "r1"}


def test_what_a_feeding_task_raises_is_named_as_it_is() -> None:
    from ray.exceptions import RayTaskError

    for ours in (DataError("part-7 is damaged."), StorageError("part-7: 6 attempts failed.")):
        said = type(ours)(f"{ours}\nFailed to apply UDF transform after 1/1 attempts.")  # as Ray Data puts it
        error = train_feed._own_error(RayTaskError("task_samples", "", said, "", 1, "127.0.0.1"))
        assert (type(error), str(error)) == (type(ours), str(ours))
    other = RayTaskError("task_samples", "", KeyError("slot"), "", 1, "127.0.0.1")
    assert train_feed._own_error(other) is other


# --- the driver ---------------------------------------------------------------------------------------------------


class FailingTrainer:
    """Ray Train whose workers fail once: `meanwhile` happens then."""

    def __init__(self, meanwhile: Callable[[], Any]) -> None:
        self.meanwhile, self.starts = meanwhile, 0

    def __call__(self, _: TrainTask) -> "FailingTrainer":
        return self

    def fit(self) -> Any:
        import ray.train

        self.starts += 1
        if self.starts == 1:
            self.meanwhile()
            raise ray.train.WorkerGroupError("", {0: OSError("broken off")})
        return SimpleNamespace(return_value=None)


def test_workers_that_fail_while_the_store_is_away_begin_again_when_it_is_back(
        flaky: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    trainer = FailingTrainer(lambda: flaky.fail("LIST", RESET, times=3))
    monkeypatch.setattr(train, "_trainer", trainer)
    train._fit(task(bucket))
    assert trainer.starts == 2
    assert "the workers failed 4 times, but the store was away" in caplog.text


def test_workers_that_fail_by_themselves_end_the_run(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = FailingTrainer(lambda: None)
    monkeypatch.setattr(train, "_trainer", trainer)
    with pytest.raises(OSError, match="broken off"):
        train._fit(task(bucket))
    assert trainer.starts == 1
