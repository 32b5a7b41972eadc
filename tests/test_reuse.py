"""`annotate --reuse OLD` and `--exclude`: what is computed again, what is copied, and what is left out."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import annotate, shard
from pipeline import storage
from pipeline.config import AnnotateConfig, ShardConfig
from pipeline.errors import ConfigError, ObjectMissing
from pipeline.keypoints import read_keypoints
from pipeline.prediction import Predictor
from pipeline.rows import pictures_of_table
from tests.worlds import NO_TRACKING, rows, write_pictures, write_tiny_model

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `in` (made pictures with annotations) and `model`."""
    folder = tmp_path_factory.mktemp("made")
    write_pictures(folder / "in", count=8)
    write_tiny_model(folder / "model")
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """The same with a run over the pictures' folder in `old`, in which two pictures were rejected."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    names(tmp_path)[0].write_bytes(b"no picture")
    names(tmp_path)[1].unlink()
    names(tmp_path)[0].with_name("unreadable.jpg").symlink_to("nowhere")
    run(tmp_path, "old")
    return tmp_path


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What is done: the keys of `read` objects, and how many persons are in each `crops` call."""
    done: dict[str, list[Any]] = {"read": [], "persons": []}
    read_object, crop_persons = storage.read_object, Predictor.crop_persons

    def noting_read(uri: str, **options: Any) -> bytes:
        done["read"].append(Path(uri).name)
        return read_object(uri, **options)

    def noting_crop(predictor: Predictor, image: Any, boxes: Any) -> Any:
        done["persons"].append(len(boxes))
        return crop_persons(predictor, image, boxes)

    monkeypatch.setattr(storage, "read_object", noting_read)
    monkeypatch.setattr(Predictor, "crop_persons", noting_crop)
    return done


def names(world: Path) -> list[Path]:
    return sorted((world / "in" / "images").iterdir())


def run(world: Path, output: str, **settings: object) -> dict[str, Any]:
    return annotate.run(AnnotateConfig(**{
        "input": str(world / "in" / "images"), "model": str(world / "model"), "output": str(world / output),
        "boxes": "whole-image", "tracking": NO_TRACKING, "pictures_per_unit": 3, "max_rejected_share": 1, **settings}))


def same_rows(world: Path, output: str, other: str) -> bool:
    return rows(str(world / output), without=("job",)).equals(rows(str(world / other), without=("job",)))


def test_a_retry_reads_and_computes_only_rejects_that_can_change(
        world: Path, work: dict[str, list[Any]]) -> None:
    (world / "in" / "images" / "unreadable.jpg").unlink()
    shutil.copy(names(world)[2], world / "in" / "images" / "unreadable.jpg")
    result = run(world, "new", reuse=str(world / "old"))
    assert [name for name in work["read"] if name.endswith(".jpg")] == ["unreadable.jpg"]
    assert work["persons"] == [1]
    assert result["counts"]["reasons"] == {"not_a_picture": 1}
    run(world, "scratch")
    assert same_rows(world, "new", "scratch")


def test_a_grown_input_computes_what_is_new_or_changed_and_forgets_what_is_gone(
        world: Path, work: dict[str, list[Any]]) -> None:
    changed, gone, source = names(world)[3], names(world)[4], names(world)[5]
    shutil.copy(source, world / "in" / "images" / "later.jpg")
    changed.write_bytes(source.read_bytes())
    os.utime(changed, ns=(1, 1))
    gone.unlink()
    run(world, "new", reuse=str(world / "old"))
    assert set(work["read"]) >= {changed.name, "later.jpg"}
    assert len(work["persons"]) == 2
    assert gone.name not in rows(str(world / "new"))["key"].to_pylist()
    run(world, "scratch")
    assert same_rows(world, "new", "scratch")


def test_another_etag_with_the_same_bytes_is_read_and_not_computed(world: Path, work: dict[str, list[Any]]) -> None:
    touched = names(world)[3]
    os.utime(touched, ns=(1, 1))
    run(world, "new", reuse=str(world / "old"))
    assert touched.name in work["read"]
    assert work["persons"] == []
    etags = {row["key"]: row["etag"] for row in rows(str(world / "new")).to_pylist()}
    assert etags[touched.name].endswith("-1")


def write_noise(folder: Path, seed: int) -> list[Path]:
    """Three pictures of noise, with the names, sizes and times that those of every other seed have."""
    folder.mkdir(parents=True)
    paths = [folder / f"{index}.bmp" for index in range(3)]
    for index, path in enumerate(paths):
        noise = np.random.default_rng([seed, index]).integers(0, 255, (60, 40, 3), np.uint8)
        path.write_bytes(cv2.imencode(".bmp", noise)[1].tobytes())
        os.utime(path, ns=(0, 10**18))
    return paths


@pytest.mark.parametrize("form", ["images", "shards", "relative.csv"])
def test_of_another_place_equal_names_sizes_and_times_say_nothing(
        made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    world = Path(shutil.copytree(made, tmp_path / "world"))
    for seed, camera in enumerate(("cam1", "cam2")):
        paths = write_noise(world / camera / "images", seed)
        monkeypatch.chdir(world / camera)
        Path("relative.csv").write_text(list_of(*(path.relative_to(world / camera) for path in paths)))
        if form == "shards":
            shard.run(ShardConfig(images=str(world / camera / "images"), output=str(world / camera / "shards"),
                                  tracking=NO_TRACKING))

    def run_camera(camera: str, output: str, **settings: object) -> None:
        monkeypatch.chdir(world / camera)
        run(world, output, input=str(world / camera / form), **settings)

    run_camera("cam1", "first")
    run_camera("cam2", "second", reuse=str(world / "first"))
    run_camera("cam2", "scratch")
    assert same_rows(world, "second", "scratch")
    assert not same_rows(world, "second", "first")


def list_of(*paths: Path) -> str:
    """A CSV of URIs whose etags are those that a disk gives."""
    return "uri,etag\n" + "".join(f"{path},{path.stat().st_size}-{path.stat().st_mtime_ns}\n" for path in paths)


def test_pictures_that_were_copied_elsewhere_are_read_and_not_computed(
        world: Path, work: dict[str, list[Any]]) -> None:
    shutil.copytree(world / "in" / "images", world / "elsewhere", symlinks=True)
    run(world, "new", input=str(world / "elsewhere"), reuse=str(world / "old"))
    assert set(work["read"]) >= {path.name for path in names(world)[1:]}
    assert work["persons"] == []


def test_what_another_list_of_the_same_objects_names_is_not_read(
        made: Path, tmp_path: Path, work: dict[str, list[Any]]) -> None:
    world = Path(shutil.copytree(made, tmp_path / "world"))
    (world / "one.csv").write_text(list_of(*names(world)[:3]))
    (world / "two.csv").write_text(list_of(*names(world)[:4]))
    run(world, "old", input=str(world / "one.csv"))
    work["read"].clear()
    run(world, "new", input=str(world / "two.csv"), reuse=str(world / "old"))
    assert [name for name in work["read"] if name.endswith(".jpg")] == [names(world)[3].name]


def test_a_trial_of_the_first_pictures_in_larger_units_is_copied_into_the_whole_run(
        made: Path, tmp_path: Path, work: dict[str, list[Any]]) -> None:
    world = Path(shutil.copytree(made, tmp_path / "world"))
    run(world, "trial", limit=5, backend="cpu")
    work["persons"].clear()
    assert run(world, "new", reuse=str(world / "trial"), pictures_per_unit=2)["counts"]["ok"] == 8
    assert work["persons"] == [1, 1, 1]


def test_a_picture_of_a_list_without_etags_is_the_same_only_if_its_bytes_are(
        made: Path, tmp_path: Path, work: dict[str, list[Any]]) -> None:
    world = Path(shutil.copytree(made, tmp_path / "world"))
    (world / "list.csv").write_text(f"uri\n{names(world)[0]}\n{names(world)[1]}\n")
    run(world, "old", input=str(world / "list.csv"), backend="cpu")
    shutil.copy(names(world)[2], names(world)[0])
    work["persons"].clear()
    run(world, "new", input=str(world / "list.csv"), reuse=str(world / "old"))
    assert work["persons"] == [1]


# --- the same intent, wherever it is asked for ---------------------------------------------------------------------


def test_what_is_left_open_is_as_the_old_run_had_it(world: Path, monkeypatch: pytest.MonkeyPatch,
                                                    work: dict[str, list[Any]]) -> None:
    monkeypatch.setattr(annotate, "actor_threads", lambda: 4)
    monkeypatch.setattr(annotate, "native_precision", lambda *, gpu: "another")
    monkeypatch.setattr(annotate, "_backend_at_hand", lambda: "another")
    run(world, "new", reuse=str(world / "old"))
    assert work["persons"] == []
    assert intent_of(world / "new") == intent_of(world / "old")


def test_what_is_asked_for_is_not_what_the_old_run_had(world: Path) -> None:
    with pytest.raises(ConfigError, match="threads: 1 there, now 2"):
        run(world, "new", reuse=str(world / "old"), threads=2)


@pytest.mark.parametrize(("backend", "remedy"), [("cuda", "run where there are GPUs"), ("openvino", "pip install")])
def test_a_backend_of_the_old_run_that_is_not_here_is_refused_before_anything_is_frozen(
        world: Path, monkeypatch: pytest.MonkeyPatch, backend: str, remedy: str) -> None:
    monkeypatch.setattr("pipeline.model.inference.has_openvino", lambda: False)
    job = json.loads((world / "old" / "_job.json").read_text())
    job["intent"]["backend"] = backend
    (world / "old" / "_job.json").write_text(json.dumps(job))
    with pytest.raises(ConfigError, match=f"computed by backend {backend}, which isn't here.*{remedy}"):
        run(world, "new", reuse=str(world / "old"))
    assert not (world / "new" / "_job.json").exists()


def intent_of(output: Path) -> Any:
    return json.loads((output / "_job.json").read_text())["intent"]


# --- poses that were left out --------------------------------------------------------------------------------------


def write_boxes(path: Path, pictures: list[str], *, moved: int | None = None) -> Path:
    """Two boxes for each picture, so alike that one pose of two is left out; `moved`: whose lesser one is another."""
    lesser = [5.0 + (index == moved) for index in range(len(pictures))]
    pq.write_table(pa.table({
        "key": pictures * 2, "x": [5.0] * len(pictures) + lesser, "y": [5.0] * 2 * len(pictures),
        "w": [40.0] * 2 * len(pictures), "h": [60.0] * 2 * len(pictures),
        "score": np.repeat([0.9, 0.8], len(pictures))}), path)
    return path


def test_pictures_of_which_poses_were_left_out_are_copied_as_long_as_all_their_boxes_are_the_same(
        made: Path, tmp_path: Path, work: dict[str, list[Any]]) -> None:
    world = Path(shutil.copytree(made, tmp_path / "world"))
    keys = [path.name for path in names(world)]
    boxes = write_boxes(world / "boxes.parquet", keys[:-1])
    first = run(world, "first", boxes=str(boxes), oks_nms=0.9)
    assert (first["counts"]["persons"], first["counts"]["suppressed"]) == (7, 7)
    work["persons"].clear()
    again = run(world, "again", boxes=str(boxes), oks_nms=0.9, reuse=str(world / "first"))
    assert (work["persons"], again["counts"]) == ([], first["counts"])
    grown = write_boxes(world / "grown.parquet", keys, moved=2)
    run(world, "grown", boxes=str(grown), oks_nms=0.9, reuse=str(world / "again"))
    assert work["persons"] == [2, 2]  # of the one whose box was moved, and of the one that has boxes now
    run(world, "scratch", boxes=str(grown), oks_nms=0.9)
    assert same_rows(world, "grown", "scratch")


def test_the_old_output_may_be_deleted_afterwards(world: Path) -> None:
    run(world, "new", reuse=str(world / "old"))
    shutil.rmtree(world / "old")
    assert run(world, "new")["units_annotated"] == 0


def test_rows_say_which_job_wrote_them_and_receipts_how_many_were_copied(
        world: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        result = run(world, "new", reuse=str(world / "old"))
    assert set(rows(str(world / "new"))["job"].to_pylist()) == {result["digest"]}
    assert "(7 copied)" in caplog.text


def test_an_old_run_of_another_intent_is_refused_with_the_difference(world: Path) -> None:
    with pytest.raises(ConfigError, match="flip: true there, now false"):
        run(world, "new", reuse=str(world / "old"), flip=False)
    assert not (world / "new").exists() or not (world / "new" / "_job.json").exists()


def test_a_place_without_a_run_cannot_be_reused(world: Path) -> None:
    with pytest.raises(ConfigError, match="no annotate run was begun there"):
        run(world, "new", reuse=str(world / "in"))


def test_only_the_committed_units_of_an_unfinished_run_are_reused(world: Path, work: dict[str, list[Any]]) -> None:
    for part in sorted((world / "old" / "keypoints").iterdir())[1:]:
        part.unlink()
    run(world, "new", reuse=str(world / "old"))
    assert len(work["persons"]) == len(rows(str(world / "new"))) - 3 - 1


def test_a_grown_shard_dataset_computes_only_what_came(made: Path, tmp_path: Path, work: dict[str, list[Any]]) -> None:
    world = Path(shutil.copytree(made, tmp_path / "world"))
    sharded(world)
    run(world, "old", input=str(world / "shards"), boxes="annotated")
    shutil.copy(names(world)[0], world / "in" / "images" / "later.jpg")
    sharded(world)
    before = work["persons"].copy()
    run(world, "new", input=str(world / "shards"), boxes="whole-image", reuse=str(world / "old"))
    assert len(work["persons"]) - len(before) == 9  # other boxes: nothing is the same
    run(world, "again", input=str(world / "shards"), boxes="annotated", reuse=str(world / "old"))
    assert len(work["persons"]) - len(before) == 9  # the one that came has no annotated person
    run(world, "scratch", input=str(world / "shards"), boxes="annotated")
    assert same_rows(world, "again", "scratch")


def test_persons_whose_annotated_box_was_moved_are_computed_again(
        made: Path, tmp_path: Path, work: dict[str, list[Any]]) -> None:
    world = Path(shutil.copytree(made, tmp_path / "world"))
    sharded(world)
    run(world, "old", input=str(world / "shards"), boxes="annotated")
    annotations = world / "in" / "annotations.json"
    values = json.loads(annotations.read_text())
    values["annotations"][0]["bbox"][2] += 3
    annotations.write_text(json.dumps(values))
    sharded(world)
    before = len(work["persons"])
    run(world, "new", input=str(world / "shards"), boxes="annotated", reuse=str(world / "old"))
    assert len(work["persons"]) - before == 1
    run(world, "scratch", input=str(world / "shards"), boxes="annotated")
    assert same_rows(world, "new", "scratch")


def test_a_shard_that_vanishes_under_way_is_its_units_failure_and_no_pictures_row(
        made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = Path(shutil.copytree(made, tmp_path / "world"))
    sharded(world)
    run(world, "old", input=str(world / "shards"), boxes="annotated")
    read_object = storage.read_object

    def gone(uri: str, **options: Any) -> bytes:
        if "/shards/part-" in uri:
            raise ObjectMissing(f"{uri}: there is no such file.")
        return read_object(uri, **options)

    monkeypatch.setattr(storage, "read_object", gone)
    with pytest.raises(OSError, match=r"units are not annotated(.|\n)*part-.*Restore the object"):
        run(world, "new", input=str(world / "shards"), reuse=str(world / "old"))  # other boxes: each one is read
    assert not (world / "new" / "keypoints").exists()


def sharded(world: Path) -> None:
    shard.run(ShardConfig(images=str(world / "in" / "images"), annotations=str(world / "in" / "annotations.json"),
                          output=str(world / "shards"), images_per_shard=4, tracking=NO_TRACKING))


def test_excluded_keys_are_not_planned(world: Path) -> None:
    (world / "out.txt").write_text(f"{names(world)[2].name}\n{names(world)[3].name}\n")
    result = run(world, "new", exclude=str(world / "out.txt"), reuse=str(world / "old"))
    assert result["counts"]["pictures"] == 6
    assert not {names(world)[2].name, names(world)[3].name} & set(rows(str(world / "new"))["key"].to_pylist())


def test_excluded_keys_are_counted_and_those_of_no_picture_are_told_with_examples(
        world: Path, caplog: pytest.LogCaptureFixture) -> None:
    (world / "out.txt").write_text(f"{names(world)[2].name}\n000003.JPG\nfolder/000004.jpg\n")
    result = run(world, "new", exclude=str(world / "out.txt"))
    assert result["given"] == {"excluded": 1, "excluded_unknown": 2}
    assert json.loads((world / "new" / "_job.json").read_text())["about"]["given"] == result["given"]
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(f"2 of the 3 keys are of no object here, such as '000003.JPG', 'folder/000004.jpg'; a key here is "
               f"{names(world)[0].name!r}" in one for one in told)


def test_a_list_of_which_no_key_is_there_is_told_to_leave_nothing_out(
        world: Path, caplog: pytest.LogCaptureFixture) -> None:
    (world / "out.txt").write_text("a.jpg\nb.jpg\n")
    assert run(world, "new", exclude=str(world / "out.txt"))["given"] == {"excluded": 0, "excluded_unknown": 2}
    assert "nothing is left out: all 2 keys" in caplog.text


def test_a_limit_that_ends_before_the_input_leaves_open_which_keys_are_there(
        world: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shard_plan.ROWS_AT_ONCE", 2)  # the last key is not even listed
    (world / "out.txt").write_text(f"{names(world)[0].name}\n{names(world)[7].name}\n")
    result = run(world, "new", exclude=str(world / "out.txt"), limit=2, pictures_per_unit=1)
    assert "excluded_unknown" not in result["given"]
    assert "no object here" not in caplog.text


def test_another_list_of_excluded_keys_is_another_input(world: Path) -> None:
    (world / "out.txt").write_text(f"{names(world)[2].name}\n")
    with pytest.raises(ConfigError, match="input: begun with"):
        run(world, "old", exclude=str(world / "out.txt"))


def test_pictures_survive_the_way_into_rows_and_back(world: Path) -> None:
    table, metadata = read_keypoints(str(world / "old"))
    pictures = list(pictures_of_table(table, metadata.skeleton))
    assert [picture.picture["key"] for picture in pictures] == sorted(set(table["key"].to_pylist()))
    first = next(picture for picture in pictures if picture.status == "ok")
    row = next(row for row in table.to_pylist() if row["key"] == first.picture["key"])
    assert first.joints_xy is not None
    np.testing.assert_array_equal(first.joints_xy[0, 0], np.float32([row["nose_x"], row["nose_y"]]))
