"""The keypoint dataset opens unmodified in DuckDB, Polars and pandas, and README's queries say what they claim to."""

import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import polars
import pytest

from pipeline.keypoints import part_bytes
from pipeline.pose.skeleton import COCO17
from pipeline.rows import AnnotatedPicture, Boxes

README = Path(__file__).parents[1] / "README.md"
WRIST = COCO17.joints.index("left_wrist")
NUM_COLUMNS = 18 + 3 * 17


def picture(key: str, status: str, *, reason: str | None = None, persons: int = 0, wrist_y: float = 90.0,
            wrist_score: float = 1.2, box_score: float = 1.0) -> AnnotatedPicture:
    """A picture of 100 x 100: all joints of each person at (50, 50) with score 1, but for the left wrist."""
    about = {"key": key, "image_id": None, "etag": "e", "sha256": None, "width": 100, "height": 100}
    if status != "ok":
        return AnnotatedPicture(about, status, reason, None if reason is None else "the message")
    joints_xy, scores = np.full((persons, 17, 2), 50.0, np.float32), np.ones((persons, 17), np.float32)
    joints_xy[:, WRIST, 1], scores[:, WRIST] = wrist_y, wrist_score
    boxes = Boxes(np.arange(persons), np.tile([[0.0, 0.0, 100.0, 100.0]], (persons, 1)), np.full(persons, box_score))
    return AnnotatedPicture(about, status, boxes=boxes, joints_xy=joints_xy, joint_scores=scores)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of two parts: 4 persons in 3 pictures, one picture without people, 3 rejected ones; 8 rows."""
    parts = [
        [picture("doubtful.jpg", "ok", persons=1, wrist_y=10.0, wrist_score=0.6),
         picture("raised.jpg", "ok", persons=1, wrist_y=10.0),
         picture("large.jpg", "rejected", reason="too_large_pixels")],
        [picture("down.jpg", "ok", persons=2, box_score=0.5), picture("empty.jpg", "no_person"),
         picture("torn.jpg", "rejected", reason="corrupt"), picture("broken.jpg", "rejected", reason="corrupt")]]
    folder = tmp_path_factory.mktemp("output")
    (folder / "keypoints").mkdir()
    for number, pictures in enumerate(parts):
        data = part_bytes(pictures, COCO17, job="0" * 64, model={"name": "made"})
        (folder / "keypoints" / f"part-{number:07}-00000000.parquet").write_bytes(data)
    (folder / "_SUCCESS").write_text("{}")
    return folder


def readme_queries() -> list[str]:
    """The statements of README's SQL block, in their order."""
    (block,) = re.findall(r"```sql\n(.*?)```", README.read_text(), re.DOTALL)
    return [statement.strip() for statement in block.split(";") if statement.strip()]


@pytest.fixture(scope="module")
def answers(output: Path) -> list[list[tuple[Any, ...]]]:
    """What DuckDB answers to each of README's queries."""
    return [duckdb.sql(query.replace("OUTPUT/", f"{output}/")).fetchall() for query in readme_queries()]


def test_people_with_a_raised_hand_are_found_where_both_joints_are_sure(answers):
    assert [(key, person) for key, person, *_ in answers[0]] == [("raised.jpg", 0)]


def test_the_reasons_of_rejected_pictures_are_counted(answers):
    assert answers[1] == [("corrupt", 2, "broken.jpg"), ("too_large_pixels", 1, "large.jpg")]


def test_the_pictures_to_label_next_are_those_with_the_least_certain_persons(answers):
    assert [(key, persons) for key, persons, _ in answers[2]] == [("down.jpg", 2), ("doubtful.jpg", 1),
                                                                  ("raised.jpg", 1)]
    assert answers[2][0][2] == pytest.approx(0.5 * (16 + 1.2) / 17)  # box score times the mean of the joints'


def test_readme_has_these_three_queries():
    assert len(readme_queries()) == 3


def test_duckdb_opens_the_glob(output):

    rows = duckdb.sql(f"SELECT * FROM '{output}/keypoints/*.parquet' ORDER BY key, person_index")

    assert (len(rows.columns), len(rows)) == (NUM_COLUMNS, 8)
    wrists = duckdb.sql(f"SELECT key, left_wrist_y FROM '{output}/keypoints/*.parquet' ORDER BY key, person_index")
    assert wrists.fetchall() == [
        ("broken.jpg", None), ("doubtful.jpg", 10.0), ("down.jpg", 90.0), ("down.jpg", 90.0), ("empty.jpg", None),
        ("large.jpg", None), ("raised.jpg", 10.0), ("torn.jpg", None)]


def test_polars_opens_the_glob(output):

    rows = polars.scan_parquet(f"{output}/keypoints/*.parquet").sort("key", "person_index").collect()

    assert rows.shape == (8, NUM_COLUMNS)
    assert rows["left_wrist_y"].to_list() == [None, 10.0, 90.0, 90.0, None, None, 10.0, None]
    assert rows["left_wrist_score"].dtype == polars.Float32
    assert rows["person_index"].drop_nulls().to_list() == [0, 0, 1, 0]


def test_pandas_opens_the_folder(output):

    rows = pandas.read_parquet(output / "keypoints").sort_values(["key", "person_index"])

    assert rows.shape == (8, NUM_COLUMNS)
    assert rows.loc[rows["status"] == "ok", "left_wrist_y"].tolist() == [10.0, 90.0, 90.0, 10.0]
    assert rows["left_wrist_y"].isna().sum() == 4
    assert rows["left_wrist_score"].dtype == np.float32
