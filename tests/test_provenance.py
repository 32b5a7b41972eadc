"""Which code made a model: its own revision, or none; never that of whatever repository lies around it."""

import logging
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import provenance
from pipeline.provenance import REVISION, REVISION_FILE, code_version, git_revision

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git, which is not here")


@pytest.fixture(autouse=True)
def nobody_says_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(REVISION, raising=False)
    code_version.cache_clear()
    yield
    code_version.cache_clear()


def git(folder: Path, *arguments: str) -> str:
    named = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    return subprocess.run(["git", "-C", str(folder), *named, *arguments], check=True, capture_output=True,
                          text=True).stdout.strip()


def code_in(folder: Path) -> Path:
    """A file of ours below a folder."""
    code = folder / "pipeline" / "provenance.py"
    code.parent.mkdir(parents=True)
    code.write_text("# ours\n")
    return code


def committed(repository: Path) -> str:
    """A repository of all that is there but .venv; its HEAD."""
    git(repository, "init")
    (repository / ".gitignore").write_text(".venv/\n")
    git(repository, "add", "--all")
    git(repository, "commit", "-m", "first")
    return git(repository, "rev-parse", "HEAD")


def test_a_checkout_has_its_commit_and_says_when_files_have_changed_since(tmp_path: Path) -> None:
    code = code_in(tmp_path)
    head = committed(tmp_path)
    clean = git_revision(code)
    code.write_text("# changed\n")

    assert clean is not None
    assert len(clean) >= 7
    assert head.startswith(clean)
    assert git_revision(code) == f"{clean}-dirty"


@pytest.mark.parametrize("place", [".venv/lib/python3.11/site-packages", "vendor/pose"])
def test_code_within_another_project_does_not_have_that_projects_commit(tmp_path: Path, place: str) -> None:
    code = code_in(tmp_path / place)
    committed(tmp_path)
    assert git_revision(code) is None


def test_an_image_has_what_it_was_built_with(tmp_path: Path) -> None:
    code = code_in(tmp_path)
    (tmp_path / REVISION_FILE).write_text("\n")  # built without
    assert git_revision(code) is None
    (tmp_path / REVISION_FILE).write_text("1a2b3c4\n")
    assert git_revision(code) == "1a2b3c4"


def test_whoever_submits_the_job_knows_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = code_in(tmp_path)
    committed(tmp_path)
    monkeypatch.setenv(REVISION, "5d6e7f8-dirty")
    assert git_revision(code) == "5d6e7f8-dirty"


def test_where_nothing_says_it_a_warning_has_the_remedy(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(provenance, "git_revision", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert code_version()["git_revision"] is None
    assert f"env {REVISION}=$(git describe --always --dirty) python -m jobs" in caplog.text


def test_the_projects_own_version_is_among_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert code_version()["packages"][project["name"]] == project["version"]
    assert code_version()["packages"]["torch"].startswith("2.")


def test_images_are_built_with_their_revision_and_training_is_submitted_with_it() -> None:
    assert f'RUN echo "${{GIT_REVISION}}" > {REVISION_FILE}' in (ROOT / "cluster" / "Dockerfile").read_text()
    pages = [path.read_text().replace("\\\n", " ") for path in (ROOT / "docs").glob("*.md")]
    builds = [line for page in pages for line in page.splitlines() if "docker build -f cluster/Dockerfile" in line]
    assert len(builds) == 2
    assert all("--build-arg GIT_REVISION=$(git describe --always --dirty)" in line for line in builds)
    submits = [line for page in pages for line in page.splitlines() if re.search("ray job submit .*jobs train", line)]
    assert submits
    assert all(f"-- env {REVISION}=$(git describe --always --dirty) python" in line for line in submits)
