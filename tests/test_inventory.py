"""Lists of objects: Parquet and CSV of URIs, S3 Inventory's own files."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import inventory
from pipeline.errors import ConfigError, DataError
from pipeline.storage import put_if_absent


def read(uri: str) -> list[tuple[str, str | None, int | None]]:
    return [tuple(row.values()) for table in inventory.read_list(uri) for row in table.to_pylist()]


def write_csv(folder: Path, text: str, name: str = "list.csv") -> str:
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


@pytest.mark.parametrize("uri", ["a/b.parquet", "s3://b/l.csv", "/l.csv.gz", "s3://b/inv/2026-11-22T01-00Z/manifest.json"])
def test_a_list_is_known_by_its_ending(uri: str) -> None:
    assert inventory.is_list(uri)
    assert not inventory.is_list(uri + "/pictures")


@pytest.mark.parametrize("name", ["list.csv", "list.csv.gz"])
def test_a_csv_of_uris(tmp_path: Path, name: str) -> None:
    uri = write_csv(tmp_path, "uri,etag,size,other\ns3://b/a 1.jpg,0012,7,x\n/local.jpg,,,y\n", name)
    assert read(uri) == [("s3://b/a 1.jpg", "0012", 7), ("/local.jpg", None, None)]


def test_addresses_of_every_right_kind_are_taken(tmp_path: Path) -> None:
    uris = ["/a:b.jpg", "c d.jpg", "file:///e.jpg", "s3://Old_Bucket/x", "s3://bucket/a:b"]
    assert [row[0] for row in read(write_csv(tmp_path, "uri\n" + "\n".join([*uris, "s3://bucket/folder/"])))] == uris


def test_an_entry_is_counted_in_the_whole_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "ROWS_AT_ONCE", 2)
    pq.write_table(pa.table({"uri": ["a", "b", "c", "d", "gs://b/e"]}), tmp_path / "l.parquet")
    with pytest.raises(DataError, match="entry 5 "):
        read(str(tmp_path / "l.parquet"))


def test_etag_and_size_may_be_missing(tmp_path: Path) -> None:
    assert read(write_csv(tmp_path, "uri\na.jpg\n")) == [("a.jpg", None, None)]


def inventory_table() -> pa.Table:
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory.html: the Parquet files' column names
    return pa.table({
        "bucket": ["raw"] * 5, "key": ["p/a+b.jpg", "p/", "p/old.jpg", "p/gone.jpg", "p/c.jpg"],
        "version_id": ["1"] * 5, "is_latest": [True, True, False, True, True],
        "is_delete_marker": [False, False, False, True, False], "size": [10, 0, 5, None, 20],
        "e_tag": ["e1", "e2", "e3", None, "e5"]})


def test_an_inventorys_parquet_gives_the_latest_versions_of_what_is_there(tmp_path: Path) -> None:
    pq.write_table(inventory_table(), tmp_path / "i.parquet")
    assert read(str(tmp_path / "i.parquet")) == [("s3://raw/p/a+b.jpg", "e1", 10), ("s3://raw/p/c.jpg", "e5", 20)]


def manifest(bucket: str, kind: str, key: str) -> bytes:
    return json.dumps({"sourceBucket": "raw", "destinationBucket": f"arn:aws:s3:::{bucket[5:]}", "fileFormat": kind,
                       "fileSchema": "Bucket, Key, Size, ETag", "files": [{"key": key, "size": 1}]}).encode()


def test_an_inventorys_manifest_leads_to_csv_with_encoded_keys_and_no_header(bucket: str) -> None:
    csv = b'"raw","p/a%2Bb%20c.jpg","10","e1"\n"raw","p/%C3%A4.jpg","20","e2"\n'
    put_if_absent(f"{bucket}/inv/data/1.csv.gz", gzip.compress(csv))
    put_if_absent(f"{bucket}/inv/day/manifest.json", manifest(bucket, "CSV", "inv/data/1.csv.gz"))
    assert read(f"{bucket}/inv/day/manifest.json") == [
        ("s3://raw/p/a+b c.jpg", "e1", 10), ("s3://raw/p/ä.jpg", "e2", 20)]


def test_an_inventorys_manifest_leads_to_parquet(tmp_path: Path, bucket: str) -> None:
    pq.write_table(inventory_table(), tmp_path / "1.parquet")
    put_if_absent(f"{bucket}/inv/data/1.parquet", (tmp_path / "1.parquet").read_bytes())
    put_if_absent(f"{bucket}/inv/day/manifest.json", manifest(bucket, "Parquet", "inv/data/1.parquet"))
    assert [row[0] for row in read(f"{bucket}/inv/day/manifest.json")] == ["s3://raw/p/a+b.jpg", "s3://raw/p/c.jpg"]


@pytest.mark.parametrize(("text", "said"), [
    ("path,size\na,1\n", "path, size"), ("uri\na\n\"\"\nb\n", "1 entries name no object"),
    ("uri,size\na,large\n", "can't be read"), ("", "can't be read"),
    ("uri\na\nhttps://host/x.jpg\n", r"entry 2 .*'https://host/x.jpg'.* expected a local path or s3://"),
    ("uri\ngs://b/x.jpg\n", "entry 1 .*'gs://b/x.jpg'"), ("uri\na\nb\ns3:///x.jpg\n", "entry 3 .*no bucket"),
    ("bucket,key\na b,x.jpg\n", "entry 1 .*'s3://a b/x.jpg': no bucket"), ("uri\ns3://b\n", "entry 1 .*no object")])
def test_a_wrong_list_is_refused_with_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(write_csv(tmp_path, text))


@pytest.mark.parametrize("values", [{}, {"files": []}, {
    "destinationBucket": "b", "files": [], "fileSchema": "Bucket, Key", "fileFormat": "ORC"}])
def test_a_wrong_manifest_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"ORC|no manifest"):
        read(str(tmp_path / "manifest.json"))


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such list"):
        read(str(tmp_path / "none.csv"))


# --- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_keys_are_the_lines_of_a_file_whatever_they_hold(tmp_path: Path, end: str, mark: str) -> None:
    # U+0085, U+2028 and form feed end a line for `splitlines`, and are a key's for an object store
    keys = ["a\x85b.jpg", " c\u2028d.jpg ", "e\x0cf.jpg", "plain.jpg"]
    (tmp_path / "keys.txt").write_bytes((mark + end.join(["", *keys, "", ""])).encode())
    assert inventory.read_keys(str(tmp_path / "keys.txt"), flag="--exclude") == keys


@pytest.mark.parametrize(("data", "says"), [(None, "no such file"), (b"\xff", "not UTF-8")])
def test_a_file_without_keys_is_refused_by_its_flag(tmp_path: Path, data: bytes | None, says: str) -> None:
    if data:
        (tmp_path / "keys.txt").write_bytes(data)
    with pytest.raises(ConfigError, match=f"--exclude {tmp_path}/keys.txt: .*{says}"):
        inventory.read_keys(str(tmp_path / "keys.txt"), flag="--exclude")
