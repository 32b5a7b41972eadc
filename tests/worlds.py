"""Small worlds for tests of whole jobs: made pictures with annotations, and an untrained little model."""

import json
from pathlib import Path

import pyarrow as pa
import torch

from pipeline.config import TrackingConfig
from pipeline.figures import write_made_dataset
from pipeline.keypoints import read_keypoints
from pipeline.model.directory import ModelSpec, save_model
from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.pose.skeleton import COCO17

NO_TRACKING = TrackingConfig(enabled=False)
TINY = MSPNConfig(num_joints=17, num_stages=1, input_size_wh=(64, 64), blocks=(1, 1, 1, 1), widths=(4, 4, 4, 4),
                  stem_channels=4, upsample_channels=8)


def write_pictures(folder: Path, count: int = 12) -> Path:
    """Made pictures under folder/images, with folder/annotations.json; `folder`."""
    write_made_dataset(folder, num_pictures=count, seed=0)
    return folder


def write_tiny_model(directory: Path, seed: int = 0) -> Path:
    """A model directory with an untrained network that answers in milliseconds; `directory`."""
    torch.manual_seed(seed)
    save_model(directory, MSPN(TINY), ModelSpec(network=TINY, skeleton=COCO17.to_json()))
    return directory


def annotated_persons(folder: Path) -> int:
    """How many persons who aren't crowds the annotations have."""
    return sum(not person["iscrowd"] for person in
               json.loads((folder / "annotations.json").read_text())["annotations"])


def rows(output: str, *, without: tuple[str, ...] = ()) -> pa.Table:
    """A keypoint dataset's rows, less some columns, sorted by (key, person_index)."""
    table, _ = read_keypoints(output)
    return table.drop_columns(list(without))
