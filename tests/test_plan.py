"""`plan`: what annotating an input will take, measured on a sample of it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import annotate, plan
from jobs.plan import Sampling
from pipeline.config import AnnotateConfig, PlanConfig
from pipeline.errors import ConfigError, DataError
from pipeline.forecast import Measured, Prediction, Whole, annotating_s, costs, predict, split_cost
from pipeline.unit_annotator import Receipt
from tests.s3 import S3Server
from tests.worlds import NO_TRACKING, write_pictures, write_tiny_model

MEASURED = Measured(pictures=100, persons=300, rejected=1, picture_s=0.5, unit_s=2.0, pool_start_s=7.0,
                    seal_unit_s=0.01)


def forecast(whole: Whole, measured: Measured, **settings: Any) -> Prediction:
    return predict(whole, measured, **{"annotators": 4, "decoders": 0, "nodes": 1, "price": None, **settings})


def test_the_busiest_actor_decides() -> None:
    whole = Whole(pictures=900, units=9, seconds=3.0)  # units of 52 s: three actors have two, one has three
    predicted = forecast(whole, MEASURED, nodes=2, price=1.5)
    assert predicted.annotating_s == pytest.approx(156)
    assert predicted.seconds == pytest.approx(3 + 7 + 156 + 0.09)
    assert predicted.node_hours == pytest.approx(2 * 166.09 / 3600)
    assert predicted.money == pytest.approx(1.5 * predicted.node_hours)


# each decoder has 5 units at most, of 23 s or 103 s
@pytest.mark.parametrize(("decoding_picture_s", "annotating_s"), [(0.2, 156), (1.0, 515)])
def test_where_others_decode_the_slower_pool_decides(decoding_picture_s: float, annotating_s: float) -> None:
    measured = replace(MEASURED, decoding_picture_s=decoding_picture_s, decoding_unit_s=3.0)
    predicted = forecast(Whole(pictures=900, units=9, seconds=3.0), measured, decoders=2)
    assert predicted.annotating_s == pytest.approx(annotating_s)


@pytest.mark.usefixtures("without_ray")
def test_what_decoding_takes_is_measured_where_others_decode(tmp_path: Path) -> None:
    pictures, model = write_pictures(tmp_path / "in", count=12), write_tiny_model(tmp_path / "model")

    def measured(decoders: int) -> float:
        return float(plan.run(PlanConfig(
            input=str(pictures / "images"), model=str(model), boxes="whole-image", sample=8, pictures_per_unit=3,
            decoders=decoders, tracking=NO_TRACKING))["measured"]["decoding_picture_s"])

    assert measured(0) == 0
    assert measured(1) > 0


def test_without_a_price_there_is_no_money_and_what_costs_nothing_is_told() -> None:
    assert forecast(Whole(900, 9, 3.0), MEASURED).money is None
    assert forecast(Whole(900, 9, 3.0), MEASURED, price=0.0).money == 0


def test_what_a_unit_costs_beside_its_pictures_is_told_by_units_of_one() -> None:
    # a second for the unit, half a second for each picture
    assert split_cost(1.5, [6.0, 11.0], [10, 20]) == pytest.approx((0.5, 1.0))


def test_where_units_of_one_picture_tell_nothing_the_pictures_cost_all() -> None:
    assert split_cost(0.1, [6.0, 12.0], [10, 20]) == pytest.approx((0.6, 0.0))  # the one was a small picture
    assert split_cost(0.5, [0.4, 0.6], [1, 1]) == pytest.approx((0.5, 0.0))
    assert split_cost(5.0, [3.0, 3.0], [10, 20]) == pytest.approx((0.2, 0.0))  # the one was a very large picture


# units of 100 pictures: 75 are copied in 1.5 s, 25 computed in 12.5 s, and 2 s for the unit; three rounds of them
def test_what_is_copied_is_priced_as_copying() -> None:
    whole = Whole(pictures=900, units=9, seconds=3.0, copied=675)
    assert forecast(whole, replace(MEASURED, copied_picture_s=0.02)).annotating_s == pytest.approx(3 * 16)
    decoding = replace(MEASURED, decoding_picture_s=1.0, decoding_unit_s=5.0, copied_decoding_s=0.2)  # 25 + 5 + 15
    assert forecast(whole, decoding, decoders=2).annotating_s == pytest.approx(5 * 45)


def receipt(seconds: float, pictures: int) -> Receipt:
    return Receipt(0, "committed", {"pictures": pictures}, began=10.0, ended=10.0 + seconds)


def test_what_a_copied_picture_costs_is_told_by_units_of_them() -> None:
    # a second for each unit, half a second for a picture that is computed, a tenth for one that is copied
    single, slices = [receipt(1.5, 1)], [receipt(6.0, 10), receipt(11.0, 20)]
    assert costs(single, slices, [receipt(2.0, 10), receipt(3.0, 20)], annotating_s) == pytest.approx((0.5, 1.0, 0.1))
    assert costs([], [], [receipt(2.0, 10), receipt(4.0, 20)], annotating_s) == pytest.approx((0.0, 0.0, 0.2))
    assert costs(single, slices, [], annotating_s) == pytest.approx((0.5, 1.0, 0.0))
    assert costs(single, slices, [receipt(0.5, 10)], annotating_s)[2] == 0  # less than the unit alone: never below 0


@pytest.mark.usefixtures("without_ray")
def test_a_sample_is_spread_over_the_units_and_all_of_them_are_counted() -> None:
    sampling = Sampling(40)
    units = [pa.table({"key": [f"{unit:02d}-{i:02d}" for i in range(30)]}) for unit in range(20)]
    first, single, *slices = sampling.choose(iter(units))
    assert len(first) == len(single) == 1
    assert (sampling.whole.pictures, sampling.whole.units) == (600, 20)
    keys = [key for one in slices for key in one["key"].to_pylist()]
    assert len(keys) == len(set(keys)) == 40
    assert len({key[:2] for key in keys}) == 4  # one actor: four slices


@pytest.mark.usefixtures("without_ray")
def test_a_plan_counts_the_input_measures_a_sample_and_leaves_nothing_behind(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    pictures = write_pictures(tmp_path / "in", count=12)
    found = plan.run(PlanConfig(
        input=str(pictures / "images"), model=str(write_tiny_model(tmp_path / "model")), boxes="whole-image", sample=5,
        pictures_per_unit=2, price_per_node_hour=2.0, scratch=str(tmp_path / "scratch"), tracking=NO_TRACKING))
    assert found["whole"]["pictures"] == 12
    assert found["whole"]["units"] == 6
    assert found["measured"]["persons"] == found["measured"]["pictures"] == 10  # 4 x 2, and 2 x 1
    assert found["predicted"]["money"] == pytest.approx(2 * found["predicted"]["node_hours"])
    assert "12 pictures in 6 units" in capsys.readouterr().err
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.usefixtures("without_ray")
def test_a_bucket_is_left_as_it_was(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    s3.upload_folder(write_pictures(tmp_path / "in", count=3), f"{bucket}/in")
    plan.run(PlanConfig(input=f"{bucket}/in/images", model=str(write_tiny_model(tmp_path / "model")),
                        boxes="whole-image", scratch=f"{bucket}/scratch", tracking=NO_TRACKING))
    left = s3.client().list_objects_v2(Bucket=bucket[5:]).get("Contents", [])
    assert [one["Key"] for one in left if not one["Key"].startswith("in/")] == []


@pytest.mark.usefixtures("without_ray")
def test_an_empty_input_is_refused(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "in")
    with pytest.raises(DataError, match="nothing to annotate is there"):
        plan.run(PlanConfig(input=str(tmp_path / "in"), model=str(write_tiny_model(tmp_path / "model")),
                            boxes="whole-image", tracking=NO_TRACKING))


# --- --reuse and --exclude ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> dict[str, Any]:
    """What is asked of an input of 12 pictures, of which the first 8 were annotated before it grew."""
    folder = tmp_path_factory.mktemp("grown")
    pictures = write_pictures(folder / "in", count=12) / "images"
    for path in sorted(pictures.iterdir())[8:]:
        path.rename(folder / path.name)
    asked = {"input": str(pictures), "model": str(write_tiny_model(folder / "model")), "boxes": "whole-image",
             "pictures_per_unit": 3, "tracking": NO_TRACKING}
    annotate.run(AnnotateConfig(**asked, output=str(folder / "old")))
    for path in folder.glob("*.jpg"):
        path.rename(pictures / path.name)
    return {**asked, "reuse": str(folder / "old")}


@pytest.mark.usefixtures("without_ray")
def test_of_a_grown_input_what_is_left_to_compute_is_predicted(
        grown: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = plan.run(PlanConfig(**grown))
    assert (found["whole"]["pictures"], found["whole"]["copied"]) == (12, 8)
    # two units of known pictures are copied; of the others all four, and two of one picture
    assert found["measured"]["copied"] in (5, 6)
    assert found["measured"]["pictures"] == found["measured"]["copied"] + 4 + 2
    assert "12 pictures in 4 units, 8 of them copied" in capsys.readouterr().err


@pytest.mark.usefixtures("without_ray")
def test_a_changed_picture_is_to_be_computed(grown: dict[str, Any], tmp_path: Path) -> None:
    pictures = Path(shutil.copytree(grown["input"], tmp_path / "in"))
    changed = min(pictures.iterdir())
    changed.write_bytes(changed.read_bytes() + b"more")
    assert plan.run(PlanConfig(**{**grown, "input": str(pictures)}))["whole"]["copied"] == 7


@pytest.mark.usefixtures("without_ray")
def test_where_nothing_is_left_to_compute_copying_is_all_that_costs(
        grown: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = sorted(path.name for path in Path(grown["input"]).iterdir())[8:]
    (tmp_path / "without.txt").write_text("\n".join(new))
    found = plan.run(PlanConfig(**grown, exclude=str(tmp_path / "without.txt")))
    assert (found["whole"]["pictures"], found["whole"]["copied"]) == (8, 8)
    assert (found["measured"]["picture_s"], found["measured"]["copied"]) == (0, found["measured"]["pictures"])
    assert found["predicted"]["annotating_s"] > 0
    assert "nothing computed" in capsys.readouterr().err


@pytest.mark.usefixtures("without_ray")
def test_rejects_that_can_change_are_to_be_computed(grown: dict[str, Any], tmp_path: Path) -> None:
    old = shutil.copytree(grown["reuse"], tmp_path / "old")
    success = tmp_path / "old" / "_SUCCESS"
    values = json.loads(success.read_text())
    values["counts"]["reasons"] = {"missing": 2, "corrupt": 1}
    success.write_text(json.dumps(values))
    assert plan.run(PlanConfig(**{**grown, "reuse": str(old)}))["whole"]["copied"] == 6


@pytest.mark.usefixtures("without_ray")
def test_an_output_whose_rows_were_computed_otherwise_is_refused_as_by_annotate(grown: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="flip: true there, now false"):
        plan.run(PlanConfig(**grown, flip=False))


# --- units that end their process ---------------------------------------------------------------------------------


def ending_actors(monkeypatch: pytest.MonkeyPatch, *, careful_too: bool) -> None:
    """Unit 2 ends its process each time; with care it does so too, or not."""
    annotate_units = plan.annotate_units

    def without_unit_2(output: str, job: Any, tasks: Any, *, careful: bool = False, **options: Any) -> Any:
        left = [task for task in tasks if task.unit != 2 or (careful and not careful_too)]
        return annotate_units(output, job, left, careful=careful, **options)

    monkeypatch.setattr(plan, "annotate_units", without_unit_2)


@pytest.mark.usefixtures("without_ray")
def test_a_unit_that_ends_its_process_is_done_with_care(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending_actors(monkeypatch, careful_too=False)
    assert plan.run(sample_of(tmp_path))["measured"]["pictures"] == 10


@pytest.mark.usefixtures("without_ray")
def test_one_that_does_so_with_care_too_is_told_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending_actors(monkeypatch, careful_too=True)
    with pytest.raises(OSError, match=r"1 of its \d+ units ended their process each time.*--set actors"):
        plan.run(sample_of(tmp_path))


def sample_of(folder: Path) -> PlanConfig:
    return PlanConfig(input=str(write_pictures(folder / "in", count=12) / "images"), boxes="whole-image", sample=5,
                      model=str(write_tiny_model(folder / "model")), pictures_per_unit=2, tracking=NO_TRACKING)
