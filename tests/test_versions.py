"""Datasets and models of every version that was ever released are read for ever.

`tests/versions/v1` was written once, by `python -m tests.write_version tests/versions/v1`, and is never written again;
a new version gets a folder of its own.
"""

from pathlib import Path

import pytest

from pipeline.keypoints import read_keypoints
from pipeline.model.directory import load_model
from pipeline.shards import open_shards, read_part

VERSIONS = sorted((Path(__file__).parent / "versions").iterdir())
KEYS = ["000001.jpg", "000002.jpg", "000003.jpg", "notes.txt"]


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_a_shard_dataset_is_read(version: Path) -> None:
    dataset = open_shards(str(version / "shards"))
    rows = [row for part in dataset.parts for row in read_part(dataset, part).to_pylist()]
    assert sorted(row["key"] for row in rows) == KEYS
    assert [row["reason"] for row in rows if row["bytes"] is None] == ["not_a_picture"]
    assert dataset.skeleton is not None
    assert dataset.skeleton.joints[0] == "nose"


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_a_keypoint_dataset_is_read(version: Path) -> None:
    table, metadata = read_keypoints(str(version / "keypoints"))
    assert sorted(set(table["key"].to_pylist())) == KEYS
    assert (metadata.counts["ok"], metadata.counts["rejected"]) == (3, 1)
    assert metadata.counts["persons"] == table["nose_x"].length() - table["nose_x"].null_count > 0


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_a_model_directory_is_read(version: Path) -> None:
    network, spec = load_model(version / "model")
    assert network.config.num_joints == 17
    assert spec.input_size_wh == (64, 64)
