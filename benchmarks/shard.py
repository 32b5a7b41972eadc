"""How fast `shard` is, beside the loop that one would write instead, and beside what this machine can do at most.

    python -m benchmarks.shard [--pictures N] [--repetitions N] [--only NAME ...] [--output DIR]

Everything is read from and written to a small S3 server on loopback (benchmarks/static_s3.py), which takes its share
of the same cores. For each size of pictures and each latency, one after the other and all of it several times:

    bare        no S3 client at all: prepared requests on sockets, nothing written. What the server can give.
    limit       the job's number of processes and threads: get_object, and a put of the joined bytes for each shard.
                No hashing, no Parquet, no Ray.
    job         jobs.shard.run, within a Ray that is running: listing, plan, writing, sealing.
    16 threads  boto3, pyarrow and a ThreadPoolExecutor: parts of 1000 rows with key and bytes.
    1 thread    the same, one picture after the other, of the first 200 pictures.

The medians are printed as tables, and all that was measured goes to DIR/shard.json.
"""

import argparse
import io
import itertools
import json
import logging
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import boto3
import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.config import Config

from benchmarks.static_s3 import RunningServer, static_s3
from jobs import shard
from jobs.start_ray import num_cpus, start_ray
from pipeline.config import ShardConfig, TrackingConfig

SIZES = {"20 kB": (20, 20), "200 kB": (200, 200), "20 to 200 kB": (20, 200)}  # of a picture, kB
LATENCIES_S = (0.0, 0.05)
THREADS = 16  # of a task: RayConfig.threads
ROWS_PER_PART = 1000
PICTURES_PER_SHARD = 250  # small, so that a run has many shards for each task: a job of millions of pictures has
DISTINCT_PICTURES = 100
BYTES_PER_PIXEL = 0.6  # COCO's have 0.5
SEQUENTIAL_PICTURES = 200
CONTENDERS = ("bare", "limit", "job", "16 threads", "1 thread")
OUT = "out"  # the bucket that is written to


@dataclass(frozen=True)
class Source:
    """One bucket of pictures."""

    name: str
    bucket: str
    keys: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True)
class Measurement:
    """One run of one contender. `cpu_s` is that of all processes but the server's."""

    source: str
    latency_s: float
    contender: str
    pictures: int
    bytes: float
    wall_s: float
    cpu_s: float
    server_cpu_s: float
    stages_s: dict[str, float]  # of the job alone


class StageClock(logging.Handler):
    """What the job has done since its last message, by the messages of its log."""

    ENDS = (("objects listed under", "list"), ("shards are there; writing", "freeze"),
            (" shards, ", "write"), (" rows = ", "seal"))

    def __init__(self) -> None:
        super().__init__()
        self.restart()

    def restart(self) -> None:
        """From now on."""
        self.stages_s: dict[str, float] = {}
        self.last = time.perf_counter()

    def emit(self, record: logging.LogRecord) -> None:
        """A message that ends a stage."""
        now, text = time.perf_counter(), record.getMessage()
        for words, stage in self.ENDS:
            if words in text:
                self.stages_s[stage] = self.stages_s.get(stage, 0) + now - self.last
                self.last = now
                return


CLOCK = StageClock()


def main() -> int:
    """Measure, print the table, write shard.json."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--pictures", type=int, default=2000, help="in each bucket")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--output", type=Path, default=Path("build/benchmark-shard"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    shard.logger.setLevel(logging.INFO)
    shard.logger.propagate = False
    shard.logger.addHandler(CLOCK)
    with static_s3() as server:
        os.environ.update(server.environment)  # before Ray: its workers inherit them
        sources = [fill_bucket(server, name, options.pictures) for name in SIZES]
        with start_ray():
            measured = measure(server, sources, options.repetitions, options.only)
    (options.output / "shard.json").write_text(json.dumps([asdict(one) for one in measured], indent=1))
    print_table(measured)
    print_stages(measured)
    return 0


# --- the pictures -------------------------------------------------------------------------------------------------


def fill_bucket(server: RunningServer, name: str, num_pictures: int) -> Source:
    """Put made JPEGs of sizes between two bounds; some hundred drawn, each object's bytes its own."""
    bucket = f"pictures-{list(SIZES).index(name)}"
    smallest, largest = SIZES[name]
    pictures = [make_jpeg(1000 * smallest * (largest / smallest) ** (i / (DISTINCT_PICTURES - 1)), seed=i)
                for i in range(DISTINCT_PICTURES)]
    objects = [(f"{i % 97:02d}/{i:07d}.jpg", with_comment(pictures[i % DISTINCT_PICTURES], f"{i:016d}"))
               for i in range(num_pictures)]
    server.put((f"/{bucket}/{key}", data) for key, data in objects)
    return Source(name, bucket, tuple(sorted(key for key, _ in objects)), sum(len(data) for _, data in objects))


def make_jpeg(num_bytes: float, *, seed: int) -> bytes:
    """A JPEG of noise of about this size."""
    pixels = num_bytes / BYTES_PER_PIXEL
    width, height = round((pixels * 4 / 3) ** 0.5), round((pixels * 3 / 4) ** 0.5)
    noise = np.random.default_rng(seed).normal(128, 60, (height // 4, width // 4, 3)).clip(0, 255).astype(np.uint8)
    picture = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    for quality in range(60, 101):
        data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) >= num_bytes:
            break
    return data


def with_comment(jpeg: bytes, text: str) -> bytes:
    """The same picture with other bytes: a comment segment after the start marker."""
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text.encode() + jpeg[2:]


# --- the contenders: each reads `keys` of a bucket, and writes below the prefix ------------------------------------


def run_job(source: Source, prefix: str) -> None:
    """The job itself."""
    result = shard.run(ShardConfig(images=f"s3://{source.bucket}", output=f"s3://{OUT}/{prefix}",
                                   images_per_shard=PICTURES_PER_SHARD, tracking=TrackingConfig(enabled=False)))
    assert result["counts"]["pictures"] == len(source.keys), result


def run_loop(source: Source, prefix: str, *, threads: int) -> None:
    """What one would write by hand."""
    client = make_client(threads)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=source.bucket)
    listed = (item["Key"] for page in pages for item in page["Contents"])
    keys = list(itertools.islice(listed, len(source.keys)))
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(keys), ROWS_PER_PART):
            some = keys[start:start + ROWS_PER_PART]
            pictures = list(pool.map(lambda key: get(client, source.bucket, key), some))
            part = io.BytesIO()
            pq.write_table(pa.table({"key": some, "bytes": pictures}), part)
            client.put_object(Bucket=OUT, Key=f"{prefix}/{start}.parquet", Body=part.getvalue())


def run_limit(processes: ProcessPoolExecutor, source: Source, prefix: str) -> None:
    """As many bytes in and out, and nothing else, in processes that are running."""
    shards = [source.keys[i:i + PICTURES_PER_SHARD] for i in range(0, len(source.keys), PICTURES_PER_SHARD)]
    names = [f"{prefix}/{i}" for i in range(len(shards))]
    list(processes.map(copy_shard, itertools.repeat(source.bucket), shards, names))


def copy_shard(bucket: str, keys: Sequence[str], name: str) -> None:
    """In a process: get some objects by as many threads as a task has, put what they hold as one."""
    client = process_client()
    with ThreadPoolExecutor(THREADS) as pool:
        data = b"".join(pool.map(lambda key: get(client, bucket, key), keys))
    client.put_object(Bucket=OUT, Key=name, Body=data)


def run_bare(processes: ProcessPoolExecutor, num_processes: int, port: int, source: Source) -> None:
    """Only requests."""
    connections = num_processes * THREADS
    shares = [source.keys[i::connections] for i in range(connections)]
    groups = [shares[i:i + THREADS] for i in range(0, connections, THREADS)]
    list(processes.map(request_all, itertools.repeat(port), itertools.repeat(source.bucket), groups))


def request_all(port: int, bucket: str, shares: Sequence[Sequence[str]]) -> None:
    """In a process: a thread and a connection for each share of the keys."""
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(lambda keys: request_each(port, bucket, keys), shares))


def request_each(port: int, bucket: str, keys: Iterable[str]) -> None:
    """GET one after the other on one connection."""
    received = bytearray(1 << 20)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for key in keys:
            connection.sendall(f"GET /{bucket}/{key} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            count = connection.recv_into(received)
            end = received.index(b"\r\n\r\n", 0, count) + 4
            length = int(received[:end].partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
            while count < end + length:
                count += connection.recv_into(received)


def make_client(connections: int) -> Any:
    """A boto3 client for so many threads."""
    return boto3.client("s3", config=Config(max_pool_connections=connections))


_CLIENTS: list[Any] = []


def process_client() -> Any:
    """This process's own client."""
    if not _CLIENTS:
        _CLIENTS.append(make_client(THREADS))
    return _CLIENTS[0]


def get(client: Any, bucket: str, key: str) -> bytes:
    """One object's bytes."""
    data: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    return data


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(server: RunningServer, sources: Sequence[Source], repetitions: int,
            names: Sequence[str]) -> list[Measurement]:
    """All contenders in turn, on each source at each latency, several times."""
    at_once = 2 * num_cpus()  # as many as jobs.shard has tasks
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn")) as processes:
        contenders: dict[str, Callable[[Source, str], None]] = {
            "bare": lambda source, _: run_bare(processes, at_once, server.port, source),
            "limit": lambda source, prefix: run_limit(processes, source, prefix),
            "job": run_job,
            "16 threads": lambda source, prefix: run_loop(source, prefix, threads=16),
            "1 thread": lambda source, prefix: run_loop(source, prefix, threads=1)}
        contenders = {name: run for name, run in contenders.items() if name in names}
        for run in contenders.values():  # imports, connections, Ray's workers
            measure_one(server, "warm-up", run, sources[0], 0)
        return list(_measurements(server, contenders, sources, repetitions))


def _measurements(server: RunningServer, contenders: dict[str, Callable[[Source, str], None]],
                  sources: Sequence[Source], repetitions: int) -> Iterator[Measurement]:
    for _, source, latency_s in itertools.product(range(repetitions), sources, LATENCIES_S):
        for name, run in contenders.items():
            some = first_pictures(source, SEQUENTIAL_PICTURES) if name == "1 thread" else source
            made = measure_one(server, name, run, some, latency_s)
            print(f"{made.source:>13} {1000 * latency_s:3.0f} ms {name:>10}: {made.wall_s:6.2f} s", file=sys.stderr)
            yield made


def first_pictures(source: Source, count: int) -> Source:
    """The source cut to its first pictures; their bytes in proportion."""
    keys = source.keys[:count]
    return Source(source.name, source.bucket, keys, source.num_bytes * len(keys) // len(source.keys))


def measure_one(server: RunningServer, name: str, run: Callable[[Source, str], None], source: Source,
                latency_s: float) -> Measurement:
    """One run, and its traces removed."""
    server.delay(latency_s)
    prefix = f"{name.replace(' ', '-')}-{time.monotonic_ns()}"
    CLOCK.restart()
    cpu, server_cpu, began = cpu_of_all(but=server.pid), cpu_of(server.pid), time.perf_counter()
    run(source, prefix)
    wall = time.perf_counter() - began
    cpu, server_cpu = cpu_of_all(but=server.pid) - cpu, cpu_of(server.pid) - server_cpu
    server.delay(0)
    remove(prefix)
    return Measurement(source.name, latency_s, name, len(source.keys), source.num_bytes, wall, cpu, server_cpu,
                       CLOCK.stages_s)


def cpu_of_all(*, but: int) -> float:
    """CPU seconds of this process and all that it started, Ray's own included."""
    here = psutil.Process()
    return sum(cpu_of(one.pid) for one in (here, *here.children(recursive=True)) if one.pid != but)


def cpu_of(pid: int) -> float:
    """CPU seconds of a process; 0 if it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def remove(prefix: str) -> None:
    """Delete what was written there."""
    client = process_client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=OUT, Prefix=prefix):
        for item in page.get("Contents", []):
            client.delete_object(Bucket=OUT, Key=item["Key"])


# --- the table ----------------------------------------------------------------------------------------------------


def print_table(measured: Sequence[Measurement]) -> None:
    """Medians; the ratios are medians of the ratios within each repetition."""
    print("| pictures | latency | | pictures/s | MB/s | of the limit | of 16 threads | CPU ms/picture | server's CPU |")
    print("|---|---|---|---|---|---|---|---|---|")
    cells = dict.fromkeys((one.source, one.latency_s) for one in measured)
    for source, latency_s in cells:
        runs: dict[str, list[Measurement]] = {}
        for one in measured:
            if (one.source, one.latency_s) == (source, latency_s):
                runs.setdefault(one.contender, []).append(one)
        for name, some in runs.items():
            ratios = [f"{statistics.median(map(ratio, some, runs[other])):.2f}" if other in runs else ""
                      for other in ("limit", "16 threads")]
            print(f"| {source} | {1000 * latency_s:.0f} ms | {name} | {median(some, rate):,.0f} "
                  f"| {median(some, lambda one: one.bytes / 1e6 / one.wall_s):.0f} | {' | '.join(ratios)} "
                  f"| {median(some, lambda one: 1000 * one.cpu_s / one.pictures):.2f} "
                  f"| {median(some, lambda one: 100 * one.server_cpu_s / one.wall_s):.0f} % |")


def print_stages(measured: Sequence[Measurement]) -> None:
    """What the job's seconds went to, and the speed of writing alone beside the limit's: medians."""
    stages = [stage for _, stage in StageClock.ENDS]
    print(f"\n| the job, s | latency | {' | '.join(stages)} | write, of the limit |")
    print("|---|---|" + "---|" * (len(stages) + 1))
    for source, latency_s in dict.fromkeys((one.source, one.latency_s) for one in measured):
        here = [one for one in measured if (one.source, one.latency_s) == (source, latency_s)]
        jobs = [one for one in here if one.contender == "job"]
        limits = [one.wall_s for one in here if one.contender == "limit"]
        seconds = [f"{statistics.median(one.stages_s[stage] for one in jobs):.2f}" for stage in stages]
        share = statistics.median(limit / one.stages_s["write"] for limit, one in zip(limits, jobs, strict=True))
        print(f"| {source} | {1000 * latency_s:.0f} ms | {' | '.join(seconds)} | {share:.2f} |")


def rate(one: Measurement) -> float:
    """Pictures a second."""
    return one.pictures / one.wall_s


def ratio(one: Measurement, other: Measurement) -> float:
    """How many times as fast."""
    return rate(one) / rate(other)


def median(some: Iterable[Measurement], value: Callable[[Measurement], float]) -> float:
    """The median of a value."""
    return statistics.median(map(value, some))


if __name__ == "__main__":
    sys.exit(main())
