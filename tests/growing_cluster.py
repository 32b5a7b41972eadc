"""A Ray cluster that grows: the node types of ray_config.yaml, made up on this machine by Ray's own fake provider.

    unshare -pfm --mount-proc python -m tests.growing_cluster FOLDER

In a PID namespace of its own, so that all of it ends with it, and a mount namespace, in which the file that Ray's wheel
lacks stands in its place. GPUs are logical. Prints what was seen as one JSON object on its last line.
"""

import contextlib
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import yaml

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "a-token-of-this-test-0123456789abcdef"
MOST = 3  # machines of each type: this one has to bear them
IDLE_MINUTES = 0.1
SMALL = {"object_store_memory": 100_000_000}
HEAD = "ray.head.default"  # the fake provider knows its head by this name alone
HEAD_ID = "f" * 51 + "00000"
COMMANDS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
            "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude",
            "rsync_filter")


def fake_config(address: str) -> dict[str, Any]:
    """ray_config.yaml's types and limits, with machines that Ray makes up."""
    ours = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    types = {HEAD if name == ours["head_node_type"] else name: {
        "resources": each["resources"] | ({} if name == ours["head_node_type"] else SMALL), "node_config": {},
        "min_workers": each["min_workers"], "max_workers": min(each["max_workers"], MOST)}
        for name, each in ours["available_node_types"].items()}
    return {"cluster_name": "fake", "max_workers": ours["max_workers"], "upscaling_speed": ours["upscaling_speed"],
            "idle_timeout_minutes": IDLE_MINUTES, "auth": {}, "docker": {}, "file_mounts": {},
            "file_mounts_sync_continuously": False, "head_node_type": HEAD, "available_node_types": types,
            "provider": {"type": "fake_multinode", "head_node_id": HEAD_ID, "launch_multiple": True,
                         "gcs_address": address}} | {name: [] for name in COMMANDS}


def start_head(folder: Path) -> "subprocess.Popen[bytes]":
    """A head with the autoscaler, its processes children of this one; RAY_ADDRESS says where."""
    import ray
    from ray._private.services import get_node_ip_address

    address = f"{get_node_ip_address()}:{free_port()}"
    config = json.dumps(fake_config(address))
    (folder / "cluster.json").write_text(config)
    place = Path(ray.__file__).parent / "autoscaler" / "_private" / "fake_multi_node"
    shutil.copytree(place, folder / "provider")
    (folder / "provider" / "example.yaml").write_text(config)
    subprocess.run(["mount", "--bind", str(folder / "provider"), str(place)], check=True)
    settings = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    log = (folder / "head.log").open("wb")
    os.environ["RAY_ADDRESS"] = address
    return subprocess.Popen([
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0", "--num-gpus=0",
        f"--port={address.rpartition(':')[2]}", f"--dashboard-port={free_port()}", "--object-store-memory=200000000",
        f"--temp-dir={folder}", f"--autoscaling-config={folder}/cluster.json", "--disable-usage-stats"],
        stdout=log, stderr=log, env={**os.environ, **settings})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    return port


def machines() -> Counter[str]:
    """How many workers of each type are alive: a type by what it has."""
    import ray

    kinds = {(8, 1, 0): "gpu_spot", (8, 1, 1): "gpu_on_demand", (16, 0, 0): "cpu_spot"}
    found = [tuple(int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU", "on_demand"))
             for node in ray.nodes() if node["Alive"]]
    return Counter(kinds[each] for each in found if any(each))


class Where:
    """Stands for what annotates: says on which node a unit was done."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A unit that takes a moment, so that later machines find some left."""
        import ray

        time.sleep(2)
        return {"node": [ray.get_runtime_context().get_node_id()]}


def kind_of(node: str) -> str:
    """What a node that is alive has."""
    import ray

    resources = next(each["Resources"] for each in ray.nodes() if each["NodeID"] == node)
    return "GPU" if "GPU" in resources else "no GPU"


class Decoding:
    """Stands for what decodes for others."""

    def __init__(self, **_: Any) -> None:
        self.where = Where()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The task, and on what it was decoded: a node with a GPU or one without."""
        here = self.where({})["node"][0]
        return batch.append_column("decoded", pa.array([kind_of(here)]))


class Annotating(Decoding):
    """Stands for what annotates what others have decoded."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A receipt that says on which node the unit was annotated, and on what decoded."""
        nodes = {"on": self.where({})["node"][0], "decoded on": batch["decoded"][0].as_py()}
        unit = json.loads(batch["task"][0].as_py())["unit"]
        return pa.table({"receipt": [json.dumps({"unit": unit, "outcome": "committed", "counts": nodes})]})


def grow_for_decoders() -> dict[str, Any]:
    """A pool of units whose decoders could take every core of the GPUs' machines, and still want more."""
    from jobs import annotate_pool
    from pipeline.units import FrozenJob

    job = FrozenJob(digest="", input={}, intent={"boxes": {"kind": "whole-image"}}, plan={}, about={})
    pool = annotate_pool.PoolSizes(annotators=2 * MOST, decoders=2 * MOST + 4, cpus=7.2, gpus=1)
    tasks = [annotate_pool.UnitTask(unit) for unit in range(40)]
    began = time.monotonic()
    with mock.patch.multiple(annotate_pool, DecodingActor=Decoding, AnnotatingActor=Annotating):
        receipts = list(annotate_pool.annotate_units("nowhere", job, tasks, pool=pool, reuse=None))
    seconds = time.monotonic() - began
    return {"seconds": seconds, "units": len({receipt.unit for receipt in receipts}), "machines": machines(),
            "annotated_on": len({receipt.counts["on"] for receipt in receipts}),
            "decoded_on": Counter(receipt.counts["decoded on"] for receipt in receipts)}


def grow(folder: Path) -> dict[str, Any]:
    """What is seen while work waits, is done, and is gone."""
    import ray

    from jobs import annotate, annotate_pool
    from pipeline.config import AnnotateConfig, TrackingConfig
    from pipeline.errors import ConfigError
    from tests.worlds import write_pictures, write_tiny_model

    seen: dict[str, Any] = {"before": machines()}
    pictures, model = write_pictures(folder / "in"), write_tiny_model(folder / "model")

    def run(**settings: Any) -> dict[str, Any]:
        return annotate.run(AnnotateConfig(
            input=str(pictures / "images"), model=str(model), boxes="whole-image", output=str(folder / "out"),
            pictures_per_unit=2, tracking=TrackingConfig(enabled=False), **settings))

    try:
        run()
    except ConfigError as error:
        seen["refused"] = str(error)
    note("refused", seen)
    units = ray.data.from_items([{"unit": unit} for unit in range(40)], override_num_blocks=40)
    pool = annotate_pool._through_actors(units, Where, {}, actors=2 * MOST, num_cpus=3.6, num_gpus=1)
    began = time.monotonic()
    nodes = Counter(str(row["node"]) for row in pool.iter_rows())
    seen |= {"gpu_seconds": time.monotonic() - began, "nodes_that_worked": len(nodes), "gpu_machines": machines()}
    note("worked", seen)
    del pool, units  # with them their actors, which would keep their machines
    seen["gone_after_s"] = wait_until_all_are_gone()
    note("gone", seen)
    seen["decoders"] = grow_for_decoders()
    note("decoded", seen)
    gc.collect()  # the pools' actors would keep their machines
    wait_until_all_are_gone()
    began = time.monotonic()
    result = run(backend="cpu", actors=6, threads=4)
    return seen | {"cpu_seconds": time.monotonic() - began, "cpu_machines": machines(), "ok": result["counts"]["ok"]}


def note(what: str, seen: dict[str, Any]) -> None:
    """For whoever reads why it failed."""
    print(what, seen, file=sys.stderr, flush=True)


def wait_until_all_are_gone() -> float:
    """Seconds until no worker is left."""
    began = time.monotonic()
    while machines():
        time.sleep(1)
    return time.monotonic() - began


def main(folder: Path) -> None:
    """Start, connect, look; the PID namespace takes everything away afterwards."""
    head = start_head(folder)
    import ray

    while not ray.is_initialized():
        assert head.poll() is None, (folder / "head.log").read_text()[-3000:]
        with contextlib.suppress(ConnectionError, RuntimeError):
            ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
        time.sleep(1)
    print(json.dumps(grow(folder)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
