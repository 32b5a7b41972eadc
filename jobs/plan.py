"""What annotating an input will take, in time, node hours and money: count it all, annotate a sample, extrapolate.

The sample goes through the very pool that would do the work, on the cluster at hand, into a place of its own that is
removed afterwards. Nothing is written to any output.
"""

import contextlib
import itertools
import logging
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
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
PICTURES_FOR_AN_ACTOR = 200  # COCO's have 3.6 persons each, give or take 3.7: the mean of 400 is right to some 5 %
SAMPLE_SEED = 0


@dataclass(frozen=True)
class Whole:
    """The input counted: pictures, units, and the seconds that listing it took."""

    pictures: int
    units: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """The sample: what was in it, an actor's seconds for a picture and for a unit without its pictures (a shard is read
    whole), and the seconds that come once, or once a unit at the end; the same of those that decode for others."""

    pictures: int
    persons: int
    rejected: int
    picture_s: float
    unit_s: float
    pool_start_s: float
    seal_unit_s: float
    decoding_picture_s: float = 0.0
    decoding_unit_s: float = 0.0


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
        scratch = storage.join(config.scratch or str(folder), f"_scratch-{uuid.uuid4().hex[:8]}")
        (folder / "model").mkdir()
        model = find_model(config.model, settings=config.tracking, into=folder / "model")
        stack.enter_context(start_ray())
        refuse_unshared(inputs=[config.input], outputs=[scratch])
        stack.callback(_remove, scratch)
        sampling = Sampling(config.sample, actors=config.actors, decoders=config.decoders or config.detectors)
        shared = {name: getattr(config, name) for name in AnnotationConfig.model_fields}
        job = freeze(AnnotateConfig(output=scratch, **shared), model, sampling.choose)
        pool = pool_sizes(job, actors=config.actors, detectors=config.detectors, decoders=config.decoders)
        measured = _measure(scratch, job, pool, sampling)
        prediction = predict(sampling.whole, measured, pool=pool, nodes=num_nodes(), price=config.price_per_node_hour)
    _tell(sampling.whole, measured, prediction, job.intent, pool)
    return {"job": "plan", "input": config.input, "actors": pool.annotators, "decoders": pool.decoders,
            "whole": asdict(sampling.whole),
            "measured": asdict(measured), "predicted": asdict(prediction)}


def predict(whole: Whole, measured: Measured, *, pool: PoolSizes, nodes: int, price: float | None) -> Prediction:
    """Units are dealt to the actors, so the work takes as many rounds of units as the busiest actor gets; where others
    decode, both pools work at once, and the slower one decides."""
    pictures = whole.pictures / whole.units
    annotating = -(-whole.units // pool.annotators) * (measured.unit_s + measured.picture_s * pictures)
    if pool.decoders:
        decoding = measured.decoding_unit_s + measured.decoding_picture_s * pictures
        annotating = max(annotating, -(-whole.units // pool.decoders) * decoding)
    sealing = measured.seal_unit_s * whole.units
    seconds = whole.seconds + measured.pool_start_s + annotating + sealing
    node_hours = nodes * seconds / 3600
    return Prediction(whole.seconds, measured.pool_start_s, annotating, sealing, seconds, node_hours,
                      None if price is None else price * node_hours)


class Sampling:
    """Goes through all units of the plan once, counts them, and keeps slices of some, drawn with equal chances.

    Before the slices come single pictures: with the first ones actors get going (`num_first`), the next ones
    (`num_single`) tell what a unit costs beside its pictures.
    """

    def __init__(self, pictures: int | None, *, actors: int | None = None, decoders: int | None = None) -> None:
        self.whole = Whole(0, 0, 0.0)
        self._actors = max(actors or num_gpus() or num_cpus(), decoders or 0)
        self.num_first = self.num_single = self._actors
        self._pictures = pictures or PICTURES_FOR_AN_ACTOR * self._actors

    def choose(self, units: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The sample's units; afterwards `whole` is known."""
        draw = random.Random(SAMPLE_SEED)
        wanted = SLICES_FOR_AN_ACTOR * self._actors
        drawn: list[pa.Table] = []
        began, pictures, count = time.monotonic(), 0, 0
        for unit in units:
            pictures, count = pictures + len(unit), count + 1
            place = len(drawn) if len(drawn) < wanted else draw.randrange(count)
            if place < wanted:
                drawn[place:place + 1] = [unit]
        self.whole = Whole(pictures, count, time.monotonic() - began)
        size = -(-self._pictures // len(drawn))
        logger.info("%d pictures in %d units counted in %.1f s; annotating a sample of about %d", pictures, count,
                    self.whole.seconds, size * len(drawn))
        for unit in itertools.islice(itertools.cycle(drawn), self.num_first + self.num_single):
            yield unit.slice(draw.randrange(len(unit)), 1)
        for unit in drawn:
            yield unit.slice(draw.randrange(max(1, len(unit) - size + 1)), size)


def _measure(scratch: str, job: FrozenJob, pool: PoolSizes, sampling: Sampling) -> Measured:
    began = time.time()
    tasks = [UnitTask(unit) for unit in range(job.num_units)]
    receipts = sorted(_committed(annotate_units(scratch, job, tasks, pool=pool, reuse=None)), key=lambda one: one.unit)
    sealing = time.monotonic()
    counts, _ = count_parts(scratch, job)
    sealed_s = time.monotonic() - sealing
    first, rest = receipts[:sampling.num_first], receipts[sampling.num_first:]
    single, slices = rest[:sampling.num_single], rest[sampling.num_single:]
    warming = statistics.mean(map(_annotating_s, first)) - statistics.mean(map(_annotating_s, single))
    return Measured(counts["pictures"], counts["persons"], counts["rejected"], *_cost(single, slices, _annotating_s),
                    min(receipt.began for receipt in receipts) - began + max(0.0, warming), sealed_s / job.num_units,
                    *_cost(single, slices, lambda receipt: receipt.decoding_s))


def _annotating_s(receipt: Receipt) -> float:
    return receipt.ended - receipt.began


def _cost(single: Sequence[Receipt], slices: Sequence[Receipt],
          seconds: Callable[[Receipt], float]) -> tuple[float, float]:
    return split_cost(statistics.mean(map(seconds, single)), [seconds(receipt) for receipt in slices],
                      [receipt.counts["pictures"] for receipt in slices])


def split_cost(single_s: float, seconds: Sequence[float], pictures: Sequence[int]) -> tuple[float, float]:
    """An actor's seconds for a picture, and for a unit beside its pictures.

    single_s           of units of one picture
    seconds, pictures  of each other unit
    """
    more = sum(pictures) - len(pictures)
    picture_s = (sum(seconds) - single_s * len(seconds)) / more if more else single_s
    # what can't be told apart belongs to the pictures
    return (picture_s, single_s - picture_s) if 0 < picture_s < single_s else (sum(seconds) / sum(pictures), 0.0)


def _committed(receipts: Iterator[Receipt]) -> Iterator[Receipt]:
    for receipt in receipts:
        if receipt.outcome == FAILED:
            raise OSError(f"the sample can't be annotated: {receipt.failure}")
        yield receipt


def _remove(scratch: str) -> None:
    for found in list(storage.list_objects(scratch)):
        storage.remove_own(found.uri)


def _tell(whole: Whole, measured: Measured, prediction: Prediction, intent: dict[str, Any], pool: PoolSizes) -> None:
    picture_s = measured.picture_s / pool.annotators
    if pool.decoders:
        picture_s = max(picture_s, measured.decoding_picture_s / pool.decoders)
    decoders = f", for whom {pool.decoders} decode" if pool.decoders else ""
    lines = [
        f"{whole.pictures:,} pictures in {whole.units:,} units, listed in {whole.seconds:.1f} s",
        f"measured on {measured.pictures} pictures, {measured.persons} persons, {measured.rejected} rejected: "
        f"{measured.persons / measured.pictures / picture_s:.1f} persons/s by {pool.annotators} actors "
        f"({intent['backend']}, {intent['precision']}){decoders}",
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
