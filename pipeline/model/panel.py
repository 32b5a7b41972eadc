"""One network on paper, for `pipeline.model.fusing`: boxes and arrows, each there because its module was called."""

# ruff: noqa: RUF001 (the multiplication sign is meant)

from collections.abc import Sequence
from math import log2, sqrt
from typing import Any

import numpy.typing as npt
from torch import nn

from pipeline.model.network import NetworkConfig
from pipeline.model.observed import lessons, look_at
from pipeline.model.settings import ARCHITECTURES, GaussianLoss
from pipeline.model.targets import gaussian_taps
from pipeline.svg import Drawing, Point, box, dot, group, path, text

W, H = 22, 17  # half a box
PLUS = 8  # half a sum
FIRST_ROW, LAST_ROW = 96, 44  # from a panel's top to its first row, from its last row to its bottom
CARD_TOP = 50


class Panel:
    """A row for each resolution, time from left to right; the id of each part is the panel's name and the module's.

    A module's row follows from the shape that it gives. What is drawn later lies above, and boxes above arrows.
    """

    def __init__(self, config: NetworkConfig, top: float, *, pitch: float) -> None:
        self.name, self.top, self.pitch = config.architecture, top, pitch
        self.seen = look_at(config)
        self.heads = [head for stage in self.seen.network.heads for head in stage]
        self.deviations = deviations(config.architecture, self.seen.network.heads)
        self.cards: list[tuple[float, float, str]] = []
        self.ways: Drawing = []
        self.boxes: Drawing = []
        self.labels: Drawing = []
        self.rows: dict[float, str] = {}
        self.right = 0.0

    def __contains__(self, module: str) -> bool:
        """Whether the network calls it."""
        return module in self.seen.passages

    @property
    def bottom(self) -> float:
        """Below the last row."""
        return max(self.rows) + LAST_ROW

    def module(self, name: str) -> nn.Module:
        """The network's module of this name."""
        return self.seen.network.get_submodule(name)

    def y(self, module: str, *, takes: bool = False) -> float:
        """The row of what a module gives, or takes."""
        passage = self.seen.passages[module]
        height = (passage.takes if takes else passage.gives)[1]
        return self.top + FIRST_ROW + self.pitch * (log2(self.seen.network.config.input_size_wh[1] / height) - 2)

    def way(self, points: Sequence[Point], kind: str = "flow", *, module: str = "", tip: bool = True) -> None:
        """An arrow; one that stands for a module only if that is called."""
        if not module:
            self.ways.append(path(points, kind, tip=tip))
        elif module in self:
            self.ways += group(f"{self.name}.{module}", [path(points, kind, tip=tip)])

    def fork(self, x: float, y: float) -> None:
        """Where arrows part or meet."""
        self.boxes.append(dot(x, y, "flow-tip"))

    def label(self, x: float, y: float, words: str, *, module: str) -> None:
        """What a module that is handed over is called."""
        if module in self:
            self.labels.append(text(x, y, words, "cross-tip wires"))

    def plus(self, module: str, x: float, y: float, *, kind: str = "plain") -> None:
        """The sum of what a module gives and something else."""
        sign = text(x, y + 4, "+", "text name", "middle")
        self.boxes += group(f"{self.name}.{module}.add",
                            [box(x - PLUS, y - PLUS, 2 * PLUS, 2 * PLUS, kind, radius=PLUS), sign])
        self.right = max(self.right, x + PLUS)

    def box(self, module: str, x: float, kind: str, *, words: str | None = None, head: str = "") -> None:
        """What computes at a resolution: its name and channels, or its name and how its head's target is blurred."""
        y, (channels, height, width) = self.y(module), self.seen.passages[module].gives
        name = module.rsplit(".", 1)[-1] if words is None else words
        channel_y = y + (10 if name else 4)
        below = self._target(head, x, y) if head else [text(x, channel_y, str(channels), "text", "middle")]
        self.boxes += group(f"{self.name}.{module}", [
            box(x - W, y - H, 2 * W, 2 * H, kind), text(x, y - 5, name, "text wires", "middle"), *below])
        self.rows[y] = f"{height}×{width}"
        self.right = max(self.right, x + W)

    def _target(self, head: str, x: float, y: float) -> Drawing:
        kind = "answer" if head == self.heads[-1] else "plain" if head in self.seen.predicting else "training"
        return group(f"{self.name}.{head}.target", [box(x - 18, y - 1, 36, 14, kind, radius=4), text(
            x, y + 10, f"σ {self.deviations[head]:.1f}", "text", "middle")])

    def card(self, left: float, right: float, title: str) -> None:
        """What lies behind a stage, from one x to another."""
        self.cards.append((left, right, title))
        self.right = max(self.right, right)

    def drawing(self, title: str, idea: str) -> Drawing:
        """All of it under the panel's name, with what it is and what its rows are."""
        parameters = sum(parameter.numel() for parameter in self.seen.network.parameters())
        cards = [box(left, self.top + CARD_TOP, right - left, self.bottom - self.top - CARD_TOP, "card")
                 for left, right, _ in self.cards]
        words = [text(left + 8, self.top + CARD_TOP - 6, name, "text wires") for left, _, name in self.cards]
        words += [text(16, self.top + 18, title, "text stage"),
                 text(250, self.top + 18, f"{idea}; {parameters:,} parameters", "text")]
        for y, size in self.rows.items():
            stride = 4 * 2 ** round((y - self.top - FIRST_ROW) / self.pitch)
            words += [text(16, y, f"1/{stride}", "text name"), text(16, y + 14, size, "faint")]
        return group(self.name, [*cards, *words, *self.ways, *self.boxes, *self.labels])


def deviations(architecture: str, heads: list[list[str]]) -> dict[str, float]:
    """The standard deviation, in cells, of the target that each head is taught by default."""
    loss, names = ARCHITECTURES[architecture].loss, [head for stage in heads for head in stage]
    if isinstance(loss, GaussianLoss):
        return dict.fromkeys(names, loss.sigma)
    kernels = [lesson.kernel for stage in lessons(len(heads)) for lesson in stage]
    return {head: _deviation(gaussian_taps(kernel)) for head, kernel in zip(names, kernels, strict=True)}


def _deviation(taps: npt.NDArray[Any]) -> float:
    middle = len(taps) // 2
    return sqrt(sum(tap * (cell - middle) ** 2 for cell, tap in enumerate(taps)) / sum(taps))
