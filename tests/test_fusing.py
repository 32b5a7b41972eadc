"""The picture of how networks fuse resolutions says what they do, and the committed one is today's."""

# ruff: noqa: RUF001 (the multiplication sign is meant)

import re
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.model import hrnet, mspn
from pipeline.model.diagram import LOOKS
from pipeline.model.fusing import fusing, main
from pipeline.model.hourglass import HourglassConfig
from pipeline.model.hrnet import HRNetConfig
from pipeline.model.mspn import MSPNConfig
from pipeline.model.rsn import RSNConfig
from tests.test_diagram import SVG, corners, parts, words

COMMITTED = Path(__file__).resolve().parents[1] / "docs" / "fusing.svg"
REMEDY = "draw it again: python -m pipeline.model.fusing --output docs/fusing.svg"
SMALL: dict[str, Any] = {"num_joints": 3, "input_size_wh": (64, 64)}
MULTI = SMALL | {"blocks": (2, 1, 1, 1), "widths": (64, 8, 8, 8), "stem_channels": 64, "upsample_channels": 8}


@pytest.fixture(scope="module")
def picture() -> dict[str, Element]:
    return parts(ElementTree.parse(COMMITTED).getroot())


@cache
def drawn(*, stages: int = 2, modules: tuple[int, int, int] = (1, 1, 1), stacks: int = 2, depth: int = 2) -> Element:
    return ElementTree.fromstring(fusing(
        MSPNConfig(**MULTI, num_stages=stages), HRNetConfig(**SMALL, width=4, modules=modules, blocks=1),
        HourglassConfig(**SMALL, num_stacks=stacks, width=8, depth=depth), RSNConfig(**MULTI)))


def named(picture: dict[str, Element], pattern: str) -> set[str]:
    return {name for name in picture if re.fullmatch(pattern, name)}


def points(line: Element) -> list[tuple[float, float]]:
    found = [float(number) for number in re.findall(r"-?[\d.]+", line.attrib["d"])]
    return list(zip(found[::2], found[1::2], strict=True))


def way(part: Element) -> list[tuple[float, float]]:
    """The points of a part's arrow."""
    return points(part.find(f"{SVG}path"))


def row(part: Element) -> float:
    """The y of a box's middle."""
    _, top, _, bottom = corners(part.find(f"{SVG}rect"))
    return (top + bottom) / 2


def test_the_committed_picture_is_what_the_code_draws_now(tmp_path: Path) -> None:
    main(["--output", str(tmp_path / "fusing.svg")])
    assert (tmp_path / "fusing.svg").read_text(encoding="utf-8") == COMMITTED.read_text(encoding="utf-8"), REMEDY


# read in the authors' code of each
@pytest.mark.parametrize(("part", "said"), [
    ("mspn", "MSPN, 2 stages"), ("mspn", "56,867,032 parameters"), ("mspn", "1/32 | 8×6"),
    ("mspn.stage1.downsample.layer3", "layer3 | 1024"), ("mspn.stage0.upsample.up1", "up1 | σ 2.6"),
    ("hrnet", "HRNet-W32"), ("hrnet", "a box is 4 blocks"), ("hrnet", "28,536,113 parameters"),
    ("hrnet.layer1", "layer1 | 256"), ("hrnet.stage4.1.branches.3", "256"), ("hrnet.final_layer", "final | σ 2.0"),
    ("hourglass", "Stacked Hourglass, 2 stacks"), ("hourglass", "8,429,088 parameters"), ("hourglass", "1/64 | 4×4"),
    ("hourglass.hgs.1.0.low2.low3", "low3 | 256"), ("hourglass.outs.0", "outs | σ 1.0"),
    ("mspn.block", "1×1 | 256→64 | 3×3 | 64→64 | 1×1 | 64→256"), ("rsn.block", "1×1 | 64→104"),
])
def test_it_says_the_authors_shapes_and_targets(picture: dict[str, Element], part: str, said: str) -> None:
    assert said in words(picture[part])


def test_mspn_hands_over_at_every_resolution_to_the_sum_behind_the_next_stages_layer() -> None:
    picture = parts(drawn(stages=3))
    skips = named(picture, r"mspn\.stage\d\.upsample\.up\d\.skip\d")
    assert skips == {f"mspn.stage{stage}.upsample.up{unit}.skip{skip}"
                     for stage in (0, 1) for unit in (1, 2, 3, 4) for skip in (1, 2)}
    for skip in skips:
        stage, unit = int(skip[len("mspn.stage")]), int(skip[-len("4.skip1")])
        left, top, right, bottom = corners(
            picture[f"mspn.stage{stage + 1}.downsample.layer{5 - unit}.add"].find(f"{SVG}rect"))
        x, y = way(picture[skip])[-1]
        assert left < x < right
        assert top <= y <= bottom
    assert named(picture, r"mspn\..*cross_conv") == {f"mspn.stage{stage}.upsample.up4.cross_conv" for stage in (0, 1)}


def test_hrnet_gives_each_branch_the_sum_of_all_at_the_end_of_each_module() -> None:
    picture = parts(drawn(modules=(1, 2, 2)))
    for module, branches, outputs in (("stage2.0", 2, 2), ("stage3.1", 3, 3), ("stage4.0", 4, 4), ("stage4.1", 4, 1)):
        fuses = named(picture, rf"hrnet\.{module}\.fuse_layers\.\d\.\d")
        assert fuses == {f"hrnet.{module}.fuse_layers.{target}.{source}"
                         for target in range(outputs) for source in range(branches)}
        for fuse in fuses:
            (_, start), (_, end) = way(picture[fuse])
            target, source = fuse.split(".")[-2:]
            assert start == row(picture[f"hrnet.{module}.branches.{source}"])
            assert end == row(picture[f"hrnet.{module}.branches.{target}"])
    assert not named(picture, r"hrnet\.stage3\.2\..*")


@pytest.mark.parametrize(("stacks", "depth"), [(1, 1), (3, 2)])
def test_the_hourglass_hands_over_between_stacks_at_the_finest_resolution_alone(stacks: int, depth: int) -> None:
    picture = parts(drawn(stacks=stacks, depth=depth))
    merges = named(picture, r"hourglass\.merge_\w+\.\d")
    assert merges == {f"hourglass.merge_{what}.{stack}"
                      for what in ("preds", "features") for stack in range(stacks - 1)}
    for merge in merges:
        left, top, right, bottom = corners(picture[f"hourglass.merges.{merge[-1]}.add"].find(f"{SVG}rect"))
        x, y = way(picture[merge])[-1]
        assert left <= x <= right
        assert top <= y <= bottom
        assert (top + bottom) / 2 == row(picture["hourglass.outs.0"])
    assert f"1/{4 << depth}" in words(picture["hourglass"])
    assert f"1/{8 << depth}" not in words(picture["hourglass"])


def test_what_the_network_does_not_call_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_skip1(unit: mspn.UpsampleUnit, feature: Tensor, merged: Tensor) -> tuple[Tensor, Tensor]:
        return unit.skip1(feature), torch.zeros_like(feature)

    def only_from_finer(module: hrnet.HighResolutionModule, features: list[Tensor]) -> list[Tensor]:
        features = [branch(x) for branch, x in zip(module.branches, features, strict=True)]
        return [functional.relu(sum(layer(x) for layer, x in list(zip(layers, features, strict=True))[:target + 1]))
                for target, layers in enumerate(module.fuse_layers)]

    monkeypatch.setattr(mspn.UpsampleUnit, "skips", only_skip1)
    monkeypatch.setattr(hrnet.HighResolutionModule, "forward", only_from_finer)
    picture = parts(drawn.__wrapped__())
    assert len(named(picture, r"mspn\..*\.skip1")) == 4
    assert not named(picture, r"mspn\..*\.skip2")
    assert named(picture, r"hrnet\.stage3\.0\.fuse_layers\.\d\.\d") == {
        f"hrnet.stage3.0.fuse_layers.{target}.{source}" for target in range(3) for source in range(target + 1)}


# standard deviations of the authors' kernels: 15 and 11 by OpenCV's formula, the others' tables by hand
@pytest.mark.parametrize(("panel", "deviations", "others"), [
    ("mspn", ["2.6", "2.0", "1.7", "1.4", "2.0", "1.7", "1.4", "1.0"], {"training"}), ("hrnet", ["2.0"], set()),
    ("hourglass", ["1.0", "1.0"], {"plain"})])
def test_every_head_is_marked_with_its_target_and_one_is_the_answer(
        picture: dict[str, Element], panel: str, deviations: list[str], others: set[str]) -> None:
    heads = [picture[name] for name in named(picture, rf"{panel}\..*\.target")]
    assert sorted(words(head) for head in heads) == sorted(f"σ {deviation}" for deviation in deviations)
    kinds = [head.find(f"{SVG}rect").attrib["class"] for head in heads]
    assert kinds.count("answer") == 1
    assert set(kinds) - {"answer"} == others


def test_a_residual_step_is_fed_by_the_one_before_and_the_one_above() -> None:
    picture = parts(drawn())
    step = "rsn.stage0.downsample.layer1.1.conv_bn_relu2_"
    assert len(named(picture, re.escape(step) + r"\d_\d")) == 10
    for branch in (1, 2, 3, 4):
        for place in range(1, branch + 1):
            part = picture[f"{step}{branch}_{place}"]
            left, top, right, bottom = corners(part.find(f"{SVG}rect"))
            ends = [points(line)[-1] for line in part.iter(f"{SVG}path")]
            before, above = ends.count((left, (top + bottom) / 2)), ends.count(((left + right) / 2, top))
            assert (before, above) == (1, int(place < branch))
            assert "3×3 | 26→26" in words(part)


@pytest.mark.parametrize("sizes", [{"stages": 1, "stacks": 1}, {"stages": 3, "modules": (1, 2, 1), "stacks": 3}, None])
def test_no_box_covers_another(sizes: dict[str, Any] | None) -> None:
    picture = ElementTree.parse(COMMITTED).getroot() if sizes is None else drawn(**sizes)
    inside = [part for name, part in parts(picture).items() if name.endswith(".target")]  # of its unit
    within = {rectangle for part in inside for rectangle in part.iter(f"{SVG}rect")}
    boxes = [corners(rectangle) for rectangle in picture.iter(f"{SVG}rect")
             if rectangle.attrib["class"] not in ("page", "card") and rectangle not in within]
    for one, other in combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1], (one, other)
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    assert all(min(left, top) >= 0 and right <= width and bottom <= height for left, top, right, bottom in boxes)


def test_every_class_has_a_look(picture: dict[str, Element]) -> None:
    used = {name for part in picture.values() for item in part.iter() for name in item.attrib.get("class", "").split()}
    assert used - {"name", "wires", "title", "stage"} <= LOOKS.keys()
