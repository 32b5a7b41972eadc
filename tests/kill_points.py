"""Where a process can be ended: at each step by which a disk is read or written, and at each request to an S3 server.

The process that is ended is a fork of one that has imported everything, without Ray, and its end is a SIGKILL at a
known point: on a disk it sends it to itself, on the wire the proxy sends it, before the server hears of the request or
after it has answered. This knows nothing of annotation.
"""

import contextlib
import itertools
import os
import random
import re
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import IO, Any

import boto3

from pipeline import storage_disk
from tests.fault_proxy import (
    AFTER,
    BEFORE,
    INTERNAL_ERROR,
    INTERNAL_ERROR_AFTER,
    RESET,
    RESET_AFTER,
    SLOW_DOWN,
    TIMEOUT,
    TIMEOUT_AFTER,
    TRUNCATED,
    Fault,
    FaultProxy,
    Logged,
)

LATE = "late"  # ended before the server hears of the request, which reaches it long after
# a time-out takes a second, and comes more rarely
FAULTS = [*[INTERNAL_ERROR, INTERNAL_ERROR_AFTER, SLOW_DOWN, RESET, RESET_AFTER, TRUNCATED] * 3, TIMEOUT, TIMEOUT_AFTER]


def fork(work: Callable[[], object], errors: Path) -> int:
    """Begin the work in a child process; its id. What it prints goes to the file `errors`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The child's exit code once it has ended; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_until_stopped(child: int) -> None:
    """Wait until the child has been stopped."""
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status), status


# --- on a disk ----------------------------------------------------------------------------------------------------

Step = Callable[[str, str], None]  # called before each step with its name and path
SEAM = ("list_objects", "read", "describe", "sha256", "put_if_absent", "remove", "arrow_filesystem")


def do_nothing(name: str, path: str) -> None:
    """Take every step."""


def end_at(number: int) -> Step:
    """End this process at its number-th step."""
    steps = itertools.count()

    def step(name: str, path: str) -> None:
        if next(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


def stop_at(wanted: str, part: str) -> Step:
    """Stop this process (SIGSTOP) at its first step of this name at a path with this in it."""
    stops = iter([signal.SIGSTOP])

    def step(name: str, path: str) -> None:
        if name == wanted and part in path:
            for stop in stops:
                os.kill(os.getpid(), stop)

    return step


def end_at_new(met: Path, *, units_alike: bool = False) -> Step:
    """End this process at its first step at which none was ended before; `met` is a file with those.

    units_alike  a step at one unit's part is that at another's
    """
    known = set(met.read_text().splitlines())
    kinds = set(map(_without_units, known))

    def step(name: str, path: str) -> None:
        label = f"{name} {_without_unique_names(path)}"
        if (_without_units(label) not in kinds) if units_alike else (label not in known):
            with met.open("a") as file:
                file.write(f"{label}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    return step


def _without_unique_names(path: str) -> str:
    return re.sub("[0-9a-f]{8,}", "unique", path)


def _without_units(label: str) -> str:
    return re.sub(r"/part-\d{7}-", "/part-", label)


def watch_disk(step: Step, root: str) -> None:
    """In this process, call `step` before each step that the storage code takes at files below `root`.

    The steps are its functions, with their paths, and what a put does, with the path that it puts: `half written`,
    `fsync`, `link`, `fsync folder`, `unlink` and, after it, `done`.
    """
    putting = threading.local()

    def below_root(name: str, path: Any) -> None:
        if os.fspath(path).startswith(root):
            step(name, os.fspath(path))

    def in_a_put(name: str) -> None:
        if getattr(putting, "uri", None):
            below_root(name, putting.uri)

    for name in SEAM:
        setattr(storage_disk, name, _before(getattr(storage_disk, name), partial(below_root, name)))
    put = storage_disk.put_if_absent

    def put_and_done(uri: str, data: bytes) -> bool:
        putting.uri = uri
        try:
            ours = put(uri, data)
        finally:
            putting.uri = None
        below_root("done", uri)
        return ours

    def is_folder(descriptor: int) -> bool:
        return stat.S_ISDIR(os.fstat(descriptor).st_mode)

    storage_disk.put_if_absent = put_and_done
    os.link = _before(os.link, lambda path: in_a_put("link"))
    os.unlink = _before(os.unlink, lambda path: in_a_put("unlink"))
    os.fsync = _before(os.fsync, lambda file: in_a_put("fsync folder" if is_folder(file) else "fsync"))
    opened = Path.open
    Path.open = lambda path, mode="r", *rest, **options: (  # type: ignore[method-assign, assignment]
        _HalfWriter(opened(path, mode, *rest, **options), partial(in_a_put, "half written")) if mode == "xb"
        else opened(path, mode, *rest, **options))


def _before(function: Callable[..., Any], step: Callable[[Any], None]) -> Callable[..., Any]:
    def watched(what: Any, *arguments: Any, **options: Any) -> Any:
        step(what)
        return function(what, *arguments, **options)

    return watched


class _HalfWriter:
    """A file that takes a step when half of what it is given is written."""

    def __init__(self, file: IO[bytes], step: Callable[[], None]) -> None:
        self._file, self._step = file, step

    def __enter__(self) -> "_HalfWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data[:len(data) // 2])
        self._file.flush()
        self._step()
        self._file.write(data[len(data) // 2:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


# --- on the wire --------------------------------------------------------------------------------------------------


def end(process: int, when: str) -> Fault:
    """The request at which the process is killed; it gets no answer."""
    kill = partial(os.kill, process, signal.SIGKILL)
    return Fault("late", hook=kill) if when == LATE else Fault("reset", when, hook=kill)


@dataclass
class EndAt:
    """Ends a process at its number-th request."""

    process: int
    number: int
    when: str

    def __call__(self, request: Logged) -> Fault | None:
        """The fault of this request."""
        self.number -= 1
        return end(self.process, self.when) if self.number == -1 else None


@dataclass
class EndAtNew:
    """Ends a process at its first request of a kind at which none was ended before: each before it is applied, those
    that change something also after it, and while a put is still on its way."""

    process: int
    reads_too: bool  # also after those that change nothing
    met: list[tuple[str, str]] = field(default_factory=list)
    units_alike: bool = False  # a request for one unit's part is that for another's

    def __call__(self, request: Logged) -> Fault | None:
        """The fault of this request."""
        label = f"{request.kind} {_without_unique_names(request.path)}"
        ends = [BEFORE, AFTER, LATE] if request.kind == "PUT" else [BEFORE, AFTER] if (
            request.kind == "DELETE" or self.reads_too) else [BEFORE]
        for when in ends:
            if not self._has_met(label, when):
                self.met.append((label, when))
                return end(self.process, when)
        return None


    def _has_met(self, label: str, when: str) -> bool:
        if not self.units_alike:
            return (label, when) in self.met
        return (_without_units(label), when) in {(_without_units(one), at) for one, at in self.met}


@dataclass
class AtRandom:
    """Faults of each kind, and the end of the process, at random."""

    process: int
    seed: str
    fault_share: float
    kill_share: float
    _random: random.Random | None = None

    def __call__(self, request: Logged) -> Fault | None:
        """The fault of this request."""
        self._random = self._random or random.Random(self.seed)
        drawn = self._random.random()
        if drawn < self.kill_share:
            return end(self.process, self._random.choice([BEFORE, AFTER, LATE] if request.kind == "PUT"
                                                         else [BEFORE, AFTER]))
        return self._random.choice(FAULTS) if drawn < self.kill_share + self.fault_share else None


@dataclass
class StopAt:
    """Stops a process (SIGSTOP) once the answer to its first request of this kind and path is on its way to it."""

    process: int
    kind: str
    path: str

    def __call__(self, request: Logged) -> Fault | None:
        """The fault of this request."""
        if request.kind != self.kind or self.path not in request.path:
            return None
        self.kind = ""
        return Fault("hook", AFTER, hook=partial(os.kill, self.process, signal.SIGSTOP))


@dataclass
class EndInFlight:
    """Ends a process at its first put to this path, which reaches the server only when it is let go."""

    process: int
    path: str

    def __call__(self, request: Logged) -> Fault | None:
        """The fault of this request."""
        return end(self.process, LATE) if request.kind == "PUT" and self.path in request.path else None


Judge = EndAt | EndAtNew | AtRandom | StopAt | EndInFlight


class Wire:
    """A proxy, in the process of `wire`."""

    def __init__(self, upstream: str) -> None:
        self._running = contextlib.ExitStack()
        self._proxy = self._running.enter_context(FaultProxy.in_front_of(upstream))

    def endpoint(self) -> str:
        """Its address."""
        return self._proxy.endpoint

    def judge(self, judge: Judge | None) -> None:
        """Who decides over each request from now on."""
        self._proxy.judge = judge

    def judged(self) -> Any:
        """The judge, as it is now."""
        return self._proxy.judge

    def log(self, begin: int = 0) -> list[Logged]:
        """The requests so far, but for the first ones: they come through a pipe, and there are soon many."""
        return self._proxy.log[begin:]

    def num_logged(self) -> int:
        """How many requests there were."""
        return len(self._proxy.log)

    def let_go(self) -> None:
        """Let the late requests reach the server, until they are held again."""
        self._proxy.let_go.set()

    def hold(self) -> None:
        """Hold late requests, as at first."""
        self._proxy.let_go.clear()

    def num_late(self) -> int:
        """How many are still held."""
        return self._proxy.num_late


class _WireProcess(BaseManager):
    pass


_WireProcess.register("Wire", Wire)


@contextlib.contextmanager
def wire(upstream: str) -> Iterator[Any]:
    """A Wire in a process of its own: who forks must have no threads."""
    with _WireProcess(("127.0.0.1", 0)) as process:  # TMPDIR may be too long for a Unix socket
        yield process.Wire(upstream)  # type: ignore[attr-defined]


def client(endpoint: str) -> Any:
    """A client that goes to the server itself."""
    return boto3.client("s3", endpoint_url=endpoint)
