"""How networks fuse resolutions, drawn from the code: MSPN, HRNet, Stacked Hourglass, and what RSN changes.

    python -m pipeline.model.fusing --output docs/fusing.svg

A box or an arrow is there because the network called its module when it ran, and its row follows from the shape that
the module gave (`pipeline.model.panel`). Columns, colours and words are chosen here.
"""

# ruff: noqa: RUF001 (the multiplication sign is meant)

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from pipeline.model.block_picture import BLOCKS_HEIGHT, draw_blocks
from pipeline.model.diagram import CSS, LOOKS
from pipeline.model.hourglass import Hourglass, HourglassConfig, StackedHourglass
from pipeline.model.hrnet import HighResolutionModule, HRNet, HRNetConfig
from pipeline.model.loss import UNITS
from pipeline.model.mspn import MSPNConfig
from pipeline.model.observed import look_at
from pipeline.model.panel import PLUS, H, Panel, W
from pipeline.model.rsn import RSNConfig
from pipeline.svg import Drawing, arrows, box, document, group, path, style, text

HEADER, BETWEEN = 132, 22  # heights above the panels and between them
LEAST = 1050  # width of the legend and the blocks
STEM, FIRST = 92, 152  # x of the stem, and of what follows it
ROUND = 34  # how far from its row an arrow goes around boxes


def fusing(mspn: MSPNConfig, hrnet: HRNetConfig, hourglass: HourglassConfig, rsn: RSNConfig) -> str:
    """The picture as an SVG document; each part is a group with the network's and the module's name as id."""
    one = Panel(mspn, HEADER, pitch=82)
    draw_mspn(one)
    two = Panel(hrnet, one.bottom + BETWEEN, pitch=54)
    draw_hrnet(two)
    three = Panel(hourglass, two.bottom + BETWEEN, pitch=58)
    draw_hourglass(three)
    blocks = three.bottom + BETWEEN
    width, height = max(one.right, two.right, three.right, LEAST) + 18, blocks + BLOCKS_HEIGHT
    return document(width, height, "How MSPN, HRNet and the Stacked Hourglass fuse resolutions", [
        style(CSS, LOOKS), arrows(["flow", "cross"]), box(0, 0, width, height, "page", radius=10), *_legend(),
        *one.drawing(f"MSPN, {_many(mspn.num_stages, 'stage')}",
                     "down and up in each stage, handed over at every resolution"),
        *two.drawing(f"HRNet-W{hrnet.width}", "resolutions are kept, each is given the sum of all at each module's end "
                     f"(a box is {_many(hrnet.blocks, 'block')})"),
        *three.drawing(f"Stacked Hourglass, {_many(hourglass.num_stacks, 'stack')}",
                       "down and up in each stack, handed over at 1/4 alone, from end to beginning"),
        *draw_blocks(one.seen, look_at(rsn), blocks)])  # fmt: skip


def _many(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number > 1)


def _legend() -> Drawing:
    kinds = [("trunk", "on the way down, or kept at its resolution"), ("unit", "on the way up, or towards heatmaps"),
             ("training", "head: is taught, in training only"), ("plain", "head: is taught, and needed further on"),
             ("answer", "head: is taught, and is the answer")]
    places = [(16, 62), (16, 86), (330, 62), (330, 86), (330, 110)]
    drawing = [text(16, 34, "How resolutions are fused", "text title")]
    for (kind, words), (x, y) in zip(kinds, places, strict=True):
        drawing += [box(x, y - 12, 26, 15, kind, radius=4), text(x + 36, y, words, "text")]
    return group("legend", [
        *drawing, path([(14, 106), (44, 106)], "cross"),
        text(52, 110, "handed over to the next stage, module, stack", "text"),
        text(640, 62, "time goes from left to right, a row is a resolution", "faint"),
        text(640, 86, "numbers in boxes: channels; +: sum", "faint"),
        text(640, 110, "σ: deviation of the target's Gaussian, in cells of the heatmap", "faint")])


# --- MSPN ---------------------------------------------------------------------------------------------------------

STEP = 50  # from a layer to the next one, which is one row lower
UP = 7 * STEP + 34  # from layer1 to its unit
STAGE = UP + 2 * W + 72  # from a stage to the next one


def draw_mspn(panel: Panel) -> None:
    """Four layers down, four units up, in each stage; what is handed over lies above."""
    stages = range(len(panel.seen.network.heads))
    panel.box("top", STEM, "trunk")
    panel.way([(STEM + W, panel.y("top")), (FIRST - W, panel.y("top"))])
    for draw in (_stage_row, _hand_over):
        for index in stages:
            for level in range(UNITS):
                draw(panel, index, level)
    for index in stages:
        panel.card(FIRST + STAGE * index - W - 10, FIRST + STAGE * index + UP + W + 10, f"stage{index}")


def _names(index: int, level: int) -> tuple[str, str]:
    return f"stage{index}.downsample.layer{level + 1}", f"stage{index}.upsample.up{UNITS - level}"


def _places(index: int, level: int) -> tuple[float, float]:
    """x of a layer and of its unit."""
    return FIRST + STAGE * index + STEP * level, FIRST + STAGE * index + UP - STEP * level


def _stage_row(panel: Panel, index: int, level: int) -> None:
    (layer, unit), (x, up) = _names(index, level), _places(index, level)
    y = panel.y(layer)
    panel.box(layer, x, "trunk")
    panel.box(unit, up, "unit", head=f"{unit}.res_conv2")
    panel.way([(x + W, y), (up - W, y)], module=f"{unit}.u_skip")
    if level < UNITS - 1:
        below = panel.y(_names(index, level + 1)[0])
        panel.way([(x + STEP, y), (x + STEP, below - H)])
        panel.way([(up - STEP + W, below), (up, below), (up, y + H)], module=f"{unit}.up_conv")
    if level < UNITS - 1 or f"{unit}.skip1" in panel:
        panel.fork(x + STEP, y)


def _hand_over(panel: Panel, index: int, level: int) -> None:
    """skip1 above the row, skip2 below it, to the sum behind the next stage's layer; cross_conv on it."""
    unit, (x, up) = _names(index, level)[1], _places(index, level)
    y, fork, add = panel.y(unit), x + STEP, x + STAGE + W + 14
    over = {"skip1": [(fork, y), (fork, y - ROUND), (add, y - ROUND), (add, y - PLUS)],
            "skip2": [(up + 14, y + H), (up + 14, y + ROUND), (add, y + ROUND), (add, y + PLUS)],
            "cross_conv": [(up + W, y), (FIRST + STAGE * (index + 1) - W, y)]}
    if level and f"{unit}.skip1" in panel:  # it bridges the way up, and the next stage's way down
        for crossed in (up + STEP, x + STAGE):
            panel.way([(crossed - 6, y - ROUND), (crossed + 6, y - ROUND)], "halo", tip=False)
    for skip, points in over.items():
        panel.way(points, "cross", module=f"{unit}.{skip}")
    panel.label(up + STEP + 10, y - ROUND + 12, "skip1", module=f"{unit}.skip1")
    panel.label(up + STEP + 10, y + ROUND - 5, "skip2", module=f"{unit}.skip2")
    panel.label(up + W + 3, y - 7, "cross_conv", module=f"{unit}.cross_conv")
    if any(f"{unit}.{skip}" in panel for skip in ("skip1", "skip2")):
        panel.plus(_names(index + 1, level)[0], add, y, kind="chip")


# --- HRNet --------------------------------------------------------------------------------------------------------

EXCHANGE, ONWARD, TRANSITION = 42, 17, 34  # from boxes to their sums; to the next module; to the next stage


def draw_hrnet(panel: Panel) -> None:
    """Branches side by side; a web from all to all at the end of each module."""
    network = panel.seen.network
    assert isinstance(network, HRNet)
    y, end = panel.y("layer1"), FIRST + W + 8.0
    panel.box("conv2", STEM, "trunk", words="stem")
    panel.box("layer1", FIRST, "trunk")
    panel.way([(STEM + W, y), (FIRST - W, y)])
    panel.way([(FIRST + W, y), (end, y)], tip=False)
    for number, stage in ((2, network.stage2), (3, network.stage3), (4, network.stage4)):
        left = end + TRANSITION
        _transition(panel, f"transition{number - 1}", end, left)
        end = _modules(panel, f"stage{number}", stage, left)
        panel.card(left - 8, end + PLUS + 4, f"stage{number}")
    panel.way([(end, y), (end + TRANSITION, y)])
    panel.box("final_layer", end + TRANSITION + W, "unit", words="final", head="final_layer")


def _transition(panel: Panel, name: str, start: float, end: float) -> None:
    """Into each branch of a stage: along its row, or down into a new one."""
    for branch, _ in panel.module(name).named_children():
        module = f"{name}.{branch}"
        source, target = panel.y(module, takes=True), panel.y(module)
        corner = [(start, target)] if source != target else []
        panel.way([(start, source), *corner, (end, target)], module=module)


def _modules(panel: Panel, name: str, stage: nn.Module, left: float) -> float:
    """A stage's modules, one after the other; x of the last one's sums."""
    end = left - ONWARD
    for index, module in stage.named_children():
        assert isinstance(module, HighResolutionModule)
        left = end + ONWARD
        for branch in range(len(module.branches)):
            y = panel.y(f"{name}.{index}.branches.{branch}")
            panel.box(f"{name}.{index}.branches.{branch}", left + W, "trunk", words="")
            if index != "0":
                panel.way([(end, y), (left, y)])
        end = left + 2 * W + EXCHANGE
        for target, sources in module.fuse_layers.named_children():
            _sum(panel, f"{name}.{index}.fuse_layers.{target}", [source for source, _ in sources.named_children()],
                 left + 2 * W)
    return end


def _sum(panel: Panel, name: str, sources: list[str], left: float) -> None:
    """What a branch is given by all of its module."""
    fuses = [f"{name}.{source}" for source in sources if f"{name}.{source}" in panel]
    y = panel.y(fuses[0])
    for fuse in fuses:
        panel.way([(left, panel.y(fuse, takes=True)), (left + EXCHANGE - PLUS, y)], "cross", module=fuse)
    panel.plus(name, left + EXCHANGE, y, kind="chip")


# --- Stacked Hourglass --------------------------------------------------------------------------------------------

DOWN, BACK = 36, 40  # from one size to the next
OUT, ADD, NEXT = 58, 78, 46  # from features to heatmaps, on to the sum, on to the next stack


def draw_hourglass(panel: Panel) -> None:
    """Down and up in each stack; what its end gives to the next one's beginning."""
    network = panel.seen.network
    assert isinstance(network, StackedHourglass)
    y, left = panel.y("pre"), STEM + W + 34.0
    panel.box("pre", STEM, "trunk")
    panel.way([(STEM + W, y), (left, y)], tip=False)
    for index in range(len(network.hgs)):
        outs = _stack(panel, index, left)
        panel.card(left - W - 8, outs + W + 8, f"hgs.{index}")
        if f"merge_features.{index}" in panel:
            _feed_back(panel, index, left, outs)
            panel.way([(outs + ADD + PLUS, y), (outs + ADD + NEXT, y)], tip=False)
        left = outs + ADD + NEXT


def _stack(panel: Panel, index: int, left: float) -> float:
    """One hourglass from x on, and its heatmaps, the x of which is returned."""
    sizes = [f"hgs.{index}.0"]
    while isinstance(panel.module(f"{sizes[-1]}.low2"), Hourglass):
        sizes.append(f"{sizes[-1]}.low2")
    middle = left + DOWN * (len(sizes) - 1) + 32
    for level, name in enumerate(sizes):
        _size(panel, name, left + DOWN * level, middle, middle + BACK * (len(sizes) - level))
    features, y = middle + BACK * (len(sizes) + 1), panel.y(sizes[0])
    panel.box(f"features.{index}", features, "unit", words="feat.")
    panel.box(f"outs.{index}", features + OUT, "unit", words="outs", head=f"outs.{index}")
    panel.way([(features + W, y), (features + OUT - W, y)])
    return features + OUT


def _size(panel: Panel, name: str, left: float, middle: float, right: float) -> None:
    """What an hourglass keeps at its size, the way down from it and the way back into the sum."""
    y, below = panel.y(f"{name}.up1"), panel.y(f"{name}.low1")
    panel.fork(left, y)
    panel.box(f"{name}.up1", middle, "trunk")
    panel.way([(left, y), (middle - W, y)])
    panel.way([(middle + W, y), (right - PLUS, y)])
    panel.plus(name, right, y)
    panel.way([(right + PLUS, y), (right + BACK - W, y)])
    if isinstance(panel.module(f"{name}.low2"), Hourglass):
        panel.box(f"{name}.low1", left, "trunk")
        panel.way([(left, y), (left, below - H)])
        panel.way([(left + W, below), (left + DOWN, below)], tip=False)
        panel.box(f"{name}.low3", right, "unit")
        panel.way([(right, below - H), (right, y + PLUS)])
    else:  # three of the same size, as one
        panel.box(f"{name}.low2", middle, "trunk", words="low1-3")
        panel.way([(left, y), (left, below), (middle - W, below)])
        panel.way([(middle + W, below), (right, below), (right, y + PLUS)])


def _feed_back(panel: Panel, index: int, left: float, outs: float) -> None:
    """A stack's own input, its heatmaps and its features, summed: the next one's input."""
    y, start, add = panel.y(f"outs.{index}"), outs - OUT, outs + ADD
    preds, features = f"merge_preds.{index}", f"merge_features.{index}"
    panel.way([(left, y), (left, y - ROUND), (add, y - ROUND), (add, y - PLUS)], "cross")
    panel.way([(outs + W, y), (add - PLUS, y)], "cross", module=preds)
    panel.way([(start, y + H), (start, y + ROUND), (add, y + ROUND), (add, y + PLUS)], "cross", module=features)
    panel.label(outs + W + 4, y - 7, "merge_", module=preds)
    panel.label(outs + W + 4, y + 13, "preds", module=preds)
    panel.label(start + 6, y + ROUND + 13, "merge_features", module=features)
    panel.plus(f"merges.{index}", add, y, kind="chip")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture: two stages, W32 and two stacks, each with the joints of its authors."""
    parser = argparse.ArgumentParser(description="Draw how networks fuse resolutions as an SVG.")
    parser.add_argument("--output", type=Path, required=True)
    picture = fusing(MSPNConfig(num_joints=17), HRNetConfig(num_joints=17), HourglassConfig(num_joints=16),
                     RSNConfig(num_joints=17))
    parser.parse_args(arguments).output.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
