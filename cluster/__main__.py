"""The command line: `python -m cluster preflight [--address ADDRESS] [--input URI ...] [--output URI ...]`, and others.

As with `python -m jobs`: people read stderr; stdout gets one JSON object as its last line. Exit code 0: nothing failed;
1: something did; 2: the command is wrong.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from pipeline.errors import ConfigError

NODE_TIMEOUT_S = 60


def main(arguments: Sequence[str]) -> int:
    """Run one command; its exit code."""
    if arguments[:1] == ["hosts"]:  # its own options, and a command's after them
        from cluster import hosts

        return hosts.main(arguments[1:])
    options = _parser().parse_args(arguments)
    if options.command == "spot-watch":
        from cluster import spot_watch

        return spot_watch.watch()
    return _preflight(options)


def _preflight(options: argparse.Namespace) -> int:
    from cluster import verdicts  # Ray and torch take seconds: not for --help
    from cluster.preflight import preflight

    try:
        found = preflight(options.address, options.inputs, options.outputs, allow_open=options.allow_open,
                          timeout_s=options.timeout)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(verdicts.table(found), file=sys.stderr)
    numbers = verdicts.counts(found)
    print(json.dumps({"counts": numbers, "verdicts": [dataclasses.asdict(one) for one in found]}))
    return 1 if numbers[verdicts.FAILED] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster", description="Where the jobs run.")
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    one = commands.add_parser("preflight", help="whether a cluster is ready, before anything is submitted")
    one.add_argument("--address", help="the cluster's address or the dashboard's http:// one (default: RAY_ADDRESS)")
    one.add_argument("--input", "--data", action="append", default=[], dest="inputs", metavar="URI",
                     help="what jobs will read; repeatable")
    one.add_argument("--output", action="append", default=[], dest="outputs", metavar="URI",
                     help="where jobs will write; repeatable")
    one.add_argument("--allow-open", action="store_true",
                     help="a cluster beyond loopback without tokens is a warning, not a failure")
    one.add_argument("--timeout", type=float, default=NODE_TIMEOUT_S, metavar="SECONDS",
                     help="for the connection, and for all nodes together (default %(default)s)")
    commands.add_parser("hosts", help="a cluster of several hosts on this machine, to try things on", add_help=False)
    commands.add_parser("spot-watch", help="on a spot machine of AWS: tell Ray before AWS takes the machine away")
    return parser


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a check that timed out still waits in its thread, and must not hold up the exit
