"""Keypoint dataset -> one file in another tool's format: read, convert, put if absent."""

import logging
from typing import Any

from pipeline import storage
from pipeline.config import ExportConfig, locations
from pipeline.errors import ConfigError
from pipeline.export import export_keypoints, person_rows
from pipeline.keypoints import read_keypoints

logger = logging.getLogger("jobs.export")


def run(config: ExportConfig) -> dict[str, Any]:
    """Write the file; gives the number of persons, and where it is. An existing file is refused."""
    config = locations(config, "keypoints", "output")
    if storage.exists(config.output):
        raise _taken(config.output)
    table, metadata = read_keypoints(config.keypoints)
    data = export_keypoints(table, config.to, skeleton=metadata.skeleton)
    if not storage.put_if_absent(config.output, data):
        raise _taken(config.output)
    num_persons = person_rows(table).num_rows
    logger.info("%d persons written to %s (%s)", num_persons, config.output, config.to)
    return {"output": config.output, "to": config.to, "persons": num_persons, "bytes": len(data)}


def _taken(output: str) -> ConfigError:
    return ConfigError(f"--output {output}: there is a file of that name, which is never replaced. "
                       "Choose another name, or move the file away.")
