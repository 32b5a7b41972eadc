"""A rank's part in the checkpoints: what rank 0 keeps or reads, all ranks hear of, and go on alike."""

import functools
import io
import logging
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from jobs.train_task import TrainTask, Worker, gather
from pipeline import checkpoints, storage, training
from pipeline.averaging import WeightAverage
from pipeline.checkpoints import STATE_FILE, Checkpoint
from pipeline.errors import DataError, StorageError
from pipeline.model.network import PoseNetwork
from pipeline.patience import waited_out

logger = logging.getLogger("jobs.train")
MAX_LOST = 3  # checkpoints in a row that couldn't be put: hours of work that a killed machine would take along


def restore(task: TrainTask, network: PoseNetwork, optimiser: torch.optim.Optimizer, average: WeightAverage | None, *,
            rank: int, world: int) -> training.TrainingState | None:
    """Put network, optimiser and average back to the last checkpoint, the same on every rank; None if there is none.

    One that is damaged is passed over with a warning, and a store that is away is waited for. DataError on every rank
    where all checkpoints are damaged, or the store stays away.
    """
    found, failure = _found(task.config.output) if rank == 0 else (None, None)
    chosen: list[tuple[Checkpoint | None, str | None]] = [(found and found[0], failure)]
    if world > 1:
        # each rank's own listing might already have one more, from a worker whose driver was killed a moment ago
        torch.distributed.broadcast_object_list(chosen, src=0)
    checkpoint, failure = chosen[0]
    if failure is not None:
        raise DataError(failure)
    if checkpoint is None:
        return None
    if rank == 0:
        logger.info("going on after iteration %d, from %s", checkpoint.iteration, checkpoint.uri)
    data = found[1] if found else waited_out(functools.partial(_state, checkpoint))
    return training.load_state(data, network, optimiser, average)


def _found(output: str) -> tuple[tuple[Checkpoint, bytes] | None, str | None]:
    """The last checkpoint with its state, or why there is none to go on from."""
    try:
        return waited_out(lambda: _last_readable(output)), None
    except storage.ABOUT_THE_OBJECT:
        raise  # a worker that should be dead has just removed it: the next start finds another
    except (DataError, StorageError) as error:
        return None, str(error)


def _last_readable(output: str) -> tuple[Checkpoint, bytes] | None:
    there = checkpoints.list_checkpoints(output)
    for checkpoint in reversed(there):
        try:
            data = _state(checkpoint)
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            logger.warning("%s is damaged, and passed over: %s", checkpoint, next(iter(str(error).splitlines()), ""))
            continue
        return checkpoint, data
    if there:
        raise DataError(f"None of the checkpoints of {output} can be read: {', '.join(each.uri for each in there)}. "
                        "Remove them to train from the beginning.")
    return None


def _state(checkpoint: Checkpoint) -> bytes:
    return storage.read_object(storage.join(checkpoint.uri, STATE_FILE))


@dataclass
class Keeper:
    """Keeps checkpoints; knows how many in a row could not be, and which machines are about to be taken away."""

    worker: Worker
    lost: int = 0
    leaving: frozenset[str] = frozenset()

    def machine_leaves(self) -> bool:
        """Whether Ray says, for the first time, that a worker's machine will be taken away: on all ranks together."""
        import ray.train

        announced = ray.train.get_preemption_info()
        nodes = frozenset(announced.preempted_node_ids if announced else ())
        is_new = not nodes <= self.leaving
        self.leaving |= nodes
        if is_new and self.worker.rank == 0:
            logger.warning("a machine with workers will be taken away: a checkpoint is kept after iteration %d",
                           self.worker.iteration)
        return is_new

    def keep(self, make_files: Callable[[], Mapping[str, bytes]]) -> str | None:
        """Keep a checkpoint, of the files that rank 0 makes. Gives the same on every rank: what to stop with, or None.

        A store or a disk that fails costs a warning, until it has failed MAX_LOST times in a row; the last time it is
        waited for.
        """
        error = self._put(make_files) if self.worker.rank == 0 else None
        error = gather(self.worker, error)[0]
        self.lost = 0 if error is None else self.lost + 1
        if error is None:
            return None
        if self.lost < MAX_LOST:
            if self.worker.rank == 0:
                logger.warning("the checkpoint after iteration %d could not be kept, and training goes on to the next "
                               "one, which is tried again: %s", self.worker.iteration, error)
            return None
        return (f"{MAX_LOST} checkpoints in a row could not be kept: {error} {self.last_good()} Once the store takes "
                "them again, the same command goes on from there.")

    def _put(self, make_files: Callable[[], Mapping[str, bytes]]) -> str | None:
        config, iteration = self.worker.task.config, self.worker.iteration
        try:
            files = make_files()
            put = functools.partial(checkpoints.keep_checkpoint, config.output, iteration, files,
                                    keep_newest=config.keep_checkpoints)
            if self.lost < MAX_LOST - 1:
                put()
            else:
                waited_out(put)
        except OSError as error:  # also of the disk where the files are made
            return str(error)
        return None

    def last_good(self) -> str:
        """A sentence that says where the last checkpoint is, on every rank."""
        return str(gather(self.worker, _last_good(self.worker.task.config.output) if self.worker.rank == 0 else "")[0])


def _last_good(output: str) -> str:
    try:
        there = checkpoints.list_checkpoints(output)
    except OSError as error:
        return f"Where the last checkpoint is, the store doesn't say: {error}"
    if not there:
        return "There is no checkpoint yet."
    return (f"The last good checkpoint is {there[-1]}: it is a model directory, and --set init={there[-1].uri} begins "
            "from its network.")
