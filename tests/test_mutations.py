"""Whatever befalls a picture's bytes, it decodes to the size that its header announces or is refused for a reason.

Each mutation is decoded in a child with little memory and time, so that a crash or a hang is a failed test that
names the picture, the mutation and the seed.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.images import PictureHeader, PictureLimits, PictureRefused
from pipeline.isolation import IsolatedDecoder
from tests.mutations import HEIGHT, WIDTH, mutated, whole_pictures

LIMITS = PictureLimits(max_bytes=20_000_000, max_pixels=4_000_000, max_side=20_000)
ACCEPTING = PictureLimits(max_bytes=20_000_000, max_pixels=4_000_000, max_side=20_000, accept_truncated=True)
PICTURES = whole_pictures()
EXPECTED_REASONS = {
    "empty", "not_a_picture", "unsupported_format", "too_large_bytes", "too_large_pixels", "truncated", "corrupt",
}  # fmt: skip


@pytest.fixture(scope="module")
def decoders() -> Iterator[list[IsolatedDecoder]]:
    with IsolatedDecoder(LIMITS, seconds=5) as strict, IsolatedDecoder(ACCEPTING, seconds=5) as accepting:
        yield [strict, accepting]


def fate(decoder: IsolatedDecoder, data: bytes) -> str:
    """`decoded` or the reason; AssertionError where header and pixels disagree, or the reason isn't expected."""
    header, pixels = outcome(decoder.read_header, data), outcome(decoder.decode, data)
    if isinstance(pixels, PictureRefused):
        assert pixels.reason in EXPECTED_REASONS, f"{pixels.reason}: {pixels}"
        if isinstance(header, PictureRefused):
            assert header.reason == pixels.reason, f"{header.reason} ({header}), but then {pixels.reason} ({pixels})"
        return pixels.reason
    assert isinstance(header, PictureHeader), f"decodes, but its header is refused: {header!r}"
    assert pixels.shape == (header.height, header.width, 3), f"{header}, but {pixels.shape}"
    return "decoded"


def outcome(act: Callable[[bytes], Any], data: bytes) -> Any:
    """What the act gives, or its refusal."""
    try:
        return act(data)
    except PictureRefused as refused:
        return refused


def fates(decoder: IsolatedDecoder, name: str, whole: bytes, seeds: range) -> Counter[str]:
    found: Counter[str] = Counter()
    for seed in seeds:
        mutations, data = mutated(whole, seed)
        try:
            found[fate(decoder, data)] += 1
        except (AssertionError, RuntimeError) as error:
            pytest.fail(f"{name}, seed {seed} ({mutations}): {error}")
    return found


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_themselves_decode(decoders: list[IsolatedDecoder], name: str) -> None:
    header = decoders[0].read_header(PICTURES[name])
    size = (HEIGHT, WIDTH) if "exif" in name else (WIDTH, HEIGHT)
    assert (header.width, header.height) == size
    assert decoders[0].decode(PICTURES[name]).shape == (*size[::-1], 3)


@pytest.mark.parametrize("name", PICTURES)
def test_a_mutated_picture_decodes_as_announced_or_is_refused(decoders: list[IsolatedDecoder], name: str) -> None:
    for decoder in decoders:
        found = fates(decoder, name, PICTURES[name], range(80))
        assert found.total() == 80
        assert len(found) >= 3  # the mutations reach both decoders and refusals


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_thousands_of_mutated_pictures_decode_as_announced_or_are_refused(
    decoders: list[IsolatedDecoder], name: str
) -> None:
    for decoder in decoders:
        print(name, fates(decoder, name, PICTURES[name], range(80, 3000)))


def test_mutated_pictures_as_found_in_the_wild_decode_as_announced_or_are_refused(
    shared: Path, decoders: list[IsolatedDecoder]
) -> None:
    paths = sorted((shared / "data" / "torture").iterdir())
    wholes = {path.name: path.read_bytes() for path in paths if path.suffix != ".csv" and path.stat().st_size < 200_000}
    assert len(wholes) > 30
    for name, whole in wholes.items():
        fates(decoders[0], name, whole, range(6))


def test_a_seed_gives_the_same_mutation_again() -> None:
    for seed in range(30):
        assert mutated(PICTURES["png"], seed) == mutated(PICTURES["png"], seed)
