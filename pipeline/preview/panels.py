"""The page's numbers: tiles, bars and small histograms, as HTML with SVG in it."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from pipeline.images import REASONS
from pipeline.preview.histogram import Bins, ScoreHistograms

# how many persons a picture has: each number up to 9, then in steps
FEW_PERSONS = 10
CROWDS = ((10, 19), (20, 49), (50, 99))


def tiles(counts: Mapping[str, Any]) -> str:
    """The totals: pictures, persons, pictures without persons, rejected ones."""
    named = [("pictures", counts["pictures"], ""), ("persons", counts["persons"], ""),
             ("pictures without persons", counts["no_person"], ""),
             ("pictures rejected", counts["rejected"], " bad" if counts["rejected"] else "")]
    shown = "".join(f'<div class="tile{kind}"><b>{value:,}</b><span class="quiet">{name}</span></div>'
                    for name, value, kind in named)
    return f'<div class="tiles">{shown}</div>'


def person_scores(scores: ScoreHistograms, meaning: str) -> str:
    """The histogram of the persons' scores, with what a score means."""
    bins, mean = scores.bins(), scores.means()[0]
    said = "no person" if mean is None else f"mean {mean:.2f}"
    return f"""<section class="panel"><h3>Person scores <span class="quiet">{said}</span></h3>
{_histogram(bins, 0, f"histogram of the person scores, {said}")}
<div class="axis"><span>{bins.low:.2f}</span><span>{(bins.low + bins.high) / 2:.2f}</span><span>{bins.high:.2f}</span>
</div><p class="quiet small">{escape(meaning)}</p></section>"""


def persons_per_picture(pictures: Mapping[int, int]) -> str:
    """How many pictures have how many persons, from 0 on."""
    return f"""<section class="panel"><h3>Persons in a picture</h3>
{_bars(group_pictures(pictures))}<p class="quiet small">Number of pictures; rejected ones don't count.</p></section>"""


def group_pictures(pictures: Mapping[int, int]) -> list[tuple[str, int]]:
    """(how many persons, how many pictures): each number below 10, then groups, as far as there are any."""
    last = max(pictures, default=0)
    single = [(str(number), pictures.get(number, 0)) for number in range(min(last, FEW_PERSONS - 1) + 1)]
    bounds = [*CROWDS, (CROWDS[-1][1] + 1, last)]
    crowds = [(f"{low} to {high}", sum(many for number, many in pictures.items() if low <= number <= high))
              for low, high in bounds if low <= last]
    return single + crowds


def reasons(counts: Mapping[str, int]) -> str:
    """How many pictures were rejected for which reason, and what each means; nothing where none was."""
    if not counts:
        return ""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"""<section class="panel"><h3>Rejected pictures</h3>
{_bars(ordered, kind=" bad", meanings={reason: meaning for reason, (meaning, _) in REASONS.items()})}</section>"""


def joint_scores(names: Sequence[str], scores: ScoreHistograms, low_score: float) -> str:
    """A small histogram of each joint's scores, its mean, and the share that is low."""
    bins, means, low = scores.bins(), scores.means(), scores.share_below(low_score)
    cells = "".join(f"<div><p><b>{escape(name)}</b>{_joint_numbers(means[joint], low[joint])}</p>"
                    f"{_histogram(bins, joint, f'histogram of the scores of {name}', line=low_score)}</div>"
                    for joint, name in enumerate(names))
    return f"""<section class="panel"><h3>Scores of each joint</h3><div class="joints">{cells}</div>
<p class="quiet small">Each from {bins.low:.2f} to {bins.high:.2f}, all persons; the line is at {low_score}, below which
a joint counts as low. Beside the name: the mean, and the share of low scores.</p></section>"""


def _joint_numbers(mean: float | None, low: float | None) -> str:
    if mean is None or low is None:
        return "<span>-</span>"
    return f"<span>{mean:.2f} <span class=\"quiet\">· {100 * low:.0f} % low</span></span>"


def _histogram(bins: Bins, row: int, label: str, *, line: float | None = None) -> str:
    counts = bins.counts[row]
    width, heights = (bins.high - bins.low) / len(counts), 100 * counts / max(counts.max(initial=0), 1)
    edges = [f"{bins.low + number * width:.2f}" for number in range(len(counts) + 1)]
    bars = "".join(
        f'<rect x="{number + 0.06:.2f}" y="{100 - height:.2f}" width="0.88" height="{height:.2f}">'
        f"<title>{edges[number]} to {edges[number + 1]}: {counts[number]:,}</title></rect>"
        for number, height in enumerate(heights.tolist()) if height)
    mark = ""
    if line is not None and bins.low < line < bins.high:
        at = (line - bins.low) / width
        mark = f'<line x1="{at:.2f}" x2="{at:.2f}" y1="0" y2="100"/>'
    return (f'<svg viewBox="0 0 {len(counts)} 100" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
            f"{bars}{mark}</svg>")


def _bars(values: Iterable[tuple[str, int]], *, kind: str = "", meanings: Mapping[str, str] | None = None) -> str:
    values = list(values)
    highest = max((value for _, value in values), default=0) or 1
    rows = "".join(
        f'<dt>{escape(name)}</dt><dd class="track">{_bar(value / highest)}</dd><dd class="number">{value:,}</dd>'
        + (f'<dd class="quiet">{escape(meanings[name])}</dd>' if meanings and name in meanings else "")
        for name, value in values)
    return f'<dl class="bars{kind}">{rows}</dl>'


def _bar(share: float) -> str:
    return f'<i style="width: {100 * np.clip(share, 0, 1):.1f}%"></i>' if share > 0 else ""
