"""How a check reads what it can't trust: an object, JSON, Parquet. What is wrong is told as a finding, never raised.

Trouble with the store passes through as StorageError; a newer format is a DataError, since nothing is known of it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import DataError
from pipeline.verification.finding import FORMAT, MOVE, PERMIT, RESTORE, WRITER, Finding, Tell, some

READS = 2  # what was damaged on its way here is whole when it is read again


def read_stored(uri: str, name: str, expected: str, tell: Tell, *, sha256: str | None = None,
                told_by: str | None = None) -> bytes | None:
    """The object's bytes; None, and a finding told, where there is none, or not the one that was written.

    uri, name        the dataset, and the object's name in it
    expected         why it has to be there, such as "the part that the plan names"
    sha256, told_by  what its SHA-256 has to be, and who says so; else what the store kept when it was written. An
                     object that was copied by other means has nothing kept, and passes.
    """
    place = storage.join(uri, name)
    try:
        due = sha256 or storage.stored_sha256(place)
        for _ in range(READS):
            data = storage.read_object(place, own_sha256=False)
            found = hashlib.sha256(data).hexdigest()
            if found == due:
                return data
    except storage.ObjectMissing:
        tell(Finding("missing", name, expected, "no such object", RESTORE))
    except storage.ObjectForbidden as error:
        tell(Finding("unreadable", name, "an object that may be read", str(error), PERMIT))
    else:
        told_by = "kept when it was written" if sha256 is None else told_by
        tell(Finding("damaged", name, f"SHA-256 {due} ({told_by})", found, RESTORE))
    return None


def copy_of(uri: str, name: str, same_size: Mapping[str, str]) -> Finding | None:
    """The finding for an object that is a copy of another one, if it is; `same_size`: SHA-256 -> those it may be."""
    if not same_size:
        return None
    original = same_size.get(storage.stored_sha256(storage.join(uri, name)))
    return None if original is None else Finding("doubled", name, "each part once", f"a copy of {original}", MOVE)


# --- JSON ---------------------------------------------------------------------------------------------------------


def read_json(uri: str, name: str, keys: Mapping[str, Any], expected: str, tell: Tell) -> dict[str, Any] | None:
    """The object's values, with at least those keys (as in `wrong_keys`); None, and a finding told, without them."""
    data = read_stored(uri, name, expected, tell)
    if data is None:
        return None
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        tell(Finding("unreadable", name, "JSON", str(error), RESTORE))
        return None
    refuse_newer(values, storage.join(uri, name))
    if problems := list(wrong_format(keys, values)):
        tell(Finding("keys", name, "the keys of its format", some(problems), RESTORE))
        return None
    result: dict[str, Any] = values
    return result


def refuse_newer(values: Any, uri: str) -> None:
    """Refuse (DataError) JSON whose `version` is newer than what this program checks."""
    if isinstance(values, dict) and isinstance(values.get("version"), int) and values["version"] > FORMAT:
        raise DataError(f"{uri} is of format {values['version']}; this program checks up to {FORMAT}. Update it.")


def wrong_format(keys: Mapping[str, Any], values: Any) -> Iterator[str]:
    """What `wrong_keys` gives, and a `version` that no program ever wrote."""
    yield from wrong_keys(keys, values)
    if isinstance(values, dict) and isinstance(values.get("version"), int) and values["version"] < 1:
        yield f"version: {values['version']}"


def wrong_keys(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """Each key that is missing or of another kind, such as `source.plan.units: missing`.

    expected  {"units": int, "parts": [{"name": str}]}: a type, a dict of keys that must be there, a list of one kind
    """
    kind = expected if isinstance(expected, type) else type(expected)
    if not issubclass(type(found), kind) or type(found) is bool:
        yield f"{where or 'the whole'}: {type(found).__name__} instead of {kind.__name__}"
    elif isinstance(expected, list):
        for index, each in enumerate(found):
            yield from wrong_keys(expected[0], each, f"{where}[{index}]")
    elif isinstance(expected, dict):
        for key, value in expected.items():
            inner = f"{where}.{key}".lstrip(".")
            if key in found:
                yield from wrong_keys(value, found[key], inner)
            else:
                yield f"{inner}: missing"


# --- Parquet ------------------------------------------------------------------------------------------------------


def read_parquet(data: bytes, name: str, columns: pa.Schema, tell: Tell) -> pa.Table | None:
    """The file's table, every page of it, with at least those columns; None, and a finding told, otherwise."""
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        tell(Finding("unreadable", name, "a Parquet file", " ".join(str(error).split()), RESTORE))
        return None
    return table if has_columns(table.schema, name, columns, tell) else None


def has_columns(schema: pa.Schema, name: str, columns: pa.Schema, tell: Tell) -> bool:
    """Whether each of those columns is there once and of its type (a struct may have more); else a finding is told."""
    wrong = [f"{column.name} of type {schema.field(column.name).type}" if schema.names.count(column.name) == 1
             else f"{schema.names.count(column.name) or 'no'} {column.name}"
             for column in columns
             if schema.names.count(column.name) != 1 or not _fits(column.type, schema.field(column.name).type)]
    if wrong:
        tell(Finding("columns", name, f"the columns {some(columns.names)}", some(wrong), WRITER))
    return not wrong


def _fits(expected: pa.DataType, found: pa.DataType) -> bool:
    if pa.types.is_struct(expected) and pa.types.is_struct(found):
        return all(found.get_field_index(each.name) >= 0 and _fits(each.type, found.field(each.name).type)
                   for each in expected)
    if pa.types.is_list(expected) and pa.types.is_list(found):
        return _fits(expected.value_type, found.value_type)
    return bool(expected.equals(found))
