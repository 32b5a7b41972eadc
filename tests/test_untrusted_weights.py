"""Weights from anywhere: a pickle among them is refused, wherever it is given, and nothing of it runs.

Published checkpoints and `import-model`: test_checkpoint.py, test_import_model.py.
"""

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import annotate
from jobs.train_start import new_network
from jobs.train_task import INIT_FOLDER
from pipeline import checkpoints
from pipeline.config import AnnotateConfig, TrackingConfig
from pipeline.errors import DataError
from pipeline.model.directory import load_model
from pipeline.model_reference import find_model
from pipeline.promotion import PromotionRefused, TrialPicture, predict_in_fresh_process
from pipeline.shards import ShardDataset
from tests.test_checkpoints import restored
from tests.test_recipes import data, small, task  # noqa: F401 - data is a fixture: a shard dataset
from tests.worlds import NO_TRACKING, write_pictures, write_tiny_model


class Runs:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that leaves a trace if it is read; at the end of the test there is none."""
    content = pickle.dumps({"conv1.weight": Runs(tmp_path / "it-ran")}, protocol=2)
    yield content
    assert not (tmp_path / "it-ran").exists()
    pickle.loads(content)
    assert (tmp_path / "it-ran").exists()  # so it would have


def model_with(weights: bytes, directory: Path) -> Path:
    """A model directory whose weights are these bytes."""
    write_tiny_model(directory)
    (directory / "model.safetensors").write_bytes(weights)
    return directory


def torch_file(evil: bytes, tmp_path: Path) -> bytes:
    """The pickle as torch's own file, which its name promises."""
    torch.save({"conv1.weight": Runs(tmp_path / "it-ran")}, tmp_path / "x.pth")
    return (tmp_path / "x.pth").read_bytes()


def test_a_pickle_in_a_model_directory_is_no_weights(evil: bytes, tmp_path: Path) -> None:
    for number, weights in enumerate((evil, torch_file(evil, tmp_path))):
        with pytest.raises(DataError, match="can't be read as safetensors"):
            load_model(model_with(weights, tmp_path / f"model-{number}"))


@pytest.mark.usefixtures("without_ray")
def test_annotate_refuses_it_and_commits_nothing(evil: bytes, tmp_path: Path) -> None:
    model = model_with(evil, tmp_path / "model")
    pictures = write_pictures(tmp_path / "in", count=1) / "images"
    with pytest.raises(DataError, match="can't be read as safetensors"):
        annotate.run(AnnotateConfig(input=str(pictures), model=str(model), output=str(tmp_path / "out"), actors=1,
                                    boxes="whole-image", tracking=NO_TRACKING))
    assert not list((tmp_path / "out").rglob("part-*"))


@pytest.mark.usefixtures("without_ray")
def test_a_detector_that_is_a_pickle_is_no_onnx_file(evil: bytes, tmp_path: Path) -> None:
    (tmp_path / "detector.onnx").write_bytes(evil)
    pictures = write_pictures(tmp_path / "in", count=1) / "images"
    with pytest.raises(DataError, match=r"detector\.onnx is no ONNX file"):
        annotate.run(AnnotateConfig(input=str(pictures), model=str(write_tiny_model(tmp_path / "model")), actors=1,
                                    output=str(tmp_path / "out"), boxes="detect", tracking=NO_TRACKING,
                                    detector=str(tmp_path / "detector.onnx")))


def test_a_trunk_is_weights_and_nothing_else(evil: bytes, data: ShardDataset, tmp_path: Path) -> None:  # noqa: F811
    contents = {"evil": evil, "torch": torch_file(evil, tmp_path), "empty": b"", "text": b"<html>404</html>",
                "list": pickle.dumps([1, 2], protocol=2)}
    for name, content in contents.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.pth (holds something else|is no state dict).*Give a ResNet-50"):
            new_network(task(small([], trunk=str(tmp_path / f"{name}.pth")), data))


def test_a_model_to_begin_from_is_safetensors(evil: bytes, data: ShardDataset, tmp_path: Path) -> None:  # noqa: F811
    model_with(evil, tmp_path / "out" / INIT_FOLDER)
    with pytest.raises(DataError, match="can't be read as safetensors"):
        new_network(task(small([], init="models:/pose/1", output=str(tmp_path / "out")), data))


def test_a_training_goes_on_from_no_pickle(evil: bytes, tmp_path: Path) -> None:
    for number, content in enumerate((evil, torch_file(evil, tmp_path))):
        output = f"{tmp_path}/out-{number}"
        checkpoints.keep_checkpoint(output, 100, {"state.pt": content, "model.json": b"{}"}, keep_newest=3)
        with pytest.raises(DataError, match="None of the checkpoints"):
            restored(output)


@pytest.mark.slow
def test_a_registered_pickle_is_downloaded_and_never_loaded(evil: bytes, tmp_path: Path) -> None:
    """Somebody who may write to MLflow registers a model whose Python and whose weights are a pickle."""
    import mlflow

    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="tests")
    logged = model_with(evil, tmp_path / "logged" / "artifacts" / "model").parents[1]
    (logged / "python_model.pkl").write_bytes(evil)
    flavour = {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl",
               "cloudpickle_version": "3.1.1", "python_version": "3.11.0"}
    (logged / "MLmodel").write_text(json.dumps({"flavors": {"python_function": flavour}}))
    client = mlflow.MlflowClient(tracking.uri)
    client.create_registered_model("evil")
    client.create_model_version("evil", logged.as_uri())

    found = find_model("models:/evil/1", settings=tracking, into=tmp_path / "downloads")
    with pytest.raises(DataError, match="can't be read as safetensors"):
        load_model(found.directory)
    # `promote` does let MLflow load it, and so runs the code that was stored with it, but no pickle
    with pytest.raises(PromotionRefused, match=r"does not load.*pickle"):
        predict_in_fresh_process("models:/evil/1", str(tracking.uri), TrialPicture(b"", []))
