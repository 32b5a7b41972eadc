"""One pass over a keypoint dataset: what is counted and chosen follows from rows and seed, not from their division."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from pipeline import keypoints
from pipeline.errors import DataError
from pipeline.preview.histogram import ScoreHistograms
from pipeline.preview.strata import QUARTERS, TURN, Candidate, Lowest, deal, quarters
from pipeline.preview.survey import Survey
from tests.test_evaluation import TORSO3, keypoint_rows
from tests.test_export import picture, write_keypoints


def rows_of(pictures: dict[str, list[float]]) -> pa.Table:
    """Rows of these pictures' persons, by their scores; a picture without any keeps one row."""
    found = [{"key": key, "person_index": index, "score": score, "keypoints": [1.0, 2.0, score] * 3}
             for key, scores in pictures.items() for index, score in enumerate(scores)]
    empty = [{"key": key, "status": "no_person"} for key, scores in pictures.items() if not scores]
    return keypoint_rows(found + empty, TORSO3).sort_by([("key", "ascending"), ("person_index", "ascending")])


def refused_rows(reasons: dict[str, str]) -> pa.Table:
    return keypoint_rows([{"key": key, "status": "rejected", "reason": reason} for key, reason in reasons.items()],
                         TORSO3)


def surveyed(*parts: pa.Table, num_pictures: int = 12, seed: int = 0) -> Survey:
    survey = Survey(TORSO3, num_pictures=num_pictures, seed=seed)
    for number, rows in enumerate(parts):
        survey.add(f"part-{number}", rows.select(survey.columns))
    return survey


def chosen(survey: Survey, number: int = 12) -> dict[str, list[tuple[str, int]]]:
    return {name: [(one.key, one.person_index) for one in own] for name, own in deal(survey.strata(), number).items()}


def crowd(number: int) -> dict[str, list[float]]:
    """So many pictures with 0 to 11 persons."""
    random = np.random.default_rng(0)
    return {f"{key:04d}.jpg": random.uniform(0.3, 1.3, key % 12).tolist() for key in range(number)}


# --- the pass --------------------------------------------------------------------------------------------


def test_what_is_chosen_and_counted_depends_neither_on_the_parts_sizes_nor_on_their_order():
    pictures = crowd(60)
    names = list(pictures)
    some, others = ({name: pictures[name] for name in own} for own in (names[:20], names[20:]))
    whole, divided = surveyed(rows_of(pictures)), surveyed(rows_of(others), rows_of(some))

    assert chosen(whole) == chosen(divided)
    assert whole.persons_per_picture == divided.persons_per_picture
    for one, other in ((whole.person_scores, divided.person_scores), (whole.joint_scores, divided.joint_scores)):
        assert one.bins().low == other.bins().low
        np.testing.assert_array_equal(one.bins().counts, other.bins().counts)


def test_another_seed_draws_other_pictures_but_the_worst_stay():
    rows = rows_of(crowd(60))
    first, second = chosen(surveyed(rows)), chosen(surveyed(rows, seed=1))
    assert first["random"] != second["random"]
    assert first["worst"][0] == second["worst"][0]


def test_no_picture_comes_twice_and_no_more_than_asked_for():
    keys = [key for own in chosen(surveyed(rows_of(crowd(60))), 12).values() for key, _ in own]
    assert len(set(keys)) == len(keys) == 12


def test_the_worst_and_the_best_person_of_all_are_found():
    survey = surveyed(rows_of({"a": [0.5, 0.2], "b": [0.9], "c": [0.1, 0.7]}), rows_of({"d": [0.6, 1.4]}))
    strata = survey.strata()
    assert [(one.key, one.person_index, one.part) for one in strata["worst"]] == [
        ("c", 0, "part-0"), ("a", 1, "part-0"), ("d", 0, "part-1"), ("b", 0, "part-0")]
    assert [(one.key, one.person_index) for one in strata["best"]][:2] == [("d", 1), ("b", 0)]


def test_pictures_are_grouped_by_how_many_persons_they_have():
    survey = surveyed(rows_of({name: [0.5] * count for name, count in
                               (("none", 0), ("one", 1), ("three", 3), ("nine", 9), ("ten", 10))}))
    strata = survey.strata()
    groups = [[one.key for one in strata[name]] for name in
              ("nobody", "1 person", "2-3 persons", "4-9 persons", "10 or more")]
    assert groups == [["none"], ["one"], ["three"], ["nine"], ["ten"]]
    assert survey.persons_per_picture == {0: 1, 1: 1, 3: 1, 9: 1, 10: 1}


def test_a_few_of_each_reason_are_kept_and_count_as_no_picture_with_persons():
    survey = surveyed(refused_rows({**{f"{number}.jpg": "corrupt" for number in range(5)}, "x.txt": "not_a_picture"}))
    assert {reason: len(own) for reason, own in survey.rejected().items()} == {"corrupt": 3, "not_a_picture": 1}
    assert not survey.persons_per_picture


def test_a_person_without_a_score_is_refused():
    rows = keypoint_rows([{"key": "a.jpg", "person_index": 0, "keypoints": [0, 0, 0.5] * 3}], TORSO3)
    with pytest.raises(DataError, match="score"):
        surveyed(rows)


def test_quarters_are_those_of_all_persons_within_a_few_hundredths():
    # a uniform distribution's quarters are at 0.25, 0.5 and 0.75; 2000 of 8000 persons are drawn
    scores = np.random.default_rng(0).uniform(0, 1, 8000)
    rows = pa.table({"key": [f"{number // 8:04d}" for number in range(8000)], "status": ["ok"] * 8000,
                     "reason": pa.nulls(8000, pa.string()), "person_index": np.arange(8000) % 8, "score": scores,
                     **{f"{joint}_score": scores for joint in TORSO3.joints}})
    strata = surveyed(rows).strata()
    for number, name in enumerate(QUARTERS):
        own = [one.score for one in strata[name]]
        assert min(own) == pytest.approx(number / 4, abs=0.04)
        assert max(own) == pytest.approx((number + 1) / 4, abs=0.04)


# --- choosing --------------------------------------------------------------------------------------------


def candidates(*keys: str) -> tuple[Candidate, ...]:
    return tuple(Candidate(rank, key, 0, "part") for rank, key in enumerate(keys))


def test_pictures_are_dealt_in_turns_and_who_has_none_left_is_passed_over():
    dealt = deal({"worst": candidates("a", "b", "c"), "random": candidates("a", "d", "e"), "best": candidates("a")}, 4)
    assert {name: [one.key for one in own] for name, own in dealt.items()} == {
        "worst": ["a", "b"], "random": ["d", "e"], "best": []}


def test_a_turn_has_each_stratum_and_the_worst_and_chance_twice():
    assert len(TURN) == 14
    assert TURN.count("worst") == TURN.count("random") == 2


def test_few_pictures_are_shown_once_each():
    assert sum(map(len, chosen(surveyed(rows_of({"a": [0.5], "b": [0.9]}))).values())) == 2


def test_the_lowest_are_kept_whatever_the_order_in_which_they_come():
    ranks = np.array([5.0, 1.0, 3.0, 3.0, 2.0])
    for order in itertools.permutations(range(5)):
        lowest = Lowest(3)
        for number in order:
            lowest.offer(ranks[[number]], lambda _, number=number: Candidate(ranks[number], f"{number}", 0, "part"))
        assert [one.key for one in lowest.candidates] == ["1", "4", "2"]


def test_four_persons_are_a_quarter_each():
    people = tuple(Candidate(0.0, str(score), 0, "part", score) for score in (0.4, 0.1, 0.3, 0.2))
    assert [[one.score for one in own] for own in quarters(people).values()] == [[0.1], [0.2], [0.3], [0.4]]


# --- histograms ------------------------------------------------------------------------------------------


def test_bins_hold_every_value_and_have_round_edges():
    scores = ScoreHistograms(2)
    scores.add(np.array([[0.505, 1.245], [0.515, np.nan], [0.995, 0.505]]))
    bins = scores.bins()
    assert (round(bins.low, 9), round(bins.high, 9)) == (0.5, 1.25)
    assert bins.counts.sum(axis=1).tolist() == [3, 2]
    assert bins.counts.shape[1] == 15
    assert scores.means() == pytest.approx((2.015 / 3, 0.875))


def test_the_share_of_low_scores_is_counted():
    scores = ScoreHistograms(1)
    scores.add(np.array([[0.5], [0.69], [0.71], [1.2]]))
    assert scores.share_below(0.7) == (0.5,)


def test_without_values_there_is_nothing_to_show():
    scores = ScoreHistograms(1)
    assert (scores.means(), scores.share_below(0.7)) == ((None,), (None,))
    assert scores.bins().counts.sum() == 0


def test_equal_values_are_one_bar_among_ten_bins():
    scores = ScoreHistograms(1)
    scores.add(np.array([[0.505]] * 3))
    assert sorted(scores.bins().counts[0].tolist()) == [0] * 9 + [3]
    assert scores.bins().low < 0.505 < scores.bins().high


@pytest.mark.parametrize("far", [1e3, -1e3, 1e6, -5.0, 10.235])
def test_values_far_out_make_bins_wider_in_any_order(far):
    values = np.array([*np.random.default_rng(0).uniform(-1, 2, 50), far])[:, None]
    first, last = ScoreHistograms(1), ScoreHistograms(1)
    for value in values:
        first.add(value[None])
    last.add(values[::-1])
    assert first.bins().counts.sum() == 51
    assert (first.bins().low, first.bins().high) == (last.bins().low, last.bins().high)
    np.testing.assert_array_equal(first.bins().counts, last.bins().counts)
    assert first.bins().low <= values.min()
    assert first.bins().high > values.max()


# --- reading ---------------------------------------------------------------------------------------------


def test_parts_are_read_by_the_columns_that_count_and_their_own_counts_are_given(tmp_path):
    uri = write_keypoints(tmp_path, [picture("a.jpg", 1, scores=(0.5, 1.0)), picture("b.jpg", 2)])
    parts = keypoints.open_keypoints(uri)
    columns = Survey(parts.metadata.skeleton, num_pictures=1, seed=0).columns

    [(name, counts, rows)] = keypoints.read_parts(parts, parts.names, columns)

    assert name == parts.names[0]
    assert (counts["pictures"], counts["persons"], rows.num_rows) == (2, 2, 3)
    assert rows.column_names == columns
    assert not {"error", "etag", "sha256", "nose_x"} & set(columns)


def test_a_damaged_part_is_named(tmp_path):
    uri = write_keypoints(tmp_path, [picture("a.jpg", 1)])
    part = next((tmp_path / "keypoints").iterdir())
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(DataError, match=part.name):
        keypoints.open_keypoints(uri)
