"""What an annotation run reads: a shard dataset, a prefix of pictures, or a list of URIs.

Each kind of input gives two things: the units of the plan, and the pictures of one planned unit.
"""

import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from pipeline import shards, storage
from pipeline.annotation import PictureToAnnotate, read_ahead
from pipeline.boxes import BoxSource
from pipeline.errors import DataError
from pipeline.exclusion import Exclusion
from pipeline.images import PictureRefused
from pipeline.inventory import LIST_SCHEMA, NEITHER_LIST_NOR_PREFIX, is_list, read_list
from pipeline.rows import PICTURE, REJECTED, SHARD_SCHEMA, AnnotatedPicture
from pipeline.shard_plan import listed_tables, refuse_repeated

READERS = 16  # objects read at once for a unit
NEIGHBOURS = 3  # objects that are tried before a refusal is taken to be about one object
SHARDS, PREFIX, LIST = "shards", "prefix", "list"


def describe_input(uri: str, exclude: Collection[str] = (), *,
                   frozen: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The kind of input at this URI, with its version where it has versions, and the digest of the keys left out.

    frozen  the input that a run was begun with: if it is at the same place, its version counts
    """
    left_out = {"exclude": _keys_digest(exclude)} if exclude else {}
    uri = storage.normalise(uri)
    if frozen is not None and frozen["uri"] == uri:
        return {name: value for name, value in frozen.items() if name != "exclude"} | left_out
    if is_list(uri):
        return {"kind": LIST, "uri": uri, **left_out}
    version = shards.newest_version(uri)
    kind = {"kind": SHARDS, "uri": uri, "version": version} if version else {"kind": PREFIX, "uri": uri}
    return kind | left_out


def _keys_digest(keys: Collection[str]) -> str:
    return hashlib.sha256("\n".join(sorted(set(keys))).encode()).hexdigest()


def plan_units(source: dict[str, Any], *, pictures_per_unit: int, limit: int | None,
               exclude: Exclusion | None = None) -> Iterator[pa.Table]:
    """The units of an input, each a table of planned pictures (columns of PLAN_SCHEMA); `exclude`: keys left out."""
    exclude = exclude or Exclusion()
    if source["kind"] == SHARDS:
        units = exclude.without(_shard_units(shards.open_shards(source["uri"], source["version"])))
    else:
        listed = _listed(source["uri"]) if source["kind"] == LIST else _under_prefix(source["uri"])
        units = _units_of(exclude.without(listed), pictures_per_unit)
    found = False
    for unit in _limited(units, limit):
        found = True
        yield unit
    if not found:
        raise _nothing_there(source["uri"], exclude)


def refuse_nothing(uri: str) -> None:
    """Refuse (DataError) a place where nothing is at all, by one look: before a list or a prefix is read as a whole."""
    there = storage.exists(uri) if is_list(uri) else any(True for _ in storage.list_objects(uri))
    if not there:
        raise _nothing_there(uri, Exclusion())


def _nothing_there(uri: str, exclude: Exclusion) -> DataError:
    if not is_list(uri) and storage.exists(uri):
        return DataError(f"{uri}: {NEITHER_LIST_NOR_PREFIX}")
    return DataError(f"{uri}: nothing to annotate is there. Check the address"
                     f"{' and what --exclude leaves out' if exclude.keys else ''}.")


def pictures_of_unit(source: dict[str, Any], planned: Sequence[dict[str, Any]], boxes: BoxSource,
                     earlier: Mapping[str, AnnotatedPicture] = MappingProxyType({}), *,
                     max_bytes: int) -> Iterator[PictureToAnnotate]:
    """The pictures of one planned unit, in the plan's order; an object above `max_bytes` is refused unread.

    earlier  what an earlier run made of some, by key
    """
    if source["kind"] == SHARDS:
        yield from _sharded_pictures(source, planned, boxes, earlier)
        return
    root = source["uri"] if source["kind"] == PREFIX else None
    uris = [one["key"] if root is None else storage.join(root, one["key"]) for one in planned]
    read = functools.partial(storage.read_object if root else _read_listed, neighbours=uris[:NEIGHBOURS],
                             max_bytes=max_bytes)
    pictures = (_plain_picture(one, boxes, functools.partial(read, uri, etag=one["etag"]), earlier)
                for uri, one in zip(uris, planned, strict=True))
    yield from read_ahead(pictures, threads=READERS) if storage.is_remote(uris[0]) else pictures


def _shard_units(dataset: shards.ShardDataset) -> Iterator[pa.Table]:
    columns = ["key", "etag", "size", "sha256"]
    for part, table in shards.read_columns(dataset, columns):
        yield table.append_column("part", pa.array([part.name] * len(table), pa.string()))


def _under_prefix(uri: str) -> Iterator[pa.Table]:
    return listed_tables(storage.list_objects(uri))


def _listed(uri: str) -> Iterator[pa.Table]:
    """A list's rows, sorted by URI; one that is listed twice is refused."""
    table = pa.concat_tables([LIST_SCHEMA.empty_table(), *read_list(uri)]).sort_by("uri")
    refuse_repeated(table["uri"], uri)
    yield table.rename_columns({"uri": "key"})


def _units_of(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size`, and a last one of fewer."""
    waiting = None
    for table in tables:
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        whole = len(waiting) // size * size
        for start in range(0, whole, size):
            yield waiting.slice(start, size)
        waiting = waiting.slice(whole)
    if waiting is not None and len(waiting):
        yield waiting


def _limited(units: Iterable[pa.Table], limit: int | None) -> Iterator[pa.Table]:
    left = limit
    for unit in units:
        yield unit.slice(0, left)
        left = None if left is None else left - len(unit)
        if left is not None and left <= 0:
            return


def _sharded_pictures(source: dict[str, Any], planned: Sequence[dict[str, Any]], boxes: BoxSource,
                      earlier: Mapping[str, AnnotatedPicture]) -> Iterator[PictureToAnnotate]:
    """In the part's order, which is the plan's. Where rows may be copied, pictures' bytes are read only if needed."""
    dataset = shards.open_shards_once(source["uri"], source["version"])
    part = next(part for part in dataset.parts if part.name == planned[0]["part"])
    wanted = {one["key"] for one in planned}
    if not earlier:
        yield from (_sharded_picture(row, boxes, functools.partial(bytes_of, row))
                    for row in shards.iterate_part(dataset, part) if row["key"] in wanted)
        return
    stored = shards.iterate_part(dataset, part, ["key", "bytes", "reason", "error"])
    light = shards.read_part_columns(dataset, part, [name for name in SHARD_SCHEMA.names if name != "bytes"])
    for row in light.to_pylist():
        if row["key"] in wanted:
            # asked for in this order, if at all: the stream goes forward to the picture
            yield _sharded_picture(row, boxes, functools.partial(_next_bytes, stored, row["key"]), earlier)


def _sharded_picture(row: dict[str, Any], boxes: BoxSource, read: Callable[[], bytes],
                     earlier: Mapping[str, AnnotatedPicture] = MappingProxyType({})) -> PictureToAnnotate:
    found = earlier.get(row["key"])
    # why a picture was refused when it was sharded can be mended without another byte in it
    kept = found if found is not None and found.status != REJECTED else None
    return PictureToAnnotate({name: row[name] for name in PICTURE}, read, functools.partial(boxes, row), kept)


def _next_bytes(stored: Iterator[dict[str, Any]], key: str) -> bytes:
    return bytes_of(next(row for row in stored if row["key"] == key))


def bytes_of(row: dict[str, Any]) -> bytes:
    """A shard row's picture; PictureRefused, with the row's own reason, where there is none."""
    if row["bytes"] is None:  # refused when it was sharded: the refusal is carried on
        raise PictureRefused(row["reason"], row["error"])
    return bytes(row["bytes"])


def _plain_picture(planned: dict[str, Any], boxes: BoxSource, read: Callable[[], bytes],
                   earlier: Mapping[str, AnnotatedPicture]) -> PictureToAnnotate:
    picture = dict.fromkeys(PICTURE) | {name: planned[name] for name in ("key", "etag")}
    return PictureToAnnotate(picture, read, functools.partial(boxes, picture), earlier.get(planned["key"]))


def _read_listed(uri: str, **how: Any) -> bytes:
    try:
        return storage.read_object(uri, **how)
    except storage.BucketMissing as error:  # a list may name any bucket; that of a prefix has been listed
        raise storage.ObjectMissing(str(error)) from None
