"""The verify job as its users run it: what it prints, how it ends, on what the shard job really wrote."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import shard, verify
from pipeline.config import ShardConfig, VerifyConfig
from pipeline.errors import ConfigError, DataError
from pipeline.shards import open_shards
from tests.keypoint_world import KeypointWorld
from tests.shard_world import World, write_files
from tests.worlds import NO_TRACKING, write_pictures

ROOT = Path(__file__).resolve().parents[1]


def sharded(folder: Path, images_per_shard: int) -> Path:
    """Twelve pictures and a text file, as the shard job writes them."""
    pictures = write_pictures(folder / "in")
    (pictures / "images" / "notes.txt").write_text("no picture")
    shard.run(ShardConfig(images=f"{pictures}/images", annotations=f"{pictures}/annotations.json",
                          output=f"{folder}/out", images_per_shard=images_per_shard, tracking=NO_TRACKING))
    return folder / "out"


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "jobs", "verify", *arguments], capture_output=True, text=True,
                          cwd=ROOT)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refuse() -> Iterator[None]:
        raise AssertionError("Ray was started")
        yield

    monkeypatch.setattr(verify, "start_ray", refuse)


@pytest.mark.usefixtures("without_ray")
def test_a_small_dataset_is_verified_without_ray(place: str) -> None:
    write_files(place, World().files())
    assert verify.run(VerifyConfig(data=place)) == {
        "job": "verify", "data": place, "dataset_version": 3, "parts": 3, "rows": 7, "findings": 0, "whole": True}


@pytest.mark.usefixtures("without_ray")
def test_what_is_wrong_before_any_part_is_read_needs_no_ray(tmp_path: Path) -> None:
    write_files(str(tmp_path), World().files() | {"dataset-000003.json": b"{"})
    with pytest.raises(DataError, match="1 thing is wrong"):
        verify.run(VerifyConfig(data=str(tmp_path)))


@pytest.mark.usefixtures("local_ray")
def test_what_the_shard_job_writes_is_whole_and_a_flipped_byte_in_it_is_named(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = sharded(tmp_path, images_per_shard=1)
    result = verify.run(VerifyConfig(data=str(output)))
    assert result["parts"] == result["rows"] == 13 > verify.FEW_PARTS  # so by Ray tasks
    assert result["whole"]
    damaged = sorted((output / "shards").iterdir())[7]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"X")
    with pytest.raises(DataError, match=r"12 of 13 parts and 12 rows read\): 1 thing is wrong"):
        verify.run(VerifyConfig(data=str(output)))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("damaged: ")]
    assert len(lines) == 1
    assert f"shards/{damaged.name}" in lines[0]


@pytest.mark.usefixtures("local_ray")
def test_a_dataset_that_grew_lost_and_dropped_pictures_is_whole_in_each_version(tmp_path: Path) -> None:
    images, output = tmp_path / "in" / "images", tmp_path / "out"
    write_pictures(tmp_path / "in", count=9)
    names = sorted(path.name for path in images.iterdir())

    def grow(**settings: object) -> int:
        known = {"images": str(images), "output": str(output), "images_per_shard": 4, "duplicates": "once",
                 "tracking": NO_TRACKING}
        return int(shard.run(ShardConfig(**{**known, **settings}))["dataset_version"])

    (images / "copy.jpg").write_bytes((images / names[0]).read_bytes())
    assert grow() == 1
    (images / names[0]).unlink()  # of the two copies the other one lives now
    (images / names[1]).write_bytes((images / names[2]).read_bytes())
    assert grow() == 2
    (tmp_path / "keys.txt").write_text(f"{names[3]}\n")
    assert grow(images=None, drop=str(tmp_path / "keys.txt")) == 3
    (images / "new.txt").write_text("no picture")
    assert grow() == 4
    for version, rows in ((1, 9), (2, 8), (3, 7), (4, 8)):
        assert verify.run(VerifyConfig(data=str(output), version=version))["whole"]
        assert open_shards(str(output), version).json["counts"]["rows"] == rows


def test_the_command_prints_each_finding_and_exits_with_1(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests" / "versions" / "v1" / "shards", tmp_path / "data")
    whole = command("--data", str(tmp_path / "data"), "--set", "version=1")
    assert whole.returncode == 0
    assert json.loads(whole.stdout)["whole"] is True
    parts = sorted((tmp_path / "data" / "shards").iterdir())
    parts[0].unlink()
    parts[1].write_bytes(b"no Parquet")
    answer = command("--data", str(tmp_path / "data"))
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert f"missing: shards/{parts[0].name}: " in answer.stderr
    assert f"damaged: shards/{parts[1].name}: " in answer.stderr
    assert "2 things are wrong" in answer.stderr


@pytest.mark.usefixtures("without_ray")
def test_a_small_keypoint_dataset_is_verified_without_ray(place: str) -> None:
    world = KeypointWorld()
    write_files(place, world.files())
    assert verify.run(VerifyConfig(data=place)) == {
        "job": "verify", "data": place, "digest": world.digest, "parts": 3, "rows": 6, "findings": 0, "whole": True}


@pytest.mark.usefixtures("local_ray")
def test_a_keypoint_dataset_of_many_parts_is_verified_by_tasks(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verify, "FEW_PARTS", 1)
    world = KeypointWorld()
    world.rows[1][0]["box_w"] = 0.0
    write_files(str(tmp_path), world.files())
    with pytest.raises(DataError, match=r"3 of 3 parts and 6 rows read\): 1 thing is wrong"):
        verify.run(VerifyConfig(data=str(tmp_path)))
    assert f"row: {world.part(1)}: " in capsys.readouterr().err


@pytest.mark.usefixtures("without_ray")
def test_a_run_that_has_not_ended_is_not_whole_and_its_parts_are_checked(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = KeypointWorld(sealed=False)
    files = world.files()
    del files[world.part(0)]
    write_files(str(tmp_path), files)
    unfinished = r"unfinished: 2 of 3 units committed, and no _SUCCESS; run the annotate command again"
    with pytest.raises(DataError, match=rf"2 of 2 parts and 3 rows read\): {unfinished}\."):
        verify.run(VerifyConfig(data=str(tmp_path)))
    assert capsys.readouterr().err == ""
    world.rows[1][0]["box_w"] = 0.0
    write_files(str(tmp_path), {world.part(1): world.files()[world.part(1)]})
    with pytest.raises(DataError, match=rf"{unfinished}; 1 thing is wrong"):
        verify.run(VerifyConfig(data=str(tmp_path)))


@pytest.mark.usefixtures("without_ray")
def test_what_is_left_of_a_keypoint_dataset_without_its_job_is_named(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = KeypointWorld().files()
    del files["_job.json"]
    write_files(str(tmp_path), files)
    with pytest.raises(DataError, match="1 thing is wrong"):
        verify.run(VerifyConfig(data=str(tmp_path)))
    assert capsys.readouterr().err.startswith("missing: _job.json: ")


def test_a_version_of_a_keypoint_dataset_is_a_wrong_setting(tmp_path: Path) -> None:
    write_files(str(tmp_path), KeypointWorld().files())
    with pytest.raises(ConfigError, match="has no versions"):
        verify.run(VerifyConfig(data=str(tmp_path), version=1))


def test_the_command_verifies_a_keypoint_dataset_too(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests" / "versions" / "v1" / "keypoints", tmp_path / "data")
    whole = command("--data", str(tmp_path / "data"))
    assert whole.returncode == 0
    assert json.loads(whole.stdout)["whole"] is True
    parts = sorted((tmp_path / "data" / "keypoints").iterdir())
    parts[0].unlink()
    (tmp_path / "data" / "keypoints" / "stray.parquet").write_bytes(parts[1].read_bytes())
    answer = command("--data", str(tmp_path / "data"))
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert f"missing: keypoints/{parts[0].name}: " in answer.stderr
    assert "doubled: keypoints/stray.parquet: " in answer.stderr
    assert "2 things are wrong" in answer.stderr
