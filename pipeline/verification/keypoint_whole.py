"""A keypoint dataset's parts, each to be checked once, and what must hold across all of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from pipeline import storage
from pipeline.verification.counts import differences
from pipeline.verification.finding import WRITER, Finding
from pipeline.verification.keypoint_output import SUCCESS, Output
from pipeline.verification.keypoint_part import FOLDER, NOT_IN_ROWS, KeypointPart, KeypointReport, missing_part
from pipeline.verification.keys import all_hashes, doubled_keys, homes_of, repeated
from pipeline.verification.plan import planned_units
from pipeline.verification.run import Run


def keypoints_to_check(output: Output) -> Iterator[KeypointPart | Finding]:
    """The part of each unit once, in the order of the plan, with its rows; and what is already wrong.

    A part that isn't there is a finding only where the run has ended.
    """
    if output.run is None:
        return
    done: set[int] = set()
    for planned in planned_units(output.uri, output.run):
        if isinstance(planned, Finding):
            yield planned
        elif planned[0] not in done:
            done.add(planned[0])
            yield from _part(output, output.run, *planned)
    for unit in range(output.run.units):
        if unit not in done:
            yield from _part(output, output.run, unit, None)


def _part(output: Output, run: Run, unit: int, planned: pa.Table | None) -> Iterator[KeypointPart | Finding]:
    name, listed = run.part_name(unit), output.listed
    if f"{FOLDER}/{name}" not in output.stored:
        if output.sealed:
            yield missing_part(name)
        return
    model = run.intent.get("model")
    part = KeypointPart(output.uri, name, run.digest, model if isinstance(model, str) else None, planned)
    if listed is not None and output.success is not None:
        part = replace(part, size=listed["size"][unit].as_py(), sha256=listed["sha256"][unit].as_py(),
                       listed_in=output.success["parts"]["object"])
    yield part


def check_all_keypoints(output: Output, reports: Sequence[KeypointReport]) -> list[Finding]:
    """What is wrong across parts: keys in two of them, parts that speak of other joints or models, the sums."""
    homes = homes_of(repeated(all_hashes(reports)), storage.join(output.uri, FOLDER), reports)
    return [*doubled_keys(homes, FOLDER, "each key in one part"), *_others_about(reports),
            *_wrong_sums(output, reports)]


def _others_about(reports: Sequence[KeypointReport]) -> Iterator[Finding]:
    known = Counter(report.about for report in reports if report.about is not None)
    if len(known) < 2:
        return
    usual = known.most_common(1)[0][0]
    for report in reports:
        if report.about not in (None, usual):
            yield Finding("source", f"{FOLDER}/{report.name}", "the skeleton, coordinate frame and model that its "
                          f"metadata `pose` shares with {known[usual]} other parts", "others", WRITER)


def _wrong_sums(output: Output, reports: Sequence[KeypointReport]) -> Iterator[Finding]:
    """Whether `_SUCCESS` counts the rows of all parts, where all could be read."""
    read = sum(report.rows is not None for report in reports)
    if output.run is None or output.success is None or read < output.run.units:
        return
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for report in reports:
        total.update(report.counts)
        reasons.update(report.reasons)
    for name in NOT_IN_ROWS:
        total[name] = sum(report.not_in_rows.get(name, 0) for report in reports)
    said = output.success["counts"]
    if wrong := differences({**dict.fromkeys(NOT_IN_ROWS, 0), **said}, total, reasons):
        yield Finding("counts", SUCCESS, "the sums over all rows", wrong, WRITER)
