"""Whether a dataset is whole and right: what is stored, then each part by a Ray task, then all parts together.

Everything that is wrong is printed on stderr, a line each; nothing is written. It shares no code with `shard` and
`annotate`.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from jobs.start_ray import num_cpus, start_ray
from pipeline.config import VerifyConfig, locations
from pipeline.cores import usable_cores
from pipeline.errors import ConfigError, DataError, printable
from pipeline.verification.chain import open_chain
from pipeline.verification.finding import Finding
from pipeline.verification.keypoint_output import is_keypoint_dataset, open_output
from pipeline.verification.keypoint_part import KeypointPart, KeypointReport, check_stored_keypoints
from pipeline.verification.keypoint_whole import check_all_keypoints, keypoints_to_check
from pipeline.verification.part import PartReport, PartToCheck, check_stored_part
from pipeline.verification.whole import check_whole, parts_to_check
from pipeline.words import counted

logger = logging.getLogger("jobs.verify")
FEW_PARTS = 8  # so many are read sooner than a local Ray starts (5 s)
PROGRESS_EVERY_S = 5

Part = TypeVar("Part", PartToCheck, KeypointPart)
Report = TypeVar("Report", PartReport, KeypointReport)


def run(config: VerifyConfig) -> dict[str, Any]:
    """Check the dataset; gives how much was checked. What is wrong is printed, and a DataError counts it."""
    config = locations(config, "data")
    return _verify_keypoints(config) if is_keypoint_dataset(config.data) else _verify_shards(config)


def _verify_shards(config: VerifyConfig) -> dict[str, Any]:
    chain = open_chain(config.data, config.version)
    for note in chain.notes:
        logger.info(note)
    findings = list(chain.findings)
    names = chain.part_names()
    reports = _check_parts(check_stored_part, _parts(parts_to_check(chain), findings), len(names), config.ray.tasks)
    findings += [finding for report in reports for finding in report.findings]
    findings += check_whole(chain, reports)
    where = f"{config.data} version {chain.number}"
    rows = _refuse(findings, where, reports, len(names))
    logger.info("%s is whole: %s, %s", where, counted(len(reports), "part"), counted(rows, "row"))
    return {"job": "verify", "data": config.data, "dataset_version": chain.number, "parts": len(reports),
            "rows": rows, "findings": 0, "whole": True}


def _verify_keypoints(config: VerifyConfig) -> dict[str, Any]:
    if config.version is not None:
        raise ConfigError(f"version={config.version}: {config.data} is a keypoint dataset, which has no versions. "
                          "Leave the setting out.")
    output = open_output(config.data)
    findings = list(output.findings)
    reports = _check_parts(check_stored_keypoints, _parts(keypoints_to_check(output), findings),
                           output.num_committed, config.ray.tasks)
    findings += [finding for report in reports for finding in report.findings]
    findings += check_all_keypoints(output, reports)
    rows = _refuse(findings, config.data, reports, output.num_committed, unfinished=output.unfinished)
    assert output.run is not None  # else there was a finding
    logger.info("%s is whole: %s, %s", config.data, counted(len(reports), "part"), counted(rows, "row"))
    return {"job": "verify", "data": config.data, "digest": output.run.digest, "parts": len(reports), "rows": rows,
            "findings": 0, "whole": True}


def _parts(found: Iterable[Part | Finding], findings: list[Finding]) -> Iterator[Part]:
    for one in found:
        if isinstance(one, Finding):
            findings.append(one)
        else:
            yield one


def _refuse(findings: Sequence[Finding], where: str, reports: Sequence[PartReport | KeypointReport], parts: int, *,
            unfinished: str = "") -> int:
    """Print what is wrong, and end with a DataError then; otherwise the number of rows that were read."""
    for finding in sorted(findings, key=lambda finding: (finding.object, finding.kind, finding.expected)):
        print(printable(str(finding)), file=sys.stderr)
    rows = sum(report.rows or 0 for report in reports)
    problems = [unfinished] if unfinished else []
    if findings:
        count = "1 thing is" if len(findings) == 1 else f"{len(findings)} things are"
        problems.append(f"{count} wrong, each named above")
    if problems:
        checked = sum(report.rows is not None for report in reports)
        raise DataError(f"{where} ({checked} of {parts} parts and {rows} rows read): {'; '.join(problems)}.")
    return rows


# --- the parts ----------------------------------------------------------------------------------------------------


def _check_parts(check: Callable[[Part], Report], parts: Iterator[Part], count: int,
                 at_once: int | None) -> list[Report]:
    """The reports of all parts, by name: by threads where there are few, else by Ray tasks."""
    if count <= FEW_PARTS:
        with ThreadPoolExecutor(at_once or usable_cores()) as threads:
            reports = list(threads.map(check, parts))
    else:
        with start_ray():
            reports = list(_check_parts_by_tasks(check, parts, count, at_once or 2 * num_cpus()))
    return sorted(reports, key=lambda report: report.name)


def _check_parts_by_tasks(check: Callable[[Part], Report], parts: Iterator[Part], count: int,
                          at_once: int) -> Iterator[Report]:
    """One Ray task for each part, at most `at_once` of them; the reports as they come."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=3)(check)
    running: dict[Any, str] = {task.remote(part): part.name for part in islice(parts, at_once)}
    done, began, last = 0, time.monotonic(), time.monotonic()
    while running:
        ready, _ = ray.wait(list(running), num_returns=1)
        yield _report_of(ready[0], running.pop(ready[0]))
        done += 1
        running |= {task.remote(part): part.name for part in islice(parts, 1)}
        if time.monotonic() - last > PROGRESS_EVERY_S:
            last = time.monotonic()
            logger.info("%d of %d parts, %.0f s", done, count, last - began)


def _report_of(answer: Any, name: str) -> Any:
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except ray.exceptions.RayError as error:
        raise OSError(f"part {name} could not be checked: {error}. Nothing was changed; run again.") from error
