"""Small pictures of every format, and what can befall their bytes. All follows from a seed."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image

Data = bytearray
Rng = np.random.Generator
WIDTH, HEIGHT = 40, 28
EXTREMES = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def whole_pictures() -> dict[str, bytes]:
    """Name -> bytes: each format and variant, plain and with EXIF that turns it."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    rgb = np.stack([x * 6, y * 9, (x * y) % 256], axis=-1).astype(np.uint8)
    picture = Image.fromarray(rgb)
    pictures = {
        "jpeg": _encoded(picture, "JPEG"),
        "jpeg progressive": _encoded(picture, "JPEG", progressive=True),
        "jpeg cmyk": _encoded(picture.convert("CMYK"), "JPEG"),
        "jpeg restarts": _encoded(picture, "JPEG", restart_marker_blocks=1),
        "png": _encoded(picture, "PNG"),
        "png palette": _encoded(picture.quantize(16), "PNG"),
        "png 16": bytes(cv2.imencode(".png", rgb.astype(np.uint16) * 257)[1]),
        "png 1": _encoded(picture.convert("1"), "PNG"),
        "webp": _encoded(picture, "WEBP"),
        "webp lossless": _encoded(picture, "WEBP", lossless=True),
        "webp animated": _encoded(picture, "WEBP", save_all=True, append_images=[picture.rotate(90)]),
        "bmp": _encoded(picture, "BMP"),
        "bmp palette": _encoded(picture.quantize(16), "BMP"),
        "tiff": _encoded(picture, "TIFF"),
        "tiff lzw": _encoded(picture, "TIFF", compression="tiff_lzw"),
        "tiff deflate": _encoded(picture, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": _encoded(picture, "TIFF", compression="jpeg"),
        "tiff 16": bytes(cv2.imencode(".tif", rgb.astype(np.uint16) * 257)[1]),
        "gif": _encoded(picture.quantize(16), "GIF"),
        "gif animated": _encoded(picture, "GIF", save_all=True, append_images=[picture.rotate(90)]),
        "avif": _encoded(picture, "AVIF"),
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    for format_ in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        pictures[f"{format_.lower()} exif"] = _encoded(picture, format_, exif=exif)
    return pictures


def _encoded(picture: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


def mutated(whole: bytes, seed: int) -> tuple[str, bytes]:
    """One to three mutations' names, and what they make of the data. The same seed gives the same."""
    rng = np.random.default_rng(seed)
    data = bytearray(whole)
    names = []
    for _ in range(1 + rng.integers(3) // 2 + rng.integers(3) // 2):
        mutate = MUTATIONS[rng.integers(len(MUTATIONS))]
        if len(data) > 1:
            mutate(data, rng)
            names.append(mutate.__name__)
    if data.startswith(b"\x89PNG") and rng.integers(4):
        _mend_checksums(data)  # else libpng looks no further
        names.append("mended")
    return ", ".join(names), bytes(data)


def flip_bits_in_header(data: Data, rng: Rng) -> None:
    _flip(data, rng, min(len(data), 200))


def flip_bits_anywhere(data: Data, rng: Rng) -> None:
    _flip(data, rng, len(data))


def _flip(data: Data, rng: Rng, end: int) -> None:
    for place in rng.integers(0, end, rng.integers(1, 9)):
        data[place] ^= 1 << rng.integers(8)


def cut_off(data: Data, rng: Rng) -> None:
    del data[rng.integers(1, len(data)) :]


def append_garbage(data: Data, rng: Rng) -> None:
    data += rng.bytes(rng.integers(1, 5000))


def zero_a_run(data: Data, rng: Rng) -> None:
    start, end = _run(data, rng)
    data[start:end] = bytes(end - start)


def fill_a_run(data: Data, rng: Rng) -> None:
    start, end = _run(data, rng)
    data[start:end] = rng.bytes(end - start)


def drop_a_run(data: Data, rng: Rng) -> None:
    start, end = _run(data, rng)
    del data[start:end]


def repeat_a_run(data: Data, rng: Rng) -> None:
    start, end = _run(data, rng)
    data[end:end] = data[start:end] * int(rng.integers(1, 5))


def _run(data: Data, rng: Rng) -> tuple[int, int]:
    start = int(rng.integers(len(data)))
    return start, min(len(data), start + int(rng.integers(1, 100)))


def lie_anywhere(data: Data, rng: Rng) -> None:
    """An extreme value in place of some length, offset or count."""
    _lie(data, rng, int(rng.integers(len(data))))


def lie_in_header(data: Data, rng: Rng) -> None:
    _lie(data, rng, int(rng.integers(min(len(data), 120))))


def lie_about_size(data: Data, rng: Rng) -> None:
    """Zero, negative, one or huge for width or height, where the format has them."""
    places = [place for place in _places_of_size(data) if place + 2 <= len(data)]
    if places:
        _lie(data, rng, places[rng.integers(len(places))])


def _lie(data: Data, rng: Rng, place: int) -> None:
    value = EXTREMES[rng.integers(len(EXTREMES))]
    length, order = (1, 2, 4)[rng.integers(3)], ("big", "little")[rng.integers(2)]
    lie = (value % 256**length).to_bytes(length, order)  # type: ignore[arg-type]
    data[place : place + length] = lie[: len(data) - place]


def _places_of_size(data: Data) -> list[int]:
    """Where the stated width and height are: found as their values, which no header holds otherwise."""
    spellings = [struct.pack(kind, side) for side in (WIDTH, HEIGHT) for kind in ("<H", ">H", "<L", ">L")]
    return [place for spelling in spellings for place in _finds(data[:1000], spelling)]


def _finds(data: Data, wanted: bytes) -> Iterator[int]:
    place = data.find(wanted)
    while place >= 0:
        yield place
        place = data.find(wanted, place + 1)


def swap_chunks(data: Data, rng: Rng) -> None:
    """Two neighbouring chunks, segments or (where there are none) blocks of 16 bytes change places."""
    cuts = _cuts(data)
    if len(cuts) < 3:
        cuts = list(range(0, len(data) + 1, 16))
    if len(cuts) >= 3:
        start, middle, end = cuts[(at := rng.integers(len(cuts) - 2)) : at + 3]
        data[start:end] = data[middle:end] + data[start:middle]


def drop_a_chunk(data: Data, rng: Rng) -> None:
    cuts = _cuts(data)
    if len(cuts) >= 2:
        start, end = cuts[(at := rng.integers(len(cuts) - 1)) : at + 2]
        del data[start:end]


def _cuts(data: Data) -> list[int]:
    """Where the chunks of a PNG, WebP or AVIF and the segments of a JPEG begin, and where the last one ends."""
    if data.startswith(b"\x89PNG"):
        return _chain(data, 8, ">L", 0, 12)
    if data.startswith(b"RIFF"):
        return _chain(data, 12, "<L", 4, 8)
    if data.startswith(b"\xff\xd8"):
        return _chain(data, 2, ">H", 2, 2)
    return _chain(data, 0, ">L", 0, 0) if data[4:8] == b"ftyp" else []


def _chain(data: Data, at: int, length_kind: str, length_at: int, overhead: int) -> list[int]:
    cuts = []
    while at + 12 <= len(data) and len(cuts) < 1000:
        cuts.append(at)
        at += overhead + max(1, struct.unpack_from(length_kind, data, at + length_at)[0])
    return [*cuts, at] if at <= len(data) else cuts


def _mend_checksums(data: Data) -> None:
    for start in _chain(data, 8, ">L", 0, 12):
        length = int.from_bytes(data[start : start + 4], "big")
        end = start + 8 + length
        if end + 4 <= len(data):
            data[end : end + 4] = struct.pack(">L", zlib.crc32(data[start + 4 : end]))


MUTATIONS: tuple[Callable[[Data, Rng], None], ...] = (
    flip_bits_in_header,
    flip_bits_anywhere,
    cut_off,
    append_garbage,
    zero_a_run,
    fill_a_run,
    drop_a_run,
    repeat_a_run,
    lie_anywhere,
    lie_in_header,
    lie_about_size,
    swap_chunks,
    drop_a_chunk,
)
