"""Hosts of their own on this one machine, out of Linux namespaces: network, processes, /dev/shm, /tmp/ray, host name.

They hang on a bridge that this machine reaches too. It knows nothing of Ray. It needs root, iproute2 and util-linux.
Everything about a host follows from its name, so that another process can kill or cut it as well.
"""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOCKS = Path("/run/pose-hosts")  # a file for each network, locked as long as its owner lives
TOOLS = ("ip", "unshare", "nsenter", "setpriv")
FIRST_ADDRESS = 10  # 10.77.N.10; the bridge is .1
SHARED_MEMORY_MB = 1024  # at most; an object store takes what it was given of it

# What process 1 of a host does: a machine of its own as far as Ray can see. It waits for others' orphans, too.
INIT = """set -e
echo {name} > /proc/sys/kernel/hostname
mount -t tmpfs -o size={shared_memory_mb}m tmpfs /dev/shm
mkdir -p /tmp/ray
mount --bind {folder}/{name} /tmp/ray
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/resolv.conf /etc/resolv.conf
echo up
sleep infinity & wait
"""


def why_not() -> str | None:
    """Why hosts can't be made here; None if they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"needs {', '.join(missing)} (Debian: iproute2, util-linux)"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "--uts", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"needs namespaces: {tried.stderr.decode().strip()}"


@dataclass(frozen=True)
class Host:
    """One host of network `network`, up or not."""

    network: int
    number: int
    name: str

    @property
    def ip(self) -> str:
        """Its address."""
        return f"10.77.{self.network}.{FIRST_ADDRESS + self.number}"

    @property
    def namespace(self) -> str:
        """What `ip netns` calls it."""
        return f"pose-{self.network}-{self.name}"

    def pids(self) -> list[int]:
        """All its processes, as this machine numbers them."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """End every process in it at once, as a power failure does, with nothing said to anyone before or after it."""
        self.cut()
        for pid in self.pids():  # process 1 is one of them, and takes along what is born meanwhile
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self) -> None:
        """Pull its network cable: what it sends or is sent is lost, and nobody is told."""
        _ip("link", "set", _cable(self), "down")

    def mend(self) -> None:
        """Put the cable back."""
        _ip("link", "set", _cable(self), "up")

    def popen(self, command: Sequence[str], *, environment: Mapping[str, str], cwd: Path,
              **options: Any) -> "subprocess.Popen[Any]":
        """A process in the host, which ends with the one that is given back. `options` are Popen's."""
        enter = ["nsenter", f"--target={self._first_process()}", "--net", "--mount", "--uts", "--pid", "--",
                 "setpriv", "--pdeathsig", "KILL", "--", "env", f"--chdir={cwd}"]
        return subprocess.Popen([*enter, *command], env=dict(environment), **options)

    def _first_process(self) -> int:
        for pid in self.pids():
            # "NSpid: 4711 1": its number here, and in its own namespace
            with contextlib.suppress(OSError):
                if re.search(r"^NSpid:.*\t1$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
                    return pid
        raise OSError(f"host {self.name} is down: start it before anything is run in it.")


class Network:
    """A bridge with hosts, 10.77.N.0/24, for the time of a `with` block; at its end nothing is left of it.

    folder  what a host writes to its /tmp/ray is in folder/NAME
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> "Network":
        if reason := why_not():
            raise OSError(f"Hosts of their own can't be made here: {reason}.")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n")
        (self.folder / "resolv.conf").touch()  # this machine's name server is out of reach: each question takes seconds
        self.number, self._lock = _claim()
        try:
            _ip("link", "add", _bridge(self.number), "type", "bridge")
            _ip("address", "add", f"10.77.{self.number}.1/24", "dev", _bridge(self.number))
            _ip("link", "set", _bridge(self.number), "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _sweep(self.number)
        self._lock.close()

    def start(self, name: str) -> Host:
        """A host of that name: a new one, or one that was killed, with its address and its old /tmp/ray."""
        host = self.hosts.get(name)
        if host is None:
            host = self.hosts[name] = Host(self.number, len(self.hosts), name)
            (self.folder / name).mkdir(exist_ok=True)
            with (self.folder / "hosts").open("a") as known:
                known.write(f"{host.ip} {name}\n")
            _add_namespace(host)
        host.mend()
        _boot(host, self.folder)
        return host


def live_networks() -> list[int]:
    """The numbers of the networks whose owners live."""
    return sorted(int(path.name) for path in LOCKS.glob("*") if _lock(int(path.name)) is None)


def find_host(network: int, name: str) -> Host:
    """A host of a network that another process has made, to kill, cut or mend it."""
    return Host(network, 0, name)


def _add_namespace(host: Host) -> None:
    cable = _cable(host)
    _ip("netns", "add", host.namespace)
    _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _ip("link", "set", cable, "master", _bridge(host.network))
    _ip("-n", host.namespace, "address", "add", f"{host.ip}/24", "dev", "eth0")
    for link in ("lo", "eth0"):
        _ip("-n", host.namespace, "link", "set", link, "up")
    # it leads nowhere, but by its default route a host finds its own address
    _ip("-n", host.namespace, "route", "add", "default", "via", f"10.77.{host.network}.1")


def _boot(host: Host, folder: Path) -> None:
    script = INIT.format(name=host.name, folder=folder, shared_memory_mb=SHARED_MEMORY_MB)
    # who dies takes the next along: owner, unshare, process 1, all others in the host
    init = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", "ip", "netns", "exec", host.namespace,
         "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert init.stdout is not None
    said = init.stdout.readline().strip()
    if said != "up":
        raise OSError(f"host {host.name} didn't come up: {said}{init.stdout.read()}")


def _claim() -> tuple[int, Any]:
    """The number of a network that is nobody's, and the lock that makes it ours. What a dead owner left is removed."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    for number in [*(int(path.name) for path in LOCKS.glob("*")), *range(256)]:
        if (lock := _lock(number)) is None:
            continue
        _sweep(number)
        if f"10.77.{number}." not in _ip("-4", "route", "show", "table", "all"):
            return number, lock
        lock.close()
    raise OSError("All of 10.77.0.0/16 is in use here: end another cluster of hosts.")


def _lock(number: int) -> Any:
    lock = (LOCKS / str(number)).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _sweep(number: int) -> None:
    """End and remove whatever there is of a network."""
    for host in _hosts_of(number):
        with contextlib.suppress(OSError):
            host.kill()
            _ip("link", "delete", _cable(host))  # it would go with the namespace, but some time later
        _ip("netns", "delete", host.namespace)
    if (Path("/sys/class/net") / _bridge(number)).exists():
        _ip("link", "delete", _bridge(number))


def _hosts_of(number: int) -> Iterator[Host]:
    for namespace in re.findall(rf"^pose-{number}-(\S+)", _ip("netns", "list"), re.MULTILINE):
        yield find_host(number, namespace)


def _bridge(number: int) -> str:
    return f"pose-{number}"


def _cable(host: Host) -> str:
    return f"p{host.network}-{host.name}"  # at most 15 characters


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
