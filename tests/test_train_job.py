"""`train` as a whole: two workers that train, validate and put a model; the same command again; refusals."""

from pathlib import Path
from typing import Any

import pytest

from jobs import shard, train
from pipeline import storage
from pipeline.config import ShardConfig, TrackingConfig, TrainConfig, load_config
from pipeline.errors import ConfigError
from pipeline.model.directory import load_model, model_digest
from tests.s3 import S3Server
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


@pytest.mark.slow
def test_a_run_that_was_broken_off_goes_on_from_its_last_checkpoint_also_in_a_bucket(
        world: Path, s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.upload_folder(world / "shards", f"{bucket}/shards")
    wanted = config(world, f"{bucket}/model", data=f"{bucket}/shards", workers=1, val=None)
    monkeypatch.setattr(train, "MAX_FAILURES", 0)
    monkeypatch.setattr(train, "train_worker", broken_off_after_two)
    with pytest.raises(OSError, match="broken off"):
        train.run(wanted)
    assert not storage.exists(f"{bucket}/model/model.json")
    assert checkpoints(f"{bucket}/model") == {"iteration-0000002"}

    monkeypatch.undo()
    result = train.run(wanted)

    assert (result["iterations"], result["samples"], result["AP"]) == (4, 16, None)
    assert checkpoints(f"{bucket}/model") == {"iteration-0000002", "iteration-0000004"}


def checkpoints(output: str) -> set[str]:
    names = [found.name for found in storage.list_objects(f"{output}/_checkpoints")]
    return {name.split("/")[0] for name in names if name.endswith("/state.pt")}


def broken_off_after_two(settings: dict[str, Any]) -> None:
    """A worker that ends with an error once its first checkpoint, after two iterations, is kept."""
    from jobs import train_worker

    keep = train_worker._keep

    def keep_and_fail(*given: Any) -> None:
        keep(*given)
        raise OSError("broken off")

    train_worker._keep = keep_and_fail  # type: ignore[assignment]
    train_worker.train_worker(settings)


def test_more_workers_than_shards_are_refused_before_anything_starts(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="50 workers need at least as many shards"):
        train.run(config(world, tmp_path / "model", workers=50))
    assert not (tmp_path / "model" / "_job.json").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_without_a_model(world: Path, tmp_path: Path) -> None:
    optimiser = {"iterations": 4, "warmup_iterations": 0, "batch_size_per_worker": 4, "learning_rate_per_worker": 1e30}
    with pytest.raises(Exception, match=r"The loss of iteration \d is (nan|inf)"):
        train.run(config(world, tmp_path / "model", workers=1, val=None, optimiser=optimiser))
    assert not (tmp_path / "model" / "model.json").exists()
