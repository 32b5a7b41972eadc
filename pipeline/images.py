"""Bytes to BGR pixels, safely, and every reason for which a picture can be refused.

What a picture is follows from its bytes, never from its name. Its header is read and held against the limits
before a decoder sees the body; pixels come out upright (EXIF orientation applied), 8 bits, three channels.
A decoder that hangs or crashes isn't this module's to survive: `pipeline.isolation` does.
"""

import io
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.image_bytes import completed, without_packed_text
from pipeline.image_headers import (
    READERS,
    HeaderCutError,
    HeaderWrongError,
    NotReadError,
    StoredHeader,
    format_of,
    looks_cut,
    stored_header,
)

Pixels = npt.NDArray[np.uint8]

# reason -> (what it means, whether looking again later can change it)
REASONS: dict[str, tuple[str, bool]] = {
    "missing": ("the store has no such object (any more)", True),
    "changed": ("the object isn't the one that was planned: another etag, and another SHA-256", True),
    "unreadable_object": ("the store refuses to give this object, though it gives others", True),
    "empty": ("the object has no bytes", False),
    "not_a_picture": ("the bytes begin like no picture format", False),
    "unsupported_format": ("a format or variant that this project doesn't read", False),
    "too_large_bytes": ("more bytes than the limit", False),
    "too_large_pixels": ("more pixels than the limit, or a side longer than the limit", False),
    "truncated": ("the end of the data is missing", False),
    "corrupt": ("the data contradicts its own format, or its decoder refuses it", False),
    "other_size": ("its size isn't the one that its annotations give, so their coordinates don't fit", False),
    "bad_boxes": ("the boxes given for the picture make no crop", False),
    "decoder_crash": ("the decoder's process died, hung, or ran out of its memory on this picture", True),
}


class PictureRefused(ValueError):
    """A picture that can't be taken; `reason` is a key of REASONS, the message says what was found."""

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS, reason
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["PictureRefused"], tuple[str, str]]:
        return type(self), (self.reason, str(self))  # crosses process borders


@dataclass(frozen=True)
class PictureHeader:
    """What is known of a picture before it is decoded; width and height after EXIF orientation."""

    format: str
    width: int
    height: int


@dataclass(frozen=True)
class PictureLimits:
    """Which pictures are taken. 128 Mpx are 384 MB of BGR pixels, and up to six times that while decoding.

    accept_truncated takes JPEG, PNG and BMP whose end is missing, once their pixels have begun: the missing part
    is grey (JPEG), or black or the palette's first colour (PNG, BMP). The other formats can't be decoded in part
    and stay refused.
    """

    max_bytes: int = 100_000_000
    max_pixels: int = 128_000_000
    max_side: int = 65_535
    accept_truncated: bool = False


DEFAULT_LIMITS = PictureLimits()
_SIDEWAYS = frozenset({5, 6, 7, 8})  # EXIF orientations that change width and height


def read_header(data: bytes, limits: PictureLimits = DEFAULT_LIMITS) -> PictureHeader:
    """A picture's format and upright size, from its header alone (tens of microseconds; AVIF a little more).

    Refused with PictureRefused: empty, not_a_picture, unsupported_format, too_large_bytes, too_large_pixels,
    truncated (the end is looked for: of WebP, and without `limits.accept_truncated` of JPEG and PNG), corrupt.
    What is only wrong within the coded pixels shows in `decode_picture`.
    """
    header = _stored_header(data, limits)
    width, height = _upright_size(header)
    return PictureHeader(header.format, width, height)


def decode_picture(data: bytes, limits: PictureLimits = DEFAULT_LIMITS) -> Pixels:
    """A picture's pixels, uint8 [H, W, 3] BGR, upright; of an animation the first frame.

    Grey and palette become three channels, CMYK is converted, alpha is dropped, 16 bits are scaled to 8.
    Refused as by `read_header`, and as `truncated` or `corrupt` where the decoder gives up.
    A JPEG with flipped bits decodes where libjpeg recovers; nothing then tells it from a good one.
    """
    header = _stored_header(data, limits)
    stored = _decode_avif(data) if header.format == "AVIF" else _decode(data, header, limits)
    # OpenCV turns TIFF upright whatever it is asked; for all others our own header decides, so that the size
    # that was announced is the size that comes.
    upright = stored if header.format == "TIFF" else _turn_upright(stored, header.orientation)
    if upright.shape[1::-1] != _upright_size(header):
        raise PictureRefused(
            "corrupt",
            f"{header.format} decodes to {upright.shape[1]}x{upright.shape[0]} pixels, but its header says "
            f"{header.width}x{header.height} with orientation {header.orientation}",
        )
    return upright


def _stored_header(data: bytes, limits: PictureLimits) -> StoredHeader:
    _refuse_unreadable(data, limits)
    try:
        header = stored_header(data, allow_cut=limits.accept_truncated)
    except HeaderCutError as error:
        raise PictureRefused("truncated", str(error)) from None
    except HeaderWrongError as error:
        raise PictureRefused("corrupt", str(error)) from None
    except NotReadError as error:
        raise PictureRefused("unsupported_format", str(error)) from None
    _refuse_too_many_pixels(header, limits)
    return header


def _refuse_unreadable(data: bytes, limits: PictureLimits) -> None:
    if not data:
        raise PictureRefused("empty", "the object has no bytes")
    if len(data) > limits.max_bytes:
        raise PictureRefused("too_large_bytes", f"{len(data)} bytes, and the limit is {limits.max_bytes}")
    name = format_of(data)
    if name is None:
        raise PictureRefused("not_a_picture", f"begins with {data[:16]!r}, like no format that is known")
    if name not in READERS:
        raise PictureRefused("unsupported_format", f"{name} isn't read, only {', '.join(READERS)}")


def _refuse_too_many_pixels(header: StoredHeader, limits: PictureLimits) -> None:
    size = f"{header.format} header states {header.width}x{header.height} pixels"
    if header.width * header.height > limits.max_pixels:
        raise PictureRefused("too_large_pixels", f"{size}, and the limit is {limits.max_pixels} in all")
    if max(header.width, header.height) > limits.max_side:
        raise PictureRefused("too_large_pixels", f"{size}, and the limit is {limits.max_side} on a side")


def _upright_size(header: StoredHeader) -> tuple[int, int]:
    if header.orientation in _SIDEWAYS:
        return header.height, header.width
    return header.width, header.height


def _decode(data: bytes, header: StoredHeader, limits: PictureLimits) -> Pixels:
    if header.format == "PNG":
        data = without_packed_text(data)
    pixels = _decode_by_opencv(data)
    is_cut = pixels is None and looks_cut(data)
    if is_cut and limits.accept_truncated:
        whole = completed(data, header.format)
        pixels = None if whole is None else _decode_by_opencv(whole)
    if pixels is None:
        reason = "truncated" if is_cut else "corrupt"
        raise PictureRefused(reason, f"{header.format} of {len(data)} bytes: the decoder refuses it")
    return pixels


def _decode_by_opencv(data: bytes) -> Pixels | None:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(str(error)) from None  # the machine's fault, not the picture's
        return None
    return None if pixels is None else np.asarray(pixels, dtype=np.uint8)


def _decode_avif(data: bytes) -> Pixels:
    """By Pillow: OpenCV 5.0 leaves out an AVIF's rotation."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["AVIF"]) as picture:
            rgb = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:
        raise PictureRefused("corrupt", f"AVIF of {len(data)} bytes: the decoder refuses it ({error})") from None
    return np.ascontiguousarray(rgb[..., ::-1])


def _turn_upright(stored: Pixels, orientation: int) -> Pixels:
    """Undoes an EXIF orientation (EXIF 2.3, tag 0x0112)."""
    if orientation == 1:
        return stored
    transposed = stored.transpose(1, 0, 2) if orientation in _SIDEWAYS else stored
    flip_y, flip_x = {
        2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)
    }[orientation]  # fmt: skip
    return np.ascontiguousarray(transposed[::flip_y, ::flip_x])
