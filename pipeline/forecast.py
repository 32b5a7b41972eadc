"""From a sample's measured costs to what a whole run takes: seconds, node hours, money. Arithmetic alone."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.unit_annotator import Receipt


@dataclass(frozen=True)
class Whole:
    """The input counted: pictures, units, and the seconds that listing it took.

    copied  of the pictures, those whose rows an earlier output has
    """

    pictures: int
    units: int
    seconds: float
    copied: int = 0


@dataclass(frozen=True)
class Measured:
    """The sample: what was in it, an actor's seconds for a picture and for a unit without its pictures (a shard is read
    whole), and the seconds that come once, or once a unit at the end; the same of those that decode for others.

    copied, copied_...  pictures that an earlier output has: how many rows of them were copied, and an actor's seconds
                        for one
    """

    pictures: int
    persons: int
    rejected: int
    picture_s: float
    unit_s: float
    pool_start_s: float
    seal_unit_s: float
    decoding_picture_s: float = 0.0
    decoding_unit_s: float = 0.0
    copied: int = 0
    copied_picture_s: float = 0.0
    copied_decoding_s: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Seconds of each step and in all; node hours, and money where a node hour has a price."""

    listing_s: float
    pool_start_s: float
    annotating_s: float
    sealing_s: float
    seconds: float
    node_hours: float
    money: float | None


def predict(whole: Whole, measured: Measured, *, annotators: int, decoders: int, nodes: int,
            price: float | None) -> Prediction:
    """Units are dealt to the actors, so the work takes as many rounds of units as the busiest actor gets; where others
    decode, both pools work at once, and the slower one decides."""
    copied = whole.copied / whole.units
    computed = whole.pictures / whole.units - copied
    annotating = -(-whole.units // annotators) * (
        measured.unit_s + measured.picture_s * computed + measured.copied_picture_s * copied)
    if decoders:
        decoding = (measured.decoding_unit_s + measured.decoding_picture_s * computed
                    + measured.copied_decoding_s * copied)
        annotating = max(annotating, -(-whole.units // decoders) * decoding)
    sealing = measured.seal_unit_s * whole.units
    seconds = whole.seconds + measured.pool_start_s + annotating + sealing
    node_hours = nodes * seconds / 3600
    return Prediction(whole.seconds, measured.pool_start_s, annotating, sealing, seconds, node_hours,
                      None if price is None else price * node_hours)


def annotating_s(receipt: Receipt) -> float:
    """What a unit took of an annotator's time."""
    return receipt.ended - receipt.began


def decoding_s(receipt: Receipt) -> float:
    """What a unit took of the time of one that decodes for others."""
    return receipt.decoding_s


def costs(single: Sequence[Receipt], slices: Sequence[Receipt], copied: Sequence[Receipt],
          seconds: Callable[[Receipt], float]) -> tuple[float, float, float]:
    """Seconds for a picture that is computed, for a unit beside its pictures, and for a picture of an earlier output.

    single, slices  units of one picture, and of more; none: nothing is computed, which costs 0
    copied          units of pictures that an earlier output has
    """
    picture_s = unit_s = 0.0
    if single and slices:
        picture_s, unit_s = split_cost(statistics.mean(map(seconds, single)), [seconds(one) for one in slices],
                                       [one.counts["pictures"] for one in slices])
    pictures = sum(one.counts["pictures"] for one in copied)
    beside = sum(map(seconds, copied)) - unit_s * len(copied)
    return picture_s, unit_s, max(0.0, beside) / pictures if pictures else 0.0


def split_cost(single_s: float, seconds: Sequence[float], pictures: Sequence[int]) -> tuple[float, float]:
    """An actor's seconds for a picture, and for a unit beside its pictures.

    single_s           of units of one picture
    seconds, pictures  of each other unit
    """
    more = sum(pictures) - len(pictures)
    picture_s = (sum(seconds) - single_s * len(seconds)) / more if more else single_s
    # what can't be told apart belongs to the pictures
    return (picture_s, single_s - picture_s) if 0 < picture_s < single_s else (sum(seconds) / sum(pictures), 0.0)
