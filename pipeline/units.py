"""What a run has to do, frozen before it begins: the plan, the intent, and which units are done.

One unit becomes one output object, and that the object exists is the commit. So a run's whole state is its output:
the plan under `_plan/`, `_job.json` that names it, and one listing of the parts. Nothing here knows what is in a part.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.rows import PLAN_SCHEMA

VERSION = 1
UNITS_PER_PLAN_FILE = 1000
_PART = re.compile(r"part-(\d{7})-([0-9a-f]{8})\.parquet")


@dataclass(frozen=True)
class FrozenJob:
    """A run's `_job.json`: its input, its intent (all that can change a row) and the digest over plan and intent.

    `about` is for people alone: what the run was begun with that can change no row, such as a model's name.
    """

    digest: str
    input: dict[str, Any]
    intent: dict[str, Any]
    plan: dict[str, Any]  # digest, units, pictures
    about: dict[str, Any]

    @property
    def num_units(self) -> int:
        """Units in the plan."""
        return int(self.plan["units"])

    def part_name(self, unit: int) -> str:
        """The object that commits a unit, such as `part-0000042-1f2e3d4c.parquet`."""
        return f"part-{unit:07d}-{self.digest[:8]}.parquet"

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


def freeze_job(output: str, units: Iterable[Sequence[dict[str, Any]]], *, input: dict[str, Any],
               intent: dict[str, Any], about: dict[str, Any] | None = None,
               name: str = "_job.json") -> FrozenJob:
    """Write the plan, then `_job.json` if absent; the job that stands there afterwards, ours or an earlier winner's.

    units   for each unit its pictures, as dicts with PLAN_SCHEMA's columns except `unit`.
    """
    files, summary = _plan_files(units)
    for number, data in enumerate(files):
        storage.put_if_absent(_plan_uri(output, summary["digest"], number), data)
    digest = _digest({"plan": summary["digest"], "intent": intent})
    job = FrozenJob(digest, input, intent, summary, about or {})
    if not storage.put_if_absent(storage.join(output, name), json.dumps(job.to_json(), indent=1).encode()):
        winner = open_job(output, name)
        assert winner is not None
        return winner
    return job


def refuse_other_intent(job: FrozenJob, output: str, *, input: dict[str, Any], intent: dict[str, Any]) -> None:
    """Refuse (ConfigError) to go on with a run that was begun otherwise; each difference is named."""
    asked, frozen = {**intent, "input": input}, {**job.intent, "input": job.input}
    differences = [f"  {key}: begun with {json.dumps(frozen.get(key))}, now {json.dumps(asked.get(key))}"
                   for key in sorted(asked.keys() | frozen.keys()) if asked.get(key) != frozen.get(key)]
    if differences:
        raise ConfigError(f"{output} holds a run that was begun with other settings:\n" + "\n".join(differences)
                          + "\nRepeat its settings to continue it, or choose a new --output.")


def read_unit(output: str, job: FrozenJob, unit: int) -> list[dict[str, Any]]:
    """The planned pictures of one unit, as dicts with PLAN_SCHEMA's columns, in the plan's order."""
    number, row_group = divmod(unit, UNITS_PER_PLAN_FILE)
    filesystem, path = storage.arrow_filesystem(_plan_uri(output, job.plan["digest"], number))
    with filesystem.open_input_file(path) as file:
        rows: list[dict[str, Any]] = pq.ParquetFile(file).read_row_group(row_group).to_pylist()
    return rows


def iterate_plan(output: str, job: FrozenJob) -> Iterator[pa.Table]:
    """The whole plan, one table for each of its files."""
    for number in range(-(-job.num_units // UNITS_PER_PLAN_FILE)):
        data = storage.read_object(_plan_uri(output, job.plan["digest"], number))
        yield pq.read_table(pa.BufferReader(data))


def committed_units(output: str, folder: str, job: FrozenJob) -> set[int]:
    """The units whose part exists, from one listing; another job's part stops the run and is named (DataError)."""
    units = set()
    for found in storage.list_objects(storage.join(output, folder)):
        match = _PART.fullmatch(found.name)
        if not match or match[2] != job.digest[:8] or int(match[1]) >= job.num_units:
            raise DataError(f"{found.uri} is no part of job {job.digest[:8]}, whose output this is. "
                            "Move it elsewhere, or choose a new --output.")
        units.add(int(match[1]))
    return units


def part_footers(output: str, folder: str, job: FrozenJob) -> list[pq.FileMetaData]:
    """The Parquet metadata of every part, in the order of units; only the files' ends are read."""
    def footer(unit: int) -> pq.FileMetaData:
        filesystem, path = storage.arrow_filesystem(storage.join(output, folder, job.part_name(unit)))
        with filesystem.open_input_file(path) as file:
            return pq.read_metadata(file)

    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(footer, range(job.num_units)))


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


def _plan_uri(output: str, digest: str, number: int) -> str:
    return storage.join(output, "_plan", digest[:16], f"plan-{number:07d}.parquet")


def _plan_files(units: Iterable[Sequence[dict[str, Any]]]) -> tuple[list[bytes], dict[str, Any]]:
    files: list[bytes] = []
    content, num_units, num_pictures = hashlib.sha256(), 0, 0
    remaining = iter(units)
    while some := list(islice(remaining, UNITS_PER_PLAN_FILE)):
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, PLAN_SCHEMA, compression="zstd") as writer:
            for pictures in some:
                rows = [{**picture, "unit": num_units} for picture in pictures]
                writer.write_table(_unit_table(rows), row_group_size=len(rows))
                content.update("".join(map(_identity, rows)).encode("utf-8"))
                num_units, num_pictures = num_units + 1, num_pictures + len(rows)
        files.append(sink.getvalue().to_pybytes())
    return files, {"digest": content.hexdigest(), "units": num_units, "pictures": num_pictures}


def _unit_table(rows: list[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist(rows, PLAN_SCHEMA)
    assert pc.all(pc.is_valid(table["key"])).as_py()
    return table


def _identity(row: dict[str, Any]) -> str:
    # by content where it is known: the same pictures, copied elsewhere, are the same plan under other ETags
    same = row.get("sha256") or row["etag"]
    return json.dumps([row["unit"], row["key"], row["size"], same]) + "\n"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
