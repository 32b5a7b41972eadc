"""Numbers in sentences for people."""

from collections.abc import Mapping


def counted(number: int, noun: str) -> str:
    """1 picture, 2 pictures, 12,000 pictures."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def ranked(counts: Mapping[str, int], most: int | None = None) -> str:
    """The names with their counts, the largest first: `corrupt 3, empty 1`."""
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count}" for name, count in order[:most])


def clock(seconds: float) -> str:
    """1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
