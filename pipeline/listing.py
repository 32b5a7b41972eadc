"""A long listing by many requests at a time, in order, in bounded memory. It knows no store: pages are a function.

Names are ordered by code points, which is the order of their UTF-8 bytes. Every page is asked for by the last name
before it, so that no request depends on another's answer, and a listing that changes under way still gives each
object that stands there all the time exactly once.
"""

import bisect
import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

THREADS = 16
# 200 pages of 1,000 objects are about 70 MB
BUFFERED_PAGES = 200
# A probe may find nothing: 7 of them take one character from the whole of ASCII to the one that is used
PROBES_AT_A_TIME = 16
PROBES_FOR_A_THREAD = 4
PAGES_FOR_A_PROBE = 8
FOLDER_LEVELS = 4
_CONTROL_END = 0x1F
_ASCII_END = chr(0x7F)
_SURROGATES = range(0xD800, 0xE000)
_LAST = 0x10FFFF


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One entry of a listing. `name` is relative to the listed prefix; `etag` is opaque (on a disk: size and mtime)."""

    name: str
    uri: str
    size: int
    etag: str


# page(after): the objects that follow this name, in order, and whether there are more. Some, if there are more.
Page = tuple[list[StoredObject], bool]
PageFunction = Callable[[str], Page]
# folders(folder, after): what is right under this folder and follows this name: folders' names, which end with "/"
FoldersFunction = Callable[[str, str], Sequence[str]]


def list_in_ranges(page: PageFunction, folders: FoldersFunction, *, threads: int = THREADS,
                   buffered_pages: int = BUFFERED_PAGES) -> Generator[StoredObject, None, None]:
    """All objects, ordered by name, each once; up to `threads` pages are asked for at a time.

    One page costs one request. Beyond it the names are cut into ranges: at folders first, later wherever a thread is
    idle, by halving what a busy one has left. Probes that find nothing are limited to an eighth of the pages and a few
    for each thread. At most `buffered_pages` wait for the consumer. What `page` raises is raised here; a consumer that
    stops early ends the threads.
    """
    objects, more = page("")
    yield from objects
    if more:
        after = objects[-1].name
        del objects
        points = _spread(_points_at_folders(folders, after), threads - 1)
        ends: list[str | None] = [*points, None]
        ranges = [_Range(start, end) for start, end in zip([after, *points], ends, strict=True)]
        yield from _ParallelListing(page, ranges, threads, buffered_pages).objects()


def midpoint(after: str, until: str | None) -> str | None:
    """A name strictly between the two, about halfway by code points; None where none is found. `until` None: no end.

    No surrogates and no control characters are made. Without an end it is U+007F, the end of ASCII, at first: names
    beyond it are rare, and halving all of Unicode for them would take 14 probes more.
    """
    if until is None:
        if after < _ASCII_END:
            return _ASCII_END
        until = chr(_LAST)
    if after >= until:
        return None
    common = _num_common(after, until)
    between = _code_between(_code_at(after, common), ord(until[common]))
    if between is not None:
        return until[:common] + between
    if common < len(until) - 1:
        return until[:common + 1]
    return _halfway_to_the_end(after, common + 1)


def num_shared(after: str, until: str | None) -> int | None:
    """How many characters at their beginning all names in (after, until] share, where that is all that `until` says.

    None where `until` says more. Such an end (`img_` + U+007F, or `img_1` for names after `img_0999`) says nothing of
    how far the names reach, and halving would take up to seven probes for each further character that they share.
    """
    if until is None:
        return None
    common = _num_common(after, until)
    if until[common:] == _ASCII_END:
        return common
    adjacent = len(until) == common + 1 <= len(after) and ord(until[common]) - ord(after[common]) == 1
    return common + 1 if adjacent else None


class Probe(NamedTuple):
    """Where to ask for a page. `stride`: how many characters more its names would share than is known."""

    middle: str
    stride: int
    varies_at: int | None


def next_probe(after: str, until: str | None, *, varies_at: int | None, stride: int) -> Probe | None:
    """Where to look for the upper half of (after, until]: behind all that share a longer beginning, else halfway."""
    shared = num_shared(after, until)
    if shared is not None and shared != varies_at:
        stride = min(stride, len(after) - shared)
        middle = after[:shared + stride] + _ASCII_END
        if stride > 0 and middle > after:
            return Probe(middle, stride, shared + stride - 1)
    between = midpoint(after, until)
    return None if between is None else Probe(between, 1, varies_at)


def _num_common(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _halfway_to_the_end(after: str, start: int) -> str | None:
    # a name that begins as `after` does, up to `start`, and is greater
    for position in range(start, len(after)):
        code = ord(after[position])
        between = _code_between(code, ord(_ASCII_END) if code < ord(_ASCII_END) - 1 else _LAST + 1)
        if between is not None:
            return after[:position] + between
    return None


def _code_at(name: str, position: int) -> int:
    return ord(name[position]) if position < len(name) else _CONTROL_END


def _code_between(low: int, high: int) -> str | None:
    code = max((low + high) // 2, _CONTROL_END + 1)
    if code in _SURROGATES:
        code = _SURROGATES.stop if high > _SURROGATES.stop else _SURROGATES.start - 1
    return chr(code) if low < code < high else None


def _points_at_folders(folders: FoldersFunction, after: str) -> list[str]:
    # the highest level with folders that are still to come: with everything in train/0000/, train/0001/, ..., not the
    # first one. What follows the levels that have none, mostly nothing, is a range of its own
    path = list(itertools.accumulate([part + "/" for part in after.split("/")[:-1]], initial=""))
    for folder in path[:FOLDER_LEVELS]:
        found = [name for name in folders(folder, after) if name > after]
        if found:
            return [*found, folder + _ASCII_END] if folder else found
    return []


def _spread(points: list[str], most: int) -> list[str]:
    return sorted({points[i * len(points) // most] for i in range(most)}) if len(points) > most else points


@dataclass(eq=False)
class _Range:
    """The names in (after, until]; `after` moves on as pages come.

    `num_listed`: pages since it was last cut. `varies_at`: a position at which its names are known to differ.
    """

    after: str
    until: str | None
    pages: deque[list[StoredObject]] = field(default_factory=deque)
    num_listed: int = 0
    varies_at: int | None = None
    in_flight: bool = False
    in_halving: bool = False
    untouched: bool = True
    done: bool = False

    def take(self, page: Page) -> bool:
        """Keep what of the page is in the range, and move on behind it; whether anything was kept."""
        objects, more = page
        if self.until is not None and objects and objects[-1].name >= self.until:
            objects = objects[:bisect.bisect_right(objects, self.until, key=lambda found: found.name)]
            more = False
        self.num_listed += 1
        self.untouched = False
        self.done = not more
        if objects:
            self.after = objects[-1].name
            self.pages.append(objects)
        return bool(objects)


def _is_nothing_until(until: str | None, page: Page) -> bool:
    objects, _ = page
    return not objects or (until is not None and objects[0].name > until)


class _ParallelListing:
    """The ranges still to be given out, in order, and the threads that list them. The lock guards all of it."""

    def __init__(self, page: PageFunction, ranges: list[_Range], threads: int, buffered_pages: int) -> None:
        self._page, self._ranges, self._limit = page, ranges, buffered_pages
        self._threads = [threading.Thread(target=self._work, name=f"listing-{i}", daemon=True) for i in range(threads)]
        self._changed = threading.Condition()
        self._num_buffered = 0
        self._probes_left = float(PROBES_FOR_A_THREAD * threads)
        self._closed = False
        self._failure: BaseException | None = None

    def objects(self) -> Iterator[StoredObject]:
        """Everything in the ranges, in order; closing it ends the threads."""
        try:
            for thread in self._threads:
                thread.start()
            while (page := self._next_page()) is not None:
                yield from page
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _next_page(self) -> list[StoredObject] | None:
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                while self._ranges and self._ranges[0].done and not self._ranges[0].pages:
                    del self._ranges[0]
                self._changed.notify_all()  # there is room, or another range is the first
                if not self._ranges:
                    return None
                if self._ranges[0].pages:
                    self._num_buffered -= 1
                    return self._ranges[0].pages.popleft()
                self._changed.wait()

    def _work(self) -> None:
        try:
            while (step := self._next_step()) is not None:
                step()
        except BaseException as error:  # the consumer's thread raises it
            with self._changed:
                self._failure = self._failure or error
                self._closed = True
                self._changed.notify_all()

    def _next_step(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._closed and not all(one.done for one in self._ranges):
                if (listed := self._to_list()) is not None:
                    listed.in_flight = True
                    return functools.partial(self._list_page, listed)
                if (halved := self._to_halve()) is not None:
                    halved.in_halving = True
                    return functools.partial(self._halve, halved)
                self._changed.wait()
            return None

    def _to_list(self) -> _Range | None:
        waiting = (one for i, one in enumerate(self._ranges) if not one.in_flight and not one.done and self._room(i))
        return next(waiting, None)

    def _to_halve(self) -> _Range | None:
        if self._probes_left < 1:
            return None
        long = (one for i, one in enumerate(self._ranges)
                if one.in_flight and not one.in_halving and one.num_listed >= 2 and self._room(i + 1))
        return next(long, None)

    def _room(self, place: int) -> bool:
        # the nearer to the consumer, the more may wait in front; the first is never stuck
        if place == 0 and not self._ranges[0].pages:
            return True
        return self._num_buffered < self._limit * (1 - place / (2 * len(self._threads)))

    def _list_page(self, listed: _Range) -> None:
        page = self._page(listed.after)
        with self._changed:
            listed.in_flight = False
            self._take(listed, page)

    def _take(self, taker: _Range, page: Page) -> None:
        self._num_buffered += taker.take(page)
        self._probes_left += 1 / PAGES_FOR_A_PROBE
        self._changed.notify_all()

    def _halve(self, halved: _Range) -> None:
        stride, overshot = 1, False
        for _ in range(PROBES_AT_A_TIME):
            with self._changed:
                probe = self._next_probe(halved, stride)
            if probe is None:
                break
            page = self._page(probe.middle)
            with self._changed:
                if halved.done or halved.after >= probe.middle:  # it has come this far itself
                    break
                if _is_nothing_until(halved.until, page):
                    self._shrink(halved, probe.middle, page)
                    stride = max(1, stride // 2) if overshot else 2 * stride
                elif probe.stride > 1:
                    stride, overshot = probe.stride // 2, True
                else:
                    self._cut(halved, probe, page)
                    break
        with self._changed:
            halved.in_halving = False
            halved.num_listed = 0
            self._changed.notify_all()

    def _next_probe(self, halved: _Range, stride: int) -> Probe | None:
        if halved.done or self._probes_left < 1:
            return None
        self._probes_left -= 1
        return next_probe(halved.after, halved.until, varies_at=halved.varies_at, stride=stride)

    def _cut(self, halved: _Range, probe: Probe, page: Page) -> None:
        upper = _Range(probe.middle, halved.until, varies_at=probe.varies_at)
        halved.until = probe.middle
        self._ranges.insert(self._ranges.index(halved) + 1, upper)
        self._take(upper, page)

    def _shrink(self, halved: _Range, middle: str, page: Page) -> None:
        halved.until = middle
        place = self._ranges.index(halved) + 1
        following = self._ranges[place] if place < len(self._ranges) else None
        # there is nothing in between: what follows the middle is what follows the range
        if following is not None and following.untouched and not following.in_flight:
            self._take(following, page)
