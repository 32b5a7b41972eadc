"""Registered models: a handful of functions of plain types over MLflow's registry.

Registering and resolving a model raise `TrackingError` where MLflow can't be used. Runs and metrics: tracking.py.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError, DataError
from pipeline.model.settings import SPEC_FILE
from pipeline.pose.skeleton import Skeleton
from pipeline.rows import prediction_columns
from pipeline.tracking import located, mlflow_errors, open_client, open_run, without_credentials

MODEL_ARTIFACT = "model"  # the folder inside the logged model, and its name in a run
SHA256_TAG = "sha256."  # a version's tag for each file of its model directory
REQUIREMENTS = ("numpy", "opencv-python-headless", "pandas", "pillow", "pyarrow", "pydantic", "pyyaml",
                "safetensors", "torch")
# MLflow's words for a model, version or run that isn't there, and for an alias
UNKNOWN = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}
REGISTRY_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model. `reference`, models:/name/version, never moves, as an alias does."""

    name: str
    version: str
    run_id: str | None

    @property
    def reference(self) -> str:
        """What `resolve_model` takes."""
        return f"models:/{self.name}/{self.version}"


def register_model_directory(directory: Path, name: str, *, tracking: TrackingConfig,
                             run_id: str | None = None, alias: str | None = None) -> dict[str, Any]:
    """Store a model directory as a new version of the registered model `name`.

    Returns name, version, alias, run_id, and `reference` (models:/name/version).
    It becomes a pyfunc from code: our `pipeline` package, the directory as an artifact, a signature, and the
    requirements of this environment; nothing is pickled and nothing inferred. Its tags name the files' SHA-256.
    `alias` then points to it.
    Without `run_id` a run of its own is opened. With it, a version that this run has of just these files is taken
    as it is: whoever was broken off calls again.
    Refused: a folder without model.json (DataError), tracking that is off (ConfigError).
    """
    if not (directory / SPEC_FILE).is_file():
        raise DataError(f"{directory} is no model directory: it has no {SPEC_FILE}.")
    _refuse_off(tracking, f"register {name!r}")
    with open_run(tracking, name=f"register {name}", run_id=run_id) as run:
        tracking = located(tracking)
        client = open_client(tracking)
        with mlflow_errors(str(tracking.uri)):
            tags = {f"{SHA256_TAG}{file}": digest for file, digest in file_sha256(directory).items()}
            version = (_version_of_run(client, name, run_id, tags)
                       or _log_pyfunc(directory, name, tags, tracking=tracking, run_id=str(run.run_id)))
            if alias is not None:
                client.set_registered_model_alias(name, alias, version)
    return {"name": name, "version": version, "alias": alias, "run_id": run.run_id,
            "reference": f"models:/{name}/{version}"}


def _version_of_run(client: Any, name: str, run_id: str | None, tags: Mapping[str, str]) -> str | None:
    if run_id is None:
        return None
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if version.name == name and tags.items() <= version.tags.items():
            return str(version.version)
    return None


def _log_pyfunc(directory: Path, name: str, tags: Mapping[str, str], *, tracking: TrackingConfig, run_id: str) -> str:
    """The new version's number. MLflow makes the version and its tags in one step: none is ever there without."""
    import mlflow.pyfunc
    from mlflow.models import Model

    package = Path(__file__).resolve().parent
    mlflow.set_tracking_uri(str(tracking.uri))
    mlflow.set_experiment(experiment_id=mlflow.get_run(run_id).info.experiment_id)
    with warnings.catch_warnings():
        # the signature is given, so that no example is needed to infer one
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        info = Model.log(
            artifact_path=None, name=MODEL_ARTIFACT, flavor=mlflow.pyfunc, run_id=run_id,
            registered_model_name=name, python_model=str(package / "pyfunc.py"), code_paths=[str(package)],
            artifacts={MODEL_ARTIFACT: str(directory)}, signature=_signature(directory),
            pip_requirements=_requirements(), tags=dict(tags),
        )
    return str(info.registered_model_version)


def _signature(directory: Path) -> Any:
    """Picture bytes and boxes in; a row for each person out, with the joints that the directory's model.json names."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    skeleton = Skeleton.from_json(json.loads((directory / SPEC_FILE).read_text())["skeleton"])

    inputs = Schema([ColSpec(DataType.binary, "picture"),
                     ColSpec(Array(Array(DataType.double)), "boxes", required=False)])
    types = {"int64": DataType.long, "float64": DataType.double}
    outputs = Schema([ColSpec(types[kind], name) for name, kind in prediction_columns(skeleton).items()])
    return ModelSignature(inputs=inputs, outputs=outputs)


def _requirements() -> list[str]:
    """The packages that inference imports, as installed here; a local build's suffix is no public version."""
    versions = {package: importlib.metadata.version(package).partition("+")[0] for package in REQUIREMENTS}
    return [f"{package}=={version}" for package, version in versions.items()]


def is_model_reference(text: str) -> bool:
    """Whether it is MLflow's to resolve (`runs:/...`, `models:/...`), rather than a folder or a URI."""
    return text.startswith(("runs:/", "models:/"))


def registered_version(reference: str, *, tracking: TrackingConfig) -> RegisteredVersion | None:
    """The version that models:/name@alias or models:/name/3 means at this moment; None for runs:/..."""
    if reference.startswith("runs:/"):
        return None
    match = REGISTRY_REFERENCE.fullmatch(reference)
    if match is None:
        raise ConfigError(f"{reference!r} is no model reference: expected models:/name@alias, models:/name/3 "
                          "or runs:/run_id/model.")
    _refuse_off(tracking, f"look up {reference}")
    tracking = located(tracking)
    client = open_client(tracking)
    with mlflow_errors(str(tracking.uri)), _refusing_unknown(reference, tracking):
        found = (client.get_model_version_by_alias(match["name"], match["alias"]) if match["alias"]
                 else client.get_model_version(match["name"], match["version"]))
        return RegisteredVersion(found.name, str(found.version), found.run_id)


def resolve_model(reference: str, *, tracking: TrackingConfig, into: Path) -> Path:
    """The model directory that a reference means, downloaded below `into`: the folder that holds model.json.

    reference  models:/name@alias, models:/name/3, or runs:/run_id/path
    A logged model without a model directory inside is refused with DataError.
    """
    _refuse_off(tracking, f"download {reference}")
    version = registered_version(reference, tracking=tracking)
    tracking = located(tracking)
    open_client(tracking)
    with mlflow_errors(str(tracking.uri)), _refusing_unknown(reference, tracking):
        import mlflow

        into.mkdir(parents=True, exist_ok=True)
        target = tempfile.mkdtemp(dir=into)
        mlflow.set_tracking_uri(str(tracking.uri))
        mlflow.artifacts.download_artifacts(version.reference if version else reference, dst_path=target)
    found = sorted(Path(target).rglob(SPEC_FILE), key=lambda path: len(path.parts))
    if not found:
        shutil.rmtree(target)
        raise DataError(f"{reference} holds no model directory (no {SPEC_FILE} inside): it was not "
                        "registered by `train` or `import-model`.")
    return found[0].parent


@contextlib.contextmanager
def _refusing_unknown(reference: str, tracking: TrackingConfig) -> Iterator[None]:
    """A ConfigError that names the reference, where MLflow is there and knows no such model, version, alias or run."""
    try:
        yield
    except Exception as error:
        if getattr(error, "error_code", None) not in UNKNOWN:
            raise
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(f"{reference}: MLflow at {without_credentials(str(tracking.uri))} doesn't know it: {said}. "
                          "Correct the name, or tracking.uri (MLFLOW_TRACKING_URI).") from None


def _refuse_off(tracking: TrackingConfig, what: str) -> None:
    if not tracking.enabled:
        raise ConfigError(f"can't {what}: tracking is off. Leave out tracking.enabled=false.")


def refuse_bad_name(name: str) -> None:
    """Refuse (ConfigError) a registered model's name that MLflow would refuse at the end, or no REF could have."""
    if not re.fullmatch(r"[^/:@\s][^/:@]*", name):
        raise ConfigError(f"--register {name!r} can't be a registered model's name. Choose one without / : @, such as "
                          "pose.")


# --- aliases and tags of registered versions ---------------------------------------------------------------


def file_sha256(directory: Path) -> dict[str, str]:
    """SHA-256 in hex of each file below a model directory, by its path there."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def noted_sha256(version: RegisteredVersion, *, tracking: TrackingConfig) -> dict[str, str]:
    """`file_sha256` of the model directory as it was registered; {} for a version of a program that didn't note it."""
    client = open_client(tracking := located(tracking))
    with mlflow_errors(str(tracking.uri)):
        tags = client.get_model_version(version.name, version.version).tags
    return {name.removeprefix(SHA256_TAG): value for name, value in tags.items() if name.startswith(SHA256_TAG)}


def version_behind(name: str, alias: str, *, tracking: TrackingConfig) -> RegisteredVersion | None:
    """The version of a registered model that an alias means at this moment; None where it means none."""
    client = open_client(tracking := located(tracking))
    with mlflow_errors(str(tracking.uri)):
        version = client.get_registered_model(name).aliases.get(alias)
        if version is None:
            return None
        return RegisteredVersion(name, str(version), client.get_model_version(name, str(version)).run_id)


def move_alias(version: RegisteredVersion, alias: str, *, tracking: TrackingConfig) -> None:
    """Let the alias mean this version, whatever it meant."""
    client = open_client(tracking := located(tracking))
    with mlflow_errors(str(tracking.uri)):
        client.set_registered_model_alias(version.name, alias, version.version)


def tag_version(version: RegisteredVersion, tags: Mapping[str, Any], *, tracking: TrackingConfig) -> None:
    """Set tags of a registered version; a tag of the same name is replaced."""
    client = open_client(tracking := located(tracking))
    with mlflow_errors(str(tracking.uri)):
        for name, value in tags.items():
            client.set_model_version_tag(version.name, version.version, name, str(value))
