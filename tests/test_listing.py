"""Long listings: all names, in order, each once, by few requests and many at a time. No server is needed."""

import bisect
import hashlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.listing import Page, StoredObject, list_in_ranges, midpoint, next_probe, num_shared

PAGE = 50
THREADS = 8


class FakeStore:
    """Names in order, a page at a time; it counts what is asked and how many ask at once."""

    def __init__(self, names: Iterator[str] | list[str], pause_s: float = 0.0) -> None:
        self.names = sorted(set(names))
        self.num_pages = self.num_folder_pages = self.most_at_once = self._at_once = 0
        self._pause_s, self._lock = pause_s, threading.Lock()

    def page(self, after: str) -> Page:
        with self._lock:
            self.num_pages += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self._pause_s)
        start = bisect.bisect_right(self.names, after) if after else 0
        found = self.names[start:start + PAGE]
        with self._lock:
            self._at_once -= 1
        return [StoredObject(name, name, 1, "e") for name in found], start + PAGE < len(self.names)

    def folders(self, folder: str, after: str) -> list[str]:
        self.num_folder_pages += 1
        below = (name[len(folder):] for name in self.names if name.startswith(folder) and name > after)
        entries = dict.fromkeys(folder + name.partition("/")[0] + "/" * ("/" in name) for name in below)
        return [entry for entry in itertools.islice(entries, PAGE) if entry.endswith("/")]

    def list(self) -> list[str]:
        return [found.name for found in list_in_ranges(self.page, self.folders, threads=THREADS)]


def words(letters: str, length: int, count: int) -> Iterator[str]:
    rng = random.Random(0)
    return ("".join(rng.choices(letters, k=length)) for _ in range(count))


NAMES: dict[str, Callable[[], Iterator[str]]] = {
    "zero-padded numbers": lambda: (f"{i:09d}.jpg" for i in range(20_000)),
    "a long common beginning": lambda: (f"COCO_train2017_{i:012d}.jpg" for i in range(20_000)),
    "uuids": lambda: (hashlib.md5(str(i).encode()).hexdigest() for i in range(20_000)),
    "nested folders": lambda: (f"train/{i // 90:05d}/{i % 90:04d}.jpg" for i in range(20_000)),
    "dates": lambda: (f"2024/{m:02}/{d:02}/{i:03}.jpg" for m in range(1, 13) for d in range(1, 29) for i in range(60)),
    "non-ASCII": lambda: words("äöüßéèñабвгдя日本語漢字😀", 8, 20_000),
    "space, percent, plus, ampersand, less-than": lambda: words(" %+&<>\"'ab", 10, 20_000),
    "one huge folder before many small ones": lambda: itertools.chain(
        (f"big/{i:07d}" for i in range(18_000)), (f"s{i:05d}/{j}" for i in range(400) for j in range(5))),
    "one huge folder behind many small ones": lambda: itertools.chain(
        (f"z/{i:07d}" for i in range(18_000)), (f"s{i:05d}/{j}" for i in range(400) for j in range(5))),
    "ASCII and a few others": lambda: itertools.chain(words("abc", 12, 19_000), words("日本", 12, 1_000)),
    "control characters and DEL": lambda: words("\x01\x1f\x7f\x80a", 9, 20_000),
    "the ends of the surrogates": lambda: words("\ud7ff\ue000\U0010ffff", 11, 20_000),
    "names that continue names": lambda: ("a" * i for i in range(1, 2_000)),
}


@pytest.mark.parametrize("kind", NAMES)
def test_every_name_is_listed_once_in_order_by_few_requests(kind: str) -> None:
    store = FakeStore(NAMES[kind]())
    assert store.list() == store.names
    # a fifth more than one after the other, and a few to find the places where to cut
    assert store.num_pages <= 1.2 * len(store.names) / PAGE + 8 * THREADS
    assert store.num_folder_pages <= 4


@pytest.mark.parametrize("kind", ["zero-padded numbers", "uuids", "nested folders",
                                  "one huge folder before many small ones"])
def test_pages_are_asked_for_at_the_same_time(kind: str) -> None:
    store = FakeStore(NAMES[kind](), pause_s=0.005)
    store.list()
    assert THREADS // 2 <= store.most_at_once <= THREADS


@pytest.mark.parametrize("count", [0, 1, PAGE])
def test_what_fits_one_page_takes_one_request(count: int) -> None:
    store = FakeStore([f"{i:03d}" for i in range(count)])
    assert store.list() == store.names
    assert (store.num_pages, store.num_folder_pages) == (1, 0)


def test_the_first_object_takes_one_request() -> None:
    store = FakeStore(NAMES["uuids"]())
    listing = list_in_ranges(store.page, store.folders)
    assert next(listing).name == store.names[0]
    assert store.num_pages == 1


def test_a_slow_consumer_is_waited_for_in_bounded_memory() -> None:
    store = FakeStore(NAMES["uuids"](), pause_s=0.001)
    listing = list_in_ranges(store.page, store.folders, threads=THREADS, buffered_pages=20)
    for _ in range(PAGE + 1):
        next(listing)
    time.sleep(0.3)
    # the first page, 20 waiting, one under way in each thread, and what found nothing
    assert store.num_pages <= 1 + 20 + THREADS + 4 * THREADS
    assert len([*listing]) == len(store.names) - PAGE - 1


def test_an_error_in_any_thread_reaches_the_consumer() -> None:
    store = FakeStore(NAMES["uuids"]())

    def page(after: str) -> Page:
        if store.num_pages > 30:
            raise OSError("the store is gone")
        return store.page(after)

    with pytest.raises(OSError, match="the store is gone"):
        list(list_in_ranges(page, store.folders, threads=THREADS))


def test_a_consumer_that_stops_ends_the_threads() -> None:
    def listing_threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("listing-")}

    before = listing_threads()
    store = FakeStore(NAMES["uuids"](), pause_s=0.001)
    listing = list_in_ranges(store.page, store.folders, threads=THREADS)
    for _ in range(3 * PAGE):
        next(listing)
    assert len(listing_threads() - before) == THREADS
    listing.close()
    for thread in listing_threads() - before:
        thread.join(5)
    assert not listing_threads() - before


def test_what_stays_is_listed_once_while_others_come_and_go() -> None:
    store = FakeStore((f"{i:09d}.jpg" for i in range(5_000)), pause_s=0.001)
    stays = set(store.names[::2])
    goes, comes = store.names[1::4], [name + "x" for name in store.names[::40]]
    rng = random.Random(0)

    def page(after: str) -> Page:
        with store._lock:
            gone = rng.sample(goes, 20)
            store.names = sorted({*store.names, *rng.sample(comes, 20)} - set(gone))
        return store.page(after)

    listed = [found.name for found in list_in_ranges(page, store.folders, threads=THREADS)]
    assert listed == sorted(set(listed))
    assert stays <= set(listed)


@pytest.mark.parametrize(("after", "until", "middle"), [
    ("a", "c", "b"), ("0", "9", "4"), ("a", "b", None), ("a5", "b", "aZ"), ("a5", "b7", "b"), ("a", None, "\x7f"),
    ("a", "a ", None), ("a", "a~", "aN"), ("\ud000", "\ue100", "\ue000"), ("", "z", "L"),
])
def test_the_midpoint_lies_halfway_by_code_points(after: str, until: str | None, middle: str | None) -> None:
    assert midpoint(after, until) == middle


def test_midpoints_lie_between_and_can_be_sent() -> None:
    rng = random.Random(0)
    letters = "\x01\x1f 09az~\x7f\x80ÿ\ud7ff\ue000😀\U0010ffff"
    for _ in range(5_000):
        after, until = sorted("".join(rng.choices(letters, k=rng.randint(1, 5))) for _ in range(2))
        middle = midpoint(after, until) if after < until else None
        if middle is not None:
            assert after < middle < until
            middle.encode()  # a surrogate could not be


def test_a_long_common_beginning_is_found_by_longer_and_longer_steps() -> None:
    assert num_shared("img_0999", "\x7f") == 0
    assert num_shared("img_0999", "img_\x7f") == 4
    assert num_shared("img_0999", "img_1") == 5  # all that is left begins with img_0
    assert num_shared("img_0999", "img_5") is None
    assert next_probe("img_0999", "\x7f", varies_at=None, stride=4) == ("img_\x7f", 4, 3)
    assert next_probe("img_0999", "img_\x7f", varies_at=4, stride=1) == ("img_W", 1, 4)
