"""Work that takes only the processor time that nothing else wants: Linux's SCHED_IDLE (sched(7))."""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def at_idle_priority(items: Iterator[Item]) -> Iterator[Item]:
    """The same items and errors, each made when it is asked for, in a thread of idle priority.

    A thread of its own, since without privileges nobody leaves that priority again, and a process of Ray's is given
    other tasks later. Where the priority can't be had (another system, a sandbox), items are made all the same.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="idle-priority", initializer=_become_idle) as thread:
        end = object()
        while (item := thread.submit(next, items, end).result()) is not end:
            yield item  # type: ignore[misc]


def _become_idle() -> None:
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
