"""The entries of a JSON array, from pieces that cut it anywhere: what `json.loads` gives, or a refusal by place."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline import json_array
from pipeline.errors import DataError

ENTRIES: list[Any] = [{"a": [1, -2.5e-3, {"b": "]}\"\\ ä\u2028"}], "c": None}, 12345, -0.5, "x,]", True, [], {}, 7]


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start:start + size] for start in range(0, len(data), size)]


def entries(data: bytes, size: int = 1 << 20) -> list[Any]:
    return list(json_array.iterate_array(pieces(data, size), source="d.json", expected="a list was expected"))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_wherever_it_is_cut_the_entries_are_those_of_the_whole(size: int, encoding: str) -> None:
    text = json.dumps(ENTRIES, ensure_ascii=False, indent=1) + "\r\n\t "
    assert entries(text.encode(encoding), max(size, 4)) == ENTRIES
    assert entries(json.dumps(ENTRIES).encode(), size) == ENTRIES


@pytest.mark.parametrize("data", [b"[]", b" [ \n] "])
def test_an_empty_array_has_no_entries(data: bytes) -> None:
    assert entries(data, 1) == []


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(("data", "says"), [
    (b'[{"a": 1}, {"a": oops}]', "entry 1: Expecting value, at character 17"),
    (b'[1, 2', "entry 2: , or ] is missing at character 5"), (b"[1 2]", "entry 1: , or ] is missing at character 3"),
    (b"[1, ]", "entry 1: Expecting value"), (b"[,1]", "entry 0: Expecting value"), (b"[", "entry 0: Expecting value"),
    (b"[1] 2", "entry 1: something follows the array, at character 4"), (b'["a', "entry 0: Unterminated string"),
    (b"[1, NaN]", "entry 1: NaN is not a number that JSON knows"), (b"[-Infinity]", "entry 0: -Infinity is not"),
    (b'["\xff"]', "entry 0: 'utf-8' codec can't decode")])
def test_what_is_no_json_is_refused_with_its_place(data: bytes, says: str, size: int) -> None:
    with pytest.raises(DataError, match=f"^d.json: not JSON: {says}.*Expected: a list was expected"):
        entries(data, size)


def test_an_entry_of_endless_depth_is_refused() -> None:
    with pytest.raises(DataError, match=r"^d.json: not JSON: entry 0: maximum recursion"):
        entries(b"[" * 100_000)


@pytest.mark.parametrize("data", [b'{"images": []}', b"<html>", b"12", b""])
def test_what_is_no_array_is_refused_by_how_it_begins(data: bytes) -> None:
    with pytest.raises(DataError, match=f"^d.json: begins with '{data[:1].decode()}', but a list was expected"):
        entries(data)


def test_an_entry_that_never_ends_is_given_up_before_the_file_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "ENTRY_CHARACTERS", 1000)
    taken = []

    def endless() -> Iterator[bytes]:
        yield b'[{"a": 1}, {"b": "'
        while True:
            taken.append(100)
            yield b"x" * 100

    with pytest.raises(DataError, match="entry 1: Unterminated string"):
        list(json_array.iterate_array(endless(), source="d.json", expected=""))
    assert sum(taken) < 3000
