"""Importing public checkpoints, from a real web server on loopback that holds files of the published form."""

import http.server
import logging
import os
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import import_model
from jobs.import_model import download, run
from pipeline.config import ImportModelConfig
from pipeline.errors import ConfigError, DataError
from pipeline.model.checkpoint import read_checkpoint
from pipeline.model.directory import load_model, model_digest
from pipeline.storage import StorageError
from tests.published import made_weights, narrow, publish, published_keys


class FilesAndFaults(http.server.SimpleHTTPRequestHandler):
    """Files below a folder; `/short/...` promises 1000 bytes more than come, `/chunked/...` promises nothing."""

    def do_GET(self) -> None:
        kind, _, name = urllib.parse.urlsplit(self.path).path.lstrip("/").partition("/")
        if kind not in ("short", "unsized"):
            super().do_GET()
            return
        data = Path(self.directory, name).read_bytes()
        self.send_response(200)
        if kind == "short":
            self.send_header("Content-Length", str(len(data) + 1000))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "public").mkdir()
    return tmp_path / "public"


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    def handle(*arguments: Any) -> FilesAndFaults:
        return FilesAndFaults(*arguments, directory=str(folder))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handle) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def config(checkpoint: str | Path, output: Path) -> ImportModelConfig:
    return ImportModelConfig(checkpoint=str(checkpoint), output=str(output))


def published(folder: Path, layout: str = "mmpose", *, seed: int = 3) -> Path:
    weights = made_weights(narrow(published_keys(layout, 1)), seed)
    content = {"state_dict": weights, "meta": {"epoch": 1}} if layout == "mmpose" else {"model": weights}
    return publish(folder, content)


@pytest.mark.parametrize(("layout", "colour"), [("mmpose", "RGB"), ("official", "BGR")])
def test_a_file_becomes_a_model_directory(folder: Path, tmp_path: Path, layout: str, colour: str) -> None:
    path = published(folder, layout)
    result = run(config(path, tmp_path / "model"))
    network, spec = load_model(tmp_path / "model")
    expected, _ = read_checkpoint(path)
    assert spec.colour == colour
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert result == {
        "output": str(tmp_path / "model"), "model_digest": model_digest(tmp_path / "model"), "written": True,
        "registered": None, "architecture": "mspn", "num_stages": 1, "skeleton": "coco17", "source": spec.source}
    assert spec.source["checkpoint"] == path.name


def test_a_url_and_a_public_name_give_the_same_model_as_the_file(
        folder: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = published(folder)
    monkeypatch.setitem(import_model.PUBLIC_FILES, "mspn_50", path.name)
    digests = {run(config(path, tmp_path / "a"))["model_digest"],
               run(config(server + path.name, tmp_path / "b"))["model_digest"],
               run(config(f"{server}unsized/{path.name}?x=1", tmp_path / "c"))["model_digest"],
               run(config("mspn_50", tmp_path / "d"), public_folder=server)["model_digest"]}
    assert len(digests) == 1


# the names under which MMPose published them
def test_the_public_names_are_mmposes_files() -> None:
    assert import_model.PUBLIC_FOLDER == "https://download.openmmlab.com/mmpose/top_down/"
    digits = {name: file.split("-")[1][:8] for name, file in import_model.PUBLIC_FILES.items()}
    assert digits == {"mspn_50": "8fbfb5d0", "2xmspn_50": "c8765a5c", "3xmspn_50": "e348f18e", "4xmspn_50": "7b837afb",
                      "rsn_18": "72f4b4a7", "rsn_50": "72ffe709", "2xrsn_50": "50648f0e", "3xrsn_50": "58f57a68",
                      "hrnet_w32": "c78dce93", "hrnet_w48": "b9e0b3ab"}
    assert {file.split("/")[0] for file in import_model.PUBLIC_FILES.values()} == {"mspn", "rsn", "hrnet"}


def test_importing_again_does_nothing_and_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    first, second = published(folder, seed=3), published(folder, seed=4)
    output = tmp_path / "model"
    run(config(first, output))
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}
    assert run(config(first, output))["written"] is False
    with pytest.raises(ConfigError, match="holds another model already"):
        run(config(second, output))
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}
    assert sorted(before) == ["model.json", "model.safetensors"]


def test_a_directory_whose_import_was_interrupted_is_completed(folder: Path, tmp_path: Path) -> None:
    path = published(folder)
    run(config(path, tmp_path / "whole"))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model.safetensors").write_bytes((tmp_path / "whole" / "model.safetensors").read_bytes())
    assert run(config(path, tmp_path / "half"))["written"] is True
    assert model_digest(tmp_path / "half") == model_digest(tmp_path / "whole")


def test_a_download_that_breaks_off_is_an_error_that_counts_the_bytes(
        folder: Path, server: str, tmp_path: Path) -> None:
    path = published(folder)
    size = path.stat().st_size
    with pytest.raises(StorageError, match=f"{size + 1000} bytes were expected, {size} were received"):
        run(config(f"{server}short/{path.name}", tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_a_download_with_another_digest_than_its_name_is_refused(folder: Path, server: str, tmp_path: Path) -> None:
    path = published(folder)
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(DataError, match="SHA-256"):
        run(config(server + path.name, tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_a_download_beyond_the_bound_is_given_up(folder: Path, server: str, tmp_path: Path) -> None:
    path = published(folder)
    with pytest.raises(DataError, match="larger than 1000 bytes"):
        download(server + path.name, tmp_path / "x", max_bytes=1000)


def test_a_download_that_takes_too_long_is_given_up(folder: Path, server: str, tmp_path: Path) -> None:
    path = published(folder)
    with pytest.raises(StorageError, match="before the time was up"):
        download(server + path.name, tmp_path / "x", max_bytes=1 << 30, timeout_s=0)


def test_a_url_that_the_server_does_not_know_is_a_wrong_command(server: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="404"):
        run(config(server + "none.pth", tmp_path / "model"))


def test_a_server_that_is_not_there_is_named_without_its_password(
        server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:1/x\.pth") as refusal:
        run(config("http://user:secret@127.0.0.1:1/x.pth?token=secret", tmp_path / "model"))
    assert "secret" not in str(refusal.value) + caplog.text


@pytest.mark.parametrize("checkpoint", ["5xmspn_50", "file:///etc/hostname", "ftp://host/x.pth", "none.pth"])
def test_what_is_no_file_url_or_name_is_refused_with_the_names(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mspn_50, 2xmspn_50, 3xmspn_50, 4xmspn_50"):
        run(config(checkpoint, tmp_path / "model"))


class Runs:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_published_pickle_that_runs_code_runs_nothing(folder: Path, server: str, tmp_path: Path) -> None:
    path = publish(folder, {"state_dict": {}, "meta": Runs(tmp_path / "it-ran")})
    with pytest.raises(DataError, match="nothing of it was run"):
        run(config(server + path.name, tmp_path / "model"))
    assert not (tmp_path / "it-ran").exists()
    assert not (tmp_path / "model").exists()


def test_an_imported_model_is_registered_under_the_given_name(
        folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], str, str]] = []

    def register(directory: Path, name: str, *, tracking: Any, alias: str) -> dict[str, Any]:
        asked.append((sorted(path.name for path in directory.iterdir()), name, alias))
        return {"reference": f"models:/{name}/1"}

    monkeypatch.setattr(import_model.model_registry, "register_model_directory", register)
    given = ImportModelConfig(checkpoint=str(published(folder)), output=str(tmp_path / "model"), register="pose")
    assert run(given)["registered"] == {"reference": "models:/pose/1"}
    assert asked == [(["model.json", "model.safetensors"], "pose", "candidate")]
