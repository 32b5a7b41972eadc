"""The network as a picture, drawn from the code itself: a changed network changes it, and a test then says so.

    python -m pipeline.model.diagram --output docs/mspn.svg [--stages N]

Shapes come from one forward pass without data (torch's meta device), what each head learns from asking the loss,
and what inference computes from watching it. Only places, colours and words are chosen here.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import torch
from torch import Tensor, nn

from pipeline.model.loss import OHKM_JOINTS, UNITS, mspn_loss
from pipeline.model.mspn import MSPN, ConvBNReLU, MSPNConfig
from pipeline.model.targets import KERNELS, gaussian_taps

Shape = tuple[int, ...]
Drawing = list[str]
Point = tuple[float, float]

# --- places, in pixels: one column for each resolution, one card for each stage -----------------------------------

WIDTH = 1012
LEFT, PITCH, BOX_WIDTH, HEAD_WIDTH = 58, 232, 140, 150  # of the columns, and of what stands in them
LANE = 34  # x of what enters a stage's first layer
SKIP2, FEATURE = 168, 196  # x of a column's two downward lines
STEM_TOP, FIRST_CARD, CARD_HEIGHT, BETWEEN = 84, 218, 392, 92
TRUNK, TRUNK_HEIGHT = 40, 62  # y within a card, and height
UNIT, UNIT_HEIGHT = 134, 92
HEAD, HEAD_HEIGHT = 256, 122
ROW_U_SKIP, ROW_UP_CONV, ROW_OUT = 38, 58, 78  # y within a unit
CHIP_WIDTH, CHIP_HEIGHT, CHIP_TOP, CHIP_SKIP2 = 84, 34, 20, 96

# each kind: what it is on a light page, and on a dark one
COLOURS = {
    "page": ("fill:#f6f8fa", "fill:#0d1117"),
    "card": ("fill:#ffffff;stroke:#d0d7de", "fill:#161b22;stroke:#30363d"),
    "trunk": ("fill:#ddebff;stroke:#2563eb", "fill:#10284f;stroke:#58a6ff"),
    "unit": ("fill:#ece7ff;stroke:#7c3aed", "fill:#2a2150;stroke:#a78bfa"),
    "training": ("fill:#f6f8fa;stroke:#6e7781;stroke-dasharray:4 3", "fill:#1f252d;stroke:#8b949e"),
    "answer": ("fill:#dafbe1;stroke:#1a7f37;stroke-width:2", "fill:#12301d;stroke:#3fb950"),
    "chip": ("fill:#ffefe2;stroke:#bc4c00", "fill:#3a2110;stroke:#f0883e"),
    "plain": ("fill:#f6f8fa;stroke:#57606a", "fill:#1f252d;stroke:#8b949e"),
    "bar": ("fill:#57606a", "fill:#adbac7"),
    "flow": ("stroke:#424a53", "stroke:#c9d1d9"),
    "cross": ("stroke:#bc4c00", "stroke:#f0883e"),
    "halo": ("stroke:#ffffff;stroke-width:7", "stroke:#161b22"),
    "flow-tip": ("fill:#424a53", "fill:#c9d1d9"),
    "cross-tip": ("fill:#bc4c00", "fill:#f0883e"),
    "text": ("fill:#1f2328", "fill:#e6edf3"),
    "faint": ("fill:#57606a", "fill:#9da7b3"),
    "good": ("fill:#116329;font-weight:700", "fill:#56d364"),
}
STYLE = """
text { font: 11px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
.name, .wires { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.name { font-size: 12px; font-weight: 700 } .wires { font-size: 10.5px } .title { font-size: 19px; font-weight: 700 }
.stage { font-size: 14px; font-weight: 700 } path { fill: none; stroke-width: 1.5 } marker path { stroke: none }
"""


# --- what the code does -------------------------------------------------------------------------------------------


class Passage(NamedTuple):
    """The shapes [C, H, W] that a module takes (its first argument) and gives."""

    takes: Shape
    gives: Shape


class Lesson(NamedTuple):
    """What a head learns: the target's kernel in cells, the weight of its loss, and the number of joints that
    count where only the hardest do (None: all)."""

    kernel: int
    weight: float
    hardest: int | None


class Facts(NamedTuple):
    """All that is drawn: the network, its modules' passages, its heads' lessons (stage by stage, coarse to fine),
    the names of the modules that `predict` calls, and the shape of all heatmaps."""

    network: MSPN
    passages: dict[str, Passage]
    lessons: list[list[Lesson]]
    predicting: set[str]
    heatmap: Shape


def facts_of(config: MSPNConfig) -> Facts:
    """Build the network without data and watch it."""
    with torch.device("meta"), torch.inference_mode():
        network = MSPN(config).eval()
        images = torch.empty(1, 3, *config.input_size_wh[::-1])
        with _watched(network) as passages:
            heatmap = network(images)[-1][-1].shape
        with _watched(network) as predicting:
            network.predict(images)
    return Facts(network, passages, lessons(config.num_stages), set(predicting), tuple(heatmap[1:]))


@contextmanager
def _watched(network: nn.Module) -> Iterator[dict[str, Passage]]:
    """The passages of all modules that are called inside the block, by name, in the order of their ends."""
    passages: dict[str, Passage] = {}

    def note(name: str, _: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            passages[name] = Passage(tuple(arguments[0].shape[1:]), tuple(output.shape[1:]))

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in network.named_modules()]
    try:
        yield passages
    finally:
        for hook in hooks:
            hook.remove()


def lessons(num_stages: int) -> list[list[Lesson]]:
    """What `mspn_loss` teaches each head, stage by stage, coarse to fine, found by asking it.

    Heads that answer 0 pay only for the target that they learn: one target of 1 after the other tells which that
    is and what it weighs. An error of a single joint then tells whether all joints count or only the hardest.
    """
    num_joints = OHKM_JOINTS + 1
    silent = [[torch.zeros(1, num_joints, 1, 1)] * UNITS] * num_stages
    visible = torch.full((1, num_joints), 2)

    def shares(targets: Tensor) -> Tensor:
        return mspn_loss(silent, targets, visible).heads

    each_kernel = torch.eye(len(KERNELS)).view(len(KERNELS), 1, len(KERNELS), 1, 1, 1).expand(
        -1, -1, -1, num_joints, -1, -1)
    weights, kernels = torch.stack([shares(targets) for targets in each_kernel]).max(dim=0)
    one_joint = torch.zeros(1, len(KERNELS), num_joints, 1, 1)
    one_joint[:, :, 0] = 1
    counting = (weights / shares(one_joint)).round().int()
    return [[Lesson(KERNELS[kernels[s, u]], float(weights[s, u]),
                    int(counting[s, u]) if counting[s, u] < num_joints else None)
             for u in range(UNITS)] for s in range(num_stages)]


# --- the picture --------------------------------------------------------------------------------------------------


def diagram(config: MSPNConfig) -> str:
    """The picture of a network as an SVG document; each part is a group with its state-dict name as id."""
    facts = facts_of(config)
    drawing = _header(facts) + _legend(facts) + _stem(facts)
    for index in range(config.num_stages):
        drawing += _stage(facts, index)
    height = _card_top(config.num_stages) - BETWEEN + 16
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
             f'height="{height}" role="img">', f"<title>{escape(_title(config))}</title>", _style(), _tips(),
             f'<rect class="page" width="{WIDTH}" height="{height}" rx="10"/>', *drawing, "</svg>"]
    return "\n".join(parts) + "\n"


def _title(config: MSPNConfig) -> str:
    return f"MSPN with {config.num_stages} stage{'s' * (config.num_stages > 1)} and {config.num_joints} joints"


def _header(facts: Facts) -> Drawing:
    num_parameters = sum(parameter.numel() for parameter in facts.network.parameters())
    notes = f"{num_parameters:,} parameters. Shapes are channels × height × width, without the batch."
    return [_text(16, 34, _title(facts.network.config), "text title"), _text(16, 56, notes, "faint")]


def _stem(facts: Facts) -> Drawing:
    conv, stem = _conv(facts, "top.conv"), facts.passages["top"]
    pooled = "then 3×3 max pool, stride 2"
    lines = [_text(176, STEM_TOP + 18, "top", "text name"),
             _text(176, STEM_TOP + 35, f"{conv} {_wires(facts, 'top.conv')}, stride 2", "text wires"),
             _text(176, STEM_TOP + 51, pooled, "text"), _text(176, STEM_TOP + 68, _size(stem.gives), "text")]
    images = [_text(28, STEM_TOP + 18, "images", "text name"), _text(28, STEM_TOP + 35, "normalised", "text"),
              _text(28, STEM_TOP + 51, _size(stem.takes), "text")]
    turn = FIRST_CARD - 30
    ways = [_path([(126, STEM_TOP + 38), (164, STEM_TOP + 38)]),
            _path([(210, STEM_TOP + 76), (210, turn), (LANE, turn), *_into_first_layer(FIRST_CARD)])]
    return [*ways, *_group("images", [_box(16, STEM_TOP, 110, 76, "plain"), *images]),
            *_group("top", [_box(164, STEM_TOP, 196, 76, "trunk"), *lines])]


def _stage(facts: Facts, index: int) -> Drawing:
    top, stage = _card_top(index), facts.network.stages[index]
    what = ("the last stage hands nothing over; its finest head is the network's answer" if stage.is_last
            else f"hands over to stage {index + 1}: its finest features, and skip1 + skip2 at each resolution")
    card = [_box(8, top, WIDTH - 16, CARD_HEIGHT, "card"), _text(LEFT, top + 24, f"stage{index}", "text stage"),
            _text(LEFT + 64, top + 24, what, "faint")]
    ways, parts = [], []
    for column in range(UNITS):
        ways += _trunk_ways(facts, index, column) + _unit_ways(column, top)
        ways += [] if stage.is_last else _hand_over(facts, index, column)
        parts += _layer(facts, index, column) + _unit(facts, index, column) + _head(facts, index, column)
    lane = [] if stage.is_last else _cross_conv(facts, index)
    return [*card, *_group(f"stage{index}", [*ways, *lane, *parts])]


def _layer(facts: Facts, index: int, column: int) -> Drawing:
    name = f"stage{index}.downsample.layer{column + 1}"
    layer, x, y = facts.network.get_submodule(name), _column(column), _card_top(index) + TRUNK
    assert isinstance(layer, nn.Sequential)
    width = facts.passages[f"{name}.0.conv_bn_relu1"].gives[0]
    lines = [_text(x + 10, y + 18, f"layer{column + 1}", "text name"),
             _text(x + 10, y + 35, f"{len(layer)} bottlenecks of {width}", "text"),
             _text(x + 10, y + 52, _size(facts.passages[name].gives), "text")]
    return _group(name, [_box(x, y, BOX_WIDTH, TRUNK_HEIGHT, "trunk"), *lines])


def _trunk_ways(facts: Facts, index: int, column: int) -> Drawing:
    """From a layer to the next one, by way of the sum with the skips; and down to the unit."""
    top, x = _card_top(index), _column(column)
    y, unit_y = top + TRUNK + TRUNK_HEIGHT / 2, top + UNIT + ROW_U_SKIP
    end = _column(column + 1) if column < UNITS - 1 else x + FEATURE
    ways = [_path([(x + BOX_WIDTH, y), (end, y)], tip=column < UNITS - 1),
            _path([(x + FEATURE, y), (x + FEATURE, unit_y), (x + BOX_WIDTH, unit_y)])]
    if index == 0:
        return [*ways, _dot(x + FEATURE, y)] if column < UNITS - 1 else ways
    add = [_box(x + 156, y - 12, 52, 24, "chip", radius=12), _text(x + 182, y + 5, "+", "text stage", "middle")]
    return [*ways, _path([(x + BOX_WIDTH, y), (x + 156, y)]),
            *_group(f"stage{index}.downsample.layer{column + 1}.add", add)]


def _unit(facts: Facts, index: int, column: int) -> Drawing:
    level = UNITS - column
    name, x, y = f"stage{index}.upsample.up{level}", _column(column), _card_top(index) + UNIT
    rows = [("u_skip", ROW_U_SKIP)] + ([("up_conv", ROW_UP_CONV)] if level > 1 else [])
    lines = [_text(x + 10, y + 18, f"up{level}", "text name"),
             _text(x + BOX_WIDTH - 8, y + 18, _size(facts.passages[name].gives), "text", "end"),
             _text(x + 10, y + ROW_OUT + 4, "add, ReLU" if level > 1 else "ReLU", "text")]
    for part, row in rows:
        words = [_text(x + 10, y + row + 4, f"{part} {_conv(facts, f'{name}.{part}')}", "text wires"),
                 _text(x + BOX_WIDTH - 8, y + row + 4, _wires(facts, f"{name}.{part}"), "text wires", "end")]
        lines += _group(f"{name}.{part}", words)
    return _group(name, [_box(x, y, BOX_WIDTH, UNIT_HEIGHT, "unit"), *lines])


def _unit_ways(column: int, top: int) -> Drawing:
    """From a unit down to its head, and from the coarser unit into it."""
    x, y = _column(column), top + UNIT
    ways = [_path([(x + BOX_WIDTH / 2, y + UNIT_HEIGHT), (x + BOX_WIDTH / 2, top + HEAD)])]
    if column == UNITS - 1:
        return ways
    bend = x + FEATURE + 18
    up = [(_column(column + 1), y + ROW_OUT), (bend, y + ROW_OUT), (bend, y + ROW_UP_CONV),
          (x + BOX_WIDTH, y + ROW_UP_CONV)]
    return [*ways, _path(up), _text(x + FEATURE - 6, y + ROW_UP_CONV - 4, "resize", "faint", "end")]


def _head(facts: Facts, index: int, column: int) -> Drawing:
    level = UNITS - column
    name, x, y = f"stage{index}.upsample.up{level}", _column(column), _card_top(index) + HEAD
    is_answer = f"{name}.res_conv2" in facts.predicting
    convs = [_text(x + 9, y + row, f"{part} {_conv(facts, f'{name}.{part}')} {_wires(facts, f'{name}.{part}')}",
                   "text wires") for part, row in (("res_conv1", 18), ("res_conv2", 33))]
    resized = facts.passages[f"{name}.res_conv2"].gives != facts.heatmap
    size = _text(x + 9, y + 49, ("resize to " if resized else "") + _size(facts.heatmap), "text")
    end = _text(x + 9, y + 112, "inference reads this one" if is_answer else "in training only",
                "good" if is_answer else "faint")
    box = _box(x, y, HEAD_WIDTH, HEAD_HEIGHT, "answer" if is_answer else "training")
    return _group(f"{name}.head", [box, *convs, size, *_lesson(facts.lessons[index][level - 1], x + 9, y + 60), end])


def _lesson(lesson: Lesson, x: float, y: float) -> Drawing:
    loss = "plain L2" if lesson.hardest is None else f"OHKM top {lesson.hardest}"
    weight = "" if lesson.weight == 1 else f" × 1/{round(1 / lesson.weight)}"
    return [*_taps(lesson.kernel, x, y), _text(x + 68, y + 13, f"kernel {lesson.kernel}", "text"),
            _text(x + 68, y + 29, loss + weight, "text")]


def _taps(kernel: int, x: float, y: float) -> Drawing:
    """The target's profile across the joint, a bar for each cell, in a field of 60×32."""
    taps = gaussian_taps(kernel) / gaussian_taps(kernel).max()
    left = x + 2 * (max(KERNELS) - kernel)
    return [f'<rect class="bar" x="{left + 4 * cell:g}" y="{y + 32 - max(1, 32 * tap):.1f}" width="3" '
            f'height="{max(1, 32 * tap):.1f}"/>' for cell, tap in enumerate(taps.tolist())]


def _hand_over(facts: Facts, index: int, column: int) -> Drawing:
    """A column's skip1 and skip2, from this stage's features to the sum after the next stage's layer."""
    top, next_top, x = _card_top(index), _card_top(index + 1), _column(column)
    unit, name = top + UNIT, f"stage{index}.upsample.up{UNITS - column}"
    chips, add = top + CARD_HEIGHT + CHIP_TOP, next_top + TRUNK + TRUNK_HEIGHT / 2 - 12
    middle = x + CHIP_SKIP2
    skip1 = [(x + FEATURE, unit + ROW_U_SKIP), (x + FEATURE, chips)]
    skip2 = [(x + BOX_WIDTH, unit + ROW_OUT), (x + SKIP2, unit + ROW_OUT), (x + SKIP2, chips - 11),
             (middle, chips - 11), (middle, chips)]
    back = [(middle, chips + CHIP_HEIGHT), (middle, chips + CHIP_HEIGHT + 14), (x + SKIP2, chips + CHIP_HEIGHT + 14),
            (x + SKIP2, add)]
    return [_path(skip1, "halo", tip=False), _path(skip1, "cross"), _dot(x + FEATURE, unit + ROW_U_SKIP, "cross-tip"),
            _path(skip2, "cross"), _path(back, "cross"),
            _path([(x + FEATURE, chips + CHIP_HEIGHT), (x + FEATURE, add)], "cross"),
            *_chip(facts, f"{name}.skip1", x + FEATURE - CHIP_WIDTH / 2, chips),
            *_chip(facts, f"{name}.skip2", middle - CHIP_WIDTH / 2, chips)]


def _cross_conv(facts: Facts, index: int) -> Drawing:
    """From the finest unit to the next stage's first layer."""
    top, name = _card_top(index), f"stage{index}.upsample.up{UNITS}.cross_conv"
    chips, out = top + CARD_HEIGHT + CHIP_TOP, top + UNIT + ROW_OUT
    return [_path([(LEFT, out), (LANE, out), (LANE, chips)], "cross"),
            _path([(LANE, chips + CHIP_HEIGHT), *_into_first_layer(_card_top(index + 1))], "cross"),
            *_chip(facts, name, 14, chips),
            _text(LANE + 8, chips + CHIP_HEIGHT + 18, _size(facts.passages[name].gives), "faint")]


def _chip(facts: Facts, name: str, x: float, y: float) -> Drawing:
    part = name.rsplit(".", 1)[1]
    words = part if part == "cross_conv" else f"{part} {_conv(facts, name)}"
    wires = _wires(facts, name) if part != "cross_conv" else f"{_conv(facts, name)} {_wires(facts, name)}"
    middle = x + CHIP_WIDTH / 2
    return _group(name, [_box(x, y, CHIP_WIDTH, CHIP_HEIGHT, "chip"), _text(middle, y + 14, words, "text wires", "middle"),
                         _text(middle, y + 28, wires, "text wires", "middle")])


def _legend(facts: Facts) -> Drawing:
    x, y, right = 398, 30, 712
    swatches = [("trunk", "stem and trunk (a ResNet-50's layers)"), ("unit", "upsample unit"),
                ("training", "head that only training computes"), ("answer", "head that inference reads")]
    drawing = [item for row, (kind, words) in enumerate(swatches)
               for item in (_box(x, y + 24 * row - 11, 24, 15, kind, radius=4), _text(x + 34, y + 24 * row, words, "text"))]
    drawing += [_path([(right, y - 4), (right + 26, y - 4)], "cross"),
                _text(right + 36, y, "handed over to the next stage", "text"),
                _box(right, y + 13, 26, 15, "chip", radius=8), _text(right + 13, y + 25, "+", "text name", "middle"),
                _text(right + 36, y + 24, "added to the layer's output, no ReLU after", "text"),
                *[bar for bar in _taps(5, right - 17, y + 22)],
                _text(right + 36, y + 48, "target: 1 at the joint, blurred over n cells", "text"),
                _text(right + 36, y + 72, "OHKM: only a person's hardest joints count", "text")]
    bare = sorted({name.rsplit(".", 1)[1] for name, module in facts.network.named_modules()
                   if isinstance(module, ConvBNReLU) and not module.relu and ".upsample." in name})
    notes = ["n×n a→b: a convolution from a to b channels, then batch norm, then ReLU",
             f"(no ReLU in {', '.join(bare)}). resize: bilinear, corners aligned."]
    return _group("legend", drawing + [_text(x, y + 100 + 17 * row, note, "faint") for row, note in enumerate(notes)])


# --- words and places ---------------------------------------------------------------------------------------------


def _conv(facts: Facts, name: str) -> str:
    module = facts.network.get_submodule(name)
    assert isinstance(module, ConvBNReLU)
    return "×".join(map(str, module.conv.kernel_size))


def _wires(facts: Facts, name: str) -> str:
    passage = facts.passages[name]
    return f"{passage.takes[0]}→{passage.gives[0]}"


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _card_top(index: int) -> int:
    return FIRST_CARD + index * (CARD_HEIGHT + BETWEEN)


def _column(column: int) -> int:
    return LEFT + PITCH * column


def _into_first_layer(card_top: int) -> list[Point]:
    y = card_top + TRUNK + TRUNK_HEIGHT / 2
    return [(LANE, y), (LEFT, y)]


# --- SVG ----------------------------------------------------------------------------------------------------------


def _group(name: str, drawing: Drawing) -> Drawing:
    return [f'<g id="{name}">', *drawing, "</g>"]


def _box(x: float, y: float, width: float, height: float, kind: str, *, radius: int = 7) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"/>'


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    anchored = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{x:g}" y="{y:g}"{anchored}>{escape(words)}</text>'


def _dot(x: float, y: float, kind: str = "flow-tip") -> str:
    return f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="3"/>'


def _path(points: Sequence[Point], kind: str = "flow", *, tip: bool = True) -> str:
    """A line with right angles, its corners rounded, its end an arrow."""
    steps = [f"M{points[0][0]:g} {points[0][1]:g}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        start, end = _towards(corner, before), _towards(corner, after)
        steps.append(f"L{start[0]:g} {start[1]:g}Q{corner[0]:g} {corner[1]:g} {end[0]:g} {end[1]:g}")
    steps.append(f"L{points[-1][0]:g} {points[-1][1]:g}")
    arrow = f' marker-end="url(#{kind}-arrow)"' if tip else ""
    return f'<path class="{kind}" d="{"".join(steps)}"{arrow}/>'


def _towards(corner: Point, other: Point, *, radius: float = 6) -> Point:
    """The point at most a radius away from a corner, on the way to another point on its row or column."""
    x, y = (max(-radius, min(radius, there - here)) for here, there in zip(corner, other, strict=True))
    return corner[0] + x, corner[1] + y


def _tips() -> str:
    return "<defs>" + "".join(
        f'<marker id="{kind}-arrow" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path class="{kind}-tip" style="stroke:none" '
        f'd="M0 .5L8 4L0 7.5Z"/></marker>' for kind in ("flow", "cross")) + "</defs>"


def _style() -> str:
    light = " ".join(f".{kind}{{{light}}}" for kind, (light, _) in COLOURS.items())
    dark = " ".join(f".{kind}{{{dark}}}" for kind, (_, dark) in COLOURS.items())
    return f"<style>{STYLE}{light}\n@media (prefers-color-scheme: dark){{{dark}}}</style>"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture; a network of COCO's 17 joints and two stages unless told otherwise."""
    parser = argparse.ArgumentParser(description="Draw MSPN as an SVG.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stages", type=int, default=2)
    options = parser.parse_args(arguments)
    options.output.write_text(diagram(MSPNConfig(num_joints=17, num_stages=options.stages)), encoding="utf-8")


if __name__ == "__main__":
    main()
