"""What an annotation run reads."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import annotation_input as inputs
from pipeline.errors import DataError
from pipeline.exclusion import Exclusion


def plan(source: dict[str, Any], *, size: int = 2, limit: int | None = None) -> list[list[str]]:
    units = inputs.plan_units(source, pictures_per_unit=size, limit=limit)
    return [unit["key"].to_pylist() for unit in units]


def write_names(folder: Path, *names: str) -> dict[str, Any]:
    for name in names:
        (folder / name).write_bytes(b"x")
    return inputs.describe_input(str(folder))


def test_a_folder_is_planned_in_the_order_of_names(tmp_path: Path) -> None:
    source = write_names(tmp_path, "c", "a", "b")
    assert source["kind"] == "prefix"
    assert plan(source) == [["a", "b"], ["c"]]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_units_are_as_large_as_was_asked_for_however_a_listing_comes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("pipeline.shard_plan.ROWS_AT_ONCE", 3)
    source = write_names(tmp_path, *"abcdefgh")
    assert plan(source, size=size) == [list("abcdefgh"[first:first + size]) for first in range(0, 8, size)]


def test_a_limit_takes_the_first_pictures(tmp_path: Path) -> None:
    source = write_names(tmp_path, *"abcde")
    assert plan(source, limit=3) == [["a", "b"], ["c"]]
    assert plan(source, limit=2) == [["a", "b"]]


def test_a_key_that_is_excluded_twice_counts_once_and_of_a_shard_without_others_there_is_no_unit() -> None:
    exclusion = Exclusion(["b", "a", "x", "b"])
    left = exclusion.without([pa.table({"key": ["a", "b"]}), pa.table({"key": ["c"]})])
    assert [table["key"].to_pylist() for table in left] == [["c"]]
    assert exclusion.counts() == {"excluded": 2, "excluded_unknown": 1}


def test_an_empty_prefix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to annotate"):
        plan(write_names(tmp_path))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_lists_keys_are_whole_uris(tmp_path: Path, ending: str) -> None:
    uris, path = ["s3://b/z.jpg", "s3://a/y.jpg", "/x.jpg"], tmp_path / f"list.{ending}"
    if ending == "csv":
        path.write_text("uri,etag\n" + "".join(f"{uri},e{i}\n" for i, uri in enumerate(uris)))
    else:
        pq.write_table(pa.table({"uri": uris, "etag": ["e0", "e1", "e2"]}), path)
    source = inputs.describe_input(str(path))
    assert plan(source) == [["/x.jpg", "s3://a/y.jpg"], ["s3://b/z.jpg"]]
    assert next(inputs.plan_units(source, pictures_per_unit=9, limit=None))["etag"].to_pylist() == ["e2", "e1", "e0"]


def test_a_list_without_the_column_uri_is_refused_by_its_columns(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,size\na,1\n")
    with pytest.raises(DataError, match="path, size"):
        plan(inputs.describe_input(str(tmp_path / "list.csv")))


def test_a_list_that_names_a_picture_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri\na\nb\na\n")
    with pytest.raises(DataError, match="lists a more than once"):
        plan(inputs.describe_input(str(tmp_path / "list.csv")))
