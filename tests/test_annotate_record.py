"""MLflow hears of every finished run of `annotate`, also where the driver that sealed it died before it could tell."""

from pathlib import Path
from typing import Any

import pytest

from jobs import annotate
from pipeline.config import AnnotateConfig, TrackingConfig
from tests.worlds import write_pictures, write_tiny_model

pytestmark = pytest.mark.usefixtures("without_ray")


class Ended(BaseException):
    """As a SIGKILL: nothing catches it."""


class Told:
    """MLflow, as far as a job tells it: what it was told, and what it answers."""

    def __init__(self) -> None:
        self.counts: list[dict[str, Any]] = []
        self.answer: str | None = "run-1"
        self.ends = False

    def record_run(self, *_: object, counts: dict[str, Any], **__: object) -> str | None:
        if self.ends:
            raise Ended
        self.counts.append(counts)
        return self.answer


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setattr(annotate, "record_run", told.record_run)
    return told


@pytest.fixture
def job(tmp_path: Path) -> Any:
    pictures, model = write_pictures(tmp_path / "in", count=3), write_tiny_model(tmp_path / "model")

    def run(**settings: object) -> dict[str, Any]:
        return annotate.run(AnnotateConfig(**{
            "input": str(pictures / "images"), "model": str(model), "output": str(tmp_path / "out"),
            "boxes": "whole-image", "tracking": TrackingConfig(uri="http://nowhere"), **settings}))

    return run


def test_a_run_that_died_between_success_and_mlflow_is_recorded_by_the_next_one_once(mlflow: Told, job: Any) -> None:
    mlflow.ends = True
    with pytest.raises(Ended):
        job()
    mlflow.ends = False
    assert [job()["units_annotated"], job()["units_annotated"]] == [0, 0]
    assert [counts["pictures"] for counts in mlflow.counts] == [3]


def test_a_run_that_mlflow_knows_is_not_recorded_again(mlflow: Told, job: Any) -> None:
    for _ in range(3):
        job()
    assert len(mlflow.counts) == 1


def test_where_mlflow_was_away_it_is_told_by_the_next_run(mlflow: Told, job: Any) -> None:
    mlflow.answer = None
    job()
    mlflow.answer = "run-2"
    job()
    job()
    assert len(mlflow.counts) == 2


def test_without_tracking_nothing_is_told_and_nothing_is_left(mlflow: Told, job: Any, tmp_path: Path) -> None:
    mlflow.answer = None
    job()
    job(tracking=TrackingConfig(enabled=False))
    assert len(mlflow.counts) == 1
    assert not (tmp_path / "out" / "_mlflow").exists()
