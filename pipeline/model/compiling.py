"""torch.compile for a network's training forward, and whether this machine can do it.

Backward follows from what was compiled; loss, targets and optimiser stay as they are.
"""

import sysconfig
from pathlib import Path

from torch import nn


def compile_forward(network: nn.Module, mode: str) -> None:
    """Compile what calling the network (or its distributed wrapper) does, at its first call, for each size anew.

    In place, so that names of weights stay; a deep copy isn't compiled.
    """
    network.compile(mode=mode, dynamic=False)


def why_not_compile() -> str | None:
    """What this machine lacks for torch.compile, with the remedy; None where it can."""
    # torch asks here whenever it compiles; importing it takes a second
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler: install g++, or set CXX to one"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.is_file() else f"{header} is missing: install Python's headers (python3-dev)"
