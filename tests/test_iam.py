"""A worker's rights (cluster/iam/worker.json): the jobs run on them, each is needed, and none can undo a commit."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from jobs import annotate, plan, shard
from pipeline import storage
from pipeline.config import AnnotateConfig, PlanConfig, ShardConfig
from tests.s3 import S3Server, s3_server
from tests.worlds import NO_TRACKING, write_pictures, write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
POLICY = ROOT / "cluster" / "iam" / "worker.json"
Policy = dict[str, Any]


@dataclass(frozen=True)
class Account:
    """A server that enforces rights, with a bucket of pictures and one for outputs; whoever asks has `policy`."""

    server: S3Server
    model: Path

    def allow(self, policy: Policy) -> None:
        """From now on the user may do what the policy says."""
        self._iam().put_user_policy(UserName="worker", PolicyName="worker", PolicyDocument=json.dumps(policy))

    def _iam(self) -> Any:
        return boto3.client("iam", endpoint_url=self.server.endpoint, region_name="us-east-1",
                            aws_access_key_id=self.server.environment["AWS_ACCESS_KEY_ID"],
                            aws_secret_access_key=self.server.environment["AWS_SECRET_ACCESS_KEY"])


def worker_policy() -> Policy:
    """worker.json for the account's buckets, less what the server doesn't know.

    moto looks at actions and resources, not at conditions, and asks for HeadBucket where AWS asks for ListBucket.
    """
    policy: Policy = json.loads(POLICY.read_text().replace("PICTURES", "pictures").replace("OUTPUT", "output"))
    for statement in policy["Statement"]:
        statement.pop("Condition", None)
        if statement["Action"] == "s3:ListBucket":
            statement["Action"] = ["s3:ListBucket", "s3:HeadBucket"]
    return policy


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    folder = tmp_path_factory.mktemp("account")
    with s3_server(folder) as server, pytest.MonkeyPatch.context() as environment:
        for bucket in ("pictures", "output"):
            server.create_bucket(bucket)
        server.upload_folder(write_pictures(folder / "in", count=6), "s3://pictures/in")
        administrator = Account(server, write_tiny_model(folder / "model"))
        iam = administrator._iam()
        iam.create_user(UserName="worker")
        iam.create_user(UserName="administrator")
        key = iam.create_access_key(UserName="worker")["AccessKey"]
        own = iam.create_access_key(UserName="administrator")["AccessKey"]
        everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
        iam.put_user_policy(UserName="administrator", PolicyName="all", PolicyDocument=json.dumps(everything))
        _enforce(server)
        for name, value in {**server.environment, "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
                            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}.items():
            environment.setenv(name, value)
        yield Account(replace(server, settings={"AWS_ACCESS_KEY_ID": own["AccessKeyId"],
                                                "AWS_SECRET_ACCESS_KEY": own["SecretAccessKey"]}), administrator.model)


def _enforce(server: S3Server) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{server.endpoint}/moto-api/reset-auth", data=b"0", method="POST",
                                                  headers={"Content-Type": "application/octet-stream"}))


def run_line(account: Account, output: str) -> None:
    """Shard, annotate and plan, from one bucket into the other."""
    shard.run(ShardConfig(images="s3://pictures/in/images", annotations="s3://pictures/in/annotations.json",
                          output=f"{output}/shards", images_per_shard=3, tracking=NO_TRACKING))
    settings: dict[str, Any] = {"input": f"{output}/shards", "model": str(account.model), "tracking": NO_TRACKING,
                                "actors": 1, "pictures_per_unit": 3}
    annotate.run(AnnotateConfig(output=f"{output}/keypoints", **settings))
    plan.run(PlanConfig(scratch=f"{output}", sample=2, **settings))


@pytest.mark.usefixtures("without_ray")
def test_the_jobs_run_on_a_workers_rights(account: Account) -> None:
    account.allow(worker_policy())
    run_line(account, "s3://output/line")
    assert storage.exists("s3://output/line/keypoints/_SUCCESS")
    # and plan, the drivers and the probes of the stores have taken away what was theirs
    temporary = ("/_scratch-", "/_drivers/", "/_probe-")
    assert not [found.uri for found in storage.list_objects("s3://output") if any(
        part in found.uri for part in temporary)]


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("missing", ["ListEachBucket", "ReadPicturesAndOutputs", "WriteWhatIsAbsent",
                                     "RemoveOwnTemporaries"])
def test_each_right_is_needed(account: Account, missing: str) -> None:
    policy = worker_policy()
    account.allow({**policy, "Statement": [each for each in policy["Statement"] if each["Sid"] != missing]})
    with pytest.raises(storage.StorageError, match=r"answered 403|credentials may do"):
        run_line(account, f"s3://output/without-{missing}")


def test_a_worker_can_remove_no_commit_and_write_to_no_pictures(account: Account) -> None:
    account.allow(worker_policy())
    output = "s3://output/commits"
    for name in ("keypoints/part-0000000-0123abcd.parquet", "shards/part-0000000-0123abcd.parquet", "_SUCCESS",
                 "_job.json", "dataset-000001.json", "_plan/0123/part.parquet", "_model/model.safetensors"):
        assert storage.put_if_absent(f"{output}/{name}", b"committed")
        with pytest.raises(storage.StorageError, match="403"):
            storage.remove_own(f"{output}/{name}")
    with pytest.raises(storage.StorageError, match="403"):
        storage.put_if_absent("s3://pictures/in/images/new.jpg", b"a picture")


def test_aws_lets_a_worker_replace_nothing_but_ray_trains_own_state() -> None:
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes-enforce.html
    writing = {statement["Sid"]: statement for statement in json.loads(POLICY.read_text())["Statement"]
               if "s3:PutObject" in statement["Action"]}
    assert writing["WriteWhatIsAbsent"]["Condition"] == {"Null": {"s3:if-none-match": "false"}}
    assert writing.keys() == {"WriteWhatIsAbsent", "WriteRayTrainsOwnState"}
    assert writing["WriteRayTrainsOwnState"]["Resource"].endswith("/*/_ray_train/*")


@pytest.mark.slow
def test_training_runs_on_a_workers_rights(account: Account, tmp_path: Path) -> None:
    account.allow(worker_policy())
    output = "s3://output/training"

    def job(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", "jobs", *arguments, "--set", "tracking.enabled=false"],
                              env=dict(os.environ), cwd=ROOT, capture_output=True, text=True)

    sharded = job("shard", "--images", "s3://pictures/in/images", "--annotations", "s3://pictures/in/annotations.json",
                  "--output", f"{output}/shards", "--images-per-shard", "3")
    assert sharded.returncode == 0, sharded.stderr
    trained = job("train", "--data", f"{output}/shards", "--val", f"{output}/shards", "--output", f"{output}/model",
                  "--config", "jobs/train_small.yaml", "--set", "network.input_size_wh=[64, 64]",
                  "--set", "network.widths=[4, 4, 4, 4]", "--set", "optimiser.iterations=6",
                  "--set", "optimiser.warmup_iterations=1", "--set", "validate_every=2", "--set", "keep_checkpoints=1")
    assert trained.returncode == 0, trained.stderr
    assert storage.exists(f"{output}/model/model.json")
