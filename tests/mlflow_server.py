"""A real MLflow server for tests, on loopback, with the command and the settings of cluster/mlflow/compose.yaml."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

COMPOSE = Path(__file__).resolve().parents[1] / "cluster" / "mlflow" / "compose.yaml"


def compose(values: Mapping[str, str]) -> dict[str, Any]:
    """The compose file as Docker reads it, with these variables: ${NAME:-default} and ${NAME:?what is missing}.

    Raises KeyError for one that is needed and isn't given.
    """
    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        return values[name] if default is None else values.get(name, default)

    pattern = r"\$\{(?P<name>\w+)(:-(?P<default>[^}]*)|:\?[^}]*)\}"
    read: dict[str, Any] = yaml.safe_load(re.sub(pattern, value, COMPOSE.read_text()))
    return read


@contextlib.contextmanager
def mlflow_server(folder: Path, *, artifacts: str, store: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Run the compose file's server for the time of the block; its address.

    artifacts    s3://bucket/prefix
    store        the database's URI, instead of the compose file's
    environment  where S3 is, with which rights
    """
    port = free_port()
    service = compose({"MLFLOW_ARTIFACTS": artifacts, "POSTGRES_PASSWORD": "not needed"})["services"]["mlflow"]
    settings = service["environment"] | {
        "MLFLOW_HOST": "127.0.0.1", "MLFLOW_PORT": str(port), "MLFLOW_BACKEND_STORE_URI": store, **environment}
    log = folder / "mlflow.log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", *service["command"]], env={**os.environ, **settings},
                                   cwd=folder, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def free_port() -> int:
    """A port of loopback on which nothing listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until_it_answers(url: str, process: "subprocess.Popen[bytes]", log: Path, *, seconds: int = 120) -> None:
    """Return when the address gives an answer; fails with the log when the process has ended, or with the time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5)
            return
        time.sleep(0.2)
    raise AssertionError(f"no answer from {url} within {seconds} s: {log.read_text()}")
