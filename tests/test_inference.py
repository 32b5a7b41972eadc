"""The fast ways to compute heatmaps: the network as it was loaded is what they are compared with."""

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.model import inference
from pipeline.model.directory import ModelSpec
from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.pose.skeleton import COCO17
from pipeline.prediction import Predictor

CONFIG = MSPNConfig(num_joints=17, num_stages=2, input_size_wh=(64, 64), blocks=(1, 1, 1, 1), widths=(8, 8, 8, 8),
                    stem_channels=8, upsample_channels=16)
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network() -> MSPN:
    """A small network whose batch norms have seen something, so that folding them is no empty act."""
    torch.manual_seed(0)
    network = MSPN(CONFIG)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            module.running_mean = torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
    return network.eval()


def plain(network: MSPN) -> torch.Tensor:
    with torch.inference_mode():
        return inference.plain_heatmaps(network, "float32")(IMAGES)


def fast(network: MSPN, backend: str, precision: str = "float32", batch_size: int = 4) -> torch.Tensor:
    with torch.inference_mode():
        return inference.fast_heatmaps(network, backend, precision, batch_size=batch_size, threads=1)(IMAGES)


def test_folded_batch_norms_change_rounding_alone(network: MSPN) -> None:
    expected = plain(network)
    assert (fast(network, "cpu") - expected).abs().max() < 1e-5 * expected.abs().max()


def test_folding_leaves_the_network_as_it_was(network: MSPN) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = inference.fold_batch_norms(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_bfloat16_keeps_float32_heatmaps_whose_values_do_not_tie(network: MSPN) -> None:
    expected, found = plain(network), fast(network, "cpu", "bfloat16")
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()
    # bfloat16 itself could tell 256 values between 128 and 255 apart, and would give neighbours the same one
    assert len(found.unique()) > 0.9 * found.numel()


@pytest.mark.skipif(not inference.has_openvino(), reason="needs the optional package openvino")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_openvino_gives_the_same_heatmaps_however_three_crops_are_cut_and_filled_up(
        network: MSPN, precision: str, tolerance: float, batch_size: int) -> None:
    expected, found = plain(network), fast(network, "openvino", precision, batch_size)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.skipif(not inference.has_openvino(), reason="needs the optional package openvino")
def test_openvino_tells_nobody_that_it_is_used(network: MSPN) -> None:
    fast(network, "openvino")
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_heatmaps_twice_also_of_a_batch_that_is_not_full(network: MSPN) -> None:
    with torch.inference_mode():
        heatmaps = inference.fast_heatmaps(network, "cpu", "float32", batch_size=4, threads=1, compile_mode="default")
        found, flipped = heatmaps(IMAGES), heatmaps(IMAGES.flip(-1))
    expected = plain(network)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not torch.equal(found, flipped)


def test_a_machine_without_a_compiler_is_named_before_the_first_picture(
        network: MSPN, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "why_not_compile", lambda: "there is no C++ compiler: install g++")
    with pytest.raises(ConfigError, match="compile=default needs a compiler"):
        inference.fast_heatmaps(network, "cpu", "float32", batch_size=4, threads=1, compile_mode="default")


@pytest.mark.gpu
@pytest.mark.parametrize("compile_mode", [None, "default", "reduce-overhead"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-2), ("bfloat16", 0.03)])
def test_a_gpu_gives_the_same_heatmaps(
        network: MSPN, precision: str, tolerance: float, compile_mode: str | None) -> None:
    with torch.inference_mode():
        heatmaps = inference.fast_heatmaps(network, "cuda", precision, batch_size=4, threads=None,
                                           compile_mode=compile_mode)
        found = heatmaps(IMAGES.cuda())
        heatmaps(IMAGES.cuda().flip(-1))  # must not write over the first answer
    expected = plain(network)
    assert (found.cpu() - expected).abs().max() < tolerance * expected.abs().max()


def test_a_predictor_gives_the_same_joints_by_each_way(network: MSPN) -> None:
    spec = ModelSpec(network=CONFIG, skeleton=COCO17.to_json())
    crops = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    answers = [Predictor((network, spec), backend=backend, batch_size=2, threads=1).predict_crops(crops)
               for backend in ("plain", "cpu")]
    np.testing.assert_allclose(answers[1][0], answers[0][0], atol=1e-3)
    np.testing.assert_allclose(answers[1][1], answers[0][1], atol=1e-5)


def test_without_a_gpu_the_fastest_backend_is_openvino_or_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert inference.fast_backend() == ("openvino" if inference.has_openvino() else "cpu")
