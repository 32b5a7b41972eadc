"""The shard job as its users run it, from a folder and from a bucket."""

import functools
from pathlib import Path

import pytest

from jobs import shard
from jobs.shard_tasks import ShardTask
from pipeline import storage
from pipeline.config import ShardConfig
from pipeline.errors import ConfigError, DataError
from pipeline.shards import open_shards, read_part
from tests.s3 import S3Server
from tests.worlds import NO_TRACKING, write_pictures

pytestmark = pytest.mark.usefixtures("local_ray")


def config(folder: str, output: str, **settings: object) -> ShardConfig:
    return ShardConfig(**{"images": f"{folder}/images", "annotations": f"{folder}/annotations.json", "output": output,
                          "images_per_shard": 5, "tracking": NO_TRACKING, **settings})


def all_rows(output: str) -> list[dict[str, object]]:
    dataset = open_shards(output)
    rows = [row for part in dataset.parts for row in read_part(dataset, part).to_pylist()]
    return sorted(rows, key=lambda row: str(row["key"]))


def test_every_object_listed_is_a_row_and_what_is_no_picture_keeps_its_reason(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    (folder / "images" / "notes.txt").write_text("no picture")
    (folder / "images" / "half.jpg").write_bytes(next((folder / "images").glob("*.jpg")).read_bytes()[:300])
    result = shard.run(config(str(folder), str(tmp_path / "out"), validate="full"))
    assert result["counts"]["rows"] == 14
    assert result["counts"]["pictures"] == 12
    refused = {row["key"]: row["reason"] for row in all_rows(str(tmp_path / "out")) if row["bytes"] is None}
    assert refused == {"notes.txt": "not_a_picture", "half.jpg": "truncated"}


def test_a_bucket_gives_the_rows_that_a_folder_gives(tmp_path: Path, s3: S3Server, bucket: str) -> None:
    folder = write_pictures(tmp_path / "in")
    s3.upload_folder(folder, f"{bucket}/in")
    shard.run(config(str(folder), str(tmp_path / "out")))
    shard.run(config(f"{bucket}/in", f"{bucket}/out"))
    here, there = all_rows(str(tmp_path / "out")), all_rows(f"{bucket}/out")
    assert len(here) == 12
    assert [{**row, "etag": None} for row in here] == [{**row, "etag": None} for row in there]


def test_bytes_are_those_of_the_picture(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    shard.run(config(str(folder), str(tmp_path / "out")))
    for row in all_rows(str(tmp_path / "out")):
        assert row["bytes"] == (folder / "images" / str(row["key"])).read_bytes()


def test_the_same_command_again_writes_nothing(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    first = shard.run(config(str(folder), str(tmp_path / "out")))
    again = shard.run(config(str(folder), str(tmp_path / "out")))
    assert first["shards_written"] == first["shards"] > 1
    assert again["shards_written"] == 0
    assert again["counts"] == first["counts"]


def test_a_run_that_was_cut_short_writes_only_what_is_missing_and_the_same_bytes(tmp_path: Path) -> None:
    folder, output = write_pictures(tmp_path / "in"), tmp_path / "out"
    shard.run(config(str(folder), str(output)))
    parts = {path.name: path.read_bytes() for path in (output / "shards").iterdir()}
    lost = sorted(parts)[0]
    (output / "shards" / lost).unlink()
    (output / "dataset-000001.json").unlink()
    assert shard.run(config(str(folder), str(output)))["shards_written"] == 1
    assert {path.name: path.read_bytes() for path in (output / "shards").iterdir()} == parts


def test_other_settings_into_the_same_output_are_refused_with_the_difference(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    shard.run(config(str(folder), str(tmp_path / "out")))
    with pytest.raises(ConfigError, match="seed: begun with 0, now 1"):
        shard.run(config(str(folder), str(tmp_path / "out"), seed=1))


def test_only_annotated_pictures_on_request(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    (folder / "images" / "unannotated.txt").write_text("no picture")
    assert shard.run(config(str(folder), str(tmp_path / "out"), annotated_only=True))["counts"]["rows"] == 12


def test_a_prefix_that_holds_nothing_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    with pytest.raises(DataError, match="nothing to shard"):
        shard.run(config(str(folder), str(tmp_path / "out"), images=str(tmp_path / "nowhere")))


def test_the_size_that_a_picture_has_wins_over_another_in_the_annotations(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    text = (folder / "annotations.json").read_text().replace('"width": ', '"width": 1', 1)
    (folder / "annotations.json").write_text(text)
    assert shard.run(config(str(folder), str(tmp_path / "out")))["counts"]["reasons"] == {"other_size": 1}


def test_an_output_that_is_elsewhere_is_left_alone(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in")
    before = [found.etag for found in storage.list_objects(str(folder))]
    shard.run(config(str(folder), str(tmp_path / "out")))
    assert [found.etag for found in storage.list_objects(str(folder))] == before


@pytest.mark.parametrize("deed", ["abort", pytest.param("loop", marks=pytest.mark.slow)])
def test_a_picture_that_kills_or_hangs_its_decoder_costs_its_own_row_alone(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: str) -> None:
    folder = write_pictures(tmp_path / "in", count=4)
    (folder / "images" / "culprit.jpg").write_bytes(f"{deed} ".encode())
    monkeypatch.setattr(shard, "ShardTask", functools.partial(
        ShardTask, decoder="tests.crashing_decoder", decode_seconds=2))
    result = shard.run(config(str(folder), str(tmp_path / "out"), validate="full"))
    assert result["counts"]["reasons"] == {"decoder_crash": 1}
    assert result["counts"]["pictures"] == 4
