"""Ends a small annotate run at each of its storage requests, runs it again, and prints what was wrong.

    python -m tests.annotate_kills disk FOLDER              each step on a disk, each time in a new output
    python -m tests.annotate_kills disk-chain FOLDER        in one output, each run at the first step that is new
    python -m tests.annotate_kills bucket FOLDER            each request to the S3 server of AWS_ENDPOINT_URL, likewise
    python -m tests.annotate_kills bucket-chain FOLDER
    python -m tests.annotate_kills random FOLDER --seed 7   storage faults and kills at random, until it is finished

What is run is the job's own code, its units one after the other without Ray. A reader looks after every end and, in a
chain, one more all the while. A chain goes through each world (WORLDS): who makes the boxes, and whether rows are
copied from an earlier output; in a later one it ends at the kinds of steps alone that are new.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import re
import select
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import botocore.loaders
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs import annotate, shard
from pipeline import annotation_input, storage, storage_disk, storage_s3, units
from pipeline.annotation_seal import SUCCESS
from pipeline.config import AnnotateConfig, ShardConfig
from pipeline.model import directory
from tests.fault_proxy import AFTER, BEFORE, Logged
from tests.kill_points import (
    AtRandom,
    EndAt,
    EndAtNew,
    Judge,
    Step,
    client,
    do_nothing,
    end_at,
    end_at_new,
    fork,
    wait,
    watch_disk,
    wire,
)
from tests.made_detector import detector_bytes
from tests.without_ray import WITHOUT_RAY
from tests.worlds import NO_TRACKING, TINY, write_tiny_model

KILLED = -9
NUM_PICTURES, PICTURES_PER_UNIT = 23, 2  # a dozen units, the last one smaller
MOST_ENDS = 1000  # of a chain
RANDOM_RUNS = 40  # that may be disturbed; one more, in peace, must finish
WHOLE_IMAGE, FILES, DETECTOR = WORLDS = "whole-image", "files", "detector"
LOOK_EVERY_S = {"disk": 0.05, "bucket": 0.1}  # a reader that polls; more often and it would slow down what it watches


@dataclass(frozen=True)
class Run:
    """What a run did: its exit code (KILLED if it was), what it said, the input objects it read, whether it listed."""

    code: int
    said: str
    read: frozenset[str]
    listed: bool


@dataclass(frozen=True)
class Started:
    """A run that may still be at work."""

    process: int
    noted: Callable[[], tuple[frozenset[str], bool]]  # the input objects that it has read, and whether it listed
    errors: Path

    def end(self) -> Run:
        """The run, once it has ended."""
        code = wait(self.process)
        return Run(code, self.errors.read_text(), *self.noted())


Objects = dict[str, bytes]


class Place(Protocol):
    """Where a run writes."""

    def uri(self, name: str) -> str:
        """Of an output."""

    def objects(self, name: str) -> Objects:
        """What a reader sees in an output: names and bytes, without probes and signs of life."""


# --- the world ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A small run: its input (a prefix or a shard dataset), its model, who makes the boxes, what it copies from."""

    input: str
    model: str
    bug: str = ""
    boxes: str = "whole-image"
    detector: str | None = None
    reuse: str | None = None

    def of_kind(self, kind: str) -> "World":
        """The same with the boxes of this kind: FILES with rows to copy too. What they need lies beside the model."""
        beside = Path(self.model).parent
        return {WHOLE_IMAGE: self,
                FILES: replace(self, boxes=str(beside / "boxes.parquet"), reuse=str(beside / "old")),
                DETECTOR: replace(self, boxes="detect", detector=str(beside / "detector.onnx"))}[kind]

    def set_up(self) -> None:
        """In this process, leave Ray out, and plant the bug."""
        for module, name, instead in WITHOUT_RAY:
            setattr(module, name, instead)
        PLANT[self.bug]()

    def begin(self, output: str) -> None:
        """The job, as its users run it."""
        annotate.run(self.config(output))

    def config(self, output: str, **more: Any) -> AnnotateConfig:
        """What the job is asked."""
        return AnnotateConfig(**{
            "input": self.input, "model": self.model, "output": output, "boxes": self.boxes, "reuse": self.reuse,
            "detector": self.detector, "detector_backend": "opencv", "max_persons": 2, "tracking": NO_TRACKING,
            "pictures_per_unit": PICTURES_PER_UNIT, "threads": 1, "backend": "cpu", "flip": False, **more})

    def inputs_of_units(self, output: str) -> dict[str, list[str]]:
        """For each unit of a run its input objects, by their names in the input."""
        job = units.open_job(output)
        assert job is not None
        planned = ((unit, units.read_unit(output, job, unit)) for unit in range(job.num_units))
        return {str(unit): sorted({f"shards/{row['part']}" if row["part"] else row["key"] for row in rows})
                for unit, rows in planned}


def write_world(folder: Path) -> None:
    """Under `folder`: `in` (pictures), `shards` (the same, sharded) and two models; boxes for most of the pictures, a
    detector, and `old`, an output of the first pictures with those boxes."""
    (folder / "in").mkdir()
    for number in range(NUM_PICTURES):
        assert cv2.imwrite(str(folder / "in" / f"{number:02d}.png"), np.full((6, 8, 3), number * 9, np.uint8))
    for module, name, instead in WITHOUT_RAY:
        setattr(module, name, instead)
    shard.run(ShardConfig(images=str(folder / "in"), output=str(folder / "shards"), images_per_shard=2,
                          tracking=NO_TRACKING))
    write_tiny_model(folder / "model")
    write_tiny_model(folder / "other-model", seed=1)
    (folder / "detector.onnx").write_bytes(detector_bytes())
    keys = [f"{number:02d}.png" for number in range(NUM_PICTURES) for _ in range((1, 1, 2, 0)[number % 4])]
    pq.write_table(pa.table({"key": keys, "x": [1.0] * len(keys), "y": [1.0] * len(keys),
                             "w": [4.0 + index % 3 for index in range(len(keys))], "h": [4.0] * len(keys)}),
                   folder / "boxes.parquet")
    world = replace(World(str(folder / "in"), str(folder / "model")).of_kind(FILES), reuse=None)
    annotate.run(world.config(str(folder / "old"), limit=10, pictures_per_unit=3))


def make_forks_cheap() -> None:
    """What every child would do again, done once: imports, the SDK's descriptions, the network without its weights."""
    import ray.util.metrics  # noqa: F401

    torch.set_num_threads(1)
    with torch.device("meta"):
        network = directory.make_network(TINY)
    directory.make_network = lambda _: network  # type: ignore[assignment]
    load = functools.cache(botocore.loaders.JSONFileLoader().load_file)
    botocore.loaders.JSONFileLoader.load_file = lambda _, path: load(path)
    storage_s3._connect()
    annotate.PAUSES_S = (0.01, 0.01)
    storage_s3.FIRST_PAUSE_S = storage_s3.FIRST_THROTTLED_PAUSE_S = 0.001
    storage_s3.READ_TIMEOUT_S = 1


# --- what must be true --------------------------------------------------------------------------------------------


@dataclass
class Judgement:
    """What an unbroken run gave, and each way in which a broken one differs from it."""

    whole: Objects
    inputs: dict[str, list[str]]  # of each unit
    points: int = 0
    looks: int = 0  # of a reader that polls
    wrong: list[str] = field(default_factory=list)

    def look(self, at: str, before: Objects, run: Run, after: Objects) -> None:
        """A run has ended, somehow, in an output that held `before`."""
        self.points += run.code == KILLED
        done = {name for unit in _units_of(before) for name in self.inputs[unit]}
        claims = {
            f"it replaced or removed {_names(before, after)}": not _names(before, after),
            f"a reader saw {_names(after, self.whole)}, which no unbroken run has": not _names(after, self.whole),
            "parts before _job.json": "_job.json" in after or not _units_of(after),
            "_job.json before plan, model and boxes": "_job.json" not in after or _begun(self.whole) <= after.keys(),
            f"{SUCCESS} before the rest": SUCCESS not in after or after.keys() == self.whole.keys(),
            f"it read {sorted(run.read & done)} again, though committed": not run.read & done,
            "it listed the input again": not (run.listed and "_job.json" in before),
        }
        self.wrong += [f"{at}: {claim}" for claim, holds in claims.items() if not holds]

    def must_be_finished(self, at: str, run: Run, after: Objects) -> None:
        """The run was left alone."""
        if run.code:
            self.wrong.append(f"{at}: the rerun ended with {run.code}: {run.said[-2000:]}")
        if after != self.whole:
            self.wrong.append(f"{at}: differs from an unbroken run in {_names(after, self.whole)} "
                              f"{_names(self.whole, after)}")

    def must_stay(self, after: Objects) -> None:
        """What was late has arrived."""
        if not self.wrong and after != self.whole:
            self.wrong.append("what was late has changed the output")

    def must_be_put_once(self, log: list[Logged]) -> None:
        """The store took each object once."""
        put = Counter(one.path for one in log if (one.kind, one.applied) == ("PUT", 200))
        twice = sorted(path for path, times in put.items() if times > 1)
        self.wrong += [f"{path}: put more than once" for path in twice]

    def add(self, other: "Judgement", world: str) -> None:
        """Count the other one's points and looks, and what was wrong in its world."""
        self.points, self.looks = self.points + other.points, self.looks + other.looks
        self.wrong += [f"{world}: {text}" for text in other.wrong]


class Reader:
    """Looks into an output while others write there, and says what no reader may see."""

    def __init__(self, place: Place, name: str, whole: Objects) -> None:
        self.place, self.name, self.whole = place, name, whole
        self.looks = 0
        self.wrong: list[str] = []
        self._seen: set[str] = set()

    def look(self) -> None:
        """List the output, and read each object."""
        ended = SUCCESS in self._seen
        now = self.place.objects(self.name)
        gone = sorted(self._seen - now.keys())
        claims = {
            f"it saw {_names(now, self.whole)}, which no unbroken run has": not _names(now, self.whole),
            f"it didn't see {gone} any more": not gone,
            f"it saw {SUCCESS} before {sorted(self.whole.keys() - now.keys())}": (
                not ended or now.keys() == self.whole.keys()),
        }
        self._seen |= now.keys()
        self.looks += 1
        self.wrong += [f"look {self.looks}: {claim}" for claim, holds in claims.items() if not holds]


@dataclass
class Seen:
    """How often a reader looked, and what was wrong."""

    looks: int = 0
    wrong: list[str] = field(default_factory=list)


@contextlib.contextmanager
def a_reader_polls(place: "Disk | Bucket", name: str, whole: Objects) -> Iterator[Seen]:
    """While the block runs a process of its own looks into the output; what it has seen is known at the end."""
    found, errors = (place.folder / f"reader-{uuid.uuid4().hex}.{kind}" for kind in ("json", "errors"))
    told, tell = os.pipe()

    def work() -> None:
        reader = Reader(place.of_another_process(), name, whole)
        while not reader.wrong and not select.select([told], [], [], place.look_every_s)[0]:
            reader.look()
        found.write_text(json.dumps([reader.looks, reader.wrong]))

    process, seen = fork(work, errors), Seen()
    try:
        yield seen
    finally:
        os.write(tell, b".")
        assert wait(process) == 0, errors.read_text()
        os.close(told)
        os.close(tell)
    seen.looks, wrong = json.loads(found.read_text())
    seen.wrong += [f"a reader that polled: {one}" for one in wrong]


def _names(objects: Objects, than: Objects) -> list[str]:
    """The objects that `than` doesn't have so."""
    return sorted(name for name, data in objects.items() if than.get(name) != data)


def _units_of(objects: Objects) -> list[str]:
    found = (re.fullmatch(r"keypoints/part-0*(\d+)-.*", name) for name in objects)
    return [match[1] for match in found if match]


def _begun(whole: Objects) -> set[str]:
    return {name for name in whole if name.startswith(("_plan/", "_model/", "_boxes/", "_detector/"))}


def _is_visible(name: str) -> bool:
    """Whether it is no temporary, probe or sign of life."""
    return not re.search(r"(^|/)(\.|_probe-)|^_drivers/", name)


# --- on a disk ----------------------------------------------------------------------------------------------------


class Disk:
    """Outputs in a folder."""

    look_every_s = LOOK_EVERY_S["disk"]

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world

    def uri(self, name: str) -> str:
        return str(self.folder / name)

    def objects(self, name: str) -> Objects:
        root = self.folder / name
        paths = (Path(folder, file) for folder, _, files in os.walk(root) for file in files)
        visible = {found: path for path in paths if _is_visible(found := path.relative_to(root).as_posix())}
        return {found: path.read_bytes() for found, path in visible.items()}

    def of_another_process(self) -> "Disk":
        """The same, for a process that was forked."""
        return self

    def run(self, name: str, number: int | None = None) -> Run:
        """Run the job into this output, and end it at its number-th step, if one is given."""
        return self.start(name, do_nothing if number is None else end_at(number)).end()

    def start(self, name: str, step: Step, world: World | None = None) -> Started:
        """Begin the job; its process calls `step` before each of its steps."""
        files = self.folder / f"{name}-{uuid.uuid4().hex}"
        noted, errors = files.with_suffix(".noted"), files.with_suffix(".errors")
        noted.write_text("")

        def work() -> None:
            self.world.set_up()
            note_reads(noted)
            watch_disk(step, self.uri(name))
            (world or self.world).begin(self.uri(name))

        def what_it_noted() -> tuple[frozenset[str], bool]:
            asked, root = noted.read_text().splitlines(), self.world.input
            return frozenset(uri.removeprefix(f"{root}/") for uri in asked if uri.startswith(f"{root}/")), root in asked

        return Started(fork(work, errors), what_it_noted, errors)

    def forget_signs_of_life(self, name: str) -> None:
        """All but the newest: each is read by every driver that begins."""
        for sign in sorted((self.folder / name / "_drivers").glob("*"), key=lambda path: path.stat().st_mtime)[:-1]:
            sign.unlink()

    def let_go_of_late(self) -> None:
        """Nothing is late on a disk."""

    def num_logged(self) -> int:
        """A disk keeps no log."""
        return 0

    def log(self, begin: int) -> list[Logged]:
        """A disk keeps no log."""
        return []

    def remove(self, name: str) -> None:
        """Delete an output, as its owner may."""
        shutil.rmtree(self.uri(name), ignore_errors=True)


def note_reads(into: Path) -> None:
    """In this process, write each file that is read, and each folder that is listed, into a file."""
    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(uri: str, *arguments: Any) -> Any:
            with into.open("a") as file:
                file.write(f"{uri}\n")
            return function(uri, *arguments)
        return noted

    storage_disk.read = noting(storage_disk.read)
    storage_disk.list_objects = noting(storage_disk.list_objects)


def kill_each_step(disk: Disk, judgement: Judgement, share: slice) -> None:
    """End a run at each step of this share, in a new output each time, and run it again."""
    for number in itertools.islice(itertools.count(), share.start, None, share.step):
        name = f"out-{number}"
        killed = disk.run(name, number)
        after = disk.objects(name)
        judgement.look(f"step {number}", {}, killed, after)
        if killed.code != KILLED:
            judgement.must_be_finished(f"step {number}, which it doesn't have", killed, after)
            return
        again = disk.run(name)
        finished = disk.objects(name)
        judgement.look(f"after step {number}", after, again, finished)
        judgement.must_be_finished(f"after step {number}", again, finished)
        shutil.rmtree(disk.uri(name))
        if judgement.wrong:
            return


# --- in a bucket --------------------------------------------------------------------------------------------------


class Bucket:
    """Outputs in a bucket of a real S3 server, behind a proxy."""

    look_every_s = LOOK_EVERY_S["bucket"]

    def __init__(self, bucket: str, world: World, wire: Any, folder: Path) -> None:
        self.bucket, self.world, self.wire, self.folder = bucket, world, wire, folder
        self._client = client(os.environ["AWS_ENDPOINT_URL"])
        self._read: dict[tuple[str, str], bytes] = {}

    def uri(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"

    def objects(self, name: str) -> Objects:
        listed = self._client.list_objects_v2(Bucket=self.bucket, Prefix=f"{name}/").get("Contents", [])
        found = {one["Key"].removeprefix(f"{name}/"): (one["Key"], one["ETag"]) for one in listed}
        return {key: self._bytes(*where) for key, where in found.items() if _is_visible(key)}

    def of_another_process(self) -> "Bucket":
        """The same, for a process that was forked: connections aren't shared."""
        return Bucket(self.bucket, self.world, self.wire, self.folder)

    def _bytes(self, key: str, etag: str) -> bytes:
        if (key, etag) not in self._read:
            self._read[key, etag] = self._client.get_object(Bucket=self.bucket, Key=key, IfMatch=etag)["Body"].read()
        return self._read[key, etag]

    def forget_signs_of_life(self, name: str) -> None:
        """All but the newest: each is read by every driver that begins."""
        signs = self._client.list_objects_v2(Bucket=self.bucket, Prefix=f"{name}/_drivers/").get("Contents", [])
        for sign in sorted(signs, key=lambda one: one["LastModified"])[:-1]:
            self._client.delete_object(Bucket=self.bucket, Key=sign["Key"])

    def run(self, name: str, judge_of: Callable[[int], Judge] | None = None) -> Run:
        """Run the job into this output; `judge_of` its process decides over each of its requests."""
        return self.start(name, judge_of).end()

    def start(self, name: str, judge_of: Callable[[int], Judge] | None = None, world: World | None = None) -> Started:
        """Begin the job; a judge holds for all that are at work, until the next one is begun."""
        begun, endpoint = self.wire.num_logged(), self.wire.endpoint()
        errors = self.folder / f"{name}-{uuid.uuid4().hex}.errors"
        ready, go = os.pipe()

        def work() -> None:
            os.read(ready, 1)
            os.environ["AWS_ENDPOINT_URL"] = endpoint
            self.world.set_up()
            (world or self.world).begin(self.uri(name))

        def what_it_asked() -> tuple[frozenset[str], bool]:
            asked, root = self.wire.log(begun), self.world.input[4:]
            read = frozenset(one.path.removeprefix(f"{root}/").partition("?")[0] for one in asked
                             if one.kind == "GET" and one.path.startswith(f"{root}/"))
            prefix = f"prefix={root.rpartition('/')[2]}%2F"
            return read, any(one.kind == "LIST" and prefix in one.path for one in asked)

        process = fork(work, errors)
        self.wire.judge(judge_of(process) if judge_of else None)
        os.write(go, b".")
        os.close(ready)
        os.close(go)
        return Started(process, what_it_asked, errors)

    def remove(self, name: str) -> None:
        """Delete an output, as its owner may."""
        found = self._client.list_objects_v2(Bucket=self.bucket, Prefix=f"{name}/").get("Contents", [])
        if found:
            self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": [{"Key": one["Key"]} for one in found]})

    def let_go_of_late(self) -> None:
        """Let the requests that were on their way when their client was killed reach the server, up to now."""
        self.wire.let_go()
        while self.wire.num_late():
            time.sleep(0.01)
        self.wire.hold()

    def num_logged(self) -> int:
        """How many requests there were."""
        return int(self.wire.num_logged())

    def log(self, begin: int) -> list[Logged]:
        """The requests since."""
        return list(self.wire.log(begin))


def kill_each_request(bucket: Bucket, judgement: Judgement, share: slice) -> None:
    """End a run before and after each request of this share, in a new output each time, and run it again."""
    for number in itertools.islice(itertools.count(), share.start, None, share.step):
        for when in (BEFORE, AFTER):
            name, at = f"out-{number}-{when}", f"{when} request {number}"
            killed = bucket.run(name, lambda process: EndAt(process, number, when))  # noqa: B023
            after = bucket.objects(name)
            judgement.look(at, {}, killed, after)
            if killed.code != KILLED:
                judgement.must_be_finished(f"{at}, which it doesn't have", killed, after)
                return
            again = bucket.run(name)
            finished = bucket.objects(name)
            judgement.look(f"again, ended {at}", after, again, finished)
            judgement.must_be_finished(f"again, ended {at}", again, finished)
            if judgement.wrong:
                return
            bucket.remove(name)  # moto lists a bucket in a time that grows with all that is in it


def kill_in_chains(place: "Disk | Bucket", kinds: Iterable[str], folder: Path,
                   run_to_the_next: Callable[[bool], tuple[Run, str]]) -> Judgement:
    """A chain in the world of each kind, one after the other, until something is wrong; all judgements in one.

    run_to_the_next  given whether units are alike: in the worlds after the first
    """
    total, world = Judgement({}, {}), place.world
    for kind in kinds:
        place.world = world.of_kind(kind)
        begun = place.num_logged()
        judgement = unbroken(place, place.world, folder)
        with a_reader_polls(place, "out", judgement.whole) as seen:
            kill_in_a_chain(place, judgement, functools.partial(run_to_the_next, total.points > 0))
            place.let_go_of_late()
        judgement.must_stay(place.objects("out"))
        judgement.must_be_put_once(place.log(begun))
        judgement.looks, judgement.wrong = seen.looks, judgement.wrong + seen.wrong
        total.add(judgement, kind)
        if total.wrong:
            break
        for name in ("out", "whole"):
            place.remove(name)
    return total


def kill_in_a_chain(place: Disk | Bucket, judgement: Judgement, run_to_the_next: Callable[[], tuple[Run, str]]) -> None:
    """In one output, end each run where none was ended before; the next is begun at once, until one isn't ended."""
    before: Objects = {}
    for number in range(MOST_ENDS):
        run, where = run_to_the_next()
        after = place.objects("out")
        judgement.look(f"end {number}, {where}", before, run, after)
        before = after
        if judgement.wrong:
            return
        if run.code != KILLED:
            break
        place.forget_signs_of_life("out")
    else:
        judgement.wrong.append("the chain has no end")
    judgement.must_be_finished("at the end", run, after)


def steps_of_a_chain(disk: Disk) -> Callable[[bool], tuple[Run, str]]:
    """Runs that end at the first step on the disk at which none has ended."""
    met = disk.folder / "met"
    met.write_text("")

    def run_to_the_next(units_alike: bool) -> tuple[Run, str]:
        run = disk.start("out", end_at_new(met, units_alike=units_alike)).end()
        return run, f"before {met.read_text().splitlines()[-1]}"

    return run_to_the_next


def requests_of_a_chain(bucket: Bucket, *, reads_too: bool) -> Callable[[bool], tuple[Run, str]]:
    """Runs that end at the first request at which none has ended."""
    met: list[tuple[str, str]] = []

    def run_to_the_next(units_alike: bool) -> tuple[Run, str]:
        run = bucket.run("out", lambda process: EndAtNew(process, reads_too, met, units_alike))
        met[:] = bucket.wire.judged().met
        label, when = met[-1]
        return run, f"{when} {label}"

    return run_to_the_next


def disturb_at_random(bucket: Bucket, judgement: Judgement, seed: int) -> None:
    """Begin the job again and again, with faults and kills at random, until it is finished."""
    dice = random.Random(seed)
    name, before = f"out-{seed}", Objects()
    for number in range(RANDOM_RUNS + 1):
        judge = functools.partial(AtRandom, seed=f"{seed}-{number}", fault_share=dice.choice([0, 0.05, 0.2]),
                                  kill_share=dice.choice([0.01, 0.05]))
        run = bucket.run(name, judge if number < RANDOM_RUNS else None)
        after = bucket.objects(name)
        judgement.look(f"seed {seed}, run {number}", before, run, after)
        before = after
        bucket.forget_signs_of_life(name)
        if judgement.wrong:
            return
        if run.code == 0:
            break
    bucket.let_go_of_late()
    judgement.must_be_finished(f"seed {seed}", run, bucket.objects(name))


# --- bugs that the harness must find ------------------------------------------------------------------------------


def _put_without_condition() -> None:
    def write(uri: str, data: bytes) -> bool:
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data[:len(data) // 2])
            file.flush()
            os.fsync(file.fileno())
            file.write(data[len(data) // 2:])
        return True

    def put(uri: str, data: bytes) -> bool:
        bucket, key = storage_s3._split(uri)
        storage_s3._connection().client.put_object(Bucket=bucket, Key=key, Body=data)
        return True

    storage_disk.put_if_absent, storage_s3.put_if_absent = write, put
    storage.prove_put_if_absent = lambda prefix: None


def _seal_early() -> None:
    annotate_all = annotate._annotate_missing_units

    def seal_first(config: AnnotateConfig, job: Any) -> int:
        storage.put_if_absent(storage.join(config.output, SUCCESS), b'{"version": 1, "counts": {}}')
        return annotate_all(config, job)

    annotate._annotate_missing_units = seal_first


def _list_again() -> None:
    annotate.open_job = lambda _: None
    listed = annotation_input._under_prefix

    def one_more(uri: str) -> Iterator[Any]:
        storage.put_if_absent(storage.join(uri, f"{uuid.uuid4().hex}.png"), b"no picture")
        return listed(uri)

    annotation_input._under_prefix = one_more


PLANT: dict[str, Callable[[], None]] = {"": lambda: None, "overwrites": _put_without_condition,
                                        "seals early": _seal_early, "lists again": _list_again}


# --- the command --------------------------------------------------------------------------------------------------


def main(options: argparse.Namespace) -> dict[str, object]:
    """How many points there were, how long it took, and what was wrong at which of them."""
    began = time.monotonic()
    folder = prepare(options.folder)
    judgements = in_parallel(options.workers, lambda worker: work(options, folder, worker))
    wrong = [text for one in judgements for text in one.wrong]
    return {"points": sum(one.points for one in judgements), "looks": sum(one.looks for one in judgements),
            "wrong": wrong, "seconds": round(time.monotonic() - began, 1)}


def prepare(place: str) -> Path:
    """Get ready to fork, and make the world in this folder, unless it is there; the folder."""
    make_forks_cheap()
    folder = Path(place).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(folder)  # what a killed process leaves
    if not (folder / "in").exists():
        assert wait(fork(lambda: write_world(folder), folder / "world.errors")) == 0
    return folder


def in_parallel(workers: int, work: Callable[[int], Judgement]) -> list[Judgement]:
    """The work, in that many processes."""
    folder = Path(os.environ["TMPDIR"])

    def kept(worker: int) -> None:
        (folder / f"worker-{worker}.json").write_text(json.dumps({**asdict(work(worker)), "whole": {}}))

    children = [fork(functools.partial(kept, worker), folder / f"worker-{worker}.errors") for worker in range(workers)]
    for worker, child in enumerate(children):
        assert wait(child) == 0, (folder / f"worker-{worker}.errors").read_text()
    return [Judgement(**json.loads((folder / f"worker-{worker}.json").read_text())) for worker in range(workers)]


def work(options: argparse.Namespace, folder: Path, worker: int) -> Judgement:
    """One worker's share of the points."""
    mine = folder / f"worker-{worker}"
    mine.mkdir()
    share = slice(worker * options.every, None, options.workers * options.every)
    if options.mode.startswith("disk"):
        disk = Disk(mine, World(str(folder / options.input), str(folder / "model"), options.bug))
        if options.mode == "disk-chain":
            return kill_in_chains(disk, options.worlds, mine, steps_of_a_chain(disk))
        disk.world = disk.world.of_kind(options.worlds[0])
        judgement = unbroken(disk, disk.world, mine)
        kill_each_step(disk, judgement, share)
        return judgement
    with open_bucket(mine, folder / options.input, folder / "model", options.bug) as bucket:
        if options.mode == "bucket-chain":
            requests = requests_of_a_chain(bucket, reads_too=options.reads_too)
            return kill_in_chains(bucket, options.worlds, mine, requests)
        bucket.world = bucket.world.of_kind(options.worlds[0])
        judgement = unbroken(bucket, bucket.world, mine)
        if options.mode == "bucket":
            kill_each_request(bucket, judgement, share)
        for number in range(options.rounds if options.mode == "random" else 0):
            if not judgement.wrong:
                disturb_at_random(bucket, judgement, options.seed + worker + options.workers * number)
        bucket.let_go_of_late()
        judgement.must_be_put_once(bucket.log(0))
        return judgement


@contextlib.contextmanager
def open_bucket(folder: Path, source: Path, model: Path, bug: str = "") -> Iterator[Bucket]:
    """A new bucket with the input, behind a proxy of its own."""
    with wire(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        name = f"kills-{os.getpid()}-{time.time_ns()}"
        bucket = Bucket(name, World(f"s3://{name}/{source.name}", str(model), bug), proxy, folder)
        fill_bucket(bucket, source)
        yield bucket


def unbroken(place: Place, world: World, folder: Path, name: str = "whole") -> Judgement:
    """What a run gives that nobody disturbs, that has no bug, and copies no rows."""
    sound = replace(world, bug="", reuse=None)

    def run() -> None:
        sound.set_up()
        sound.begin(place.uri(name))
        (folder / "inputs.json").write_text(json.dumps(sound.inputs_of_units(place.uri(name))))

    errors = folder / f"{name}.errors"
    assert wait(fork(run, errors)) == 0, errors.read_text()
    return Judgement(place.objects(name), json.loads((folder / "inputs.json").read_text()))


def fill_bucket(bucket: Bucket, source: Path) -> None:
    """Make the bucket, with the input."""
    bucket._client.create_bucket(Bucket=bucket.bucket)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            key = f"{source.name}/{path.relative_to(source).as_posix()}"
            bucket._client.put_object(Bucket=bucket.bucket, Key=key, Body=path.read_bytes())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="tests.annotate_kills", description=__doc__)
    parser.add_argument("mode", choices=["disk", "disk-chain", "bucket", "bucket-chain", "random"])
    parser.add_argument("folder", help="for the world and all outputs")
    parser.add_argument("--input", choices=["in", "shards"], default="in")
    parser.add_argument("--bug", choices=list(PLANT), default="")
    parser.add_argument("--worlds", choices=WORLDS, nargs="+", default=list(WORLDS), help="but a chain's, the first")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="only every so many points")
    parser.add_argument("--reads-too", action="store_true", help="chain: end runs also after requests that only read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="random: this many seeds, each in a new output")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(main(parse())))
