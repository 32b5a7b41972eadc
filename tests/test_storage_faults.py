"""What storage does when the network or the store fails: the same result while attempts are left, then an error that
names the object. The failures happen on the wire, between the client and a real server."""

import re
import threading
from collections.abc import Callable

import pytest

from pipeline import storage, storage_s3
from pipeline.errors import ConfigError
from pipeline.storage import StorageError, join, list_objects, put_if_absent, read_object
from tests.fault_proxy import (
    FLIPPED,
    INTERNAL_ERROR,
    INTERNAL_ERROR_AFTER,
    RESET,
    RESET_AFTER,
    SLOW_DOWN,
    TIMEOUT,
    TIMEOUT_AFTER,
    TRUNCATED,
    Fault,
    FaultProxy,
    denied,
)
from tests.s3 import S3Server

ATTEMPTS = storage_s3.ATTEMPTS
FAULTS = {"500": INTERNAL_ERROR, "500 after": INTERNAL_ERROR_AFTER, "SlowDown": SLOW_DOWN, "time-out": TIMEOUT,
          "time-out after": TIMEOUT_AFTER, "reset": RESET, "reset after": RESET_AFTER, "truncated": TRUNCATED,
          "409": Fault("status", status=409, code="ConditionalRequestConflict"),
          "429": Fault("status", status=429, code="TooManyRequests")}
BEFORE = [name for name in FAULTS if "after" not in name and name != "truncated"]
AFTER = [name for name in FAULTS if "after" in name]
QUICK = [name for name in FAULTS if "time-out" not in name]  # a time-out takes a second


def names_under(uri: str) -> list[str]:
    return [found.name for found in list_objects(uri)]


def size_of(uri: str) -> int | None:
    found = storage.describe_object(uri)
    return None if found is None else found.size


def read_by_pyarrow(bucket: str) -> bytes:
    with storage.arrow_file(join(bucket, "a"), remedy="") as file:
        return bytes(file.read())


REQUESTS: dict[str, tuple[str, Callable[[str], object], object]] = {
    "a whole read": ("GET", lambda bucket: read_object(join(bucket, "a")), b"0123456789"),
    "a ranged read": ("GET", lambda bucket: storage.read_range(join(bucket, "a"), 2, 5), b"23456"),
    "a description": ("HEAD", lambda bucket: size_of(join(bucket, "a")), 10),
    "a listing": ("LIST", names_under, ["a", "b"]),
}


@pytest.fixture
def world(bucket: str) -> str:
    """A bucket with two objects."""
    put_if_absent(join(bucket, "a"), b"0123456789")
    put_if_absent(join(bucket, "b"), b"")
    return bucket


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_below_the_limit_changes_nothing(
        world: str, faulty_s3: FaultProxy, request_name: str, fault: str) -> None:
    kind, act, expected = REQUESTS[request_name]
    times = 1 if "time-out" in fault else ATTEMPTS - 1
    faulty_s3.fail(kind, FAULTS[fault], path=world[5:], times=times)
    assert act(world) == expected
    # a HEAD has no body that could be cut
    assert len(faulty_s3.asked(kind)) == (1 if (kind, fault) == ("HEAD", "truncated") else times + 1)


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("fault", QUICK)
def test_a_fault_that_stays_is_an_error_that_names_the_object_and_the_attempts(
        world: str, faulty_s3: FaultProxy, request_name: str, fault: str) -> None:
    kind, act, _ = REQUESTS[request_name]
    if (kind, fault) == ("HEAD", "truncated"):
        pytest.skip("a HEAD has no body that could be cut")
    faulty_s3.fail(kind, FAULTS[fault], times=100)
    with pytest.raises(StorageError, match=f"{re.escape(world)}.*6 attempts failed.* because") as raised:
        act(world)
    assert not isinstance(raised.value, storage.ABOUT_THE_OBJECT)
    assert len(faulty_s3.asked(kind)) == ATTEMPTS


@pytest.mark.parametrize("kind", ["HEAD", "GET"])
@pytest.mark.parametrize("fault", [SLOW_DOWN, INTERNAL_ERROR, RESET, denied("ExpiredToken")],
                         ids=lambda fault: fault.action + fault.code)
def test_what_the_service_does_to_pyarrow_is_the_services_error_too(
        world: str, faulty_s3: FaultProxy, monkeypatch: pytest.MonkeyPatch, kind: str, fault: Fault) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    faulty_s3.fail(kind, fault, path="/a", times=100)
    with pytest.raises(StorageError, match=f"{re.escape(world)}/a: ") as raised:
        read_by_pyarrow(world)
    assert not isinstance(raised.value, storage.ABOUT_THE_OBJECT)


@pytest.mark.parametrize(("denied_path", "kind"), [("/a", storage.ObjectForbidden), ("", StorageError)])
def test_a_refusal_to_pyarrow_is_about_the_object_if_one_beside_it_can_be_read(
        world: str, faulty_s3: FaultProxy, denied_path: str, kind: type[StorageError]) -> None:
    for request in ("HEAD", "GET"):
        faulty_s3.fail(request, denied("AccessDenied"), path=world[5:] + denied_path, times=100)
    with pytest.raises(StorageError) as raised:
        read_by_pyarrow(world)
    assert type(raised.value) is kind


@pytest.mark.parametrize("times", [1, ATTEMPTS - 1])
def test_a_flipped_byte_in_what_we_wrote_is_found_and_read_again(
        world: str, faulty_s3: FaultProxy, times: int) -> None:
    faulty_s3.fail("GET", FLIPPED, times=times)
    assert read_object(join(world, "a")) == b"0123456789"


def test_an_object_that_stays_damaged_is_named(world: str, faulty_s3: FaultProxy) -> None:
    faulty_s3.fail("GET", FLIPPED, times=100)
    # by our own SHA-256, or by the store's checksum where it keeps one
    with pytest.raises(StorageError, match=r"/a: 6 attempts failed.*(damaged|hecksum)"):
        read_object(join(world, "a"))


def test_our_own_sha256_is_checked_where_the_store_keeps_no_checksum(
        world: str, faulty_s3: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "WHEN_REQUIRED")
    faulty_s3.fail("GET", FLIPPED, times=100)
    with pytest.raises(StorageError, match=r"/a: 6 attempts failed.*damaged"):
        read_object(join(world, "a"))


@pytest.mark.parametrize(("setting", "header"), [("WHEN_SUPPORTED", "x-amz-checksum-crc32"),
                                                 ("WHEN_REQUIRED", "content-md5")])
def test_a_put_carries_a_checksum_for_the_store_to_check(
        bucket: str, faulty_s3: FaultProxy, monkeypatch: pytest.MonkeyPatch, setting: str, header: str) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", setting)
    # what the store says where the checksum is wrong is tried again; the last answer isn't
    for code in ("BadDigest", "XAmzContentChecksumMismatch", "InvalidRequest"):
        faulty_s3.fail("PUT", Fault("status", status=400, code=code))
    with pytest.raises(StorageError, match="400 InvalidRequest"):
        put_if_absent(join(bucket, "a"), b"0123456789")
    assert [header in one.headers for one in faulty_s3.log] == [True, True, True]


def test_a_byte_that_flips_on_its_way_to_the_store_is_sent_again(
        bucket: str, faulty_s3: FaultProxy, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--store") == "moto":
        pytest.skip("moto does not check the checksum of what it is sent")
    faulty_s3.fail("PUT", FLIPPED, times=2)
    assert put_if_absent(join(bucket, "a"), b"0123456789")
    assert len(faulty_s3.asked("PUT")) == 3
    assert read_object(join(bucket, "a")) == b"0123456789"


@pytest.mark.parametrize("somebody_else", [False, True])
@pytest.mark.parametrize("fault", [*BEFORE, *AFTER])
def test_a_put_succeeds_exactly_if_it_is_our_object_that_stands_there(
        s3: S3Server, bucket: str, faulty_s3: FaultProxy, fault: str, somebody_else: bool) -> None:
    def write_meanwhile() -> None:
        if somebody_else:
            s3.client().put_object(Bucket=bucket[5:], Key="a", Body=b"theirs")

    # they come between the fault and our next attempt, or before what is applied
    if fault in AFTER:
        write_meanwhile()
    faulty_s3.fail("PUT", FAULTS[fault], times=1 if "time-out" in fault else 3)
    faulty_s3.fail("PUT", Fault("hook", hook=write_meanwhile if fault in BEFORE else None))
    assert put_if_absent(join(bucket, "a"), b"ours") is not somebody_else
    assert read_object(join(bucket, "a")) == (b"theirs" if somebody_else else b"ours")


@pytest.mark.parametrize("fault", [name for name in AFTER if name in QUICK])
def test_a_put_that_was_applied_is_a_success_though_no_answer_ever_came(
        bucket: str, faulty_s3: FaultProxy, fault: str) -> None:
    faulty_s3.fail("PUT", FAULTS[fault], times=100)
    assert put_if_absent(join(bucket, "a"), b"ours")
    assert len(faulty_s3.asked("PUT")) == ATTEMPTS


@pytest.mark.parametrize("fault", [name for name in BEFORE if name in QUICK])
def test_a_put_that_never_was_applied_is_an_error_that_names_the_object(
        bucket: str, faulty_s3: FaultProxy, fault: str) -> None:
    faulty_s3.fail("PUT", FAULTS[fault], times=100)
    with pytest.raises(StorageError, match="/part-1: 6 attempts failed"):
        put_if_absent(join(bucket, "part-1"), b"ours")
    assert not storage.exists(join(bucket, "part-1"))


def test_of_many_writers_on_a_bad_network_exactly_one_wins(bucket: str, faulty_s3: FaultProxy) -> None:
    for fault in (RESET_AFTER, INTERNAL_ERROR_AFTER, INTERNAL_ERROR, RESET) * 2:
        faulty_s3.fail("PUT", fault)
    won: list[int] = []

    def write(writer: int) -> None:
        if put_if_absent(join(bucket, "race"), f"writer {writer}".encode()):
            won.append(writer)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [f"writer {writer}".encode() for writer in won] == [read_object(join(bucket, "race"))]


def test_the_probe_passes_on_a_bad_network_and_leaves_nothing(bucket: str, faulty_s3: FaultProxy) -> None:
    faulty_s3.fail("PUT", RESET_AFTER)
    faulty_s3.fail("GET", TRUNCATED)
    faulty_s3.fail("DELETE", INTERNAL_ERROR_AFTER)
    storage.prove_put_if_absent(bucket)
    assert names_under(bucket) == []


def test_the_probe_is_removed_when_reading_it_fails(bucket: str, faulty_s3: FaultProxy) -> None:
    faulty_s3.fail("GET", INTERNAL_ERROR, times=100)
    with pytest.raises(StorageError, match="_probe-"):
        storage.prove_put_if_absent(bucket)
    assert names_under(bucket) == []


@pytest.mark.parametrize(("fault", "pauses_s"), [
    (INTERNAL_ERROR, [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20, 20]), (SLOW_DOWN, [1, 2, 4, 8, 16, 20, 20, 20, 20])])
def test_pauses_between_attempts_double_up_to_a_bound_and_are_longer_where_the_store_is_overloaded(
        world: str, faulty_s3: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: Fault,
        pauses_s: list[float]) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "10")
    monkeypatch.setattr(storage_s3, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(storage_s3, "FIRST_THROTTLED_PAUSE_S", 1.0)
    slept: list[float] = []
    monkeypatch.setattr(storage_s3.time, "sleep", slept.append)
    monkeypatch.setattr(storage_s3.random, "uniform", lambda shortest, longest: longest - shortest)
    faulty_s3.fail("GET", fault, times=100)
    with pytest.raises(StorageError, match="10 attempts failed"):
        read_object(join(world, "a"))
    assert slept == pytest.approx(pauses_s)


@pytest.mark.parametrize(("attempts", "requests"), [("1", 1), ("3", 3)])
def test_the_number_of_attempts_is_the_usual_setting(
        world: str, faulty_s3: FaultProxy, monkeypatch: pytest.MonkeyPatch, attempts: str, requests: int) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", attempts)
    faulty_s3.fail("GET", SLOW_DOWN, times=100)
    with pytest.raises(StorageError, match=f"{attempts} attempts failed.*503 SlowDown"):
        read_object(join(world, "a"))
    assert len(faulty_s3.asked("GET")) == requests


# --- listings that change under way: pages of ten ------------------------------------------------------------------


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings come in pages of ten."""
    monkeypatch.setattr(storage_s3, "PAGE_OBJECTS", 10)


def put_many(s3: S3Server, bucket: str, names: list[str], body: bytes = b"x") -> None:
    client = s3.client()
    for name in names:
        client.put_object(Bucket=bucket[5:], Key=name, Body=body)


@pytest.mark.usefixtures("small_pages")
def test_what_stays_is_listed_once_while_others_come_go_and_change(
        s3: S3Server, bucket: str, faulty_s3: FaultProxy) -> None:
    stay = [f"{folder}/{i:03d}" for folder in ("a", "b c", "ü") for i in range(40)]
    go, come = [f"{name}-goes" for name in stay[::4]], [f"{name}-comes" for name in stay[::5]]
    put_many(s3, bucket, [*stay, *go])

    def change(step: int) -> Callable[[], None]:
        def act() -> None:
            client = s3.client()
            for name in go[step::6]:
                client.delete_object(Bucket=bucket[5:], Key=name)
            put_many(s3, bucket, come[step::6])
            put_many(s3, bucket, stay[step::30], b"another size")
        return act

    for step in range(6):
        faulty_s3.fail("LIST", Fault("hook", hook=change(step)))
    listed = names_under(bucket)
    assert listed == sorted(set(listed))
    assert set(stay) <= set(listed) <= {*stay, *go, *come}


@pytest.mark.usefixtures("small_pages")
def test_a_long_listing_is_whole_on_a_bad_network(s3: S3Server, bucket: str, faulty_s3: FaultProxy) -> None:
    names = sorted(f"p/{'x' if i % 3 else 'y/z'}/{i:03d}&<ä>" for i in range(150))
    put_many(s3, bucket, names)
    # one page alone could meet them all: they are fewer than its attempts
    for fault in (RESET, TRUNCATED, INTERNAL_ERROR, SLOW_DOWN, RESET_AFTER):
        faulty_s3.fail("LIST", fault, path="start-after")
    assert names_under(join(bucket, "p")) == [name[2:] for name in names]


@pytest.mark.usefixtures("small_pages")
def test_a_listing_that_fails_in_the_middle_is_an_error_and_no_short_list(
        s3: S3Server, bucket: str, faulty_s3: FaultProxy) -> None:
    put_many(s3, bucket, [f"{i:03d}" for i in range(60)])
    listing = list_objects(bucket)
    for _ in range(5):
        next(listing)
    faulty_s3.fail("LIST", INTERNAL_ERROR, times=1000)
    with pytest.raises(StorageError, match=f"{bucket}: 6 attempts failed"):
        list(listing)


# --- 403 ----------------------------------------------------------------------------------------------------------


def test_a_refused_object_is_about_the_object_if_one_beside_it_can_be_read(world: str, faulty_s3: FaultProxy) -> None:
    faulty_s3.fail("GET", denied("AccessDenied"), path="/a", times=100)
    with pytest.raises(storage.ObjectForbidden, match=r"/a: the store refuses this object and gives s3://.*/b"):
        read_object(join(world, "a"))
    with pytest.raises(storage.ObjectForbidden):
        storage.read_range(join(world, "a"), 0, 1)


def test_a_neighbour_that_is_given_saves_the_listing(world: str, faulty_s3: FaultProxy) -> None:
    faulty_s3.fail("GET", denied("AccessDenied"), path="/a", times=100)
    with pytest.raises(storage.ObjectForbidden):
        read_object(join(world, "a"), neighbours=[join(world, "a"), join(world, "b")])
    assert faulty_s3.asked("LIST") == []


def test_a_refused_object_alone_in_its_folder_is_compared_with_those_above(world: str, faulty_s3: FaultProxy) -> None:
    put_if_absent(join(world, "deep", "er", "alone"), b"x")
    faulty_s3.fail("GET", denied("AccessDenied"), path="/alone", times=100)
    with pytest.raises(storage.ObjectForbidden, match="gives"):
        read_object(join(world, "deep", "er", "alone"))


def test_a_listing_that_is_refused_too_leaves_the_given_neighbours(world: str, faulty_s3: FaultProxy) -> None:
    faulty_s3.fail("GET", denied("AccessDenied"), path="/a", times=100)
    faulty_s3.fail("LIST", denied("AccessDenied"), times=100)
    with pytest.raises(storage.ObjectForbidden, match="gives"):
        read_object(join(world, "a"), neighbours=[join(world, "missing"), join(world, "b")])
    with pytest.raises(StorageError, match="neither") as raised:
        read_object(join(world, "a"))
    assert not isinstance(raised.value, storage.ABOUT_THE_OBJECT)


def test_refused_neighbours_make_it_the_services_error(world: str, faulty_s3: FaultProxy) -> None:
    faulty_s3.fail("GET", denied("AccessDenied"), times=100)
    with pytest.raises(StorageError, match=r"/a: neither this object nor any of its neighbours.*policy") as raised:
        read_object(join(world, "a"), neighbours=[join(world, "b")])
    assert not isinstance(raised.value, storage.ABOUT_THE_OBJECT)


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch",
                                  "RequestTimeTooSkewed"])
def test_other_403s_are_the_services_error_at_once(world: str, faulty_s3: FaultProxy, code: str) -> None:
    faulty_s3.fail("GET", denied(code), path="/a", times=100)
    with pytest.raises(StorageError, match=f"/a: the store answered 403 {code}.*credentials") as raised:
        read_object(join(world, "a"))
    assert not isinstance(raised.value, storage.ABOUT_THE_OBJECT)
    assert len(faulty_s3.asked("GET")) == 1


@pytest.mark.parametrize(("kind", "act"), [
    ("HEAD", lambda bucket: storage.exists(join(bucket, "a"))), ("LIST", names_under),
    ("PUT", lambda bucket: put_if_absent(join(bucket, "c"), b""))])
def test_a_403_of_anything_but_a_read_is_the_services_error(
        world: str, faulty_s3: FaultProxy, kind: str, act: Callable[[str], object]) -> None:
    faulty_s3.fail(kind, denied("AccessDenied"), times=100)
    with pytest.raises(StorageError, match=r"403.*Check") as raised:
        act(world)
    assert not isinstance(raised.value, storage.ABOUT_THE_OBJECT)
    assert len(faulty_s3.asked(kind)) == 1


def test_wrong_credentials_are_the_services_error(
        world: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--store") == "moto":
        pytest.skip("moto does not check signatures")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for act in (read_object, storage.exists, storage.stored_sha256):
        with pytest.raises(StorageError, match=r"/a: the store answered 403.*credentials") as raised:
            act(join(world, "a"))
        assert not isinstance(raised.value, storage.ABOUT_THE_OBJECT)
        assert "wrong" not in str(raised.value)


def test_no_password_of_an_address_is_in_a_message(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:pass-word@127.0.0.1:9")
    monkeypatch.setattr(storage_s3, "FIRST_PAUSE_S", 0.001)
    with pytest.raises(StorageError, match=r"/a: 6 attempts failed") as raised:
        read_object(join(bucket, "a"))
    seen: BaseException | None = raised.value
    while seen is not None:
        assert "pass-word" not in str(seen)
        seen = seen.__cause__ or seen.__context__


@pytest.mark.parametrize(("said", "shown"), [
    ('Could not connect to "https://u:p@host/b/k?X-Amz-Signature=abc&x=1"', 'Could not connect to "https://host/b/k"'),
    ("proxy http://me:s/e@c@host:3128 is down", "proxy http://host:3128 is down"),
    ("Invalid endpoint: u:p@host", "Invalid endpoint: host"), ("plain: words", "plain: words")])
def test_secrets_are_taken_out_of_messages(said: str, shown: str) -> None:
    assert storage_s3._without_secrets(said) == shown


# --- stores that aren't as S3 is ----------------------------------------------------------------------------------


def listed(*names: str, **more: object) -> dict[str, object]:
    """A page as the store answers it."""
    return {"Contents": [{"Key": name, "Size": 1, "ETag": '"e"'} for name in names], **more}


def test_a_store_that_does_not_list_in_order_is_refused(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3._Listing, "_ask", lambda *_, **__: listed("b", "a"))
    with pytest.raises(ConfigError, match="does not list in the order of the names' bytes"):
        names_under("s3://express")


def test_a_page_without_objects_is_not_the_end_of_a_listing(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **request: str) -> dict[str, object]:
        if "ContinuationToken" not in request:
            return listed(IsTruncated=True, NextContinuationToken="next")
        assert request["ContinuationToken"] == "next"
        return listed("a")

    monkeypatch.setattr(storage_s3._Listing, "_ask", ask)
    assert names_under("s3://sparse") == ["a"]


def test_a_store_that_sends_all_of_an_object_for_a_range_does_no_harm(
        s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "_get", lambda *_: ({"ContentLength": 10}, b"0123456789"))
    assert storage.read_range("s3://plain/a", 2, 3) == b"234"


def test_an_object_that_changed_is_refused_also_by_a_store_that_knows_no_condition(
        world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = storage_s3._connection().client
    get = client.get_object
    monkeypatch.setattr(client, "get_object", lambda IfMatch=None, **request: get(**request))  # noqa: N803
    with pytest.raises(storage.ObjectChanged, match="a"):
        read_object(join(world, "a"), etag="another")
