"""How large actors are and how many, so that each fits in one node of the cluster, or in one that is yet to come."""

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from jobs import annotate_pool, start_ray, train_feed, train_intent
from jobs.train_task import Worker
from pipeline.config import AnnotateConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.units import FrozenJob


def cluster_of(nodes: list[int], monkeypatch: pytest.MonkeyPatch, *, gpus: list[int] | None = None) -> None:
    for module in (start_ray, annotate_pool):
        monkeypatch.setattr(module, "node_cpus", lambda: nodes)
    monkeypatch.setattr(annotate_pool, "node_gpus", lambda: gpus or [0] * len(nodes))
    monkeypatch.setattr(annotate_pool, "num_gpus", lambda: sum(gpus or []))
    monkeypatch.setattr(start_ray, "num_cpus", lambda: sum(nodes))


def job_of(threads: int, backend: str = "cpu", boxes: str = "annotated") -> FrozenJob:
    intent = {"threads": threads, "backend": backend, "boxes": {"kind": boxes}}
    return FrozenJob(digest="", intent=intent, plan={}, input={}, about={})


@pytest.mark.parametrize(("nodes", "threads"), [([4], 1), ([2, 2, 2], 1), ([0, 3, 3], 1), ([8], 4), ([0, 4, 4], 4)])
def test_an_actor_takes_no_more_threads_than_a_node_has_cores(
        nodes: list[int], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(nodes, monkeypatch)
    assert start_ray.actor_threads() == threads


def test_there_are_as_many_actors_as_fit_in_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of([0, 6, 6], monkeypatch)  # 12 cores, but a third actor of 4 would find room in neither
    assert annotate_pool.pool_sizes(job_of(threads=4), actors=None).annotators == 2


def test_a_run_whose_actors_fit_nowhere_says_what_it_waits_for(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cluster_of([2, 2], monkeypatch)
    with caplog.at_level(logging.WARNING, logger="jobs.annotate"):
        annotate_pool.pool_sizes(job_of(threads=4), actors=None)
    assert "takes 4 threads, and no node of the cluster has so many cores" in caplog.text


def test_on_a_cluster_without_workers_yet_there_are_as_many_actors_as_are_asked_for_and_none_is_guessed(
        monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of([0], monkeypatch)
    assert annotate_pool.pool_sizes(job_of(threads=4), actors=16) == annotate_pool.PoolSizes(
        annotators=16, decoders=0, cpus=0.9 * 4, gpus=0)
    with pytest.raises(ConfigError, match="--set actors=N"):
        annotate_pool.pool_sizes(job_of(threads=4), actors=None)


# --- who decodes --------------------------------------------------------------------------------------------------


def sizes(job: FrozenJob, **asked: int) -> tuple[int, int]:
    found = annotate_pool.pool_sizes(job, **{"actors": None, **asked})
    return found.annotators, found.decoders


def test_beside_gpus_others_decode_where_there_are_machines_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of([0, 8, 8], monkeypatch, gpus=[0, 1, 1])
    assert sizes(job_of(4, "cuda")) == (2, 0)
    cluster_of([0, 8, 8, 2], monkeypatch, gpus=[0, 1, 1, 0])  # the last one has no room for four threads
    assert sizes(job_of(4, "cuda")) == (2, 0)
    cluster_of([0, 8, 8, 16], monkeypatch, gpus=[0, 1, 1, 0])
    assert sizes(job_of(4, "cuda")) == (2, 2 + 2 + 4)  # with the cores of the GPUs' own machines
    assert sizes(job_of(4, "cuda"), decoders=0) == (2, 0)
    assert sizes(job_of(4, "cuda", "detect")) == (2, 2 + 2 + 4)


def test_without_gpus_nobody_decodes_for_others_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of([8, 8], monkeypatch)
    assert sizes(job_of(4)) == (4, 0)
    assert sizes(job_of(4), decoders=1) == (3, 1)
    assert sizes(job_of(4, boxes="detect")) == (3, 1)


def test_actors_that_share_cores_all_find_room_and_those_beside_gpus_may_wait_for_machines(
        monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of([8], monkeypatch)
    shared = annotate_pool.pool_sizes(job_of(4), actors=2, decoders=2)
    assert (shared.annotators + shared.decoders) * shared.cpus < 8
    cluster_of([0, 8], monkeypatch, gpus=[0, 1])
    assert annotate_pool.pool_sizes(job_of(4, "cuda"), actors=4, decoders=16) == annotate_pool.PoolSizes(
        annotators=4, decoders=16, cpus=0.9 * 4, gpus=1)


def test_where_a_detector_makes_the_boxes_it_is_asked_how_many_detect_and_not_how_many_decode() -> None:
    with pytest.raises(ValueError, match="set detectors instead"):
        AnnotateConfig(input="in", model="model", output="out", boxes="detect", detector="d.onnx", decoders=2)


# --- training -----------------------------------------------------------------------------------------------------


def test_a_ray_that_is_too_slow_to_start_ends_the_job_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def times_out(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", times_out)
    with pytest.raises(OSError, match=r"timed out during startup.*on a busy machine, try again"), start_ray.start_ray():
        pass


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


@pytest.mark.parametrize(("cpus", "world", "num_sets", "feeders", "each"), [
    (10, 2, 1, 4, 1.0),      # 8 are left by the workers, 4 for each
    (10, 2, 2, 4, 0.5),      # tasks of one dataset leave room for those of the other
    (100, 2, 1, 8, 1.0),     # more would wait
    (5, 4, 1, 1, 0.25), (33, 32, 1, 1, 0.1),  # a task fits in what is left
    (4, 4, 1, 1, 0), (4, 8, 2, 1, 0)])        # the workers have all: the task takes none, or would never run
def test_a_ranks_feeding_tasks_fit_in_its_share_of_the_cpus_that_the_workers_leave(
        cpus: int, world: int, num_sets: int, feeders: int, each: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus)})
    worker = cast(Worker, SimpleNamespace(world=world, task=SimpleNamespace(sets=[None] * num_sets)))
    assert (train_feed._num_feeders(worker), train_feed._cpus_of_feeder(worker)) == (feeders, each)
