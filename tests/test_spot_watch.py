"""A spot machine's notice is read as AWS gives it, and told to Ray as Ray takes it."""

import json
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster import spot_watch
from cluster.hosts import Hosts
from cluster.namespaces import why_not
from cluster.spot_watch import Notice


class Metadata(BaseHTTPRequestHandler):
    """AWS's metadata service, version 2: nothing without a session's token, 404 while no interruption is planned."""

    notices: list[dict[str, str] | None]  # what each look finds; the last one stays

    def do_PUT(self) -> None:
        known = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200 if known else 400, b"session-token")

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != "session-token":
            return self.answer(401)
        if self.path != "/latest/meta-data/spot/instance-action":
            return self.answer(404)
        notice = self.notices.pop(0) if len(self.notices) > 1 else self.notices[0]
        return self.answer(404) if notice is None else self.answer(200, json.dumps(notice).encode())

    def answer(self, code: int, body: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The service's address; a look is due at once."""
    monkeypatch.setattr(spot_watch, "LOOK_EVERY_S", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", address)
        yield address
        server.shutdown()


def in_two_minutes() -> dict[str, str]:
    # https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html: its form of time
    return {"action": "terminate", "time": f"{datetime.now(UTC) + timedelta(seconds=120):%Y-%m-%dT%H:%M:%SZ}"}


def test_nothing_planned_is_no_notice(metadata: str) -> None:
    Metadata.notices = [None]
    assert spot_watch.read_notice(metadata) is None


def test_the_notice_says_how_long_the_machine_has(metadata: str) -> None:
    Metadata.notices = [None, None, in_two_minutes()]
    notice = spot_watch.wait_for_notice(metadata)
    assert notice.action == "terminate"
    assert 110 <= notice.seconds_left <= 120


def test_ray_is_told_once_there_is_a_notice(metadata: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Metadata.notices = [None, in_two_minutes()]
    told: list[Notice] = []
    monkeypatch.setattr(spot_watch, "drain", lambda notice: told.append(notice) or 0)
    assert spot_watch.watch() == 0
    assert [notice.action for notice in told] == ["terminate"]


def test_a_machine_without_metadata_is_told_so(monkeypatch: pytest.MonkeyPatch,
                                               caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    assert spot_watch.watch() == 1
    assert "no machine of AWS" in caplog.text


def test_rays_command_takes_what_it_is_told() -> None:
    from ray.scripts.scripts import drain_node

    context = drain_node.make_context("drain-node", spot_watch.drain_options(Notice("stop", 90)))
    assert context.params["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert context.params["deadline_remaining_seconds"] == 90
    assert context.params["node_id"] is None


# On a worker's host: a metadata service that says what AWS would, and the command as ray_config.yaml starts it.
NOTICED = """
import os, sys, threading
from http.server import ThreadingHTTPServer
from tests.test_spot_watch import Metadata, in_two_minutes
from cluster.__main__ import main
Metadata.notices = [in_two_minutes()]
server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"
sys.exit(main(["spot-watch"]))
"""
GOING = """
import ray
from ray._private.state import state
ray.init(log_to_driver=False)
draining = state.get_draining_nodes()  # a node without work goes at once
print(*(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] in draining or not node["Alive"]))
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_the_node_that_has_a_notice_is_drained_and_no_other(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(tmp_path) as hosts:
        hosts.start_head()
        hosts.start_workers(["worker-1", "worker-2"])
        told = hosts.run("worker-2", [sys.executable, "-c", NOTICED], timeout=60)
        assert told.returncode == 0, told.stdout
        assert "AWS will terminate this machine" in told.stdout
        going = hosts.run("head", [sys.executable, "-c", GOING], timeout=60)
        assert going.stdout.splitlines()[-1] == hosts.host("worker-2").ip, going.stdout
