"""HRNet, held against the authors' answers for the same weights (tests/golden/README.md) and counts."""


import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError, DataError
from pipeline.model.hrnet import HighResolutionModule, HRNet, HRNetConfig, load_trunk
from tests.networks import assert_rounded, drawn, gmacs, keys_of
from tests.published import GOLDEN, made_images, made_weights, published_keys

TINY = {"width": 8, "modules": (1, 2, 1), "blocks": 1, "bottlenecks": 2, "stem_channels": 8}


@pytest.fixture(autouse=True)
def _one_thread() -> None:  # tiny layers wait for each other where cores are shared
    torch.set_num_threads(1)


def on_meta(width: int, *, num_joints: int = 17) -> HRNet:
    with torch.device("meta"):
        return HRNet(HRNetConfig(num_joints=num_joints, width=width))


def tiny(*, num_joints: int = 5) -> HRNet:
    return drawn(HRNet(HRNetConfig(num_joints=num_joints, **TINY)))


def test_names_and_shapes_are_the_authors_in_their_order() -> None:
    assert keys_of(on_meta(32)) == published_keys("hrnet_w32", 1)


# counted on the authors' networks; they publish 28.5 M and 63.6 M
@pytest.mark.parametrize(("width", "num_parameters", "work"), [(32, 28_536_113, 7.645), (48, 63_595_745, 15.692)])
def test_sizes_and_work_are_the_authors(width: int, num_parameters: int, work: float) -> None:
    network = on_meta(width)
    assert sum(parameter.numel() for parameter in network.parameters()) == num_parameters
    assert gmacs(network.predict, size_wh=(192, 256)) == pytest.approx(work, abs=1e-3)


def test_w48_has_the_names_of_w32_and_half_as_many_channels_again() -> None:
    assert [name for name, _ in keys_of(on_meta(48))] == [name for name, _ in published_keys("hrnet_w32", 1)]
    shapes = dict(keys_of(on_meta(48)))
    assert shapes["stage4.2.branches.3.3.conv2.weight"] == [384, 384, 3, 3]
    assert shapes["transition1.1.0.0.weight"] == [96, 256, 3, 3]
    assert shapes["final_layer.weight"] == [17, 48, 1, 1]


def test_the_same_weights_give_the_authors_heatmaps() -> None:
    with np.load(GOLDEN / "hrnet_w32.npz") as archive:
        expected = archive["final_sample"]
    network, images = on_meta(32).eval(), made_images(5033)
    network.load_state_dict(made_weights(published_keys("hrnet_w32", 1), 5032), assign=True)
    with torch.inference_mode():
        single = network.predict(images).flatten()[::29]
        [[exact]] = network.double()(images.double())
    assert np.abs(single.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    assert_rounded(exact.flatten()[::29], expected)


def test_prediction_is_what_training_sees() -> None:
    network, images = tiny(), torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        [[heatmaps]] = network(images)
        assert torch.equal(network.predict(images), heatmaps)


@pytest.mark.parametrize(("size_wh", "num_joints"), [((32, 32), 1), ((96, 160), 16), ((288, 384), 21)])
def test_any_size_of_multiples_of_32_and_any_joints_work(size_wh: tuple[int, int], num_joints: int) -> None:
    width, height = size_wh
    with torch.inference_mode():
        heatmaps = tiny(num_joints=num_joints).predict(torch.zeros(1, 3, height, width))
    assert heatmaps.shape == (1, num_joints, height // 4, width // 4)


def test_each_output_of_a_module_hears_from_every_branch() -> None:
    torch.manual_seed(0)
    module = HighResolutionModule([4, 8, 16], 1, num_outputs=3).eval()
    features = [torch.randn(1, 4 * 2 ** branch, 8 >> branch, 8 >> branch, requires_grad=True) for branch in range(3)]
    for output in module(features):
        gradients = torch.autograd.grad(output.sum(), features, retain_graph=True)
        assert all(gradient.any() for gradient in gradients)


def test_all_blocks_may_be_recomputed() -> None:
    # 4 bottlenecks; 1 × 2, 4 × 3 and 3 × 4 branches of 4 blocks
    blocks = list(on_meta(32).recomputed())
    assert len(blocks) == 4 + 4 * (2 + 12 + 12)
    assert {methods for _, methods in blocks} == {("forward",)}


def test_a_new_network_is_drawn_as_the_authors_draw() -> None:
    torch.manual_seed(0)
    network = HRNet(HRNetConfig(num_joints=17, modules=(1, 1, 1), blocks=1))
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(1e-3, rel=0.15), name  # the final layer has 544 weights
            assert module.weight.abs().max() > 2.5e-3, name  # normal, and not uniform
        if isinstance(module, nn.BatchNorm2d):
            assert torch.all(module.weight == 1), name
            assert torch.all(module.bias == 0), name
    assert not network.final_layer.bias.any()


def test_a_side_that_is_no_multiple_of_32_is_refused_with_the_nearest_that_is() -> None:
    with pytest.raises(ConfigError, match=r"HRNet.*multiples of 32.*nearest: \(192, 256\)"):
        HRNetConfig(num_joints=17, input_size_wh=(200, 250))


@pytest.mark.parametrize("wrong", [{"widths": 32}, {"width": 0}, {"modules": (1, 4)}, {"modules": (1, 0, 3)}])
def test_a_setting_that_is_unknown_or_out_of_range_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"HRNet.*{next(iter(wrong))}"):
        HRNetConfig(num_joints=17, **wrong)


def classifier() -> dict[str, torch.Tensor]:
    """An ImageNet classifier of the authors as its names say: heads of its own, and all outputs of the last module."""
    weights = {name: tensor for name, tensor in drawn(tiny(), seed=6).state_dict().items()
               if not name.startswith("final_layer.")}
    more = {f"stage4.0.fuse_layers.{target}.{source}.0.weight": torch.zeros(1) for target in (1, 2, 3)
            for source in range(4)}
    heads = {name: torch.zeros(1) for name in ("incre_modules.0.0.conv1.weight", "downsamp_modules.0.0.weight",
                                               "final_layer.0.weight", "classifier.weight")}
    return weights | more | heads


@pytest.mark.parametrize("colour", ["RGB", "BGR"])
def test_an_imagenet_classifier_begins_all_but_the_head(colour: str) -> None:
    network, weights = tiny(), classifier()
    head = network.final_layer.weight.clone()
    load_trunk(network, {name: tensor for name, tensor in weights.items() if "num_batches" not in name}, colour=colour)
    assert torch.equal(network.final_layer.weight, head)
    for name, tensor in network.state_dict().items():
        if name == "conv1.weight":
            assert torch.equal(tensor, weights[name].flip(1) if colour == "BGR" else weights[name])
        elif not name.startswith("final_layer."):
            assert torch.equal(tensor, weights[name]), name


def test_a_classifier_that_does_not_fit_is_refused_by_name() -> None:
    weights = classifier()
    del weights["stage3.1.branches.0.0.bn1.weight"]
    weights["stage9.weight"] = torch.zeros(1)
    with pytest.raises(DataError) as refusal:
        load_trunk(tiny(), weights)
    assert "1 missing: stage3.1.branches.0.0.bn1.weight; 1 unexpected: stage9.weight" in str(refusal.value)
