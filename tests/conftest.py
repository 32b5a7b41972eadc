"""What several test files need: the folder of shared reference data, a real S3 server, places to write to."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.start_ray import start_ray
from tests.s3 import S3Server, s3_server

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `../shared` beside the checkout: real pictures and golden numbers. Skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference data in {SHARED}, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server, and the environment in which every client finds it."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        environment.delenv("AWS_PROFILE", raising=False)
        yield server


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
