"""S3's side of `storage`, and the one importer of boto3. Endpoint, region, credentials, number of attempts, checksums
and certificates come from the usual AWS settings.

The SDK makes one attempt; the retries are here, in one place, and end in an error that names the object, the attempts
and what the store said, without any secret that an address may carry.
"""

import base64
import contextlib
import datetime
import email.utils
import functools
import hashlib
import itertools
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import boto3.session
import botocore.parsers
import botocore.session
import botocore.utils
from botocore import exceptions as sdk
from botocore.config import Config
from botocore.parsers import ResponseParserError

from pipeline.errors import (
    BucketMissing,
    ConfigError,
    ObjectChanged,
    ObjectForbidden,
    ObjectMissing,
    ObjectTooLarge,
    StorageError,
)
from pipeline.listing import Page, StoredObject, list_in_ranges

if TYPE_CHECKING:
    import pyarrow.fs

T = TypeVar("T")

# Attempts of one request where AWS_MAX_ATTEMPTS and the profile's max_attempts say nothing
ATTEMPTS = 6
# The longest pause before the second attempt; it doubles, and a random part of it is waited ("full jitter":
# https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/). Throttling wants more patience.
FIRST_PAUSE_S = 0.2
FIRST_THROTTLED_PAUSE_S = 1.0
LONGEST_PAUSE_S = 20.0
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
PAGE_OBJECTS = 1000  # of a listing; no store gives more
WRITER_KEY = "writer"
SHA256_KEY = "sha256"
# How many given neighbours, and how many keys of each folder above, are tried before a refusal is about us
NEIGHBOURS_GIVEN = 3
NEIGHBOURS_IN_A_FOLDER = 4
FOLDERS_ABOVE = 8

_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}
# Refusals that are no server's fault and pass all the same: damage on the way, and two writers at once (409)
_PASSING = {"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "IncompleteBody", "RequestTimeout",
            "InternalError", "ServiceUnavailable", *_THROTTLED}
_PASSING_STATUS = {408, 409, 429}
_PASSING_ERRORS = (sdk.HTTPClientError, sdk.ConnectionError, sdk.IncompleteReadError, sdk.ChecksumError,
                   sdk.FlexibleChecksumError, sdk.CredentialRetrievalError, sdk.MetadataRetrievalError,
                   ResponseParserError)
# Refusals of one object to us; an archived one must be restored first
_DENIED = {"AccessDenied", "InvalidObjectState"}
_WRONG_BUCKET = {"NoSuchBucket": "there is no such bucket. Create it, or correct the name",
                 "InvalidBucketName": "no bucket can have this name. Correct it"}
# No object can have such a name (the last one is MinIO's)
_NO_NAME = {"KeyTooLongError", "InvalidURI", "XMinioInvalidObjectName"}
# Sources of credentials that pyarrow's own SDK knows, and renews
_RENEWED_BY_PYARROW = {"iam-role", "container-role", "assume-role-with-web-identity"}


class _Passing(Exception):
    """The request failed in a way that may pass: it is made again, after a longer pause if the store is overloaded."""

    def __init__(self, said: str, *, throttled: bool = False) -> None:
        super().__init__(said)
        self.throttled = throttled


class _AttemptsFailed(StorageError):
    """The last attempt failed too; it may have been applied all the same."""


class _Denied(StorageError):
    """403 AccessDenied, before it is known whether that is about the object or about us."""


@dataclass(frozen=True)
class _Connection:
    """The client of this process, and what the SDK's settings say about it."""

    session: botocore.session.Session
    client: Any
    attempts: int
    sends_md5: bool


def list_objects(prefix_uri: str) -> Iterator[StoredObject]:
    """Every object under the prefix, by parallel pages; names that end with "/" are left out."""
    bucket, key = _split(prefix_uri)
    listing = _Listing(prefix_uri, bucket, f"{key}/" if key else "")
    found = list_in_ranges(listing.page, listing.folders)
    with contextlib.closing(found):
        yield from (one for one in found if one.name and not one.name.endswith("/"))


def read(uri: str, etag: str | None, neighbours: Sequence[str], own_sha256: bool, max_bytes: int | None) -> bytes:
    """The object's bytes, checked for length, by the store's checksum, and by our own SHA-256 where there is one."""
    def get() -> bytes:
        answer, data = _get(uri, etag, {}, max_bytes)
        ours = answer["Metadata"] if own_sha256 and WRITER_KEY in answer["Metadata"] else {}
        if SHA256_KEY in ours and hashlib.sha256(data).hexdigest() != ours[SHA256_KEY]:
            raise _Passing(f"the object is damaged: its bytes do not have its metadata's SHA-256 {ours[SHA256_KEY]}")
        return data

    return _read(uri, get, neighbours)


def read_range(uri: str, start: int, length: int, etag: str | None) -> bytes:
    """Some of the object's bytes; none beyond its end."""
    def get() -> bytes:
        try:
            answer, data = _get(uri, etag, {"Range": f"bytes={start}-{start + length - 1}"})
        except sdk.ClientError as error:
            if _status(error.response) == 416:
                return b""
            raise
        # a server that knows no ranges sends all
        return data if "ContentRange" in answer else data[start:start + length]

    return _read(uri, get, ())


def describe(uri: str) -> StoredObject | None:
    """The object's size and ETag by a HEAD; None if it is not there."""
    head = _head(uri)
    return None if head is None else StoredObject(uri.rpartition("/")[2], uri, head["ContentLength"], _etag(head))


def sha256(uri: str) -> str:
    """The digest in the object's metadata; of an object that is not ours, by reading it."""
    head = _head(uri)
    if head is None:
        raise ObjectMissing(f"{uri}: there is no such object.")
    kept = head["Metadata"].get(SHA256_KEY)
    return str(kept) if kept else hashlib.sha256(read(uri, None, (), False, None)).hexdigest()


def put_if_absent(uri: str, data: bytes) -> bool:
    """One PutObject with If-None-Match; whether it is this call's object that stands there now.

    A 412 is somebody's object, perhaps our own whose answer was lost: its metadata has the writer's id. The same is
    asked once more when all attempts have failed, since the last may have been applied.
    """
    bucket, key = _split(uri)
    writer = uuid.uuid4().hex
    request = {"Bucket": bucket, "Key": key, "Body": data, "IfNoneMatch": "*",
               "Metadata": {WRITER_KEY: writer, SHA256_KEY: hashlib.sha256(data).hexdigest()}}
    if _connection().sends_md5:
        request["ContentMD5"] = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    try:
        _retried(uri, lambda: _connection().client.put_object(**request))
        return True
    except ObjectChanged:
        head = _head(uri)
        return head is not None and head["Metadata"].get(WRITER_KEY) == writer
    except _AttemptsFailed:
        head = None
        with contextlib.suppress(StorageError):
            head = _head(uri)
        if head is None:
            raise
        return bool(head["Metadata"].get(WRITER_KEY) == writer)


def remove(uri: str) -> None:
    """Remove a temporary of our own, if it is there."""
    bucket, key = _split(uri)
    with contextlib.suppress(ObjectMissing):
        _retried(uri, lambda: _connection().client.delete_object(Bucket=bucket, Key=key))


def remove_folder(uri: str) -> None:
    """A bucket has no folders."""


def arrow_filesystem(uri: str) -> "tuple[pyarrow.fs.FileSystem, str]":
    """pyarrow's S3 filesystem with what the SDK found, and `bucket/key`.

    pyarrow's own reading of AWS_ENDPOINT_URL differs between versions: it is told. AWS_REQUEST_CHECKSUM_CALCULATION
    it reads itself, from the environment.
    """
    import pyarrow.fs

    global _filesystem
    connection = _connection()
    endpoint = urlsplit(connection.client.meta.endpoint_url)
    settings: dict[str, Any] = {
        "scheme": endpoint.scheme, "endpoint_override": endpoint.netloc.rpartition("@")[2] + endpoint.path.rstrip("/"),
        "region": connection.client.meta.region_name, "request_timeout": READ_TIMEOUT_S,
        "connect_timeout": CONNECT_TIMEOUT_S, "tls_ca_file_path": connection.session.get_config_variable("ca_bundle")}
    settings |= _retried(uri, lambda: _arrow_credentials(connection.session))
    known = (os.getpid(), connection.attempts, *settings.items())
    if _filesystem is None or _filesystem[0] != known:
        retries = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=connection.attempts)
        _filesystem = known, pyarrow.fs.S3FileSystem(**settings, retry_strategy=retries)
    return _filesystem[1], uri[5:]


def arrow_failure(uri: str, error: OSError) -> StorageError | None:
    """What the store told pyarrow, whose SDK has made all attempts; None if it is about the content."""
    if isinstance(error, FileNotFoundError):
        return ObjectMissing(f"{uri}: there is no such object.")
    if "AWS Error" not in str(error):
        return None
    if "ACCESS_DENIED" in str(error):
        try:
            read_range(uri, 0, 1, None)  # whether it is about the object, the neighbours say
        except StorageError as failure:
            return failure
    return StorageError(f"{uri}: reading failed: {_without_secrets(error)}. Run again later.")


# --- the client ---------------------------------------------------------------------------------------------------

# The settings whose change makes another client; all others are read once
_SETTINGS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID",
             "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_MAX_ATTEMPTS",
             "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
_connections: dict[tuple[int, ...], _Connection] = {}
# the newest pyarrow filesystem, for as long as settings and credentials are the same: it keeps its connections open
_filesystem: "tuple[tuple[Any, ...], pyarrow.fs.S3FileSystem] | None" = None
_connecting = threading.Lock()


def _connection() -> _Connection:
    # one client for each process: it is safe across threads, not across a fork. It takes 0.2 s to make
    settings = (os.getpid(), *(hash(os.environ.get(name)) for name in _SETTINGS))
    found = _connections.get(settings)
    if found is None:
        with _connecting:
            found = _connections.get(settings) or _connect()
            _connections[settings] = found
    return found


def _connect() -> _Connection:
    try:
        session = botocore.session.get_session()
        session.register_component("response_parser_factory", _AnswerParsers())
        attempts = session.get_config_variable("max_attempts")
        client = boto3.session.Session(botocore_session=session).client("s3", config=Config(
            retries={"mode": "standard", "total_max_attempts": 1}, max_pool_connections=64, tcp_keepalive=True,
            connect_timeout=CONNECT_TIMEOUT_S, read_timeout=READ_TIMEOUT_S))
    except (sdk.BotoCoreError, ValueError) as error:
        failure = ConfigError(f"The AWS settings are wrong: {_without_secrets(error)} Correct the environment or the "
                              "profile.")
    else:
        return _Connection(session, client, max(1, attempts or ATTEMPTS),
                           client.meta.config.request_checksum_calculation == "when_required")
    raise failure


class _AnswerParsers(botocore.parsers.ResponseParserFactory):  # type: ignore[misc]
    """The SDK's parsers, but for listings. A page of 1,000 objects takes them 370 ms under the profiler, of
    it 75 % for times; this way it takes 30."""

    def __init__(self) -> None:
        super().__init__()
        self.set_parser_defaults(timestamp_parser=parse_timestamp)

    def create_parser(self, protocol_name: str) -> Any:
        """The parser of a service's answers; S3's are "rest-xml"."""
        return _XMLParser(**self._defaults) if protocol_name == "rest-xml" else super().create_parser(protocol_name)


class _XMLParser(botocore.parsers.RestXMLParser):  # type: ignore[misc]

    def _handle_list(self, shape: Any, node: Any) -> Any:
        if shape.name != "ObjectList":
            return super()._handle_list(shape, node)
        listed = [{child.tag.rpartition("}")[2]: child.text or "" for child in item}
                  for item in (node if isinstance(node, list) else [node])]
        # only what is read here of a listed object
        return [{"Key": item["Key"], "Size": int(item["Size"]), "ETag": item.get("ETag", "")} for item in listed]


def parse_timestamp(value: Any) -> datetime.datetime:
    """A time in an answer. The SDK's own parser, by dateutil, takes 0.2 ms, in each answer to a GET too."""
    with contextlib.suppress(TypeError, ValueError):
        return datetime.datetime.fromisoformat(value)
    with contextlib.suppress(TypeError, ValueError):
        return email.utils.parsedate_to_datetime(value)
    found: datetime.datetime = botocore.utils.parse_timestamp(value)
    return found


def _arrow_credentials(session: botocore.session.Session) -> dict[str, str | None]:
    credentials = session.get_credentials()
    if credentials is None or credentials.method in _RENEWED_BY_PYARROW:
        return {}
    frozen = credentials.get_frozen_credentials()
    return {"access_key": frozen.access_key, "secret_key": frozen.secret_key, "session_token": frozen.token}


# --- requests and their errors ------------------------------------------------------------------------------------


def _retried(uri: str, request: Callable[[], T]) -> T:
    """The request's result, asked for again with growing random pauses while the service is at fault."""
    attempts = _connection().attempts
    for attempt in range(1, attempts + 1):
        try:
            return request()
        except Exception as error:
            failure = _failure(uri, error)
        # outside the handler: the SDK's error may carry an address with a password, and must not come along
        if not isinstance(failure, _Passing):
            raise failure
        if attempt < attempts:
            time.sleep(_pause_s(attempt, throttled=failure.throttled))
    raise _AttemptsFailed(f"{uri}: {attempts} attempts failed, the last one because {failure}. Run again later.")


def _pause_s(attempt: int, *, throttled: bool) -> float:
    first = FIRST_THROTTLED_PAUSE_S if throttled else FIRST_PAUSE_S
    return random.uniform(0, min(LONGEST_PAUSE_S, first * 2.0 ** (attempt - 1)))


def _failure(uri: str, error: Exception) -> Exception:
    """Ours for the SDK's error; any other error as it is."""
    if isinstance(error, sdk.ClientError):
        return _refusal(uri, error.response)
    if isinstance(error, _PASSING_ERRORS):
        return _Passing(f"of {type(error).__name__}: {_without_secrets(error)}")
    if isinstance(error, sdk.BotoCoreError):
        return StorageError(f"{uri}: no request could be made: {_without_secrets(error)} Check the AWS settings.")
    return error


def _refusal(uri: str, response: Mapping[str, Any]) -> Exception:
    status, code = _status(response), str(response.get("Error", {}).get("Code", ""))
    said = f"the store answered {status} {code}"
    if message := _without_secrets(response.get("Error", {}).get("Message") or ""):
        said += f" ({message})"
    if code in _WRONG_BUCKET:
        return BucketMissing(f"{uri}: {_WRONG_BUCKET[code]}.")
    if status == 404 or code in _NO_NAME:
        return ObjectMissing(f"{uri}: there is no such object.")
    if status == 412:
        return ObjectChanged(f"{uri}: it is no longer the object that was listed (another ETag).")
    throttled = status in (429, 503) or code in _THROTTLED
    if code in _PASSING or status in _PASSING_STATUS or (status >= 500 and status != 501) or status < 300:
        return _Passing(said, throttled=throttled)
    if code in _DENIED:
        return _Denied(f"{uri}: {said}. Check what the credentials may do (the policy of the bucket and of the user).")
    remedy = {401: "credentials", 403: "that the credentials are right and not expired, the clock, and the policy",
              301: "the region", 307: "the region"}.get(status, "the address and the AWS settings")
    return StorageError(f"{uri}: {said}. Check {remedy}.")


def _status(response: Mapping[str, Any]) -> int:
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def _without_secrets(said: object) -> str:
    """The text without user names, passwords and query strings (signatures!) of addresses, and not too long."""
    text = re.sub(r"(\w+://)[^\s\"']*@", r"\1", str(said))
    text = re.sub(r"[^\s/\"'@:]+:[^\s/\"'@]+@", "", text)  # an address without its scheme
    return re.sub(r"(//[^\s?\"']*)\?[^\s\"']*", r"\1", text)[:300]


# --- requests -----------------------------------------------------------------------------------------------------


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri[5:].partition("/")
    return bucket, key


def _etag(answer: Mapping[str, Any]) -> str:
    return str(answer["ETag"]).strip('"')


@dataclass(frozen=True)
class _Listing:
    """The pages of one prefix, each asked for by the name before it; names are relative to the prefix."""

    uri: str
    bucket: str
    prefix: str

    def page(self, after: str) -> Page:
        """Up to 1,000 objects that follow the name, and whether there are more."""
        request: dict[str, str] = {"StartAfter": self.prefix + after} if after else {}
        while True:
            answer = self._ask(Prefix=self.prefix, **request)
            found, more = [self._object(item) for item in answer.get("Contents", [])], bool(answer.get("IsTruncated"))
            if found or not more:
                break
            request = {"ContinuationToken": answer["NextContinuationToken"]}  # a store may send an empty page
        names = [*([after] if after else []), *(one.name for one in found)]
        if any(first >= second for first, second in itertools.pairwise(names)):
            raise ConfigError(f"{self.uri}: the store does not list in the order of the names' bytes (after {after!r}) "
                              "and no listing can be trusted. Use a bucket of the general kind.")
        return found, more

    def folders(self, folder: str, after: str) -> list[str]:
        """Folders right under `folder` that follow the name, those of one page."""
        answer = self._ask(Prefix=self.prefix + folder, StartAfter=self.prefix + after, Delimiter="/")
        return [item["Prefix"].removeprefix(self.prefix) for item in answer.get("CommonPrefixes", [])]

    def _ask(self, **request: str) -> dict[str, Any]:
        answer: dict[str, Any] = _retried(
            self.uri, lambda: _connection().client.list_objects_v2(Bucket=self.bucket, MaxKeys=PAGE_OBJECTS, **request))
        return answer

    def _object(self, item: Mapping[str, Any]) -> StoredObject:
        return StoredObject(item["Key"].removeprefix(self.prefix), f"s3://{self.bucket}/{item['Key']}", item["Size"],
                            _etag(item))


def _get(uri: str, etag: str | None, more: Mapping[str, str],
         max_bytes: int | None = None) -> tuple[dict[str, Any], bytes]:
    bucket, key = _split(uri)
    condition = {} if etag is None else {"IfMatch": f'"{etag}"'}
    answer: dict[str, Any] = _connection().client.get_object(Bucket=bucket, Key=key, **condition, **more)
    if etag is not None and _etag(answer) != etag:  # a store may not know the condition
        raise ObjectChanged(f"{uri}: it is no longer the object that was listed (another ETag).")
    if max_bytes is not None and answer["ContentLength"] > max_bytes:
        answer["Body"].close()
        raise ObjectTooLarge(f"{answer['ContentLength']} bytes, and the limit is {max_bytes}")
    data = bytes(answer["Body"].read())
    if len(data) != answer["ContentLength"]:
        raise _Passing(f"{len(data)} bytes came of {answer['ContentLength']}")
    return answer, data


def _read(uri: str, get: Callable[[], bytes], neighbours: Sequence[str]) -> bytes:
    try:
        return _retried(uri, get)
    except _Denied as error:
        denied = error
    readable = _readable_neighbour(uri, neighbours)
    if readable is not None:
        raise ObjectForbidden(f"{uri}: the store refuses this object and gives {readable}. ({denied})")
    raise StorageError(f"{uri}: neither this object nor any of its neighbours can be read, so that it is not about the "
                       f"object. Check the credentials and the policy. ({denied})")


def _readable_neighbour(uri: str, neighbours: Sequence[str]) -> str | None:
    """The URI of another object that can be read now; None if there is none."""
    tried = {uri}
    for candidate in _neighbours(uri, neighbours):
        if candidate not in tried and _can_be_read(candidate):
            return candidate
        tried.add(candidate)
    return None


def _neighbours(uri: str, given: Sequence[str]) -> Iterator[str]:
    yield from [one for one in given if one.startswith("s3://") and one != uri][:NEIGHBOURS_GIVEN]
    bucket, key = _split(uri)
    folders = [key[:i + 1] for i, letter in enumerate(key) if letter == "/"]
    for folder in ["", *folders][:-FOLDERS_ABOVE - 1:-1]:
        request = functools.partial(_connection().client.list_objects_v2, Bucket=bucket, Prefix=folder,
                                    MaxKeys=NEIGHBOURS_IN_A_FOLDER)
        with contextlib.suppress(_Denied):  # this folder's names are not ours to see; perhaps those above
            yield from [f"s3://{bucket}/{item['Key']}" for item in _retried(uri, request).get("Contents", [])]


def _can_be_read(uri: str) -> bool:
    def get() -> bool:
        try:
            _get(uri, None, {"Range": "bytes=0-0"})
        except sdk.ClientError as error:
            if _status(error.response) != 416:  # an empty object: it could be read
                raise
        return True

    try:
        return _retried(uri, get)
    except (_Denied, ObjectMissing):
        return False


def _head(uri: str) -> dict[str, Any] | None:
    bucket, key = _split(uri)
    try:
        head: dict[str, Any] = _retried(uri, lambda: _connection().client.head_object(Bucket=bucket, Key=key))
        return head
    except ObjectMissing:
        return None
