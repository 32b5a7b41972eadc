"""What MLflow is told of a job that has ended."""

from pathlib import Path

import pytest

from jobs.record import record_run
from pipeline.config import TrackingConfig


def test_a_runs_counts_are_kept_nested_ones_by_their_whole_names(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = record_run(TrackingConfig(uri=uri), "shard", params={"seed": 3},
                        counts={"rows": 2, "reasons": {"empty": 1}}, dataset=("/data", "d1"), read=("s3://raw", "d0"))
    client = MlflowClient(uri)
    run = client.search_runs([client.get_experiment_by_name("pose").experiment_id])[0]
    assert run.info.run_id == run_id
    assert run.data.metrics == {"rows": 2.0, "reasons.empty": 1.0}
    assert run.data.params == {"seed": "3"}
    assert {one.dataset.name: one.dataset.digest for one in run.inputs.dataset_inputs} == {"input": "d0", "shard": "d1"}


def test_an_mlflow_that_is_not_there_is_only_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert record_run(TrackingConfig(uri="http://127.0.0.1:9"), "shard", params={}, counts={}) is None
    assert "not in MLflow" in caplog.text
