"""What MLflow runs when it loads one of our registered models: the file is stored with the model as its code.

It is executed by MLflow alone (`python_model=` this path), never imported by the project. The model directory
is the artifact `model`; everything else comes from the `pipeline` package that is stored beside it.
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd

from pipeline.images import PictureLimits, decode_picture
from pipeline.prediction import Predictor
from pipeline.rows import prediction_columns


class PoseModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc,name-defined,unused-ignore]
    """Pictures and boxes in, one row of keypoints for each person out."""

    def load_context(self, context: Any) -> None:
        """Load the model directory, on a GPU where there is one."""
        self.predictor = Predictor(Path(context.artifacts["model"]))

    def predict(self, context: Any, model_input: pd.DataFrame,
                params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row for each person of each picture, in the order given.

        model_input  `picture`: an image file's bytes; `boxes` (optional): list of [x, y, w, h], floats in picture
                     pixels (MLflow refuses integers); None or absent: the whole picture is one person's box;
                     []: no person
        Returns      `prediction_columns`: picture_index (row of the input), person_index, box_x, box_y, box_w,
                     box_h, score (mean of the joints' scores), then <joint>_x, <joint>_y (picture pixels after
                     EXIF orientation) and <joint>_score for each joint
        A picture that can't be decoded is a PictureRefused, which names the reason.
        """
        boxes = model_input["boxes"] if "boxes" in model_input else [None] * len(model_input)
        pictures = zip(model_input["picture"], boxes, strict=True)
        rows = [row for index, (data, own) in enumerate(pictures)
                for row in self._person_rows(index, data, own)]
        columns = prediction_columns(self.predictor.skeleton)
        return pd.DataFrame(rows, columns=list(columns)).astype(columns)

    def _person_rows(self, picture_index: int, data: bytes, boxes: Any) -> list[list[float]]:
        image_bgr = decode_picture(bytes(data), PictureLimits())
        boxes_xywh = _boxes_xywh(boxes, image_bgr.shape)
        persons = self.predictor.predict_persons(image_bgr, boxes_xywh)
        joints = np.concatenate([persons.joints_xy, persons.joint_scores[..., None]], axis=-1)
        return [[picture_index, index, *boxes_xywh[index].tolist(), float(persons.scores[index]),
                 *joints[index].ravel().tolist()] for index in range(len(boxes_xywh))]


def _boxes_xywh(boxes: Any, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The boxes as [n, 4] float64; those of a picture without any given are the picture itself."""
    if boxes is None or isinstance(boxes, float):  # pandas may turn None into NaN
        height, width = shape[:2]
        return np.array([[0.0, 0.0, width, height]])
    return np.array([list(box) for box in boxes], dtype=np.float64).reshape(-1, 4)


mlflow.models.set_model(PoseModel())
