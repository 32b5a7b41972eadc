"""Runs a small shard job once for each of its commit steps, ends it there, runs it again, and prints what came of it.

    python -m tests.shard_kills FOLDER GROWN BUG
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jobs import shard
from pipeline import shard_listing, shard_versions, storage, storage_disk
from pipeline.config import ShardConfig
from tests.without_ray import WITHOUT_RAY
from tests.worlds import NO_TRACKING

ENDED = 9


def main(folder: Path, grown: bool, bug: str) -> list[dict[str, object]]:
    """What came of each point, and of the first one that the run doesn't have; with a bug, up to where it shows."""
    images = folder / "images"
    for number in range(6):
        write_picture(images / f"{number:02d}.png", number)
    before = folder / "before"
    if grown:
        in_child(lambda: run(images, before))
        for number in range(6, 12):
            write_picture(images / f"{number:02d}.png", number)
        (images / "03.png").unlink()
    else:
        before.mkdir()
    PLANT.get(bug, lambda: None)()
    shutil.copytree(before, folder / "whole")
    in_child(lambda: run(images, folder / "whole"))
    unbroken = files(folder / "whole")
    points = []
    for point in range(1000):
        output = folder / "out"
        shutil.copytree(before, output)
        ended = in_child(lambda: (end_at(point), run(images, output))) == ENDED  # noqa: B023
        finished = set(files(output)) & {name for name in unbroken if name.startswith("shards/")}
        if ended:
            in_child(lambda: (note_reads(folder / "read"), run(images, output)))  # noqa: B023
        read = set((folder / "read").read_text().split()) if ended else set()
        points.append({"point": point, "whole": files(output) == unbroken,
                       "read_again": sorted(read & keys_of(folder / "whole", finished, before))})
        shutil.rmtree(output)
        for later in images.glob("later-*"):
            later.unlink()
        if not ended or (bug and not points[-1]["whole"]):
            return points
    raise AssertionError("the run has no end")


def write_picture(path: Path, shade: int) -> None:
    """A little grey picture."""
    path.parent.mkdir(exist_ok=True)
    assert cv2.imwrite(str(path), np.full((6, 8, 3), shade, np.uint8))


def run(images: Path, output: Path) -> None:
    """The job, as its users run it, but for Ray."""
    for module, name, instead in WITHOUT_RAY:
        setattr(module, name, instead)
    shard.run(ShardConfig(images=str(images), output=str(output), images_per_shard=3, tracking=NO_TRACKING))


def in_child(work: Callable[[], object]) -> int:
    """Do the work in a child process; its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_at(point: int) -> None:
    """End this process before the point-th step of a commit."""
    steps = iter(range(point))

    def or_end(step: Callable[..., object]) -> Callable[..., object]:
        def do(*arguments: object, **options: object) -> object:
            if next(steps, None) is None:
                os._exit(ENDED)
            return step(*arguments, **options)
        return do

    for name in ("fsync", "link"):
        setattr(os, name, or_end(getattr(os, name)))


def note_reads(path: Path) -> None:
    """Write the name of each picture that is read into a file."""
    path.write_text("")
    read = storage.read_object

    def noting(uri: str, **options: Any) -> bytes:
        if uri.endswith(".png"):
            with path.open("a") as file:
                file.write(f"{Path(uri).name}\n")
        return read(uri, **options)

    storage.read_object = noting


def files(folder: Path) -> dict[str, bytes]:
    """Each object with its bytes; temporaries and probes that a dying process leaves aren't objects."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths
            if not path.name.startswith((".", "_probe-"))}


def keys_of(output: Path, parts: set[str], before: Path) -> set[str]:
    """The keys of the new parts."""
    import pyarrow.parquet as pq

    return {key for part in parts - set(files(before))
            for key in pq.read_table(output / part, columns=["key"])["key"].to_pylist()}


# --- bugs that the harness must find ------------------------------------------------------------------------------


def _put_without_condition() -> None:
    def put(uri: str, data: bytes) -> bool:
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data[:len(data) // 2])
            os.fsync(file.fileno())
            file.write(data[len(data) // 2:])
        return True

    storage_disk.put_if_absent = put
    storage.prove_put_if_absent = lambda prefix: None


def _plan_listed_again() -> None:
    shard.open_job = lambda *_: None
    shard_listing.Listing.tables = _with_one_more(shard_listing.Listing.tables)  # type: ignore[method-assign]


def _with_one_more(tables: Any) -> Any:
    def more(listing: Any) -> Any:
        write_picture(Path(listing.images, f"later-{os.getpid()}.png"), 200)
        yield from tables(listing)
    return more


def _seal_early() -> None:
    finish = shard._write_missing_parts

    def seal_first(config: Any, job: Any, annotations: Any, base_version: int) -> int:
        storage.put_if_absent(f"{config.output}/dataset-{base_version + 1:06d}.json", b"{}")
        return finish(config, job, annotations, base_version)

    shard._write_missing_parts = seal_first
    shard_versions._refuse_other_winner = lambda *_: None


PLANT = {"overwrites": _put_without_condition, "lists again": _plan_listed_again, "seals early": _seal_early}

if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])))
