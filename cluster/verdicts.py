"""Facts in, verdicts out: what `preflight` thinks of what was found. Pure functions, which know no Ray."""

import ipaddress
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from cluster.node_facts import Answer, NodeFacts

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
# S3 refuses requests 15 minutes off (RequestTimeTooSkewed, in S3's list of error responses). Clocks that NTP keeps
# differ by milliseconds: 5 s says that nothing keeps them, 5 min that the refusals are near
SKEW_WARNING_S = 5
SKEW_FAILED_S = 300
# Ray stops creating objects on a disk that is fuller (local_fs_capacity_threshold, docs on object spilling)
FULL_DISK = 0.95
SLOW_STORE_S = 2.0  # two puts, a get and a delete; on S3 in one region they take 0.1 to 0.3 s
TOKEN_REMEDY = "Start every node with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
GIB = 1 << 30


@dataclass(frozen=True)
class Verdict:
    """One check: ok, warning, failed or skipped; what was found; what to do, "" where there is nothing to do."""

    check: str
    verdict: str
    found: str
    remedy: str = ""


def judge_versions(nodes: Mapping[str, NodeFacts], *, driver: NodeFacts) -> Verdict:
    """Whether each node has this machine's packages. Ray and Python must be equal; torch, pyarrow and OpenCV too, for
    the same rows. Builds of one version (2.13.0+cpu, +cu130) agree; our own package may be shipped, not installed."""
    wrong = []
    for name, facts in nodes.items():
        for package, ours in driver.versions.items():
            theirs = facts.versions.get(package)
            absent_is_fine = package == "pose-annotation" and None in (theirs, ours)
            if not absent_is_fine and _release(theirs) != _release(ours):
                wrong.append(f"{name} has {package} {theirs}, not {ours}")
    if wrong:
        return Verdict("versions", FAILED, "; ".join(wrong), "Use one image for all nodes, made with constraints.txt")
    have = ", ".join(f"{package} {version}" for package, version in driver.versions.items() if version)
    return Verdict("versions", OK, f"{have} on {_nodes(len(nodes))} and here")


def judge_access(address: str, dashboard: Answer | None, nodes: Mapping[str, NodeFacts], *,
                 addresses: Iterable[str], allow_open: bool) -> Verdict:
    """Whether strangers are kept out: the dashboard refuses who has no token, and every node's Ray wants one.

    dashboard   its answer to a request without a token
    addresses   at which nodes and dashboard listen; an open cluster is let pass only if all are loopback
    """
    without = [name for name, facts in nodes.items() if not facts.token_auth]
    if dashboard is not None and dashboard.status in (401, 403) and not without:
        return Verdict("tokens", OK, f"{address} answers {dashboard.status} without a token")
    if dashboard is not None and dashboard.status is None and not without and nodes:
        return Verdict("tokens", WARNING, f"the nodes want tokens; the dashboard wasn't reached ({dashboard.text})",
                       "Start the head with its dashboard")
    if dashboard is not None and dashboard.status is None and not nodes:
        return Verdict("tokens", FAILED, f"{address} can't be reached: {dashboard.text}", "Check --address")
    if dashboard is None and not without:
        return Verdict("tokens", OK, "every node's Ray wants tokens; there is no dashboard")
    found = f"{address} lets in whoever reaches it" + (f"; without tokens: {', '.join(without)}" if without else "")
    if all(is_loopback(one) for one in addresses):
        return Verdict("tokens", OK, f"{found}; loopback alone")
    if allow_open:
        return Verdict("tokens", WARNING, f"{found}; --allow-open was given (CVE-2023-48022)", TOKEN_REMEDY)
    return Verdict("tokens", FAILED, f"{found} and runs their code (CVE-2023-48022)",
                   f"{TOKEN_REMEDY}, or say --allow-open where a network keeps all others out")


def judge_stores(machines: Mapping[str, NodeFacts]) -> list[Verdict]:
    """One verdict for each URI: readable, and outputs written exactly once, from every machine that looked."""
    verdicts = []
    asked = [(store.uri, store.writes) for facts in machines.values() for store in facts.stores]
    for uri, writes in dict.fromkeys(asked):
        looks = {name: store for name, facts in machines.items() for store in facts.stores
                 if (store.uri, store.writes) == (uri, writes)}
        check = f"{'output' if writes else 'input'} {uri}"
        failed = {name: store.error for name, store in looks.items() if store.error}
        slowest = max((store.put_s or store.list_s or 0 for store in looks.values()), default=0)
        where = f"from {', '.join(looks)}"
        if failed:
            verdicts.append(Verdict(check, FAILED, f"from {', '.join(failed)}: {next(iter(failed.values()))}",
                                    "See the message; check the machine's role, network and AWS settings"))
        elif not writes and any(store.empty for store in looks.values()):
            verdicts.append(Verdict(check, FAILED, f"nothing is there, {where}", "Correct the address"))
        elif slowest > SLOW_STORE_S:
            verdicts.append(Verdict(check, WARNING, f"slow: {slowest:.1f} s for a few small requests, {where}",
                                    "Use a bucket in the cluster's region, and a gateway endpoint"))
        else:
            did = "readable, writable, a second put refused" if writes else "readable"
            verdicts.append(Verdict(check, OK, f"{did}, {where}; at most {slowest:.2f} s"))
    return verdicts


def judge_mlflow(uri: str | None, machines: Mapping[str, NodeFacts], *, client: str, num_nodes: int) -> Verdict:
    """Whether every machine reaches the MLflow server, and its major.minor version is the client's.

    A file (sqlite:, a path) can't be shared by several nodes: training logs from the node of worker 0.
    """
    check, server = "MLflow", "Set MLFLOW_TRACKING_URI to an MLflow server's http(s) address"
    if not uri:
        several = num_nodes > 1
        return Verdict(check, WARNING if several else OK, "MLFLOW_TRACKING_URI isn't set: an SQLite file in the "
                       "working directory" + (", another one on each node" if several else ""),
                       server if several else "")
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file", "sqlite"):
        several = num_nodes > 1
        return Verdict(check, FAILED if several else OK, f"a local store ({scheme or 'path'})"
                       + (f" on {num_nodes} nodes: each would have its own" if several else ""),
                       server if several else "")
    if scheme not in ("http", "https"):
        return Verdict(check, SKIPPED, f"{scheme} addresses aren't asked", server)
    asked = {name: facts.mlflow for name, facts in machines.items() if facts.mlflow is not None}
    for name, answer in asked.items():
        if answer.status != 200:
            return Verdict(check, FAILED, f"from {name}: {answer.status or 'no answer'} {answer.text}",
                           "Start the server, open its port to the nodes, check MLFLOW_TRACKING_USERNAME and _PASSWORD")
    versions = {answer.text.strip() for answer in asked.values()}
    if any(version.split(".")[:2] != client.split(".")[:2] for version in versions):
        return Verdict(check, WARNING, f"the server is {', '.join(sorted(versions))}, the client {client}",
                       "Give both the same major.minor version")
    return Verdict(check, OK, f"{', '.join(sorted(versions))} from {', '.join(asked)}; the client is {client}")


def judge_gpus(counted: Mapping[str, int], nodes: Mapping[str, NodeFacts]) -> list[Verdict]:
    """Whether torch computes on as many GPUs as Ray counts (`counted`: node -> GPUs), by code made for them."""
    if not any(counted.values()):
        return [Verdict("GPUs", SKIPPED, "no node has a GPU")]
    return [_judge_gpu(name, count, nodes[name]) for name, count in counted.items() if count and name in nodes]


def _judge_gpu(name: str, count: int, facts: NodeFacts) -> Verdict:
    check, gpu = f"GPUs of {name}", facts.gpu
    if gpu is None:
        return Verdict(check, FAILED, "torch wasn't asked")
    if gpu.error is not None:
        return Verdict(check, FAILED, f"CUDA doesn't compute: {gpu.error}",
                       "Check driver (nvidia-smi) and torch's CUDA")
    if gpu.cuda is None:
        return Verdict(check, FAILED, f"Ray counts {count}, and torch is a CPU build",
                       "Install torch's CUDA build there")
    if gpu.count != count:
        return Verdict(check, FAILED, f"Ray counts {count}, torch {gpu.count}",
                       "Start the node with its real --num-gpus; check the container's GPU access")
    strange = [f"sm_{major}{minor}" for major, minor in gpu.capabilities
               if not _made_for(major, minor, gpu.architectures)]
    if strange:
        return Verdict(check, WARNING, f"torch has no code for {', '.join(strange)}, only "
                       + " ".join(gpu.architectures), "Install a torch made for this GPU")
    return Verdict(check, OK, f"{count}, CUDA {gpu.cuda}, computed on each")


def _made_for(major: int, minor: int, architectures: Iterable[str]) -> bool:
    # code for sm_80 runs on 8.x from x = 0 on, and on no other major (CUDA C++ Programming Guide, binary compatibility)
    digits = ["".join(filter(str.isdigit, one)) for one in architectures if one.startswith("sm_")]
    return any((int(one[:-1]), int(one[-1]) <= minor) == (major, True) for one in digits)


def judge_skew(offsets_s: Mapping[str, tuple[float, float]]) -> Verdict:
    """How far clocks are from this machine's. Each is known to lie between two bounds in seconds, which differ by
    what the question took; what counts is the least that it can be."""
    least = {name: max(0.0, low, -high) for name, (low, high) in offsets_s.items()}
    if not least:
        return Verdict("clocks", SKIPPED, "no clock could be asked")
    worst = max(least, key=lambda name: least[name])
    found = f"{worst} is at least {least[worst]:.1f} s off this machine"
    if least[worst] >= SKEW_WARNING_S:
        return Verdict("clocks", FAILED if least[worst] >= SKEW_FAILED_S else WARNING, found,
                       "Run chrony or another NTP client there; S3 refuses 15 minutes")
    width = max(high - low for low, high in offsets_s.values())
    return Verdict("clocks", OK, f"{', '.join(least)}: no difference found, to within {width:.1f} s")


def offset_bounds(facts: NodeFacts, *, sent_s: float, received_s: float) -> tuple[float, float]:
    """Between which seconds a node's clock is ahead of ours, which sent the question and received the answer then."""
    return facts.ended_s - received_s, facts.began_s - sent_s


def judge_disk(name: str, facts: NodeFacts, *, object_store: int) -> Verdict:
    """Whether what overflows the object store has room on the node's disk."""
    check, used = f"disk of {name}", 1 - facts.spill_free / max(1, facts.spill_total)
    found = f"{facts.spill_free / GIB:.1f} GiB free in {facts.spill_folder}, {used:.0%} used"
    remedy = "Free the disk, or start the node with --object-spilling-directory on a larger one"
    if used > FULL_DISK:
        return Verdict(check, FAILED, f"{found}; Ray stops above {FULL_DISK:.0%}", remedy)
    if facts.spill_free < object_store:
        return Verdict(check, WARNING, f"{found}: less than the object store's {object_store / GIB:.1f} GiB", remedy)
    return Verdict(check, OK, found)


def judge_shm(name: str, facts: NodeFacts, *, object_store: int) -> Verdict:
    """Whether /dev/shm holds the object store; Ray puts a larger one on the disk, which works, and slowly."""
    check = f"/dev/shm of {name}"
    if facts.shm_total is None:
        return Verdict(check, SKIPPED, "there is none")
    found = f"{facts.shm_total / GIB:.1f} GiB, the object store has {object_store / GIB:.1f} GiB"
    if facts.shm_total < object_store:
        return Verdict(check, WARNING, f"{found}: Ray keeps it on the disk", "Give the container a larger --shm-size "
                       "(Kubernetes: emptyDir with medium Memory), or start Ray with less --object-store-memory")
    return Verdict(check, OK, found)


def is_loopback(address: str) -> bool:
    """Whether a host, or host:port, or URL is this machine's loopback alone."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def table(verdicts: Iterable[Verdict]) -> str:
    """The verdicts for people, aligned; a remedy on a line of its own."""
    verdicts = list(verdicts)
    width = max((len(one.check) for one in verdicts), default=0)
    lines = []
    for one in verdicts:
        lines.append(f"{one.verdict:<8} {one.check:<{width}}  {one.found}")
        if one.remedy and one.verdict != OK:
            lines.append(f"{'':<8} {'':<{width}}  -> {one.remedy}.")
    return "\n".join(lines)


def counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many of each."""
    found = Counter(one.verdict for one in verdicts)
    return {verdict: found[verdict] for verdict in (OK, WARNING, FAILED, SKIPPED)}


def _release(version: str | None) -> str | None:
    return version.partition("+")[0] if version else None


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"
