"""Published weight files: both layouts give the originals' answers, and no file is taken half or run."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.model.checkpoint import read_checkpoint
from pipeline.model.hourglass import HourglassConfig, StackedHourglass
from pipeline.model.hrnet import HRNet, HRNetConfig
from pipeline.model.layouts import mmpose_name
from pipeline.model.mspn import MSPNConfig
from pipeline.model.rsn import RSNConfig
from pipeline.model.settings import Decoding, GaussianLoss
from pipeline.pose.skeleton import COCO17, MPII16
from tests.networks import drawn
from tests.published import GOLDEN, Keys, made_images, made_weights, narrow, publish, published_keys

NARROW = {"widths": (8, 16, 32, 64), "stem_channels": 8, "upsample_channels": 32}


@pytest.fixture(autouse=True)
def _one_thread() -> None:  # tiny layers wait for each other where cores are shared
    torch.set_num_threads(1)


def official(*, num_stages: int = 1, joints: int = 17) -> dict[str, Tensor]:
    return made_weights(with_joints(narrow(published_keys("official", num_stages)), joints), 1)


def mmpose(*, num_stages: int = 1, joints: int = 17) -> dict[str, Tensor]:
    return made_weights(with_joints(narrow(published_keys("mmpose", num_stages)), joints), 2)


def with_joints(keys: Keys, joints: int) -> Keys:
    return [(name, [joints if size == 17 else size for size in shape]) for name, shape in keys]


def saved(folder: Path, content: Any, name: str = "iter-96000.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize("num_stages", [1, 2])
def test_names_translate_to_exactly_mmposes(num_stages: int) -> None:
    ours = [name for name, _ in published_keys("official", num_stages)]
    theirs = {name for name, _ in published_keys("mmpose", num_stages)}
    translated = [mmpose_name(name, head="keypoint_head") for name in ours]
    assert {name for name in translated if name} == theirs
    assert len([name for name in translated if name]) == len(theirs)
    assert all(name.endswith("conv.bias") for name, there in zip(ours, translated, strict=True) if there is None)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_mmposes_file_gives_mmposes_heatmaps(tmp_path: Path, num_stages: int) -> None:
    with np.load(GOLDEN / "mspn.npz") as archive:
        names = ("final_sample", "heads_mean", "heads_std")
        expected = {name: archive[f"mmpose_s{num_stages}_{name}"] for name in names}
    weights = made_weights(published_keys("mmpose", num_stages), 3000 + num_stages)
    network, _ = read_checkpoint(publish(tmp_path, {"meta": {"epoch": 210}, "state_dict": weights}))
    images = made_images(4000 + num_stages)
    with torch.inference_mode():
        single = network.predict(images)
        heads = torch.cat([torch.stack(stage) for stage in network.double()(images.double())]).flatten(1)
    largest = np.abs(expected["final_sample"]).max()
    assert np.abs(single.flatten()[::97].numpy() - expected["final_sample"]).max() < 1e-5 * largest
    assert np.abs(heads.mean(1).numpy() - expected["heads_mean"]).max() < 1e-9 * largest
    assert np.abs(heads.std(1).numpy() - expected["heads_std"]).max() < 1e-9 * largest


def test_the_authors_file_gives_their_way_of_cropping_and_decoding(tmp_path: Path) -> None:
    weights = official(num_stages=2)
    path = saved(tmp_path, {"model": weights, "optimizer": {"state": {}}, "scheduler": {}, "iteration": 96000})
    network, spec = read_checkpoint(path)
    assert spec.network == MSPNConfig(num_joints=17, num_stages=2, **NARROW)
    assert (spec.colour, spec.mean, spec.std) == ("BGR", (0.406, 0.456, 0.485), (0.225, 0.224, 0.229))
    assert (spec.box_padding_wh, spec.decoding) == ((1.09, 1.135), Decoding(variant="official", blur_kernel=5))
    assert spec.skeleton == COCO17.to_json()
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in weights.items())


def test_mmposes_file_gives_mmposes_way_of_cropping_and_decoding(tmp_path: Path) -> None:
    path = publish(tmp_path, {"meta": {"epoch": 210}, "state_dict": mmpose(num_stages=2)})
    network, spec = read_checkpoint(path)
    assert spec.network == MSPNConfig(num_joints=17, num_stages=2, **NARROW)
    assert (spec.colour, spec.mean, spec.std) == ("RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (spec.box_padding_wh, spec.decoding) == ((1.25, 1.25), Decoding(variant="mmpose", blur_kernel=5))
    assert spec.source["checkpoint"] == path.name
    assert spec.source["sha256"][:8] in path.name
    biases = [tensor for name, tensor in network.state_dict().items() if name.endswith("conv.bias")]
    assert biases
    assert not any(bias.any() for bias in biases)


def test_the_authors_mpii_network_has_their_other_crops_and_blur(tmp_path: Path) -> None:
    _, spec = read_checkpoint(saved(tmp_path, {"model": official(joints=16)}))
    assert spec.skeleton == MPII16.to_json()
    assert (spec.input_size_wh, spec.box_padding_wh, spec.decoding.blur_kernel) == ((256, 256), (1.25, 1.25), 9)


@pytest.mark.parametrize("wrapper", ["module.", "model.module."])
@pytest.mark.parametrize("around", [lambda weights: weights, lambda weights: {"state_dict": weights}])
def test_what_several_gpus_put_before_the_names_is_taken_off(tmp_path: Path, wrapper: str, around: Any) -> None:
    weights = official()
    path = saved(tmp_path, around({wrapper + name: tensor for name, tensor in weights.items()}))
    network, _ = read_checkpoint(path)
    assert torch.equal(network.state_dict()["top.conv.conv.weight"], weights["top.conv.conv.weight"])


def test_mmposes_newer_names_give_the_same_network(tmp_path: Path) -> None:
    old = mmpose()
    new = {name.replace("keypoint_head.", "head."): tensor for name, tensor in old.items()}
    new |= {"data_preprocessor.mean": torch.zeros(3, 1, 1), "data_preprocessor.std": torch.ones(3, 1, 1)}
    networks = [read_checkpoint(saved(tmp_path, {"state_dict": weights}))[0].state_dict() for weights in (old, new)]
    assert all(torch.equal(networks[1][name], tensor) for name, tensor in networks[0].items())


def test_a_file_of_an_old_torch_with_numpy_numbers_among_its_notes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    notes = {"epoch": 210, "config": "model = dict()", "hook_msgs": {"best_score": np.float64(0.723)}}
    torch.save({"meta": notes, "state_dict": mmpose()}, path, _use_new_zipfile_serialization=False)
    assert read_checkpoint(path)[1].network.num_stages == 1


@pytest.mark.parametrize(("weights", "names"), [
    (official(), ("top.conv.bn.weight", "stage0.upsample.up2.u_skip.conv.weight")),
    (mmpose(), ("backbone.top.top.0.bn.weight", "backbone.multi_stage_mspn.0.upsample.up2.in_skip.conv.weight")),
])
def test_every_entry_that_does_not_fit_is_listed_by_its_name_in_the_file(
        tmp_path: Path, weights: dict[str, Tensor], names: tuple[str, str]) -> None:
    gone, misshapen = names
    wrong = {name: tensor for name, tensor in weights.items() if name != gone}
    wrong |= {"something.else": torch.zeros(2), misshapen: torch.zeros(32, 1, 1, 1)}
    with pytest.raises(DataError) as refusal:
        read_checkpoint(saved(tmp_path, {"state_dict": wrong}))
    for part in (f"1 missing: {gone}", "1 unexpected: something.else", f"{misshapen} [32, 1, 1, 1] instead of"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("lost", ["stage0.upsample.up4.res_conv2", "top.conv", "stage0.downsample.layer1"])
def test_a_file_without_a_whole_part_is_refused(tmp_path: Path, lost: str) -> None:
    weights = {name: tensor for name, tensor in official().items() if not name.startswith(lost)}
    with pytest.raises(DataError, match=f"missing.*{lost}|{lost}.*missing"):
        read_checkpoint(saved(tmp_path, weights))


def test_a_file_that_is_no_checkpoint_is_refused_without_advice_to_run_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.pth").write_text('{"images": []}')
    with pytest.raises(DataError, match=r"notes\.pth: not a checkpoint") as refusal:
        read_checkpoint(tmp_path / "notes.pth")
    assert "weights_only" not in str(refusal.value)


def test_a_file_with_another_digest_than_its_name_says_is_refused(tmp_path: Path) -> None:
    path = publish(tmp_path, {"state_dict": mmpose()})
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"SHA-256 begins with [0-9a-f]{8}, but it begins with"):
        read_checkpoint(path)


class Runs:
    """A pickle of it calls a function when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "it-ran"
    torch.save({"meta": Runs(marker), "state_dict": mmpose()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=r"mkdir.*nothing of it was run"):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x02}q\x00.", b"PK\x03\x04 cut off"])
def test_bytes_that_are_no_checkpoint_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.pth"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": 1}}, {"weights": "none"}, torch.zeros(3), {}])
def test_a_file_without_the_state_dict_of_a_known_network_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(DataError, match="Give a checkpoint of"):
        read_checkpoint(saved(tmp_path, content))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.pth: the checkpoint can't be read"):
        read_checkpoint(tmp_path / "none.pth")


def test_joints_that_nobody_can_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"5 joints, which is neither COCO's 17 nor MPII's 16"):
        read_checkpoint(saved(tmp_path, {"model": official(joints=5)}))


# --- the networks that MSPN is compared with ----------------------------------------------------------------------


def narrowed(layout: str, number: int) -> dict[str, Tensor]:
    return made_weights(narrow(published_keys(layout, number)), 4)


def beside_official(weights: dict[str, Tensor], path: Path) -> None:
    """The file's network has exactly these weights under the authors' names."""
    found = read_checkpoint(path)[0].state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_rsns_file_is_told_from_mspns_and_is_used_like_it(tmp_path: Path) -> None:
    weights = made_weights(published_keys("rsn18", 1), 7018)
    path = saved(tmp_path, {"model": weights, "optimizer": {}, "scheduler": {}, "iteration": 96000})
    _, spec = read_checkpoint(path)
    assert spec.network == RSNConfig(num_joints=17)
    assert (spec.colour, spec.box_padding_wh, spec.decoding) == ("BGR", (1.09, 1.135), Decoding())
    beside_official(weights, path)


def test_hrnets_bare_state_dict_gives_its_way_of_cropping_and_decoding(tmp_path: Path) -> None:
    weights = made_weights(published_keys("hrnet_w32", 1), 1)
    path = saved(tmp_path, weights, "pose_hrnet_w32_256x192.pth")
    _, spec = read_checkpoint(path)
    assert spec.network == HRNetConfig(num_joints=17)
    assert (spec.colour, spec.mean, spec.box_padding_wh) == ("RGB", (0.485, 0.456, 0.406), (1.25, 1.25))
    assert (spec.decoding, spec.loss) == (Decoding(variant="hrnet", blur_kernel=1), GaussianLoss(sigma=2, weight=0.5))
    beside_official(weights, path)


def test_a_checkpoint_of_hrnets_own_training_is_read_in_spite_of_its_models_name(tmp_path: Path) -> None:
    weights = hrnet()
    content = {"epoch": 210, "model": "pose_hrnet", "perf": 0.744, "optimizer": {"state": {}},
               "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}, "best_state_dict": weights}
    beside_official(weights, saved(tmp_path, content, "checkpoint.pth"))


def hrnet(**settings: Any) -> dict[str, Tensor]:
    config = {"num_joints": 17, "width": 8, "modules": (1, 2, 1), "blocks": 2, "bottlenecks": 3, "stem_channels": 16}
    return drawn(HRNet(HRNetConfig(**config | settings))).state_dict()


def test_another_hrnets_sizes_are_seen_in_its_file(tmp_path: Path) -> None:
    _, spec = read_checkpoint(saved(tmp_path, hrnet(num_joints=16), "pose_hrnet_w8_256x256.pth"))
    assert spec.network == HRNetConfig(num_joints=16, input_size_wh=(256, 256), width=8, modules=(1, 2, 1), blocks=2,
                                       bottlenecks=3, stem_channels=16)
    assert spec.skeleton == MPII16.to_json()


@pytest.mark.parametrize(("name", "size_wh", "sigma", "radius"), [
    ("pose_hrnet_w48_384x288.pth", (288, 384), 3, 9), ("pose_hrnet_w48_256x192.pth", (192, 256), 2, 6),
    ("checkpoint.pth", (192, 256), 2, 6)])
def test_the_input_size_is_the_names_height_first_and_so_are_the_gaussians(
        tmp_path: Path, name: str, size_wh: tuple[int, int], sigma: float, radius: int) -> None:
    path = saved(tmp_path, hrnet(), name)
    _, spec = read_checkpoint(path)
    assert (spec.input_size_wh, spec.loss) == (size_wh, GaussianLoss(sigma=sigma, radius=radius))
    assert read_checkpoint(path, input_size_wh=(96, 128))[1].input_size_wh == (96, 128)


@pytest.mark.parametrize("head", ["keypoint_head", "head"])
def test_mmposes_hrnet_is_the_authors_under_other_names(tmp_path: Path, head: str) -> None:
    weights = hrnet()
    theirs = {(f"{head}.{name}" if name.startswith("final_layer") else f"backbone.{name}"): tensor
              for name, tensor in weights.items()}
    path = publish(tmp_path, {"meta": {}, "state_dict": theirs}, name="hrnet_w8_coco_256x192")
    beside_official(weights, path)
    _, spec = read_checkpoint(path)
    assert (spec.source["layout"], spec.colour, spec.decoding.variant) == ("mmpose", "RGB", "hrnet")
    assert spec.loss == GaussianLoss(weight=1.0)  # MMPose leaves out the half


def test_mmposes_rsn_has_its_own_names_and_no_biases(tmp_path: Path) -> None:
    keys = published_keys("rsn18", 1)
    assert mmpose_name("stage1.downsample.layer2.0.conv_bn_relu3.bn.weight", architecture="rsn") == (
        "backbone.multi_stage_rsn.1.downsample.layer2.0.conv_bn3.bn.weight")
    assert mmpose_name("stage0.downsample.layer2.0.conv_bn_relu2_3_1.conv.weight", architecture="rsn") == (
        "backbone.multi_stage_rsn.0.downsample.layer2.0.conv_bn_relu2_3_1.conv.weight")
    weights = {name: tensor * (not name.endswith("conv.bias")) for name, tensor in made_weights(keys, 5).items()}
    theirs = {there: weights[name] for name, _ in keys
              if (there := mmpose_name(name, architecture="rsn", head="keypoint_head"))}
    path = publish(tmp_path, {"state_dict": theirs}, name="rsn18_coco_256x192")
    beside_official(weights, path)
    _, spec = read_checkpoint(path)
    assert (spec.network, spec.decoding.variant, spec.colour) == (RSNConfig(num_joints=17), "mmpose", "RGB")
    theirs["keypoint_head.predict_layers.0.prm.conv.weight"] = torch.zeros(2)
    with pytest.raises(DataError, match=r"1 unexpected: keypoint_head\.predict_layers\.0\.prm"):
        read_checkpoint(publish(tmp_path, {"state_dict": theirs}, name="rsn18_coco_256x192"))


@pytest.mark.parametrize(("num_stacks", "depth"), [(1, 2), (2, 4), (3, 1)])
def test_the_hourglasss_file_gives_its_stacks_colours_and_decoding(
        tmp_path: Path, num_stacks: int, depth: int) -> None:
    config = HourglassConfig(num_joints=16, num_stacks=num_stacks, width=8, depth=depth)
    weights = drawn(StackedHourglass(config)).state_dict()
    content = {"state_dict": {f"model.module.{name}": tensor for name, tensor in weights.items()},
               "optimizer": {"state": {}, "param_groups": []}, "epoch": 200}
    path = saved(tmp_path, content, "checkpoint.pt")
    beside_official(weights, path)
    _, spec = read_checkpoint(path)
    assert (spec.network, spec.skeleton) == (config, MPII16.to_json())
    assert (spec.colour, spec.mean, spec.std) == ("RGB", (0, 0, 0), (1, 1, 1))
    assert (spec.decoding.variant, spec.box_padding_wh) == ("hourglass", (1.25, 1.25))


def test_mmposes_hourglass_is_refused_as_the_other_network_that_it_is(tmp_path: Path) -> None:
    weights = {"backbone.stem.0.conv.weight": torch.zeros(1), "backbone.hourglass_modules.0.up1.0.conv1.weight":
               torch.zeros(1), "keypoint_head.multi_final_layers.0.weight": torch.zeros(17, 1, 1, 1)}
    with pytest.raises(DataError, match=r"CornerNet's.*Give a file of the Stacked Hourglass's authors"):
        read_checkpoint(saved(tmp_path, {"state_dict": weights}))


@pytest.mark.parametrize("way", ["udp", "dark"])
def test_files_with_the_same_entries_and_another_decoding_are_refused_by_their_name(tmp_path: Path, way: str) -> None:
    with pytest.raises(DataError, match=f"{way.upper()}'s targets and decoding"):
        read_checkpoint(publish(tmp_path, {"state_dict": hrnet()}, name=f"hrnet_w48_coco_256x192_{way}"))


@pytest.mark.parametrize(("weights", "gone"), [
    (hrnet(), "final_layer.weight"), (hrnet(), "stage3.1.branches.2.0.conv1.weight"),
    (hrnet(), "transition1.0.0.weight"), (narrowed("hourglass", 2), "outs.0.conv.weight"),
    (narrowed("rsn18", 1), "stage0.downsample.layer3.1.conv_bn_relu2_4_2.conv.weight"),
    (narrowed("hourglass", 2), "hgs.1.0.low2.low2.up1.conv3.conv.bias"),
    (narrowed("hourglass", 2), "pre.3.skip_layer.conv.weight")])
def test_an_entry_that_is_missing_is_named_whichever_network_it_is_of(
        tmp_path: Path, weights: dict[str, Tensor], gone: str) -> None:
    del (wrong := dict(weights))[gone]
    with pytest.raises(DataError, match=re.escape(gone)):
        read_checkpoint(saved(tmp_path, wrong))
