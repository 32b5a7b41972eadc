"""`train` as a whole: two workers that train, validate and put a model; the same command again; refusals."""

from pathlib import Path
from typing import Any

import pytest

from jobs import shard, train
from pipeline.config import ShardConfig, TrackingConfig, TrainConfig, load_config
from pipeline.errors import ConfigError
from pipeline.model.directory import load_model, model_digest
from tests.worlds import NO_TRACKING, write_pictures

TINY = {"num_stages": 1, "input_size_wh": (64, 64), "blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 4),
        "stem_channels": 4, "upsample_channels": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A shard dataset of 12 made pictures in several shards."""
    folder = write_pictures(tmp_path_factory.mktemp("world"))
    shard.run(ShardConfig(images=str(folder / "images"), annotations=str(folder / "annotations.json"),
                          output=str(folder / "shards"), images_per_shard=4, tracking=NO_TRACKING))
    return folder


def config(world: Path, output: Path | str, **settings: Any) -> TrainConfig:
    optimiser = {"iterations": 4, "warmup_iterations": 1, "batch_size_per_worker": 4}
    return load_config(TrainConfig, flags={
        "data": str(world / "shards"), "val": str(world / "shards"), "output": str(output), "workers": 2,
        "validate_every": 2, "threads": 1, "network": TINY, "optimiser": optimiser,
        "tracking": NO_TRACKING.model_dump(), **settings})


def test_two_workers_make_a_model_that_says_where_it_comes_from_and_a_second_run_does_nothing(
        world: Path, tmp_path: Path) -> None:
    tracked = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db").model_dump()
    wanted = config(world, tmp_path / "model", tracking=tracked, register="pose-test", alias="candidate")
    result = train.run(wanted)

    network, spec = load_model(tmp_path / "model")
    assert network.config.widths == (4, 4, 4, 4)
    assert result["model_digest"] == model_digest(tmp_path / "model")
    assert result["iterations"] == spec.source["iterations"] == 4
    assert result["samples"] == 4 * 4 * 2
    assert 0 <= result["AP"] <= 1
    assert spec.source["data_digest"]
    assert spec.source["packages"]["torch"].startswith("2.")
    assert result["registered"]["version"] == "1"
    assert_run_has_the_numbers(tracked["uri"], result["run_id"])

    assert train.run(wanted) == result
    with pytest.raises(ConfigError, match="seed: begun with 0, now 1"):
        train.run(config(world, tmp_path / "model", tracking=tracked, seed=1))


def assert_run_has_the_numbers(uri: str, run_id: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert {"loss", "loss_stage0_unit4", "learning_rate", "samples_per_second", "input_wait_share", "val_ap",
            "val_pck"} <= run.data.metrics.keys()
    assert run.data.params["optimiser.iterations"] == "4"
    assert run.inputs is not None
    assert {each.tags[0].value for each in run.inputs.dataset_inputs} == {"training", "validation"}
    assert [each.path for each in client.list_artifacts(run_id, "validation")] == [
        "validation/iteration-0000002.jpg", "validation/iteration-0000004.jpg"]


def test_more_workers_than_shards_are_refused_before_anything_starts(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="50 workers need at least as many shards"):
        train.run(config(world, tmp_path / "model", workers=50))
    assert not (tmp_path / "model" / "_job.json").exists()


def test_the_best_checkpoint_is_asked_for_only_where_something_says_which_it_is(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep is best, but without --val nothing says which"):
        train.run(config(world, tmp_path / "model", keep="best", val=None))
