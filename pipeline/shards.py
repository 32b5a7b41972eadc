"""Shard datasets: one picture's row, one shard's Parquet file, what names a version's parts, reading them back.

It knows the form of the dataset, and neither how many write it at once nor what is trained on it.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.ahead import map_ahead
from pipeline.coco import AnnotatedImage, Person
from pipeline.errors import DataError
from pipeline.images import PictureHeader, PictureRefused
from pipeline.pose.skeleton import Skeleton
from pipeline.rows import SHARD_SCHEMA
from pipeline.shard_plan import DROPPED

VERSION = 1
FOLDER = "shards"
NOT_A_PICTURE = "not_a_picture"
STREAMED_ROWS = 16  # some 3 MB of pictures
# Parquet looks whether a page is full only after so many rows. At its default, 1024, a part's pictures are one page,
# which a reader has to hold at once: 83 MB to stream a part of 100 MB, instead of 6 (benchmarks/shard_format.py)
ROWS_UNTIL_PAGE_CHECK = 16


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
    dropped: pa.Table  # part, key, why: rows of parts that don't count in this version
    json: dict[str, Any]


# --- one picture, one part ----------------------------------------------------------------------------------------


def shard_row(planned: Mapping[str, Any], image: AnnotatedImage | None, read: Callable[[], bytes],
              examine: Callable[[bytes], PictureHeader], *, max_bytes: int) -> dict[str, Any]:
    """The row (SHARD_SCHEMA) of one listed object: its bytes as stored, or the reason why they could not be taken.

    planned  key, etag, size of the object; one above `max_bytes` isn't read
    image    what the annotations say of it, or None
    read     gives its bytes; raises ObjectMissing, ObjectChanged, ObjectForbidden. Trouble with the store itself
             (any other StorageError) is not about the picture, and passes through.
    examine  bytes -> the picture's header, or PictureRefused
    """
    row: dict[str, Any] = dict.fromkeys(SHARD_SCHEMA.names)
    row |= {name: planned[name] for name in ("key", "etag", "size")}
    if image is not None:
        row |= {"image_id": image.image_id, "persons": persons_of(image)}
    try:
        if planned["size"] is not None and planned["size"] > max_bytes:
            raise PictureRefused("too_large_bytes", f"{planned['size']} bytes, and the limit is {max_bytes}")
        data = read()
        row |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        header = examine(data)
        _refuse_other_size(image, header.width, header.height)
    except (PictureRefused, *storage.ABOUT_THE_OBJECT) as error:
        return row | {"reason": storage.reason_of(error), "error": str(error)}
    return row | {"bytes": data, "width": header.width, "height": header.height}


def persons_of(image: AnnotatedImage) -> list[dict[str, Any]]:
    """What a row's column `persons` holds of an annotated picture."""
    return [_person_struct(person) for person in image.persons]


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
    pq.write_table(table, sink, compression=compression, use_dictionary=False, row_group_size=max(len(rows), 1),
                   write_batch_size=ROWS_UNTIL_PAGE_CHECK)
    return bytes(sink.getvalue().to_pybytes())


def leaf_columns(schema: pa.Schema) -> list[str]:
    """The names by which Parquet knows a schema's columns, those inside lists and structs too."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet.names))]


def count_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many rows: pictures, refused pictures by reason, and objects that are no pictures; the pictures' bytes,
    their persons, and how many of those can be trained on. Needs the columns `reason`, `size` and `persons`."""
    pictures = [row for row in rows if row["reason"] is None]
    persons = [person for row in pictures for person in row["persons"] or ()]
    reasons = Counter(row["reason"] for row in rows if row["reason"] is not None)
    return {"rows": len(rows), "pictures": len(pictures), "refused": reasons.total() - reasons[NOT_A_PICTURE],
            "not_pictures": reasons[NOT_A_PICTURE], "reasons": dict(sorted(reasons.items())),
            "bytes": sum(row["size"] for row in pictures), "persons": len(persons),
            "trainable": sum(is_trainable(person) for person in persons)}


def part_counts(footer: pq.FileMetaData) -> dict[str, Any]:
    """The counts that a part's Parquet metadata carries."""
    counts: dict[str, Any] = json.loads(footer.metadata[b"shard"])["counts"]
    return counts


def is_trainable(person: Mapping[str, Any]) -> bool:
    """Whether a person (a `persons` struct) is trained on, as the authors choose: no crowd, one joint labelled."""
    return not person["iscrowd"] and any(visible > 0 for visible in (person["keypoints"] or ())[2::3])


# --- a version of the dataset -------------------------------------------------------------------------------------


def version_name(version: int) -> str:
    """The object that makes a version of the dataset whole, such as `dataset-000001.json`."""
    return f"dataset-{version:06d}.json"


def dataset_json(parts: Sequence[ShardPart], *, version: int, skeleton: Skeleton | None, source: dict[str, Any],
                 counts: dict[str, Any], dropped: tuple[str, str] | None = None,
                 changes: dict[str, int] | None = None) -> bytes:
    """What `dataset-00000N.json` holds: all live parts with their SHA-256, counts, skeleton, source.

    dropped  name and SHA-256 of the list of the parts' rows that don't count
    changes  how many rows came and went since the version before, by why
    """
    return json.dumps({
        "version": VERSION, "dataset_version": version, "counts": counts, "changes": changes, "source": source,
        "skeleton": None if skeleton is None else skeleton.to_json(),
        "dropped": dropped and dropped[0], "dropped_sha256": dropped and dropped[1],
        "parts": [{"name": part.name, "sha256": part.sha256, "counts": part.counts} for part in parts],
    }, indent=1).encode()


def open_shards(uri: str, version: int | None = None) -> ShardDataset:
    """The newest version of the shard dataset, or the pinned one.

    Refuses (DataError) a place that holds none, and a list of dropped rows that isn't the version's own.
    """
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
    return ShardDataset(uri, found, parts, skeleton, _dropped(uri, found, values), values)


@functools.lru_cache(maxsize=4)
def open_shards_once(uri: str, version: int) -> ShardDataset:
    """`open_shards` of one version, which never changes, kept for the next who asks."""
    return open_shards(uri, version)


def newest_version(uri: str) -> int:
    """The number of the newest version at this place; 0: there is none."""
    version = 0
    while storage.exists(storage.join(uri, version_name(version + 1))):
        version += 1
    return version


def _dropped(uri: str, version: int, values: Mapping[str, Any]) -> pa.Table:
    if values["dropped"] is None:
        return DROPPED.empty_table()
    return pq.read_table(_checked(uri, values["dropped"], values.get("dropped_sha256"), version))


def read_part(dataset: ShardDataset, part: ShardPart, columns: Sequence[str] | None = None) -> pa.Table:
    """One shard's live rows; the file's SHA-256 is checked first, and a wrong one is refused by name (DataError)."""
    table = pq.read_table(_checked_part(dataset, part), columns=None if columns is None else list(columns))
    return live_rows(dataset, part, table)


def iterate_part(dataset: ShardDataset, part: ShardPart,
                 columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """One shard's live rows one by one, in the order of their keys: in memory are the file as stored and some rows.

    Refused as by `read_part`, before the first row comes. `columns` must hold `key`.
    """
    with pq.ParquetFile(_checked_part(dataset, part)) as file:
        yield from _streamed_rows(dataset, part, file, columns)


def read_chosen(dataset: ShardDataset, part: ShardPart, columns: Sequence[str],
                choose: Callable[[list[dict[str, Any]]], Container[str]]) -> list[dict[str, Any]]:
    """Those of one shard's live rows whose keys are chosen: in memory are the file as stored, then these rows.

    choose  of all rows without their `bytes`: the keys that are wanted
    Refused as by `read_part`. `columns` must hold `key`.
    """
    with pq.ParquetFile(_checked_part(dataset, part)) as file:
        without_bytes = [column for column in columns if column != "bytes"]
        keys = choose(list(_streamed_rows(dataset, part, file, without_bytes)))
        return [row for row in _streamed_rows(dataset, part, file, columns) if row["key"] in keys]


def _streamed_rows(dataset: ShardDataset, part: ShardPart, file: pq.ParquetFile,
                   columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    # a few rows are read in less time than Arrow's threads take to divide them
    for batch in file.iter_batches(STREAMED_ROWS, columns=columns and list(columns), use_threads=False):
        yield from live_rows(dataset, part, pa.Table.from_batches([batch])).to_pylist()


def _checked_part(dataset: ShardDataset, part: ShardPart) -> pa.BufferReader:
    return _checked(dataset.uri, f"{FOLDER}/{part.name}", part.sha256, dataset.version)


def _checked(uri: str, name: str, sha256: str | None, version: int) -> pa.BufferReader:
    """An object of the dataset that a version names; DataError, by name, where it isn't of the SHA-256 that this says.

    None: it says none, as versions of older programs of what they drop.
    """
    place = storage.join(uri, name)
    try:
        data = storage.read_object(place, own_sha256=False)
    except storage.ABOUT_THE_OBJECT as error:  # about the dataset, and so about no picture
        raise DataError(f"{place} can't be read ({error}). Restore the object, or shard again.") from None
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise DataError(f"{place} is damaged: its SHA-256 is {found[:16]}..., but {version_name(version)} says "
                        f"{sha256[:16]}.... Restore the object, or shard again.")
    return pa.BufferReader(data)


def read_part_columns(dataset: ShardDataset, part: ShardPart, columns: Sequence[str]) -> pa.Table:
    """Some columns of one shard's live rows (`key` among them), without reading the pictures and so unchecked."""
    return live_rows(dataset, part, stored_columns(dataset.uri, part.name, columns))


def read_columns(dataset: ShardDataset, columns: Sequence[str]) -> Iterator[tuple[ShardPart, pa.Table]]:
    """`read_part_columns` of every part in their order, several read ahead."""
    tables = map_ahead(lambda part: read_part_columns(dataset, part, columns), dataset.parts)
    return zip(dataset.parts, tables, strict=True)


def stored_columns(uri: str, name: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of all rows of one part of the dataset at `uri`, whether they count or not."""
    with storage.arrow_file(storage.join(uri, FOLDER, name), remedy="Restore the object, or shard again.") as file:
        return pq.ParquetFile(file).read(list(columns))


def live_rows(dataset: ShardDataset, part: ShardPart, table: pa.Table) -> pa.Table:
    """The rows of a part's table that count in this version."""
    if not len(dataset.dropped):
        return table
    gone = dataset.dropped.filter(pc.equal(dataset.dropped["part"], part.name))["key"]
    return table.filter(pc.invert(pc.is_in(table["key"], gone.combine_chunks()))) if len(gone) else table
