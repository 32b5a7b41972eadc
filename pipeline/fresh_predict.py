"""A registered model, loaded and asked once: a script that `pipeline.promotion` runs in a process of its own.

    python -E -P -B fresh_predict.py REQUEST.json ANSWER.json FOLDER

It is never imported and imports nothing of the project, so that what the model needs of it can only be what MLflow
stored. MLflow is imported here because nobody else is in that process.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

OWN_PACKAGES = ("pipeline", "jobs", "cluster")


def predict(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the model says: its columns, its rows as numbers, and which project code it ran.

    request  tracking_uri; reference, as models:/name/3; picture: an image file in base64; boxes [n][4] in pixels
    folder   where MLflow downloads the model
    Returns  columns, rows; foreign: modules of the project that came from elsewhere than `folder`, with their files.
             An editable install gives what the stored code lacks, without a word.
    """
    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(request["tracking_uri"])
    model = mlflow.pyfunc.load_model(request["reference"], dst_path=str(folder))
    picture = base64.b64decode(request["picture"])
    table = model.predict(pd.DataFrame({"picture": [picture], "boxes": [request["boxes"]]}))
    # NaN and infinity aren't JSON: as None
    rows = [[float(value) if abs(float(value)) < float("inf") else None for value in row] for row in table.to_numpy()]
    return {"columns": list(table.columns), "rows": rows, "foreign": _foreign(folder)}


def _foreign(folder: Path) -> dict[str, str]:
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()
             if name.partition(".")[0] in OWN_PACKAGES}
    return {name: file for name, file in files.items()
            if file is not None and not Path(file).resolve().is_relative_to(folder.resolve())}


if __name__ == "__main__":
    request_file, answer_file, download_folder = map(Path, sys.argv[1:])
    answer = predict(json.loads(request_file.read_text()), download_folder)
    answer_file.write_text(json.dumps(answer, allow_nan=False))
