"""Published weight files -> our networks: the authors' checkpoints, and MMPose's.

Both hold the same networks under other names. A file is never unpickled without restriction, every entry of it
is accounted for, and what its weights were trained with (colours, box padding, decoding) goes into the spec.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.model.architectures import NETWORKS, make_network
from pipeline.model.directory import ModelSpec, build_network, spec_of_use
from pipeline.model.layouts import MPII, Layout, find_layout, seen_settings
from pipeline.model.network import NetworkConfig, PoseNetwork, check_tensors
from pipeline.model.settings import GaussianLoss
from pipeline.pose.skeleton import COCO17, MPII16, Skeleton

# `mspn50_coco_256x192-8fbfb5d0_20201123.pth`: published names carry the first digits of the file's SHA-256.
# (`iter-96000000.pth` of the authors carries an iteration.)
DIGEST_IN_NAME = re.compile(r"(?<!^iter)-([0-9a-f]{8})(?:_\d{8})?\.pth$")
SIZE_IN_NAME = re.compile(r"(?<!\d)(\d{3})x(\d{3})(?!\d)")  # height × width, which no entry's shape tells
OTHER_WAY_IN_NAME = re.compile(r"[_-](udp|dark)[_-]")  # the same entries, but other targets and another decoding
WRAPPERS = ("model.module.", "module.")  # what training on several GPUs puts before every name
UNUSED = ("data_preprocessor.mean", "data_preprocessor.std")  # of MMPose 1.x; the spec has the same numbers
SKELETONS = {17: (COCO17, (192, 256)), 16: (MPII16, (256, 256))}
LARGE_WH = (288, 384)  # where HRNet's Gaussians are half as wide again


def read_checkpoint(path: Path, *, input_size_wh: tuple[int, int] | None = None) -> tuple[PoseNetwork, ModelSpec]:
    """The network of a published file, in evaluation mode, and the spec that its weights go with.

    Architecture, joints and sizes of layers follow from the entries and their shapes. What doesn't: the skeleton (17
    joints are taken for COCO's, 16 for MPII's) and the input size (as the file's name has it, height first; else
    192×256 and 256×256 for these).
    Refused with DataError: a file whose SHA-256 isn't the one in its name, a pickle that asks for more than
    tensors and plain values, entries that are missing, unexpected or of another shape, and a number of joints
    that no known skeleton has.
    """
    sha256 = check_name_digest(path)
    if other := OTHER_WAY_IN_NAME.search(path.name):
        raise DataError(f"{path}: by its name it was trained for {other[1].upper()}'s targets and decoding, which this "
                        "program doesn't have: its joints would be beside the mark. Give the plain file.")
    tensors = _read_tensors(path)
    layout = find_layout(tensors, str(path))
    seen = seen_settings(tensors, layout)
    skeleton, usual_wh = _skeleton(seen.pop("num_joints", None), seen.pop("finest"), path)
    config = NETWORKS[layout.architecture].config(
        num_joints=skeleton.num_joints, input_size_wh=input_size_wh or _size_in_name(path) or usual_wh, **seen)
    network = build_network(config, _our_weights(tensors, layout, config, path), source=str(path))
    source = {"checkpoint": path.name, "sha256": sha256, "layout": layout.name}
    return network, _spec(config, layout, skeleton, source=source)


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
        inner = (content.get(key) for key in ("model", "state_dict"))
        state = next((each for each in inner if isinstance(each, Mapping)), content)  # HRNet's `model` is its name
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"{list(content)[:8]}" if isinstance(content, Mapping) else type(content).__name__
        raise DataError(f"{path} holds no state dict, alone or under `model` or `state_dict`; found {found}. "
                        "Give a checkpoint of a pose network.")
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
    if "weights_only" in first_line:  # torch then recommends to run what is in the file
        return "not a checkpoint that torch can read. Check that it is one; it may be cut off: download it again."
    return f"not a checkpoint that torch can read ({first_line}). It may be cut off: download it again."


def _size_in_name(path: Path) -> tuple[int, int] | None:
    found = SIZE_IN_NAME.search(path.name)
    return (int(found[2]), int(found[1])) if found else None


def _our_weights(tensors: Mapping[str, Tensor], layout: Layout, config: NetworkConfig,
                 path: Path) -> dict[str, Tensor]:
    """The file's entries under our names, biases that it lacks 0; DataError lists all that don't fit."""
    with torch.device("meta"):
        ours = make_network(config).state_dict()
    names = {name: layout.name_in_file(name) for name in ours}
    check_tensors(tensors, {there: ours[name] for name, there in names.items() if there}, source=str(path))
    return {name: tensors[there] if there else torch.zeros(ours[name].shape) for name, there in names.items()}


def _skeleton(num_joints: int | None, finest: str, path: Path) -> tuple[Skeleton, tuple[int, int]]:
    """The joints' names, and the usual input size."""
    if num_joints is None:
        raise DataError(f"{path}: {finest}, the last heatmaps' weights, is missing: it isn't a whole network. "
                        "Download it again.")
    if num_joints not in SKELETONS:
        raise DataError(f"{path} has {num_joints} joints, which is neither COCO's 17 nor MPII's 16, and the file "
                        "doesn't say what they are. Give a checkpoint for one of these.")
    return SKELETONS[num_joints]


def _spec(config: NetworkConfig, layout: Layout, skeleton: Skeleton, *, source: dict[str, Any]) -> ModelSpec:
    inference, loss = layout.inference, layout.loss
    if layout.name == "official" and inference.decoding == "official" and skeleton.num_joints == MPII16.num_joints:
        inference = inference.model_copy(update=MPII)
    if isinstance(loss, GaussianLoss) and config.input_size_wh == LARGE_WH:
        loss = loss.model_copy(update={"sigma": 3.0, "radius": 9})
    return spec_of_use(config, skeleton, inference, loss, source=source)
