"""On a spot machine of AWS: tell Ray when the machine is about to be taken away, so that training saves a checkpoint.

    python -m cluster spot-watch

AWS gives two minutes' notice in the machine's own metadata, which nothing in Ray reads. Ray then gives the node no more
work, tells those who ask (`train` does), and counts the restart of an actor there against nobody.
"""

import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger("cluster.spot_watch")
# https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html asks for a look each 5 s
LOOK_EVERY_S = 5.0
ADDRESS = "http://169.254.169.254"
ANSWER_WITHIN_S = 2.0
SESSION_S = 60
RAY = (sys.executable, "-m", "ray.scripts.scripts")


@dataclass(frozen=True)
class Notice:
    """What AWS will do with this machine, and how long it leaves it."""

    action: str  # terminate, stop or hibernate
    seconds_left: int


def watch() -> int:
    """Look until there is a notice; tell Ray; 0 then. 1 if this machine has no metadata, or Ray didn't take it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        notice = wait_for_notice(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", ADDRESS).rstrip("/"))
    except OSError as error:
        logger.error("this machine's metadata can't be read: %s. It is no machine of AWS, or IMDS is off: nothing "
                     "will be said before it is taken away.", error)
        return 1
    logger.warning("AWS will %s this machine in %d s; Ray gives it no more work", notice.action, notice.seconds_left)
    return drain(notice)


def wait_for_notice(address: str) -> Notice:
    """The notice, when there is one. Raises OSError where the metadata can't be read at the first look."""
    notice = read_notice(address)
    while notice is None:
        time.sleep(LOOK_EVERY_S)
        try:
            notice = read_notice(address)
        except OSError as error:  # IMDS answers slowly now and then
            logger.warning("no answer from this machine's metadata: %s", error)
    return notice


def read_notice(address: str) -> Notice | None:
    """What the metadata service (IMDSv2) at an address says of an interruption; None while nothing is planned."""
    session = _ask(f"{address}/latest/api/token", method="PUT",
                   headers={"X-aws-ec2-metadata-token-ttl-seconds": str(SESSION_S)})
    try:
        answer = _ask(f"{address}/latest/meta-data/spot/instance-action",
                      headers={"X-aws-ec2-metadata-token": session.decode()})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    said = json.loads(answer)
    left = datetime.fromisoformat(said["time"]) - datetime.now(UTC)
    return Notice(said["action"], max(0, int(left.total_seconds())))


def _ask(url: str, **request: Any) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, **request), timeout=ANSWER_WITHIN_S) as answer:
        body: bytes = answer.read()
    return body


def drain(notice: Notice) -> int:
    """Tell Ray that this node will be preempted; the exit code of Ray's command."""
    return subprocess.run([*RAY, "drain-node", *drain_options(notice)], check=False).returncode


def drain_options(notice: Notice) -> list[str]:
    """What `ray drain-node` is told. Without a node's id it means the node that it runs on."""
    return ["--reason=DRAIN_NODE_REASON_PREEMPTION", f"--reason-message=AWS will {notice.action} this machine",
            f"--deadline-remaining-seconds={notice.seconds_left}"]
