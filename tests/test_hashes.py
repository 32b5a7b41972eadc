"""What the image installs: every package of a known version, and of each only the files whose SHA-256 is known."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)")


def plain(name: str) -> str:
    """A package's name as indexes compare it (packaging.python.org, "Names and normalization")."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    found = [PIN.match(line) for line in path.read_text().splitlines()]
    return {plain(pin["name"]): pin["version"] for pin in found if pin}


def test_every_package_has_a_version_and_hashes() -> None:
    text = re.sub(r"^#.*\n", "", (ROOT / "cluster" / "requirements.txt").read_text(), flags=re.MULTILINE)
    packages = text.replace("\\\n", " ").splitlines()
    assert len(packages) > 100
    for package in packages:
        assert re.fullmatch(r"[a-z0-9.-]+==\S+( +--hash=sha256:[0-9a-f]{64})+", package), package


def test_versions_are_those_that_the_tests_run_with_and_nothing_needed_is_missing() -> None:
    installed, tested = pins(ROOT / "cluster" / "requirements.txt"), pins(ROOT / "constraints.txt")
    assert {name: version for name, version in installed.items() if tested.get(name, version) != version} == {}
    # PyTorch's CUDA, which a machine for tests doesn't have, and what builds this project itself
    more = installed.keys() - tested.keys()
    assert not [name for name in more if not name.startswith(("nvidia-", "cuda-")) and name not in (
        "triton", "setuptools")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["detect"], *extras["openvino"]]
    assert {plain(re.split(r"[\[=<>]", one)[0]) for one in needed} <= installed.keys()


def test_the_image_takes_no_file_without_its_hash() -> None:
    text = (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ")
    assert 'ARG PACKAGES="--no-deps --require-hashes --requirement requirements.txt"' in text
    installs = re.findall(r"pip install (.*)", text)
    assert installs == ["${PACKAGES}", "--no-deps --no-build-isolation --editable ."]
