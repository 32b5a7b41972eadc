"""What RSN changes in MSPN, drawn from the code: its trunks' block. A part of `pipeline.model.fusing`."""

# ruff: noqa: RUF001 (the multiplication sign is meant)

import re

from pipeline.model.mspn import ConvBNReLU
from pipeline.model.observed import Seen
from pipeline.model.panel import PLUS
from pipeline.svg import Drawing, box, dot, group, path, text

BLOCK = "stage0.downsample.layer1.1"  # the first that takes and gives the same shape
CONV, SMALL, GAP = 66, 52, 24  # widths of boxes, and of what is between them
BLOCKS_HEIGHT = 244
ROW, HALF = 40, 14  # from one branch to the next; half the height of a step


def draw_blocks(mspn: Seen, rsn: Seen, top: float) -> Drawing:
    """MSPN's bottleneck, and beside it RSN's residual steps."""
    rows = max(row for row, _ in _steps(rsn))
    middle = top + 70 + HALF + ROW * (rows - 1) / 2
    return [text(16, top + 18, "RSN", "text stage"),
            text(250, top + 18, "MSPN with another block in its trunks: branches, each fed by the one above", "text"),
            text(44, top + 46, "MSPN's block", "text wires"), text(484, top + 46, "RSN's block", "text wires"),
            *group("mspn.block", _bottleneck(mspn, 52, middle)), *group("rsn.block", _residual_steps(rsn, 492, middle))]


def _bottleneck(seen: Seen, left: float, y: float) -> Drawing:
    drawing, x = [], left
    for name in (name for name in seen.passages if re.fullmatch(rf"{BLOCK}\.conv_bn_relu\d", name)):
        drawing += [path([(x, y), (x + GAP, y)], "flow"), *_conv(seen, name, x + GAP, y, half=20)]
        x += GAP + CONV
    return drawing + _identity(left, x, y, over=y - 38)


def _steps(seen: Seen) -> dict[tuple[int, int], str]:
    """Names of an RSN block's 3×3 convolutions by their branch and their place in it."""
    found = (re.fullmatch(rf"{BLOCK}\.conv_bn_relu2_(\d)_(\d)", name) for name in seen.passages)
    return {(int(match[1]), int(match[2])): match[0] for match in found if match}


def _residual_steps(seen: Seen, left: float, y: float) -> Drawing:
    steps = _steps(seen)
    rows = max(row for row, _ in steps)
    half, inner = ROW * (rows - 1) / 2 + HALF, left + GAP + CONV + GAP
    last = inner + (SMALL + GAP) * rows
    drawing = [path([(left, y), (left + GAP, y)], "flow"), *_identity(left, last + CONV, y, over=y - half - 14),
               *_conv(seen, f"{BLOCK}.conv_bn_relu1", left + GAP, y, half=half),
               *_conv(seen, f"{BLOCK}.conv_bn_relu3", last, y, half=half)]
    for (row, column), name in steps.items():
        x, middle = inner + (SMALL + GAP) * (column - 1), y - half + HALF + ROW * (row - 1)
        ways = [path([(x - GAP, middle), (x, middle)], "flow")]
        if (row - 1, column) in steps:
            ways.append(path([(x + SMALL / 2, middle - ROW + HALF), (x + SMALL / 2, middle - HALF)], "flow"))
        if column == row:
            ways.append(path([(x + SMALL, middle), (last, middle)], "flow"))
        drawing += group(f"rsn.{name}", [*ways, *_conv(seen, name, x, middle, half=HALF, width=SMALL)])
    return drawing


def _conv(seen: Seen, name: str, x: float, y: float, *, half: float, width: float = CONV) -> Drawing:
    conv, passage = seen.network.get_submodule(name), seen.passages[name]
    assert isinstance(conv, ConvBNReLU)
    words = ["×".join(map(str, conv.conv.kernel_size)), f"{passage.takes[0]}→{passage.gives[0]}"]
    lines = zip(words, (y - 2, y + 10), strict=True)
    return [box(x, y - half, width, 2 * half, "trunk"),
            *(text(x + width / 2, line_y, line, "text wires", "middle") for line, line_y in lines)]


def _identity(left: float, right: float, y: float, *, over: float) -> Drawing:
    """From a block's input past its convolutions to the sum with what they give."""
    add = right + GAP + PLUS
    return [path([(left - 20, y), (left, y)], "flow", tip=False), dot(left, y, "flow-tip"),
            path([(left, y), (left, over), (add, over), (add, y - PLUS)], "flow"),
            path([(right, y), (add - PLUS, y)], "flow"), path([(add + PLUS, y), (add + PLUS + 20, y)], "flow"),
            box(add - PLUS, y - PLUS, 2 * PLUS, 2 * PLUS, "plain", radius=PLUS),
            text(add, y + 4, "+", "text name", "middle")]
