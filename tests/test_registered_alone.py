"""A registered model in an environment that has what its requirements.txt names and nothing else."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import pytest

from jobs.demo import PHOTOGRAPH, SHIPPED_MODEL
from pipeline.config import TrackingConfig
from pipeline.model_registry import register_model_directory
from pipeline.prediction import Predictor
from pipeline.promotion import SCRIPT

PICTURE = Path(matplotlib.get_data_path()) / "sample_data" / PHOTOGRAPH
BOXES = [[0.0, 0.0, 512.0, 600.0], [50.0, 60.0, 300.0, 400.0]]


def run(*command: str | Path, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True,
                          env={"PATH": os.defpath, "HOME": str(folder), **environment})


def environment_of(requirements: Path, folder: Path) -> Path:
    """A new environment's Python. Skips where no package index is in reach."""
    assert run(sys.executable, "-m", "venv", folder, folder=folder.parent).returncode == 0
    python = folder / "bin" / "python"
    pip_settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    smallest = next(line for line in requirements.read_text().splitlines() if line.startswith("pyyaml=="))
    reached = run(python, "-m", "pip", "download", "--no-deps", smallest, folder=folder, **pip_settings)
    if reached.returncode != 0:
        pytest.skip(f"needs a package index: {reached.stderr.splitlines()[-1]}")
    installed = run(python, "-m", "pip", "install", "--requirement", requirements, folder=folder, **pip_settings)
    assert installed.returncode == 0, installed.stderr
    return python


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.timeout(1800)
def test_the_champion_predicts_where_there_is_nothing_but_its_requirements(tmp_path: Path) -> None:
    import mlflow

    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    register_model_directory(SHIPPED_MODEL, "mspn", tracking=tracking, alias="champion")
    mlflow.set_tracking_uri(str(tracking.uri))
    stored = Path(mlflow.artifacts.download_artifacts("models:/mspn@champion", dst_path=str(tmp_path / "stored")))
    python = environment_of(stored / "requirements.txt", tmp_path / "environment")
    (tmp_path / "download").mkdir()
    request = {"tracking_uri": tracking.uri, "reference": "models:/mspn@champion", "boxes": BOXES,
               "picture": base64.b64encode(PICTURE.read_bytes()).decode()}
    (tmp_path / "request.json").write_text(json.dumps(request))

    done = run(python, "-E", "-P", SCRIPT, "request.json", "answer.json", "download", folder=tmp_path)

    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads((tmp_path / "answer.json").read_text())
    assert answer["foreign"] == {}
    expected = Predictor(SHIPPED_MODEL, backend="cpu").predict_persons(cv2.imread(str(PICTURE)), np.array(BOXES))
    joints = np.array(answer["rows"])[:, 7:].reshape(2, 17, 3)
    np.testing.assert_allclose(joints[..., :2], expected.joints_xy, atol=0.01)
    np.testing.assert_allclose(joints[..., 2], expected.joint_scores, atol=1e-4)
    # the project itself isn't there, nor what training alone needs
    assert run(python, "-E", "-P", "-c", "import ray", folder=tmp_path).returncode == 1
    assert run(python, "-E", "-P", "-c", "import pipeline", folder=tmp_path).returncode == 1
