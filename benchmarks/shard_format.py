"""Which form of Parquet a shard should have: size, time to write, to read without the pictures, to read them all.

    python -m benchmarks.shard_format [--megabytes N]

One part of made JPEGs of 20 to 200 kB and their persons, as `pipeline.shards.part_bytes` would write it, in several
forms. Reading without the pictures is what planning and sealing do on every part: key, etag, sha256 and size. The
ranges that it reads are counted: each is a request where the part is in object storage. Reading all is
`pipeline.shards.iterate_part`; its memory is Arrow's, beyond the file as stored.
"""

import argparse
import hashlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.shard import DISTINCT_PICTURES, make_jpeg, with_comment
from pipeline import shards, storage
from pipeline.images import read_header
from pipeline.shard_plan import DROPPED

REPETITIONS = 5
NARROW = ["key", "etag", "sha256", "size"]
NO_DROPPED = DROPPED.empty_table()


@dataclass(frozen=True)
class Form:
    """How a part is written; by default as `part_bytes` does. `row_group` 0: the whole part is one."""

    compression: str = "none"  # of `bytes`; the other columns have zstd
    row_group: int = 0
    page_bytes: int = 1 << 20  # Arrow's default
    check_rows: int = shards.ROWS_UNTIL_PAGE_CHECK

    def name(self) -> str:
        """A cell of the table."""
        return (f"{self.compression} | {self.row_group or 'whole part'} | {self.page_bytes >> 10} KiB "
                f"| {self.check_rows} rows")


FORMS = (Form(), Form("lz4"), Form("zstd"), Form(row_group=256), Form(row_group=64), Form(page_bytes=64 << 10),
         Form(page_bytes=16 << 20), Form(check_rows=64), Form(check_rows=1024), Form("zstd", check_rows=1024),
         Form(row_group=64, check_rows=1024))


def main() -> int:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=100)
    options = parser.parse_args()
    table = make_table(options.megabytes * 1e6)
    measured: dict[Form, list[tuple[float, ...]]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(REPETITIONS):
            for number, form in enumerate(FORMS):
                measured[form].append(measure(table, form, f"{folder}/{repetition}-{number}"))
    print_table(table, measured)
    return 0


def make_table(num_bytes: float) -> pa.Table:
    """A part's rows, with two persons each."""
    jpegs = [make_jpeg(20_000 * 10 ** (i / (DISTINCT_PICTURES - 1)), seed=i) for i in range(DISTINCT_PICTURES)]
    rows: list[dict[str, Any]] = []
    size = 0
    while size < num_bytes:
        data = with_comment(jpegs[len(rows) % len(jpegs)], f"{len(rows):016d}")
        rows.append(make_row(f"{len(rows):012d}.jpg", data))
        size += len(data)
    return pq.read_table(pa.BufferReader(shards.part_bytes(rows)))


def make_row(key: str, data: bytes) -> dict[str, Any]:
    """One picture's row."""
    person = {"annotation_id": 1, "box_xywh": [1.5, 2.5, 30.0, 60.0], "area": 1800.0, "iscrowd": False,
              "num_keypoints": 17, "keypoints": [float(i) for i in range(51)]}
    planned = {"key": key, "etag": hashlib.md5(data).hexdigest(), "size": len(data)}
    return shards.shard_row(planned, None, lambda: data, read_header, max_bytes=len(data)) | {"persons": [person] * 2}


def write(table: pa.Table, form: Form) -> bytes:
    """The part in this form."""
    compression = {name: form.compression if name == "bytes" else "zstd" for name in shards.leaf_columns(table.schema)}
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression, use_dictionary=False, data_page_size=form.page_bytes,
                   row_group_size=form.row_group or len(table), write_batch_size=form.check_rows)
    return bytes(sink.getvalue().to_pybytes())


def measure(table: pa.Table, form: Form, folder: str) -> tuple[float, ...]:
    """MB, seconds to write; seconds, ranges and bytes without pictures; seconds and MB for all."""
    began = time.perf_counter()
    data = write(table, form)
    seconds = time.perf_counter() - began
    storage.put_if_absent(f"{folder}/{shards.FOLDER}/part", data)
    # in a process of its own: Arrow counts the most that it had since its start
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        reading = process.submit(stream, folder, hashlib.sha256(data).hexdigest()).result()
    return len(data) / 1e6, seconds, *read_narrow(data), *reading


def read_narrow(data: bytes) -> tuple[float, float, float]:
    """Seconds, ranges and kB to read some columns."""
    began = time.perf_counter()
    pq.ParquetFile(pa.BufferReader(data)).read(NARROW)
    seconds = time.perf_counter() - began
    counting = CountingFile(data)
    pq.ParquetFile(pa.PythonFile(counting, "r")).read(NARROW)
    return seconds, counting.ranges, counting.bytes_read / 1e3


class CountingFile(io.BytesIO):
    """A file that counts what is read of it."""

    ranges = bytes_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As BytesIO's."""
        data = super().read(size)
        self.ranges += 1
        self.bytes_read += len(data)
        return data


def stream(folder: str, sha256: str) -> tuple[float, float]:
    """Seconds to have each picture in hand once, and MB of Arrow's memory at most."""
    part = shards.ShardPart("part", sha256, {})
    dataset = shards.ShardDataset(folder, 1, (part,), None, NO_DROPPED, {})
    began = time.perf_counter()
    for row in shards.iterate_part(dataset, part):
        assert row["bytes"]
    return time.perf_counter() - began, pa.default_memory_pool().max_memory() / 1e6


def print_table(table: pa.Table, measured: Mapping[Form, Sequence[tuple[float, ...]]]) -> None:
    """Medians."""
    print(f"{len(table)} pictures, {sum(table['size'].to_pylist()) / 1e6:.1f} MB\n")
    print("| `bytes` | row group | page | checked each | file MB | write s | some columns: ms | ranges | kB | all: s "
          "| MB of memory |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for form, some in measured.items():
        size, seconds, narrow, ranges, kilobytes, all_s, memory = map(statistics.median, zip(*some, strict=True))
        print(f"| {form.name()} | {size:.2f} | {seconds:.2f} | {1000 * narrow:.1f} | {ranges:.0f} | {kilobytes:.0f} "
              f"| {all_s:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    sys.exit(main())
