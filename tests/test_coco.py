"""What becomes of each entry of a COCO keypoint file, flawless or not, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.coco import (
    FATES,
    AnnotatedImage,
    Detection,
    Person,
    coco_json,
    parse_annotations,
    parse_detections,
)
from pipeline.errors import DataError
from pipeline.pose.skeleton import COCO17, MPII16, skeleton_from_category


def image(image_id: Any = 1, **changes: Any) -> dict[str, Any]:
    return {"id": image_id, "file_name": f"{image_id}.jpg", "width": 100, "height": 80, **changes}


def person(annotation_id: Any = 7, **changes: Any) -> dict[str, Any]:
    entry = {
        "id": annotation_id,
        "image_id": 1,
        "category_id": 1,
        "bbox": [10.25, 20, 30, 40],
        "area": 600.5,
        "iscrowd": 0,
        "num_keypoints": 2,
        "keypoints": [12.1, 21, 2, 13, 22.3, 1],
    }
    return {key: value for key, value in {**entry, **changes}.items() if value is not ...}


CATEGORY = {"id": 1, "name": "person", "keypoints": ["nose", "tail"], "skeleton": [[1, 2]]}


def document(**changes: Any) -> bytes:
    return json.dumps({"images": [image()], "annotations": [person()], "categories": [CATEGORY], **changes}).encode()


def counted(**changes: Any) -> dict[str, int]:
    """The counts that differ from those of the flawless document."""
    plain = parse_annotations(document(), source="a.json").counts
    counts = parse_annotations(document(**changes), source="a.json").counts
    return {name: counts[name] - plain[name] for name in counts if counts[name] != plain[name]}


def test_a_person_is_read_to_the_last_digit() -> None:
    annotations = parse_annotations(document(), source="a.json")
    expected = Person(7, (10.25, 20.0, 30.0, 40.0), 600.5, False, 2, (12.1, 21.0, 2.0, 13.0, 22.3, 1.0))
    assert annotations.images == {"1.jpg": AnnotatedImage(1, "1.jpg", 100, 80, (expected,))}
    assert annotations.skeleton.joints == ("nose", "tail")
    assert annotations.counts == {**dict.fromkeys(FATES, 0), "images": 1, "persons": 1}


def test_ids_beyond_float_precision_stay_exact() -> None:
    large = 2**53 + 1
    found = parse_annotations(
        document(images=[image(large, file_name="a.jpg")], annotations=[person(large + 2, image_id=large)]),
        source="a.json",
    ).images["a.jpg"]
    assert (found.image_id, found.persons[0].annotation_id) == (large, large + 2)


def test_crowds_stay_and_are_counted() -> None:
    crowd = person(iscrowd=1, segmentation={"counts": [1], "size": [1, 1]})
    assert counted(annotations=[crowd]) == {"crowds": 1}
    assert parse_annotations(document(annotations=[crowd]), source="a.json").images["1.jpg"].persons[0].iscrowd


@pytest.mark.parametrize("keypoints", [..., None, [], [0, 0, 0, 0, 0, 0]])
def test_a_person_without_keypoints_stays_with_none(keypoints: Any) -> None:
    entry = person(keypoints=keypoints, num_keypoints=0)
    assert counted(annotations=[entry]) == {"persons_without_keypoints": 1}
    found = parse_annotations(document(annotations=[entry]), source="a.json").images["1.jpg"].persons[0]
    assert found.keypoints is None
    assert found.num_keypoints == 0


@pytest.mark.parametrize("box", [[100, 0, 5, 5], [0, 80, 5, 5], [-9, 0, 9, 5], [0, -9, 5, 9]])
def test_a_box_outside_of_the_picture_stays_and_is_counted(box: list[int]) -> None:
    assert counted(annotations=[person(bbox=box)]) == {"boxes_outside_picture": 1}


def test_a_box_that_reaches_out_of_the_picture_is_neither_clipped_nor_counted() -> None:
    entry = person(bbox=[-5, -5, 500, 500])
    assert counted(annotations=[entry]) == {}
    found = parse_annotations(document(annotations=[entry]), source="a.json").images["1.jpg"].persons[0]
    assert found.box_xywh == (-5, -5, 500, 500)


@pytest.mark.parametrize("box", [..., None, [5, 5, 0, 10], [5, 5, 10, -1]])
def test_a_person_without_a_box_is_left_out(box: Any) -> None:
    assert counted(annotations=[person(bbox=box)]) == {"persons": -1, "persons_without_box": 1}


def test_a_missing_area_is_that_of_the_box() -> None:
    entry = person(area=...)
    assert counted(annotations=[entry]) == {"areas_from_boxes": 1}
    found = parse_annotations(document(annotations=[entry]), source="a.json").images["1.jpg"].persons[0]
    assert found.area == 30 * 40


def test_missing_iscrowd_and_num_keypoints_follow_from_the_rest() -> None:
    entry = person(iscrowd=..., num_keypoints=...)
    assert parse_annotations(document(annotations=[entry]), source="a").images == (
        parse_annotations(document(), source="a").images
    )


def test_an_annotation_for_a_missing_image_is_left_out() -> None:
    assert counted(annotations=[person(), person(8, image_id=2)]) == {"annotations_without_image": 1}


def test_an_annotation_of_another_category_is_left_out() -> None:
    dog = {"id": 18, "name": "dog"}
    changes = {"categories": [CATEGORY, dog], "annotations": [person(), person(8, category_id=18)]}
    assert counted(**changes) == {"annotations_of_other_categories": 1}


def test_the_first_of_two_annotations_with_one_id_counts() -> None:
    twice = [person(), person(area=1.0)]
    assert counted(annotations=twice) == {"annotations_with_repeated_id": 1}
    persons = parse_annotations(document(annotations=twice), source="a.json").images["1.jpg"].persons
    assert [one.area for one in persons] == [600.5]


def test_the_first_of_two_images_with_one_id_counts() -> None:
    twice = [image(), image(file_name="other.jpg")]
    assert counted(images=twice) == {"images_with_repeated_id": 1}
    assert list(parse_annotations(document(images=twice), source="a.json").images) == ["1.jpg"]


def test_the_first_of_two_images_with_one_name_counts_and_the_others_annotations_have_no_image() -> None:
    changes = {
        "images": [image(), image(2, file_name="1.jpg")],
        "annotations": [person(), person(8, image_id=2)],
    }
    assert counted(**changes) == {"images_with_repeated_name": 1, "annotations_without_image": 1}


def test_a_picture_without_annotations_is_there_with_no_persons() -> None:
    bare = {"id": 1, "file_name": "1.jpg"}
    found = parse_annotations(document(annotations=[], images=[bare]), source="a.json")
    assert found.images["1.jpg"] == AnnotatedImage(1, "1.jpg", None, None, ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [image("0001")]}, r"images\[0\] \('0001.jpg'\): `id`.*'0001' \(str\)"),
        ({"images": [image(1.0)]}, r"`id` must be an integer.*1\.0 \(float\)"),
        ({"images": [image(True)]}, r"`id` must be an integer"),
        ({"images": [image(2**63)]}, r"`id` must be an integer of 64 bits"),
        ({"images": [{"id": 1}]}, r"images\[0\].*`file_name`.*missing"),
        ({"images": [image(width=-3)]}, r"`width`.*positive.*-3"),
        ({"images": ["1.jpg"]}, r"images\[0\]: must be an object"),
        ({"images": {}}, r"`images` must be a list"),
        ({"annotations": None}, r"`annotations` must be a list"),
        ({"annotations": [person("x")]}, r"annotations\[0\] \(id 'x'\): `id`"),
        ({"annotations": [person(image_id="1")]}, r"annotations\[0\].*`image_id`"),
        (
            {"annotations": [person(), person(8, bbox=[1, 2, 3])]},
            r"annotations\[1\] \(id 8\): `bbox`.*list of 3",
        ),
        ({"annotations": [person(bbox=[1, 2, 3, "4"])]}, r"`bbox` must be 4 finite numbers"),
        ({"annotations": [person(bbox=[1, 2, 3, 10**400])]}, r"`bbox` must be 4 finite numbers"),
        ({"annotations": [person(keypoints=[1, 2, 2])]}, r"`keypoints` must be 6 finite numbers.*list of 3"),
        ({"annotations": [person(keypoints=[1, 2, 3, 0, 0, 0])]}, r"visibilities must be 0, 1 or 2.*3\.0"),
        ({"annotations": [person(area="big")]}, r"`area`.*'big'"),
        ({"annotations": [person(category_id=...)]}, r"`category_id`.*missing"),
        ({"categories": []}, r"one category with `keypoints`, but 0"),
        ({"categories": [CATEGORY, {**CATEGORY, "id": 2, "name": "cat"}]}, r"2 have them.*'person', 'cat'"),
        ({"categories": [{**CATEGORY, "keypoints": ["nose", 3]}]}, r"names, but is \['nose', 3\]"),
    ],
)
def test_what_is_not_coco_is_refused_with_source_entry_and_flaw(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^s3://b/a.json: .*{message}"):
        parse_annotations(document(**changes), source="s3://b/a.json")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"3", b'{"images": NaN}', b"[" * 100_000])
def test_what_is_not_json_or_no_object_is_refused_by_source(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^s3://b/a.json: "):
        parse_annotations(data, source="s3://b/a.json")


def test_coco_json_brings_back_images_and_persons() -> None:
    images = [
        AnnotatedImage(5, "a/b.jpg", 640, 480, (
            Person(2**53 + 1, (0.1, 0.2, 30.0, 40.7), 600.123456789, False, 1, (0.1 + 0.2, 5, 2) + (0,) * 48),
            Person(4, (1.0, 2.0, 3.0, 4.0), 12.0, True, 0, None),
        )),
        AnnotatedImage(6, "c.jpg", None, None, ()),
    ]  # fmt: skip
    found = parse_annotations(json.dumps(coco_json(images, COCO17)).encode(), source="again")
    assert list(found.images.values()) == images
    assert found.skeleton is COCO17


@pytest.mark.parametrize(
    "skeleton",
    [MPII16, skeleton_from_category({"name": "dog", "keypoints": ["l_paw", "r_paw"], "skeleton": [[1, 2]]})],
)
def test_coco_json_brings_back_other_skeletons(skeleton: Any) -> None:
    empty = json.dumps(coco_json([], skeleton)).encode()
    assert parse_annotations(empty, source="again").skeleton == skeleton


def test_coco_json_counts_edges_from_one_and_writes_whole_numbers_as_integers() -> None:
    one = Person(1, (1.0, 2.0, 3.5, 4.0), 12.0, False, 1, (7.0, 8.0, 2.0) + (0.0,) * 48)
    written = coco_json([AnnotatedImage(1, "a.jpg", 9, 9, (one,))], COCO17)
    assert written["categories"][0]["skeleton"][0] == [16, 14]  # COCO's own first edge
    assert json.dumps(written["annotations"][0]["bbox"]) == "[1, 2, 3.5, 4]"
    assert json.dumps(written["annotations"][0]["keypoints"][:3]) == "[7, 8, 2]"


@pytest.mark.parametrize(
    ("name", "joints", "counts"),
    [
        ("coco17_mini/annotations/person_keypoints_val.json", 17,
         {"images": 155, "persons": 572, "persons_without_keypoints": 572 - 459}),
        ("lspet14/annotations/person_keypoints_val.json", 14, {"images": 361, "persons": 361}),
    ],
)  # fmt: skip
def test_real_files_give_the_numbers_that_are_known_of_them_and_come_back(
    shared: Path, name: str, joints: int, counts: dict[str, int]
) -> None:
    found = parse_annotations((shared / "data" / name).read_bytes(), source=name)
    assert found.skeleton.num_joints == joints
    assert {fate: found.counts[fate] for fate in counts} == counts
    written = json.dumps(coco_json(found.images.values(), found.skeleton)).encode()
    assert parse_annotations(written, source="again").images == found.images


def test_detections_have_their_picture_and_their_place_in_the_file() -> None:
    entries = [
        {"image_id": 2, "category_id": 1, "bbox": [0, 1, 2.5, 3], "score": 0.5},
        {"image_id": 2, "category_id": 18, "bbox": [0, 1, 2, 3], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [4, 5, 6, 7], "score": 1},
        {"image_id": 2, "category_id": 1, "bbox": [0, 0, 0, 0], "score": 0.0},
    ]
    assert list(parse_detections([json.dumps(entries).encode()], source="d.json")) == [
        Detection(0, 2, (0.0, 1.0, 2.5, 3.0), 0.5),
        Detection(2, 1, (4.0, 5.0, 6.0, 7.0), 1.0),
        Detection(3, 2, (0.0, 0.0, 0.0, 0.0), 0.0),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_id": "2", "category_id": 1, "bbox": [0, 1, 2, 3], "score": 1}, "entry 0: `image_id`.*'2'"),
        ({"image_id": 2, "category_id": 1, "bbox": [0, 1, 2], "score": 1}, "entry 0: `bbox`"),
        ({"image_id": 2, "category_id": 1, "bbox": [0, 1, 2, 3]}, "entry 0: `score`.*missing"),
        ({"image_id": 2, "bbox": [0, 1, 2, 3], "score": 1}, "entry 0: `category_id`.*missing"),
        ([1], "entry 0: must be an object"),
    ],
)
def test_a_detection_of_another_form_is_refused_by_its_place(entry: object, message: str) -> None:
    with pytest.raises(DataError, match=f"^d.json: {message}"):
        list(parse_detections([json.dumps([entry]).encode()], source="d.json"))


def test_an_annotation_file_in_place_of_detections_is_refused() -> None:
    with pytest.raises(DataError, match="detections are a list"):
        list(parse_detections([document()], source="d.json"))


# Files that are broken, at scale, or found elsewhere


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"images": [],\n "annotations": oops}', r"not JSON: Expecting value: line 2 column 17 \(.*36 bytes"),
        (document()[:-100], r"not JSON: .*line 1 column \d+"),
        (document()[: len(document()) // 2], r"not JSON: .*line 1 column \d+"),
        (document(annotations=[person(area=float("nan"))]), "not JSON: NaN is not a number that JSON knows"),
        (document(annotations=[person(area=float("inf"))]), "not JSON: Infinity is not"),
        (document().replace(b"600.5", b"1e999"), r"annotations\[0\] \(id 7\): `area` must be a finite number.*inf"),
        (document().replace(b"10.25", b"1e999"), r"annotations\[0\] \(id 7\): `bbox` must be 4 finite numbers.*inf"),
        (document().replace(b"10.25", b"-1e999"), r"annotations\[0\] \(id 7\): `bbox` must be 4 finite numbers.*inf"),
        (document().replace(b"22.3", b"true"), r"annotations\[0\] \(id 7\): `keypoints` must be 6 finite.*True"),
        (document().replace(b"22.3", b"null"), r"annotations\[0\] \(id 7\): `keypoints` must be 6 finite.*None"),
        (document(annotations={"0": person()}), "`annotations` must be a list, but is .*dict"),
        (document(annotations=[[person()]]), r"annotations\[0\]: must be an object"),
        (document().decode().encode("utf-16")[:99], "not JSON"),
    ],
)
def test_a_broken_file_is_refused_with_the_place_and_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"^s3://b/a.json: {message}"):
        parse_annotations(data, source="s3://b/a.json")


def test_outlines_are_left_unread() -> None:
    outlined = person(segmentation=[[1.5, 2.5, "not even a number"]])
    assert counted(annotations=[outlined]) == {}


MEASURED_PARSE = """
import resource, sys, time
from pathlib import Path
from pipeline.coco import parse_annotations
data = Path(sys.argv[1]).read_bytes()
start = time.process_time()
counts = parse_annotations(data, source="large").counts
seconds = time.process_time() - start
print(counts["images"], counts["persons"], seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_large_file(path: Path, *, num_images: int, num_persons: int, num_corners: int) -> None:
    """As COCO's train2017, where an outline has 60 corners or so, and each picture two addresses."""
    outline = json.dumps([[round(100 + 0.37 * number, 2) for number in range(2 * num_corners)]])
    address = "http://images.cocodataset.org/train2017/000000000000.jpg"
    with path.open("w") as file:
        file.write('{"images": [')
        images = (image(number, coco_url=address, flickr_url=address) for number in range(num_images))
        file.write(", ".join(map(json.dumps, images)))
        file.write('], "annotations": [')
        for number in range(num_persons):
            keypoints = [(number * 7 + joint) % 640 for joint in range(51)]
            keypoints[2::3] = [joint % 3 for joint in range(17)]
            one = person(10**6 + number, image_id=number % num_images, keypoints=keypoints, bbox=[number / 7, 1, 2, 3])
            file.write((", " if number else "") + json.dumps(one)[:-1] + f', "segmentation": {outline}}}')
        category = {**CATEGORY, "keypoints": list(COCO17.joints), "skeleton": []}
        file.write(f'], "categories": [{json.dumps(category)}]}}')


@pytest.mark.slow
def test_a_file_as_large_as_cocos_own_takes_less_than_two_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "person_keypoints_large.json"
    write_large_file(path, num_images=57_000, num_persons=150_000, num_corners=75)
    assert 220e6 < path.stat().st_size < 260e6
    command = [sys.executable, "-c", MEASURED_PARSE, str(path)]
    root = Path(__file__).resolve().parents[1]
    measured = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    num_images, num_persons, seconds, peak_bytes = map(float, measured.stdout.split())
    print(f"{path.stat().st_size / 1e6:.0f} MB: {seconds:.1f} s of one core, peak {peak_bytes / 1e6:.0f} MB")
    assert (num_images, num_persons) == (57_000, 150_000)
    assert peak_bytes < 2e9


# How many pictures and persons there are, or for what reason it is none of ours
FOUND_FILES: dict[str, tuple[int, int] | str] = {
    "coco17_mini/annotations/person_keypoints_train.json": (197, 772),
    "coco17_mini/annotations/person_keypoints_val.json": (155, 572),
    "coco_annotations_only/person_keypoints_val2017_rebuilt.json": (2209, 5919),
    "lspet14/annotations/person_keypoints_train.json": (5115, 5115),
    "lspet14/annotations/person_keypoints_train_as_coco17.json": (5115, 5115),
    "lspet14/annotations/person_keypoints_val.json": (361, 361),
    "lspet14/annotations/person_keypoints_val_as_coco17.json": (361, 361),
    "mmpose_tests_data/aic/test_aic.json": (3, 9),
    "mmpose_tests_data/coco/test_coco.json": (4, 14),
    "mmpose_tests_data/coco/test_coco_det_AP_H_56.json": "a JSON list, not an object.*Use it as boxes",
    "mmpose_tests_data/coco/test_coco_wholebody.json": (4, 14),
    "mmpose_tests_data/coco/test_keypoint_partition_metric.json": "`keypoints` must be 51 .* a list of 399",
    "mmpose_tests_data/crowdpose/test_crowdpose.json": (2, 5),
    "mmpose_tests_data/crowdpose/test_crowdpose_det_AP_40.json": "a JSON list, not an object.*Use it as boxes",
    "mmpose_tests_data/exlpose/test_exlpose.json": (2, 6),
    "mmpose_tests_data/h36m/h36m_coco.json": (4, 4),
    "mmpose_tests_data/halpe/test_halpe.json": "needs one category with `keypoints`, but 0",
    "mmpose_tests_data/humanart/test_humanart.json": "`keypoints` must be 63 .* a list of 51",
    "mmpose_tests_data/humanart/test_humanart_det_AP_H_56.json": "a JSON list, not an object.*Use it as boxes",
    "mmpose_tests_data/jhmdb/test_jhmdb_sub1.json": (3, 3),
    "mmpose_tests_data/mhp/test_mhp.json": (2, 4),
    "mmpose_tests_data/mpii/test_mpii.json": "a JSON list, not an object",
    "mmpose_tests_data/mpii/test_mpii_trb.json": (5, 0),  # none has a box, and that is counted
    "mmpose_tests_data/ochuman/test_ochuman.json": (3, 5),
    "mmpose_tests_data/posetrack18/annotations/test_posetrack18_human_detections.json": "a JSON list, not an object",
    "mmpose_tests_data/posetrack18/annotations/test_posetrack18_val.json": (3, 14),
    "mmpose_tests_data/posetrack18/annotations/val/003418_mpii_test.json": (1, 1),
    "mmpose_tests_data/posetrack18/annotations/val/009473_mpii_test.json": (1, 2),
    "mmpose_tests_data/posetrack18/annotations/val/012834_mpii_test.json": (1, 11),
}


@pytest.mark.parametrize("name", FOUND_FILES)
def test_a_found_file_is_read_or_refused_with_its_reason(shared: Path, name: str) -> None:
    data, expected = (shared / "data" / name).read_bytes(), FOUND_FILES[name]
    if isinstance(expected, str):
        with pytest.raises(DataError, match=f"^{re.escape(name)}.*: .*{expected}"):
            parse_annotations(data, source=name)
        return
    found = parse_annotations(data, source=name)
    assert (found.counts["images"], found.counts["persons"]) == expected
    assert sum(len(one.persons) for one in found.images.values()) == expected[1]


def test_no_annotation_file_is_left_untried(shared: Path) -> None:
    data = shared / "data"
    assert {path.relative_to(data).as_posix() for path in data.rglob("*.json")} == set(FOUND_FILES)
