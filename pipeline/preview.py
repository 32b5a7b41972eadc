"""One HTML page to judge a keypoint dataset by eye: which pictures to show, and the page with them.

Pure: tables and drawn pictures in, text out. The page holds everything in itself and loads nothing.
"""

import base64
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.drawing import COLOURS, LOW_SCORE, Image, jpeg_bytes
from pipeline.export import person_rows
from pipeline.pose.skeleton import Skeleton
from pipeline.rows import REJECTED

Array = npt.NDArray[Any]

NUM_BINS = 24
MAX_CHIPS = 12  # scores under a picture; a crowd's others are counted
MAX_REJECTED = 100  # rejected pictures listed by name


@dataclass(frozen=True)
class Choice:
    """A picture to show, and the person on whose account it was chosen (its row's person_index)."""

    key: str
    person_index: int


@dataclass(frozen=True)
class Card:
    """One picture of the page. `image_bgr` has its skeletons drawn; None: it can't be had, see `note`."""

    key: str
    image_bgr: Image | None
    scores: tuple[float, ...]
    chosen: int
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Cards under a heading, with a sentence on how they were chosen."""

    name: str
    about: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Page:
    """Everything that the page says.

    model         name, version, digest
    counts        pictures, persons, ok, no_person, rejected, reasons
    joint_scores  (joint, mean score over all persons), None without persons
    histogram     number of persons in equal bins of the person score, and the bins' outer edges
    rejected      (key, reason, message) of the first refused pictures
    """

    model: dict[str, Any]
    counts: dict[str, Any]
    skeleton_name: str
    joint_scores: tuple[tuple[str, float | None], ...]
    histogram: tuple[tuple[int, ...], float, float]
    score_meaning: str
    sections: tuple[Section, ...]
    rejected: tuple[tuple[str, str, str], ...]


# --- what to show ------------------------------------------------------------------------------------------


def choose_pictures(table: pa.Table, *, num_pictures: int, seed: int) -> dict[str, list[Choice]]:
    """Pictures with the worst and the best person score, and some at random; none twice.

    A third each (what doesn't divide goes to random), less where there aren't enough. The same table and seed
    give the same pictures.
    """
    persons = person_rows(table).select(["key", "person_index", "score"])
    ascending = np.argsort(persons["score"].to_numpy(), kind="stable")
    shuffled = np.random.default_rng(seed).permutation(persons.num_rows)
    third, taken = num_pictures // 3, set[str]()
    return {
        "worst": _first_pictures(persons, ascending, third, taken),
        "best": _first_pictures(persons, ascending[::-1], third, taken),
        "random": _first_pictures(persons, shuffled, num_pictures - 2 * third, taken),
    }


def _first_pictures(persons: pa.Table, order: Array, number: int, taken: set[str]) -> list[Choice]:
    """The first persons in the order whose pictures aren't taken yet; theirs are then."""
    choices: list[Choice] = []
    for row in order:
        if len(choices) == number:
            break
        key = persons["key"][int(row)].as_py()
        if key not in taken:
            taken.add(key)
            choices.append(Choice(key, persons["person_index"][int(row)].as_py()))
    return choices


def mean_joint_scores(table: pa.Table, skeleton: Skeleton) -> tuple[tuple[str, float | None], ...]:
    """Each joint with the mean of its scores over all persons; None without any."""
    means = (pc.mean(table[f"{column}_score"]).as_py() for column in skeleton.columns())
    return tuple(zip(skeleton.joints, means, strict=True))


def score_histogram(table: pa.Table) -> tuple[tuple[int, ...], float, float]:
    """Numbers of persons in 24 equal bins of the person score, from 0 (or the lowest) to the highest."""
    scores = person_rows(table)["score"].to_numpy()
    low, high = (min(0.0, scores.min()), scores.max()) if len(scores) else (0.0, 1.0)
    counts, edges = np.histogram(scores, bins=NUM_BINS, range=(low, max(high, low + 1e-6)))
    return tuple(counts.tolist()), float(edges[0]), float(edges[-1])


def rejected_pictures(table: pa.Table) -> tuple[tuple[str, str, str], ...]:
    """Key, reason and message of the first refused pictures, a hundred at most."""
    refused = table.filter(pc.equal(table["status"], REJECTED)).slice(0, MAX_REJECTED)
    columns = (refused[name].fill_null("").to_pylist() for name in ("key", "reason", "error"))
    return tuple(zip(*columns, strict=True))


# --- the page ----------------------------------------------------------------------------------------------

_CSS = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --text: #16181d; --quiet: #626976;
  --line: #e2e5ea; --bar: #3b74d9; --bad: #b3261e; --badge: #eceff4 }
@media (prefers-color-scheme: dark) { :root { --ground: #111318; --card: #1a1d24; --text: #e9ebef;
  --quiet: #9aa2b1; --line: #2b303a; --bar: #6c9cf0; --bad: #ff8a80; --badge: #272c36 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 1360px; margin: 0 auto; padding: 28px 24px 64px }
h1 { font-size: 26px; margin: 0; letter-spacing: -.01em;
  overflow-wrap: anywhere } h2 { font-size: 19px; margin: 40px 0 2px }
p { margin: 0 } .quiet { color: var(--quiet) }
code, .key { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; font-size: 13px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 22px 0 12px }
.tile, .panel, figure { background: var(--card); border: 1px solid var(--line); border-radius: 12px }
.tile { padding: 12px 16px } .tile b { display: block; font-size: 26px; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums } .tile.bad b { color: var(--bad) }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); gap: 12px }
.panel { padding: 14px 18px 18px; display: flex; flex-direction: column }
.panel h3 { font-size: 15px; margin: 0 0 10px }
.bars { display: grid; grid-template-columns: max-content 1fr 3.2em; gap: 3px 12px; align-items: center;
  font-size: 13px; font-variant-numeric: tabular-nums }
.bars i { display: block; height: 9px; border-radius: 5px; background: var(--bar); min-width: 2px }
.bars .track { background: var(--badge); border-radius: 5px } .bars span:nth-child(3n) { text-align: right }
svg { display: block; width: 100%; height: 120px; flex: 1 0 120px } svg rect { fill: var(--bar) }
.axis { display: flex; justify-content: space-between; font-size: 12px; color: var(--quiet);
  border-top: 1px solid var(--line); padding-top: 3px; font-variant-numeric: tabular-nums }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 14px;
  margin-top: 14px }
figure { margin: 0; overflow: hidden; display: flex; flex-direction: column }
figure img, .missing { width: 100%; height: 260px; object-fit: contain; background: #0b0c0f; display: block;
  cursor: zoom-in }
.missing { display: grid; place-items: center; color: #c6cbd6; padding: 20px; text-align: center;
  cursor: default }
figure input { position: absolute; opacity: 0; pointer-events: none }
figure input:focus-visible + img { outline: 3px solid var(--bar); outline-offset: -3px }
figure input:checked + img { position: fixed; inset: 0; width: 100vw; height: 100vh; z-index: 9;
  cursor: zoom-out; background: rgba(5, 6, 8, .94) }
figcaption { padding: 10px 14px 13px } .key { overflow-wrap: anywhere }
.chips { display: flex; flex-wrap: wrap; gap: 5px; margin-top: 7px }
.chips span { background: var(--badge); border-radius: 999px; padding: 0 10px; font-size: 13px;
  font-variant-numeric: tabular-nums }
.chips .chosen { background: var(--bar); color: #fff; font-weight: 600 }
@media (prefers-color-scheme: dark) { .chips .chosen { color: #0b1220 } }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin-top: 12px }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 6px;
  border: 1px solid #4448; vertical-align: -1px }
.scroll { overflow-x: auto; margin-top: 14px }
table { border-collapse: collapse; width: 100%; font-size: 14px } th { text-align: left; font-weight: 600 }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.reason { white-space: nowrap; color: var(--bad) }
"""


# the browser holds the page to it: nothing is loaded, no script runs
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(page: Page) -> str:
    """The whole HTML page: one file, pictures inside, no script, nothing loaded, all names escaped."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>Keypoints: {escape(_model_name(page.model))}</title>
<style>{_CSS}</style>
</head>
<body>
<main>
{_header(page)}
{_tiles(page.counts)}
<div class="panels">
{_histogram_panel(page)}
{_joints_panel(page)}
</div>
{"".join(_section(section) for section in page.sections)}
{_rejected_section(page)}
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
    return f"""<h1>{escape(_model_name(page.model))}</h1>
<p class="quiet">skeleton {escape(page.skeleton_name)} · model digest
<code title="{escape(digest)}">{escape(digest[:12])}</code></p>
<p class="legend quiet">{swatches}<span>hollow and faded: joint score below {LOW_SCORE}</span>
<span>box: the person on whose account the picture is here</span>
<span>click a picture to enlarge it</span></p>"""


def _tiles(counts: dict[str, Any]) -> str:
    named = [("pictures", counts["pictures"], ""), ("persons", counts["persons"], ""),
             ("pictures without persons", counts["no_person"], ""),
             ("pictures rejected", counts["rejected"], " bad" if counts["rejected"] else "")]
    tiles = "".join(f'<div class="tile{kind}"><b>{value:,}</b><span class="quiet">{name}</span></div>'
                    for name, value, kind in named)
    reasons = "".join(f"<span>{escape(str(reason))}: {number:,}</span>"
                      for reason, number in counts.get("reasons", {}).items())
    listed = f'<p class="chips">{reasons}</p><br>' if reasons else ""
    return f'<div class="tiles">{tiles}</div>{listed}'


def _histogram_panel(page: Page) -> str:
    counts, low, high = page.histogram
    highest = max(*counts, 1)
    bars = "".join(
        f'<rect x="{index + 0.06:.2f}" y="{100 - 100 * count / highest:.2f}" width="0.88" '
        f'height="{100 * count / highest:.2f}"><title>{count:,} persons</title></rect>'
        for index, count in enumerate(counts))
    return f"""<section class="panel"><h3>Person scores</h3>
<svg viewBox="0 0 {len(counts)} 100" preserveAspectRatio="none" role="img" aria-label="histogram">{bars}</svg>
<div class="axis"><span>{low:.2f}</span><span>{(low + high) / 2:.2f}</span><span>{high:.2f}</span></div>
<p class="quiet" style="margin-top: 10px; font-size: 13px">{escape(page.score_meaning)}</p></section>"""


def _joints_panel(page: Page) -> str:
    highest = max((score for _, score in page.joint_scores if score is not None), default=1.0) or 1.0
    rows = "".join(
        f'<span>{escape(name)}</span>'
        f'<span class="track"><i style="width: {_percent(score, highest)}%"></i></span>'
        f"<span>{'-' if score is None else f'{score:.2f}'}</span>" for name, score in page.joint_scores)
    return f"""<section class="panel"><h3>Mean score of each joint</h3>
<div class="bars">{rows}</div></section>"""


def _percent(score: float | None, highest: float) -> float:
    return round(100 * min(1.0, max(0.0, (score or 0.0) / highest)), 1)


def _section(section: Section) -> str:
    if not section.cards:
        return ""
    return (f'<h2>{escape(section.name)}</h2><p class="quiet">{escape(section.about)}</p>'
            f'<div class="cards">{"".join(map(_card, section.cards))}</div>')


def _card(card: Card) -> str:
    shown = sorted({*range(min(len(card.scores), MAX_CHIPS)), card.chosen})
    chips = "".join(f"<span{_chosen(index == card.chosen)}>{index}: {card.scores[index]:.2f}</span>"
                    for index in shown)
    if len(shown) < len(card.scores):
        chips += f"<span>and {len(card.scores) - len(shown)} more</span>"
    return (f'<figure>{_picture(card)}<figcaption><span class="key">{escape(card.key)}</span>'
            f'<div class="chips">{chips}</div></figcaption></figure>')


def _chosen(chosen: bool) -> str:
    return ' class="chosen" title="the person on whose account the picture is here"' if chosen else ""


def _picture(card: Card) -> str:
    if card.image_bgr is None:
        return f'<div class="missing">{escape(card.note)}</div>'
    data = base64.b64encode(jpeg_bytes(card.image_bgr)).decode()
    return (f'<label><input type="checkbox" aria-label="enlarge">'
            f'<img loading="lazy" alt="{escape(card.key)}" src="data:image/jpeg;base64,{data}"></label>')


def _rejected_section(page: Page) -> str:
    if not page.rejected:
        return ""
    rows = "".join(f'<tr><td class="reason">{escape(reason)}</td><td class="key">{escape(key)}</td>'
                   f"<td>{escape(message)}</td></tr>" for key, reason, message in page.rejected)
    more = page.counts["rejected"] - len(page.rejected)
    rest = f'<p class="quiet">and {more:,} more in the dataset (status rejected)</p>' if more > 0 else ""
    return f"""<h2>Rejected pictures</h2><p class="quiet">They keep their rows, with the reason.</p>
<div class="scroll"><table><tr><th>reason</th><th>picture</th><th>message</th></tr>{rows}</table></div>
{rest}"""
