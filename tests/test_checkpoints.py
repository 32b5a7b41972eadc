"""Which of a training's checkpoints stay, which one is whole, and that each is a model that any command takes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from jobs.train_checkpoints import Keeper, restore
from jobs.train_task import TrainTask, Worker
from pipeline import checkpoints, storage, training
from pipeline.checkpoints import Checkpoint, list_checkpoints
from pipeline.config import TrackingConfig
from pipeline.errors import DataError, StorageError
from pipeline.model.directory import load_model
from pipeline.model.mspn import MSPN
from pipeline.model_reference import find_model
from tests.worlds import TINY, write_tiny_model

AP = {100: 0.10, 200: 0.40, 300: 0.30, 400: 0.35, 500: 0.40}


def files(ap: float | None = None, state: bytes = b"state") -> dict[str, bytes]:
    source = {"evaluation": {} if ap is None else {"ap": ap}}
    return {"model.json": json.dumps({"source": source}).encode(), "state.pt": state, "model.safetensors": b"weights"}


def keep(output: str, iteration: int, *, keep_newest: int = 2) -> None:
    checkpoints.keep_checkpoint(output, iteration, files(AP.get(iteration)), keep_newest=keep_newest)


def test_the_newest_stay_and_the_best(place: str) -> None:
    there = []
    for iteration in (100, 200, 300, 400, 500):
        keep(place, iteration)
        there.append([each.iteration for each in list_checkpoints(place)])
    # by hand: the newest two, and the best so far; of the equal 0.40 the later one
    assert there == [[100], [100, 200], [200, 300], [200, 300, 400], [400, 500]]


def test_without_validation_the_newest_stay(place: str) -> None:
    for iteration in (600, 700, 800):
        keep(place, iteration)
    assert [(each.iteration, each.ap) for each in list_checkpoints(place)] == [(700, None), (800, None)]


def test_the_best_has_the_highest_ap_and_of_equals_it_was_trained_longer() -> None:
    some = [Checkpoint("a", 1, 0.2), Checkpoint("b", 2, 0.5), Checkpoint("c", 3, 0.5), Checkpoint("d", 4, None)]
    best = checkpoints.best_checkpoint(some)
    assert best is not None
    assert best.uri == "c"
    assert checkpoints.best_checkpoint(some[3:]) is None


def test_what_was_broken_off_is_no_checkpoint_and_is_replaced_whole(place: str) -> None:
    keep(place, 100)
    storage.put_if_absent(storage.join(checkpoints.checkpoint_uri(place, 200), "model.safetensors"), b"of another run")
    assert [each.iteration for each in list_checkpoints(place)] == [100]

    keep(place, 200)

    kept = list_checkpoints(place)[-1]
    assert kept.iteration == 200
    assert storage.read_object(storage.join(kept.uri, "model.safetensors")) == b"weights"


def test_a_checkpoint_of_an_earlier_version_has_its_state_alone_and_counts(tmp_path: Path) -> None:
    storage.put_if_absent(storage.join(checkpoints.checkpoint_uri(str(tmp_path), 100), "state.pt"), b"state")
    (tmp_path / "_checkpoints" / "checkpoint_manager_snapshot.json").write_text("{")
    (tmp_path / "_checkpoints" / "of_others").mkdir()
    (tmp_path / "_checkpoints" / "of_others" / "state.pt").write_bytes(b"state")
    assert [(each.iteration, each.ap) for each in list_checkpoints(str(tmp_path))] == [(100, None)]


def test_a_removed_checkpoint_leaves_no_folder(tmp_path: Path) -> None:
    for iteration in (100, 200, 300, 400):
        keep(str(tmp_path), iteration)
    assert sorted(path.name for path in (tmp_path / "_checkpoints").iterdir()) == [
        "iteration-0000200", "iteration-0000300", "iteration-0000400"]


def test_a_store_that_fails_is_said_and_leaves_the_others_and_no_half_one(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path)
    keep(output, 100)

    def full(uri: str, data: bytes) -> bool:
        if uri.endswith("state.pt"):
            raise StorageError("no space left on device")
        return put(uri, data)

    put = storage.put_if_absent
    monkeypatch.setattr(storage, "put_if_absent", full)
    with pytest.raises(StorageError, match="no space left on device"):
        keep(output, 200)

    assert [each.iteration for each in list_checkpoints(output)] == [100]
    assert not Path(checkpoints.checkpoint_uri(output, 200)).exists()


def test_a_checkpoint_is_whole_with_its_last_file_and_gone_with_the_first_that_is_removed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[list[int]] = []
    for name in ("put_if_absent", "remove_own"):
        act = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda *given, act=act: (
            there.append([each.iteration for each in list_checkpoints(str(tmp_path))]), act(*given))[1])
    keep(str(tmp_path), 100)
    keep(str(tmp_path), 200, keep_newest=1)
    # before each of its three files is put, then of the next one's, then before each of the first one's is removed
    assert there == [[]] * 3 + [[100]] * 3 + [[100, 200], [200], [200]]


def test_an_old_checkpoint_that_can_not_be_removed_is_a_warning_and_the_next_time_removes_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refused(uri: str) -> None:
        raise StorageError("not allowed")

    keep(str(tmp_path), 600)
    with monkeypatch.context() as patches:
        patches.setattr(storage, "remove_own", refused)
        keep(str(tmp_path), 700, keep_newest=1)
    assert "an old checkpoint could not be removed" in caplog.text
    assert [each.iteration for each in list_checkpoints(str(tmp_path))] == [600, 700]
    keep(str(tmp_path), 800, keep_newest=1)
    assert [each.iteration for each in list_checkpoints(str(tmp_path))] == [800]


def test_a_checkpoint_that_another_run_puts_too_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "put_if_absent", lambda uri, data: False)
    with pytest.raises(StorageError, match="another run puts the same checkpoint"):
        keep(str(tmp_path), 100)


def test_a_checkpoint_is_a_model_that_any_command_takes(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    data = {path.name: path.read_bytes() for path in model.iterdir()} | {"state.pt": b"state"}
    checkpoints.keep_checkpoint(str(tmp_path / "run"), 2400, data, keep_newest=1)

    found = find_model(f"{tmp_path}/run/_checkpoints/iteration-0002400", settings=TrackingConfig(enabled=False),
                       into=tmp_path)

    network, _ = load_model(found.directory)
    assert network.config.widths == (4, 4, 4, 4)


def test_a_checkpoint_with_a_damaged_specification_counts_as_not_validated_and_one_warning_says_so(
        place: str, caplog: pytest.LogCaptureFixture) -> None:
    for iteration, spec in ((100, b'{"source": {"evaluation"'), (200, b"[]"), (300, files(0.3)["model.json"])):
        checkpoints.keep_checkpoint(place, iteration, files() | {"model.json": spec}, keep_newest=3)
    for _ in range(2):
        assert [(each.iteration, each.ap) for each in list_checkpoints(place)] == [(100, None), (200, None), (300, 0.3)]
    assert caplog.text.count("is damaged, and its checkpoint counts as not validated") == 2


# --- going on -----------------------------------------------------------------------------------------------------


def state(iteration: int) -> bytes:
    network = MSPN(TINY)
    optimiser = training.make_optimiser(network, weight_decay=0.0)
    return training.state_bytes(network, optimiser, training.TrainingState(iteration, ((5 * iteration,),)))


def restored(output: str) -> training.TrainingState | None:
    network = MSPN(TINY)
    task = SimpleNamespace(config=SimpleNamespace(output=output))
    return restore(cast(TrainTask, task), network, training.make_optimiser(network, weight_decay=0.0), None, rank=0,
                   world=1)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
        place: str, caplog: pytest.LogCaptureFixture) -> None:
    assert restored(place) is None
    whole = state(200)
    for iteration, data in ((100, state(100)), (200, whole[:len(whole) // 2]), (300, b"")):
        checkpoints.keep_checkpoint(place, iteration, files() | {"state.pt": data}, keep_newest=3)

    found = restored(place)

    assert found == training.TrainingState(100, ((500,),))
    assert caplog.text.count("is damaged, and passed over") == 2


def test_where_all_checkpoints_are_damaged_the_run_does_not_begin_anew_by_itself(place: str) -> None:
    checkpoints.keep_checkpoint(place, 100, files() | {"state.pt": b"no state"}, keep_newest=3)
    with pytest.raises(DataError, match=r"None of the checkpoints .* can be read: .*iteration-0000100.*Remove them"):
        restored(place)


def test_a_run_goes_on_from_the_newest_checkpoint_not_from_the_best(place: str) -> None:
    for iteration, ap in ((100, 0.9), (200, 0.1)):
        checkpoints.keep_checkpoint(place, iteration, files(ap) | {"state.pt": state(iteration)}, keep_newest=1)
    assert [each.iteration for each in list_checkpoints(place)] == [100, 200]
    found = restored(place)
    assert found is not None
    assert found.iteration == 200


def keeper(output: str) -> Keeper:
    return Keeper(cast(Worker, SimpleNamespace(
        task=SimpleNamespace(config=SimpleNamespace(output=output, keep_checkpoints=2)), rank=0, world=1, iteration=0)))


def test_the_third_checkpoint_in_a_row_that_can_not_be_kept_ends_the_run_and_names_the_last_good_one(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def full() -> dict[str, bytes]:
        raise OSError(28, "No space left on device")

    keeping, said = keeper(str(tmp_path)), []
    for make_files in (full, full, files, full, full, full):
        keeping.worker.iteration += 100
        said.append(keeping.keep(make_files))

    assert said[:5] == [None] * 5  # one that was kept begins the count anew
    assert re.search(r"3 checkpoints in a row could not be kept: .*No space left.*last good checkpoint is .*-0000300 "
                     r".*--set init=.*-0000300 begins.*the same command goes on", str(said[5]))
    assert caplog.text.count("could not be kept, and training goes on to the next one") == 4


def test_a_machine_that_is_about_to_go_is_told_of_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import ray.train

    keeping = keeper(str(tmp_path))
    announced = [None, ["a"], ["a"], ["a", "b"], ["b"], None]
    said = iter(announced)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: (nodes := next(said)) and SimpleNamespace(
        preempted_node_ids=nodes))
    assert [keeping.machine_leaves() for _ in announced] == [False, True, False, True, False, False]
    assert caplog.text.count("will be taken away") == 2
