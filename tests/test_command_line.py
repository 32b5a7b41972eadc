"""What a person meets at the command line: help, settings, refusals, exit codes, the one line of result."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import JOBS, read_command
from pipeline.config import AnnotateConfig, ShardConfig, TrainConfig, load_config, locations
from pipeline.errors import ConfigError

NEEDED = {"images": "in", "output": "out"}


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "jobs", *arguments], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])


def test_help_answers_within_a_second() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = command("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of processor time, so that a busy machine doesn't count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert answer.returncode == 0
    assert all(name in answer.stdout for name in JOBS)


def test_bad_usage_imports_nothing_heavy() -> None:
    code = ("import sys; from jobs.__main__ import main; code = main(['shard', '--set', 'imgs=x']); "
            "heavy = {'ray', 'torch', 'mlflow', 'cv2', 'boto3', 'pyarrow'} & set(sys.modules); "
            "sys.exit(99 if heavy else code)")
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 2


@pytest.mark.parametrize("arguments", [("nosuch",), ("shard", "--nosuch", "x"), ("shard", "--images", "x"),
                                       ("export", "--keypoints", "k", "--to", "nosuch", "--output", "o")])
def test_a_wrong_command_exits_with_2_and_prints_nothing_on_stdout(arguments: tuple[str, ...]) -> None:
    answer = command(*arguments)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr


@pytest.mark.parametrize("name", JOBS)
def test_each_job_lists_its_settings(name: str) -> None:
    answer = command(name, "--help")
    assert answer.returncode == 0
    assert all(f"--{flag}" in answer.stdout for flag in JOBS[name].flags)


def test_an_unknown_setting_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean images_per_shard"):
        load_config(ShardConfig, assignments=["image_per_shard=3"], flags=NEEDED)


def test_an_unknown_setting_inside_a_group_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"did you mean optimiser\.iterations"):
        load_config(TrainConfig, assignments=["optimiser.iteration=3"], flags={"data": "d", "output": "o"})


@pytest.mark.parametrize("assignment", ["images_per_shard=0", "images_per_shard=many", "validate=half"])
def test_a_value_out_of_range_is_refused_by_name(assignment: str) -> None:
    with pytest.raises(ConfigError, match=assignment.partition("=")[0]):
        load_config(ShardConfig, assignments=[assignment], flags=NEEDED)


def test_a_later_file_changes_what_it_names_inside_groups_too_and_leaves_the_rest(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1\noptimiser: {iterations: 100, warmup_iterations: 10}\n"
                                          "augmentation: {extend_wh: [0.1, 0.2]}\n")
    (tmp_path / "longer.yaml").write_text("optimiser:\n  iterations: 200\naugmentation:\n  extend_wh: [0.3, 0.4]\n")
    files = [str(tmp_path / name) for name in ("recipe.yaml", "longer.yaml")]
    config = load_config(TrainConfig, files=files, flags={"data": "d", "output": "o"})
    assert (config.seed, config.optimiser.iterations, config.optimiser.warmup_iterations) == (1, 200, 10)
    assert config.augmentation.extend_wh == (0.3, 0.4)  # a list is one value
    turned = load_config(TrainConfig, files=files[::-1], flags={"data": "d", "output": "o"})
    assert (turned.optimiser.iterations, turned.augmentation.extend_wh) == (100, (0.1, 0.2))


def test_config_is_repeatable_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("images: in\noutput: out\nimages_per_shard: 5\n")
    (tmp_path / "b.yaml").write_text("images_per_shard: 0\n")
    answer = command("shard", "--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"))
    assert answer.returncode == 2
    assert "images_per_shard" in answer.stderr
    assert "images is needed" not in answer.stderr


@pytest.mark.parametrize("assignment", [
    "augmentation.scale_range=[1.5,0.5]", "augmentation.scale_range=[0,1]", "augmentation.extend_wh=[-0.1,0]",
    "augmentation.center_jitter=-1", "augmentation.rotation_sigma_deg=0", "augmentation.half_body_center=middle",
    "optimiser.decay_factor=1", "loss.target_peak=255", "inference.colour=GBR", "inference.blur_kernel=4",
    "inference.box_padding_wh=[0,1]"])
def test_a_recipes_values_out_of_range_are_refused_by_name(assignment: str) -> None:
    with pytest.raises(ConfigError, match=assignment.partition("=")[0]):
        load_config(TrainConfig, assignments=[assignment], flags={"data": "d", "output": "o"})


SHARE, COUNT, FACTOR, WIDTH = ([0, 1], [-0.01, 1.01]), ([1], [0]), ([0.01], [0]), ([0], [-0.01])
RANGES = {
    **{f"augmentation.{name}": SHARE for name in (
        "center_jitter", "center_jitter_probability", "rotation_probability", "flip_probability",
        "half_body_probability")},
    **{f"augmentation.{name}": COUNT for name in ("half_body_min_joints", "half_body_taken_from", "half_body_needs")},
    **{f"augmentation.{name}": FACTOR for name in (
        "base_scale", "half_body_scale", "rotation_sigma_deg", "scale_sigma")},
    "augmentation.rotation_deg": ([0, 180], [-1, 181]),
    "augmentation.scale_range": (["[0.5,0.5]"], ["[0,1]", "[0.6,0.5]"]),
    **{f"augmentation.{name}": (["[0,0]"], ["[-0.1,0]", "[0,-0.1]"]) for name in ("extend_wh", "half_body_extend_wh")},
    "optimiser.learning_rate_per_worker": FACTOR, "optimiser.weight_decay": WIDTH, "optimiser.warmup_factor": SHARE,
    "optimiser.iterations": COUNT, "optimiser.warmup_iterations": ([0], [-1]), "optimiser.batch_size_per_worker": COUNT,
    "optimiser.accumulate": ([1, 32], [0, 64]), "optimiser.clip_norm": FACTOR,
    **{f"optimiser.{name}": ([0.01, 0.99], [0, 1]) for name in ("decay_factor", "ema_decay")},
    "promotion.version": COUNT, "promotion.tolerance": SHARE, "promotion.threads": COUNT,
    "threads": COUNT, "validate_every": COUNT, "validate_persons": COUNT, "keep_checkpoints": COUNT,
    "heatmap_scale": FACTOR, "data": (["{uri: d, weight: 0.01}"], ["{uri: d, weight: 0}", "[]"]),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_trainings_setting_is_taken_up_to_the_ends_of_its_range_and_refused_beyond(name: str) -> None:
    taken, refused = RANGES[name]
    needed = {"output": "o"} if name == "data" else {"data": "d", "output": "o"}
    for value in taken:
        load_config(TrainConfig, assignments=[f"{name}={value}"], flags=needed)
    for value in refused:
        with pytest.raises(ConfigError, match=f"^{name}"):
            load_config(TrainConfig, assignments=[f"{name}={value}"], flags=needed)


@pytest.mark.parametrize("architecture", ["hrnet", "hourglass"])
def test_a_loss_for_four_heads_is_refused_for_a_network_that_has_others(architecture: str) -> None:
    flags = {"data": "d", "output": "o", "network": {"architecture": architecture}}
    with pytest.raises(ConfigError, match=rf"coarse-to-fine is for mspn and rsn, .*; {architecture} learns with"):
        load_config(TrainConfig, assignments=["loss.kind=coarse-to-fine"], flags=flags)
    asked = load_config(TrainConfig, assignments=["loss.kind=gaussian"], flags=flags | {"network": {}})
    assert (asked.network.architecture, asked.loss.kind) == ("mspn", "gaussian")


@pytest.mark.parametrize("workers", ["2:1", "0", "0:2", "2:", "1:2:3", "-1", "two"])
def test_workers_that_could_not_be_are_refused_before_anything_is_frozen(workers: str) -> None:
    with pytest.raises(ConfigError, match=r"workers: .*1 <= MIN <= MAX.*" + workers):
        load_config(TrainConfig, flags={"data": "d", "output": "o", "workers": workers})


def test_a_range_of_workers_is_one_in_files_and_assignments_too(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("workers: 2:8\n")  # YAML 1.1 has 2:8 for 2 minutes and 8 seconds, 128
    needed = {"data": "d", "output": "o"}
    assert load_config(TrainConfig, files=[str(tmp_path / "c.yaml")], flags=needed).workers == "2:8"
    assert load_config(TrainConfig, assignments=["workers=2:8"], flags=needed).workers == "2:8"
    assert load_config(TrainConfig, assignments=["workers=12"], flags=needed).workers == "12"


def test_flags_win_over_assignments_and_these_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("images_per_shard: 1\nseed: 1\nlimit: 1\n")
    config = load_config(ShardConfig, files=[str(tmp_path / "c.yaml")], assignments=["images_per_shard=2", "seed=2"],
                         flags={**NEEDED, "images_per_shard": "3"})
    assert (config.images_per_shard, config.seed, config.limit) == (3, 2, 1)


@pytest.mark.parametrize("text", ["- a\n", "a: [\n"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(ShardConfig, files=[str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(("assignment", "why"), [
    ("seed", r"--set seed: expected a\.b=value"), ("=3", "--set =3: expected"),
    ("seed.a=1", "--set seed.a=1: seed is a value, not a group of settings"),
    ("zzz=1", "zzz is not a setting of this job; known: images, output, annotations"),
    ("tracking.zzz=1", "tracking.zzz is not a setting of this job; known: enabled, uri, experiment")])
def test_an_assignment_that_sets_nothing_is_refused_with_what_it_could_be(assignment: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_config(ShardConfig, assignments=["seed=1", assignment], flags=NEEDED)


def test_what_is_needed_and_not_given_is_named_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"^output is needed: give --output or set it in the configuration file\.$"):
        load_config(ShardConfig, files=[str(tmp_path / "empty.yaml")], flags={"images": "in", "output": None})
    with pytest.raises(ConfigError, match=r"gone\.yaml: No such file"):
        load_config(ShardConfig, files=[str(tmp_path / "gone.yaml")])


def test_places_are_spelled_in_full_also_in_lists_and_what_is_not_given_stays_so(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(TrainConfig, flags={"data": ["a", "{uri: b/, weight: 2}"], "output": "s3://bucket/o/"})
    full = locations(config, "data", "output", "val")
    assert [(one.uri, one.weight) for one in full.data] == [(f"{tmp_path}/a", 1), (f"{tmp_path}/b", 2)]
    assert (full.output, full.val, full.trunk) == ("s3://bucket/o", None, None)


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"c\.yaml: not UTF-8"):
        load_config(ShardConfig, files=[str(tmp_path / "c.yaml")])


def test_a_value_that_is_no_yaml_is_text() -> None:
    assert load_config(ShardConfig, assignments=["include=*.jpg"], flags=NEEDED).include == "*.jpg"
    with pytest.raises(ConfigError, match=r"annotated_only: expected true or false \(given: '\[1'\)"):
        load_config(ShardConfig, assignments=["annotated_only=[1"], flags=NEEDED)


@pytest.mark.parametrize(("assignment", "told"), [
    ("data=[{uri: a, wight: 2}]", r"^data\.0\.wight is not a setting of this job; did you mean data\.0\.weight\?$"),
    ("data=[{weight: 2}]", r"^data\.0\.uri is needed: set it\.$"),
    ("augmentation.scale_range=[1]", r"augmentation\.scale_range: expected more values"),
    ("tracking=false", r"tracking is a group of settings: set those in it, as tracking\.NAME"),
    ("threads=0", r"threads: expected at least 1 \(given: 0\)")])
def test_what_is_wrong_is_said_in_words_for_people(assignment: str, told: str) -> None:
    needed = {"output": "o"} if assignment.startswith("data") else {"data": "d", "output": "o"}
    with pytest.raises(ConfigError, match=told):
        load_config(TrainConfig, assignments=[assignment], flags=needed)


@pytest.mark.parametrize(("arguments", "told"), [
    (["--boxs", "detect"], "did you mean --boxes"), (["--batch-size", "4"], "did you mean --set batch_size=VALUE"),
    (["--tracking.enabled=false"], "did you mean --set tracking.enabled=VALUE"), (["b.jpg"], "belongs to no flag"),
    (["--zzz"], "annotate --help")])
def test_a_flag_that_a_job_does_not_know_is_refused_with_what_may_be_meant(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_command(["annotate", "--input", "a.jpg", *arguments])


def test_help_tells_the_words_that_a_setting_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_command(["shard", "--help"])
    assert 'validate = "header"  (header | full;' in capsys.readouterr().out


def test_a_result_that_cannot_be_written_is_still_on_stdout(tmp_path: Path) -> None:
    output = Path(__file__).parent / "versions" / "v1" / "keypoints"
    answer = command("status", "--output", str(output), "--result", "/proc/nothing/result.json")
    assert answer.returncode == 1
    assert json.loads(answer.stdout)["job"] == "status"
    assert "/proc/nothing" in answer.stderr


def test_a_command_that_is_interrupted_says_that_it_can_go_on() -> None:
    code = ("import sys, jobs.status\n"
            "def run(config): raise KeyboardInterrupt\n"
            "jobs.status.run = run\n"
            "from jobs.__main__ import main\n"
            "sys.exit(main(['status', '--output', 'o']))")
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            cwd=Path(__file__).parents[1])
    assert (answer.returncode, answer.stdout) == (130, "")
    assert answer.stderr.startswith("failed: interrupted; what is committed stays")


def test_settings_cannot_be_changed_once_read() -> None:
    config = load_config(AnnotateConfig, flags={"input": "i", "model": "m", "output": "o"})
    with pytest.raises(ValueError, match="frozen"):
        config.batch_size = 4  # type: ignore[misc]


def test_the_result_is_the_only_line_on_stdout_and_is_written_where_asked(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "not-a-picture.txt").write_text("hello")
    answer = command("shard", "--images", str(tmp_path / "pictures"), "--output", str(tmp_path / "shards"),
                     "--result", str(tmp_path / "result.json"))
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.splitlines()) == 1
    result = json.loads(answer.stdout)
    assert result["counts"]["rows"] == 1
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_a_failed_run_exits_with_1_and_names_what_failed(tmp_path: Path) -> None:
    (tmp_path / "truth.json").write_text('{"images": [], "annotations": [], "categories": []}')
    answer = command("evaluate", "--keypoints", str(tmp_path / "nothing"),
                     "--annotations", str(tmp_path / "truth.json"))
    assert answer.returncode == 1
    assert "holds no keypoint dataset" in answer.stderr
    assert answer.stdout == ""
