"""A shard dataset but for its parts' rows: the chain of its versions, what is stored, what is dropped."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import DataError
from pipeline.verification.finding import MOVE, RESTORE, WRITER, Finding, Tell, some
from pipeline.verification.reading import copy_of, read_parquet, read_stored
from pipeline.verification.run import Run, read_run
from pipeline.verification.versions import (
    DATASET,
    DROPPED,
    DROPPED_NAME,
    EACH_VERSION,
    FOLDER,
    JOB,
    Version,
    read_version,
)

_NUMBERED = re.compile(r"(?:dataset-|_job-)(\d{6})\.json")
STORED_COLUMNS = pa.schema([("part", pa.string()), ("key", pa.string())])
DROPPED_COLUMNS = STORED_COLUMNS.append(pa.field("why", pa.string()))  # "" where the list has no such column


@dataclass(frozen=True)
class Chain:
    """A shard dataset up to one version.

    versions  those that can be read, up to `number`
    runs      theirs, whether the version told of its run or the run's own file
    dropped   columns part ("" for NULL), key, why: the rows that don't count in version `number`; None: not to be
              read
    retired   columns part, key, why: what earlier versions dropped of parts that have been left out since
    stored    size of each object in the place, by its name
    findings  what is wrong so far
    notes     what isn't wrong, but worth knowing
    """

    uri: str
    number: int
    versions: dict[int, Version]
    runs: dict[int, Run]
    stored: dict[str, int]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    dropped: pa.Table | None = None
    retired: pa.Table | None = None

    @property
    def newest(self) -> Version | None:
        """The version that is checked, if its JSON can be read."""
        return self.versions.get(self.number)

    @property
    def all_runs_known(self) -> bool:
        """Whether each version's run is known, so that a part of another run can be told."""
        return len(self.runs) == self.number

    def part_names(self) -> set[str]:
        """All parts that must be there: those that were planned, and those that a version names."""
        planned = {run.part_name(unit) for run in self.runs.values() for unit in range(run.units)}
        return planned.union(*(version.sha256 for version in self.versions.values()))


def open_chain(uri: str, number: int | None = None) -> Chain:
    """The dataset up to its newest version, or the one of this number, and what is wrong before any part is read.

    Refuses with DataError a place without a shard dataset, a version above the newest, a newer format. What comes
    after a pinned version explains the objects that are there, and isn't judged.
    """
    stored = {found.name: found.size for found in storage.list_objects(uri)}
    last = max((int(match[1]) for name in stored if name.startswith("dataset-")
                and (match := _NUMBERED.fullmatch(name))), default=0)
    _refuse_other_places(uri, stored, last, number)
    number = number or last
    findings: list[Finding] = []
    versions: dict[int, Version] = {}
    runs: dict[int, Run] = {}
    for each in range(1, last + 2):
        tell = findings.append if each <= number or number == last else _ignore
        version = read_version(uri, each, tell) if each <= last else None
        job = JOB.format(each)
        run = read_run(uri, job, EACH_VERSION, tell) if each <= last or job in stored else None
        if version is not None:
            versions[each] = version
            _compare_run(job, run, version, tell)
        if found := version.run if version else run:
            runs[each] = found
    findings += [*_foreign_parts(uri, stored, versions, runs), *_foreign_others(stored, versions, last)]
    chain = Chain(uri, number, {each: versions[each] for each in versions if each <= number},
                  {each: runs[each] for each in runs if each <= number}, stored, (), _notes(stored, last, runs))
    findings += [*_unplanned_parts(chain), *_other_digests(chain)]
    return _with_dropped(replace(chain, findings=tuple(findings)))


def _ignore(finding: Finding) -> None:
    pass


def _refuse_other_places(uri: str, stored: Mapping[str, int], last: int, number: int | None) -> None:
    if last and (number is None or number <= last):
        return
    if last:
        raise DataError(f"{uri} has versions 1 to {last}, and no version {number}. Give one of these, or none.")
    begun = " A run was begun there: repeat its command to end it." if JOB.format(1) in stored else ""
    raise DataError(f"{uri} holds no shard dataset ({DATASET.format(1)} isn't there) and no keypoint dataset "
                    f"(_job.json).{begun} Give the --output of a shard run that has ended, or of an annotate run.")


def _compare_run(name: str, run: Run | None, version: Version, tell: Tell) -> None:
    if run is not None and run != version.run:
        tell(Finding("source", name, f"the run that {version.name} comes from: {version.run}", str(run), RESTORE))


def _notes(stored: Mapping[str, int], last: int, runs: Mapping[int, Run]) -> tuple[str, ...]:
    unended = runs.get(last + 1)
    if unended is None:
        return ()
    written = sum(unended.wrote(name.removeprefix(f"{FOLDER}/")) for name in stored if name.startswith(f"{FOLDER}/"))
    return (f"{JOB.format(last + 1)}: a run has not ended; {written} of its {unended.units} parts are there, and no "
            "version has them yet. Repeat its command to end it.",)


# --- what is stored -----------------------------------------------------------------------------------------------


def _foreign_parts(uri: str, stored: Mapping[str, int], versions: Mapping[int, Version],
                   runs: Mapping[int, Run]) -> Iterator[Finding]:
    known: dict[str, str] = {}
    for version in versions.values():
        known |= version.sha256
    by_size: dict[int | None, dict[str, str]] = defaultdict(dict)
    for name, sha256 in known.items():
        by_size[stored.get(f"{FOLDER}/{name}")][sha256] = f"{FOLDER}/{name}"
    for path in sorted(stored):
        folder, _, name = path.partition("/")
        if folder == FOLDER and name not in known and not any(run.wrote(name) for run in runs.values()):
            yield copy_of(uri, path, by_size.get(stored[path], {})) or Finding(
                "foreign", path, "only parts that a version names or a run has planned", "neither", MOVE)


def _foreign_others(stored: Mapping[str, int], versions: Mapping[int, Version], last: int) -> Iterator[Finding]:
    explained = {version.dropped for version in versions.values()}
    # an unreadable version, or the one that a run is about to write, may name its own
    explained |= {DROPPED.format(number) for number in range(1, last + 2) if number not in versions}
    for name in sorted(stored):
        match = _NUMBERED.fullmatch(name)
        if match and not 1 <= int(match[1]) <= last + 1:
            yield Finding("foreign", name, f"versions 1 to {last}, their runs and the next", "another number", MOVE)
        if DROPPED_NAME.fullmatch(name) and name not in explained:
            yield Finding("foreign", name, "only what a version names", "no version does", MOVE)


def _unplanned_parts(chain: Chain) -> Iterator[Finding]:
    if chain.newest is None or not chain.all_runs_known:
        return
    for name in sorted(chain.newest.sha256):
        if not any(run.wrote(name) for run in chain.runs.values()):
            yield Finding("foreign", f"{FOLDER}/{name}", "the part of a unit that a run has planned",
                          f"no such unit, though {chain.newest.name} names it", WRITER)


def _other_digests(chain: Chain) -> Iterator[Finding]:
    known: dict[str, tuple[str, str]] = {}
    for version in chain.versions.values():
        for name, sha256 in version.sha256.items():
            before, told = known.get(name, (sha256, version.name))
            known[name] = sha256, version.name
            if before != sha256:
                yield Finding("source", f"{FOLDER}/{name}", f"SHA-256 {before} ({told})",
                              f"{sha256} ({version.name})", WRITER)


# --- what is dropped ----------------------------------------------------------------------------------------------


def _with_dropped(chain: Chain) -> Chain:
    """The chain with what its versions drop. Each must keep what the one before it dropped, but for duplicates: the
    picture that was kept instead may be gone."""
    findings: list[Finding] = []
    retired = [DROPPED_COLUMNS.empty_table()]
    before: pa.Table | None = None
    for version in chain.versions.values():
        table = _read_dropped(chain, version, findings.append)
        if before is not None and table is not None:
            lasting = before.filter(pc.not_equal(before["why"], "duplicate"))
            gone = lasting.join(table, ["part", "key"], join_type="left anti")
            kept = pc.is_in(gone["part"], pa.array(["", *version.sha256], pa.string()))
            if back := sorted(gone.filter(kept)["key"].to_pylist()):
                findings.append(Finding("dropped", version.dropped or version.name, "all that was dropped before",
                                        f"not {some([repr(key) for key in back])}", WRITER))
            retired.append(gone.filter(pc.invert(kept)))
        before = table
    dropped = before if chain.newest else None
    return replace(chain, dropped=dropped, retired=pa.concat_tables(retired),
                   findings=(*chain.findings, *findings, *_unknown_parts(chain, dropped)))


def _read_dropped(chain: Chain, version: Version, tell: Tell) -> pa.Table | None:
    """Columns part ("" where it is NULL), key, why; None: it can't be read, and that is told."""
    if version.dropped is None:
        return DROPPED_COLUMNS.empty_table()
    data = read_stored(chain.uri, version.dropped, f"what {version.name} names", tell, sha256=version.dropped_sha256,
                       told_by=version.name)
    if data is None:
        return None
    table = read_parquet(data, version.dropped, STORED_COLUMNS, tell)
    if table is not None and table["key"].null_count:
        tell(Finding("columns", version.dropped, "a key in each row", "NULL", WRITER))
        return None
    if table is None:
        return None
    why = table["why"] if "why" in table.column_names else pa.nulls(len(table), pa.string())
    return pa.table([pc.fill_null(table["part"], ""), table["key"], pc.fill_null(why, "")], schema=DROPPED_COLUMNS)


def _unknown_parts(chain: Chain, dropped: pa.Table | None) -> Iterator[Finding]:
    if chain.newest is None or dropped is None:
        return
    parts = set(pc.unique(dropped["part"]).to_pylist()) - {""}
    if unknown := sorted(parts - chain.part_names()):
        yield Finding("dropped", chain.newest.dropped or "", "only parts of the dataset", f"others: {some(unknown)}",
                      WRITER)
