"""`python -m cluster preflight`: what to know before anything is submitted, as verdicts with remedies.

One task on each node finds out its facts (`node_facts`), this process does the same, and `verdicts` judges them. Every
wait has an end, and what didn't answer is a verdict too.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from cluster import verdicts
from cluster.node_facts import Answer, NodeFacts, ask, look_around
from cluster.verdicts import FAILED, OK, SKIPPED, Verdict
from jobs.start_ray import refuse_unshared
from pipeline import storage
from pipeline.errors import ConfigError

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
INSIDE = "ray job submit --working-dir . -- python -m cluster preflight --output URI"


def preflight(address: str | None, inputs: Sequence[str], outputs: Sequence[str], *, allow_open: bool,
              timeout_s: float) -> list[Verdict]:
    """All verdicts. `address`: a cluster's, or the http(s):// address of its dashboard; default RAY_ADDRESS."""
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ConfigError("There is no cluster to look at: give --address, or set RAY_ADDRESS. On one machine the jobs "
                          "start a Ray of their own.")
    inputs, outputs = [storage.normalise(uri) for uri in inputs], [storage.normalise(uri) for uri in outputs]
    mlflow_uri = os.environ.get("MLFLOW_TRACKING_URI")
    try:
        driver = _within(timeout_s, lambda: look_around(inputs, outputs, mlflow_uri=_served(mlflow_uri)))
    except TimeoutError as error:
        return [Verdict("this machine", FAILED, str(error), "Look for a store or an MLflow that doesn't answer")]
    here = {"this machine": driver}
    if address.startswith(("http://", "https://")):
        return [*_from_outside(address, allow_open=allow_open), *verdicts.judge_stores(here),
                verdicts.judge_mlflow(mlflow_uri, here, client=version("mlflow"), num_nodes=1),
                verdicts.judge_skew(_stores_offset())]
    try:
        dashboard_url = _within(timeout_s, lambda: _connect(address))
    except Exception as error:  # Ray has many kinds, and each is a verdict
        return [_no_connection(address, error), *verdicts.judge_stores(here)]
    try:
        return _from_inside(driver, inputs, outputs, mlflow_uri, dashboard_url=dashboard_url, allow_open=allow_open,
                            timeout_s=timeout_s)
    finally:
        import ray

        ray.shutdown()


def _from_outside(address: str, *, allow_open: bool) -> list[Verdict]:
    """What a dashboard's address tells: whether it is open, whether it takes our token, and its Ray's version."""
    import ray
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    url = f"{address.rstrip('/')}/api/version"
    access = verdicts.judge_access(address, ask(url), {}, addresses=[address], allow_open=allow_open)
    ours = ask(url, get_auth_headers_if_auth_enabled({}))
    if ours.status == 200:
        theirs = json.loads(ours.text)["ray_version"]
        agree = theirs == ray.__version__
        ray_verdict = Verdict("Ray", OK if agree else FAILED, f"{theirs} there, {ray.__version__} here",
                              "" if agree else "Install the cluster's version here, or the reverse")
    elif ours.status is None:
        ray_verdict = Verdict("Ray", FAILED, f"no answer: {ours.text}", "Check --address, and that the dashboard runs")
    else:
        ray_verdict = Verdict("Ray", FAILED, f"{ours.status} {ours.text} to this machine's token",
                              verdicts.TOKEN_REMEDY.replace("Start every node with", "Set, as the cluster has them,"))
    return [ray_verdict, access, Verdict("nodes", SKIPPED, "a dashboard's address doesn't reach nodes: their versions, "
                                         "storage, GPUs, disks and clocks weren't looked at",
                                         f"Run it inside: {INSIDE}")]


def _connect(address: str) -> str | None:
    """Connect; the dashboard's URL, None where there is none. A `ray://` address gives it as others do."""
    import ray

    # our packages travel with the question, unless a submitted job has brought them already
    inside = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    shipped = {} if inside else {"py_modules": [str(ROOT / name) for name in ("pipeline", "jobs", "cluster")]}
    url = ray.init(address=address, runtime_env=shipped, log_to_driver=False, logging_level=logging.ERROR).dashboard_url
    return (url if "://" in url else f"http://{url}") if url else None


def _no_connection(address: str, error: Exception) -> Verdict:
    said = " ".join(str(error).split())[:400]
    if "Version mismatch" in said:
        return Verdict("Ray", FAILED, said, "Use the same Ray and Python here as on the cluster")
    if "uthentication" in said or "oken" in said:
        return Verdict("Ray", FAILED, said, "Set RAY_AUTH_MODE=token and, as the cluster has it, RAY_AUTH_TOKEN or "
                                            "RAY_AUTH_TOKEN_PATH")
    return Verdict("Ray", FAILED, f"{address} can't be reached: {said}",
                   "Check the address, that the head runs and its port is open to this machine, and that here as on "
                   "the cluster RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH are set "
                   '("Unauthenticated" among the lines above says that they differ)')


def _from_inside(driver: NodeFacts, inputs: Sequence[str], outputs: Sequence[str], mlflow_uri: str | None, *,
                 dashboard_url: str | None, allow_open: bool, timeout_s: float) -> list[Verdict]:
    import ray

    alive = {f"{node['NodeManagerHostname']}/{node['NodeManagerAddress']}/{node['NodeID'][:6]}": node
             for node in ray.nodes() if node["Alive"]}
    dead = len(ray.nodes()) - len(alive)
    nodes, offsets, silent = _ask_nodes(alive, [uri for uri in inputs if storage.is_remote(uri)],
                                        [uri for uri in outputs if storage.is_remote(uri)], timeout_s=timeout_s,
                                        mlflow_uri=_served(mlflow_uri), dashboard_url=dashboard_url)
    machines = {"this machine": driver, **nodes}
    store_bytes = {name: int(node["Resources"].get("object_store_memory", 0)) for name, node in alive.items()}
    return [
        Verdict("nodes", OK, f"{len(alive)} alive" + (f", {dead} dead" if dead else "")), *silent,
        verdicts.judge_versions(nodes, driver=driver),
        verdicts.judge_access(dashboard_url or "the cluster", _dashboard_answer(nodes), nodes, allow_open=allow_open,
                              addresses=[node["NodeManagerAddress"] for node in alive.values()]
                              + ([dashboard_url] if dashboard_url else [])),
        *verdicts.judge_stores(machines), *_shared(inputs, outputs, timeout_s=timeout_s),
        verdicts.judge_mlflow(mlflow_uri, machines, client=version("mlflow"), num_nodes=len(alive)),
        *verdicts.judge_gpus({name: int(node["Resources"].get("GPU", 0)) for name, node in alive.items()}, nodes),
        verdicts.judge_skew({**offsets, **_stores_offset()}),
        *(verdicts.judge_disk(name, facts, object_store=store_bytes[name]) for name, facts in nodes.items()),
        *(verdicts.judge_shm(name, facts, object_store=store_bytes[name]) for name, facts in nodes.items())]


def _ask_nodes(alive: dict[str, dict[str, Any]], inputs: Sequence[str], outputs: Sequence[str], *,
               mlflow_uri: str | None, dashboard_url: str | None, timeout_s: float
               ) -> tuple[dict[str, NodeFacts], dict[str, tuple[float, float]], list[Verdict]]:
    """Each node's facts, its clock's bounds, and a verdict for each node that gave neither."""
    import ray

    look: Any = ray.remote(num_cpus=0, max_retries=0)(look_around)
    asked, sent_s, end = {}, time.time(), time.monotonic() + timeout_s
    for name, node in alive.items():
        there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        head = "node:__internal_head__" in node["Resources"]  # the dashboard may listen on the head's loopback alone
        asked[look.options(scheduling_strategy=there).remote(
            inputs, outputs, mlflow_uri=mlflow_uri, gpus=bool(node["Resources"].get("GPU")),
            dashboard_url=dashboard_url if head else None)] = name
    facts, offsets, silent = {}, {}, []
    while asked:
        ready, _ = ray.wait(list(asked), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            break
        name, received_s = asked.pop(ready[0]), time.time()
        try:
            facts[name] = ray.get(ready[0])
            offsets[name] = verdicts.offset_bounds(facts[name], sent_s=sent_s, received_s=received_s)
        except Exception as error:  # of the node's Ray, of what is missing there
            said = " ".join(str(error).split())[-300:]
            silent.append(Verdict(f"node {name}", FAILED, said, "Look at the node's logs"))
    for task, name in asked.items():
        ray.cancel(task, force=True)
        silent.append(Verdict(f"node {name}", FAILED, f"no answer within {timeout_s:g} s", "Look for a store or an "
                              "MLflow that doesn't answer from there, or give more --timeout"))
    return facts, offsets, silent


def _dashboard_answer(nodes: dict[str, NodeFacts]) -> Answer | None:
    return next((facts.dashboard for facts in nodes.values() if facts.dashboard is not None), None)


def _shared(inputs: Sequence[str], outputs: Sequence[str], *, timeout_s: float) -> list[Verdict]:
    local = [uri for uri in (*inputs, *outputs) if not storage.is_remote(uri)]
    if not local:
        return []
    try:
        _within(timeout_s, lambda: refuse_unshared(inputs=inputs, outputs=outputs))
    except (OSError, ValueError) as error:
        return [Verdict("shared folders", FAILED, str(error), "Use s3:// or a folder that all nodes share")]
    return [Verdict("shared folders", OK, f"every node sees {', '.join(local)}")]


def _stores_offset() -> dict[str, tuple[float, float]]:
    """How far the store's clock is ahead of ours, if its address is in the environment; its Date has whole seconds."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        return {}
    sent_s = time.time()
    answer = ask(endpoint, method="HEAD")
    return {"the store": (answer.date_s - time.time(), answer.date_s + 1 - sent_s)} if answer.date_s else {}


def _served(mlflow_uri: str | None) -> str | None:
    return mlflow_uri if mlflow_uri and mlflow_uri.startswith(("http://", "https://")) else None


def _within(seconds: float, do: Callable[[], T]) -> T:
    """What `do` gives; TimeoutError if it takes longer. It then goes on in a thread that no exit waits for."""
    done: list[T | Exception] = []

    def run() -> None:
        try:
            done.append(do())
        except Exception as error:
            done.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if isinstance(done[0], Exception):
        raise done[0]
    return done[0]
