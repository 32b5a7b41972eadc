"""`train` as a whole: two workers that train, validate and put a model; the same command again; refusals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import annotate, evaluate, shard, train
from pipeline.config import AnnotateConfig, EvaluateConfig, ShardConfig, TrackingConfig, TrainConfig, load_config
from pipeline.errors import ConfigError, DataError
from pipeline.model.directory import load_model, model_digest
from pipeline.model.settings import Decoding
from pipeline.model_registry import registered_version
from tests.without_ray import WITHOUT_RAY
from tests.worlds import NO_TRACKING, write_pictures, write_tiny_model

TINY = {"num_stages": 1, "input_size_wh": (64, 64), "blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 4),
        "stem_channels": 4, "upsample_channels": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A shard dataset of 12 made pictures in several shards."""
    folder = write_pictures(tmp_path_factory.mktemp("world"))
    shard.run(ShardConfig(images=str(folder / "images"), annotations=str(folder / "annotations.json"),
                          output=str(folder / "shards"), images_per_shard=4, tracking=NO_TRACKING))
    return folder


def config(world: Path, output: Path | str, *, files: Sequence[str] = (), **settings: Any) -> TrainConfig:
    optimiser = {"iterations": 4, "warmup_iterations": 1, "batch_size_per_worker": 4}
    return load_config(TrainConfig, files=files, flags={
        "data": str(world / "shards"), "val": str(world / "shards"), "output": str(output), "workers": 2,
        "validate_every": 2, "threads": 1, "network": TINY, "optimiser": optimiser,
        "tracking": NO_TRACKING.model_dump(), **settings})


def test_two_workers_make_a_model_that_says_where_it_comes_from_and_a_second_run_does_nothing(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train.WORKER_ENVIRONMENT, "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    tracked = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db").model_dump()
    hips = {"uri": str(world / "shards"), "weight": 0.5, "joints": ["left_hip", "right_hip"]}
    wanted = config(world, tmp_path / "model", tracking=tracked, register="pose-test", promote="champion",
                    data=[str(world / "shards"), hips])
    result = train.run(wanted)

    network, spec = load_model(tmp_path / "model")
    assert network.config.widths == (4, 4, 4, 4)
    assert result["model_digest"] == model_digest(tmp_path / "model")
    assert result["iterations"] == spec.source["iterations"] == 4
    assert result["samples"] == 4 * 4 * 2
    assert 0 <= result["AP"] <= 1
    assert spec.source["data"] == [str(world / "shards")] * 2
    assert spec.source["data_digest"][0] == spec.source["data_digest"][1]
    assert spec.source["packages"]["torch"].startswith("2.")
    assert result["registered"]["version"] == "1"
    assert_run_has_the_numbers(tracked["uri"], result["run_id"], spec.source)
    assert_evaluate_says_the_same(world, tmp_path, result["evaluation"])

    promotion = result["promotion"]
    assert (promotion["moved"], promotion["champion"], promotion["data_version"]) == (True, None, 1), promotion
    assert promotion["ap"] == result["AP"]  # --val again, by code of its own
    champion = registered_version("models:/pose-test@champion", tracking=wanted.tracking)
    assert champion is not None
    assert (champion.reference, champion.run_id) == ("models:/pose-test/1", result["run_id"])

    assert train.run(wanted) == result
    with pytest.raises(ConfigError, match="seed: begun with 0, now 1"):
        train.run(config(world, tmp_path / "model", tracking=tracked, seed=1, data=[wanted.data[0].uri, hips]))
    with pytest.raises(ConfigError, match=r"sets: begun with .*\"weight\": 0.5"):
        train.run(config(world, tmp_path / "model", tracking=tracked, data=[wanted.data[0].uri, hips | {"weight": 2}]))


def assert_run_has_the_numbers(uri: str, run_id: str, source: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert {"loss", "loss_stage0_unit4", "learning_rate", "samples_per_second", "input_wait_share", "val_ap",
            "val_pck", "val_pck_left_hip", "promotion/ap", "system/cpu_utilization_percentage",
            "system/system_memory_usage_percentage"} <= run.data.metrics.keys()
    assert run.data.params["optimiser.iterations"] == "4"
    assert run.data.params["packages.torch"] == source["packages"]["torch"]
    assert run.data.tags.get("git_revision") == source["git_revision"]
    assert run.data.tags["promotion.champion"] == "moved"
    assert run.inputs is not None
    inputs = {(each.dataset.name, each.tags[0].value, each.dataset.digest) for each in run.inputs.dataset_inputs}
    first, second = (digest[:36] for digest in source["data_digest"])
    assert inputs == {("train", "training", first), ("train_2", "training", second),
                      ("val", "validation", source["val_digest"][:36])}
    assert [each.path for each in client.list_artifacts(run_id, "validation")] == [
        "validation/iteration-0000002.jpg", "validation/iteration-0000004.jpg"]


def assert_evaluate_says_the_same(world: Path, folder: Path, evaluation: dict[str, float]) -> None:
    """The ten COCO numbers of the last validation, by two ranks, are those of `annotate` and `evaluate`."""
    with pytest.MonkeyPatch.context() as patches:
        for module, name, instead in WITHOUT_RAY:
            patches.setattr(module, name, instead)
        annotate.run(AnnotateConfig(input=str(world / "shards"), model=str(folder / "model"), threads=1, backend="cpu",
                                    precision="float32", output=str(folder / "keypoints"), tracking=NO_TRACKING))
        numbers = evaluate.run(EvaluateConfig(keypoints=str(folder / "keypoints"), tracking=NO_TRACKING,
                                              annotations=str(world / "annotations.json")))
    assert {"ap", "ap50", "ar", "pck"} <= evaluation.keys()
    assert evaluation == {name: numbers[name] for name in evaluation}


@pytest.mark.slow
def test_mmposes_recipe_makes_a_model_that_is_cropped_and_decoded_as_mmposes(world: Path, tmp_path: Path) -> None:
    optimiser = {"iterations": 3, "warmup_iterations": 1, "decay_at": [2], "batch_size_per_worker": 4}
    mmpose = [str(Path(train.__file__).with_name("train_mmpose.yaml"))]
    wanted = config(world, tmp_path / "model", files=mmpose, workers=1, validate_every=3, optimiser=optimiser)
    result = train.run(wanted)

    _, spec = load_model(tmp_path / "model")
    assert (spec.colour, spec.mean) == ("RGB", (0.485, 0.456, 0.406))
    assert (spec.box_padding_wh, spec.decoding) == ((1.25, 1.25), Decoding(variant="mmpose", blur_kernel=5))
    assert spec.source["recipe"]["inference"]["decoding"] == "mmpose"
    assert spec.source["recipe"]["loss"] == spec.loss.model_dump()
    assert (spec.loss.occluded, spec.loss.target_peak) == ("supervise", "joint")
    assert spec.source["recipe"]["optimiser"]["decay_at"] == [2]
    assert (result["iterations"], result["samples"]) == (3, 12)

    assert train.run(wanted) == result
    with pytest.raises(ConfigError, match=r'inference: begun with .*"RGB".*, now (null|.*"BGR")'):
        train.run(config(world, tmp_path / "model", files=mmpose, workers=1, validate_every=3, optimiser=optimiser,
                         inference={}))


def test_joints_that_the_data_do_not_have_are_refused_before_anything_is_kept(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="half_body_upper names left_elbo, but the data have"):
        train.run(config(world, tmp_path / "model", augmentation={"half_body_upper": ["left_elbo"]}))
    assert not (tmp_path / "model" / "_job.json").exists()


def test_more_workers_than_shards_are_refused_before_anything_starts(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="50 workers need at least as many shards"):
        train.run(config(world, tmp_path / "model", workers=50))
    assert not (tmp_path / "model" / "_job.json").exists()


@pytest.mark.slow
def test_two_workers_train_with_all_options_at_once_and_the_average_becomes_the_model(
        world: Path, tmp_path: Path) -> None:
    optimiser = {"iterations": 4, "warmup_iterations": 1, "batch_size_per_worker": 4, "accumulate": 2,
                 "clip_norm": 1.0, "ema_decay": 0.9}
    tracked = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db").model_dump()
    result = train.run(config(world, tmp_path / "model", optimiser=optimiser, tracking=tracked, sync_batch_norm=True,
                              checkpoint_activations=True))

    network, spec = load_model(tmp_path / "model")
    state = torch.load(tmp_path / "model" / "_checkpoints" / "iteration-0000004" / "state.pt", weights_only=True)
    assert state["average"]["updates"] == 4
    assert same_weights(network.state_dict(), state["average"]["network"])
    assert not same_weights(network.state_dict(), state["network"])
    assert (spec.source["recipe"]["optimiser"]["clip_norm"], spec.source["recipe"]["sync_batch_norm"]) == (1.0, True)
    from mlflow import MlflowClient

    assert "gradient_norm" in MlflowClient(tracked["uri"]).get_run(result["run_id"]).data.metrics


@pytest.mark.slow
def test_a_model_says_which_one_it_began_from_also_when_another_has_come_to_its_place(
        world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = write_tiny_model(tmp_path / "theirs")
    begun = model_digest(theirs)
    tracked = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db").model_dump()
    wanted = config(world, tmp_path / "model", workers=1, val=None, init=str(theirs), tracking=tracked)
    result = train.run(wanted)

    recipe = load_model(tmp_path / "model")[1].source["recipe"]
    assert (recipe["init_reference"], recipe["init_digest"]) == (str(theirs), begun)
    from mlflow import MlflowClient

    params = MlflowClient(tracked["uri"]).get_run(result["run_id"]).data.params
    assert (params["init"], params["init_reference"], params["init_digest"]) == (str(theirs), str(theirs), begun)

    theirs.rename(tmp_path / "before")
    write_tiny_model(theirs, seed=1)
    assert train.run(wanted) == result
    assert f"init {theirs} means another model now" in caplog.text
    with pytest.raises(ConfigError, match=r"init: begun with .*theirs.*, now .*before"):
        train.run(config(world, tmp_path / "model", workers=1, val=None, init=str(tmp_path / "before"),
                         tracking=tracked))


def test_a_trunk_that_is_none_is_refused_while_the_output_is_still_free(world: Path, tmp_path: Path) -> None:
    (tmp_path / "trunk.pth").write_text("no weights")
    with pytest.raises(DataError, match=r"trunk .* holds something else than weights"):
        train.run(config(world, tmp_path / "model", trunk=str(tmp_path / "trunk.pth")))
    assert list((tmp_path / "model").iterdir()) == []


def test_workers_without_a_compiler_are_refused_while_the_output_is_still_free(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "why_not_compile", lambda: "there is no C++ compiler: install g++")
    with pytest.raises(ConfigError, match=r"on one there is no C\+\+ compiler: install g\+\+, or leave compile out"):
        train.run(config(world, tmp_path / "model", compile="default"))
    assert list((tmp_path / "model").iterdir()) == []


def same_weights(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], each) for name, each in expected.items())


def test_the_best_checkpoint_is_asked_for_only_where_something_says_which_it_is(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep is best, but without --val nothing says which"):
        train.run(config(world, tmp_path / "model", keep="best", val=None))


@pytest.mark.parametrize(("settings", "why"), [
    ({"register": "pose"}, "--register pose needs MLflow"),
    ({"register": "a/b"}, "'a/b' can't be a registered model's name"),
    ({"register": "pose", "alias": "latest"}, "'latest' can't be an alias"),
    ({"optimiser": {"iterations": 4, "warmup_iterations": 4}}, "warm-up|warmup"),
    ({"augmentation": {"half_body_upper": ["left_wing"]}}, "half_body_upper names left_wing")])
def test_settings_that_could_only_fail_later_are_refused_before_anything_is_written(
        world: Path, tmp_path: Path, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        train.run(config(world, tmp_path / "model", **settings))
    assert not (tmp_path / "model").exists()
