"""Shard datasets: which picture goes to which shard, one shard's Parquet file, the dataset's versions, reading back.

It knows the form of the dataset, and neither how many write it at once nor what is trained on it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.coco import AnnotatedImage, Person
from pipeline.errors import DataError
from pipeline.images import PictureLimits, PictureRefused, decode_picture, read_header
from pipeline.pose.skeleton import Skeleton
from pipeline.rows import SHARD_SCHEMA
from pipeline.storage import StoredObject

VERSION = 1
FOLDER = "shards"


@dataclass(frozen=True)
class ShardPart:
    """One shard file: its name under `shards/`, the SHA-256 of its bytes, and its counts (`rows`, `persons`, ...)."""

    name: str
    sha256: str
    counts: dict[str, Any]


@dataclass(frozen=True)
class ShardDataset:
    """One version of a shard dataset. `json` is the whole `dataset-00000N.json`."""

    uri: str
    version: int
    parts: tuple[ShardPart, ...]
    skeleton: Skeleton | None
    dropped: frozenset[tuple[str, str]]  # (part, key): rows of older parts that no longer count
    json: dict[str, Any]


# --- planning -----------------------------------------------------------------------------------------------------


def assign_shards(objects: Iterable[StoredObject], *, seed: int, max_pictures: int,
                  max_bytes: int) -> list[list[StoredObject]]:
    """Which picture goes to which shard: bounded by count and bytes, each shard sorted by name.

    It follows from names, sizes and the seed alone. Pictures are spread by a hash of their names, and a group that
    is too large is halved by the hash's next bit: another picture changes its own shard, and no other. An object
    that is larger than `max_bytes` has a shard to itself.
    """
    hashed = sorted((_name_hash(found.name, seed), found) for found in objects)
    groups = _halve(hashed, 255, max_pictures, max_bytes)
    return [sorted((found for _, found in group), key=lambda found: found.name.encode()) for group in groups if group]


def _name_hash(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest(), "big")


def _halve(hashed: list[tuple[int, Any]], bit: int, max_pictures: int,
           max_bytes: int) -> Iterator[list[tuple[int, Any]]]:
    if len(hashed) <= max_pictures and (len(hashed) <= 1 or sum(found.size for _, found in hashed) <= max_bytes):
        yield hashed
        return
    low = [pair for pair in hashed if not pair[0] >> bit & 1]
    yield from _halve(low, bit - 1, max_pictures, max_bytes)
    yield from _halve(hashed[len(low):], bit - 1, max_pictures, max_bytes)


# --- one picture, one part ----------------------------------------------------------------------------------------


def shard_row(planned: Mapping[str, Any], image: AnnotatedImage | None, read: Callable[[], bytes], *,
              limits: PictureLimits, full: bool) -> dict[str, Any]:
    """The row (SHARD_SCHEMA) of one listed object: its bytes as stored, or the reason why they could not be taken.

    planned  key, etag, size of the object
    image    what the annotations say of it, or None
    read     gives its bytes; raises ObjectMissing, ObjectChanged, ObjectForbidden. Trouble with the store itself
             (any other StorageError) is not about the picture, and passes through.
    full     decode the picture, rather than look at its header alone
    """
    row: dict[str, Any] = dict.fromkeys(SHARD_SCHEMA.names)
    row |= {name: planned[name] for name in ("key", "etag", "size")}
    if image is not None:
        row |= {"image_id": image.image_id, "persons": [_person_struct(person) for person in image.persons]}
    try:
        data = read()
        row["sha256"] = hashlib.sha256(data).hexdigest()
        header = read_header(data, limits)
        if full:
            decode_picture(data, limits)
        _refuse_other_size(image, header.width, header.height)
    except (PictureRefused, *storage.ABOUT_THE_OBJECT) as error:
        return row | {"reason": storage.reason_of(error), "error": str(error)}
    return row | {"bytes": data, "width": header.width, "height": header.height}


def _refuse_other_size(image: AnnotatedImage | None, width: int, height: int) -> None:
    if image is None or image.width is None or (image.width, image.height) == (width, height):
        return
    raise PictureRefused("other_size", f"the annotations say {image.width}x{image.height} pixels, but the picture "
                         f"has {width}x{height} after its EXIF orientation, so that their coordinates don't fit it")


def _person_struct(person: Person) -> dict[str, Any]:
    return {"annotation_id": person.annotation_id, "box_xywh": list(person.box_xywh), "area": person.area,
            "iscrowd": person.iscrowd, "num_keypoints": person.num_keypoints,
            "keypoints": None if person.keypoints is None else list(person.keypoints)}


def part_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """One shard's Parquet file: the rows as they come, and their counts under the metadata key `shard`."""
    table = pa.Table.from_pylist([dict(row) for row in rows], SHARD_SCHEMA)
    shard = {"version": VERSION, "counts": count_rows(rows)}
    table = table.replace_schema_metadata({"shard": json.dumps(shard, sort_keys=True)})
    # JPEG doesn't compress: zstd on `bytes` costs time and saves nothing
    compression = {name: "none" if name == "bytes" else "zstd" for name in leaf_columns(table.schema)}
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression, use_dictionary=False, row_group_size=max(len(rows), 1))
    return bytes(sink.getvalue().to_pybytes())


def leaf_columns(schema: pa.Schema) -> list[str]:
    """The names by which Parquet knows a schema's columns, those inside lists and structs too."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet.names))]


def count_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many rows, bytes and persons, how many persons can be trained on, and how many refused by which reason."""
    persons = [person for row in rows if row["bytes"] is not None for person in row["persons"] or ()]
    reasons: dict[str, int] = {}
    for row in rows:
        if row["reason"] is not None:
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    return {"rows": len(rows), "pictures": sum(row["bytes"] is not None for row in rows),
            "refused": sum(reasons.values()), "reasons": dict(sorted(reasons.items())),
            "bytes": sum(len(row["bytes"] or b"") for row in rows), "persons": len(persons),
            "trainable": sum(is_trainable(person) for person in persons)}


def part_counts(footer: pq.FileMetaData) -> dict[str, Any]:
    """The counts that a part's Parquet metadata carries."""
    counts: dict[str, Any] = json.loads(footer.metadata[b"shard"])["counts"]
    return counts


def is_trainable(person: Mapping[str, Any]) -> bool:
    """Whether a person (a `persons` struct) is trained on, as the authors choose: no crowd, one joint labelled."""
    return not person["iscrowd"] and any(visible > 0 for visible in (person["keypoints"] or ())[2::3])


# --- the dataset's versions ---------------------------------------------------------------------------------------


def version_name(version: int) -> str:
    """The object that makes a version of the dataset whole, such as `dataset-000001.json`."""
    return f"dataset-{version:06d}.json"


def dataset_json(parts: Sequence[ShardPart], *, version: int, skeleton: Skeleton | None, source: dict[str, Any],
                 counts: dict[str, Any]) -> bytes:
    """What `dataset-00000N.json` holds: all live parts with their SHA-256, counts, skeleton, source."""
    return json.dumps({
        "version": VERSION, "dataset_version": version, "counts": counts, "source": source,
        "skeleton": None if skeleton is None else skeleton.to_json(), "dropped": None,
        "parts": [{"name": part.name, "sha256": part.sha256, "counts": part.counts} for part in parts],
    }, indent=1).encode()


def open_shards(uri: str, version: int | None = None) -> ShardDataset:
    """The newest version of the shard dataset, or the pinned one. Refuses (DataError) a place that holds none."""
    uri = storage.normalise(uri)
    found = version if version is not None else newest_version(uri)
    try:
        values = json.loads(storage.read_object(storage.join(uri, version_name(found))))
    except storage.ObjectMissing:
        raise DataError(f"{uri} holds no shard dataset: {version_name(max(found, 1))} isn't there. "
                        "Give the --output of a shard run that has ended.") from None
    if values["version"] > VERSION:
        raise DataError(f"{uri} is a shard dataset of format {values['version']}; this program reads up to {VERSION}. "
                        "Update it.")
    parts = tuple(ShardPart(part["name"], part["sha256"], part["counts"]) for part in values["parts"])
    skeleton = None if values["skeleton"] is None else Skeleton.from_json(values["skeleton"])
    return ShardDataset(uri, found, parts, skeleton, _dropped(uri, values["dropped"]), values)


def newest_version(uri: str) -> int:
    """The number of the newest version at this place; 0: there is none."""
    version = 0
    while storage.exists(storage.join(uri, version_name(version + 1))):
        version += 1
    return version


def _dropped(uri: str, name: str | None) -> frozenset[tuple[str, str]]:
    if name is None:
        return frozenset()
    table = pq.read_table(pa.BufferReader(storage.read_object(storage.join(uri, name))))
    return frozenset(zip(table["part"].to_pylist(), table["key"].to_pylist(), strict=True))


def read_part(dataset: ShardDataset, part: ShardPart, columns: Sequence[str] | None = None) -> pa.Table:
    """One shard's live rows; the file's SHA-256 is checked first, and a wrong one is refused by name (DataError)."""
    uri = storage.join(dataset.uri, FOLDER, part.name)
    data = storage.read_object(uri)
    found = hashlib.sha256(data).hexdigest()
    if found != part.sha256:
        raise DataError(f"{uri} is damaged: its SHA-256 is {found[:16]}..., but {version_name(dataset.version)} says "
                        f"{part.sha256[:16]}.... Restore the object, or shard again.")
    table = pq.read_table(pa.BufferReader(data), columns=None if columns is None else list(columns))
    return _live(dataset, part, table)


def read_part_columns(dataset: ShardDataset, part: ShardPart, columns: Sequence[str]) -> pa.Table:
    """Some columns of one shard's live rows (`key` among them), without reading the pictures and so unchecked."""
    uri = storage.join(dataset.uri, FOLDER, part.name)
    filesystem, path = storage.arrow_filesystem(uri)
    try:
        with filesystem.open_input_file(path) as file:
            return _live(dataset, part, pq.ParquetFile(file).read(list(columns)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri} can't be read ({error}). Restore the object, or shard again.") from None


def _live(dataset: ShardDataset, part: ShardPart, table: pa.Table) -> pa.Table:
    gone = [key for name, key in dataset.dropped if name == part.name]
    return table.filter(pc.invert(pc.is_in(table["key"], pa.array(gone, pa.string())))) if gone else table
