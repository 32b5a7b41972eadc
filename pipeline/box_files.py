"""Boxes from files: COCO's detections JSON, or Parquet, one file or all under a prefix; read as tables, in a stream.

Parquet's columns, by name: `key` (a picture's name under the prefix of the input, or its URI in a list) or `image_id`;
`box_x`, `box_y`, `box_w`, `box_h` or `x`, `y`, `w`, `h`, in pixels; where they are there, `box_score` or `score`
(otherwise 1), `box_id`, and `category_id`, of which only 1, the person, counts. So a keypoint dataset is a source too.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.coco import PERSON_CATEGORY, parse_detections
from pipeline.errors import ConfigError, DataError

KEY, IMAGE_ID = "key", "image_id"
SIDES = ("x", "y", "w", "h")
ROWS_AT_ONCE = 65_536
WRITE_AGAIN = "Boxes are Parquet: write it again, or leave it out."
# Of a JSON. More rows take memory (65,536 of them 60 MB) and save no time; fewer bytes are more requests
JSON_ROWS_AT_ONCE, BYTES_AT_ONCE = 8192, 4 << 20
# `picture` is the key, or the image id in digits; `box_id` NULL: not given
BOX_SCHEMA = pa.schema([("picture", pa.string()), ("box_id", pa.int64()), *((side, pa.float64()) for side in SIDES),
                        ("score", pa.float64())])


@dataclass(frozen=True)
class BoxFiles:
    """Where boxes come from: one JSON, or Parquet files by name. `by`: what names the pictures, KEY or IMAGE_ID."""

    uri: str
    objects: tuple[storage.StoredObject, ...]
    by: str
    is_json: bool

    def state(self) -> str:
        """A digest of names, sizes and ETags: as long as it stays, so do the boxes."""
        listed = [[found.name, found.size, found.etag] for found in self.objects]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def find_box_files(uri: str) -> BoxFiles:
    """The files with boxes at a URI; names with a part that begins with "_" or "." are left out.

    Refuses with ConfigError a place without any, and with DataError a file that lacks a column.
    """
    uri = storage.normalise(uri)
    one = storage.describe_object(uri)
    objects = [one] if one else [found for found in storage.list_objects(uri) if _is_parquet(found.name)]
    if not objects:
        raise ConfigError(f"--boxes {uri}: nothing is there, neither a COCO detections JSON nor a Parquet file nor a "
                          "prefix with Parquet files. Give one of these, or annotated, whole-image or detect.")
    if one and not uri.endswith(".parquet"):
        return BoxFiles(uri, (one,), IMAGE_ID, is_json=True)
    return BoxFiles(uri, tuple(objects), _picture_column(_names(objects[0].uri), objects[0].uri), is_json=False)


def read_box_tables(files: BoxFiles) -> Iterator[pa.Table]:
    """All boxes of Parquet files, as tables of BOX_SCHEMA.

    A side or score that is NULL becomes NaN; a row without any side is no box, and left out.
    Refused with DataError, naming file and row: what can't be read, another type, a row that names no picture.
    """
    for found in files.objects:
        yield from _parquet_tables(found.uri, files.by)


def read_pieces(found: storage.StoredObject) -> Iterator[bytes]:
    """An object's bytes, some at a time; ObjectChanged if it becomes another one meanwhile."""
    for start in range(0, found.size, BYTES_AT_ONCE):
        yield storage.read_range(found.uri, start, BYTES_AT_ONCE, etag=found.etag)


def json_box_tables(pieces: Iterable[bytes], source: str) -> Iterator[pa.Table]:
    """The person boxes of a COCO detections JSON, as tables of BOX_SCHEMA; `box_id` is the place in the file.

    Refused as by `coco.parse_detections`.
    """
    detections = parse_detections(pieces, source=source)
    while some := list(itertools.islice(detections, JSON_ROWS_AT_ONCE)):
        sides = np.array([one.box_xywh for one in some], np.float64).T
        yield pa.table([[str(one.image_id) for one in some], [one.index for one in some], *sides,
                        np.array([one.score for one in some], np.float64)], schema=BOX_SCHEMA)


def _is_parquet(name: str) -> bool:
    return name.endswith(".parquet") and not any(part.startswith(("_", ".")) for part in name.split("/"))


# --- Parquet ------------------------------------------------------------------------------------------------------


def _names(uri: str) -> list[str]:
    with storage.arrow_file(uri, remedy=WRITE_AGAIN) as file:
        return list(pq.read_schema(file).names)


def _picture_column(names: Sequence[str], uri: str) -> str:
    for name in (KEY, IMAGE_ID):
        if name in names:
            return name
    raise DataError(f"{uri}: boxes need a column `key` or `image_id`; it has {', '.join(names)}.")


def _columns(names: Sequence[str], by: str, uri: str) -> dict[str, str]:
    """Which column of a file is what: `picture`, x, y, w, h, and those of score, box_id, category_id that it has."""
    if by not in names:
        raise DataError(f"{uri}: it has no column `{by}`, by which the first file names its pictures; it has "
                        f"{', '.join(names)}. Name them in the same way in all files.")
    columns = {"picture": by}
    # `box_score` before `score`, which in a keypoint dataset is the person's
    for name, spellings in {**{side: (f"box_{side}", side) for side in SIDES}, "score": ("box_score", "score"),
                            "box_id": ("box_id",), "category_id": ("category_id",)}.items():
        found = [spelling for spelling in spellings if spelling in names]
        columns |= {name: found[0]} if found else {}
    if missing := [side for side in SIDES if side not in columns]:
        raise DataError(f"{uri}: boxes need the columns x, y, w, h, or box_x, box_y, box_w, box_h, but "
                        f"{', '.join(missing)} is not there. It has {', '.join(names)}.")
    return columns


def _parquet_tables(uri: str, by: str) -> Iterator[pa.Table]:
    with storage.arrow_file(uri, remedy=WRITE_AGAIN) as file, pq.ParquetFile(file) as parquet:
        columns = _columns(parquet.schema_arrow.names, by, uri)
        first_row = 0
        for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=list(columns.values())):
            yield _box_table(batch, columns, where=(uri, first_row))
            first_row += len(batch)


def _box_table(batch: pa.RecordBatch, columns: Mapping[str, str], *, where: tuple[str, int]) -> pa.Table:
    sides = [_numbers(batch[columns[side]], columns[side], where) for side in SIDES]
    score = columns.get("score")
    scores = np.ones(len(batch)) if score is None else _numbers(batch[score], score, where)
    box_id = columns.get("box_id")
    ids = pa.nulls(len(batch), pa.int64()) if box_id is None else _cast(batch[box_id], pa.int64(), box_id, where)
    pictures = _pictures(batch[columns["picture"]], columns["picture"], where)
    table = pa.table([pictures, ids, *sides, scores], schema=BOX_SCHEMA)
    kept = ~np.isnan(sides).all(axis=0)
    if "category_id" in columns:
        category = _cast(batch[columns["category_id"]], pa.int64(), "category_id", where)
        kept &= pc.fill_null(pc.equal(category, PERSON_CATEGORY), False).to_numpy(zero_copy_only=False)
    table = table.filter(pa.array(kept))
    if table["picture"].null_count:
        row = int(np.flatnonzero(kept & pictures.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{where[0]}: row {where[1] + row} has a box but no {columns['picture']}. Give it one, or "
                        "leave the row out.")
    return table


def _pictures(values: pa.Array, name: str, where: tuple[str, int]) -> pa.Array:
    if name == KEY and not _is_text(values.type):
        raise DataError(f"{where[0]}: its column `key` holds {values.type}, but keys are text: a picture's name under "
                        "the prefix, or its URI. Numbers of an annotation file belong in `image_id`.")
    if name == IMAGE_ID:
        values = _cast(values, pa.int64(), name, where)
    return values.cast(pa.string())


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _numbers(values: pa.Array, name: str, where: tuple[str, int]) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    cast = _cast(values, pa.float64(), name, where)
    return np.asarray(pc.fill_null(cast, float("nan")).to_numpy(zero_copy_only=False))


def _cast(values: pa.Array, kind: pa.DataType, name: str, where: tuple[str, int]) -> pa.Array:
    try:
        return values.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{where[0]}: rows from {where[1]} on: column `{name}` holds {values.type}, which is no {kind} "
                        f"throughout: {error}. Write it as {kind}.") from None
