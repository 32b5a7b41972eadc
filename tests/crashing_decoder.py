"""pipeline.images for tests, but with pictures on which it dies: what they begin with says how."""

import ctypes
import os
import sys
import time
from collections.abc import Callable

from pipeline.images import PictureHeader, PictureLimits, Pixels
from pipeline.images import decode_picture as decode_good_picture
from pipeline.images import read_header as read_good_header


def decode_picture(data: bytes, limits: PictureLimits) -> Pixels:
    """As pipeline.images, but first what the data's first word asks for."""
    _misbehave(data)
    return decode_good_picture(data, limits)


def read_header(data: bytes, limits: PictureLimits) -> PictureHeader:
    """As pipeline.images, but first what the data's first word asks for."""
    _misbehave(data)
    return read_good_header(data, limits)


def _misbehave(data: bytes) -> None:
    deed, _, what = data.partition(b" ")
    if deed == b"tell":
        with open(what, "a") as told:
            told.write(".")
        os.abort()
    DEEDS.get(deed, lambda: None)()


def _loop() -> None:
    while True:
        pass


def _hold_the_gil() -> None:
    ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the GIL during the call


def _allocate() -> None:
    blocks = []
    while True:
        blocks.append(bytearray(1 << 24))


def _allocate_in_c() -> None:
    # as a C++ decoder does whose bad_alloc nobody catches
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    while malloc(ctypes.c_size_t(1 << 24)):
        pass
    os.abort()


def _print() -> None:
    ctypes.CDLL(None).puts(b"a C library speaks")
    ctypes.CDLL(None).fflush(None)
    print("so does Python", flush=True)


def _fail() -> None:
    raise KeyError("a bug in the decoder")


def _answer_nonsense() -> None:
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b"nonsense!" * 9)
        except OSError:
            continue


DEEDS: dict[bytes, Callable[[], object]] = {
    b"abort": os.abort,
    b"segfault": lambda: ctypes.string_at(0),
    b"exit": lambda: os._exit(3),
    b"sys.exit": lambda: sys.exit(4),
    b"loop": _loop,
    b"sleep": lambda: time.sleep(1000),
    b"hold": _hold_the_gil,
    b"allocate": _allocate,
    b"allocate_in_c": _allocate_in_c,
    b"print": _print,
    b"fail": _fail,
    b"nonsense": _answer_nonsense,
}
