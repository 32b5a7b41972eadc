"""What the annotate job does, without Ray: every picture exactly once, whatever happens on the way."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import annotate, shard
from pipeline.config import AnnotateConfig, ShardConfig
from pipeline.errors import ConfigError, DataError
from pipeline.keypoints import read_keypoints
from pipeline.unit_annotator import Receipt
from tests.s3 import S3Server
from tests.worlds import NO_TRACKING, annotated_persons, rows, write_pictures, write_tiny_model

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> Path:
    """A folder with `in` (made pictures), `shards` (the same, sharded) and `model`."""
    folder = tmp_path_factory.mktemp("world")
    pictures = write_pictures(folder / "in")
    sharded(pictures, str(folder / "shards"))
    write_tiny_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def first_run(world: Path) -> dict[str, Any]:
    """The result of a finished run into world/out."""
    return annotate.run(config(world, str(world / "out")))


@pytest.fixture
def finished(world: Path, first_run: dict[str, Any], tmp_path: Path) -> Path:
    """A finished run's output, copied for one test."""
    assert first_run["output"] == str(world / "out")
    return Path(shutil.copytree(world / "out", tmp_path / "out"))


def sharded(pictures: Path | str, output: str) -> None:
    shard.run(ShardConfig(images=f"{pictures}/images", annotations=f"{pictures}/annotations.json", output=output,
                          images_per_shard=4, tracking=NO_TRACKING))


def config(world: Path, output: str, **settings: object) -> AnnotateConfig:
    return AnnotateConfig(**{"input": str(world / "shards"), "model": str(world / "model"), "output": output,
                             "tracking": NO_TRACKING, "actors": 1, "pictures_per_unit": 4, **settings})


def test_each_annotated_person_is_a_row_and_each_picture_is_accounted_for(
        world: Path, first_run: dict[str, Any]) -> None:
    table, metadata = read_keypoints(str(world / "out"))
    assert first_run["counts"]["pictures"] == 12
    assert first_run["counts"]["persons"] == annotated_persons(world / "in") == table.num_rows
    keys = list(zip(table["key"].to_pylist(), table["person_index"].to_pylist(), strict=True))
    assert keys == sorted(set(keys))
    assert table["box_score"].to_pylist() == [1.0] * table.num_rows
    assert metadata.counts["ok"] == 12
    assert json.loads((world / "out" / "_SUCCESS").read_text())["counts"] == first_run["counts"]


@pytest.mark.usefixtures("first_run")
def test_a_bucket_gives_the_rows_that_a_folder_gives(world: Path, s3: S3Server, bucket: str) -> None:
    s3.upload_folder(world / "in", f"{bucket}/in")
    sharded(f"{bucket}/in", f"{bucket}/shards")
    s3.upload_folder(world / "model", f"{bucket}/model")
    annotate.run(config(world, f"{bucket}/out", input=f"{bucket}/shards", model=f"{bucket}/model"))
    here, there = (rows(output, without=("etag",)) for output in (str(world / "out"), f"{bucket}/out"))
    assert here.num_rows > 12
    assert here.equals(there)


def test_the_same_command_again_does_nothing(world: Path, first_run: dict[str, Any]) -> None:
    again = annotate.run(config(world, str(world / "out")))
    assert first_run["units_annotated"] == first_run["units"] > 1
    assert again["units_annotated"] == 0
    assert again["counts"] == first_run["counts"]


@pytest.mark.usefixtures("first_run")
def test_the_intent_is_all_that_can_change_a_row(world: Path) -> None:
    assert set(json.loads((world / "out" / "_job.json").read_text())["intent"]) == {
        "boxes", "model", "precision", "backend", "threads", "batch_size", "flip", "deterministic", "limit",
        "pictures_per_unit", "max_pixels", "row_version"}


@pytest.mark.parametrize(("setting", "value"), [("flip", False), ("batch_size", 3), ("boxes", "whole-image")])
def test_another_intent_into_the_same_output_is_refused(
        world: Path, finished: Path, setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{setting}: begun with"):
        annotate.run(config(world, str(finished), **{setting: value}))


def test_another_model_into_the_same_output_is_refused(world: Path, finished: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="model: begun with"):
        annotate.run(config(world, str(finished), model=str(other)))


def test_a_run_whose_own_model_was_changed_stops_and_says_so(world: Path, finished: Path) -> None:
    next((finished / "keypoints").iterdir()).unlink()
    (finished / "_SUCCESS").unlink()
    (finished / "_model" / "model.json").write_text((finished / "_model" / "model.json").read_text() + "\n")
    with pytest.raises(DataError, match="not the model that this run was begun with"):
        annotate.run(config(world, str(finished)))


def test_a_part_that_is_gone_from_a_finished_output_is_named(world: Path, finished: Path) -> None:
    lost = min((finished / "keypoints").iterdir())
    lost.unlink()
    with pytest.raises(DataError, match=f"1 of its parts are gone since, the first of them {lost.name}"):
        annotate.run(config(world, str(finished)))


def test_another_jobs_part_in_a_finished_output_is_named(world: Path, finished: Path) -> None:
    (finished / "keypoints" / "part-0000001-00000000.parquet").write_bytes(b"put late")
    with pytest.raises(DataError, match="part-0000001-00000000"):
        annotate.run(config(world, str(finished)))


def test_another_jobs_success_is_no_success(world: Path, finished: Path) -> None:
    success = json.loads((finished / "_SUCCESS").read_text())
    (finished / "_SUCCESS").write_text(json.dumps({**success, "job": "f" * 64}))
    with pytest.raises(DataError, match="_SUCCESS is that of job ffffffff"):
        annotate.run(config(world, str(finished)))


def test_only_a_missing_unit_is_computed_and_its_bytes_are_the_same(world: Path, finished: Path) -> None:
    parts = {path.name: path.read_bytes() for path in (finished / "keypoints").iterdir()}
    (finished / "keypoints" / sorted(parts)[0]).unlink()
    (finished / "_SUCCESS").unlink()
    assert annotate.run(config(world, str(finished)))["units_annotated"] == 1
    assert {path.name: path.read_bytes() for path in (finished / "keypoints").iterdir()} == parts


def test_the_frozen_plan_rules_when_the_input_has_grown(world: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "in")
    asked = config(world, str(tmp_path / "out"), input=str(pictures / "images"), boxes="whole-image")
    annotate.run(asked)
    next((tmp_path / "out" / "keypoints").iterdir()).unlink()
    (tmp_path / "out" / "_SUCCESS").unlink()
    (pictures / "images" / "new.jpg").write_bytes(b"arrived later")
    assert annotate.run(asked)["counts"]["pictures"] == 12


def test_pictures_that_cannot_be_read_become_rejected_rows_with_their_reasons(world: Path, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "in") / "images"
    names = sorted(path.name for path in images.iterdir())
    (images / names[0]).write_bytes((images / names[0]).read_bytes()[:400])
    (images / names[1]).write_bytes(b"no picture")
    annotate.run(config(world, str(tmp_path / "out"), input=str(images), boxes="whole-image", max_rejected_share=0.5))
    table = rows(str(tmp_path / "out")).to_pylist()
    assert {row["key"]: row["reason"] for row in table if row["status"] == "rejected"} == {
        names[0]: "truncated", names[1]: "not_a_picture"}
    rejected = next(row for row in table if row["key"] == names[1])
    assert rejected["error"]
    absent = {name: value for name, value in rejected.items() if name.startswith(("box", "nose", "person", "score"))}
    assert set(absent.values()) == {None}


def test_a_refusal_of_the_shard_dataset_is_carried_on(world: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "in")
    (pictures / "images" / "notes.txt").write_text("no picture")
    sharded(pictures, str(tmp_path / "shards"))
    result = annotate.run(config(world, str(tmp_path / "out"), input=str(tmp_path / "shards"), max_rejected_share=0.5))
    assert result["counts"]["reasons"] == {"not_a_picture": 1}
    assert "notes.txt" in rows(str(tmp_path / "out"))["key"].to_pylist()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize("limit", [{"max_rejected_share": 0.2}, {"max_rejected_share": 1, "max_rejected": 2}])
def test_too_many_rejected_pictures_stop_the_run_before_success(
        world: Path, tmp_path: Path, limit: dict[str, float]) -> None:
    images = write_pictures(tmp_path / "in") / "images"
    for path in sorted(images.iterdir())[:3]:
        cut_short(path)
    told = rf"3 pictures rejected, more than the 2 of 12 that {list(limit)[-1]} .*truncated 3"
    with pytest.raises(DataError, match=told):
        annotate.run(config(world, str(tmp_path / "out"), input=str(images), boxes="whole-image", **limit))
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_what_runs_before_have_rejected_stops_the_run_that_goes_on(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = sorted((write_pictures(tmp_path / "in") / "images").iterdir())
    asked = config(world, str(tmp_path / "out"), input=str(tmp_path / "in" / "images"), boxes="whole-image",
                   pictures_per_unit=1)
    for path in images[:3]:
        cut_short(path)
    annotate.run(asked.model_copy(update={"max_rejected_share": 0.25}))
    (tmp_path / "out" / "_SUCCESS").unlink()
    for part in sorted((tmp_path / "out" / "keypoints").iterdir())[3:]:
        part.unlink()
    monkeypatch.setattr(annotate, "annotate_units", after_counting(annotate.annotate_units))
    with pytest.raises(DataError, match="3 pictures rejected"):  # each of them by the run before
        annotate.run(asked)
    assert len(list((tmp_path / "out" / "keypoints").iterdir())) == 4


def test_what_runs_before_have_rejected_keeps_a_run_that_has_nothing_left_to_do_from_success(
        world: Path, tmp_path: Path) -> None:
    images = sorted((write_pictures(tmp_path / "in", count=4) / "images").iterdir())
    cut_short(images[0])
    asked = config(world, str(tmp_path / "out"), input=str(tmp_path / "in" / "images"), boxes="whole-image",
                   backend="cpu")
    annotate.run(asked.model_copy(update={"max_rejected_share": 1}))
    (tmp_path / "out" / "_SUCCESS").unlink()
    with pytest.raises(DataError, match="1 picture rejected"):
        annotate.run(asked)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def after_counting(annotate_units: Callable[..., Iterator[Receipt]]) -> Callable[..., Iterator[Receipt]]:
    """The same, begun once the parts that stood before are counted."""
    def annotate(*arguments: Any, **options: Any) -> Iterator[Receipt]:
        for thread in threading.enumerate():
            if thread.name == "counting parts":
                thread.join()
        yield from annotate_units(*arguments, **options)

    return annotate


def test_what_is_no_picture_at_all_is_counted_apart_unless_nothing_else_is_there(world: Path, tmp_path: Path) -> None:
    images = sorted((write_pictures(tmp_path / "in") / "images").iterdir())
    asked = config(world, str(tmp_path / "out"), input=str(tmp_path / "in" / "images"), boxes="whole-image")
    for path in images[1:]:
        path.write_bytes(b"no picture")
    assert annotate.run(asked)["counts"]["reasons"] == {"not_a_picture": 11}
    images[0].write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the 12 objects is a picture"):
        annotate.run(asked.model_copy(update={"output": str(tmp_path / "nothing")}))


def test_a_list_of_uris_is_annotated_under_whole_uris_as_keys(world: Path, tmp_path: Path) -> None:
    uris = sorted(str(path) for path in (world / "in" / "images").iterdir())[:3]
    (tmp_path / "list.csv").write_text("uri\n" + "\n".join(uris) + "\n")
    annotate.run(config(world, str(tmp_path / "out"), input=str(tmp_path / "list.csv"), boxes="whole-image"))
    assert rows(str(tmp_path / "out"))["key"].to_pylist() == uris


def test_a_damaged_shard_leaves_its_unit_uncommitted_and_no_rejected_row(world: Path, tmp_path: Path) -> None:
    sharded(world / "in", str(tmp_path / "shards"))
    damaged = next((tmp_path / "shards" / "shards").iterdir())
    whole = damaged.read_bytes()
    asked = config(world, str(tmp_path / "out"), input=str(tmp_path / "shards"))
    data = bytearray(whole)
    data[len(data) // 2] ^= 1  # in the middle, where the pictures are
    damaged.write_bytes(bytes(data))
    with pytest.raises(OSError, match=r"1 of \d+ units are not annotated"):
        annotate.run(asked)
    assert set(rows(str(tmp_path / "out"))["status"].to_pylist()) == {"ok"}
    damaged.write_bytes(whole)
    assert annotate.run(asked)["units_annotated"] == 1


def test_detections_of_a_json_file_are_annotated_with_their_scores(world: Path, tmp_path: Path) -> None:
    image_id = rows_of_shards(world)[0]["image_id"]
    (tmp_path / "d.json").write_text(json.dumps(
        [{"image_id": image_id, "category_id": 1, "bbox": [5, 5, 40, 60], "score": 0.5},
         {"image_id": image_id, "category_id": 1, "bbox": [9, 9, 0, 60], "score": 0.5}]))
    result = annotate.run(config(world, str(tmp_path / "out"), boxes=str(tmp_path / "d.json")))
    assert (result["counts"]["persons"], result["counts"]["no_person"]) == (1, 11)
    assert result["counts"]["boxes_refused"] == 1
    person = next(row for row in rows(str(tmp_path / "out")).to_pylist() if row["status"] == "ok")
    assert (person["box_score"], person["box_w"], person["box_id"]) == (0.5, 40.0, 0)


def rows_of_shards(world: Path) -> list[dict[str, object]]:
    from pipeline.shards import open_shards, read_part

    dataset = open_shards(str(world / "shards"))
    return read_part(dataset, dataset.parts[0]).to_pylist()


def test_a_cut_picture_is_rejected_or_taken_as_far_as_it_goes_as_the_run_says(world: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "in", count=3) / "images"
    cut = sorted(pictures.iterdir())[1]
    cut.write_bytes(cut.read_bytes()[:-200])
    settings: dict[str, Any] = {"input": str(pictures), "boxes": "whole-image", "max_rejected_share": 1}
    refusing = annotate.run(config(world, str(tmp_path / "refusing"), **settings))
    taking = annotate.run(config(world, str(tmp_path / "taking"), accept_truncated=True, **settings))
    assert refusing["counts"]["reasons"] == {"truncated": 1}
    assert (taking["counts"]["ok"], taking["counts"]["rejected"]) == (3, 0)
    with pytest.raises(ConfigError, match="accept_truncated: begun with null, now true"):
        annotate.run(config(world, str(tmp_path / "refusing"), accept_truncated=True, **settings))


@pytest.mark.parametrize("settings", [{"output": "in/out"}, {"reuse": "out/old"}])
def test_an_output_that_would_be_read_as_its_own_input_is_refused(
        world: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    paths = {"input": "in", "output": "out", **settings}
    with pytest.raises(ConfigError, match="lie one inside the other"):
        annotate.run(config(world, **{name: str(tmp_path / path) for name, path in paths.items()}))


@pytest.mark.parametrize(("backend", "mode"), [("openvino", "default"), ("cpu", "reduce-overhead")])
def test_what_a_backend_cannot_compile_is_refused_before_anything_is_written(
        world: Path, tmp_path: Path, backend: str, mode: str) -> None:
    with pytest.raises(ConfigError, match=f"compile={mode} is for backend .*, and this run's is {backend}"):
        annotate.run(config(world, str(tmp_path / "out"), backend=backend, compile=mode))
    assert not (tmp_path / "out" / "_job.json").exists()


@pytest.mark.parametrize("settings", [{"input": "/nowhere", "boxes": "whole-image"}, {"input": "/nowhere/list.csv"},
                                      {"boxes": "/nowhere.json"}, {"boxes": "detect"},
                                      {"boxes": "detect", "detector": "/nowhere.onnx"}])
def test_an_input_and_boxes_that_are_not_there_are_refused_before_ray_starts(
        world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]) -> None:
    monkeypatch.setattr(annotate, "start_ray", lambda: pytest.fail("Ray was started"))
    with pytest.raises((ConfigError, DataError), match=r"nowhere|needs --detector"):
        annotate.run(config(world, str(tmp_path / "out"), **settings))
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_another_kind_of_run_is_refused(world: Path, first_run: dict[str, Any],
                                                             tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a shard dataset"):
        annotate.run(config(world, str(world / "shards"), input=str(world / "in" / "images"), boxes="whole-image"))
    with pytest.raises(ConfigError, match="holds a keypoint dataset"):
        sharded(world / "in", str(world / "out"))
    with pytest.raises(ConfigError, match="holds a keypoint dataset, and no pictures"):
        annotate.run(config(world, str(tmp_path / "out"), input=str(world / "out"), boxes="whole-image"))


def test_one_picture_is_no_input(world: Path, tmp_path: Path) -> None:
    picture = min((world / "in" / "images").iterdir())
    with pytest.raises(DataError, match=r"this is one object\. Give the folder"):
        annotate.run(config(world, str(tmp_path / "out"), input=str(picture), boxes="whole-image"))
    with pytest.raises(DataError, match=r"this is one object\. Give the folder"):
        shard.run(ShardConfig(images=str(picture), output=str(tmp_path / "out"), tracking=NO_TRACKING))
