"""The node types of ray_config.yaml come when work waits, and go when it is done; `annotate` takes all that come."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.growing_cluster import MOST, ROOT, TOKEN

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.endurance, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, Any]]:
    """What `tests.growing_cluster` saw."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root and unshare (util-linux), for namespaces of its own")
    folder = Path(tempfile.mkdtemp(prefix="grow-", dir="/tmp"))  # short: a socket's name has at most 107 characters
    try:
        apart = ("unshare", "-pfm", "--kill-child", "--mount-proc")
        settings = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        done = subprocess.run([*apart, sys.executable, "-m", "tests.growing_cluster", str(folder)], cwd=ROOT,
                              env=settings, capture_output=True, text=True, timeout=560)
        assert done.returncode == 0, done.stderr[-6000:]
        yield json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_where_nothing_is_yet_nothing_is_guessed(seen: dict[str, Any]) -> None:
    assert seen["before"] == {}
    assert "--set actors=N" in seen["refused"]


def test_a_gpu_pool_of_units_fills_every_machine_that_it_asks_for(seen: dict[str, Any]) -> None:
    assert seen["nodes_that_worked"] == MOST + MOST
    assert seen["gpu_machines"] == {"gpu_spot": MOST, "gpu_on_demand": MOST}


def test_decoders_bring_machines_without_gpus_and_take_no_room_from_those_that_annotate(seen: dict[str, Any]) -> None:
    found = seen["decoders"]
    assert found["units"] == 40
    assert found["annotated_on"] == MOST + MOST
    assert found["machines"]["gpu_spot"] == found["machines"]["gpu_on_demand"] == MOST
    assert found["decoded_on"]["no GPU"] > 0


def test_machines_without_work_go(seen: dict[str, Any]) -> None:
    assert seen["gone_after_s"] < 120


def test_work_for_cpus_starts_no_gpu(seen: dict[str, Any]) -> None:
    assert seen["ok"] == 12
    assert set(seen["cpu_machines"]) == {"cpu_spot"}
