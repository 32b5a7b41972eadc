"""The storage seam: the same claims hold on a disk and on an S3 server."""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import storage, storage_disk
from pipeline.errors import ConfigError, DataError, ObjectMissing, ObjectTooLarge
from pipeline.storage import join, list_objects, put_if_absent, read_object
from tests.s3 import S3Server


@dataclass
class CredentialService:
    """What a container asks for its role's credentials; those that it gives end in 3 seconds."""

    uri: str = ""
    asked: list[str] = field(default_factory=list)


@contextlib.contextmanager
def credential_service(environment: dict[str, str]) -> Iterator[CredentialService]:
    service = CredentialService()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            service.asked.append(self.path)
            until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({
                "AccessKeyId": environment["AWS_ACCESS_KEY_ID"], "Token": None,
                "SecretAccessKey": environment["AWS_SECRET_ACCESS_KEY"],
                "Expiration": until.strftime("%Y-%m-%dT%H:%M:%SZ")}).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    service.uri = f"http://127.0.0.1:{server.server_address[1]}/credentials"
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()


def test_what_was_put_is_read_back(place: str) -> None:
    data = bytes(range(256))  # of which half is no UTF-8
    assert put_if_absent(join(place, "a", "b.bin"), data)
    assert read_object(join(place, "a", "b.bin")) == data
    assert storage.read_range(join(place, "a", "b.bin"), 200, 10) == data[200:210]


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


def test_folders_are_ordered_among_files_as_their_whole_names_are(place: str) -> None:
    names = ["a-b/c", "a.jpg", "a/z.jpg", "a0", "a/b/c", "a/b.c", "b"]
    for name in names:
        put_if_absent(join(place, name), b"")
    # "-" is 2d, "." is 2e, "/" is 2f, "0" is 30
    assert [found.name for found in list_objects(place)] == [
        "a-b/c", "a.jpg", "a/b.c", "a/b/c", "a/z.jpg", "a0", "b"]


def test_any_name_comes_back_as_it_was_given(place: str) -> None:
    names = sorted([" a", "a b", "a%20b", "a+b", "a&b<c>", 'a"b', "a'b", "a\\b", "ä", "日本", "😀", "a\x7f",
                    "a=b;c?d#e"])
    for name in names:
        assert put_if_absent(join(place, name), name.encode())
    listed = list(list_objects(place))
    assert [found.name for found in listed] == names
    assert [read_object(found.uri, etag=found.etag).decode() for found in listed] == names


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


def test_a_range_is_read(place: str) -> None:
    uri = join(place, "digits")
    put_if_absent(uri, b"0123456789")
    assert storage.read_range(uri, 2, 3) == b"234"
    assert storage.read_range(uri, 8, 5) == b"89"
    assert storage.read_range(uri, 10, 5) == b""
    put_if_absent(join(place, "nothing"), b"")
    assert storage.read_range(join(place, "nothing"), 0, 1) == b""


def test_a_range_of_another_object_than_the_listed_one_is_refused(place: str) -> None:
    put_if_absent(join(place, "digits"), b"0123456789")
    listed = next(list_objects(place))
    assert storage.read_range(listed.uri, 0, 1, etag=listed.etag) == b"0"
    with pytest.raises(storage.ObjectChanged, match="digits"):
        storage.read_range(listed.uri, 0, 1, etag="another")
    with pytest.raises(storage.ObjectMissing, match="nothing-here"):
        storage.read_range(join(place, "nothing-here"), 0, 1)


def test_an_object_is_described_as_it_is_listed(place: str) -> None:
    put_if_absent(join(place, "a", "b.bin"), b"12345")
    listed = next(list_objects(join(place, "a")))
    assert storage.describe_object(join(place, "a", "b.bin")) == listed
    assert storage.describe_object(join(place, "a", "b")) is None
    assert storage.describe_object(join(place, "a")) is None


def test_an_object_that_is_not_there_is_missing(place: str) -> None:
    with pytest.raises(storage.ObjectMissing, match="nothing-here"):
        read_object(join(place, "nothing-here"))
    assert not storage.exists(join(place, "nothing-here"))


def test_the_sha256_of_a_written_object_is_known(place: str) -> None:
    put_if_absent(join(place, "abc"), b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.stored_sha256(join(place, "abc")) == expected


def test_the_sha256_of_an_object_that_is_gone_is_an_error(place: str) -> None:
    with pytest.raises(storage.ObjectMissing, match="nothing-here"):
        storage.stored_sha256(join(place, "nothing-here"))


def test_the_sha256_of_somebody_elses_object_is_counted(s3: S3Server, place: str) -> None:
    put_if_absent(join(place, "b"), b"")
    if storage.is_remote(place):
        s3.client().put_object(Bucket=place[5:], Key="abc", Body=b"abc")
    else:
        Path(place, "abc").write_bytes(b"abc")
    assert storage.stored_sha256(join(place, "abc")) == hashlib.sha256(b"abc").hexdigest()


def test_the_kept_sha256_of_a_file_ends_when_the_file_is_edited_in_place(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    put_if_absent(str(path), b"abc")
    path.write_bytes(b"abd")
    assert storage.stored_sha256(str(path)) == hashlib.sha256(b"abd").hexdigest()


def test_the_kept_sha256_saves_reading_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_if_absent(str(tmp_path / "abc"), b"abc")
    if not os.listxattr(tmp_path / "abc"):
        pytest.skip(f"the filesystem of {tmp_path} keeps no extended attributes")
    monkeypatch.delattr(hashlib, "file_digest")
    assert storage.stored_sha256(str(tmp_path / "abc")) == hashlib.sha256(b"abc").hexdigest()


def test_a_disk_without_attributes_keeps_the_object_all_the_same(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_attributes(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", no_attributes)
    assert put_if_absent(str(tmp_path / "abc"), b"abc")
    assert storage.stored_sha256(str(tmp_path / "abc")) == hashlib.sha256(b"abc").hexdigest()


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


def test_a_probe_is_removed_when_something_fails_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise storage.StorageError("the disk is gone for a moment")

    monkeypatch.setattr(storage_disk, "read", fail)
    with pytest.raises(storage.StorageError, match="for a moment"):
        storage.prove_put_if_absent(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_on_the_disk_before_they_have_their_name_and_the_name_before_a_put_has_ended(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str | int] = []
    fsync, link = os.fsync, os.link

    def noting_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        steps.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "link", lambda *names: steps.append("name") or link(*names))
    put_if_absent(str(tmp_path / "part-1"), b"12345")
    assert steps == [5, "name", "folder"]


def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(storage.StorageError, match=r"part-1: writing 5 bytes failed: No space left.*Make room"):
        put_if_absent(str(tmp_path / "part-1"), b"12345")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(storage.StorageError, match="file/a"):
        put_if_absent(str(tmp_path / "file" / "a"), b"")


def test_a_name_of_255_bytes_can_be_put(tmp_path: Path) -> None:
    assert put_if_absent(str(tmp_path / ("x" * 255)), b"")


def test_a_disk_lists_files_and_links_to_files_and_warns_of_links_to_folders(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = tmp_path / "world"
    (world / ".hidden-folder").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for path in (world / "a", world / ".hidden", world / ".hidden-folder" / "b", tmp_path / "elsewhere" / "c"):
        path.write_bytes(b"123")
    (world / "linked-file").symlink_to(world / "a")
    (world / "linked-folder").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(world / "pipe")
    assert [(found.name, found.size) for found in list_objects(str(world))] == [
        (".hidden-folder/b", 3), ("a", 3), ("linked-file", 3)]
    warning, = caplog.messages
    assert f"{world}/linked-folder: a link to a folder, which is not followed" in warning


@pytest.mark.parametrize("target", ["nowhere", "dangling"])
def test_a_link_that_leads_nowhere_is_listed_and_missing(tmp_path: Path, target: str) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / target)  # or to itself
    (found,) = list_objects(str(tmp_path))
    with pytest.raises(storage.ObjectMissing, match="dangling"):
        read_object(found.uri, etag=found.etag)
    assert not storage.exists(found.uri)


def test_a_name_that_is_not_utf8_is_listed_and_read(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"latin")
    put_if_absent(str(tmp_path / "\U0010ffff"), b"last of unicode")
    listed = list(list_objects(str(tmp_path)))
    assert [os.fsencode(found.name) for found in listed] == [b"\xf4\x8f\xbf\xbf", b"\xff.jpg"]
    assert read_object(listed[1].uri, etag=listed[1].etag) == b"latin"


def test_what_vanishes_while_a_disk_is_listed_is_left_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d/e"):
        put_if_absent(str(tmp_path / name), b"")
    listing = list_objects(str(tmp_path))
    assert next(listing).name == "a"
    (tmp_path / "b").unlink()
    (tmp_path / "d" / "e").unlink()
    (tmp_path / "d").rmdir()
    assert [found.name for found in listing] == ["c"]


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


def test_what_is_wrong_with_a_file_is_told_apart_from_an_object_that_is_not_there(place: str) -> None:
    put_if_absent(join(place, "file"), b"no Parquet")
    with (pytest.raises(DataError, match=r"/file can't be read .*\. Mend it\."),
          storage.arrow_file(join(place, "file"), remedy="Mend it.") as file):
        pq.read_table(file)
    with pytest.raises(ObjectMissing), storage.arrow_file(join(place, "none"), remedy="Mend it."):
        pass


def test_an_object_above_the_limit_is_not_read(place: str) -> None:
    put_if_absent(join(place, "file"), b"0123456789")
    assert read_object(join(place, "file"), max_bytes=10) == b"0123456789"
    with pytest.raises(ObjectTooLarge, match="10 bytes, and the limit is 9"):
        read_object(join(place, "file"), max_bytes=9)


def test_a_name_that_is_too_long_for_any_object_is_a_missing_one(place: str) -> None:
    with pytest.raises(ObjectMissing):
        read_object(join(place, "x" * 1025))  # S3: 1,024 bytes; a disk: 255


def test_pyarrow_writes_what_can_be_read(place: str) -> None:
    put_if_absent(join(place, "first"), b"")
    filesystem, path = storage.arrow_filesystem(join(place, "from-arrow"))
    with filesystem.open_output_stream(path) as file:
        file.write(b"0123456789")
    assert read_object(join(place, "from-arrow")) == b"0123456789"


def test_pyarrow_renews_the_credentials_of_a_role_itself(
        s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_if_absent(join(bucket, "file"), b"0123456789")
    with credential_service(s3.environment) as service:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", service.uri)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        filesystem, path = storage.arrow_filesystem(join(bucket, "file"))
        asked_at_first = len(service.asked)
        assert filesystem.open_input_file(path).read() == b"0123456789"
        assert len(service.asked) > asked_at_first


@pytest.mark.slow
def test_ten_thousand_objects_are_all_found(s3: S3Server, bucket: str) -> None:
    names = [f"{'big' if i % 10 else f'small-{i % 70}'}/{i:06d} ä.jpg" for i in range(10_000)]
    client = s3.client()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: client.put_object(Bucket=bucket[5:], Key=f"p/{name}", Body=b"x"), names))
    assert [found.name for found in list_objects(join(bucket, "p"))] == sorted(names)


@pytest.mark.parametrize(("name", "value"), [("AWS_MAX_ATTEMPTS", "many"), ("AWS_PROFILE", "there-is-no-such-profile"),
                                             ("AWS_ENDPOINT_URL", "user:secret@nowhere")])
def test_settings_that_are_wrong_are_a_wrong_command(
        bucket: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="AWS settings") as raised:
        read_object(join(bucket, "x"))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "s3:///x", "s3://b\x01/x", "s3://a b/x", "s3:/b/x",
                                 "S3://b/x", ""])
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
