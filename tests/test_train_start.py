"""What a training begins from: what it is known by, what is refused while nothing is frozen, what has moved since."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch

from jobs import train, train_feed, train_intent, train_start
from jobs.train_task import INIT_FOLDER, TrainTask, Worker
from pipeline import samples, shards, storage, training
from pipeline.checkpoints import keep_checkpoint
from pipeline.config import TrainConfig
from pipeline.errors import ConfigError, DataError
from pipeline.mixture import TrainingSet
from pipeline.model.directory import ModelSpec, model_digest, save_model
from pipeline.model.mspn import MSPN
from pipeline.model.settings import Decoding
from pipeline.pose.skeleton import COCO17, MPII16, Skeleton
from pipeline.shards import ShardDataset
from pipeline.tracking import TrackingError
from pipeline.units import FrozenJob, freeze_job, open_job
from tests.test_recipes import data, recipe, torchvision_weights, training_set  # noqa: F401 - data is a fixture
from tests.test_training import made_shards
from tests.worlds import NO_TRACKING, TINY, write_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = TINY.model_dump(mode="json", exclude={"num_joints"})


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A model that isn't used as the default recipe's is: of MMPose's colours, crop and decoding."""
    torch.manual_seed(0)
    save_model(tmp_path / "theirs", MSPN(TINY), ModelSpec(
        network=TINY, skeleton=COCO17.to_json(), colour="RGB", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        box_padding_wh=(1.25, 1.25), decoding=Decoding(variant="mmpose")))
    return tmp_path / "theirs"


def config(tmp_path: Path, **settings: Any) -> TrainConfig:
    given = {"output": str(tmp_path / "out"), "workers": 1, "tracking": NO_TRACKING.model_dump(), **settings}
    return recipe([], **{name: value for name, value in given.items() if value is not None})


def begun(given: TrainConfig, dataset: ShardDataset) -> FrozenJob:
    """The run as `train` freezes it."""
    intent = train._begun_intent(given, (training_set(dataset),))
    return freeze_job(given.output, (), input={}, intent=intent, about={"run_id": "r1"})


def refuse_other(given: TrainConfig, job: FrozenJob, dataset: ShardDataset) -> None:
    intent = train_intent.resolved_intent(given, job, [training_set(dataset)])
    train_intent.refuse_other_run(given, job, {}, intent)


# --- which model it was -------------------------------------------------------------------------------------------


def test_a_run_is_known_by_the_model_that_it_began_from_and_by_what_that_one_is(
        data: ShardDataset, tmp_path: Path, theirs: Path) -> None:  # noqa: F811
    given = config(tmp_path, init=str(theirs), heatmap_scale=8.0)
    job = begun(given, data)
    recipe_of_it = train._source(given, job, run_id=None)["recipe"]

    assert recipe_of_it["init"] == recipe_of_it["init_reference"] == str(theirs)
    assert recipe_of_it["init_digest"] == model_digest(theirs)
    # what the settings left to the model is what it is, and not the defaults that stood there
    assert recipe_of_it["network"] == SMALL
    assert recipe_of_it["inference"] == {"colour": "RGB", "normalisation": "imagenet", "decoding": "mmpose",
                                         "box_padding_wh": [1.25, 1.25], "blur_kernel": 5}
    assert recipe_of_it["heatmap_scale"] == 1.0
    assert model_digest(Path(given.output, INIT_FOLDER)) == model_digest(theirs)


def test_a_trunk_is_known_by_its_digest(data: ShardDataset, tmp_path: Path) -> None:  # noqa: F811
    torch.save(torchvision_weights(red=1.0, green=2.0, blue=3.0), tmp_path / "trunk.pth")
    given = config(tmp_path, trunk=str(tmp_path / "trunk.pth"), network=SMALL)
    sha256 = storage.stored_sha256(str(tmp_path / "trunk.pth"))
    assert train._source(given, begun(given, data), run_id=None)["recipe"]["trunk_sha256"] == sha256


def test_all_that_a_run_is_known_by_is_in_its_models_source(data: ShardDataset, tmp_path: Path) -> None:  # noqa: F811
    given = config(tmp_path, network=SMALL, validate_persons=100)
    job = begun(given, data)
    source = train._source(given, job, run_id=None)
    assert {**source["recipe"], "seed": source["seed"], "joints": list(COCO17.joints)} == job.intent
    assert source["recipe"]["validate_persons"] == 100


# --- the same command again ---------------------------------------------------------------------------------------


def test_a_run_goes_on_with_its_own_copy_and_says_that_init_means_another_model_now(
        data: ShardDataset, tmp_path: Path, theirs: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    given = config(tmp_path, init=str(theirs))
    job, digest = begun(given, data), model_digest(theirs)
    train_intent.tell_if_init_moved(given, job)
    assert not caplog.text

    for path in theirs.iterdir():
        path.unlink()
    write_tiny_model(theirs, seed=1)
    train_intent.tell_if_init_moved(given, job)

    assert f"means another model now, {theirs} of digest {model_digest(theirs)[:12]}" in caplog.text
    assert f"began from {theirs} of digest {digest[:12]}, and goes on with its own copy" in caplog.text
    refuse_other(given, job, data)
    assert model_digest(Path(given.output, INIT_FOLDER)) == digest


def test_a_run_goes_on_where_the_model_that_it_began_from_is_gone(
        data: ShardDataset, tmp_path: Path, theirs: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    given = config(tmp_path, init=str(theirs))
    job = begun(given, data)
    theirs.rename(tmp_path / "elsewhere")
    train_intent.tell_if_init_moved(given, job)
    assert f"has its own copy; what init is now can't be seen: init {theirs}: no model directory" in caplog.text
    refuse_other(given, job, data)


@pytest.mark.parametrize("error", [storage.StorageError("away"), TrackingError("away"), DataError("broken")])
def test_a_run_goes_on_where_what_init_is_now_can_not_be_seen(
        data: ShardDataset, tmp_path: Path, theirs: Path, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
        caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    given = config(tmp_path, init=str(theirs))
    job = begun(given, data)
    monkeypatch.setattr(train_intent, "find_model", Mock(side_effect=error))
    train_intent.tell_if_init_moved(given, job)
    assert f"what init is now can't be seen: {error}" in caplog.text


@pytest.mark.parametrize(("other", "difference"), [
    ({"init": None}, "init: begun with"), ({"network": SMALL | {"num_stages": 2}}, "network: begun with"),
    ({"inference": {"blur_kernel": 9}}, "inference: begun with"), ({"loss": {"ohkm_joints": 3}}, "loss: begun with"),
    ({"trunk": "trunk.pth"}, "trunk: begun with null")])
def test_what_the_settings_left_to_the_model_cannot_be_changed_later(
        data: ShardDataset, tmp_path: Path, theirs: Path, other: dict[str, Any], difference: str) -> None:  # noqa: F811
    torch.save({}, tmp_path / "trunk.pth")
    other = {name: str(tmp_path / value) if name == "trunk" else value for name, value in other.items()}
    job = begun(config(tmp_path, init=str(theirs)), data)
    with pytest.raises(ConfigError, match=difference):
        refuse_other(config(tmp_path, **{"init": str(theirs), **other}), job, data)


def test_what_has_no_effect_on_a_run_from_a_model_is_no_difference(
        data: ShardDataset, tmp_path: Path, theirs: Path) -> None:  # noqa: F811
    job = begun(config(tmp_path, init=str(theirs)), data)
    refuse_other(config(tmp_path, init=str(theirs), heatmap_scale=8.0), job, data)
    refuse_other(config(tmp_path, init=str(theirs), network=SMALL), job, data)


def test_a_run_that_an_earlier_program_began_from_a_model_goes_on_in_silence(
        data: ShardDataset, tmp_path: Path, theirs: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    given = config(tmp_path, init=str(theirs), trunk=str(tmp_path / "trunk.pth"), heatmap_scale=8.0)
    torch.save({}, tmp_path / "trunk.pth")
    # what it froze: the settings as they stood, also those without effect, and no word of which model it was
    settings = given.model_dump(mode="json", include={
        "workers", "seed", "precision", "compile", "sync_batch_norm", "trunk", "init", "heatmap_scale", "network",
        "optimiser", "loss", "augmentation", "inference", "validate_every", "validate_persons", "keep"})
    earlier = settings | {"joints": list(COCO17.joints), "trunk_sha256": storage.stored_sha256(str(given.trunk))}
    job = freeze_job(given.output, (), input={}, intent=earlier, about={"run_id": "r1"})

    train_intent.tell_if_init_moved(given, job)
    refuse_other(given, job, data)

    assert not caplog.text
    assert train._source(given, job, run_id=None)["recipe"]["heatmap_scale"] == 8.0


def test_a_model_that_was_put_there_otherwise_is_not_taken_for_a_finished_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a model that was not trained there"):
        train_intent.refuse_other_model(config(tmp_path), None, {}, ())


# --- what can't begin ---------------------------------------------------------------------------------------------


def bad_start(tmp_path: Path, theirs: Path, name: str) -> dict[str, Any]:
    """Settings from which no worker could begin."""
    trunk = str(tmp_path / "trunk.pth")
    torch.save(torchvision_weights(red=1.0, green=2.0, blue=3.0), trunk)
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"epoch": 3, "weight": torch.zeros(1)}, tmp_path / "checkpoint.pth")
    return {
        "text": {"trunk": str(tmp_path / "text.pth"), "network": SMALL},
        "list": {"trunk": str(tmp_path / "list.pth"), "network": SMALL},
        "whole checkpoint": {"trunk": str(tmp_path / "checkpoint.pth"), "network": SMALL},
        "no trunk": {"trunk": str(tmp_path / "gone.pth"), "network": SMALL},
        "trunk of another network": {"trunk": trunk, "network": SMALL | {"widths": [8, 8, 8, 8]}},
        "trunk without a classifier": {"trunk": trunk, "network": {"architecture": "rsn"}},
        "both": {"trunk": trunk, "init": str(theirs)},
        "nothing there": {"init": str(tmp_path / "nowhere")},
        "another network": {"init": str(theirs), "network": SMALL | {"num_stages": 2}},
        "used otherwise": {"init": str(theirs), "inference": {"blur_kernel": 9}},
    }[name]


@pytest.mark.parametrize(("name", "why"), [
    ("text", "holds something else than weights"), ("list", "is no state dict"),
    ("whole checkpoint", "is no state dict"),
    ("no trunk", r"gone\.pth"),
    ("trunk of another network", "doesn't hold the network's weights"),
    ("trunk without a classifier", "there is no classifier from whose weights rsn could begin"),
    ("both", r"init and trunk are both given.*--set trunk=null"), ("nothing there", "init .*nowhere: no model direct"),
    ("another network", "but `network` asks for"), ("used otherwise", "Give the model's own")])
def test_what_no_worker_could_begin_with_is_refused_and_the_corrected_command_can_follow(
        data: ShardDataset, tmp_path: Path, theirs: Path, name: str, why: str) -> None:  # noqa: F811
    with pytest.raises((ConfigError, DataError, storage.ObjectMissing), match=why):
        begun(config(tmp_path, **bad_start(tmp_path, theirs, name)), data)
    assert open_job(str(tmp_path / "out")) is None
    assert not (tmp_path / "out" / INIT_FOLDER).exists()
    begun(config(tmp_path, network=SMALL), data)


def test_a_network_of_full_size_is_tried_without_memory_for_its_weights(
        data: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    made: list[torch.device] = []
    scale = train.try_start.__globals__["training"].scale_heatmaps

    def scale_and_look(network: torch.nn.Module, factor: float) -> None:
        made.extend(parameter.device for parameter in network.parameters())
        scale(network, factor)

    monkeypatch.setattr("pipeline.training.scale_heatmaps", scale_and_look)
    assert train.try_start(config(tmp_path), COCO17, tmp_path) is None
    assert set(made) == {torch.device("meta")}


def test_a_scale_that_has_no_effect_is_named(
        tmp_path: Path, theirs: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train.try_start(config(tmp_path, init=str(theirs), heatmap_scale=8.0), COCO17, tmp_path)
    assert "heatmap_scale=8 has no effect" in caplog.text


# --- which data it reads ------------------------------------------------------------------------------------------


def put_version(made: ShardDataset, version: int, skeleton: Skeleton | None = COCO17) -> None:
    """A later version of the same parts."""
    Path(made.uri, shards.version_name(version)).write_bytes(shards.dataset_json(
        made.parts, version=version, skeleton=skeleton, source={}, counts={}))


def test_a_run_goes_on_with_the_versions_of_its_data_and_a_new_one_takes_the_newest(tmp_path: Path) -> None:
    one, two = (made_shards(tmp_path, num_shards=number) for number in (1, 2))
    for made in (one, two):
        put_version(made, 2)

    def opened(given: TrainConfig, begun: dict[str, Any]) -> list[int]:
        sets, val = train_intent.open_inputs(given, begun)
        assert [each.dataset.uri for each in sets] == [each.uri for each in given.data]
        assert val is not None
        return [*(each.dataset.version for each in sets), val.version]

    alone, both = (config(tmp_path, data=given, val=two.uri) for given in (one.uri, [one.uri, two.uri]))
    assert (opened(alone, {}), opened(both, {})) == ([2, 2], [2, 2, 2])
    assert opened(alone, {"data": one.uri, "data_version": 1, "val": two.uri, "val_version": 1}) == [1, 1]
    assert opened(alone, {"data": one.uri, "data_version": 1, "val": None}) == [1, 2]
    assert opened(both, {"data": [one.uri, two.uri], "data_version": [2, 1], "val_version": 2}) == [2, 1, 2]
    assert opened(alone, {"data": two.uri, "data_version": 1, "val_version": 1}) == [2, 2]  # another run's


def test_data_without_joints_and_a_val_with_others_are_refused(tmp_path: Path) -> None:
    made, bare, other = (made_shards(tmp_path / name, num_shards=1) for name in ("made", "bare", "other"))
    put_version(bare, 2, skeleton=None)
    put_version(other, 2, skeleton=MPII16)
    for trained, val in ((bare, made), (made, bare)):
        with pytest.raises(ConfigError, match="was sharded without --annotations: there are no joints to learn"):
            train_intent.open_inputs(config(tmp_path, data=trained.uri, val=val.uri), {})
    with pytest.raises(ConfigError, match="have different joints"):
        train_intent.open_inputs(config(tmp_path, data=made.uri, val=other.uri), {})


def test_a_worker_begins_to_train_at_the_first_person_of_each_set_or_where_the_last_checkpoint_was(
        data: ShardDataset, tmp_path: Path, theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    import ray.train.torch

    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    given = config(tmp_path, init=str(theirs), optimiser={"ema_decay": 0.9})
    begun(given, data)
    task = TrainTask(given, (training_set(data),) * 2, None, {}, {}, None)
    worker = train_start.open_worker(task, 0, 1)
    assert (worker.iteration, worker.positions) == (0, (0, 0))
    assert worker.wrapped is worker.network
    assert worker.network.training
    assert worker.network._compiled_call_impl is None  # what nobody has asked for
    assert worker.average is not None
    assert worker.result is worker.average.network

    with torch.no_grad():
        next(worker.network.parameters()).fill_(7)
    keep_checkpoint(given.output, 3, {"state.pt": training.state_bytes(
        worker.network, worker.optimiser, training.TrainingState(3, ((12, 5),)), worker.average)}, keep_newest=1)
    again = train_start.open_worker(task, 0, 1)
    assert (again.iteration, again.positions) == (3, (12, 5))
    assert (next(again.network.parameters()) == 7).all()
    assert (next(again.result.parameters()) != 7).any()


def test_a_weight_of_one_set_among_several_is_part_of_what_a_run_is_known_by(
        data: ShardDataset, tmp_path: Path) -> None:  # noqa: F811
    plain, weighted = (train_intent.resolved_intent(config(tmp_path, data=["a", second]), None, [training_set(data)])
                       for second in ("b", {"uri": "b", "weight": 2}))
    assert "sets" not in plain
    assert weighted["sets"] == [{"weight": 1, "joints": None}, {"weight": 2, "joints": None}]


def test_a_ranks_batches_go_on_from_its_positions_however_many_tasks_are_planned_at_once(
        data: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    optimiser = {"iterations": 10, "warmup_iterations": 1, "batch_size_per_worker": 6}
    sets = tuple(replace(training_set(data), weight=weight) for weight in (1.0, 2.0))
    task = TrainTask(config(tmp_path, optimiser=optimiser), sets, None, {}, {}, None)
    recipe_of_it = replace(train_feed.recipe_of(task, ModelSpec(network=TINY, skeleton=COCO17.to_json())), joints=None)
    planned: list[int] = []

    def made_here(_: Any, one: TrainingSet, groups: list[list[samples.Turn]], share: float) -> Iterator[samples.Arrays]:
        planned.append(sum(one.counts[turn.part] - turn.skip for group in groups for turn in group))
        for group in groups:
            yield from samples.task_samples({"turns": [samples.turns_text(group)]}, one.dataset, recipe_of_it)

    def batches(iteration: int, positions: tuple[int, ...], count: int) -> list[list[tuple[int, int]]]:
        worker = SimpleNamespace(task=task, rank=0, world=1, iteration=iteration, positions=positions)
        some = itertools.islice(train_feed.sample_batches(cast(Worker, worker)), count)
        return [list(zip(batch["set"].tolist(), batch["slot"].tolist(), strict=True)) for batch in some]

    monkeypatch.setattr(train_feed, "_made_by_tasks", made_here)
    whole = batches(0, (0, 0), 14)
    # 10 iterations of 6, a third of them of the first set; whole shards are planned, and more only where more is asked
    (persons,) = sets[0].counts
    assert planned == [-(-20 // persons) * persons, -(-40 // persons) * persons, *planned[2:]]
    monkeypatch.setattr(train_feed, "TASKS_AHEAD", 1)
    monkeypatch.setattr(samples, "SAMPLES_PER_TASK", 1)
    assert batches(4, (8, 16), 10) == whole[4:]
    assert whole[4] == [(1, 16), (0, 8), (1, 17), (1, 18), (0, 9), (1, 19)]


# --- several ranks ------------------------------------------------------------------------------------------------


def test_the_rehearsal_before_the_first_iteration_leaves_no_trace(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = MSPN(TINY).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = train_start.averaging(network)
    finally:
        torch.distributed.destroy_process_group()
    assert wrapped.module is network
    assert not wrapped.forward_sync_buffers  # as the authors: each rank keeps its own statistics
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
