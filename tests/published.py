"""Weight files as they are published, made from the published lists of names and shapes (tests/golden)."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
Keys = list[tuple[str, list[int]]]


def published_keys(layout: str, num_stages: int) -> Keys:
    """Names and shapes of a public file's state dict, in order; layout is "official" or "mmpose"."""
    return [(name, shape) for name, shape in json.loads((GOLDEN / f"{layout}_keys_s{num_stages}.json").read_text())]


def narrow(keys: Keys) -> Keys:
    """The same names with an eighth of the channels: a file of 2 MB rather than 100."""
    return [(name, [size // 8 if size >= 64 else size for size in shape]) for name, shape in keys]


def made_weights(keys: Keys, seed: int) -> dict[str, Tensor]:
    """The weights that the golden answers are for (golden README: one stream of random numbers, in order)."""
    draws = np.random.RandomState(seed)
    return {name: _made(name, shape, draws) for name, shape in keys}


def _made(name: str, shape: list[int], draws: np.random.RandomState) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    if len(shape) == 4:
        values = draws.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("running_var"):
        values = draws.uniform(0.5, 1.5, shape)
    elif name.endswith("weight"):
        values = draws.uniform(0.3, 0.9, shape)
    else:
        values = 0.1 * draws.standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


def made_images(seed: int) -> Tensor:
    """The normalised images [2, 3, 256, 192] that the golden answers are for."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((2, 3, 256, 192)).astype(np.float32))


def publish(folder: Path, content: Any, *, name: str = "mspn50_coco_256x192") -> Path:
    """A file named as MMPose publishes, with the first digits of its own SHA-256."""
    draft = folder / "draft.pth"
    torch.save(content, draft)
    digits = hashlib.sha256(draft.read_bytes()).hexdigest()[:8]
    return draft.rename(folder / f"{name}-{digits}_20201123.pth")
