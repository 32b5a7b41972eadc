"""What several test files need: the folder of shared reference data, a real S3 server, places to write to."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything brings in torch, whose threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from jobs.start_ray import start_ray
from pipeline import storage_s3
from tests.fault_proxy import FaultProxy
from tests.s3 import S3Server, ceph_server, s3_server, why_no_ceph
from tests.without_ray import WITHOUT_RAY

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `../shared` beside the checkout: real pictures and golden numbers. Skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference data in {SHARED}, which is not here")
    return SHARED


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes by one thread: bits depend on how many, and on a busy machine several wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store", choices=["moto", "ceph"], default="moto",
                     help="the S3 server that the tests run on: moto's, or a real Ceph gateway")


@pytest.fixture(scope="session")
def s3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server, as --store says, and the environment in which every client finds it."""
    ceph = request.config.getoption("--store") == "ceph"
    if ceph and (reason := why_no_ceph()):
        pytest.skip(reason)
    run = ceph_server if ceph else s3_server
    with run(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        environment.delenv("AWS_PROFILE", raising=False)
        yield server


@pytest.fixture(scope="session")
def s3_proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """The proxy of all tests: with one address for all, one client is enough for all."""
    with FaultProxy.in_front_of(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def faulty_s3(s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """A proxy in front of the S3 server, which every client now goes through and which fails as it is told.

    Pauses between attempts are tiny, and a request may take one second.
    """
    s3_proxy.forget()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.endpoint)
    monkeypatch.setattr(storage_s3, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(storage_s3, "FIRST_THROTTLED_PAUSE_S", 0.001)
    monkeypatch.setattr(storage_s3, "READ_TIMEOUT_S", 1)
    return s3_proxy


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """The URI of a new, empty bucket."""
    return s3.create_bucket(f"bucket-{uuid.uuid4().hex[:12]}")


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to write to: once a local folder, once a bucket."""
    return str(tmp_path / "place") if request.param == "disk" else str(request.getfixturevalue("bucket"))


@pytest.fixture(scope="session")
def local_ray(s3: S3Server) -> Iterator[None]:
    """One local Ray for all tests that run jobs; it begins after the S3 server, whose settings its workers need."""
    with start_ray():
        yield


@pytest.fixture(scope="module")
def without_ray() -> Iterator[None]:
    """`shard` and `annotate` work in this process, one thing after the other."""
    with pytest.MonkeyPatch.context() as patches:
        for module, name, instead in WITHOUT_RAY:
            patches.setattr(module, name, instead)
        yield
