"""Which code runs here: its revision, its version, and the packages that can change a model.

A revision is ours or there is none: one of whatever repository lies around the code would be worse.
"""

import contextlib
import functools
import importlib.metadata
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

logger = logging.getLogger("pipeline.provenance")
REVISION = "POSE_GIT_REVISION"  # whoever submits code without its repository says so
REVISION_FILE = "REVISION"  # beside the code in an image (cluster/Dockerfile), and true of that code alone
PACKAGES = ("pose-annotation", "torch", "ray", "numpy", "opencv-python-headless", "pyarrow", "mlflow")
HERE = Path(__file__).resolve()


@functools.cache
def code_version() -> dict[str, Any]:
    """`git_revision` (None, with one warning, where nothing says it), `python`, and `packages` with their versions."""
    revision = git_revision()
    if revision is None:
        logger.warning("nothing says which revision of the code this is. Set %s where the job is submitted: "
                       "env %s=$(git describe --always --dirty) python -m jobs ...", REVISION, REVISION)
    return {"git_revision": revision, "python": sys.version.split()[0], "packages": _packages()}


def git_revision(code: Path = HERE) -> str | None:
    """The revision that the environment says; else that of the checkout or image to which the file `code` belongs.

    As `git describe --always --dirty` has it: a commit, with `-dirty` where tracked files have changed since.
    """
    return os.environ.get(REVISION) or _of_checkout(code) or _of_image(code)


def _of_checkout(code: Path) -> str | None:
    root = code.parents[1]
    # its name from the repository's root tells a checkout of ours from a copy within another repository; one that is
    # installed there is not tracked at all
    name = _git(root, "ls-files", "--full-name", "--error-unmatch", str(code))
    if name != code.relative_to(root).as_posix():
        return None
    return _git(root, "describe", "--always", "--dirty", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10,
                                check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _of_image(code: Path) -> str | None:
    try:
        return (code.parents[1] / REVISION_FILE).read_text().strip() or None
    except OSError:
        return None


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
