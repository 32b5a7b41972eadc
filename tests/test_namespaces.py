"""Hosts out of namespaces: machines of their own, which die, are cut off, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.hosts import main
from cluster.namespaces import Host, Network, live_networks, why_not

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Network(tmp_path) as network:
        yield network


def said(host: Host, *command: str) -> str:
    process = host.popen(command, environment=os.environ, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return process.communicate(timeout=20)[0].strip()


def reaches(host: Host, other: Host) -> bool:
    """Whether anything comes back from the other host: a port on which nobody listens refuses, if the host is there."""
    script = ("import socket\ntry: socket.create_connection(('" + other.ip + "', 9), timeout=1)\n"
              "except ConnectionRefusedError: print('refused')\nexcept OSError: print('nothing')")
    return said(host, sys.executable, "-c", script) == "refused"


def test_a_host_has_its_own_name_address_processes_and_shared_memory(network: Network) -> None:
    first, second = network.start("first"), network.start("second")
    assert said(first, "sh", "-c", "hostname; cat /proc/sys/kernel/hostname; echo $$ > /dev/shm/mine").split() == [
        "first", "first"]
    assert said(second, "ls", "/dev/shm") == ""
    assert not Path("/dev/shm/mine").exists()
    assert said(second, "getent", "hosts", "first").split() == [first.ip, "first"]
    assert int(said(first, "sh", "-c", "echo $$")) < 100
    assert said(first, "pwd") == str(ROOT)


def test_what_a_host_writes_to_its_tmp_ray_can_be_read_outside(network: Network, tmp_path: Path) -> None:
    said(network.start("first"), "sh", "-c", "echo here > /tmp/ray/log")
    assert (tmp_path / "first" / "log").read_text() == "here\n"


def test_a_killed_host_has_no_process_left_and_can_be_started_again(network: Network) -> None:
    host = network.start("first")
    running = host.popen(["sleep", "100"], environment=os.environ, cwd=ROOT)
    host.kill()
    assert running.wait(5) == -signal.SIGKILL
    wait_for(lambda: not host.pids())
    with pytest.raises(OSError, match="host first is down: start it"):
        host.popen(["true"], environment=os.environ, cwd=ROOT)
    assert network.start("first").ip == host.ip
    assert said(host, "hostname") == "first"


def test_a_cut_host_is_reached_by_nobody_until_it_is_mended(network: Network) -> None:
    first, second = network.start("first"), network.start("second")
    assert reaches(first, second)
    second.cut()
    assert not reaches(first, second)
    assert not reaches(second, first)
    second.mend()
    wait_for(lambda: reaches(first, second))


def test_two_networks_do_not_meet(network: Network, tmp_path: Path) -> None:
    host = network.start("first")
    with Network(tmp_path / "other") as other:
        assert other.number != network.number
        assert not reaches(other.start("first"), host)
        assert {network.number, other.number} <= set(live_networks())
        assert main(["cut", "first"]) == 2  # whose?
        assert main(["kill", "first", "--network", str(other.number)]) == 0
        wait_for(lambda: not other.hosts["first"].pids())
    assert host.pids()


def test_of_a_network_whose_owner_was_killed_processes_end_at_once_and_the_next_one_removes_the_rest(
        tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from cluster.namespaces import Network
        network = Network(Path(sys.argv[1])).__enter__()
        network.start("left")
        print(network.number, flush=True)
        os.kill(os.getpid(), 9)
    """)
    owner = subprocess.run([sys.executable, "-c", script, str(tmp_path / "dead")], cwd=ROOT, capture_output=True,
                           text=True)
    left = Host(int(owner.stdout), 0, "left")
    wait_for(lambda: not left.pids())
    assert left.namespace in namespaces()
    with Network(tmp_path / "next"):
        assert left.namespace not in namespaces()


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


def wait_for(condition: Callable[[], object], within_s: float = 5) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
