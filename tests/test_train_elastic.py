"""`--workers MIN:MAX` on a cluster that changes: warned of a loss it keeps a checkpoint, and it uses what there is."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from jobs import shard
from pipeline.config import ShardConfig
from tests.worlds import NO_TRACKING, write_pictures

ROOT = Path(__file__).parents[1]
EVERY, BATCH = 1000, 4

pytestmark = [pytest.mark.cluster, pytest.mark.endurance, pytest.mark.timeout(900),
              pytest.mark.usefixtures("without_ray")]

# A head with one CPU. Once the first checkpoint is kept, CHANGE happens to the cluster.
SCRIPT = textwrap.dedent("""
    import json, sys, threading, time
    import ray
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from jobs import train
    from pipeline import checkpoints
    from pipeline.config import TrainConfig, load_config

    def lose(node):
        # room for two workers; Ray is told that the node will be taken away in 15 s, as autoscalers and spot handlers
        # tell it; then it is killed
        deadline_ms = int((time.time() + 15) * 1000)
        GcsClient(address=cluster.address).drain_node(
            node.node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", deadline_ms)
        time.sleep(15)
        cluster.remove_node(node, allow_graceful=False)

    def change_the_cluster(change, node):
        while not checkpoints.list_checkpoints(settings["output"]):
            time.sleep(0.1)
        if change == "lose":
            return lose(node)
        ray._private.utils.set_sigterm_handler = lambda handler: None  # only the main thread may have one
        cluster.add_node(num_cpus=2)
        threading.Event().wait()  # the kernel ends a node with the thread that started it

    settings, change = json.loads(sys.argv[1]), sys.argv[3]
    train.RESIZE_EVERY_S = 5.0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=2) if change == "lose" else None
    ray.init(address=cluster.address)
    threading.Thread(target=change_the_cluster, args=(change, node), daemon=True).start()
    result = train.run(load_config(TrainConfig, flags=settings))
    kept = [each.iteration for each in checkpoints.list_checkpoints(settings["output"])]
    with open(sys.argv[2], "w") as file:
        json.dump(result | {"kept": kept}, file)
    ray.shutdown()
    cluster.shutdown()
""")


def train_while(change: str, folder: Path, *, iterations: int) -> tuple[dict[str, Any], str]:
    """The result of a training during which the cluster changes, with the iterations of its checkpoints; its output."""
    world = write_pictures(folder / "world")
    shard.run(ShardConfig(images=str(world / "images"), annotations=str(world / "annotations.json"),
                          output=str(world / "shards"), images_per_shard=4, tracking=NO_TRACKING))
    network = {"num_stages": 1, "input_size_wh": [64, 64], "blocks": [1, 1, 1, 1], "widths": [4, 4, 4, 4],
               "stem_channels": 4, "upsample_channels": 8}
    settings = {"data": str(world / "shards"), "output": str(folder / "model"), "workers": "1:2", "threads": 1,
                "validate_every": EVERY, "keep_checkpoints": 100, "network": network, "tracking": {"enabled": False},
                "optimiser": {"iterations": iterations, "warmup_iterations": 1, "batch_size_per_worker": BATCH}}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(settings), str(folder / "result.json"), change], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    return json.loads((folder / "result.json").read_text()), done.stdout


def test_a_machine_that_is_taken_away_costs_no_more_than_the_warning_left_and_the_rest_goes_on(tmp_path: Path) -> None:
    result, said = train_while("lose", tmp_path, iterations=3000)
    between = [iteration for iteration in result["kept"] if iteration % EVERY]
    assert len(between) == 1
    assert f"will be taken away: a checkpoint is kept after iteration {between[0]}" in said
    assert f"going on after iteration {between[0]}" in said
    assert result["iterations"] == 3000


def test_a_machine_that_comes_is_trained_on(tmp_path: Path) -> None:
    result, said = train_while("grow", tmp_path, iterations=2500)
    assert "going on after iteration" in said
    assert result["iterations"] == 2500
    assert 2500 * BATCH < result["samples"] < 2 * 2500 * BATCH  # some iterations had one worker, some had two
