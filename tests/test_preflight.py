"""`python -m cluster preflight`: what it says of what it finds, by example; and of a real head, store and dashboard."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import verdicts
from cluster.node_facts import Answer, GpuFacts, NodeFacts, StoreFacts, look_at_store
from cluster.preflight import _within
from cluster.verdicts import FAILED, OK, SKIPPED, WARNING
from pipeline import storage
from tests.fault_proxy import FaultProxy
from tests.ray_head import ray_head
from tests.s3 import S3Server

ROOT = Path(__file__).parents[1]
TOKEN = "a-token-for-tests-0123456789"
GIB = 1 << 30
NODE = NodeFacts(versions={"python": "3.11.2", "ray": "2.60.0", "torch": "2.13.0+cpu", "pose-annotation": None},
                 token_auth=True, began_s=1000, ended_s=1003, spill_folder="/tmp/ray", spill_free=50 * GIB,
                 spill_total=100 * GIB, shm_total=8 * GIB)
OPEN, CLOSED = Answer(200, "{}"), Answer(401, "Unauthorized")
GPU = GpuFacts(cuda="13.0", count=1, capabilities=[[8, 6]], architectures=["sm_80", "sm_90"])


def node(**changes: Any) -> NodeFacts:
    return dataclasses.replace(NODE, **changes)


def access(dashboard: Answer | None, *, address: str = "http://10.0.0.1:8265", allow_open: bool = False,
           **changes: Any) -> str:
    return verdicts.judge_access(address, dashboard, {"a": node(**changes)}, addresses=[address],
                                 allow_open=allow_open).verdict


@pytest.mark.parametrize(("package", "theirs"), [("ray", "2.59.0"), ("python", "3.12.1"), ("torch", None)])
def test_a_node_with_another_version_is_named(package: str, theirs: str | None) -> None:
    other = node(versions={**NODE.versions, package: theirs})
    found = verdicts.judge_versions({"a": NODE, "b": other}, driver=NODE)
    assert found.verdict == FAILED
    assert f"b has {package} {theirs}" in found.found
    assert "a has" not in found.found


def test_builds_of_one_version_agree_and_our_package_may_be_shipped() -> None:
    other = node(versions={**NODE.versions, "torch": "2.13.0+cu130", "pose-annotation": "0.1.0"})
    assert verdicts.judge_versions({"a": other}, driver=NODE).verdict == OK


def test_a_cluster_open_to_strangers_fails_unless_that_is_allowed() -> None:
    assert access(OPEN) == FAILED
    assert access(OPEN, allow_open=True) == WARNING
    assert access(CLOSED, token_auth=False) == FAILED
    assert access(None, token_auth=False) == FAILED


def test_a_cluster_with_tokens_or_on_loopback_alone_is_fine() -> None:
    assert access(CLOSED) == OK
    assert access(None) == OK
    assert access(OPEN, address="http://127.0.0.1:8265", token_auth=False) == OK


def test_a_dashboard_that_is_not_reached_is_never_fine() -> None:
    assert access(Answer(None, "refused")) == WARNING
    outside = verdicts.judge_access("http://10.0.0.1:8265", Answer(None, "refused"), {}, addresses=["10.0.0.1"],
                                    allow_open=True)
    assert outside.verdict == FAILED


@pytest.mark.parametrize(("address", "loopback"), [
    ("127.0.0.1:6379", True), ("http://localhost:8265", True), ("[::1]:6379", True), ("0.0.0.0:6379", False),
    ("10.0.0.1", False), ("http://127.0.0.1.example.org", False)])
def test_loopback_is_told_from_its_look_alikes(address: str, loopback: bool) -> None:
    assert verdicts.is_loopback(address) == loopback


@pytest.mark.parametrize(("ahead_s", "verdict"), [(0, OK), (4.9, OK), (-5.1, WARNING), (299, WARNING), (301, FAILED)])
def test_a_clock_counts_by_the_least_that_it_can_be_off(ahead_s: float, verdict: str) -> None:
    # asked at 996 and answered at 1007 by our clock, the node worked 1000 to 1003 by ours: it took 8 s on the way
    facts = node(began_s=1000 + ahead_s, ended_s=1003 + ahead_s)
    low, high = verdicts.offset_bounds(facts, sent_s=996, received_s=1007)
    assert (low, high) == pytest.approx((ahead_s - 4, ahead_s + 4))
    exact = verdicts.offset_bounds(facts, sent_s=1000, received_s=1003)
    assert verdicts.judge_skew({"a": exact}).verdict == verdict


@pytest.mark.parametrize(("changes", "verdict", "word"), [
    ({}, OK, "computed"), ({"cuda": None, "count": 0, "capabilities": []}, FAILED, "CPU build"),
    ({"count": 0, "capabilities": []}, FAILED, "torch 0"), ({"error": "no driver"}, FAILED, "no driver"),
    ({"capabilities": [[7, 5]]}, WARNING, "sm_75")])
def test_gpus_must_be_those_that_ray_counts_and_compute(changes: dict[str, Any], verdict: str, word: str) -> None:
    [found] = verdicts.judge_gpus({"a": 1, "b": 0}, {"a": node(gpu=dataclasses.replace(GPU, **changes)), "b": NODE})
    assert found.verdict == verdict
    assert word in found.found


def test_without_gpus_the_check_is_skipped() -> None:
    assert [one.verdict for one in verdicts.judge_gpus({"a": 0}, {"a": NODE})] == [SKIPPED]


@pytest.mark.parametrize(("free", "verdict"), [(50, OK), (9, WARNING), (4, FAILED)])
def test_what_overflows_needs_room_on_the_disk(free: int, verdict: str) -> None:
    assert verdicts.judge_disk("a", node(spill_free=free * GIB), object_store=10 * GIB).verdict == verdict


def test_a_small_shm_is_a_warning() -> None:
    assert verdicts.judge_shm("a", node(shm_total=64 << 20), object_store=GIB).verdict == WARNING
    assert verdicts.judge_shm("a", NODE, object_store=GIB).verdict == OK


@pytest.mark.parametrize(("uri", "answer", "num_nodes", "verdict"), [
    ("http://m", Answer(200, "3.17.0"), 2, OK), ("http://m", Answer(200, "3.16.2"), 2, WARNING),
    ("http://m", Answer(None, "refused"), 2, FAILED), ("http://m", Answer(401, "Unauthorized"), 2, FAILED),
    ("sqlite:///mlflow.db", None, 2, FAILED), ("sqlite:///mlflow.db", None, 1, OK), (None, None, 2, WARNING)])
def test_mlflow_is_a_server_of_our_version(uri: str | None, answer: Answer | None, num_nodes: int,
                                           verdict: str) -> None:
    found = verdicts.judge_mlflow(uri, {"a": node(mlflow=answer)}, client="3.17.2", num_nodes=num_nodes)
    assert found.verdict == verdict


def test_a_store_that_one_node_cannot_use_fails_and_names_the_node() -> None:
    fine, denied = StoreFacts("s3://b/o", True, list_s=0.1, put_s=0.2), StoreFacts("s3://b/o", True, error="403")
    [found] = verdicts.judge_stores({"here": node(stores=(fine,)), "b": node(stores=(denied,))})
    assert found.verdict == FAILED
    assert "from b: 403" in found.found


def test_an_empty_input_fails_and_an_empty_output_does_not() -> None:
    stores = (StoreFacts("s3://b/i", False, list_s=0.1, empty=True),
              StoreFacts("s3://b/o", True, list_s=0.1, put_s=0.2, empty=True))
    assert [one.verdict for one in verdicts.judge_stores({"here": node(stores=stores)})] == [FAILED, OK]


def run(*arguments: str, environment: dict[str, str]) -> tuple[int, dict[str, dict[str, str]], str]:
    """Exit code, verdicts by check, what people read."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    done = subprocess.run([sys.executable, "-m", "cluster", "preflight", *arguments], cwd=ROOT, text=True, timeout=200,
                          env={**bare, "PYTHONPATH": str(ROOT), **environment}, capture_output=True)
    last = (done.stdout.splitlines() or [""])[-1]
    found = {one["check"]: one for one in json.loads(last)["verdicts"]} if last else {}
    return done.returncode, found, done.stderr


def test_without_a_cluster_the_command_is_wrong() -> None:
    code, found, said = run(environment={})
    assert (code, found) == (2, {})
    assert "--address" in said


def test_a_store_that_ignores_the_condition_fails(faulty_s3: FaultProxy, bucket: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faulty_s3, "ignores_conditions", True)
    facts = look_at_store(f"{bucket}/out", writes=True)
    [found] = verdicts.judge_stores({"here": node(stores=(facts,))})
    assert found.verdict == FAILED
    assert "If-None-Match" in found.found
    assert list(storage.list_objects(bucket)) == []


def test_a_head_with_tokens_and_a_store_pass_and_a_wrong_token_is_named(tmp_path: Path, s3: S3Server,
                                                                        bucket: str) -> None:
    storage.put_if_absent(f"{bucket}/in/a.jpg", b"x")
    storage.put_if_absent(f"{bucket}/other", b"x")
    with ray_head(tmp_path, token=TOKEN) as head:
        asked = ("--input", f"{bucket}/in", "--output", f"{bucket}/out")
        code, found, said = run(*asked, environment=head.environment)
        wrong = {**head.environment, "RAY_AUTH_TOKEN": "another-token-0123456789"}
        outside_code, outside, _ = run("--address", head.dashboard_url, environment=wrong)
    assert code == 0, said
    # how fast the store is on a busy machine is not the claim
    assert {one["verdict"] for one in found.values() if not one["found"].startswith("slow")} <= {OK, SKIPPED}, said
    assert "401" in found["tokens"]["found"]
    assert "this machine, " in found[f"output {bucket}/out"]["found"]  # and the node
    assert {one.name for one in storage.list_objects(bucket)} == {"in/a.jpg", "other"}
    assert TOKEN not in said
    assert outside_code == 1
    assert (outside["tokens"]["verdict"], outside["Ray"]["verdict"]) == (OK, FAILED)
    assert "RAY_AUTH_TOKEN" in outside["Ray"]["remedy"]


def test_what_does_not_answer_is_given_up() -> None:
    with pytest.raises(TimeoutError, match=r"0\.1 s"):
        _within(0.1, lambda: time.sleep(5))


def own_address() -> str:
    """This machine's address beyond loopback; a UDP socket that is connected sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("needs an address beyond loopback")
        return str(one.getsockname()[0])


@pytest.mark.slow
def test_a_head_open_beyond_loopback_is_refused(tmp_path: Path) -> None:
    with ray_head(tmp_path, token=None, ip=own_address()) as head:
        refused, found, said = run(environment=head.environment)
        outside, from_outside, _ = run("--address", head.dashboard_url, environment=head.environment)
        allowed, let_pass, _ = run("--allow-open", environment=head.environment)
    assert (refused, outside, allowed) == (1, 1, 0), said
    assert (found["tokens"]["verdict"], from_outside["tokens"]["verdict"]) == (FAILED, FAILED)
    assert "CVE-2023-48022" in said
    assert let_pass["tokens"]["verdict"] == WARNING
