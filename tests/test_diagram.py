"""The picture of the network says what the network does, and the committed one is today's."""

# ruff: noqa: RUF001 (the multiplication sign is meant)

import re
from functools import cache
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.model.diagram import LOOKS, diagram, main
from pipeline.model.mspn import MSPN, ConvBNReLU, MSPNConfig
from pipeline.model.observed import facts_of, lessons
from pipeline.model.targets import KERNELS

SVG = "{http://www.w3.org/2000/svg}"
COMMITTED = Path(__file__).resolve().parents[1] / "docs" / "mspn.svg"
REMEDY = "draw it again: python -m pipeline.model.diagram --output docs/mspn.svg"


@pytest.fixture(scope="module")
def picture() -> Element:
    return ElementTree.parse(COMMITTED).getroot()


@cache
def drawn_with(num_stages: int) -> Element:
    return ElementTree.fromstring(diagram(MSPNConfig(num_joints=17, num_stages=num_stages)))


def parts(picture: Element) -> dict[str, Element]:
    groups = [group for group in picture.iter(f"{SVG}g") if "id" in group.attrib]
    named = {group.attrib["id"]: group for group in groups}
    assert len(named) == len(groups), "an id occurs twice"
    return named


def words(part: Element) -> str:
    return " | ".join("".join(text.itertext()) for text in part.iter(f"{SVG}text"))


def corners(rectangle: Element) -> tuple[float, float, float, float]:
    x, y, width, height = (float(rectangle.attrib[name]) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def ends(part: Element) -> list[tuple[float, float]]:
    """The last point of each line in a part."""
    lines = [re.findall(r"-?[\d.]+", path.attrib["d"]) for path in part.iter(f"{SVG}path")]
    return [(float(numbers[-2]), float(numbers[-1])) for numbers in lines]


def test_the_committed_picture_is_what_the_code_draws_now(tmp_path: Path) -> None:
    main(["--output", str(tmp_path / "mspn.svg")])
    assert (tmp_path / "mspn.svg").read_text(encoding="utf-8") == COMMITTED.read_text(encoding="utf-8"), REMEDY


def test_every_part_of_both_stages_is_in_it_under_its_name(picture: Element) -> None:
    with torch.device("meta"):
        network = MSPN(MSPNConfig(num_joints=17))
    drawn = parts(picture)
    for name, module in network.named_modules():
        if re.fullmatch(r"top|stage\d|stage\d\.downsample\.layer\d|stage\d\.upsample\.up\d", name):
            assert name in drawn
        if isinstance(module, ConvBNReLU) and ".upsample." in name:
            unit, conv = name.rsplit(".", 1)
            assert conv in words(drawn[f"{unit}.head" if conv.startswith("res_conv") else name])


# read in the authors' code
@pytest.mark.parametrize(("part", "said"), [
    ("images", "3×256×192"), ("top", "7×7 3→64, stride 2"), ("top", "64×64×48"),
    ("stage0.downsample.layer1", "3 blocks, width 64 | 256×64×48"),
    ("stage0.downsample.layer2", "4 blocks, width 128 | 512×32×24"),
    ("stage1.downsample.layer3", "6 blocks, width 256 | 1024×16×12"),
    ("stage1.downsample.layer4", "3 blocks, width 512 | 2048×8×6"),
    ("stage0.upsample.up1", "256×8×6"), ("stage0.upsample.up1.u_skip", "u_skip 1×1 | 2048→256"),
    ("stage1.upsample.up3.up_conv", "up_conv 1×1 | 256→256"), ("stage1.upsample.up4", "256×64×48"),
    ("stage0.upsample.up2.skip1", "skip1 1×1 | 1024→1024"), ("stage0.upsample.up2.skip2", "skip2 1×1 | 256→1024"),
    ("stage0.upsample.up4.cross_conv", "1×1 256→64 | 64×64×48"),
    ("stage0.upsample.up1.head", "res_conv1 1×1 256→256 | res_conv2 3×3 256→17 | resize to 17×64×48"),
    ("stage1.upsample.up4.head", "res_conv2 3×3 256→17 | 17×64×48"),
])
def test_it_says_the_authors_shapes(picture: Element, part: str, said: str) -> None:
    assert said in words(parts(picture)[part])


def test_shapes_follow_the_network_that_is_drawn() -> None:
    config = MSPNConfig(num_joints=5, input_size_wh=(64, 128), blocks=(1, 2, 1, 2), widths=(4, 8, 12, 20),
                        stem_channels=6, upsample_channels=10)
    drawn = parts(ElementTree.fromstring(diagram(config)))
    assert "7×7 3→6" in words(drawn["top"])
    assert "2 blocks, width 20 | 80×4×2" in words(drawn["stage1.downsample.layer4"])
    assert "32→10" in words(drawn["stage0.upsample.up3.u_skip"])
    assert "res_conv2 3×3 10→5 | resize to 5×32×16" in words(drawn["stage0.upsample.up2.head"])


# the authors' loss: kernels of the units, coarse to fine
WIDE, NARROW = [15, 11, 9, 7], [11, 9, 7, 5]


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_heads_learn_the_authors_kernels_a_quarter_of_l2_and_the_eight_hardest(num_stages: int) -> None:
    found = lessons(num_stages)
    assert [[head.kernel for head in stage] for stage in found] == [WIDE] * (num_stages - 1) + [NARROW]
    assert [[(head.weight, head.hardest) for head in stage] for stage in found] \
        == [[(0.25, None)] * 3 + [(1.0, 8)]] * num_stages


def test_every_head_shows_its_kernel_and_its_loss(picture: Element) -> None:
    drawn = parts(picture)
    for stage, kernels in enumerate([WIDE, NARROW]):
        for unit, kernel in enumerate(kernels, start=1):
            head = drawn[f"stage{stage}.upsample.up{unit}.head"]
            loss = "OHKM top 8" if unit == 4 else "L2 × 1/4"
            assert f"kernel {kernel} | {loss}" in words(head)
            assert len(head.findall(f"{SVG}rect[@class='bar']")) == kernel


@pytest.mark.parametrize("num_stages", [1, 3])
def test_inference_reads_the_last_stages_finest_head_alone(num_stages: int) -> None:
    drawn = parts(drawn_with(num_stages))
    heads = {name: words(part) for name, part in drawn.items() if name.endswith(".head")}
    reading = [name for name, said in heads.items() if "inference reads this" in said]
    assert reading == [f"stage{num_stages - 1}.upsample.up4.head"]
    assert sum("in training only" in said for said in heads.values()) == 4 * num_stages - 1


def test_cross_stage_lines_end_in_the_sum_behind_the_layer_of_their_resolution() -> None:
    drawn = parts(drawn_with(3))
    for stage in (0, 1):
        for layer in (1, 2, 3, 4):
            add = drawn[f"stage{stage + 1}.downsample.layer{layer}.add"].find(f"{SVG}rect")
            left, top, right, bottom = corners(add)
            behind = drawn[f"stage{stage + 1}.downsample.layer{layer}"].find(f"{SVG}rect")
            assert corners(behind)[2] < left
            for skip in ("skip1", "skip2"):
                reached = ends(drawn[f"stage{stage}.upsample.up{5 - layer}.{skip}"])
                assert any(left < x < right and top <= y <= bottom for x, y in reached)
    assert not any(name.startswith("stage0") and name.endswith(".add") for name in drawn)


def test_the_network_adds_where_the_picture_does() -> None:
    torch.manual_seed(0)
    network = MSPN(MSPNConfig(num_joints=2, widths=(2, 2, 3, 4), blocks=(1, 1, 1, 1), stem_channels=4,
                              upsample_channels=4)).eval()
    given, gave = {}, {}

    def note(module: nn.Module, arguments: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            given[names[module]], gave[names[module]] = arguments[0].clone(), output.clone()

    names = {module: name for name, module in network.named_modules()}
    for module in names:
        module.register_forward_hook(note)
    with torch.inference_mode():
        network(torch.randn(1, 3, 64, 64))
    for layer in (1, 2, 3, 4):
        unit = f"upsample.up{5 - layer}"
        total = gave[f"stage1.downsample.layer{layer}"] \
            + gave[f"stage0.{unit}.skip1"] + gave[f"stage0.{unit}.skip2"]
        assert torch.equal(given[f"stage1.{unit}.u_skip"], total)
        if layer < 4:
            assert torch.equal(given[f"stage1.downsample.layer{layer + 1}"], total)
    assert torch.equal(given["stage1.downsample.layer1"], gave["stage0.upsample.up4.cross_conv"])


@pytest.mark.parametrize("num_stages", [1, 3])
def test_no_box_covers_another(num_stages: int) -> None:
    picture = drawn_with(num_stages)
    boxes = [corners(rectangle) for rectangle in picture.iter(f"{SVG}rect")
             if rectangle.attrib["class"] not in ("page", "card", "bar")]
    for one, other in combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1], (one, other)
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    assert all(min(left, top) >= 0 and right <= width and bottom <= height for left, top, right, bottom in boxes)


def test_every_class_has_a_look_on_light_and_on_dark_pages(picture: Element) -> None:
    used = {name for item in picture.iter() for name in item.attrib.get("class", "").split()}
    fonts = {"name", "wires", "title", "stage"}
    assert used - fonts <= LOOKS.keys()
    light, dark = picture.find(f"{SVG}style").text.split("@media (prefers-color-scheme: dark)")
    assert all(f".{name}{{" in light and f".{name}{{" in dark for name in LOOKS)


def test_watching_the_network_leaves_no_hook_behind() -> None:
    facts = facts_of(MSPNConfig(num_joints=3, num_stages=1))
    assert not [module for module in facts.network.modules() if module._forward_hooks]
    assert max(KERNELS) not in [head.kernel for head in facts.lessons[0]]


def test_a_network_without_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_stages"):
        main(["--output", str(tmp_path / "mspn.svg"), "--stages", "0"])
    assert not (tmp_path / "mspn.svg").exists()
