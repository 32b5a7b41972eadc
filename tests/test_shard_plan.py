"""Which object goes to which shard, and what a grown input changes: without a store, by names and sizes alone."""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import pytest

from pipeline import hash_buckets, shard_plan
from pipeline.errors import DataError
from pipeline.hash_buckets import HashBuckets
from pipeline.shard_plan import Bounds
from pipeline.storage import StoredObject

Listed = Iterable[tuple[str, int]]


def names(count: int, size: int = 10) -> list[tuple[str, int]]:
    return [(f"{number:04d}.jpg", size) for number in range(count)]


def assign(listed: Listed, *, seed: int = 0, pictures: int = 50, size: int = 10**9) -> list[list[str]]:
    objects = [StoredObject(name, "", bytes_, "etag") for name, bytes_ in listed]
    with HashBuckets(shard_plan.LISTED) as buckets:
        shard_plan.spread(shard_plan.listed_tables(objects), buckets, seed=seed)
        return [table["key"].to_pylist() for table in shard_plan.assign_shards(buckets, Bounds(pictures, size))]


def test_every_object_has_exactly_one_shard() -> None:
    assert sorted(name for group in assign(names(1000)) for name in group) == [name for name, _ in names(1000)]


def test_shards_are_sorted_by_key() -> None:
    assert all(group == sorted(group) for group in assign(names(1000)))


def test_shards_are_bounded_by_count_and_by_bytes() -> None:
    assert max(map(len, assign(names(1000)))) <= 50
    assert max(map(len, assign(names(1000), size=95))) <= 9


def test_shards_smaller_than_a_bucket_are_bounded_too() -> None:
    assert max(map(len, assign(names(3000), pictures=3))) <= 3


def test_an_object_above_the_bytes_of_a_shard_is_alone() -> None:
    assert ["huge.tif"] in assign([*names(20), ("huge.tif", 10**6)], size=1000)


def test_the_order_of_the_listing_does_not_matter() -> None:
    assert assign(names(300)) == assign(names(300)[::-1])


def test_another_seed_gives_other_shards() -> None:
    assert assign(names(300)) != assign(names(300), seed=1)


def test_one_more_picture_changes_no_shard_but_its_own() -> None:
    before = {tuple(group) for group in assign(names(1000))}
    after = {tuple(group) for group in assign([*names(1000), ("new.jpg", 10)])}
    assert len(before - after) == 1  # the shard that it came to, which may have been halved


def test_one_larger_picture_changes_no_shard_but_its_own() -> None:
    grown = [(name, 90 if name == "0500.jpg" else size) for name, size in names(1000)]
    before, after = ({tuple(group) for group in assign(some, size=100)} for some in (names(1000), grown))
    assert len(before - after) == 1


def test_more_rows_than_fit_into_memory_give_the_same_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    few = assign(names(1000))
    monkeypatch.setattr(hash_buckets, "ROWS_IN_MEMORY", 64)
    monkeypatch.setattr(shard_plan, "ROWS_AT_ONCE", 10)
    assert assign(names(1000)) == few


def test_a_shard_is_where_its_hash_says() -> None:
    groups = assign(names(60), pictures=59)
    first_bits = [{hashlib.sha256(f"0/{name}".encode()).digest()[0] >> 7 for name in group} for group in groups]
    assert first_bits == [{0}, {1}]


def test_a_name_that_is_not_utf8_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"caf.*isn't UTF-8"):
        assign([("caf\udce9.jpg", 1)])


# --- what has changed ---

LIVE = [("a", "1", 10, "aaaa", False), ("b", "2", 10, "bbbb", False), ("c", "3", 10, "cccc", False)]


def compare(now: Sequence[tuple[str, str, int]], live: Sequence[tuple[Any, ...]] = LIVE, *,
            left_out: Sequence[str] = (), same: Sequence[str] = ()) -> tuple[Any, Any, Any]:
    """Keys to take; (part, key, why) of dropped rows; keys that were looked at again. `same`: keys of equal bytes."""
    looked: list[str] = []

    def look_again(rows: pa.Table, sha256: Sequence[str]) -> list[bool]:
        looked.extend(rows["key"].to_pylist())
        assert [text[0] for text in sha256] == rows["key"].to_pylist()
        return [key in same for key in rows["key"].to_pylist()]

    with ExitStack() as stack:
        listed = stack.enter_context(HashBuckets(shard_plan.LISTED))
        before = stack.enter_context(HashBuckets(shard_plan.LIVE))
        columns = [list(column) for column in zip(*now, strict=True)] or [[], [], []]
        shard_plan.spread([pa.table(columns, schema=shard_plan.LISTED)], listed, seed=0)
        rows = [(key, etag, size, sha256, f"part-{key}", again) for key, etag, size, sha256, again in live]
        columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in shard_plan.LIVE.names]
        shard_plan.spread([pa.table(columns, schema=shard_plan.LIVE)], before, seed=0)
        pairs = list(shard_plan.compare(listed, before, left_out=pa.array(left_out, pa.string()),
                                        look_again=look_again, source="s3://in"))
    taken = sorted(key for take, _ in pairs for key in take["key"].to_pylist())
    dropped = sorted(tuple(row.values()) for _, drop in pairs for row in drop.to_pylist())
    return taken, dropped, sorted(looked)


SAME = [("a", "1", 10), ("b", "2", 10), ("c", "3", 10)]


def test_the_same_listing_changes_nothing() -> None:
    assert compare(SAME) == ([], [], [])


def test_a_first_version_takes_all() -> None:
    assert compare(SAME, live=[]) == (["a", "b", "c"], [], [])


def test_a_new_object_is_taken() -> None:
    assert compare([*SAME, ("d", "4", 10)]) == (["d"], [], [])


def test_a_removed_object_is_dropped_and_named() -> None:
    assert compare(SAME[:2]) == ([], [("part-c", "c", "removed")], [])


def test_another_size_is_a_change_without_looking() -> None:
    assert compare([*SAME[:2], ("c", "9", 11)]) == (["c"], [("part-c", "c", "changed")], [])


def test_another_etag_is_looked_at_and_an_equal_sha256_is_no_change() -> None:
    assert compare([("a", "9", 10), ("b", "8", 10), SAME[2]], same=["a"]) == (
        ["b"], [("part-b", "b", "changed")], ["a", "b"])


def test_a_row_to_be_made_again_is_taken_though_its_object_is_the_same() -> None:
    live = [*LIVE[:2], ("c", "3", 10, "cccc", True)]
    assert compare(SAME, live) == (["c"], [("part-c", "c", "changed")], [])


def test_an_object_that_could_not_be_read_before_is_a_change_when_it_has_another_etag() -> None:
    live = [*LIVE[:2], ("c", "3", 10, None, False)]
    assert compare([*SAME[:2], ("c", "4", 10)], live) == (["c"], [("part-c", "c", "changed")], [])


def test_a_key_that_was_taken_out_stays_out() -> None:
    assert compare([*SAME, ("d", "4", 10)], left_out=["d"]) == ([], [], [])


def test_a_key_that_is_listed_twice_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="s3://in lists d more than once"):
        compare([*SAME, ("d", "4", 10), ("d", "5", 10)])


# --- the same content ---


def test_copies_are_those_with_the_larger_keys() -> None:
    rows = {"sha256": ["ab" * 32, "cd" * 32, "ab" * 32, "ab" * 32], "key": ["z", "y", "m", "a"], "part": ["1"] * 4}
    with HashBuckets(shard_plan.CONTENT) as contents:
        shard_plan.spread_by_content([pa.table(rows, schema=shard_plan.CONTENT)], contents)
        copies = [key for table in shard_plan.repeated_content(contents) for key in table["key"].to_pylist()]
    assert copies == ["m", "z"]
