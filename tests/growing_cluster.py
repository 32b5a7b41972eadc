"""A Ray cluster that grows: the node types of ray_config.yaml, made up on this machine by Ray's own fake provider.

    unshare -pfm --mount-proc python -m tests.growing_cluster FOLDER

In a PID namespace of its own, so that all of it ends with it, and a mount namespace, in which the file that Ray's wheel
lacks stands in its place. GPUs are logical. Prints what was seen as one JSON object on its last line.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

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


def start_head(folder: Path) -> None:
    """A head with the autoscaler, its processes children of this one; RAY_ADDRESS says where."""
    import ray
    from ray._private.services import get_node_ip_address

    address = f"{get_node_ip_address()}:6399"
    config = json.dumps(fake_config(address))
    (folder / "cluster.json").write_text(config)
    place = Path(ray.__file__).parent / "autoscaler" / "_private" / "fake_multi_node"
    shutil.copytree(place, folder / "provider")
    (folder / "provider" / "example.yaml").write_text(config)
    subprocess.run(["mount", "--bind", str(folder / "provider"), str(place)], check=True)
    settings = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    log = (folder / "head.log").open("wb")
    subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0",
                      "--num-gpus=0", f"--port={address.rpartition(':')[2]}", "--object-store-memory=200000000",
                      f"--temp-dir={folder}", f"--autoscaling-config={folder}/cluster.json", "--disable-usage-stats",
                      "--dashboard-port=8399"], stdout=log, stderr=log, env={**os.environ, **settings})
    os.environ["RAY_ADDRESS"] = address


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


def grow(folder: Path) -> dict[str, Any]:
    """What is seen while work waits, is done, and is gone."""
    import ray

    from jobs import annotate, annotate_pool, start_ray
    from pipeline.config import AnnotateConfig, TrackingConfig
    from tests.worlds import write_pictures, write_tiny_model

    seen: dict[str, Any] = {"before": machines(), "num_gpus": start_ray.num_gpus(), "num_cpus": start_ray.num_cpus(),
                            "present_gpus": start_ray.present_gpus()}
    note("asked", seen)
    units = ray.data.from_items([{"unit": unit} for unit in range(40)], override_num_blocks=40)
    pool = annotate_pool._through_actors(units, Where, {}, actors=start_ray.num_gpus(), num_cpus=3.6, num_gpus=1)
    began = time.monotonic()
    nodes = Counter(str(row["node"]) for row in pool.iter_rows())
    seen |= {"gpu_seconds": time.monotonic() - began, "nodes_that_worked": len(nodes), "gpu_machines": machines()}
    note("worked", seen)
    seen["gone_after_s"] = wait_until_all_are_gone()
    note("gone", seen)

    pictures, model = write_pictures(folder / "in"), write_tiny_model(folder / "model")
    began = time.monotonic()
    result = annotate.run(AnnotateConfig(
        input=str(pictures / "images"), model=str(model), boxes="whole-image", output=str(folder / "out"),
        backend="cpu", pictures_per_unit=2, tracking=TrackingConfig(enabled=False)))
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
    start_head(folder)
    import ray

    while True:
        try:
            ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
            break
        except (ConnectionError, RuntimeError):
            time.sleep(1)
    from ray._private.state import state

    while state.get_cluster_config() is None:  # the autoscaler tells it when it has begun
        time.sleep(0.5)
    print(json.dumps(grow(folder)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
