"""One HTML page to judge a keypoint dataset by eye: numbers and drawn pictures in, text out.

The page holds everything in itself, loads nothing and runs no script.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from pipeline.drawing import COLOURS, Image, jpeg_bytes
from pipeline.preview import panels
from pipeline.preview.histogram import ScoreHistograms
from pipeline.preview.style import CSS

MAX_CHIPS = 12  # scores under a picture; a crowd's others are counted
MAX_NOTE = 300  # characters of a message
# the browser holds the page to it: nothing is loaded, no script runs
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Card:
    """One picture of the page.

    label      why it is here, in a word or two
    image_bgr  with its skeletons drawn; None: it can't be had, see `note`
    scores     of its persons, by person_index
    chosen     the person on whose account it is here, if it is one person's
    note       what there is to say: why it was rejected, why it can't be shown
    """

    key: str
    label: str
    image_bgr: Image | None
    scores: tuple[float, ...] = ()
    chosen: int | None = None
    note: str = ""
    rejected: bool = False


@dataclass(frozen=True)
class Section:
    """Cards under a heading, with a sentence on how they were chosen."""

    name: str
    about: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Page:
    """Everything that the page says.

    model                name, version, digest
    counts               pictures, persons, ok, no_person, rejected, reasons
    joints               their names, in the order of `joint_scores`
    persons_per_picture  number of persons -> how many pictures have so many
    low_score            a joint with less is low
    """

    model: dict[str, Any]
    counts: dict[str, Any]
    skeleton_name: str
    joints: tuple[str, ...]
    person_scores: ScoreHistograms
    joint_scores: ScoreHistograms
    persons_per_picture: Mapping[int, int]
    score_meaning: str
    low_score: float
    sections: tuple[Section, ...]


def write_page(page: Page) -> str:
    """The whole HTML page: one file, pictures inside, no script, nothing loaded, all names escaped."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>Keypoints: {escape(_model_name(page.model))}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{_header(page)}
{panels.tiles(page.counts)}
<div class="panels">
{panels.person_scores(page.person_scores, page.score_meaning)}
{panels.persons_per_picture(page.persons_per_picture)}
{panels.reasons(page.counts.get("reasons", {}))}
</div>
{panels.joint_scores(page.joints, page.joint_scores, page.low_score)}
{"".join(_section(number, section) for number, section in enumerate(page.sections) if section.cards)}
</main>
</body>
</html>
"""


def _model_name(model: dict[str, Any]) -> str:
    version = f" version {model['version']}" if model.get("version") else ""
    return f"{model.get('name') or 'model'}{version}"


def _header(page: Page) -> str:
    digest = str(page.model.get("digest") or "")
    swatches = "".join(
        f'<span><span class="dot" style="background: rgb({r}, {g}, {b})"></span>{side}</span>'
        for side, (b, g, r) in COLOURS.items())
    links = "".join(f'<a href="#section-{number}">{escape(section.name)}</a>'
                    for number, section in enumerate(page.sections) if section.cards)
    return f"""<h1>{escape(_model_name(page.model))}</h1>
<p class="quiet">skeleton {escape(page.skeleton_name)} · model digest
<code title="{escape(digest)}">{escape(digest[:12])}</code></p>
<p class="legend quiet">{swatches}<span>hollow and faded: joint score below {page.low_score}</span>
<span>box: the person on whose account the picture is here</span>
<span>click a picture, or press Space on it, to enlarge it</span></p>
<nav aria-label="pictures">{links}</nav>"""


def _section(number: int, section: Section) -> str:
    return (f'<h2 id="section-{number}">{escape(section.name)}</h2><p class="quiet">{escape(section.about)}</p>'
            f'<div class="cards">{"".join(map(_card, section.cards))}</div>')


def _card(card: Card) -> str:
    kind = " bad" if card.rejected else ""
    note = f'<p class="small quiet">{escape(_short(card.note))}</p>' if card.note and not _says_why(card) else ""
    return (f'<figure>{_picture(card)}<figcaption><span class="badge{kind}">{escape(card.label)}</span><br>'
            f'<span class="key">{escape(card.key)}</span>{note}{_chips(card)}</figcaption></figure>')


def _chips(card: Card) -> str:
    numbers = set(range(min(len(card.scores), MAX_CHIPS))) | ({card.chosen} if card.chosen is not None else set())
    chips = "".join(f"<span{_chosen(index == card.chosen)}>{index}: {card.scores[index]:.2f}</span>"
                    for index in sorted(numbers))
    if len(numbers) < len(card.scores):
        chips += f"<span>and {len(card.scores) - len(numbers)} more</span>"
    return f'<div class="chips">{chips}</div>' if chips else ""


def _chosen(chosen: bool) -> str:
    return ' class="chosen" title="the person on whose account the picture is here"' if chosen else ""


def _picture(card: Card) -> str:
    if _says_why(card):
        return f'<div class="missing">{escape(_short(card.note))}</div>'
    if card.image_bgr is None:
        return ""
    data = base64.b64encode(jpeg_bytes(card.image_bgr)).decode()
    return (f'<label><input type="checkbox" aria-label="enlarge {escape(card.key)}">'
            f'<img alt="{escape(card.key)}" src="data:image/jpeg;base64,{data}"></label>')


def _says_why(card: Card) -> bool:
    """Whether a note stands where the picture should be; a rejected picture needs no such place."""
    return card.image_bgr is None and not card.rejected


def _short(text: str) -> str:
    return text if len(text) <= MAX_NOTE else text[:MAX_NOTE] + "..."
