"""Who makes the boxes: what a choice is refused for, boxes from files, and what of them is frozen where."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.box_files import BOX_SCHEMA, find_box_files, json_box_tables, read_box_tables, read_pieces
from pipeline.boxes import AskedBoxes, choose_boxes, unit_box_source
from pipeline.errors import ConfigError, DataError, ObjectChanged
from pipeline.frozen_boxes import PICTURE_SCHEMA, SpreadBoxes, count_frozen, freeze_boxes, read_unit_boxes
from pipeline.storage import put_if_absent
from pipeline.units import FrozenJob, freeze_job
from tests.made_detector import detector_bytes

PREFIX = {"kind": "prefix", "uri": "/pictures"}


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def six_boxes(path: Path, order: list[int]) -> Path:
    """Boxes of the pictures a, b, c and of one that isn't planned, in some order."""
    rows = [("a", 1.0, 0.5), ("a", 2.0, 0.9), ("b", 3.0, 0.7), ("c", 4.0, 0.1), ("elsewhere", 5.0, 0.5),
            ("a", 2.0, 0.9)]
    chosen = [rows[index] for index in order]
    return write(path, key=[key for key, _, _ in chosen], x=[x for _, x, _ in chosen], y=[0.0] * len(order),
                 w=[10.0] * len(order), h=[20.0] * len(order), score=[score for _, _, score in chosen])


def freeze(tmp_path: Path, boxes: Path, units: list[list[str]] | None = None, **asked: Any) -> tuple[str, FrozenJob]:
    """An output whose plan has these units, with the boxes frozen."""
    output = str(tmp_path / "out")
    with choose_boxes(AskedBoxes(str(boxes), **asked), PREFIX, output) as chosen:
        plan = [pa.table({"key": keys, "etag": ["e"] * len(keys)}) for keys in units or [["a", "b"], ["none"], ["c"]]]
        return output, freeze_job(output, plan, input=PREFIX, intent={"boxes": chosen.choice.intent()},
                                  about=chosen.about, before_commit=chosen.freeze)


def boxes_of(output: str, job: FrozenJob, unit: int, key: str) -> tuple[list[int], list[float], list[float]]:
    boxes = unit_box_source(output, job, unit)({"key": key}, 100, 100)
    return boxes.ids.tolist(), boxes.xywh[:, 0].tolist(), boxes.scores.tolist()


# --- the choice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "says"), [
    (AskedBoxes(), "say who makes the boxes"), (AskedBoxes("annotated"), "no shard dataset with annotations"),
    (AskedBoxes("/nowhere"), "--boxes /nowhere"), (AskedBoxes("detect"), "needs --detector"),
    (AskedBoxes("whole-image", detector="d.onnx"), "is for --boxes detect"),
    (AskedBoxes("detect", detector="/nowhere.onnx"), "no such file")])
def test_a_choice_that_a_plain_prefix_cannot_serve_is_refused(asked: AskedBoxes, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says), choose_boxes(asked, PREFIX, str(tmp_path)):
        pass


def test_boxes_by_image_id_are_refused_where_pictures_have_none(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text("[]")
    with (pytest.raises(ConfigError, match="column `key`"),
          choose_boxes(AskedBoxes(str(tmp_path / "d.json")), PREFIX, str(tmp_path / "out"))):
        pass


@pytest.mark.parametrize(("asked", "begun", "reused", "backend"), [
    ("auto", None, None, "at hand"), ("auto", "opencv", None, "opencv"), ("auto", None, "opencv", "opencv"),
    ("auto", "first", "second", "first"), ("opencv", "first", "second", "opencv")])
def test_a_detectors_backend_that_is_left_open_is_that_of_the_run_that_goes_on_or_is_copied(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, begun: str | None, reused: str | None,
        backend: str) -> None:
    monkeypatch.setattr("pipeline.boxes.choose_backend", lambda asked: "at hand" if asked == "auto" else asked)
    (tmp_path / "d.onnx").write_bytes(detector_bytes())
    jobs = [one and FrozenJob("", {}, {"boxes": {"backend": one}}, {}, {}) for one in (begun, reused)]
    with choose_boxes(AskedBoxes("detect", detector=str(tmp_path / "d.onnx"), detector_backend=asked), PREFIX,
                      str(tmp_path / "out"), jobs[0], reused=jobs[1]) as chosen:
        assert chosen.choice.detector["backend"] == backend


# --- Parquet ------------------------------------------------------------------------------------------------------


def test_each_unit_finds_its_own_boxes_the_best_first(tmp_path: Path) -> None:
    output, job = freeze(tmp_path, six_boxes(tmp_path / "d.parquet", [0, 1, 2, 3, 4, 5]))
    assert boxes_of(output, job, 0, "a") == ([0, 1, 2], [2, 2, 1], [0.9, 0.9, 0.5])  # a box given twice is kept twice
    assert boxes_of(output, job, 0, "b") == ([0], [3], [0.7])
    assert boxes_of(output, job, 2, "c") == ([0], [4], [0.1])
    assert read_unit_boxes(output, job, job.intent["boxes"]["digest"], 1) == {}
    assert set(read_unit_boxes(output, job, job.intent["boxes"]["digest"], 0)) == {"a", "b"}


def test_weak_boxes_and_those_beyond_the_limit_are_left_out(tmp_path: Path) -> None:
    output, job = freeze(tmp_path, six_boxes(tmp_path / "d.parquet", [0, 1, 2, 3, 4]), min_box_score=0.6, max_persons=1)
    assert boxes_of(output, job, 0, "a") == ([0], [2], [0.9])
    assert boxes_of(output, job, 2, "c") == ([], [], [])


def test_the_same_boxes_in_other_files_and_another_order_are_the_same_bytes(tmp_path: Path) -> None:
    one = six_boxes(tmp_path / "one" / "d.parquet", [0, 1, 2, 3, 4, 5])
    six_boxes(tmp_path / "two" / "z.parquet", [4, 1, 0])
    six_boxes(tmp_path / "two" / "deep" / "a.parquet", [3, 5, 2])
    (tmp_path / "two" / "_job.json").write_text("no boxes")
    frozen = [freeze(tmp_path / name, boxes)[0] for name, boxes in (("1", one), ("2", tmp_path / "two"))]
    first, second = ({path.relative_to(output): path.read_bytes() for path in sorted(Path(output).rglob("*"))
                      if path.is_file() and path.name != "_job.json"} for output in frozen)
    assert any("_boxes" in str(path) for path in first)
    assert first == second


@pytest.mark.parametrize("change", [{"picture": "b"}, {"box_id": 8}, {"x": 9.0}, {"y": 9.0}, {"w": 9.0}, {"h": 9.0},
                                    {"score": 0.5}], ids=str)
def test_boxes_of_which_anything_differs_are_others(change: dict[str, Any]) -> None:
    box = {"picture": "a", "box_id": 7, "x": 1.0, "y": 2.0, "w": 3.0, "h": 4.0, "score": 0.9}
    given, same, other = (SpreadBoxes([pa.Table.from_pylist([values], BOX_SCHEMA)]) for values in (
        box, box, box | change))
    with given, same, other:
        assert given.digest() == same.digest() != other.digest()


def test_boxes_go_through_a_disk_when_they_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.hash_buckets.ROWS_IN_MEMORY", 50)
    monkeypatch.setattr("pipeline.frozen_boxes.UNITS_PER_FILE", 3)
    keys = [f"{index % 97:03d}.jpg" for index in range(1000)]
    sides = np.arange(1000.0)
    path = write(tmp_path / "d.parquet", key=keys, x=sides, y=sides, w=sides + 1, h=sides + 1, score=sides / 1000)
    units = [[f"{index:03d}.jpg" for index in range(first, first + 10)] for first in range(0, 100, 10)]
    output, job = freeze(tmp_path, path, units)
    found = [read_unit_boxes(output, job, job.intent["boxes"]["digest"], unit) for unit in range(10)]
    assert len(list((tmp_path / "out" / "_boxes").rglob("*.parquet"))) == 4
    assert sum(len(boxes.ids) for unit in found for boxes in unit.values()) == 1000
    assert found[4]["042.jpg"].xywh[:, 0].tolist() == [float(x) for x in range(999 // 97 * 97 + 42 - 97, 0, -97)]


def test_of_more_units_than_buckets_each_finds_its_own_boxes(tmp_path: Path) -> None:
    keys, output = [f"{unit:03d}.jpg" for unit in range(600)], str(tmp_path)
    job = FrozenJob("job", {}, {}, {"digest": "plan", "units": 600}, {})
    chosen = [0, 1, 2, 4, 599]  # the first three share one of the 256 buckets
    given = [{"picture": keys[unit], "x": unit, "y": 1, "w": 2, "h": 3, "score": 1} for unit in chosen]
    with SpreadBoxes([pa.Table.from_pylist(given, BOX_SCHEMA)]) as boxes:
        pictures = [pa.table([keys, keys, range(600)], schema=PICTURE_SCHEMA)]
        freeze_boxes(output, job, "digest", boxes, pictures, source="")
    for unit in (*range(6), 598, 599):
        found = {key: one.xywh[:, 0].tolist() for key, one in read_unit_boxes(output, job, "digest", unit).items()}
        assert found == ({keys[unit]: [unit]} if unit in chosen else {})
    assert count_frozen(output, job, "digest") == 5


def test_a_keypoint_dataset_is_a_source_of_boxes_and_its_empty_rows_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", key=["a", "b"], image_id=pa.array([None, None], pa.int64()),
                 box_id=pa.array([77, None], pa.int64()), box_x=[1.0, None], box_y=[1.0, None], box_w=[5.0, None],
                 box_h=[5.0, None], box_score=[0.5, None], score=[0.9, None])
    output, job = freeze(tmp_path, path)
    assert boxes_of(output, job, 0, "a") == ([77], [1], [0.5])
    assert boxes_of(output, job, 0, "b") == ([], [], [])


def test_without_scores_each_is_1_and_other_categories_than_persons_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", key=["a", "a"], x=[1, 2], y=[1, 2], w=[5, 5], h=[5, 5], category_id=[1, 3])
    output, job = freeze(tmp_path, path)
    assert boxes_of(output, job, 0, "a") == ([0], [1], [1])


def test_a_side_or_score_that_is_missing_stays_a_box_to_be_refused_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", key=["a", "a"], x=[1.0, None], y=[1.0, 1.0], w=[5.0, 5.0], h=[5.0, 5.0],
                 score=[None, 0.5])
    output, job = freeze(tmp_path, path, min_box_score=0.2)
    assert boxes_of(output, job, 0, "a")[0] == [0, 1]


@pytest.mark.parametrize(("columns", "says"), [
    ({"x": [1]}, "need a column `key` or `image_id`; it has x"),
    ({"key": ["a"], "x": [1], "y": [1]}, "w, h is not there"),
    ({"key": [1], "x": [1], "y": [1], "w": [1], "h": [1]}, "keys are text"),
    ({"key": ["a", None], "x": [1, 1], "y": [1, 1], "w": [1, 1], "h": [1, 1]}, "row 1 has a box but no key"),
    ({"key": ["a"], "x": ["left"], "y": [1], "w": [1], "h": [1]}, "column `x` holds string"),
    ({"image_id": [1.5], "x": [1], "y": [1], "w": [1], "h": [1]}, "column `image_id` holds double")])
def test_a_file_that_holds_no_boxes_is_refused_by_file_and_flaw(
        tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    path = write(tmp_path / "d.parquet", **columns)
    with pytest.raises(DataError, match=says) as refusal:
        list(read_box_tables(find_box_files(str(path))))
    assert str(path) in str(refusal.value)


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"d\.parquet can't be read .*Boxes are Parquet"):
        find_box_files(str(tmp_path / "d.parquet"))


def test_files_that_name_pictures_in_different_ways_are_refused(tmp_path: Path) -> None:
    six_boxes(tmp_path / "d" / "a.parquet", [0])
    write(tmp_path / "d" / "b.parquet", image_id=[1], x=[1], y=[1], w=[1], h=[1])
    with pytest.raises(DataError, match=r"b\.parquet: it has no column `key`"):
        list(read_box_tables(find_box_files(str(tmp_path / "d"))))


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_detections_of_a_json_keep_their_place_in_the_file_as_id_and_order(tmp_path: Path) -> None:
    rows = [{"image_id": 7, "bbox": [1, 2, 3, 4], "score": 0.2}, {"image_id": 3, "bbox": [0, 0, 9, 9], "score": 0.9},
            {"image_id": 7, "bbox": [5, 6, 7, 8], "score": 0.8}]
    data = json.dumps([{"category_id": 1, **row} for row in rows]).encode()
    with SpreadBoxes(json_box_tables([data[:60], data[60:]], "d.json")) as boxes:
        found = [row for number in boxes.numbers() for row in boxes.bucket(number).to_pylist() if row["picture"] == "7"]
    assert [(row["box_id"], row["x"], row["score"]) for row in found] == [(0, 1.0, 0.2), (2, 5.0, 0.8)]


def test_a_json_is_read_only_as_far_as_its_boxes_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.box_files.JSON_ROWS_AT_ONCE", 10)
    entry = json.dumps({"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5})
    taken: list[int] = []

    def pieces() -> Iterator[bytes]:
        for number in range(1000):
            taken.append(number)
            yield f"{',' if number else '['}{entry}".encode()

    assert len(next(json_box_tables(pieces(), "d.json"))) == 10
    assert len(taken) < 15


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 25])
def test_a_bucket_gives_the_pieces_of_an_object_that_make_it_whole(
        bucket: str, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("pipeline.box_files.BYTES_AT_ONCE", 10)
    data = bytes(range(size))
    put_if_absent(f"{bucket}/{size}.json", data)
    pieces = list(read_pieces(find_box_files(f"{bucket}/{size}.json").objects[0]))
    assert b"".join(pieces) == data
    assert len(pieces) == -(-size // 10)


def test_a_json_that_becomes_another_one_while_it_is_read_is_refused(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.box_files.BYTES_AT_ONCE", 10)
    (tmp_path / "d.json").write_text("[1, 2, 3, 4, 5, 6]")
    pieces = read_pieces(find_box_files(str(tmp_path / "d.json")).objects[0])
    next(pieces)
    (tmp_path / "d.json").write_text("[1, 2, 3, 4, 5, 6, 7]")
    with pytest.raises(ObjectChanged):
        next(pieces)
