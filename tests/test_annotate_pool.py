"""How large actors are and how many, so that each fits in one node of the cluster, or in one that is yet to come."""

import logging

import pytest

from jobs import annotate_pool, start_ray, train_intent
from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
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


def test_on_a_cluster_without_workers_yet_there_are_as_many_actors_as_are_asked_for_and_none_is_guessed(
        monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of([0], monkeypatch)
    assert annotate_pool.pool_sizes(job_of(threads=4), actors=16, detectors=None) == annotate_pool.PoolSizes(
        annotators=16, detectors=0, cpus=0.9 * 4, gpus=0)
    with pytest.raises(ConfigError, match="--set actors=N"):
        annotate_pool.pool_sizes(job_of(threads=4), actors=None, detectors=None)


def training(monkeypatch: pytest.MonkeyPatch, *, gpus: int, cores: list[int], **settings: str) -> TrainConfig:
    monkeypatch.setattr(train_intent, "num_gpus", lambda: gpus)
    monkeypatch.setattr(start_ray, "node_cpus", lambda: cores)
    return TrainConfig(data=("s3://there/shards",), output="s3://there/model", **settings)


def test_training_is_on_gpus_where_there_are_some_or_some_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_intent.trains_on_gpus(training(monkeypatch, gpus=2, cores=[8]))
    assert not train_intent.trains_on_gpus(training(monkeypatch, gpus=0, cores=[8]))
    assert train_intent.trains_on_gpus(training(monkeypatch, gpus=0, cores=[0], device="cuda"))
    assert not train_intent.trains_on_gpus(training(monkeypatch, gpus=2, cores=[8], device="cpu"))
    with pytest.raises(ConfigError, match="--set device=cuda"):
        train_intent.trains_on_gpus(training(monkeypatch, gpus=0, cores=[0]))


def test_how_many_workers_is_not_guessed_where_gpus_are_yet_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_intent._workers_at_hand(training(monkeypatch, gpus=4, cores=[8])) == "4"
    assert train_intent._workers_at_hand(training(monkeypatch, gpus=0, cores=[8])) == "1"
    with pytest.raises(ConfigError, match="Give --workers"):
        train_intent._workers_at_hand(training(monkeypatch, gpus=0, cores=[8], device="cuda"))
