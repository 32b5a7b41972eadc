"""A real S3 server for tests, on loopback and a free port, that keeps a log of what was asked of it."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
               "AWS_EC2_METADATA_DISABLED": "true"}


@dataclass(frozen=True)
class S3Server:
    """A running server; `requests` reads its log."""

    endpoint: str
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        """The AWS settings under which every client finds it."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint}

    def create_bucket(self, name: str) -> str:
        """A new bucket; its URI."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def client(self) -> "boto3.client":
        """A plain boto3 client of it."""
        return boto3.client("s3", endpoint_url=self.endpoint, aws_access_key_id="test", aws_secret_access_key="test",
                            region_name="us-east-1")

    def upload_folder(self, folder: Path, uri: str) -> None:
        """Put each file of a folder under an s3:// prefix."""
        bucket, _, prefix = uri[5:].partition("/")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key = "/".join(filter(None, [prefix, path.relative_to(folder).as_posix()]))
                self.client().put_object(Bucket=bucket, Key=key, Body=path.read_bytes())

    def requests(self, method: str) -> list[str]:
        """The paths of all requests of one method so far, in order."""
        return re.findall(rf'"{method} (\S+) HTTP', self.log.read_text())


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
        _wait_until_it_answers(server, process)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)


def _wait_until_it_answers(server: S3Server, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(300):
        assert process.poll() is None, server.log.read_text()
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{server.endpoint}/moto-api/", timeout=1)
            return
        time.sleep(0.1)
    raise AssertionError("the S3 server did not answer within 30 s")
