"""A real Ray head for tests, by `ray start`, on free ports and in a process group of its own.

It ends by a signal to that group: `ray stop` would end every Ray of the machine.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
PORTS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
         "dashboard-agent-grpc-port", "metrics-export-port", "node-manager-port", "object-manager-port",
         "runtime-env-agent-port")
NUM_CPUS = 4  # logical: two training workers would leave none for the tasks that feed them
OBJECT_STORE_BYTES = 200_000_000
READY_S = 120


@dataclass(frozen=True)
class RayHead:
    """A running head.

    address        of the cluster, for RAY_ADDRESS
    dashboard_url  of the dashboard and the Jobs API
    environment    the settings under which a process finds both, the token among them
    """

    address: str
    dashboard_url: str
    environment: dict[str, str]


@contextlib.contextmanager
def ray_head(folder: Path, *, token: str | None, ip: str = LOOPBACK) -> Iterator[RayHead]:
    """Run a head for the time of the block, its dashboard on `ip`; without a token it is open. Its log is in `folder`.

    Ray takes the machine's own address for a loopback one, so that all but the dashboard listens beyond loopback.
    """
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    # short: a socket's name has at most 107 characters
    temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    secrets = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    # RAY_TMPDIR: where the head notes that it is the machine's current cluster, for nobody else to find
    settings = {**secrets, "RAY_TMPDIR": str(temporary), "RAY_USAGE_STATS_ENABLED": "0"}
    head = RayHead(f"{ip}:{ports['port']}", f"http://{ip}:{ports['dashboard-port']}", {
        **settings, "RAY_ADDRESS": f"{ip}:{ports['port']}",
        "RAY_API_SERVER_ADDRESS": f"http://{ip}:{ports['dashboard-port']}"})
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address", ip,
               "--dashboard-host", ip, "--temp-dir", str(temporary), "--num-cpus", str(NUM_CPUS),
               "--object-store-memory", str(OBJECT_STORE_BYTES), "--disable-usage-stats",
               *(f"--{name}={port}" for name, port in ports.items())]
    log = folder / "ray_head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   env={**_without_ray(os.environ), **settings}, start_new_session=True)
    try:
        _wait_until_it_answers(head.dashboard_url, token, process, log)
        yield head
    finally:
        _end(process)
        shutil.rmtree(temporary, ignore_errors=True)


def _without_ray(environment: "os._Environ[str]") -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith("RAY_")}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_until_it_answers(url: str, token: str | None, process: "subprocess.Popen[bytes]", log: Path) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{url}/api/version", headers=headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text(errors="replace")
        with contextlib.suppress(urllib.error.URLError, OSError):
            direct.open(request, timeout=5).close()
            return
        time.sleep(0.2)
    raise AssertionError(f"the head did not answer within {READY_S} s:\n{log.read_text(errors='replace')}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(5)
