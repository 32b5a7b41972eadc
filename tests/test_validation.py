"""The numbers of validation in the loop and of promotion are those of `annotate` and `evaluate`, to the last digit."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from jobs import annotate, evaluate, promote, shard, train_progress
from jobs.train_task import Worker
from pipeline import validation
from pipeline.config import AnnotateConfig, EvaluateConfig, PromotionConfig, ShardConfig
from pipeline.errors import DataError
from pipeline.evaluation import COCO_NUMBERS, joint_metrics
from pipeline.model.directory import load_model
from pipeline.pose.skeleton import COCO17
from pipeline.prediction import Predictor
from pipeline.shards import ShardDataset, ShardPart, open_shards, read_part
from pipeline.validation import (
    PartShare,
    ValidatedPicture,
    evaluate_pictures,
    preview_sheet,
    rank_shares,
    validate_part,
)
from tests.test_training import made_shards, write_part
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
    return [picture for part in data.parts for picture in validate_part(data, PartShare(part), predictor)]


@pytest.fixture(scope="module")
def evaluated(world: Path) -> dict[str, Any]:
    """What a separate `annotate` and `evaluate` say of the same weights, in units that aren't the shards."""
    annotate.run(AnnotateConfig(input=f"{world}/shards", model=str(TRAINED), output=f"{world}/keypoints", backend="cpu",
                                precision="float32", threads=1, pictures_per_unit=5, max_rejected_share=1,
                                tracking=NO_TRACKING))
    return evaluate.run(EvaluateConfig(keypoints=f"{world}/keypoints", annotations=f"{world}/annotations.json",
                                       tracking=NO_TRACKING))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_training_validates_on_any_number_of_workers_as_annotate_and_evaluate_do(
        data: ShardDataset, evaluated: dict[str, Any], monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    evaluations: list[int] = []
    monkeypatch.setattr(train_progress, "evaluate_pictures", lambda pictures, skeleton: (
        evaluations.append(len(pictures)), evaluate_pictures(pictures, skeleton))[1])
    logged: list[dict[str, float]] = []
    run = SimpleNamespace(log_metrics=lambda metrics, step: logged.append(metrics), log_picture=lambda *_: None)

    found = on_ranks(monkeypatch, data, world_size, lambda worker: train_progress.validate(worker, cast(Any, run)))

    assert evaluated["ap"] > 0.1
    names = [*map(str.lower, COCO_NUMBERS), "pck"]
    assert found == [{name: evaluated[name] for name in names}] * world_size
    joints = {f"val_pck_{joint['name']}": joint["pck"] for joint in evaluated["joints"]}
    assert logged == [{f"val_{name}": evaluated[name] for name in names} | joints]
    assert evaluations == [12]


def on_ranks(monkeypatch: pytest.MonkeyPatch, data: ShardDataset, world_size: int,
             act: Callable[[Worker], Any]) -> list[Any]:
    """What each rank's act gives, all at once: threads stand for the processes, and a barrier for torch.distributed."""
    given: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size, timeout=60)

    def gather(worker: Worker, value: Any) -> list[Any]:
        given[worker.rank] = value
        barrier.wait()
        values = list(given)
        barrier.wait()
        return values

    monkeypatch.setattr(train_progress, "gather", gather)
    monkeypatch.setattr(train_progress, "_network_of_rank0", lambda worker: worker.network)
    network, spec = load_model(TRAINED)
    config = SimpleNamespace(validate_persons=None)
    task = SimpleNamespace(val=data, config=config, intent={"precision": "float32"})
    workers = [cast(Worker, SimpleNamespace(task=task, rank=rank, world=world_size, network=network, spec=spec,
                                            iteration=1)) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(act, workers))


# --- who takes which pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("most_persons", [None, 2])
@pytest.mark.parametrize("world_size", [2, 3, 7, 64])
def test_however_many_workers_there_are_the_same_pictures_are_predicted_once(
        data: ShardDataset, world_size: int, most_persons: int | None) -> None:
    predictor = Predictor(TRAINED, backend="null")

    def keys(rank: int, world: int) -> list[str]:
        shares = rank_shares(data.parts, rank=rank, world=world, most_persons=most_persons)
        return [picture.predicted.picture["key"] for share in shares
                for picture in validate_part(data, share, predictor, most_persons=most_persons)]

    alone = keys(0, 1)
    assert [key for rank in range(world_size) for key in keys(rank, world_size)] == alone
    assert len(set(alone)) == len(alone)
    assert len(alone) == 12 if most_persons is None else 3 <= len(alone) < 12


def test_a_limit_takes_the_first_pictures_of_each_shard_until_they_hold_so_many_persons(data: ShardDataset) -> None:
    for part in data.parts:
        taken = validate_part(data, PartShare(part), Predictor(TRAINED, backend="null"), most_persons=3)
        persons = [sum(not person.iscrowd for person in picture.truth.persons) for picture in taken]
        first = read_part(data, part).column("key").to_pylist()[:len(taken)]
        assert [picture.truth.file_name for picture in taken] == first
        assert sum(persons[:-1]) < 3
        assert sum(persons) >= 3 or len(taken) == part.counts["rows"]


def test_eight_workers_share_three_shards_equally_and_neighbours_share_a_shard() -> None:
    parts = [ShardPart(f"part-{number}", "", {"rows": rows, "persons": persons})
             for number, (rows, persons) in enumerate([(999, 2000), (999, 2000), (599, 1400)])]
    shares = [rank_shares(parts, rank=rank, world=8) for rank in range(8)]

    # 1 for the part, for each picture and for each person: 3000, 3000 and 2000, so 1000 for each rank
    works = [3000, 3000, 2000]
    assert [sum((share.end - share.start) * works[parts.index(share.part)] for share in each) for each in shares] == [
        1000] * 8
    assert [[share.part.name[-1] for share in each] for each in shares] == [[n] for n in "00011122"]
    assert shares[1] == [PartShare(parts[0], Fraction(1, 3), Fraction(2, 3))]
    assert [[share.part.name[-1] for share in rank_shares(parts, rank=rank, world=2)] for rank in range(2)] == [
        ["0", "1"], ["1", "2"]]
    # of each part 50 persons at most: as much work in the small one as in the large one
    small = ShardPart("part-3", "", {"rows": 49, "persons": 50})
    assert [rank_shares([parts[0], small], rank=rank, world=2, most_persons=50) for rank in range(2)] == [
        [PartShare(parts[0])], [PartShare(small)]]


# --- what is evaluated, and drawn --------------------------------------------------------------------------------


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
    pictures = validate_part(data, PartShare(data.parts[0]), Predictor(TRAINED, backend="plain"), keep_bytes=4)
    assert all((picture.data is None) == (picture.predicted.picture["width"] is None) for picture in pictures)
    assert preview_sheet(pictures, COCO17, low_score=0.7) is not None
    for part in data.parts:
        able = [row["key"] for row in read_part(data, part, ["key", "bytes"]).to_pylist() if row["bytes"]]
        some = validate_part(data, PartShare(part), Predictor(TRAINED, backend="null"), keep_bytes=len(able))
        assert [picture.truth.file_name for picture in some if picture.data is not None] == able


def test_a_preview_has_each_kept_picture_as_predicted_and_as_annotated_without_crowds(
        data: ShardDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(validation, "draw_persons", lambda _, joints_xy, *others, **more: drawn.append(joints_xy))
    monkeypatch.setattr(validation, "contact_sheet", lambda pictures: len(pictures))
    pictures = validate_part(data, PartShare(data.parts[1]), Predictor(TRAINED, backend="null"), keep_bytes=2)
    kept = [picture for picture in pictures if picture.data is not None]
    first, *_ = kept[0].truth.persons
    crowd = replace(first, iscrowd=True, keypoints=(1.0, 1.0, 2) * 17)
    half = replace(first, keypoints=(7.0, 8.0, 1) * 2 + (0, 0, 0) * 15)
    kept[0] = replace(kept[0], truth=replace(kept[0].truth, persons=(crowd, half, replace(first, keypoints=None))))

    assert preview_sheet(kept, COCO17, low_score=0.7) == len(drawn) == 4
    assert preview_sheet([replace(picture, data=None) for picture in kept], COCO17, low_score=0.7) is None
    assert drawn[0] is kept[0].predicted.joints_xy
    assert drawn[2] is kept[1].predicted.joints_xy
    assert drawn[1].shape == (1, 17, 2)
    assert drawn[1][0, :2].tolist() == [[7, 8]] * 2
    assert np.isnan(drawn[1][0, 2:]).all()


def test_pictures_without_annotations_are_passed_over_and_where_there_are_no_others_nothing_is_measured(
        tmp_path: Path) -> None:
    made = made_shards(tmp_path, num_shards=1)
    rows = [row | {"size": len(row["bytes"])} for row in read_part(made, made.parts[0]).to_pylist()]
    bare = [rows[0] | {"persons": None}, rows[1] | {"image_id": None}]
    some, none = (write_part(Path(made.uri), number, given) for number, given in ((7, [*bare, *rows[2:]]), (8, bare)))
    predictor = Predictor(TRAINED, backend="null")
    taken = validate_part(replace(made, parts=(some,)), PartShare(some), predictor)
    assert [picture.truth.file_name for picture in taken] == [row["key"] for row in rows[2:]]
    assert validate_part(replace(made, parts=(none,)), PartShare(none), predictor) == []
    with pytest.raises(DataError, match="no annotated picture"):
        evaluate_pictures([], COCO17)


def test_each_joints_pck_has_a_name_of_its_own(data: ShardDataset) -> None:
    pictures = validated(data)
    evaluation = evaluate_pictures(pictures, COCO17)
    named = joint_metrics(evaluation, COCO17)
    assert list(named) == [f"pck_{joint}" for joint in COCO17.joints]
    assert named["pck_left_hip"] == evaluation.joints[11].pck
