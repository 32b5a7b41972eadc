"""Connect to the cluster at hand, or start a local one for the time of a job."""

import contextlib
import logging
import os
import sys
import uuid
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice

from pipeline import storage
from pipeline.cores import usable_cores
from pipeline.errors import ConfigError

logger = logging.getLogger("jobs.ray")
PROBED_OBJECTS = 5
# A cluster that has scaled to nothing doesn't say what it can grow to: Ray has no public way to ask
NO_CORES = ("the Ray cluster has no core for tasks now, so that how much is done at once can't follow from it. If it "
            "grows, say how much is wanted: annotate, plan: --set backend=cuda --set actors=N --set threads=4; train: "
            "--workers N --set device=cuda; shard, verify: --set ray.tasks=N.")
# How PyTorch's threads wait for each other. Those that spin for long starve each other where processes share cores, and
# those that sleep at once are woken up too late between the small steps of a small network. A small MSPN on two cores,
# samples/s: asleep at once 47, after 2,000 looks 72, after OpenMP's own 300,000 looks 80; two such processes on the
# same two cores: 12, 11, no end within minutes (RESULTS.md)
THREAD_WAITS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
# Ray gives its workers nearly the lowest priority (nice 15). On a machine of a few cores each of Ray's own dozen
# processes that wakes up then takes a core from a thread of a network, for which the others wait: steps beside an idle
# Ray made 54 samples/s, and 60 at everybody's priority (RESULTS.md)
WORKER_NICENESS = {"RAY_worker_niceness": "0"}
# What Ray warns of at each start and nobody can mend: that a local Ray asks for a token, that its own bars are off
NOT_WORTH_A_LINE = ("ray._private.authentication.authentication_token_setup", "ray.data._internal.progress")


@contextlib.contextmanager
def start_ray() -> Iterator[None]:
    """A Ray to submit to: one that is running in this process, the cluster of RAY_ADDRESS, or else a local one.

    A Ray that the block started ends with it.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray Data's own account of plans and operators is for who develops it; ours says what is done
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
    for name, value in (THREAD_WAITS | WORKER_NICENESS).items():
        os.environ.setdefault(name, value)
    # as `python -m jobs` has it: OpenCV's own lines, from every worker, would drown everything else
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    if not sys.stderr.isatty():  # Ray colours workers' lines in files too
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    for name in NOT_WORTH_A_LINE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        _connect()
    except Exception as error:  # of a node that is slow to start, Ray says just that
        said = str(error).rstrip(".")
        raise OSError(f"Ray could not be started or reached: {said}. Check RAY_ADDRESS; on a busy machine, try "
                      "again.") from error
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")  # the only way to bound an actor's restarts
    try:
        yield
    finally:
        ray.shutdown()


def _connect() -> None:
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True)
        logger.info("connected to the Ray cluster at RAY_ADDRESS: %s", _resources())
        return
    # "local", not the default: a stale address file of an earlier cluster would otherwise be tried first.
    # At least 4 logical CPUs: two training workers would leave none for the tasks that feed them.
    ray.init(address="local", num_cpus=max(4, usable_cores()), log_to_driver=True,
             logging_level=logging.WARNING)
    logger.info("started a local Ray: %s", _resources())


def _resources() -> str:
    import ray

    have = dict(ray.cluster_resources())
    if not os.environ.get("RAY_ADDRESS"):
        have["CPU"] = usable_cores()  # those of a local Ray are logical, and at least 4
    return ", ".join(f"{have[kind]:g} {kind}" for kind in ("CPU", "GPU") if kind in have)


def refuse_unshared(*, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Refuse (ConfigError) local paths that a node of the cluster doesn't see as this one does; each is named.

    For an output the driver writes a probe file that every node must see; of an input, the first objects listed.
    """
    import ray

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    local_inputs = [uri for uri in inputs if not storage.is_remote(uri)]
    local_outputs = [uri for uri in outputs if not storage.is_remote(uri)]
    if len(nodes) < 2 or not (local_inputs or local_outputs):
        return
    seen = {found.uri: found.etag for uri in local_inputs for found in islice(_objects_at(uri), PROBED_OBJECTS)}
    probes = [storage.join(uri, f"_probe-{uuid.uuid4().hex}") for uri in local_outputs]
    try:
        for probe in probes:
            storage.put_if_absent(probe, b"seen?")
            found = storage.describe_object(probe)
            assert found is not None
            seen[probe] = found.etag
        look = ray.remote(num_cpus=0)(_unseen)
        for node in nodes:
            there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
            unseen = ray.get(look.options(scheduling_strategy=there).remote(seen))
            if unseen:
                raise ConfigError(f"{unseen[0]}: a node of the cluster ({node[:8]}) doesn't see this file as the "
                                  "driver does. Give s3:// addresses, or a folder that all nodes share.")
    finally:
        for probe in probes:
            storage.remove_own(probe)


def _objects_at(uri: str) -> Iterator[storage.StoredObject]:
    one = storage.describe_object(uri)
    return iter([one]) if one else storage.list_objects(uri)


def _unseen(objects: dict[str, str]) -> list[str]:
    """On a node: which of the objects aren't there with the ETag that the driver sees."""
    found = {uri: storage.describe_object(uri) for uri in objects}
    return [uri for uri, one in found.items() if one is None or one.etag != objects[uri]]


def num_nodes() -> int:
    """Nodes of the connected cluster that are alive."""
    return len(_nodes())


def num_gpus() -> int:
    """GPUs of the connected cluster that are there now."""
    return sum(int(node.get("GPU", 0)) for node in _nodes())


def num_cpus() -> int:
    """Cores of the connected cluster that are there now. Refuses (ConfigError) to say none: they may be yet to come."""
    cpus = sum(node_cpus())
    if not cpus:
        raise ConfigError(NO_CORES)
    return cpus


def node_cpus() -> list[int]:
    """Cores of each node; of this machine where Ray is local, whose logical CPUs may be more."""
    cpus = [int(node.get("CPU", 0)) for node in _nodes()]
    return cpus if os.environ.get("RAY_ADDRESS") else [min(sum(cpus), usable_cores())]


def node_gpus() -> list[int]:
    """GPUs of each node, in the order of `node_cpus`."""
    gpus = [int(node.get("GPU", 0)) for node in _nodes()]
    return gpus if os.environ.get("RAY_ADDRESS") else [sum(gpus)]


def _nodes() -> list[dict[str, float]]:
    """The resources of each node of the connected cluster that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def warn_of_cpus(remedy: str) -> None:
    """On a cluster whose GPUs may be yet to come: say that CPUs will do the work, and how to have it otherwise."""
    if os.environ.get("RAY_ADDRESS"):
        logger.warning("the cluster has no GPU now, so this is done on CPUs. If it starts machines that have one, give "
                       "%s.", remedy)


def actor_threads() -> int:
    """Threads of an actor on CPUs, where nobody says.

    One thread for each actor keeps a few cores busy with decoding and network at once. Of more than one an actor would
    never start where no node has so many cores, however many all nodes have together.
    """
    return 1 if num_cpus() <= 4 or max(node_cpus()) < 4 else 4


def native_precision(*, gpu: bool) -> str:
    """bfloat16 where a node that would do the work computes it natively, else float32; a task there looks."""
    import ray

    if gpu and not num_gpus():
        logger.info("no GPU is there yet: waiting for the cluster to start a machine that has one")
    look = ray.remote(num_cpus=0, num_gpus=1 if gpu else 0)(_native_precision)
    found: str = ray.get(look.remote(gpu))
    return found


def _native_precision(gpu: bool) -> str:
    from pipeline.model.inference import native_precision

    return native_precision("cuda" if gpu else "cpu")
