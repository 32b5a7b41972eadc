"""`plan`: what annotating an input will take, measured on a sample of it."""

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import plan
from jobs.annotate_pool import PoolSizes
from jobs.plan import Measured, Sampling, Whole, predict, split_cost
from pipeline.config import PlanConfig
from pipeline.errors import DataError
from tests.s3 import S3Server
from tests.worlds import NO_TRACKING, write_pictures, write_tiny_model

POOL = PoolSizes(annotators=4, decoders=0, cpus=0.9, gpus=0)
MEASURED = Measured(pictures=100, persons=300, rejected=1, picture_s=0.5, unit_s=2.0, pool_start_s=7.0,
                    seal_unit_s=0.01)


def test_the_busiest_actor_decides() -> None:
    whole = Whole(pictures=900, units=9, seconds=3.0)  # units of 52 s: three actors have two, one has three
    predicted = predict(whole, MEASURED, pool=POOL, nodes=2, price=1.5)
    assert predicted.annotating_s == pytest.approx(156)
    assert predicted.seconds == pytest.approx(3 + 7 + 156 + 0.09)
    assert predicted.node_hours == pytest.approx(2 * 166.09 / 3600)
    assert predicted.money == pytest.approx(1.5 * predicted.node_hours)


# each decoder has 5 units at most, of 23 s or 103 s
@pytest.mark.parametrize(("decoding_picture_s", "annotating_s"), [(0.2, 156), (1.0, 515)])
def test_where_others_decode_the_slower_pool_decides(decoding_picture_s: float, annotating_s: float) -> None:
    measured = replace(MEASURED, decoding_picture_s=decoding_picture_s, decoding_unit_s=3.0)
    predicted = predict(Whole(pictures=900, units=9, seconds=3.0), measured, pool=replace(POOL, decoders=2), nodes=1,
                        price=None)
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


def test_without_a_price_there_is_no_money() -> None:
    assert predict(Whole(900, 9, 3.0), MEASURED, pool=POOL, nodes=1, price=None).money is None


def test_what_a_unit_costs_beside_its_pictures_is_told_by_units_of_one() -> None:
    # a second for the unit, half a second for each picture
    assert split_cost(1.5, [6.0, 11.0], [10, 20]) == pytest.approx((0.5, 1.0))


def test_where_units_of_one_picture_tell_nothing_the_pictures_cost_all() -> None:
    assert split_cost(0.1, [6.0, 12.0], [10, 20]) == pytest.approx((0.6, 0.0))  # the one was a small picture
    assert split_cost(0.5, [0.4, 0.6], [1, 1]) == pytest.approx((0.5, 0.0))


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
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]


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
