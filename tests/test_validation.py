"""The numbers of validation in the loop and of promotion are those of `annotate` and `evaluate`, to the last digit."""

from pathlib import Path
from typing import Any

import pytest

from jobs import annotate, evaluate, promote, shard
from pipeline.config import AnnotateConfig, EvaluateConfig, PromotionConfig, ShardConfig
from pipeline.evaluation import COCO_NUMBERS, joint_metrics
from pipeline.pose.skeleton import COCO17
from pipeline.prediction import Predictor
from pipeline.shards import ShardDataset, open_shards
from pipeline.validation import ValidatedPicture, evaluate_pictures, preview_sheet, validate_part
from tests.worlds import NO_TRACKING, annotated_persons, write_pictures

pytestmark = pytest.mark.usefixtures("without_ray")

TRAINED = Path(__file__).parent / "trained_tiny"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> Path:
    """12 made pictures in three shards; one is no picture at all, and another ends in its middle."""
    folder = write_pictures(tmp_path_factory.mktemp("world"))
    pictures = sorted((folder / "images").iterdir())
    pictures[2].write_bytes(b"no picture")
    pictures[7].write_bytes(pictures[7].read_bytes()[:2000])
    shard.run(ShardConfig(images=f"{folder}/images", annotations=f"{folder}/annotations.json",
                          output=f"{folder}/shards", images_per_shard=4, tracking=NO_TRACKING))
    return folder


@pytest.fixture(scope="module")
def data(world: Path) -> ShardDataset:
    return open_shards(f"{world}/shards")


def validated(data: ShardDataset) -> list[ValidatedPicture]:
    predictor = Predictor(TRAINED, backend="plain")
    return [picture for part in data.parts for picture in validate_part(data, part, predictor)]


@pytest.fixture(scope="module")
def evaluated(world: Path) -> dict[str, Any]:
    """What a separate `annotate` and `evaluate` say of the same weights, in units that aren't the shards."""
    annotate.run(AnnotateConfig(input=f"{world}/shards", model=str(TRAINED), output=f"{world}/keypoints", backend="cpu",
                                precision="float32", threads=1, pictures_per_unit=5, max_rejected_share=1,
                                tracking=NO_TRACKING))
    return evaluate.run(EvaluateConfig(keypoints=f"{world}/keypoints", annotations=f"{world}/annotations.json",
                                       tracking=NO_TRACKING))


def test_training_validates_as_annotate_and_evaluate_do(data: ShardDataset, evaluated: dict[str, Any]) -> None:
    predictor = Predictor(TRAINED, backend="plain")  # as in the loop, where the network is on its device already
    two_ranks = [data.parts[rank::2] for rank in range(2)]
    pictures = [picture for parts in two_ranks for part in parts for picture in validate_part(data, part, predictor)]

    evaluation = evaluate_pictures(pictures, COCO17)

    assert evaluated["ap"] > 0.1
    assert evaluation.coco == {name: evaluated[name.lower()] for name in COCO_NUMBERS}
    assert evaluation.pck == evaluated["pck"]
    assert [joint.pck for joint in evaluation.joints] == [joint["pck"] for joint in evaluated["joints"]]


def test_promotion_measures_as_annotate_and_evaluate_do(data: ShardDataset, evaluated: dict[str, Any]) -> None:
    assert promote._measure([TRAINED, TRAINED], data, PromotionConfig()) == [evaluated["ap"]] * 2


def test_each_picture_counts_once_also_one_that_could_not_be_taken(
        world: Path, data: ShardDataset, evaluated: dict[str, Any]) -> None:
    pictures = validated(data)
    counts = evaluate_pictures(pictures, COCO17).counts
    assert sorted(picture.predicted.picture["key"] for picture in pictures) == sorted(
        path.name for path in (world / "images").iterdir())
    assert [picture.predicted.status for picture in pictures].count("rejected") == 2
    assert counts["persons"] == evaluated["counts"]["persons"] == annotated_persons(world)
    assert counts["predictions"] == evaluated["counts"]["predictions"] < counts["persons"]


def test_a_picture_that_could_not_be_taken_is_not_drawn(data: ShardDataset) -> None:
    pictures = validate_part(data, data.parts[0], Predictor(TRAINED, backend="plain"), keep_bytes=4)
    assert all((picture.data is None) == (picture.predicted.picture["width"] is None) for picture in pictures)
    assert preview_sheet(pictures, COCO17, low_score=0.7) is not None


def test_each_joints_pck_has_a_name_of_its_own(data: ShardDataset) -> None:
    pictures = validated(data)
    evaluation = evaluate_pictures(pictures, COCO17)
    named = joint_metrics(evaluation, COCO17)
    assert list(named) == [f"pck_{joint}" for joint in COCO17.joints]
    assert named["pck_left_hip"] == evaluation.joints[11].pck
