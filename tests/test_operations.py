"""docs/operations.md: its commands are commands, and what it names is there."""

import json
import re
import shlex
from pathlib import Path

import pytest

from jobs.__main__ import JOBS, _parser, _setting
from pipeline import config

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text()


def commands() -> list[list[str]]:
    """The commands of the page's code, as a shell would split them."""
    code = "\n".join(line.strip() for line in PAGE.splitlines() if line.startswith("    "))
    return [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]


JOB_COMMANDS = [words[words.index("jobs") + 1:] for words in commands()
                if "python -m jobs" in " ".join(words)]


def test_the_page_has_the_whole_line() -> None:
    assert [words[0] for words in JOB_COMMANDS] == ["shard", "train", "plan", "annotate"]


@pytest.mark.parametrize("words", JOB_COMMANDS, ids=lambda words: words[0])
def test_our_command_line_takes_each_command(words: list[str]) -> None:
    options = _parser().parse_args(words)
    job = JOBS[options.job]
    flags = {_setting(flag): getattr(options, _setting(flag)) for flag in job.flags}
    config.load_config(job.settings, files=options.config, assignments=options.set, flags=flags)


def test_the_rights_that_it_gives_are_there_and_what_it_replaces_stands_in_them() -> None:
    named = {Path(path) for path in re.findall(r"cluster/iam/\w+\.json", PAGE)}
    assert {path.name for path in named} == {"trust.json", "worker.json", "head.json"}
    text = "".join((ROOT / path).read_text() for path in named)
    assert all(word in text for word in ("PICTURES", "OUTPUT", "ACCOUNT"))
    replaced = re.sub("PICTURES|OUTPUT|ACCOUNT", "x", text)
    assert all(json.loads((ROOT / path).read_text()) for path in named)
    assert not re.findall(r":::?[A-Z]{3,}", replaced)


def test_what_it_points_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
