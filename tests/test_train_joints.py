"""Other joints than COCO's through all jobs: learnt from nothing, and begun from a model with COCO's."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import annotate, evaluate, shard, train
from jobs.demo import SHIPPED_MODEL
from pipeline.config import AnnotateConfig, EvaluateConfig, ShardConfig, TrainConfig, load_config
from pipeline.keypoints import read_keypoints
from pipeline.model.directory import load_model
from pipeline.model.joint_sets import joint_channels
from pipeline.rows import joint_columns
from tests.worlds import NO_TRACKING, write_pictures, write_tiny_model

pytestmark = pytest.mark.usefixtures("without_ray", "local_ray")  # but for training

JOBS = Path(train.__file__).parent
# the first iteration is the last, and its rate is 0: weights stay, but for the statistics of batch norms
NO_STEP = {"iterations": 1, "warmup_iterations": 0, "batch_size_per_worker": 4}
FIVE = {"head top": "nose", "left_wrist": "left_wrist", "right_wrist": "right_wrist", "right_ankle": "right_ankle",
        "left_ankle": "left_ankle"}


def sharded(images: Path, annotations: Path, output: Path, **settings: Any) -> str:
    shard.run(ShardConfig(images=str(images), annotations=str(annotations), output=str(output), tracking=NO_TRACKING,
                          **settings))
    return str(output)


def trained(data: str, output: Path, *files: str, **settings: Any) -> TrainConfig:
    config = load_config(TrainConfig, files=[str(JOBS / name) for name in files], flags={
        "data": data, "val": data, "output": str(output), "tracking": NO_TRACKING.model_dump(), **settings})
    train.run(config)
    return config


def annotated(data: str, model: Path, output: Path, annotations: Path) -> dict[str, Any]:
    """What `evaluate` says of the keypoints that `annotate` gives."""
    annotate.run(AnnotateConfig(input=data, model=str(model), output=str(output), precision="float32", backend="cpu",
                                threads=1, tracking=NO_TRACKING))
    return evaluate.run(EvaluateConfig(keypoints=str(output), annotations=str(annotations), tracking=NO_TRACKING))


def with_five_joints(annotations: Path) -> Path:
    """The annotations with five of their joints, in another order, one under a name of its own."""
    coco = json.loads(annotations.read_text())
    [category] = coco["categories"]
    indices = [category["keypoints"].index(name) for name in FIVE.values()]
    category |= {"keypoints": list(FIVE), "skeleton": []}
    for each in coco["annotations"]:
        flat = each["keypoints"]
        each["keypoints"] = [value for index in indices for value in flat[3 * index:3 * index + 3]]
        each["num_keypoints"] = sum(visible > 0 for visible in each["keypoints"][2::3])
    annotations.write_text(json.dumps(coco))
    return annotations


def assert_trunk_kept(before: Path, after: Path) -> None:
    """All weights that don't follow the joints are the same bits, and so is a joint's head that both have."""
    (known, old), (network, new) = load_model(before), load_model(after)
    joints = [(old.skeleton["joints"].index(name), index) for index, name in enumerate(new.skeleton["joints"])
              if name in old.skeleton["joints"]]
    of_joints, weights = joint_channels(network.config), dict(known.named_parameters())
    assert len(of_joints) < len(weights)
    for name, weight in network.named_parameters():
        if name not in of_joints:
            assert torch.equal(weight, weights[name]), name
            continue
        for theirs, ours in joints:
            assert torch.equal(weight.select(of_joints[name], ours), weights[name].select(of_joints[name], theirs))


def wait_for(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Workers' lines come a moment later."""
    seen, until = "", time.monotonic() + 30
    while text not in seen:
        assert time.monotonic() < until, seen
        seen += "".join(capfd.readouterr())
        time.sleep(0.2)


@pytest.mark.slow
def test_joints_of_ones_own_are_begun_from_a_coco_model_validated_and_annotated(
        tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world = write_pictures(tmp_path / "world", count=6)
    annotations = with_five_joints(world / "annotations.json")
    data, model = sharded(world / "images", annotations, tmp_path / "shards"), write_tiny_model(tmp_path / "coco17")
    trained(data, tmp_path / "model", workers=1, threads=1, init=str(model), optimiser=NO_STEP)

    wait_for(f"init {model} has other joints: those that are new begin untrained: head top", capfd)
    assert_trunk_kept(model, tmp_path / "model")
    numbers = annotated(data, tmp_path / "model", tmp_path / "keypoints", annotations)
    spec = load_model(tmp_path / "model")[1]
    assert spec.skeleton["joints"] == list(FIVE)
    assert spec.source["evaluation"] == {name: numbers[name] for name in spec.source["evaluation"]}
    assert "ap" in spec.source["evaluation"]
    assert (numbers["pck"], "no left_shoulder" in numbers["pck_reason"]) == (None, True)
    columns = read_keypoints(str(tmp_path / "keypoints"))[0].column_names
    assert columns[17:-1] == [f"{joint}_{value}" for joint in ("head_top", *list(FIVE)[1:])
                              for value in ("x", "y", "score")]


@pytest.fixture(scope="module")
def lspet(shared: Path, tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> tuple[str, Path]:
    """A shard dataset of 48 athletes with their own 14 joints, and the annotation file."""
    folder, data = tmp_path_factory.mktemp("lspet"), shared / "data" / "lspet14"
    annotations = data / "annotations" / "person_keypoints_train.json"
    return sharded(data / "images", annotations, folder / "shards", annotated_only=True, limit=48,
                   images_per_shard=24), annotations


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.timeout(1200)
def test_the_14_joints_of_lspet_are_learnt_by_heart(lspet: tuple[str, Path], tmp_path: Path) -> None:
    data, annotations = lspet
    optimiser = {"iterations": 100, "warmup_iterations": 20, "batch_size_per_worker": 16,
                 "learning_rate_per_worker": 0.003}
    trained(data, tmp_path / "model", "demo.yaml", optimiser=optimiser, augmentation={"enabled": False})
    numbers = annotated(data, tmp_path / "model", tmp_path / "keypoints", annotations)

    table, metadata = read_keypoints(str(tmp_path / "keypoints"))
    skeleton = metadata.skeleton
    assert (skeleton.num_joints, skeleton.joints[-2:]) == (14, ("neck", "head_top"))
    assert table.column_names[17:-1] == joint_columns(skeleton)
    assert numbers["counts"]["persons"] == numbers["counts"]["predictions"] == 48
    assert numbers["pck"] > 0.8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_shipped_models_trunk_and_its_12_joints_of_lspets_14_are_what_training_begins_with(
        lspet: tuple[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, _ = lspet
    trained(data, tmp_path / "model", workers=1, init=str(SHIPPED_MODEL), optimiser=NO_STEP)
    wait_for(f"init {SHIPPED_MODEL} has other joints: those that are new begin untrained: neck, head_top", capfd)
    assert_trunk_kept(SHIPPED_MODEL, tmp_path / "model")
    assert load_model(tmp_path / "model")[1].skeleton["joints"][-2:] == ["neck", "head_top"]
