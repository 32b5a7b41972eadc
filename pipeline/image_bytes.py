"""What is changed in a picture's bytes before a decoder sees them: an end where it is missing, a PNG's packed text.

What there is of a cut picture decodes as in the whole one; the rest is what the decoder makes of nothing: a JPEG's
is grey (a progressive one's is coarse), a PNG's and a BMP's black, or its palette's first colour. WebP, GIF, TIFF
and AVIF aren't completed: their decoders give all or nothing, and a cut TIFF or AVIF has often lost its directory.
"""

import struct
import zlib
from collections.abc import Callable, Iterator

from pipeline.image_headers import MAX_SEGMENTS


def without_packed_text(png: bytes) -> bytes:
    """A PNG without its zTXt and iTXt chunks, which have no part in its pixels. Most PNGs have none.

    libpng unpacks them all, up to 8 MB each: 500 such chunks, a file of 4 MB, took 4 GB and more than a minute.
    """
    if b"zTXt" not in png and b"iTXt" not in png:
        return png
    return png[:8] + b"".join(piece for kind, piece in _png_chunks(png) if kind not in (b"zTXt", b"iTXt"))


def _png_chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each chunk's kind and its bytes, whole with length and checksum; the last one may be cut."""
    at = 8
    for _ in range(MAX_SEGMENTS):
        if at + 8 > len(png):
            break
        length, kind = struct.unpack_from(">L4s", png, at)
        yield kind, png[at : at + 12 + length]
        at += 12 + length


def completed(data: bytes, name: str) -> bytes | None:
    """A cut picture of the format `name` with an end of our making; None where that can't be made.

    Its header must have been read and found good: a PNG takes as much memory as its pixels do.
    """
    complete = COMPLETIONS.get(name)
    try:
        return complete(data) if complete else None
    except (struct.error, KeyError, zlib.error):
        return None


def _completed_jpeg(data: bytes) -> bytes:
    return data + b"\xff\xd9"


def _completed_bmp(data: bytes) -> bytes:
    """As long as its rows are; a compressed one isn't made longer."""
    start, header_size = struct.unpack_from("<LL", data, 10)
    if header_size < 40:
        raise KeyError("the header of 1987, which has no compression")
    width, height, _, bits, compression = struct.unpack_from("<llHHL", data, 18)
    if compression not in (0, 3):  # plain, or plain with masks
        raise KeyError(compression)
    if bits not in (1, 4, 8, 16, 24, 32) or start >= len(data) or width < 0:
        raise KeyError("a header whose rows could be of any length")
    row = (width * bits + 31) // 32 * 4
    return data.ljust(start + row * abs(height), b"\0")


_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG, by its colour type
# Adam7's passes: first column, first row, column step, row step (PNG specification, 8.2)
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def _completed_png(data: bytes) -> bytes:
    """With the pixels packed anew: a cut deflate stream can't be continued."""
    before, packed = _png_parts(data)
    unpacker = zlib.decompressobj()
    length = _png_length(data)
    rows = unpacker.decompress(packed, length).ljust(length, b"\0")  # a row of zeros is black, unfiltered
    return before + _chunk(b"IDAT", zlib.compress(rows, 1)) + _chunk(b"IEND", b"")


def _png_parts(data: bytes) -> tuple[bytes, bytes]:
    """All whole chunks before the pixels with the signature, and the packed pixels without their chunks."""
    before: list[bytes] = []
    packed: list[bytes] = []
    for kind, piece in _png_chunks(data):
        if kind == b"IDAT":
            (length,) = struct.unpack_from(">L", piece)
            packed.append(piece[8 : 8 + length])
        elif not packed:
            before.append(piece)
    return data[:8] + b"".join(before), b"".join(packed)


def _png_length(data: bytes) -> int:
    """How many bytes a PNG's pixels are, unpacked, each row with its filter's byte."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">LLBBBBB", data, 16)
    if depth not in (1, 2, 4, 8, 16):
        raise KeyError(depth)
    bits = depth * _CHANNELS[colour]
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    sizes = [((width - x + dx - 1) // dx, (height - y + dy - 1) // dy) for x, y, dx, dy in passes]
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


COMPLETIONS: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": _completed_jpeg,
    "PNG": _completed_png,
    "BMP": _completed_bmp,
}
