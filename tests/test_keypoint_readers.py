"""What reads a keypoint dataset takes the job's own parts, and says where some are missing or strangers among them."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs import export
from pipeline import keypoints
from pipeline.config import ExportConfig
from pipeline.errors import DataError
from pipeline.units import committed_units, open_job

V1 = Path(__file__).parent / "versions" / "v1" / "keypoints"
STRANGER = "part-0000000-deadbeef.parquet"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A finished dataset of 6 persons in 2 units, of release 0.1.0."""
    return Path(shutil.copytree(V1, tmp_path / "keypoints"))


def parts_of(dataset: Path) -> list[Path]:
    return sorted((dataset / "keypoints").iterdir())


def add_stranger(dataset: Path) -> None:
    """As one late put of another job can leave it."""
    shutil.copy(parts_of(dataset)[0], dataset / "keypoints" / STRANGER)


def persons_in_a_table(dataset: Path) -> int:
    return int(keypoints.read_keypoints(str(dataset))[0]["person_index"].drop_null().length())


def persons_part_by_part(dataset: Path) -> int:
    parts = keypoints.open_keypoints(str(dataset))
    return sum(counts["persons"] for _, counts, _ in keypoints.read_parts(parts, parts.names))


def exported(dataset: Path, to: str = "fiftyone") -> dict[str, Any]:
    return export.run(ExportConfig(keypoints=str(dataset), to=to, output=str(dataset.with_name(f"{to}.json"))))


def persons_exported(dataset: Path) -> int:
    return int(exported(dataset)["persons"])


READERS = [persons_in_a_table, persons_part_by_part, persons_exported]


@pytest.mark.parametrize("read", READERS)
def test_a_strange_part_doubles_no_person_and_is_named(
        dataset: Path, caplog: pytest.LogCaptureFixture, read: Any) -> None:
    add_stranger(dataset)
    assert read(dataset) == 6
    assert f"{STRANGER} is no part of job" in caplog.text
    assert "`verify` names each" in caplog.text


@pytest.mark.parametrize("read", READERS)
def test_a_damaged_part_is_named(dataset: Path, read: Any) -> None:
    damaged = parts_of(dataset)[1]
    damaged.write_bytes(damaged.read_bytes()[:-20])  # its footer's end is gone
    with pytest.raises(DataError, match=f"{damaged.name} can't be read.*`verify` says what is wrong with it"):
        read(dataset)


@pytest.mark.parametrize("name", ["part-0000002-{job}.parquet", "part-0000000-{job}.parquet.copy", "notes.txt"])
def test_only_the_units_of_the_plan_are_the_jobs_own(dataset: Path, name: str) -> None:
    job = open_job(str(dataset))
    assert job is not None
    shutil.copy(parts_of(dataset)[0], dataset / "keypoints" / name.format(job=job.digest[:8]))
    assert persons_in_a_table(dataset) == 6


def test_rows_are_copied_from_no_output_with_a_strange_part(dataset: Path) -> None:
    add_stranger(dataset)
    job = open_job(str(dataset))
    assert job is not None
    with pytest.raises(DataError, match=STRANGER):
        committed_units(str(dataset), keypoints.FOLDER, job)


def test_strange_parts_alone_are_no_dataset(dataset: Path) -> None:
    for part in parts_of(dataset):
        part.rename(part.with_name(part.name[:13] + "deadbeef.parquet"))
    with pytest.raises(DataError, match="holds no keypoint dataset"):
        keypoints.open_keypoints(str(dataset))


def test_a_whole_dataset_is_complete_and_nothing_is_said(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert exported(dataset)["complete"] is True
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize(("gone", "said"), [
    ("_SUCCESS", "2 of 2 parts are there, without _SUCCESS. The annotate command again goes on with it."),
    ("keypoints/part", "1 of 2 parts are there, with _SUCCESS. `verify` names each that is gone.")])
def test_a_dataset_that_is_not_complete_is_read_and_the_result_says_so(
        dataset: Path, caplog: pytest.LogCaptureFixture, gone: str, said: str) -> None:
    next(path for path in sorted(dataset.rglob("*")) if str(path.relative_to(dataset)).startswith(gone)).unlink()
    assert exported(dataset)["complete"] is False
    assert said in caplog.text


def test_parts_are_read_ahead_as_far_as_their_bytes_may_be(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = keypoints.open_keypoints(str(dataset))
    monkeypatch.setattr(keypoints, "BYTES_AHEAD", 4 * parts.largest_bytes)
    taken: list[str] = []
    reading = keypoints.read_parts(parts, (taken.append(name) or name for name in parts.names[:1] * 40))
    next(reading)
    assert len(taken) == 4


def test_columns_that_nobody_needs_are_not_read(dataset: Path) -> None:
    whole, less = (keypoints.read_keypoints(str(dataset), without=names)[0] for names in ((), ("etag", "nose_x")))
    assert whole.drop_columns(["etag", "nose_x"]).equals(less)
