"""Draw boxes, arrows and words as SVG that is readable on a light and on a dark page."""

from __future__ import annotations

from html import escape

FILLS = {  # by class: on a light page, on a dark one
    "M": ("#ddf4ff", "#0c3a5e"),
    "E": ("#fff1cf", "#4d3a08"),
    "A": ("#ffe2e0", "#5c2220"),
    "S": ("#dcf7e3", "#17432a"),
    "H": ("#eee5ff", "#3b2a63"),
    "none": ("none", "none"),
}


def colours(ink: str, pale: str, fill: str, which: int) -> str:
    """Return the rules of one kind of page."""
    kinds = " ".join(f".{name} {{ fill: {pair[which]} }}" for name, pair in FILLS.items())
    return (
        f"text {{ fill: {ink} }} .small {{ fill: {pale} }} .box {{ stroke: {pale}; fill: {fill} }} "
        f".line {{ stroke: {pale}; fill: none }} .head {{ fill: {pale} }} {kinds}"
    )


STYLE = f"""
text {{ font: 14px ui-sans-serif, system-ui, sans-serif }} .small {{ font-size: 12px }}
.code {{ font-family: ui-monospace, monospace }} .strong {{ font-weight: 600 }}
.box, .line {{ stroke-width: 1.4 }}
{colours("#1f2328", "#59636e", "#f6f8fa", 0)}
@media (prefers-color-scheme: dark) {{
{colours("#e6edf3", "#9da7b1", "#21262d", 1)}
}}
"""


class Drawing:
    """A picture of a given width; its height follows from what is drawn."""

    def __init__(self, title: str, width: int = 480):
        self.title, self.width, self.parts, self.bottom = title, width, list[str](), 0.0

    def box(
        self, x: float, y: float, w: float, h: float, *lines: str, kind: str = "", code: bool = False
    ) -> None:
        """Draw a box with lines of text in its middle; `kind` is a class of colours."""
        self.parts.append(
            f'<rect class="box {kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4"/>'
        )
        top = y + h / 2 - 8.5 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            self.text(x + w / 2, top + 17 * number, line, "middle", "code" if code else "")
        self.reach(y + h)

    def text(self, x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> None:
        """Write one line of text; y is its base line."""
        self.parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'
        )
        self.reach(y + 4)

    def line(self, *points: tuple[float, float], arrow: bool = True) -> None:
        """Draw a line through points, with an arrow head at its end."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="line" d="{path}"/>')
        if arrow:
            (a, b), (x, y) = points[-2:]
            length = ((x - a) ** 2 + (y - b) ** 2) ** 0.5
            u, v = (x - a) / length, (y - b) / length
            corners = [(x, y), (x - 8 * u + 4 * v, y - 8 * v - 4 * u), (x - 8 * u - 4 * v, y - 8 * v + 4 * u)]
            self.parts.append(f'<path class="head" d="M{" L".join(f"{p:g} {q:g}" for p, q in corners)} Z"/>')
        self.reach(max(y for _, y in points))

    def shape(self, *points: tuple[float, float], kind: str = "") -> None:
        """Draw a closed shape."""
        self.parts.append(f'<path class="box {kind}" d="M{" L".join(f"{x:g} {y:g}" for x, y in points)} Z"/>')
        self.reach(max(y for _, y in points))

    def reach(self, y: float) -> None:
        """Make the picture at least this high."""
        self.bottom = max(self.bottom, y)

    def svg(self) -> str:
        """Return the picture as the text of an SVG file."""
        w, h = self.width, f"{self.bottom + 12:g}"
        size = f'viewBox="0 0 {w} {h}" width="{w}" height="{h}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(self.title)}">'
        return "\n".join(
            [head, f"<title>{escape(self.title)}</title><style>{STYLE}</style>", *self.parts, "</svg>\n"]
        )
