"""`status`: how far a run is, told by its output alone; and drivers' signs of life."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import annotate, shard, status
from pipeline import drivers, run_status, storage
from pipeline.config import AnnotateConfig, ShardConfig, StatusConfig
from pipeline.errors import DataError
from tests.fault_proxy import RESET, FaultProxy
from tests.worlds import NO_TRACKING, write_pictures, write_tiny_model

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A finished run of 5 pictures, one of them broken, in 3 units."""
    write_pictures(tmp_path / "in", count=5)
    (tmp_path / "in" / "images" / "000001.jpg").write_bytes(b"no picture")
    annotate.run(AnnotateConfig(
        input=str(tmp_path / "in" / "images"), model=str(write_tiny_model(tmp_path / "model")), boxes="whole-image",
        output=str(tmp_path / "out"), tracking=NO_TRACKING, pictures_per_unit=2, max_rejected_share=1))
    return tmp_path / "out"


def unfinish(output: Path) -> None:
    (output / "_SUCCESS").unlink()
    sorted((output / "keypoints").iterdir())[-1].unlink()


def leave_sign(output: Path, *, age_s: float) -> None:
    sign = drivers.Sign("abc", "host-7", 42, 0.0, time.time() - age_s, {"units_done": 2, "units": 3,
                                                                       "persons_per_s": 4.5, "seconds_left": 600})
    storage.put_if_absent(f"{output}/_drivers/abc-1.json", json.dumps(vars(sign)).encode())


def test_a_finished_run_is_complete_and_gives_its_counts(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = status.run(StatusConfig(output=str(output)))
    assert (found["state"], found["done"], found["units"], found["pictures"]) == ("complete", 3, 3, 5)
    assert found["counts"]["rejected"] == 1
    assert len(found["model"]["digest"]) == 64
    told = capsys.readouterr().err
    assert "3 of 3 units (100.0%), of 5 pictures" in told
    assert "committed: 5 pictures, 4 ok, 0 no_person, 1 rejected, 4 persons" in told
    assert "not_a_picture 1" in told


def test_a_finished_run_whose_part_is_gone_is_damaged(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    min((output / "keypoints").iterdir()).unlink()
    found = status.run(StatusConfig(output=str(output)))
    assert (found["state"], found["done"], found["counts"]["pictures"]) == ("damaged", 2, 3)
    told = capsys.readouterr().err
    assert "damaged: it was complete, and parts are gone since" in told
    assert "2 of 3 units (66.7%)" in told


def test_a_run_that_nobody_works_on_is_stopped_and_counts_what_is_committed(
        output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinish(output)
    leave_sign(output, age_s=1000)
    found = status.run(StatusConfig(output=str(output)))
    assert (found["state"], found["done"], found["counts"]["pictures"]) == ("stopped", 2, 4)
    told = capsys.readouterr().err
    assert "stopped: the same command continues it" in told
    assert "driver abc on host-7, process 42: gone" in told


def test_a_run_whose_driver_left_a_sign_just_now_is_running(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinish(output)
    leave_sign(output, age_s=5)
    assert status.run(StatusConfig(output=str(output)))["state"] == "running"
    assert "alive, last seen 5 s ago; 2 of 3 units, 4.5 persons/s, about 0:10:00 left" in capsys.readouterr().err


def test_of_many_parts_some_are_counted_and_the_rest_is_estimated(
        output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinish(output)
    monkeypatch.setattr(run_status, "COUNTED_PARTS", 1)
    found = status.run(StatusConfig(output=str(output)))
    assert found["estimated"]
    assert found["counts"]["pictures"] == 4  # one part of two was counted, both have two pictures


def test_a_shard_run_that_was_cut_short_says_how_many_parts_are_there(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", count=4)
    shard.run(ShardConfig(images=str(tmp_path / "in" / "images"), output=str(tmp_path / "out"), images_per_shard=1,
                          tracking=NO_TRACKING))
    assert status.run(StatusConfig(output=str(tmp_path / "out")))["state"] == "complete"
    (tmp_path / "out" / "dataset-000001.json").unlink()
    parts = sorted((tmp_path / "out" / "shards").iterdir())
    parts[0].unlink()
    found = status.run(StatusConfig(output=str(tmp_path / "out")))
    assert (found["kind"], found["state"], found["done"]) == ("shard", "stopped", len(parts) - 1)


def test_a_shard_run_that_was_cut_short_while_a_dataset_grew_leaves_the_older_version_counted(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "in", count=4) / "images"
    asked = ShardConfig(images=str(images), output=str(tmp_path / "out"), images_per_shard=2, tracking=NO_TRACKING)
    shard.run(asked)
    shutil.copy(images / "000001.jpg", images / "later.jpg")
    shard.run(asked)
    assert status.run(StatusConfig(output=str(tmp_path / "out")))["counts"]["pictures"] == 5
    (tmp_path / "out" / "dataset-000002.json").unlink()
    found = status.run(StatusConfig(output=str(tmp_path / "out")))
    assert (found["state"], found["units"], found["done"]) == ("stopped", 1, 1)
    assert found["counts"]["pictures"] == 4


def test_a_place_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotate or shard run was begun there"):
        status.run(StatusConfig(output=str(tmp_path)))


def test_a_heartbeat_renews_its_sign_and_leaves_none_behind(place: str) -> None:
    with drivers.Heartbeat(place, lambda: {"units_done": 1}, interval_s=0.05) as heart:
        first = drivers.signs_of_life(place)[0]
        until = time.monotonic() + 10
        while (now := drivers.signs_of_life(place)) in ([], [first]) and time.monotonic() < until:
            time.sleep(0.02)
    assert now[0].driver == heart.driver
    assert now[0].at > first.at
    assert now[0].progress == {"units_done": 1}
    assert drivers.signs_of_life(place) == []


def test_a_heartbeat_that_cannot_be_left_is_a_warning(
        faulty_s3: FaultProxy, bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    faulty_s3.fail("PUT", RESET, times=100)
    with drivers.Heartbeat(bucket, dict):
        pass
    assert "no sign of life could be left, which harms nothing" in caplog.text


def test_a_second_driver_is_warned_and_takes_units_in_another_order(
        output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(annotate.random, "sample", lambda units, count: units[::-1])
    assert annotate._in_an_order_of_our_own(str(output), [1, 2, 3]) == [1, 2, 3]
    leave_sign(output, age_s=5)
    assert annotate._in_an_order_of_our_own(str(output), [1, 2, 3]) == [3, 2, 1]
    assert "another driver is at work here, or was 5 s ago: host-7, process 42" in caplog.text


def test_a_driver_at_work_is_seen_and_lets_another_one_know_its_order(
        output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(output / "keypoints")
    (output / "_SUCCESS").unlink()
    leave_sign(output, age_s=5)
    seen: list[tuple[list[int], set[str]]] = []
    annotate_units = annotate.annotate_units

    def looking(place: str, job: Any, tasks: Any, **options: Any) -> Any:
        seen.append(([task.unit for task in tasks], {sign.driver for sign in drivers.signs_of_life(place)}))
        return annotate_units(place, job, tasks, **options)

    monkeypatch.setattr(annotate, "annotate_units", looking)
    monkeypatch.setattr(annotate.random, "sample", lambda units, count: units[::-1])
    annotate.run(AnnotateConfig(
        input=str(output.parent / "in" / "images"), model=str(output.parent / "model"), boxes="whole-image",
        output=str(output), tracking=NO_TRACKING, pictures_per_unit=2, max_rejected_share=1))
    (units, at_work), = seen
    assert units == [2, 1, 0]
    assert len(at_work) == 2
    assert [sign.driver for sign in drivers.signs_of_life(str(output))] == ["abc"]
