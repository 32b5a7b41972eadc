"""What annotating an input will take, in time, node hours and money: count it all, annotate a sample, extrapolate.

The sample goes through the very pool that would do the work, on the cluster at hand, into a place of its own that is
removed afterwards. Nothing is written to any output.
"""

import contextlib
import logging
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.annotate import freeze
from jobs.annotate_pool import PoolSizes, UnitTask, annotate_units, pool_sizes
from jobs.start_ray import num_cpus, num_gpus, num_nodes, refuse_unshared, start_ray
from pipeline import storage
from pipeline.annotation_seal import count_parts
from pipeline.config import AnnotateConfig, AnnotationConfig, PlanConfig, locations
from pipeline.model_reference import find_model
from pipeline.unit_annotator import FAILED, Receipt
from pipeline.units import FrozenJob

logger = logging.getLogger("jobs.plan")
SLICES_FOR_AN_ACTOR = 4  # so that what one actor gets by chance weighs little
PICTURES_FOR_AN_ACTOR = 100
SAMPLE_SEED = 0


@dataclass(frozen=True)
class Whole:
    """The input counted: pictures, units, and the seconds that listing it took."""

    pictures: int
    units: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """The sample: what was in it, an actor's seconds for a picture, and the seconds that come once or once a unit."""

    pictures: int
    persons: int
    rejected: int
    picture_s: float
    pool_start_s: float
    seal_unit_s: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of each step and in all; node hours, and money where a node hour has a price."""

    listing_s: float
    pool_start_s: float
    annotating_s: float
    sealing_s: float
    seconds: float
    node_hours: float
    money: float | None


def run(config: PlanConfig) -> dict[str, Any]:
    """Measure and predict; people read a table on stderr, the values are the same."""
    config = locations(config, "input", "scratch", "detector")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plan-")))
        scratch = storage.join(config.scratch or str(folder), f"plan-{uuid.uuid4().hex[:8]}")
        (folder / "model").mkdir()
        model = find_model(config.model, settings=config.tracking, into=folder / "model")
        stack.enter_context(start_ray())
        refuse_unshared(inputs=[config.input], outputs=[scratch])
        stack.callback(_remove, scratch)
        sampling = Sampling(config.sample)
        shared = {name: getattr(config, name) for name in AnnotationConfig.model_fields}
        job = freeze(AnnotateConfig(output=scratch, **shared), model, sampling.choose)
        pool = pool_sizes(job, actors=config.actors, detectors=config.detectors)
        measured = _measure(scratch, job, pool)
        prediction = predict(sampling.whole, measured, pool=pool, nodes=num_nodes(), price=config.price_per_node_hour)
    _tell(sampling.whole, measured, prediction, job.intent, pool)
    return {"job": "plan", "input": config.input, "actors": pool.annotators, "whole": asdict(sampling.whole),
            "measured": asdict(measured), "predicted": asdict(prediction)}


def predict(whole: Whole, measured: Measured, *, pool: PoolSizes, nodes: int, price: float | None) -> Prediction:
    """Units are dealt to the actors, so the work takes as many rounds of units as the busiest actor gets."""
    unit_s = measured.picture_s * whole.pictures / whole.units
    annotating = -(-whole.units // pool.annotators) * unit_s
    sealing = measured.seal_unit_s * whole.units
    seconds = whole.seconds + measured.pool_start_s + annotating + sealing
    node_hours = nodes * seconds / 3600
    return Prediction(whole.seconds, measured.pool_start_s, annotating, sealing, seconds, node_hours,
                      None if price is None else price * node_hours)


class Sampling:
    """Goes through all units of the plan once, counts them, and keeps slices of some, drawn with equal chances."""

    def __init__(self, pictures: int | None) -> None:
        self.whole = Whole(0, 0, 0.0)
        self._pictures = pictures

    def choose(self, units: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The sample's units; afterwards `whole` is known."""
        draw = random.Random(SAMPLE_SEED)
        wanted = SLICES_FOR_AN_ACTOR * (num_gpus() or num_cpus())
        drawn: list[pa.Table] = []
        began, pictures, count = time.monotonic(), 0, 0
        for unit in units:
            pictures, count = pictures + len(unit), count + 1
            place = len(drawn) if len(drawn) < wanted else draw.randrange(count)
            if place < wanted:
                drawn[place:place + 1] = [unit]
        self.whole = Whole(pictures, count, time.monotonic() - began)
        size = -(-(self._pictures or PICTURES_FOR_AN_ACTOR * (num_gpus() or num_cpus())) // len(drawn))
        logger.info("%d pictures in %d units counted in %.1f s; annotating a sample of about %d", pictures, count,
                    self.whole.seconds, size * len(drawn))
        for unit in drawn:
            yield unit.slice(draw.randrange(max(1, len(unit) - size + 1)), size)


def _measure(scratch: str, job: FrozenJob, pool: PoolSizes) -> Measured:
    began = time.time()
    tasks = [UnitTask(unit) for unit in range(job.num_units)]
    receipts = list(_committed(annotate_units(scratch, job, tasks, pool=pool, reuse=None)))
    sealing = time.monotonic()
    counts, _ = count_parts(scratch, job)
    sealed_s = time.monotonic() - sealing
    return Measured(counts["pictures"], counts["persons"], counts["rejected"],
                    sum(receipt.ended - receipt.began for receipt in receipts) / counts["pictures"],
                    min(receipt.began for receipt in receipts) - began, sealed_s / job.num_units)


def _committed(receipts: Iterator[Receipt]) -> Iterator[Receipt]:
    for receipt in receipts:
        if receipt.outcome == FAILED:
            raise OSError(f"the sample can't be annotated: {receipt.failure}")
        yield receipt


def _remove(scratch: str) -> None:
    for found in list(storage.list_objects(scratch)):
        storage.remove_own(found.uri)


def _tell(whole: Whole, measured: Measured, prediction: Prediction, intent: dict[str, Any], pool: PoolSizes) -> None:
    rate = pool.annotators * measured.persons / measured.pictures / measured.picture_s
    lines = [
        f"{whole.pictures:,} pictures in {whole.units:,} units, listed in {whole.seconds:.1f} s",
        f"measured on {measured.pictures} pictures, {measured.persons} persons, {measured.rejected} rejected: "
        f"{rate:.1f} persons/s by {pool.annotators} actors ({intent['backend']}, {intent['precision']})",
        f"about {whole.pictures * measured.persons / measured.pictures:,.0f} persons",
        f"wall time   {_hours(prediction.seconds)}  (listing {prediction.listing_s:.0f} s, pool "
        f"{prediction.pool_start_s:.0f} s, annotating {prediction.annotating_s:.0f} s, sealing "
        f"{prediction.sealing_s:.0f} s)",
        f"node hours  {prediction.node_hours:.2f}"]
    if prediction.money is not None:
        lines.append(f"money       {prediction.money:.2f}, in the currency of the price")
    print("\n".join(lines), file=sys.stderr)


def _hours(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
