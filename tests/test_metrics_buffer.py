"""Metrics that wait for MLflow: how many, in which order, and beside the output for the next process."""

from pipeline import storage
from pipeline.metrics_buffer import (
    LoggedMetric,
    MetricsBuffer,
    metrics_lines,
    read_metrics_lines,
    store_waiting,
    stored_metrics,
)

SOME = [LoggedMetric("loss", 0.1 + 0.2, 20, 1_700_000_000_000),
        LoggedMetric("loss", float("inf"), 40, 1_700_000_000_001)]


def test_lines_and_back_is_the_same_bit_for_bit() -> None:
    assert read_metrics_lines(metrics_lines(SOME)) == SOME


def test_too_many_drop_the_oldest_and_count_them() -> None:
    buffer = MetricsBuffer(most=3)
    buffer.add(LoggedMetric("loss", 1.0, step, 0) for step in range(5))
    assert [each.step for each in buffer.first(10)] == [2, 3, 4]
    assert [each.step for each in buffer.first(2)] == [2, 3]
    assert buffer.dropped == 2
    buffer.forget(2)
    assert [each.step for each in buffer.waiting] == [4]


def test_a_file_beside_the_output_holds_what_waits_and_goes_when_nothing_does(place: str) -> None:
    first = store_waiting(place, SOME[:1])
    second = store_waiting(place, SOME)
    assert first != second
    assert stored_metrics(place) == SOME
    assert second is not None
    assert storage.read_object(second).count(b"\n") == 2

    assert store_waiting(place, []) is None
    assert stored_metrics(place) == []
    assert not storage.exists(second)


def test_what_two_files_have_comes_once(place: str) -> None:
    # a worker that was killed between putting its own file and removing the older one
    storage.put_if_absent(storage.join(place, "_metrics", "unended"), b"a run's id, and no metrics")
    for name, some in (("unsent-a.jsonl", SOME[:1]), ("unsent-b.jsonl", SOME)):
        storage.put_if_absent(storage.join(place, "_metrics", name), metrics_lines(some))
    assert stored_metrics(place) == SOME
