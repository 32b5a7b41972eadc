"""The jobs as they are submitted: `ray job submit -- python -m jobs ...`, to a head that asks for a token."""

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from tests.ray_head import RayHead, ray_head
from tests.s3 import S3Server
from tests.worlds import annotated_persons, write_pictures, write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
RAY = (sys.executable, "-m", "ray.scripts.scripts")
TOKEN = "a-token-of-this-test-0123456789abcdef"
TINY = ("network.input_size_wh=[64, 64]", "network.widths=[4, 4, 4, 4]", "network.stem_channels=4",
        "network.upsample_channels=8", "optimiser.iterations=6", "optimiser.warmup_iterations=1", "validate_every=3")


@dataclass(frozen=True)
class Submitter:
    """Whoever has the head's address and perhaps its token."""

    head: RayHead

    def submit(self, *arguments: str, wait: bool = True, token: str = TOKEN) -> "subprocess.CompletedProcess[str]":
        """Ray's own command with a job of ours behind it, as docs/operations.md submits a training."""
        options = [] if wait else ["--no-wait"]
        return self._ray("job", "submit", *options, "--working-dir", ".", "--", "env", "POSE_GIT_REVISION=1a2b3c4",
                         "python", "-m", "jobs", *arguments, token=token)

    def stop(self, submission: str) -> None:
        self._ray("job", "stop", submission)

    def status(self, submission: str) -> str:
        return self._ray("job", "status", submission).stdout

    def _ray(self, *arguments: str, token: str = TOKEN) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*RAY, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=400,
                              env={**os.environ, **self.head.environment, "RAY_AUTH_TOKEN": token})


@pytest.fixture(scope="module")
def submitter(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submitter]:
    """A head whose jobs find the S3 server, an MLflow of their own, and this project's Python."""
    folder = tmp_path_factory.mktemp("head")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        environment.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        with ray_head(folder, token=TOKEN) as head:
            yield Submitter(head)


def result(uri: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(storage.read_object(uri))
    return found


def test_what_is_uploaded_is_the_code_and_the_small_model(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    create_package(str(ROOT), tmp_path / "sent.zip", include_gitignore=True, include_parent_dir=False, excludes=[])
    with zipfile.ZipFile(tmp_path / "sent.zip") as sent:
        folders = {name.partition("/")[0] for name in sent.namelist() if "/" in name.rstrip("/")}
    assert folders == {"pipeline", "jobs", "cluster", "models"}
    assert (tmp_path / "sent.zip").stat().st_size < 15_000_000  # of the 100 MB at which Ray begins to warn


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.timeout(900)
def test_the_whole_line_is_submitted_job_by_job(submitter: Submitter, s3: S3Server, bucket: str,
                                                tmp_path: Path) -> None:
    world = write_pictures(tmp_path / "in")
    s3.upload_folder(world, f"{bucket}/in")
    line = {
        "shard": ("--images", f"{bucket}/in/images", "--annotations", f"{bucket}/in/annotations.json",
                  "--output", f"{bucket}/shards", "--images-per-shard", "4"),
        "train": ("--config", "jobs/train_small.yaml", "--data", f"{bucket}/shards", "--val", f"{bucket}/shards",
                  "--output", f"{bucket}/model", *(part for each in TINY for part in ("--set", each))),
        "annotate": ("--input", f"{bucket}/shards", "--model", f"{bucket}/model", "--output", f"{bucket}/keypoints"),
        "evaluate": ("--keypoints", f"{bucket}/keypoints", "--annotations", f"{bucket}/in/annotations.json")}
    for job, arguments in line.items():
        done = submitter.submit(job, *arguments, "--result", f"{bucket}/results/{job}.json")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        assert result(f"{bucket}/results/{job}.json")["job"] == job
        assert TOKEN not in done.stdout + done.stderr
    assert result(f"{bucket}/model/model.json")["source"]["git_revision"] == "1a2b3c4"
    assert storage.exists(f"{bucket}/keypoints/_SUCCESS")
    assert result(f"{bucket}/results/annotate.json")["counts"]["persons"] == annotated_persons(world)


@pytest.mark.slow
def test_a_wrong_command_fails_and_a_stranger_is_turned_away(submitter: Submitter, bucket: str) -> None:
    wrong = submitter.submit("shard", "--images", f"{bucket}/in", "--output", f"{bucket}/out", "--image", "2")
    assert wrong.returncode == 1  # Ray's, for every failure: ours was 2
    assert "--image" in wrong.stdout
    stranger = submitter.submit("shard", "--images", f"{bucket}/in", "--output", f"{bucket}/out", token="another" * 5)
    assert stranger.returncode != 0
    assert "token" in (stranger.stdout + stranger.stderr).lower()
    assert list(storage.list_objects(bucket)) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_job_goes_on_by_the_same_command(submitter: Submitter, s3: S3Server, bucket: str,
                                                   tmp_path: Path) -> None:
    s3.upload_folder(write_pictures(tmp_path / "in", count=200) / "images", f"{bucket}/images")
    model = write_tiny_model(tmp_path / "model")
    command = ("annotate", "--input", f"{bucket}/images", "--model", str(model), "--boxes", "whole-image",
               "--output", f"{bucket}/out", "--set", "pictures_per_unit=2", "--set", "actors=1",
               "--result", f"{bucket}/result.json")
    began = submitter.submit(*command, wait=False)
    submission = next(word for word in began.stdout.replace("'", " ").split() if word.startswith("raysubmit_"))
    while not (before := parts(bucket)):
        assert "FAILED" not in submitter.status(submission)
        time.sleep(0.5)
    submitter.stop(submission)
    assert "was stopped" in submitter.status(submission)
    assert not storage.exists(f"{bucket}/out/_SUCCESS")
    assert not storage.exists(f"{bucket}/result.json")

    again = submitter.submit(*command)
    assert again.returncode == 0, again.stdout[-4000:]
    assert storage.exists(f"{bucket}/out/_SUCCESS")
    assert len(parts(bucket)) == 100
    assert before.items() <= parts(bucket).items()  # what was committed stays as it was
    assert result(f"{bucket}/result.json")["units_annotated"] <= 100 - len(before)


def parts(bucket: str) -> dict[str, str]:
    """The committed parts and their ETags."""
    return {found.name: found.etag for found in storage.list_objects(f"{bucket}/out/keypoints")}
