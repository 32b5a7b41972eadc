"""Drawing, choosing and the page; and the job on a small dataset of made pictures."""

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from jobs.preview import run
from pipeline import shards, storage
from pipeline.config import PreviewConfig
from pipeline.drawing import COLOURS, contact_sheet, draw_persons, draw_picture, joint_side
from pipeline.errors import ConfigError, DataError
from pipeline.pose.skeleton import COCO17, Skeleton
from pipeline.preview import (
    Card,
    Page,
    Section,
    choose_pictures,
    mean_joint_scores,
    rejected_pictures,
    score_histogram,
    write_page,
)
from pipeline.rows import SHARD_SCHEMA
from tests.test_evaluation import TORSO3, keypoint_rows
from tests.test_export import picture, write_keypoints
from tests.worlds import NO_TRACKING

ARM = Skeleton("arm", ("left_wrist", "left_elbow", "right_wrist"), ((0, 1),), (), (0.1, 0.1, 0.1), (0, 1, 2))
GREY = np.full((100, 200, 3), 127, np.uint8)
HOSTILE = """<script>alert("1")</script>&'.jpg"""


def rows_with_scores(*scores: float):
    """Persons of one picture each, `0.jpg`, `1.jpg`, ..., with these scores."""
    return keypoint_rows([{"key": f"{index}.jpg", "person_index": 0, "score": score, "keypoints": [1.0, 2.0, 0.5] * 3}
                          for index, score in enumerate(scores)], TORSO3)


def page(*cards: Card, **more) -> Page:
    values = {
        "model": {"name": "mspn", "version": "3", "digest": "0123456789abcdef"},
        "counts": {"pictures": 3, "persons": 2, "no_person": 1, "rejected": 1, "reasons": {"corrupt": 1}},
        "skeleton_name": "arm", "joint_scores": (("left_wrist", 0.5), ("nose", None)),
        "histogram": ((1, 0, 2), 0.0, 1.5), "score_meaning": "", "rejected": (),
        "sections": (Section("Worst", "the lowest", cards),)}
    return Page(**(values | more))


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


# --- drawing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "side"), [
    ("left_wrist", "left"), ("RightElbow", "right"), ("nose", "middle"), ("l_knee", "left"), ("pelvis", "middle"),
    ("bright_spot", "middle"),
])  # fmt: skip
def test_a_joints_side_follows_from_its_name(name, side):
    assert joint_side(name) == side


def test_limbs_and_joints_have_the_colour_of_their_side():
    joints_xy = np.array([[[20.0, 50.0], [120.0, 50.0], [160.0, 80.0]]])

    drawn = draw_persons(GREY, joints_xy, np.ones((1, 3)), ARM)

    np.testing.assert_allclose(drawn[50, 70], COLOURS["left"], atol=30)  # the edges of a thin line are smoothed
    np.testing.assert_allclose(drawn[80, 160], COLOURS["right"], atol=30)


def test_a_joint_with_a_low_score_is_hollow_and_its_limb_faded():
    joints_xy = np.array([[[20.0, 50.0], [120.0, 50.0], [160.0, 80.0]]])

    drawn = draw_persons(GREY, joints_xy, np.array([[1.0, 0.55, 0.55]]), ARM)

    assert tuple(drawn[80, 160]) == (127, 127, 127)
    blue = int(drawn[50, 70, 0])
    assert 127 < blue < COLOURS["left"][0]


def test_drawing_leaves_the_picture_as_it_was_and_joints_that_do_not_exist_out():
    image = GREY.copy()

    drawn = draw_persons(image, np.array([[[20.0, 50.0], [np.nan, np.nan], [1e9, 1e9]]]), np.ones((1, 3)), ARM)

    assert (image == GREY).all()
    assert tuple(drawn[50, 20]) == COLOURS["left"]
    assert tuple(drawn[50, 70]) == (127, 127, 127)


def test_a_picture_without_persons_is_drawn_as_it_is():
    drawn = draw_persons(GREY, np.zeros((0, 3, 2)), np.zeros((0, 3)), ARM)
    assert (drawn == GREY).all()


def test_large_pictures_are_shrunk_and_the_joints_with_them():
    image = np.zeros((1440, 2880, 3), np.uint8)
    points = [400.0, 400.0, 1.0, 2400.0, 400.0, 1.0, 400.0, 1200.0, 1.0]
    table = keypoint_rows([{"person_index": 0, "score": 1.0, "keypoints": points}], ARM)

    drawn = draw_picture(image, table, ARM)

    assert drawn.shape == (360, 720, 3)
    assert tuple(drawn[100, 350]) == COLOURS["left"]


def test_a_contact_sheet_fits_each_picture_whole_into_its_tile():
    red = np.full((10, 40, 3), (0, 0, 255), np.uint8)

    sheet = contact_sheet([red] * 5, columns=4, tile_wh=(40, 20))

    assert sheet.shape == (40, 160, 3)
    assert tuple(sheet[10, 20]) == (0, 0, 255)
    assert tuple(sheet[2, 20]) == tuple(sheet[30, 100]) != (0, 0, 255)


# --- choosing --------------------------------------------------------------------------------------------


def test_worst_and_best_pictures_are_found_and_none_comes_twice():
    chosen = choose_pictures(rows_with_scores(0.5, 0.9, 0.1, 0.7, 0.3, 0.8), num_pictures=6, seed=0)

    assert [choice.key for choice in chosen["worst"]] == ["2.jpg", "4.jpg"]
    assert [choice.key for choice in chosen["best"]] == ["1.jpg", "5.jpg"]
    assert {choice.key for choice in chosen["random"]} == {"0.jpg", "3.jpg"}


def test_the_same_seed_chooses_the_same_pictures():
    table = rows_with_scores(*np.linspace(0.1, 1, 50))
    keys = [[choice.key for choice in choose_pictures(table, num_pictures=6, seed=seed)["random"]]
            for seed in (3, 3, 4)]
    assert keys[0] == keys[1] != keys[2]


def test_few_pictures_are_shown_once_each():
    chosen = choose_pictures(rows_with_scores(0.5, 0.9), num_pictures=24, seed=0)
    assert sum(len(choices) for choices in chosen.values()) == 2


def test_the_numbers_beside_the_pictures_are_those_of_the_rows():
    rejected = {"key": "x", "status": "rejected", "reason": "corrupt", "error": "bad"}
    table = keypoint_rows([{"score": 0.5, "keypoints": [0, 0, 0.4] * 3}, {"score": 1.0, "keypoints": [0, 0, 0.6] * 3},
                           rejected], TORSO3)

    assert dict(mean_joint_scores(table, TORSO3))["nose"] == pytest.approx(0.5)
    counts, low, high = score_histogram(table)
    assert (sum(counts), low, high) == (2, 0.0, 1.0)
    assert rejected_pictures(table) == (("x", "corrupt", "bad"),)


# --- the page --------------------------------------------------------------------------------------------


def test_hostile_names_stay_text():
    card = Card(HOSTILE, GREY, (0.5,), 0)
    missing = Card(HOSTILE, None, (0.5,), 0, note=HOSTILE)

    elements = Elements(write_page(page(
        card, missing, model={"name": HOSTILE, "version": HOSTILE, "digest": HOSTILE}, skeleton_name=HOSTILE,
        joint_scores=((HOSTILE, 0.5),), score_meaning=HOSTILE, rejected=((HOSTILE, HOSTILE, HOSTILE),),
        counts={"pictures": 1, "persons": 1, "no_person": 0, "rejected": 2, "reasons": {HOSTILE: 1}})))

    assert "script" not in {tag for tag, _ in elements.tags}
    assert elements.text.count(HOSTILE) >= 9
    assert [attributes["alt"] for tag, attributes in elements.tags if tag == "img"] == [HOSTILE]


def test_the_page_holds_everything_in_itself():
    html = write_page(page(Card("a.jpg", GREY, (0.5,), 0)))

    links = [value for _, attributes in Elements(html).tags for name, value in attributes.items()
             if name in ("src", "href", "srcset")]
    assert len(links) == 1
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert not re.search(r"url\(|@import|https?:", html)
    assert "default-src 'none'" in html


def test_the_page_says_model_counts_scores_and_reasons():
    card = Card("street/a.jpg", None, (0.51, 1.25), 1, note="it was deleted")

    text = Elements(write_page(page(card, rejected=(("b.jpg", "corrupt", "no end"),)))).text

    for expected in ("mspn version 3", "0123456789ab", "street/a.jpg", "0: 0.51", "1: 1.25", "it was deleted",
                     "corrupt: 1", "b.jpg", "no end", "left_wrist", "0.50"):
        assert expected in text


def test_a_crowds_scores_are_counted_and_the_chosen_one_is_shown():
    text = Elements(write_page(page(Card("a.jpg", None, (0.5,) * 29 + (0.99,), 29)))).text

    assert "29: 0.99" in text
    assert "and 17 more" in text


# --- the job ---------------------------------------------------------------------------------------------


def png(shade: int) -> bytes:
    return bytes(cv2.imencode(".png", np.full((10, 20, 3), shade, np.uint8))[1])


def annotated(key: str, data: bytes):
    return picture(key, 1, scores=(0.5,), sha256=hashlib.sha256(data).hexdigest())


def preview(tmp_path: Path, keys: str, **more) -> tuple[dict, str]:
    result = run(PreviewConfig(keypoints=keys, output=str(tmp_path / "preview"), pictures=6,
                               tracking=NO_TRACKING, **more))
    return result, Path(result["output"]).read_text()


def test_pictures_under_a_prefix_are_drawn_and_a_changed_or_missing_one_says_so(tmp_path):
    for name, shade in (("a.png", 10), ("b.png", 20)):
        storage.put_if_absent(f"{tmp_path}/pictures/{name}", png(shade))
    keys = write_keypoints(tmp_path / "keypoints", [annotated("a.png", png(10)), annotated("b.png", png(99)),
                                                    annotated("c.png", png(0)), picture("d.png", 4)],
                           source={"kind": "prefix", "uri": f"{tmp_path}/pictures"})

    result, html = preview(tmp_path, keys)

    assert (result["pictures"], result["not_readable"]) == (1, 2)
    assert "SHA-256 differs" in html
    assert "there is no such file" in html
    assert cv2.imread(result["contact_sheet"]).shape == (240, 1280, 3)


def test_pictures_of_a_shard_dataset_are_found_in_their_parts(tmp_path):
    parts = []
    for number, name in enumerate(("a.png", "b.png")):
        row = dict.fromkeys(SHARD_SCHEMA.names)
        data = shards.part_bytes([row | {"key": name, "bytes": png(number), "size": len(png(number))}])
        parts.append(shards.ShardPart(f"part-{number}.parquet", hashlib.sha256(data).hexdigest(), {}))
        storage.put_if_absent(f"{tmp_path}/shards/shards/{parts[-1].name}", data)
    storage.put_if_absent(f"{tmp_path}/shards/{shards.version_name(1)}",
                          shards.dataset_json(parts, version=1, skeleton=None, source={}, counts={}))
    keys = write_keypoints(tmp_path / "keypoints", [annotated("a.png", png(0)), annotated("b.png", png(1))],
                           source={"kind": "shards", "uri": f"{tmp_path}/shards", "version": 1})

    result, _ = preview(tmp_path, keys)

    assert (result["pictures"], result["not_readable"]) == (2, 0)


def test_pictures_that_moved_are_found_by_images(tmp_path):
    storage.put_if_absent(f"{tmp_path}/moved/a.png", png(10))
    keys = write_keypoints(tmp_path / "keypoints", [annotated("a.png", png(10))],
                           source={"kind": "prefix", "uri": f"{tmp_path}/gone"})

    with pytest.raises(DataError, match="--images"):
        preview(tmp_path, keys)
    result, _ = preview(tmp_path, keys, images=f"{tmp_path}/moved")

    assert result["pictures"] == 1


def test_an_existing_page_is_refused(tmp_path):
    (tmp_path / "preview").mkdir()
    (tmp_path / "preview" / "index.html").write_text("mine")
    keys = write_keypoints(tmp_path / "keypoints", [picture("a.png", 1)])

    with pytest.raises(ConfigError, match="another --output"):
        preview(tmp_path, keys)


def test_the_colours_are_the_same_for_every_skeleton():
    assert {joint_side(name) for name in COCO17.joints} == set(COLOURS)
