"""Real S3 servers for tests, on loopback, that keep a log of what was asked of them: moto's, and Ceph's gateway."""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
               "AWS_EC2_METADATA_DISABLED": "true"}
# Ceph 16 refuses the checksums that today's SDKs send by default; it checks Content-MD5
CEPH_SETTINGS = {"AWS_SECRET_ACCESS_KEY": "testtest", "AWS_REQUEST_CHECKSUM_CALCULATION": "WHEN_REQUIRED",
                 "AWS_RESPONSE_CHECKSUM_VALIDATION": "WHEN_REQUIRED"}
CEPH_SCRIPT = Path(__file__).resolve().parents[2] / "shared" / "tools" / "mini_ceph_s3.sh"
CEPH_PORTS = {"monitor": 6789, "gateway": 7480}


@dataclass(frozen=True)
class S3Server:
    """A running server; `requests` reads its log."""

    endpoint: str
    log: Path
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The AWS settings under which every client finds it."""
        return {**CREDENTIALS, **self.settings, "AWS_ENDPOINT_URL": self.endpoint}

    def create_bucket(self, name: str) -> str:
        """A new bucket; its URI."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def client(self) -> "boto3.client":
        """A plain boto3 client of it."""
        return _client(self.endpoint, self.environment["AWS_ACCESS_KEY_ID"], self.environment["AWS_SECRET_ACCESS_KEY"])

    def upload_folder(self, folder: Path, uri: str) -> None:
        """Put each file of a folder under an s3:// prefix."""
        bucket, _, prefix = uri[5:].partition("/")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key = "/".join(filter(None, [prefix, path.relative_to(folder).as_posix()]))
                self.client().put_object(Bucket=bucket, Key=key, Body=path.read_bytes())

    def requests(self, method: str) -> list[str]:
        """The paths of all requests of one method so far, in order."""
        return re.findall(rf'"{method} (\S+) HTTP', self.log.read_text(errors="replace"))


@functools.cache
def _client(endpoint: str, access_key: str, secret_key: str) -> "boto3.client":
    return boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=access_key, aws_secret_access_key=secret_key,
                        region_name="us-east-1")


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run moto's server for the time of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "s3.log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                                   stdout=output, stderr=output, env={**os.environ, **CREDENTIALS},
                                   start_new_session=True)
    server = S3Server(f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_it_answers(f"{server.endpoint}/moto-api/", log, lambda: process.poll() is None)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)


def why_no_ceph() -> str | None:
    """Why Ceph's gateway can't be started here; None if it can."""
    if not CEPH_SCRIPT.is_file():
        return f"needs {CEPH_SCRIPT}, which is not here"
    if missing := [name for name in ("radosgw", "ceph-mon", "ceph-osd", "ceph-mgr", "ceph") if not shutil.which(name)]:
        return f"needs Ceph's {', '.join(missing)} (Debian: radosgw ceph-mon ceph-osd ceph-mgr ceph-common)"
    for role, port in CEPH_PORTS.items():
        with socket.socket() as taken:
            if taken.connect_ex(("127.0.0.1", port)) == 0:
                return f"needs port {port} for Ceph's {role}, and something listens there"
    return None


@contextlib.contextmanager
def ceph_server(folder: Path) -> Iterator[S3Server]:
    """Run a small Ceph with its S3 gateway, in memory, for the time of the block."""
    home = folder / "ceph"
    log = home / "log" / "client.rgw.log"
    try:
        started = subprocess.run(["bash", str(CEPH_SCRIPT)], env={**os.environ, "D": str(home)}, timeout=180,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                 stderr=(folder / "ceph.err").open("wb"))
        assert started.returncode == 0, (folder / "ceph.err").read_text(errors="replace")
        server = S3Server(f"http://127.0.0.1:{CEPH_PORTS['gateway']}", log, CEPH_SETTINGS)
        _wait_until_it_answers(server.endpoint, log, lambda: True)
        yield server
    finally:
        _stop_by_pid_files(home / "run")


def _stop_by_pid_files(folder: Path) -> None:
    # the gateway first: without the others it would wait for them
    paths = sorted(folder.glob("*.pid"))
    for path in paths:
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(path.read_text()), signal.SIGTERM)
    for path in paths:
        with contextlib.suppress(ProcessLookupError, ValueError, FileNotFoundError):
            pid = int(path.read_text())
            for _ in range(50):
                os.kill(pid, 0)
                time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)


def _wait_until_it_answers(url: str, log: Path, lives: Callable[[], bool]) -> None:
    for _ in range(300):
        assert lives(), log.read_text()
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=1)
            return
        time.sleep(0.1)
    raise AssertionError("the S3 server did not answer within 30 s")
