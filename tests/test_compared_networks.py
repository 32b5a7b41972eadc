"""The networks that benchmarks.architectures compares."""

import pytest

from benchmarks.architectures import FULL, SMALL, size_of
from pipeline.model.settings import ARCHITECTURES


def test_the_small_networks_that_train_alike_are_of_each_kind_and_cost_the_same() -> None:
    macs = [size_of(settings)["macs"] for settings in SMALL.values()]
    assert SMALL.keys() == ARCHITECTURES.keys()
    assert macs == pytest.approx([sum(macs) / len(macs)] * len(macs), rel=0.03)
    assert len({settings.input_size_wh for settings in SMALL.values()}) == 1


def test_full_sizes_are_compared_at_one_input_size() -> None:
    assert {settings.input_size_wh for settings in FULL.values()} == {(192, 256)}


def test_a_size_is_parameters_and_multiplications_of_one_crop() -> None:
    # the authors' README of HRNet: W32 has 28.5 million parameters and 7.10 "GFLOPs", which they count as MACs
    size = size_of(FULL["HRNet-W32"])
    assert size["parameters"] == pytest.approx(28.5e6, rel=0.002)
    assert size["macs"] == pytest.approx(7.10e9, rel=0.1)
