"""Which of a training's checkpoints stay, which one is whole, and that each is a model that any command takes."""

import json
from pathlib import Path

import pytest

from pipeline import checkpoints, storage
from pipeline.checkpoints import Checkpoint, list_checkpoints
from pipeline.config import TrackingConfig
from pipeline.errors import StorageError
from pipeline.model.directory import load_model
from pipeline.model_reference import find_model
from tests.worlds import write_tiny_model

AP = {100: 0.10, 200: 0.40, 300: 0.30, 400: 0.35, 500: 0.40}


def files(ap: float | None = None, state: bytes = b"state") -> dict[str, bytes]:
    source = {"evaluation": {} if ap is None else {"ap": ap}}
    return {"model.json": json.dumps({"source": source}).encode(), "state.pt": state, "model.safetensors": b"weights"}


def keep(output: str, iteration: int, *, keep_newest: int = 2) -> str | None:
    return checkpoints.keep_checkpoint(output, iteration, files(AP.get(iteration)), keep_newest=keep_newest)


def test_the_newest_stay_and_the_best(place: str) -> None:
    there = []
    for iteration in (100, 200, 300, 400, 500):
        assert keep(place, iteration) is None
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
    assert keep(output, 200) == "no space left on device"

    assert [each.iteration for each in list_checkpoints(output)] == [100]
    assert not Path(checkpoints.checkpoint_uri(output, 200)).exists()


def test_a_checkpoint_is_a_model_that_any_command_takes(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    data = {path.name: path.read_bytes() for path in model.iterdir()} | {"state.pt": b"state"}
    checkpoints.keep_checkpoint(str(tmp_path / "run"), 2400, data, keep_newest=1)

    found = find_model(f"{tmp_path}/run/_checkpoints/iteration-0002400", settings=TrackingConfig(enabled=False),
                       into=tmp_path)

    network, _ = load_model(found.directory)
    assert network.config.widths == (4, 4, 4, 4)
