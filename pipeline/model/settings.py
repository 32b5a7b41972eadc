"""What can be said of each network, how it is taught and how it is used, before there is torch to build it.

`ARCHITECTURES` has a line for each: its settings, and the loss, colours, crop and decoding of its authors.
"""

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, Tag, model_validator
from pydantic.functional_validators import AfterValidator
from pydantic.types import Discriminator

from pipeline.settings import Count, Positive, Settings

Four = tuple[Count, Count, Count, Count]
SizeWH = tuple[Count, Count]
DEFAULT = "mspn"
SPEC_FILE, WEIGHTS_FILE = "model.json", "model.safetensors"  # of a model directory
BELOW = "with the settings from here on"


# --- networks -----------------------------------------------------------------------------------------------------


class NetworkSettings(Settings):
    """What every network can be told. Refused: an input side that isn't a multiple of `side_multiple`."""

    architecture: str
    input_size_wh: SizeWH

    @property
    def side_multiple(self) -> int:
        """What both sides of an input must be multiples of: the network halves them so often."""
        return 32

    @model_validator(mode="after")
    def _sides_halve(self) -> Self:
        multiple = self.side_multiple
        nearest = tuple(max(multiple, round(side / multiple) * multiple) for side in self.input_size_wh)
        if nearest != self.input_size_wh:
            raise ValueError(f"both sides of input_size_wh must be multiples of {multiple}, as often as the network "
                             f"halves them; given: {self.input_size_wh}, nearest: {nearest}")
        return self


class MultiStageSettings(NetworkSettings):
    """What MSPN and RSN have in common: stages, each with a trunk of four layers and four units on the way up.

    blocks, widths  of the trunk's four layers: how many blocks, and how wide
    """

    num_stages: Count
    input_size_wh: SizeWH = (192, 256)
    blocks: Four
    widths: Four = (64, 128, 256, 512)
    stem_channels: Count = 64
    upsample_channels: Count = 256


class MSPNSettings(MultiStageSettings):
    """Which MSPN. The defaults are the authors' two stages of ResNet-50; fewer blocks and smaller widths make small
    ones. A bottleneck of width w gives out 4w channels.
    """

    architecture: Literal["mspn"] = Field("mspn", description=BELOW)
    num_stages: Count = 2
    blocks: Four = (3, 4, 6, 3)


class RSNSettings(MultiStageSettings):
    """Which RSN: RSN-18 by default; blocks of (3, 4, 6, 3) make an RSN-50. A block of width w gives out w channels."""

    architecture: Literal["rsn"] = Field("rsn", description=BELOW)
    num_stages: Count = 1
    blocks: Four = (2, 2, 2, 2)


class HRNetSettings(NetworkSettings):
    """Which HRNet: W32 by default; a width of 48 makes W48.

    width    channels of the finest branch; each coarser one has twice as many
    modules  exchange modules in the stages of two, three and four branches
    blocks   basic blocks of a branch in each module; bottlenecks: of the first stage
    """

    architecture: Literal["hrnet"] = Field("hrnet", description=BELOW)
    input_size_wh: SizeWH = (192, 256)
    width: Count = 32
    modules: tuple[Count, Count, Count] = (1, 4, 3)
    blocks: Count = 4
    bottlenecks: Count = 4
    stem_channels: Count = 64


class HourglassSettings(NetworkSettings):
    """Which Stacked Hourglass: two stacks by default; the authors also publish eight.

    width  channels at 1/4 and in the hourglasses, at every size
    depth  how often an hourglass halves
    """

    architecture: Literal["hourglass"] = Field("hourglass", description=BELOW)
    input_size_wh: SizeWH = (256, 256)
    num_stacks: Count = 2
    width: int = Field(256, ge=2)  # a residual halves it
    depth: Count = 4

    @property
    def side_multiple(self) -> int:
        """64 by default."""
        return 4 << self.depth


# --- losses -------------------------------------------------------------------------------------------------------


Occluded = Literal["suppress", "supervise"]
TargetPeak = Literal["maximum", "joint"]


class CoarseToFineLoss(Settings):
    """MSPN's and RSN's. `occluded: suppress` is the authors': occluded joints are driven to zero on coarse heads."""

    kind: Literal["coarse-to-fine"] = Field("coarse-to-fine", description=BELOW)
    ohkm_joints: int = Field(8, ge=1)
    occluded: Occluded = "suppress"
    target_peak: TargetPeak = Field(
        "maximum", description="what is 255 in a target: its highest cell, or the joint's own")

    @property
    def margin_px(self) -> int:
        """How far outside of the crop a joint is taught: it isn't."""
        return 0


class GaussianLoss(Settings):
    """Mean squared error of every head against one Gaussian with a peak of 1: HRNet's, the hourglass's."""

    kind: Literal["gaussian"] = Field("gaussian", description=BELOW)
    sigma: float = Field(2.0, gt=0, description="of the Gaussian, in cells")
    radius: int = Field(6, ge=0, description="cells from the middle beyond which it is 0")
    center: Literal["nearest", "floor"] = Field("nearest", description="the joint's cell: rounded, or cut off")
    weight: float = Field(0.5, gt=0, description="of the mean squared error")
    unlabelled: Literal["ignore", "empty"] = Field(
        "ignore", description="joints without a label: they take no part in the loss, or have an empty map to learn")

    @property
    def margin_px(self) -> int:
        """How far outside of the crop a joint is taught: while its Gaussian, in cells of 4 pixels, reaches in."""
        return 4 * (self.radius + 2) + 2 if self.unlabelled == "ignore" else 0


def _kind_of(value: Any) -> Any:
    return value.get("kind", "coarse-to-fine") if isinstance(value, dict) else getattr(value, "kind", None)


AnyLoss = Annotated[Annotated[CoarseToFineLoss, Tag("coarse-to-fine")] | Annotated[GaussianLoss, Tag("gaussian")],
                    Discriminator(_kind_of, custom_error_type="loss",
                                  custom_error_message="known kinds of loss are coarse-to-fine and gaussian")]


# --- use ----------------------------------------------------------------------------------------------------------


def odd(size: int) -> int:
    """The size, if it is odd: a blur has a middle."""
    if size % 2 == 0:
        raise ValueError("a blur's size must be odd")
    return size


MEGVII_SCORE = "value of the averaged heatmap at the joint / 255 + 0.5, about 0.5 to 1.5; not a probability"
RAW_SCORE = "maximum of the averaged heatmap, about 0 to 1; not a probability"
DecodingVariant = Literal["official", "mmpose", "hrnet", "hourglass"]
# from 21 on, the authors' border of 10 cells would mirror the map itself
BlurKernel = Annotated[int, Field(ge=1, le=19), AfterValidator(odd)]


class Decoding(Settings):
    """How heatmaps become joints: whose way, and the size of the blur, for the ways that have one (MPII: 9)."""

    variant: DecodingVariant = "official"
    blur_kernel: BlurKernel = 5

    @property
    def flip_shift(self) -> int:
        """Cells by which the mirror image's maps go to the right before they are averaged (HRNet's SHIFT_HEATMAP)."""
        return 1 if self.variant == "hrnet" else 0

    @property
    def low_score(self) -> float:
        """A fifth of a full peak on this way's scale, where most tools stop trusting a joint."""
        return 0.7 if self.variant in ("official", "mmpose") else 0.2

    @property
    def score_meaning(self) -> str:
        """What a joint's score is, for people."""
        return RAW_SCORE if self.variant in ("hrnet", "hourglass") else MEGVII_SCORE


class InferenceConfig(Settings):
    """How the model is used, during training and ever after: it goes into model.json.

    A model that begins from another one (`init`) keeps that one's; others than it and the defaults are refused.
    """

    colour: Literal["BGR", "RGB"] = Field("BGR", description="order of the network's input channels")
    normalisation: Literal["imagenet", "none"] = Field(
        "imagenet", description="of values of 0 to 1: less ImageNet's mean, by its deviation; or as they are")
    box_padding_wh: tuple[Positive, Positive] = Field((1.09, 1.135), description="factors on a box's sides")
    decoding: DecodingVariant = Field("official", description="from heatmaps to joints")
    blur_kernel: BlurKernel = Field(5, description="of the blur before decoding, in cells")


@dataclass(frozen=True)
class Architecture:
    """A network's settings, and what its authors teach and use it with."""

    settings: type[NetworkSettings]
    loss: CoarseToFineLoss | GaussianLoss
    inference: InferenceConfig


ARCHITECTURES = {
    "mspn": Architecture(MSPNSettings, CoarseToFineLoss(), InferenceConfig()),
    "rsn": Architecture(RSNSettings, CoarseToFineLoss(), InferenceConfig()),
    "hrnet": Architecture(HRNetSettings, GaussianLoss(), InferenceConfig(
        colour="RGB", box_padding_wh=(1.25, 1.25), decoding="hrnet", blur_kernel=1)),
    "hourglass": Architecture(
        HourglassSettings, GaussianLoss(sigma=1.0, radius=4, center="floor", weight=1.0, unlabelled="empty"),
        InferenceConfig(colour="RGB", normalisation="none", box_padding_wh=(1.25, 1.25), decoding="hourglass",
                        blur_kernel=1)),
}


def _architecture_of(value: Any) -> Any:
    return value.get("architecture", DEFAULT) if isinstance(value, dict) else getattr(value, "architecture", DEFAULT)


KNOWN_ARCHITECTURES = f"known architectures are {', '.join(ARCHITECTURES)}"
if TYPE_CHECKING:
    AnyNetwork = NetworkSettings
else:
    AnyNetwork = Annotated[
        reduce(or_, (Annotated[known.settings, Tag(name)] for name, known in ARCHITECTURES.items())),
        Discriminator(_architecture_of, custom_error_type="architecture", custom_error_message=KNOWN_ARCHITECTURES)]
