"""Decoding whose crash or hang costs one picture and not the job: in a child process, or with the worker's own end.

`IsolatedDecoder` has the contract of `images.read_header` and `images.decode_picture`, in a child under a limit of
time and memory. `end_if_stuck` is for workers that decode by themselves and that someone else restarts.
Nothing here forks a threaded process, pickles, or knows who started the worker.

Between the two, on the child's stdin and stdout: a kind (one byte), a length (eight bytes), so many bytes.
Requests are H(eader) and D(ecode) with the picture; replies H(eader) in JSON, D(ecoded) with height, width and
pixels, R(efused) in JSON, M(emory) and E(rror) in words. Before all that the child says that it has S(tarted).
"""

import argparse
import dataclasses
import faulthandler
import importlib
import itertools
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

import numpy as np

from pipeline.images import DEFAULT_LIMITS, PictureHeader, PictureLimits, PictureRefused, Pixels

# A COCO picture costs 0.6 ms on top of the 5 that it takes to decode; wider pipes make no difference.
START_SECONDS = 120.0  # a child imports OpenCV: half a second, and many from a cold network disk
SWEEP_S = 5.0  # how often a timer that nobody needs any more is looked for
_FRAME = struct.Struct("<cQ")  # kind, length
_SIZE_HW = struct.Struct("<QQ")
_MAX_TEXT = 1 << 20  # of a reply that isn't pixels


class IsolatedDecoder:
    """Pictures read in a child process, which starts with the first one, serves many, and is replaced when it dies.

    limits   as for `read_header` and `decode_picture`
    seconds  for one picture, wall time
    decoder  the module that the child imports, with `read_header` and `decode_picture` as pipeline.images has

    Beyond what it has after its start the child may allocate `memory_bytes` (RLIMIT_DATA): 32 for each pixel of the
    limit (17 are the most that a format was seen to need: GIF and AVIF) and 4 for each byte. Less would be dangerous:
    OpenCV calls a picture corrupt where memory fails it.
    Refused beyond what they refuse: `decoder_crash`, when the child dies, takes too long, or runs out of its
    memory. That counts only in a new child: in one that has served before, the picture is tried once more in a
    new one, so that what becomes of a picture doesn't follow from its predecessors.
    An error that is no refusal, and a child that can't start, are a RuntimeError with the child's own words.
    Threads may share one; they wait for each other. A child ends with its parent, however that ends: at once,
    or, where C code holds it up, `seconds` + 1 after the picture began at the latest.
    """

    def __init__(
        self,
        limits: PictureLimits = DEFAULT_LIMITS,
        *,
        seconds: float = 60.0,
        decoder: str = "pipeline.images",
    ) -> None:
        if seconds <= 0:
            raise ValueError(f"a decoder needs time, but was given {seconds} s")
        self.limits = limits
        self.seconds = seconds
        self.memory_bytes = 32 * limits.max_pixels + 4 * limits.max_bytes
        self.decoder = decoder
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def read_header(self, data: bytes) -> PictureHeader:
        """A picture's format and upright size, or PictureRefused, as by `images.read_header`."""
        return PictureHeader(**json.loads(self._ask(b"H", data)))

    def decode(self, data: bytes) -> Pixels:
        """A picture's pixels, uint8 [H, W, 3] BGR, upright, or PictureRefused, as by `images.decode_picture`."""
        pixels = self._ask(b"D", data)
        assert isinstance(pixels, np.ndarray)
        return pixels

    def close(self) -> None:
        """Ends the child; the next picture would start another."""
        with self._lock:
            self._end_child()

    def __enter__(self) -> "IsolatedDecoder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, kind: bytes, data: bytes) -> Any:
        with self._lock:
            while True:
                child = self._child = self._child or _Child(self)
                try:
                    return child.ask(kind, data, self.seconds)
                except _ChildFailed as failure:
                    self._end_child()
                    if not child.has_served:
                        raise PictureRefused("decoder_crash", str(failure)) from None
                except PictureRefused:
                    raise
                except BaseException:  # Ctrl-C in the midst of an answer: its rest must not answer the next picture
                    self._end_child()
                    raise

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()


class _ChildFailed(Exception):
    """The child didn't answer; the message says why, as a refusal says it."""


class _Child:
    """A started child process, seen from its parent."""

    def __init__(self, settings: IsolatedDecoder) -> None:
        self.has_served = False
        self._limits = settings.limits
        self._memory_bytes = settings.memory_bytes
        options = {
            "decoder": settings.decoder,
            "seconds": settings.seconds,
            "memory_bytes": settings.memory_bytes,
            "limits": dataclasses.asdict(settings.limits),
        }
        # The parent's import path may have been changed since its start, as Ray does with a working directory.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.isolation", json.dumps(options)],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        try:
            self._await_start()
        except BaseException:
            self.end()
            raise

    def ask(self, kind: bytes, data: bytes, seconds: float) -> Any:
        """The answer: text of JSON, or pixels. PictureRefused, RuntimeError (the decoder's bug), _ChildFailed."""
        deadline = time.monotonic() + seconds
        try:
            self._write(_FRAME.pack(kind, len(data)), deadline)
            self._write(data, deadline)
            return self._answer(kind, deadline)
        except TimeoutError:
            raise _ChildFailed(f"the decoder took longer than {seconds:g} s") from None
        except (EOFError, BrokenPipeError):
            raise _ChildFailed(f"the decoder's process {self._fate()}") from None

    def end(self) -> None:
        """Ends the process, whatever it does, and takes its exit code, so that no zombie stays."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()

    def _await_start(self) -> None:
        try:
            kind, _ = _FRAME.unpack(self._read(_FRAME.size, time.monotonic() + START_SECONDS))
        except TimeoutError:
            raise RuntimeError(f"the decoder's process didn't start within {START_SECONDS:g} s") from None
        except EOFError:
            raise RuntimeError(f"the decoder's process {self._fate()} before it began; see stderr") from None
        assert kind == b"S", kind

    def _answer(self, request: bytes, deadline: float) -> Any:
        kind, length = _FRAME.unpack(self._read(_FRAME.size, deadline))
        if kind == request == b"D":
            answer: Any = self._read_pixels(length, deadline)
        elif kind not in {request, b"R", b"M", b"E"} or length > _MAX_TEXT:
            raise _ChildFailed(f"the decoder's process answered nonsense: {kind!r}, {length} bytes")
        else:
            answer = self._read(length, deadline).decode()
        if kind == b"M":
            raise _ChildFailed(f"the decoder needs more memory than the {self._memory_bytes} bytes that it may have")
        self.has_served = True
        if kind == b"R":
            raise PictureRefused(*json.loads(answer))
        if kind == b"E":
            raise RuntimeError(f"the decoder failed, and not as it should:\n{answer}")
        return answer

    def _read_pixels(self, length: int, deadline: float) -> Pixels:
        height, width = _SIZE_HW.unpack(self._read(_SIZE_HW.size, deadline))
        if length != _SIZE_HW.size + height * width * 3 or height * width > self._limits.max_pixels:
            raise _ChildFailed(f"the decoder's process answered nonsense: {length} bytes for {width}x{height} pixels")
        pixels = np.empty((height, width, 3), np.uint8)
        self._read_into(pixels.data.cast("B"), deadline)
        return pixels

    def _read(self, length: int, deadline: float) -> bytes:
        read = bytearray(length)
        self._read_into(memoryview(read), deadline)
        return bytes(read)

    def _read_into(self, rest: memoryview, deadline: float) -> None:
        while rest:
            _await(self._replies, select.POLLIN, deadline)
            count = os.readv(self._replies, [rest])
            if not count:
                raise EOFError
            rest = rest[count:]

    def _write(self, data: bytes, deadline: float) -> None:
        rest = memoryview(data)
        while rest:
            _await(self._requests, select.POLLOUT, deadline)
            rest = rest[os.write(self._requests, rest) :]

    def _fate(self) -> str:
        """How the process ended, after it closed its pipes."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        if code >= 0:
            return f"ended with exit code {code}"
        return f"died of {signal.Signals(-code).name}"


def _await(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


# The child


def _serve(options: dict[str, Any]) -> NoReturn:
    """Answers requests until they end."""
    requests, replies = _take_pipes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it goes to every process of a terminal
    faulthandler.enable()
    threading.Thread(target=_end_with_parent, args=(requests.fileno(),), daemon=True).start()
    decoder = importlib.import_module(options["decoder"])
    limits = PictureLimits(**options["limits"])
    _limit_memory(options["memory_bytes"])
    _reply(replies, b"S")
    while frame := requests.read(_FRAME.size):
        kind, length = _FRAME.unpack(frame)
        # The kernel ends a picture that the parent, dead by then, can't end. The parent's own limit comes first.
        signal.setitimer(signal.ITIMER_REAL, options["seconds"] + 1)
        answer = _answer(decoder, kind, requests.read(length), limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, *answer)
    sys.exit()


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the parent, under other numbers: what a C library prints on stdout goes to stderr."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


def _end_with_parent(requests: int) -> NoReturn:
    poll = select.poll()
    poll.register(requests, 0)  # POLLHUP comes unasked
    poll.poll()
    os._exit(0)


def _limit_memory(memory_bytes: int) -> None:
    """Holds what this process may allocate from now on. RLIMIT_AS would count what glibc reserves for each thread."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as statm:
        present = int(statm.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (present + memory_bytes, present + memory_bytes))


def _answer(decoder: Any, kind: bytes, data: bytes, limits: PictureLimits) -> tuple[bytes, *tuple[Any, ...]]:
    try:
        if kind == b"H":
            return b"H", json.dumps(dataclasses.asdict(decoder.read_header(data, limits))).encode()
        pixels = np.ascontiguousarray(decoder.decode_picture(data, limits))
        return b"D", _SIZE_HW.pack(*pixels.shape[:2]), pixels.data.cast("B")
    except PictureRefused as refusal:
        return b"R", json.dumps([refusal.reason, str(refusal)]).encode()
    except MemoryError:
        return b"M", b""
    except Exception:
        return b"E", traceback.format_exc().encode(errors="replace")[-_MAX_TEXT:]


def _reply(replies: BinaryIO, kind: bytes, *parts: Any) -> None:
    replies.write(_FRAME.pack(kind, sum(len(part) for part in parts)))
    for part in parts:
        replies.write(part)
    replies.flush()


# In the worker's own process


@contextmanager
def end_if_stuck(seconds: float) -> Iterator[None]:
    """Ends this *process* (exit code 1, every thread's traceback on stderr) if the block takes longer.

    Not at once then, but before twice that time. Also when C code holds the GIL for ever. Blocks may be nested, and
    run in many threads at once: each has its own deadline, and the earliest counts. For that this function needs
    faulthandler's timer, of which a process has one, for itself: nothing else in the process may call
    `faulthandler.dump_traceback_later`.
    """
    if seconds <= 0:
        raise ValueError(f"a time limit must be positive, but is {seconds} s")
    block = next(_DEADLINES.numbers)
    _DEADLINES.add(block, seconds)
    try:
        yield
    finally:
        _DEADLINES.remove(block)


class WatchedDecoder:
    """Pictures read in this process, which one that takes longer than `seconds` ends (`end_if_stuck`)."""

    def __init__(self, limits: PictureLimits, *, seconds: float, decoder: str) -> None:
        self.limits, self.seconds = limits, seconds
        self._module = importlib.import_module(decoder)

    def read_header(self, data: bytes) -> PictureHeader:
        """As `images.read_header`."""
        with end_if_stuck(self.seconds):
            header: PictureHeader = self._module.read_header(data, self.limits)
            return header

    def decode(self, data: bytes) -> Pixels:
        """As `images.decode_picture`."""
        with end_if_stuck(self.seconds):
            pixels: Pixels = self._module.decode_picture(data, self.limits)
            return pixels


@contextmanager
def open_decoder(limits: PictureLimits, *, isolated: bool, seconds: float = 60.0,
                 decoder: str = "pipeline.images") -> Iterator[IsolatedDecoder | WatchedDecoder]:
    """What a task reads pictures with: in its own process, fast, which a bad picture may end; or, where one has
    (`isolated`), in a child. `seconds`: a picture that takes longer hangs."""
    if not isolated:
        yield WatchedDecoder(limits, seconds=seconds, decoder=decoder)
        return
    with IsolatedDecoder(limits, seconds=seconds, decoder=decoder) as apart:
        yield apart


class _Deadlines:
    """The running blocks' deadlines, and faulthandler's timer, which ends the process when one of them has passed.

    Setting the timer starts a thread, and ending it waits for that: 0.1 ms, and 4 on a busy machine, where a picture
    takes 3. So it is set late, at some time between the earliest deadline and twice its block's time, and left as it
    is while that holds; once no block has run for a while, a thread of ours takes it back.
    """

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self._running: dict[int, tuple[float, float]] = {}  # deadline, and the latest time for the timer
        self._timer_at: float | None = None
        self._idle_since = 0.0
        self._lock = threading.Lock()
        self._sweeper: threading.Thread | None = None

    def add(self, block: int, seconds: float) -> None:
        with self._lock:
            now = time.monotonic()
            latest = now + 2 * seconds
            self._running[block] = (now + seconds, latest)
            if self._timer_at is None or self._timer_at > latest or self._too_early():
                self._set_timer(now)

    def remove(self, block: int) -> None:
        with self._lock:
            self._running.pop(block)
            self._idle_since = now = time.monotonic()
            if self._running:
                if self._too_early():
                    self._set_timer(now)
            elif self._timer_at is not None and self._timer_at - now < 2 * SWEEP_S:
                self._cancel_timer()

    def _too_early(self) -> bool:
        return self._timer_at is not None and self._timer_at < min(deadline for deadline, _ in self._running.values())

    def _set_timer(self, now: float) -> None:
        self._timer_at = min(latest for _, latest in self._running.values())
        # To descriptor 2 and not to sys.stderr: a worker may have replaced that by an object without a file.
        faulthandler.dump_traceback_later(max(0.001, self._timer_at - now), exit=True, file=2)
        if self._sweeper is None or not self._sweeper.is_alive():  # a fork leaves threads behind
            self._sweeper = threading.Thread(target=self._sweep, daemon=True, name="decoding deadlines")
            self._sweeper.start()

    def _cancel_timer(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._timer_at = None

    def _sweep(self) -> None:
        while True:
            time.sleep(SWEEP_S)
            with self._lock:
                idle = not self._running and time.monotonic() - self._idle_since > SWEEP_S / 2
                if idle and self._timer_at is not None:
                    self._cancel_timer()


_DEADLINES = _Deadlines()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The child of an IsolatedDecoder; not for use by hand.")
    parser.add_argument("options", type=json.loads)
    _serve(parser.parse_args().options)
