"""What one machine finds out about itself and about what it can reach, for `preflight`.

`look_around` runs on each node and in the driver. It judges nothing, raises nothing, and knows no Ray but for the
folders and tokens of the Ray that it runs in.
"""

import base64
import contextlib
import email.utils
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from pipeline import storage
from pipeline.errors import ConfigError

PACKAGES = ("ray", "torch", "pyarrow", "opencv-python-headless", "pose-annotation")
HTTP_TIMEOUT_S = 10
GPU_TIMEOUT_S = 50  # importing torch and opening CUDA take 5 to 20 s
# A child asks: it sees all GPUs of the node without waiting for busy ones, and a crash of CUDA ends the child alone
ASK_TORCH = """
import json, torch
count = torch.cuda.device_count()
found = {"cuda": torch.version.cuda, "count": count, "architectures": torch.cuda.get_arch_list(), "error": None,
         "capabilities": [list(torch.cuda.get_device_capability(i)) for i in range(count)]}
try:
    for i in range(count):
        assert (torch.ones(8, 8, device=f"cuda:{i}") @ torch.ones(8, 8, device=f"cuda:{i}")).sum().item() == 512
except Exception as error:
    found["error"] = str(error).splitlines()[0]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class StoreFacts:
    """One URI from one machine. `error`: what went wrong, remedy and all; None where all was as it should be.

    list_s, put_s   seconds of a first page, and of proving a conditional put (two puts, a get, a delete)
    empty           whether nothing is there
    """

    uri: str
    writes: bool
    error: str | None = None
    list_s: float | None = None
    put_s: float | None = None
    empty: bool = False


@dataclass(frozen=True)
class Answer:
    """An HTTP server's answer: status (None: there was none, and `text` says why), and its Date in seconds."""

    status: int | None
    text: str
    date_s: float | None = None


@dataclass(frozen=True)
class GpuFacts:
    """What torch says of a node's GPUs. `error`: why CUDA didn't compute there; `cuda`: None for a CPU build."""

    cuda: str | None = None
    count: int = 0
    capabilities: list[list[int]] = field(default_factory=list)
    architectures: list[str] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class NodeFacts:
    """One machine. `began_s`, `ended_s`: its own clock; sizes in bytes; a version is None where there is none."""

    versions: dict[str, str | None]
    token_auth: bool
    began_s: float
    ended_s: float
    stores: tuple[StoreFacts, ...] = ()
    mlflow: Answer | None = None
    gpu: GpuFacts | None = None
    spill_folder: str = ""
    spill_free: int = 0
    spill_total: int = 0
    shm_total: int | None = None
    dashboard: Answer | None = None


def look_around(inputs: Sequence[str], outputs: Sequence[str], *, mlflow_uri: str | None = None, gpus: bool = False,
                dashboard_url: str | None = None) -> NodeFacts:
    """This machine's facts. The dashboard is asked without a token, MLflow and stores with this machine's rights."""
    began_s = time.time()
    spill_folder = _spill_folder()
    disk = shutil.disk_usage(spill_folder)
    return NodeFacts(
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        token_auth=_token_auth(),
        stores=tuple([look_at_store(uri, writes=False) for uri in inputs]
                     + [look_at_store(uri, writes=True) for uri in outputs]),
        mlflow=ask_mlflow(mlflow_uri) if mlflow_uri else None,
        gpu=_ask_torch() if gpus else None,
        spill_folder=spill_folder, spill_free=disk.free, spill_total=disk.total,
        shm_total=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        dashboard=ask(f"{dashboard_url}/api/version") if dashboard_url else None,
        began_s=began_s, ended_s=time.time())


def look_at_store(uri: str, *, writes: bool) -> StoreFacts:
    """Whether the URI can be listed and, for an output, takes a put exactly once; the probe is removed again."""
    try:
        storage.describe_object(uri)  # the first request of a process makes the client, which takes a second or two
        began = time.monotonic()
        first = storage.describe_object(uri) or next(storage.list_objects(uri), None)
        listed = time.monotonic()
        if writes:
            storage.prove_put_if_absent(uri)
        put_s = time.monotonic() - listed if writes else None
        return StoreFacts(uri, writes, list_s=listed - began, put_s=put_s, empty=first is None)
    except (ConfigError, OSError) as error:
        return StoreFacts(uri, writes, error=str(error))


def ask(url: str, headers: dict[str, str] | None = None, *, method: str = "GET") -> Answer:
    """What an HTTP server answers, without any proxy: these are addresses of the cluster's own network."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(url, headers=headers or {}, method=method)
        with opener.open(request, timeout=HTTP_TIMEOUT_S) as answer:
            return Answer(answer.status, answer.read(10_000).decode(errors="replace"), _date_s(answer.headers["Date"]))
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.reason, _date_s(error.headers["Date"]))
    except (OSError, ValueError) as error:  # URLError is an OSError
        return Answer(None, str(getattr(error, "reason", error)))


def ask_mlflow(uri: str) -> Answer:
    """What an MLflow server says is its version, with the credentials that MLflow itself would use."""
    parts = urlsplit(uri)
    user = unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    headers = {}
    if user:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    return ask(f"{bare}/version", headers)


def _date_s(date: str | None) -> float | None:
    with contextlib.suppress(TypeError, ValueError):
        return email.utils.parsedate_to_datetime(str(date)).timestamp()
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _token_auth() -> bool:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def _spill_folder() -> str:
    """Where this node's Ray spills objects: its own folder for it, else the session's; "/tmp" outside any Ray."""
    import ray._private.worker

    node = ray._private.worker._global_node
    if node is None:
        return "/tmp"
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        told = json.loads(node._object_spilling_config)["params"]["directory_path"]
        folder = told[0] if isinstance(told, list) else told
        if Path(folder).is_dir():
            return str(folder)
    return str(node.get_session_dir_path())


def _ask_torch() -> GpuFacts:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        asked = subprocess.run([sys.executable, "-c", ASK_TORCH], env=environment, capture_output=True, text=True,
                               timeout=GPU_TIMEOUT_S)
        return GpuFacts(**json.loads(asked.stdout))
    except subprocess.TimeoutExpired:
        return GpuFacts(error=f"torch did not answer within {GPU_TIMEOUT_S} s")
    except ValueError:
        return GpuFacts(error=f"torch ended with {asked.returncode}: {asked.stderr.strip()[-200:]}")
