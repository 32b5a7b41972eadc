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
from pipeline.errors import DataError
from pipeline.shards import open_shards
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


def test_a_keypoint_dataset_is_a_wrong_command() -> None:
    answer = command("--data", str(ROOT / "tests" / "versions" / "v1" / "keypoints"))
    assert answer.returncode == 2
    assert "keypoint dataset" in answer.stderr
