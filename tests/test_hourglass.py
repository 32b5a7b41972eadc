"""Stacked Hourglass, held against the authors' answers for the same weights (tests/golden/README.md) and counts."""


import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.model.hourglass import HourglassConfig, Residual, StackedHourglass
from pipeline.model.inference import fold_batch_norms
from tests.networks import assert_rounded, drawn, gmacs, keys_of
from tests.published import GOLDEN, made_weights, published_keys

TINY = {"width": 8, "depth": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> None:  # tiny layers wait for each other where cores are shared
    torch.set_num_threads(1)


def on_meta(num_stacks: int, *, num_joints: int = 16) -> StackedHourglass:
    with torch.device("meta"):
        return StackedHourglass(HourglassConfig(num_joints=num_joints, num_stacks=num_stacks))


def tiny(num_stacks: int = 2, *, num_joints: int = 5) -> StackedHourglass:
    return drawn(StackedHourglass(HourglassConfig(num_joints=num_joints, num_stacks=num_stacks, **TINY)))


def test_names_and_shapes_are_the_authors_in_their_order() -> None:
    assert keys_of(on_meta(2)) == published_keys("hourglass", 2)


# counted on the authors' networks
@pytest.mark.parametrize(("num_stacks", "num_parameters", "work"), [
    (1, 4_364_048, 5.150), (2, 8_429_088, 8.335), (8, 32_819_328, 27.440)])
def test_sizes_and_work_are_the_authors(num_stacks: int, num_parameters: int, work: float) -> None:
    network = on_meta(num_stacks)
    assert sum(parameter.numel() for parameter in network.parameters()) == num_parameters
    assert gmacs(network.predict, size_wh=(256, 256)) == pytest.approx(work, abs=1e-3)


def test_the_same_weights_give_the_authors_heatmaps_in_every_stack() -> None:
    with np.load(GOLDEN / "hourglass_s2.npz") as archive:
        expected = archive["final_sample"]
    # theirs takes [B, H, W, 3]
    images = torch.from_numpy(np.random.RandomState(6003).standard_normal((2, 256, 256, 3))).permute(0, 3, 1, 2)
    images = images.float()
    network = on_meta(2).eval()
    network.load_state_dict(made_weights(published_keys("hourglass", 2), 6002), assign=True)
    with torch.inference_mode():
        single, exact = (torch.stack([heatmaps for [heatmaps] in answer], dim=1).flatten()[::29]
                         for answer in (network(images), network.double()(images.double())))
    assert np.abs(single.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    assert_rounded(exact, expected)


@pytest.mark.parametrize("num_stacks", [1, 3])
def test_prediction_is_the_last_stack_of_what_training_sees(num_stacks: int) -> None:
    network, images = tiny(num_stacks), torch.randn(2, 3, 48, 32)
    with torch.inference_mode():
        stacks = network(images)
        assert [len(stack) for stack in stacks] == [1] * num_stacks
        assert torch.equal(network.predict(images), stacks[-1][0])


def test_a_network_of_fewer_stacks_is_the_beginning_of_a_longer_one() -> None:
    longer, shorter, images = tiny(3), tiny(2), torch.randn(1, 3, 32, 32)
    weights = longer.state_dict()
    shorter.load_state_dict({name: weights[name] for name in shorter.state_dict()})
    with torch.inference_mode():
        torch.testing.assert_close(shorter(images), longer(images)[:2])


@pytest.mark.parametrize(("depth", "size_wh"), [(1, (8, 24)), (2, (16, 48)), (4, (64, 64))])
def test_any_depth_and_any_size_of_its_multiples_work(depth: int, size_wh: tuple[int, int]) -> None:
    network = StackedHourglass(HourglassConfig(num_joints=3, width=6, depth=depth)).eval()
    width, height = size_wh
    with torch.inference_mode():
        assert network.predict(torch.zeros(1, 3, height, width)).shape == (1, 3, height // 4, width // 4)


def test_batch_norms_fold_into_the_convolution_before_them_where_there_is_one() -> None:
    network, images = tiny().double(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    plain = fold_batch_norms(network)
    # a residual's first reads a sum
    left = {name for name, module in plain.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert left == {f"{name}.bn1" for name, module in plain.named_modules() if isinstance(module, Residual)}
    with torch.inference_mode():
        torch.testing.assert_close(plain(images), network(images))


def test_all_residuals_may_be_recomputed() -> None:
    # 3 before the stacks; in each, 3 of each of 4 depths, 1 in the middle, 1 for the features
    blocks = list(on_meta(8).recomputed())
    assert len(blocks) == 3 + 8 * (4 * 3 + 1 + 1)
    assert {methods for _, methods in blocks} == {("forward",)}


def test_every_parameter_that_wants_a_gradient_gets_one_and_idle_ones_want_none() -> None:
    network = tiny(2).train()
    sum(heatmaps.square().sum() for [heatmaps] in network(torch.randn(2, 3, 32, 32))).backward()
    wanting = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    idle = {name for name, _ in network.named_parameters()} - wanting
    assert {name for name, parameter in network.named_parameters() if parameter.grad is not None} == wanting
    # only where a residual changes the number of channels does its projection work: 64 -> 128, and 128 -> width
    assert all(".skip_layer." in name for name in idle)
    assert {name for name in wanting if ".skip_layer." in name} == {
        f"pre.{index}.skip_layer.conv.{kind}" for index in (1, 4) for kind in ("weight", "bias")}


def test_a_new_network_is_drawn_with_pytorchs_defaults() -> None:
    torch.manual_seed(0)
    network = StackedHourglass(HourglassConfig(num_joints=16, num_stacks=1, depth=1))
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):  # uniform up to the fan-in's root
            bound = module.weight[0].numel() ** -0.5
            assert 0.98 * bound < module.weight.abs().max() <= bound, name
            assert 0.7 * bound < module.bias.abs().max() <= bound, name
        if isinstance(module, nn.BatchNorm2d):
            assert torch.all(module.weight == 1), name
            assert torch.all(module.bias == 0), name


@pytest.mark.parametrize(("depth", "multiple", "nearest"), [(4, 64, r"\(192, 256\)"), (2, 16, r"\(208, 256\)")])
def test_a_side_that_does_not_halve_often_enough_is_refused_with_the_nearest(
        depth: int, multiple: int, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"Hourglass.*multiples of {multiple}.*nearest: {nearest}"):
        HourglassConfig(num_joints=16, depth=depth, input_size_wh=(203, 250))


@pytest.mark.parametrize("wrong", [{"stacks": 2}, {"num_stacks": 0}, {"width": 1}, {"depth": 0}])
def test_a_setting_that_is_unknown_or_out_of_range_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"Hourglass.*{next(iter(wrong))}"):
        HourglassConfig(num_joints=16, **wrong)
