"""A public checkpoint -> a model directory: fetch, check, translate, put, register.

No Ray: it is one file's work. What is downloaded is checked by length and by the digest in its name before it
is opened, and opened without running anything that it holds.
"""

import http.client
import logging
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline import model_registry, storage, tracking
from pipeline.config import ImportModelConfig, locations
from pipeline.errors import ConfigError, DataError
from pipeline.model.checkpoint import read_checkpoint
from pipeline.model.directory import model_digest, save_model
from pipeline.model_reference import put_model

logger = logging.getLogger("jobs.import_model")

# MMPose's on COCO, 256×192; AP on val2017 .723, .754, .758, .765; .704, .724, .748, .750; .746, .756
PUBLIC_FOLDER = "https://download.openmmlab.com/mmpose/top_down/"
PUBLIC_FILES = {
    "mspn_50": "mspn/mspn50_coco_256x192-8fbfb5d0_20201123.pth",
    "2xmspn_50": "mspn/2xmspn50_coco_256x192-c8765a5c_20201123.pth",
    "3xmspn_50": "mspn/3xmspn50_coco_256x192-e348f18e_20201123.pth",
    "4xmspn_50": "mspn/4xmspn50_coco_256x192-7b837afb_20201123.pth",
    "rsn_18": "rsn/rsn18_coco_256x192-72f4b4a7_20201127.pth",
    "rsn_50": "rsn/rsn50_coco_256x192-72ffe709_20201127.pth",
    "2xrsn_50": "rsn/2xrsn50_coco_256x192-50648f0e_20201127.pth",
    "3xrsn_50": "rsn/3xrsn50_coco_256x192-58f57a68_20201127.pth",
    "hrnet_w32": "hrnet/hrnet_w32_coco_256x192-c78dce93_20200708.pth",
    "hrnet_w48": "hrnet/hrnet_w48_coco_256x192-b9e0b3ab_20200708.pth",
}
MAX_BYTES = 4 << 30  # the authors' largest with its optimiser's state is a third of it
SILENCE_TIMEOUT_S = 60
DOWNLOAD_TIMEOUT_S = 3600
BLOCK_BYTES = 1 << 20


def run(config: ImportModelConfig, *, public_folder: str = PUBLIC_FOLDER) -> dict[str, Any]:
    """Import the checkpoint; says where the model is, what it is, and under which name it was registered."""
    config = locations(config, "output")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = fetch_checkpoint(config.checkpoint, Path(folder), public_folder=public_folder)
        network, spec = read_checkpoint(checkpoint, input_size_wh=config.input_size_wh)
        model = Path(folder, "model")
        save_model(model, network, spec)
        written = put_model(model, config.output)
        digest = model_digest(model)
        logger.info("%s: %s, %d stages, %d joints, digest %s%s", config.output, spec.architecture, len(network.heads),
                    spec.network.num_joints, digest[:12], "" if written else "; it was there already")
        registered = _register(model, config.register_as, config) if config.register_as else None
    return {"output": config.output, "model_digest": digest, "written": written, "registered": registered,
            "architecture": spec.architecture, "num_stages": len(network.heads),
            "skeleton": spec.skeleton["name"], "source": spec.source}


def fetch_checkpoint(checkpoint: str, into: Path, *, public_folder: str) -> Path:
    """The checkpoint as a local file under its own name: a path itself, a URL or a public name downloaded.

    A name that is none of these is refused with ConfigError.
    """
    url = public_folder + PUBLIC_FILES[checkpoint] if checkpoint in PUBLIC_FILES else checkpoint
    if url.startswith(("http://", "https://")):
        name = PurePosixPath(unquote(urlsplit(url).path)).name or "checkpoint.pth"
        download(url, into / name, max_bytes=MAX_BYTES)
        return into / name
    if not Path(checkpoint).is_file():
        raise ConfigError(f"--checkpoint {checkpoint}: there is no such file, and it is neither a URL (http, "
                          f"https) nor one of {', '.join(PUBLIC_FILES)}.")
    return Path(checkpoint)


def download(url: str, path: Path, *, max_bytes: int, timeout_s: float = DOWNLOAD_TIMEOUT_S) -> None:
    """Write what the URL holds into a file, whole.

    A server that can't be reached, breaks off or takes too long is a StorageError: the same command may do
    better. More than max_bytes is refused with DataError, a URL that the server doesn't know with
    ConfigError.
    """
    place = tracking.without_credentials(url)
    logger.info("downloading %s", place)
    deadline = time.monotonic() + timeout_s
    try:
        with urllib.request.urlopen(url, timeout=SILENCE_TIMEOUT_S) as answer, path.open("wb") as file:
            expected = answer.headers.get("Content-Length")
            received = _copy(answer.read, file.write, place, max_bytes=max_bytes, deadline=deadline)
    except urllib.error.HTTPError as error:
        kind = ConfigError if error.code in (401, 403, 404, 410) else storage.StorageError
        raise kind(f"{place}: the server answered {error.code} {error.reason}.") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise storage.StorageError(f"{place}: the download failed: {error}. Run the command again.") from None
    if expected is not None and received != int(expected):
        raise storage.StorageError(f"{place}: the download broke off: {expected} bytes were expected, "
                                   f"{received} were received. Run the command again.")


def _copy(read: Callable[[int], bytes], write: Callable[[bytes], Any], place: str, *,
          max_bytes: int, deadline: float) -> int:
    received = 0
    while block := read(BLOCK_BYTES):
        received += len(block)
        if received > max_bytes:
            raise DataError(f"{place} is larger than {max_bytes} bytes, which no checkpoint of these networks is. "
                            "Correct the address.")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{received} bytes came before the time was up")
        write(block)
    return received


def _register(model: Path, name: str, config: ImportModelConfig) -> dict[str, Any]:
    return model_registry.register_model_directory(model, name, tracking=config.tracking, alias=config.alias)
