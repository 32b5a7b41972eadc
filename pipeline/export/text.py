"""Text for a million rows, made by columns: Arrow joins what Python would format one by one; and archives of text.

200,000 persons as COCO's annotations: 6 s and 380 MB, 29 s and 1,569 MB by json.dumps (`python -m benchmarks.export`).
A column of text is a pyarrow string array with one piece for each row; a plain str is the same piece in each row.
"""

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.export.persons import Array

Text: TypeAlias = pa.Array | str
_MADE = (1980, 1, 1, 0, 0, 0)  # the same rows give the same bytes: an archive must not hold the time


def numbers(values: Array) -> pa.Array:
    """Each number in the shortest decimal form that reads back as the same float32, float64 or integer."""
    assert np.isfinite(values).all(), "JSON has no NaN"
    return pa.array(np.ascontiguousarray(values)).cast(pa.string())


def strings(values: Iterable[str]) -> pa.Array:
    """Each string as JSON has it."""
    return pa.array([json.dumps(value) for value in values], pa.string())


def joined(separator: str, pieces: Sequence[Text]) -> pa.Array:
    """The pieces of each row with the separator between them; a piece that is NULL is left out."""
    return pc.binary_join_element_wise(*(pa.scalar(piece) if isinstance(piece, str) else piece for piece in pieces),
                                       separator, null_handling="skip")


def lists(pieces: Sequence[Text]) -> pa.Array:
    """Each row's pieces as a JSON list."""
    return joined("", ["[", joined(", ", pieces), "]"])


def objects(fields: Mapping[str, Text]) -> pa.Array:
    """A JSON object for each row; the fields' values are JSON already, and one at least is a column."""
    named = [piece for name, value in fields.items() for piece in (f", {json.dumps(name)}: ", value)]
    return joined("", ["{" + str(named[0])[2:], *named[1:], "}"])


def gathered(pieces: pa.Array, offsets: Array, separator: str) -> pa.Array:
    """One piece for each picture: those of its persons, offsets[i] to offsets[i + 1], with separators between."""
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pieces), separator)


def listed(columns: Iterable[pa.Array]) -> Iterator[str]:
    """All pieces of all columns as the lines of a JSON list."""
    between = "[\n"
    for column in columns:
        if len(column):
            yield between + ",\n".join(column.to_pylist())
            between = ",\n"
    yield "[]" if between == "[\n" else "\n]"


def encoded(pieces: Iterable[str]) -> bytes:
    """The pieces one behind the other, in UTF-8."""
    sink = io.BytesIO()
    for piece in pieces:
        sink.write(piece.encode())
    return sink.getvalue()


def archive(files: Iterable[tuple[str, Iterable[str]]]) -> bytes:
    """A .zip with these files, each given as pieces of text. The same files give the same bytes."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as whole:
        for name, pieces in files:
            about = zipfile.ZipInfo(name, _MADE)
            about.compress_type = zipfile.ZIP_DEFLATED
            about.external_attr = 0o644 << 16
            with whole.open(about, "w", force_zip64=True) as member:
                for piece in pieces:
                    member.write(piece.encode())
    return sink.getvalue()
