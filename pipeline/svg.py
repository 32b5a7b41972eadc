"""The few SVG elements that a drawing of boxes and ways needs, as text.

An element's colours are its class's: `style` gives each class a look on a light page and one on a dark page.
All places and sizes are in pixels.
"""

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

Drawing = list[str]
Point = tuple[float, float]


def document(width: float, height: float, title: str, drawing: Drawing) -> str:
    """The whole SVG file; its title is what a screen reader says."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" role="img">')
    return "\n".join([head, f"<title>{escape(title)}</title>", *drawing, "</svg>"]) + "\n"


def style(css: str, looks: Mapping[str, tuple[str, str]]) -> str:
    """The style element: common CSS, and each class's look, (light, dark)."""
    light, dark = (" ".join(f".{name}{{{look[page]}}}" for name, look in looks.items()) for page in (0, 1))
    return f"<style>{css}{light}\n@media (prefers-color-scheme: dark){{{dark}}}</style>"


def arrows(kinds: Sequence[str]) -> str:
    """The heads for `path`s of these classes, coloured as the classes `<kind>-tip`."""
    return "<defs>" + "".join(
        f'<marker id="{kind}-arrow" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path class="{kind}-tip" d="M0 .5L8 4L0 7.5Z"/></marker>'
        for kind in kinds) + "</defs>"


def group(name: str, drawing: Drawing) -> Drawing:
    """The drawing under a name by which it can be found."""
    return [f'<g id="{name}">', *drawing, "</g>"]


def box(x: float, y: float, width: float, height: float, kind: str, *, radius: int = 7) -> str:
    """A rectangle with round corners; x, y is its upper left."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"/>'


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    """One line of words; y is its base line, x its start, middle or end."""
    anchored = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{x:g}" y="{y:g}"{anchored}>{escape(words)}</text>'


def dot(x: float, y: float, kind: str) -> str:
    """Where a line branches."""
    return f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="3"/>'


def path(points: Sequence[Point], kind: str, *, tip: bool = True) -> str:
    """A line with right angles, its corners rounded, its end an arrow."""
    steps = [f"M{points[0][0]:g} {points[0][1]:g}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        start, end = _towards(corner, before), _towards(corner, after)
        steps.append(f"L{start[0]:g} {start[1]:g}Q{corner[0]:g} {corner[1]:g} {end[0]:g} {end[1]:g}")
    steps.append(f"L{points[-1][0]:g} {points[-1][1]:g}")
    arrow = f' marker-end="url(#{kind}-arrow)"' if tip else ""
    return f'<path class="{kind}" d="{"".join(steps)}"{arrow}/>'


def _towards(corner: Point, other: Point, *, radius: float = 6) -> Point:
    """The point at most a radius away from a corner, on the way to another point on its row or column."""
    x, y = (max(-radius, min(radius, there - here)) for here, there in zip(corner, other, strict=True))
    return corner[0] + x, corner[1] + y
