"""The command line: `python -m jobs <job> [--config FILE.yaml ...] [--set a.b=value ...] [flags]`.

Nothing heavy is imported before the command has been found right. People read stderr, where workers' prints go too;
stdout gets one line at the end, a JSON object with what the job did. Exit code 0: done; 2: the command or its
configuration is wrong, and nothing was started; 1: it ran and failed; 130: Ctrl-C ended it.
"""

import argparse
import contextlib
import difflib
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from pydantic.fields import FieldInfo

from pipeline import config as settings
from pipeline import storage
from pipeline.errors import ConfigError, DataError, printable

INTERRUPTED = 130  # as a shell has it of a command that Ctrl-C ended


@dataclass(frozen=True)
class Job:
    """One command: its module in `jobs`, its settings, and the flags that everyone gives (name -> help text).

    repeatable  flags that may be given more than once
    """

    module: str
    settings: type[settings.Settings]
    summary: str
    flags: dict[str, str] = field(default_factory=dict)
    repeatable: tuple[str, ...] = ()


JOBS = {
    "shard": Job("shard", settings.ShardConfig, "pictures in a folder or bucket -> a shard dataset", {
        "images": "folder or s3://bucket/prefix that holds the pictures; or a list: .parquet, .csv, S3 Inventory's "
                  "manifest.json",
        "output": "where the shard dataset goes; one that is there gets what has changed as its next version",
        "annotations": "COCO keypoints JSON (optional)",
        "drop": "instead of --images: a file with keys to take out of the dataset, one on each line",
        "images-per-shard": "at most so many pictures in a shard",
        "include": "only names that match this pattern, such as '*.jpg'",
        "limit": "only the first N pictures, by name"}),
    "train": Job("train", settings.TrainConfig, "a shard dataset -> a model directory", {
        "data": "shard dataset to train on; repeatable: a URI or '{uri: URI, weight: 2}'; the first names the joints",
        "output": "where the model directory and its checkpoints go",
        "val": "shard dataset for the AP in the loop",
        "workers": "number of workers, or MIN:MAX",
        "register": "name to register the model under in MLflow",
        "promote": "alias, such as champion, that moves to the registered model if it deserves it"},
        repeatable=("data",)),
    "promote": Job("promote", settings.PromoteConfig, "a registered model behind an alias, if it deserves it", {
        "model": "registered version: models:/name/3 or models:/name@candidate",
        "alias": "alias to move",
        "data": "annotated shard dataset on which both models are measured"}),
    "annotate": Job("annotate", settings.AnnotateConfig, "pictures -> a keypoint dataset in Parquet", {
        "input": "shard dataset, prefix of pictures, or a Parquet/CSV list of URIs",
        "model": "model directory, runs:/... or models:/name@alias",
        "output": "where the keypoint dataset goes; the same command again continues there",
        "boxes": "annotated, whole-image, detect, or the URI of boxes: a COCO detections JSON, a Parquet file, or a "
                 "prefix of Parquet files",
        "detector": "for --boxes detect: an ONNX file with YOLOX's layout",
        "reuse": "an earlier output: what would come out the same is copied from it, not computed",
        "exclude": "a file with keys to leave out, one on each line",
        "limit": "only the first N pictures: a trial"}),
    "plan": Job("plan", settings.PlanConfig, "time, node hours and money before spending them", {
        "input": "as of annotate",
        "model": "as of annotate",
        "boxes": "as of annotate",
        "detector": "as of annotate",
        "reuse": "as of annotate: what would be copied is priced as copying",
        "exclude": "as of annotate",
        "price-per-node-hour": "what an hour of one node costs",
        "limit": "only the first N pictures"}),
    "status": Job("status", settings.StatusConfig, "how far a run is, from its output alone", {
        "output": "the --output of an annotate or shard run"}),
    "verify": Job("verify", settings.VerifyConfig, "whether a dataset is whole and right; names what isn't", {
        "data": "shard dataset or keypoint dataset to check: the --output of shard or annotate"}),
    "evaluate": Job("evaluate", settings.EvaluateConfig, "keypoints against annotations: the ten COCO numbers, PCK", {
        "keypoints": "keypoint dataset",
        "annotations": "COCO keypoints JSON with the truth"}),
    "export": Job("export", settings.ExportConfig, "keypoints in another tool's format", {
        "keypoints": "keypoint dataset",
        "to": "format: coco-results, coco-annotations, cvat, label-studio, fiftyone, yolo-pose",
        "output": "file to write; a .zip for cvat, label-studio and yolo-pose"}),
    "preview": Job("preview", settings.PreviewConfig, "one HTML page: sampled pictures with skeletons, histograms", {
        "keypoints": "keypoint dataset",
        "output": "folder for the page",
        "images": "where the pictures are now (default: where the dataset says)"}),
    "import-model": Job("import_model", settings.ImportModelConfig, "a public checkpoint -> a model directory", {
        "checkpoint": "file, URL, or name: mspn_50, 2xmspn_50, 3xmspn_50, 4xmspn_50, rsn_18, rsn_50, 2xrsn_50, "
                      "3xrsn_50, hrnet_w32, hrnet_w48",
        "output": "where the model directory goes",
        "register": "name to register the model under in MLflow"}),
    "demo": Job("demo", settings.DemoConfig, "the whole line, on pictures that it makes itself", {
        "output": "folder for everything",
        "data": "a folder like COCO's instead of made pictures"}),
}


def main(arguments: Sequence[str]) -> int:
    """Run one job; its exit code. See the module's text for what goes where."""
    with _stdout_for_the_result() as stdout:
        try:
            options = read_command(arguments)
            job = JOBS[options.job]
            flags = {_setting(flag): getattr(options, _setting(flag)) for flag in job.flags}
            config = settings.load_config(job.settings, files=options.config, assignments=options.set, flags=flags)
            if options.result:
                storage.normalise(options.result)  # refused now, and not after hours of work
            _log_to_stderr()
            # each broken picture's row says why; OpenCV's own lines would drown everything else
            os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
            result = importlib.import_module(f"jobs.{job.module}").run(config)
        except ConfigError as error:
            return _failed(2, error)
        except DataError as error:
            return _failed(1, error)
        except OSError as error:  # the store, the network, the disk: the message names the object
            return _failed(1, error)
        except KeyboardInterrupt:
            return _failed(INTERRUPTED, "interrupted; what is committed stays, and the same command goes on from there")
        return _report({"job": options.job} | result, stdout, options.result)


def read_command(arguments: Sequence[str]) -> argparse.Namespace:
    """The command's parts; what no job knows is refused (ConfigError) with what may have been meant."""
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        raise ConfigError(f"{options.job} doesn't know {unknown[0]!r}; {_meant(options.job, unknown[0])}")
    return options


def _meant(job: str, unknown: str) -> str:
    flag = unknown.lstrip("-").partition("=")[0]
    known = {name: f"--set {name}=VALUE" for name, _ in _settings_of(JOBS[job].settings)}
    known |= {_setting(name): f"--{name}" for name in (*JOBS[job].flags, "config", "set", "result")}
    if not unknown.startswith("-"):
        return "it belongs to no flag. What has spaces or a pattern in it needs quotes."
    nearest = difflib.get_close_matches(_setting(flag), known, n=1)
    return f"did you mean {known[nearest[0]]}?" if nearest else f"python -m jobs {job} --help lists what it knows."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs", description="Human-pose annotation as a batch system.",
        epilog="Each job: python -m jobs <job> --help.")
    jobs = parser.add_subparsers(dest="job", metavar="<job>", required=True)
    for name, job in JOBS.items():
        one = jobs.add_parser(name, help=job.summary, description=f"{name}: {job.summary}.",
                              formatter_class=argparse.RawDescriptionHelpFormatter,
                              epilog="settings (--set name=value, or in --config):\n" + _defaults(job.settings))
        fields = dict(_settings_of(job.settings))
        for flag, text in job.flags.items():
            about = fields.get(_setting(flag))  # `data` of train is a group
            one.add_argument(f"--{flag}", help=f"{text} (needed)" if about is None or about.is_required() else text,
                             metavar="N" if about and settings.is_number(about.annotation) else flag.upper(),
                             action="append" if flag in job.repeatable else "store")
        one.add_argument("--config", action="append", default=[], metavar="FILE.yaml",
                         help="settings from a file; repeatable, a later one changes what it names")
        one.add_argument("--set", action="append", default=[], metavar="a.b=value", help="one setting; repeatable")
        one.add_argument("--result", metavar="URI", help="write the result there too, as JSON")
    return parser


def _defaults(kind: type[settings.Settings]) -> str:
    lines = []
    for name, about in _settings_of(kind):
        default = "(needed)" if about.is_required() else f"= {json.dumps(about.default)}"
        told = "; ".join(filter(None, [settings.choices_of(about.annotation), about.description]))
        lines.append(f"  {name} {default}" + (f"  ({told})" if told else ""))
    return "\n".join(lines)


def _settings_of(kind: type[settings.Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Each setting's full name, and what is known of it; groups are opened."""
    for name, about in kind.model_fields.items():
        groups = settings.groups_of(about.annotation)
        for group in groups:
            yield from _settings_of(group, f"{prefix}{name}.")
        if not groups:
            yield prefix + (about.alias or name), about


def _setting(flag: str) -> str:
    return flag.replace("-", "_")


@contextlib.contextmanager
def _stdout_for_the_result() -> Iterator[TextIO]:
    """The real stdout, for one line at the end; until then whatever is printed, by workers too, goes to stderr."""
    if any(flag in sys.argv for flag in ("-h", "--help")):
        yield sys.stdout
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)
        yield stdout
        sys.stdout.flush()
        stdout.flush()
        os.dup2(stdout.fileno(), 1)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("botocore", "alembic", "mlflow", "ray"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Printable(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))


def _failed(code: int, error: Exception | str) -> int:
    print(printable(f"{'error' if code == 2 else 'failed'}: {error}"), file=sys.stderr)
    return code


def _report(result: dict[str, Any], stdout: TextIO, uri: str | None) -> int:
    """The result on stdout and at `uri`; the exit code."""
    line = json.dumps(result)
    print(line, file=stdout)
    try:
        if uri and not storage.put_if_absent(uri, line.encode()):
            print(f"warning: --result {uri}: there is an object of that name, which is never replaced.",
                  file=sys.stderr)
    except (ConfigError, OSError) as error:
        return _failed(1, f"{result['job']} is done, but --result can't be written: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
