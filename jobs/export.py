"""Keypoint dataset -> one file in another tool's format: read, convert, put if absent."""

import logging
from typing import Any

from pipeline import storage
from pipeline.config import ExportConfig, locations
from pipeline.errors import ConfigError
from pipeline.export import ExportOptions, export_keypoints, refuse_other_ending, refuse_unused
from pipeline.keypoints import read_keypoints

logger = logging.getLogger("jobs.export")
NOT_EXPORTED = ("etag", "sha256", "reason", "error", "job")  # half of what a row takes in memory, and in no format


def run(config: ExportConfig) -> dict[str, Any]:
    """Write the file; gives the numbers of pictures and persons, where it is, and whether the dataset was complete.

    An existing file is refused.
    """
    refuse_unused(config.to, config.model_fields_set - {"keypoints", "to", "output"})
    refuse_other_ending(config.to, config.output)
    config = locations(config, "keypoints", "output")
    if storage.exists(config.output):
        raise _taken(config.output)
    table, metadata = read_keypoints(config.keypoints, without=NOT_EXPORTED)
    model = " ".join(str(metadata.model[part]) for part in ("name", "version") if metadata.model.get(part))
    min_score = metadata.low_score if config.min_score is None else config.min_score
    options = ExportOptions(min_score=min_score, low_joints=config.low_joints, image_prefix=config.image_prefix,
                            empty_pictures=config.empty_pictures, model=model)
    exported = export_keypoints(table, config.to, skeleton=metadata.skeleton, options=options)
    if not storage.put_if_absent(config.output, exported.data):
        raise _taken(config.output)
    logger.info("%d persons in %d pictures written to %s (%s)", exported.persons, exported.pictures, config.output,
                config.to)
    return {"output": config.output, "to": config.to, "pictures": exported.pictures, "persons": exported.persons,
            "left_out": exported.left_out, "bytes": len(exported.data), "complete": metadata.complete}


def _taken(output: str) -> ConfigError:
    return ConfigError(f"--output {output}: something of that name is there, which is never replaced. "
                       "Choose another name, or move the file away.")
