"""One frozen model of settings for each job, and how they come together: defaults, a YAML file, `--set`, flags.

It knows no Ray, no torch and no MLflow, so that `--help` and a wrong command answer at once.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator

from pipeline.errors import ConfigError
from pipeline.model.settings import ARCHITECTURES, AnyLoss, AnyNetwork, Architecture, InferenceConfig, MSPNSettings
from pipeline.settings import NotNegative
from pipeline.settings import Settings as Settings
from pipeline.storage import normalise


class TrackingConfig(Settings):
    """Where MLflow is. Without `uri`: MLFLOW_TRACKING_URI, or an SQLite file in the working directory."""

    enabled: bool = Field(True, description="tell MLflow")
    # may hold a password, and whoever is given these settings may print them: Ray Train shows them on its dashboard
    uri: str | None = Field(None, repr=False, description="default: MLFLOW_TRACKING_URI, or mlflow.db in the working "
                            "directory")
    experiment: str = Field("pose", description="MLflow's experiment")


class RayConfig(Settings):
    """How much is done at once. Nothing here can change a row."""

    tasks: int | None = Field(None, ge=1, description="tasks at once; default: one for each core")
    threads: int = Field(16, ge=1, description="objects read at once by each task of shard")


class ShardConfig(Settings):
    """`shard`: pictures under a prefix, and their annotations -> a shard dataset; again, the same one grown."""

    images: str | None = None
    output: str
    annotations: str | None = None
    drop: str | None = None
    images_per_shard: int = Field(1000, ge=1)
    bytes_per_shard: int = Field(128_000_000, ge=1_000_000, le=2_000_000_000, description="at most so many in a shard")
    include: str | None = None
    annotated_only: bool = Field(False, description="only pictures that the annotations name")
    limit: int | None = Field(None, ge=1)
    seed: int = Field(0, description="another one spreads the pictures over shards otherwise")
    validate_pictures: Literal["header", "full"] = Field("header", alias="validate",
                                                         description="full decodes each picture")
    accept_truncated: bool = Field(False, description="take a picture whose end is missing, as far as it goes")
    max_pixels: int = Field(128_000_000, ge=1, description="a picture with more is refused")
    duplicates: Literal["keep", "once"] = Field("keep", description="pictures with the same bytes as another")
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig = TrackingConfig()


class AugmentationConfig(Settings):
    """The authors' augmentation; `enabled: false` crops as at test time. MMPose's: jobs/train_mmpose.yaml."""

    enabled: bool = True
    base_scale: float = Field(1.05, gt=0, description="factor on both sides of the box")
    extend_wh: tuple[NotNegative, NotNegative] = Field(
        (0.6, 0.8), description="each side grows by up to this share of itself")
    center_jitter: float = Field(0.0, ge=0, le=1, description="the box's centre moves by up to this share of its sides")
    center_jitter_probability: float = Field(0.0, ge=0, le=1)
    rotation_deg: float = Field(45.0, ge=0, le=180)
    rotation_sigma_deg: float | None = Field(
        None, gt=0, description="normal about 0, cut off at rotation_deg; null: uniform")
    rotation_probability: float = Field(0.5, ge=0, le=1)
    scale_range: tuple[float, float] = (0.6, 1.0)
    scale_sigma: float | None = Field(
        None, gt=0, description="normal about the middle of scale_range, cut off at its ends; null: uniform")
    flip_probability: float = Field(0.5, ge=0, le=1)
    half_body_probability: float = Field(0.3, ge=0, le=1)
    half_body_min_joints: int = Field(4, ge=1, description="only persons with so many labelled joints")
    half_body_upper: tuple[str, ...] | None = Field(None, description="joints by name; null: the skeleton's own")
    half_body_taken_from: int = Field(4, ge=1, description="a half with so many labelled joints is taken")
    half_body_needs: int = Field(3, ge=1, description="with fewer in both halves there is no half body")
    half_body_center: Literal["extent", "mean"] = Field("extent", description="the middle of what, for a half's joints")
    half_body_scale: float = Field(1.0, gt=0, description="factor on both sides of the chosen joints' extent")
    half_body_extend_wh: tuple[NotNegative, NotNegative] = Field((0.6, 0.8), description="as extend_wh, of a half body")

    @field_validator("scale_range")
    @classmethod
    def _scales_ascend(cls, scale_range: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError("expected [least, most], with 0 < least <= most")
        return scale_range


class OptimiserConfig(Settings):
    """The optimiser and schedule of megvii-research/MSPN: Adam, L2 on everything, warm-up, linear decay to 0.

    With `decay_at` the rate falls in steps instead, as MMPose's does.
    What neither has is off by default: accumulation, clipping, the average of the weights.
    """

    learning_rate_per_worker: float = Field(5e-4, gt=0)
    weight_decay: float = Field(1e-5, ge=0)
    iterations: int = Field(96_000, ge=1)
    warmup_iterations: int = Field(2400, ge=0)
    warmup_factor: float = Field(0.1, ge=0, le=1)
    decay_at: tuple[int, ...] = Field(
        (), description="after each of these iterations the rate is multiplied by decay_factor; none: linearly to 0")
    decay_factor: float = Field(0.1, gt=0, lt=1)
    batch_size_per_worker: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1, description="pieces in which a worker's batch goes through, to take less memory; "
                            "batch norms see the pieces")
    clip_norm: float | None = Field(None, gt=0, description="longer gradients are shortened to this length")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="the model is the exponential average of the weights "
                                    "with this decay, such as 0.9998")

    @field_validator("accumulate")
    @classmethod
    def _pieces_are_equal(cls, pieces: int, info: ValidationInfo) -> int:
        batch = info.data.get("batch_size_per_worker")
        if batch is not None and batch % pieces:
            raise ValueError(f"optimiser.batch_size_per_worker, {batch}, must be a multiple of it")
        return pieces


class PromotionConfig(Settings):
    """What a registered model has to show before an alias moves to it. Nothing here can change the model."""

    data: str | None = Field(None, description="annotated shard dataset to measure on; in train by default --val")
    version: int | None = Field(None, ge=1, description="of that dataset; default: the newest, or --val's as trained")
    # The standard error of a share of .7 among COCO val2017's 6,352 persons is .0057: less than that is within what
    # another choice of pictures would change. A set of fewer persons wants more.
    tolerance: float = Field(0.005, ge=0, le=1, description="AP may be lower by so much than the alias's present model")
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = Field(None, ge=1, description="of each actor that evaluates on CPUs")


class DataConfig(Settings):
    """One shard dataset to train on, beside others."""

    uri: str
    weight: float = Field(1.0, gt=0, description="how often one of its persons comes, against those of other sets")
    joints: tuple[str, ...] | None = Field(None, description="those that it has labels of, where it lists more")


class TrainConfig(Settings):
    """`train`: shard datasets -> a model directory. The model's joints are those of the first dataset."""

    data: tuple[DataConfig, ...] = Field(
        min_length=1, description="a URI, or a list of URIs and {uri, weight, joints}; the first names the joints")
    output: str
    val: str | None = None
    workers: str = "auto"
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="of workers; auto: cuda where Ray has GPUs now")
    register_as: str | None = Field(None, alias="register")
    alias: str = Field("candidate", description="moves to whatever is registered")
    promote: str | None = Field(None, description="alias that moves to the registered model if it deserves it")
    promotion: PromotionConfig = PromotionConfig()
    seed: int = Field(0, description="of the first weights, the order of the data and its augmentation")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "float32", description="bfloat16: the network under autocast; auto: on GPUs")
    compile: Literal["default"] | None = Field(None, description="torch.compile's mode, for the training forward")
    sync_batch_norm: bool = Field(False, description="batch norms see the batches of all workers as one")
    checkpoint_activations: bool = Field(False, description="keep less for the backward pass and compute it again: the "
                                         "same model in less memory and more time")
    threads: int | None = Field(None, ge=1, description="of each worker on CPUs; default: its share of the cores")
    validate_every: int = Field(2400, ge=1, description="iterations between validations and checkpoints")
    validate_persons: int | None = Field(None, ge=1, description="about so many, the first ones of each shard of val; "
                                         "default: all")
    keep_checkpoints: int = Field(2, ge=1, description="the newest so many, and the best")
    keep: Literal["last", "best"] = Field(
        "last", description="whose weights become the model: the last iteration's, as the authors', or those of the "
                            "checkpoint with the highest validation AP")
    trunk: str | None = Field(None, description="an ImageNet classifier's state dict to begin from: a ResNet-50's for "
                              "every stage's trunk of mspn, HRNet's own for hrnet")
    init: str | None = Field(None, description="a model to begin from, instead of trunk and heatmap_scale")
    heatmap_scale: float = Field(1.0, gt=0, description="of an untrained network's heatmaps; more for a short run")
    network: AnyNetwork = MSPNSettings()
    optimiser: OptimiserConfig = OptimiserConfig()
    loss: AnyLoss = Field(default_factory=lambda data: _architecture(data).loss)
    augmentation: AugmentationConfig = AugmentationConfig()
    inference: InferenceConfig = Field(default_factory=lambda data: _architecture(data).inference)
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        """A URI, a mapping, or a list of them; in a flag, a mapping is YAML: `{uri: s3://..., weight: 2}`."""
        entries = list(value) if isinstance(value, list | tuple) else [value]
        read = [_value(each) if isinstance(each, str) and each.startswith("{") else each for each in entries]
        return [{"uri": each} if isinstance(each, str) else each for each in read]

    @field_validator("loss", "inference", mode="before")
    @classmethod
    def _rest_is_its_authors(cls, value: Any, info: ValidationInfo) -> Any:
        """What isn't said of a group is as the network's authors have it."""
        if not isinstance(value, dict) or "network" not in info.data:
            return value
        own = getattr(_architecture(info.data), str(info.field_name)).model_dump()
        return own | value if value.get("kind", own.get("kind")) == own.get("kind") else value

    @field_validator("loss")
    @classmethod
    def _has_its_heads(cls, loss: AnyLoss, info: ValidationInfo) -> AnyLoss:
        if "network" in info.data and loss.kind == "coarse-to-fine" and _architecture(info.data).loss.kind != loss.kind:
            able = (name for name, known in ARCHITECTURES.items() if known.loss.kind == loss.kind)
            raise ValueError(f"coarse-to-fine is for {' and '.join(able)}, whose stages have four heads; "
                             f"{info.data['network'].architecture} learns with kind gaussian")
        return loss

    @field_validator("sync_batch_norm", "checkpoint_activations")
    @classmethod
    def _compiled_alone(cls, wanted: bool, info: ValidationInfo) -> bool:
        if wanted and info.data.get("compile") is not None:
            # the compiler can't see through batch norms that wait for other workers, and decides itself what to keep
            raise ValueError(f"it doesn't go together with compile; leave {info.field_name} or compile out")
        return wanted

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_are_a_count(cls, value: Any) -> str:
        text = str(value)
        bounds = [int(part) for part in text.split(":")] if re.fullmatch("[0-9]+(:[0-9]+)?", text) else [0]
        if text != "auto" and not 1 <= bounds[0] <= bounds[-1]:
            raise ValueError("expected a number of workers, MIN:MAX with 1 <= MIN <= MAX, or auto")
        return text


def _architecture(values: Mapping[str, Any]) -> Architecture:
    """What is known of the network that settings name; of the default one, where what they say of it is wrong."""
    return ARCHITECTURES[values.get("network", MSPNSettings()).architecture]


class AnnotationConfig(Settings):
    """What `annotate` and `plan` ask alike: the input, the model, the boxes, and how the work is done."""

    input: str
    model: str
    boxes: str | None = None
    min_box_score: float = Field(0.0, ge=0, le=1, description="of boxes from files or a detector")
    max_persons: int | None = Field(None, ge=1, description="of a picture, by score; boxes from files or a detector")
    detector: str | None = None
    detector_score: float = Field(0.1, ge=0, le=1, description="detections below it are left out")
    detector_nms: float = Field(0.65, ge=0, le=1, description="a detection that overlaps a better one by more is too")
    detector_backend: Literal["auto", "opencv", "onnxruntime"] = Field(
        "auto", description="onnxruntime where it is installed, half of OpenCV's time; then as the run was begun")
    oks_nms: float | None = Field(None, ge=0, le=1, description="a pose more like a better one than this is left out")
    limit: int | None = Field(None, ge=1)
    pictures_per_unit: int = Field(500, ge=1, le=100_000, description="in one output file; as a shard has, where the "
                                   "input is shards")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="bfloat16 where the processor computes it, else float32")
    flip: bool = Field(True, description="predict the mirrored crop too, and take the mean")
    backend: Literal["auto", "cpu", "cuda", "openvino", "null"] = Field(
        "auto", description="cuda where Ray has GPUs, else openvino where it is installed; null: no network, to "
                            "measure what all else costs")
    threads: int | None = Field(None, ge=1, description="of each actor; default: 1, or 4 on nodes of more cores")
    batch_size: int = Field(32, ge=1, description="crops that go through the network together; OpenVINO takes fours")
    deterministic: bool = Field(False, description="the same bits each time, also on GPUs")
    compile: Literal["default", "reduce-overhead"] | None = Field(
        None, description="torch.compile's mode, for backends cpu and cuda; reduce-overhead: CUDA graphs")
    max_pixels: int = Field(128_000_000, ge=1, description="a picture with more is refused")
    accept_truncated: bool = Field(False, description="take a picture whose end is missing, as far as it goes")
    actors: int | None = Field(None, ge=1, description="that annotate; default: as many as there is room for")
    detectors: int | None = Field(None, ge=1, description="actors that detect; default: what cores there are for it")
    decoders: int | None = Field(None, ge=0, description="actors that read, decode and crop for those that annotate; "
                                 "default: 0, or beside GPUs, where there are machines without one, what fits")
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("decoders")
    @classmethod
    def _detectors_decode(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("boxes") == "detect":
            raise ValueError("with boxes=detect it is the detectors that decode; set detectors instead")
        return value


class AnnotateConfig(AnnotationConfig):
    """`annotate`: pictures -> a keypoint dataset."""

    output: str
    reuse: str | None = None
    exclude: str | None = None
    max_rejected_share: float = Field(0.05, ge=0, le=1, description="of pictures; what is no picture counts apart")
    max_rejected: int | None = Field(None, ge=0, description="pictures, whatever their share")


class PlanConfig(AnnotationConfig):
    """`plan`: what annotating will take."""

    price_per_node_hour: float | None = Field(None, ge=0)
    sample: int | None = Field(None, ge=1, description="pictures to measure on; default: 200 for each actor")
    scratch: str | None = Field(None, description="where the sample's output goes for a while; default: TMPDIR")
    reuse: str | None = None
    exclude: str | None = None


class StatusConfig(Settings):
    """`status`: how far a run is."""

    output: str


class VerifyConfig(Settings):
    """`verify`: a shard dataset or a keypoint dataset -> what is wrong with it."""

    data: str
    version: int | None = Field(None, ge=1, description="of a shard dataset; default: the newest")
    ray: RayConfig = RayConfig()


class EvaluateConfig(Settings):
    """`evaluate`: keypoints against annotations."""

    keypoints: str
    annotations: str
    tracking: TrackingConfig = TrackingConfig()


class ExportConfig(Settings):
    """`export`: keypoints in another tool's format."""

    keypoints: str
    to: Literal["coco-results", "coco-annotations", "cvat", "label-studio", "fiftyone", "yolo-pose"]
    output: str
    min_score: float | None = Field(None, description="joints from this score on are visible, COCO's v = 2; default: a "
                                    "fifth of a full peak, 0.7 or 0.2 by the model's scale")
    low_joints: Literal["hidden", "absent"] = Field("hidden", description="the others: v = 1, or left out")
    image_prefix: str | None = Field(None, description="goes before each key where the file names pictures")
    empty_pictures: bool = Field(True, description="name pictures in which nobody was found, too")


class PreviewConfig(Settings):
    """`preview`: one HTML page with skeletons over pictures."""

    keypoints: str
    output: str
    images: str | None = None
    pictures: int = Field(28, ge=1, description="drawn, besides some rejected ones: in turns two of the worst, two by "
                          "chance, one of each other kind")
    seed: int = Field(0, description="another one draws other pictures")
    tracking: TrackingConfig = TrackingConfig()


class ImportModelConfig(Settings):
    """`import-model`: a public checkpoint -> a model directory."""

    checkpoint: str
    output: str
    input_size_wh: tuple[int, int] | None = Field(
        None, description="of crops; default: as the file's name has it, height first, or the network's usual one")
    register_as: str | None = Field(None, alias="register")
    alias: str = Field("candidate", description="moves to whatever is registered")
    tracking: TrackingConfig = TrackingConfig()


class PromoteConfig(PromotionConfig):
    """`promote`: a registered model behind an alias, if it deserves it."""

    model: str
    alias: str = "champion"
    directory: str | None = Field(None, description="the model directory that was registered, to compare the stored "
                                  "files with; default: the SHA-256 noted when it was registered")
    force: bool = Field(False, description="move the alias without any check: back to an earlier version")
    tracking: TrackingConfig = TrackingConfig()


class DemoConfig(Settings):
    """`demo`: the whole line on pictures that it makes itself, or on `data` (a folder like COCO's)."""

    output: str = "demo"
    data: str | None = None
    pictures: int = Field(320, ge=64)
    iterations: int | None = Field(None, ge=1)
    tracking: TrackingConfig = TrackingConfig()


AnySettings = TypeVar("AnySettings", bound=Settings)
# pydantic's kinds of problems and its words -> ours
EXPECTED = {"bool_parsing": "expected true or false", "bool_type": "expected true or false",
            "int_parsing": "expected a whole number", "int_type": "expected a whole number",
            "int_from_float": "expected a whole number", "float_parsing": "expected a number",
            "float_type": "expected a number", "string_type": "expected text",
            "tuple_type": "expected a list, as [1, 2]", "too_short": "expected more values",
            "too_long": "expected fewer values"}
WORDS = {"Value error, ": "", "Input should be": "expected", "greater than or equal to": "at least",
         "less than or equal to": "at most", "greater than": "more than"}


class PlainYaml(yaml.SafeLoader):
    """YAML in which 2:8 is text. YAML 1.1 has it for 128: two minutes and eight seconds."""

    yaml_implicit_resolvers = yaml.SafeLoader.yaml_implicit_resolvers | {
        digit: [("tag:yaml.org,2002:str", re.compile("[0-9]+:[0-9]+$")), *resolvers]
        for digit, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items() if digit.isdigit()}


def load_config(kind: type[AnySettings], *, files: Sequence[str] = (), assignments: Sequence[str] = (),
                flags: Mapping[str, Any] | None = None) -> AnySettings:
    """The job's settings: defaults, then each YAML file, then each `a.b=value`, then flags (None: not given).

    A later file changes the settings that it names, inside groups too, and leaves the others.
    Refuses with ConfigError: a file that isn't there or isn't a mapping, an assignment without "=", an unknown key
    (the nearest known one is named), a value of the wrong kind or out of its range.
    """
    values: dict[str, Any] = {}
    for file in files:
        values = _merged(values, _read_yaml(file))
    for assignment in assignments:
        _assign(values, assignment)
    values |= {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [problem for problem in error.errors() if problem["type"] != "default_factory_not_called"]
        raise ConfigError("\n".join(_explain(kind, problem) for problem in problems
                                    if not _follows(problem, problems))) from None


def locations(settings: Settings, *names: str) -> Any:
    """The same settings with the named URIs spelled in full, so that a worker elsewhere reads the same place."""
    known = {name: _located(value) for name in names if (value := getattr(settings, name))}
    return settings.model_copy(update=known)


def _located(value: str | tuple[DataConfig, ...]) -> Any:
    if isinstance(value, str):
        return normalise(value)
    return tuple(one.model_copy(update={"uri": normalise(one.uri)}) for one in value)


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        values = yaml.load(Path(file).read_text("utf-8-sig"), PlainYaml)
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {file}: not UTF-8 text. Expected YAML, settings as `name: value`.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file}: not YAML: {error}.") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"--config {file}: expected settings as `name: value`, found {type(values).__name__}.")
    return values or {}


def _merged(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Both, key by key; where both have a value that isn't a group of settings, the later one."""
    merged = {**earlier, **later}
    for name in earlier.keys() & later.keys():
        if isinstance(earlier[name], dict) and isinstance(later[name], dict):
            merged[name] = _merged(earlier[name], later[name])
    return merged


def _assign(values: dict[str, Any], assignment: str) -> None:
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {assignment}: expected a.b=value.")
    *path, last = name.split(".")
    for step in path:
        inner = values.setdefault(step, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {assignment}: {step} is a value, not a group of settings.")
        values = inner
    values[last] = _value(text)


def _value(text: str) -> Any:
    """What YAML makes of it; the text itself where that is nothing, as of *.jpg."""
    try:
        return yaml.load(text, PlainYaml)
    except yaml.YAMLError:
        return text


def _follows(problem: Any, problems: Sequence[Any]) -> bool:
    """Whether it is only that a list has nothing left without the entries that are wrong."""
    depth = len(problem["loc"])
    return problem["type"] == "too_short" and any(other["loc"][:depth] == problem["loc"] != other["loc"]
                                                  for other in problems)


def _explain(kind: type[Settings], problem: Any) -> str:
    """One line for one of pydantic's problems: the setting's full name, what was given, what to write instead."""
    path = _without_tags(kind, [str(step) for step in problem["loc"]])
    name = ".".join(path)
    if problem["type"] == "missing" and path[-1].isdigit():
        return f"{'.'.join(path[:-1])}: expected more values (given: {problem['input']!r})."
    if problem["type"] == "missing":
        give = f"give --{name.replace('_', '-')} or set it in the configuration file" if len(path) == 1 else "set it"
        return f"{name} is needed: {give}."
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"{name} is a group of settings: set those in it, as {name}.NAME (given: {problem['input']!r})."
    if problem["type"] != "extra_forbidden":
        message = EXPECTED.get(problem["type"], problem["msg"])
        for theirs, ours in WORDS.items():
            message = message.replace(theirs, ours)
        return f"{name}: {message} (given: {problem['input']!r})."
    known = _known_names(kind, [str(step) for step in problem["loc"]][:-1])
    nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean {'.'.join([*path[:-1], nearest[0]])}?" if nearest else f"known: {', '.join(known)}."
    return f"{name} is not a setting of this job; {hint}"


def _known_names(kind: type[Settings], path: Sequence[str]) -> list[str]:
    groups: tuple[type[Settings], ...] = (kind,)
    for step in path:
        if step.isdigit():  # a place in a list
            continue
        tagged = tuple(each for each in groups if step in _tags(each))
        groups = tagged or groups_of(groups[0].model_fields[step].annotation) or groups
    return [field.alias or name for name, field in groups[0].model_fields.items()]


def groups_of(annotation: Any) -> tuple[type[Settings], ...]:
    """The groups of settings that a field can hold: none, one, or one of several."""
    if isinstance(annotation, type):
        return (annotation,) if issubclass(annotation, Settings) else ()
    return tuple(chain.from_iterable(map(groups_of, get_args(annotation))))


def choices_of(annotation: Any) -> str:
    """The words that a setting may be, for people to read; "" where it may be more than a few words."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    return next(filter(None, map(choices_of, get_args(annotation))), "")


def is_number(annotation: Any) -> bool:
    """Whether a setting is one number."""
    return annotation in (int, float) or (get_origin(annotation) is not tuple and
                                          any(map(is_number, get_args(annotation))))


def _tags(group: type[Settings]) -> list[Any]:
    """What names this group among those that a field can hold: mspn, hrnet, ..., gaussian."""
    return [field.default for name, field in group.model_fields.items() if name in ("architecture", "kind")]


def _without_tags(kind: type[Settings], path: list[str]) -> list[str]:
    """A setting's place as people write it; pydantic also says which of several groups it is in."""
    tags = set(chain.from_iterable(_tags(group) for field in kind.model_fields.values()
                                   for group in groups_of(field.annotation)))
    return [step for index, step in enumerate(path) if not (index == 1 and step in tags)]
