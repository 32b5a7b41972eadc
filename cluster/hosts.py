"""A Ray cluster of several hosts on this one machine, with an S3 and an MLflow server as further hosts: to try what
survives what. `python -m cluster hosts` is this module.

    python -m cluster hosts up [--workers 3] [COMMAND ...]  a shell, or a command, on the head; with it the cluster ends
    python -m cluster hosts kill|cut|mend HOST              from another terminal: power failure, network down, up

The cluster is as one in production should be: tokens are asked for, the head takes no work, memory is limited.
"""

import argparse
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster.namespaces import Host, Network, find_host, live_networks, why_not

ROOT = Path(__file__).parents[1]
MB = 10**6
GCS_PORT, JOBS_PORT, S3_PORT, MLFLOW_PORT = 6379, 8265, 5000, 5001
START_S = 120
BUCKET = "pose"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
               "AWS_EC2_METADATA_DISABLED": "true"}


class Hosts:
    """A network of hosts for the time of a `with` block: first none; `start_head` and the rest add them.

    folder       what a process of host NAME logs is under folder/NAME (Ray) or in folder/NAME.log (servers)
    environment  settings that every process in every host gets
    """

    def __init__(self, folder: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self.network = Network(folder)
        self.folder = self.network.folder
        self._given = dict(environment or {})
        self._servers: dict[str, tuple[Sequence[str], subprocess.Popen[Any]]] = {}
        self.head = ""  # the name of the newest one

    def __enter__(self) -> "Hosts":
        self.network.__enter__()
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        return self

    def __exit__(self, *_: object) -> None:
        self.network.__exit__()

    @property
    def token(self) -> Path:
        """The file with the cluster's token."""
        return self.folder / "token"

    @property
    def environment(self) -> dict[str, str]:
        """What a process in a host finds: where the servers are, and the token."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "MLFLOW_"))}
        servers = {setting: f"http://{self.host(name).ip}:{port}" for name, setting, port in
                   (("s3", "AWS_ENDPOINT_URL", S3_PORT), ("mlflow", "MLFLOW_TRACKING_URI", MLFLOW_PORT))
                   if name in self.network.hosts}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `python` and `ray` are the project's
        return {**outer, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(self.token), **CREDENTIALS, **servers, **self._given}

    @property
    def job_environment(self) -> dict[str, str]:
        """The same, and the cluster that jobs and `ray job submit` go to."""
        head = self.host(self.head).ip
        return self.environment | {"RAY_ADDRESS": f"{head}:{GCS_PORT}",
                                   "RAY_API_SERVER_ADDRESS": f"http://{head}:{JOBS_PORT}"}

    def host(self, name: str) -> Host:
        """The host of that name."""
        return self.network.hosts[name]

    # --- servers --------------------------------------------------------------------------------------------------

    def start_s3(self) -> None:
        """moto's server on host s3, with an empty bucket: s3://pose. It holds all in memory."""
        host = self.network.start("s3")
        self._serve("s3", [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(S3_PORT)])
        self._wait_for("s3", f"http://{host.ip}:{S3_PORT}/moto-api/")
        bucket = urllib.request.Request(f"http://{host.ip}:{S3_PORT}/{BUCKET}", method="PUT")
        urllib.request.urlopen(bucket, timeout=10).close()

    def start_mlflow(self) -> None:
        """A tracking server on host mlflow, on SQLite; its artifacts are in a folder."""
        host = self.network.start("mlflow")
        self._serve("mlflow", [
            "env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", sys.executable, "-m", "mlflow", "server",
            "--host", "0.0.0.0", "--port", str(MLFLOW_PORT), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "artifacts")])
        self._wait_for("mlflow", f"http://{host.ip}:{MLFLOW_PORT}/health")

    def restart(self, name: str) -> None:
        """SIGKILL a server, and run it anew, without what it held in memory. Nobody waits until it answers."""
        command, server = self._servers[name]
        own = psutil.Process(server.pid).children(recursive=True)
        server.kill()
        server.wait()
        for process in own:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(own, timeout=START_S)
        self._serve(name, command)

    def _serve(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as output:
            self._servers[name] = command, self.host(name).popen(
                command, environment=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output)

    def _wait_for(self, name: str, url: str) -> None:
        deadline = time.monotonic() + START_S
        while not _answers(url):
            if self._servers[name][1].poll() is not None or time.monotonic() > deadline:
                raise OSError(f"{name} didn't answer within {START_S} s; see {self.folder / name}.log.")
            time.sleep(0.2)

    # --- Ray ------------------------------------------------------------------------------------------------------

    def start_head(self, name: str = "head") -> Host:
        """A head, which takes no work. Jobs go to the newest."""
        host = self.network.start(name)
        self.head = name
        self._ray_start(host, "--head", f"--port={GCS_PORT}", "--dashboard-host=0.0.0.0",
                        f"--dashboard-port={JOBS_PORT}", "--num-cpus=0", memory_mb=1000)
        return host

    def start_workers(self, names: Sequence[str], *, num_cpus: int = 2) -> list[Host]:
        """Workers of the newest head."""
        address = f"{self.host(self.head).ip}:{GCS_PORT}"
        for name in names:
            self._ray_start(self.network.start(name), f"--address={address}", f"--num-cpus={num_cpus}", memory_mb=2500)
        return [self.host(name) for name in names]

    def _ray_start(self, host: Host, *options: str, memory_mb: int) -> None:
        done = self.run(host.name, [sys.executable, "-m", "ray.scripts.scripts", "start", *options,
                                    f"--node-ip-address={host.ip}", f"--memory={memory_mb * MB}",
                                    f"--object-store-memory={300 * MB}", "--disable-usage-stats"], timeout=START_S)
        if done.returncode != 0:
            raise OSError(f"Ray didn't start on {host.name}: {done.stdout.strip()}")

    # --- commands -------------------------------------------------------------------------------------------------

    def popen(self, name: str, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """A user's command on a host, in the project's folder. `options` are Popen's."""
        return self.host(name).popen(command, environment=self.job_environment, cwd=ROOT, **options)

    def run(self, name: str, command: Sequence[str], *,
            timeout: float | None = None) -> "subprocess.CompletedProcess[str]":
        """The same, waited for; stdout has both streams."""
        process = self.popen(name, command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
        try:
            said, _ = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, process.returncode, said)


def main(arguments: Sequence[str]) -> int:
    """`python -m cluster hosts ...`; its exit code: that of the command on the head, 2 where hosts can't be made."""
    options = _parser().parse_args(arguments)
    if reason := why_not():
        print(f"error: hosts of their own can't be made here: {reason}.", file=sys.stderr)
        return 2
    if options.what == "up":
        command = options.command[options.command[:1] == ["--"]:]
        return _up(options.workers, command or [os.environ.get("SHELL", "bash")])
    networks = live_networks()
    if len(networks) != 1 and options.network is None:
        print(f"error: {len(networks)} clusters of hosts are up here; expected one, or --network with one of "
              f"{networks}.", file=sys.stderr)
        return 2
    host = find_host(networks[0] if options.network is None else options.network, options.host)
    getattr(host, options.what)()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster hosts", description="A Ray cluster of several hosts on "
                                     "this one machine, in network namespaces. Needs root.")
    kinds = parser.add_subparsers(dest="what", metavar="<what>", required=True)
    up = kinds.add_parser("up", help="make it, and run a command on its head (a shell); the cluster ends with that")
    up.add_argument("--workers", type=int, default=3)
    up.add_argument("command", nargs=argparse.REMAINDER)
    for what, text in {"kill": "a host's power failure", "cut": "pull its network cable",
                       "mend": "put the cable back"}.items():
        one = kinds.add_parser(what, help=text)
        one.add_argument("host", help="head, worker-1, ..., s3, mlflow")
        one.add_argument("--network", type=int, help="which, where several clusters are up")
    return parser


def _up(workers: int, command: list[str]) -> int:
    with (tempfile.TemporaryDirectory(prefix="pose-hosts-", ignore_cleanup_errors=True) as folder,
          _ended_by_signals(), Hosts(Path(folder)) as hosts):
        hosts.start_s3()
        hosts.start_mlflow()
        hosts.start_head()
        names = [f"worker-{number}" for number in range(1, workers + 1)]
        hosts.start_workers(names)
        print(f"hosts up: head, {', '.join(names)}, s3 (bucket s3://{BUCKET}), mlflow. Exit to end them all.",
              file=sys.stderr)
        return hosts.popen("head", command).wait()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that nothing is left behind."""
    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {one: signal.signal(one, end) for one in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(url, timeout=2).close()
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
