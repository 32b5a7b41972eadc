"""How large actors are and how many, so that each fits in one node of the cluster."""

import logging

import pytest

from jobs import annotate_pool, start_ray
from pipeline.units import FrozenJob


def cluster_of(nodes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (start_ray, annotate_pool):
        monkeypatch.setattr(module, "node_cpus", lambda: nodes)
    monkeypatch.setattr(start_ray, "num_cpus", lambda: sum(nodes))


def job_of(threads: int) -> FrozenJob:
    intent = {"threads": threads, "backend": "cpu", "boxes": {"kind": "annotated"}}
    return FrozenJob(digest="", intent=intent, plan={}, input={}, about={})


@pytest.mark.parametrize(("nodes", "threads"), [([4], 1), ([2, 2, 2], 1), ([0, 3, 3], 1), ([8], 4), ([0, 4, 4], 4)])
def test_an_actor_takes_no_more_threads_than_a_node_has_cores(
        nodes: list[int], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(nodes, monkeypatch)
    assert start_ray.actor_threads() == threads


def test_there_are_as_many_actors_as_fit_in_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of([0, 6, 6], monkeypatch)  # 12 cores, but a third actor of 4 would find room in neither
    assert annotate_pool.pool_sizes(job_of(threads=4), actors=None, detectors=None).annotators == 2


def test_a_run_whose_actors_fit_nowhere_says_what_it_waits_for(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cluster_of([2, 2], monkeypatch)
    with caplog.at_level(logging.WARNING, logger="jobs.annotate"):
        annotate_pool.pool_sizes(job_of(threads=4), actors=None, detectors=None)
    assert "takes 4 threads, and no node of the cluster has so many cores" in caplog.text
