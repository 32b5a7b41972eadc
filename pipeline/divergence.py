"""Numbers that aren't finite: in which iteration they came up first, on whose batch, and what to say of it.

It knows what a rank's steps report; not how ranks hear from each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.training import StepReport

REMEDY = ("Lower optimiser.learning_rate_per_worker or lengthen optimiser.warmup_iterations, and train into a new "
          "--output.")


@dataclass(frozen=True)
class Divergence:
    """The first iteration whose loss or gradient isn't finite, as one rank sees it.

    loss   the rank's own
    ids    annotation ids of the rank's batch
    sets   the dataset of each, by its place among --data
    """

    iteration: int
    loss: float
    ids: tuple[int, ...]
    sets: tuple[int, ...]


def divergence(reports: Sequence[StepReport]) -> Divergence | None:
    """The first of a rank's iterations that was not finite; None if all were."""
    if not reports:
        return None
    losses = torch.stack([report.loss for report in reports]).tolist()
    norms = torch.stack([report.gradient_norm for report in reports]).tolist()
    for report, loss, norm in zip(reports, losses, norms, strict=True):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            ids = tuple(report.ids.tolist())
            sets = (0,) * len(ids) if report.sets is None else tuple(report.sets.tolist())
            return Divergence(report.iteration, loss, ids, sets)
    return None


def divergence_text(found: Sequence[Divergence | None], uris: Sequence[str]) -> str | None:
    """What is wrong, from what each rank has found: the iteration, its persons, the remedy; None if nothing is.

    One rank's loss spoils the others' weights, and so their next iterations: the earliest one counts, and in it the
    ranks whose own loss isn't finite. A gradient is the average of all ranks': it names all their batches.

    uris  of the datasets
    """
    iteration = min((each.iteration for each in found if each), default=None)
    if iteration is None:
        return None
    first = [each for each in found if each and each.iteration == iteration]
    of_loss = [each for each in first if not math.isfinite(each.loss)]
    what = (f"The loss of iteration {iteration} is {of_loss[0].loss}" if of_loss else
            f"The gradient of iteration {iteration} isn't finite, though its loss is")
    return (f"{what}: training has diverged. Its batch held the annotations {_persons(of_loss or first, uris)}: look "
            f"at them. {REMEDY}")


def _persons(found: Sequence[Divergence], uris: Sequence[str]) -> str:
    persons = [(place, one) for each in found for place, one in zip(each.sets, each.ids, strict=True)]
    if len(uris) == 1:
        return str([one for _, one in persons])
    return " and ".join(f"{[one for place, one in persons if place == number]} of {uri}"
                        for number, uri in enumerate(uris) if any(place == number for place, _ in persons))


def not_finite(network: nn.Module, *, iteration: int) -> str | None:
    """What is wrong with a network that holds a number which isn't finite: such a one is never kept; or None."""
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            return (f"After iteration {iteration} the network isn't finite ({name}), though its losses were: training "
                    f"has diverged. {REMEDY}")
    return None
