"""Kubernetes manifests as kubectl renders them, and whether KubeRay's own schemas take them."""

import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).resolve().parents[1]
# PyYAML's own loader takes 8 s for a schema of a megabyte
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@functools.cache
def render(folder: str) -> tuple[dict[str, Any], ...]:
    """The objects of `kubectl apply -k cluster/kuberay/<folder>`."""
    done = subprocess.run(["kubectl", "kustomize", str(ROOT / "cluster" / "kuberay" / folder)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.load_all(done.stdout, Loader=LOADER))


def one(folder: str, kind: str, name: str | None = None) -> dict[str, Any]:
    """The only object of a kind (and name) among those of a folder."""
    found = [each for each in render(folder) if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    assert len(found) == 1, [(each["kind"], each["metadata"]["name"]) for each in render(folder)]
    return found[0]


@functools.cache
def schema(crd: Path) -> dict[str, Any]:
    """The closed schema of a custom resource's version v1."""
    versions = yaml.load(crd.read_text(), Loader=LOADER)["spec"]["versions"]
    return closed(next(each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1"))


def closed(node: Any) -> Any:
    """The schema, with every object refusing what it doesn't list, as `kubectl apply` does; JSON Schema ignores it."""
    if isinstance(node, list):
        return [closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    properties = {name: closed(each) for name, each in node.get("properties", {}).items()}
    rest = {name: closed(each) for name, each in node.items() if name != "properties"}
    if "properties" not in node:
        return rest
    open_ = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    return rest | {"properties": properties} | ({} if open_ else {"additionalProperties": False})


def problems(manifest: dict[str, Any], closed_schema: dict[str, Any]) -> list[str]:
    """Where and why the schema refuses a manifest: nothing if it takes it."""
    found = jsonschema.Draft7Validator(closed_schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, each.absolute_path))}: {each.message[:200]}" for each in found]


def pod_specs(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The specification of every pod that a manifest describes, however deep."""
    for value in manifest.values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                if "containers" in each:
                    yield each
                else:
                    yield from pod_specs(each)
