"""Published weight files -> our network: the authors' checkpoints, and MMPose's.

Both hold the same network under other names. A file is never unpickled without restriction, every entry of it
is accounted for, and what its weights were trained with (colours, box padding, decoding) goes into the spec.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.model.directory import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB, ModelSpec, build_network
from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.model.network import PoseNetwork, check_tensors
from pipeline.model.settings import Decoding
from pipeline.pose.skeleton import COCO17, MPII16, Skeleton

# `mspn50_coco_256x192-8fbfb5d0_20201123.pth`: published names carry the first digits of the file's SHA-256.
# (`iter-96000000.pth` of the authors carries an iteration.)
DIGEST_IN_NAME = re.compile(r"(?<!^iter)-([0-9a-f]{8})(?:_\d{8})?\.pth$")
WRAPPERS = ("model.module.", "module.")  # what training on several GPUs puts before every name
UNUSED = ("data_preprocessor.mean", "data_preprocessor.std")  # of MMPose 1.x; the spec has the same numbers
BLOCK = re.compile(r"^(?:stage|backbone\.multi_stage_mspn\.)(\d+)\.downsample\.layer([1-4])\.(\d+)\.")
UPSAMPLE_NAMES = {"u_skip": "in_skip", "up_conv": "up_conv", "skip1": "out_skip1", "skip2": "out_skip2",
                  "cross_conv": "cross_conv"}


@dataclass(frozen=True)
class Layout:
    """One way of publishing; `name_in_file` gives what it calls an entry of ours, None where it has none."""

    name: Literal["official", "mmpose"]
    name_in_file: Callable[[str], str | None]


@dataclass(frozen=True)
class Recipe:
    """What goes with a number of joints: the skeleton, and how the authors crop and decode."""

    skeleton: Skeleton
    input_size_wh: tuple[int, int]
    box_padding_wh: tuple[float, float]
    blur_kernel: int


RECIPES = {17: Recipe(COCO17, (192, 256), (1.09, 1.135), blur_kernel=5),
           16: Recipe(MPII16, (256, 256), (1.25, 1.25), blur_kernel=9)}
MMPOSE_PADDING_WH = (1.25, 1.25)
MMPOSE_BLUR_KERNEL = 5


def read_checkpoint(path: Path, *, skeleton: Skeleton | None = None,
                    input_size_wh: tuple[int, int] | None = None) -> tuple[PoseNetwork, ModelSpec]:
    """The network of a published file, in evaluation mode, and the spec that its weights go with.

    Stages, joints, blocks and widths follow from the entries and their shapes. What doesn't: the skeleton (17
    joints are taken for COCO's, 16 for MPII's) and the input size (192×256 and 256×256 for these).
    Refused with DataError: a file whose SHA-256 isn't the one in its name, a pickle that asks for more than
    tensors and plain values, entries that are missing, unexpected or of another shape, and a number of joints
    that no known skeleton has where none is given.
    """
    sha256 = check_name_digest(path)
    tensors = _read_tensors(path)
    layout = _layout(tensors, path)
    recipe = _recipe(_num_joints(tensors, layout, path), skeleton, path)
    config = _config(tensors, layout, recipe, input_size_wh=input_size_wh or recipe.input_size_wh)
    network = build_network(config, _our_weights(tensors, layout, config, path), source=str(path))
    source = {"checkpoint": path.name, "sha256": sha256, "layout": layout.name}
    return network, _spec(config, layout, recipe, source=source)


def check_name_digest(path: Path) -> str:
    """The file's SHA-256; DataError where its name carries another one's first digits, or it isn't there."""
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: the checkpoint can't be read ({error.strerror}).") from None
    named = DIGEST_IN_NAME.search(path.name)
    if named and not sha256.startswith(named[1]):
        raise DataError(f"{path}: by its name the SHA-256 begins with {named[1]}, but it begins with "
                        f"{sha256[:8]}: the file is damaged or another one. Download it again.")
    return sha256


def mmpose_name(name: str, *, head: str = "head") -> str | None:
    """What MMPose calls an entry of ours; None for convolutions' biases, which it has none of.

    head  "head" in files of MMPose 1.x, "keypoint_head" in those of 0.x, to which all public ones belong
    """
    if name.endswith(".conv.bias"):
        return None
    name = re.sub(r"^top\.conv\.", "backbone.top.top.0.", name)
    name = re.sub(r"^stage(\d+)\.upsample\.up(\d)\.res_conv(\d)\.", partial(_mmpose_head, head=head), name)
    name = re.sub(r"^stage(\d+)\.", r"backbone.multi_stage_mspn.\1.", name)
    name = re.sub(r"conv_bn_relu(\d)\.(conv|bn)\.", r"\2\1.", name)
    return re.sub(r"(upsample\.up\d)\.(\w+)\.", lambda m: f"{m[1]}.{UPSAMPLE_NAMES[m[2]]}.", name)


def _mmpose_head(match: re.Match[str], *, head: str) -> str:
    stage, unit, conv = (int(number) for number in match.groups())
    return f"{head}.predict_layers.{4 * stage + unit - 1}.conv_layers.{conv - 1}."


class _Ignored:
    """Stands for what a file's notes may hold, such as numpy's numbers: takes anything, does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# MMPose notes its best AP as one of numpy's numbers, which torch's restricted unpickler refuses
_NOTES = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The file's state dict without wrappers around it or its names."""
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in _NOTES]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that aren't a checkpoint, unpickling raises whatever it likes
        raise DataError(f"{path}: {_why_unreadable(error)}") from None
    state = content
    if isinstance(content, Mapping):
        state = next((content[key] for key in ("model", "state_dict") if key in content), content)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"{list(content)[:8]}" if isinstance(content, Mapping) else type(content).__name__
        raise DataError(f"{path} holds no state dict, alone or under `model` or `state_dict`; found {found}. "
                        "Give a checkpoint of MSPN.")
    for wrapper in WRAPPERS:
        if state and all(str(name).startswith(wrapper) for name in state):
            state = {str(name).removeprefix(wrapper): tensor for name, tensor in state.items()}
    return {str(name): tensor for name, tensor in state.items() if name not in UNUSED}


def _why_unreadable(error: Exception) -> str:
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    if wanted:
        return (f"the file asks to load {wanted[1]}, which is code and not weights; nothing of it was run. "
                "If you trust where it is from, save its state_dict alone into a new file, and import that.")
    first_line = next(iter(str(error).splitlines()), type(error).__name__)
    return f"not a checkpoint that torch can read ({first_line}). It may be cut off: download it again."


def _layout(tensors: Mapping[str, Tensor], path: Path) -> Layout:
    if any(name.startswith(("stage0.", "top.conv")) for name in tensors):
        return Layout("official", lambda name: name)
    if any(name.startswith("backbone.multi_stage_mspn") for name in tensors):
        old = any(name.startswith("keypoint_head.") for name in tensors)
        return Layout("mmpose", partial(mmpose_name, head="keypoint_head" if old else "head"))
    raise DataError(f"{path} is neither the authors' MSPN (names like stage0...) nor MMPose's "
                    f"(backbone.multi_stage_mspn...); its names begin with {list(tensors)[:3]}. "
                    "Give a checkpoint of MSPN.")


def _out_channels(tensors: Mapping[str, Tensor], layout: Layout, name: str) -> int | None:
    """How many channels an entry of ours gives out in the file; None where the file lacks it."""
    tensor = tensors.get(layout.name_in_file(name) or "")
    return len(tensor) if tensor is not None and tensor.ndim else None


def _num_stages(tensors: Mapping[str, Tensor]) -> int:
    return max(1, len({match[1] for name in tensors if (match := BLOCK.match(name))}))


def _num_joints(tensors: Mapping[str, Tensor], layout: Layout, path: Path) -> int:
    finest = f"stage{_num_stages(tensors) - 1}.upsample.up4.res_conv2.conv.weight"
    num_joints = _out_channels(tensors, layout, finest)
    if num_joints is None:
        raise DataError(f"{path}: {layout.name_in_file(finest)}, the last heatmaps' weights, is missing: "
                        "it isn't a whole MSPN. Download it again.")
    return num_joints


def _config(tensors: Mapping[str, Tensor], layout: Layout, recipe: Recipe, *,
            input_size_wh: tuple[int, int]) -> MSPNConfig:
    """The network that these entries belong to; what can't be seen is left the authors'."""
    blocks = {match.groups() for name in tensors if (match := BLOCK.match(name))}
    num_blocks = [len({block for stage, layer, block in blocks if (stage, layer) == ("0", number)})
                  for number in "1234"]
    widths = [_out_channels(tensors, layout, f"stage0.downsample.layer{number}.0.conv_bn_relu1.conv.weight")
              for number in "1234"]
    seen = {
        "blocks": tuple(num_blocks) if all(num_blocks) else None,
        "widths": tuple(widths) if all(widths) else None,
        "stem_channels": _out_channels(tensors, layout, "top.conv.conv.weight"),
        "upsample_channels": _out_channels(tensors, layout, "stage0.upsample.up1.u_skip.conv.weight"),
    }
    return MSPNConfig(num_joints=recipe.skeleton.num_joints, num_stages=_num_stages(tensors),
                      input_size_wh=input_size_wh, **{name: value for name, value in seen.items() if value})


def _our_weights(tensors: Mapping[str, Tensor], layout: Layout, config: MSPNConfig,
                 path: Path) -> dict[str, Tensor]:
    """The file's entries under our names, biases that it lacks 0; DataError lists all that don't fit."""
    with torch.device("meta"):
        ours = MSPN(config).state_dict()
    names = {name: layout.name_in_file(name) for name in ours}
    check_tensors(tensors, {there: ours[name] for name, there in names.items() if there}, source=str(path))
    return {name: tensors[there] if there else torch.zeros(ours[name].shape) for name, there in names.items()}


def _recipe(num_joints: int, skeleton: Skeleton | None, path: Path) -> Recipe:
    known = RECIPES.get(num_joints)
    if skeleton is None:
        if known is None:
            raise DataError(f"{path} has {num_joints} joints, which is neither COCO's 17 nor MPII's 16: "
                            "give the skeleton that they belong to.")
        return known
    if skeleton.num_joints != num_joints:
        raise DataError(f"{path} has {num_joints} joints, but the skeleton {skeleton.name!r} has "
                        f"{skeleton.num_joints}. Give the skeleton that the file was trained for.")
    return replace(known or RECIPES[17], skeleton=skeleton)


def _spec(config: MSPNConfig, layout: Layout, recipe: Recipe, *, source: dict[str, Any]) -> ModelSpec:
    skeleton = recipe.skeleton.to_json()
    if layout.name == "official":
        decoding = Decoding(variant="official", blur_kernel=recipe.blur_kernel)
        return ModelSpec(network=config, skeleton=skeleton, colour="BGR", mean=IMAGENET_MEAN_RGB[::-1],
                         std=IMAGENET_STD_RGB[::-1], box_padding_wh=recipe.box_padding_wh, decoding=decoding,
                         source=source)
    decoding = Decoding(variant="mmpose", blur_kernel=MMPOSE_BLUR_KERNEL)
    return ModelSpec(network=config, skeleton=skeleton, colour="RGB", mean=IMAGENET_MEAN_RGB,
                     std=IMAGENET_STD_RGB, box_padding_wh=MMPOSE_PADDING_WH, decoding=decoding, source=source)
