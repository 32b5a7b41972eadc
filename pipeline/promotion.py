"""Whether a registered model deserves an alias: the rules, and the trial in a fresh process.

Each rule passes in silence or raises `PromotionRefused`, whose text says what was found and what to do. `jobs.promote`
asks them in their order; nothing here knows Ray.
"""

import base64
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.annotation import annotated_boxes, usable_boxes
from pipeline.errors import ConfigError
from pipeline.pose.skeleton import Skeleton
from pipeline.rows import prediction_columns
from pipeline.shards import ShardDataset, read_part

SCRIPT = Path(__file__).with_name("fresh_predict.py")
FRESH_TIMEOUT_S = 600  # importing torch and MLflow takes 10 s, compiling a large network for OpenVINO a minute
ROUNDING = 1e-9  # 0.700 is not below 0.705 by more than 0.005, though 0.705 - 0.700 > 0.005 in floating point
# what MLflow refuses as an alias: its own name for the newest version, and what looks like a version
RESERVED_ALIAS = re.compile(r"latest|v[0-9]+", re.IGNORECASE)


class PromotionRefused(Exception):
    """The alias stays where it is; the message says why, and what to do."""


@dataclass(frozen=True)
class Promotion:
    """What became of the wish that an alias mean a model.

    champion      what the alias meant before, models:/name/2; None: nothing
    ap            of the candidate on version `data_version` of `data`; None: it didn't come to that
    champion_ap   of the champion on the same persons
    """

    alias: str
    moved: bool
    why: str
    candidate: str
    champion: str | None
    ap: float | None = None
    champion_ap: float | None = None
    tolerance: float | None = None
    data: str | None = None
    data_version: int | None = None


@dataclass(frozen=True)
class TrialPicture:
    """An image file's bytes, and boxes [n][4] of persons in it, in pixels."""

    data: bytes
    boxes_xywh: list[list[float]]


# --- rules --------------------------------------------------------------------------------------------------------


def refuse_reserved_alias(alias: str) -> None:
    """Refuse (ConfigError) an alias that MLflow would refuse at the end."""
    if RESERVED_ALIAS.fullmatch(alias) or not re.fullmatch(r"[\w-]+", alias):
        raise ConfigError(f"{alias!r} can't be an alias in MLflow. Choose a word of letters, digits, _ and -, such as "
                          "champion; neither `latest` nor `v` with a number.")


def refuse_other_files(stored: Mapping[str, str], expected: Mapping[str, str], reference: str) -> None:
    """Refuse stored files whose SHA-256 are not the expected ones, by name; files that are missing or too many, too."""
    if not expected:
        raise PromotionRefused(
            f"nothing says which files {reference} should have: it was registered by a program that didn't note them. "
            "Name its model directory (--set directory=URI), or register it again.")
    different = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
    if different:
        found = "; ".join(f"{name}: {_short(stored.get(name))}, but registered was {_short(expected.get(name))}"
                          for name in different)
        raise PromotionRefused(f"what MLflow has stored for {reference} is not what was registered ({found}). Copy its "
                               "model directory's files there again, or register it again.")


def refuse_other_joints(joints: Sequence[str], champions: Sequence[str], champion: str, alias: str) -> None:
    """Refuse a candidate whose joints aren't the champion's: who reads the alias expects those columns."""
    if list(joints) != list(champions):
        raise PromotionRefused(
            f"{champion}, which is @{alias} now, has other joints ({', '.join(champions)}) than this model "
            f"({', '.join(joints)}): no AP compares them, and who reads @{alias} expects the champion's. Register this "
            "model under a name of its own, or --set force=true once its readers know.")


def refuse_worse(ap: float | None, champion_ap: float | None, *, tolerance: float, champion: str | None,
                 data: str) -> str:
    """Refuse an AP that is absent or more than `tolerance` below the champion's; gives the comparison in words.

    champion  None: there is none yet, and a finite AP is enough
    """
    if ap is None or not math.isfinite(ap):
        raise PromotionRefused(f"its AP on {data} is {ap}: nothing was measured. Give --data with annotated persons.")
    if champion is None:
        return f"no model had the alias, so that a finite AP was enough: {ap:.4f} on {data}"
    if champion_ap is None or not math.isfinite(champion_ap):
        raise PromotionRefused(f"the AP of {champion} on {data} is {champion_ap}: nothing to compare with. Give --data "
                               "on which it can be measured.")
    if champion_ap - ap > tolerance + ROUNDING:
        raise PromotionRefused(
            f"its AP on {data} is {ap:.4f}, and that of {champion} is {champion_ap:.4f}: lower by "
            f"{champion_ap - ap:.4f}, and {tolerance:g} is tolerated. Train a better one; if the set is too small to "
            "tell, give a larger --data, or a larger tolerance.")
    return f"AP {ap:.4f} against {champion_ap:.4f} of {champion} on {data}; {tolerance:g} less would do"


def refuse_bad_answer(answer: Mapping[str, Any], skeleton: Skeleton, num_boxes: int, reference: str) -> None:
    """Refuse what `predict_in_fresh_process` gave: code from elsewhere, other columns or rows, what isn't finite."""
    if answer["foreign"]:
        name, file = next(iter(answer["foreign"].items()))
        raise PromotionRefused(
            f"{reference} runs only where this project is installed: it took {name} from {file}, not from what MLflow "
            "stored with it. Register it again.")
    if answer["columns"] != list(prediction_columns(skeleton)):
        raise PromotionRefused(f"{reference} answers with the columns {', '.join(answer['columns'])}, not those of "
                               f"its {skeleton.num_joints} joints. Register it again.")
    if len(answer["rows"]) != num_boxes:
        raise PromotionRefused(f"{reference} gave {len(answer['rows'])} rows for {num_boxes} boxes.")
    if any(value is None for row in answer["rows"] for value in row):
        raise PromotionRefused(f"{reference} predicts numbers that aren't finite: its weights are broken. Train again.")


def _short(sha256: str | None) -> str:
    return "absent" if sha256 is None else f"{sha256[:16]}..."


# --- a fresh process ----------------------------------------------------------------------------------------------


def trial_picture(data: ShardDataset) -> TrialPicture:
    """The first picture of the dataset with persons to predict; ConfigError where there is none."""
    for part in data.parts:
        for row in read_part(data, part, ["key", "bytes", "width", "height", "persons"]).to_pylist():
            if row["bytes"] is None:
                continue
            boxes = usable_boxes(annotated_boxes(row["persons"]), row["width"], row["height"])
            if len(boxes.ids):
                return TrialPicture(row["bytes"], boxes.xywh.tolist())
    raise ConfigError(f"{data.uri} has no picture with an annotated person to measure on. Give --data that has.")


def predict_in_fresh_process(reference: str, tracking_uri: str, picture: TrialPicture) -> dict[str, Any]:
    """What `fresh_predict` says of a registered model: a Python of its own loads it by MLflow and predicts once.

    That process works in an empty folder and sees neither PYTHONPATH nor the folder it is started from: of the project
    it has what MLflow stored as the model's code, and of all else the installed packages. The project itself may be
    among those; what comes from there is named in `foreign`.

    Raises PromotionRefused where it doesn't load, doesn't predict, or takes more than FRESH_TIMEOUT_S.
    """
    request = {"tracking_uri": tracking_uri, "reference": reference, "boxes": picture.boxes_xywh,
               "picture": base64.b64encode(picture.data).decode()}
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, downloads = Path(folder, "request.json"), Path(folder, "answer.json"), Path(folder, "model")
        downloads.mkdir()
        asked.write_text(json.dumps(request))  # a file, since the address may hold a password, and arguments are seen
        command = [sys.executable, "-E", "-P", "-B", str(SCRIPT), str(asked), str(answered), str(downloads)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # ours has none: one that has is another's
        try:
            ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True,
                                   timeout=FRESH_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise PromotionRefused(f"{reference} gave no answer in a fresh process within {FRESH_TIMEOUT_S} s. Try it "
                                   "by mlflow.pyfunc.load_model.") from None
        if ended.returncode != 0:
            raise PromotionRefused(f"{reference} does not load and predict in a fresh process, which has what MLflow "
                                   f"stored and the installed packages: {_last_line(ended.stderr)}. Register it again.")
        answer: dict[str, Any] = json.loads(answered.read_text())
        return answer


def _last_line(text: str) -> str:
    lines = [line.strip().rstrip(".") for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"
