"""How published files name the entries of each network, what can be seen of it in them, and what else goes with them.

A file's names tell which network it holds and who published it. `LAYOUTS` has an entry for each way.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from pipeline.errors import DataError
from pipeline.model.settings import ARCHITECTURES, CoarseToFineLoss, GaussianLoss, InferenceConfig

Tensors = Mapping[str, Tensor]
# how long a dimension of an entry is, by our name; None where the file lacks it
Size = Callable[..., int | None]
UPSAMPLE_NAMES = {"u_skip": "in_skip", "up_conv": "up_conv", "skip1": "out_skip1", "skip2": "out_skip2",
                  "cross_conv": "cross_conv"}
MMPOSE = InferenceConfig(colour="RGB", box_padding_wh=(1.25, 1.25), decoding="mmpose", blur_kernel=5)
MPII = {"box_padding_wh": (1.25, 1.25), "blur_kernel": 9}  # of the authors of MSPN, for 16 joints


@dataclass(frozen=True)
class Layout:
    """One way of publishing a network.

    name_in_file  what it calls an entry of ours; None where it has none
    inference     how its heatmaps are made and read; loss: what they were taught with
    """

    name: Literal["official", "mmpose"]
    architecture: str
    name_in_file: Callable[[str], str | None]
    inference: InferenceConfig
    loss: CoarseToFineLoss | GaussianLoss


def find_layout(names: Iterable[str], source: str) -> Layout:
    """Who published a file with these names, and of which network. DataError: nobody whom this program knows."""
    names = list(names)

    def any_begins(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if any_begins("backbone.hourglass_modules."):
        raise DataError(f"{source} holds MMPose's hourglass, which is CornerNet's: another network than the Stacked "
                        "Hourglass, and none that this program knows. Give a file of the Stacked Hourglass's authors.")
    by_mmpose = any_begins("backbone.")
    if any_begins("stage0.", "top.", "backbone.multi_stage_"):
        steps = any("conv_bn_relu2_1_1." in name for name in names) or any_begins("backbone.multi_stage_rsn.")
        return _multi_stage_layout("rsn" if steps else "mspn", by_mmpose, old=any_begins("keypoint_head."))
    if any_begins("transition1.", "backbone.transition1."):
        return _hrnet_layout(by_mmpose, old=any_begins("keypoint_head."))
    if any_begins("hgs."):
        return _official("hourglass")
    raise DataError(f"{source} is of no network that this program knows: MSPN or RSN (names like stage0..., or "
                    f"MMPose's backbone.multi_stage_mspn...), HRNet (transition1...), Stacked Hourglass (hgs...). Its "
                    f"names begin with {names[:3]}. Give a checkpoint of one of these.")


def _official(architecture: str) -> Layout:
    known = ARCHITECTURES[architecture]
    return Layout("official", architecture, lambda name: name, known.inference, known.loss)


def _multi_stage_layout(architecture: str, by_mmpose: bool, *, old: bool) -> Layout:
    if not by_mmpose:
        return _official(architecture)
    names = partial(mmpose_name, architecture=architecture, head="keypoint_head" if old else "head")
    return Layout("mmpose", architecture, names, MMPOSE, CoarseToFineLoss(occluded="supervise", target_peak="joint"))


def _hrnet_layout(by_mmpose: bool, *, old: bool) -> Layout:
    if not by_mmpose:
        return _official("hrnet")
    head = "keypoint_head." if old else "head."
    return Layout("mmpose", "hrnet", lambda name: (head if name.startswith("final_layer.") else "backbone.") + name,
                  ARCHITECTURES["hrnet"].inference, GaussianLoss(weight=1.0))


def mmpose_name(name: str, *, architecture: str = "mspn", head: str = "head") -> str | None:
    """What MMPose calls an entry of our MSPN or RSN; None for convolutions' biases, which it has none of.

    head  "head" in files of MMPose 1.x, "keypoint_head" in those of 0.x, to which all public ones belong
    """
    if name.endswith(".conv.bias"):
        return None
    name = re.sub(r"^top\.conv\.", "backbone.top.top.0.", name)
    name = re.sub(r"^stage(\d+)\.upsample\.up(\d)\.res_conv(\d)\.", partial(_mmpose_head, head=head), name)
    name = re.sub(r"^stage(\d+)\.", rf"backbone.multi_stage_{architecture}.\1.", name)
    if architecture == "mspn":
        name = re.sub(r"conv_bn_relu(\d)\.(conv|bn)\.", r"\2\1.", name)
    name = name.replace(".conv_bn_relu3.", ".conv_bn3.")
    return re.sub(r"(upsample\.up\d)\.(\w+)\.", lambda m: f"{m[1]}.{UPSAMPLE_NAMES[m[2]]}.", name)


def _mmpose_head(match: re.Match[str], *, head: str) -> str:
    stage, unit, conv = (int(number) for number in match.groups())
    return f"{head}.predict_layers.{4 * stage + unit - 1}.conv_layers.{conv - 1}."


# --- what can be seen ---------------------------------------------------------------------------------------------


def seen_settings(tensors: Tensors, layout: Layout) -> dict[str, Any]:
    """The network's settings with its joints, as far as entries and shapes tell them.

    `finest`: the entry (by its name in the file) whose first size is the joints; without it there is no `num_joints`.
    What can't be seen of a damaged file is left out: the defaults then tell what is missing.
    """
    def size(name: str, dimension: int = 0) -> int | None:
        tensor = tensors.get(layout.name_in_file(name) or "")
        return tensor.shape[dimension] if tensor is not None and tensor.ndim > dimension else None

    seen = SEERS[layout.architecture](list(tensors), size)
    seen |= {"num_joints": size(seen["finest"]), "finest": layout.name_in_file(seen["finest"])}
    return {name: value for name, value in seen.items() if _whole(value)}


def _whole(value: Any) -> bool:
    return all(value) if isinstance(value, tuple) else bool(value)


def _indices(names: Iterable[str], pattern: str) -> int:
    """How many different texts the pattern's one group has among the names."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _see_multi_stage(names: list[str], size: Size) -> dict[str, Any]:
    stage = r"(?:stage|backbone\.multi_stage_(?:mspn|rsn)\.)"
    num_stages = _indices(names, stage + r"(\d+)\.downsample\.") or 1
    first = "stage0.downsample.layer{}.0."
    is_rsn = any("conv_bn_relu2_1_1." in name for name in names)  # its blocks' last convolution is as wide as they are
    width = first + ("conv_bn_relu3" if is_rsn else "conv_bn_relu1") + ".conv.weight"
    return {"finest": f"stage{num_stages - 1}.upsample.up4.res_conv2.conv.weight", "num_stages": num_stages,
            "blocks": tuple(_indices(names, rf"{stage}0\.downsample\.layer{layer}\.(\d+)\.") for layer in range(1, 5)),
            "widths": tuple(size(width.format(layer)) for layer in range(1, 5)),
            "stem_channels": size("top.conv.conv.weight"),
            "upsample_channels": size("stage0.upsample.up1.u_skip.conv.weight")}


def _see_hrnet(names: list[str], size: Size) -> dict[str, Any]:
    stage = r"(?:backbone\.)?"
    return {"finest": "final_layer.weight", "width": size("transition1.0.0.weight"),
            "modules": tuple(_indices(names, rf"{stage}stage{number}\.(\d+)\.") for number in (2, 3, 4)),
            "blocks": _indices(names, rf"{stage}stage2\.0\.branches\.0\.(\d+)\."),
            "bottlenecks": _indices(names, rf"{stage}layer1\.(\d+)\."), "stem_channels": size("conv1.weight")}


def _see_hourglass(names: list[str], size: Size) -> dict[str, Any]:
    depth = max((name.count(".low2") for name in names if name.startswith("hgs.0.")), default=0)
    return {"finest": "outs.0.conv.weight", "num_stacks": _indices(names, r"hgs\.(\d+)\."),
            "width": size("outs.0.conv.weight", 1), "depth": depth}


SEERS: Mapping[str, Callable[[list[str], Size], dict[str, Any]]] = {
    "mspn": _see_multi_stage, "rsn": _see_multi_stage, "hrnet": _see_hrnet, "hourglass": _see_hourglass}
