"""The imports go one way, and each big library has one importer."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORTERS = {"boto3": {"pipeline/storage_s3.py"}, "botocore": {"pipeline/storage_s3.py"},
             # MLflow itself runs pyfunc.py, as the code of a registered model; fresh_predict.py is a process of its own
             "mlflow": {"pipeline/tracking.py", "pipeline/model_registry.py", "pipeline/pyfunc.py",
                        "pipeline/fresh_predict.py"},
             "pycocotools": {"pipeline/evaluation.py"},
             "openvino": {"pipeline/model/inference.py"}}


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.split(".")[0])
    return packages


def importers(package: str) -> set[str]:
    folders = [folder for folder in ("pipeline", "jobs", "cluster") if (ROOT / folder).is_dir()]
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix() for path in paths if package in imported_packages(path)}


@pytest.mark.parametrize("package", sorted(IMPORTERS))
def test_each_big_library_has_one_importer(package: str) -> None:
    assert importers(package) <= IMPORTERS[package]


def test_ray_is_imported_in_jobs_and_cluster_alone() -> None:
    assert not [path for path in importers("ray") if path.startswith("pipeline/")]


def test_pipeline_knows_neither_jobs_nor_cluster() -> None:
    assert not [path for package in ("jobs", "cluster") for path in importers(package) if path.startswith("pipeline/")]


def test_jobs_do_not_know_the_cluster() -> None:
    assert not [path for path in importers("cluster") if path.startswith("jobs/")]


def test_geometry_needs_no_torch() -> None:
    assert not [path for path in importers("torch") if path.startswith("pipeline/pose/")]
