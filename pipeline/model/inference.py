"""A network's heatmaps, computed fast: ways that differ in speed and rounding, and nothing else.

Each is a function of a batch of images on its device; the plain way, the network as it was loaded, is what the others
are compared with. Speed and effect on keypoints: benchmarks/RESULTS.md.
"""

import copy
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.errors import ConfigError
from pipeline.model.compiling import why_not_compile
from pipeline.model.network import PoseNetwork

# images [B, 3, H, W] float32 -> heatmaps [B, K, H/4, W/4] float32, on the same device
Heatmaps = Callable[[Tensor], Tensor]
PLAIN, CPU, CUDA, OPENVINO = "plain", "cpu", "cuda", "openvino"
NULL = "null"  # no network at all: every joint at 0, 0. To measure what everything else costs
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# OpenVINO computes so many crops at once, and fills up fewer. More aren't faster, and 32 take 0.9 GB more at 256x192;
# of units of 73 persons a quarter of the time went into filling up to 32 (RESULTS.md)
OPENVINO_CROPS = 4
PRECISION_HINTS = {"float32": "f32", "bfloat16": "bf16"}  # OpenVINO's names


def fast_backend() -> str:
    """The fastest backend that this process offers: a GPU, else OpenVINO where it is installed, else PyTorch."""
    return CUDA if torch.cuda.is_available() else cpu_backend()


def cpu_backend() -> str:
    """The fastest backend without a GPU."""
    return OPENVINO if has_openvino() else CPU


def has_openvino() -> bool:
    """Whether the optional package is installed (`pip install .[openvino]`)."""
    return importlib.util.find_spec("openvino") is not None


def native_precision(backend: str) -> str:
    """bfloat16 where this machine's processor computes it, else float32: elsewhere it is emulated, and slower.

    It moves 6 % of the joints by more than half a pixel, and changes AP by -0.0007 +- 0.0005 (RESULTS.md).
    """
    if backend == CUDA:
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def fast_heatmaps(network: PoseNetwork, backend: str, precision: str, *, batch_size: int, threads: int | None,
                  compile_mode: str | None = None) -> Heatmaps:
    """The network's finest heatmaps by this backend. The network itself stays as it is.

    backend       cpu or cuda: PyTorch, batch norms folded into convolutions, channels last · openvino
    batch_size    what torch compiles is compiled for it, and a smaller batch is filled up
    threads       OpenVINO's; PyTorch's are the process's own
    compile_mode  of torch.compile, for cpu and cuda: "default", or "reduce-overhead", which replays CUDA graphs;
                  None: PyTorch as it is
    """
    if backend == OPENVINO:
        assert compile_mode is None
        return _openvino(network, precision, batch_size, threads)
    device, dtype = torch.device(backend), DTYPES[precision]
    fast = fold_batch_norms(network).to(device)
    fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _lower_precision(fast, dtype)
    predict = fast.predict if compile_mode is None else _compiled(fast, compile_mode, batch_size)

    def heatmaps(images: Tensor) -> Tensor:
        return predict(images.to(dtype, memory_format=torch.channels_last)).float()

    return heatmaps


def _compiled(network: PoseNetwork, mode: str, batch_size: int) -> Heatmaps:
    """The network's `predict` by torch.compile, for batches of one size: another size would be compiled anew.

    Refused with ConfigError: a machine that can't compile.
    """
    if problem := why_not_compile():
        raise ConfigError(f"compile={mode} needs a compiler on each machine. {problem}; or leave compile out.")
    predict = torch.compile(network.predict, mode=mode, dynamic=False)

    def heatmaps(images: Tensor) -> Tensor:
        filled = images
        if len(images) < batch_size:
            filled = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, batch_size - len(images)))
        # a replayed graph writes where it wrote before, and the flip test needs two answers at once
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        found: Tensor = predict(filled.contiguous(memory_format=torch.channels_last))
        return found[:len(images)].clone()

    return heatmaps


def plain_heatmaps(network: PoseNetwork, precision: str) -> Heatmaps:
    """The network as it is, where it is; bfloat16 by autocast."""
    def heatmaps(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, DTYPES[precision], enabled=precision != "float32"):
            return network.predict(images).float()

    return heatmaps


def fold_batch_norms(network: PoseNetwork) -> PoseNetwork:
    """A copy in which each batch norm, a fixed scale and shift once trained, is part of its convolution."""
    folded = copy.deepcopy(network).eval()
    for conv, norm in network.foldable():
        fused = fuse_conv_bn_eval(folded.get_submodule(conv), folded.get_submodule(norm))  # type: ignore[arg-type,type-var]
        folded.set_submodule(conv, fused)
        folded.set_submodule(norm, nn.Identity())
    return folded


def _lower_precision(network: PoseNetwork, dtype: torch.dtype) -> None:
    """All but the last convolution: of heatmaps up to 255, bfloat16's steps of 1 would make ties of neighbours."""
    network.to(dtype)
    finest = network.heads[-1][-1]
    network.set_submodule(finest, _InFloat32(network.get_submodule(finest).float()))


class _InFloat32(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x.float())
        return y


class _Finest(nn.Module):
    """The network's `predict` as its `forward`, which is what is traced."""

    def __init__(self, network: PoseNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.predict(images)


def _openvino(network: PoseNetwork, precision: str, batch_size: int, threads: int | None) -> Heatmaps:
    # the converter tells its makers of each use, unless this package can't be imported; pictures' owners didn't agree
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    width, height = network.config.input_size_wh
    example = torch.zeros(min(batch_size, OPENVINO_CROPS), 3, height, width)
    with warnings.catch_warnings():  # tracing, which the converter does, is out of fashion; our sizes are fixed
        warnings.simplefilter("ignore")
        traced = openvino.convert_model(_Finest(network), example_input=example, input=[tuple(example.shape)])
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision], "NUM_STREAMS": 1}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.compile_model(traced, "CPU", settings)

    def heatmaps(images: Tensor) -> Tensor:
        return torch.cat([some_heatmaps(some) for some in torch.split(images, len(example))])

    def some_heatmaps(some: Tensor) -> Tensor:
        filled = functional.pad(some, (0, 0, 0, 0, 0, 0, 0, len(example) - len(some)))
        return torch.from_numpy(compiled(filled.numpy())[0][:len(some)].copy())

    return heatmaps
