"""Connect to the cluster at hand, or start a local one for the time of a job."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

logger = logging.getLogger("jobs.ray")


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
    # threads that spin while they wait starve each other where processes share cores: 5 times slower training
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _connect()
    except (ray.exceptions.RayError, ConnectionError, TimeoutError, RuntimeError) as error:
        raise OSError(f"Ray could not be started or reached: {error}. Check RAY_ADDRESS; on a busy machine, "
                      "try again.") from error
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
    ray.init(address="local", num_cpus=max(4, os.cpu_count() or 1), log_to_driver=True,
             logging_level=logging.WARNING)
    logger.info("started a local Ray: %s", _resources())


def _resources() -> str:
    import ray

    have = ray.cluster_resources()
    return ", ".join(f"{have[kind]:g} {kind}" for kind in ("CPU", "GPU") if kind in have)


def num_gpus() -> int:
    """GPUs in the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def num_cpus() -> int:
    """Cores of the connected cluster; of this machine where Ray is local, whose logical CPUs may be more."""
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))
    return cpus if os.environ.get("RAY_ADDRESS") else min(cpus, os.cpu_count() or 1)
