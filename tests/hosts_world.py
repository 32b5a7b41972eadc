"""Several hosts with pictures in their S3 server, and jobs that are run on the head as a user runs them."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.hosts import ROOT, Hosts
from pipeline import storage
from tests.s3 import S3Server

WAIT_S = 300
# What the S3 server holds goes to a file and back: it keeps all in memory
SAVE = """
import pickle, sys, boto3
s3 = boto3.client("s3", endpoint_url=sys.argv[2])
pages = s3.get_paginator("list_objects_v2").paginate(Bucket="pose")
found = [(key["Key"], s3.get_object(Bucket="pose", Key=key["Key"])) for page in pages for key in page["Contents"]]
kept = [{"Key": key, "Metadata": one["Metadata"], "Body": one["Body"].read()} for key, one in found]
open(sys.argv[1], "wb").write(pickle.dumps(kept))
"""
RESTORE = """
import pickle, sys, boto3
from botocore.config import Config
# it has just begun
s3 = boto3.client("s3", endpoint_url=sys.argv[2], config=Config(retries={"total_max_attempts": 10}))
s3.create_bucket(Bucket="pose")
for one in pickle.loads(open(sys.argv[1], "rb").read()):
    s3.put_object(Bucket="pose", **one)
"""


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, its last line on stdout, what people read."""

    code: int
    result: dict[str, Any]
    said: str


@dataclass
class Job:
    """A command that runs on a head."""

    process: "subprocess.Popen[str]"
    log: Path

    def said(self) -> str:
        """What people read so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, happens: Callable[[], object], *, within_s: float = WAIT_S) -> float:
        """Wait until it happens while the job runs; the seconds that this took."""
        began = time.monotonic()
        while not happens():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.said()[-5000:]}"
            assert time.monotonic() - began < within_s, self.said()[-5000:]
            time.sleep(0.1)
        return time.monotonic() - began

    def end(self) -> Ended:
        """Wait for its end."""
        try:
            stdout, _ = self.process.communicate(timeout=WAIT_S)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            raise AssertionError(f"still at work after {WAIT_S} s: {self.said()[-5000:]}") from error
        lines = stdout.splitlines()
        result = json.loads(lines[-1]) if self.process.returncode == 0 and lines else {}
        return Ended(self.process.returncode, result, self.said())

    def succeed(self) -> Ended:
        """Wait for its end, which must be 0."""
        ended = self.end()
        assert ended.code == 0, ended.said[-5000:]
        return ended


def start_job(hosts: Hosts, *arguments: str) -> Job:
    """`python -m jobs ...` on the newest head."""
    log = hosts.folder / f"job-{time.time_ns()}.log"
    with log.open("w") as said:
        process = hosts.popen(hosts.head, [sys.executable, "-m", "jobs", *arguments], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=said, text=True)
    return Job(process, log)


def submit_job(hosts: Hosts, *arguments: str) -> str:
    """`ray job submit -- python -m jobs ...`, which must succeed; what it printed."""
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--working-dir={ROOT}", "--"]
    submitted = hosts.run(hosts.head, [*submit, sys.executable, "-m", "jobs", *arguments], timeout=WAIT_S)
    assert submitted.returncode == 0, submitted.stdout[-5000:]
    return submitted.stdout


def s3_of(hosts: Hosts) -> S3Server:
    """The hosts' S3 server."""
    return S3Server(hosts.environment["AWS_ENDPOINT_URL"], hosts.folder / "s3.log")


def restart_s3(hosts: Hosts, *, away_s: float) -> None:
    """Out of reach for so long, and meanwhile another process with the same objects: connections are gone."""
    host, kept, begun = hosts.host("s3"), str(hosts.folder / "s3.pickle"), time.monotonic()
    host.cut()
    for script in (SAVE, RESTORE):
        if script is RESTORE:
            hosts.restart("s3")
        done = hosts.run("s3", [sys.executable, "-c", script, kept, hosts.environment["AWS_ENDPOINT_URL"]])
        assert done.returncode == 0, done.stdout
    time.sleep(max(0.0, away_s - (time.monotonic() - begun)))
    host.mend()


def parts(output: str) -> dict[str, str]:
    """The names of an output's committed parts, and their ETags."""
    return {found.name: found.etag for found in storage.list_objects(storage.join(output, "keypoints"))}


def hosts_at_work(hosts: Hosts, title: str) -> list[str]:
    """The names of the hosts in which an actor of that class runs now."""
    return [name for name, host in hosts.network.hosts.items()
            if any(title in command for command in map(_command, host.pids()))]


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline()[:1])
    except psutil.Error:
        return ""
