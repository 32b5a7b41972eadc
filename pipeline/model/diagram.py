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
ADD, ADD_WIDTH = 156, 52  # x and width of the sum that they end in
STEM_TOP, FIRST_CARD, CARD_HEIGHT, BETWEEN = 78, 200, 392, 92
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
    drawing = _header(facts) + _legend(facts)
    for draw in (_card, _ways, _parts):  # what is drawn later lies above
        for index in range(config.num_stages):
            drawing += draw(facts, index)
    drawing += _stem(facts)
    height = _card_top(config.num_stages) - BETWEEN + 16
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
             f'height="{height}" role="img">', f"<title>{escape(_title(config))}</title>", _style(), _tips(),
             f'<rect class="page" width="{WIDTH}" height="{height}" rx="10"/>', *drawing, "</svg>"]
    return "\n".join(parts) + "\n"


def _title(config: MSPNConfig) -> str:
    return f"MSPN with {config.num_stages} stage{'s' * (config.num_stages > 1)} and {config.num_joints} joints"


def _header(facts: Facts) -> Drawing:
    num_parameters = sum(parameter.numel() for parameter in facts.network.parameters())
    notes = f"{num_parameters:,} parameters"
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


def _card(facts: Facts, index: int) -> Drawing:
    top = _card_top(index)
    what = "the last" if facts.network.stages[index].is_last else ""
    return [_box(8, top, WIDTH - 16, CARD_HEIGHT, "card"), _text(LEFT, top + 24, f"stage{index}", "text stage"),
            _text(LEFT + 64, top + 24, what, "faint")]


def _ways(facts: Facts, index: int) -> Drawing:
    ways: Drawing = []
    for column in range(UNITS):
        ways += _trunk_ways(index, column) + _unit_ways(index, column)
        ways += [] if facts.network.stages[index].is_last else _hand_over(facts, index, column)
    return ways + ([] if facts.network.stages[index].is_last else _cross_conv(facts, index))


def _parts(facts: Facts, index: int) -> Drawing:
    parts: Drawing = []
    for column in range(UNITS):
        parts += _layer(facts, index, column) + _unit(facts, index, column) + _head(facts, index, column)
        parts += _add(index, column) if index > 0 else []
    return _group(f"stage{index}", parts)


def _layer(facts: Facts, index: int, column: int) -> Drawing:
    name = f"stage{index}.downsample.layer{column + 1}"
    layer, x, y = facts.network.get_submodule(name), _column(column), _card_top(index) + TRUNK
    assert isinstance(layer, nn.Sequential)
    width, shape = facts.passages[f"{name}.0.conv_bn_relu1"].gives[0], facts.passages[name].gives
    lines = [_text(x + 10, y + 18, f"layer{column + 1}", "text name"),
             _text(x + BOX_WIDTH - 10, y + 18, f"1/{facts.passages['top'].takes[1] // shape[1]}", "faint", "end"),
             _text(x + 10, y + 35, f"{len(layer)} blocks, width {width}", "text"),
             _text(x + 10, y + 52, _size(shape), "text")]
    return _group(name, [_box(x, y, BOX_WIDTH, TRUNK_HEIGHT, "trunk"), *lines])


def _trunk_ways(index: int, column: int) -> Drawing:
    """From a layer to the next one, where there are skips by way of the sum with them; and down to the unit."""
    top, x = _card_top(index), _column(column)
    y, unit_y, is_last = top + TRUNK + TRUNK_HEIGHT / 2, top + UNIT + ROW_U_SKIP, column == UNITS - 1
    along = [(x + BOX_WIDTH, y), (x + FEATURE if is_last else _column(column + 1), y)]
    down = [(x + FEATURE, y), (x + FEATURE, unit_y), (x + BOX_WIDTH, unit_y)]
    if is_last:  # no next layer: one line, with one corner
        return [_path([along[0], *down])] if index == 0 else [_path([along[0], (x + ADD, y)]), _path(down)]
    branch = [_dot(x + FEATURE, y)] if index == 0 else [_path([along[0], (x + ADD, y)])]
    return [_path(along), _path(down), *branch]


def _add(index: int, column: int) -> Drawing:
    """The sum of a layer's output and its two skips."""
    x, y = _column(column) + ADD, _card_top(index) + TRUNK + TRUNK_HEIGHT / 2
    sign = _text(x + ADD_WIDTH / 2, y + 5, "+", "text stage", "middle")
    return _group(f"stage{index}.downsample.layer{column + 1}.add", [_box(x, y - 12, ADD_WIDTH, 24, "chip", radius=12), sign])


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


def _unit_ways(index: int, column: int) -> Drawing:
    """From a unit down to its head, and from the coarser unit into it."""
    top, x = _card_top(index), _column(column)
    y = top + UNIT
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
    end = _text(x + 9, y + 112, "inference reads this" if is_answer else "in training only",
                "good" if is_answer else "faint")
    box = _box(x, y, HEAD_WIDTH, HEAD_HEIGHT, "answer" if is_answer else "training")
    return _group(f"{name}.head", [box, *convs, size, *_lesson(facts.lessons[index][level - 1], x + 9, y + 60), end])


def _lesson(lesson: Lesson, x: float, y: float) -> Drawing:
    loss = "L2" if lesson.hardest is None else f"OHKM top {lesson.hardest}"
    weight = "" if lesson.weight == 1 else f" × 1/{round(1 / lesson.weight)}"
    return [*_taps(lesson.kernel, x, y + 32), _text(x + 70, y + 13, f"kernel {lesson.kernel}", "text"),
            _text(x + 70, y + 29, loss + weight, "text")]


def _taps(kernel: int, x: float, bottom: float, *, height: int = 32) -> Drawing:
    """The target's profile across the joint, a bar for each cell, in a field 60 wide."""
    tallest = gaussian_taps(kernel).max()
    bars = [max(1, height * tap / tallest) for tap in gaussian_taps(kernel)]
    left = x + 2 * (max(KERNELS) - kernel)
    return [f'<rect class="bar" x="{left + 4 * cell:g}" y="{bottom - bar:.1f}" width="3" height="{bar:.1f}"/>'
            for cell, bar in enumerate(bars)]


def _hand_over(facts: Facts, index: int, column: int) -> Drawing:
    """A column's skip1 and skip2, from this stage's features to the sum after the next stage's layer."""
    top, next_top, x = _card_top(index), _card_top(index + 1), _column(column)
    unit, name = top + UNIT, f"stage{index}.upsample.up{UNITS - column}"
    chips, add = top + CARD_HEIGHT + CHIP_TOP, next_top + TRUNK + TRUNK_HEIGHT / 2 - 12
    middle = x + CHIP_SKIP2
    crossing = [(x + FEATURE, unit + ROW_UP_CONV - 6), (x + FEATURE, unit + ROW_UP_CONV + 6)]
    skip1 = [(x + FEATURE, unit + ROW_U_SKIP), (x + FEATURE, chips)]
    skip2 = [(x + BOX_WIDTH, unit + ROW_OUT), (x + SKIP2, unit + ROW_OUT), (x + SKIP2, chips - 11),
             (middle, chips - 11), (middle, chips)]
    back = [(middle, chips + CHIP_HEIGHT), (middle, chips + CHIP_HEIGHT + 14), (x + SKIP2, chips + CHIP_HEIGHT + 14),
            (x + SKIP2, add)]
    return [
        *_group(f"{name}.skip1", [
            _path(crossing, "halo", tip=False), _path(skip1, "cross"), _dot(*skip1[0], "cross-tip"),
            _path([(x + FEATURE, chips + CHIP_HEIGHT), (x + FEATURE, add)], "cross"),
            *_chip(facts, f"{name}.skip1", x + FEATURE - CHIP_WIDTH / 2, chips)]),
        *_group(f"{name}.skip2", [_path(skip2, "cross"), _path(back, "cross"),
                                  *_chip(facts, f"{name}.skip2", middle - CHIP_WIDTH / 2, chips)]),
    ]  # fmt: skip


def _cross_conv(facts: Facts, index: int) -> Drawing:
    """From the finest unit to the next stage's first layer."""
    top, name = _card_top(index), f"stage{index}.upsample.up{UNITS}.cross_conv"
    chips, out = top + CARD_HEIGHT + CHIP_TOP, top + UNIT + ROW_OUT
    size = _text(LANE + 8, chips + CHIP_HEIGHT + 18, _size(facts.passages[name].gives), "faint")
    return _group(name, [_path([(LEFT, out), (LANE, out), (LANE, chips)], "cross"),
                         _path([(LANE, chips + CHIP_HEIGHT), *_into_first_layer(_card_top(index + 1))], "cross"),
                         *_chip(facts, name, 14, chips), size])


def _chip(facts: Facts, name: str, x: float, y: float) -> Drawing:
    part = name.rsplit(".", 1)[1]
    words = part if part == "cross_conv" else f"{part} {_conv(facts, name)}"
    wires = _wires(facts, name) if part != "cross_conv" else f"{_conv(facts, name)} {_wires(facts, name)}"
    middle = x + CHIP_WIDTH / 2
    return [_box(x, y, CHIP_WIDTH, CHIP_HEIGHT, "chip"), _text(middle, y + 14, words, "text wires", "middle"),
            _text(middle, y + 28, wires, "text wires", "middle")]


def _legend(facts: Facts) -> Drawing:
    x, right, rows = 398, 676, [34, 58, 82, 106]
    left_words = ["stem and trunk: a ResNet-50's layers", "upsample unit", "head that only training computes",
                  "head that inference reads"]
    right_words = ["handed over to the next stage", "added to the layer's output, no ReLU after",
                   "target across the joint, a bar for each cell", "only a person's hardest joints count"]
    bare = sorted({name.rsplit(".", 1)[1] for name, module in facts.network.named_modules()
                   if isinstance(module, ConvBNReLU) and not module.relu and ".upsample." in name})
    notes = [f"n×n a→b: convolution from a to b channels, batch norm, ReLU (none in {', '.join(bare)})",
             "sizes: channels × height × width; resize: bilinear, corners aligned; L2: mean squared error",
             "loss: the sum over all heads"]
    return _group("legend", [
        *[_box(x, row - 12, 26, 15, kind, radius=4)
          for row, kind in zip(rows, ("trunk", "unit", "training", "answer"), strict=True)],
        *[_text(x + 36, row, words, "text") for row, words in zip(rows, left_words, strict=True)],
        _path([(right - 2, rows[0] - 4), (right + 28, rows[0] - 4)], "cross"),
        _box(right, rows[1] - 12, 26, 15, "chip", radius=8),
        _text(right + 13, rows[1], "+", "text name", "middle"),
        *_taps(KERNELS[-1], right - 17, rows[2] + 3, height=16),
        _text(right + 13, rows[3], "OHKM", "text", "middle"),
        *[_text(right + 42, row, words, "text") for row, words in zip(rows, right_words, strict=True)],
        *[_text(x, 137 + 17 * row, note, "faint") for row, note in enumerate(notes)],
    ])  # fmt: skip


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
