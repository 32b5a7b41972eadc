"""RSN, held against the authors' answers for the same weights, against counts, and against MSPN."""

import numpy as np
import pytest
import torch

from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.model.rsn import RSN, ResidualSteps, RSNConfig
from tests.networks import assert_rounded, drawn, keys_of
from tests.published import GOLDEN, made_images, made_weights, published_keys

RSN_50 = (3, 4, 6, 3)


def on_meta(**settings: object) -> RSN:
    with torch.device("meta"):
        return RSN(RSNConfig(num_joints=17, **settings))


def test_names_and_shapes_are_the_authors_in_their_order() -> None:
    assert keys_of(on_meta()) == published_keys("rsn18", 1)


def test_the_same_weights_give_the_authors_heatmaps() -> None:
    with np.load(GOLDEN / "rsn18_s1.npz") as archive:
        expected = archive["final_sample"]
    network, images = on_meta().eval(), made_images(7019)
    network.load_state_dict(made_weights(published_keys("rsn18", 1), 7018), assign=True)
    with torch.inference_mode():
        single = network.predict(images).flatten()[::97]
        exact = network.double().predict(images.double())
    assert np.abs(single.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    assert_rounded(exact.flatten()[::97], expected)


def test_all_but_the_trunks_blocks_is_mspn() -> None:
    settings = {"num_joints": 17, "num_stages": 3, "blocks": RSN_50}
    with torch.device("meta"):
        ours, theirs = RSN(RSNConfig(**settings)), MSPN(MSPNConfig(**settings, widths=(16, 32, 64, 128)))
    beside = [(name, shape) for name, shape in keys_of(ours) if ".downsample.layer" not in name]
    assert beside == [(name, shape) for name, shape in keys_of(theirs) if ".downsample.layer" not in name]
    assert len(beside) == 7 * (1 + 3 * 15 + 2 * 9)  # stem; each stage's units; what two stages hand over


def test_a_block_is_what_the_paper_draws() -> None:
    block = drawn_block(64, 64)
    x = torch.randn(1, 64, 8, 8)
    with torch.inference_mode():
        one, two, three, four = block.conv_bn_relu1(x).split(26, dim=1)
        steps = {name: module for name, module in block.named_children() if name.startswith("conv_bn_relu2")}

        def step(row: int, column: int, *sums: torch.Tensor) -> torch.Tensor:
            return steps[f"conv_bn_relu2_{row}_{column}"](sum(sums[1:], sums[0].clone()))

        y11 = step(1, 1, one)
        y21 = step(2, 1, two, y11)
        y22 = step(2, 2, y21)
        y31 = step(3, 1, three, y21)
        y32 = step(3, 2, y31, y22)
        y33 = step(3, 3, y32)
        y41 = step(4, 1, four, y31)
        y42 = step(4, 2, y41, y32)
        y43 = step(4, 3, y42, y33)
        y44 = step(4, 4, y43)
        expected = torch.relu(block.conv_bn_relu3(torch.cat([y11, y22, y33, y44], dim=1)) + x)
        assert torch.equal(block(x), expected)


def drawn_block(in_channels: int, width: int) -> ResidualSteps:
    block = ResidualSteps(in_channels, width, stride=1, projects=True).eval()
    keys = [(name, list(tensor.shape)) for name, tensor in block.state_dict().items()]
    block.load_state_dict(made_weights(keys, 3))
    return block


@pytest.mark.parametrize(("in_channels", "width", "stride", "branch"), [(64, 64, 1, 26), (64, 128, 2, 26),
                                                                         (128, 128, 1, 52), (512, 512, 1, 208)])
def test_a_branchs_width_follows_what_its_block_takes(in_channels: int, width: int, stride: int, branch: int) -> None:
    block = ResidualSteps(in_channels, width, stride=stride, projects=True)
    assert block.conv_bn_relu1.conv.out_channels == 4 * branch
    assert (block.downsample is None) == (stride == 1)
    assert block(torch.randn(2, in_channels, 8, 8)).shape == (2, width, 8 // stride, 8 // stride)


def test_what_training_sees_ends_with_the_prediction() -> None:
    network, images = drawn(RSN(RSNConfig(num_joints=3, num_stages=2, widths=(4, 8, 8, 8), stem_channels=4,
                                          upsample_channels=4))), torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        heatmaps = network(images)
        assert [len(stage) for stage in heatmaps] == [4, 4]
        torch.testing.assert_close(network.predict(images), heatmaps[-1][-1])
