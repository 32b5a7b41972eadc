"""One planned unit -> its part, committed: look whether it is there, read, annotate, put if absent.

What an actor of the annotate job does, without Ray: the same object runs in a test's process, or on a machine with a
GPU and no Ray. What goes wrong with the service is said in the receipt, and leaves the unit uncommitted.
"""

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from pipeline import annotation_input as inputs
from pipeline import keypoints, storage
from pipeline.annotation import Opened, annotate_opened, open_pictures
from pipeline.boxes import unit_box_source
from pipeline.errors import ConfigError, DataError
from pipeline.images import PictureLimits
from pipeline.isolation import open_decoder
from pipeline.model.directory import model_digest
from pipeline.model_reference import download_model
from pipeline.prediction import Predictor
from pipeline.reuse import EarlierPictures
from pipeline.rows import Boxes, count_rows
from pipeline.units import FrozenJob, read_unit, refuse_if_begun_again

logger = logging.getLogger("jobs.annotate")
COMMITTED, LOST, THERE, FAILED = "committed", "lost", "there", "failed"


@dataclass(frozen=True)
class Receipt:
    """What became of a unit in the hands of one annotator.

    outcome  committed: by this one · lost: another writer was first · there: it was committed already, nothing was
             read · failed: not committed
    counts   of the unit's rows; `reused`, how many of its pictures were copied, and `computed`, how many persons
             were not; {} unless the unit was done here
    failure  why it failed
    passing  whether the same may go well later: it was about the service, or memory
    began, ended  when, in seconds since 1970
    decoding_s  the seconds that who decodes for the annotator has spent on it before
    """

    unit: int
    outcome: str
    counts: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    passing: bool = False
    began: float = 0.0
    ended: float = 0.0
    decoding_s: float = 0.0


def limits_of(intent: Mapping[str, Any]) -> PictureLimits:
    """Which pictures a run takes; runs of older programs took no truncated ones."""
    return PictureLimits(max_pixels=intent["max_pixels"], accept_truncated=intent.get("accept_truncated", False))


def failure_receipt(unit: int, error: Exception) -> Receipt:
    """The receipt of a unit that this error kept from being done; of one that nobody expects, its traceback is logged.

    Whatever it is, it must not leave the actor: Ray would drop the unit without a word.
    """
    said = str(error)
    if not isinstance(error, (storage.StorageError, ConfigError, DataError)):
        logger.warning("unit %d failed", unit, exc_info=error)
        said = f"{type(error).__name__}: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        said += " If no other process takes the GPU's memory: a smaller batch_size, which needs a new --output."
    return Receipt(unit, FAILED, failure=f"unit {unit}: {said}", passing=_may_pass(error))


def _may_pass(error: Exception) -> bool:
    if isinstance(error, storage.ABOUT_THE_OBJECT):  # of a shard, a plan, boxes: who took it away must put it back
        return False
    out_of_memory = "can't allocate memory" in str(error)  # torch's RuntimeError on a CPU
    return out_of_memory or isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError))


class UnitAnnotator:
    """Holds the model, and turns a unit's number into the unit's committed part.

    output   the run's output, where its model is kept
    decoder  the module that decodes
    reuse    an earlier output whose rows are copied where they would be the same

    Refuses (DataError) a process that can't work as the frozen job says: no GPU, another model.
    """

    def __init__(self, output: str, job: FrozenJob, *, decoder: str = "pipeline.images",
                 reuse: str | None = None) -> None:
        self.output, self.job, self.decoder = output, job, decoder
        self.predictor = _open_predictor(output, job)
        self.earlier = EarlierPictures(reuse, job.input) if reuse else None

    def annotate(self, unit: int, earlier_parts: Sequence[str] = (),
                 opened: Mapping[str, Opened] = MappingProxyType({}),
                 detected: Mapping[str, Boxes] = MappingProxyType({}), *, careful: bool = False) -> Receipt:
        """Annotate and commit one unit.

        earlier_parts  those of the reused output that may hold its pictures
        opened         its pictures, by key, that another process has read, decoded and cropped
        detected       of the others what the detector found, where one makes the boxes
        careful        decode in processes apart: a picture may have ended this unit's process before
        """
        began = time.time()
        receipt = self._annotate(unit, earlier_parts, opened, detected, careful=careful)
        return replace(receipt, began=began, ended=time.time())

    def _annotate(self, unit: int, earlier_parts: Sequence[str], opened: Mapping[str, Opened],
                  detected: Mapping[str, Boxes], *, careful: bool) -> Receipt:
        part = storage.join(self.output, keypoints.FOLDER, self.job.part_name(unit))
        try:
            if storage.exists(part):
                return Receipt(unit, THERE)
            data, counts = self._part(unit, earlier_parts, opened, detected, careful=careful)
            refuse_if_begun_again(self.output, self.job)
            return Receipt(unit, COMMITTED if storage.put_if_absent(part, data) else LOST, counts)
        except Exception as error:
            return failure_receipt(unit, error)

    def _part(self, unit: int, earlier_parts: Sequence[str], opened: Mapping[str, Opened],
              detected: Mapping[str, Boxes], *, careful: bool) -> tuple[bytes, dict[str, Any]]:
        planned = read_unit(self.output, self.job, unit)
        left = [one for one in planned if one["key"] not in opened]
        with contextlib.ExitStack() as resources:
            others: Iterator[Opened] = iter(())
            if left:
                others = self._opened(unit, left, earlier_parts, detected, resources, careful=careful)
            in_order = (opened.get(one["key"]) or next(others) for one in planned)
            pictures = annotate_opened(in_order, self.predictor, oks_nms=self.job.intent.get("oks_nms"))
        reused = [picture for picture in pictures if picture.reused]
        counts = count_rows(pictures)
        data = keypoints.part_bytes(pictures, self.predictor.skeleton, job=self.job.digest,
                                    model={**self.job.about["model"], "source": self.predictor.spec.source},
                                    detector=self.job.about.get("detector"), decoding=self.predictor.spec.decoding)
        computed = counts["persons"] - sum(len(picture.boxes.ids) for picture in reused)
        return data, {**counts, "reused": len(reused), "computed": computed}

    def _opened(self, unit: int, planned: Sequence[dict[str, Any]], earlier_parts: Sequence[str],
                detected: Mapping[str, Boxes], resources: contextlib.ExitStack, *,
                careful: bool) -> Iterator[Opened]:
        earlier = self.earlier.of_parts(earlier_parts) if self.earlier else {}
        boxes = unit_box_source(self.output, self.job, unit, detected=detected)
        limits = limits_of(self.job.intent)
        decoder = resources.enter_context(open_decoder(limits, isolated=careful, decoder=self.decoder))
        tasks = inputs.pictures_of_unit(self.job.input, planned, boxes, earlier, max_bytes=limits.max_bytes)
        # a GPU waits for whoever decodes; on a CPU decoding and network share the cores anyway
        threads = int(self.job.intent["threads"]) if self.job.intent["backend"] == "cuda" and not careful else 1
        return open_pictures(tasks, self.predictor.crop_persons, decode=decoder.decode, threads=threads)


def _open_predictor(output: str, job: FrozenJob) -> Predictor:
    intent = job.intent
    if intent["backend"] == "cuda" and not torch.cuda.is_available():
        raise DataError(f"{output} was begun on GPUs, but this process on {os.uname().nodename} has none. "
                        "Continue it where there are GPUs, or choose a new --output.")
    if torch.are_deterministic_algorithms_enabled() != intent["deterministic"]:  # to say so imports a compiler: 2 s
        torch.use_deterministic_algorithms(intent["deterministic"])
    with tempfile.TemporaryDirectory() as folder:
        model = download_model(storage.join(output, keypoints.MODEL_FOLDER), Path(folder))
        if model_digest(model) != intent["model"]:
            raise DataError(f"{output}/{keypoints.MODEL_FOLDER} is not the model that this run was begun with. "
                            "Restore it, or choose a new --output.")
        return Predictor(model, backend=intent["backend"], precision=intent["precision"], flip=intent["flip"],
                         batch_size=intent["batch_size"], threads=intent["threads"],
                         compile_mode=intent.get("compile"))
