"""The model that comes with the project: it is what its card says it is, and it finds a person's joints."""

import hashlib
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest

from jobs.demo import PHOTOGRAPH, SHIPPED_MODEL
from pipeline.config import TrainConfig, load_config
from pipeline.model.directory import load_model, model_digest
from pipeline.pose.skeleton import COCO17
from pipeline.prediction import Predictor

CARD = SHIPPED_MODEL / "README.md"
# read off the photograph by eye, in pixels; left and right are the person's
SEEN_XY = {"nose": (268, 228), "left_eye": (308, 188), "right_eye": (225, 190), "left_ear": (362, 225),
           "right_ear": (165, 232), "left_shoulder": (430, 395), "right_shoulder": (85, 395)}


def test_the_card_is_that_of_these_files() -> None:
    card = CARD.read_text()
    assert model_digest(SHIPPED_MODEL) in card
    assert hashlib.sha256((SHIPPED_MODEL / "model.safetensors").read_bytes()).hexdigest() in card


def test_it_is_small_and_the_recipe_beside_it_makes_such_a_network() -> None:
    network, spec = load_model(SHIPPED_MODEL)
    assert (SHIPPED_MODEL / "model.safetensors").stat().st_size <= 10e6
    assert tuple(spec.skeleton["joints"]) == COCO17.joints
    recipe = load_config(TrainConfig, files=[str(SHIPPED_MODEL / "train.yaml")], flags={"data": "d", "output": "o"})
    assert recipe.network.model_dump() == network.config.model_dump(exclude={"num_joints"})
    assert f"{sum(weights.numel() for weights in network.parameters()):,}" in CARD.read_text()


def test_nothing_in_it_names_the_machine_on_which_it_was_trained() -> None:
    assert "/" not in "".join(load_model(SHIPPED_MODEL)[1].source["data"])


@pytest.mark.parametrize("backend", ["plain", "cpu"])
def test_it_finds_what_there_is_in_a_portrait_and_is_less_sure_of_the_rest(backend: str) -> None:
    picture = cv2.imread(str(Path(matplotlib.get_data_path()) / "sample_data" / PHOTOGRAPH))
    height, width = picture.shape[:2]
    found = Predictor(SHIPPED_MODEL, backend=backend).predict_persons(picture, np.array([[0.0, 0.0, width, height]]))
    joints_xy = dict(zip(COCO17.joints, found.joints_xy[0], strict=True))
    scores = dict(zip(COCO17.joints, found.joint_scores[0], strict=True))
    off = {name: float(np.hypot(*(joints_xy[name] - expected))) for name, expected in SEEN_XY.items()}
    assert max(off.values()) < 40, off  # two cells of the heatmaps
    assert min(scores[name] for name in SEEN_XY) > max(scores[name] for name in set(scores) - set(SEEN_XY))
