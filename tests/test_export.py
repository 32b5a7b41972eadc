"""Keypoint rows in other tools' formats."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.export import run
from pipeline import keypoints, storage, units
from pipeline.config import ExportConfig
from pipeline.errors import ConfigError, DataError
from pipeline.export import FORMATS, coco_results, export_keypoints
from pipeline.pose.skeleton import Skeleton
from pipeline.rows import AnnotatedPicture, Boxes
from tests.test_evaluation import TORSO3, keypoint_rows

POINTS = [1.5, 2.25, 0.9, 3.0, 4.0, 0.8, 12.3, 6.0, 0.7]


def picture(key: str, image_id: int | None, *, scores: tuple[float, ...] = (), **more: Any) -> AnnotatedPicture:
    """A picture with a person for each box score, all with the joints of POINTS (mean joint score 0.8)."""
    about = {"key": key, "image_id": image_id, "etag": "e", "sha256": None, "width": 20, "height": 10} | more
    joints = np.tile(np.reshape(POINTS, (1, 3, 3)), (len(scores), 1, 1)).astype(np.float32)
    boxes = Boxes(np.arange(len(scores)), np.tile([[0.0, 0.0, 20.0, 10.0]], (len(scores), 1)), np.array(scores))
    return AnnotatedPicture(about, "ok" if scores else "no_person", None, None, boxes, joints[..., :2], joints[..., 2])


def write_keypoints(output: Path | str, pictures: list[AnnotatedPicture], skeleton: Skeleton = TORSO3, *,
                    source: dict[str, Any] | None = None) -> str:
    """A committed keypoint dataset of one unit."""
    planned = [{"key": one.picture["key"], "etag": "e", "size": 1} for one in pictures]
    job = units.freeze_job(str(output), [pa.Table.from_pylist(planned)], intent={},
                           input=source or {"kind": "prefix", "uri": "/nowhere"})
    data = keypoints.part_bytes(pictures, skeleton, job=job.digest,
                                model={"name": "mspn", "version": "3", "digest": "0" * 64})
    storage.put_if_absent(storage.join(str(output), keypoints.FOLDER, job.part_name(0)), data)
    return str(output)


def test_coco_results_hold_each_person_with_image_category_points_and_score():
    table = keypoint_rows([{"image_id": 7, "score": 0.5, "keypoints": POINTS}], TORSO3)

    assert coco_results(table, skeleton=TORSO3) == [
        {"image_id": 7, "category_id": 1, "keypoints": POINTS, "score": 0.5}]


def test_coco_results_are_ordered_by_picture_and_score_descending():
    rows = [{"image_id": image_id, "score": score, "keypoints": POINTS}
            for image_id, score in [(1, 0.2), (2, 0.1), (1, 0.9), (2, 0.3)]]

    results = coco_results(keypoint_rows(rows, TORSO3), skeleton=TORSO3)

    assert [(entry["image_id"], entry["score"]) for entry in results] == [(2, 0.3), (2, 0.1), (1, 0.9), (1, 0.2)]


def test_pictures_without_persons_have_no_entry_and_absent_joints_are_zero():
    rows = [{"image_id": 1, "status": "no_person"}, {"image_id": None, "status": "rejected"},
            {"image_id": 2, "score": 0.5, "keypoints": POINTS[:6]}]

    results = coco_results(keypoint_rows(rows, TORSO3), skeleton=TORSO3)

    assert [entry["keypoints"] for entry in results] == [[*POINTS[:6], 0.0, 0.0, 0.0]]


def test_persons_without_an_image_id_are_refused_with_their_number_and_the_remedy():
    rows = [{"key": "a.jpg", "image_id": None, "score": 0.5, "keypoints": POINTS},
            {"image_id": 2, "score": 0.5, "keypoints": POINTS}]

    with pytest.raises(DataError, match=r"1 of 2 person rows have no image_id.*a\.jpg.*--annotations"):
        coco_results(keypoint_rows(rows, TORSO3), skeleton=TORSO3)


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="coco-results"):
        export_keypoints(keypoint_rows([], TORSO3), "yolo", skeleton=TORSO3)


def test_the_file_is_what_pycocotools_reads(tmp_path):
    from pycocotools.coco import COCO

    keys = write_keypoints(tmp_path / "keypoints", [picture("a.jpg", 1, scores=(0.5, 1.0)), picture("b.jpg", 2)])

    result = run(ExportConfig(keypoints=keys, to="coco-results", output=str(tmp_path / "results.json")))

    truth = COCO()
    truth.dataset = {"images": [{"id": 1}, {"id": 2}], "annotations": [], "categories": []}
    truth.createIndex()
    loaded = truth.loadRes(result["output"])
    assert result["persons"] == len(loaded.anns) == 2
    assert [entry["score"] for entry in loaded.dataset["annotations"]] == pytest.approx([0.8, 0.4])


def test_an_existing_file_is_refused_and_kept(tmp_path):
    keys = write_keypoints(tmp_path / "keypoints", [picture("a.jpg", 1, scores=(0.5,))])
    output = tmp_path / "results.json"
    output.write_text("mine")

    with pytest.raises(ConfigError, match="never replaced"):
        run(ExportConfig(keypoints=keys, to="coco-results", output=str(output)))

    assert output.read_text() == "mine"


def test_every_format_of_the_command_line_is_in_the_registry():
    from typing import get_args

    assert set(get_args(ExportConfig.model_fields["to"].annotation)) == set(FORMATS)


def test_numbers_are_written_short():
    data = export_keypoints(keypoint_rows([{"image_id": 1, "score": 0.5, "keypoints": POINTS}], TORSO3),
                            "coco-results", skeleton=TORSO3).data

    assert json.loads(data)[0]["keypoints"][6] == 12.3
    assert b"12.3," in data


def test_a_setting_that_the_format_has_no_use_for_is_refused_by_name(tmp_path):
    keys = write_keypoints(tmp_path / "keypoints", [picture("a.jpg", 1, scores=(0.5,))])

    with pytest.raises(ConfigError, match="--to coco-results has no use for min_score; its settings: none"):
        run(ExportConfig(keypoints=keys, to="coco-results", output=str(tmp_path / "file"), min_score=0.7))


@pytest.mark.parametrize(("to", "name"), [("cvat", "out.json"), ("coco-results", "out.zip")])
def test_a_name_that_ends_as_another_kind_of_file_is_refused(tmp_path, to, name):
    keys = write_keypoints(tmp_path / "keypoints", [picture("a.jpg", 1, scores=(0.5,))])

    with pytest.raises(ConfigError, match=f"{to} is a .* file"):
        run(ExportConfig(keypoints=keys, to=to, output=str(tmp_path / name)))


def test_the_job_says_how_many_pictures_and_persons_the_file_holds(tmp_path):
    keys = write_keypoints(tmp_path / "keypoints", [picture("a.jpg", 1, scores=(0.5, 0.9)), picture("b.jpg", 2)])

    result = run(ExportConfig(keypoints=keys, to="yolo-pose", output=str(tmp_path / "yolo.zip")))

    assert (result["pictures"], result["persons"], result["left_out"]) == (2, 2, 0)
    assert result["bytes"] == (tmp_path / "yolo.zip").stat().st_size
