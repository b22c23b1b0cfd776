"""HTML and SVG for pages that load nothing: elements, tables, bar charts and their style.

A page is a tree of elements. All text enters it through `element` and `verbatim`, which make control characters
visible; `document` escapes the rest. So no file name, class name or architecture name can break a page.
"""

import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from radiotag.errors import printable

LABEL = 17  # columns of text that fit to the left of a bar on a telephone
BLOCKS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "article", "h1", "h2",
    "h3", "p", "ul", "li", "pre", "div", "figure", "figcaption", "table", "caption", "thead", "tbody", "tr", "svg",
}  # fmt: skip
CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 52rem; color: #111; background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 2px solid #111; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
p, ul { margin: .5rem 0; }
p, li, figcaption { max-width: 44rem; overflow-wrap: break-word; }
code, pre { font: .875em/1.45 ui-monospace, "Liberation Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre { margin: .5rem 0; padding: .6rem .8rem; border: 1px solid #767676; white-space: pre-wrap;
  overflow-wrap: anywhere; }
article { border: 1px solid #767676; border-left-width: 6px; padding: .2rem 1rem .5rem; margin: 1rem 0; }
article.detected { border: 2px solid #111; border-left-width: 10px; }
article h3 { margin: .5rem 0 0; }
.verdict { font-size: 1.3rem; font-weight: 700; margin: .1rem 0; }
.small, figcaption, caption { color: #333; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; }
caption { text-align: left; padding-bottom: .3rem; overflow-wrap: anywhere; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #bbb; }
th { font-weight: 600; overflow-wrap: break-word; }
td { overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid #111; }
.facts th { width: 11rem; }
.facts code { font-size: .8125rem; }
td ul { margin: 0; padding-left: 1.1rem; }
td:last-child, th:last-child { padding-right: 0; }
.word { display: inline-block; max-width: 100%; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.gap { font-weight: 400; font-style: italic; }
figure { margin: .8rem 0; }
figure > svg { display: block; width: 100%; font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans",
  "DejaVu Sans", sans-serif; }
svg text { fill: #111; }
svg rect { fill: #555; }
svg line { stroke: #111; stroke-width: 1.5; stroke-dasharray: 4 3; }
@media (max-width: 36rem) {
  body { padding: .7rem; }
  .facts tr { display: block; border-bottom: 1px solid #bbb; padding: .3rem 0; }
  .facts th, .facts td { display: block; width: auto; border: 0; padding: 0; }
  .numbers { font-size: .875rem; }
  .numbers tbody td:first-child { min-width: 6.5rem; }
}
@page { size: A4; margin: 18mm 16mm 20mm; @bottom-right { content: counter(page) " / " counter(pages); } }
@media print {
  :root { font-size: 10pt; }
  body { max-width: none; padding: 0; color: #000; line-height: 1.35; }
  th, td { padding-top: .15rem; padding-bottom: .15rem; }
  .small, figcaption, caption { color: #000; }
  h2 { margin-top: 1.2rem; }
  h1, h2, h3, h2 + p, caption, thead { break-after: avoid; }
  tr, article, figure, pre, table { break-inside: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
  p, li { orphans: 3; widows: 3; }
}
"""


def document(title: str, *body: ET.Element) -> str:
    """Return a whole page as text. A policy in it forbids the browser to load or run anything."""
    style = ET.Element("style")
    style.text = CSS
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        style,
    )
    root = element("html", head, element("body", *body), lang="en")
    for part in root.iter():
        if part.tag in BLOCKS and part.tail is None:
            part.tail = "\n"
    return "<!DOCTYPE html>\n" + ET.tostring(root, encoding="unicode", method="html")


def element(name: str, /, *content: str | ET.Element, **attributes: str) -> ET.Element:
    """Make an element of text and elements. The attribute `class_` becomes class, `font_size` becomes font-size."""
    node = ET.Element(name, {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()})
    last: ET.Element | None = None
    for part in content:
        if isinstance(part, ET.Element):
            node.append(part)
            last = part
        elif last is None:
            node.text = (node.text or "") + printable(part)
        else:
            last.tail = (last.tail or "") + printable(part)
    return node


def paragraph(*content: str | ET.Element, **attributes: str) -> ET.Element:
    """Make a paragraph."""
    return element("p", *content, **attributes)


def verbatim(text: str) -> ET.Element:
    """Quote a text line by line."""
    node = ET.Element("pre")
    node.text = "\n".join(printable(line) for line in text.rstrip("\n").split("\n"))
    return node


def facts(rows: Iterable[tuple[str, str | ET.Element]]) -> ET.Element:
    """Make a table of names and values, which are stacked on a narrow screen."""
    body = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in rows]
    return element("table", element("tbody", *body), class_="facts")


def numbers(heads: Sequence[str], groups: Iterable[ET.Element], caption: str) -> ET.Element:
    """Make a table of numbers: groups of rows under one head. It scrolls if it is too wide."""
    head = element("tr", *(_cell("th", text, i, scope="col") for i, text in enumerate(heads)))
    table = element("table", element("caption", caption), element("thead", head), *groups, class_="numbers")
    return element("div", table, class_="scroll")


def group(rows: Iterable[Sequence[str]]) -> ET.Element:
    """Make one group of rows of a table of numbers; the first column is text."""
    return element("tbody", *(element("tr", *(_cell("td", text, i) for i, text in enumerate(cells))) for cells in rows))


def _cell(name: str, text: str, column: int, **attributes: str) -> ET.Element:
    return element(name, text, **attributes, **({"class_": "number"} if column else {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar of a chart."""

    label: str
    value: float
    shown: str  # the value as text, at the right


def chart(title: str, bars: Sequence[Bar], lines: Sequence[tuple[float, str]], top: float) -> ET.Element:
    """Draw horizontal bars, and dashed lines across them, on a scale from 0 to `top`, as SVG.

    Positions along the bars are percentages, so the chart fills any width and its text keeps its size. The first line's
    name is above the chart, a second line's name below.
    """
    row, margin = 20, 22
    height = row * len(bars)
    labels, drawn = [], []
    for i, bar in enumerate(bars):
        middle, width = row * i + 14, f"{100 * bar.value / top:.2f}%"
        labels.append(element("text", element("title", bar.label), shortened(bar.label), x="0", y=str(margin + middle)))
        drawn.append(element("rect", x="0", y=str(row * i + 3), width=width, height="14"))
        labels.append(element("text", bar.shown, x="100%", y=str(margin + middle), text_anchor="end"))
    for (value, name), y in zip(lines, (-7, height + 16), strict=False):
        x = f"{100 * value / top:.2f}%"
        drawn.append(element("line", x1=x, x2=x, y1="-4", y2=str(height + 4)))
        drawn.append(element("text", name, x=x, y=str(y), text_anchor="end" if value > top / 2 else "start"))
    left = 18 if max(len(bar.label) for bar in bars) <= 8 else 34  # per cent
    area = element(
        "svg", *drawn, x=f"{left}%", y=str(margin), width=f"{84 - left}%", height=str(height), overflow="visible"
    )
    return element(
        "svg", element("title", title), *labels, area, role="img", width="100%", height=str(height + 2 * margin)
    )


def shortened(text: str) -> str:
    """Cut a label to the width beside a bar; East Asian letters are two columns wide."""
    text, columns, kept = printable(text), 0, ""
    for letter in text:
        columns += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if columns > LABEL:
            return kept[:-1] + "…"
        kept += letter
    return kept
