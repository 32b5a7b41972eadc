"""How many cores a process takes for its own."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import start_ray, train_worker
from pipeline.cores import usable_cores


@pytest.fixture
def pinned() -> Iterator[None]:
    """This process runs on one core alone, as after `taskset`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


# as the kernel's documentation has these files: cgroup-v2.rst (cpu.max: "$MAX $PERIOD"), sched-bwc.rst
@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(("files", "cores"), [
    ({"cpu.max": "300000 100000\n"}, 3),
    ({"cpu.max": "350000 100000\n"}, 3),  # a pod's limit of 3500m: the fourth thread would wait for half of each period
    ({"cpu.max": "50000 100000\n"}, 1),
    ({"cpu.max": "1600000 100000\n"}, 8),
    ({"cpu.max": "max 100000\n"}, 8),
    ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ({}, 8)], ids=str)
def test_a_containers_limit_counts(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert usable_cores(write(tmp_path, files)) == cores


@pytest.mark.usefixtures("pinned")
def test_a_pinned_process_has_the_cores_that_it_may_run_on() -> None:
    assert usable_cores() == 1


@pytest.mark.usefixtures("pinned")
def test_a_training_worker_shares_out_the_cores_that_it_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.train

    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_local_world_size=lambda: 1))
    assert train_worker._threads() == 1


@pytest.mark.usefixtures("pinned")
def test_a_local_ray_has_no_more_cores_than_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(start_ray, "_nodes", lambda: [{"CPU": 4.0}])
    assert start_ray.node_cpus() == [1]
