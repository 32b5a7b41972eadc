"""Planning millions of objects, and resuming with many units done: time, memory of the driver, and how both grow.

    python -m benchmarks.planning [--listed 100000 1000000] [--inventory 10000000] [--resumed 100000 1000000]
                                  [--latency-ms 30]

What is measured is what `shard` does before its first part: list (or read an inventory), compare with the version
that is there, assign to shards, freeze the plan. The listing comes from a server that answers ListObjectsV2 from a
formula, each page after a latency, so that nothing has to be filled; nested (10,000 objects in each folder) and flat.
Resumed is what `annotate` does before the first unit that is left, of a run in which all others are committed: one
listing of the parts. Each row is a process of its own; memory is its peak above what it had before it began.
"""

import argparse
import http.server
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import urllib.parse
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

DIGEST = "0123abcd"  # the first 8 digits of a job's
SIZE, ETAG = 120_000, "9a0364b9e99bb480dd25e1f0284c8555"
KEYS: dict[str, Callable[[int], str]] = {
    "nested": lambda index: f"pictures/{index // 10_000:06d}/{index:012d}.jpg",
    "flat": lambda index: f"pictures/{index:012d}.jpg",
    "parts": lambda index: f"pictures/keypoints/part-{index:07d}-{DIGEST}.parquet"}
ROWS_PER_GROUP = 1_000_000


def main() -> int:
    """Run every row, and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--listed", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--inventory", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--resumed", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--latency-ms", type=float, default=30)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--units", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(resume_one(options.one, options.units) if options.units else plan_one(options.one)))
        return 0
    print(f"{'source':>10} {'objects':>10} {'seconds':>8} {'objects/s':>10} {'MB above base':>14} {'shards':>7}")
    for kind in ("nested", "flat"):
        for count in options.listed:
            with listing_server(kind, count, options.latency_ms / 1000) as endpoint:
                report(kind, count, "s3://listed/pictures", endpoint)
    for count in options.inventory:
        with tempfile.TemporaryDirectory() as folder:
            write_inventory(Path(folder, "inventory.parquet"), count)
            report("inventory", count, f"{folder}/inventory.parquet", "http://127.0.0.1:1")
    for count in options.resumed:
        with listing_server("parts", count, options.latency_ms / 1000) as endpoint:
            report("parts", count, "s3://listed/pictures", endpoint, "--units", str(count + 1))
    return 0


def report(kind: str, count: int, images: str, endpoint: str, *more: str) -> None:
    """Plan in a process of its own; one row of the table."""
    environment = {**os.environ, "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
                   "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-m", "benchmarks.planning", "--one", images, *more]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    assert found["objects"] == count, found
    print(f"{kind:>10} {count:>10,} {found['seconds']:>8.1f} {count / found['seconds']:>10,.0f} {found['mb']:>14.0f} "
          f"{found['shards']:>7,}", flush=True)


def plan_one(images: str) -> dict[str, float]:
    """Freeze the plan of a first version; objects, seconds, shards, peak memory above the start in MB."""
    from jobs.shard import freeze_next
    from pipeline.config import ShardConfig
    from pipeline.shard_versions import NO_VERSION

    with tempfile.TemporaryDirectory() as output:
        config = ShardConfig(images=images, output=output)
        base = resident_mb("VmRSS")
        began = time.monotonic()
        job = freeze_next(config, None, NO_VERSION)
        assert job is not None
        return {"objects": job.plan["pictures"], "shards": job.num_units, "seconds": time.monotonic() - began,
                "mb": resident_mb("VmHWM") - base}


def resume_one(output: str, units: int) -> dict[str, float]:
    """Find the units of a run that are left; as `plan_one`, with the parts as objects, and the units left as shards."""
    from jobs.annotate import missing_units
    from pipeline.units import FrozenJob

    job = FrozenJob(DIGEST, {}, {}, {"units": units}, {})
    base = resident_mb("VmRSS")
    began = time.monotonic()
    missing = missing_units(output, job)
    return {"objects": units - len(missing), "shards": len(missing), "seconds": time.monotonic() - began,
            "mb": resident_mb("VmHWM") - base}


def resident_mb(what: str) -> float:
    """This process's memory now (VmRSS) or at most so far (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def write_inventory(path: Path, count: int) -> None:
    """An S3 Inventory in Parquet, of so many objects."""
    schema = pa.schema([("bucket", pa.string()), ("key", pa.string()), ("size", pa.int64()), ("e_tag", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, ROWS_PER_GROUP):
            keys = [KEYS["flat"](index) for index in range(start, min(start + ROWS_PER_GROUP, count))]
            writer.write_table(pa.table([["raw"] * len(keys), keys, [SIZE] * len(keys), [ETAG] * len(keys)],
                                        schema=schema))


# --- a server that knows its objects by a formula ------------------------------------------------------------------


@contextmanager
def listing_server(kind: str, count: int, latency_s: float) -> Iterator[str]:
    """The endpoint of a server whose buckets hold `count` objects; in a process of its own."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(kind, count, latency_s, there),
                                                           daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(kind: str, count: int, latency_s: float, port: "multiprocessing.connection.Connection") -> None:
    key = KEYS[kind]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(latency_s)
            query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
            body = _list_page(key, count, query).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_port)
    server.serve_forever()


def _list_page(key: Callable[[int], str], count: int, query: dict[str, str]) -> str:
    """ListObjectsV2's answer: prefix, delimiter, start-after, max-keys."""
    prefix, after, most = query.get("prefix", ""), query.get("start-after", ""), int(query.get("max-keys", 1000))
    delimiter = query.get("delimiter")
    index = bisect_left(range(count), max(prefix, after + "\0" if after else ""), key=key)
    items: list[str] = []
    while index < count and len(items) < most and key(index).startswith(prefix):
        folder, found, _ = key(index)[len(prefix):].partition(delimiter) if delimiter else ("", "", "")
        if found:
            common = f"{prefix}{folder}{delimiter}"
            items.append(f"<CommonPrefixes><Prefix>{common}</Prefix></CommonPrefixes>")
            index = bisect_left(range(count), common + "\U0010ffff", key=key)
        else:
            items.append(f"<Contents><Key>{key(index)}</Key><LastModified>2026-11-22T00:00:00.000Z</LastModified>"
                         f"<ETag>&quot;{ETAG}&quot;</ETag><Size>{SIZE}</Size></Contents>")
            index += 1
    more = index < count and key(index).startswith(prefix)
    return ('<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<KeyCount>{len(items)}</KeyCount><MaxKeys>{most}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated><NextContinuationToken>x</NextContinuationToken>"
            f"{''.join(items)}</ListBucketResult>")


if __name__ == "__main__":
    sys.exit(main())
