"""The storage seam: the same claims hold on a disk and on an S3 server."""

import threading
from pathlib import Path

import pytest

from pipeline import storage, storage_disk
from pipeline.errors import ConfigError
from pipeline.storage import join, list_objects, put_if_absent, read_object
from tests.s3 import S3Server


def test_what_was_put_is_read_back(place: str) -> None:
    assert put_if_absent(join(place, "a", "b.bin"), b"\x00bytes")
    assert read_object(join(place, "a", "b.bin")) == b"\x00bytes"


def test_a_second_put_is_refused_and_the_first_object_stays(place: str) -> None:
    put_if_absent(join(place, "one"), b"first")
    assert not put_if_absent(join(place, "one"), b"second")
    assert read_object(join(place, "one")) == b"first"


def test_of_many_writers_exactly_one_wins(place: str) -> None:
    won: list[int] = []

    def write(writer: int) -> None:
        if put_if_absent(join(place, "race"), f"writer {writer}".encode()):
            won.append(writer)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert read_object(join(place, "race")) == f"writer {won[0]}".encode()


def test_a_listing_is_ordered_by_bytes_and_names_are_relative(place: str) -> None:
    for name in ("b.jpg", "a/z.jpg", "B.jpg", "ä.jpg", "a.jpg"):
        put_if_absent(join(place, "pictures", name), name.encode())
    put_if_absent(join(place, "other", "c.jpg"), b"")
    listed = list(list_objects(join(place, "pictures")))
    assert [found.name for found in listed] == ["B.jpg", "a.jpg", "a/z.jpg", "b.jpg", "ä.jpg"]
    assert [found.size for found in listed] == [5, 5, 7, 5, 6]


def test_a_listing_of_nothing_is_empty(place: str) -> None:
    assert list(list_objects(join(place, "nowhere"))) == []


def test_folder_markers_are_not_objects(s3: S3Server, bucket: str) -> None:
    s3.client().put_object(Bucket=bucket[5:], Key="pictures/", Body=b"")
    put_if_absent(join(bucket, "pictures", "a.jpg"), b"x")
    assert [found.name for found in list_objects(join(bucket, "pictures"))] == ["a.jpg"]


def test_an_object_that_changed_since_it_was_listed_is_refused(s3: S3Server, place: str) -> None:
    put_if_absent(join(place, "a"), b"old")
    listed = next(iter(list_objects(place)))
    if storage.is_remote(place):
        s3.client().put_object(Bucket=place[5:], Key="a", Body=b"newer")
    else:
        Path(place, "a").write_bytes(b"newer")
    with pytest.raises(storage.ObjectChanged, match="a"):
        read_object(listed.uri, etag=listed.etag)


def test_an_object_that_is_not_there_is_missing(place: str) -> None:
    with pytest.raises(storage.ObjectMissing, match="nothing-here"):
        read_object(join(place, "nothing-here"))
    assert not storage.exists(join(place, "nothing-here"))


def test_the_sha256_of_a_written_object_is_known(place: str) -> None:
    put_if_absent(join(place, "abc"), b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.stored_sha256(join(place, "abc")) == expected


def test_the_probe_passes_on_a_store_that_honours_the_condition_and_leaves_nothing(place: str) -> None:
    storage.prove_put_if_absent(place)
    assert list(list_objects(place)) == []


def test_the_probe_refuses_a_store_that_ignores_the_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(uri: str, data: bytes) -> bool:
        Path(uri).write_bytes(data)
        return True

    monkeypatch.setattr(storage_disk, "put_if_absent", overwrite)
    with pytest.raises(storage.ConditionIgnored, match="If-None-Match"):
        storage.prove_put_if_absent(str(tmp_path))


def test_a_disk_keeps_no_temporary_file(tmp_path: Path) -> None:
    put_if_absent(str(tmp_path / "a"), b"1")
    put_if_absent(str(tmp_path / "a"), b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_without_hard_links_a_file_is_renamed_if_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    assert put_if_absent(str(tmp_path / "a"), b"first")
    assert not put_if_absent(str(tmp_path / "a"), b"second")
    assert (tmp_path / "a").read_bytes() == b"first"


def test_pyarrow_reads_what_was_put(place: str) -> None:
    put_if_absent(join(place, "file"), b"0123456789")
    filesystem, path = storage.arrow_filesystem(join(place, "file"))
    with filesystem.open_input_file(path) as file:
        file.seek(4)
        assert file.read(3) == b"456"


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", ""])
def test_an_address_of_another_kind_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError):
        storage.normalise(uri)


def test_a_missing_bucket_is_a_wrong_command(s3: S3Server) -> None:
    with pytest.raises(ConfigError, match="no such bucket"):
        list(list_objects("s3://there-is-no-such-bucket/x"))


@pytest.mark.parametrize(("first", "second"), [("/a/b", "/a/b/c"), ("/a/b/c", "/a/b"), ("s3://x/y", "s3://x/y/")])
def test_an_output_inside_its_input_is_refused(first: str, second: str) -> None:
    with pytest.raises(ConfigError, match="inside"):
        storage.refuse_overlap(first, second)


def test_an_output_beside_its_input_is_accepted() -> None:
    storage.refuse_overlap("/a/pictures", "/a/pictures-out")
