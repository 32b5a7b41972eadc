"""Dashboard and alerts ask for metrics that there are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.metrics import NAMES

MONITORING = Path(__file__).resolve().parents[1] / "cluster" / "monitoring"
OURS = {f"ray_pose_annotate_{name}" for name in NAMES}


def dashboard() -> Any:
    return json.loads((MONITORING / "dashboard.json").read_text())


def queries() -> list[str]:
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return [*panels, *(rule["expr"] for rule in rules)]


def test_what_is_asked_of_the_jobs_is_what_they_tell() -> None:
    asked = {name for query in queries() for name in re.findall(r"ray_pose_\w+", query)}
    assert asked == OURS


def test_what_is_asked_of_the_nodes_is_what_ray_tells() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    asked = {name for query in queries() for name in re.findall(r"ray_(node_\w+)", query)}
    assert asked
    assert asked <= METRICS_GAUGES.keys()


@pytest.mark.parametrize("query", queries())
def test_brackets_of_each_query_match(query: str) -> None:
    for opening, closing in ("()", "[]", "{}"):
        assert query.count(opening) == query.count(closing)


def test_panels_lie_beside_each_other_and_not_over() -> None:
    taken = [(panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy) for panel in dashboard()["panels"]
             for dx in range(panel["gridPos"]["w"]) for dy in range(panel["gridPos"]["h"])]
    assert len(taken) == len(set(taken))
    assert all(x < 24 for x, _ in taken)
