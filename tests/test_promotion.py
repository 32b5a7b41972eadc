"""An alias moves only to a model that deserves it: its files as registered, alive in a fresh process, not worse."""

import base64
import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from jobs import promote as job
from jobs import train, train_intent
from jobs.train_task import INIT_FOLDER
from pipeline import model_registry, promotion, storage, tracking
from pipeline.config import PromoteConfig, PromotionConfig, TrackingConfig, TrainConfig, load_config
from pipeline.errors import ConfigError, DataError
from pipeline.mixture import TrainingSet
from pipeline.model.directory import ModelSpec, model_digest, read_spec, save_model
from pipeline.model.mspn import MSPN
from pipeline.model_registry import RegisteredVersion
from pipeline.pose.skeleton import COCO17, MPII16
from pipeline.promotion import Promotion, PromotionRefused
from pipeline.samples import trainable_counts
from pipeline.shards import ShardDataset, dataset_json, read_part, version_name
from pipeline.units import freeze_job
from tests.test_training import made_shards, write_part
from tests.worlds import TINY, write_tiny_model

pytestmark = pytest.mark.usefixtures("without_ray")

TRAINED = Path(__file__).parent / "trained_tiny"  # knows the 12 made pictures; an untrained one has an AP of about 0
NAMES = {"reference": "models:/pose/3", "skeleton": COCO17, "num_boxes": 2}
COLUMNS = ["picture_index", "person_index", "box_x", "box_y", "box_w", "box_h", "score",
           *(f"{joint}_{value}" for joint in COCO17.joints for value in ("x", "y", "score"))]


# --- rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ap", "champion_ap", "passes"), [
    (0.710, 0.700, True), (0.700, 0.700, True), (0.696, 0.700, True),
    (0.695, 0.700, True),  # in floating point 0.700 - 0.695 > 0.005
    (0.6949, 0.700, False), (0.0, 0.700, False), (None, 0.700, False), (float("nan"), 0.7, False), (0.7, None, False)])
def test_an_ap_may_be_lower_by_the_tolerance_and_no_more(ap: Any, champion_ap: Any, passes: bool) -> None:
    def judge() -> str:
        return promotion.refuse_worse(ap, champion_ap, tolerance=0.005, champion="models:/pose/2", data="val")

    if passes:
        assert f"AP {ap:.4f} against 0.7000 of models:/pose/2" in judge()
    else:
        with pytest.raises(PromotionRefused):
            judge()


@pytest.mark.parametrize(("ap", "passes"), [(0.0, True), (None, False), (float("nan"), False)])
def test_the_first_champion_needs_a_finite_ap_alone(ap: Any, passes: bool) -> None:
    if passes:
        assert "no model had the alias" in promotion.refuse_worse(ap, None, tolerance=0.0, champion=None, data="val")
        return
    with pytest.raises(PromotionRefused, match="nothing was measured"):
        promotion.refuse_worse(ap, None, tolerance=0.0, champion=None, data="val")


def good_answer(**other: Any) -> dict[str, Any]:
    return {"columns": COLUMNS, "rows": [[0.0] * len(COLUMNS)] * 2, "foreign": {}} | other


def test_an_answer_with_the_models_columns_and_finite_numbers_passes() -> None:
    promotion.refuse_bad_answer(good_answer(), **NAMES)


@pytest.mark.parametrize(("other", "why"), [
    ({"foreign": {"pipeline.pose.crop": "/here/crop.py"}}, "took pipeline.pose.crop from /here/crop.py"),
    ({"columns": COLUMNS[:-1]}, "answers with the columns"),
    ({"rows": [[0.0] * len(COLUMNS)]}, "1 rows for 2 boxes"),
    ({"rows": [[0.0] * len(COLUMNS), [None] * len(COLUMNS)]}, "aren't finite")])
def test_another_answer_is_refused_with_what_is_wrong(other: dict[str, Any], why: str) -> None:
    with pytest.raises(PromotionRefused, match=why):
        promotion.refuse_bad_answer(good_answer(**other), **NAMES)


@pytest.mark.parametrize(("stored", "why"), [
    ({"a": "1" * 64, "b": "3" * 64}, r"b: 3{16}\.\.\., but registered was 2{16}"), ({"a": "1" * 64}, "b: absent"),
    ({"a": "1" * 64, "b": "2" * 64, "c": "4" * 64}, "registered was absent")])
def test_files_that_differ_lack_or_are_too_many_are_refused_by_name(stored: dict[str, str], why: str) -> None:
    with pytest.raises(PromotionRefused, match=why):
        promotion.refuse_other_files(stored, {"a": "1" * 64, "b": "2" * 64}, "models:/pose/3")


def test_a_version_of_which_nobody_noted_the_files_is_refused_with_the_remedy() -> None:
    with pytest.raises(PromotionRefused, match="directory=URI"):
        promotion.refuse_other_files({"a": "1" * 64}, {}, "models:/pose/3")


@pytest.mark.parametrize("alias", ["latest", "V12", "a@b", "a/b", ""])
def test_an_alias_that_mlflow_would_refuse_is_refused_at_once(alias: str) -> None:
    with pytest.raises(ConfigError, match="can't be an alias"):
        promotion.refuse_reserved_alias(alias)


# --- registered models, measured for real -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    folder = tmp_path_factory.mktemp("mlflow")
    return TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """12 made pictures in two shards."""
    return made_shards(tmp_path_factory.mktemp("world"), num_shards=2)


@pytest.fixture(scope="module")
def register(settings: TrackingConfig) -> Callable[[Path], RegisteredVersion]:
    def register(directory: Path) -> RegisteredVersion:
        made = model_registry.register_model_directory(directory, "pose", tracking=settings)
        return RegisteredVersion("pose", made["version"], made["run_id"])

    return register


@pytest.fixture(scope="module")
def trained(register: Callable[[Path], RegisteredVersion]) -> RegisteredVersion:
    return register(TRAINED)


@pytest.fixture(scope="module")
def untrained(register: Callable[[Path], RegisteredVersion], tmp_path_factory: pytest.TempPathFactory
              ) -> RegisteredVersion:
    return register(write_tiny_model(tmp_path_factory.mktemp("models") / "untrained"))


@pytest.fixture
def quick_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh process takes 10 s; its answer is as it should be."""
    def predict(reference: str, uri: str, picture: promotion.TrialPicture) -> dict[str, Any]:
        return good_answer(rows=[[0.0] * len(COLUMNS)] * len(picture.boxes_xywh))

    monkeypatch.setattr(promotion, "predict_in_fresh_process", predict)


@pytest.fixture
def alias() -> str:
    """An alias that only this test knows."""
    return f"alias-{uuid.uuid4().hex}"


@pytest.fixture
def promote_to(data: ShardDataset, settings: TrackingConfig, quick_trial: None, alias: str) -> Callable[..., Promotion]:
    """Promote a version to the test's alias; `champion`: what the alias means before."""
    def promote(candidate: RegisteredVersion, champion: RegisteredVersion | None = None, *, tolerance: float = 0.005,
                on: ShardDataset = data) -> Promotion:
        if champion is not None:
            model_registry.move_alias(champion, alias, tracking=settings)
        return job.promote(candidate, alias, on, expected=model_registry.noted_sha256(candidate, tracking=settings),
                           rules=PromotionConfig(tolerance=tolerance), settings=settings)

    return promote


def behind(alias: str, settings: TrackingConfig) -> RegisteredVersion | None:
    return model_registry.version_behind("pose", alias, tracking=settings)


def test_the_first_champion_gets_the_alias(promote_to, trained, settings) -> None:
    decided = promote_to(trained)

    assert decided.moved
    assert behind(decided.alias, settings) == trained
    assert (decided.candidate, decided.champion, decided.champion_ap) == (trained.reference, None, None)
    assert 0.1 < decided.ap < 1


def test_a_worse_model_is_refused_and_the_alias_stays_with_the_reason_everywhere(
        promote_to, trained, untrained, settings, data, caplog) -> None:
    from mlflow import MlflowClient

    decided = promote_to(untrained, champion=trained)

    assert not decided.moved
    assert behind(decided.alias, settings) == trained
    assert decided.champion_ap - decided.ap > 0.1
    assert f"{decided.champion_ap:.4f}" in decided.why
    assert "0.005 is tolerated" in decided.why
    assert (decided.data, decided.data_version, decided.tolerance) == (data.uri, 1, 0.005)
    assert f"WARNING: @{decided.alias} was not moved to {untrained.reference}" in caplog.text
    client, tag = MlflowClient(settings.uri), f"promotion.{decided.alias}"
    version, run = client.get_model_version("pose", untrained.version), client.get_run(untrained.run_id)
    for tags in (version.tags, run.data.tags):
        assert (tags[tag], tags[f"{tag}.why"], tags[f"{tag}.before"]) == ("refused", decided.why, trained.reference)
    assert run.data.metrics["promotion/ap"] == decided.ap
    assert run.data.metrics[f"promotion/{decided.alias}_ap"] == decided.champion_ap


def test_a_better_model_replaces_the_champion(promote_to, trained, untrained, settings) -> None:
    decided = promote_to(trained, champion=untrained)
    assert decided.moved
    assert behind(decided.alias, settings) == trained


def test_a_model_that_is_lower_by_less_than_the_tolerance_replaces_the_champion(
        promote_to, trained, untrained, settings) -> None:
    decided = promote_to(untrained, champion=trained, tolerance=0.9)
    assert decided.ap < decided.champion_ap
    assert decided.moved
    assert behind(decided.alias, settings) == untrained


def test_both_models_are_measured_on_the_same_persons_by_the_same_code(promote_to, trained, register) -> None:
    decided = promote_to(register(TRAINED), champion=trained)
    assert decided.moved
    assert decided.ap == decided.champion_ap


def test_the_champion_itself_is_left_where_it_is(promote_to, trained) -> None:
    decided = promote_to(trained, champion=trained)
    assert (decided.moved, decided.ap) == (False, None)
    assert "already" in decided.why


def test_a_flipped_byte_in_mlflows_store_is_refused(promote_to, register, trained, settings) -> None:
    damaged = register(TRAINED)
    weights = stored_file(damaged, settings, "model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))

    decided = promote_to(damaged, champion=trained)

    assert not decided.moved
    assert "not what was registered (model.safetensors: " in decided.why
    assert behind(decided.alias, settings) == trained


@pytest.mark.parametrize("error", [DataError("no model.json inside."), tracking.TrackingError("No answer.")])
def test_a_version_that_can_not_be_downloaded_is_refused(
        settings, tmp_path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(model_registry, "resolve_model", Mock(side_effect=error))
    with pytest.raises(PromotionRefused, match=f"models:/pose/3 can't be downloaded: {error}"):
        job._downloaded(RegisteredVersion("pose", "3", None), settings, tmp_path)


def test_a_model_that_does_not_load_is_refused(promote_to, register, tmp_path, settings) -> None:
    half = shutil.copytree(TRAINED, tmp_path / "half")
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[:len(weights) // 2])

    decided = promote_to(register(half))

    assert not decided.moved
    assert "can't be loaded" in decided.why
    assert behind(decided.alias, settings) is None


def test_a_champion_that_is_gone_from_the_store_is_named_with_the_remedy(
        promote_to, register, trained, settings) -> None:
    champion = register(TRAINED)
    stored_file(champion, settings, "model.safetensors").unlink()

    decided = promote_to(trained, champion=champion)

    assert not decided.moved
    assert f"the present @{decided.alias} is broken" in decided.why
    assert "force=true" in decided.why


def test_a_champion_with_other_joints_is_no_comparison(promote_to, register, trained, tmp_path) -> None:
    network = TINY.model_copy(update={"num_joints": 16})
    save_model(tmp_path / "mpii", MSPN(network), ModelSpec(network=network, skeleton=MPII16.to_json()))

    decided = promote_to(trained, champion=register(tmp_path / "mpii"))

    assert not decided.moved
    assert "has other joints (" in decided.why
    assert "a name of its own" in decided.why


def test_data_of_other_joints_than_the_models_are_a_wrong_command(promote_to, trained, data) -> None:
    with pytest.raises(ConfigError, match=r"has other joints than models:/pose/\d+\. Give --data"):
        promote_to(trained, on=replace(data, skeleton=MPII16))


def test_a_champion_that_another_promotion_made_meanwhile_is_not_overruled(
        promote_to, alias, trained, untrained, register, settings, monkeypatch) -> None:
    other = register(TRAINED)
    validated = job._validated_shards

    def another_is_faster(*arguments: Any) -> Iterator[Any]:
        model_registry.move_alias(other, alias, tracking=settings)
        return validated(*arguments)

    monkeypatch.setattr(job, "_validated_shards", another_is_faster)
    decided = promote_to(trained, champion=untrained)

    assert not decided.moved
    assert f"became {other.reference} while this model was measured against {untrained.reference}" in decided.why
    assert behind(decided.alias, settings) == other


# --- commands -----------------------------------------------------------------------------------------------------


def promote_command(settings: TrackingConfig, **flags: Any) -> dict[str, Any]:
    return job.run(load_config(PromoteConfig, flags={"tracking": settings.model_dump(), **flags}))


def test_the_command_promotes_a_registered_version_and_force_goes_back(
        settings, trained, untrained, data, quick_trial) -> None:
    model_registry.move_alias(untrained, "rolled", tracking=settings)
    done = promote_command(settings, model=trained.reference, alias="rolled", data=data.uri)["promotion"]
    assert (done["moved"], done["candidate"], done["champion"]) == (True, trained.reference, untrained.reference)

    refused = promote_command(settings, model=untrained.reference, alias="rolled", data=data.uri)["promotion"]
    assert not refused["moved"]
    back = promote_command(settings, model=untrained.reference, alias="rolled", force=True)["promotion"]
    assert (back["moved"], back["champion"], back["ap"]) == (True, trained.reference, None)
    assert behind("rolled", settings) == untrained


def test_files_may_be_compared_with_a_model_directory(settings, trained, data, quick_trial, tmp_path) -> None:
    flags = {"model": trained.reference, "alias": "compared", "data": data.uri}
    other = write_tiny_model(tmp_path / "other")
    assert "model.safetensors" in promote_command(settings, **flags, directory=str(other))["promotion"]["why"]
    assert promote_command(settings, **flags, directory=str(TRAINED))["promotion"]["moved"]


@pytest.mark.parametrize(("flags", "why"), [
    ({"model": "models:/pose/1"}, "--data is needed"),
    ({"model": "runs:/1/model", "data": "d"}, "no registered version"),
    ({"model": "models:/pose/1", "data": "d", "alias": "latest"}, "can't be an alias")])
def test_a_command_that_lacks_something_is_refused(settings, trained, flags: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        promote_command(settings, **flags)


@pytest.mark.parametrize(("flags", "why"), [
    ({"register": None}, "needs --register"), ({"alias": "champion"}, "would move as soon as"),
    ({"val": None}, "needs data to measure on"), ({"promote": "v1"}, "can't be an alias")])
def test_a_training_that_could_not_be_promoted_is_refused_before_it_begins(
        data, flags: dict[str, Any], why: str) -> None:
    config = load_config(TrainConfig, flags={"data": data.uri, "val": data.uri, "output": "/nowhere",
                                             "register": "pose", "promote": "champion"} | flags)
    # what is None isn't given: the setting keeps its value unless it is taken out
    config = config.model_copy(update={{"register": "register_as"}.get(name, name): None
                                       for name, value in flags.items() if value is None})
    with pytest.raises(ConfigError, match=why):
        job.refuse_unpromotable(config, data)


def test_a_set_to_measure_on_has_the_datas_joints(data, tmp_path) -> None:
    config = load_config(TrainConfig, flags={
        "data": data.uri, "val": "/nowhere", "output": "/nowhere", "register": "pose", "promote": "champion",
        "promotion": {"data": data.uri}})
    job.refuse_unpromotable(config, data)
    with pytest.raises(ConfigError, match="has other joints than --data"):
        job.refuse_unpromotable(config, replace(data, skeleton=MPII16))
    bare = dataset_json(data.parts, version=1, skeleton=None, source={}, counts={})
    (tmp_path / version_name(1)).write_bytes(bare)
    with pytest.raises(ConfigError, match="without --annotations: no AP can be measured"):
        job.open_frozen_set(str(tmp_path), None)


def test_train_decides_once_on_val_as_it_was_when_the_model_was_trained(
        settings, data, trained, untrained, quick_trial, tmp_path) -> None:
    model_registry.move_alias(trained, "decided", tracking=settings)
    config = TrainConfig(data=data.uri, val=data.uri, output=str(tmp_path), register="pose", promote="decided",
                         tracking=settings)
    directory = model_registry.resolve_model(untrained.reference, tracking=settings, into=tmp_path / "model")
    spec = read_spec(directory).model_copy(update={"source": {"val_version": 1}})

    first = train._promote(config, directory, spec, untrained.reference)
    model_registry.move_alias(untrained, "decided", tracking=settings)
    again = train._promote(config, directory, spec, untrained.reference)

    assert (first["moved"], first["champion"], first["data_version"]) == (False, trained.reference, 1)
    assert again == first
    assert json.loads(storage.read_object(str(tmp_path / "_promotion-pose-decided.json"))) == first


# --- how a training ends, and begins ------------------------------------------------------------------------------


@pytest.fixture
def run_id(settings: TrackingConfig) -> str:
    """A training's run."""
    with tracking.open_run(settings, name="train") as run:
        return str(run.run_id)


def end_of_training(settings: TrackingConfig, output: Path, directory: Path, run_id: str, **flags: Any
                    ) -> tuple[TrainConfig, Path, ModelSpec]:
    """What `train` has when the model is whole."""
    config = TrainConfig(data="d", output=str(output), tracking=settings, **flags)
    return config, directory, read_spec(directory).model_copy(update={"source": {"run_id": run_id}})


@pytest.mark.parametrize("broken", [
    "mlflow.tracking._model_registry.fluent._register_model", "mlflow.MlflowClient.set_model_version_tag",
    "mlflow.MlflowClient.set_registered_model_alias", "pipeline.storage.put_if_absent"])
def test_a_registration_is_broken_off_anywhere_and_the_same_command_makes_one_version_of_it(
        settings, run_id, tmp_path, monkeypatch, broken: str) -> None:
    from mlflow import MlflowClient

    name = broken.rpartition(".")[2]
    ended = end_of_training(settings, tmp_path, TRAINED, run_id, register=name)
    with monkeypatch.context() as patches, contextlib.suppress(KeyboardInterrupt):
        patches.setattr(broken, Mock(side_effect=KeyboardInterrupt))
        train._register(*ended)

    registered = train._register(*ended)

    (version,) = MlflowClient(settings.uri).search_model_versions(f"name = '{name}'")
    assert (registered["version"], str(version.version), version.run_id) == ("1", "1", run_id)
    noted = model_registry.noted_sha256(RegisteredVersion(name, "1", run_id), tracking=settings)
    assert noted == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in TRAINED.iterdir()}
    assert model_registry.version_behind(name, "candidate", tracking=settings) == RegisteredVersion(name, "1", run_id)
    assert train._register(*ended) == registered


def test_a_runs_version_is_that_of_just_this_name_and_these_files() -> None:
    found = [("other", {"sha256.a": "1"}, 3), ("pose", {"sha256.a": "2"}, 4), ("pose", {"sha256.a": "1", "x": "y"}, 5)]
    versions = [SimpleNamespace(name=name, tags=tags, version=version) for name, tags, version in found]
    client = Mock(search_model_versions=lambda asked: versions if asked == "run_id = 'r'" else [])
    assert model_registry._version_of_run(client, "pose", "r", {"sha256.a": "1"}) == "5"
    assert model_registry._version_of_run(client, "third", "r", {"sha256.a": "1"}) is None
    assert model_registry._version_of_run(client, "pose", None, {"sha256.a": "1"}) is None


def test_other_files_of_the_same_run_are_another_version(settings, run_id, tmp_path) -> None:
    other = write_tiny_model(tmp_path / "other")
    for version, directory in (("1", TRAINED), ("2", other), ("1", TRAINED)):
        made = model_registry.register_model_directory(directory, "two-of-a-run", tracking=settings, run_id=run_id)
        assert made["version"] == version


def test_an_mlflow_that_goes_away_before_the_promotion_leaves_the_model_whole_and_says_so(
        settings, tmp_path, monkeypatch) -> None:
    ended = end_of_training(settings, tmp_path, TRAINED, "r1", register="pose", promote="champion",
                            promotion={"data": "frozen"})
    monkeypatch.setattr(train, "open_frozen_set", Mock())
    monkeypatch.setattr(model_registry, "registered_version", Mock(side_effect=tracking.TrackingError("No answer.")))
    with pytest.raises(tracking.TrackingError, match=r"The model is whole, at .*, but not compared with @champion: "
                                                     r"No answer\. The same command goes on there"):
        train._promote(*ended, "models:/pose/1")
    assert list(tmp_path.iterdir()) == []


def test_a_training_begins_from_the_version_behind_an_alias_and_goes_on_when_that_has_moved(
        settings, data, trained, untrained, tmp_path, caplog) -> None:
    model_registry.move_alias(trained, "start", tracking=settings)
    config = load_config(TrainConfig, flags={"data": data.uri, "output": str(tmp_path / "out"), "workers": 1,
                                             "init": "models:/pose@start", "tracking": settings.model_dump()})
    sets = (TrainingSet(data, 1.0, tuple(trainable_counts(data)), tuple(range(17))),)
    frozen = freeze_job(config.output, (), input={}, intent=train._begun_intent(config, sets), about={"run_id": "r1"})
    assert frozen.intent["init_reference"] == trained.reference
    assert frozen.intent["init_digest"] == model_digest(TRAINED)

    model_registry.move_alias(untrained, "start", tracking=settings)
    train_intent.tell_if_init_moved(config, frozen)

    assert f"init models:/pose@start means another model now, {untrained.reference} of digest" in caplog.text
    assert f"This run began from {trained.reference} of digest {model_digest(TRAINED)[:12]}" in caplog.text
    assert train_intent.resolved_intent(config, frozen, sets) == frozen.intent
    assert model_digest(tmp_path / "out" / INIT_FOLDER) == model_digest(TRAINED)


# --- a fresh process ----------------------------------------------------------------------------------------------


def test_the_trial_picture_is_the_first_with_somebody_to_predict(data: ShardDataset, tmp_path: Path) -> None:
    rows = [row | {"size": len(row["bytes"])} for row in read_part(data, data.parts[0]).to_pylist()]
    refused = rows[0] | {"bytes": None, "reason": "corrupt"}
    crowds = rows[1] | {"persons": [person | {"iscrowd": True} for person in rows[1]["persons"]]}
    first = write_part(Path(data.uri), 7, [refused, rows[1] | {"persons": []}, rows[1] | {"persons": None}, crowds])
    second = write_part(Path(data.uri), 8, [refused, *rows[2:]])
    found = promotion.trial_picture(replace(data, parts=(first, second)))
    assert found.data == rows[2]["bytes"]
    assert found.boxes_xywh == [person["box_xywh"] for person in rows[2]["persons"] if not person["iscrowd"]]
    with pytest.raises(ConfigError, match="no picture with an annotated person to measure on"):
        promotion.trial_picture(replace(data, parts=(first,)))


def in_fresh_process(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What becomes of a trial in which this code stands in for `fresh_predict`."""
    (folder / "script.py").write_text("import json, os, sys, time\nfrom pathlib import Path\n" + script)
    monkeypatch.setattr(promotion, "SCRIPT", folder / "script.py")
    picture = promotion.TrialPicture(b"picture", [[1.0, 2.0, 3.0, 4.0]])
    return promotion.predict_in_fresh_process("models:/pose/3", "http://ann:s3cret@mlflow", picture)


def test_a_fresh_process_sees_the_request_in_a_file_and_nothing_of_this_one(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    seen = in_fresh_process(
        "asked, answer, downloads = map(Path, sys.argv[1:])\n"
        "answer.write_text(json.dumps({'asked': json.loads(asked.read_text()), 'path': sys.path, 'argv': sys.argv,\n"
        "    'environment': dict(os.environ), 'here': os.listdir(), 'downloads': os.listdir(downloads)}))",
        tmp_path, monkeypatch)
    assert seen["asked"] == {"tracking_uri": "http://ann:s3cret@mlflow", "reference": "models:/pose/3",
                             "boxes": [[1, 2, 3, 4]], "picture": base64.b64encode(b"picture").decode()}
    assert "s3cret" not in str(seen["argv"])
    assert not {"", str(tmp_path)} & set(seen["path"])
    assert not [name for name in seen["environment"] if name.startswith("PYTHON")]
    assert seen["environment"]["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert (sorted(seen["here"]), seen["downloads"]) == (["model", "request.json"], [])


@pytest.mark.parametrize(("script", "patience_s", "why"), [
    ("raise ValueError('no such\\nweights.')\n", 60, r"does not load .*: weights\. Register it again"),
    ("os._exit(3)", 60, "it ended without a word"),
    ("time.sleep(60)", 0.2, "gave no answer in a fresh process within 0.2 s")])
def test_a_model_that_does_not_answer_in_a_fresh_process_is_refused_with_its_last_words(
        script: str, patience_s: float, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotion, "FRESH_TIMEOUT_S", patience_s)
    with pytest.raises(PromotionRefused, match=why):
        in_fresh_process(script, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_model_whose_stored_code_lacks_a_file_is_refused_though_this_checkout_has_it(
        register, settings, data) -> None:
    bare, picture = register(TRAINED), promotion.trial_picture(data)
    stored_file(bare, settings, "prediction.py").unlink()

    # an editable install of the project gives the file, without a word; without one it is missing
    with pytest.raises(PromotionRefused, match=r"pipeline\.prediction"):
        promotion.refuse_bad_answer(
            promotion.predict_in_fresh_process(bare.reference, str(settings.uri), picture),
            COCO17, len(picture.boxes_xywh), bare.reference)


@pytest.mark.slow
def test_a_fresh_process_runs_what_mlflow_stored_and_sees_no_checkout(
        register, trained, settings, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    picture = promotion.trial_picture(data)
    answer = promotion.predict_in_fresh_process(trained.reference, str(settings.uri), picture)
    promotion.refuse_bad_answer(answer, COCO17, len(picture.boxes_xywh), trained.reference)

    broken = register(TRAINED)
    stored_file(broken, settings, "prediction.py").write_text("raise ImportError('this code is broken')")
    with pytest.raises(PromotionRefused, match=r"fresh process.*this code is broken"):
        promotion.predict_in_fresh_process(broken.reference, str(settings.uri), picture)


# --- small things -------------------------------------------------------------------------------------------------


def stored_file(version: RegisteredVersion, settings: TrackingConfig, name: str) -> Path:
    """A file of a registered version where MLflow keeps it."""
    from mlflow import MlflowClient

    logged = MlflowClient(settings.uri).get_model_version(version.name, version.version).source.rpartition("/")[2]
    root = Path(str(settings.uri).removeprefix("sqlite:///")).parent / "mlruns"
    found = [path for path in root.rglob(name) if logged in path.parts]
    assert len(found) == 1, (logged, found)
    return found[0]
