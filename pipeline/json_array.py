"""The entries of a JSON array one by one, from bytes that come in pieces: a file of any size, in bounded memory.

It knows nothing of what the entries are.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from pipeline.errors import DataError

# An entry that hasn't ended after so many characters is broken: reading on would only fill the memory
ENTRY_CHARACTERS = 16 << 20
_SPACE, _NUMBER = re.compile(r"[ \t\n\r]*"), re.compile(r"[-+.0-9eE]*")


def iterate_array(pieces: Iterable[bytes], *, source: str, expected: str) -> Iterator[Any]:
    """The array's entries in their order; all pieces have been taken when it ends.

    source, expected  the file's name, and what should be in it, for messages
    Refused with DataError, naming the entry and the character: what isn't JSON (NaN and Infinity aren't). What isn't an
    array is refused by how it begins.
    """
    text = _Text(pieces)
    entries, count = _entries(text), 0
    try:
        if (char := text.next_character()) != "[":
            raise DataError(f"{source}: begins with {char!r}, but {expected}.")
        for entry in entries:
            yield entry
            count += 1
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not JSON: entry {count}: {error}. Expected: {expected}.") from None


def refuse_constant(name: str) -> NoReturn:
    """For `parse_constant`: what Python takes and JSON doesn't."""
    raise ValueError(f"{name} is not a number that JSON knows")


def _entries(text: "_Text") -> Iterator[Any]:
    text.take("[")
    if text.next_character() == "]":
        text.take("]")
    else:
        yield text.take_value()
        while text.take(",]") == ",":
            yield text.take_value()
    if text.next_character():
        raise ValueError(f"something follows the array, at character {text.position()}")


class _Text:
    """Text that comes in pieces: those that were not taken yet. What is wrong with it is a ValueError."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = _decoded(pieces)
        self._text, self._at, self._before = "", 0, 0
        self._decoder = json.JSONDecoder(parse_constant=refuse_constant)

    def position(self) -> int:
        """How many characters were taken."""
        return self._before + self._at

    def next_character(self) -> str:
        """The next one that is no space, which isn't taken; "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def take(self, characters: str) -> str:
        """The next one that is no space, which must be one of these."""
        found = self.next_character()
        if not found or found not in characters:
            raise ValueError(f"{' or '.join(characters)} is missing at character {self.position()}")
        self._at += 1
        return found

    def take_value(self) -> Any:
        """The JSON value that begins here."""
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > ENTRY_CHARACTERS or not self._read_on():
                    raise ValueError(f"{error.msg}, at character {self._before + error.pos}") from None
            else:
                if not self._may_go_on(end) or not self._read_on():
                    self._at = end
                    return value

    def _may_go_on(self, end: int) -> bool:
        """Whether what was taken for a number until here may be the beginning of another one."""
        match = _NUMBER.match(self._text, end)
        assert match is not None
        return match.end() == len(self._text) and self._text[end - 1] not in "}]\""

    def _read_on(self) -> bool:
        """At least as much again as is left: a long value isn't begun again for each piece. False at the end."""
        left, added = len(self._text) - self._at, 0
        pieces = [self._text[self._at:]]
        while added <= left and (piece := next(self._pieces, None)) is not None:
            pieces.append(piece)
            added += len(piece)
        if added:
            self._text, self._at, self._before = "".join(pieces), 0, self._before + self._at
        return added > 0


def _decoded(pieces: Iterable[bytes]) -> Iterator[str]:
    """As `json.loads` decodes; the first piece tells the encoding."""
    remaining = iter(pieces)
    first = next(remaining, b"")
    return codecs.iterdecode(itertools.chain([first], remaining), json.detect_encoding(first), "surrogatepass")
