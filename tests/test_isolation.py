"""A decoder that dies, hangs or eats the memory costs one picture; the next one decodes as if nothing had been."""

import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.images import PictureHeader, PictureLimits, PictureRefused, decode_picture
from pipeline.isolation import IsolatedDecoder, end_if_stuck

ROOT = Path(__file__).resolve().parents[1]
SMALL = PictureLimits(max_bytes=1_000_000, max_pixels=1_000_000)


def picture(seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", noise)[1])


GOOD = picture()


@pytest.fixture(scope="module")
def decoder() -> Iterator[IsolatedDecoder]:
    with IsolatedDecoder(SMALL, seconds=1, decoder="tests.crashing_decoder") as decoder:
        yield decoder


def refusal(act: Callable[[], object]) -> PictureRefused:
    with pytest.raises(PictureRefused) as caught:
        act()
    return caught.value


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and runs(pid):
        time.sleep(0.02)
    return not runs(pid)


def test_headers_pixels_and_refusals_are_those_of_the_same_call_without_a_child() -> None:
    with IsolatedDecoder(SMALL) as decoder:
        assert decoder.read_header(GOOD) == PictureHeader("JPEG", 36, 24)
        pixels = decoder.decode(GOOD)
        np.testing.assert_array_equal(pixels, decode_picture(GOOD))
        assert pixels.flags.writeable
        refused = refusal(lambda: decoder.decode(b"<html>"))
        assert (refused.reason, "<html>" in str(refused)) == ("not_a_picture", True)
        assert refusal(lambda: decoder.decode(GOOD + bytes(1_000_000))).reason == "too_large_bytes"


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        ("abort", "died of SIGABRT"),
        ("segfault", "died of SIGSEGV"),
        ("exit", "ended with exit code 3"),
        ("sys.exit", "ended with exit code 4"),
        ("loop", r"longer than 1 s"),
        ("hold", r"longer than 1 s"),
        ("allocate", "more memory than the 36000000 bytes"),
        ("allocate_in_c", "died of SIGABRT"),
        ("nonsense", "nonsense"),
    ],
)
def test_a_decoder_that_dies_or_hangs_costs_one_picture(decoder: IsolatedDecoder, deed: str, words: str) -> None:
    np.testing.assert_array_equal(decoder.decode(GOOD), decode_picture(GOOD))
    refused = refusal(lambda: decoder.decode(deed.encode() + b" of the picture"))
    assert (refused.reason, re.search(words, str(refused)) is not None) == ("decoder_crash", True), refused
    other = picture(1)
    np.testing.assert_array_equal(decoder.decode(other), decode_picture(other))


def test_reading_a_header_is_isolated_too(decoder: IsolatedDecoder) -> None:
    assert "SIGSEGV" in str(refusal(lambda: decoder.read_header(b"segfault within the header")))
    assert decoder.read_header(GOOD) == PictureHeader("JPEG", 36, 24)


def test_what_a_library_prints_does_not_get_between_the_answers(decoder: IsolatedDecoder) -> None:
    assert refusal(lambda: decoder.decode(b"print something")).reason == "not_a_picture"
    np.testing.assert_array_equal(decoder.decode(GOOD), decode_picture(GOOD))


def test_a_bug_in_the_decoder_is_an_error_and_no_refusal(decoder: IsolatedDecoder) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'a bug in the decoder'"):
        decoder.decode(b"fail here")


def test_a_failure_counts_only_in_a_new_child(tmp_path: Path) -> None:
    times = tmp_path / "times"
    with IsolatedDecoder(SMALL, decoder="tests.crashing_decoder") as decoder:
        decoder.decode(GOOD)
        refusal(lambda: decoder.decode(f"tell {times}".encode()))
        assert len(times.read_text()) == 2  # in the child that had served, and in a new one
        refusal(lambda: decoder.decode(f"tell {times}".encode()))
        assert len(times.read_text()) == 3  # there was no old one


def test_a_decoder_that_cannot_be_imported_is_an_error_and_no_refusal() -> None:
    with IsolatedDecoder(decoder="pipeline.no_such_module") as decoder, pytest.raises(RuntimeError, match="code 1"):
        decoder.decode(GOOD)


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_decoder_without_time_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="needs time"):
        IsolatedDecoder(seconds=seconds)


def test_a_decoder_may_have_as_much_memory_as_the_largest_picture_needs() -> None:
    assert IsolatedDecoder(PictureLimits(max_pixels=10, max_bytes=100)).memory_bytes == 32 * 10 + 4 * 100


def test_threads_share_a_decoder(decoder: IsolatedDecoder) -> None:
    pictures = [picture(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for data, pixels in zip(pictures, pool.map(decoder.decode, pictures), strict=True):
            np.testing.assert_array_equal(pixels, decode_picture(data))


def test_neither_a_process_nor_a_zombie_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def begin(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        begun.append(popen(*arguments, **options))
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", begin)
    with IsolatedDecoder(SMALL, decoder="tests.crashing_decoder") as decoder:
        decoder.decode(GOOD)
        refusal(lambda: decoder.decode(b"abort"))
        decoder.decode(GOOD)
        there = [Path(f"/proc/{child.pid}").exists() for child in begun]  # a zombie is there too
    assert there == [False, False, True]
    assert not any(Path(f"/proc/{child.pid}").exists() for child in begun)


PARENT = """
import sys
from pathlib import Path
from pipeline.isolation import IsolatedDecoder
decoder = IsolatedDecoder(seconds=2, decoder="tests.crashing_decoder")
decoder.decode(bytes.fromhex(sys.argv[1]))
print(decoder._child._process.pid, flush=True)
decoder.decode(sys.argv[2].encode()) if sys.argv[2] else sys.stdin.read()
"""


@pytest.mark.parametrize(("deed", "seconds"), [("", 2), ("sleep", 2), ("hold", 5)])
def test_a_child_ends_with_its_parent_even_when_that_is_killed(deed: str, seconds: float) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, GOOD.hex(), deed], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.2)
        assert runs(child)
        parent.kill()
    assert ends_within(child, seconds)


DAEMON = """
import multiprocessing, sys
from pipeline.isolation import IsolatedDecoder
def decode():
    with IsolatedDecoder() as decoder:
        print(decoder.decode(bytes.fromhex(sys.argv[1])).shape, flush=True)
daemon = multiprocessing.get_context("fork").Process(target=decode, daemon=True)
daemon.start()
daemon.join()
"""


def test_a_daemonic_process_can_have_a_decoder_from_any_folder(tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{DAEMON}"
    command = [sys.executable, "-c", script, GOOD.hex()]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout == "(24, 36, 3)\n"


# end_if_stuck


def run_worker(body: str) -> subprocess.CompletedProcess[str]:
    script = f"""
import ctypes, threading, time
from pipeline.isolation import end_if_stuck
{textwrap.dedent(body)}
print("came through")
"""
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_block_that_hangs_ends_the_process_though_c_code_holds_the_gil() -> None:
    worker = run_worker("""
        def decode():
            with end_if_stuck(0.3):
                ctypes.PyDLL(None).sleep(60)
        decode()
    """)
    assert worker.returncode == 1
    assert "in decode" in worker.stderr
    assert "came through" not in worker.stdout


def test_a_block_in_time_leaves_no_timer() -> None:
    assert run_worker("""
        with end_if_stuck(0.2):
            pass
        time.sleep(0.4)
    """).stdout == "came through\n"


def test_an_error_in_the_block_comes_through_and_leaves_no_timer() -> None:
    assert run_worker("""
        try:
            with end_if_stuck(0.2):
                raise KeyError
        except KeyError:
            time.sleep(0.4)
    """).stdout == "came through\n"


@pytest.mark.parametrize(("outer", "inner"), [(0.3, 60), (60, 0.3)])
def test_of_nested_blocks_each_keeps_its_deadline(outer: float, inner: float) -> None:
    worker = run_worker(f"""
        with end_if_stuck({outer}):
            with end_if_stuck({inner}):
                {"pass" if outer < inner else "time.sleep(9)"}
            time.sleep(9)
    """)
    assert worker.returncode == 1


def test_one_threads_end_does_not_lift_anothers_deadline() -> None:
    worker = run_worker("""
        def stuck():
            with end_if_stuck(0.6):
                time.sleep(9)
        threading.Thread(target=stuck).start()
        for _ in range(1000):
            with end_if_stuck(0.5):
                time.sleep(0.001)
        time.sleep(9)
    """)
    assert worker.returncode == 1
    assert "in stuck" in worker.stderr


def test_many_threads_in_time_come_through() -> None:
    assert run_worker("""
        def work():
            for _ in range(100):
                with end_if_stuck(2):
                    time.sleep(0.0005)
        threads = [threading.Thread(target=work) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    """).stdout == "came through\n"


def test_a_time_limit_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive, but is 0 s"), end_if_stuck(0):
        pass


def test_blocks_in_time_leave_the_timer_to_be_taken_back_later() -> None:
    assert run_worker("""
        import pipeline.isolation as isolation
        isolation.SWEEP_S = 0.2
        for _ in range(3):
            with end_if_stuck(1.0):
                pass
        assert isolation._DEADLINES._timer_at is not None
        time.sleep(0.6)
        assert isolation._DEADLINES._timer_at is None
        time.sleep(2.0)
    """).stdout == "came through\n"


def test_a_block_that_hangs_after_many_in_time_ends_the_process_before_twice_its_time() -> None:
    began = time.monotonic()
    assert run_worker("""
        for _ in range(200):
            with end_if_stuck(1.0):
                time.sleep(0.005)
        with end_if_stuck(1.0):
            time.sleep(20)
    """).returncode == 1
    assert time.monotonic() - began < 15
