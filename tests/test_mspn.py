"""The network, held against the authors' answers for the same weights (tests/golden/README.md) and counts."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError, DataError
from pipeline.model.mspn import MSPN, ConvBNReLU, MSPNConfig, load_trunk
from tests.published import GOLDEN, made_images, made_weights, published_keys

TINY = {"blocks": (2, 1, 1, 2), "widths": (4, 4, 8, 8), "stem_channels": 8, "upsample_channels": 12}


@pytest.fixture(autouse=True)
def _one_thread() -> None:  # tiny layers wait for each other where cores are shared
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "mspn.npz") as archive:
        return dict(archive)


def on_meta(num_stages: int, *, num_joints: int = 17) -> MSPN:
    with torch.device("meta"):
        return MSPN(MSPNConfig(num_joints=num_joints, num_stages=num_stages))


def tiny(num_stages: int = 2, *, num_joints: int = 5) -> MSPN:
    torch.manual_seed(0)
    return MSPN(MSPNConfig(num_joints=num_joints, num_stages=num_stages, **TINY)).eval()


@pytest.mark.parametrize("num_stages", [1, 2])
def test_names_and_shapes_are_the_authors_in_their_order(num_stages: int) -> None:
    ours = [(name, list(tensor.shape)) for name, tensor in on_meta(num_stages).state_dict().items()]
    assert ours == published_keys("official", num_stages)


# counted on the authors' networks
@pytest.mark.parametrize(("num_stages", "num_joints", "num_keys", "num_parameters"), [
    (1, 17, 476, 25_141_708), (2, 17, 1008, 56_867_032), (3, 17, 1540, 88_592_356), (4, 17, 2072, 120_317_680),
    (2, 16, 1008, 56_848_576), (4, 16, 2072, 120_280_768),
])
def test_sizes_are_the_authors(num_stages: int, num_joints: int, num_keys: int, num_parameters: int) -> None:
    network = on_meta(num_stages, num_joints=num_joints)
    assert len(network.state_dict()) == num_keys
    assert sum(parameter.numel() for parameter in network.parameters()) == num_parameters


@pytest.mark.parametrize("num_stages", [1, 2])
def test_the_same_weights_give_the_authors_heatmaps(golden: dict[str, np.ndarray], num_stages: int) -> None:
    expected = {name.removeprefix(f"official_s{num_stages}_"): value for name, value in golden.items()}
    network = on_meta(num_stages).eval()
    weights = made_weights(published_keys("official", num_stages), 1000 + num_stages)
    network.load_state_dict(weights, assign=True)
    images = made_images(2000 + num_stages)
    with torch.inference_mode():
        single = network.predict(images)
        heads = torch.stack([torch.stack(stage) for stage in network.double()(images.double())])
    largest = np.abs(expected["final_sample"]).max()
    samples = heads.flatten(2)[..., ::997].numpy()
    assert np.abs(single.flatten()[::97].numpy() - expected["final_sample"]).max() < 1e-5 * largest
    assert np.abs(samples - expected["heads_sample"]).max() < 1e-9 * largest
    assert np.abs(heads.flatten(2).mean(2).flatten().numpy() - expected["heads_mean"]).max() < 1e-9 * largest
    assert np.abs(heads.flatten(2).std(2).flatten().numpy() - expected["heads_std"]).max() < 1e-9 * largest


@pytest.mark.parametrize("num_stages", [1, 3])
def test_prediction_computes_one_head_and_training_all(num_stages: int) -> None:
    network, calls = tiny(num_stages), []
    heads = [module for name, module in network.named_modules() if name.endswith(("res_conv1", "res_conv2"))]
    for head in heads:
        head.register_forward_hook(lambda module, *_: calls.append(module))
    network.predict(torch.zeros(1, 3, 64, 32))
    assert calls == list(network.stages[-1].upsample.up4.children())[-2:]
    calls.clear()
    network(torch.zeros(1, 3, 64, 32))
    assert len(calls) == len(heads) == 8 * num_stages


# GMAC at 256x192, counted on the authors' networks; unused heads cost 427.2 MMAC a stage, 321.7 of them the finest
@pytest.mark.parametrize(("num_stages", "gmacs"), [(1, 5.073), (2, 11.263), (3, 17.453), (4, 23.643)])
def test_work_is_the_authors_and_prediction_spares_the_other_heads(num_stages: int, gmacs: float) -> None:
    network = on_meta(num_stages)
    spared = (427.2 * num_stages - 321.7) / 1000
    assert gmacs_of(network, network) == pytest.approx(gmacs, abs=1e-3)
    assert gmacs_of(network, network.predict) == pytest.approx(gmacs - spared, abs=1e-3)


def gmacs_of(network: MSPN, function: Callable[[Tensor], object]) -> float:
    """10⁹ multiplications of all convolutions, for one image of 256×192."""
    counts = []
    hooks = [conv.register_forward_hook(lambda conv, _, out: counts.append(out.numel() * conv.weight[0].numel()))
             for conv in network.modules() if isinstance(conv, nn.Conv2d)]
    function(torch.empty(1, 3, 256, 192, device="meta"))
    for hook in hooks:
        hook.remove()
    return sum(counts) / 1e9


def test_prediction_is_the_last_and_finest_of_all_heatmaps() -> None:
    network, images = tiny(3), torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        assert torch.equal(network.predict(images), network(images)[-1][-1])


@pytest.mark.parametrize(("size_wh", "num_joints"), [((32, 32), 1), ((32, 64), 21), ((96, 160), 16), ((288, 384), 2)])
def test_any_size_of_multiples_of_32_and_any_joints_work(size_wh: tuple[int, int], num_joints: int) -> None:
    width, height = size_wh
    with torch.inference_mode():
        heatmaps = tiny(num_joints=num_joints)(torch.zeros(1, 3, height, width))
    shapes = {tuple(heatmap.shape) for stage in heatmaps for heatmap in stage}
    assert [len(stage) for stage in heatmaps] == [4, 4]
    assert shapes == {(1, num_joints, height // 4, width // 4)}


def test_every_parameter_of_a_training_step_gets_a_gradient() -> None:
    network = tiny(2).train()
    sum(heatmap.square().sum() for stage in network(torch.randn(2, 3, 64, 64)) for heatmap in stage).backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


def test_a_side_that_cannot_be_halved_five_times_is_refused_with_the_nearest_that_can() -> None:
    with pytest.raises(ConfigError, match=r"multiples of 32.*nearest: \(192, 256\)"):
        MSPNConfig(num_joints=17, input_size_wh=(200, 250))


@pytest.mark.parametrize("wrong", [{"stages": 2}, {"num_stages": 0}, {"blocks": (3, 4, 6)}, {"widths": (1, 2, 3, 0)}])
def test_a_setting_that_is_unknown_or_out_of_range_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MSPNConfig(num_joints=17, **wrong)


def test_a_new_network_is_drawn_as_the_authors_draw() -> None:
    torch.manual_seed(0)
    network = MSPN(MSPNConfig(num_joints=17, num_stages=1))
    trunk, head = network.stages[0].downsample.layer4[1].conv_bn_relu2, network.stages[0].upsample.up4.res_conv1
    # normal with variance 2 / (k² out) in the trunk; PyTorch's uniform, variance 1 / (3 in k²), elsewhere
    assert trunk.conv.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert trunk.conv.weight.abs().max() > 4 * trunk.conv.weight.std()
    assert head.conv.weight.std().item() == pytest.approx((1 / (3 * 256)) ** 0.5, rel=0.01)
    assert network.top.conv.conv.weight.std().item() == pytest.approx((1 / (3 * 147)) ** 0.5, rel=0.03)
    for block in (trunk, head):
        bound = block.conv.weight[0].numel() ** -0.5
        assert 0.9 * bound < block.conv.bias.abs().max() <= bound
        assert torch.all(block.bn.weight == 1)
        assert torch.all(block.bn.bias == 0)


def test_the_same_seed_draws_the_same_network_and_another_one_another() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return MSPN(MSPNConfig(num_joints=3, **TINY)).stages[1].downsample.layer1[0].conv_bn_relu1.conv.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


# --- the trunk from an ImageNet classifier ----------------------------------------------------------------------


def resnet_weights() -> dict[str, Tensor]:
    """A ResNet of TINY's shape with torchvision's names, without batch norms' counters as old files are."""
    draws = torch.Generator().manual_seed(5)
    weights = {"fc.weight": torch.zeros(10, 32), "fc.bias": torch.zeros(10)}

    def add(conv: str, bn: str, shape: tuple[int, ...]) -> None:
        weights[f"{conv}.weight"] = torch.randn(shape, generator=draws) / np.sqrt(np.prod(shape[1:]))
        for name in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{bn}.{name}"] = torch.rand(shape[0], generator=draws) + 0.5

    add("conv1", "bn1", (8, 3, 7, 7))
    channels = 8
    for layer, (count, width) in enumerate(zip(TINY["blocks"], TINY["widths"], strict=True), start=1):
        for block in range(count):
            name = f"layer{layer}.{block}"
            add(f"{name}.conv1", f"{name}.bn1", (width, channels, 1, 1))
            add(f"{name}.conv2", f"{name}.bn2", (width, width, 3, 3))
            add(f"{name}.conv3", f"{name}.bn3", (4 * width, width, 1, 1))
            if block == 0:
                add(f"{name}.downsample.0", f"{name}.downsample.1", (4 * width, channels, 1, 1))
            channels = 4 * width
    return weights


def resnet_features(weights: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """The four layers' outputs of He et al.'s network, straight from torchvision's names."""
    def conv_bn(x: Tensor, conv: str, bn: str, *, stride: int = 1) -> Tensor:
        kernel = weights[f"{conv}.weight"]
        x = functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (weights[f"{bn}.{name}"] for name in names)
        return functional.batch_norm(x, mean, var, weight, bias)

    x = functional.max_pool2d(conv_bn(images, "conv1", "bn1", stride=2).relu(), 3, stride=2, padding=1)
    features = []
    for layer, count in enumerate(TINY["blocks"], start=1):
        for block in range(count):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            inner = conv_bn(x, f"{name}.conv1", f"{name}.bn1").relu()
            inner = conv_bn(inner, f"{name}.conv2", f"{name}.bn2", stride=stride).relu()
            inner = conv_bn(inner, f"{name}.conv3", f"{name}.bn3")
            if block == 0:
                x = conv_bn(x, f"{name}.downsample.0", f"{name}.downsample.1", stride=stride)
            x = (x + inner).relu()
        features.append(x)
    return features


@pytest.mark.parametrize("colour", ["BGR", "RGB"])
def test_every_stage_begins_as_the_resnet_whatever_the_channel_order(colour: str) -> None:
    network, weights, images_rgb = tiny(3), resnet_weights(), torch.randn(2, 3, 64, 64)
    load_trunk(network, weights, colour=colour)
    expected = resnet_features(weights, images_rgb)
    with torch.inference_mode():
        stem = network.top(images_rgb.flip(1) if colour == "BGR" else images_rgb)
        for stage in network.stages:
            for feature, answer in zip(stage.downsample(stem, None), expected, strict=True):
                torch.testing.assert_close(feature, answer, rtol=1e-5, atol=1e-5)
    blocks = [module for stage in network.stages for module in stage.downsample.modules()
              if isinstance(module, ConvBNReLU)]
    assert not any(block.conv.bias.any() for block in blocks)


def test_loading_a_trunk_leaves_heads_and_given_weights_alone() -> None:
    network, weights = tiny(), resnet_weights()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if ".upsample." in name}
    given = {name: tensor.clone() for name, tensor in weights.items()}
    load_trunk(network, weights)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(weights[name], tensor) for name, tensor in given.items())


def test_a_trunk_that_does_not_fit_is_refused_entry_by_entry_and_changes_nothing() -> None:
    network, weights = tiny(), resnet_weights()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    del weights["layer2.0.conv3.weight"]
    weights["layer9.0.conv1.weight"] = torch.zeros(1)
    weights["bn1.bias"] = torch.zeros(9)
    with pytest.raises(DataError) as refusal:
        load_trunk(network, weights)
    for part in ("1 missing: layer2.0.conv3.weight", "1 unexpected: layer9.0.conv1.weight",
                 "bn1.bias [9] instead of [8]"):
        assert part in str(refusal.value)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
