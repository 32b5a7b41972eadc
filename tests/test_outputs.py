"""What kind of run an output holds, by what was frozen there first."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.outputs import KEYPOINTS, SHARDS, TRAINING, kind_at, refuse_other_kind
from pipeline.units import freeze_job

OLDEST = Path(__file__).parent / "versions" / "v1"


@pytest.fixture
def training(tmp_path: Path) -> str:
    """An output in which a training was begun."""
    freeze_job(str(tmp_path / "model"), (), input={"data": []}, intent={"recipe": {}})
    return str(tmp_path / "model")


def test_each_kind_is_known_also_of_the_oldest_version(training: str, tmp_path: Path) -> None:
    places = [str(OLDEST / "shards"), str(OLDEST / "keypoints"), training, str(tmp_path)]
    assert [kind_at(place) for place in places] == [SHARDS, KEYPOINTS, TRAINING, None]


def test_another_kind_is_refused_and_the_same_or_none_is_not(training: str, tmp_path: Path) -> None:
    refuse_other_kind(training, TRAINING)
    refuse_other_kind(str(tmp_path), KEYPOINTS)
    with pytest.raises(ConfigError, match=r"holds a training\. Choose another place for a keypoint dataset"):
        refuse_other_kind(training, KEYPOINTS)
