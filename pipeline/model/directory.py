"""A model directory: everything that inference needs, and nothing that has to be trusted.

    model.safetensors   the weights, under the authors' names
    model.json          `ModelSpec`: which network, what it wants to see, what its answers mean, its origin

Writing and reading live here, and the one definition of what the network sees of a crop.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.errors import DataError
from pipeline.model.architectures import NETWORKS, make_network
from pipeline.model.network import NetworkConfig, PoseNetwork, check_tensors
from pipeline.model.settings import (
    ARCHITECTURES,
    DEFAULT,
    KNOWN_ARCHITECTURES,
    SPEC_FILE,
    WEIGHTS_FILE,
    AnyLoss,
    CoarseToFineLoss,
    Decoding,
    GaussianLoss,
    InferenceConfig,
)
from pipeline.pose.skeleton import Skeleton
from pipeline.settings import Positive

VERSION = 1  # the newest major version of model.json that this program reads
REMEDY = "Copy the whole directory again, or write it anew with import-model or train."

# ImageNet's, which the authors and MMPose use alike, in the order R, G, B and for values of 0 to 1
IMAGENET_MEAN_RGB = (0.485, 0.456, 0.406)
IMAGENET_STD_RGB = (0.229, 0.224, 0.225)

# of values of 0 to 1, in the order R, G, B: mean and deviation
NORMALISATIONS: Final = {"imagenet": (IMAGENET_MEAN_RGB, IMAGENET_STD_RGB), "none": ((0.0,) * 3, (1.0,) * 3)}


class ModelSpec(BaseModel):
    """What model.json says. Keys that this version doesn't know are ignored, at every level.

    architecture    mspn, rsn, ...: the network's own, unless it is read from a file
    network         which one of it; its input_size_wh is what crops must have
    skeleton        the joints, as `Skeleton.to_json` gives them, as many as the network has
    colour          order of the network's input channels
    mean, std       of values of 0 to 1, in the network's channel order; the authors' by default
    box_padding_wh  factors on a box's width and height before its aspect is fitted; the authors' by default
    decoding        how the heatmaps become joints
    loss            what the heatmaps were taught with; the architecture's authors' by default
    source          where the weights come from, for people: run id, data digest, checkpoint, its SHA-256
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1
    architecture: str = DEFAULT
    network: SerializeAsAny[NetworkConfig]
    skeleton: dict[str, Any]
    colour: Literal["BGR", "RGB"] = "BGR"
    mean: tuple[float, float, float] = IMAGENET_MEAN_RGB[::-1]
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD_RGB[::-1]
    box_padding_wh: tuple[Positive, Positive] = (1.09, 1.135)
    decoding: Decoding = Decoding()
    loss: AnyLoss = Field(default_factory=lambda data: ARCHITECTURES[data["architecture"]].loss)
    source: dict[str, Any] = {}

    @property
    def input_size_wh(self) -> tuple[int, int]:
        """Width and height of the crops that the network sees."""
        return self.network.input_size_wh

    @model_validator(mode="before")
    @classmethod
    def _of_its_architecture(cls, values: dict[str, Any]) -> dict[str, Any]:
        network = values.get("network")
        own = {"architecture": network.architecture} if isinstance(network, NetworkConfig) else {}
        return {"architecture": DEFAULT} | values | own

    @field_validator("architecture")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in ARCHITECTURES:
            raise ValueError(KNOWN_ARCHITECTURES)
        return value

    @field_validator("network", mode="before")
    @classmethod
    def _network_of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict) or "architecture" not in info.data:
            return value
        kind = NETWORKS[info.data["architecture"]].config
        return kind(**_known(value, kind))

    @field_validator("decoding", mode="before")
    @classmethod
    def _without_unknown_keys(cls, value: Any) -> Any:
        return _known(value, Decoding) if isinstance(value, dict) else value

    @field_validator("loss", mode="before")
    @classmethod
    def _loss_without_unknown_keys(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return _known(value, GaussianLoss if value.get("kind") == "gaussian" else CoarseToFineLoss)

    @model_validator(mode="after")
    def _joints_are_as_many(self) -> "ModelSpec":
        num_joints = Skeleton.from_json(self.skeleton).num_joints
        if num_joints != self.network.num_joints:
            raise ValueError(f"the skeleton has {num_joints} joints, the network {self.network.num_joints}")
        return self


def spec_of_use(network: NetworkConfig, skeleton: Skeleton, inference: InferenceConfig,
                loss: CoarseToFineLoss | GaussianLoss, *,
                source: Mapping[str, Any] = MappingProxyType({})) -> ModelSpec:
    """What model.json will say of a network that is taught and used so."""
    mean, std = NORMALISATIONS[inference.normalisation]
    if inference.colour == "BGR":
        mean, std = mean[::-1], std[::-1]
    return ModelSpec(network=network, skeleton=skeleton.to_json(), colour=inference.colour, mean=mean, std=std,
                     box_padding_wh=inference.box_padding_wh, loss=loss, source=dict(source),
                     decoding=Decoding(variant=inference.decoding, blur_kernel=inference.blur_kernel))


def save_model(directory: Path, network: PoseNetwork, spec: ModelSpec) -> None:
    """Write a model directory; the same weights and spec give the same bytes. `load_model` is the inverse.

    Weights are written as float32, model.json last. A directory that holds a model is refused with DataError.
    """
    assert network.config == spec.network, (network.config, spec.network)
    directory.mkdir(parents=True, exist_ok=True)
    there = [name for name in (SPEC_FILE, WEIGHTS_FILE) if (directory / name).exists()]
    if there:
        raise DataError(f"{directory} holds {' and '.join(there)} already, and a model is never replaced: "
                        "choose another directory.")
    (directory / WEIGHTS_FILE).write_bytes(save(_as_stored(network)))
    (directory / SPEC_FILE).write_text(_spec_text(spec), encoding="utf-8")


def add_to_source(directory: Path, about: Mapping[str, Any]) -> None:
    """Say more of where a local directory's weights come from; all else stays as it is."""
    spec = read_spec(directory)
    more = spec.model_copy(update={"source": spec.source | dict(about)})
    (directory / SPEC_FILE).write_text(_spec_text(more), encoding="utf-8")


def load_model(directory: Path) -> tuple[PoseNetwork, ModelSpec]:
    """The network, in evaluation mode on the CPU, and its spec.

    Refused with DataError: a missing or broken file, a newer version, weights of any other network.
    """
    spec = read_spec(directory)
    path = directory / WEIGHTS_FILE
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise DataError(f"{directory} has no {WEIGHTS_FILE}. {REMEDY}") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} can't be read as safetensors ({error}). {REMEDY}") from None
    return build_network(spec.network, weights, source=str(path)), spec


def build_network(config: NetworkConfig, weights: dict[str, Tensor], *, source: str) -> PoseNetwork:
    """The network with exactly these weights, in evaluation mode; DataError names what doesn't fit."""
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        network = make_network(config)
    expected = network.state_dict()
    check_tensors(weights, expected, source=source)
    # copies: what comes from safetensors is the file itself, mapped into memory
    network.load_state_dict({name: weights[name].to(tensor.dtype, copy=True) for name, tensor in expected.items()},
                            assign=True)
    return network.eval()


def read_spec(directory: Path) -> ModelSpec:
    """The spec alone; DataError where model.json is missing, broken, or newer than this program."""
    path = directory / SPEC_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{directory} is no model directory: it has no {SPEC_FILE}. {REMEDY}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). {REMEDY}") from None
    version = values.get("version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise DataError(f"{path} names no version, so it is no model's. {REMEDY}")
    if version > VERSION:
        raise DataError(f"{path} is of version {version}; this program reads versions up to {VERSION}. "
                        "Upgrade the program.")
    try:
        return ModelSpec.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DataError(f"{path}: {problems}. {REMEDY}") from None


def model_digest(directory: Path) -> str:
    """What identifies the model: the SHA-256 of model.json's bytes and then the weights', 64 hex digits.

    `cat model.json model.safetensors | sha256sum` says the same.
    """
    digest = hashlib.sha256()
    for name in (SPEC_FILE, WEIGHTS_FILE):
        try:
            with (directory / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{directory} has no {name}. {REMEDY}") from None
    return digest.hexdigest()


def normalise_crops(crops: Tensor, spec: ModelSpec) -> Tensor:
    """What the network sees of crops: float32 [B, 3, H, W], in the network's channel order.

    crops  uint8 [B, H, W, 3] BGR, on any device
    """
    channels = crops.permute(0, 3, 1, 2)
    ordered = channels if spec.colour == "BGR" else channels.flip(1)
    mean, std = (torch.tensor(values, device=crops.device).view(3, 1, 1) for values in (spec.mean, spec.std))
    # in the order in which the authors compute it, so that rounding is the same
    return ordered.contiguous().float().div(255).sub(mean).div(std)


def _spec_text(spec: ModelSpec) -> str:
    return spec.model_dump_json(indent=2, exclude={"network": {"architecture"}}) + "\n"


def _known(values: Mapping[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in kind.model_fields}


def _as_stored(network: PoseNetwork) -> dict[str, Tensor]:
    tensors = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    return {name: (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in tensors.items()}
