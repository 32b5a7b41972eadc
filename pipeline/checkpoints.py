"""A training's checkpoints: folders under its output, each a model directory with what is needed to go on from it.

    _checkpoints/iteration-0002400/model.safetensors   the network as it was then: any command takes the folder as
    _checkpoints/iteration-0002400/model.json          a model, and so does `init`; its `source` has the evaluation
    _checkpoints/iteration-0002400/state.pt            put last: with it the checkpoint is whole

The newest ones are kept, and the best. Ray Train's own keeping does either, by count or by score; it lists them in one
file that is written in place, and a driver that is killed in that moment leaves a run which nothing can go on with.
It knows nothing of networks and of Ray.
"""

import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.model.settings import SPEC_FILE

logger = logging.getLogger("pipeline.checkpoints")
FOLDER = "_checkpoints"
STATE_FILE = "state.pt"
NAME = re.compile(r"iteration-(\d{7,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. `ap` is None where nothing was validated then."""

    uri: str
    iteration: int
    ap: float | None

    def __str__(self) -> str:
        validated = "" if self.ap is None else f", AP {self.ap:.3f}"
        return f"{self.uri} (iteration {self.iteration}{validated})"


def checkpoint_uri(output: str, iteration: int) -> str:
    """Where a checkpoint lies; names in the order of iterations."""
    return storage.join(output, FOLDER, f"iteration-{iteration:07d}")


def list_checkpoints(output: str) -> list[Checkpoint]:
    """The whole checkpoints of a training's output, the oldest first. StorageError where the store can't say."""
    folders = _files(output)
    iterations = sorted(iteration for iteration, names in folders.items() if STATE_FILE in names)
    return [Checkpoint(checkpoint_uri(output, iteration), iteration,
                       _ap(output, iteration) if SPEC_FILE in folders[iteration] else None)
            for iteration in iterations]


def best_checkpoint(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The one with the highest validation AP, of equals the one that was trained longer; None: none was validated."""
    validated = [each for each in checkpoints if each.ap is not None]
    return max(validated, key=lambda each: (each.ap, each.iteration), default=None)


def superfluous(checkpoints: Sequence[Checkpoint], *, keep_newest: int) -> list[Checkpoint]:
    """Of checkpoints, the oldest first, those that are neither among the newest nor the best."""
    best = best_checkpoint(checkpoints)
    return [each for each in checkpoints[:-keep_newest] if each != best]


def keep_checkpoint(output: str, iteration: int, files: Mapping[str, bytes], *, keep_newest: int) -> None:
    """Put a checkpoint, then remove the superfluous ones. StorageError where it can't be put; nothing of it is left.

    files  by name; `state.pt` goes last. What a run that was broken off left of this checkpoint is replaced.
    Old ones that can't be removed are a warning: they cost space, and the next time removes them.
    """
    _put(output, iteration, files)
    try:
        for each in superfluous(list_checkpoints(output), keep_newest=keep_newest):
            _remove(output, each.iteration)
    except StorageError as error:
        logger.warning("an old checkpoint could not be removed, which is tried again at the next one: %s", error)


def _put(output: str, iteration: int, files: Mapping[str, bytes]) -> None:
    _remove(output, iteration)
    try:
        for name in sorted(files, key=STATE_FILE.__eq__):
            if not storage.put_if_absent(storage.join(checkpoint_uri(output, iteration), name), files[name]):
                raise StorageError(f"{checkpoint_uri(output, iteration)}: another run puts the same checkpoint at this "
                                   "moment. End one of them.")
    except StorageError:
        _forget_half(output, iteration)
        raise


def _forget_half(output: str, iteration: int) -> None:
    """On a full disk what was put of a checkpoint takes the room that the next one needs."""
    try:
        _remove(output, iteration)
    except StorageError as error:
        logger.warning("a part of a checkpoint is left, and means nothing: %s", error)


def _remove(output: str, iteration: int) -> None:
    names = _files(output).get(iteration, ())
    # the state first: what lacks it is no checkpoint, whenever this is broken off
    for name in sorted(names, key=STATE_FILE.__ne__):
        storage.remove_own(storage.join(checkpoint_uri(output, iteration), name))
    if names:
        storage.remove_empty_folder(checkpoint_uri(output, iteration))


def _files(output: str) -> dict[int, set[str]]:
    """The names of the files of each checkpoint, whole or not."""
    found: dict[int, set[str]] = {}
    for listed in storage.list_objects(storage.join(output, FOLDER)):
        folder, _, name = listed.name.partition("/")
        match = NAME.fullmatch(folder)
        if match and name:
            found.setdefault(int(match[1]), set()).add(name)
    return found


def _ap(output: str, iteration: int) -> float | None:
    """None also where the file is damaged: training goes on from the state, which is another one."""
    uri = storage.join(checkpoint_uri(output, iteration), SPEC_FILE)
    data = storage.read_object(uri)
    try:
        ap = json.loads(data).get("source", {}).get("evaluation", {}).get("ap")
        return None if ap is None else float(ap)
    except (ValueError, TypeError, AttributeError) as error:
        _warn_once(f"{uri} is damaged, and its checkpoint counts as not validated: {error}")
        return None


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)
