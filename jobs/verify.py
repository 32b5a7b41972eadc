"""Whether a shard dataset is whole and right: its versions, then each part by a Ray task, then all parts together.

Everything that is wrong is printed on stderr, a line each; nothing is written. It shares no code with `shard`.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from jobs.start_ray import num_cpus, start_ray
from pipeline.config import VerifyConfig, locations
from pipeline.errors import DataError
from pipeline.verification.chain import open_chain
from pipeline.verification.finding import Finding
from pipeline.verification.part import PartReport, PartToCheck, check_stored_part
from pipeline.verification.whole import check_whole, parts_to_check

logger = logging.getLogger("jobs.verify")
FEW_PARTS = 8  # so many are read sooner than a local Ray starts (5 s)
PROGRESS_EVERY_S = 5


def run(config: VerifyConfig) -> dict[str, Any]:
    """Check the dataset; gives how much was checked. What is wrong is printed, and a DataError counts it."""
    config = locations(config, "data")
    chain = open_chain(config.data, config.version)
    for note in chain.notes:
        logger.info(note)
    findings = list(chain.findings)
    names = chain.part_names()
    reports = list(_check_parts(_parts(parts_to_check(chain), findings), len(names), config.ray.tasks))
    findings += [finding for report in reports for finding in report.findings]
    findings += check_whole(chain, reports)
    checked = sum(report.rows is not None for report in reports)
    rows = sum(report.rows or 0 for report in reports)
    _refuse(findings, f"{config.data} version {chain.number} ({checked} of {len(names)} parts and {rows} rows read)")
    logger.info("%s version %d is whole: %d parts, %d rows", config.data, chain.number, len(reports), rows)
    return {"job": "verify", "data": config.data, "dataset_version": chain.number, "parts": len(reports),
            "rows": rows, "findings": 0, "whole": True}


def _parts(found: Iterable[PartToCheck | Finding], findings: list[Finding]) -> Iterator[PartToCheck]:
    for one in found:
        if isinstance(one, Finding):
            findings.append(one)
        else:
            yield one


def _refuse(findings: Sequence[Finding], where: str) -> None:
    for finding in sorted(findings, key=lambda finding: (finding.object, finding.kind, finding.expected)):
        print(finding, file=sys.stderr)
    if findings:
        count = "1 thing is" if len(findings) == 1 else f"{len(findings)} things are"
        raise DataError(f"{where}: {count} wrong, each named above.")


def _check_parts(parts: Iterator[PartToCheck], count: int, at_once: int | None) -> Iterator[PartReport]:
    if count <= FEW_PARTS:
        with ThreadPoolExecutor(at_once or os.cpu_count()) as threads:
            yield from threads.map(check_stored_part, parts)
        return
    with start_ray():
        yield from _check_parts_by_tasks(parts, count, at_once or 2 * num_cpus())


def _check_parts_by_tasks(parts: Iterator[PartToCheck], count: int, at_once: int) -> Iterator[PartReport]:
    """One Ray task for each part, at most `at_once` of them; the reports as they come."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=3)(check_stored_part)
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


def _report_of(answer: Any, name: str) -> PartReport:
    import ray

    try:
        report: PartReport = ray.get(answer)
        return report
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except ray.exceptions.RayError as error:
        raise OSError(f"part {name} could not be checked: {error}. Nothing was changed; run again.") from error
