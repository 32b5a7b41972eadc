"""Where objects are: a local folder or `s3://bucket/prefix`, behind a handful of functions that take a URI.

The one importer of boto3. It knows nothing of pictures or datasets. Endpoint, region and credentials come from the
usual AWS settings (AWS_ENDPOINT_URL, profile, instance role) and from nowhere else.

`put_if_absent` is the commit of everything that this project writes: an object appears whole or not at all, and is
never replaced. Errors are of two kinds: about the *object* (`ObjectMissing`, `ObjectChanged`, `ObjectForbidden`) and
about the *service* (`StorageError` itself: time-outs, 5xx, credentials, a full disk), which a later run can mend.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow.fs

T = TypeVar("T")

# Attempts of one request, the SDK's own retries included in each: throttling in S3 passes within a minute.
ATTEMPTS = 5
FIRST_PAUSE_S = 0.2
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
WRITER_KEY = "writer"
SHA256_KEY = "sha256"
_RENAME_NOREPLACE = 1  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class StorageError(OSError):
    """The store could not be used: the message names the object and what the store said. Running again may help."""


class ObjectMissing(StorageError):
    """There is no such object."""


class ObjectChanged(StorageError):
    """The object is there, but it is not the one that was planned (another ETag)."""


class ObjectForbidden(StorageError):
    """The store refuses this object (403). Whether that is about the object or the service, its neighbours tell."""


# What is about one object; any other StorageError is about the service, and never becomes a row.
ABOUT_THE_OBJECT = (ObjectMissing, ObjectChanged, ObjectForbidden)


def reason_of(error: Exception) -> str:
    """The reason that a refused picture's row gives, for an error about the object or a refusal with its own reason."""
    named: dict[type[Exception], str] = {
        ObjectMissing: "missing", ObjectChanged: "changed", ObjectForbidden: "unreadable_object"}
    return named.get(type(error)) or str(getattr(error, "reason"))  # noqa: B009


class ConditionIgnored(ConfigError):
    """The store took a second put of one name: nothing written there could be trusted."""


@dataclass(frozen=True)
class StoredObject:
    """One entry of a listing. `name` is relative to the listed prefix; `etag` is opaque (on a disk: size and mtime)."""

    name: str
    uri: str
    size: int
    etag: str


def normalise(uri: str | os.PathLike[str]) -> str:
    """The URI in its one spelling: an absolute local path, or `s3://bucket/key` without a slash at the end.

    Refuses other schemes and a bucket without a name with ConfigError. Keys inside a bucket are never touched.
    """
    text = os.fspath(uri)
    if text.startswith("s3://"):
        bucket, _, key = text[5:].partition("/")
        if not bucket:
            raise ConfigError(f"{text!r} names no bucket; expected s3://bucket/prefix.")
        return f"s3://{bucket}/{key}".rstrip("/")
    if text.startswith("file://"):
        text = text[7:]
    elif "://" in text:
        raise ConfigError(f"{text!r}: this kind of address is unknown; expected a local path or s3://bucket/prefix.")
    if not text:
        raise ConfigError("An empty path was given where a local path or s3://bucket/prefix is needed.")
    return os.path.abspath(text)


def join(uri: str, *names: str) -> str:
    """The URI of an object below `uri`; the names are taken as they are."""
    return "/".join([uri.rstrip("/"), *names])


def is_remote(uri: str) -> bool:
    """Whether other machines can reach it without a shared disk."""
    return uri.startswith("s3://")


def refuse_overlap(input_uri: str, output_uri: str) -> None:
    """Refuse (ConfigError) an output inside its input, or the reverse: it would be read back as input."""
    first, second = normalise(input_uri) + "/", normalise(output_uri) + "/"
    if first.startswith(second) or second.startswith(first):
        raise ConfigError(f"The output {output_uri} and the input {input_uri} lie one inside the other; "
                          "choose an output beside the input.")


def list_objects(prefix_uri: str) -> Iterator[StoredObject]:
    """Every object under the prefix, ordered by the bytes of its name.

    Folder markers (names that end with "/") and this module's own temporaries are left out. A prefix that holds
    nothing yields nothing; a local folder that does not exist too.
    """
    prefix_uri = normalise(prefix_uri)
    if is_remote(prefix_uri):
        yield from _list_s3(prefix_uri)
    else:
        yield from _list_disk(Path(prefix_uri))


def read_object(uri: str, *, etag: str | None = None, neighbours: Any = ()) -> bytes:
    """The object's bytes; with `etag`, ObjectChanged unless it is still that object."""
    uri = normalise(uri)
    if is_remote(uri):
        return _retried(uri, lambda: _get_s3(uri, etag))
    return _read_disk(Path(uri), etag)


def exists(uri: str) -> bool:
    """Whether there is an object of exactly this name."""
    uri = normalise(uri)
    if not is_remote(uri):
        return Path(uri).is_file()
    return _retried(uri, lambda: _head_s3(uri)) is not None


def describe_object(uri: str) -> StoredObject | None:
    """What a listing would say of one object (`name`: its last component), or None."""
    uri = normalise(uri)
    name = uri.rpartition("/")[2]
    if not is_remote(uri):
        path = Path(uri)
        return StoredObject(name, uri, path.stat().st_size, _disk_etag(path.stat())) if path.is_file() else None
    head = _retried(uri, lambda: _head_s3(uri))
    return None if head is None else StoredObject(name, uri, head["ContentLength"], head["ETag"].strip('"'))


def stored_sha256(uri: str) -> str:
    """SHA-256 of an object that `put_if_absent` wrote: from its metadata on S3, by reading it on a disk."""
    uri = normalise(uri)
    if is_remote(uri):
        head = _retried(uri, lambda: _head_s3(uri))
        if head is None:
            raise ObjectMissing(f"{uri}: there is no such object.")
        if SHA256_KEY in head["Metadata"]:
            return str(head["Metadata"][SHA256_KEY])
    return hashlib.sha256(read_object(uri)).hexdigest()


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write the object, whole, unless one of that name exists; whether it is ours that stands there now.

    On S3 it is one PutObject with If-None-Match, never multipart, never a copy: stores ignore the condition there.
    The writer's id travels as metadata, so that a refusal after a lost answer is recognised as our own success.
    On a disk: a dot-file in the same folder, fsync, hard link, fsync of the folder.
    """
    uri = normalise(uri)
    if is_remote(uri):
        return _put_s3(uri, data)
    return _put_disk(Path(uri), data)


def prove_put_if_absent(prefix_uri: str) -> None:
    """Prove on the output's own prefix that a second put of one name is refused; ConditionIgnored where it isn't.

    The probe's name begins with `_`, so that readers of Parquet skip it; the probe is our own temporary, and removed.
    """
    probe = join(normalise(prefix_uri), f"_probe-{uuid.uuid4().hex}")
    put_if_absent(probe, b"first")
    refused = not put_if_absent(probe, b"second")
    kept = read_object(probe) == b"first"
    _delete_own_temporary(probe)
    if not (refused and kept):
        raise ConditionIgnored(
            f"{prefix_uri}: the store accepted a second put of the same name, so that two writers could overwrite "
            "each other. Use a store that honours If-None-Match on PutObject, or a local folder.")


def arrow_filesystem(uri: str) -> "tuple[pyarrow.fs.FileSystem, str]":
    """The pyarrow filesystem and the path in it, from the same settings as every other function here."""
    import pyarrow.fs

    uri = normalise(uri)
    if not is_remote(uri):
        return pyarrow.fs.LocalFileSystem(), uri
    # pyarrow's own reading of AWS_ENDPOINT_URL differs between versions: hand over what boto3 found
    client = _client()
    credentials = client._request_signer._credentials
    settings: dict[str, Any] = {"endpoint_override": client.meta.endpoint_url, "region": client.meta.region_name,
                                "request_timeout": READ_TIMEOUT_S, "connect_timeout": CONNECT_TIMEOUT_S}
    if credentials is not None:
        frozen = credentials.get_frozen_credentials()
        settings |= {"access_key": frozen.access_key, "secret_key": frozen.secret_key,
                     "session_token": frozen.token}
    return pyarrow.fs.S3FileSystem(**settings), uri[5:]


def _retried(uri: str, request: Callable[[], T]) -> T:
    """The request's result, asked again with growing, jittered pauses while the service is at fault."""
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except ABOUT_THE_OBJECT:
            raise
        except StorageError:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError(uri)


# --- a folder on a disk -------------------------------------------------------------------------------------------


def _list_disk(root: Path) -> Iterator[StoredObject]:
    # a disk lists in any order, S3 by the bytes of the keys: sort, so that both give the same datasets
    found: list[tuple[bytes, Path]] = []
    for folder, _, files in os.walk(root):
        paths = (Path(folder, file) for file in files if not file.startswith("."))
        found += [(PurePosixPath(path.relative_to(root)).as_posix().encode("utf-8", "surrogateescape"), path)
                  for path in paths]
    for encoded, path in sorted(found):
        status = path.stat()
        yield StoredObject(encoded.decode("utf-8", "surrogateescape"), str(path), status.st_size, _disk_etag(status))


def _disk_etag(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _read_disk(path: Path, etag: str | None) -> bytes:
    try:
        with path.open("rb") as file:
            if etag is not None and _disk_etag(os.fstat(file.fileno())) != etag:
                raise ObjectChanged(f"{path}: the file is no longer the one that was listed (size or time differ).")
            return file.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ObjectMissing(f"{path}: there is no such file.") from error
    except PermissionError as error:
        raise ObjectForbidden(f"{path}: the file may not be read ({error.strerror}).") from error
    except ObjectChanged:
        raise
    except OSError as error:
        raise StorageError(f"{path}: reading failed: {error}.") from error


def _put_disk(path: Path, data: bytes) -> bool:
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        committed = _link_exclusively(temporary, path)
        _fsync_folder(path.parent)
        return committed
    except ConfigError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: writing failed: {error}.") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _link_exclusively(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    return _rename_exclusively(temporary, path)


def _rename_exclusively(temporary: Path, path: Path) -> bool:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        names = (os.fsencode(temporary), os.fsencode(path))
        if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) == 0:
            return True
        if ctypes.get_errno() == errno.EEXIST:
            return False
    raise ConfigError(f"{path.parent}: this filesystem offers neither hard links nor renameat2(RENAME_NOREPLACE), so "
                      "that a file can't be put only if absent. Write to a local disk or to object storage.")


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- S3 -----------------------------------------------------------------------------------------------------------


@functools.cache
def _client_of_process(process: int) -> Any:
    import boto3
    from botocore.config import Config

    # one client for each process: it is safe across threads, not across a fork
    return boto3.session.Session().client("s3", config=Config(
        retries={"mode": "standard", "max_attempts": 3}, max_pool_connections=64,
        connect_timeout=CONNECT_TIMEOUT_S, read_timeout=READ_TIMEOUT_S))


def _client() -> Any:
    return _client_of_process(os.getpid())


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri[5:].partition("/")
    return bucket, key


@contextlib.contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    """Turn the SDK's errors into ours; the HTTP status decides which."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = error.response.get("Error", {}).get("Code", "")
        if code == "NoSuchBucket":
            raise ConfigError(f"{uri}: there is no such bucket. Create it, or correct the name.") from error
        kind = {404: ObjectMissing, 412: ObjectChanged}.get(int(status or 0), StorageError)
        if code == "AccessDenied":  # other 403s, such as ExpiredToken, are about us and not about the object
            kind = ObjectForbidden
        raise kind(f"{uri}: the store answered {status} {code}.") from error
    except (BotoCoreError, HTTPClientError) as error:
        raise StorageError(f"{uri}: the store could not be reached: {error}.") from error


def _list_s3(prefix_uri: str) -> Iterator[StoredObject]:
    bucket, key = _split(prefix_uri)
    prefix = f"{key}/" if key else ""
    token: dict[str, str] = {}
    while True:
        page = _retried(prefix_uri, functools.partial(_list_page, prefix_uri, bucket, prefix, token))
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                yield StoredObject(item["Key"][len(prefix):], f"s3://{bucket}/{item['Key']}",
                                   item["Size"], item["ETag"].strip('"'))
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def _list_page(uri: str, bucket: str, prefix: str, token: Mapping[str, str]) -> dict[str, Any]:
    with _s3_errors(uri):
        page: dict[str, Any] = _client().list_objects_v2(Bucket=bucket, Prefix=prefix, **token)
        return page


def _get_s3(uri: str, etag: str | None) -> bytes:
    bucket, key = _split(uri)
    condition = {} if etag is None else {"IfMatch": f'"{etag}"'}
    with _s3_errors(uri):
        answer = _client().get_object(Bucket=bucket, Key=key, **condition)
        data = bytes(answer["Body"].read())
    if len(data) != answer["ContentLength"]:
        raise StorageError(f"{uri}: {len(data)} bytes came of {answer['ContentLength']}.")
    return data


def _head_s3(uri: str) -> dict[str, Any] | None:
    bucket, key = _split(uri)
    try:
        with _s3_errors(uri):
            head: dict[str, Any] = _client().head_object(Bucket=bucket, Key=key)
            return head
    except ObjectMissing:
        return None


def _put_s3(uri: str, data: bytes) -> bool:
    bucket, key = _split(uri)
    writer = uuid.uuid4().hex
    metadata = {WRITER_KEY: writer, SHA256_KEY: hashlib.sha256(data).hexdigest()}

    def put() -> bool:
        with _s3_errors(uri):
            _client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", Metadata=metadata)
        return True

    try:
        return _retried(uri, put)
    except ObjectChanged:
        # 412: somebody's object is there. Perhaps our own, whose answer was lost on the way
        head = _retried(uri, lambda: _head_s3(uri))
        return head is not None and head["Metadata"].get(WRITER_KEY) == writer


def _delete_own_temporary(uri: str) -> None:
    if is_remote(uri):
        bucket, key = _split(uri)
        with _s3_errors(uri):
            _client().delete_object(Bucket=bucket, Key=key)
    else:
        Path(uri).unlink()
