"""A run's frozen plan and intent, and what its output says of how far it is."""

from typing import Any

import pyarrow as pa
import pytest

from pipeline import units
from pipeline.errors import ConfigError, DataError
from pipeline.storage import join, put_if_absent

INPUT = {"kind": "prefix", "uri": "/pictures"}
INTENT = {"flip": True, "threads": 1}
PLANNED = [[{"key": "a.jpg", "etag": "1", "size": 10}, {"key": "b.jpg", "etag": "2", "size": 20}],
           [{"key": "c.jpg", "etag": "3", "size": 30}]]


def freeze(place: str, planned: Any = PLANNED, intent: dict[str, Any] = INTENT, **options: Any) -> units.FrozenJob:
    tables = [pa.Table.from_pylist(unit) for unit in planned]
    return units.freeze_job(place, tables, input=INPUT, intent=intent, **options)


def test_a_frozen_job_is_found_again_with_its_plan(place: str) -> None:
    job = freeze(place)
    assert units.open_job(place) == job
    assert (job.num_units, job.plan["pictures"]) == (2, 3)
    assert [row["key"] for row in units.read_unit(place, job, 0)] == ["a.jpg", "b.jpg"]
    assert units.read_unit(place, job, 1) == [
        {"unit": 1, "key": "c.jpg", "etag": "3", "size": 30, "sha256": None, "part": None}]


def test_the_loser_of_two_planners_works_from_the_winners_plan(place: str) -> None:
    winner = freeze(place)
    loser = freeze(place, planned=PLANNED[:1])
    assert loser == winner


def test_a_loser_that_takes_no_other_plan_still_takes_its_own(tmp_path: Any) -> None:
    winner = freeze(str(tmp_path))
    assert freeze(str(tmp_path), accept_winner=False) == winner
    with pytest.raises(DataError, match="another run was first"):
        freeze(str(tmp_path), planned=PLANNED[:1], accept_winner=False)


def test_plans_of_many_files_give_every_unit(place: str) -> None:
    planned = [pa.table({"key": [f"{unit}.jpg"], "etag": [""], "size": [1]}) for unit in range(5)]
    job = units.freeze_job(place, planned, input=INPUT, intent=INTENT, units_per_file=2)
    assert [units.read_unit(place, job, unit)[0]["key"] for unit in range(5)] == [f"{u}.jpg" for u in range(5)]
    some = [(unit, table["key"].to_pylist()) for unit, table in units.read_units(place, job, [1, 2, 4])]
    assert some == [(1, ["1.jpg"]), (2, ["2.jpg"]), (4, ["4.jpg"])]


@pytest.mark.parametrize("change", [{"etag": "9"}, {"key": "z.jpg"}, {"size": 11}])
def test_another_picture_is_another_job(tmp_path: Any, change: dict[str, Any]) -> None:
    changed = [[{**PLANNED[0][0], **change}, PLANNED[0][1]], PLANNED[1]]
    assert freeze(str(tmp_path / "a")).digest != freeze(str(tmp_path / "b"), changed).digest


def test_the_same_content_under_another_etag_is_the_same_job(tmp_path: Any) -> None:
    here, there = ([[{"key": "a", "etag": etag, "size": 1, "sha256": "f00d"}]] for etag in ("disk", "bucket"))
    assert freeze(str(tmp_path / "a"), here).digest == freeze(str(tmp_path / "b"), there).digest


def test_another_intent_is_refused_with_the_difference(place: str) -> None:
    job = freeze(place)
    with pytest.raises(ConfigError, match="flip: begun with true, now false"):
        units.refuse_other_intent(job, place, input=INPUT, intent={**INTENT, "flip": False})
    units.refuse_other_intent(job, place, input=INPUT, intent=INTENT)


def test_an_output_that_was_deleted_or_begun_again_is_refused_by_who_still_works_for_it(tmp_path: Any) -> None:
    place = str(tmp_path / "out")
    job = freeze(place)
    units.refuse_if_begun_again(place, job)
    (tmp_path / "out" / "_job.json").unlink()
    with pytest.raises(DataError, match="has been deleted while"):
        units.refuse_if_begun_again(place, job)
    other = freeze(place, intent={**INTENT, "flip": False})
    with pytest.raises(DataError, match=f"begun again as job {other.digest[:8]}"):
        units.refuse_if_begun_again(place, job)


def test_a_part_commits_its_unit(place: str) -> None:
    job = freeze(place)
    assert units.committed_units(place, "keypoints", job) == set()
    put_if_absent(join(place, "keypoints", job.part_name(1)), b"")
    assert units.committed_units(place, "keypoints", job) == {1}


@pytest.mark.parametrize("name", ["part-0000000-00000000.parquet", "stray.parquet"])
def test_a_foreign_part_stops_the_run_and_is_named(place: str, name: str) -> None:
    job = freeze(place)
    put_if_absent(join(place, "keypoints", name), b"")
    with pytest.raises(DataError, match=name):
        units.committed_units(place, "keypoints", job)


def test_a_part_beyond_the_plan_is_foreign(place: str) -> None:
    job = freeze(place)
    put_if_absent(join(place, "keypoints", job.part_name(2)), b"")
    with pytest.raises(DataError, match=job.part_name(2)):
        units.committed_units(place, "keypoints", job)


def test_a_job_of_a_newer_version_is_refused_by_name(place: str) -> None:
    put_if_absent(join(place, "_job.json"), b'{"version": 2}')
    with pytest.raises(DataError, match="version 2"):
        units.open_job(place)


def test_counts_are_summed_name_by_name() -> None:
    total = units.total_counts([{"pictures": 2, "reasons": {"corrupt": 1}},
                                {"pictures": 3, "reasons": {"corrupt": 1, "empty": 4}}])
    assert total == {"pictures": 5, "reasons": {"corrupt": 2, "empty": 4}}
