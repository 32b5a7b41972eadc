"""A shard dataset grows with its bucket: what is new or changed is added, what is gone is dropped, nothing is moved."""

import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import shard
from pipeline import shards, storage
from pipeline.config import ShardConfig
from pipeline.errors import ConfigError, DataError
from pipeline.shards import open_shards, read_part
from tests.test_shard_job import config as annotated_config
from tests.worlds import NO_TRACKING, write_pictures

pytestmark = pytest.mark.usefixtures("local_ray")


def write_png(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((6, 8, 3), shade, np.uint8))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of six pictures, 0.png to 5.png."""
    for number in range(6):
        write_png(tmp_path / "in" / f"{number}.png", 10 * number)
    return tmp_path / "in"


def config(folder: Path, **settings: Any) -> ShardConfig:
    return ShardConfig(**{"images": str(folder), "output": str(folder.parent / "out"), "images_per_shard": 3,
                          "tracking": NO_TRACKING, **settings})


def drop(images: Path, *keys: str) -> dict[str, Any]:
    listed = images.parent / "drop.txt"
    listed.write_text("".join(f"{key}\n" for key in keys))
    return shard.run(config(images, images=None, drop=str(listed)))


def live(images: Path, version: int | None = None) -> dict[str, dict[str, Any]]:
    """The live rows by key; each key must be live once."""
    dataset = open_shards(str(images.parent / "out"), version)
    rows = [row for part in dataset.parts for row in read_part(dataset, part).to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows) == dataset.json["counts"]["rows"]
    assert [part.counts["rows"] for part in dataset.parts] == [len(read_part(dataset, part)) for part in dataset.parts]
    return {row["key"]: row for row in rows}


def stored(images: Path) -> dict[str, bytes]:
    output = images.parent / "out"
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def dropped(images: Path, version: int) -> list[tuple[str, str]]:
    table = pq.read_table(images.parent / "out" / f"dropped-{version:06d}.parquet")
    return sorted(zip(table["key"].to_pylist(), table["why"].to_pylist(), strict=True))


def test_a_grown_folder_adds_a_version_and_touches_nothing_that_is_there(images: Path) -> None:
    shard.run(config(images))
    before = stored(images)
    write_png(images / "6.png", 60)
    write_png(images / "2.png", 99)
    (images / "5.png").unlink()
    (images / "readme.txt").write_text("no picture")
    result = shard.run(config(images))
    assert result["dataset_version"] == 2
    assert result["changes"] == {"new": 2, "changed": 1, "removed": 1}
    assert (result["counts"]["pictures"], result["counts"]["refused"], result["counts"]["not_pictures"]) == (6, 0, 1)
    rows = live(images)
    assert sorted(rows) == ["0.png", "1.png", "2.png", "3.png", "4.png", "6.png", "readme.txt"]
    assert rows["2.png"]["bytes"] == (images / "2.png").read_bytes()
    assert dropped(images, 2) == [("2.png", "changed"), ("5.png", "removed")]
    assert {name: data for name, data in stored(images).items() if name in before} == before


def test_an_older_version_still_reads_as_it_was(images: Path) -> None:
    shard.run(config(images))
    first = live(images)
    (images / "5.png").unlink()
    write_png(images / "2.png", 99)
    shard.run(config(images))
    assert live(images, version=1) == first


def test_when_nothing_has_changed_nothing_is_written(images: Path) -> None:
    shard.run(config(images))
    before = stored(images)
    assert shard.run(config(images))["shards_written"] == 0
    os.utime(images / "1.png")  # another ETag, the same bytes
    assert shard.run(config(images))["shards_written"] == 0
    assert stored(images) == before


def test_a_removal_alone_makes_a_version_without_a_new_part(images: Path) -> None:
    shard.run(config(images))
    parts = {name for name in stored(images) if name.startswith("shards/")}
    (images / "0.png").unlink()
    result = shard.run(config(images))
    assert (result["dataset_version"], result["counts"]["rows"], result["shards_written"]) == (2, 5, 0)
    assert {name for name in stored(images) if name.startswith("shards/")} == parts
    assert "0.png" not in live(images)


def test_a_picture_that_comes_back_is_taken_again(images: Path) -> None:
    shard.run(config(images))
    kept = (images / "0.png").read_bytes()
    (images / "0.png").unlink()
    shard.run(config(images))
    (images / "0.png").write_bytes(kept)
    shard.run(config(images))
    assert live(images)["0.png"]["bytes"] == kept
    assert open_shards(str(images.parent / "out")).version == 3


def test_a_picture_may_come_and_go_and_come_again(images: Path) -> None:
    shard.run(config(images))
    extra, times = images / "6.png", (10**18, 10**18)  # the same ETag each time
    for _ in range(2):
        write_png(extra, 60)
        os.utime(extra, ns=times)
        shard.run(config(images))
        assert "6.png" in live(images)
        extra.unlink()
        shard.run(config(images))
        assert "6.png" not in live(images)


def test_growth_that_was_cut_short_goes_on_from_its_plan_and_gives_the_same_bytes(images: Path) -> None:
    shard.run(config(images))
    first = stored(images)
    for number in range(6, 14):
        write_png(images / f"{number}.png", number)
    shard.run(config(images))
    whole = stored(images)
    lost = next(name for name in whole.keys() - first.keys() if name.startswith("shards/"))
    for name in (lost, "dataset-000002.json"):
        (images.parent / "out" / name).unlink()
    write_png(images / "later.png", 200)  # came after the plan was frozen: another run's business
    assert shard.run(config(images))["shards_written"] == 1
    assert stored(images) == whole
    assert shard.run(config(images))["changes"] == {"new": 1, "changed": 0, "removed": 0}


def test_of_two_growers_that_saw_other_listings_one_fails_by_name_and_may_run_again(
        images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard.run(config(images))
    write_png(images / "6.png", 60)
    freeze = shard.freeze_job

    def freeze_after_another_has_grown(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(shard, "freeze_job", freeze)
        write_png(images / "7.png", 70)
        shard.run(config(images))
        return freeze(*arguments, **options)

    monkeypatch.setattr(shard, "freeze_job", freeze_after_another_has_grown)
    with pytest.raises(DataError, match=r"another run was first to write _job-000002\.json"):
        shard.run(config(images))
    write_png(images / "8.png", 80)
    assert shard.run(config(images))["changes"] == {"new": 1, "changed": 0, "removed": 0}
    assert len(live(images)) == 9


def test_two_growers_that_saw_the_same_make_one_version_together(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard.run(config(images))
    write_png(images / "6.png", 60)
    freeze = shard.freeze_job

    def freeze_after_another_has_grown(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(shard, "freeze_job", freeze)
        shard.run(config(images))
        return freeze(*arguments, **options)

    monkeypatch.setattr(shard, "freeze_job", freeze_after_another_has_grown)
    assert shard.run(config(images))["dataset_version"] == 2
    assert len(live(images)) == 7


def test_another_runs_part_among_the_shards_stops_the_run_and_is_named(images: Path) -> None:
    shard.run(config(images))
    (images.parent / "out" / "shards" / "part-0000000-deadbeef.parquet").write_bytes(b"")
    write_png(images / "6.png", 60)
    with pytest.raises(DataError, match="part-0000000-deadbeef"):
        shard.run(config(images))


# --- taken out on request ---


def test_a_dropped_picture_is_gone_from_the_next_version_and_stays_out_when_the_dataset_grows(images: Path) -> None:
    shard.run(config(images))
    assert drop(images, "1.png", "4.png")["changes"] == {"dropped on request": 2}
    assert sorted(live(images)) == ["0.png", "2.png", "3.png", "5.png"]
    write_png(images / "6.png", 60)
    write_png(images / "1.png", 123)
    shard.run(config(images))
    assert sorted(live(images)) == ["0.png", "2.png", "3.png", "5.png", "6.png"]
    assert drop(images, "1.png")["dataset_version"] == 3  # it is out already


def test_an_unknown_key_is_refused_and_nothing_is_dropped(images: Path) -> None:
    shard.run(config(images))
    before = stored(images)
    with pytest.raises(DataError, match=r"1 keys are in no live row .* 'nobody\.png'"):
        drop(images, "1.png", "nobody.png")
    assert stored(images) == before


def test_dropping_waits_for_an_unfinished_run(images: Path) -> None:
    shard.run(config(images))
    write_png(images / "6.png", 60)
    shard.run(config(images))
    (images.parent / "out" / "dataset-000002.json").unlink()
    with pytest.raises(DataError, match="version 2 isn't finished"):
        drop(images, "1.png")


def test_a_drop_that_was_cut_short_is_finished_before_the_next_one(images: Path) -> None:
    shard.run(config(images))
    drop(images, "1.png")
    (images.parent / "out" / "dataset-000002.json").unlink()
    assert drop(images, "2.png")["dataset_version"] == 3
    assert sorted(live(images)) == ["0.png", "3.png", "4.png", "5.png"]


def test_adding_and_dropping_are_two_runs(images: Path) -> None:
    with pytest.raises(ConfigError, match="--drop"):
        shard.run(config(images, drop="keys.txt"))
    with pytest.raises(ConfigError, match="--images"):
        shard.run(config(images, images=None))


# --- copies ---


def test_pictures_with_the_same_bytes_are_counted(images: Path) -> None:
    shutil.copy(images / "3.png", images / "copy.png")
    result = shard.run(config(images))
    assert (result["counts"]["duplicates"], result["counts"]["rows"]) == (1, 7)


def test_on_request_the_first_by_key_of_the_same_bytes_is_kept(images: Path) -> None:
    shutil.copy(images / "3.png", images / "copy.png")
    shutil.copy(images / "3.png", images / "1copy.png")
    result = shard.run(config(images, duplicates="once"))
    assert (result["counts"]["duplicates"], result["counts"]["rows"]) == (0, 6)
    assert dropped(images, 1) == [("3.png", "duplicate"), ("copy.png", "duplicate")]
    assert shard.run(config(images, duplicates="once"))["shards_written"] == 0


def test_a_copy_comes_back_when_the_one_that_was_kept_is_gone(images: Path) -> None:
    shutil.copy(images / "3.png", images / "copy.png")
    shard.run(config(images, duplicates="once"))
    (images / "3.png").unlink()
    result = shard.run(config(images, duplicates="once"))
    assert (result["shards_written"], sorted(live(images))) == (0, ["0.png", "1.png", "2.png", "4.png", "5.png",
                                                                   "copy.png"])


# --- annotations ---


def test_another_annotation_of_a_picture_makes_its_row_anew(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    shard.run(annotated_config(str(folder), str(tmp_path / "out")))
    text = (folder / "annotations.json").read_text()
    (folder / "annotations.json").write_text(text.replace('"area": ', '"area": 1', 1))
    result = shard.run(annotated_config(str(folder), str(tmp_path / "out")))
    assert result["changes"] == {"new": 0, "changed": 1, "removed": 0}
    assert result["counts"]["rows"] == 12
    assert shard.run(annotated_config(str(folder), str(tmp_path / "out")))["shards_written"] == 0


def test_annotations_that_were_given_must_be_given_again(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    shard.run(annotated_config(str(folder), str(tmp_path / "out")))
    with pytest.raises(ConfigError, match="was made with --annotations"):
        shard.run(annotated_config(str(folder), str(tmp_path / "out"), annotations=None))


def test_annotations_that_speak_of_no_listed_picture_are_refused_with_an_example(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    with pytest.raises(DataError, match=r"none of the 13 objects is annotated.*'000001\.jpg'"):
        shard.run(annotated_config(str(folder), str(tmp_path / "out"), images=str(folder)))


# --- the same everywhere ---


def test_any_number_of_tasks_and_threads_gives_the_same_dataset_to_the_byte(images: Path) -> None:
    for number in range(6, 40):
        write_png(images / f"{number}.png", number)
    shard.run(config(images, ray={"tasks": 1, "threads": 1}))
    one = stored(images)
    shutil.rmtree(images.parent / "out")
    shard.run(config(images, ray={"tasks": 4, "threads": 8}))
    assert stored(images) == one


def test_a_list_of_uris_is_sharded_under_whole_uris(images: Path) -> None:
    listed = images.parent / "list.csv"
    listed.write_text("uri\n" + "".join(f"{images}/{number}.png\n" for number in (4, 2, 9)))
    result = shard.run(config(listed))
    assert result["counts"]["reasons"] == {"missing": 1}
    rows = live(images)
    assert sorted(rows) == [f"{images}/{number}.png" for number in (2, 4, 9)]
    assert rows[f"{images}/2.png"]["etag"] == next(
        found.etag for found in storage.list_objects(str(images)) if found.name == "2.png")
    write_png(images / "9.png", 9)  # what was missing is looked for again
    assert shard.run(config(listed))["changes"] == {"new": 0, "changed": 1, "removed": 0}
    assert live(images)[f"{images}/9.png"]["reason"] is None


def test_an_object_above_the_limit_of_bytes_is_refused_unread() -> None:
    row = shards.shard_row({"key": "a", "etag": "e", "size": 11}, None, lambda: pytest.fail("was read"),
                           lambda data: pytest.fail("was examined"), max_bytes=10)
    assert row["reason"] == "too_large_bytes"
