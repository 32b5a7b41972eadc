"""A shard run that ends anywhere, and its rerun, give what an unbroken run gives, and read no finished shard again.

Not by luck: a process runs the job's own code (its tasks one after the other, without Ray) and really ends before each
step by which a disk commits an object, one after another: fsync, link, fsync of the folder.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_first_run_that_ends_anywhere_is_continued(tmp_path: Path) -> None:
    assert_every_end_is_survived(tmp_path, grown=False)


def test_growth_that_ends_anywhere_is_continued(tmp_path: Path) -> None:
    assert_every_end_is_survived(tmp_path, grown=True)


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["overwrites", "lists again", "seals early"])
def test_the_harness_finds_planted_bugs(tmp_path: Path, bug: str) -> None:
    assert not all(point["whole"] for point in end_everywhere(tmp_path, grown=True, bug=bug))


def assert_every_end_is_survived(folder: Path, *, grown: bool) -> None:
    points = end_everywhere(folder, grown=grown)
    assert len(points) >= 20
    assert [point for point in points if not point["whole"] or point["read_again"]] == []


def end_everywhere(folder: Path, *, grown: bool, bug: str = "") -> list[dict[str, object]]:
    """For each point at which the run was ended: whether the rerun gave the unbroken result, what it read again."""
    done = subprocess.run([sys.executable, "-m", "tests.shard_kills", str(folder), json.dumps(grown), bug], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    points: list[dict[str, object]] = json.loads(done.stdout)
    return points
