"""The numbers that `evaluate` gives: COCO's as COCOeval gave them for the authors' results, PCK by hand."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.evaluate import run
from pipeline.config import EvaluateConfig
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import COCO_NUMBERS, evaluate_keypoints, evaluation_metrics, format_evaluation
from pipeline.export import coco_results
from pipeline.pose.skeleton import COCO17, Skeleton
from pipeline.rows import keypoint_schema

GOLDEN = Path(__file__).parent / "golden"
TORSO3 = Skeleton(
    name="torso3",
    joints=("left_shoulder", "right_hip", "nose"),
    edges=(),
    flip_pairs=(),
    sigmas=(0.079, 0.107, 0.026),
    upper_body=(0, 1, 2),
)


def keypoint_rows(persons: list[dict[str, Any]], skeleton: Skeleton) -> pa.Table:
    """Keypoint rows from dicts of columns and `keypoints`, [x, y, score] * K; what isn't given is NULL."""
    rows = []
    for person in persons:
        row = {"key": f"{person.get('image_id')}.jpg", "status": "ok"} | person
        points = np.reshape(row.pop("keypoints", []), (-1, 3))
        for joint, point in zip(skeleton.columns(), points, strict=False):
            row |= {f"{joint}_{part}": value for part, value in zip(("x", "y", "score"), point, strict=True)}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=keypoint_schema(skeleton))


def result_rows(results: list[dict[str, Any]], images: list[int]) -> pa.Table:
    """The authors' results as keypoint rows, and a row without a person for each other picture."""
    persons = [{name: entry[name] for name in ("image_id", "score", "keypoints")} for entry in results]
    empty = sorted(set(images) - {entry["image_id"] for entry in results})
    return keypoint_rows(persons + [{"image_id": image, "status": "no_person"} for image in empty], COCO17)


def annotation(annotation_id: int, image_id: int, keypoints: list[float], **more: Any) -> dict[str, Any]:
    return {"id": annotation_id, "image_id": image_id, "category_id": 1, "bbox": [0.0, 0.0, 200.0, 200.0],
            "area": 20000.0, "iscrowd": 0, "num_keypoints": 3, "keypoints": keypoints} | more


def truth_of(*annotations: dict[str, Any], images: tuple[int, ...] = (1,)) -> dict[str, Any]:
    return {"images": [{"id": image_id} for image_id in images], "annotations": list(annotations),
            "categories": [{"id": 1, "name": "person", "keypoints": list(TORSO3.joints)}]}


def person(keypoints: list[float], **more: Any) -> dict[str, Any]:
    """A predicted person of picture 1 whose box is that of annotation 7."""
    box = {"box_id": 7, "box_x": 0.0, "box_y": 0.0, "box_w": 200.0, "box_h": 200.0}
    return {"image_id": 1, "score": 0.9, "keypoints": keypoints} | box | more


# left shoulder (0, 0) and right hip (30, 40): a torso of 50 px, so that 10 px is just right
LABELLED = [0.0, 0.0, 2.0, 30.0, 40.0, 1.0, 100.0, 100.0, 2.0]


@pytest.fixture
def golden() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    truth, results = ((GOLDEN / f"coco_{name}.json").read_text() for name in ("gt", "results"))
    return json.loads(truth), json.loads(results)


def test_the_ten_numbers_are_those_of_the_reference_evaluation(golden):
    truth, results = golden
    table = result_rows(results, [image["id"] for image in truth["images"]])

    evaluation = evaluate_keypoints(table, truth, skeleton=COCO17)

    expected = np.load(GOLDEN / "coco_eval.npz")["stats"]
    np.testing.assert_allclose([evaluation.coco[name] for name in COCO_NUMBERS], expected, atol=1e-12)


def test_rows_keep_the_authors_order_and_scores(golden):
    _, results = golden
    shuffled = [results[i] for i in np.random.default_rng(0).permutation(len(results))]

    ours = coco_results(result_rows(shuffled, []), skeleton=COCO17)

    assert [(entry["image_id"], entry["score"]) for entry in ours] == [
        (entry["image_id"], entry["score"]) for entry in results]
    np.testing.assert_allclose([entry["keypoints"] for entry in ours],
                               [entry["keypoints"] for entry in results], rtol=1e-6)


def test_perfect_predictions_score_one_and_nothing_is_printed(capsys):
    table = keypoint_rows([person(LABELLED)], TORSO3)

    evaluation = evaluate_keypoints(table, truth_of(annotation(7, 1, LABELLED)), skeleton=TORSO3)

    assert evaluation.coco["AP"] == pytest.approx(1.0)
    assert evaluation.pck == 1.0
    assert capsys.readouterr().out == ""


def test_a_size_that_no_annotated_person_has_gives_none():
    table = keypoint_rows([person(LABELLED)], TORSO3)  # area 20000: large, none medium

    evaluation = evaluate_keypoints(table, truth_of(annotation(7, 1, LABELLED)), skeleton=TORSO3)

    assert evaluation.coco["APM"] is None
    assert evaluation.coco["APL"] == pytest.approx(1.0)
    assert "apm" not in evaluation_metrics(evaluation)


def test_the_skeletons_own_sigmas_decide():
    # 10 px off at area 20000: OKS = exp(-100 / (2 * (2 sigma)^2 * 20000)); sigma .026: .40, sigma 1: 1.00
    truth = truth_of(annotation(7, 1, [0, 0, 0, 0, 0, 0, 100.0, 100.0, 2], num_keypoints=1))
    table = keypoint_rows([person([0, 0, 1, 0, 0, 1, 110.0, 100.0, 1])], TORSO3)
    lenient = Skeleton(**{**vars(TORSO3), "sigmas": (1.0, 1.0, 1.0)})

    assert evaluate_keypoints(table, truth, skeleton=TORSO3).coco["AP"] == 0.0
    assert evaluate_keypoints(table, truth, skeleton=lenient).coco["AP"] == pytest.approx(1.0)


def test_pictures_that_were_not_annotated_do_not_count_but_refused_ones_do():
    truth = truth_of(annotation(7, 1, LABELLED), annotation(8, 2, LABELLED), annotation(9, 3, LABELLED),
                     images=(1, 2, 3))
    refused = {"image_id": 2, "status": "rejected", "reason": "corrupt"}
    elsewhere = [{"image_id": 50, "status": "no_person"}, {"image_id": None, "status": "no_person"}]

    evaluation = evaluate_keypoints(keypoint_rows([person(LABELLED), refused, *elsewhere], TORSO3), truth,
                                    skeleton=TORSO3)

    assert evaluation.counts == {
        "pictures": 2, "persons": 2, "predictions": 1, "truth_images_not_in_table": 1,
        "pictures_not_in_truth": 1, "rows_without_image_id": 1, "rows_matched": 1}
    assert evaluation.coco["AR"] == pytest.approx(0.5)  # one of two persons found


def test_no_prediction_at_all_is_zero_not_an_error():
    table = keypoint_rows([{"image_id": 1, "status": "no_person"}], TORSO3)

    evaluation = evaluate_keypoints(table, truth_of(annotation(7, 1, LABELLED)), skeleton=TORSO3)

    assert (evaluation.coco["AP"], evaluation.coco["AR"], evaluation.pck) == (0.0, 0.0, None)


def test_crowds_and_persons_without_keypoints_do_not_count():
    truth = truth_of(annotation(7, 1, LABELLED), annotation(8, 1, LABELLED, iscrowd=1),
                     {"id": 9, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81.0})

    evaluation = evaluate_keypoints(keypoint_rows([person(LABELLED)], TORSO3), truth, skeleton=TORSO3)

    assert evaluation.counts["persons"] == 1
    assert evaluation.coco["AR"] == pytest.approx(1.0)


def test_pck_counts_joints_within_a_fifth_of_the_torso():
    # shoulder 10 px off: just right; hip 11 px off: wrong; nose exact
    predicted = [10.0, 0.0, 0.5, 41.0, 40.0, 0.7, 100.0, 100.0, 0.9]

    evaluation = evaluate_keypoints(keypoint_rows([person(predicted)], TORSO3),
                                    truth_of(annotation(7, 1, LABELLED)), skeleton=TORSO3)

    assert evaluation.pck == pytest.approx(2 / 3)
    assert [joint.pck for joint in evaluation.joints] == [1.0, 0.0, 1.0]
    assert [joint.error_px for joint in evaluation.joints] == pytest.approx([10.0, 11.0, 0.0])
    assert [joint.score for joint in evaluation.joints] == pytest.approx([0.5, 0.7, 0.9], abs=1e-6)
    assert [joint.num_labelled for joint in evaluation.joints] == [1, 1, 1]


@pytest.mark.parametrize("torso", [
    [0.0, 0.0, 0.0, 30.0, 40.0, 2.0],  # the shoulder isn't labelled
    [30.0, 40.0, 2.0, 30.0, 40.0, 2.0],  # both at one place
])  # fmt: skip
def test_a_person_without_a_torso_has_errors_but_no_pck(torso):
    evaluation = evaluate_keypoints(
        keypoint_rows([person([0, 0, 1, 0, 0, 1, 103.0, 104.0, 1])], TORSO3),
        truth_of(annotation(7, 1, [*torso, 100.0, 100.0, 2.0])), skeleton=TORSO3)

    assert evaluation.pck is None
    assert evaluation.pck_reason == "no matched person has both torso joints labelled"
    assert evaluation.joints[2].error_px == pytest.approx(5.0)


def test_joints_without_a_torso_have_errors_and_no_pck_and_it_is_said_why():
    hand = Skeleton("hand", ("thumb", "wrist"), (), (), (0.1, 0.1), ())
    truth = truth_of(annotation(7, 1, [0.0, 0.0, 2, 30.0, 40.0, 2]))
    truth["categories"][0]["keypoints"] = list(hand.joints)

    evaluation = evaluate_keypoints(keypoint_rows([person([3.0, 4.0, 1, 30.0, 40.0, 1])], hand), truth, skeleton=hand)

    assert (evaluation.pck, [joint.pck for joint in evaluation.joints]) == (None, [None, None])
    assert [joint.error_px for joint in evaluation.joints] == pytest.approx([5.0, 0.0])
    assert evaluation.pck_reason == "the skeleton 'hand' has no left_shoulder and right_hip to measure a torso by"


def test_boxes_that_are_not_annotated_ones_give_no_pck_even_if_an_index_is_an_annotations_id():
    detected = person(LABELLED, box_x=3.0)

    evaluation = evaluate_keypoints(keypoint_rows([detected], TORSO3), truth_of(annotation(7, 1, LABELLED)),
                                    skeleton=TORSO3)

    assert evaluation.pck is None
    assert "annotated" in evaluation.pck_reason
    assert evaluation.coco["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(("other", "pck"), [
    ({"box_x": 0.01, "box_h": 199.99}, 1.0), ({"box_x": 0.02}, None), ({"box_h": 199.98}, None),
    ({"image_id": 2}, None), ({"box_id": 8}, None), ({"box_id": 6}, None)])
def test_a_row_is_an_annotations_by_id_picture_and_box_to_the_two_decimals_of_files(other, pck):
    truth = truth_of(annotation(7, 1, LABELLED), images=(1, 2))

    evaluation = evaluate_keypoints(keypoint_rows([person(LABELLED, **other)], TORSO3), truth, skeleton=TORSO3)

    assert evaluation.pck == pck


def test_an_annotation_without_area_has_its_boxs():
    truth = truth_of(annotation(7, 1, LABELLED, bbox=[0.0, 0.0, 50.0, 60.0]))
    del truth["annotations"][0]["area"]

    evaluation = evaluate_keypoints(keypoint_rows([person(LABELLED)], TORSO3), truth, skeleton=TORSO3)

    # COCO's medium: 32 to 96 px squared; 3000 is, 50 + 60 and 200 * 200 are not
    assert (evaluation.coco["APM"], evaluation.coco["APL"]) == (pytest.approx(1.0), None)


def test_annotations_of_another_category_are_nobody_and_names_of_joints_may_be_in_capitals():
    truth = truth_of(annotation(7, 1, LABELLED), {"id": 8, "image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5]})
    truth["categories"] = [{"id": 2, "name": "dog", "keypoints": ["tail"]}, {"id": 3, "name": "chair"},
                           truth["categories"][0] | {"keypoints": [name.upper() for name in TORSO3.joints]}]
    titled = Skeleton(**{**vars(TORSO3), "joints": tuple(name.title() for name in TORSO3.joints)})

    evaluation = evaluate_keypoints(keypoint_rows([person(LABELLED)], titled), truth, skeleton=titled)

    assert evaluation.counts["persons"] == 1
    assert evaluation.coco["AP"] == pytest.approx(1.0)


def test_a_joints_score_is_the_mean_over_all_persons_of_evaluated_pictures_and_its_error_over_those_matched():
    rows = [person([*LABELLED[:2], 0.5, *LABELLED[3:5], 0.5, 103.0, 104.0, 0.5]),
            person([5.0, 5.0, 1.0] * 3, box_id=None), person([0.0, 0.0, 9.0] * 3, image_id=2)]

    evaluation = evaluate_keypoints(keypoint_rows(rows, TORSO3), truth_of(annotation(7, 1, LABELLED)), skeleton=TORSO3)

    assert [joint.score for joint in evaluation.joints] == [0.75] * 3
    assert [joint.error_px for joint in evaluation.joints] == pytest.approx([0.0, 0.0, 5.0])
    assert "not counted: 1 pictures not in truth" in format_evaluation(evaluation)


def test_an_annotation_with_id_0_counts_as_any_other():
    table = keypoint_rows([person(LABELLED, box_id=0)], TORSO3)

    evaluation = evaluate_keypoints(table, truth_of(annotation(0, 1, LABELLED)), skeleton=TORSO3)

    assert evaluation.coco["AP"] == pytest.approx(1.0)


def test_the_order_of_the_annotations_does_not_matter(golden):
    truth, results = golden
    table = result_rows(results, [image["id"] for image in truth["images"]])
    backwards = truth | {"annotations": truth["annotations"][::-1]}

    assert evaluate_keypoints(table, backwards, skeleton=COCO17) == evaluate_keypoints(table, truth, skeleton=COCO17)


def test_the_truth_is_not_modified(golden):
    truth, results = golden
    before = copy.deepcopy(truth)

    evaluate_keypoints(result_rows(results, []), truth, skeleton=COCO17)

    assert truth == before


def test_annotations_for_other_joints_are_refused_with_both_lists():
    truth = truth_of(annotation(7, 1, LABELLED))
    with pytest.raises(DataError, match=r"nose.*left_shoulder, right_hip, nose"):
        evaluate_keypoints(keypoint_rows([], COCO17), truth, skeleton=COCO17)


def test_a_table_with_none_of_the_annotated_pictures_is_refused():
    with pytest.raises(DataError, match=r"none of the 1 annotated pictures.*1 of 1 rows have none"):
        evaluate_keypoints(keypoint_rows([person(LABELLED, image_id=None)], TORSO3),
                           truth_of(annotation(7, 1, LABELLED)), skeleton=TORSO3)


@pytest.mark.parametrize(("truth", "says"), [
    ({"images": []}, "annotations, categories"),
    (truth_of(annotation(7, 1, [1.0, 2.0])), "9 numbers"),
    (truth_of({"id": 7, "image_id": 1, "category_id": 1}), "bbox"),
])  # fmt: skip
def test_a_misshapen_truth_is_refused(truth, says):
    with pytest.raises(DataError, match=says):
        evaluate_keypoints(keypoint_rows([person(LABELLED)], TORSO3), truth, skeleton=TORSO3)


def test_the_text_shows_every_joint_and_why_there_is_no_pck():
    table = keypoint_rows([person(LABELLED, box_id=None)], TORSO3)

    text = format_evaluation(evaluate_keypoints(table, truth_of(annotation(7, 1, LABELLED)), skeleton=TORSO3))

    assert "AP    1.000" in text
    assert "APM  -" in text
    assert "PCK@0.2 -  (no row's box is an annotated one" in text
    assert all(joint in text for joint in TORSO3.joints)


# --- the job ---------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> dict[str, str]:
    """A keypoint dataset with one person, 0.5 px off at most, and its annotations."""
    from tests.test_export import POINTS, picture, write_keypoints

    keys = write_keypoints(tmp_path / "keypoints", [picture("a.jpg", 1, scores=(1.0,))])
    labelled = [value if index % 3 < 2 else 2 for index, value in enumerate(POINTS)]
    truth = truth_of(annotation(0, 1, labelled, bbox=[0.0, 0.0, 20.0, 10.0]))
    (tmp_path / "annotations.json").write_text(json.dumps(truth))
    return {"keypoints": keys, "annotations": str(tmp_path / "annotations.json")}


def test_the_job_gives_the_numbers_and_prints_them_on_stderr(world, capsys):
    result = run(EvaluateConfig(**world, tracking={"enabled": False}))

    assert result["ap"] == pytest.approx(1.0)
    assert result["apm"] is None
    assert result["pck"] == 1.0
    assert result["run_id"] is None
    assert json.loads(json.dumps(result)) == result
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "AP    1.000" in printed.err


@pytest.mark.parametrize(("content", "says"), [("{", "not JSON"), ("[]", "expected a COCO keypoint file")])
def test_annotations_that_are_no_coco_file_are_refused_by_name(world, content, says):
    Path(world["annotations"]).write_text(content)
    with pytest.raises(DataError, match=says):
        run(EvaluateConfig(**world, tracking={"enabled": False}))


def test_annotations_that_are_not_there_are_refused(world):
    with pytest.raises(ConfigError, match=r"gone\.json"):
        run(EvaluateConfig(**world | {"annotations": "/gone.json"}, tracking={"enabled": False}))
