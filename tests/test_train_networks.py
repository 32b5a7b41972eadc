"""The networks that MSPN is compared with, in the same jobs: trained by workers, registered, annotating, judged."""

from pathlib import Path
from typing import Any

import pytest

from jobs import train
from pipeline.model.directory import load_model, read_spec
from pipeline.model.settings import ARCHITECTURES
from tests.test_networks import SMALL
from tests.test_train_job import assert_evaluate_says_the_same, config, world  # noqa: F401 - the fixture

# two workers in the default run for the one whose idle weights have no gradients, which workers must not wait for
NAMES = [pytest.param("rsn", marks=pytest.mark.slow), pytest.param("hrnet", marks=pytest.mark.slow), "hourglass"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_trained_validated_and_annotates_as_its_authors_have_it(
        world: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    network = {"architecture": name, "input_size_wh": (64, 64), **SMALL[name]}
    result = train.run(config(world, tmp_path / "model", network=network))

    spec, known = read_spec(tmp_path / "model"), ARCHITECTURES[name]
    assert spec.architecture == name
    assert spec.loss == known.loss
    assert (spec.colour, spec.box_padding_wh) == (known.inference.colour, known.inference.box_padding_wh)
    assert spec.decoding.variant == known.inference.decoding
    assert result["samples"] == 4 * 4 * 2
    assert_evaluate_says_the_same(world, tmp_path, result["evaluation"])


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.parametrize("name", ["hrnet", "hourglass"])
def test_training_goes_on_from_its_model_and_promotes_it(world: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    settings: dict[str, Any] = {"network": {"architecture": name, "input_size_wh": (64, 64), **SMALL[name]},
                                "workers": 1, "tracking": tracking}
    train.run(config(world, tmp_path / "first", **settings))
    del settings["network"]
    on = config(world, tmp_path / "second", init=str(tmp_path / "first"), register=f"pose-{name}", promote="champion",
                **settings | {"network": None})
    result = train.run(on)
    assert result["promotion"]["moved"], result["promotion"]
    network, spec = load_model(tmp_path / "second")
    assert (network.config, spec.loss) == (read_spec(tmp_path / "first").network, ARCHITECTURES[name].loss)
