"""What is found wrong with a shard dataset: each kind of damage is named, and nothing else is."""

import ast
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.errors import DataError
from pipeline.verification.chain import open_chain
from pipeline.verification.counts import count_rows
from pipeline.verification.finding import Finding
from pipeline.verification.keys import hash_keys
from pipeline.verification.part import PartToCheck, check_stored_part
from pipeline.verification.reading import read_stored
from pipeline.verification.whole import check_whole, parts_to_check
from tests.fault_proxy import FLIPPED, FaultProxy
from tests.shard_world import SHARD, World, job_digest, person, picture, plan_json, write_files

ROOT = Path(__file__).resolve().parents[1]
Files = dict[str, bytes]


def verify(place: str, version: int | None = None) -> list[Finding]:
    chain = open_chain(place, version)
    found = list(parts_to_check(chain))
    reports = [check_stored_part(part) for part in found if isinstance(part, PartToCheck)]
    return [*chain.findings, *(one for one in found if isinstance(one, Finding)),
            *(finding for report in reports for finding in report.findings), *check_whole(chain, reports)]


def verified(place: Path | str, files: Files, version: int | None = None) -> list[tuple[str, str]]:
    """(kind, object) of each finding, sorted."""
    write_files(str(place), files)
    return sorted((finding.kind, finding.object) for finding in verify(str(place), version))


def named(world: World, *expected: str) -> list[tuple[str, str]]:
    """`"row C"` -> ("row", the name of part C)."""
    names = world.names()
    pairs = [one.split(maxsplit=1) for one in expected]
    return sorted((kind, names.get(name, name)) for kind, name in pairs)


def flipped(data: bytes, index: int) -> bytes:
    changed = bytearray(data)
    changed[index] ^= 1
    return bytes(changed)


# --- whole --------------------------------------------------------------------------------------------------------


def test_nothing_is_found_in_a_whole_dataset(place: str) -> None:
    assert verified(place, World().files()) == []


@pytest.mark.parametrize("version", [1, 2, 3])
def test_nothing_is_found_in_any_version_of_it(tmp_path: Path, version: int) -> None:
    assert verified(tmp_path, World().files(), version) == []


@pytest.mark.parametrize("version", sorted((ROOT / "tests" / "versions").iterdir()), ids=lambda path: path.name)
def test_nothing_is_found_in_the_datasets_of_earlier_releases(version: Path) -> None:
    assert verify(str(version / "shards")) == []


def test_it_shares_no_code_with_what_writes_datasets() -> None:
    paths = [*(ROOT / "pipeline" / "verification").glob("*.py"), ROOT / "jobs" / "verify.py"]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {f"{node.module}.{each.name}" for node in nodes if isinstance(node, ast.ImportFrom)
                 for each in node.names if node.module in ("pipeline", "jobs")} - {None}
    imported |= {each.name for node in nodes if isinstance(node, ast.Import) for each in node.names}
    ours = {name for name in imported if name and name.startswith(("pipeline.", "jobs."))}
    assert {name for name in ours if not name.startswith("pipeline.verification.")} == {
        "pipeline.storage", "pipeline.errors", "pipeline.config", "pipeline.cores", "pipeline.words", "jobs.start_ray"}


def test_keys_and_columns_that_came_later_are_no_fault(tmp_path: Path) -> None:
    def add(name: str, values: dict[str, Any]) -> None:
        values["later"] = 1
        for part in values.get("parts", ()):
            part["later"] = part["counts"]["later"] = 2

    world = World(edit_json=add, columns={"first": pa.int8(), **SHARD})
    assert verified(tmp_path, world.files()) == []


def test_old_datasets_say_no_sha256_of_what_they_drop(tmp_path: Path) -> None:
    world = World(edit_json=lambda name, values: values.pop("dropped_sha256", None))
    assert verified(tmp_path, world.files()) == []


# --- objects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["A", "B", "dataset-000001.json", "dataset-000002.json", "_job-000001.json",
                                  "_job-000003.json", "dropped-000002.parquet", "dropped-000003.parquet",
                                  "plan1/plan-0000000.parquet"])
def test_an_object_that_is_missing_is_named(tmp_path: Path, lost: str) -> None:
    world = World()
    names, files = world.names(), world.files()
    name = names.get(lost, lost.replace("plan1", names["plan1"]))
    del files[name]
    assert verified(tmp_path, files) == [("missing", name)]


def test_a_part_that_is_missing_in_a_bucket_or_a_folder_is_named(place: str) -> None:
    world = World()
    files = world.files()
    del files[world.names()["C"]]
    assert verified(place, files) == named(world, "missing C")


def test_an_object_that_nothing_explains_is_foreign(place: str) -> None:
    world = World()
    digest = job_digest(world, 1)[:8]
    foreign = ["shards/notes.txt", f"shards/part-0000002-{digest}.parquet", "shards/part-0000000-01234567.parquet",
               "shards/deeper/part-0000000-01234567.parquet", "dropped-000001.parquet", "_job-000007.json"]
    assert verified(place, world.files() | dict.fromkeys(foreign, b"x")) == sorted(("foreign", name)
                                                                                   for name in foreign)


def test_a_copy_of_a_part_is_doubled_and_named_with_its_original(tmp_path: Path) -> None:
    world = World()
    files, names = world.files(), world.names()
    files["shards/part-0000009-01234567.parquet"] = files[names["A"]]
    write_files(str(tmp_path), files)
    finding, = verify(str(tmp_path))
    assert (finding.kind, finding.object) == ("doubled", "shards/part-0000009-01234567.parquet")
    assert names["A"] in finding.found


@pytest.mark.parametrize("share", range(64))
def test_a_flipped_byte_anywhere_in_a_part_is_found(tmp_path: Path, share: int) -> None:
    world = World()
    data = world.files()[world.names()["C"]]
    part = PartToCheck(uri=str(tmp_path), name="part-0000000-01234567.parquet", version="dataset-000003.json",
                       counts=None, named_by="dataset-000003.json", sha256=hashlib.sha256(data).hexdigest(),
                       planned=None, dropped=None, dropped_name="", num_joints=2)
    write_files(str(tmp_path), {part.object: data})
    assert check_stored_part(part).findings == ()
    write_files(str(tmp_path), {part.object: flipped(data, share * (len(data) - 1) // 63)})
    findings = check_stored_part(part).findings
    assert [(finding.kind, finding.object) for finding in findings] == [("damaged", part.object)]


@pytest.mark.parametrize(("times", "kinds"), [(1, []), (2, ["damaged"])])
def test_damage_in_a_bucket_is_found_by_what_was_kept_and_damage_on_the_way_is_none(
        bucket: str, faulty_s3: FaultProxy, monkeypatch: pytest.MonkeyPatch, times: int, kinds: list[str]) -> None:
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "WHEN_REQUIRED")  # as of a store that keeps no checksum
    storage.put_if_absent(f"{bucket}/a", b"0123456789")
    faulty_s3.fail("GET", FLIPPED, times=times)
    findings: list[Finding] = []
    data = read_stored(bucket, "a", "an object", findings.append)
    assert [finding.kind for finding in findings] == kinds
    assert data == (None if kinds else b"0123456789")


@pytest.mark.parametrize("part", ["A", "B", "C"])
def test_a_damaged_part_is_named_also_where_it_is_left_out(place: str, part: str) -> None:
    world = World()
    files, name = world.files(), world.names()[part]
    files[name] = flipped(files[name], 40)
    assert verified(place, files) == [("damaged", name)]


@pytest.mark.parametrize("name", ["dropped-000002.parquet", "dropped-000003.parquet"])
def test_a_damaged_file_of_drops_is_named(tmp_path: Path, name: str) -> None:
    files = World().files()
    files[name] = flipped(files[name], 40)
    assert verified(tmp_path, files) == [("damaged", name)]


def test_a_part_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    world = World()
    files, name = world.files(), world.names()["A"]
    for version in (1, 2, 3):
        text = files[f"dataset-{version:06d}.json"].decode()
        files[f"dataset-{version:06d}.json"] = text.replace(
            hashlib.sha256(files[name]).hexdigest(), hashlib.sha256(b"no Parquet").hexdigest()).encode()
    files[name] = b"no Parquet"
    assert verified(tmp_path, files) == [("unreadable", name)]


@pytest.mark.parametrize("columns", [{name: kind for name, kind in SHARD.items() if name != "etag"},
                                     {**SHARD, "width": pa.int64()}, {**SHARD, "bytes": pa.large_binary()}])
def test_a_part_without_the_columns_of_a_shard_is_named(tmp_path: Path, columns: dict[str, pa.DataType]) -> None:
    world = World(columns=columns)
    assert verified(tmp_path, world.files()) == named(world, "columns A", "columns B", "columns C")


def test_all_that_is_wrong_is_named_and_not_only_the_first(tmp_path: Path) -> None:
    world = World()
    files, names = world.files(), world.names()
    del files[names["A"]], files["dataset-000002.json"]
    files[names["C"]] = flipped(files[names["C"]], -1)
    files["shards/x"] = b"x"
    assert verified(tmp_path, files) == named(world, "missing A", "missing dataset-000002.json", "damaged C",
                                              "foreign shards/x")


# --- JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dataset-000001.json", "dataset-000003.json", "_job-000002.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_json_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    assert verified(tmp_path, World().files() | {name: content}) == [("unreadable", name)]


@pytest.mark.parametrize(("broken", "is_told"), [(1, True), (2, True), (3, False)])
def test_what_is_wrong_with_a_pinned_version_or_an_earlier_one_is_named_and_with_a_later_one_not(
        tmp_path: Path, broken: int, is_told: bool) -> None:
    name = f"dataset-{broken:06d}.json"
    assert (("unreadable", name) in verified(tmp_path, World().files() | {name: b"{"}, version=2)) is is_told


@pytest.mark.parametrize(("key", "value"), [
    ("version", None), ("version", "1"), ("dataset_version", 7), ("counts", None), ("parts", None), ("parts", {}),
    ("parts", [{"name": "part-0000000-01234567.parquet"}]), ("source", {}), ("skeleton", {"joints": [1]}),
    ("parts", [{"name": "../../elsewhere", "sha256": "0" * 64, "counts": {}}]), ("dropped", "elsewhere.parquet"),
    ("dropped_sha256", 5), ("source", {"job": "x", "plan": {"digest": "x", "units": 1, "pictures": 1}})])
@pytest.mark.parametrize("version", [1, 3])
def test_wrong_keys_of_a_version_are_named(tmp_path: Path, key: str, value: Any, version: int) -> None:
    def edit(name: str, values: dict[str, Any]) -> None:
        if name == f"dataset-{version:06d}.json":
            values[key] = value

    assert verified(tmp_path, World(edit_json=edit).files()) == [("keys", f"dataset-{version:06d}.json")]


@pytest.mark.parametrize("key", ["digest", "plan", "intent", "input"])
def test_a_key_that_a_run_lacks_is_named(tmp_path: Path, key: str) -> None:
    def edit(name: str, values: dict[str, Any]) -> None:
        if name == "_job-000002.json":
            del values[key]

    assert verified(tmp_path, World(edit_json=edit).files()) == [("keys", "_job-000002.json")]


def test_an_intent_that_was_changed_is_damage(tmp_path: Path) -> None:
    def edit(name: str, values: dict[str, Any]) -> None:
        if name == "_job-000002.json":
            values["intent"] = {"seed": 1}

    assert verified(tmp_path, World(edit_json=edit).files()) == [("damaged", "_job-000002.json")]


def test_a_run_other_than_its_version_says_is_named(tmp_path: Path) -> None:
    files = World().files()
    files["_job-000002.json"] = files["_job-000001.json"]
    assert verified(tmp_path, files) == [("source", "_job-000002.json")]


@pytest.mark.parametrize("name", ["dataset-000002.json", "_job-000001.json"])
def test_a_newer_format_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write_files(str(tmp_path), World().files() | {name: b'{"version": 2}'})
    with pytest.raises(DataError, match=rf"{name} is of format 2.*Update"):
        verify(str(tmp_path))


def test_versions_that_disagree_about_a_part_are_named(tmp_path: Path) -> None:
    def edit(name: str, values: dict[str, Any]) -> None:
        if name == "dataset-000001.json":
            values["parts"][0]["sha256"] = "0" * 64

    world = World(edit_json=edit)
    assert verified(tmp_path, world.files()) == named(world, "source A")


def test_a_part_that_is_listed_twice_is_doubled(tmp_path: Path) -> None:
    def edit(name: str, values: dict[str, Any]) -> None:
        if name == "dataset-000003.json":
            values["parts"] += values["parts"][:1]

    world = World(edit_json=edit)
    assert verified(tmp_path, world.files()) == named(world, "doubled A")


def test_a_copy_that_a_version_names_too_is_doubled(tmp_path: Path) -> None:
    copy = "part-0000009-01234567.parquet"

    def edit(name: str, values: dict[str, Any]) -> None:
        if name == "dataset-000003.json":
            values["parts"] += [{**values["parts"][0], "name": copy}]

    world = World(edit_json=edit)
    files = world.files()
    files[f"shards/{copy}"] = files[world.names()["A"]]
    assert set(verified(tmp_path, files)) == {("doubled", f"shards/{copy}")}


def test_a_part_of_no_run_is_foreign_also_if_a_version_names_it(tmp_path: Path) -> None:
    world = World()
    files, old = world.files(), world.names()["C"]
    name = "part-0000000-01234567.parquet"
    files[f"shards/{name}"] = files.pop(old)
    for version in (2, 3):
        text = files[f"dataset-{version:06d}.json"].decode()
        files[f"dataset-{version:06d}.json"] = text.replace(old.removeprefix("shards/"), name).encode()
    assert verified(tmp_path, files) == named(world, f"foreign shards/{name}", "missing C")


# --- rows ---------------------------------------------------------------------------------------------------------

Damage = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(("row", "damage", "claim"), [
    (1, lambda row: row.update(sha256="0" * 64), "sha256"),
    (1, lambda row: row.update(sha256=None), "sha256"),
    (0, lambda row: row.update(width=0), "width"),
    (0, lambda row: row.update(height=None), "height"),
    (2, lambda row: row.update(error=None), "error"),
    (0, lambda row: row.update(error="but why"), "error"),
    (0, lambda row: row["persons"][0].update(box_xywh=[1.0, None, 3.0, 4.0]), "box of 4"),
    (0, lambda row: row["persons"][0].update(box_xywh=[1.0, float("nan"), 3.0, 4.0]), "box of 4"),
    (0, lambda row: row["persons"][0].update(keypoints=[0.0] * 5), "keypoints"),
    (0, lambda row: row["persons"][0].update(keypoints=[0.0] * 9), "2 joints"),
    (2, lambda row: row.update(persons=[person(1, 2, 2)]), "2 joints")])
def test_a_row_that_breaks_a_rule_is_named_with_the_rule(tmp_path: Path, row: int, damage: Damage,
                                                         claim: str) -> None:
    world = World()
    damage(world.rows["C"][row])
    write_files(str(tmp_path), world.files())
    finding, = verify(str(tmp_path))
    assert (finding.kind, finding.object) == ("row", world.names()["C"])
    assert claim in finding.expected
    assert world.rows["C"][row]["key"] in finding.found


def test_a_person_without_a_box_makes_the_part_unreadable(tmp_path: Path) -> None:
    world = World()  # Arrow writes a NULL among lists of 4 to Parquet, and then refuses to read it
    world.rows["C"][0]["persons"][0]["box_xywh"] = None
    assert verified(tmp_path, world.files()) == named(world, "unreadable C")


@pytest.mark.parametrize(("row", "damage", "expected"), [
    (1, lambda row: row.update(size=11), ["row C", "plan C"]),
    (1, lambda row: row.update(etag="another"), ["plan C"]),
    (1, lambda row: row.update(key=None), ["row C", "plan C"]),
    (1, lambda row: row.update(reason="truncated", error="x"), ["row C", "counts C", "counts C"]),
    (2, lambda row: row.update(reason=None, error=None), ["row C", "counts C", "counts C"]),
    (1, lambda row: row.update(bytes=None), ["row C", "counts C", "counts C", "counts dataset-000003.json"]),
    (1, lambda row: row.update(bytes=b"b" * 10), ["row C", "counts dataset-000003.json"])])
def test_what_is_wrong_in_more_than_one_way_is_named_in_each(tmp_path: Path, row: int, damage: Damage,
                                                             expected: list[str]) -> None:
    world = World()
    damage(world.rows["C"][row])
    assert verified(tmp_path, world.files()) == named(world, *expected)


def test_keypoints_of_any_number_of_joints_are_right_without_a_skeleton(tmp_path: Path) -> None:
    world = World(edit_json=lambda name, values: values.update(skeleton=None) if "counts" in values else None)
    world.rows["C"][0]["persons"] = [person(0, 0, 0)]
    assert verified(tmp_path, world.files()) == []


def test_rows_in_another_order_than_their_keys_are_named(tmp_path: Path) -> None:
    world = World()
    world.rows["C"].reverse()
    assert verified(tmp_path, world.files()) == named(world, "row C")


def test_keys_are_ordered_by_their_bytes(tmp_path: Path) -> None:
    world = World()
    for rows in (world.rows, world.planned):  # by UTF-16 units the last would come before the second
        for row, key in zip(rows["C"], ["c.jpg", "\uffee", "\U0001f600"], strict=True):
            row["key"] = key
    assert verified(tmp_path, world.files()) == []


# --- the plan -----------------------------------------------------------------------------------------------------


def recount(world: World, part: str, **counts: int) -> None:
    """All counts that the dataset gives of this part say so, and so do the sums."""
    for said in (world.metadata[part], *(live[part] for live in world.live.values() if part in live)):
        for name, more in counts.items():
            said[name] += more
    for version, total in world.totals.items():
        for name, more in counts.items():
            total[name] += more if part in world.live[version] else 0


@pytest.mark.parametrize(("damage", "counts", "expected"), [
    (lambda rows: rows.pop(1), {"rows": -1, "pictures": -1, "bytes": -10}, ["plan C", "counts dataset-000003.json"]),
    (lambda rows: rows.insert(2, picture("ee.jpg", b"new")), {"rows": 1, "pictures": 1, "bytes": 3}, ["plan C"]),
    (lambda rows: rows.insert(1, dict(rows[0], persons=None)), {"rows": 1, "pictures": 1, "bytes": 25},
     ["doubled C", "counts dataset-000003.json"])])
def test_rows_other_than_planned_are_named(tmp_path: Path, damage: Callable[[list[Any]], object],
                                           counts: dict[str, int], expected: list[str]) -> None:
    world = World()
    damage(world.rows["C"])
    recount(world, "C", **counts)
    assert verified(tmp_path, world.files()) == named(world, *expected)


def test_a_plan_other_than_the_one_that_was_frozen_is_named(tmp_path: Path) -> None:
    world = World()
    files, path = world.files(), f"{world.names()['plan2']}/plan-0000000.parquet"
    world.planned["C"][2]["etag"] = "another"
    files[path] = world.files()[f"{world.names()['plan2']}/plan-0000000.parquet"]
    assert verified(tmp_path, files) == sorted([("damaged", path.rpartition("/")[0]), *named(World(), "plan C")])


def test_a_plan_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    world = World()
    path = f"{world.names()['plan1']}/plan-0000000.parquet"
    assert verified(tmp_path, world.files() | {path: b"no Parquet"}) == [("unreadable", path)]


def test_a_unit_that_two_runs_have_is_doubled(tmp_path: Path) -> None:
    world = World()
    files = world.files()
    files["_job-000003.json"] = files["_job-000002.json"]
    values = json.loads(files["dataset-000003.json"])
    values["source"] |= {"plan": plan_json(world, 2), "job": job_digest(world, 2)}
    files["dataset-000003.json"] = json.dumps(values).encode()
    assert ("doubled", world.names()["C"]) in verified(tmp_path, files)


# --- live rows and what is dropped --------------------------------------------------------------------------------


def test_a_key_that_is_live_twice_is_named_with_both_parts(place: str) -> None:
    world = World()
    world.dropped = {2: world.dropped[2][1:], 3: [*world.dropped[3][1:]]}  # c.jpg of B was never dropped
    world.live[2]["B"] = world.metadata["B"]
    world.totals[2] |= {"rows": 7, "pictures": 5, "bytes": 95}
    write_files(place, world.files())
    finding, = verify(place, 2)
    assert finding.kind == "doubled"
    assert {finding.object, finding.found} == {world.names()["C"], f"'c.jpg' in {world.names()['B']} too"}


def test_keys_whose_hashes_are_equal_are_not_the_same_key(tmp_path: Path) -> None:
    write_files(str(tmp_path), World().files())
    chain = open_chain(str(tmp_path))
    reports = [check_stored_part(part) for part in parts_to_check(chain) if isinstance(part, PartToCheck)]
    same = [type(report)(**{**vars(report), "key_hashes": np.array([7], np.uint64)}) for report in reports]
    assert check_whole(chain, same) == []


def test_a_key_that_is_kept_out_and_live_is_named(tmp_path: Path) -> None:
    world = World()
    world.dropped[3].append((None, "e.jpg", "request"))
    assert verified(tmp_path, world.files()) == named(world, "dropped C")


def test_a_part_that_is_left_out_with_rows_that_nothing_drops_is_lost(tmp_path: Path) -> None:
    world = World()
    del world.dropped[3][1]  # d.jpg
    assert verified(tmp_path, world.files()) == named(world, "lost B")


def test_what_is_dropped_of_a_part_that_is_left_out_may_go(tmp_path: Path) -> None:
    world = World()
    world.live[4], world.totals[4], world.dropped[4], world.runs[4] = (
        world.live[3], world.totals[3], [(None, "z.jpg", "request")], "")
    assert verified(tmp_path, world.files()) == []


def test_what_was_dropped_stays_dropped(tmp_path: Path) -> None:
    world = World()
    del world.dropped[3][2]  # z.jpg, on request
    write_files(str(tmp_path), world.files())
    finding, = verify(str(tmp_path))
    assert (finding.kind, finding.object) == ("dropped", "dropped-000003.parquet")
    assert "z.jpg" in finding.found


@pytest.mark.parametrize("drop", [("part-0000005-01234567.parquet", "a.jpg", "removed"), ("A", "y.jpg", "removed"),
                                  ("B", "y.jpg", "removed")])
def test_a_drop_of_what_is_not_there_is_named(tmp_path: Path, drop: tuple[str, str, str]) -> None:
    world = World()
    world.dropped[3].append(drop)
    assert verified(tmp_path, world.files()) == [("dropped", "dropped-000003.parquet")]


@pytest.mark.parametrize(("content", "kind"), [(b"no Parquet", "unreadable"), (None, "columns")])
def test_a_file_of_drops_in_another_form_is_named(tmp_path: Path, content: bytes | None, kind: str) -> None:
    world = World(edit_json=lambda name, values: values.pop("dropped_sha256", None))
    files = world.files()
    files["dropped-000003.parquet"] = content or files[world.names()["plan1"] + "/plan-0000000.parquet"].replace(
        b"part", b"port")
    assert verified(tmp_path, files) == [(kind, "dropped-000003.parquet")]


# --- counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows", "pictures", "refused", "bytes", "persons", "trainable", "not_pictures"])
def test_a_wrong_count_is_named_wherever_it_is(tmp_path: Path, name: str) -> None:
    metadata, part, total = World(), World(), World()
    metadata.metadata["C"][name] += 1
    part.live[3]["C"][name] += 1
    total.totals[3][name] += 1
    assert verified(tmp_path / "1", metadata.files()) == named(metadata, "counts C")
    assert verified(tmp_path / "2", part.files()) == named(part, "counts C", "counts dataset-000003.json")
    assert verified(tmp_path / "3", total.files()) == [("counts", "dataset-000003.json")]


@pytest.mark.parametrize("reasons", [{}, {"truncated": 2}, {"other_size": 1}, {"truncated": 1, "not_a_picture": 1}])
def test_wrong_reasons_are_named(tmp_path: Path, reasons: dict[str, int]) -> None:
    world = World()
    world.metadata["C"]["reasons"] = reasons
    assert verified(tmp_path, world.files()) == named(world, "counts C")


def test_a_count_that_is_not_there_is_named(tmp_path: Path) -> None:
    world = World()
    del world.totals[3]["persons"]
    assert verified(tmp_path, world.files()) == [("counts", "dataset-000003.json")]


@pytest.mark.parametrize("wrong", [{}, {"rows": "3"}, {"reasons": []}, {"reasons": {"truncated": "1"}}])
def test_counts_that_are_none_are_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    world = World()
    world.live[3]["C"] = {**world.live[3]["C"], **wrong} if wrong else {}
    assert verified(tmp_path, world.files()) == named(world, "counts C", "counts dataset-000003.json")


def test_a_wrong_number_of_duplicates_is_named(tmp_path: Path) -> None:
    world = World()
    world.totals[3]["duplicates"] = 0
    assert verified(tmp_path, world.files()) == [("counts", "dataset-000003.json")]


# --- places -------------------------------------------------------------------------------------------------------


def test_a_run_that_has_not_ended_is_a_note_and_no_fault(tmp_path: Path) -> None:
    files = World().files()
    del files["dataset-000003.json"], files["dataset-000002.json"], files["_job-000003.json"]
    del files["dropped-000003.parquet"]
    assert verified(tmp_path, files) == []
    note, = open_chain(str(tmp_path)).notes
    assert "1 of its 1 parts" in note


def test_a_place_without_a_shard_dataset_is_refused(place: str) -> None:
    with pytest.raises(DataError, match=r"holds no shard dataset .* and no keypoint dataset"):
        open_chain(place)


def test_a_first_run_that_has_not_ended_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write_files(str(tmp_path), {"_job-000001.json": World().files()["_job-000001.json"]})
    with pytest.raises(DataError, match="repeat its command"):
        open_chain(str(tmp_path))


def test_a_version_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    write_files(str(tmp_path), World().files())
    with pytest.raises(DataError, match="versions 1 to 3, and no version 4"):
        open_chain(str(tmp_path), 4)


def test_a_person_is_trainable_by_one_visible_joint_unless_it_is_a_crowd() -> None:
    def person(*keypoints: float, crowd: bool = False) -> dict[str, Any]:
        return {"iscrowd": crowd, "keypoints": keypoints or None}

    persons = [person(9, 9, 0, 5, 5, 1), person(9, 9, 2, 5, 5, 0), person(9, 9, 0, 5, 5, 0), person(),
               person(9, 9, 2, 5, 5, 2, crowd=True)]
    counts = count_rows([{"num_bytes": 3, "persons": persons, "reason": None}])
    assert (counts["persons"], counts["trainable"]) == (5, 2)


def test_of_a_key_eight_bytes_are_kept_so_that_millions_fit_into_memory() -> None:
    # FIPS 180-2, appendix B.1, and the SHA-256 of nothing
    assert hash_keys(["", "abc"]).tolist() == [0xba7816bf8f01cfea, 0xe3b0c44298fc1c14]
