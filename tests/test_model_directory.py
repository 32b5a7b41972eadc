"""Model directories: what is written is read back, the same bytes each time, and nothing half right is loaded."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pipeline.errors import DataError
from pipeline.model.directory import ModelSpec, load_model, model_digest, normalise_crops, read_spec, save_model
from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.model.settings import Decoding, GaussianLoss
from pipeline.pose.skeleton import COCO17, MPII16

# Written once by version 1. Every later version must read it for ever.
VERSION_1 = Path(__file__).parent / "golden" / "model_v1"
TINY = MSPNConfig(num_joints=17, num_stages=2, input_size_wh=(64, 96), blocks=(1, 1, 1, 1), widths=(2, 2, 2, 2),
                  stem_channels=2, upsample_channels=2)


def tiny_spec(**changes: Any) -> ModelSpec:
    return ModelSpec(**{"network": TINY, "skeleton": COCO17.to_json(), "source": {"run_id": "r1"}, **changes})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_model(tmp_path / "model", MSPN(TINY), tiny_spec())
    return tmp_path / "model"


def change_spec(directory: Path, **changes: Any) -> None:
    path = directory / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    network, images = MSPN(TINY).eval(), torch.randn(1, 3, 96, 64)
    spec = tiny_spec(colour="RGB", mean=(0.1, 0.2, 0.3), box_padding_wh=(1.25, 1.25), decoding=Decoding(blur_kernel=9))
    save_model(tmp_path, network, spec)
    loaded, loaded_spec = load_model(tmp_path)
    assert loaded_spec == spec
    assert not loaded.training
    with torch.inference_mode():
        assert torch.equal(loaded.predict(images), network.predict(images))


def test_the_same_model_gives_the_same_bytes_wherever_it_was_trained(directory: Path, tmp_path: Path) -> None:
    network, spec = load_model(directory)
    save_model(tmp_path / "again", network.to(memory_format=torch.channels_last).train(), spec)
    for name in ("model.json", "model.safetensors"):
        assert (directory / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert model_digest(directory) == model_digest(tmp_path / "again")


def test_the_digest_is_what_the_shell_says_and_follows_every_byte(directory: Path) -> None:
    both = (directory / "model.json").read_bytes() + (directory / "model.safetensors").read_bytes()
    assert model_digest(directory) == hashlib.sha256(both).hexdigest()
    change_spec(directory, source={"run_id": "r2"})
    assert model_digest(directory) != hashlib.sha256(both).hexdigest()


def test_a_directory_of_version_1_is_read() -> None:
    network, spec = load_model(VERSION_1)
    assert spec.version == 1
    assert (spec.network, spec.skeleton) == (TINY, COCO17.to_json())
    assert (spec.colour, spec.mean, spec.std) == ("BGR", (0.406, 0.456, 0.485), (0.225, 0.224, 0.229))
    assert (spec.box_padding_wh, spec.decoding) == ((1.09, 1.135), Decoding(variant="official", blur_kernel=5))
    assert network.predict(torch.zeros(1, 3, 96, 64)).shape == (1, 17, 24, 16)


def test_a_model_is_never_replaced(directory: Path) -> None:
    with pytest.raises(DataError, match=r"model\.json and model\.safetensors already"):
        save_model(directory, MSPN(TINY), tiny_spec())


@pytest.mark.parametrize("missing", ["model.json", "model.safetensors"])
def test_a_missing_file_is_refused_by_name_and_with_a_remedy(directory: Path, missing: str) -> None:
    (directory / missing).unlink()
    for read in (load_model, model_digest):
        with pytest.raises(DataError, match=rf"no {missing}.*Copy the whole directory again"):
            read(directory)


def test_weights_that_were_cut_off_are_refused(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors can't be read.*Copy the whole directory again"):
        load_model(directory)


def test_missing_unexpected_and_misshapen_weights_are_listed(directory: Path) -> None:
    path = directory / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del weights["top.conv.bn.weight"]
    weights["extra"] = torch.zeros(1)
    weights["stage1.upsample.up4.res_conv2.conv.bias"] = torch.zeros(16)
    save_file(weights, path)
    with pytest.raises(DataError) as refusal:
        load_model(directory)
    for part in ("model.safetensors", "1 missing: top.conv.bn.weight", "1 unexpected: extra",
                 "stage1.upsample.up4.res_conv2.conv.bias [16] instead of [17]"):
        assert part in str(refusal.value)


def test_another_networks_weights_are_refused(directory: Path) -> None:
    change_spec(directory, network=TINY.model_dump() | {"num_stages": 3})
    with pytest.raises(DataError, match=r"280 missing: stage1\.upsample\.up1\.skip1"):
        load_model(directory)


def test_a_newer_version_is_refused_by_its_number(directory: Path) -> None:
    change_spec(directory, version=2, network="something new")
    with pytest.raises(DataError, match=r"version 2.*up to 1.*Upgrade"):
        read_spec(directory)


def test_keys_that_this_version_does_not_know_are_ignored_at_every_level(directory: Path) -> None:
    before = read_spec(directory)
    change_spec(directory, licence="?", network=before.network.model_dump() | {"new": 1},
                decoding=before.decoding.model_dump() | {"new": 1}, skeleton=before.skeleton | {"new": 1})
    after = read_spec(directory)
    assert (after.network, after.decoding) == (before.network, before.decoding)
    load_model(directory)


@pytest.mark.parametrize(("content", "said"), [
    ("{", "not JSON"), ("[]", "names no version"), ("{}", "names no version"), ('{"version": 1}', "network"),
])
def test_a_spec_that_is_no_spec_is_refused(directory: Path, content: str, said: str) -> None:
    (directory / "model.json").write_text(content)
    with pytest.raises(DataError, match=rf"model\.json.*{said}"):
        read_spec(directory)


def test_a_loss_that_is_not_its_authors_is_read_as_it_was_written(directory: Path) -> None:
    loss = GaussianLoss(sigma=3.0, radius=9)
    change_spec(directory, loss=loss.model_dump() | {"later": 1})
    assert read_spec(directory).loss == loss


def test_an_architecture_that_this_version_does_not_know_is_refused_with_those_it_does(directory: Path) -> None:
    change_spec(directory, architecture="transformer")
    with pytest.raises(DataError, match=r"architecture.*known architectures are .*hrnet"):
        read_spec(directory)


@pytest.mark.parametrize(("changes", "said"), [
    ({"skeleton": MPII16.to_json()}, "the skeleton has 16 joints, the network 17"), ({"skeleton": {}}, "name"),
    ({"colour": "GRB"}, "colour"), ({"std": (0.2, 0.2, 0)}, "std"), ({"box_padding_wh": (1.2, -1)}, "box_padding_wh"),
])
def test_a_spec_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        tiny_spec(**changes)


def test_crops_are_normalised_to_the_authors_tensor(shared: Path) -> None:
    with np.load(shared / "golden" / "affine_val.npz") as golden:
        crops, expected = torch.from_numpy(golden["crop_bgr_uint8"]), torch.from_numpy(golden["tensor"])
    torch.testing.assert_close(normalise_crops(crops, tiny_spec()), expected, rtol=0, atol=1e-6)


def test_an_rgb_model_sees_red_first_and_a_bgr_model_blue() -> None:
    crop = torch.tensor([51, 102, 204], dtype=torch.uint8).view(1, 1, 1, 3)  # B, G, R: 0.2, 0.4, 0.8
    plain = {"mean": (0, 0, 0.5), "std": (1, 1, 2)}
    seen = {colour: normalise_crops(crop, tiny_spec(colour=colour, **plain)).flatten().tolist()
            for colour in ("BGR", "RGB")}
    assert seen["BGR"] == pytest.approx([0.2, 0.4, 0.15])
    assert seen["RGB"] == pytest.approx([0.8, 0.4, -0.15])


def test_normalised_crops_are_what_a_network_takes() -> None:
    images = normalise_crops(torch.zeros(2, 96, 64, 3, dtype=torch.uint8), tiny_spec())
    assert (images.dtype, images.shape) == (torch.float32, (2, 3, 96, 64))
