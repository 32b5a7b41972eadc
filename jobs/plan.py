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
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.annotate import freeze, refuse_early
from jobs.annotate_pool import PoolSizes, UnitTask, annotate_units, pool_sizes
from jobs.start_ray import num_cpus, num_gpus, num_nodes, refuse_unshared, start_ray
from pipeline import storage
from pipeline.annotation_seal import count_parts
from pipeline.config import AnnotateConfig, AnnotationConfig, PlanConfig, locations
from pipeline.forecast import Measured, Prediction, Whole, annotating_s, costs, decoding_s, predict
from pipeline.model_reference import find_model
from pipeline.reuse import KnownPictures, earlier_parts
from pipeline.unit_annotator import COMMITTED, FAILED, Receipt
from pipeline.units import FrozenJob, open_job
from pipeline.words import clock, counted

logger = logging.getLogger("jobs.plan")
SLICES_FOR_AN_ACTOR = 4  # so that what one actor gets by chance weighs little
COPIED_FOR_AN_ACTOR = 2  # whole units: copying one reads whole parts
PICTURES_FOR_AN_ACTOR = 200  # COCO's have 3.6 persons each, give or take 3.7: the mean of 400 is right to some 5 %
SAMPLE_SEED = 0


def run(config: PlanConfig) -> dict[str, Any]:
    """Measure and predict; people read a table on stderr, the values are the same."""
    config = locations(config, "input", "scratch", "detector", "reuse", "exclude")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plan-")))
        scratch = storage.join(config.scratch or str(folder), f"_scratch-{uuid.uuid4().hex[:8]}")
        (folder / "model").mkdir()
        model = find_model(config.model, settings=config.tracking, into=folder / "model")
        refuse_early(config)
        stack.enter_context(start_ray())
        refuse_unshared(inputs=[config.input], outputs=[scratch])
        stack.callback(_remove, scratch)
        sampling = Sampling(config.sample, actors=config.actors, decoders=config.decoders or config.detectors,
                            reuse=config.reuse)
        shared = {name: getattr(config, name) for name in (*AnnotationConfig.model_fields, "reuse", "exclude")}
        job = freeze(AnnotateConfig(output=scratch, **shared), model, sampling.choose)
        pool = pool_sizes(job, actors=config.actors, detectors=config.detectors, decoders=config.decoders)
        measured = _measure(scratch, job, pool, sampling)
        prediction = predict(sampling.whole, measured, annotators=pool.annotators, decoders=pool.decoders,
                             nodes=num_nodes(), price=config.price_per_node_hour)
    _tell(sampling.whole, measured, prediction, job.intent, pool)
    return {"job": "plan", "input": config.input, "actors": pool.annotators, "decoders": pool.decoders,
            "whole": asdict(sampling.whole),
            "measured": asdict(measured), "predicted": asdict(prediction)}


# --- the sample ---------------------------------------------------------------------------------------------------


class Sampling:
    """Goes through all units of the plan once, counts them, and keeps slices of some, drawn with equal chances.

    Before the slices come single pictures: with the first ones actors get going (`num_first`), the next ones
    (`num_single`) tell what a unit costs beside its pictures. Behind them come units of pictures that the output
    `reuse` has (`num_copied`), which are not in the slices: each whole, since a part is read whole.
    """

    def __init__(self, pictures: int | None, *, actors: int | None = None, decoders: int | None = None,
                 reuse: str | None = None) -> None:
        self.whole = Whole(0, 0, 0.0)
        self.reuse = reuse
        self._actors = max(actors or num_gpus() or num_cpus(), decoders or 0)
        self.num_first = self.num_single = self._actors
        self.num_copied = 0
        self._pictures = pictures or PICTURES_FOR_AN_ACTOR * self._actors

    def choose(self, units: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The sample's units; afterwards `whole` is known."""
        draw = random.Random(SAMPLE_SEED)
        computed = _Drawn(SLICES_FOR_AN_ACTOR * self._actors, draw)
        copied = _Drawn(COPIED_FOR_AN_ACTOR * self._actors, draw)
        self._count(units, computed, copied)
        if not computed.units and self.whole.copied < self.whole.pictures:
            computed.units = copied.units  # rejects that can change are computed, and cost what any picture does
        if not computed.units:
            self.num_first = self.num_single = 0
        yield from self._slices(computed.units, draw)
        self.num_copied = len(copied.units)
        yield from copied.units

    def _count(self, units: Iterator[pa.Table], computed: "_Drawn", copied: "_Drawn") -> None:
        began = time.monotonic()
        known = None if self.reuse is None else KnownPictures(self.reuse)
        num_pictures = num_units = num_known = 0
        for unit in units:
            are_known = np.zeros(len(unit), bool) if known is None else known.among(unit)
            num_pictures, num_units = num_pictures + len(unit), num_units + 1
            num_known += int(are_known.sum())
            computed.offer(unit.filter(pa.array(~are_known)))
            copied.offer(unit.filter(pa.array(are_known)))
        num_copied = num_known - min(num_known, known.num_changeable if known else 0)
        self.whole = Whole(num_pictures, num_units, time.monotonic() - began, num_copied)

    def _slices(self, units: list[pa.Table], draw: random.Random) -> Iterator[pa.Table]:
        size = -(-self._pictures // max(1, len(units)))
        logger.info("%s in %s counted in %.1f s; annotating a sample of about %d",
                    counted(self.whole.pictures, "picture"), counted(self.whole.units, "unit"), self.whole.seconds,
                    size * len(units))
        for unit in itertools.islice(itertools.cycle(units), self.num_first + self.num_single):
            yield unit.slice(draw.randrange(len(unit)), 1)
        for unit in units:
            yield unit.slice(draw.randrange(max(1, len(unit) - size + 1)), size)


class _Drawn:
    """Some of the units that are offered, each with the same chance; empty ones are none."""

    def __init__(self, wanted: int, draw: random.Random) -> None:
        self.units: list[pa.Table] = []
        self._wanted, self._draw, self._offered = wanted, draw, 0

    def offer(self, unit: pa.Table) -> None:
        """Keep it, perhaps."""
        if not len(unit):
            return
        self._offered += 1
        place = len(self.units) if len(self.units) < self._wanted else self._draw.randrange(self._offered)
        if place < self._wanted:
            self.units[place:place + 1] = [unit]


def _tasks(scratch: str, job: FrozenJob, sampling: Sampling) -> list[UnitTask]:
    first_copied = job.num_units - sampling.num_copied
    tasks = [UnitTask(unit) for unit in range(first_copied)]
    if sampling.num_copied and sampling.reuse is not None:
        earlier = open_job(sampling.reuse)
        assert earlier is not None
        tasks += [UnitTask(unit, tuple(parts)) for unit, parts in earlier_parts(
            sampling.reuse, earlier, scratch, job, range(first_copied, job.num_units))]
    return tasks


def _measure(scratch: str, job: FrozenJob, pool: PoolSizes, sampling: Sampling) -> Measured:
    began = time.time()
    receipts = _annotate(scratch, job, _tasks(scratch, job, sampling), pool=pool, reuse=sampling.reuse)
    sealing = time.monotonic()
    counts, _ = count_parts(scratch, job)
    sealed_s = time.monotonic() - sealing
    bounds = [0, *itertools.accumulate([sampling.num_first, sampling.num_single]),
              job.num_units - sampling.num_copied, job.num_units]
    first, single, slices, copied = (
        [receipts[unit] for unit in range(*ends) if receipts[unit].outcome == COMMITTED]
        for ends in itertools.pairwise(bounds))
    warming = _mean_s(first) - _mean_s(single) if first and single else 0.0
    picture_s, unit_s, copied_s = costs(single, slices, copied, annotating_s)
    decoding_picture_s, decoding_unit_s, copied_decoding_s = costs(single, slices, copied, decoding_s)
    return Measured(
        counts["pictures"], counts["persons"], counts["rejected"], picture_s, unit_s,
        pool_start_s=min(receipt.began for receipt in receipts.values()) - began + max(0.0, warming),
        seal_unit_s=sealed_s / job.num_units,
        decoding_picture_s=decoding_picture_s, decoding_unit_s=decoding_unit_s,
        copied=sum(receipt.counts["reused"] for receipt in copied),
        copied_picture_s=copied_s, copied_decoding_s=copied_decoding_s)


def _mean_s(receipts: list[Receipt]) -> float:
    return statistics.mean(map(annotating_s, receipts))


def _annotate(scratch: str, job: FrozenJob, tasks: list[UnitTask], *, pool: PoolSizes,
              reuse: str | None) -> dict[int, Receipt]:
    """The receipt of each unit. Those that ended their process go through it once more with care, as in `annotate`.

    Refuses (OSError) a sample of which a unit failed, or ended its process then too.
    """
    receipts = _receipts(annotate_units(scratch, job, tasks, pool=pool, reuse=reuse))
    crashed = [task for task in tasks if task.unit not in receipts]
    if crashed:
        logger.warning("%d units of the sample ended their process each time; once more, with the pictures decoded in "
                       "processes of their own", len(crashed))
        receipts |= _receipts(annotate_units(scratch, job, crashed, pool=pool, reuse=reuse, careful=True))
    if lost := [task for task in tasks if task.unit not in receipts]:
        raise OSError(f"the sample can't be annotated: {len(lost)} of its {len(tasks)} units ended their process each "
                      "time, also with the pictures decoded in processes of their own. What Ray says above tells why; "
                      "where memory ran out, take fewer actors (--set actors=N) or smaller batches (--set "
                      "batch_size=N).")
    return receipts


def _receipts(receipts: Generator[Receipt]) -> dict[int, Receipt]:
    found = {}
    with contextlib.closing(receipts):  # while Ray is up
        for receipt in receipts:
            if receipt.outcome == FAILED:
                raise OSError(f"the sample can't be annotated: {receipt.failure}")
            found[receipt.unit] = receipt
    return found


def _remove(scratch: str) -> None:
    """All objects under it and, on a disk, the folders that they were in."""
    folders = {scratch}
    for found in list(storage.list_objects(scratch)):
        storage.remove_own(found.uri)
        steps = found.name.split("/")[:-1]
        folders |= {storage.join(scratch, *steps[:depth]) for depth in range(1, len(steps) + 1)}
    for folder in sorted(folders, key=len, reverse=True):
        storage.remove_empty_folder(folder)


# --- telling ------------------------------------------------------------------------------------------------------


def _tell(whole: Whole, measured: Measured, prediction: Prediction, intent: dict[str, Any], pool: PoolSizes) -> None:
    picture_s = measured.picture_s / pool.annotators
    if pool.decoders:
        picture_s = max(picture_s, measured.decoding_picture_s / pool.decoders)
    speed = f"{measured.persons / measured.pictures / picture_s:.1f} persons/s" if picture_s else "nothing computed"
    copied = f", {whole.copied:,} of them copied" if whole.copied else ""
    decoders = f", for whom {pool.decoders} decode" if pool.decoders else ""
    lines = [
        f"{counted(whole.pictures, 'picture')} in {counted(whole.units, 'unit')}{copied}, listed in "
        f"{whole.seconds:.1f} s",
        f"measured on {counted(measured.pictures, 'picture')}, {counted(measured.persons, 'person')}, "
        f"{measured.rejected} rejected: {speed} by {counted(pool.annotators, 'actor')} "
        f"({intent['backend']}, {intent['precision']}){decoders}",
        f"about {whole.pictures * measured.persons / measured.pictures:,.0f} persons",
        f"wall time   {clock(prediction.seconds)}  (listing {prediction.listing_s:.0f} s, pool "
        f"{prediction.pool_start_s:.0f} s, annotating {prediction.annotating_s:.0f} s, sealing "
        f"{prediction.sealing_s:.0f} s)",
        f"node hours  {prediction.node_hours:.2f}"]
    if prediction.money is not None:
        lines.append(f"money       {prediction.money:.2f}, in the currency of the price")
    print("\n".join(lines), file=sys.stderr)
