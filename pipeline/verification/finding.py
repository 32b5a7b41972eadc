"""What a check says when something is wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

FORMAT = 1
RESTORE = "Restore the object as it was written, or run again into a new --output."
WRITER = "It was written so: run again into a new --output, and report this line."
MOVE = "Move it elsewhere."
PERMIT = "Give this user the right to read it."


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `object` is named relative to the dataset.

    kind    missing | doubled | foreign | damaged | unreadable (no JSON, no Parquet) | keys | columns | source
            (two files disagree) | plan (rows that aren't those planned) | row | counts | dropped | lost
    """

    kind: str
    object: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.object}: expected {self.expected}; found {self.found}. {self.remedy}"


Tell = Callable[[Finding], None]


def some(names: Sequence[str], count: int | None = None) -> str:
    """At most three of the names, and how many more there are; `count`: of all of them, where some are left out."""
    more = (count or len(names)) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
