import os
import threading
from collections.abc import Iterator

import pytest

from pipeline.idle_priority import at_idle_priority

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="only Linux has this priority")


def test_items_are_made_at_idle_priority_and_the_caller_keeps_its_own() -> None:
    def policies() -> Iterator[int]:
        yield os.sched_getscheduler(0)
        yield os.sched_getscheduler(0)

    before = os.sched_getscheduler(0)
    assert list(at_idle_priority(policies())) == [os.SCHED_IDLE] * 2
    assert os.sched_getscheduler(0) == before != os.SCHED_IDLE


def test_each_item_is_made_when_it_is_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number

    taken = at_idle_priority(items())
    assert (next(taken), made) == (0, [0])
    assert (next(taken), made) == (1, [0, 1])


def test_an_error_reaches_the_caller_after_what_came_before_it() -> None:
    def items() -> Iterator[str]:
        yield "first"
        raise OSError("the store is away")

    taken = at_idle_priority(items())
    assert next(taken) == "first"
    with pytest.raises(OSError, match="the store is away"):
        next(taken)


def test_its_thread_ends_with_it() -> None:
    taken = at_idle_priority(iter(range(100)))
    next(taken)
    taken.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("idle-priority")]


def test_where_the_priority_is_forbidden_items_are_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    assert list(at_idle_priority(iter("ab"))) == ["a", "b"]
