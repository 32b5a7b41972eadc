"""The Kubernetes manifests: KubeRay takes them, our own command line takes their commands, nothing is open."""

import copy
import re
import shlex
import shutil
import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.__main__ import JOBS, _parser, _setting
from pipeline import config as settings
from tests.kubernetes import ROOT, one, pod_specs, problems, render, schema
from tests.mlflow_server import compose

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which is not here")

COMMANDS = ("shard", "train", "annotate", "plan", "evaluate", "verify")
EVERYTHING = ("cluster", *COMMANDS)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def manifest(folder: str) -> dict[str, Any]:
    return one(folder, "RayCluster" if folder == "cluster" else "RayJob")


def cluster_of(folder: str) -> dict[str, Any]:
    spec: dict[str, Any] = manifest(folder)["spec"]
    return spec if folder == "cluster" else spec["rayClusterSpec"]


def groups_of(folder: str) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in cluster_of(folder)["workerGroupSpecs"]}


def containers(folder: str) -> list[dict[str, Any]]:
    return [container for spec in pod_specs(manifest(folder)) for container in spec["containers"]]


def gib(quantity: str) -> float:
    return int(quantity.removesuffix("Gi"))


def schema_of(kind: str, shared: Path) -> dict[str, Any]:
    folder = shared / "data" / "kuberay-crds"
    if not folder.is_dir():
        pytest.skip(f"needs KubeRay's schemas in {folder}, which are not here")
    return schema(folder / f"ray.io_{kind.lower()}s.yaml")


@pytest.mark.parametrize("folder", EVERYTHING)
def test_kuberay_takes_every_field(folder: str, shared: Path) -> None:
    assert problems(manifest(folder), schema_of(manifest(folder)["kind"], shared)) == []


@pytest.mark.parametrize(("path", "value", "said"), [
    ("ttlSecondAfterFinished", 60, "ttlSecondAfterFinished"),
    ("rayClusterSpec.headGroupSpec.template.spec.container", [], "container"),
    ("rayClusterSpec.workerGroupSpecs.0.maxReplicas", "many", "'many' is not of type 'integer'"),
    ("rayClusterSpec.authOptions.mode", "tokens", "'tokens' is not one of"),
    ("backoffLimit", None, "None is not of type 'integer'"),
])
def test_a_misspelt_field_and_a_wrong_value_are_refused(path: str, value: Any, said: str, shared: Path) -> None:
    wrong = copy.deepcopy(manifest("annotate"))
    *parents, last = path.split(".")
    place = wrong["spec"]
    for name in parents:
        place = place[int(name)] if name.isdigit() else place[name]
    place[last] = value

    found = problems(wrong, schema_of("RayJob", shared))

    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_our_own_command_line_takes_the_command(name: str) -> None:
    variables = one(name, "ConfigMap", "pose-settings")["data"]
    command = shlex.split(string.Template(manifest(name)["spec"]["entrypoint"]).substitute(variables))
    assert command[:4] == ["python", "-m", "jobs", name]

    options = _parser().parse_args(command[3:])
    flags = {_setting(flag): getattr(options, _setting(flag)) for flag in JOBS[name].flags}
    # the image has the project in /opt/pose (cluster/Dockerfile)
    files = [file.replace("/opt/pose", str(ROOT)) for file in options.config]
    config = settings.load_config(JOBS[name].settings, files=files, assignments=options.set, flags=flags)

    assert "s3://BUCKET" in str(config)


@pytest.mark.parametrize("folder", EVERYTHING)
def test_tokens_are_on_and_nothing_is_reached_from_outside(folder: str) -> None:
    spec = cluster_of(folder)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not spec["headGroupSpec"].get("enableIngress")
    policy = one(folder, "NetworkPolicy")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule["from"] for rule in policy["ingress"])
    assert not any("ipBlock" in peer for rule in policy["ingress"] for peer in rule["from"])
    assert {"169.254.169.254/32"} <= {address for rule in policy["egress"] for peer in rule["to"]
                                      for address in peer.get("ipBlock", {}).get("except", [])}


@pytest.mark.parametrize("folder", EVERYTHING)
def test_the_head_takes_no_work(folder: str) -> None:
    assert cluster_of(folder)["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}


@pytest.mark.parametrize("folder", EVERYTHING)
def test_every_pod_keeps_to_the_restricted_pod_security_standard(folder: str) -> None:
    """As the namespace demands: https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    specs = list(pod_specs(manifest(folder)))
    assert len(specs) == (3 if folder == "cluster" else 4)  # head, two groups, what submits
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all(set(volume) <= {"name", "emptyDir"} for volume in spec.get("volumes", []))
    boxes = [container["securityContext"] for container in containers(folder)]
    for box in [*boxes, cluster_of(folder)["autoscalerOptions"]["securityContext"]]:
        assert box == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("folder", EVERYTHING)
def test_no_secret_is_written_down(folder: str) -> None:
    assert "Secret" not in {each["kind"] for each in render(folder)}
    names = [name for container in containers(folder) for name in (each["name"] for each in container.get("env", []))]
    names += [name for each in render(folder) if each["kind"] == "ConfigMap" for name in each["data"]]
    assert not [name for name in names if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]


@pytest.mark.parametrize("folder", EVERYTHING)
def test_the_workers_cannot_ask_kubernetes_for_anything(folder: str) -> None:
    specs = [group["template"]["spec"] for group in groups_of(folder).values()]
    assert {spec["serviceAccountName"] for spec in specs} == {"pose-worker"}
    assert {spec["automountServiceAccountToken"] for spec in specs} == {False}
    assert cluster_of(folder)["headGroupSpec"]["template"]["spec"]["serviceAccountName"] == "pose-head"
    for name in ("pose-head", "pose-worker"):
        account = one(folder, "ServiceAccount", name)
        assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].endswith(f":role/{name}")


@pytest.mark.parametrize("folder", EVERYTHING)
def test_versions_are_those_of_the_project(folder: str) -> None:
    ray = next(each for each in PROJECT["dependencies"] if each.startswith("ray["))
    assert ray.endswith(f"=={cluster_of(folder)['rayVersion']}")
    assert {each["image"] for each in containers(folder)} == {f"REGISTRY/pose-annotation:{PROJECT['version']}"}


@pytest.mark.parametrize("folder", EVERYTHING)
def test_memory_is_promised_in_full_and_holds_rays_objects(folder: str) -> None:
    """Ray takes 30 % of a container's memory for objects, in /dev/shm if they fit (ray_constants.py)."""
    for spec in pod_specs(manifest(folder)):
        container = spec["containers"][0]
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests["memory"] == limits["memory"]
        if container["name"] == "ray-job-submitter":
            continue
        assert requests["ephemeral-storage"] == limits["ephemeral-storage"]  # what doesn't fit is spilled there
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volume = next(each["emptyDir"] for each in spec["volumes"] if each["name"] == mounted["/dev/shm"])
        assert volume["medium"] == "Memory"
        assert 0.3 * gib(limits["memory"]) <= gib(volume["sizeLimit"]) < gib(limits["memory"])


@pytest.mark.parametrize("folder", EVERYTHING)
def test_groups_scale_within_their_bounds_and_go_when_idle(folder: str) -> None:
    assert list(groups_of(folder)) == ["gpu-worker", "cpu-worker"]  # each job's patches count on the order
    for group in groups_of(folder).values():
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert cluster_of(folder)["enableInTreeAutoscaling"] is True
    assert cluster_of(folder)["autoscalerOptions"]["version"] == "v2"
    gpus = {name: group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
            for name, group in groups_of(folder).items()}
    assert gpus == {"gpu-worker": "1", "cpu-worker": None}


@pytest.mark.parametrize("folder", EVERYTHING)
def test_a_spot_warning_leaves_time_for_a_checkpoint(folder: str) -> None:
    """AWS gives two minutes; Ray drains for 30 s unless told otherwise, and Kubernetes must not be quicker."""
    for group in groups_of(folder).values():
        spec = group["template"]["spec"]
        drains = {each["name"]: int(each["value"]) for each in spec["containers"][0]["env"]}
        assert 30 < drains["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] < spec["terminationGracePeriodSeconds"] <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_a_job_ends_by_itself_is_tried_again_and_leaves_no_cluster(name: str) -> None:
    spec = manifest(name)["spec"]
    assert manifest(name)["metadata"]["name"] == name
    assert spec["backoffLimit"] >= 1
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert "runtimeEnvYAML" not in spec  # the image has everything; its variables would show on the dashboard


def test_jobs_ask_for_what_their_groups_can_give() -> None:
    train, annotate = manifest("train")["spec"]["entrypoint"], manifest("annotate")["spec"]["entrypoint"]
    gpus = groups_of("train")["gpu-worker"]
    assert f"--workers {gpus['minReplicas']}:{gpus['maxReplicas']}" in " ".join(train.split())
    assert f"actors={groups_of('annotate')['gpu-worker']['maxReplicas']} " in annotate
    # without a GPU in sight at its start annotate would take processors, unless it is told
    assert "backend=cuda" in annotate


@pytest.fixture(scope="module")
def mlflow() -> dict[str, dict[str, Any]]:
    """The manifests of cluster/mlflow/kubernetes.yaml by kind."""
    path = ROOT / "cluster" / "mlflow" / "kubernetes.yaml"
    return {each["kind"]: each for each in yaml.safe_load_all(path.read_text())}


def test_kubernetes_takes_every_field_of_mlflows_pod(mlflow: dict[str, Any], shared: Path) -> None:
    job = schema_of("RayJob", shared)["properties"]["spec"]["properties"]
    template = mlflow["Deployment"]["spec"]["template"]
    assert problems(template, job["rayClusterSpec"]["properties"]["headGroupSpec"]["properties"]["template"]) == []


def test_mlflow_on_kubernetes_is_the_compose_files_server(mlflow: dict[str, Any]) -> None:
    compose_file = compose({"MLFLOW_ARTIFACTS": "s3://BUCKET/mlflow", "POSTGRES_PASSWORD": "p"})["services"]["mlflow"]
    container = mlflow["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    command = [*container["command"], *container["args"]]
    flags = [word for word in compose_file["command"] if word.startswith("--")]
    assert [word for word in command if word.startswith("--")] == flags
    assert command[:4] == compose_file["command"][:4]
    assert {each["name"] for each in container["env"]} == set(compose_file["environment"])
    assert container["image"].endswith(compose_file["image"].rpartition("/")[2])


def test_jobs_find_mlflow_where_it_is_and_nobody_else_does(mlflow: dict[str, Any]) -> None:
    place = one("annotate", "ConfigMap")["data"]["MLFLOW_TRACKING_URI"]
    service, policy = mlflow["Service"], mlflow["NetworkPolicy"]["spec"]
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    assert place == f"http://{name}.{namespace}.svc:{service['spec']['ports'][0]['port']}"
    hosts = mlflow["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"][-1].split(",")
    assert f"{name}.{namespace}.svc:*" in hosts
    assert service["spec"]["selector"] == policy["podSelector"]["matchLabels"]
    assert policy["ingress"][0]["from"] == [{"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}]
