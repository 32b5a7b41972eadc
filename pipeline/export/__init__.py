"""Keypoint rows in other tools' formats: pure functions from a table to the bytes of a file.

`FORMATS` is where another format is added. It knows nothing of storage or pictures.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.export.coco_annotations import write_coco_annotations, write_cvat
from pipeline.export.fiftyone import write_fiftyone
from pipeline.export.label_studio import write_label_studio
from pipeline.export.persons import Exported, ExportOptions, joint_array, person_rows
from pipeline.export.results import coco_results, write_coco_results
from pipeline.export.yolo_pose import write_yolo_pose
from pipeline.pose.skeleton import Skeleton

__all__ = ["FORMATS", "ExportOptions", "Exported", "Format", "coco_results", "export_keypoints", "joint_array",
           "person_rows", "refuse_other_ending", "refuse_unused"]

JOINTS, PICTURES, PREFIX = ("min_score", "low_joints"), ("empty_pictures",), ("image_prefix",)


@dataclass(frozen=True)
class Format:
    """Who writes it, which options change the file, and how its name ends."""

    write: Callable[[pa.Table, Skeleton, ExportOptions], Exported]
    options: tuple[str, ...] = ()
    ending: str = ".json"


FORMATS = {
    "coco-results": Format(write_coco_results),
    "coco-annotations": Format(write_coco_annotations, JOINTS + PICTURES + PREFIX),
    "cvat": Format(write_cvat, JOINTS + PICTURES + PREFIX, ".zip"),
    "label-studio": Format(write_label_studio, JOINTS + PICTURES + PREFIX, ".zip"),
    "fiftyone": Format(write_fiftyone, JOINTS + PICTURES + PREFIX),
    "yolo-pose": Format(write_yolo_pose, JOINTS + PICTURES, ".zip"),
}


def export_keypoints(table: pa.Table, to: str, *, skeleton: Skeleton, options: ExportOptions | None = None) -> Exported:
    """The file in the format named `to`, of rows sorted by (key, person_index); ConfigError where there is none."""
    if to not in FORMATS:
        raise ConfigError(f"there is no export format {to!r}; known: {', '.join(sorted(FORMATS))}.")
    return FORMATS[to].write(table, skeleton, options or ExportOptions())


def refuse_other_ending(to: str, output: str) -> None:
    """Refuse (ConfigError) a .json or .zip that wouldn't be one: tools look at the name first."""
    ending = FORMATS[to].ending
    if output.lower().endswith((".json", ".zip")) and not output.lower().endswith(ending):
        raise ConfigError(f"--output {output}: {to} is a {ending} file. Choose a name that ends so.")


def refuse_unused(to: str, given: Collection[str]) -> None:
    """Refuse (ConfigError) options that were given and that don't change a file of this format."""
    unused = sorted(set(given) - set(FORMATS[to].options))
    if unused:
        known = ", ".join(FORMATS[to].options) or "none"
        raise ConfigError(f"--to {to} has no use for {', '.join(unused)}; its settings: {known}. Leave it out.")
