"""Bytes to pixels: what is decoded, to what, and what is refused for which reason.

The pictures are made here; a folder of found and broken ones, with what a good program does to each, is used
where it is present.
"""

import csv
import io
import pickle
import re
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.images import (
    DEFAULT_LIMITS,
    REASONS,
    PictureHeader,
    PictureLimits,
    PictureRefused,
    decode_picture,
    read_header,
)

WIDTH, HEIGHT = 90, 60
TORTURE_INDEX = Path(__file__).resolve().parents[2] / "shared" / "data" / "torture" / "index.csv"
LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}}


def gradient_rgb() -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([x * 255 // 89, y * 255 // 59, (x + y) * 255 // 148], axis=-1).astype(np.uint8)


def encoded(picture: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


def gradient(mode: str = "RGB") -> Image.Image:
    picture = Image.fromarray(gradient_rgb())
    return picture.quantize(64) if mode == "P" else picture.convert(mode)


def textured_jpeg(**options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    return encoded(Image.fromarray(cv2.resize(noise, (180, 120))), "JPEG", **options)


def reason_of(data: bytes, limits: PictureLimits = DEFAULT_LIMITS) -> str:
    with pytest.raises(PictureRefused) as refusal:
        decode_picture(data, limits)
    return refusal.value.reason


def pixels_or_reason(data: bytes, limits: PictureLimits = DEFAULT_LIMITS) -> np.ndarray | str:
    try:
        return decode_picture(data, limits)
    except PictureRefused as refusal:
        return refusal.reason


@pytest.mark.parametrize("format_", LOSSLESS)
def test_lossless_formats_come_out_as_they_went_in_but_bgr(format_: str) -> None:
    data = encoded(gradient(), format_, **LOSSLESS[format_])
    pixels = decode_picture(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, gradient_rgb()[..., ::-1])
    assert (read_header(data).width, read_header(data).height) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("format_", ["JPEG", "AVIF", "WEBP"])
def test_lossy_formats_come_out_nearly_as_they_went_in(format_: str) -> None:
    pixels = decode_picture(encoded(gradient(), format_, quality=95))
    assert np.abs(pixels.astype(int) - gradient_rgb()[..., ::-1]).mean() < 3


def test_a_jpeg_is_what_one_call_of_opencv_makes_of_it() -> None:
    data = textured_jpeg()
    np.testing.assert_array_equal(decode_picture(data), cv2.imdecode(np.frombuffer(data, np.uint8), 1))


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA"])
def test_grey_palette_and_alpha_become_three_channels(mode: str) -> None:
    picture = gradient(mode)
    expected = np.asarray(picture.convert("RGB"))[..., ::-1]
    np.testing.assert_array_equal(decode_picture(encoded(picture, "PNG")), expected)


def test_transparent_pixels_keep_their_colour() -> None:
    rgba = np.dstack([gradient_rgb(), np.zeros((HEIGHT, WIDTH), np.uint8)])
    pixels = decode_picture(encoded(Image.fromarray(rgba), "PNG"))
    np.testing.assert_array_equal(pixels, gradient_rgb()[..., ::-1])


def test_cmyk_is_no_negative() -> None:
    pixels = decode_picture(encoded(gradient("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - gradient_rgb()[..., ::-1]).mean() < 3


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(suffix: str, channels: int) -> None:
    deep = gradient_rgb().astype(np.uint16)[..., :channels] * 257
    _, data = cv2.imencode(suffix, deep)
    expected = np.broadcast_to(gradient_rgb()[..., :channels], (HEIGHT, WIDTH, 3))
    np.testing.assert_array_equal(decode_picture(data.tobytes()), expected)


def test_of_an_animation_the_first_frame_comes() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    for format_ in ("GIF", "WEBP"):
        data = encoded(frames[0], format_, save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(decode_picture(data)[3, 4], [0, 0, 255], atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_exif_orientation_comes_out_upright(format_: str, orientation: int) -> None:
    upright = gradient_rgb()
    data = encoded(_stored_as(upright, orientation), format_, exif=_exif(orientation), quality=95)
    header = read_header(data)
    assert (header.width, header.height) == (WIDTH, HEIGHT)
    pixels = decode_picture(data)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright[..., ::-1]).mean() < 3


def _stored_as(upright: np.ndarray, orientation: int) -> Image.Image:
    """The picture that EXIF 2.3's table calls upright: where the stored row 0 and column 0 are in it."""
    stored = {
        1: upright,  # row 0 is the top, column 0 the left side
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.transpose(1, 0, 2),  # left, top
        6: upright[:, ::-1].transpose(1, 0, 2),  # right, top
        7: upright[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
        8: upright[::-1].transpose(1, 0, 2),  # left, bottom
    }[orientation]
    return Image.fromarray(np.ascontiguousarray(stored))


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xee" * 90])
def test_a_broken_exif_block_is_no_reason_to_refuse(exif: bytes) -> None:
    assert read_header(encoded(gradient(), "JPEG", exif=exif)) == PictureHeader("JPEG", WIDTH, HEIGHT)


def test_a_png_with_imagemagicks_exif_text_comes_out_upright() -> None:
    profile = b"\nexif\n%8d\n" % 32 + (b"Exif\0\0" + _exif(6).tobytes()[6:]).hex().encode()
    stored = encoded(gradient(), "PNG")
    text = _chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))
    data = stored[:33] + text + stored[33:]
    assert read_header(data) == PictureHeader("PNG", HEIGHT, WIDTH)
    expected = cv2.rotate(gradient_rgb()[..., ::-1], cv2.ROTATE_90_CLOCKWISE)
    np.testing.assert_array_equal(decode_picture(data), expected)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def test_bytes_behind_the_end_are_ignored() -> None:
    for data in (textured_jpeg(), encoded(gradient(), "PNG")):
        np.testing.assert_array_equal(decode_picture(data + b"more" * 99), decode_picture(data))


def test_an_empty_object_is_refused_as_empty() -> None:
    assert reason_of(b"") == "empty"


@pytest.mark.parametrize("data", [b"\xff" * 4096, b"<html>404</html>", b"\0", b"{}", b"RIFF\0\0\0\0WAVE", b"GIF"])
def test_what_begins_like_no_picture_is_refused_as_such(data: bytes) -> None:
    assert reason_of(data) == "not_a_picture"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "isom"),
        (b"\0\0\1\0\1\0\x10\x10", "ICO"),
        (b"%PDF-1.7", "PDF"),
        (b"II+\0\x08\0\0\0", "BigTIFF"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "samples"),
    ],
)
def test_a_format_that_is_known_but_not_read_is_named(data: bytes, name: str) -> None:
    with pytest.raises(PictureRefused, match=name) as refusal:
        read_header(data)
    assert refusal.value.reason == "unsupported_format"


def test_limits_are_held_against_the_header() -> None:
    data = encoded(gradient(), "PNG")
    read_header(data, PictureLimits(len(data), WIDTH * HEIGHT, WIDTH))
    assert reason_of(data, PictureLimits(max_bytes=len(data) - 1)) == "too_large_bytes"
    assert reason_of(data, PictureLimits(max_pixels=WIDTH * HEIGHT - 1)) == "too_large_pixels"
    assert reason_of(data, PictureLimits(max_side=WIDTH - 1)) == "too_large_pixels"


def test_a_bomb_is_refused_before_a_decoder_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("the decoder was asked"))
    data = bytearray(encoded(gradient(), "PNG"))
    data[16:24] = struct.pack(">LL", 65_000, 65_000)
    assert reason_of(bytes(data)) == "too_large_pixels"


@pytest.mark.parametrize(
    ("format_", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("AVIF", {}),
    ],
)
def test_a_cut_picture_is_refused_wherever_it_was_cut(format_: str, options: dict[str, Any]) -> None:
    data = encoded(gradient(), format_, **options)
    cuts = {*range(1, len(data), max(1, len(data) // 60)), *range(len(data) - 6, len(data))}
    reasons = {reason_of(data[:cut]) for cut in cuts if cut >= 16}
    assert reasons <= {"truncated", "corrupt"}
    if format_ in ("JPEG", "WEBP"):
        assert reasons == {"truncated"}


def test_a_jpeg_whose_tail_is_zeros_is_refused_as_truncated() -> None:
    data = textured_jpeg()
    half = len(data) // 2  # a download that was allocated in full and never finished
    assert reason_of(data[:half] + bytes(len(data) - half)) == "truncated"


def test_the_end_marker_of_a_thumbnail_does_not_make_a_jpeg_whole() -> None:
    thumbnail = b"Exif\0\0MM\0*\0\0\0\x08\0\0" + textured_jpeg(quality=5)
    data = textured_jpeg(exif=thumbnail)
    assert b"\xff\xd9" in data[:-2]
    assert reason_of(data[:-2]) == "truncated"


ACCEPTING = PictureLimits(accept_truncated=True)


def deep_png() -> bytes:
    return bytes(cv2.imencode(".png", gradient_rgb()[..., ::-1].astype(np.uint16) * 257)[1])


@pytest.mark.parametrize(
    "data",
    [
        encoded(gradient(), "PNG"),
        encoded(gradient(), "PNG", compress_level=0),
        encoded(gradient("P"), "PNG"),
        encoded(gradient("1"), "PNG"),
        encoded(gradient("LA"), "PNG"),
        encoded(gradient("RGBA"), "PNG"),
        deep_png(),
        encoded(gradient(), "BMP"),
        encoded(gradient("P"), "BMP"),
    ],
)
def test_a_cut_png_or_bmp_gives_its_rows_and_black_if_asked_to(data: bytes) -> None:
    assert reason_of(data[: len(data) * 6 // 10]) == "truncated"
    whole, partial = decode_picture(data), decode_picture(data[: len(data) * 6 // 10], ACCEPTING)
    if data.startswith(b"BM"):  # stored from the bottom
        whole, partial = whole[::-1], partial[::-1]
    assert partial.shape == whole.shape
    same = (whole == partial).all(axis=(1, 2))
    num_rows = int(same.argmin())
    assert num_rows >= 10
    assert (partial[num_rows + 1 :] == partial[-1, -1]).all()


@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_jpeg_gives_what_is_there_and_grey_if_asked_to(progressive: bool) -> None:
    data = textured_jpeg(progressive=progressive)
    cut = data[: len(data) * 6 // 10]
    assert reason_of(cut) == "truncated"
    whole, partial = decode_picture(data), decode_picture(cut, ACCEPTING)
    assert read_header(cut, ACCEPTING) == read_header(data)
    difference = np.abs(whole.astype(int) - partial).mean(axis=(1, 2))
    if progressive:
        assert difference.max() < 40  # coarse everywhere
    else:
        assert not difference[:32].any()
        assert len(np.unique(partial[-8:])) == 1


def test_a_cut_sideways_jpeg_comes_out_upright_if_asked_for() -> None:
    cut = textured_jpeg(exif=_exif(6))[:-200]
    header = read_header(cut, ACCEPTING)
    assert (header.width, header.height) == (120, 180)
    assert decode_picture(cut, ACCEPTING).shape == (180, 120, 3)


def test_a_cut_interlaced_png_gives_its_first_passes_if_asked_to() -> None:
    # 8 x 8 grey: pass 1 is the pixel at 0, 0 and pass 2 that at 4, 0 (PNG specification, 8.2); the rest is cut off
    header = struct.pack(">LLBBBBB", 8, 8, 8, 0, 0, 0, 1)
    cut = zlib.compressobj()
    packed = cut.compress(bytes([0, 200, 0, 100])) + cut.flush(zlib.Z_SYNC_FLUSH)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + struct.pack(">L", 900) + b"IDAT" + packed
    pixels = decode_picture(data, ACCEPTING)
    assert (pixels[0, 0, 0], pixels[0, 4, 0], pixels[7, 7, 0]) == (200, 100, 0)


@pytest.mark.parametrize(
    ("format_", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("TIFF", {}),
        ("AVIF", {}),
    ],
)
def test_a_picture_cut_anywhere_is_announced_as_it_comes_or_refused(format_: str, options: dict[str, Any]) -> None:
    data = encoded(gradient(), format_, **options)
    cuts = {*range(16, len(data), max(1, len(data) // 100)), *range(len(data) - 16, len(data))}
    num_decoded = 0
    for cut in cuts:
        pixels = pixels_or_reason(data[:cut], ACCEPTING)
        if isinstance(pixels, str):
            assert pixels in ("truncated", "corrupt")
        else:
            num_decoded += 1
            assert pixels.shape == (HEIGHT, WIDTH, 3)
            assert read_header(data[:cut], ACCEPTING).width == WIDTH
    assert (num_decoded > 10) == (format_ in ("JPEG", "PNG", "BMP"))


def test_a_whole_picture_is_the_same_whether_cut_ones_are_accepted_or_not() -> None:
    for data in (textured_jpeg(), encoded(gradient(), "PNG"), encoded(gradient(), "BMP")):
        np.testing.assert_array_equal(decode_picture(data, ACCEPTING), decode_picture(data))


def test_damage_is_not_accepted_for_a_cut() -> None:
    png = bytearray(encoded(gradient(), "PNG"))
    png[len(png) // 2] ^= 0xFF
    assert reason_of(bytes(png), ACCEPTING) == "corrupt"
    assert reason_of(b"\xff\xd8\xff\xd9", ACCEPTING) == "corrupt"
    assert reason_of(textured_jpeg()[:100], ACCEPTING) == "truncated"  # before the first pixel


@pytest.mark.parametrize(
    ("format_", "place", "lie"),
    [
        ("BMP", 10, struct.pack("<L", 0xFFFFFFF0)),  # where the pixels begin
        ("BMP", 28, struct.pack("<H", 0xFFFF)),  # bits for each
        ("PNG", 24, b"\xff"),  # bits for each channel
    ],
)
def test_a_cut_picture_whose_header_lies_is_not_made_as_long_as_it_says(format_: str, place: int, lie: bytes) -> None:
    data = bytearray(encoded(gradient(), format_)[:-100])
    data[place : place + len(lie)] = lie
    tracemalloc.start()
    assert reason_of(bytes(data), ACCEPTING) == "truncated"
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_cut_bomb_is_refused_like_a_whole_one() -> None:
    data = bytearray(encoded(gradient(), "PNG")[:-20])
    data[16:24] = struct.pack(">LL", 65_000, 65_000)
    assert reason_of(bytes(data), ACCEPTING) == "too_large_pixels"


def test_damage_within_is_refused_as_corrupt() -> None:
    png = bytearray(encoded(gradient(), "PNG"))
    png[len(png) // 2] ^= 0xFF  # its chunk's checksum is wrong now
    assert reason_of(bytes(png)) == "corrupt"
    assert reason_of(b"\xff\xd8\xff\xd9") == "corrupt"


def test_random_damage_ends_in_pixels_of_the_announced_size_or_a_refusal() -> None:
    generator = np.random.default_rng(0)
    for format_ in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        whole = encoded(gradient(), format_)
        for _ in range(60):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), 4):
                data[place] = generator.integers(0, 256)
            pixels = pixels_or_reason(bytes(data), PictureLimits(max_pixels=1_000_000))
            if isinstance(pixels, str):
                assert pixels in REASONS
            else:
                header = read_header(bytes(data))
                assert pixels.shape == (header.height, header.width, 3)


def test_a_refusal_crosses_process_borders_with_its_reason() -> None:
    again = pickle.loads(pickle.dumps(PictureRefused("corrupt", "what was found")))
    assert (again.reason, str(again)) == ("corrupt", "what was found")


def _torture() -> list[Any]:
    if not TORTURE_INDEX.is_file():
        return [{}]  # one test, which the fixture `shared` skips
    with TORTURE_INDEX.open() as index:
        return [pytest.param(row, id=row["file"]) for row in csv.DictReader(index)]


@pytest.mark.parametrize("row", _torture())
def test_a_found_or_broken_picture_meets_its_fate(shared: Path, row: dict[str, str]) -> None:
    data = (shared / "data" / "torture" / row["file"]).read_bytes()
    pixels = pixels_or_reason(data)
    assert row["expected"] in ("either", "reject" if isinstance(pixels, str) else "decode"), pixels
    if isinstance(pixels, str):
        return
    header = read_header(data)
    assert pixels.shape == (header.height, header.width, 3)
    truth = row["ground_truth"]
    if truth.startswith("coco17_mini val image_id") and truth.endswith("1 person(s)"):
        image_id = int(truth.split()[3].rstrip(","))
        original = cv2.imread(str(shared / f"data/coco17_mini/images/{image_id:012d}.jpg"))
        if "gray" in row["file"]:
            original = cv2.cvtColor(original, cv2.COLOR_BGR2GRAY)[..., None]
        assert np.abs(original.astype(float) - pixels).mean() < 6


def test_every_reason_is_documented_as_the_code_has_it() -> None:
    table = (Path(__file__).parents[1] / "docs" / "shards.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (yes|no) \|$", table, re.M)
    assert {reason: (what, again == "yes") for reason, what, again in rows} == REASONS
