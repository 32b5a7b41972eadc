"""A training that diverges is stopped with the iteration in which it did, and with the persons of that batch."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline import training
from pipeline.divergence import Divergence, divergence, divergence_text, not_finite
from pipeline.model.mspn import MSPN
from tests.gloo_ranks import failing_ranks
from tests.test_training import random_batch, step
from tests.worlds import TINY

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = math.nan


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks say when something fails."""
    return failing_ranks(tmp_path_factory.mktemp("ranks"))


def network_and_optimiser() -> tuple[MSPN, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = MSPN(TINY).train()
    return network, training.make_optimiser(network, weight_decay=0.0)


def test_a_loss_that_is_not_finite_is_named_with_its_iteration_and_persons() -> None:
    network, optimiser = network_and_optimiser()
    good = step(network, optimiser, random_batch(), 41, 0.0)
    with torch.no_grad():
        next(network.parameters()).fill_(NAN)
    bad = step(network, optimiser, random_batch(), 42, 0.0)

    assert divergence([good]) is None
    assert divergence_text([divergence([good]), divergence([])], ["shards"]) is None
    message = divergence_text([divergence([good, bad])], ["shards"])
    assert message is not None
    assert "The loss of iteration 42 is nan" in message
    assert "[500, 501, 502]" in message


def test_a_gradient_that_overflows_is_named_in_its_own_iteration_though_its_loss_is_finite() -> None:
    network, optimiser = network_and_optimiser()
    hook = next(network.parameters()).register_hook(lambda gradient: gradient.fill_(math.inf))
    bad = step(network, optimiser, random_batch(), 7, 1e-3)
    hook.remove()
    after = step(network, optimiser, replace(random_batch(), ids=torch.tensor([1, 2, 3])), 8, 1e-3)

    assert math.isfinite(bad.loss)
    message = divergence_text([divergence([bad, after])], ["shards"])
    assert message is not None
    assert "The gradient of iteration 7 isn't finite" in message
    assert "[500, 501, 502]" in message


def test_the_earliest_iteration_counts_and_in_it_the_ranks_whose_own_loss_is_not_finite() -> None:
    found = [Divergence(4, NAN, (1040, 1041), (0, 0)), Divergence(3, NAN, (2030, 2031), (0, 0)),
             Divergence(3, 5.0, (3030, 3031), (0, 0)), None]
    message = divergence_text(found, ["shards"])
    assert message is not None
    assert "The loss of iteration 3 is nan" in message
    assert "annotations [2030, 2031]:" in message


def test_an_averaged_gradient_names_every_ranks_batch() -> None:
    message = divergence_text([Divergence(3, 4.0, (1, 2), (0, 0)), Divergence(3, 5.0, (3, 4), (0, 0))], ["shards"])
    assert message is not None
    assert "annotations [1, 2, 3, 4]:" in message


def test_of_several_datasets_each_annotation_is_named_with_its_own() -> None:
    message = divergence_text([Divergence(3, NAN, (7, 7, 9), (1, 0, 1))], ["s3://a", "s3://b", "s3://c"])
    assert message is not None
    assert "annotations [7] of s3://a and [7, 9] of s3://b:" in message


def test_a_batch_of_several_datasets_tells_them_apart() -> None:
    arrays: dict[str, Any] = {"crop": torch.zeros(2, 4, 4, 3), "joints_xy": torch.zeros(2, 1, 2),
                              "visible": torch.zeros(2, 1), "annotation_id": torch.tensor([7, 7]),
                              "set": torch.tensor([1, 0])}
    batch = training.as_batch(arrays, torch.device("cpu"))
    report = training.StepReport(3, torch.tensor(NAN), torch.zeros(1, 1), batch.ids, torch.tensor(NAN), batch.sets)
    found = divergence([report])
    assert found is not None
    assert (found.iteration, found.ids, found.sets) == (3, (7, 7), (1, 0))


def test_two_ranks_name_the_batch_that_diverged_and_not_the_next_one_of_the_other(ranks: list[dict[str, Any]]) -> None:
    messages = [each["diverged"] for each in ranks]
    assert messages[0] == messages[1]
    assert "The loss of iteration 3 is nan" in messages[0]
    assert "annotations [2030, 2031]:" in messages[0]


def test_where_all_checkpoints_are_damaged_every_rank_says_so_and_none_waits(ranks: list[dict[str, Any]]) -> None:
    assert all("None of the checkpoints of" in each["damaged"] for each in ranks)


def test_a_network_that_is_not_finite_is_named_before_it_is_kept() -> None:
    network = MSPN(TINY)
    assert not_finite(network, iteration=7) is None
    with torch.no_grad():
        network.stages[0].upsample.units[0].res_conv2.bn.running_var[1] = float("inf")
    message = not_finite(network, iteration=7)
    assert message is not None
    assert "After iteration 7 the network isn't finite" in message
    assert "res_conv2.bn.running_var" in message
