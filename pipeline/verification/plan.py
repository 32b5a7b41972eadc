"""The plan of a run: its files read and counted up to its digest, and rows compared with what it has."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.verification.finding import RESTORE, WRITER, Finding, Tell, some
from pipeline.verification.reading import read_stored
from pipeline.verification.run import Run

DROPPED = "dropped.parquet"
PLAN_COLUMNS = ("unit", "key", "size", "sha256", "etag")
DROPPED_COLUMNS = ("part", "key", "why")


def planned_units(uri: str, run: Run) -> Iterator[tuple[int, pa.Table] | Finding]:
    """Each unit of a run's plan with its rows (columns key, etag, size, sha256); and what is wrong with its files.

    The plan's digest is the SHA-256 over a line `[unit, key, size, sha256 or etag]` of JSON for each row, and then
    one `[part, key, why]` for each row that it drops: it says that these are the files which were frozen.
    """
    content, units, pictures = hashlib.sha256(), 0, 0
    wrong: list[Finding] = []
    for number in range(-(-run.units // run.units_per_file)):
        tables = _read_tables(uri, f"{run.plan_folder}/plan-{number:07d}.parquet", PLAN_COLUMNS, wrong.append)
        for unit, table in enumerate(tables, number * run.units_per_file):
            content.update(_identities(table))
            units, pictures = units + 1, pictures + len(table)
            if unit < run.units:
                yield unit, table.select(["key", "etag", "size", "sha256"])
    if run.dropped is not None:
        for table in _read_tables(uri, f"{run.plan_folder}/{DROPPED}", DROPPED_COLUMNS, wrong.append):
            content.update(_lines(_rows(table, DROPPED_COLUMNS)))
    yield from wrong
    if not wrong and (content.hexdigest(), units, pictures) != (run.plan_digest, run.units, run.pictures):
        yield Finding("damaged", run.plan_folder,
                      f"{run.pictures} pictures in {run.units} units of digest {run.plan_digest}",
                      f"{pictures} in {units} of {content.hexdigest()}", RESTORE)


def compare_keys(name: str, planned: Collection[str], found: Collection[str], *, changed: Sequence[str],
                 change: str) -> Iterator[Finding]:
    """Whether a part has a row for each planned key and for no other, and which of its rows are others than planned.

    name, change  the part's object, and what of the changed keys differs, such as "etag or size"
    """
    have, due = set(found), set(planned)
    differences = {"no row for": due - have, "rows that no plan has:": have - due,
                   f"another {change} than planned:": set(changed)}
    for what, keys in differences.items():
        if keys:
            yield Finding("plan", name, "the rows that its unit in the plan has",
                          f"{what} {some([repr(key) for key in sorted(keys)])}", WRITER)


def _read_tables(uri: str, name: str, columns: Sequence[str], tell: Tell) -> list[pa.Table]:
    """A table for each row group of the file, which is a unit in a plan; none, and a finding told, if it can't be."""
    data = read_stored(uri, name, "what the plan of a run has", tell)
    if data is None:
        return []
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        tables = [file.read_row_group(group).select(columns) for group in range(file.num_row_groups)]
        for table in tables:
            table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        tell(Finding("unreadable", name, f"Parquet with the columns {', '.join(columns)}",
                     " ".join(str(error).split()), RESTORE))
        return []
    return tables


def _identities(table: pa.Table) -> bytes:
    return _lines([unit, key, size, sha256 or etag] for unit, key, size, sha256, etag in _rows(table, PLAN_COLUMNS))


def _rows(table: pa.Table, columns: Sequence[str]) -> Iterable[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in columns), strict=True)


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
