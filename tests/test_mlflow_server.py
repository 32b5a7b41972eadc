"""cluster/mlflow as it is started: what the jobs keep there arrives in the database and on S3, and comes back."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pwd
import re
import signal
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import TrackingConfig
from pipeline.model.directory import ModelSpec, save_model
from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.model_registry import (
    RegisteredVersion,
    file_sha256,
    noted_sha256,
    register_model_directory,
    resolve_model,
)
from pipeline.pose.skeleton import COCO17
from pipeline.tracking import open_run
from tests.mlflow_server import COMPOSE, compose, free_port, mlflow_server
from tests.s3 import S3Server
from tests.worlds import write_pictures

ROOT = COMPOSE.parents[2]
GIVEN = {"MLFLOW_ARTIFACTS": "s3://bucket/mlflow", "POSTGRES_PASSWORD": "p"}
TINY_TRAINING = ("network.num_stages=1", "network.input_size_wh=[64, 64]", "network.blocks=[1, 1, 1, 1]",
                 "network.widths=[4, 4, 4, 4]", "network.stem_channels=4", "network.upsample_channels=8",
                 "optimiser.iterations=4", "optimiser.warmup_iterations=1", "optimiser.batch_size_per_worker=4",
                 "validate_every=2", "threads=1")
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    """The smallest MSPN, with random weights."""
    torch.manual_seed(0)
    network = MSPN(MSPNConfig(num_joints=17, num_stages=1, input_size_wh=(64, 64), blocks=(1, 1, 1, 1),
                              widths=(4, 4, 4, 4), stem_channels=4, upsample_channels=4))
    save_model(tmp_path / "mspn", network, ModelSpec(network=network.config, skeleton=COCO17.to_json()))
    return tmp_path / "mspn"


@pytest.fixture
def no_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs' side has no way to S3, and no rights there."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def postgres() -> Iterator[str]:
    """An empty PostgreSQL with the compose file's user and database; its URI."""
    if not POSTGRES:
        pytest.skip("needs PostgreSQL's server (Debian: apt-get install postgresql), which is not here")
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs psycopg2 (pip install psycopg2-binary), which is not here")
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name, _postgres(Path(name)) as uri:
        yield uri


@contextlib.contextmanager
def _postgres(folder: Path) -> Iterator[str]:
    user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    if user:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    port, data = free_port(), str(folder / "data")
    subprocess.run([POSTGRES[-1] / "initdb", "-D", data, "-U", "mlflow", "--auth=trust"], user=user, check=True,
                   stdout=subprocess.DEVNULL, cwd=folder)
    server = subprocess.Popen([POSTGRES[-1] / "postgres", "-D", data, "-p", str(port), "-k", str(folder),
                               "-c", "listen_addresses=127.0.0.1"], user=user, cwd=folder,
                              stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        create = [POSTGRES[-1] / "psql", "-h", str(folder), "-p", str(port), "-U", "mlflow", "-d", "postgres",
                  "-c", "CREATE DATABASE mlflow"]
        until_up = [POSTGRES[-1] / "pg_isready", "-h", str(folder), "-p", str(port), "-t", "30"]
        for _ in range(100):
            if subprocess.run(until_up, stdout=subprocess.DEVNULL).returncode == 0:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert server.wait(0.2) == 0, "PostgreSQL has ended"
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        uri = compose(GIVEN)["services"]["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
        yield uri.replace("@postgres:5432/", f"@127.0.0.1:{port}/")
    finally:
        server.send_signal(signal.SIGINT)  # "fast": it doesn't wait for whoever is connected
        server.wait(30)


def keep_a_run_and_a_model(uri: str, model_directory: Path, tmp_path: Path) -> None:
    """What a training keeps in MLflow, and what an annotation asks for, through our own functions."""
    import mlflow

    tracking = TrackingConfig(uri=uri, experiment="pose")
    with open_run(tracking, name="train") as run:
        run.log_params({"seed": 3, "optimiser": {"iterations": 10}})
        run.log_metrics({"loss": 0.5}, step=10)
        run.log_picture("samples/0010.png", np.full((4, 6, 3), (255, 0, 0), np.uint8))  # blue, as BGR
        for _ in range(2):  # the second time as after a kill: what is there is found
            made = register_model_directory(model_directory, "pose", tracking=tracking, run_id=run.run_id,
                                            alias="champion")
    client = mlflow.MlflowClient(uri)
    kept = client.get_run(run.run_id)
    assert (kept.info.status, kept.data.metrics) == ("FINISHED", {"loss": 0.5})
    assert kept.data.params == {"seed": "3", "optimiser.iterations": "10"}
    assert [file.path for file in client.list_artifacts(run.run_id, "samples")] == ["samples/0010.png"]

    again = resolve_model("models:/pose@champion", tracking=tracking, into=tmp_path / "loaded")

    assert file_sha256(again) == file_sha256(model_directory)
    noted = noted_sha256(RegisteredVersion("pose", made["version"], run.run_id), tracking=tracking)
    assert (made["version"], noted) == ("1", file_sha256(model_directory))


def keys_below(s3: S3Server, bucket: str, prefix: str) -> list[str]:
    listed = s3.client().list_objects_v2(Bucket=bucket.removeprefix("s3://"), Prefix=prefix)
    return [each["Key"] for each in listed.get("Contents", [])]


def answer(uri: str, **headers: str) -> int:
    """The status that a request for the list of experiments gets."""
    request = urllib.request.Request(f"{uri}/api/2.0/mlflow/experiments/search", data=b'{"max_results": 1}',
                                     headers={"Content-Type": "application/json", **headers})
    try:
        return int(urllib.request.urlopen(request, timeout=30).status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_jobs_keep_runs_and_models_on_the_server_without_any_right_on_s3(
        s3: S3Server, bucket: str, model_directory: Path, tmp_path: Path, no_s3: None) -> None:
    with mlflow_server(tmp_path, artifacts=f"{bucket}/mlflow", store=f"sqlite:///{tmp_path}/mlflow.db",
                       environment=s3.environment) as uri:
        keep_a_run_and_a_model(uri, model_directory, tmp_path)
        statuses = {"plain": answer(uri), "rebinding": answer(uri, Host="evil.example"),
                    "another site": answer(uri, Origin="https://evil.example")}

    stored = keys_below(s3, bucket, "mlflow/")
    assert [key for key in stored if key.endswith("/samples/0010.png")]
    assert [key for key in stored if key.endswith("/model.safetensors")]
    assert not list(tmp_path.glob("mlartifacts*"))
    assert statuses == {"plain": 200, "rebinding": 403, "another site": 403}


@pytest.mark.slow
def test_with_postgresql_runs_and_models_outlive_the_server(
        s3: S3Server, bucket: str, model_directory: Path, tmp_path: Path, no_s3: None, postgres: str) -> None:
    settings = {"artifacts": f"{bucket}/mlflow", "store": postgres, "environment": s3.environment}
    with mlflow_server(tmp_path, **settings) as uri:  # type: ignore[arg-type]
        keep_a_run_and_a_model(uri, model_directory, tmp_path)

    with mlflow_server(tmp_path, **settings) as uri:  # type: ignore[arg-type]
        again = resolve_model("models:/pose@champion", tracking=TrackingConfig(uri=uri), into=tmp_path / "later")

    assert file_sha256(again) == file_sha256(model_directory)


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.timeout(900)
def test_a_model_that_train_registers_is_the_one_that_annotate_takes_by_its_alias(
        s3: S3Server, bucket: str, tmp_path: Path, no_s3: None) -> None:
    import mlflow

    world = write_pictures(tmp_path / "in")
    with mlflow_server(tmp_path, artifacts=f"{bucket}/mlflow", store=f"sqlite:///{tmp_path}/mlflow.db",
                       environment=s3.environment) as uri:
        def job(*arguments: str) -> dict[str, Any]:
            done = subprocess.run([sys.executable, "-m", "jobs", *arguments], capture_output=True, text=True, cwd=ROOT,
                                  env={**os.environ, "MLFLOW_TRACKING_URI": uri})
            assert done.returncode == 0, done.stderr
            answer: dict[str, Any] = json.loads(done.stdout)
            return answer

        shards = str(tmp_path / "shards")
        job("shard", "--images", f"{world}/images", "--annotations", f"{world}/annotations.json", "--output", shards)
        trained = job("train", "--data", shards, "--val", shards, "--output", f"{tmp_path}/model", "--register", "pose",
                      "--workers", "1", *(word for each in TINY_TRAINING for word in ("--set", each)))
        job("annotate", "--input", shards, "--model", "models:/pose@candidate", "--output", f"{tmp_path}/keypoints",
            "--set", "threads=1")
        run = mlflow.MlflowClient(uri).get_run(trained["run_id"])

    assert run.info.status == "FINISHED"
    assert {"loss", "val_ap"} <= run.data.metrics.keys()
    stored = keys_below(s3, bucket, "mlflow/")
    assert [key for key in stored if key.endswith("/validation/iteration-0000004.jpg")]
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "keypoints" / "_model" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_what_must_be_given_is_refused_when_it_is_not() -> None:
    for name in GIVEN:
        with pytest.raises(KeyError, match=name):
            compose({key: value for key, value in GIVEN.items() if key != name})


def test_the_server_is_open_on_this_machine_alone_and_the_database_nowhere() -> None:
    services = compose(GIVEN)["services"]
    assert services["mlflow"]["ports"] == ["127.0.0.1:5000:5000"]
    assert "ports" not in services["postgres"]
    for service in services.values():
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"
        assert "no-new-privileges:true" in service["security_opt"]


def test_the_password_is_in_no_command_and_no_address() -> None:
    services = compose(GIVEN | {"POSTGRES_PASSWORD": "cAnArY"})["services"]
    holders = [(name, key) for name, service in services.items() for key, value in service["environment"].items()
               if "cAnArY" in value]
    assert holders == [("mlflow", "PGPASSWORD"), ("postgres", "POSTGRES_PASSWORD")]
    assert "cAnArY" not in " ".join(services["mlflow"]["command"])


def test_the_servers_version_is_the_projects() -> None:
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    version = next(pin.removeprefix("mlflow==") for pin in pins if pin.startswith("mlflow=="))
    assert version == importlib.metadata.version("mlflow")
    assert compose(GIVEN)["services"]["mlflow"]["image"] == f"pose-mlflow:{version}"
    assert re.search(rf"^mlflow=={re.escape(version)}$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
