"""`--workers MIN:MAX` on a cluster that loses a machine: warned of it, training keeps a checkpoint, and goes on."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jobs import shard
from pipeline.config import ShardConfig
from tests.worlds import NO_TRACKING, write_pictures

ROOT = Path(__file__).parents[1]
ITERATIONS, EVERY = 3000, 1000

# A head with one CPU and a node with two: room for two workers. Once the first checkpoint is kept, Ray is told that the
# node will be taken away in 15 s, as autoscalers and spot handlers tell it; then it is killed.
SCRIPT = textwrap.dedent("""
    import json, sys, threading, time
    import ray
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from jobs import train
    from pipeline import checkpoints
    from pipeline.config import TrainConfig, load_config

    settings = json.loads(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address)

    def take_the_node_away():
        while not checkpoints.list_checkpoints(settings["output"]):
            time.sleep(0.1)
        deadline_ms = int((time.time() + 15) * 1000)
        GcsClient(address=cluster.address).drain_node(
            node.node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", deadline_ms)
        time.sleep(15)
        cluster.remove_node(node, allow_graceful=False)

    threading.Thread(target=take_the_node_away, daemon=True).start()
    result = train.run(load_config(TrainConfig, flags=settings))
    kept = [each.iteration for each in checkpoints.list_checkpoints(settings["output"])]
    with open(sys.argv[2], "w") as file:
        json.dump(result | {"kept": kept}, file)
    ray.shutdown()
    cluster.shutdown()
""")


@pytest.mark.cluster
@pytest.mark.endurance
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("without_ray")
def test_a_machine_that_is_taken_away_costs_no_more_than_the_warning_left_and_the_rest_goes_on(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "world")
    shard.run(ShardConfig(images=str(folder / "images"), annotations=str(folder / "annotations.json"),
                          output=str(folder / "shards"), images_per_shard=4, tracking=NO_TRACKING))
    network = {"num_stages": 1, "input_size_wh": [64, 64], "blocks": [1, 1, 1, 1], "widths": [4, 4, 4, 4],
               "stem_channels": 4, "upsample_channels": 8}
    settings = {"data": str(folder / "shards"), "output": str(tmp_path / "model"), "workers": "1:2", "threads": 1,
                "validate_every": EVERY, "keep_checkpoints": 100, "network": network, "tracking": {"enabled": False},
                "optimiser": {"iterations": ITERATIONS, "warmup_iterations": 1, "batch_size_per_worker": 4}}
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(settings), str(tmp_path / "result.json")], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    assert done.returncode == 0, done.stdout[-5000:]
    result = json.loads((tmp_path / "result.json").read_text())
    between = [iteration for iteration in result["kept"] if iteration % EVERY]
    assert len(between) == 1
    assert f"will be taken away: a checkpoint is kept after iteration {between[0]}" in done.stdout
    assert f"going on after iteration {between[0]}" in done.stdout
    assert result["iterations"] == ITERATIONS
