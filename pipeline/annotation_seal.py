"""`_SUCCESS`, earned: every planned unit has its part, and the parts' own counts add up to the plan.

Totals are sums over the parts' metadata, never a process's counters. With it goes a list of the parts with their
SHA-256, as they were kept when the parts were written, so that any later change of a byte can be found.
"""

import hashlib
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import keypoints, storage
from pipeline.ahead import map_ahead
from pipeline.errors import DataError
from pipeline.units import RESTORE, FrozenJob, refuse_if_begun_again, total_counts

VERSION = 1
SUCCESS = keypoints.SUCCESS
PARTS_FOLDER = "_parts"
PARTS_SCHEMA = pa.schema([("unit", pa.int32()), ("part", pa.string()), ("size", pa.int64()), ("sha256", pa.string())])


def sealed_counts(output: str, job: FrozenJob) -> dict[str, Any] | None:
    """The totals of a finished run, or None if there is no `_SUCCESS`.

    Refuses (DataError) one of a newer format, and that of another job.
    """
    uri = storage.join(output, SUCCESS)
    try:
        values = json.loads(storage.read_object(uri))
    except storage.ObjectMissing:
        return None
    if values.get("version", VERSION) > VERSION:
        raise DataError(f"{uri} has version {values['version']}; this program reads up to {VERSION}. Update it.")
    if values.get("job", job.digest) != job.digest:
        raise DataError(f"{uri} is that of job {values['job'][:8]}, but the output is job {job.digest[:8]}'s: what "
                        "stands there is not known to be complete. Move it elsewhere, and run again.")
    counts: dict[str, Any] = values["counts"]
    return counts


def count_parts(output: str, job: FrozenJob) -> tuple[dict[str, Any], pa.Table]:
    """The totals of all parts of the plan, and the list of them (PARTS_SCHEMA).

    Refuses (DataError) parts that don't account for every planned picture; a part that isn't there is ObjectMissing.
    """
    found = list(map_ahead(lambda unit: _look_at_part(output, job, unit), range(job.num_units)))
    counts = total_counts(counts for _, counts in found)
    accounted = counts["ok"] + counts["no_person"] + counts["rejected"]
    if not accounted == counts["pictures"] == job.plan["pictures"]:
        raise DataError(f"{output}: {job.plan['pictures']} pictures were planned, but the parts account for "
                        f"{accounted}; {SUCCESS} is not written. `verify` says which part is wrong.")
    return counts, pa.Table.from_pylist([row for row, _ in found], PARTS_SCHEMA)


def seal(output: str, job: FrozenJob, counts: dict[str, Any], parts: pa.Table) -> None:
    """Put the list of parts, then `_SUCCESS`, which names it. Whoever else seals puts the same.

    Refuses (DataError) an output that was begun again meanwhile.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(parts, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    sha256 = hashlib.sha256(data).hexdigest()
    listed = f"{PARTS_FOLDER}/{sha256[:16]}.parquet"
    storage.put_if_absent(storage.join(output, listed), data)
    success = {"version": VERSION, "job": job.digest, "units": job.num_units, "counts": counts,
               "parts": {"object": listed, "sha256": sha256}}
    refuse_if_begun_again(output, job)
    storage.put_if_absent(storage.join(output, SUCCESS), json.dumps(success, indent=1).encode())


def _look_at_part(output: str, job: FrozenJob, unit: int) -> tuple[dict[str, Any], dict[str, Any]]:
    name = job.part_name(unit)
    uri = storage.join(output, keypoints.FOLDER, name)
    with storage.arrow_file(uri, remedy=RESTORE) as file:
        size, pose = file.size(), keypoints.pose_metadata(pq.read_metadata(file))
    return {"unit": unit, "part": name, "size": size, "sha256": storage.stored_sha256(uri)}, pose["counts"]
