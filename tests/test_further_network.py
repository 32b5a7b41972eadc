"""A network that no part of the program knows is trained, stored and used by all of them once it has its two lines."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.train_start import new_network
from jobs.train_task import Worker, schedule_of
from jobs.train_worker import _step
from pipeline import training
from pipeline.model.architectures import NETWORKS, Built
from pipeline.model.directory import load_model, save_model
from pipeline.model.settings import ARCHITECTURES, Architecture, GaussianLoss, InferenceConfig
from pipeline.prediction import Predictor
from tests import test_networks
from tests.simple_baseline import SimpleBaseline, SimpleConfig, SimpleSettings
from tests.test_recipes import first_batch, recipe, task
from tests.test_training import made_shards

LIKE_HRNET = InferenceConfig(colour="RGB", box_padding_wh=(1.25, 1.25), decoding="hrnet", blur_kernel=1)
# all that is tried of each network, but for the one that asks for the configuration's own list
TRIED = [test for name, test in vars(test_networks).items() if name.startswith("test_")]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that docs/architectures.md asks for."""
    monkeypatch.setitem(ARCHITECTURES, "simple", Architecture(SimpleSettings, GaussianLoss(), LIKE_HRNET))
    monkeypatch.setitem(NETWORKS, "simple", Built(SimpleConfig, SimpleBaseline))
    monkeypatch.setitem(test_networks.SMALL, "simple", {"width": 8})


@pytest.mark.parametrize("test", TRIED, ids=lambda test: test.__name__.removeprefix("test_"))
def test_it_passes_what_every_network_does(test: Any, tmp_path: Path) -> None:
    given = {"name": "simple", "tmp_path": tmp_path, "backend": "cpu"}
    test(**{name: given[name] for name in inspect.signature(test).parameters})


def test_the_training_jobs_steps_teach_it_and_its_model_is_used(tmp_path: Path) -> None:
    data = made_shards(tmp_path / "data", num_shards=1)
    known = ARCHITECTURES["simple"]
    config = recipe([]).model_copy(update={"loss": known.loss, "inference": known.inference,
                                           "network": SimpleSettings(input_size_wh=(64, 64), width=8)})
    given = task(config, data)
    network, spec = new_network(given)
    assert (spec.architecture, spec.colour, spec.decoding.variant) == ("simple", "RGB", "hrnet")
    optimiser = training.make_optimiser(network, weight_decay=0.0)
    worker = Worker(given, 0, 1, torch.device("cpu"), spec, network.train(), network, optimiser, 0, (0,))
    batch = first_batch(given, spec)
    losses = [float(_step(worker, batch, schedule_of(config, world=1)).loss) for _ in range(8)]
    assert losses[-1] < losses[0]

    save_model(tmp_path / "model", network.eval(), spec)
    crops = training.as_batch(batch, torch.device("cpu")).crops.numpy()
    joints_xy, scores = Predictor(load_model(tmp_path / "model")).predict_crops(crops)
    assert joints_xy.shape == (*scores.shape, 2) == (len(crops), 17, 2)
