"""The network as a picture, drawn from the code itself: a changed network changes it, and a test then says so.

    python -m pipeline.model.diagram --output docs/mspn.svg [--stages N]

What is drawn comes from `pipeline.model.observed`; places, colours and words are chosen here.
"""

# ruff: noqa: RUF001 (the multiplication sign is meant)

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from pipeline.model.loss import UNITS
from pipeline.model.mspn import ConvBNReLU, MSPNConfig, MultiStageConfig
from pipeline.model.observed import Facts, Lesson, facts_of
from pipeline.model.targets import KERNELS, gaussian_taps
from pipeline.svg import Drawing, Point, arrows, box, document, dot, group, path, style, text

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

# each class: its look on a light page, and on a dark one
LOOKS = {
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
    "flow-tip": ("fill:#424a53;stroke:none", "fill:#c9d1d9"),
    "cross-tip": ("fill:#bc4c00;stroke:none", "fill:#f0883e"),
    "text": ("fill:#1f2328", "fill:#e6edf3"),
    "faint": ("fill:#57606a", "fill:#9da7b3"),
    "good": ("fill:#116329;font-weight:700", "fill:#56d364"),
}
CSS = """
text { font: 11px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
.name, .wires { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.name { font-size: 12px; font-weight: 700 } .wires { font-size: 10.5px } .title { font-size: 19px; font-weight: 700 }
.stage { font-size: 14px; font-weight: 700 } path { fill: none; stroke-width: 1.5 }
"""


# --- the picture --------------------------------------------------------------------------------------------------


def diagram(config: MSPNConfig) -> str:
    """The picture of a network as an SVG document; each part is a group with its state-dict name as id."""
    facts = facts_of(config)
    height = _card_top(config.num_stages) - BETWEEN + 16
    drawing = [style(CSS, LOOKS), arrows(["flow", "cross"]), box(0, 0, WIDTH, height, "page", radius=10)]
    drawing += _header(facts) + _legend(facts)
    for draw in (_card, _ways, _parts):  # what is drawn later lies above
        for index in range(config.num_stages):
            drawing += draw(facts, index)
    return document(WIDTH, height, _title(config), drawing + _stem(facts))


def _title(config: MultiStageConfig) -> str:
    return f"MSPN with {config.num_stages} stage{'s' * (config.num_stages > 1)} and {config.num_joints} joints"


def _header(facts: Facts) -> Drawing:
    num_parameters = sum(parameter.numel() for parameter in facts.network.parameters())
    notes = f"{num_parameters:,} parameters"
    return [text(16, 34, _title(facts.network.config), "text title"), text(16, 56, notes, "faint")]


def _stem(facts: Facts) -> Drawing:
    passage, conv, turn = facts.passages["top"], facts.network.top.conv.conv, FIRST_CARD - 30
    images = [text(28, STEM_TOP + 18, "images", "text name"), text(28, STEM_TOP + 35, "normalised", "text"),
              text(28, STEM_TOP + 51, _size(passage.takes), "text")]
    wires = f"{_conv(facts, 'top.conv')} {_wires(facts, 'top.conv')}, stride {conv.stride[0]}"
    lines = [text(176, STEM_TOP + 18, "top", "text name"), text(176, STEM_TOP + 35, wires, "text wires"),
             text(176, STEM_TOP + 51, "then 3×3 max pool, stride 2", "text"),
             text(176, STEM_TOP + 68, _size(passage.gives), "text")]
    return [path([(126, STEM_TOP + 38), (164, STEM_TOP + 38)], "flow"),
            path([(210, STEM_TOP + 76), (210, turn), (LANE, turn), *_into_first_layer(FIRST_CARD)], "flow"),
            *group("images", [box(16, STEM_TOP, 110, 76, "plain"), *images]),
            *group("top", [box(164, STEM_TOP, 196, 76, "trunk"), *lines])]


def _card(facts: Facts, index: int) -> Drawing:
    top = _card_top(index)
    what = "the last" if facts.network.stages[index].is_last else ""
    return [box(8, top, WIDTH - 16, CARD_HEIGHT, "card"), text(LEFT, top + 24, f"stage{index}", "text stage"),
            text(LEFT + 64, top + 24, what, "faint")]


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
    return group(f"stage{index}", parts)


def _layer(facts: Facts, index: int, column: int) -> Drawing:
    name = f"stage{index}.downsample.layer{column + 1}"
    layer, x, y = facts.network.get_submodule(name), _column(column), _card_top(index) + TRUNK
    assert isinstance(layer, nn.Sequential)
    width, shape = facts.passages[f"{name}.0.conv_bn_relu1"].gives[0], facts.passages[name].gives
    lines = [text(x + 10, y + 18, f"layer{column + 1}", "text name"),
             text(x + BOX_WIDTH - 10, y + 18, f"1/{facts.passages['top'].takes[1] // shape[1]}", "faint", "end"),
             text(x + 10, y + 35, f"{len(layer)} blocks, width {width}", "text"),
             text(x + 10, y + 52, _size(shape), "text")]
    return group(name, [box(x, y, BOX_WIDTH, TRUNK_HEIGHT, "trunk"), *lines])


def _trunk_ways(index: int, column: int) -> Drawing:
    """From a layer to the next one, where there are skips by way of the sum with them; and down to the unit."""
    top, x = _card_top(index), _column(column)
    y, unit_y, is_last = top + TRUNK + TRUNK_HEIGHT / 2, top + UNIT + ROW_U_SKIP, column == UNITS - 1
    along = [(x + BOX_WIDTH, y), (x + FEATURE if is_last else _column(column + 1), y)]
    down = [(x + FEATURE, y), (x + FEATURE, unit_y), (x + BOX_WIDTH, unit_y)]
    to_sum = path([along[0], (x + ADD, y)], "flow")
    if is_last:  # there is no next layer
        return [path([along[0], *down], "flow")] if index == 0 else [to_sum, path(down, "flow")]
    branch = dot(x + FEATURE, y, "flow-tip") if index == 0 else to_sum
    return [path(along, "flow"), path(down, "flow"), branch]


def _add(index: int, column: int) -> Drawing:
    """The sum of a layer's output and its two skips."""
    x, y = _column(column) + ADD, _card_top(index) + TRUNK + TRUNK_HEIGHT / 2
    sign = text(x + ADD_WIDTH / 2, y + 5, "+", "text stage", "middle")
    return group(f"stage{index}.downsample.layer{column + 1}.add",
                 [box(x, y - 12, ADD_WIDTH, 24, "chip", radius=12), sign])


def _unit(facts: Facts, index: int, column: int) -> Drawing:
    level = UNITS - column
    name, x, y = f"stage{index}.upsample.up{level}", _column(column), _card_top(index) + UNIT
    rows = [("u_skip", ROW_U_SKIP)] + ([("up_conv", ROW_UP_CONV)] if level > 1 else [])
    lines = [text(x + 10, y + 18, f"up{level}", "text name"),
             text(x + BOX_WIDTH - 8, y + 18, _size(facts.passages[name].gives), "text", "end"),
             text(x + 10, y + ROW_OUT + 4, "add, ReLU" if level > 1 else "ReLU", "text")]
    for part, row in rows:
        words = [text(x + 10, y + row + 4, f"{part} {_conv(facts, f'{name}.{part}')}", "text wires"),
                 text(x + BOX_WIDTH - 8, y + row + 4, _wires(facts, f"{name}.{part}"), "text wires", "end")]
        lines += group(f"{name}.{part}", words)
    return group(name, [box(x, y, BOX_WIDTH, UNIT_HEIGHT, "unit"), *lines])


def _unit_ways(index: int, column: int) -> Drawing:
    """From a unit down to its head, and from the coarser unit into it."""
    top, x = _card_top(index), _column(column)
    y = top + UNIT
    ways = [path([(x + BOX_WIDTH / 2, y + UNIT_HEIGHT), (x + BOX_WIDTH / 2, top + HEAD)], "flow")]
    if column == UNITS - 1:
        return ways
    bend = x + FEATURE + 18
    up = [(_column(column + 1), y + ROW_OUT), (bend, y + ROW_OUT), (bend, y + ROW_UP_CONV),
          (x + BOX_WIDTH, y + ROW_UP_CONV)]
    return [*ways, path(up, "flow"), text(x + FEATURE - 6, y + ROW_UP_CONV - 4, "resize", "faint", "end")]


def _head(facts: Facts, index: int, column: int) -> Drawing:
    level = UNITS - column
    name, x, y = f"stage{index}.upsample.up{level}", _column(column), _card_top(index) + HEAD
    is_answer = f"{name}.res_conv2" in facts.predicting
    convs = [text(x + 9, y + row, f"{part} {_conv(facts, f'{name}.{part}')} {_wires(facts, f'{name}.{part}')}",
                   "text wires") for part, row in (("res_conv1", 18), ("res_conv2", 33))]
    resized = facts.passages[f"{name}.res_conv2"].gives != facts.heatmap
    size = text(x + 9, y + 49, ("resize to " if resized else "") + _size(facts.heatmap), "text")
    end = text(x + 9, y + 112, "inference reads this" if is_answer else "in training only",
                "good" if is_answer else "faint")
    frame = box(x, y, HEAD_WIDTH, HEAD_HEIGHT, "answer" if is_answer else "training")
    lesson = _lesson(facts.lessons[index][level - 1], x + 9, y + 60)
    return group(f"{name}.head", [frame, *convs, size, *lesson, end])


def _lesson(lesson: Lesson, x: float, y: float) -> Drawing:
    loss = "L2" if lesson.hardest is None else f"OHKM top {lesson.hardest}"
    weight = "" if lesson.weight == 1 else f" × 1/{round(1 / lesson.weight)}"
    return [*_taps(lesson.kernel, x, y + 32), text(x + 67, y + 13, f"kernel {lesson.kernel}", "text"),
            text(x + 67, y + 29, loss + weight, "text")]


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
        *group(f"{name}.skip1", [
            path(crossing, "halo", tip=False), path(skip1, "cross"), dot(*skip1[0], "cross-tip"),
            path([(x + FEATURE, chips + CHIP_HEIGHT), (x + FEATURE, add)], "cross"),
            *_chip(facts, f"{name}.skip1", x + FEATURE - CHIP_WIDTH / 2, chips)]),
        *group(f"{name}.skip2", [path(skip2, "cross"), path(back, "cross"),
                                  *_chip(facts, f"{name}.skip2", middle - CHIP_WIDTH / 2, chips)]),
    ]  # fmt: skip


def _cross_conv(facts: Facts, index: int) -> Drawing:
    """From the finest unit to the next stage's first layer."""
    top, name = _card_top(index), f"stage{index}.upsample.up{UNITS}.cross_conv"
    chips, out = top + CARD_HEIGHT + CHIP_TOP, top + UNIT + ROW_OUT
    size = text(LANE + 8, chips + CHIP_HEIGHT + 18, _size(facts.passages[name].gives), "faint")
    return group(name, [path([(LEFT, out), (LANE, out), (LANE, chips)], "cross"),
                         path([(LANE, chips + CHIP_HEIGHT), *_into_first_layer(_card_top(index + 1))], "cross"),
                         *_chip(facts, name, 14, chips), size])


def _chip(facts: Facts, name: str, x: float, y: float) -> Drawing:
    part = name.rsplit(".", 1)[1]
    words = part if part == "cross_conv" else f"{part} {_conv(facts, name)}"
    wires = _wires(facts, name) if part != "cross_conv" else f"{_conv(facts, name)} {_wires(facts, name)}"
    middle = x + CHIP_WIDTH / 2
    return [box(x, y, CHIP_WIDTH, CHIP_HEIGHT, "chip"), text(middle, y + 14, words, "text wires", "middle"),
            text(middle, y + 28, wires, "text wires", "middle")]


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
    return group("legend", [
        *[box(x, row - 12, 26, 15, kind, radius=4)
          for row, kind in zip(rows, ("trunk", "unit", "training", "answer"), strict=True)],
        *[text(x + 36, row, words, "text") for row, words in zip(rows, left_words, strict=True)],
        path([(right - 2, rows[0] - 4), (right + 28, rows[0] - 4)], "cross"),
        box(right, rows[1] - 12, 26, 15, "chip", radius=8),
        text(right + 13, rows[1], "+", "text name", "middle"),
        *_taps(KERNELS[-1], right - 17, rows[2] + 3, height=16),
        text(right + 13, rows[3], "OHKM", "text", "middle"),
        *[text(right + 42, row, words, "text") for row, words in zip(rows, right_words, strict=True)],
        *[text(x, 137 + 17 * row, note, "faint") for row, note in enumerate(notes)],
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture; a network of COCO's 17 joints and two stages unless told otherwise."""
    parser = argparse.ArgumentParser(description="Draw MSPN as an SVG.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stages", type=int, default=2)
    options = parser.parse_args(arguments)
    options.output.write_text(diagram(MSPNConfig(num_joints=17, num_stages=options.stages)), encoding="utf-8")


if __name__ == "__main__":
    main()
