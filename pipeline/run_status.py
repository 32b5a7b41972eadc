"""How far a run is, from its output alone: the plan, one listing of the parts, `_SUCCESS`, drivers' signs of life."""

import random
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline import keypoints, shards, storage
from pipeline.annotation_seal import sealed_counts
from pipeline.drivers import Sign, signs_of_life
from pipeline.errors import DataError
from pipeline.shard_versions import job_name, open_version_job
from pipeline.units import FrozenJob, committed_units, open_job, total_counts

COUNTED_PARTS = 2000  # of more parts than this, so many are counted, and the rest is estimated
COMPLETE, RUNNING, STOPPED, DAMAGED = "complete", "running", "stopped", "damaged"


@dataclass(frozen=True)
class RunStatus:
    """A run as its output shows it.

    kind       annotate or shard
    state      complete · running: a driver left a sign of life just now · stopped: none did; the same command
               continues. `shard` leaves no signs, and so is never running · damaged: it was complete, and parts are
               gone since
    units      planned; `done` of them are committed, and `pictures` is what the plan has in all
    counts     of the committed parts; `estimated`: from some of them
    drivers    their newest signs of life, alive or not
    """

    kind: str
    output: str
    state: str
    digest: str
    units: int
    done: int
    pictures: int
    counts: dict[str, Any]
    estimated: bool = False
    drivers: list[Sign] = field(default_factory=list)
    model: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Its values, with each driver's age in seconds."""
        signs = [asdict(sign) | {"age_s": round(sign.age_s(), 1), "alive": sign.alive()} for sign in self.drivers]
        return {name: value for name, value in vars(self).items() if name != "drivers"} | {"drivers": signs}


def run_status(output: str) -> RunStatus:
    """The state of the run at this output. Refuses (DataError) a place where no run was begun."""
    output = storage.normalise(output)
    if (job := open_job(output)) is not None:
        return _annotate_status(output, job)
    version = shards.newest_version(output)
    if version or open_job(output, job_name(1)) is not None:
        return _shard_status(output, version)
    raise DataError(f"{output}: no annotate or shard run was begun there. Give the --output of one.")


def _annotate_status(output: str, job: FrozenJob) -> RunStatus:
    signs = signs_of_life(output)
    sealed, estimated = sealed_counts(output, job), False
    done = committed_units(output, keypoints.FOLDER, job)
    if sealed is not None and len(done) == job.num_units:
        state, counts = COMPLETE, sealed
    else:
        alive = any(sign.alive() for sign in signs)
        state = DAMAGED if sealed is not None else RUNNING if alive else STOPPED
        counts, estimated = _count(output, job, sorted(done))
    return RunStatus("annotate", output, state, job.digest, job.num_units, len(done), int(job.plan["pictures"]),
                     counts, estimated, signs, job.about.get("model"))


def _count(output: str, job: FrozenJob, done: list[int]) -> tuple[dict[str, Any], bool]:
    some = sorted(random.Random(0).sample(done, COUNTED_PARTS)) if len(done) > COUNTED_PARTS else done
    counts = total_counts(keypoints.counts_of_parts(output, map(job.part_name, some)))
    if len(some) == len(done):
        return counts, False
    return _scaled(counts, len(done) / len(some)), True


def _scaled(counts: dict[str, Any], factor: float) -> dict[str, Any]:
    return {name: _scaled(value, factor) if isinstance(value, dict) else round(value * factor)
            for name, value in counts.items()}


def _shard_status(output: str, version: int) -> RunStatus:
    """The run that makes the version after the newest, if one was begun, else the one that made the newest."""
    begun = open_job(output, job_name(version + 1))
    job = begun or open_version_job(output, version)
    counts = shards.open_shards(output, version).json["counts"] if version else {}
    if begun is None:
        return RunStatus("shard", output, COMPLETE, job.digest, job.num_units, job.num_units,
                         int(job.plan["pictures"]), counts)
    earlier = [open_version_job(output, each) for each in range(1, version + 1)]
    done = committed_units(output, shards.FOLDER, job, earlier=earlier)
    return RunStatus("shard", output, STOPPED, job.digest, job.num_units, len(done), int(job.plan["pictures"]), counts)
