"""What tracking promises: runs that others can continue, models that come back as they went, no secrets."""

import contextlib
import http.server
import importlib.util
import json
import logging
import re
import socket
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from jobs import evaluate
from pipeline.config import EvaluateConfig, TrackingConfig
from pipeline.errors import ConfigError, DataError
from pipeline.model.directory import ModelSpec, save_model
from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.model_registry import register_model_directory, registered_version, resolve_model
from pipeline.pose.skeleton import COCO17
from pipeline.prediction import Predictor
from pipeline.tracking import (
    Run,
    TrackingError,
    knows_run,
    located,
    open_run,
    without_credentials,
)
from tests.test_evaluation import world  # noqa: F401 - a fixture: one dataset and its annotations


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """One store for the file's tests: creating its tables takes seconds."""
    folder = tmp_path_factory.mktemp("tracking")
    return TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="tests")


@pytest.fixture
def client(tracking: TrackingConfig):
    import mlflow

    return mlflow.MlflowClient(tracking.uri)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest MSPN, with random weights."""
    torch.manual_seed(0)
    network = MSPN(MSPNConfig(num_joints=17, num_stages=1, input_size_wh=(64, 64), blocks=(1, 1, 1, 1),
                              widths=(4, 4, 4, 4), stem_channels=4, upsample_channels=4))
    directory = tmp_path_factory.mktemp("models") / "mspn"
    save_model(directory, network, ModelSpec(network=network.config, skeleton=COCO17.to_json()))
    return directory


@pytest.fixture(scope="module")
def registered(tracking: TrackingConfig, model_directory: Path) -> dict:
    return register_model_directory(model_directory, "mspn", tracking=tracking, alias="champion")


def test_a_run_keeps_what_was_logged(tracking, client):
    with open_run(tracking, name="train") as run:
        run.log_params({"seed": 3, "optimiser": {"iterations": 10}})
        run.log_metrics({"ap": 0.5, "apm": None}, step=7)
        run.set_tags({"dataset": "v1"})
        run.log_dataset("people", "s3://user:secret@bucket/shards", digest="d" * 64, context="training")
        run.log_text("notes/report.txt", "AP 0.5")
        run.log_json("counts.json", {"pictures": 2})

    kept = client.get_run(run.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == "train"
    assert kept.data.params == {"seed": "3", "optimiser.iterations": "10"}
    assert kept.data.metrics == {"ap": 0.5}
    assert client.get_metric_history(run.run_id, "ap")[0].step == 7
    assert kept.data.tags["dataset"] == "v1"
    dataset = kept.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("people", "d" * 36)
    assert json.loads(dataset.source) == {"uri": "s3://bucket/shards"}
    assert {file.path for file in client.list_artifacts(run.run_id)} == {"notes", "counts.json"}


def test_artifacts_lie_beside_the_database(tracking, client):
    with open_run(tracking, name="pictures") as run:
        run.log_picture("persons.png", np.full((4, 6, 3), (255, 0, 0), np.uint8))  # blue, as BGR

    folder = Path(tracking.uri.removeprefix("sqlite:///")).parent / "mlruns"
    from PIL import Image

    picture = Image.open(folder / run.run_id / "artifacts" / "persons.png")
    assert picture.size == (6, 4)
    assert picture.convert("RGB").getpixel((0, 0)) == (0, 0, 255)


def test_another_process_continues_a_run_without_ending_it(tracking, client):
    with open_run(tracking, name="train") as driver:
        with open_run(tracking, name="worker 0", run_id=driver.run_id) as worker:
            worker.log_metrics({"loss": 1.0}, step=1)
        assert client.get_run(driver.run_id).info.status == "RUNNING"

    assert client.get_run(driver.run_id).data.metrics == {"loss": 1.0}
    assert client.get_run(driver.run_id).info.status == "FINISHED"


def test_a_finished_run_takes_metrics_and_stays_finished(tracking, client):
    with open_run(tracking, name="train") as trained:
        pass
    with open_run(tracking, name="evaluate", run_id=trained.run_id) as run:
        run.log_metrics({"ap": 0.7})

    assert client.get_run(trained.run_id).info.status == "FINISHED"
    assert client.get_run(trained.run_id).data.metrics == {"ap": 0.7}


def test_a_job_that_resumes_ends_its_own_run_and_keeps_its_first_parameters(tracking, client):
    with contextlib.suppress(KeyError), open_run(tracking, name="train") as first:
        first.log_params({"workers": 2})
        raise KeyError("the machine was lost")
    assert client.get_run(first.run_id).info.status == "FAILED"

    with open_run(tracking, name="train", run_id=first.run_id, ends=True) as again:
        assert client.get_run(first.run_id).info.status == "RUNNING"
        again.log_params({"workers": 4, "resumed": True})

    kept = client.get_run(first.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"workers": "2", "resumed": "True"}


def test_system_metrics_are_logged_for_this_machine(tracking, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")

    with open_run(tracking, name="busy", system_metrics=True) as run:
        deadline = time.monotonic() + 10
        while not client.get_run(run.run_id).data.metrics and time.monotonic() < deadline:
            time.sleep(0.2)

    assert "system/cpu_utilization_percentage" in client.get_run(run.run_id).data.metrics


def test_mlflow_finds_the_package_without_which_it_leaves_gpus_out_silently():
    assert importlib.util.find_spec("pynvml") is not None, "install nvidia-ml-py (make setup)"


def test_the_null_run_takes_every_call_and_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with open_run(TrackingConfig(enabled=False), name="train", system_metrics=True) as run:
        run.log_params({"seed": 1})
        run.log_metrics({"ap": 1.0}, step=1)
        run.set_tags({"a": 1})
        run.log_dataset("d", "/data", digest="0", context="training")
        run.log_picture("p.png", np.zeros((2, 2, 3), np.uint8))
        run.log_text("t.txt", "t")
        run.log_json("j.json", {})

    assert (run.run_id, run.url) == (None, None)
    assert list(tmp_path.iterdir()) == []


def test_what_mlflow_refuses_is_a_warning_and_the_rest_is_logged(tracking, client, caplog):
    with caplog.at_level(logging.WARNING), open_run(tracking, name="train") as run:
        run.log_metrics({"not/a?name": 1.0, "loss": 2.0})
        run.log_metrics({"ap": 1.0})

    assert "not logged (1 metrics, such as not/a?name of step 0)" in caplog.text
    assert client.get_run(run.run_id).data.metrics == {"ap": 1.0, "loss": 2.0}


class FlakyServer:
    """What a run needs of MLflow's client; it refuses connections while it is `away`."""

    def __init__(self) -> None:
        self.away, self.attempts, self.metrics, self.done = False, 0, [], []

    def reach(self, what: str) -> None:
        self.attempts += 1
        if self.away:
            raise ConnectionError("refused")
        self.done.append(what)

    def log_batch(self, run_id, metrics):
        self.reach("metrics")
        self.metrics += [(each.key, each.step, each.value) for each in metrics]

    def log_text(self, run_id, text, name):
        self.reach(name)

    def set_terminated(self, run_id, status):
        self.reach(status)


@pytest.fixture
def server(monkeypatch) -> FlakyServer:
    monkeypatch.setattr("pipeline.tracking.PAUSE_S", 0.05)
    return FlakyServer()


def test_what_is_logged_while_mlflow_is_away_arrives_when_it_is_back_and_one_warning_says_so(server, caplog):
    caplog.set_level(logging.INFO)
    run = Run(server, location="http://tracking", run_id="1")
    run.log_metrics({"loss": 3.0}, step=1)
    server.away = True
    for step in range(2, 6):
        run.log_metrics({"loss": 3.0 / step}, step=step)
        run.log_text(f"note-{step}.txt", "")
        time.sleep(0.06)
    server.away = False
    run.log_metrics({"loss": 0.5}, step=6)

    assert server.metrics == [("loss", 1, 3.0), *(("loss", step, 3.0 / step) for step in range(2, 6)), ("loss", 6, 0.5)]
    assert server.done[2:] == [f"note-{step}.txt" for step in range(2, 6)]
    assert caplog.text.count("what is logged waits until MLflow is back") == 1
    assert "MLflow is back after" in caplog.text


def test_an_mlflow_that_is_away_is_asked_once_in_a_while(server, monkeypatch):
    monkeypatch.setattr("pipeline.tracking.PAUSE_S", 60)
    server.away = True
    run = Run(server, location="http://tracking", run_id="1")
    for step in range(100):
        run.log_metrics({"loss": 1.0}, step=step)
    assert server.attempts == 1


def test_one_that_lets_us_wait_costs_a_twentieth_of_the_time(server, monkeypatch):
    monkeypatch.setattr(server, "reach", lambda what: time.sleep(0.02) or (_ for _ in ()).throw(TimeoutError()))
    run = Run(server, location="http://tracking", run_id="1")
    began = time.monotonic()
    run.log_metrics({"loss": 1.0})
    assert run._again_at - began >= 0.02 / 0.05


def test_what_waits_at_the_end_is_sent_then_and_what_cannot_be_is_counted(server, caplog):
    server.away = True
    back, gone = (Run(server, location="http://ann:s3cret@tracking", run_id=name) for name in ("1", "2"))
    for run in (back, gone):
        run.log_metrics({"loss": 1.0}, step=1)
        run.log_text("note.txt", "")
    server.away = False
    back.close(end=lambda client, run_id: client.set_terminated(run_id, "FINISHED"))
    assert server.done == ["metrics", "note.txt", "FINISHED"]
    assert back.waiting_metrics() == []

    server.away = True
    gone.close()
    assert "MLflow at http://tracking is not back. It lacks 1 metrics, note.txt" in caplog.text
    assert [(each.name, each.step) for each in gone.waiting_metrics()] == [("loss", 1)]
    assert "s3cret" not in caplog.text


def test_a_run_that_goes_on_is_opened_while_mlflow_is_away(server, monkeypatch, caplog):
    def connect(_):
        if server.away:
            raise TrackingError("MLflow at http://tracking could not be used")
        return server

    monkeypatch.setattr("pipeline.tracking.open_client", connect)
    server.away = True
    settings = TrackingConfig(uri="http://tracking")
    with pytest.raises(TrackingError), open_run(settings, name="train", run_id="1"):
        pass
    with open_run(settings, name="train", run_id="1", must_answer=False) as run:
        run.log_metrics({"loss": 1.0}, step=20)
        server.away = False
        run.flush(now=True)

    assert server.metrics == [("loss", 20, 1.0)]
    assert server.done == ["metrics"]


def test_an_unknown_run_is_refused(tracking):
    with pytest.raises(TrackingError, match="0123abcd"), open_run(tracking, name="train", run_id="0123abcd"):
        pass


def test_an_unreachable_server_is_named_without_its_password_within_seconds(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    uri = f"http://ann:s3cret@127.0.0.1:{port}"
    began = time.monotonic()

    with pytest.raises(TrackingError) as error, open_run(TrackingConfig(uri=uri), name="train"):
        pass

    assert time.monotonic() - began < 30
    assert f"http://127.0.0.1:{port}" in str(error.value)
    assert "tracking.enabled=false" in str(error.value)
    assert "s3cret" not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


class TinyTrackingServer(http.server.BaseHTTPRequestHandler):
    """As much of MLflow's REST interface as one run needs."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        run = {"info": {"run_id": "r1", "experiment_id": "7", "status": "RUNNING"}, "data": {}}
        answer = json.dumps({"experiment": {"experiment_id": "7", "name": "pose", "lifecycle_stage": "active"},
                             "run": run, "run_info": run["info"]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = answer  # noqa: N815 - the names that http.server calls

    def log_message(self, *_: object) -> None:
        pass


def test_a_run_on_a_server_never_shows_the_password(capfd, caplog):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), TinyTrackingServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"

    with caplog.at_level(logging.DEBUG), open_run(TrackingConfig(uri=f"http://ann:s3cret@{address}"), name="x") as run:
        run.log_metrics({"ap": 1.0})
    server.shutdown()

    assert run.url == f"http://{address}/#/experiments/7/runs/r1"
    assert run.url in caplog.text
    assert "s3cret" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(("text", "shown"), [
    ("postgresql://ann:pw@db:5432/mlflow?sslpassword=x", "postgresql://db:5432/mlflow"),
    ("no connection to https://token@host/mlflow, sorry", "no connection to https://host/mlflow, sorry"),
    ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
])  # fmt: skip
def test_credentials_are_taken_out_of_every_address(text, shown):
    assert without_credentials(text) == shown


def test_the_default_place_is_an_absolute_file_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert located(TrackingConfig()).uri == f"sqlite:///{tmp_path}/mlflow.db"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert located(TrackingConfig()).uri == "http://tracking:5000"
    assert located(TrackingConfig(uri="sqlite:///mine.db")).uri == f"sqlite:///{tmp_path}/mine.db"


def test_looking_up_a_model_while_tracking_is_off_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="tracking is off"):
        resolve_model("models:/mspn@champion", tracking=TrackingConfig(enabled=False), into=tmp_path)


@pytest.mark.parametrize("reference", ["models:/mspn", "models:/mspn@", "models:/a/b/c"])
def test_a_misspelt_reference_is_refused_with_the_right_forms(reference, tracking):
    with pytest.raises(ConfigError, match="models:/name@alias"):
        registered_version(reference, tracking=tracking)


@pytest.mark.parametrize("reference", ["models:/other@champion", "models:/mspn@nobody", "models:/mspn/77"])
def test_a_model_that_mlflow_does_not_know_is_a_wrong_command(reference, tracking, registered):
    with pytest.raises(ConfigError, match=re.escape(reference) + ".*doesn't know it"):
        registered_version(reference, tracking=tracking)


def test_a_run_that_mlflow_does_not_know_is_a_wrong_command(tracking, tmp_path):
    with pytest.raises(ConfigError, match=r"runs:/0123/model.*doesn't know it"):
        resolve_model("runs:/0123/model", tracking=tracking, into=tmp_path)


def test_a_folder_without_a_model_is_not_registered(tracking, tmp_path):
    with pytest.raises(DataError, match=r"no model\.json"):
        register_model_directory(tmp_path, "mspn", tracking=tracking)


def test_a_registered_model_comes_back_byte_for_byte(tracking, registered, model_directory, tmp_path):
    for reference in ("models:/mspn@champion", f"models:/mspn/{registered['version']}",
                      f"runs:/{registered['run_id']}/model"):
        found = resolve_model(reference, tracking=tracking, into=tmp_path)

        assert {file.name for file in found.iterdir()} == {"model.json", "model.safetensors"}
        for file in found.iterdir():
            assert file.read_bytes() == (model_directory / file.name).read_bytes()


def test_an_alias_moves_and_a_version_does_not(tracking, registered, model_directory, client):
    first = registered_version("models:/mspn@champion", tracking=tracking)
    with open_run(tracking, name="train") as run:
        again = register_model_directory(model_directory, "mspn", tracking=tracking, run_id=run.run_id,
                                         alias="champion")
        assert client.get_run(run.run_id).info.status == "RUNNING"

    moved = registered_version("models:/mspn@champion", tracking=tracking)
    assert (first.version, first.reference) == ("1", "models:/mspn/1")
    assert (moved.version, moved.run_id) == (again["version"], run.run_id)
    assert registered_version(first.reference, tracking=tracking) == first


def test_the_stored_model_states_its_needs_and_pickles_nothing(tracking, registered):
    import mlflow

    mlflow.set_tracking_uri(tracking.uri)
    folder = Path(mlflow.artifacts.download_artifacts(registered["reference"]))

    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".pkl", ".pt2", ".pth"))]
    assert {"pyfunc.py", "model.safetensors", "prediction.py"} <= names
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert "torch==2.13.0" in requirements
    signature = mlflow.models.Model.load(folder).signature
    assert [(column.name, column.required) for column in signature.inputs] == [("picture", True), ("boxes", False)]


def test_the_stored_model_predicts_what_the_predictor_does(tracking, registered, model_directory):
    import mlflow

    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    data = bytes(cv2.imencode(".png", image)[1])
    boxes = [[5.0, 6.0, 30.0, 40.0], [20.0, 0.0, 50.0, 60.0]]
    mlflow.set_tracking_uri(tracking.uri)
    stored = mlflow.pyfunc.load_model("models:/mspn@champion")

    with_boxes = stored.predict(pd.DataFrame({"picture": [data, data, data], "boxes": [boxes, None, []]}))
    whole = stored.predict(pd.DataFrame({"picture": [data]}))

    expected = Predictor(model_directory).predict_persons(image, np.array([*boxes, [0.0, 0.0, 80.0, 60.0]]))
    assert with_boxes[["picture_index", "person_index"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0]]
    np.testing.assert_allclose(with_boxes["left_hip_x"], expected.joints_xy[:, 11, 0], rtol=1e-5)
    np.testing.assert_allclose(with_boxes["nose_score"], expected.joint_scores[:, 0], rtol=1e-5)
    np.testing.assert_allclose(with_boxes["score"], expected.scores, rtol=1e-5)
    np.testing.assert_allclose(whole["nose_x"], expected.joints_xy[2:, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("boxes", [None, []], ids=["a person", "nobody"])
def test_the_signature_names_what_is_predicted_column_by_column_with_its_type(tracking, registered, boxes):
    import mlflow

    mlflow.set_tracking_uri(tracking.uri)
    stored = mlflow.pyfunc.load_model(registered["reference"])
    picture = bytes(cv2.imencode(".png", np.zeros((60, 80, 3), np.uint8))[1])
    predicted = stored.predict(pd.DataFrame({"picture": [picture], "boxes": [boxes]}))

    joints = [f"{joint}_{value}" for joint in COCO17.joints for value in ("x", "y", "score")]
    assert list(predicted) == ["picture_index", "person_index", "box_x", "box_y", "box_w", "box_h", "score", *joints]
    signed = stored.metadata.signature.outputs
    assert dict(zip(signed.input_names(), signed.numpy_types(), strict=True)) == predicted.dtypes.to_dict()


def test_a_model_that_is_not_ours_is_refused(tracking, tmp_path):
    with open_run(tracking, name="other") as run:
        run.log_text("model/readme.txt", "no model directory")

    with pytest.raises(DataError, match=r"no model\.json"):
        resolve_model(f"runs:/{run.run_id}/model", tracking=tracking, into=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_known_or_not(tracking):
    with open_run(tracking, name="train") as run:
        assert knows_run(run.run_id, tracking=tracking)
    assert not knows_run("0" * 32, tracking=tracking)
    assert not knows_run(run.run_id, tracking=TrackingConfig(enabled=False))


def test_an_evaluation_goes_to_the_models_own_run_where_it_is_known(tracking, client, world):  # noqa: F811
    with open_run(tracking, name="train") as trained:
        pass
    model = Path(world["keypoints"], "_model", "model.json")
    model.parent.mkdir()

    model.write_text(json.dumps({"source": {"run_id": trained.run_id}}))
    result = evaluate.run(EvaluateConfig(**world, tracking=tracking))
    model.write_text(json.dumps({"source": {"run_id": "0" * 32}}))
    elsewhere = evaluate.run(EvaluateConfig(**world, tracking=tracking))

    kept = client.get_run(trained.run_id)
    assert result["run_id"] == trained.run_id
    assert result["complete"] is False  # there is no _SUCCESS
    assert kept.data.metrics["evaluate/ap"] == pytest.approx(1.0)
    assert kept.inputs.dataset_inputs[0].dataset.name == "annotations"
    assert elsewhere["run_id"] not in (None, trained.run_id, "0" * 32)
