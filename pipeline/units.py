"""What a run has to do, frozen before it begins: the plan, the intent, and which units are done.

One unit becomes one output object, and that the object exists is the commit. So a run's whole state is its output:
the plan under `_plan/`, `_job.json` that names it, and one listing of the parts. Nothing here knows what is in a part.
"""

import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.ahead import map_ahead
from pipeline.errors import ConfigError, DataError
from pipeline.rows import PLAN_SCHEMA

VERSION = 1
UNITS_PER_PLAN_FILE = 1000
DROPPED_FILE = "dropped.parquet"
RESTORE = "Restore the object, or choose a new --output."
_PART = re.compile(r"part-(\d{7})-([0-9a-f]{8})\.parquet")


@dataclass(frozen=True)
class FrozenJob:
    """A run's `_job.json`: its input, its intent (all that can change a row) and the digest over plan and intent.

    `about` is for people alone: what the run was begun with that can change no row, such as a model's name.
    """

    digest: str
    input: dict[str, Any]
    intent: dict[str, Any]
    plan: dict[str, Any]  # digest, units, pictures, units_per_file; how many rows of earlier versions are dropped
    about: dict[str, Any]

    @property
    def num_units(self) -> int:
        """Units in the plan."""
        return int(self.plan["units"])

    @property
    def units_per_plan_file(self) -> int:
        """Units in each file of the plan but the last."""
        return int(self.plan.get("units_per_file", UNITS_PER_PLAN_FILE))

    def part_name(self, unit: int) -> str:
        """The object that commits a unit, such as `part-0000042-1f2e3d4c.parquet`."""
        return f"part-{unit:07d}-{self.digest[:8]}.parquet"

    def unit_of(self, part: str) -> int | None:
        """The inverse: the unit that an object of this name commits; None where it is no part of this job."""
        match = _PART.fullmatch(part)
        own = match is not None and match[2] == self.digest[:8] and int(match[1]) < self.num_units
        return int(match[1]) if match is not None and own else None

    def to_json(self) -> dict[str, Any]:
        """What `_job.json` holds."""
        return {"version": VERSION, "digest": self.digest, "plan": self.plan, "intent": self.intent,
                "input": self.input, "about": self.about}


def open_job(output: str, name: str = "_job.json") -> FrozenJob | None:
    """The job that was frozen at this output, or None; a newer format is refused by name (DataError)."""
    uri = storage.join(output, name)
    try:
        values = json.loads(storage.read_object(uri))
    except storage.ObjectMissing:
        return None
    if values["version"] > VERSION:
        raise DataError(f"{uri} has version {values['version']}; this program reads up to {VERSION}. Update it.")
    return FrozenJob(values["digest"], values["input"], values["intent"], values["plan"], values["about"])


def freeze_job(output: str, units: Iterable[pa.Table], *, input: dict[str, Any], intent: dict[str, Any],
               about: dict[str, Any] | None = None, dropped: pa.Table | None = None, name: str = "_job.json",
               units_per_file: int = UNITS_PER_PLAN_FILE, accept_winner: bool = True,
               before_commit: Callable[[FrozenJob], Mapping[str, Any]] = lambda job: {}) -> FrozenJob:
    """Write the plan, then `_job.json` if absent; the job that stands there afterwards, ours or an earlier winner's.

    units          for each unit its pictures: a table of PLAN_SCHEMA's columns but `unit`; what it lacks is NULL
    dropped        rows of an earlier version that no longer count: a table of text columns, part of the plan
    accept_winner  work from an earlier winner's plan, whatever it is; else another plan is refused (DataError)
    before_commit  puts what else belongs to the job, once its plan stands and before the job does; what it gives back
                   is added to `about`

    The plan goes through files in a temporary folder (TMPDIR), one in memory at a time: a place in the output has the
    digest in its name, which is known at the end.
    """
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        summary = _write_plan(Path(folder), units, dropped, units_per_file)
        for path in sorted(Path(folder).iterdir()):
            storage.put_if_absent(_plan_uri(output, summary["digest"], path.name), path.read_bytes())
    digest = _digest({"plan": summary["digest"], "intent": intent})
    job = FrozenJob(digest, input, intent, summary, about or {})
    job = replace(job, about={**job.about, **before_commit(job)})
    if not storage.put_if_absent(storage.join(output, name), json.dumps(job.to_json(), indent=1).encode()):
        winner = open_job(output, name)
        assert winner is not None
        if winner.digest != digest and not accept_winner:
            raise DataError(f"{output}: another run was first to write {name}, from another listing or other settings. "
                            "Wait until it has ended, and run again, to add what is still missing.")
        return winner
    return job


def refuse_if_begun_again(output: str, job: FrozenJob) -> None:
    """Refuse (DataError) to put anything more at an output that was deleted, or deleted and begun again, meanwhile.

    For who may have slept: asked right before a put. What was sent before it is not held back.
    """
    there = open_job(output)
    if there is None or there.digest != job.digest:
        now = "has been deleted" if there is None else f"has been deleted and begun again as job {there.digest[:8]}"
        raise DataError(f"{output}: the output of job {job.digest[:8]} {now} while this process was at work on it. "
                        "Nothing more is put there.")


def refuse_other_intent(job: FrozenJob, output: str, *, input: dict[str, Any], intent: dict[str, Any],
                        added: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Refuse (ConfigError) to go on with a run that was begun otherwise; each difference is named.

    added  settings that jobs of older programs don't have, with the values under which they ran
    """
    asked, frozen = {**intent, "input": input}, {**added, **job.intent, "input": job.input}
    differences = [f"  {key}: begun with {json.dumps(frozen.get(key))}, now {json.dumps(asked.get(key))}"
                   for key in sorted(asked.keys() | frozen.keys()) if asked.get(key) != frozen.get(key)]
    if differences:
        raise ConfigError(f"{output} holds a run that was begun with other settings:\n" + "\n".join(differences)
                          + "\nRepeat its settings to continue it, or choose a new --output.")


def read_unit(output: str, job: FrozenJob, unit: int) -> list[dict[str, Any]]:
    """The planned pictures of one unit, as dicts with PLAN_SCHEMA's columns, in the plan's order."""
    _, table = next(read_units(output, job, [unit]))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def read_units(output: str, job: FrozenJob, units: Iterable[int]) -> Iterator[tuple[int, pa.Table]]:
    """Some units in ascending order, each with its planned pictures; each file of the plan is opened once.

    Refuses (DataError) a file that can't be read as one; trouble with the store is a StorageError.
    """
    for number, wanted in itertools.groupby(units, lambda unit: unit // job.units_per_plan_file):
        uri = _plan_uri(output, job.plan["digest"], _plan_file(number))
        with storage.arrow_file(uri, remedy=RESTORE) as file, pq.ParquetFile(file) as plan:
            for unit in wanted:
                yield unit, plan.read_row_group(unit % job.units_per_plan_file)


def read_dropped(output: str, job: FrozenJob) -> pa.Table | None:
    """The rows of earlier versions that the plan says no longer count, or None."""
    if "dropped" not in job.plan:
        return None
    return pq.read_table(pa.BufferReader(storage.read_object(_plan_uri(output, job.plan["digest"], DROPPED_FILE))))


def committed_units(output: str, folder: str, job: FrozenJob, *, earlier: Iterable[FrozenJob] = ()) -> set[int]:
    """The units whose part exists, from one listing; another job's part stops the run and is named (DataError).

    earlier  jobs whose parts belong there too: those of a dataset's earlier versions
    """
    known = {one.digest[:8] for one in earlier}
    units = set()
    for found in storage.list_objects(storage.join(output, folder)):
        match = _PART.fullmatch(found.name)
        if (unit := job.unit_of(found.name)) is not None:
            units.add(unit)
        elif not match or match[2] not in known:
            raise DataError(f"{found.uri} is no part of job {job.digest[:8]}, whose output this is. "
                            "Move it elsewhere, or choose a new --output.")
    return units


def part_footers(output: str, folder: str, names: Iterable[str]) -> Iterator[pq.FileMetaData]:
    """The Parquet metadata of the named parts, in their order; only the files' ends are read."""
    def footer(name: str) -> pq.FileMetaData:
        with storage.arrow_file(storage.join(output, folder, name), remedy=RESTORE) as file:
            return pq.read_metadata(file)

    return map_ahead(footer, names)


def total_counts(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sums of several parts' counts; counts of counts (such as reasons) are summed name by name."""
    total: dict[str, Any] = {}
    for one in counts:
        for name, value in one.items():
            if isinstance(value, dict):
                total[name] = total_counts([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return total


def _plan_uri(output: str, digest: str, file: str) -> str:
    return storage.join(output, "_plan", digest[:16], file)


def _plan_file(number: int) -> str:
    return f"plan-{number:07d}.parquet"


def _write_plan(folder: Path, units: Iterable[pa.Table], dropped: pa.Table | None,
                units_per_file: int) -> dict[str, Any]:
    """Write the plan's files; its summary: digest, units, pictures, units_per_file, and `dropped`, how many rows."""
    content, num_units, num_pictures = hashlib.sha256(), 0, 0
    remaining = iter(units)
    for number in itertools.count():
        some = itertools.islice(remaining, units_per_file)
        if (first := next(some, None)) is None:
            break
        with pq.ParquetWriter(folder / _plan_file(number), PLAN_SCHEMA, compression="zstd") as writer:
            for pictures in itertools.chain([first], some):
                table = _unit_table(pictures, num_units)
                writer.write_table(table, row_group_size=len(table))
                content.update(_identities(table).encode())
                num_units, num_pictures = num_units + 1, num_pictures + len(table)
    summary = {"units": num_units, "pictures": num_pictures, "units_per_file": units_per_file}
    if dropped is not None:
        pq.write_table(dropped, folder / DROPPED_FILE, compression="zstd")
        for row in zip(*dropped.to_pydict().values(), strict=True):
            content.update((json.dumps(row) + "\n").encode())
        summary["dropped"] = len(dropped)
    return {"digest": content.hexdigest(), **summary}


def _unit_table(pictures: pa.Table, unit: int) -> pa.Table:
    assert len(pictures)
    assert not pictures["key"].null_count
    columns = [pictures[name] if name in pictures.column_names else pa.nulls(len(pictures), kind)
               for name, kind in zip(PLAN_SCHEMA.names[1:], PLAN_SCHEMA.types[1:], strict=True)]
    return pa.table([pa.array([unit] * len(pictures), pa.int32()), *columns], schema=PLAN_SCHEMA)


def _identities(table: pa.Table) -> str:
    # by content where it is known: the same pictures, copied elsewhere, are the same plan under other ETags
    same = pc.coalesce(table["sha256"], table["etag"])
    rows = zip(*(column.to_pylist() for column in (table["unit"], table["key"], table["size"], same)), strict=True)
    return "".join(f"[{unit}, {_json(key)}, {_json(size)}, {_json(one)}]\n" for unit, key, size, one in rows)


def _json(value: str | int | None) -> str:
    # json.dumps of each row takes 5 us, this 1: of 10 million rows 40 s
    return json.encoder.encode_basestring_ascii(value) if isinstance(value, str) else json.dumps(value)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
