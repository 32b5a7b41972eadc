"""A shard dataset's parts, each to be checked once, and what must hold across all of them.

The parts' rows are compared with the plan of the run that wrote them, which is read here, a file at a time.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.verification.chain import Chain
from pipeline.verification.finding import FOLDER, RESTORE, WRITER, Finding, some
from pipeline.verification.part import Hashes, PartReport, PartToCheck, hash_keys, missing_part
from pipeline.verification.versions import Run, Version

PLAN_DROPPED = "dropped.parquet"
PLAN_COLUMNS = ("unit", "key", "size", "sha256", "etag")


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
        uri=storage.join(chain.uri, FOLDER, name), name=name, version=newest.name,
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


# --- the plan -----------------------------------------------------------------------------------------------------


def planned_units(uri: str, run: Run) -> Iterator[tuple[int, pa.Table] | Finding]:
    """Each unit of a run's plan with its rows (columns key, etag, size); and what is wrong with the plan's files.

    The plan's digest is the SHA-256 over a line `[unit, key, size, sha256 or etag]` of JSON for each row, and then
    one `[part, key, why]` for each row that it drops: it says that these are the files which were frozen.
    """
    folder = f"_plan/{run.plan_digest[:16]}"
    content, units, pictures, complete = hashlib.sha256(), 0, 0, True
    for number in range(-(-run.units // run.units_per_file)):
        name = f"{folder}/plan-{number:07d}.parquet"
        tables = _plan_file(uri, name)
        if isinstance(tables, Finding):
            yield tables
            complete = False
            continue
        for unit, table in enumerate(tables, number * run.units_per_file):
            content.update(_identities(table))
            units, pictures = units + 1, pictures + len(table)
            if unit < run.units:
                yield unit, table.select(["key", "etag", "size"])
    if run.dropped is not None:
        lines = _dropped_lines(uri, f"{folder}/{PLAN_DROPPED}")
        if isinstance(lines, Finding):
            yield lines
            complete = False
        else:
            content.update(lines)
    if complete and (content.hexdigest(), units, pictures) != (run.plan_digest, run.units, run.pictures):
        yield Finding("damaged", folder, f"{run.pictures} pictures in {run.units} units of digest {run.plan_digest}",
                      f"{pictures} in {units} of {content.hexdigest()}", RESTORE)


def _plan_file(uri: str, name: str) -> list[pa.Table] | Finding:
    """One table for each unit of the file, which is one row group."""
    try:
        file = pq.ParquetFile(pa.BufferReader(storage.read_object(storage.join(uri, name))))
        tables = [file.read_row_group(group).select(PLAN_COLUMNS) for group in range(file.num_row_groups)]
        for table in tables:
            table.validate(full=True)
    except storage.ObjectMissing:
        return Finding("missing", name, "the plan of a run", "no such object", RESTORE)
    except storage.StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        return Finding("unreadable", name, f"Parquet with the columns {', '.join(PLAN_COLUMNS)}",
                       " ".join(str(error).split()), RESTORE)
    return tables


def _dropped_lines(uri: str, name: str) -> bytes | Finding:
    try:
        table = pq.read_table(pa.BufferReader(storage.read_object(storage.join(uri, name))))
        rows = zip(*(table[column].to_pylist() for column in ("part", "key", "why")), strict=True)
    except storage.ObjectMissing:
        return Finding("missing", name, "what the plan of a run drops", "no such object", RESTORE)
    except storage.StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        return Finding("unreadable", name, "Parquet with the columns part, key, why", " ".join(str(error).split()),
                       RESTORE)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _identities(table: pa.Table) -> bytes:
    rows = zip(*(table[name].to_pylist() for name in PLAN_COLUMNS), strict=True)
    return "".join(json.dumps([unit, key, size, sha256 or etag]) + "\n" for unit, key, size, sha256, etag in
                   rows).encode()


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
    hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *(report.key_hashes for report in reports)]))
    kept_out = set() if chain.dropped is None else set(chain.dropped.filter(pc.or_(
        pc.equal(chain.dropped["part"], ""), pc.equal(chain.dropped["why"], "request")))["key"].to_pylist())
    hashes_out = hash_keys(kept_out)
    suspects = np.union1d(hashes[1:][hashes[1:] == hashes[:-1]], hashes_out[_among(hashes_out, hashes)])
    homes = _homes(chain, reports, suspects) if len(suspects) else {}
    pairs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key, parts in sorted(homes.items()):
        for part in parts[1:]:
            pairs[part, parts[0]].append(repr(key))
        if key in kept_out:
            assert chain.newest is not None
            yield Finding("dropped", f"{FOLDER}/{parts[0]}", f"no row of {key!r}, which {chain.newest.dropped} "
                          "keeps out", "a live one", "Shard again with the key excluded, into a new version.")
    for (part, other), keys in sorted(pairs.items()):
        yield Finding("doubled", f"{FOLDER}/{part}", "each key to be live once",
                      f"{some(keys)} live in {FOLDER}/{other} too", WRITER)


def _among(hashes: Hashes, ordered: Hashes) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """bool [n]: which of the hashes are in `ordered`. np.isin takes 16 s for one among 10 million, this nothing."""
    if not len(ordered):
        return np.zeros(len(hashes), bool)
    nearest = ordered[np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)]
    return np.equal(nearest, hashes)


def _homes(chain: Chain, reports: Sequence[PartReport], suspects: Hashes) -> dict[str, list[str]]:
    """The parts in which each key of these hashes is live: the keys themselves, since two may share a hash."""
    wanted = set(suspects.tolist())
    dropped = _keys_by_part(chain.dropped)
    homes: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        if not _among(report.key_hashes, suspects).any():
            continue
        filesystem, path = storage.arrow_filesystem(storage.join(chain.uri, FOLDER, report.name))
        keys = set(pq.read_table(path, filesystem=filesystem, columns=["key"])["key"].to_pylist())
        for key in keys - dropped.get(report.name, frozenset()) - {None}:
            if int(hash_keys({key})[0]) in wanted:
                homes[key].append(report.name)
    return homes


def _wrong_duplicates(newest: Version, reports: Sequence[PartReport]) -> Iterator[Finding]:
    if "duplicates" not in newest.total:
        return
    # by 8 bytes of each SHA-256: among 50 million pictures, two that differ share them with a chance of 1 in 14,000
    hashes = np.concatenate([np.empty(0, np.uint64), *(report.picture_hashes for report in reports)])
    duplicates = len(hashes) - len(np.unique(hashes))
    if newest.total["duplicates"] != duplicates:
        yield Finding("counts", newest.name, f"duplicates to be {duplicates}, as the live pictures' SHA-256 say",
                      str(newest.total["duplicates"]), WRITER)
