"""Where objects are: a local folder or `s3://bucket/prefix`, behind a handful of functions that take a URI.

The seam: it chooses the side (`storage_disk`, `storage_s3`) and nothing else here knows which it is. It knows nothing
of pictures or datasets. Endpoint, region, credentials and attempts come from the usual AWS settings (AWS_ENDPOINT_URL,
AWS_MAX_ATTEMPTS, profile, instance role) and from nowhere else.

`put_if_absent` is the commit of everything that this project writes: an object appears whole or not at all, and is
never replaced. Errors are of two kinds: about the *object* (ABOUT_THE_OBJECT) and about the *service* (`StorageError`
itself: time-outs, 5xx, credentials, a full disk), which a later run can mend.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from pipeline import storage_disk
from pipeline.errors import (
    BucketMissing,
    ConfigError,
    DataError,
    ObjectChanged,
    ObjectForbidden,
    ObjectMissing,
    ObjectTooLarge,
    StorageError,
)
from pipeline.listing import StoredObject

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs

__all__ = [
    "ABOUT_THE_OBJECT", "BucketMissing", "ConditionIgnored", "ObjectChanged", "ObjectForbidden", "ObjectMissing",
    "ObjectTooLarge", "StorageError", "StoredObject", "arrow_file", "arrow_filesystem", "describe_object", "exists",
    "is_remote", "join", "list_objects", "member", "normalise", "prove_put_if_absent", "put_if_absent", "read_object",
    "read_range", "reason_of", "refuse_no_object", "refuse_overlap", "remove_empty_folder", "remove_own",
    "stored_sha256",
]

_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")  # what the SDK asks a store for
# What is about one object; any other StorageError is about the service, and never becomes a row.
ABOUT_THE_OBJECT = (ObjectMissing, ObjectChanged, ObjectForbidden, ObjectTooLarge)


def reason_of(error: Exception) -> str:
    """The reason that a refused picture's row gives, for an error about the object or a refusal with its own reason."""
    named: dict[type[Exception], str] = {
        ObjectMissing: "missing", ObjectChanged: "changed", ObjectForbidden: "unreadable_object",
        ObjectTooLarge: "too_large_bytes"}
    return named.get(type(error)) or str(getattr(error, "reason"))  # noqa: B009


class ConditionIgnored(ConfigError):
    """The store took a second put of one name: nothing written there could be trusted."""


class Side(Protocol):
    """What each kind of store offers; `uri` is normalised."""

    def list_objects(self, prefix_uri: str) -> Iterator[StoredObject]:
        """Every object, ordered by the bytes of its name."""

    def read(self, uri: str, etag: str | None, neighbours: Sequence[str], own_sha256: bool,
             max_bytes: int | None) -> bytes:
        """The whole object."""

    def read_range(self, uri: str, start: int, length: int, etag: str | None) -> bytes:
        """Some of its bytes."""

    def describe(self, uri: str) -> StoredObject | None:
        """Its size and ETag."""

    def sha256(self, uri: str) -> str:
        """Its digest, kept or counted."""

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Whether it is ours that stands there now."""

    def remove(self, uri: str) -> None:
        """Remove a temporary of our own."""

    def remove_folder(self, uri: str) -> None:
        """Remove a folder with nothing in it, where there are folders."""

    def arrow_filesystem(self, uri: str) -> "tuple[pyarrow.fs.FileSystem, str]":
        """For pyarrow."""

    def arrow_failure(self, uri: str, error: OSError) -> StorageError | None:
        """Ours for an error of pyarrow's; None if it is about the content."""


def normalise(uri: str | os.PathLike[str]) -> str:
    """The URI in its one spelling: an absolute local path, or `s3://bucket/key` without a slash at the end.

    Refuses other schemes and what can be no bucket's name with ConfigError. Keys inside a bucket are never touched.
    """
    text = os.fspath(uri)
    if text.startswith("s3://"):
        bucket, _, key = text[5:].partition("/")
        if not bucket:
            raise ConfigError(f"{text!r} names no bucket; expected s3://bucket/prefix.")
        if not _BUCKET.fullmatch(bucket):
            raise ConfigError(f"{text!r}: no bucket can have this name; expected s3://bucket/prefix.")
        return f"s3://{bucket}/{key}".rstrip("/")
    if text.lower().startswith("s3:"):
        raise ConfigError(f"{text!r}: expected s3://bucket/prefix, or a local path (./{text} if it is one).")
    if text.startswith("file://"):
        text = text[7:]
    elif "://" in text:
        raise ConfigError(f"{text!r}: this kind of address is unknown; expected a local path or s3://bucket/prefix.")
    if not text:
        raise ConfigError("An empty path was given where a local path or s3://bucket/prefix is needed.")
    return os.path.abspath(text)


def refuse_no_object(uri: str) -> None:
    """Refuse (ConfigError) what can be no object's address; a folder marker, with its "/" at the end, can."""
    if is_remote(normalise(uri)) and "/" not in uri[len("s3://"):]:
        raise ConfigError(f"{uri!r} names a bucket and no object.")


def join(uri: str, *names: str) -> str:
    """The URI of an object below `uri`; the names are taken as they are."""
    return "/".join([uri.rstrip("/"), *names])


def member(prefix_uri: str, key: str) -> str:
    """The URI of the object `key` under a prefix.

    In a folder a key such as `../x`, `a//x` or `/x` would be another file than one that is listed there: it is an
    ObjectMissing. A bucket takes any key as it is.
    """
    uri = join(prefix_uri, key)
    if not is_remote(uri) and normalise(uri) != join(normalise(prefix_uri), key):
        raise ObjectMissing(f"{prefix_uri}: no file below this folder can have the name {key!r}.")
    return uri


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
    """Every object under the prefix, ordered by the bytes of its name, as a stream in bounded memory.

    Folder markers (names that end with "/") and, on a disk, files whose names begin with a dot are left out. A prefix
    that holds nothing yields nothing; a local folder that does not exist too. While others write and remove there,
    each object that stands there all the time is given exactly once. On S3 several pages are asked for at a time.
    """
    prefix_uri = normalise(prefix_uri)
    return _side(prefix_uri).list_objects(prefix_uri)


def read_object(uri: str, *, etag: str | None = None, neighbours: Sequence[str] = (), own_sha256: bool = True,
                max_bytes: int | None = None) -> bytes:
    """The object's bytes, checked against their length and every checksum that the store keeps of them; the SHA-256
    that we put with it is left to a caller who knows it (`own_sha256` False): 128 MB take 0.6 s.

    With `etag`, ObjectChanged unless it is still that object. One of more than `max_bytes` isn't read: ObjectTooLarge.
    An object that the store refuses (403) is ObjectForbidden only if another one can be read now: one of `neighbours`
    (URIs) or what lies beside and above it; otherwise it is about us, and a StorageError.
    """
    uri = normalise(uri)
    return _side(uri).read(uri, etag, neighbours, own_sha256, max_bytes)


def read_range(uri: str, start: int, length: int, *, etag: str | None = None) -> bytes:
    """`length` bytes (at least 1) of the object from byte `start`: fewer at its end, none beyond it.

    Errors are those of `read_object`. Only whole objects can be checked against a checksum.
    """
    assert start >= 0, start
    assert length > 0, length
    uri = normalise(uri)
    return _side(uri).read_range(uri, start, length, etag)


def describe_object(uri: str) -> StoredObject | None:
    """The object of exactly this name, its `name` the last component of the URI; None if there is none."""
    uri = normalise(uri)
    return _side(uri).describe(uri)


def exists(uri: str) -> bool:
    """Whether there is an object of exactly this name."""
    return describe_object(uri) is not None


def stored_sha256(uri: str) -> str:
    """SHA-256 in hex of an object: as `put_if_absent` kept it, otherwise by reading it. Refuses with ObjectMissing.

    Kept in the metadata on S3, and on a disk in an extended attribute, which counts only while size and time of the
    file are those of the write.
    """
    uri = normalise(uri)
    return _side(uri).sha256(uri)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write the object, whole, unless one of that name exists; whether it is ours that stands there now.

    On S3 it is one PutObject with If-None-Match, never multipart, never a copy: stores ignore the condition there.
    The writer's id travels as metadata, so that a refusal after a lost answer is recognised as our own success.
    On a disk: a dot-file in the same folder, fsync, hard link, fsync of the folder.
    """
    uri = normalise(uri)
    return _side(uri).put_if_absent(uri, data)


def remove_own(uri: str) -> None:
    """Remove a temporary of our own, such as a sign of life; nothing that was committed is ever removed.

    One that isn't there is no error.
    """
    uri = normalise(uri)
    _side(uri).remove(uri)


def remove_empty_folder(uri: str) -> None:
    """Remove the folder in which our temporaries were, if nothing is left in it; a bucket has no folders."""
    uri = normalise(uri)
    _side(uri).remove_folder(uri)


def prove_put_if_absent(prefix_uri: str) -> None:
    """Prove on the output's own prefix that a second put of one name is refused; ConditionIgnored where it isn't.

    The probe's name begins with `_`, so that readers of Parquet skip it; the probe is our own temporary, and removed,
    also when something fails in between.
    """
    probe = join(normalise(prefix_uri), f"_probe-{uuid.uuid4().hex}")
    side = _side(probe)
    try:
        side.put_if_absent(probe, b"first")
        refused = not side.put_if_absent(probe, b"second")
        kept = side.read(probe, None, (), True, None) == b"first"
    except BaseException:
        with contextlib.suppress(StorageError):
            side.remove(probe)
        raise
    side.remove(probe)
    if not (refused and kept):
        raise ConditionIgnored(
            f"{prefix_uri}: the store accepted a second put of the same name, so that two writers could overwrite "
            "each other. Use a store that honours If-None-Match on PutObject, or a local folder.")


def arrow_filesystem(uri: str) -> "tuple[pyarrow.fs.FileSystem, str]":
    """The pyarrow filesystem and the path in it, from the same settings as every other function here.

    Each call gives one with the credentials of now. Those of instance and container roles and of web identities are
    renewed by the filesystem itself, however long it is kept; other temporary ones (SSO, an assumed role) end in it
    when they end: ask for a new filesystem then, rather than keep one for hours.
    """
    uri = normalise(uri)
    return _side(uri).arrow_filesystem(uri)


@contextlib.contextmanager
def arrow_file(uri: str, *, remedy: str) -> "Iterator[pyarrow.NativeFile]":
    """The object, open for pyarrow to read at any place of it, for the time of the block.

    What the store refuses meanwhile is raised as by `read_object`; what pyarrow can't make of the content is a
    DataError, which ends with the remedy.
    """
    import pyarrow as pa

    uri = normalise(uri)
    try:
        filesystem, path = arrow_filesystem(uri)
        with filesystem.open_input_file(path) as file:
            yield file
    except (StorageError, MemoryError):
        raise
    except (pa.ArrowException, OSError) as error:
        failure = _side(uri).arrow_failure(uri, error) if isinstance(error, OSError) else None
        raise failure or DataError(f"{uri} can't be read ({error}). {remedy}") from None


def _side(uri: str) -> Side:
    if not is_remote(uri):
        return storage_disk
    from pipeline import storage_s3  # boto3 takes half a second: only when there is something for it to do

    return storage_s3
