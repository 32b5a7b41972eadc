"""What is found wrong with a keypoint dataset: each kind of damage is named, and nothing else is."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import annotate
from pipeline import keypoints, rows, storage, units
from pipeline.config import AnnotateConfig
from pipeline.errors import DataError
from pipeline.images import REASONS
from pipeline.pose.skeleton import COCO17
from pipeline.verification import counts as counted
from pipeline.verification.finding import Finding
from pipeline.verification.keypoint_output import is_keypoint_dataset, open_output
from pipeline.verification.keypoint_part import KeypointPart, check_stored_keypoints
from pipeline.verification.keypoint_whole import check_all_keypoints, keypoints_to_check
from tests.keypoint_world import BOXES, COLUMNS, FIRST_BOXES, MODEL, MODEL_DIGEST, KeypointWorld, counts, person
from tests.shard_world import parquet, write_files
from tests.worlds import NO_TRACKING, write_pictures, write_tiny_model

V1 = Path(__file__).parent / "versions" / "v1" / "keypoints"
Files = dict[str, bytes]
Found = set[tuple[str, str]]


def verify(place: str) -> list[Finding]:
    output = open_output(place)
    found = list(keypoints_to_check(output))
    reports = [check_stored_keypoints(part) for part in found if isinstance(part, KeypointPart)]
    return [*output.findings, *(one for one in found if isinstance(one, Finding)),
            *(finding for report in reports for finding in report.findings), *check_all_keypoints(output, reports)]


def verified(place: Path | str, files: Files) -> Found:
    """(kind, object) of what is found."""
    write_files(str(place), files)
    return {(finding.kind, finding.object) for finding in verify(str(place))}


def flipped(data: bytes, index: int) -> bytes:
    changed = bytearray(data)
    changed[index] ^= 1
    return bytes(changed)


# --- whole --------------------------------------------------------------------------------------------------------


def test_nothing_is_found_in_a_whole_dataset(place: str) -> None:
    assert verified(place, KeypointWorld().files()) == set()


def test_nothing_is_found_without_a_list_of_parts_as_older_programs_wrote_none(tmp_path: Path) -> None:
    assert verified(tmp_path, KeypointWorld(listed=False).files()) == set()


@pytest.mark.parametrize("version", sorted(V1.parents[1].iterdir()), ids=lambda path: path.name)
def test_nothing_is_found_in_the_datasets_of_earlier_releases(version: Path) -> None:
    assert verify(str(version / "keypoints")) == []


def test_nothing_is_found_in_what_the_code_that_annotates_writes(tmp_path: Path) -> None:
    write_files(str(tmp_path), MODEL)
    planned = pa.table({"key": ["a", "b", "c"], "etag": ["1", "2", "3"], "size": [4, 5, 6]})
    job = units.freeze_job(str(tmp_path), [planned], input={"kind": "prefix", "uri": "/pictures"},
                           intent={"model": MODEL_DIGEST})
    known = {"image_id": None, "sha256": "0" * 64, "width": 8, "height": 6}
    random = np.random.default_rng(0)
    boxes = rows.Boxes(np.arange(2), random.uniform(1, 5, (2, 4)), random.uniform(0, 1, 2))
    data = keypoints.part_bytes([
        rows.AnnotatedPicture({"key": "b", "etag": "2", **known}, rows.OK, boxes=boxes,
                              joints_xy=random.normal(size=(2, 17, 2)).astype(np.float32),
                              joint_scores=random.uniform(0.5, 1.5, (2, 17)).astype(np.float32)),
        rows.AnnotatedPicture({"key": "a", "etag": "1", **known}, rows.NO_PERSON),
        rows.AnnotatedPicture({"key": "c", "etag": "3", **dict.fromkeys(known)}, rows.REJECTED, "missing", "gone")],
        COCO17, job=job.digest, model={"digest": MODEL_DIGEST})
    storage.put_if_absent(storage.join(str(tmp_path), keypoints.FOLDER, job.part_name(0)), data)
    assert verify(str(tmp_path)) == []


@pytest.mark.usefixtures("without_ray")
def test_nothing_is_found_in_the_outputs_of_runs_and_of_runs_that_copy_from_them(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "in", count=5) / "images"
    (images / "000002-notes.txt").write_text("no picture")
    model = write_tiny_model(tmp_path / "model")

    def annotated(output: str, **settings: object) -> str:
        known = {"input": str(images), "model": str(model), "output": str(tmp_path / output), "boxes": "whole-image",
                 "pictures_per_unit": 2, "max_rejected_share": 1, "actors": 1, "tracking": NO_TRACKING}
        return str(annotate.run(AnnotateConfig(**{**known, **settings}))["output"])

    assert verify(annotated("out")) == []
    (images / "zz.jpg").write_bytes(next(images.iterdir()).read_bytes()[:400])
    assert verify(annotated("again", reuse=str(tmp_path / "out"))) == []


def test_keys_and_columns_that_came_later_are_no_fault(tmp_path: Path) -> None:
    def add(name: str, values: Any) -> None:
        if name != "list":
            values["later"] = 1
            values.get("counts", {})["later"] = 2

    assert verified(tmp_path, KeypointWorld(edit=add, columns={"z": pa.float32(), **COLUMNS}).files()) == set()


def test_what_jobs_leave_beside_a_dataset_is_no_fault(tmp_path: Path) -> None:
    beside = ["_drivers/1.json", "_probe-0123", "_detector/model.json", "_boxes/x", "_parts/0123.parquet",
              "_plan/of-the-loser/plan-0000000.parquet", "result.json"]
    assert verified(tmp_path, KeypointWorld().files() | dict.fromkeys(beside, b"x")) == set()


def test_keys_are_ordered_by_their_bytes(tmp_path: Path) -> None:
    # by UTF-16 units the last would come before the one above it
    world = KeypointWorld(rows=[[person("c.jpg"), person("\uffee"), person("\U0001f600")]], counts=[counts(3, 3, 3)],
                          total=counts(3, 3, 3))
    assert verified(tmp_path, world.files()) == set()


# --- objects ------------------------------------------------------------------------------------------------------


def test_an_object_that_is_missing_is_named(tmp_path: Path) -> None:
    world = KeypointWorld()
    for number, lost in enumerate(world.files()):
        if lost == "_SUCCESS":
            continue  # that is a run which has not ended
        files = world.files()
        del files[lost]
        assert verified(tmp_path / str(number), files) == {("missing", lost)}


def test_a_part_that_is_missing_in_a_bucket_or_a_folder_is_named(place: str) -> None:
    world = KeypointWorld()
    files = world.files()
    del files[world.part(1)]
    assert verified(place, files) == {("missing", world.part(1))}


def test_an_object_that_nothing_explains_among_the_parts_is_foreign(place: str) -> None:
    world = KeypointWorld()
    foreign = ["keypoints/notes.txt", "keypoints/part-0000000-01234567.parquet",
               f"keypoints/part-0000003-{world.digest[:8]}.parquet", f"keypoints/deeper/{Path(world.part(0)).name}"]
    assert verified(place, world.files() | dict.fromkeys(foreign, b"x")) == {("foreign", name) for name in foreign}


@pytest.mark.parametrize("copy", ["part-0000003-{}.parquet", "copy of part-0000000.parquet"])
def test_a_copy_of_a_part_is_doubled_and_named_with_its_original(tmp_path: Path, copy: str) -> None:
    world = KeypointWorld()
    name = f"keypoints/{copy.format(world.digest[:8])}"
    write_files(str(tmp_path), {**world.files(), name: world.files()[world.part(0)]})
    finding, = verify(str(tmp_path))
    assert (finding.kind, finding.object) == ("doubled", name)
    assert world.part(0) in finding.found


@pytest.fixture(scope="module")
def whole_part(tmp_path_factory: pytest.TempPathFactory) -> KeypointPart:
    """A part of a whole dataset on a disk, with what it has to be."""
    folder = tmp_path_factory.mktemp("whole")
    write_files(str(folder), KeypointWorld().files())
    part = next(part for part in keypoints_to_check(open_output(str(folder))) if isinstance(part, KeypointPart))
    assert check_stored_keypoints(part).findings == ()
    return part


@pytest.mark.parametrize("share", range(64))
def test_a_flipped_byte_anywhere_in_a_part_is_found(tmp_path: Path, whole_part: KeypointPart, share: int) -> None:
    data = Path(whole_part.uri, whole_part.object).read_bytes()
    write_files(str(tmp_path), {whole_part.object: flipped(data, share * (len(data) - 1) // 63)})
    findings = check_stored_keypoints(replace(whole_part, uri=str(tmp_path))).findings
    assert [(finding.kind, finding.object) for finding in findings] == [("damaged", whole_part.object)]


@pytest.mark.parametrize("length", [0, 8, -1])
def test_a_part_that_was_cut_is_found_with_and_without_a_list(tmp_path: Path, length: int) -> None:
    for listed, kind in ((True, "damaged"), (False, "unreadable")):
        world = KeypointWorld(listed=listed)
        files, name = world.files(), world.part(1)
        files[name] = files[name][:length]
        assert verified(tmp_path / kind, files) == {(kind, name)}


@pytest.mark.parametrize("share", range(2))
def test_a_flipped_byte_in_the_list_or_the_model_is_found(tmp_path: Path, share: int) -> None:
    whole = KeypointWorld().files()
    lists = next(name for name in whole if name.startswith("_parts/"))
    for name, named in ((lists, lists), ("_model/model.safetensors", "_model"), ("_model/model.json", "_model")):
        files = whole | {name: flipped(whole[name], share * (len(whole[name]) - 1))}
        assert verified(tmp_path, files) == {("damaged", named)}


@pytest.mark.parametrize("length", [0, 8, -1])
def test_a_plan_that_was_cut_is_named_and_the_other_units_are_compared_with_theirs(tmp_path: Path,
                                                                                   length: int) -> None:
    world = KeypointWorld()
    world.rows[0][2]["etag"] = world.rows[2][0]["etag"] = "another"
    files, name = world.files(), world.plan(1)
    files[name] = files[name][:length]
    assert verified(tmp_path, files) == {("unreadable", name), ("plan", world.part(0))}


def test_a_plan_other_than_the_one_that_was_frozen_is_named(tmp_path: Path) -> None:
    world, other = KeypointWorld(), KeypointWorld()
    other.planned[2][0]["etag"] = "another"
    files = world.files() | {world.plan(1): other.files()[other.plan(1)]}
    assert verified(tmp_path, files) == {("damaged", world.plan(1).rpartition("/")[0]), ("plan", world.part(2))}


def test_each_byte_of_success_matters_or_changes_no_value(tmp_path: Path) -> None:
    files = KeypointWorld().files()
    data = files["_SUCCESS"]
    for index in range(0, len(data), 29):
        write_files(str(tmp_path), files | {"_SUCCESS": flipped(data, index)})
        try:
            found = {finding.object for finding in verify(str(tmp_path))}
        except DataError:  # another version
            continue
        lists = {name for name in files if name.startswith("_parts/")}  # named by another digest, it is damaged
        assert found in ({"_SUCCESS"}, lists) or json.loads(flipped(data, index)) == json.loads(data), index


def test_damage_without_a_list_is_found_by_what_the_disk_kept(tmp_path: Path) -> None:
    world = KeypointWorld(listed=False)
    files, name = world.files(), world.part(1)
    write_files(str(tmp_path), {each: data for each, data in files.items() if each != name})
    path = tmp_path / name
    storage.put_if_absent(str(path), files[name])
    if hashlib.sha256(files[name]).hexdigest() != storage.stored_sha256(str(path)):
        pytest.skip("this filesystem keeps no attributes")
    before = path.stat()
    path.write_bytes(flipped(files[name], len(files[name]) // 3))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk damages, and not as a program writes
    assert {(finding.kind, finding.object) for finding in verify(str(tmp_path))} == {("damaged", name)}


def test_a_part_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    world = KeypointWorld(listed=False)
    assert verified(tmp_path, world.files() | {world.part(1): b"no Parquet"}) == {("unreadable", world.part(1))}


def test_all_that_is_wrong_is_named_and_not_only_the_first(tmp_path: Path) -> None:
    world = KeypointWorld()
    files = world.files()
    del files[world.part(0)], files["_model/model.json"]
    files |= {world.part(1): flipped(files[world.part(1)], -1), "keypoints/x": b"x"}
    assert verified(tmp_path, files) == {("missing", world.part(0)), ("missing", "_model/model.json"),
                                         ("damaged", world.part(1)), ("foreign", "keypoints/x")}


@pytest.mark.parametrize(("folder", "columns"), [
    ("{digest}-{plan}/boxes-0000000", BOXES), ("{digest}", FIRST_BOXES)])  # by unit; the first outputs
def test_frozen_detections_have_to_be_there_and_readable(tmp_path: Path, folder: str, columns: pa.Schema) -> None:
    world = KeypointWorld(intent={"model": MODEL_DIGEST, "boxes": {"kind": "detections", "digest": "abcd" * 16}})
    by_unit, name = (f"_boxes/{name.format(digest='abcd' * 4, plan=world.plan_digest[:8])}.parquet"
                     for name in ("{digest}-{plan}/boxes-0000000", folder))
    assert verified(tmp_path / "1", world.files()) == {("missing", by_unit)}
    assert verified(tmp_path / "2", world.files() | {name: b"x"}) == {("unreadable", name)}
    assert verified(tmp_path / "3", world.files() | {name: parquet(columns.empty_table())}) == set()


def test_a_frozen_detector_has_to_be_there_and_whole(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"onnx").hexdigest()
    world = KeypointWorld(intent={"model": MODEL_DIGEST, "boxes": {"kind": "detect", "digest": digest}})
    name = f"_detector/{digest[:16]}.onnx"
    assert verified(tmp_path / "1", world.files()) == {("missing", name)}
    assert verified(tmp_path / "2", world.files() | {name: b"other"}) == {("damaged", name)}
    assert verified(tmp_path / "3", world.files() | {name: b"onnx"}) == set()


# --- JSON ---------------------------------------------------------------------------------------------------------


def edited(name: str, change: Callable[[Any], object]) -> KeypointWorld:
    return KeypointWorld(edit=lambda each, values: change(values) if each == name else None)


@pytest.mark.parametrize("name", ["_job.json", "_SUCCESS"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[]", b"{}"])
def test_json_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (_, named), = verified(tmp_path, KeypointWorld().files() | {name: content})
    assert named == name


@pytest.mark.parametrize(("change", "kind"), [
    (lambda job: job["intent"].update(flip=False), "damaged"),
    (lambda job: job.update(intent={**job["intent"], "later": 1}), "damaged"),
    (lambda job: job["plan"].update(units_per_file=0), "keys"),
    (lambda job: job["plan"].update(units=10**12), "keys"),
    (lambda job: job["plan"].update(digest="x"), "keys"),
    (lambda job: job.pop("intent"), "keys")])
def test_a_job_that_was_changed_is_named(tmp_path: Path, change: Callable[[Any], object], kind: str) -> None:
    world = KeypointWorld()
    files = world.files()
    job = json.loads(files["_job.json"])
    change(job)
    assert verified(tmp_path, files | {"_job.json": json.dumps(job).encode()}) == {(kind, "_job.json")}


@pytest.mark.parametrize(("change", "where"), [
    ({"pictures": 6}, {"_SUCCESS"}), ({"units": 2}, {"_SUCCESS", "list"}), ({"units": 4}, {"_SUCCESS", "list"})])
def test_numbers_of_the_plan_that_were_changed_are_named(tmp_path: Path, change: dict[str, int],
                                                         where: set[str]) -> None:
    world = KeypointWorld()
    files = world.files()
    job = json.loads(files["_job.json"])
    job["plan"] |= change
    found = {name for _, name in verified(tmp_path, files | {"_job.json": json.dumps(job).encode()})}
    lists = next(name for name in files if name.startswith("_parts/"))
    assert found >= {lists if name == "list" else name for name in where} | {world.plan(0).rpartition("/")[0]}


@pytest.mark.parametrize(("change", "kind"), [
    (lambda success: success.update(job="0" * 64), "source"),
    (lambda success: success.update(units=2), "counts"),
    (lambda success: success["counts"].update(pictures=4), "counts"),
    (lambda success: success["counts"].update(persons=5), "counts"),
    (lambda success: success["counts"].update(boxes_refused=1), "counts"),
    (lambda success: success["counts"].update(suppressed=1), "counts"),
    (lambda success: success["counts"].update(reasons={"truncated": 1}), "counts"),
    (lambda success: success["counts"].pop("ok"), "counts"),
    (lambda success: success.pop("counts"), "keys"),
    (lambda success: success.pop("parts"), "keys"),
    (lambda success: success.pop("version"), "keys"),
    (lambda success: success["parts"].update(object="_parts/elsewhere.parquet"), "keys"),
    (lambda success: success["parts"].pop("sha256"), "keys")])
def test_a_success_that_is_not_the_runs_is_named(tmp_path: Path, change: Callable[[Any], object], kind: str) -> None:
    assert verified(tmp_path, edited("_SUCCESS", change).files()) == {(kind, "_SUCCESS")}


@pytest.mark.parametrize("change", [
    lambda rows: rows.pop(), lambda rows: rows.reverse(), lambda rows: rows.append(dict(rows[0])),
    lambda rows: rows[0].update(unit=7), lambda rows: rows[0].update(part="part-0000000-01234567.parquet"),
    lambda rows: rows[0].update(sha256=None)])
def test_a_list_without_each_part_in_its_order_is_named(tmp_path: Path, change: Callable[[Any], object]) -> None:
    files = edited("list", change).files()
    assert verified(tmp_path, files) == {("plan", next(name for name in files if name.startswith("_parts/")))}


def test_a_list_that_gives_another_digest_or_size_names_the_part(tmp_path: Path) -> None:
    digest, size = (edited("list", lambda rows, change=change: rows[1].update(change))
                    for change in ({"sha256": "0" * 64}, {"size": 7}))
    assert verified(tmp_path / "1", digest.files()) == {("damaged", digest.part(1))}
    assert verified(tmp_path / "2", size.files()) == {("source", size.part(1))}


@pytest.mark.parametrize("name", ["_job.json", "_SUCCESS", "pose 1"])
def test_a_newer_format_is_refused_by_name(tmp_path: Path, name: str) -> None:
    world = edited(name, lambda values: values.update(version=2))
    write_files(str(tmp_path), world.files())
    with pytest.raises(DataError, match=rf"{name if 'pose' not in name else world.part(1)} is of format 2.*Update"):
        verify(str(tmp_path))


# --- rows ---------------------------------------------------------------------------------------------------------

Damage = Callable[[list[dict[str, Any]]], object]


@pytest.mark.parametrize(("unit", "damage", "claim"), [
    (0, lambda rows: rows[1].update(person_index=2), "person_index 0, 1"),
    (0, lambda rows: rows[1].update(person_index=0), "person_index 0, 1"),
    (0, lambda rows: rows[0].update(person_index=None), "person_index 0, 1"),
    (2, lambda rows: rows[0].update(person_index=1), "person_index 0, 1"),
    (2, lambda rows: rows[0].update(job="0" * 64), "job "),
    (2, lambda rows: rows[0].update(error="why"), "an error exactly"),
    (1, lambda rows: rows[1].update(error=None), "an error exactly"),
    (2, lambda rows: rows[0].update(width=0), "positive width and height"),
    (2, lambda rows: rows[0].update(height=None), "positive width and height"),
    (0, lambda rows: rows[2].update(width=None, height=None), "positive width and height"),
    (1, lambda rows: rows[1].update(width=8), "positive width and height"),
    (2, lambda rows: rows[0].update(sha256=None), "a sha256"),
    (0, lambda rows: rows[2].update(sha256=None), "a sha256"),
    (2, lambda rows: rows[0].update(box_w=0.0), "a box of positive"),
    (2, lambda rows: rows[0].update(box_h=-4.0), "a box of positive"),
    (2, lambda rows: rows[0].update(box_id=None), "box_id"),
    (2, lambda rows: rows[0].update(box_x=None), "finite"),
    (2, lambda rows: rows[0].update(box_y=math.nan), "finite"),
    (2, lambda rows: rows[0].update(box_score=None), "finite"),
    (2, lambda rows: rows[0].update(score=None), "finite"),
    (2, lambda rows: rows[0].update(head_x=None), "finite"),
    (2, lambda rows: rows[0].update(head_y=math.nan), "finite"),
    (2, lambda rows: rows[0].update(tail_fin_x=math.inf), "finite"),
    (2, lambda rows: rows[0].update(tail_fin_score=None), "finite"),
    (2, lambda rows: rows[0].update(score=0.37501), "box_score times the mean"),
    (2, lambda rows: rows[0].update(tail_fin_score=1.001), "box_score times the mean"),
    (0, lambda rows: rows[2].update(head_x=0.0), "NULL where there is no person"),
    (0, lambda rows: rows[2].update(head_x=math.nan), "NULL where there is no person"),
    (0, lambda rows: rows[2].update(box_id=0), "NULL where there is no person"),
    (0, lambda rows: rows[2].update(person_index=0), "NULL where there is no person"),
    (1, lambda rows: rows[1].update(score=0.5), "NULL where there is no person"),
    (0, lambda rows: rows[1].update(width=9), "the same width"),
    (0, lambda rows: rows[1].update(image_id=3), "the same image_id"),
    (0, lambda rows: rows.append(dict(rows[2])), "one row of a picture without persons"),
    (1, lambda rows: rows.append(dict(rows[1])), "one row of a picture without persons"),
    (1, lambda rows: rows.reverse(), "rows sorted")])
def test_a_row_that_breaks_a_rule_is_named_with_the_rule(tmp_path: Path, unit: int, damage: Damage,
                                                         claim: str) -> None:
    world = KeypointWorld()
    damage(world.rows[unit])
    write_files(str(tmp_path), world.files())
    finding, = verify(str(tmp_path))
    assert (finding.kind, finding.object) == ("row", world.part(unit))
    assert claim in finding.expected
    assert any(repr(row["key"]) in finding.found for row in world.rows[unit])


@pytest.mark.parametrize(("unit", "damage", "kinds"), [
    (0, lambda rows: rows.pop(2), {"plan", "counts"}),
    (0, lambda rows: rows.pop(1), {"counts"}),
    (0, lambda rows: rows.pop(0), {"row", "counts"}),
    (0, lambda rows: rows.insert(1, dict(rows[0])), {"row", "counts"}),
    (0, lambda rows: rows.insert(1, dict(rows[1])), {"row", "counts"}),
    (2, lambda rows: rows.append(person("f.jpg")), {"plan", "counts"}),
    (2, lambda rows: rows.clear(), {"plan", "counts"}),
    (2, lambda rows: rows[0].update(key=None), {"row", "plan", "counts"}),
    (2, lambda rows: rows[0].update(key="f.jpg"), {"plan"}),
    (2, lambda rows: rows[0].update(etag="another"), {"plan"}),
    (0, lambda rows: rows[2].update(sha256="0" * 64), {"plan"}),
    (2, lambda rows: rows[0].update(status="fine"), {"row", "counts"}),
    (1, lambda rows: rows[1].update(reason="because"), {"row", "counts"}),
    (2, lambda rows: rows[0].update(status=None), {"row", "counts"}),
    (2, lambda rows: rows[0].update(status="rejected"), {"row", "counts"}),
    (2, lambda rows: rows[0].update(reason="truncated"), {"row", "counts"}),
    (1, lambda rows: rows[1].update(reason=None), {"row", "counts"}),
    (1, lambda rows: rows[1].update(reason="truncated"), {"counts"}),
    (1, lambda rows: rows[1].update(status="no_person"), {"row", "counts"})])
def test_what_is_wrong_in_more_than_one_way_is_named_in_each(tmp_path: Path, unit: int, damage: Damage,
                                                             kinds: set[str]) -> None:
    world = KeypointWorld()
    damage(world.rows[unit])
    found = verified(tmp_path, world.files())
    assert {kind for kind, name in found if name == world.part(unit)} == kinds
    assert found <= {(kind, world.part(unit)) for kind in kinds} | {("counts", "_SUCCESS")}


def test_the_reasons_that_are_known_are_those_of_the_code_that_refuses() -> None:
    assert set(counted.REASONS) == set(REASONS)


def test_persons_that_were_suppressed_are_summed(tmp_path: Path) -> None:
    world = edited("pose 1", lambda pose: pose["counts"].update(suppressed=2))
    assert verified(tmp_path / "1", world.files()) == {("counts", "_SUCCESS")}
    world.total["suppressed"] = 2
    assert verified(tmp_path / "2", world.files()) == set()


def test_a_picture_may_have_no_etag_and_another_sha256_is_no_matter_where_the_plan_has_none(tmp_path: Path) -> None:
    world = KeypointWorld()
    world.rows[2][0].update(etag=None, sha256="0" * 64)
    assert verified(tmp_path, world.files()) == set()


def test_a_key_that_was_planned_twice_is_named(tmp_path: Path) -> None:
    again = KeypointWorld(rows=[[person("a.jpg")], [person("a.jpg")]], counts=[counts(1, 1, 1)] * 2,
                          total=counts(2, 2, 2))
    assert verified(tmp_path / "1", again.files()) == {("doubled", again.part(1))}
    within = KeypointWorld()
    within.planned[2] *= 2
    assert ("doubled", within.part(2)) in verified(tmp_path / "2", within.files())


@pytest.mark.parametrize("columns", [
    {name: kind for name, kind in COLUMNS.items() if name != "etag"}, {**COLUMNS, "width": pa.int64()},
    {**COLUMNS, "head_x": pa.float64()}, {name: kind for name, kind in COLUMNS.items() if name != "tail_fin_score"}])
def test_a_part_without_its_columns_is_named(tmp_path: Path, columns: dict[str, pa.DataType]) -> None:
    world = KeypointWorld(columns=columns)
    assert verified(tmp_path, world.files()) == {("columns", world.part(unit)) for unit in range(3)}


def test_nan_in_a_column_that_came_later_is_named(tmp_path: Path) -> None:
    world = KeypointWorld(columns={**COLUMNS, "z": pa.float32()})
    world.rows[1][1]["z"] = math.nan
    assert verified(tmp_path, world.files()) == {("row", world.part(1))}


# --- metadata -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "kind"), [
    (lambda pose: pose["counts"].update(pictures=3), "counts"),
    (lambda pose: pose["counts"].update(persons=2), "counts"),
    (lambda pose: pose["counts"].update(ok=2), "counts"),
    (lambda pose: pose["counts"].update(no_person=1), "counts"),
    (lambda pose: pose["counts"].pop("rejected"), "counts"),
    (lambda pose: pose["counts"].update(reasons={"truncated": 1}), "counts"),
    (lambda pose: pose["counts"].update(boxes_refused="1"), "counts"),
    (lambda pose: pose["counts"].update(suppressed=-1), "counts"),
    (lambda pose: pose["counts"].update(suppressed=None), "counts"),
    (lambda pose: pose["counts"].update(ok=True), "counts"),
    (lambda pose: pose["counts"].update(reasons={"not_a_picture": 1.0}), "counts"),
    (lambda pose: pose.update(version=0), "keys"),
    (lambda pose: pose.update(job="0" * 64), "source"),
    (lambda pose: pose["model"].update(digest="0" * 64), "source"),
    (lambda pose: pose["model"].update(name="another"), "source"),
    (lambda pose: pose.update(coordinate_frame="metres"), "source"),
    (lambda pose: pose["skeleton"].update(edges=[[0, 1]]), "source"),
    (lambda pose: pose["skeleton"].update(joints=["Head", "gill"]), "columns"),
    (lambda pose: pose.pop("skeleton"), "keys"),
    (lambda pose: pose.update(counts=None), "keys"),
    (lambda pose: pose.pop("version"), "keys")])
def test_metadata_that_is_not_the_parts_is_named(tmp_path: Path, change: Callable[[Any], object], kind: str) -> None:
    world = edited("pose 1", change)
    found = verified(tmp_path, world.files())
    assert (kind, world.part(1)) in found
    assert {name for _, name in found} <= {world.part(1), "_SUCCESS"}


# --- places -------------------------------------------------------------------------------------------------------


def test_what_is_there_of_a_run_that_has_not_ended_is_checked_and_what_is_not_is_no_fault(tmp_path: Path) -> None:
    world = KeypointWorld(sealed=False)
    files = world.files()
    del files[world.part(1)]
    assert verified(tmp_path, files) == set()
    assert "2 of 3 units committed" in open_output(str(tmp_path)).unfinished
    world.rows[2][0]["box_w"] = 0.0
    assert verified(tmp_path, {world.part(2): world.files()[world.part(2)]}) == {("row", world.part(2))}


@pytest.mark.parametrize("lost", ["_job.json", "_SUCCESS", "_model/model.json"])
def test_a_keypoint_dataset_is_known_by_what_is_left_of_it(tmp_path: Path, lost: str) -> None:
    shutil.copytree(V1, tmp_path / "data")
    (tmp_path / "data" / lost).unlink()
    assert is_keypoint_dataset(str(tmp_path / "data"))


def test_a_shard_dataset_and_an_empty_place_are_none(place: str) -> None:
    assert not is_keypoint_dataset(place)
    assert not is_keypoint_dataset(str(V1.parent / "shards"))


def test_a_place_with_both_kinds_is_refused(tmp_path: Path) -> None:
    write_files(str(tmp_path), KeypointWorld().files() | {"dataset-000001.json": b"{}"})
    with pytest.raises(DataError, match=r"holds both.*move one elsewhere"):
        is_keypoint_dataset(str(tmp_path))
