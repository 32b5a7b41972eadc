"""Whoever may put pictures, lists or datasets where they are read may call them what they like: names stay names.

The whole line on hostile names: each keeps its row, unchanged; nothing is written but the outputs; pages and archives
hold the names as text. Weights that run code: test_untrusted_weights.py.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path, PureWindowsPath
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import annotate, export, preview, shard, verify
from jobs.__main__ import _failed
from pipeline import shards, storage
from pipeline.coco import coco_json
from pipeline.config import AnnotateConfig, ExportConfig, PreviewConfig, ShardConfig, VerifyConfig
from pipeline.errors import DataError, printable
from pipeline.export import FORMATS, ExportOptions, export_keypoints
from pipeline.keypoints import read_keypoints
from pipeline.pose.skeleton import COCO17
from pipeline.preview.pictures import fetch_pictures
from tests.export_readers import READERS
from tests.s3 import S3Server
from tests.worlds import NO_TRACKING, write_tiny_model

SIZE_WH = (48, 40)
# what a folder can hold too
NAMES = (
    "C:\\x.jpg", "up\\..\\..\\x.jpg", "CON", "nul.jpg", "carriage\rreturn.jpg", "new\nline.jpg", "escape\x1b[2J.jpg",
    "%2e%2e%2fx.jpg", "a+b c.jpg", "invoice\u202egpj.exe", "zero\u200bwidth.jpg", "zerowidth.jpg", "caf\u00e9.jpg",
    "cafe\u0301.jpg", "<script>alert(1)<", "'\"><img src=x onerror=alert(1)>.jpg", "_SUCCESS", "$(touch x).jpg",
    "~root.jpg", "?versionId=1", "#f.jpg", "-rf")
LEAVING = ("../../etc/passwd", "a/../../b.jpg", "..", "..\\..\\x.jpg", "up\\..\\..\\x.jpg")
# what only a bucket has; moto's server is the one that can't take a line end
KEYS = (*(name for name in NAMES if name != "new\nline.jpg"), *LEAVING[:4], "/etc/passwd", "etc/passwd", "a/./b.jpg",
        "a//b.jpg", "a/b.jpg", ".", ".hidden.jpg", "<script>alert(1)</script>.jpg", "nu\0l.jpg", "file:///etc/passwd",
        "s3://other/x.jpg", "l" * 1017 + ".jpg")
TOLD = ["coco-results", "coco-annotations", "cvat", "label-studio", "fiftyone"]


@dataclass(frozen=True)
class Line:
    """Hostile names after `shard` and `annotate`. `around` is the folder that has the outputs in `out`, and more."""

    names: tuple[str, ...]
    around: Path
    images: str

    @property
    def out(self) -> Path:
        return self.around / "out"


def picture(number: int) -> bytes:
    """A picture that no other number gives."""
    return bytes(cv2.imencode(".png", np.full((*SIZE_WH[::-1], 3), number, np.uint8))[1])


def annotations(names: Sequence[str]) -> bytes:
    """COCO keypoints: one person in each picture."""
    images = [{"id": number, "file_name": name, "width": SIZE_WH[0], "height": SIZE_WH[1]}
              for number, name in enumerate(names, start=1)]
    persons = [{"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, "bbox": [4, 4, 30, 30], "area": 900,
                "num_keypoints": 1, "keypoints": [9, 9, 2] + [0] * 48} for number in range(1, len(names) + 1)]
    return json.dumps({"images": images, "annotations": persons,
                       "categories": coco_json((), COCO17)["categories"]}).encode()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below the folder but those of the outputs."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            and not path.is_relative_to(folder / "out")}


def annotated(around: Path, images: str, names: tuple[str, ...]) -> Line:
    (around / "annotations.json").write_bytes(annotations(names))
    model = write_tiny_model(around / "model")
    before = tree(around)
    out = str(around / "out")
    shard.run(ShardConfig(images=images, annotations=str(around / "annotations.json"), output=f"{out}/shards",
                          images_per_shard=10, tracking=NO_TRACKING))
    annotate.run(AnnotateConfig(input=f"{out}/shards", model=str(model), output=f"{out}/keypoints", actors=1,
                                precision="float32", tracking=NO_TRACKING))
    assert tree(around) == before
    return Line(names, around, images)


@pytest.fixture(scope="module", params=["bucket", "folder"])
def line(request: pytest.FixtureRequest, s3: S3Server, tmp_path_factory: pytest.TempPathFactory,
         without_ray: None) -> Line:
    around = tmp_path_factory.mktemp("around")
    if request.param == "folder":
        (around / "in").mkdir()
        for number, name in enumerate(NAMES):
            (around / "in" / name).write_bytes(picture(number))
        return annotated(around, str(around / "in"), NAMES)
    images = f"{s3.create_bucket('hostile-names')}/in"
    for number, name in enumerate(KEYS):
        s3.client().put_object(Bucket="hostile-names", Key=f"in/{name}", Body=picture(number))
    return annotated(around, images, KEYS)


# --- rows ---------------------------------------------------------------------------------------------------------


def test_every_name_keeps_its_row_and_its_own_picture(line: Line) -> None:
    sharded = shards.open_shards(str(line.out / "shards"))
    stored = {row["key"]: row["bytes"] for part in sharded.parts
              for row in shards.read_part_columns(sharded, part, ["key", "bytes"]).to_pylist()}
    assert stored == {name: picture(number) for number, name in enumerate(line.names)}
    table, _ = read_keypoints(str(line.out / "keypoints"))
    assert sorted(table["key"].to_pylist()) == sorted(line.names)
    assert dict(zip(table["key"].to_pylist(), table["image_id"].to_pylist(), strict=True)) == {
        name: number for number, name in enumerate(line.names, start=1)}
    assert set(table["status"].to_pylist()) == {"ok"}


def test_what_was_written_is_verified(line: Line) -> None:
    for data in ("shards", "keypoints"):
        assert verify.run(VerifyConfig(data=str(line.out / data)))["rows"] == len(line.names)


def test_pictures_are_annotated_from_where_they_are_too(line: Line) -> None:
    before = tree(line.around)
    done = annotate.run(AnnotateConfig(input=line.images, model=str(line.around / "model"), boxes="whole-image",
                                       output=str(line.out / "direct"), actors=1, precision="float32",
                                       tracking=NO_TRACKING))
    table, _ = read_keypoints(str(line.out / "direct"))
    assert (done["counts"]["rejected"], sorted(table["key"].to_pylist())) == (0, sorted(line.names))
    assert tree(line.around) == before


@pytest.mark.usefixtures("without_ray")
def test_a_list_may_name_what_no_file_can_be_called(tmp_path: Path) -> None:
    storage.put_if_absent(f"{tmp_path}/a.png", picture(7))
    impossible = [f"{tmp_path}/nu\0l.png", f"{tmp_path}/{'l' * 1020}.png", f"{tmp_path}/a.png/b.png", f"{tmp_path}/\n"]
    uris = [f"{tmp_path}/a.png", *impossible]
    pq.write_table(pa.table({"uri": uris}), tmp_path / "list.parquet")
    shard.run(ShardConfig(images=f"{tmp_path}/list.parquet", output=f"{tmp_path}/shards", tracking=NO_TRACKING))
    model = write_tiny_model(tmp_path / "model")
    done = annotate.run(AnnotateConfig(input=f"{tmp_path}/list.parquet", model=str(model), boxes="whole-image",
                                       output=f"{tmp_path}/out", actors=1, max_rejected_share=1, tracking=NO_TRACKING))
    assert done["counts"]["reasons"] == {"missing": 4}
    sharded = shards.open_shards(f"{tmp_path}/shards")
    stored = [row for part in sharded.parts for row in shards.read_part_columns(sharded, part, [
        "key", "reason"]).to_pylist()]
    assert {row["key"]: row["reason"] for row in stored} == {uris[0]: None, **dict.fromkeys(impossible, "missing")}


# --- the page -----------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """A page's tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_has_the_names_as_text_and_no_script_of_theirs(line: Line) -> None:
    before = tree(line.around)
    done = preview.run(PreviewConfig(keypoints=str(line.out / "keypoints"), output=str(line.out / "preview"),
                                     pictures=100, tracking=NO_TRACKING))
    page = Elements(Path(done["output"]).read_bytes().decode())
    assert not page.tags & {"script", "iframe", "object", "embed", "form", "base", "link"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    sources = [value or "" for name, value in page.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:image/jpeg;base64,", "#section-")) for value in sources)
    shown = [value for name, value in page.attributes if name == "alt"]
    assert done["pictures"] == len(shown) == len(set(shown))
    assert set(shown) <= set(line.names) & set(page.texts)
    assert len(shown) > 10
    assert tree(line.around) == before


@pytest.mark.parametrize("key", ["../secret.png", "a/../x.png", "a/../../secret.png", "//x.png", "./x.png",
                                 "a//x.png", "nu\0l.png", "l" * 1020, "/x.png", ""])
def test_a_key_is_no_path_out_of_a_folder_of_pictures(tmp_path: Path, key: str) -> None:
    for name in ("secret.png", "pictures/x.png", "pictures/a/x.png"):
        storage.put_if_absent(f"{tmp_path}/{name}", b"not for the page")
    source = {"kind": "prefix", "uri": f"{tmp_path}/pictures"}
    ((_, found),) = fetch_pictures(source, [key])
    assert isinstance(found, storage.ObjectMissing)
    assert dict(fetch_pictures(source, ["a/x.png"])) == {"a/x.png": b"not for the page"}


# --- exports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", TOLD)
def test_every_format_names_every_picture_as_it_is_called(line: Line, to: str) -> None:
    before = tree(line.around)
    output = line.out / f"export-{to}"
    more: dict[str, Any] = {"image_prefix": "s3://bucket/"} if to == "label-studio" else {}
    done = export.run(ExportConfig(keypoints=str(line.out / "keypoints"), to=to, output=str(output), **more))
    assert done["persons"] == len(line.names)
    if to == "coco-results":  # pictures by number
        assert {one["image_id"] for one in json.loads(output.read_bytes())} == set(range(1, len(line.names) + 1))
    else:
        assert set(READERS[to](output.read_bytes(), dict.fromkeys(line.names, SIZE_WH))) == set(line.names)
    assert tree(line.around) == before


def test_no_archive_has_a_member_that_leaves_its_folder(line: Line, tmp_path: Path) -> None:
    table, metadata = read_keypoints(str(line.out / "keypoints"))
    options = ExportOptions(image_prefix="s3://bucket/")
    for to in FORMATS:
        names = yolo_names(line.names) if to == "yolo-pose" else line.names
        rows = table.filter(pa.array([key in names for key in table["key"].to_pylist()]))
        data = export_keypoints(rows, to, skeleton=metadata.skeleton, options=options).data
        if not zipfile.is_zipfile(io.BytesIO(data)):
            continue
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.namelist()
        for path in members:
            windows = PureWindowsPath(path)
            assert ".." not in windows.parts, path
            assert not windows.root, path
            assert not windows.drive, path
            assert (tmp_path / path).resolve().is_relative_to(tmp_path.resolve()), path
        assert len({(tmp_path / path).resolve() for path in members}) == len(members)
        if to == "yolo-pose":
            assert len(members) == 1 + len(names)


def yolo_names(names: Sequence[str]) -> set[str]:
    """Those that yolo-pose takes: without a step out, without NUL, one of those with the same label file."""
    same = {"/etc/passwd", "a/./b.jpg", "a//b.jpg", "nu\0l.jpg", ".", "file:///etc/passwd"}
    return set(names) - same - set(LEAVING)


@pytest.mark.parametrize("key", [*LEAVING, "nu\0l.jpg"])
def test_yolos_archive_refuses_a_key_that_would_leave_its_folder(line: Line, key: str) -> None:
    with pytest.raises(DataError, match=r"Give the picture another name, or export to a format of one file"):
        export_yolo(line, key)


@pytest.mark.parametrize("pair", [("/etc/passwd", "etc/passwd"), ("a/b.jpg", "a/./b.jpg"), ("a/b.jpg", "a//b.jpg")])
def test_two_keys_that_would_be_one_file_when_unpacked_are_refused(line: Line, pair: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="would both have the labels"):
        export_yolo(line, *pair)


def export_yolo(line: Line, *keys: str) -> None:
    table, metadata = read_keypoints(str(line.out / "keypoints"))
    rows = pa.concat_tables([table.slice(0, 1).set_column(0, table.schema.field(0), pa.array([key])) for key in keys])
    export_keypoints(rows, "yolo-pose", skeleton=metadata.skeleton)


# --- people's terminals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "seen"), [
    ("caf\u00e9 \u540d.jpg", "caf\u00e9 \u540d.jpg"), ("a\x1b[2Jb", r"a\x1b[2Jb"), ("a\rb\x9bc", r"a\rb\x9bc"),
    ("invoice\u202egpj.exe", r"invoice\u202egpj.exe"), ("a\n12:00:00 all is well", "a\n    12:00:00 all is well")])
def test_what_a_name_says_to_the_terminal_is_shown(said: str, seen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(said) == seen
    assert _failed(1, DataError(said)) == 1
    assert capsys.readouterr().err == f"failed: {seen}\n"
