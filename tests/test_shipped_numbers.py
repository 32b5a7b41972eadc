"""The numbers on the shipped model's card, by the commands on the card."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.demo import SHIPPED_MODEL

ROOT = Path(__file__).parents[1]
CARD = (SHIPPED_MODEL / "README.md").read_text()
NAMES = ("persons", "AP", "AP50", "AP75", "AR", "PCK@0.2")


def stated(row: str) -> dict[str, float]:
    """The numbers of the card's row that begins so."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in CARD.splitlines()]
    header = next(cells for cells in lines if cells[1:] == list(NAMES))
    cells = next(cells for cells in lines if cells[0].startswith(row))
    return dict(zip(header[1:], map(float, cells[1:]), strict=True))


def card_commands() -> list[str]:
    """The commands by which each row is measured."""
    block = CARD.partition("Each line again")[2].split("```")[1]
    return block.replace("\\\n", " ").strip().splitlines()


def run_job(command: str, folder: Path, **names: str) -> dict[str, Any]:
    """The result of a command of the card, with `build` below a folder."""
    for name, value in ("build", str(folder)), *names.items():
        command = command.replace(name, value)
    arguments = shlex.split(command)
    assert arguments[0] == "python"
    done = subprocess.run([sys.executable, *arguments[1:]], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"})
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("row", "data", "split"), [
    ("COCO val2017", "coco17_mini", "val"), ("Leeds Sports Pose", "lspet14", "val_as_coco17")])
def test_its_numbers_are_those_of_its_card(shared: Path, tmp_path: Path, row: str, data: str, split: str) -> None:
    *before, evaluate = card_commands()
    for command in before:
        run_job(command, tmp_path, DATA=str(shared / "data" / data), SPLIT=split)
    found = run_job(evaluate, tmp_path, DATA=str(shared / "data" / data), SPLIT=split)

    numbers = {name: found[name.lower().replace("@0.2", "")] for name in NAMES[1:]}
    card = stated(row)
    assert found["counts"]["persons"] == card.pop("persons")
    assert numbers == pytest.approx(card, abs=0.001)  # other CPUs round otherwise
