"""A list of objects instead of a listing: a Parquet or CSV file of URIs, or an S3 Inventory, read in a stream.

A list has the column `uri`, or `bucket` and `key` as S3 Inventory has them; `etag` and `size` where they are known.
"""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ConfigError, DataError

ENDINGS = (".parquet", ".csv", ".csv.gz", "/manifest.json")
NEITHER_LIST_NOR_PREFIX = ("this is one object. Give the folder or prefix that holds the pictures, or a list of them, "
                           f"whose name ends with {', '.join(ENDINGS)}.")
LIST_SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
ROWS_AT_ONCE = 50_000
EXPECTED = "A list is Parquet, or CSV with a header."


def is_list(uri: str) -> bool:
    """Whether a URI names a list of objects, and not a prefix: by its ending."""
    return uri.endswith(ENDINGS)


def read_list(uri: str) -> Iterator[pa.Table]:
    """The listed objects (LIST_SCHEMA) in the file's order; what the list doesn't know is NULL.

    Left out: names that end with "/" (folder markers), and of a versioned bucket's inventory all but the latest
    versions. Column names count without regard to case and underscores (`e_tag`, `ETag`).
    Refused with DataError: a list without `uri`, or `bucket` and `key`; an entry without them, or that can be no
    object's address; what can't be read.
    """
    try:
        if uri.endswith("/manifest.json"):
            yield from _read_inventory(uri)
        else:
            yield from _listed_tables(uri, None)
    except pa.ArrowInvalid as error:
        raise DataError(f"{uri}: this list can't be read: {error}. {EXPECTED}") from None


def read_keys(uri: str, *, flag: str) -> list[str]:
    """The keys of a text file, one on each line, in their order. Refuses (ConfigError, by `flag`) one that isn't.

    A line ends with "\\n" or "\\r\\n" and with nothing else: all other characters may be a key's. Empty ones are none.
    """
    try:
        keys = storage.read_object(uri).decode("utf-8-sig").split("\n")
    except storage.ObjectMissing:
        raise ConfigError(f"{flag} {uri}: there is no such file. Expected keys, one on each line.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} {uri}: not UTF-8 text. Expected keys, one on each line.") from None
    return [key for key in (key.removesuffix("\r") for key in keys) if key]


def _read_inventory(uri: str) -> Iterator[pa.Table]:
    """The files that an S3 Inventory's manifest names; CSV there has no header and encoded keys."""
    manifest = json.loads(storage.read_object(uri))
    try:
        bucket = manifest["destinationBucket"].rpartition(":")[2]
        files = [f"s3://{bucket}/{file['key']}" for file in manifest["files"]]
        names = [name.strip() for name in manifest["fileSchema"].split(",")]
        kind = manifest["fileFormat"]
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{uri} is no manifest of an S3 Inventory: it needs destinationBucket, fileFormat, fileSchema "
                        "and files.") from None
    if kind not in ("CSV", "Parquet"):
        raise DataError(f"{uri}: an inventory in {kind} isn't read; order it as CSV or Parquet.")
    for file in files:
        yield from _listed_tables(file, names if kind == "CSV" else None)


def _listed_tables(uri: str, names: list[str] | None) -> Iterator[pa.Table]:
    first = 1
    for table in _tables(uri, names):
        yield _listed(table, uri, first, encoded=names is not None)
        first += len(table)


def _tables(uri: str, names: list[str] | None) -> Iterator[pa.Table]:
    """A file in pieces; `names` are a CSV's columns where it has no header."""
    if not storage.exists(uri):
        raise DataError(f"{uri}: there is no such list.")
    if uri.endswith(".parquet"):
        with storage.arrow_file(uri, remedy=EXPECTED) as file, pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=_wanted(parquet.schema_arrow.names)):
                yield pa.Table.from_batches([batch])
        return
    compression = "gzip" if uri.endswith(".gz") else None
    if names is None:
        with (storage.arrow_file(uri, remedy=EXPECTED) as file, pa.input_stream(file, compression) as stream,
              pyarrow.csv.open_csv(stream) as csv):
            names, skip = csv.schema.names, 1
    else:
        skip = 0
    # all as text: an ETag of digits alone is no number
    text = pyarrow.csv.ConvertOptions(strings_can_be_null=True, column_types=dict.fromkeys(names, pa.string()))
    header = pyarrow.csv.ReadOptions(column_names=names, skip_rows=skip)
    with (storage.arrow_file(uri, remedy=EXPECTED) as file, pa.input_stream(file, compression) as stream,
          pyarrow.csv.open_csv(stream, read_options=header, convert_options=text) as csv):
        for batch in csv:
            yield pa.Table.from_batches([batch])


# What is right at first sight: 10 million take 1.4 s; to ask `storage` of each, 24
_PLAIN_ADDRESS = r"^s3://[a-z0-9.-]{3,63}/.|^[^:]+$"
_COLUMNS = ("uri", "bucket", "key", "etag", "size", "islatest", "isdeletemarker")


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _wanted(names: list[str]) -> list[str] | None:
    return [name for name in names if _plain(name) in _COLUMNS] or None


def _listed(table: pa.Table, source: str, first: int, *, encoded: bool) -> pa.Table:
    columns = {_plain(name): table[name] for name in table.column_names}
    if not ("uri" in columns or {"bucket", "key"} <= columns.keys()):
        raise DataError(f"{source}: a list of objects needs a column `uri`, or `bucket` and `key`; it has "
                        f"{', '.join(table.column_names)}. (Of an S3 Inventory in CSV give the manifest.json.)")
    keep = pa.array([True] * len(table))
    if "islatest" in columns:
        keep = pc.and_(keep, _is(columns["islatest"], default=True))
    if "isdeletemarker" in columns:
        keep = pc.and_(keep, pc.invert(_is(columns["isdeletemarker"], default=False)))
    uris = _uris(columns, encoded=encoded)
    if uris.null_count:
        raise DataError(f"{source}: {uris.null_count} entries name no object (an empty field). Leave them out.")
    _refuse_no_address(uris, source, first)
    listed = pa.table([uris, _etags(columns.get("etag"), len(table)), _sizes(columns.get("size"), len(table))],
                      schema=LIST_SCHEMA)
    return listed.filter(pc.and_(keep, pc.invert(pc.ends_with(listed["uri"], "/"))))


def _refuse_no_address(uris: pa.ChunkedArray, source: str, first: int) -> None:
    doubtful = pc.invert(pc.match_substring_regex(uris, _PLAIN_ADDRESS))
    for index in pc.indices_nonzero(doubtful).to_pylist():
        try:
            storage.refuse_no_object(uris[index].as_py())
        except ConfigError as error:
            raise DataError(f"{source}: entry {first + index} can't be annotated or sharded: {error} Correct it, or "
                            "leave it out.") from None


def _is(values: pa.ChunkedArray, *, default: bool) -> pa.ChunkedArray:
    text = pc.utf8_lower(values.cast(pa.string()))
    return pc.fill_null(pc.equal(text, "true"), default)


def _uris(columns: dict[str, Any], *, encoded: bool) -> pa.ChunkedArray:
    if "uri" in columns:
        return columns["uri"].cast(pa.string())
    keys = columns["key"].cast(pa.string())
    if encoded:
        keys = pa.chunked_array([[None if key is None else unquote_plus(key) for key in keys.to_pylist()]], pa.string())
    return pc.binary_join_element_wise("s3:/", columns["bucket"].cast(pa.string()), keys, "/")


def _etags(values: pa.ChunkedArray | None, count: int) -> Any:
    return pa.nulls(count, pa.string()) if values is None else pc.utf8_trim(values.cast(pa.string()), '"')


def _sizes(values: pa.ChunkedArray | None, count: int) -> Any:
    return pa.nulls(count, pa.int64()) if values is None else values.cast(pa.int64())
