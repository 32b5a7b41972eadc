"""What a check says when something is wrong, and how it reads a Parquet file that it can't trust."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

FORMAT = 1
FOLDER = "shards"
RESTORE = "Restore the object as it was written, or shard into a new --output."
WRITER = "It was written so: shard into a new --output, and report this line."
MOVE = "Move it elsewhere."


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `object` is named relative to the dataset.

    kind    missing | doubled | foreign | damaged | unreadable (no JSON, no Parquet) | keys | columns | source
            (two files disagree) | plan (rows that aren't those planned) | row | counts | dropped | lost
    """

    kind: str
    object: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.object}: expected {self.expected}; found {self.found}. {self.remedy}"


Tell = Callable[[Finding], None]


def some(names: Sequence[str]) -> str:
    """At most three of the names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_parquet(data: bytes, name: str, columns: pa.Schema, tell: Tell) -> pa.Table | None:
    """The file's table, with at least those columns; None, and a finding told, where it is none or lacks them."""
    try:
        table = pq.read_table(pa.BufferReader(data))
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        tell(Finding("unreadable", name, "a Parquet file", " ".join(str(error).split()), RESTORE))
        return None
    if wrong := _wrong_columns(columns, table.schema):
        tell(Finding("columns", name, f"the columns {', '.join(columns.names)}", wrong, WRITER))
        return None
    return table


def _wrong_columns(expected: pa.Schema, found: pa.Schema) -> str:
    return ", ".join(
        f"{column.name} of type {found.field(column.name).type}" if column.name in found.names
        else f"no {column.name}"
        for column in expected
        if found.names.count(column.name) != 1 or not _fits(column.type, found.field(column.name).type))


def _fits(expected: pa.DataType, found: pa.DataType) -> bool:
    """Whether it is the same type; a struct may have further fields."""
    if pa.types.is_struct(expected) and pa.types.is_struct(found):
        return all(found.get_field_index(each.name) >= 0 and _fits(each.type, found.field(each.name).type)
                   for each in expected)
    if pa.types.is_list(expected) and pa.types.is_list(found):
        return _fits(expected.value_type, found.value_type)
    return bool(expected.equals(found))
