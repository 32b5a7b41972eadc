"""What an output holds already: two kinds of run never share one."""

from pipeline.errors import ConfigError
from pipeline.shard_versions import job_name
from pipeline.units import FrozenJob, open_job

KEYPOINTS, SHARDS, TRAINING = "a keypoint dataset", "a shard dataset", "a training"


def kind_at(output: str) -> str | None:
    """What kind of run was begun there; None: none was."""
    if open_job(output, job_name(1)) is not None:
        return SHARDS
    job = open_job(output)
    return None if job is None else kind_of(job)


def kind_of(job: FrozenJob) -> str:
    """What kind of run `_job.json` is of."""
    return KEYPOINTS if "boxes" in job.intent else TRAINING


def refuse_other_kind(output: str, own: str) -> None:
    """Refuse (ConfigError) an output in which another kind of run was begun than `own`."""
    kind = kind_at(output)
    if kind not in (None, own):
        raise ConfigError(f"--output {output} holds {kind}. Choose another place for {own}.")
