"""No secret is found in anything that a job leaves behind: output, logs, MLflow, Ray's own files; nor in what it tells
Ray, which shows it on its dashboard."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import start_ray, train
from pipeline import storage
from pipeline.config import TrackingConfig
from tests.s3 import S3Server
from tests.test_recipes import data, small, task  # noqa: F401 - data is a fixture: a shard dataset
from tests.worlds import write_pictures, write_tiny_model

ROOT = Path(__file__).parents[1]
CANARY = "cAnArY+SeCrEt/0123456789"
TOKEN = "tOkEn+CaNaRy/9876543210"
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_USERNAME",
           "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN")


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every secret that a job's environment may hold is a canary, and so is the password in MLflow's address."""
    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:{CANARY}@mlflow:5000")


@pytest.mark.usefixtures("canaries")
@pytest.mark.parametrize("address", [None, "ray://head:10001"])
def test_a_job_brings_ray_no_environment(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    import ray

    given: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **settings: given.append(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests have one running
    monkeypatch.setattr(start_ray, "_resources", lambda: "")
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with start_ray.start_ray():
        pass
    assert len(given) == 1
    assert "runtime_env" not in given[0]
    assert CANARY not in repr(given)


@pytest.mark.usefixtures("canaries")
def test_what_ray_train_shows_of_a_training_has_no_secret(
        data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    import ray
    from ray.train.v2._internal.state.schema import _to_json_serializable_value

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4})
    tracked = TrackingConfig(uri=f"http://ann:{CANARY}@mlflow:5000").model_dump()
    given = task(small([], output=str(tmp_path), device="cpu", tracking=tracked), data)
    given.intent["workers"] = "2"
    trainer = train._trainer(given)

    # what Ray's own state keeps of a run for its dashboard
    shown = [_to_json_serializable_value(trainer.train_loop_config), repr(trainer.run_config)]
    assert "batch_size_per_worker" in str(shown[0])
    assert CANARY not in str(shown)
    assert {name.partition("_")[0] for name in trainer.run_config.worker_runtime_env["env_vars"]} == {
        "OMP", "GOMP", "RAY"}


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A short path for Ray's files: a socket's name has at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_secrets_are_in_no_output_no_log_no_parameter_and_no_file_of_ray(
        tmp_path: Path, s3: S3Server, bucket: str, ray_folder: Path) -> None:
    s3.upload_folder(write_pictures(tmp_path / "in", count=3), f"{bucket}/in")
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": CANARY, "AWS_SESSION_TOKEN": TOKEN,
                   "RAY_TMPDIR": str(ray_folder), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}

    def job(*arguments: str) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run([sys.executable, "-m", "jobs", *arguments], env=environment, cwd=ROOT,
                              capture_output=True)

    done = job("shard", "--images", f"{bucket}/in/images", "--annotations", f"{bucket}/in/annotations.json",
               "--output", f"{bucket}/out", "--result", f"{bucket}/result.json")
    annotated = job("annotate", "--input", f"{bucket}/out", "--model", str(write_tiny_model(tmp_path / "model")),
                    "--output", f"{bucket}/keypoints", "--result", f"{bucket}/annotated.json")
    failed = job("shard", "--images", "s3://there-is-no-such-bucket/x", "--output", f"{bucket}/other")
    printed = b"".join(one.stdout + one.stderr for one in (done, annotated, failed))
    assert (done.returncode, annotated.returncode, failed.returncode) == (0, 0, 2), printed.decode()

    places = {"what was printed": printed}
    places |= {found.uri: storage.read_object(found.uri) for found in storage.list_objects(bucket)}
    files = [path for folder in (tmp_path, ray_folder) for path in folder.rglob("*") if path.is_file()]
    places |= {str(path): path.read_bytes() for path in files}
    assert any("mlflow.db" in place for place in places)
    assert any("raylet" in place for place in places)
    assert [place for place, found in places.items() for secret in (CANARY, TOKEN) if secret.encode() in found] == []
