"""Millions of rows in bounded memory: spread by a hash into buckets, which go to a disk when they are many.

What planning needs of millions of objects: all that have one name (or one content) in one bucket, and the buckets in
the order of their hashes. It knows nothing of pictures or shards.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

NUM_BUCKETS = 256  # 50 million rows are 200,000 a bucket, some 30 MB
ROWS_IN_MEMORY = 200_000
HASH = "hash"

Hashes = npt.NDArray[np.uint64]


def name_hashes(names: Iterable[str], seed: int) -> Hashes:
    """uint64 [n]: the first 8 bytes of the SHA-256 of "seed/name"."""
    prefix = hashlib.sha256(f"{seed}/".encode())
    return np.array([_first_bytes(prefix, name.encode()) for name in names], np.uint64)


def _first_bytes(prefix: Any, name: bytes) -> int:
    digest = prefix.copy()
    digest.update(name)
    return int.from_bytes(digest.digest()[:8], "big")


class HashBuckets:
    """Rows of one schema, read back bucket by bucket; bucket i has the hashes that begin with the 8 bits of i.

    A context manager: its files are in a temporary folder (TMPDIR), and gone at the end. Not for several threads.
    `rows` and `sizes` int64 [256] are each bucket's number of rows and the sum of their column `size`, if it has one.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema.append(pa.field(HASH, pa.uint64()))
        self.rows = np.zeros(NUM_BUCKETS, np.int64)
        self.sizes = np.zeros(NUM_BUCKETS, np.int64)
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self._resources = contextlib.ExitStack()
        self._folder: Path | None = None
        self._written: set[int] = set()

    def __enter__(self) -> "HashBuckets":
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.clear()
        self._resources.close()

    def add(self, rows: pa.Table, hashes: Hashes) -> None:
        """Add rows with their hashes."""
        buckets = _buckets(hashes)
        self.rows += np.bincount(buckets, minlength=NUM_BUCKETS)
        if "size" in rows.column_names:
            sizes = pc.fill_null(rows["size"], 0).to_numpy()
            self.sizes += np.bincount(buckets, weights=sizes, minlength=NUM_BUCKETS).astype(np.int64)
        self._waiting.append(rows.append_column(HASH, pa.array(hashes)).cast(self.schema).sort_by(HASH))
        self._num_waiting += len(rows)
        if self._num_waiting >= ROWS_IN_MEMORY:
            self._write_waiting()

    def read(self, first: int, end: int) -> pa.Table:
        """The rows of the buckets first <= i < end, with their column `hash`, sorted by it."""
        tables = [self._in_memory(first, end)]
        for bucket in self._written.intersection(range(first, end)):
            tables += self._on_disk(bucket)
        return pa.concat_tables(tables).sort_by(HASH).combine_chunks()

    def __iter__(self) -> Iterator[pa.Table]:
        """The buckets in order, also the empty ones."""
        return (self.read(bucket, bucket + 1) for bucket in range(NUM_BUCKETS))

    def _in_memory(self, first: int, end: int) -> pa.Table:
        if not self._waiting:
            return self.schema.empty_table()
        if len(self._waiting) > 1:
            self._waiting = [pa.concat_tables(self._waiting).sort_by(HASH).combine_chunks()]
        table = self._waiting[0]
        start, stop = np.searchsorted(_buckets(table[HASH].to_numpy()), [first, end])
        return table.slice(start, stop - start)

    def _on_disk(self, bucket: int) -> list[pa.Table]:
        path = self._path(bucket)
        tables = []
        with pa.OSFile(str(path)) as file:
            while file.tell() < file.size():  # one stream for each time that rows were written
                with pa.ipc.open_stream(file) as reader:
                    tables.append(reader.read_all())
        return tables

    def _write_waiting(self) -> None:
        if self._folder is None:
            self._folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="plan-")))
        table = pa.concat_tables(self._waiting).sort_by(HASH).combine_chunks()
        ends = np.searchsorted(_buckets(table[HASH].to_numpy()), np.arange(NUM_BUCKETS + 1))
        for bucket in np.flatnonzero(np.diff(ends)).tolist():
            # opened anew each time: 256 files held open by each of several tables reach the usual limit of 1024
            with pa.OSFile(str(self._path(bucket)), "ab") as file, pa.ipc.new_stream(file, self.schema) as writer:
                writer.write_table(table.slice(ends[bucket], ends[bucket + 1] - ends[bucket]))
            self._written.add(bucket)
        self._waiting, self._num_waiting = [], 0

    def _path(self, bucket: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{bucket}.arrow"


def _buckets(hashes: Hashes) -> npt.NDArray[np.int64]:
    return (hashes >> np.uint64(56)).astype(np.int64)
