"""Shard datasets without Ray: which picture goes where, one row, one part, reading back, damage."""

import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import shards, storage
from pipeline.coco import AnnotatedImage, Person
from pipeline.errors import DataError
from pipeline.images import read_header
from pipeline.shard_plan import DROPPED
from pipeline.storage import join, put_if_absent

PERSON = Person(annotation_id=5, box_xywh=(1.5, 2.0, 3.0, 4.25), area=6.5, iscrowd=False, num_keypoints=1,
                keypoints=(1.0, 2.0, 2.0, 0.0, 0.0, 0.0))


def png(width: int = 8, height: int = 6) -> bytes:
    encoded, data = cv2.imencode(".png", np.full((height, width, 3), 127, np.uint8))
    assert encoded
    return bytes(data)


def row(data: bytes, image: AnnotatedImage | None = None, **planned: Any) -> dict[str, Any]:
    return shards.shard_row({"key": "a.png", "etag": "e", "size": len(data)} | planned, image, lambda: data,
                            read_header, max_bytes=10**6)


def test_a_row_keeps_the_bytes_as_stored_and_the_annotation_to_the_last_digit() -> None:
    data = png()
    image = AnnotatedImage(7, "a.png", 8, 6, (PERSON,))
    made = row(data, image)
    assert made["bytes"] == data
    assert made["sha256"] == hashlib.sha256(data).hexdigest()
    assert (made["image_id"], made["width"], made["height"], made["reason"]) == (7, 8, 6, None)
    table = shards.pq.read_table(shards.pa.BufferReader(shards.part_bytes([made])))
    person = table["persons"].to_pylist()[0][0]
    assert person["box_xywh"] == [1.5, 2.0, 3.0, 4.25]
    assert person["keypoints"] == [1.0, 2.0, 2.0, 0.0, 0.0, 0.0]


def test_a_picture_that_no_annotation_speaks_of_has_no_persons_column() -> None:
    assert row(png())["persons"] is None
    assert row(png(), AnnotatedImage(7, "a.png", 8, 6, ()))["persons"] == []


def test_what_is_no_picture_keeps_its_row_with_the_reason_and_without_bytes() -> None:
    made = row(b"hello, world")
    assert made["reason"] == "not_a_picture"
    assert made["bytes"] is None
    assert made["error"]


def test_a_picture_of_another_size_than_its_annotations_say_is_refused() -> None:
    made = row(png(), AnnotatedImage(7, "a.png", 6, 8, (PERSON,)))
    assert (made["reason"], made["bytes"]) == ("other_size", None)
    assert "6x8" in made["error"]
    assert "8x6" in made["error"]


@pytest.mark.parametrize(("error", "reason"), [(storage.ObjectMissing, "missing"), (storage.ObjectChanged, "changed"),
                                               (storage.ObjectForbidden, "unreadable_object")])
def test_trouble_with_the_object_becomes_its_reason(error: type[Exception], reason: str) -> None:
    def read() -> bytes:
        raise error("a.png: gone")

    made = shards.shard_row({"key": "a.png", "etag": "e", "size": 1}, None, read, read_header, max_bytes=10)
    assert (made["reason"], made["error"]) == (reason, "a.png: gone")


def test_trouble_with_the_store_never_becomes_a_row() -> None:
    def read() -> bytes:
        raise storage.StorageError("503 SlowDown")

    with pytest.raises(storage.StorageError, match="SlowDown"):
        shards.shard_row({"key": "a", "etag": "", "size": 1}, None, read, read_header, max_bytes=10)


def test_the_same_rows_give_the_same_bytes() -> None:
    assert shards.part_bytes([row(png())]) == shards.part_bytes([row(png())])


def write_dataset(place: str) -> shards.ShardDataset:
    data = shards.part_bytes([row(png(), key="a.png"), row(b"", key="b.png")])
    put_if_absent(join(place, "shards", "part-0000000-12345678.parquet"), data)
    part = shards.ShardPart("part-0000000-12345678.parquet", hashlib.sha256(data).hexdigest(), {"rows": 2})
    put_if_absent(join(place, "dataset-000001.json"), shards.dataset_json(
        [part], version=1, skeleton=None, source={}, counts={"rows": 2}))
    return shards.open_shards(place)


def test_a_dataset_is_opened_at_its_newest_version(place: str) -> None:
    dataset = write_dataset(place)
    assert dataset.version == 1
    table = shards.read_part(dataset, dataset.parts[0])
    assert table["key"].to_pylist() == ["a.png", "b.png"]
    assert shards.read_part_columns(dataset, dataset.parts[0], ["key", "size"]).column_names == ["key", "size"]


def test_a_flipped_byte_in_a_part_is_found_and_the_part_is_named(tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path))
    path = tmp_path / "shards" / dataset.parts[0].name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=dataset.parts[0].name):
        shards.read_part(dataset, dataset.parts[0])


def test_a_part_whose_columns_cannot_be_read_is_named(tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path))
    (tmp_path / "shards" / dataset.parts[0].name).write_bytes(b"no Parquet")
    with pytest.raises(DataError, match=dataset.parts[0].name):
        shards.read_part_columns(dataset, dataset.parts[0], ["key"])


def drop_first(place: Path) -> str:
    """Version 2 of a dataset of two rows, without the first; the name of its list of drops."""
    dataset, name = write_dataset(str(place)), "dropped-000002.parquet"
    gone = pa.table([[dataset.parts[0].name], ["a.png"], ["request"]], schema=DROPPED)
    pq.write_table(gone, place / name)
    sha256 = hashlib.sha256((place / name).read_bytes()).hexdigest()
    put_if_absent(str(place / "dataset-000002.json"), shards.dataset_json(
        dataset.parts, version=2, skeleton=None, source={}, counts={"rows": 1}, dropped=(name, sha256)))
    return name


def test_a_list_of_drops_that_is_not_the_versions_own_is_refused_by_name(tmp_path: Path) -> None:
    name = drop_first(tmp_path)
    dataset = shards.open_shards(str(tmp_path))
    assert shards.read_part(dataset, dataset.parts[0])["key"].to_pylist() == ["b.png"]
    pq.write_table(DROPPED.empty_table(), tmp_path / name)  # else the picture that was taken out would be back
    with pytest.raises(DataError, match=f"{name} is damaged"):
        shards.open_shards(str(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} can't be read"):
        shards.open_shards(str(tmp_path))


def test_a_place_without_a_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no shard dataset"):
        shards.open_shards(str(tmp_path))


def test_a_dataset_of_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    put_if_absent(str(tmp_path / "dataset-000001.json"), b'{"version": 2}')
    with pytest.raises(DataError, match="format 2"):
        shards.open_shards(str(tmp_path))
