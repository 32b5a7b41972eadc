"""Planning millions of objects, and resuming with many units done: time, memory of the driver, and how both grow.

    python -m benchmarks.planning [--listed 100000 1000000] [--inventory 10000000] [--resumed 100000 1000000]
                                  [--counted 100000] [--latency-ms 30]

What is measured is what `shard` does before its first part: list (or read an inventory), compare with the version
that is there, assign to shards, freeze the plan. The listing comes from a server that answers ListObjectsV2 from a
formula, each page after a latency, so that nothing has to be filled; nested (10,000 objects in each folder) and flat.
Resumed is what `annotate` does before the first unit that is left, of a run in which all others are committed: one
listing of the parts. Counted is what it does then beside the work: it reads what each of those parts counts, from the
end of its file, so that pictures which earlier runs rejected count too. Each row is a process of its own; memory is its
peak above what it had before it began.
"""

import argparse
import http.server
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DIGEST = "0123abcd" * 8  # a job's
SIZE, ETAG = 120_000, "9a0364b9e99bb480dd25e1f0284c8555"
KEYS: dict[str, Callable[[int], str]] = {
    "nested": lambda index: f"pictures/{index // 10_000:06d}/{index:012d}.jpg",
    "flat": lambda index: f"pictures/{index:012d}.jpg",
    "parts": lambda index: f"pictures/keypoints/part-{index:07d}-{DIGEST[:8]}.parquet"}
ROWS_PER_GROUP = 1_000_000
PICTURES_PER_UNIT = 1000


def main() -> int:
    """Run every row, and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--listed", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--inventory", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--resumed", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--counted", type=int, nargs="*", default=[100_000])
    parser.add_argument("--latency-ms", type=float, default=30)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, uri = options.one
        print(json.dumps(MEASUREMENTS.get(kind, plan_one)(uri)))
        return 0
    print(f"{'source':>10} {'objects':>10} {'seconds':>8} {'of CPU':>7} {'objects/s':>10} {'MB above base':>14} "
          f"{'shards':>7}")
    for kind in ("nested", "flat"):
        for count in options.listed:
            with listing_server(kind, count, options.latency_ms / 1000) as endpoint:
                report(kind, count, "s3://listed/pictures", endpoint)
    for count in options.inventory:
        with tempfile.TemporaryDirectory() as folder:
            write_inventory(Path(folder, "inventory.parquet"), count)
            report("inventory", count, f"{folder}/inventory.parquet", "http://127.0.0.1:1")
    for kind, counts in (("resumed", options.resumed), ("counted", options.counted)):
        for count in counts:
            with listing_server("parts", count, options.latency_ms / 1000) as endpoint:
                report(kind, count, "s3://listed/pictures", endpoint)
    return 0


def report(kind: str, count: int, images: str, endpoint: str) -> None:
    """Plan in a process of its own; one row of the table."""
    environment = {**os.environ, "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
                   "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-m", "benchmarks.planning", "--one", kind, images]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    assert found["objects"] == count, found
    print(f"{kind:>10} {count:>10,} {found['seconds']:>8.1f} {found['cpu_s']:>7.1f} {count / found['seconds']:>10,.0f} "
          f"{found['mb']:>14.0f} {found['shards']:>7,}", flush=True)


def plan_one(images: str) -> dict[str, float]:
    """Freeze the plan of a first version; objects, shards, what it took (`Costs`)."""
    from jobs.shard import freeze_next
    from pipeline.config import ShardConfig
    from pipeline.shard_versions import NO_VERSION

    with tempfile.TemporaryDirectory() as output:
        config = ShardConfig(images=images, output=output)
        costs = Costs()
        job = freeze_next(config, None, NO_VERSION)
        assert job is not None
        return {"objects": job.plan["pictures"], "shards": job.num_units, **costs.so_far()}


def resume_one(output: str) -> dict[str, float]:
    """Find the units of a run that are left; as `plan_one`, with the parts as objects, and the units left as shards."""
    from jobs.annotate import missing_units
    from pipeline.units import open_job

    costs = Costs()
    job = open_job(output)
    assert job is not None
    missing = missing_units(output, job)
    return {"objects": job.num_units - len(missing), "shards": len(missing), **costs.so_far()}


def count_one(output: str) -> dict[str, float]:
    """Add up what all committed parts of a run count; as `resume_one`."""
    from pipeline.keypoints import counts_of_parts
    from pipeline.units import open_job, total_counts

    job = open_job(output)
    assert job is not None
    done = job.num_units - 1
    costs = Costs()
    total: dict[str, Any] = {}
    for counts in counts_of_parts(output, map(job.part_name, range(done))):
        total = total_counts([total, counts])
    assert total["pictures"] == done * PICTURES_PER_UNIT, total
    return {"objects": done, "shards": 1, **costs.so_far()}


MEASUREMENTS = {"resumed": resume_one, "counted": count_one}


class Costs:
    """What this process has taken since now."""

    def __init__(self) -> None:
        self._base_mb, self._began, self._cpu_s = resident_mb("VmRSS"), time.monotonic(), time.process_time()

    def so_far(self) -> dict[str, float]:
        """Seconds, those of a core, and at most so many MB more."""
        return {"seconds": time.monotonic() - self._began, "cpu_s": time.process_time() - self._cpu_s,
                "mb": resident_mb("VmHWM") - self._base_mb}


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
    # of a run with one unit more than there are parts; all parts are alike
    stored = {"_job.json": _job(count + 1), ".parquet": _part()} if kind == "parts" else {}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(latency_s)
            address = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(address.query))
            whole = next((data for name, data in stored.items() if address.path.endswith(name)), None)
            body = _list_page(key, count, query).encode() if whole is None else whole
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked:
                body = body[int(asked[1]):int(asked[2]) + 1]
            self.send_response(206 if asked else 200)
            self.send_header("Content-Type", "application/xml" if whole is None else "binary/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{ETAG}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_port)
    server.serve_forever()


def _job(units: int) -> bytes:
    from pipeline.units import FrozenJob

    plan = {"digest": DIGEST, "units": units, "pictures": units * PICTURES_PER_UNIT}
    return json.dumps(FrozenJob(DIGEST, {}, {}, plan, {}).to_json()).encode()


def _part() -> bytes:
    """A unit of pictures, each with one person."""
    from pipeline.keypoints import part_bytes
    from pipeline.pose.skeleton import COCO17
    from pipeline.rows import OK, AnnotatedPicture, Boxes

    boxes = Boxes(np.zeros(1, np.int64), np.array([[0.0, 0.0, 64.0, 128.0]]), np.ones(1))
    about = {"image_id": None, "etag": ETAG, "sha256": DIGEST, "width": 640, "height": 480}
    joints = np.zeros((1, COCO17.num_joints, 2), np.float32)
    pictures = [AnnotatedPicture({"key": KEYS["flat"](index), **about}, OK, boxes=boxes, joints_xy=joints,
                                 joint_scores=joints[..., 0]) for index in range(PICTURES_PER_UNIT)]
    return part_bytes(pictures, COCO17, job=DIGEST, model={"name": "none", "version": None, "digest": DIGEST})


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
