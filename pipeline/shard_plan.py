"""Which object goes to which shard, and what has changed since a dataset was made: for millions of objects, in
bounded memory.

It works on tables of names, sizes and ETags, bucket by bucket of their hashes; it reads no picture.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.hash_buckets import HASH, NUM_BUCKETS, HashBuckets, Hashes, name_hashes
from pipeline.storage import StoredObject

ROWS_AT_ONCE = 10_000
LISTED = pa.schema([("key", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
# a row of an existing dataset; `again`: it has to be made anew even if its object is still the same
LIVE = pa.schema([*LISTED, ("sha256", pa.string()), ("part", pa.string()), ("again", pa.bool_())])
# rows of parts that no longer count, and why; a key without a part stays out of all later versions
DROPPED = pa.schema([("part", pa.string()), ("key", pa.string()), ("why", pa.string())])
CHANGED, REMOVED, REQUEST, DUPLICATE = "changed", "removed", "request", "duplicate"

# objects as listed now, and the SHA-256 that each had -> whether each still has it
LookAgain = Callable[[pa.Table, Sequence[str]], Sequence[bool]]


@dataclass(frozen=True)
class Bounds:
    """How large a shard may become."""

    pictures: int
    bytes: int


def listed_tables(objects: Iterable[StoredObject]) -> Iterator[pa.Table]:
    """A listing as tables (LISTED). A name that isn't UTF-8, which a disk can have, is refused (DataError)."""
    remaining = iter(objects)
    while some := list(islice(remaining, ROWS_AT_ONCE)):
        try:
            yield pa.table([[found.name for found in some], [found.etag for found in some],
                            [found.size for found in some]], schema=LISTED)
        except UnicodeEncodeError as error:
            raise DataError(f"{error.object!r}: this file's name isn't UTF-8, which a dataset's keys must be. "
                            "Rename the file (or let shard leave it out by --include).") from None


def spread(tables: Iterable[pa.Table], into: HashBuckets, *, seed: int) -> None:
    """Spread tables with a column `key` by the hash of their keys."""
    for table in tables:
        into.add(table, name_hashes(table["key"].to_pylist(), seed))


# --- which object goes to which shard -----------------------------------------------------------------------------


def assign_shards(objects: HashBuckets, bounds: Bounds) -> Iterator[pa.Table]:
    """The shards, each a table of its objects sorted by key; bounded by count and by bytes.

    They follow from names, sizes and the seed of the hashes alone. A group that is too large is halved by the hash's
    next bit: so another object changes its own shard, and no other. An object above the bytes of a shard is alone.
    """
    return (group.drop_columns(HASH).sort_by("key") for group in _groups(objects, 0, NUM_BUCKETS, bounds))


def _groups(objects: HashBuckets, first: int, end: int, bounds: Bounds) -> Iterator[pa.Table]:
    count, size = int(objects.rows[first:end].sum()), int(objects.sizes[first:end].sum())
    if count == 0:
        return
    if _fits(count, size, bounds):
        yield objects.read(first, end)
    elif end - first > 1:
        middle = (first + end) // 2
        yield from _groups(objects, first, middle, bounds)
        yield from _groups(objects, middle, end, bounds)
    else:
        yield from _halve_bucket(objects.read(first, end), bounds)


def _halve_bucket(objects: pa.Table, bounds: Bounds) -> Iterator[pa.Table]:
    hashes = objects[HASH].to_numpy()
    ends = np.concatenate([[0], np.cumsum(pc.fill_null(objects["size"], 0).to_numpy())])
    bit = 64 - NUM_BUCKETS.bit_length()  # the first bit that doesn't choose the bucket
    for start, stop in _halve(hashes, ends, (0, len(hashes)), bit, bounds):
        yield objects.slice(start, stop - start)


def _halve(hashes: Hashes, ends: npt.NDArray[np.int64], span: tuple[int, int], bit: int,
           bounds: Bounds) -> Iterator[tuple[int, int]]:
    start, stop = span
    if start == stop:
        return
    if _fits(stop - start, int(ends[stop] - ends[start]), bounds):
        yield span
        return
    middle = start + int(np.searchsorted(hashes[start:stop] >> np.uint64(bit) & np.uint64(1), 1))
    yield from _halve(hashes, ends, (start, middle), bit - 1, bounds)
    yield from _halve(hashes, ends, (middle, stop), bit - 1, bounds)


def _fits(count: int, size: int, bounds: Bounds) -> bool:
    return count <= 1 or (count <= bounds.pictures and size <= bounds.bytes)


# --- what has changed ---------------------------------------------------------------------------------------------


def compare(listed: HashBuckets, live: HashBuckets, *, left_out: pa.Array, look_again: LookAgain,
            source: str) -> Iterator[tuple[pa.Table, pa.Table]]:
    """For each bucket the objects to take (with column `hash`), and the rows (DROPPED) that no longer count.

    left_out    keys that stay out, whatever is listed
    look_again  is asked about objects with another ETag but the same size: an equal SHA-256 counts as unchanged
    source      what was listed, for messages
    Refused with DataError: a key that is listed twice.
    """
    for now, before in zip(listed, live, strict=True):
        refuse_repeated(now["key"], source)
        now = now.filter(pc.invert(pc.is_in(now["key"], left_out)))
        place = pc.index_in(now["key"], before["key"])
        known = now.filter(pc.is_valid(place))
        old = before.take(place.drop_null())
        altered = pc.invert(_unchanged(known, old, look_again))
        removed = before.filter(pc.invert(pc.is_in(before["key"], now["key"])))
        yield (pa.concat_tables([now.filter(pc.is_null(place)), known.filter(altered)]),
               pa.concat_tables([dropped_rows(old.filter(altered), CHANGED), dropped_rows(removed, REMOVED)]))


def refuse_repeated(keys: pa.ChunkedArray, source: str) -> None:
    """Refuse (DataError) keys of which one comes twice; it is named."""
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = pc.value_counts(keys)
        twice = next(pair["values"] for pair in counts.to_pylist() if pair["counts"] > 1)
        raise DataError(f"{source} lists {twice} more than once; each picture has one entry.")


def dropped_rows(rows: pa.Table, why: str) -> pa.Table:
    """The rows (with `part` and `key`) as entries of a dropped list."""
    return pa.table([rows["part"], rows["key"], pa.array([why] * len(rows), pa.string())], schema=DROPPED)


def _unchanged(now: pa.Table, old: pa.Table, look_again: LookAgain) -> pa.Array:
    """bool [n]: whether the object is the one that the row was made of."""
    keep = pc.invert(old["again"])
    same = pc.fill_null(pc.equal(now["etag"], old["etag"]), False)
    perhaps = pc.and_(pc.and_(keep, pc.invert(same)),
                      pc.and_(pc.is_valid(old["sha256"]), pc.fill_null(pc.equal(now["size"], old["size"]), False)))
    unchanged = np.asarray(pc.and_(keep, same))
    if pc.any(perhaps).as_py():
        which = np.flatnonzero(np.asarray(perhaps))
        unchanged = unchanged.copy()
        unchanged[which] = look_again(now.take(which), old["sha256"].take(which).to_pylist())
    return pa.array(unchanged, pa.bool_())


# --- pictures with the same content -------------------------------------------------------------------------------

CONTENT = pa.schema([("sha256", pa.string()), ("key", pa.string()), ("part", pa.string())])


def spread_by_content(tables: Iterable[pa.Table], into: HashBuckets) -> None:
    """Spread tables (CONTENT) by their SHA-256."""
    for table in tables:
        hashes = np.array([int(sha256[:16], 16) for sha256 in table["sha256"].to_pylist()], np.uint64)
        into.add(table, hashes)


def repeated_content(contents: HashBuckets) -> Iterator[pa.Table]:
    """The pictures (CONTENT) whose content another picture of a smaller key has, bucket by bucket."""
    for bucket in contents:
        table = bucket.sort_by([("sha256", "ascending"), ("key", "ascending")])
        sha256 = table["sha256"].combine_chunks()
        if len(sha256) > 1:
            again = pc.equal(sha256[1:], sha256[:-1])
            yield table.slice(1).filter(again).select(CONTENT.names)
