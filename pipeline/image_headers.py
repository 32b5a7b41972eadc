"""What a picture's header says of it: format, stored size, EXIF orientation. No pixel is decoded.

Our own readers, since they cost microseconds, allocate nothing, and see what a decoder would hide: that the
end is missing. They trust nothing: every offset may lie, every loop is bounded.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

MAX_SEGMENTS = 100_000  # markers or chunks; a 100 MB PNG in the usual 8 KiB chunks has 12 000
ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class StoredHeader:
    """A picture as stored: size in pixels before its EXIF orientation (1 to 8; 1 is upright) is applied."""

    format: str
    width: int
    height: int
    orientation: int


class HeaderCutError(ValueError):
    """The data ends before the picture does."""


class HeaderWrongError(ValueError):
    """The data contradicts its own format."""


class NotReadError(ValueError):
    """A variant of a format that this project doesn't read."""


def format_of(data: bytes) -> str | None:
    """The format's name by magic bytes: one of READERS, another known one, or None: not a picture at all."""
    if data[4:8] == b"ftyp":
        return _iso_format(data)
    if data[:4] == b"RIFF":
        return "WebP" if data[8:12] == b"WEBP" else None
    for name, magics in MAGICS.items():
        if data.startswith(magics):
            return name
    return None


MAGICS: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*"),
    "BigTIFF": (b"II+\0", b"MM\0+"),
    "JPEG 2000": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "ICO": (b"\0\0\1\0",),
    "PSD": (b"8BPS",),
    "PDF": (b"%PDF",),
    "SVG": (b"<svg", b"<?xml"),
    "PNM": (b"P1\n", b"P2\n", b"P3\n", b"P4\n", b"P5\n", b"P6\n", b"P7\n"),
    "OpenEXR": (b"v/1\x01",),
    "HDR": (b"#?RADIANCE", b"#?RGBE"),
}


def stored_header(data: bytes, *, allow_cut: bool = False) -> StoredHeader:
    """The header of data whose format is one of READERS.

    allow_cut takes a JPEG or PNG whose end is missing too, if its pixels have begun.
    HeaderCutError where the data ends too early (a JPEG, PNG or WebP without its end counts as such),
    HeaderWrongError where it contradicts itself, NotReadError for variants that aren't read.
    """
    name = format_of(data)
    assert name in READERS, name
    try:
        width, height, orientation = READERS[name](data, allow_cut)
    except (struct.error, IndexError):
        raise HeaderCutError(f"{name} data ends after {len(data)} bytes, within the picture") from None
    if width <= 0 or height <= 0:
        raise HeaderWrongError(f"{name} header states a size of {width}x{height} pixels")
    return StoredHeader(name, width, height, orientation)


def looks_cut(data: bytes) -> bool:
    """Whether data that a decoder refused seems to lack its end."""
    name = format_of(data)
    if name == "GIF":  # of this and BMP the header can't tell
        return not data.rstrip(b"\0").endswith(b";")
    if name == "BMP":
        return int.from_bytes(data[2:6], "little") > len(data)
    try:
        stored_header(data)
    except HeaderCutError:
        return True
    except ValueError:
        return False
    return False


# Readers: data, and whether its end may be missing -> stored width, height, and orientation.
# Reading past the end is struct.error or IndexError.

Reading = tuple[int, int, int]

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those are tables and a reserved code
_NO_FILL_BYTE = re.compile(rb"[^\xff]")
_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})


def _read_jpeg(data: bytes, allow_cut: bool) -> Reading:
    at, size = 2, None
    orientation: int | None = None
    for _ in range(MAX_SEGMENTS):
        at, marker = _next_marker(data, at)
        if marker in _WITHOUT_LENGTH:
            continue
        if marker == 0xD9:
            raise HeaderWrongError("JPEG data ends without a picture")
        (length,) = struct.unpack_from(">H", data, at)
        if marker in _START_OF_FRAME and size is None:
            size = struct.unpack_from(">HH", data, at + 3)
        if marker == 0xE1 and orientation is None and data[at + 2 : at + 8] == b"Exif\0\0":
            orientation = _orientation(data[at + 8 : at + length])
        if marker == 0xDA:
            break
        at += length
    if size is None:
        raise HeaderWrongError("JPEG data has a scan before any frame, or none within 100 000 markers")
    if not allow_cut and data.rfind(b"\xff\xd9", at) < 0:  # the scan's own bytes never hold this
        raise HeaderCutError("JPEG data has no end marker: the rest of the picture is missing")
    return size[1], size[0], orientation or 1


def _next_marker(data: bytes, at: int) -> tuple[int, int]:
    """Where the next marker's payload begins, and its code; stray bytes before it are passed over."""
    at = data.find(b"\xff", at)
    if at < 0:
        raise IndexError
    code = _NO_FILL_BYTE.search(data, at)
    if code is None:
        raise IndexError
    return code.end(), data[code.start()]


def _read_png(data: bytes, allow_cut: bool) -> Reading:
    length, kind, width, height = struct.unpack_from(">L4sLL", data, 8)
    if kind != b"IHDR" or length != 13:
        raise HeaderWrongError(f"PNG data must begin with IHDR, but begins with {kind!r}")
    at, has_pixels = 33, False
    exif: int | None = None  # the first of each kind counts, and no other is read: each may be a bomb
    profile: int | None = None
    for _ in range(MAX_SEGMENTS):
        ends_here = at + 8 > len(data) and has_pixels and allow_cut
        length, kind = (0, b"IEND") if ends_here else struct.unpack_from(">L4s", data, at)
        if kind == b"IEND":
            return width, height, exif or profile or 1
        has_pixels |= kind == b"IDAT"
        if kind == b"eXIf" and exif is None:
            exif = _orientation(data[at + 8 : at + 8 + length])
        elif profile is None and data.startswith(_EXIF_AS_TEXT, at + 4):
            profile = _profile_orientation(kind, data[at + 8 : at + 8 + length])
        at += 12 + length
    raise HeaderWrongError(f"PNG data has more than {MAX_SEGMENTS} chunks")


_EXIF_AS_TEXT = tuple(
    kind + b"Raw profile type " + name + b"\0" for kind in (b"zTXt", b"tEXt") for name in (b"exif", b"APP1")
)
_MAX_PROFILE = 1 << 16  # hexadecimal digits; the orientation is in the first directory


def _profile_orientation(kind: bytes, chunk: bytes) -> int:
    """From EXIF as hexadecimal text, which ImageMagick wrote before PNG had a chunk for it."""
    _, _, text = chunk.partition(b"\0")
    try:
        plain = zlib.decompressobj().decompress(text[1:], _MAX_PROFILE) if kind == b"zTXt" else text[:_MAX_PROFILE]
        digits = b"".join(plain.split(b"\n", 3)[3].split())  # an empty line, name, length, digits
        exif = bytes.fromhex(digits[: len(digits) // 2 * 2].decode("ascii"))
    except (ValueError, IndexError, zlib.error):
        return 1
    return _orientation(exif.removeprefix(b"Exif\0\0"))


def _read_webp(data: bytes, _: bool) -> Reading:
    (size,) = struct.unpack_from("<L", data, 4)
    if size + 8 > len(data):
        raise HeaderCutError(f"WebP data should be {size + 8} bytes long, but is {len(data)}")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = _uint24(data, 24) + 1, _uint24(data, 27) + 1
        return width, height, _webp_orientation(data)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<L", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1
    if kind != b"VP8 ":
        raise HeaderWrongError(f"WebP data must begin with a VP8 chunk, but begins with {kind!r}")
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF, 1


def _uint24(data: bytes, at: int) -> int:
    low, high = struct.unpack_from("<HB", data, at)
    return int(low | high << 16)


def _webp_orientation(data: bytes) -> int:
    at = 12
    for _ in range(MAX_SEGMENTS):
        if at + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sL", data, at)
        if kind == b"EXIF":
            return _orientation(data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0"))
        at += 8 + length + length % 2
    return 1


def _read_gif(data: bytes, _: bool) -> Reading:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height, 1


def _read_bmp(data: bytes, _: bool) -> Reading:
    (header_size,) = struct.unpack_from("<L", data, 14)
    if header_size not in (12, 16, 40, 52, 56, 64, 108, 124):
        raise HeaderWrongError(f"BMP data has an unknown header of {header_size} bytes")
    width, height = struct.unpack_from("<HH" if header_size == 12 else "<ll", data, 18)
    return width, abs(height), 1  # negative: stored from the top


_WIDTH, _HEIGHT, _BITS, _SAMPLE_FORMAT = 256, 257, 258, 339


def _read_tiff(data: bytes, _: bool) -> Reading:
    tags = _tags(data)
    if _WIDTH not in tags or _HEIGHT not in tags:
        raise HeaderWrongError("TIFF data has no picture in its first directory")
    if tags.get(_BITS, 1) > 16 or tags.get(_SAMPLE_FORMAT, 1) != 1:
        raise NotReadError("TIFF with samples that aren't unsigned integers of up to 16 bits")
    return tags[_WIDTH], tags[_HEIGHT], _valid_orientation(tags)


def _read_avif(data: bytes, _: bool) -> Reading:
    from PIL import (
        Image,
        UnidentifiedImageError,
        features,
    )  # only here: no other format waits for this import

    if not features.check("avif"):
        raise NotReadError("AVIF, which this build of Pillow doesn't read")
    try:
        with Image.open(io.BytesIO(data), formats=["AVIF"]) as picture:
            width, height = picture.size
            return width, height, _valid_orientation(dict(picture.getexif()))
    except Image.DecompressionBombError as error:
        raise NotReadError(f"AVIF that Pillow holds for a bomb: {error}") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, RuntimeError) as error:
        raise HeaderWrongError(f"AVIF data whose header isn't readable: {error}") from None


READERS: dict[str, Callable[[bytes, bool], Reading]] = {
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "WebP": _read_webp,
    "GIF": _read_gif,
    "BMP": _read_bmp,
    "TIFF": _read_tiff,
    "AVIF": _read_avif,
}


def _iso_format(data: bytes) -> str:
    """AVIF, HEIC, or the brand of another ISO media file (such as MP4), from its `ftyp` box."""
    size = int.from_bytes(data[:4], "big")
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, min(size, 256), 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    if brands & {b"heic", b"heix", b"hevc", b"mif1"}:
        return "HEIC"
    return f"ISO media {data[8:12].decode('ascii', 'replace')!r}"


# EXIF is a TIFF without pixels


def _orientation(exif: bytes) -> int:
    """The orientation in an EXIF block, 1 where it has none or is broken: EXIF never stops a picture."""
    try:
        return _valid_orientation(_tags(exif))
    except (struct.error, HeaderWrongError):
        return 1


def _valid_orientation(tags: dict[int, int]) -> int:
    value = tags.get(ORIENTATION_TAG, 1)
    return value if 1 <= value <= 8 else 1


def _tags(tiff: bytes) -> dict[int, int]:
    """The first directory's tags with their first value, of those that hold unsigned integers."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        raise HeaderWrongError("TIFF or EXIF data without a byte order")
    (start,) = struct.unpack_from(order + "L", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    tags: dict[int, int] = {}
    for at in range(start + 2, start + 2 + 12 * count, 12):
        if at + 12 > len(tiff) and ORIENTATION_TAG in tags:
            break  # a block cut behind what is asked for
        tag, kind, number = struct.unpack_from(order + "HHL", tiff, at)
        if kind not in (1, 3, 4):
            continue
        code, width = {1: ("B", 1), 3: ("H", 2), 4: ("L", 4)}[kind]
        (offset,) = struct.unpack_from(order + "L", tiff, at + 8)
        place = at + 8 if number * width <= 4 else offset
        if place + width <= len(tiff):
            (tags[tag],) = struct.unpack_from(order + code, tiff, place)
    return tags
