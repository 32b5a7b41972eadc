"""How far a run is: read from its output alone, so that it can be asked from anywhere, while it runs or years later."""

import sys
from typing import Any

from pipeline.config import StatusConfig, locations
from pipeline.run_status import DAMAGED, STOPPED, RunStatus, run_status
from pipeline.words import clock, counted, ranked

FIRST_COUNTS = ("rows", "pictures", "ok", "no_person", "rejected", "refused", "persons", "trainable")


def run(config: StatusConfig) -> dict[str, Any]:
    """Tell people on stderr; gives the same as values."""
    config = locations(config, "output")
    status = run_status(config.output)
    print("\n".join(_lines(status)), file=sys.stderr)
    return {"job": "status", **status.to_json()}


def _lines(status: RunStatus) -> list[str]:
    share = status.done / status.units if status.units else 1.0
    remedy = {STOPPED: ": the same command continues it", DAMAGED: ": it was complete, and parts are gone since; put "
              "them back, or remove _SUCCESS and run the same command again, to make them"}.get(status.state, "")
    model = status.model or {}
    named = f", model {model['name']}{f' version {version}' if (version := model['version']) else ''}" if model else ""
    return [f"{status.output}",
            f"  {status.kind} run {status.digest[:8]}{named}",
            f"  {status.state}{remedy}",
            f"  {status.done} of {counted(status.units, 'unit')} ({share:.1%}), of "
            f"{counted(status.pictures, 'picture')}",
            *_counts(status), *map(_driver, status.drivers)]


def _counts(status: RunStatus) -> list[str]:
    counts = {name: value for name, value in status.counts.items() if not isinstance(value, dict)}
    order = [name for name in FIRST_COUNTS if name in counts] + [name for name in counts if name not in FIRST_COUNTS]
    about = " (estimated)" if status.estimated else ""
    lines = [f"  committed{about}: " + ", ".join(f"{counts[name]} {name}" for name in order)] if counts else []
    if reasons := status.counts.get("reasons"):
        lines.append(f"  reasons: {ranked(reasons)}")
    return lines


def _driver(sign: Any) -> str:
    done = sign.progress
    left = done.get("seconds_left")
    speed = f"{done.get('units_done', 0)} of {done.get('units', 0)} units, {done.get('persons_per_s', 0)} persons/s"
    ends = f", about {clock(left)} left" if left is not None and sign.alive() else ""
    return (f"  driver {sign.driver} on {sign.host}, process {sign.pid}: {'alive' if sign.alive() else 'gone'}, "
            f"last seen {max(0, sign.age_s()):.0f} s ago; {speed}{ends}")
