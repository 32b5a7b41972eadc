"""ray_config.yaml: Ray takes it, AWS as moto has it makes the machines that it says, and none is open to strangers."""

import copy
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import moto
import pytest
import yaml
from botocore.client import BaseClient

ROOT = Path(__file__).resolve().parents[1]
IAM = ROOT / "cluster" / "iam"
PROFILES = ("pose-head", "pose-worker")
Config = dict[str, Any]


@pytest.fixture
def config() -> Config:
    loaded: Config = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    return loaded


def ready(config: Config) -> Config:
    """The configuration as `ray up` has it after its own checks; refuses what Ray refuses."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: Config = prepare_config(config)
    validate_config(prepared)
    return prepared


def machines(config: Config) -> dict[str, Config]:
    types: dict[str, Config] = config["available_node_types"]
    return types


# --- what Ray says of it ------------------------------------------------------------------------------------------


def test_ray_takes_the_file(config: Config) -> None:
    assert set(machines(ready(config))) == {"head", "gpu_spot", "gpu_on_demand", "cpu_spot"}


def test_ray_would_refuse_a_misspelt_setting(config: Config) -> None:
    with pytest.raises(jsonschema.ValidationError):
        ready(config | {"idle_timeout": 5})


def test_the_cluster_may_have_as_many_machines_as_its_types_together(config: Config) -> None:
    assert config["max_workers"] == sum(each["max_workers"] for each in machines(config).values())


def test_image_and_project_have_one_version(config: Config) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert config["docker"]["image"].endswith(f"/pose-annotation:{project['version']}")


def test_nothing_is_installed_when_a_machine_starts(config: Config) -> None:
    assert not any(commands for name, commands in ready(config).items() if name.endswith("setup_commands"))
    assert "wheel" not in str(ready(config))  # as in Ray's default, which installs a nightly build


# --- closed to strangers ------------------------------------------------------------------------------------------


def test_every_node_asks_for_the_token_which_is_in_no_command(config: Config) -> None:
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (path,) = [option.partition("=")[2] for option in options if "RAY_AUTH_TOKEN_PATH" in option]
    assert str(Path(path).parent) in config["file_mounts"]
    assert "RAY_AUTH_TOKEN=" not in (ROOT / "ray_config.yaml").read_text()


def test_the_containers_have_no_more_rights_than_a_user(config: Config) -> None:
    options = config["docker"]["run_options"]
    assert {"--security-opt no-new-privileges", "--cap-drop ALL"} <= set(options)
    assert not [option for option in options if "privileged" in option or "docker.sock" in option]


def test_the_dashboard_listens_on_the_head_alone_and_no_machine_has_a_public_address(config: Config) -> None:
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert config["provider"]["use_internal_ips"] is True
    assert all(each["node_config"]["SecurityGroupIds"] for each in machines(config).values())


def test_the_head_takes_no_work(config: Config) -> None:
    assert machines(config)["head"]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in " ".join(config["head_start_ray_commands"])


# --- what AWS makes of it -----------------------------------------------------------------------------------------


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A made AWS account; the calls that were made of it since, as IAM names them."""
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)  # Ray makes a key pair and keeps it under HOME
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    calls: list[str] = []
    call = BaseClient._make_api_call

    def recorded(client: BaseClient, name: str, arguments: Config) -> Any:
        calls.append(f"{client.meta.service_model.service_name}:{name}")
        return call(client, name, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", recorded)
    with moto.mock_aws():
        yield calls


def with_an_account(config: Config) -> Config:
    """The file with what is to be SET set: a private network, a group, both profiles."""
    region = config["provider"]["region"]
    ec2, iam = boto3.resource("ec2", region_name=region), boto3.client("iam", region_name=region)
    network = ec2.create_vpc(CidrBlock="10.0.0.0/16")
    subnet = network.create_subnet(CidrBlock="10.0.1.0/24", AvailabilityZone=f"{region}a")
    group = network.create_security_group(GroupName="pose", Description="its members alone")
    for name in PROFILES:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=(IAM / "trust.json").read_text())
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    ours = copy.deepcopy(config)
    image = ec2.meta.client.describe_images()["Images"][0]["ImageId"]
    for each in machines(ours).values():
        each["node_config"] |= {"SubnetIds": [subnet.id], "SecurityGroupIds": [group.id], "ImageId": image}
    return ours


def provider_of(config: Config) -> Any:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    return AWSNodeProvider(config["provider"], config["cluster_name"])


def start(provider: Any, config: Config, kind: str) -> Any:
    """A machine of a type, as Ray's launcher and autoscaler start it."""
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS, TAG_RAY_USER_NODE_TYPE

    tags = {TAG_RAY_NODE_KIND: "head" if kind == "head" else "worker", TAG_RAY_USER_NODE_TYPE: kind,
            TAG_RAY_NODE_STATUS: "uninitialized"}
    (machine,) = provider.create_node(machines(config)[kind]["node_config"], tags, 1).values()
    machine.reload()
    return machine


def test_each_type_becomes_the_machine_that_it_says(config: Config, aws: list[str]) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws

    ours = with_an_account(config)
    aws.clear()
    booted = bootstrap_aws(ready(ours))
    assert "ec2:DescribeSubnets" in aws
    # Ray's own group would open port 22 to the world
    assert not {"ec2:CreateSecurityGroup", "ec2:AuthorizeSecurityGroupIngress"}.intersection(aws)
    provider = provider_of(booted)
    for kind, wanted in machines(config).items():
        machine = start(provider, booted, kind)
        assert machine.instance_type == wanted["node_config"]["InstanceType"]
        assert (machine.instance_lifecycle == "spot") == kind.endswith("_spot"), kind
        assert machine.iam_instance_profile["Arn"].endswith("/pose-head" if kind == "head" else "/pose-worker")
        assert machine.public_ip_address is None
        assert machine.metadata_options["HttpTokens"] == "required"
        assert [volume.encrypted for volume in machine.volumes.all()] == [True]


def test_the_heads_rights_are_what_its_autoscaler_asks_for_and_no_more(config: Config, aws: list[str]) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws

    booted = bootstrap_aws(ready(with_an_account(config)))
    provider = provider_of(booted)
    aws.clear()
    ids = [start(provider, booted, kind).id for kind in machines(config) if kind != "head"]
    assert provider.non_terminated_nodes({}) == ids
    for each in ids:
        assert provider.is_running(each)
        assert provider.internal_ip(each).startswith("10.0.1.")
        provider.set_node_tags(each, {"ray-node-status": "up-to-date"})
    provider.terminate_nodes(ids)
    assert provider.non_terminated_nodes({}) == []

    allowed = actions("head.json")
    reached = {action for action in allowed if action.startswith("ssm")}  # the SSM agent's, AWS's list for it
    assert set(aws) | {"iam:PassRole"} == allowed - reached  # AWS asks for PassRole itself when a profile is given


def actions(policy: str) -> set[str]:
    """All that a policy allows."""
    found: set[str] = set()
    for statement in json.loads((IAM / policy).read_text())["Statement"]:
        assert statement["Effect"] == "Allow"
        each = statement["Action"]
        found |= {each} if isinstance(each, str) else set(each)
    return found


def test_the_image_is_not_roots_and_has_what_the_launcher_and_the_probes_call() -> None:
    lines = (ROOT / "cluster" / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"]
    assert lines[-1] == "USER ray"
    (installed,) = [line for line in lines if "apt-get install" in line]
    assert {"rsync", "openssh-client", "wget"} <= set(installed.split())
