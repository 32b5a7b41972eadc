"""A shard dataset's parts, each to be checked once, and what must hold across all of them.

The parts' rows are compared with the plan of the run that wrote them, which is read here, a file at a time.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.verification.chain import Chain
from pipeline.verification.finding import WRITER, Finding
from pipeline.verification.keys import all_hashes, among, doubled_keys, hash_keys, homes_of, no_hashes, repeated
from pipeline.verification.part import PartReport, PartToCheck, missing_part
from pipeline.verification.plan import planned_units
from pipeline.verification.versions import FOLDER, Version


def parts_to_check(chain: Chain) -> Iterator[PartToCheck | Finding]:
    """Each part of the dataset once, in the order of the plans, with its unit's rows; and what is already wrong.

    Parts that the version leaves out are among them: their rows were planned, and are to be dropped by name.
    """
    if chain.newest is None:
        return
    dropped = {} if chain.dropped is None else _keys_by_part(chain.dropped)
    retired = _keys_by_part(chain.retired)
    done: set[str] = set()
    for number, run in chain.runs.items():
        for planned in planned_units(chain.uri, run):
            if isinstance(planned, Finding):
                yield planned
                continue
            unit, table = planned
            name = run.part_name(unit)
            if name in done:
                yield Finding("doubled", f"{FOLDER}/{name}", "to be planned by one run",
                              f"an earlier run and that of version {number} have it", WRITER)
                continue
            done.add(name)
            yield _part(chain, chain.newest, name, table, dropped, retired)
    for name in sorted(chain.part_names() - done):
        yield _part(chain, chain.newest, name, None, dropped, retired)


def _part(chain: Chain, newest: Version, name: str, planned: pa.Table | None, dropped: Mapping[str, frozenset[str]],
          retired: Mapping[str, frozenset[str]]) -> PartToCheck | Finding:
    named_by = next((version for version in reversed(chain.versions.values()) if name in version.sha256), None)
    if f"{FOLDER}/{name}" not in chain.stored:
        return missing_part(f"{FOLDER}/{name}", named_by.name if named_by else None)
    counts = newest.counts.get(name)
    gone = dropped.get(name, frozenset())
    if counts is None:
        gone |= retired.get(name, frozenset())
    return PartToCheck(
        uri=chain.uri, name=name, version=newest.name,
        named_by=named_by.name if named_by else None, sha256=named_by.sha256[name] if named_by else None,
        counts=counts, planned=planned, dropped=None if chain.dropped is None else gone,
        dropped_name=newest.dropped or newest.name, num_joints=newest.num_joints,
        count_duplicates="duplicates" in newest.total)


def _keys_by_part(table: pa.Table | None) -> dict[str, frozenset[str]]:
    if table is None:
        return {}
    grouped = table.group_by("part").aggregate([("key", "list")])
    return {part: frozenset(keys) for part, keys in
            zip(grouped["part"].to_pylist(), grouped["key_list"].to_pylist(), strict=True)}


# --- across parts -------------------------------------------------------------------------------------------------


def check_whole(chain: Chain, reports: Sequence[PartReport]) -> list[Finding]:
    """What is wrong across parts: keys live twice or kept out, duplicates, rows that weren't planned."""
    if chain.newest is None:
        return []
    read = {report.name for report in reports if report.rows is not None}
    findings = [*_wrong_keys(chain, reports)]
    if chain.dropped is not None and read >= chain.newest.sha256.keys():
        findings += _wrong_duplicates(chain.newest, reports)
    planned, rows = sum(run.pictures for run in chain.runs.values()), sum(report.rows or 0 for report in reports)
    # a part that lacks a row has told so itself
    if planned != rows and read == chain.part_names() and not any(report.findings for report in reports):
        findings.append(Finding("counts", chain.newest.name, f"{planned} rows, as all runs together planned", str(rows),
                                WRITER))
    return findings


def _wrong_keys(chain: Chain, reports: Sequence[PartReport]) -> Iterator[Finding]:
    hashes = all_hashes(reports)
    kept_out = set() if chain.dropped is None else set(chain.dropped.filter(pc.or_(
        pc.equal(chain.dropped["part"], ""), pc.equal(chain.dropped["why"], "request")))["key"].to_pylist())
    hashes_out = hash_keys(kept_out)
    suspects = np.union1d(repeated(hashes), hashes_out[among(hashes_out, hashes)])
    homes = homes_of(suspects, storage.join(chain.uri, FOLDER), reports, _keys_by_part(chain.dropped))
    for key in sorted(homes.keys() & kept_out):
        assert chain.newest is not None
        yield Finding("dropped", f"{FOLDER}/{homes[key][0]}", f"no row of {key!r}, which {chain.newest.dropped} "
                      "keeps out", "a live one", "Shard again with the key excluded, into a new version.")
    yield from doubled_keys(homes, FOLDER, "each key to be live once")


def _wrong_duplicates(newest: Version, reports: Sequence[PartReport]) -> Iterator[Finding]:
    if "duplicates" not in newest.total:
        return
    # by 8 bytes of each SHA-256: among 50 million pictures, two that differ share them with a chance of 1 in 14,000
    hashes = np.concatenate([no_hashes(), *(report.picture_hashes for report in reports)])
    duplicates = len(hashes) - len(np.unique(hashes))
    if newest.total["duplicates"] != duplicates:
        yield Finding("counts", newest.name, f"duplicates to be {duplicates}, as the live pictures' SHA-256 say",
                      str(newest.total["duplicates"]), WRITER)
