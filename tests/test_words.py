"""Numbers in sentences."""

from pipeline.words import clock, counted, ranked


def test_one_is_no_plural() -> None:
    assert [counted(number, "unit") for number in (0, 1, 2, 12_000)] == ["0 units", "1 unit", "2 units", "12,000 units"]


def test_the_commonest_comes_first_and_names_decide_between_equals() -> None:
    assert ranked({"empty": 1, "corrupt": 3, "changed": 1}) == "corrupt 3, changed 1, empty 1"
    assert ranked({"empty": 1, "corrupt": 3, "changed": 1}, 1) == "corrupt 3"


def test_a_clock_has_hours_minutes_and_seconds() -> None:
    assert [clock(seconds) for seconds in (0.4, 59.6, 3723, 360_000)] == ["0:00:00", "0:01:00", "1:02:03", "100:00:00"]
