"""Reading a header stays cheap, whatever ten megabytes are made to do to it."""

import struct
import time
import zlib

import numpy as np
import pytest

from pipeline.images import PictureLimits, PictureRefused, decode_picture, read_header
from pipeline.isolation import IsolatedDecoder
from tests.mutations import HEIGHT, WIDTH, whole_pictures

SIZE = 10_000_000
SECONDS = 1.0  # the worst takes 0.26 on a slow machine
WHOLE = whole_pictures()
TAGS = struct.pack("<HHLL", 1, 3, 1, 6)  # an entry that nobody asks for
ORIENTED = b"II*\0" + struct.pack("<LH", 8, 1) + struct.pack("<HHLL", 0x0112, 3, 1, 6)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def png(chunks: bytes, times: int = 1) -> bytes:
    return WHOLE["png"][:33] + chunks * times + WHOLE["png"][33:]


def jpeg(segments: bytes, times: int = 1) -> bytes:
    return b"\xff\xd8" + segments * times + WHOLE["jpeg"][2:]


def text_bomb(num_digits: int) -> bytes:
    """A kilobyte that unpacks to a million."""
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n8\n" + b"0" * num_digits, 9))


def many_tags(number: int) -> bytes:
    return b"II*\0" + struct.pack("<LH", 8, number) + TAGS * number


CRAFTED = {
    "png of empty chunks": png(chunk(b"aaAa", b""), SIZE // 12),
    "png of text bombs": png(text_bomb(1_000_000), SIZE // len(text_bomb(1_000_000))),
    "png of a long text": png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n8\n" + b"00" * (SIZE // 2))),
    "png of exif directories": png(chunk(b"eXIf", many_tags(65_535)), 12),
    "png whose chunk is beyond the end": png(b"\xff\xff\xff\xffaaAa" + bytes(SIZE)),
    "jpeg of fill bytes": jpeg(b"\xff" * SIZE),
    "jpeg of fill bytes alone": b"\xff\xd8" + b"\xff" * SIZE,
    "jpeg of markers without length": jpeg(b"\xff\xd0", SIZE // 2),
    "jpeg of stray bytes": jpeg(b"\xff\xd0\x00", SIZE // 3),
    "jpeg of segments that say they have no length": jpeg(b"\xff\xe1\0\0", SIZE // 4),
    "jpeg of exif segments": jpeg(b"\xff\xe1\x00\x22Exif\0\0" + ORIENTED.ljust(26, b"\0"), 90_000),
    "jpeg of frames": jpeg(b"\xff\xc0\0\2", SIZE // 4),
    "webp of empty chunks": b"RIFF" + struct.pack("<L", SIZE + 22) + b"WEBPVP8X\x0a\0\0\0" + bytes(10) + bytes(SIZE),
    "gif of empty blocks": WHOLE["gif"][:13] + b"\x21\xfe\0" * (SIZE // 3),
    "tiff of tags": many_tags(65_535) + bytes(SIZE),
    "tiff whose values are elsewhere": (b"II*\0" + struct.pack("<LH", 8, 65_535) + TAGS * 65_535)[:-4] + b"\xff" * SIZE,
    "avif of free boxes": WHOLE["avif"][:32] + struct.pack(">L4s", 8, b"free") * (SIZE // 8),
}


@pytest.mark.parametrize("name", CRAFTED)
@pytest.mark.parametrize("accept_truncated", [False, True])
def test_ten_crafted_megabytes_take_less_than_a_second(name: str, accept_truncated: bool) -> None:
    start = time.process_time()
    try:
        read_header(CRAFTED[name], PictureLimits(accept_truncated=accept_truncated))
    except PictureRefused as refused:
        assert refused.reason in ("corrupt", "truncated")  # noqa: PT017
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("kind", ["zTXt", "iTXt"])
def test_the_packed_text_of_a_png_costs_neither_memory_nor_time(kind: str) -> None:
    start = {"zTXt": b"Comment\0\0", "iTXt": b"Comment\0\1\0\0\0"}[kind]
    data = png(chunk(kind.encode(), start + zlib.compress(b"a" * 7_900_000, 9)), 500)  # 4 MB, unpacked 4 GB
    limits = PictureLimits(max_pixels=1_000_000, max_bytes=10_000_000)
    with IsolatedDecoder(limits, seconds=5) as decoder:
        np.testing.assert_array_equal(decoder.decode(data), decode_picture(WHOLE["png"]))


def test_of_several_exif_blocks_the_first_counts() -> None:
    turned, upright = ORIENTED, ORIENTED[:-4] + struct.pack("<L", 1)
    for first, second, size in ((turned, upright, (HEIGHT, WIDTH)), (upright, turned, (WIDTH, HEIGHT))):
        segments = b"".join(
            b"\xff\xe1" + struct.pack(">H", 8 + len(exif)) + b"Exif\0\0" + exif for exif in (first, second)
        )
        for data in (jpeg(segments), png(chunk(b"eXIf", first) + chunk(b"eXIf", second))):
            header = read_header(data)
            assert (header.width, header.height) == size


def test_a_png_profile_beyond_the_limit_still_gives_its_orientation() -> None:
    profile = b"\nexif\n99\n" + ORIENTED.hex().encode() + b"\n00" * 100_000
    for data in (
        png(chunk(b"tEXt", b"Raw profile type exif\0" + profile)),
        png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))),
    ):
        assert read_header(data).width == HEIGHT
