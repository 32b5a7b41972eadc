"""Millions of boxes, spread over a disk, joined with the plan, and kept in the output where each unit finds its own.

`_boxes/<digest>/boxes-0000012.parquet` has the boxes of a hundred units, a row group for each unit of the plan: a unit
reads its own and no others. Neither the boxes nor the plan are ever in memory as a whole.
"""

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.box_files import BOX_SCHEMA, SIDES
from pipeline.errors import DataError
from pipeline.hash_buckets import HASH, HashBuckets, Hashes, name_hashes
from pipeline.rows import Boxes
from pipeline.units import RESTORE, FrozenJob, part_footers

logger = logging.getLogger("jobs.annotate")
FOLDER = "_boxes"
UNITS_PER_FILE = 100
FROZEN_SCHEMA = pa.schema([("key", pa.string()), *list(BOX_SCHEMA)[1:]])
PICTURE_SCHEMA = pa.schema([("picture", pa.string()), ("key", pa.string()), ("unit", pa.int64())])
_PLACED_SCHEMA = FROZEN_SCHEMA.append(pa.field("unit", pa.int64()))
# the order of a picture's boxes: by their ids, and without ids the best first
_ORDER = [("box_id", "ascending"), ("score", "descending"), *((side, "ascending") for side in SIDES)]


class SpreadBoxes:
    """Boxes in buckets by the hash of their picture, each bucket in an order that the files have no part in.

    A context manager: what is on the disk is gone at the end.
    """

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._resources = contextlib.ExitStack()
        self._buckets = self._resources.enter_context(HashBuckets(BOX_SCHEMA))
        for table in tables:
            self._buckets.add(table, picture_hashes(table["picture"]))

    def __enter__(self) -> "SpreadBoxes":
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def __len__(self) -> int:
        return int(self._buckets.rows.sum())

    def numbers(self) -> list[int]:
        """The buckets that hold any, ascending."""
        return [int(number) for number in np.flatnonzero(self._buckets.rows)]

    def bucket(self, number: int) -> pa.Table:
        """One bucket's boxes (BOX_SCHEMA), in order.

        Where no ids were given, they are 0, 1, ... in each picture, the best first.
        """
        table = self._buckets.read(number, number + 1).drop_columns([HASH])
        table = table.sort_by([("picture", "ascending"), *_ORDER]).combine_chunks()
        if not table["box_id"].null_count:
            return table
        encoded = pc.dictionary_encode(table["picture"].combine_chunks()).indices.to_numpy()
        ranks = np.arange(len(table)) - np.searchsorted(encoded, encoded)  # sorted: each picture's are one slice
        return table.set_column(1, "box_id", pc.fill_null(table["box_id"], pa.array(ranks, pa.int64())))

    def digest(self) -> str:
        """SHA-256 over all boxes; the same whatever files they lay in, and in whatever order."""
        content = hashlib.sha256()
        for number in self.numbers():
            table = self.bucket(number)
            content.update(pc.binary_length(table["picture"]).to_numpy().astype("<i4").tobytes())
            content.update("".join(table["picture"].to_pylist()).encode())
            content.update(table["box_id"].to_numpy().astype("<i8").tobytes())
            for name in (*SIDES, "score"):
                values = table[name].to_numpy().astype("<f8")
                content.update(np.where(np.isnan(values), np.nan, values).tobytes())  # NaN has many spellings
        return content.hexdigest()


def picture_hashes(pictures: pa.ChunkedArray) -> Hashes:
    """uint64 [n]: each name's hash. Rows of one picture mostly stand together: each name is hashed once a table."""
    encoded = pc.dictionary_encode(pa.array([], pa.string()) if not len(pictures) else pictures.combine_chunks())
    hashes: Hashes = name_hashes(encoded.dictionary.to_pylist(), 0)[encoded.indices.to_numpy()]
    return hashes


def are_frozen(output: str, job: FrozenJob, digest: str) -> bool:
    """Whether the boxes of every unit are there."""
    there = sum(1 for _ in storage.list_objects(storage.join(output, _folder_name(job, digest))))
    return there == _num_files(job)


def freeze_boxes(output: str, job: FrozenJob, digest: str, boxes: SpreadBoxes, pictures: Iterable[pa.Table], *,
                 source: str, whole: bool = True) -> None:
    """Write each unit's boxes, put if absent: the same bytes for the same boxes and plan.

    pictures  the plan's (PICTURE_SCHEMA): what the boxes call each one, its key, its unit
    source    where the boxes come from, for messages
    whole     the plan has the whole input: boxes of which none is of its pictures are refused then (DataError); of a
              limited or sampled plan they are only told
    """
    with HashBuckets(_PLACED_SCHEMA) as placed, HashBuckets(PICTURE_SCHEMA) as planned:
        for table in pictures:
            planned.add(table, picture_hashes(table["picture"]))
        _place(boxes, planned, placed, job.num_units)
        found = int(placed.rows.sum())
        logger.info("%d boxes are of planned pictures; %d are of pictures that aren't in the plan", found,
                    len(boxes) - found)
        if len(boxes) and not found:
            _tell_that_none_fits(source, boxes, planned, refuse=whole)
        for number, file in enumerate(_files(placed, job.num_units)):
            storage.put_if_absent(_file_uri(output, job, digest, number), file)


def count_frozen(output: str, job: FrozenJob, digest: str) -> int:
    """How many boxes are frozen, by the files' footers."""
    names = (_file_name(number) for number in range(_num_files(job)))
    return sum(footer.num_rows for footer in part_footers(output, _folder_name(job, digest), names))


def read_unit_boxes(output: str, job: FrozenJob, digest: str, unit: int) -> dict[str, Boxes]:
    """The frozen boxes of one unit, by key, each picture's in the order of their ids."""
    uri = _file_uri(output, job, digest, unit // UNITS_PER_FILE)
    with storage.arrow_file(uri, remedy=RESTORE) as file, pq.ParquetFile(file) as parquet:
        table = parquet.read_row_group(unit % UNITS_PER_FILE).combine_chunks()
    xywh = np.stack([table[side].to_numpy() for side in SIDES], -1)
    ids, scores = table["box_id"].to_numpy(), table["score"].to_numpy()
    keys = table["key"].to_pylist()
    starts = [index for index in range(len(keys)) if index == 0 or keys[index] != keys[index - 1]]
    ends = [*starts, len(keys)][1:]
    return {keys[a]: Boxes(ids[a:b], xywh[a:b], scores[a:b]) for a, b in zip(starts, ends, strict=True)}


def _folder_name(job: FrozenJob, digest: str) -> str:
    # by the plan too: two drivers may begin with different listings, and one plan wins
    return f"{FOLDER}/{digest[:16]}-{job.plan['digest'][:8]}"


def _num_files(job: FrozenJob) -> int:
    return -(-job.num_units // UNITS_PER_FILE)


def _file_name(number: int) -> str:
    return f"boxes-{number:07d}.parquet"


def _file_uri(output: str, job: FrozenJob, digest: str, number: int) -> str:
    return storage.join(output, _folder_name(job, digest), _file_name(number))


def _tell_that_none_fits(source: str, boxes: SpreadBoxes, planned: HashBuckets, *, refuse: bool) -> None:
    box = boxes.bucket(boxes.numbers()[0])["picture"][0].as_py()
    pictures = next((bucket["picture"] for bucket in planned if len(bucket)), None)
    plan = "no planned picture has an image_id" if pictures is None else f"the plan has {pictures[0].as_py()!r}"
    said = f"{source}: none of the {len(boxes)} boxes is of a planned picture: they are of {box!r}, but {plan}."
    if refuse:
        raise DataError(f"{said} Name pictures as the column `key` (or image_id) does; --boxes whole-image needs none.")
    logger.warning("%s That may be so in a part of the input; if not, spell them alike.", said)


def _place(boxes: SpreadBoxes, planned: HashBuckets, placed: HashBuckets, num_units: int) -> None:
    """Join boxes and pictures bucket by bucket, and spread what belongs together by its unit."""
    for number in boxes.numbers():
        there = planned.read(number, number + 1).drop_columns([HASH])
        joined = boxes.bucket(number).join(there, "picture", join_type="inner").select(_PLACED_SCHEMA.names)
        placed.add(joined, _unit_hashes(joined["unit"].to_numpy(), num_units))


def _unit_hashes(units: np.ndarray[Any, Any], num_units: int) -> Hashes:
    """Hashes that rise with the unit, so that buckets, read in order, give the units in order."""
    return units.astype(np.uint64) * np.uint64((2**64 - 1) // num_units)


def _files(placed: HashBuckets, num_units: int) -> Iterator[bytes]:
    """The files' bytes in order; UNITS_PER_FILE row groups each, also empty ones."""
    units = _unit_tables(placed, num_units)
    with tempfile.TemporaryDirectory(prefix="boxes-") as folder:
        path = Path(folder, "boxes.parquet")
        for first in range(0, num_units, UNITS_PER_FILE):
            with pq.ParquetWriter(path, FROZEN_SCHEMA, compression="zstd", write_statistics=False) as writer:
                for _ in range(first, min(first + UNITS_PER_FILE, num_units)):
                    table = next(units)
                    writer.write_table(table, row_group_size=max(1, len(table)))
            yield path.read_bytes()


def _unit_tables(placed: HashBuckets, num_units: int) -> Iterator[pa.Table]:
    """Each unit's boxes (FROZEN_SCHEMA), sorted; units lie whole in one bucket, in their order."""
    unit = 0
    for number in np.flatnonzero(placed.rows).tolist():
        table = placed.read(number, number + 1)
        table = table.sort_by([("unit", "ascending"), ("key", "ascending"), *_ORDER]).combine_chunks()
        units = table["unit"].to_numpy()
        for one in range(unit, int(units[-1]) + 1):
            start, end = np.searchsorted(units, [one, one + 1])
            yield table.slice(start, end - start).select(FROZEN_SCHEMA.names)
        unit = int(units[-1]) + 1
    yield from (FROZEN_SCHEMA.empty_table() for _ in range(unit, num_units))
