"""A model REF -> a local model directory, and the name and version by which people know it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pipeline import model_registry, storage
from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError
from pipeline.model.settings import SPEC_FILE, WEIGHTS_FILE

FILES = (WEIGHTS_FILE, SPEC_FILE)  # the specification last: it makes the directory whole


@dataclass(frozen=True)
class FoundModel:
    """A local model directory. `name` and `version` are the registry's; a plain directory has its path and None."""

    directory: Path
    name: str
    version: str | None

    @property
    def run_id(self) -> str | None:
        """The MLflow run that trained it, as the model itself says; None where it doesn't."""
        run_id: str | None = json.loads((self.directory / SPEC_FILE).read_text()).get("source", {}).get("run_id")
        return run_id

    @property
    def reference(self) -> str:
        """A REF that means this one, wherever an alias may go: models:/name/version, or the path."""
        return self.name if self.version is None else f"models:/{self.name}/{self.version}"


def find_model(reference: str, *, settings: TrackingConfig, into: Path, asked_by: str = "--model") -> FoundModel:
    """The model that a REF means: a directory (path or s3://), `runs:/...` or `models:/name@alias`.

    What is elsewhere is downloaded below `into`. Refuses (ConfigError) a place that holds no model directory, and says
    which setting asked for it.
    """
    if model_registry.is_model_reference(reference):
        version = model_registry.registered_version(reference, tracking=settings)
        # an alias may move at any moment: what is downloaded is the version that it meant just now
        fixed = version.reference if version else reference
        directory = model_registry.resolve_model(fixed, tracking=settings, into=into)
        return FoundModel(directory, version.name if version else reference, version.version if version else None)
    uri = storage.normalise(reference)
    if storage.is_remote(uri):
        return FoundModel(download_model(uri, into), uri, None)
    if not (Path(uri) / SPEC_FILE).is_file():
        raise ConfigError(f"{asked_by} {reference}: no model directory is there (expected {' and '.join(FILES)}). "
                          "Give the --output of train or import-model, runs:/... or models:/name@alias.")
    return FoundModel(Path(uri), uri, None)


def download_model(uri: str, into: Path) -> Path:
    """The model directory at a path or s3:// URI, copied below `into`."""
    for name in FILES:
        try:
            data = storage.read_object(storage.join(uri, name))
        except storage.ObjectMissing:
            raise ConfigError(f"{uri} is no model directory: it has no {name}.") from None
        (into / name).write_bytes(data)
    return into


def put_model(directory: Path, output: str) -> bool:
    """Put the model directory's files at a URI, model.json last: where that is, the model is whole.

    Gives False where just this model stands there already; another one is refused with ConfigError.
    """
    files = {name: (directory / name).read_bytes() for name in FILES}
    there = [name for name in files if storage.exists(storage.join(output, name))]
    for name in there:
        _refuse_other(output, name, files[name])
    if len(there) == len(files):
        return False
    storage.prove_put_if_absent(output)
    for name, data in files.items():
        if not storage.put_if_absent(storage.join(output, name), data):
            _refuse_other(output, name, data)
    return True


def _refuse_other(output: str, name: str, data: bytes) -> None:
    if storage.stored_sha256(storage.join(output, name)) != hashlib.sha256(data).hexdigest():
        raise ConfigError(f"{output} holds another model already ({name} differs), and a model is never "
                          "replaced. Give another --output.")
