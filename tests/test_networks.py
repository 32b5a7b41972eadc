"""What training, inference and files do with every network alike, without knowing which one it is."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline import training
from pipeline.model import inference
from pipeline.model.architectures import NETWORKS, make_network
from pipeline.model.directory import ModelSpec, load_model, read_spec, save_model
from pipeline.model.joint_sets import joint_channels, with_joints
from pipeline.model.network import PoseNetwork
from pipeline.model.recompute import recompute_activations
from pipeline.model.settings import ARCHITECTURES, GaussianLoss
from pipeline.model.sync_batch_norm import SynchronisedBatchNorm2d, synchronise_batch_norms
from pipeline.pose.skeleton import COCO17, Skeleton
from pipeline.prediction import Predictor
from tests.networks import drawn

SMALL: dict[str, dict[str, Any]] = {
    "mspn": {"blocks": (1, 1, 1, 1), "widths": (4, 4, 8, 8), "stem_channels": 4, "upsample_channels": 8},
    "rsn": {"num_stages": 1, "blocks": (1, 1, 1, 1), "widths": (8, 8, 8, 8), "stem_channels": 8,
            "upsample_channels": 8},
    "hrnet": {"width": 4, "modules": (1, 1, 1), "blocks": 1, "bottlenecks": 1, "stem_channels": 4},
    "hourglass": {"width": 8},
}
IMAGES_WH = (64, 64)
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("name", sorted(SMALL))]


def small(name: str, *, num_joints: int = 17) -> PoseNetwork:
    torch.manual_seed(0)
    config = NETWORKS[name].config(num_joints=num_joints, input_size_wh=IMAGES_WH, **SMALL[name])
    return drawn(make_network(config))


def spec_of(network: PoseNetwork) -> ModelSpec:
    return ModelSpec(network=network.config, skeleton=COCO17.to_json())


def batch(persons: int = 4) -> training.TrainingBatch:
    generator = torch.Generator().manual_seed(3)
    return training.TrainingBatch(
        torch.randint(0, 256, (persons, *IMAGES_WH[::-1], 3), dtype=torch.uint8, generator=generator),
        torch.rand((persons, 17, 2), generator=generator) * 63, torch.full((persons, 17), 2, dtype=torch.int8),
        torch.arange(persons))


def test_every_architecture_is_tried_here(name: str) -> None:
    assert set(SMALL) == set(NETWORKS) == set(ARCHITECTURES)
    assert isinstance(small(name).config, ARCHITECTURES[name].settings)


def test_its_heads_are_what_gives_the_heatmaps(name: str) -> None:
    network, given = small(name), {}
    for stage in network.heads:
        for head in stage:
            network.get_submodule(head).register_forward_hook(
                lambda _, __, answer, head=head: given.setdefault(head, answer))
    with torch.inference_mode():
        heatmaps = network(torch.randn(2, 3, 64, 64))
    assert [len(stage) for stage in heatmaps] == [len(stage) for stage in network.heads]
    assert torch.equal(given[network.heads[-1][-1]], heatmaps[-1][-1])
    for stage, names in zip(heatmaps, network.heads, strict=True):
        for head, module in zip(stage, names, strict=True):
            assert head.shape == (2, 17, 16, 16)
            assert given[module].shape[1] == 17


def test_a_picture_is_answered_alike_in_any_company(name: str) -> None:
    network, images = small(name).double(), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        together = network.predict(images)
        for index in range(3):
            torch.testing.assert_close(network.predict(images[index:index + 1])[0], together[index])


def test_folded_batch_norms_change_nothing_but_rounding(name: str) -> None:
    network, images = small(name).double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    folded = inference.fold_batch_norms(network)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert norms == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) - len(
        list(network.foldable()))
    with torch.inference_mode():
        torch.testing.assert_close(folded.predict(images), network.predict(images), rtol=1e-9, atol=1e-9)


def test_in_bfloat16_only_the_last_head_stays_exact(name: str) -> None:
    network = small(name)
    fast = inference.fast_heatmaps(network, "cpu", "bfloat16", batch_size=2, threads=None)
    with torch.inference_mode():
        exact, rounded = network.predict(images := torch.randn(2, 3, 64, 64)), fast(images)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    assert len(rounded.unique()) > 0.9 * rounded.numel()  # bfloat16 itself has 256 values for each power of two


def test_recomputed_activations_change_no_gradient(name: str) -> None:
    network = small(name).train()
    other = copy.deepcopy(network)
    recompute_activations(other)
    assert list(other.recomputed())
    for each in (network, other):
        torch.manual_seed(1)
        sum(head.square().mean() for stage in each(torch.randn(2, 3, 64, 64)) for head in stage).backward()
    for (key, plain), again in zip(network.named_parameters(), other.parameters(), strict=True):
        assert (plain.grad is None) == (again.grad is None), key
        assert plain.grad is None or torch.equal(plain.grad, again.grad), key
    assert all(torch.equal(*pair) for pair in zip(network.buffers(), other.buffers(), strict=True))


def test_all_batch_norms_are_synchronised(name: str) -> None:
    network = small(name)
    norms = [key for key, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    synchronise_batch_norms(network)
    assert norms == [key for key, module in network.named_modules() if isinstance(module, SynchronisedBatchNorm2d)]


def test_every_weight_that_wants_a_gradient_gets_one(name: str) -> None:
    """Workers that average gradients wait for each."""
    network = small(name).train()
    sum(head.sum() for stage in network(torch.randn(2, 3, 64, 64)) for head in stage).backward()
    assert not [key for key, weight in network.named_parameters() if weight.requires_grad and weight.grad is None]


def test_it_learns_a_batch_with_its_own_loss(name: str) -> None:
    network = small(name).train()
    spec, optimiser = spec_of(network), training.make_optimiser(network, weight_decay=0.0)
    if spec.loss.kind == "coarse-to-fine":  # whose targets reach 255: far for 40 steps
        training.scale_heatmaps(network, 32.0)
    losses = [float(training.train_step(network, optimiser, batch(), iteration=iteration, rate=1e-2, spec=spec).loss)
              for iteration in range(1, 41)]
    assert losses[-1] < 0.8 * losses[0]


def test_its_directory_gives_back_network_and_specification(name: str, tmp_path: Path) -> None:
    network = small(name)
    spec = spec_of(network)
    save_model(tmp_path / "model", network, spec)
    loaded, read = load_model(tmp_path / "model")
    assert (type(loaded), read) == (type(network), spec)
    assert read_spec(tmp_path / "model").architecture == name
    with torch.inference_mode():
        assert torch.equal(loaded.predict(images := torch.randn(1, 3, 64, 64)), network.predict(images))


@pytest.mark.parametrize("backend", ["plain", "cpu", pytest.param("openvino", marks=pytest.mark.slow)])
def test_every_backend_gives_the_same_joints(name: str, backend: str, tmp_path: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="the optional package openvino is not installed")
    network = small(name)
    crops = batch(3).crops.numpy()
    exact, _ = Predictor((network, spec_of(network)), backend="plain").predict_crops(crops)
    found, scores = Predictor((network, spec_of(network)), backend=backend).predict_crops(crops)
    assert scores.shape == (3, 17)
    assert (abs(found - exact).max(axis=-1) < 0.5).mean() > 0.95


def test_another_joint_set_keeps_what_is_known_of_each_joint(name: str) -> None:
    network = small(name)
    few = Skeleton.from_json(COCO17.to_json() | {
        "name": "few", "joints": ["right_wrist", "antler", "nose"], "edges": [], "flip_pairs": [],
        "sigmas": [0.1, 0.1, 0.1], "upper_body": [0, 2]})
    other, spec, new = with_joints(network, spec_of(network), few)
    assert (new, spec.network.num_joints) == (["antler"], 3)
    changed = joint_channels(network.config)
    assert {key for key, tensor in network.state_dict().items()
            if tensor.shape != other.state_dict()[key].shape} == set(changed)
    for key, dimension in changed.items():
        own, known = other.state_dict()[key], network.state_dict()[key]
        assert torch.equal(own.select(dimension, 0), known.select(dimension, COCO17.joints.index("right_wrist"))), key
        assert torch.equal(own.select(dimension, 2), known.select(dimension, 0)), key


def test_untrained_heatmaps_can_be_larger(name: str) -> None:
    network, images = small(name), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = [head.std() for stage in network(images)[:1] for head in stage]
        training.scale_heatmaps(network, 8.0)
        after = [head.std() for stage in network(images)[:1] for head in stage]
    assert [float(large / little) for large, little in zip(after, before, strict=True)] == pytest.approx(
        [8.0] * len(after), rel=1e-3)


def test_a_gaussian_can_teach_every_network(name: str) -> None:
    network = small(name).train()
    spec = ModelSpec(network=network.config, skeleton=COCO17.to_json(), loss=GaussianLoss())
    report = training.train_step(network, training.make_optimiser(network, weight_decay=0.0), batch(), iteration=1,
                                 rate=1e-3, spec=spec)
    assert report.heads.shape == (len(network.heads), len(network.heads[0]))
    assert float(report.loss) == pytest.approx(float(report.heads.sum()), rel=1e-5)
