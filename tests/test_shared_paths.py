"""A local path is refused where a node of the cluster doesn't see what the driver sees there."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A head and a node in a mount namespace of its own, in which one folder is empty: another machine, as to that folder.
SCRIPT = textwrap.dedent("""
    import os, signal, subprocess, sys, time
    import ray
    from ray.cluster_utils import Cluster
    from jobs.start_ray import refuse_unshared
    from pipeline.errors import ConfigError

    shared, own = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {own} && exec {sys.executable} -m "
         f"ray.scripts.scripts start --address={cluster.address} --num-cpus=1 --block"],
        stdout=sys.stderr, start_new_session=True)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        while sum(one["Alive"] for one in ray.nodes()) < 2:
            assert node.poll() is None
            time.sleep(0.2)
        refuse_unshared(inputs=[shared], outputs=[shared, "s3://bucket/out"])
        for inputs, outputs in (([own], []), ([], [own])):
            try:
                refuse_unshared(inputs=inputs, outputs=outputs)
            except ConfigError as error:
                print(error)
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        ray.shutdown()
        cluster.shutdown()
""")


@pytest.mark.cluster
@pytest.mark.timeout(180)
@pytest.mark.skipif(shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"]).returncode != 0,
                    reason="needs mount namespaces (root)")
def test_a_folder_that_one_node_sees_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    for folder in (shared, own):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(b"picture")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(shared), str(own)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    refusals = done.stdout.splitlines()
    assert len(refusals) == 2
    assert f"{own}/a.jpg: a node of the cluster" in refusals[0]
    assert f"{own}/_probe-" in refusals[1]
    assert sorted(path.name for folder in (shared, own) for path in folder.iterdir()) == ["a.jpg", "a.jpg"]
