"""An annotate run that is killed anywhere, and begun again at once, gives what an unbroken run gives.

Not by luck: a process runs the job's own code (its units one after the other, without Ray) and is really killed at each
step by which it reads or writes a disk, and at each request to an S3 server, before and after it is applied, and with
the request still on its way. `python -m tests.annotate_kills` does the same outside pytest, and says more.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.annotate_kills import Disk, Reader, World
from tests.s3 import S3Server

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[1]
SEED = 20261122


@dataclass(frozen=True)
class Harness:
    """A harness that is running."""

    process: subprocess.Popen[str]
    command: list[str]

    def printed(self) -> dict[str, Any]:
        """What it prints."""
        output, errors = self.process.communicate()
        assert self.process.returncode == 0, f"{' '.join(self.command)}:\n{errors[-4000:]}"
        printed: dict[str, Any] = json.loads(output)
        return printed


def begin(mode: str, folder: Path, server: S3Server, *options: str, program: str = "annotate_kills") -> Harness:
    command = [sys.executable, "-m", f"tests.{program}", mode, str(folder), *options]
    return Harness(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **server.environment}, text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True), command)


def nothing_is_wrong(harness: Harness, *, points: int, looks: int = 0) -> bool:
    """Whether all of at least so many points are right, and a reader looked so often; what isn't right is said with the
    command that shows it again."""
    found = harness.printed()
    assert not found["wrong"], "\n".join(["again: " + " ".join(harness.command[1:]), *found["wrong"]])
    return bool(found["points"] >= points and found["looks"] >= looks)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, s3: S3Server) -> Iterator[dict[str, Harness]]:
    """A harness on a disk and one on S3, side by side."""
    folder = tmp_path_factory.mktemp("kills")
    running = {"disk": begin("disk-chain", folder / "disk", s3), "s3": begin("bucket-chain", folder / "s3", s3)}
    yield running
    for harness in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(harness.process.pid, signal.SIGKILL)
        harness.process.wait()


def test_killed_at_each_step_on_a_disk_it_is_finished_by_the_runs_that_follow(both: dict[str, Harness]) -> None:
    assert nothing_is_wrong(both["disk"], points=185, looks=100)


def test_killed_at_each_request_to_s3_it_is_finished_by_the_runs_that_follow(both: dict[str, Harness]) -> None:
    assert nothing_is_wrong(both["s3"], points=120, looks=100)


WHOLE = {"_job.json": b"{}", "keypoints/part": b"all of it", "_SUCCESS": b"{}"}


@pytest.mark.parametrize(("states", "wrong"), [
    ([{"keypoints/part": b"all"}, {"keypoints/part": b"all of it"}], "it saw ['keypoints/part'], which no unbroken"),
    ([{"keypoints/part": b"all of it"}, {"_job.json": b"{}"}], "it didn't see ['keypoints/part'] any more"),
    ([{"keypoints/other": b"all of it"}], "it saw ['keypoints/other'], which no unbroken run has"),
    ([{"_SUCCESS": b"{}"}, {"_SUCCESS": b"{}", "_job.json": b"{}"}], "it saw _SUCCESS before ['keypoints/part']")])
def test_a_reader_that_polls_finds_what_none_may_see(
        tmp_path: Path, states: list[dict[str, bytes]], wrong: str) -> None:
    reader = Reader(Disk(tmp_path, World("in", "model")), "out", WHOLE)
    for state in states:
        write_state(tmp_path / "out", state)
        reader.look()
    assert len(reader.wrong) == 1
    assert wrong in reader.wrong[0]


def test_a_reader_that_polls_takes_no_offence_at_a_run_that_grows_and_at_its_temporaries(tmp_path: Path) -> None:
    reader = Reader(Disk(tmp_path, World("in", "model")), "out", WHOLE)
    for count in range(len(WHOLE) + 1):
        temporaries = {"keypoints/.part-half": b"al", "_drivers/1.json": b"{", "_probe-1": b""}
        write_state(tmp_path / "out", {**dict(list(WHOLE.items())[:count]), **temporaries})
        reader.look()
    assert (reader.looks, reader.wrong) == (4, [])


def write_state(output: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(output, ignore_errors=True)
    for name, data in files.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(data)


# requests to moto take their time: some of the points have to do here, and the harness itself does all of them
@pytest.mark.slow
@pytest.mark.parametrize(("mode", "input_kind", "options", "points"), [
    ("disk", "in", "--workers 2", 200), ("disk", "shards", "--workers 2 --every 3", 60),
    ("disk", "in", "--worlds files --workers 2 --every 4", 60),
    pytest.param("disk", "in", "--worlds detector --every 8", 30, marks=pytest.mark.endurance),
    pytest.param("bucket", "in", "--worlds files --workers 2 --every 8", 50, marks=pytest.mark.endurance),
    ("bucket", "in", "--workers 2 --every 2", 150), ("bucket", "shards", "--workers 2 --every 4", 60),
    ("bucket-chain", "in", "--reads-too", 150), ("bucket-chain", "shards", "--reads-too", 150)])
def test_killed_at_each_step_and_request_it_is_finished_by_the_next_run(
        tmp_path: Path, s3: S3Server, mode: str, input_kind: str, options: str, points: int) -> None:
    assert nothing_is_wrong(begin(mode, tmp_path, s3, "--input", input_kind, *options.split()), points=points)


@pytest.mark.slow
@pytest.mark.parametrize("input_kind", ["in", "shards"])
def test_with_faults_of_each_kind_and_kills_at_random_it_is_finished(
        tmp_path: Path, s3: S3Server, input_kind: str) -> None:
    harness = begin("random", tmp_path, s3, "--seed", str(SEED), "--rounds", "12", "--workers", "2",
                    "--input", input_kind)
    assert nothing_is_wrong(harness, points=60)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disk-chain", "bucket-chain"])
@pytest.mark.parametrize("bug", ["overwrites", "seals early", "lists again"])
def test_the_harness_finds_planted_bugs(tmp_path: Path, s3: S3Server, mode: str, bug: str) -> None:
    assert begin(mode, tmp_path, s3, "--bug", bug).printed()["wrong"]


@pytest.mark.parametrize("place", ["disk", pytest.param("s3", marks=pytest.mark.slow)])
def test_drivers_beside_each_other_and_zombies_that_wake_up_late_harm_nothing(
        tmp_path: Path, s3: S3Server, place: str) -> None:
    told = begin(place, tmp_path, s3, program="annotate_zombies").printed()
    assert len(told) >= 5
    assert {story: wrong for story, wrong in told.items() if wrong} == {}
