"""What the rows of a shard dataset count up to, and whether the counts that an object gives are those.

Two forms are understood: the first datasets count what is no picture among `refused`, later ones as `not_pictures`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

COUNTED = ("rows", "pictures", "refused", "bytes", "persons", "trainable")  # numbers; `reasons` is beside them
NOT_A_PICTURE = "not_a_picture"
# Why a picture may have been refused
REASONS = ("missing", "changed", "unreadable_object", "empty", NOT_A_PICTURE, "unsupported_format", "too_large_bytes",
           "too_large_pixels", "truncated", "corrupt", "other_size", "bad_boxes", "decoder_crash")


def is_picture(row: Row) -> bool:
    """Whether the row (of a part that is checked) has the bytes of its object."""
    return row["num_bytes"] is not None


def count_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """What is so, in the form of the first datasets: what is no picture is among `refused` and `reasons`."""
    persons = [person for row in rows if is_picture(row) for person in row["persons"] or () if person]
    reasons = Counter(row["reason"] for row in rows if row["reason"] is not None)
    return {"rows": len(rows), "pictures": sum(map(is_picture, rows)), "refused": reasons.total(),
            "reasons": dict(reasons), "bytes": sum(row["num_bytes"] or 0 for row in rows),
            "persons": len(persons), "trainable": sum(map(_is_trainable, persons))}


def _is_trainable(person: Row) -> bool:
    return not person["iscrowd"] and any((visible or 0) > 0 for visible in (person["keypoints"] or ())[2::3])


def count_differences(said: Any, true: Mapping[str, Any]) -> str:
    """In what the counts that an object gives differ from those that are so, or nothing ("").

    Where `said` has `not_pictures`, these aren't among its `refused`. Counts of other names are not looked at.
    """
    if not isinstance(said, dict) or not isinstance(said.get("reasons"), dict):
        return f"no counts, but {said!r:.100}"
    reasons = {reason: count for reason, count in true["reasons"].items() if count}
    expected = {name: true[name] for name in COUNTED}
    if "not_pictures" in said:
        expected["not_pictures"] = reasons.get(NOT_A_PICTURE, 0)
        expected["refused"] -= expected["not_pictures"]
        if NOT_A_PICTURE not in said["reasons"]:
            reasons.pop(NOT_A_PICTURE, None)
    return differences(said, expected, reasons)


def differences(said: Mapping[str, Any], expected: Mapping[str, int], reasons: Mapping[str, int]) -> str:
    """In what `said` differs from these counts, and its `reasons` from those; none of a reason is as not naming it."""
    wrong = [f"{name} {said.get(name)} instead of {count}" for name, count in expected.items()
             if not _is(said.get(name), count)]
    named = {reason: count for reason, count in said["reasons"].items() if count}
    if named.keys() != reasons.keys() or not all(_is(named[reason], count) for reason, count in reasons.items()):
        wrong.append(f"reasons {said['reasons']} instead of {dict(reasons)}")
    return ", ".join(wrong)


def _is(said: Any, count: int) -> bool:
    return type(said) is int and said == count  # JSON's true is no 1, and 1.0 none either


def add_counts(said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of what parts say of themselves, in the form of `count_rows`; KeyError or TypeError: not counts."""
    reasons: Counter[str] = Counter()
    for counts in said:
        reasons.update(counts["reasons"])
        if "not_pictures" in counts:
            reasons[NOT_A_PICTURE] += counts["not_pictures"] - counts["reasons"].get(NOT_A_PICTURE, 0)
    total: dict[str, Any] = {name: sum(counts[name] for counts in said) for name in COUNTED}
    total["refused"] += sum(counts.get("not_pictures", 0) for counts in said)
    return total | {"reasons": dict(reasons)}
