"""What an annotation run reads: a shard dataset, a prefix of pictures, or a list of URIs; and who makes the boxes.

Each kind of input gives two things: the units of the plan, and the pictures of one planned unit.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import shards, storage
from pipeline.annotation import (
    PictureToAnnotate,
    annotated_boxes,
    read_ahead,
    strongest_boxes,
    whole_image_box,
)
from pipeline.coco import parse_detections
from pipeline.errors import ConfigError, DataError
from pipeline.images import PictureRefused
from pipeline.inventory import LIST_SCHEMA, is_list, read_list
from pipeline.rows import REJECTED, SHARD_SCHEMA, AnnotatedPicture, Boxes
from pipeline.shard_plan import listed_tables, refuse_repeated

READERS = 16  # objects read at once for a unit
NEIGHBOURS = 3  # objects that are tried before a refusal is taken to be about one object
SHARDS, PREFIX, LIST = "shards", "prefix", "list"
ANNOTATED, WHOLE_IMAGE, DETECTIONS = "annotated", "whole-image", "detections"
BOX_SCHEMA = pa.schema([("image_id", pa.int64()), ("box_id", pa.int64()), ("xywh", pa.list_(pa.float64(), 4)),
                        ("score", pa.float64())])


@dataclass(frozen=True)
class BoxChoice:
    """Who makes the boxes, and the digest of what they come from; `detections` is where the frozen copy lies."""

    kind: str
    digest: str | None = None
    detections: str | None = None
    min_score: float = 0.0
    max_persons: int | None = None

    def intent(self) -> dict[str, Any]:
        """What of it can change a row."""
        return {"kind": self.kind, "digest": self.digest, "min_score": self.min_score, "max_persons": self.max_persons}


# --- the input ----------------------------------------------------------------------------------------------------


def describe_input(uri: str, exclude: Sequence[str] = (), *, frozen: Mapping[str, Any] | None = None) -> dict[str, Any]:
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


def _keys_digest(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(set(keys))).encode()).hexdigest()


def plan_units(source: dict[str, Any], *, pictures_per_unit: int, limit: int | None,
               exclude: Sequence[str] = ()) -> Iterator[pa.Table]:
    """The units of an input, each a table of planned pictures (columns of PLAN_SCHEMA); `exclude`: keys left out."""
    out = pa.array(exclude, pa.string())
    if source["kind"] == SHARDS:
        units = _without(out, _shard_units(shards.open_shards(source["uri"], source["version"])))
    else:
        listed = _listed(source["uri"]) if source["kind"] == LIST else _under_prefix(source["uri"])
        units = _units_of(_without(out, listed), pictures_per_unit)
    found = False
    for unit in _limited(units, limit):
        found = True
        yield unit
    if not found:
        raise DataError(f"{source['uri']}: nothing to annotate is there. Check the address.")


def pictures_of_unit(source: dict[str, Any], planned: Sequence[dict[str, Any]], boxes: "BoxSource",
                     earlier: Mapping[str, AnnotatedPicture] = MappingProxyType({})) -> Iterator[PictureToAnnotate]:
    """The pictures of one planned unit, in the plan's order; `earlier`: what an earlier run made of some, by key."""
    if source["kind"] == SHARDS:
        yield from _sharded_pictures(source, planned, boxes, earlier)
        return
    root = source["uri"] if source["kind"] == PREFIX else None
    uris = [one["key"] if root is None else storage.join(root, one["key"]) for one in planned]
    pictures = (_plain_picture(uri, one, boxes, earlier, neighbours=uris[:NEIGHBOURS])
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


def _without(keys: pa.Array, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        left = table.filter(pc.invert(pc.is_in(table["key"], keys))) if len(keys) else table
        if len(left):
            yield left


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


@functools.lru_cache(maxsize=4)
def _open_shards_once(uri: str, version: int) -> shards.ShardDataset:
    return shards.open_shards(uri, version)


def _sharded_pictures(source: dict[str, Any], planned: Sequence[dict[str, Any]], boxes: "BoxSource",
                      earlier: Mapping[str, AnnotatedPicture]) -> Iterator[PictureToAnnotate]:
    """In the part's order, which is the plan's. Where rows may be copied, pictures' bytes are read only if needed."""
    dataset = _open_shards_once(source["uri"], source["version"])
    part = next(part for part in dataset.parts if part.name == planned[0]["part"])
    wanted = {one["key"] for one in planned}
    if not earlier:
        yield from (_sharded_picture(row, boxes, functools.partial(_bytes_of, row))
                    for row in shards.iterate_part(dataset, part) if row["key"] in wanted)
        return
    stored = shards.iterate_part(dataset, part, ["key", "bytes", "reason", "error"])
    light = shards.read_part_columns(dataset, part, [name for name in SHARD_SCHEMA.names if name != "bytes"])
    for row in light.to_pylist():
        if row["key"] in wanted:
            # asked for in this order, if at all: the stream goes forward to the picture
            yield _sharded_picture(row, boxes, functools.partial(_next_bytes, stored, row["key"]), earlier)


def _sharded_picture(row: dict[str, Any], boxes: "BoxSource", read: Callable[[], bytes],
                     earlier: Mapping[str, AnnotatedPicture] = MappingProxyType({})) -> PictureToAnnotate:
    names = ("key", "image_id", "etag", "sha256", "width", "height")
    found = earlier.get(row["key"])
    # why a picture was refused when it was sharded can be mended without another byte in it
    kept = found if found is not None and found.status != REJECTED else None
    return PictureToAnnotate({name: row[name] for name in names}, read, functools.partial(boxes, row), kept)


def _next_bytes(stored: Iterator[dict[str, Any]], key: str) -> bytes:
    return _bytes_of(next(row for row in stored if row["key"] == key))


def _bytes_of(row: dict[str, Any]) -> bytes:
    if row["bytes"] is None:  # refused when it was sharded: the refusal is carried on
        raise PictureRefused(row["reason"], row["error"])
    return bytes(row["bytes"])


def _plain_picture(uri: str, planned: dict[str, Any], boxes: "BoxSource", earlier: Mapping[str, AnnotatedPicture], *,
                   neighbours: Sequence[str]) -> PictureToAnnotate:
    picture = {"key": planned["key"], "image_id": None, "etag": planned["etag"], "sha256": None,
               "width": None, "height": None}
    read = functools.partial(storage.read_object, uri, etag=planned["etag"], neighbours=neighbours)
    return PictureToAnnotate(picture, read, functools.partial(boxes, picture), earlier.get(planned["key"]))


# --- the boxes ----------------------------------------------------------------------------------------------------

BoxSource = Callable[[dict[str, Any], int, int], Boxes]  # (row, width, height) -> its persons


def choose_boxes(asked: str | None, source: dict[str, Any], output: str, *, min_score: float,
                 max_persons: int | None) -> BoxChoice:
    """Who makes the boxes of this run. A detections JSON is copied to the output, so that it is frozen too.

    Refuses (ConfigError) a choice that this input can't serve: annotated boxes without annotations, detections
    (which name pictures by image_id) without a shard dataset that has image ids.
    """
    annotations = _annotations_sha256(source)
    if asked is None and not annotations:
        raise ConfigError(f"{source['uri']} comes without annotated persons: say who makes the boxes by "
                          "--boxes whole-image, or --boxes with the URI of a COCO detections JSON.")
    if asked in (None, ANNOTATED):
        if not annotations:
            raise ConfigError(f"--boxes annotated: {source['uri']} is no shard dataset with annotations. "
                              "Shard it with --annotations, or choose other boxes.")
        return BoxChoice(ANNOTATED, annotations)
    if asked == WHOLE_IMAGE:
        return BoxChoice(WHOLE_IMAGE)
    if not annotations:
        raise ConfigError(f"--boxes {asked}: COCO detections name pictures by image_id, which only a shard dataset "
                          "made with --annotations has.")
    return _freeze_detections(str(asked), output, min_score=min_score, max_persons=max_persons)


def box_source(choice: BoxChoice) -> BoxSource:
    """The function that gives a picture's boxes: (row, width, height) -> Boxes."""
    if choice.kind == ANNOTATED:
        return lambda row, width, height: annotated_boxes(row.get("persons"))
    if choice.kind == WHOLE_IMAGE:
        return lambda row, width, height: whole_image_box(width, height)
    assert choice.detections is not None
    detected = _read_detections(choice.detections)

    def boxes_of(row: dict[str, Any], width: int, height: int) -> Boxes:
        return strongest_boxes(detected.get(row["image_id"], Boxes.none()), min_score=choice.min_score,
                               max_persons=choice.max_persons)

    return boxes_of


def _annotations_sha256(source: dict[str, Any]) -> str | None:
    if source["kind"] != SHARDS:
        return None
    found: str | None = _open_shards_once(source["uri"], source["version"]).json["source"]["annotations_sha256"]
    return found


def _freeze_detections(uri: str, output: str, *, min_score: float, max_persons: int | None) -> BoxChoice:
    try:
        data = storage.read_object(uri)
    except storage.ObjectMissing:
        raise ConfigError(f"--boxes {uri}: neither annotated, nor whole-image, nor a detections JSON "
                          "that is there.") from None
    rows = [{"image_id": image_id, "box_id": one.index, "xywh": list(one.box_xywh), "score": one.score}
            for image_id, detections in sorted(parse_detections(data, source=uri).items()) for one in detections]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, BOX_SCHEMA), sink, compression="zstd")
    digest = hashlib.sha256(data).hexdigest()
    frozen = storage.join(output, "_boxes", f"{digest[:16]}.parquet")
    storage.put_if_absent(frozen, sink.getvalue().to_pybytes())
    return BoxChoice(DETECTIONS, digest, frozen, min_score, max_persons)


def _read_detections(uri: str) -> dict[int, Boxes]:
    table = pq.read_table(pa.BufferReader(storage.read_object(uri)))
    image_ids = table["image_id"].to_numpy()
    xywh = np.array(table["xywh"].to_pylist(), np.float64).reshape(-1, 4)
    ids, scores = table["box_id"].to_numpy(), table["score"].to_numpy()
    # the frozen copy is sorted by image: each image's boxes are one slice
    found, starts = np.unique(image_ids, return_index=True)
    ends = [*starts[1:], len(image_ids)]
    return {int(image): Boxes(ids[a:b], xywh[a:b], scores[a:b])
            for image, a, b in zip(found, starts, ends, strict=True)}
