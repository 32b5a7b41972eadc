"""An S3 server for benchmarks: everything in the memory of one process, and little work for each request.

It checks no signature and serves any bucket without its creation. It knows GET (If-Match, Range), HEAD, PUT
(If-None-Match, metadata, aws-chunked bodies), DELETE and ListObjectsV2, and can keep each answer back for a while,
as a network does, without holding up others. A server for tests of behaviour is in tests/s3.py.
"""

import asyncio
import bisect
import contextlib
import hashlib
import http.client
import multiprocessing
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from multiprocessing.connection import Connection
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

MAX_KEYS = 1000
LATENCY_PATH = "/_latency"  # PUT here: seconds for which each answer is kept back from now on
_REASONS = {200: "OK", 204: "No Content", 206: "Partial Content", 404: "Not Found", 412: "Precondition Failed"}


@dataclass(frozen=True)
class RunningServer:
    """A server in a process of its own."""

    port: int
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """The AWS settings under which every client finds it."""
        return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}

    def put(self, objects: Iterator[tuple[str, bytes]]) -> None:
        """Put objects, each a path (`/bucket/key`) and bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        for path, data in objects:
            connection.request("PUT", path, data)
            connection.getresponse().read()
        connection.close()

    def delay(self, seconds: float) -> None:
        """Keep each answer back so long."""
        self.put(iter([(LATENCY_PATH, str(seconds).encode())]))


@contextlib.contextmanager
def static_s3() -> Iterator[RunningServer]:
    """Run a server on loopback for the time of the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield RunningServer(ours.recv(), int(process.pid or 0))
    finally:
        process.terminate()
        process.join()


@dataclass(frozen=True)
class _Object:
    data: bytes
    etag: str
    head: bytes  # of an answer that has it whole


@dataclass
class _Store:
    objects: dict[str, _Object] = field(default_factory=dict)  # path -> object
    paths: list[str] = field(default_factory=list)  # sorted
    delay_s: float = 0.0

    def put(self, path: str, data: bytes, metadata: dict[str, str]) -> _Object:
        etag = hashlib.md5(data).hexdigest()
        fields = {"ETag": f'"{etag}"', "Last-Modified": formatdate(time.time(), usegmt=True),
                  "Accept-Ranges": "bytes", "Content-Type": "binary/octet-stream", **metadata}
        if path not in self.objects:
            bisect.insort(self.paths, path, key=str.encode)
        self.objects[path] = made = _Object(data, etag, _head(200, len(data), fields))
        return made

    def delete(self, path: str) -> None:
        if self.objects.pop(path, None) is not None:
            del self.paths[bisect.bisect_left(self.paths, path.encode(), key=str.encode)]


def _head(status: int, length: int, fields: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Length: {length}", "x-amz-request-id: 1",
             *(f"{name}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class _Connection(asyncio.Protocol):
    """One client's connection: requests come one after the other."""

    def __init__(self, store: _Store) -> None:
        self.store, self.received = store, bytearray()
        self.request: tuple[str, str, dict[str, str]] | None = None
        self.missing = 0  # bytes of the request's body that have not come

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.request is None and not self._take_head():
            return
        if len(self.received) < self.missing:
            return
        assert self.request is not None
        body, self.received = bytes(self.received[:self.missing]), self.received[self.missing:]
        method, target, fields = self.request
        self.request = None
        answer = _answer(self.store, method, target, fields, body)
        if self.store.delay_s:
            asyncio.get_running_loop().call_later(self.store.delay_s, self.transport.writelines, answer)
        else:
            self.transport.writelines(answer)

    def _take_head(self) -> bool:
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = self.received[:end].decode("latin-1").split("\r\n")
        del self.received[:end + 4]
        method, target, _ = first.split(" ")
        pairs = (line.partition(":") for line in lines)
        fields = {name.lower(): value.strip() for name, _, value in pairs}
        self.request, self.missing = (method, target, fields), int(fields.get("content-length", 0))
        if "expect" in fields:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True


Answer = list[bytes]


def _answer(store: _Store, method: str, target: str, fields: dict[str, str], body: bytes) -> Answer:
    if method == "GET" and target in store.objects:  # most requests: the path needs no decoding
        return _read(store, target, fields, with_body=True)
    address = urlsplit(target)
    path, query = unquote(address.path), {name: values[0] for name, values in parse_qs(address.query).items()}
    if method == "GET" and "list-type" in query:
        return _listing(store, path, query)
    if method in {"GET", "HEAD"}:
        return _read(store, path, fields, with_body=method == "GET")
    if method == "PUT":
        return _write(store, path, fields, body)
    assert method == "DELETE", method
    store.delete(path)
    return [_head(204, 0, {})]


def _read(store: _Store, path: str, fields: dict[str, str], *, with_body: bool) -> Answer:
    found = store.objects.get(path)
    if found is None:
        return _error(404, "NoSuchKey", with_body=with_body)
    if fields.get("if-match", found.etag).strip('"') != found.etag:
        return _error(412, "PreconditionFailed", with_body=with_body)
    if with_body and (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", fields.get("range", ""))):
        start, end = int(wanted[1]), min(int(wanted[2] or len(found.data)), len(found.data) - 1)
        some = found.data[start:end + 1]
        return [_head(206, len(some), {"ETag": f'"{found.etag}"',
                                       "Content-Range": f"bytes {start}-{end}/{len(found.data)}"}), some]
    return [found.head, found.data] if with_body else [found.head]


def _write(store: _Store, path: str, fields: dict[str, str], body: bytes) -> Answer:
    if path == LATENCY_PATH:
        store.delay_s = float(body)
        return [_head(200, 0, {})]
    if "if-none-match" in fields and path in store.objects:
        return _error(412, "PreconditionFailed")
    data = _without_chunks(body) if "aws-chunked" in fields.get("content-encoding", "") else body
    metadata = {name: value for name, value in fields.items() if name.startswith("x-amz-meta-")}
    return [_head(200, 0, {"ETag": f'"{store.put(path, data, metadata).etag}"'})]


def _without_chunks(body: bytes) -> bytes:
    """The data of an aws-chunked body: chunks of `size[;signature]CRLF data CRLF`, an empty one, trailers."""
    chunks: list[bytes] = []
    at = 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end].split(b";")[0], 16)
        if not size:
            return b"".join(chunks)
        chunks.append(body[end + 2:end + 2 + size])
        at = end + 4 + size


def _listing(store: _Store, bucket: str, query: dict[str, str]) -> Answer:
    root = bucket.rstrip("/") + "/"
    prefix, delimiter = root + query.get("prefix", ""), query.get("delimiter")
    after = root + query.get("continuation-token", query.get("start-after", ""))
    at = max(bisect.bisect_left(store.paths, prefix.encode(), key=str.encode),
             bisect.bisect_right(store.paths, after.encode(), key=str.encode))
    most = min(int(query.get("max-keys", MAX_KEYS)), MAX_KEYS)
    encode = quote if query.get("encoding-type") == "url" else str
    entries: dict[str, str] = {}
    last, truncated = "", False
    for path in store.paths[at:]:
        if not path.startswith(prefix):
            break
        folder, found, _ = path[len(prefix):].partition(delimiter) if delimiter else ("", "", "")
        name = prefix + folder + found if found else path
        if name not in entries and len(entries) == most:
            truncated = True
            break
        entries[name] = _entry(encode(name[len(root):]), None if found else store.objects[path])
        last = path[len(root):]
    more = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if truncated else ""
    text = (f"<ListBucketResult><IsTruncated>{str(truncated).lower()}</IsTruncated>{more}"
            f"<KeyCount>{len(entries)}</KeyCount><EncodingType>{query.get('encoding-type', '')}</EncodingType>"
            f"{''.join(entries.values())}</ListBucketResult>").encode()
    return [_head(200, len(text), {"Content-Type": "application/xml"}), text]


def _entry(key: str, found: _Object | None) -> str:
    if found is None:
        return f"<CommonPrefixes><Prefix>{escape(key)}</Prefix></CommonPrefixes>"
    return (f"<Contents><Key>{escape(key)}</Key><ETag>&quot;{found.etag}&quot;</ETag><Size>{len(found.data)}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>")


def _error(status: int, code: str, *, with_body: bool = True) -> Answer:
    text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    head = _head(status, len(text), {"Content-Type": "application/xml"})
    return [head, text] if with_body else [head]


def _serve(ready: Connection) -> None:
    asyncio.run(_serve_for_ever(ready))


async def _serve_for_ever(ready: Connection) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(partial(_Connection, _Store()), "127.0.0.1", 0, backlog=1024)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()
