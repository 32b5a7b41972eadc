"""Where a keypoint dataset's pictures are now: bytes by key, pixels that are the ones that were annotated."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import shards, storage
from pipeline.ahead import map_ahead
from pipeline.annotation_input import LIST, SHARDS, describe_input
from pipeline.drawing import Image
from pipeline.images import PictureRefused

PictureReader = Callable[[str], bytes]
Fetched = bytes | PictureRefused | storage.StorageError


def fetch_pictures(source: Mapping[str, Any], keys: Collection[str]) -> Iterator[tuple[str, Fetched]]:
    """Each key with its picture's bytes, or with why they can't be had; a few are read ahead.

    source  an input as `describe_input` gives it. What a shard dataset refused, and so has no bytes of, is looked for
            where it was sharded from.
    """
    read = _picture_reader(source, keys)

    def fetch(key: str) -> tuple[str, Fetched]:
        try:
            return key, read(key)
        except (PictureRefused, storage.StorageError) as error:
            return key, error

    return map_ahead(fetch, keys)


def decode_checked(data: bytes, sha256: str | None, decode: Callable[[bytes], Image]) -> Image:
    """The pixels of bytes that have this SHA-256 (None: unknown); PictureRefused (changed) for others."""
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise PictureRefused("changed", "the picture isn't the one that was annotated: its SHA-256 differs.")
    return decode(data)


def _picture_reader(source: Mapping[str, Any], keys: Collection[str]) -> PictureReader:
    if source["kind"] == LIST:
        return storage.read_object  # a list's keys are whole URIs
    if source["kind"] != SHARDS:
        return lambda key: storage.read_object(storage.member(source["uri"], key))
    dataset = shards.open_shards(source["uri"], source.get("version"))
    found = {key: data for key, data in _sharded_pictures(dataset, keys) if data is not None}
    refused = [key for key in keys if key not in found]
    origin = dataset.json["source"].get("images")
    elsewhere = _picture_reader(describe_input(origin), refused) if origin and refused else _not_sharded(dataset)
    return lambda key: found[key] if key in found else elsewhere(key)


def _not_sharded(dataset: shards.ShardDataset) -> PictureReader:
    def read(key: str) -> bytes:
        raise PictureRefused("missing", f"the shard dataset {dataset.uri} has no bytes of this picture.")

    return read


def _sharded_pictures(dataset: shards.ShardDataset, keys: Collection[str]) -> Iterator[tuple[str, bytes | None]]:
    """Key and bytes of the wanted pictures; of the other shards only the keys are read."""
    wanted = pa.array(sorted(keys), pa.string())

    holding = [part for part, listed in shards.read_columns(dataset, ["key"])
               if pc.any(pc.is_in(listed["key"], wanted)).as_py()]
    for part in holding:
        rows = shards.read_part_columns(dataset, part, ["key", "bytes"])
        for row in rows.filter(pc.is_in(rows["key"], wanted)).to_pylist():
            yield row["key"], row["bytes"]
