"""The preview's page, and the job on small datasets of made pictures."""

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
from pipeline.errors import ConfigError, DataError, ObjectMissing
from pipeline.preview.histogram import ScoreHistograms
from pipeline.preview.page import Card, Page, Section, write_page
from pipeline.preview.panels import group_pictures
from pipeline.preview.pictures import fetch_pictures
from pipeline.rows import SHARD_SCHEMA, AnnotatedPicture
from tests.test_export import picture, write_keypoints
from tests.worlds import NO_TRACKING

GREY = np.full((100, 200, 3), 127, np.uint8)
HOSTILE = """<script>alert("1")</script>&'.jpg"""


def histograms(*values: float) -> ScoreHistograms:
    """One histogram for each column, of these values alone."""
    found = ScoreHistograms(len(values))
    found.add(np.array([values]))
    return found


def page(*cards: Card, **more) -> Page:
    values = {
        "model": {"name": "mspn", "version": "3", "digest": "0123456789abcdef"},
        "counts": {"pictures": 3, "persons": 2, "no_person": 1, "rejected": 1, "reasons": {"corrupt": 1}},
        "skeleton_name": "arm", "joints": ("left_wrist", "nose"), "joint_scores": histograms(0.5, np.nan),
        "person_scores": histograms(0.5), "persons_per_picture": {0: 1, 1: 2}, "score_meaning": "", "low_score": 0.7,
        "sections": (Section("By score", "from the lowest on", cards),)}
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


# --- the page --------------------------------------------------------------------------------------------


def test_hostile_names_stay_text():
    card = Card(HOSTILE, HOSTILE, GREY, (0.5,), 0)
    missing = Card(HOSTILE, HOSTILE, None, (0.5,), 0, note=HOSTILE)
    refused = Card(HOSTILE, HOSTILE, None, note=HOSTILE, rejected=True)

    elements = Elements(write_page(page(
        card, missing, refused, model={"name": HOSTILE, "version": HOSTILE, "digest": HOSTILE}, skeleton_name=HOSTILE,
        joints=(HOSTILE, "nose"), score_meaning=HOSTILE,
        counts={"pictures": 1, "persons": 1, "no_person": 0, "rejected": 2, "reasons": {HOSTILE: 1}})))

    assert "script" not in {tag for tag, _ in elements.tags}
    assert elements.text.count(HOSTILE) >= 13
    assert [attributes["alt"] for tag, attributes in elements.tags if tag == "img"] == [HOSTILE]


def test_the_page_holds_everything_in_itself():
    html = write_page(page(Card("a.jpg", "worst", GREY, (0.5,), 0)))

    tags = Elements(html).tags
    links = [value for _, attributes in tags for name, value in attributes.items() if name in ("src", "srcset")]
    assert [attributes["href"] for tag, attributes in tags if tag == "a"] == ["#section-0"]
    assert len(links) == 1
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert not re.search(r"url\(|@import|https?:", html)
    assert "default-src 'none'" in html


def test_the_page_says_model_counts_scores_and_reasons():
    gone = Card("street/a.jpg", "worst", None, (0.51, 1.25), 1, note="it was deleted")
    refused = Card("b.jpg", "corrupt", None, note="no end", rejected=True)

    text = Elements(write_page(page(gone, refused, persons_per_picture={0: 7, 2: 1234}))).text

    for expected in ("mspn version 3", "0123456789ab", "street/a.jpg", "0: 0.51", "1: 1.25", "it was deleted",
                     "corrupt", "the data contradicts its own format", "b.jpg", "no end", "left_wrist",
                     "0.50 · 100 % low", "1,234"):
        assert expected in text


def test_bars_go_to_the_largest_crowd():
    assert group_pictures({}) == [("0", 0)]
    assert group_pictures({0: 5, 2: 1}) == [("0", 5), ("1", 0), ("2", 1)]
    assert group_pictures({1: 4, 12: 2, 19: 1, 20: 3})[-2:] == [("10 to 19", 3), ("20 to 49", 3)]
    assert group_pictures({250: 1})[-1] == ("100 to 250", 1)


def test_a_long_message_is_cut():
    html = write_page(page(Card("a.jpg", "corrupt", None, note="x" * 5000, rejected=True)))
    assert "x" * 300 + "..." in html
    assert "x" * 301 not in html


def test_a_crowds_scores_are_counted_and_the_chosen_one_is_shown():
    text = Elements(write_page(page(Card("a.jpg", "worst", None, (0.5,) * 29 + (0.99,), 29)))).text

    assert "29: 0.99" in text
    assert "and 17 more" in text


# --- the job ---------------------------------------------------------------------------------------------


def refused(key: str, reason: str, sha256: str | None = None) -> AnnotatedPicture:
    about = {"key": key, "image_id": None, "etag": "e", "sha256": sha256, "width": None, "height": None}
    return AnnotatedPicture(about, "rejected", reason, f"{key}: it is {reason}")


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

    assert (result["pictures"], result["not_readable"]) == (1, 3)
    assert result["complete"] is False  # there is no _SUCCESS
    assert "SHA-256 differs" in html
    assert "there is no such file" in html
    assert cv2.imread(result["contact_sheet"]).shape == (240, 1280, 3)


def test_a_preview_that_was_ended_before_its_page_is_made_again_and_a_whole_one_is_refused(tmp_path):
    storage.put_if_absent(f"{tmp_path}/pictures/a.png", png(10))
    keys = write_keypoints(tmp_path / "keypoints", [annotated("a.png", png(10))],
                           source={"kind": "prefix", "uri": f"{tmp_path}/pictures"})
    result, html = preview(tmp_path, keys)
    Path(result["output"]).unlink()

    assert preview(tmp_path, keys) == (result, html)
    with pytest.raises(ConfigError, match=r"index\.html is there already"):
        preview(tmp_path, keys)


def test_a_shard_dataset_that_is_gone_is_asked_for(tmp_path):
    keys = write_keypoints(tmp_path / "keypoints", [annotated("a.png", png(10))],
                           source={"kind": "shards", "uri": f"{tmp_path}/gone", "version": 1})
    with pytest.raises(DataError, match=r"gone: the shard dataset that was annotated isn't there any more\. Give --im"):
        preview(tmp_path, keys)


def write_shards(output: Path, rows: list[dict], source: dict) -> None:
    """A shard dataset of one part for each row."""
    parts = []
    for number, row in enumerate(rows):
        data = shards.part_bytes([row])
        parts.append(shards.ShardPart(f"part-{number}.parquet", hashlib.sha256(data).hexdigest(), {}))
        storage.put_if_absent(f"{output}/shards/{parts[-1].name}", data)
    storage.put_if_absent(f"{output}/{shards.version_name(1)}",
                          shards.dataset_json(parts, version=1, skeleton=None, source=source, counts={}))


def test_pictures_of_a_shard_dataset_are_found_in_their_parts(tmp_path):
    rows = [dict.fromkeys(SHARD_SCHEMA.names) | {"key": name, "bytes": png(number), "size": len(png(number))}
            for number, name in enumerate(("a.png", "b.png"))]
    write_shards(tmp_path / "shards", rows, source={})
    keys = write_keypoints(tmp_path / "keypoints", [annotated("a.png", png(0)), annotated("b.png", png(1))],
                           source={"kind": "shards", "uri": f"{tmp_path}/shards", "version": 1})

    result, _ = preview(tmp_path, keys)

    assert (result["pictures"], result["not_readable"]) == (2, 0)


def test_rejected_pictures_are_shown_with_their_reason_where_they_can_still_be_read(tmp_path):
    for name, data in (("a.png", png(10)), ("sized.png", png(20)), ("text.png", b"text")):
        storage.put_if_absent(f"{tmp_path}/pictures/{name}", data)
    rejects = [refused("sized.png", "other_size"), refused("text.png", "not_a_picture"), refused("gone.png", "missing")]
    keys = write_keypoints(tmp_path / "keypoints", [annotated("a.png", png(10)), *rejects],
                           source={"kind": "prefix", "uri": f"{tmp_path}/pictures"})

    result, html = preview(tmp_path, keys)

    assert (result["pictures"], result["rejected"]) == (1, 3)
    elements = Elements(html)
    assert [attributes["alt"] for tag, attributes in elements.tags if tag == "img"] == ["a.png", "sized.png"]
    for key, reason in (("sized.png", "other_size"), ("text.png", "not_a_picture"), ("gone.png", "missing")):
        assert f"{key}: it is {reason}" in elements.text


def test_three_pictures_of_each_reason_are_shown_and_all_are_counted(tmp_path):
    rejects = [refused(f"{number}.png", "missing") for number in range(9)] + [refused("x.png", "changed")]
    keys = write_keypoints(tmp_path / "keypoints", rejects)

    result, html = preview(tmp_path, keys)

    assert result["rejected"] == 4
    assert re.search(r"<dt>missing</dt>.*?>9<", html)


def test_what_a_shard_dataset_refused_is_looked_for_where_it_came_from(tmp_path):
    storage.put_if_absent(f"{tmp_path}/pictures/a.png", png(7))
    row = dict.fromkeys(SHARD_SCHEMA.names) | {"key": "a.png", "size": 1, "reason": "other_size"}
    write_shards(tmp_path / "shards", [row], source={"images": f"{tmp_path}/pictures"})

    fetched = dict(fetch_pictures({"kind": "shards", "uri": f"{tmp_path}/shards", "version": 1}, ["a.png", "b.png"]))

    assert fetched["a.png"] == png(7)
    assert isinstance(fetched["b.png"], ObjectMissing)


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
