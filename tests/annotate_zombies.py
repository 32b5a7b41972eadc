"""Annotate runs beside each other at one output: two drivers, and some that were stopped and wake up too late.

    python -m tests.annotate_zombies disk|s3 FOLDER

Prints, for each story, what was wrong. S3 is the server of AWS_ENDPOINT_URL.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.annotate_kills import (
    KILLED,
    Bucket,
    Disk,
    Run,
    Started,
    World,
    a_reader_polls,
    open_bucket,
    prepare,
    unbroken,
)
from tests.kill_points import EndAt, EndInFlight, StopAt, do_nothing, end_at, stop_at, wait_until_stopped

UNIT = "keypoints/part-0000005"
DRIVERS = 3
Place = Disk | Bucket


class Scene:
    """A place, what an unbroken run gives there, and what another model's gives."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place = place
        self.other_world = replace(place.world, model=str(Path(place.world.model).with_name("other-model")))
        self.judgement = unbroken(place, place.world, folder)
        self.other = unbroken(place, self.other_world, folder, "other-whole").whole

    def start(self, world: World | None = None) -> Started:
        """Begin the job, in peace."""
        if isinstance(self.place, Disk):
            return self.place.start("out", do_nothing, world)
        return self.place.start("out", None, world)

    def stopped(self, on_disk: tuple[str, str], in_bucket: tuple[str, str]) -> Started:
        """A run that was stopped before this step, or once it was given the answer to this request."""
        if isinstance(self.place, Disk):
            started = self.place.start("out", stop_at(*on_disk))
        else:
            started = self.place.start("out", lambda process: StopAt(process, *in_bucket))
        wait_until_stopped(started.process)
        return started

    def killed_early(self, world: World) -> Run:
        """A run that was killed when it had committed some units."""
        if isinstance(self.place, Disk):
            return self.place.start("out", end_at(100), world).end()
        return self.place.start("out", lambda process: EndAt(process, 60, "before"), world).end()


def wake(zombie: Started) -> Run:
    """Let a stopped run go on, until it ends."""
    os.kill(zombie.process, signal.SIGCONT)
    return zombie.end()


def wrong_of(claims: dict[str, bool]) -> list[str]:
    """The claims that don't hold."""
    return [claim for claim, holds in claims.items() if not holds]


# --- the stories --------------------------------------------------------------------------------------------------


def several_drivers_begin_at_once(scene: Scene) -> list[str]:
    with a_reader_polls(scene.place, "out", scene.judgement.whole) as seen:
        started = [scene.start() for _ in range(DRIVERS)]
        runs = [one.end() for one in started]
    return seen.wrong + wrong_of({
        "all succeed": [run.code for run in runs] == [0] * DRIVERS,
        f"the result is that of one: {runs[0].said}": scene.place.objects("out") == scene.judgement.whole})


def one_that_wakes_up_after_its_unit_was_committed_leaves_no_trace(scene: Scene) -> list[str]:
    with a_reader_polls(scene.place, "out", scene.judgement.whole) as seen:
        zombie = scene.stopped(("link", UNIT), ("HEAD", UNIT))
        second = scene.start().end()
        finished = scene.place.objects("out")
        woken = wake(zombie)
    return seen.wrong + wrong_of({
        "the second finishes": second.code == 0 and finished == scene.judgement.whole,
        "the second warns": "another driver is at work here" in second.said,
        f"the zombie ends well: {woken.said}": woken.code == 0,
        "nothing has changed": scene.place.objects("out") == finished})


def _one_that_wakes_up_in_another_models_output(scene: Scene, on_disk: tuple[str, str]) -> list[str]:
    zombie = scene.stopped(on_disk, ("HEAD", UNIT))
    scene.place.remove("out")
    begun_again = scene.start(scene.other_world).end()
    woken = wake(zombie)
    return wrong_of({f"the new run succeeds: {begun_again.said}": begun_again.code == 0,
                     "the zombie leaves no trace": scene.place.objects("out") == scene.other,
                     f"and says why: {woken.code} {woken.said}": woken.code == 1 and "begun again" in woken.said})


def one_that_wakes_up_before_a_unit_in_another_models_output_leaves_no_trace(scene: Scene) -> list[str]:
    return _one_that_wakes_up_in_another_models_output(scene, ("describe", UNIT))


def one_that_wakes_up_in_its_put_in_another_models_output_leaves_no_trace(scene: Scene) -> list[str]:
    return _one_that_wakes_up_in_another_models_output(scene, ("link", UNIT))


def one_that_wakes_up_before_it_seals_another_models_output_leaves_no_trace(scene: Scene) -> list[str]:
    zombie = scene.stopped(("put_if_absent", "/_parts/"), ("PUT", "/_parts/"))
    scene.place.remove("out")
    broken = scene.killed_early(scene.other_world)
    woken = wake(zombie)
    seen = scene.place.objects("out")
    return wrong_of({"it is begun again": broken.code == KILLED and "_job.json" in seen,
                     f"the zombie doesn't seal it: {woken.said}": woken.code == 1 and "_SUCCESS" not in seen,
                     "the new run goes on": scene.start(scene.other_world).end().code == 0})


def a_part_that_arrives_in_another_models_output_is_named_by_the_next_run(scene: Scene) -> list[str]:
    return _late_in_another_models_output(scene, UNIT, finished=True)


def a_part_that_arrives_before_the_other_models_run_is_finished_stops_it(scene: Scene) -> list[str]:
    return _late_in_another_models_output(scene, UNIT, finished=False)


def a_success_that_arrives_in_another_models_output_is_named_by_the_next_run(scene: Scene) -> list[str]:
    return _late_in_another_models_output(scene, "_SUCCESS", finished=False)


def _late_in_another_models_output(scene: Scene, path: str, *, finished: bool) -> list[str]:
    """A request that was on its way when its sender died."""
    assert isinstance(scene.place, Bucket)
    killed = scene.place.run("out", lambda process: EndInFlight(process, f"/out/{path}"))
    scene.place.remove("out")
    begun_again = scene.start(scene.other_world).end() if finished else scene.killed_early(scene.other_world)
    scene.place.let_go_of_late()
    late = scene.place.objects("out").keys() - scene.other.keys()
    seen = scene.place.objects("out")
    again = scene.start(scene.other_world).end()
    name = path if path == "_SUCCESS" else min(late, default="a part")
    return wrong_of({"it is killed": killed.code == KILLED,
                     "it is begun again": begun_again.code == (0 if finished else KILLED),
                     "it has arrived": name in seen and seen[name] != scene.other.get(name),
                     f"the next run stops, and names it: {again.said}": again.code == 1 and name in again.said})


ANYWHERE: list[Callable[[Scene], list[str]]] = [
    several_drivers_begin_at_once,
    one_that_wakes_up_after_its_unit_was_committed_leaves_no_trace,
    one_that_wakes_up_before_a_unit_in_another_models_output_leaves_no_trace,
    one_that_wakes_up_before_it_seals_another_models_output_leaves_no_trace]
ON_A_DISK = [one_that_wakes_up_in_its_put_in_another_models_output_leaves_no_trace]
ON_THE_WIRE = [
    a_part_that_arrives_in_another_models_output_is_named_by_the_next_run,
    a_part_that_arrives_before_the_other_models_run_is_finished_stops_it,
    a_success_that_arrives_in_another_models_output_is_named_by_the_next_run]


def main(place: str, folder: Path) -> dict[str, list[str]]:
    """What was wrong in each story."""
    outputs = folder / place
    outputs.mkdir()
    if place == "disk":
        disk = Disk(outputs, World(str(folder / "in"), str(folder / "model")))
        return tell(Scene(disk, outputs), ANYWHERE + ON_A_DISK)
    with open_bucket(outputs, folder / "in", folder / "model") as bucket:
        return tell(Scene(bucket, outputs), ANYWHERE + ON_THE_WIRE)


def tell(scene: Scene, stories: list[Callable[[Scene], list[str]]]) -> dict[str, list[str]]:
    """Each story, in an output of its own."""
    told = {}
    for story in stories:
        told[story.__name__] = story(scene)
        scene.place.remove("out")
    return told


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], prepare(sys.argv[2]))))
