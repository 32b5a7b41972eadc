"""How `annotate` tells people how far it is."""

import logging
import time

import pytest

from jobs import progress
from jobs.progress import Progress, RejectionBudget
from pipeline.errors import DataError
from pipeline.unit_annotator import COMMITTED, Receipt


def begun(units: int) -> Progress:
    return Progress(units, budget=RejectionBudget(10, 0.05), output="out")


def receipt(unit: int) -> Receipt:
    return Receipt(unit, COMMITTED, {"pictures": 1, "persons": 3, "computed": 3, "rejected": 0}, began=time.time())


def test_the_last_line_says_how_long_it_took(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    begun(1).add(receipt(0))
    line, = caplog.messages
    assert line.startswith("1 of 1 unit, 1 picture, ")
    assert line.endswith("0 rejected, done in 0:00:00")


def test_too_many_rejected_are_told_with_their_reasons_and_the_setting_that_allows_them() -> None:
    with pytest.raises(DataError, match=r"^1 picture rejected, more than the 0 of 10 that max_rejected_share allows; "
                                        r"commonest: missing 1\..*--set max_rejected_share=1\.$"):
        RejectionBudget(10, 0.05).check({"reasons": {"missing": 1}})


def test_on_the_way_it_says_what_is_left(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    caplog.set_level(logging.INFO)
    begun(3).add(receipt(0))
    assert "1 of 3 units" in caplog.text
    assert "left" in caplog.text


def test_where_no_unit_is_done_for_long_it_says_so(
        caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.05)
    caplog.set_level(logging.INFO)
    with begun(20).telling_of_silence():
        time.sleep(0.2)
    assert "0 of 20 units; no unit was done for 0:00:00" in caplog.text


def test_where_units_come_it_is_not_called_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with begun(20).telling_of_silence():
        pass
    assert caplog.messages == []
