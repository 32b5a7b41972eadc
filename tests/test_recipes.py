"""The recipes and presets that come with the program: each is complete, builds the network that it says, and trains."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from jobs import train, train_intent
from jobs.train_feed import recipe_of
from jobs.train_start import new_network
from jobs.train_task import INIT_FOLDER, TrainTask, Worker, augmentation_of, schedule_of
from jobs.train_worker import _step
from pipeline import mixture, samples, shards, training
from pipeline.config import OptimiserConfig, Settings, TrainConfig, load_config
from pipeline.errors import ConfigError
from pipeline.model.architectures import config_of, make_network
from pipeline.model.directory import ModelSpec, normalise_crops, save_model
from pipeline.model.loss import mspn_loss
from pipeline.model.mspn import MSPN
from pipeline.model.settings import Decoding
from pipeline.model.targets import draw_targets
from pipeline.pose.augment import Augmentation, Draws, augmented_region, rotation, sample_generator
from pipeline.pose.crop import Region
from pipeline.pose.skeleton import COCO17, MPII16
from tests.test_training import made_shards
from tests.worlds import TINY

JOBS = Path(train.__file__).parent
RSN_18, HRNET, HOURGLASS = ["train.yaml", "presets/rsn_18.yaml"], ["train_hrnet.yaml"], ["train_hourglass.yaml"]
AUTHORS, MMPOSE, MPII = ["train.yaml"], ["train_mmpose.yaml"], ["train.yaml", "presets/mpii.yaml"]
pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(names: list[str], **settings: Any) -> TrainConfig:
    return load_config(TrainConfig, files=[str(JOBS / name) for name in names],
                       flags={"data": "d", "output": "o", **settings})


# --- the files ----------------------------------------------------------------------------------------------------

# parameters as the authors' network has them: torch's count on their code
NETWORKS = [
    (AUTHORS, 17, 56_867_032), (MMPOSE, 17, 56_867_032), (MPII, 16, 56_848_576),
    *(([*base, f"presets/{preset}.yaml"], 17, parameters) for base in (AUTHORS, MMPOSE) for preset, parameters in (
        ("1_stage", 25_141_708), ("2_stages", 56_867_032), ("3_stages", 88_592_356), ("4_stages", 120_317_680),
        ("4_stages_384x288", 120_317_680))),
    ([*MPII, "presets/4_stages.yaml"], 16, 120_280_768),
    (RSN_18, 17, 9_159_072), ([*AUTHORS, "presets/rsn_50.yaml"], 17, 19_355_132), (HRNET, 17, 28_536_113),
    (HOURGLASS, 16, 8_429_088)]


@pytest.mark.parametrize(("names", "num_joints", "parameters"), NETWORKS, ids=str)
def test_every_recipe_and_preset_builds_the_network_that_it_says(
        names: list[str], num_joints: int, parameters: int) -> None:
    config = recipe(names)
    schedule_of(config, world=8)
    with torch.device("meta"):
        network = make_network(config_of(config.network, num_joints=num_joints))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    if len(names) > 1:  # a preset says what it costs
        assert any(f"{parameters:,}" in (JOBS / name).read_text() for name in names)


def test_no_recipe_or_preset_is_forgotten_here() -> None:
    small = {"train_small.yaml", "demo.yaml"}
    there = {path.relative_to(JOBS).as_posix() for path in JOBS.rglob("*.yaml")}
    assert there == {name for names, _, _ in NETWORKS for name in names} | small
    for name in small:
        config_of(recipe([name]).network, num_joints=17)
        schedule_of(recipe([name]), world=2)


def test_sizes_of_presets_are_width_first() -> None:
    assert recipe([*AUTHORS, "presets/4_stages_384x288.yaml"]).network.input_size_wh == (288, 384)
    assert recipe([*MMPOSE, "presets/4_stages.yaml"]).network.input_size_wh == (192, 256)


def test_the_authors_recipe_is_what_no_recipe_gives() -> None:
    assert recipe(AUTHORS, workers="auto") == recipe([])


@pytest.mark.parametrize("names", [AUTHORS, MMPOSE, HRNET, HOURGLASS], ids=str)
def test_a_recipe_names_every_setting_of_its_groups(names: list[str]) -> None:
    written, read = yaml.safe_load((JOBS / names[0]).read_text()), recipe(names)
    elsewhere = ("tracking", "promotion")  # nothing in them can change the model
    groups = {name: value for name in TrainConfig.model_fields if name not in elsewhere
              and isinstance(value := getattr(read, name), Settings)}
    assert len(groups) == 5
    assert {name: sorted(written[name]) for name in groups} == {
        name: sorted(type(group).model_fields) for name, group in groups.items()}


@pytest.mark.parametrize("names", [RSN_18, HRNET, HOURGLASS], ids=str)
def test_a_network_is_taught_and_used_as_its_recipe_says_without_the_recipe_too(names: list[str]) -> None:
    read = recipe(names)
    bare = recipe([], network={"architecture": read.network.architecture})
    assert (bare.network, bare.loss, bare.inference) == (read.network, read.loss, read.inference)


def test_the_two_recipes_differ_where_the_documentation_says() -> None:
    page = (JOBS.parent / "docs" / "recipes.md").read_text()
    authors, mmpose = recipe(AUTHORS).model_dump(mode="json"), recipe(MMPOSE).model_dump(mode="json")
    for group in ("optimiser", "loss", "augmentation", "inference"):
        for name in authors[group]:
            if authors[group][name] != mmpose[group][name]:
                assert f"`{group}.{name}`" in page, f"{group}.{name}"


def test_the_documentation_has_every_setting_of_a_training() -> None:
    page = (JOBS.parent / "docs" / "recipes.md").read_text()
    names = {field.alias or name for name, field in TrainConfig.model_fields.items()}
    names |= {f"optimiser.{name}" for name in OptimiserConfig.model_fields}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_recipes_and_their_documentation_name_files_that_are_there() -> None:
    for path in [*JOBS.rglob("*.yaml"), JOBS.parent / "docs" / "recipes.md"]:
        for name in re.findall(r"(?:presets/)?[\w*]+\.yaml", path.read_text()):
            there = name.replace("N_stages", "*_stages")
            assert list(JOBS.glob(there)) or list(JOBS.glob(f"presets/{there}")), (path.name, name)


def test_fewer_workers_with_the_authors_batch_have_the_authors_rate() -> None:
    """As docs/recipes.md says: each worker's batch, its pieces and its rate, for 1, 2 and 4 workers."""
    page = (JOBS.parent / "docs" / "recipes.md").read_text()
    section = page.partition("batch of 256 on fewer GPUs\n")[2].partition("\n## ")[0]
    one = [float(value) for value in re.findall(r"(?:per_worker|accumulate)=([\d.e-]+)", section)]
    named = {"Four": 4, "two": 2}
    several = re.findall(r"(Four|two) (?:have it )?with (\d+), (\d+) and ([\d.e-]+\d)", section)
    asked = {1: one} | {named[word]: [float(value) for value in values] for word, *values in several}
    assert asked.keys() == {1, 2, 4}
    theirs = schedule_of(recipe([]), world=8)
    for workers, (batch, pieces, rate) in asked.items():
        config = recipe([], optimiser={"batch_size_per_worker": batch, "accumulate": pieces,
                                       "learning_rate_per_worker": rate})
        assert schedule_of(config, world=workers) == theirs
        assert (batch * workers, batch / pieces) == (256, 32)


def test_mmposes_optimiser_is_theirs_on_eight_gpus() -> None:
    optimiser = recipe(MMPOSE).optimiser
    assert (optimiser.weight_decay, optimiser.batch_size_per_worker) == (0, 32)
    schedule = schedule_of(recipe(MMPOSE), world=8)
    rates = [training.learning_rate(iteration, schedule) for iteration in (500, 99_450, 99_451, 117_001, 122_850)]
    assert rates == pytest.approx([5e-3, 5e-3, 5e-4, 5e-5, 5e-5], rel=1e-9)  # 585 iterations each of 210 epochs


# --- MMPose's augmentation, over many samples ---------------------------------------------------------------------

MANY = 20_000
BOX = (50.0, 40.0, 90.0, 150.0)  # narrower than 3:4, so its region is 112.5x150, times 1.25


def mmpose_augmentation() -> Augmentation:
    augmentation = augmentation_of(recipe(MMPOSE), COCO17)
    assert augmentation is not None
    return augmentation


@pytest.fixture(scope="module")
def chances() -> list[Draws]:
    return [Draws(*sample_generator(0, 0, annotation_id).random(13)) for annotation_id in range(MANY)]


def regions(chances: list[Draws], keypoints: np.ndarray) -> list[Region]:
    augmentation = mmpose_augmentation()
    return [augmented_region(BOX, keypoints, skeleton=COCO17, input_size_wh=(192, 256), augmentation=augmentation,
                             draws=draws) for draws in chances]


def test_mmposes_scale_is_a_normal_about_one_cut_off_at_one_deviation(chances: list[Draws]) -> None:
    scales = np.array([region.size_wh[0] / (1.25 * 112.5) for region in regions(chances, np.zeros((17, 3)))])
    assert scales.min() == pytest.approx(0.5)
    assert scales.max() == pytest.approx(1.5)
    # a sixth of a normal lies beyond one deviation on either side: Phi(-1) = 0.1587
    assert np.isclose(scales, 0.5).mean() == pytest.approx(0.1587, abs=0.01)
    assert np.isclose(scales, 1.5).mean() == pytest.approx(0.1587, abs=0.01)
    assert scales.mean() == pytest.approx(1.0, abs=0.01)
    # cut off at one deviation, variance is 0.6827 - 2 * 0.2420 + 2 * 0.1587 = 0.516 of what it was
    assert scales.std() == pytest.approx(0.5 * 0.516**0.5, abs=0.005)


def test_mmposes_angle_is_a_normal_in_three_of_five_samples_cut_off_at_80(chances: list[Draws]) -> None:
    augmentation = mmpose_augmentation()
    angles = np.array([rotation(augmentation, draws) for draws in chances])
    turned = angles[angles != 0]
    assert len(turned) / MANY == pytest.approx(0.6, abs=0.015)
    assert np.abs(turned).max() == 80
    assert (turned == 80).mean() == pytest.approx(0.0228, abs=0.005)  # Phi(-2)
    assert (turned == -80).mean() == pytest.approx(0.0228, abs=0.005)
    assert np.median(turned) == pytest.approx(0, abs=1.5)
    assert (np.abs(turned) < 40).mean() == pytest.approx(0.6827, abs=0.015)


def test_mmposes_centre_moves_in_three_of_ten_samples_by_a_fifth_of_the_box_at_most(chances: list[Draws]) -> None:
    away = np.array([region.center_xy - (95.0, 115.0) for region in regions(chances, np.zeros((17, 3)))]) / (90, 150)
    moved = away[(away != 0).any(axis=1)]
    assert len(moved) / MANY == pytest.approx(0.3, abs=0.015)
    assert np.abs(moved).max(axis=0) == pytest.approx([0.2, 0.2], abs=0.001)
    assert np.abs(moved).max() <= 0.2 + 1e-9
    assert moved.std(axis=0) == pytest.approx([0.2 / 3**0.5] * 2, abs=0.004)
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.05


def test_mmposes_half_bodies_come_in_three_of_ten_samples_seven_of_ten_of_them_upper(chances: list[Draws]) -> None:
    keypoints = np.column_stack([np.arange(17) * 1000.0, np.arange(17) % 2 * 10.0, np.full(17, 2)])
    found = [region.center_xy[0] for region in regions(chances, keypoints)]
    # means of the ids 0 to 10, and of 11 to 16, hips and below
    upper, lower = np.isclose(found, 5000).mean(), np.isclose(found, 13_500).mean()
    assert upper + lower == pytest.approx(0.3, abs=0.015)
    assert upper / (upper + lower) == pytest.approx(0.6915, abs=0.025)  # Phi(0.5)


def test_joints_that_the_data_do_not_have_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"half_body_upper names left_ear, .*right_ankle, .*null for the skel"):
        augmentation_of(recipe(MMPOSE), MPII16)


# --- training with them -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> shards.ShardDataset:
    return made_shards(tmp_path_factory.mktemp("data"), num_shards=1)


def task(config: TrainConfig, data: shards.ShardDataset) -> TrainTask:
    return TrainTask(config, (training_set(data),), None, {"precision": "float32"}, {}, None)


def training_set(data: shards.ShardDataset) -> mixture.TrainingSet:
    return mixture.TrainingSet(data, 1.0, tuple(samples.trainable_counts(data)), tuple(range(17)))


def small(names: list[str], **settings: Any) -> TrainConfig:
    """A recipe with a network that is trained in milliseconds."""
    return recipe(names, network=TINY.model_dump(exclude={"num_joints"}), **settings)


def first_batch(given: TrainTask, spec: ModelSpec) -> samples.Arrays:
    one = given.sets[0]
    turn = next(samples.rank_turns(one.counts, seed=0, rank=0, world=1))
    stream = samples.turn_samples(one.dataset, turn, recipe_of(given, spec))
    return next(mixture.mixed_batches([stream], [1.0], batch_size=16, positions=[0]))


@pytest.mark.parametrize(("names", "peak", "occluded"), [
    (AUTHORS, "maximum", "suppress"), (MMPOSE, "joint", "supervise"), (MPII, "maximum", "suppress")], ids=str)
def test_one_step_of_each_recipe_minimises_its_own_loss(
        data: shards.ShardDataset, names: list[str], peak: Any, occluded: Any) -> None:
    given = task(small(names), data)
    network, spec = new_network(given)
    batch = first_batch(given, spec)
    tensors = training.as_batch(batch, torch.device("cpu"))
    targets = draw_targets(tensors.joints_xy, tensors.visible, (64, 64), peak=peak)
    expected = mspn_loss(network.train()(normalise_crops(tensors.crops, spec)), targets, tensors.visible,
                         occluded=occluded)
    assert not torch.equal(targets, draw_targets(tensors.joints_xy, tensors.visible, (64, 64),
                                                 peak="joint" if peak == "maximum" else "maximum"))

    network, spec = new_network(given)
    before = network.top.conv.conv.weight.detach().clone()
    optimiser = training.make_optimiser(network, weight_decay=given.config.optimiser.weight_decay)
    worker = Worker(given, 0, 1, torch.device("cpu"), spec, network.train(), network, optimiser, 0, (0,))
    report = _step(worker, batch, schedule_of(given.config, world=1))

    torch.testing.assert_close(report.heads, expected.heads.detach(), rtol=1e-4, atol=1e-3)
    assert not torch.equal(network.top.conv.conv.weight, before)


def test_a_run_in_bfloat16_takes_its_steps_in_it(data: shards.ShardDataset) -> None:
    given = task(small([]), data)

    def first_step(precision: str) -> training.StepReport:
        network, spec = new_network(given)
        optimiser = training.make_optimiser(network, weight_decay=0.0)
        asked = replace(given, intent={"precision": precision})
        worker = Worker(asked, 0, 1, torch.device("cpu"), spec, network.train(), network, optimiser, 0, (0,))
        return _step(worker, first_batch(given, spec), schedule_of(given.config, world=1))

    exact, rounded = first_step("float32"), first_step("bfloat16")
    assert not torch.equal(rounded.loss, exact.loss)
    torch.testing.assert_close(rounded.loss, exact.loss, rtol=0.01, atol=0)


def test_a_model_of_mmposes_recipe_is_used_as_an_imported_one_of_theirs(data: shards.ShardDataset) -> None:
    _, spec = new_network(task(small(MMPOSE), data))
    assert (spec.colour, spec.mean, spec.std) == ("RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert spec.box_padding_wh == (1.25, 1.25)
    assert spec.decoding == Decoding(variant="mmpose", blur_kernel=5)


def test_a_model_for_mpii_is_used_as_the_authors_test_it(data: shards.ShardDataset) -> None:
    _, spec = new_network(task(small(MPII), data))
    assert (spec.colour, spec.box_padding_wh) == ("BGR", (1.25, 1.25))
    assert spec.decoding == Decoding(variant="official", blur_kernel=9)


def test_a_model_of_the_default_recipe_says_what_it_said_before_there_were_others(data: shards.ShardDataset) -> None:
    _, spec = new_network(task(small([]), data))
    assert spec == ModelSpec(network=TINY, skeleton=COCO17.to_json())


@pytest.mark.parametrize(("names", "red_first"), [(AUTHORS, False), (MMPOSE, True)], ids=str)
def test_a_trunk_is_turned_to_the_colours_that_the_recipe_trains_on(
        data: shards.ShardDataset, tmp_path: Path, names: list[str], red_first: bool) -> None:
    weights = torchvision_weights(red=1.0, green=2.0, blue=3.0)
    torch.save(weights, tmp_path / "trunk.pth")
    network, _ = new_network(task(small(names, trunk=str(tmp_path / "trunk.pth")), data))
    of_channel = network.top.conv.conv.weight.detach().mean(dim=(0, 2, 3)).tolist()
    assert of_channel == ([1.0, 2.0, 3.0] if red_first else [3.0, 2.0, 1.0])


def torchvision_weights(*, red: float, green: float, blue: float) -> dict[str, torch.Tensor]:
    """A ResNet of TINY's shape under torchvision's names, its first convolution one number for each colour."""
    weights: dict[str, torch.Tensor] = {}

    def add(conv: str, bn: str, *shape: int) -> None:
        weights[f"{conv}.weight"] = torch.zeros(shape)
        for name in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{bn}.{name}"] = torch.ones(shape[0])

    add("conv1", "bn1", 4, 3, 7, 7)
    weights["conv1.weight"] += torch.tensor([red, green, blue])[:, None, None]
    for layer, channels in enumerate((4, 16, 16, 16), start=1):
        block = f"layer{layer}.0"
        add(f"{block}.conv1", f"{block}.bn1", 4, channels, 1, 1)
        add(f"{block}.conv2", f"{block}.bn2", 4, 4, 3, 3)
        add(f"{block}.conv3", f"{block}.bn3", 16, 4, 1, 1)
        add(f"{block}.downsample.0", f"{block}.downsample.1", 16, channels, 1, 1)
    return weights


@pytest.fixture
def from_mmpose(tmp_path: Path) -> ModelSpec:
    """A model as import-model makes it of a checkpoint of MMPose's, where a run keeps what it begins from."""
    torch.manual_seed(0)
    spec = ModelSpec(network=TINY, skeleton=COCO17.to_json(), colour="RGB", mean=(0.485, 0.456, 0.406),
                     std=(0.229, 0.224, 0.225), box_padding_wh=(1.25, 1.25), decoding=Decoding(variant="mmpose"))
    save_model(tmp_path / "out" / INIT_FOLDER, MSPN(TINY), spec)
    return spec


@pytest.mark.parametrize("names", [[], AUTHORS, MMPOSE], ids=str)
def test_training_on_from_a_model_keeps_its_colours_crop_and_decoding(
        data: shards.ShardDataset, tmp_path: Path, from_mmpose: ModelSpec, names: list[str]) -> None:
    config = small(names, init="models:/theirs@best", output=str(tmp_path / "out"))
    _, spec = new_network(task(config, data))
    assert spec == from_mmpose.model_copy(update={"loss": config.loss})


@pytest.mark.usefixtures("from_mmpose")
def test_training_on_from_a_model_in_another_way_than_its_own_is_refused(
        data: shards.ShardDataset, tmp_path: Path) -> None:
    config = small(MPII, init="models:/theirs@best", output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"trained with inference .*'colour': 'RGB'.*Give the model's own"):
        new_network(task(config, data))


# --- what a run is known by ---------------------------------------------------------------------------------------


def test_a_run_begun_before_there_were_recipes_is_recognised(data: shards.ShardDataset) -> None:
    # the intent that the first version froze for the defaults, written out
    first = {
        "workers": "8", "seed": 0, "precision": "float32", "trunk": None, "init": None, "heatmap_scale": 1.0,
        "network": {"num_stages": 2, "input_size_wh": [192, 256], "blocks": [3, 4, 6, 3],
                    "widths": [64, 128, 256, 512], "stem_channels": 64, "upsample_channels": 256},
        "optimiser": {"learning_rate_per_worker": 5e-4, "weight_decay": 1e-5, "iterations": 96_000,
                      "warmup_iterations": 2400, "warmup_factor": 0.1, "batch_size_per_worker": 32},
        "loss": {"ohkm_joints": 8, "occluded": "suppress"},
        "augmentation": {"enabled": True, "base_scale": 1.05, "extend_wh": [0.6, 0.8], "rotation_deg": 45.0,
                         "rotation_probability": 0.5, "scale_range": [0.6, 1.0], "flip_probability": 0.5,
                         "half_body_probability": 0.3},
        "validate_every": 2400, "validate_persons": None, "joints": list(COCO17.joints)}
    now = train_intent.resolved_intent(recipe(AUTHORS), None, [training_set(data)])
    defaults = recipe([]).model_dump(mode="json")
    assert train_intent._as_it_began(now, first, defaults) == first
    other = train_intent.resolved_intent(recipe([*AUTHORS, "presets/mpii.yaml"]), None, [training_set(data)])
    assert train_intent._as_it_began(other, first, defaults)["inference"]["blur_kernel"] == 9


def test_what_differs_from_the_authors_is_part_of_what_a_run_is_known_by(data: shards.ShardDataset) -> None:
    intent = train_intent.resolved_intent(recipe(MMPOSE), None, [training_set(data)])
    assert intent["optimiser"]["decay_at"] == [99_450, 117_000]
    assert intent["loss"]["target_peak"] == "joint"
    assert intent["augmentation"]["scale_sigma"] == 0.5
    assert intent["inference"] == {"colour": "RGB", "normalisation": "imagenet", "box_padding_wh": [1.25, 1.25],
                                   "decoding": "mmpose", "blur_kernel": 5}


def test_an_upper_body_by_name_is_one_by_id() -> None:
    assert mmpose_augmentation().half_body_upper == tuple(range(11))
    assert augmentation_of(recipe([]), COCO17) == Augmentation()  # the skeleton's own
