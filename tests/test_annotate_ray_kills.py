"""An annotate run on Ray whose driver, actors and raylets are killed, and which is begun again at once."""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from jobs import annotate
from pipeline.config import AnnotateConfig
from tests.fault_proxy import Fault, FaultProxy, Logged
from tests.s3 import S3Server
from tests.worlds import NO_TRACKING, rows, write_pictures, write_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.usefixtures("without_ray")]
PICTURES = 36
PUT_S = 0.4  # so long does the store take for each part: kills come between and in the middle of units
WAIT_S = 240
DRIVER, ACTOR, RAYLET = "driver", "actor", "raylet"
# who is killed in each run, one after another, each when the run has committed something since; the last run finishes
KILLS = [[ACTOR, ACTOR, DRIVER], [RAYLET], [ACTOR, DRIVER], [ACTOR, RAYLET], [DRIVER], [ACTOR, ACTOR]]


def slow_puts(request: Logged) -> Fault | None:
    is_part = request.kind == "PUT" and "/keypoints/" in request.path
    return Fault("hook", hook=partial(time.sleep, PUT_S)) if is_part else None


@pytest.fixture
def slow_s3(s3: S3Server) -> Iterator[FaultProxy]:
    """A proxy through which a part takes its time."""
    with FaultProxy.in_front_of(s3.endpoint) as proxy:
        proxy.judge = slow_puts
        yield proxy


@pytest.fixture
def family() -> Iterator[set[psutil.Process]]:
    """All processes of all runs; those that a killed driver has left are ended."""
    seen: set[psutil.Process] = set()
    yield seen
    for process in seen:
        with contextlib.suppress(psutil.Error):
            process.kill()


def test_whoever_is_killed_each_unit_is_put_once_and_the_rows_are_those_of_an_unbroken_run(
        tmp_path: Path, s3: S3Server, slow_s3: FaultProxy, bucket: str, family: set[psutil.Process]) -> None:
    s3.upload_folder(write_pictures(tmp_path / "in", PICTURES) / "images", f"{bucket}/in")
    model = write_tiny_model(tmp_path / "model")
    asked = AnnotateConfig(input=f"{bucket}/in", model=str(model), output=f"{bucket}/out", boxes="whole-image",
                           tracking=NO_TRACKING, pictures_per_unit=1, threads=1)
    environment = {**os.environ, **s3.environment, "AWS_ENDPOINT_URL": slow_s3.endpoint}
    codes, read_again = [], []
    for victims in KILLS:
        before, begun = parts(slow_s3), len(slow_s3.log)
        codes.append(run_and_kill(asked, victims, environment, lambda: len(parts(slow_s3)), family))
        read_again.append(read(slow_s3.log[begun:]) & {f"{int(name[5:12]) + 1:06d}.jpg" for name in before})
    annotate.run(asked.model_copy(update={"output": f"{bucket}/unbroken"}))
    assert codes[-1] == 0
    assert 0 not in codes[:-1]
    assert sum(map(len, KILLS)) >= 10
    assert not any(read_again)
    assert len(parts(slow_s3)) == len(set(parts(slow_s3))) == PICTURES
    assert rows(f"{bucket}/out").equals(rows(f"{bucket}/unbroken"))


def parts(proxy: FaultProxy) -> list[str]:
    """The names of the parts that the store has taken, each as often as it has."""
    return [one.path.rpartition("/")[2] for one in list(proxy.log)
            if one.kind == "PUT" and one.applied == 200 and "/keypoints/" in one.path]


def read(log: list[Logged]) -> set[str]:
    """The pictures that were read."""
    return {one.path.rpartition("/")[2] for one in log if one.kind == "GET" and "/in/" in one.path}


def run_and_kill(asked: AnnotateConfig, victims: list[str], environment: dict[str, str],
                 committed: Callable[[], int], family: set[psutil.Process]) -> int:
    """The command's exit code, run as users run it; each victim is killed once another part has been committed."""
    settings = ("pictures_per_unit=1", "threads=1", "actors=2", "tracking.enabled=false")
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs", "annotate", "--input", asked.input, "--model", asked.model,
         "--output", asked.output, "--boxes", "whole-image", *(f"--set={setting}" for setting in settings)],
        cwd=Path(__file__).parents[1], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for victim in victims:
            kill_after_a_commit(psutil.Process(driver.pid), victim, committed, family)
        return driver.wait(WAIT_S)
    finally:
        driver.kill()
        driver.wait()


def kill_after_a_commit(driver: psutil.Process, victim: str, committed: Callable[[], int],
                        family: set[psutil.Process]) -> None:
    """Kill one of the driver's processes, or the driver; all that it has go into the family."""
    seen, until = committed(), time.monotonic() + WAIT_S
    for turn in itertools.count():
        # looking for children takes this process's time, which the proxy in it needs
        if committed() > seen or turn % 20 == 0:
            children = driver.children(recursive=True)
            family.update(children)
            found = [driver] if victim == DRIVER else [one for one in children if role(one) == victim]
            if committed() > seen and found:
                found[0].kill()
                return
        assert driver.status() != psutil.STATUS_ZOMBIE, "the driver ended before its victims"
        assert time.monotonic() < until, f"{committed() - seen} parts came, but no {victim} to kill: {children}"
        time.sleep(0.05)


def role(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        if command and command[0].endswith("/raylet"):
            return RAYLET
        if command and command[0].startswith("ray::") and "Annotating" in command[0]:
            return ACTOR
    return ""

