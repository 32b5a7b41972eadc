"""The run that wrote a dataset, as its own file tells of it: `_job.json`, or `_job-00000N.json` of a version."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.verification.finding import RESTORE, Finding, Tell, some
from pipeline.verification.reading import read_json

PART_NAME = re.compile(r"part-(\d{7})-([0-9a-f]{8})\.parquet")
SHA256 = re.compile("[0-9a-f]{64}")
UNITS_PER_PLAN_FILE = 1000  # where a plan doesn't say
MAX_UNITS = 10_000_000  # the names of parts have seven digits

# What must be there, and of which kind; other keys may be there too.
PLAN_KEYS = {"digest": str, "units": int, "pictures": int}
_JOB_KEYS = {"version": int, "digest": str, "plan": PLAN_KEYS, "intent": dict, "input": dict}


@dataclass(frozen=True)
class Run:
    """What a run had to do: its digest, and its plan's. `dropped`: rows that the plan drops; None: no list.

    intent  all that could change a row; empty where only a version tells of the run
    """

    digest: str
    plan_digest: str
    units: int
    pictures: int
    units_per_file: int
    dropped: int | None
    intent: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return (f"job {self.digest[:16]}... with {self.pictures} pictures in {self.units} units, "
                f"plan {self.plan_digest[:16]}...")

    @property
    def plan_folder(self) -> str:
        """Where its plan is, by its name in the dataset."""
        return f"_plan/{self.plan_digest[:16]}"

    def part_name(self, unit: int) -> str:
        """The part of a unit."""
        return f"part-{unit:07d}-{self.digest[:8]}.parquet"

    def wrote(self, name: str) -> bool:
        """Whether a part of this name is one of its units'."""
        match = PART_NAME.fullmatch(name)
        return match is not None and match[2] == self.digest[:8] and int(match[1]) < self.units


def read_run(uri: str, name: str, expected: str, tell: Tell) -> Run | None:
    """The run, from its own file; what is wrong with that is told, and None is a file that can't be used.

    The digest is the SHA-256 of the JSON of the plan's digest and the intent: keys sorted, no spaces.
    """
    values = read_json(uri, name, _JOB_KEYS, expected, tell)
    if values is None:
        return None
    plan = values["plan"]
    if problems := list(wrong_digests(values["digest"], plan)):
        tell(Finding("keys", name, "the values of a run", some(problems), RESTORE))
        return None
    frozen = json.dumps({"plan": plan["digest"], "intent": values["intent"]}, sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(frozen.encode()).hexdigest() != values["digest"]:
        tell(Finding("damaged", name, f"the plan and the intent of digest {values['digest']}", "others", RESTORE))
    return run_of(values["digest"], plan, values["intent"])


def run_of(digest: str, plan: Mapping[str, Any], intent: Mapping[str, Any] | None = None) -> Run:
    """The run of this digest and plan, which are without fault."""
    return Run(digest, plan["digest"], plan["units"], plan["pictures"],
               plan.get("units_per_file", UNITS_PER_PLAN_FILE), plan.get("dropped"), intent or {})


def wrong_digests(job: str, plan: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a run's digest and the values of its plan, whose keys are there."""
    for name, digest in (("job", job), ("plan", plan["digest"])):
        if not SHA256.fullmatch(digest):
            yield f"{name}: digest {digest!r} instead of a SHA-256"
    if not 0 <= plan["units"] <= MAX_UNITS or plan["pictures"] < 0:
        yield f"plan: {plan['units']} units, {plan['pictures']} pictures"
    per_file, dropped = plan.get("units_per_file", UNITS_PER_PLAN_FILE), plan.get("dropped")
    if type(per_file) is not int or per_file < 1 or type(dropped) not in (int, type(None)):
        yield f"plan: {per_file!r} units in a file, {dropped!r} rows dropped"
