"""The jobs on a cluster of several hosts that die, are cut off and come back: nothing lost, nothing twice.

Each host is one of `cluster.hosts`. Times are printed: `pytest -s`. They depend on Ray's own time-outs: it takes a host
that doesn't answer for dead after about a minute.
"""

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import yaml

from cluster.hosts import Hosts
from cluster.namespaces import why_not
from pipeline import checkpoints, storage
from tests.hosts_world import Job, hosts_at_work, parts, restart_s3, s3_of, start_job, submit_job
from tests.worlds import rows, write_pictures, write_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.endurance, pytest.mark.timeout(900)]
BUCKET = "s3://pose"
PICTURES, COPIES = 24, 12  # each picture lies there under 12 more names, so that a run takes its time
UNITS = PICTURES * COPIES
EVERY, ITERATIONS = 20, 400
TRAINING = {"workers": 3, "threads": 1, "validate_every": EVERY,  # three workers don't fit in one host
            "network": {"num_stages": 1, "input_size_wh": [64, 64], "blocks": [1, 1, 1, 1], "widths": [8, 8, 16, 16],
                        "stem_channels": 8, "upsample_channels": 16},
            "optimiser": {"iterations": ITERATIONS, "warmup_iterations": 10, "batch_size_per_worker": 4}}
ANNOTATOR, DECODER, TRAINER = "AnnotatingActor", "DecodingActor", "RayTrainWorker"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Head, three workers, S3 and MLflow, each a host; in the bucket pictures, an untrained model, a shard dataset."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    with Hosts(folder / "cluster") as hosts, pytest.MonkeyPatch.context() as environment:
        hosts.start_s3()
        hosts.start_mlflow()
        hosts.start_head("head")
        hosts.start_workers(["worker-1", "worker-2", "worker-3"])
        for name, value in hosts.environment.items():
            if name.startswith("AWS_"):
                environment.setenv(name, value)
        pictures = write_pictures(folder / "world", PICTURES)
        s3_of(hosts).upload_folder(pictures, f"{BUCKET}/world")
        for copy in range(COPIES):
            s3_of(hosts).upload_folder(pictures / "images", f"{BUCKET}/many/{copy:02d}")
        s3_of(hosts).upload_folder(write_tiny_model(folder / "model"), f"{BUCKET}/model")
        (hosts.folder / "train.yaml").write_text(yaml.safe_dump(TRAINING))
        submit_job(hosts, "shard", "--images", f"{BUCKET}/world/images", "--annotations",
                   f"{BUCKET}/world/annotations.json", "--output", f"{BUCKET}/shards", "--images-per-shard", "4",
                   "--result", f"{BUCKET}/shard.json")
        yield hosts


@pytest.fixture(scope="module")
def annotated(hosts: Hosts) -> str:
    """What `annotate` gives when nothing happens."""
    start_annotate(hosts, "unbroken").succeed()
    return f"{BUCKET}/unbroken"


@pytest.fixture(scope="module")
def trained(hosts: Hosts) -> str:
    """What `train` gives when nothing happens."""
    start_train(hosts, "unbroken-model").succeed()
    return f"{BUCKET}/unbroken-model"


def test_jobs_on_several_hosts_shard_train_annotate_and_evaluate(hosts: Hosts, trained: str) -> None:
    assert json.loads(storage.read_object(f"{BUCKET}/shard.json"))["counts"]["rows"] == PICTURES
    start_job(hosts, "annotate", "--input", f"{BUCKET}/shards", "--model", trained,
              "--output", f"{BUCKET}/keypoints").succeed()
    evaluated = start_job(hosts, "evaluate", "--keypoints", f"{BUCKET}/keypoints",
                          "--annotations", f"{BUCKET}/world/annotations.json").succeed()
    assert 0 <= evaluated.result["ap"] <= 1


def test_a_worker_host_that_dies_in_annotate_costs_no_row(hosts: Hosts, annotated: str) -> None:
    job = start_annotate(hosts, "host-dies")
    wait_for_parts(job, "host-dies", 20)
    victim = hosts_at_work(hosts, ANNOTATOR)[0]
    hosts.host(victim).kill()
    tell(f"annotate, {victim} dies", job, "host-dies")
    job.succeed()
    assert_same_rows(hosts, "host-dies", annotated)
    hosts.start_workers([victim])


def test_a_host_whose_actors_decode_for_others_dies_and_costs_no_row(hosts: Hosts, annotated: str) -> None:
    job = start_annotate(hosts, "decoders-die", "decoders=3")
    wait_for_parts(job, "decoders-die", 20)
    victim = hosts_at_work(hosts, DECODER)[0]
    hosts.host(victim).kill()
    tell(f"annotate, {victim}, which decodes, dies", job, "decoders-die")
    job.succeed()
    assert_same_rows(hosts, "decoders-die", annotated)
    hosts.start_workers([victim])


def test_a_worker_host_that_dies_in_train_costs_what_came_after_the_last_checkpoint(hosts: Hosts, trained: str) -> None:
    job = start_train(hosts, "host-dies-model")
    wait_for_iteration(job, "host-dies-model", 100)
    victim = hosts_at_work(hosts, TRAINER)[0]
    hosts.host(victim).kill()
    killed_at, began = last_iteration("host-dies-model"), time.monotonic()
    wait_for_iteration(job, "host-dies-model", killed_at + EVERY)
    print(f"train, {victim} dies: {time.monotonic() - began:.0f} s until the next checkpoint")
    ended = job.succeed()
    assert goes_on_after(ended.said) in range(killed_at, killed_at + EVERY + 1)
    assert ended.result["iterations"] == ITERATIONS
    assert_same_weights("host-dies-model", trained)
    hosts.start_workers([victim])


def test_a_host_that_is_cut_off_until_it_counts_as_dead_leaves_no_trace(hosts: Hosts, annotated: str) -> None:
    job = start_annotate(hosts, "host-cut")
    wait_for_parts(job, "host-cut", 20)
    victim = hosts_at_work(hosts, ANNOTATOR)[0]
    hosts.host(victim).cut()
    tell(f"annotate, {victim} cut off", job, "host-cut")
    print(f"annotate, {victim} counts as dead after {job.wait_for(lambda: len(alive(hosts)) < 4):.0f} s more")
    hosts.host(victim).mend()  # now it wakes up among those that have gone on without it
    job.succeed()
    assert_same_rows(hosts, "host-cut", annotated)
    hosts.host(victim).kill()
    hosts.start_workers([victim])


def test_a_store_that_is_away_for_a_while_and_comes_back_as_another_process_rejects_no_picture(
        hosts: Hosts, annotated: str) -> None:
    job = start_annotate(hosts, "store-away")
    wait_for_parts(job, "store-away", 20)
    restart_s3(hosts, away_s=45)
    tell("annotate, S3 is back", job, "store-away")
    job.succeed()
    assert_same_rows(hosts, "store-away", annotated)


def test_a_head_that_dies_in_annotate_costs_the_units_at_work_and_a_new_cluster_resumes(
        hosts: Hosts, annotated: str) -> None:
    job = start_annotate(hosts, "head-dies")
    wait_for_parts(job, "head-dies", 20)
    hosts.host(hosts.head).kill()  # its workers live on, and go on with what they have
    assert job.end().code == -9
    new_cluster(hosts, 1)
    before, logged = parts(f"{BUCKET}/head-dies"), len(s3_of(hosts).requests("GET"))

    job = start_annotate(hosts, "head-dies")
    job.wait_for(lambda: len(parts(f"{BUCKET}/head-dies")) > len(before))
    print(f"annotate, new cluster: {len(before)} of {UNITS} units were there")
    job.succeed()

    after = parts(f"{BUCKET}/head-dies")
    read = {key_of(path) for path in s3_of(hosts).requests("GET")[logged:] if "/many/" in path}
    assert {name: after[name] for name in before} == before
    assert read
    assert not read & {KEYS[int(name[5:12])] for name in before}
    assert_same_rows(hosts, "head-dies", annotated)


def test_a_head_that_dies_in_train_costs_what_came_after_the_last_checkpoint_and_a_new_cluster_resumes(
        hosts: Hosts, trained: str) -> None:
    job = start_train(hosts, "head-dies-model")
    wait_for_iteration(job, "head-dies-model", 100)
    hosts.host(hosts.head).kill()
    assert job.end().code == -9
    new_cluster(hosts, 2)
    killed_at = last_iteration("head-dies-model")

    ended = start_train(hosts, "head-dies-model").succeed()

    begun = json.loads(storage.read_object(f"{BUCKET}/head-dies-model/_job.json"))["about"]["run_id"]
    assert ended.result["run_id"] == begun
    assert goes_on_after(ended.said) == killed_at
    assert ended.result["iterations"] == ITERATIONS
    assert_same_weights("head-dies-model", trained)


# --- what is true -------------------------------------------------------------------------------------------------

KEYS = [f"{copy:02d}/{picture:06d}.jpg" for copy in range(COPIES) for picture in range(1, PICTURES + 1)]  # by unit


def assert_same_rows(hosts: Hosts, output: str, undisturbed: str) -> None:
    """Each unit once, the rows of the undisturbed run, and `verify` says whole."""
    uri = f"{BUCKET}/{output}"
    assert len(parts(uri)) == UNITS
    assert Counter(rows(uri)["key"].to_pylist()).keys() == set(KEYS)
    assert not rows(uri)["reason"].drop_null().to_pylist()
    assert rows(uri).equals(rows(undisturbed))
    start_job(hosts, "verify", "--data", uri).succeed()


def assert_same_weights(output: str, undisturbed: str) -> None:
    name = "model.safetensors"
    assert storage.read_object(f"{BUCKET}/{output}/{name}") == storage.read_object(f"{undisturbed}/{name}")


def goes_on_after(said: str) -> int:
    """The iteration after which a training says that it goes on."""
    return int(re.findall(r"going on after iteration (\d+)", said)[-1])


def key_of(path: str) -> str:
    return path.partition("/many/")[2].partition("?")[0].replace("%2F", "/")


# --- commands -----------------------------------------------------------------------------------------------------


def start_annotate(hosts: Hosts, output: str, *settings: str) -> Job:
    """All copies, a picture a unit."""
    return start_job(hosts, "annotate", "--input", f"{BUCKET}/many", "--model", f"{BUCKET}/model",
                     "--output", f"{BUCKET}/{output}", "--boxes", "whole-image",
                     *(f"--set={setting}" for setting in ("pictures_per_unit=1", *settings)))


def start_train(hosts: Hosts, output: str) -> Job:
    return start_job(hosts, "train", "--config", str(hosts.folder / "train.yaml"), "--data", f"{BUCKET}/shards",
                     "--output", f"{BUCKET}/{output}")


def new_cluster(hosts: Hosts, number: int) -> None:
    """Another head, and three workers of its own."""
    hosts.start_head(f"head{number}")
    hosts.start_workers([f"worker{number}-{worker}" for worker in (1, 2, 3)])


def alive(hosts: Hosts) -> list[str]:
    """The nodes that the head takes for alive, itself among them."""
    said = hosts.run(hosts.head, [sys.executable, "-m", "ray.scripts.scripts", "status"]).stdout
    return re.findall(r"^ 1 (node_\w+)", said, re.MULTILINE)


def wait_for_parts(job: Job, output: str, count: int) -> None:
    job.wait_for(lambda: len(parts(f"{BUCKET}/{output}")) >= count)


def wait_for_iteration(job: Job, output: str, iteration: int) -> None:
    job.wait_for(lambda: last_iteration(output) >= iteration)


def last_iteration(output: str) -> int:
    """That of the newest whole checkpoint; 0 before the first."""
    return max((each.iteration for each in checkpoints.list_checkpoints(f"{BUCKET}/{output}")), default=0)


def tell(what: str, job: Job, output: str) -> None:
    """Print how long it takes until the next unit is committed, and until ten more are."""
    there = len(parts(f"{BUCKET}/{output}"))
    first = job.wait_for(lambda: len(parts(f"{BUCKET}/{output}")) > there)
    ten = job.wait_for(lambda: len(parts(f"{BUCKET}/{output}")) > there + 10)
    print(f"{what}: {first:.1f} s until the next of {UNITS} units after {there}, {ten:.1f} s until ten more")
