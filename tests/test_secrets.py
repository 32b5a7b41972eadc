"""No secret is found in anything that a job leaves behind: output, logs, MLflow, Ray's own files."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import storage
from tests.s3 import S3Server
from tests.worlds import write_pictures

ROOT = Path(__file__).parents[1]
CANARY = "cAnArY+SeCrEt/0123456789"
TOKEN = "tOkEn+CaNaRy/9876543210"

pytestmark = pytest.mark.slow


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A short path for Ray's files: a socket's name has at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


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
    failed = job("shard", "--images", "s3://there-is-no-such-bucket/x", "--output", f"{bucket}/other")
    assert (done.returncode, failed.returncode) == (0, 2), done.stderr.decode() + failed.stderr.decode()

    places = {"what was printed": done.stdout + done.stderr + failed.stdout + failed.stderr}
    places |= {found.uri: storage.read_object(found.uri) for found in storage.list_objects(bucket)}
    files = [path for folder in (tmp_path, ray_folder) for path in folder.rglob("*") if path.is_file()]
    places |= {str(path): path.read_bytes() for path in files}
    assert any("mlflow.db" in place for place in places)
    assert any("raylet" in place for place in places)
    assert [place for place, data in places.items() for secret in (CANARY, TOKEN) if secret.encode() in data] == []
