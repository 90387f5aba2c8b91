"""HTML that is escaped by construction, and the look of the run report.

`tag` escapes every text it is given; only `Html`, which `tag` makes, passes as it is. The page
needs nothing from outside: system fonts, its own CSS, no script.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from mdpd_deploy.text import shown

VOID = frozenset({"img", "meta"})


class Html(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Return one element; texts and attribute values are escaped.

    Args:
        name: The element, e.g. "td".
        children: `Html` goes in as it is, lists of it too, None not at all, the rest as text.
        attributes: A trailing underscore is dropped (`class_`), None and False leave the
            attribute out, True gives it no value.
    """
    opening = "".join(
        f" {key.rstrip('_')}" + ("" if value is True else f'="{_escaped(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{opening}>")
    return Html(f"<{name}{opening}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Html:
    """Return children one after another, each as `tag` takes it."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, list | tuple):
            parts.append(join(child))
        elif child is not None:
            parts.append(_escaped(child))
    return Html("".join(parts))


def _escaped(value: object) -> str:
    """Return a value as text of a page; what is not visible, or no Unicode, is spelt out."""
    return html.escape(shown(str(value)))


def document(title: str, *sections: object) -> str:
    """Return a whole page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        Html(f"<style>{CSS}</style>"),
    )
    page = tag("html", head, tag("body", tag("main", *sections)), lang="en")
    return f"<!doctype html>\n{page}\n"


def section(title: str, *children: object, note: str | None = None) -> Html:
    """Return a titled panel of the page, with a sentence below the title if `note` is given."""
    said = tag("p", note, class_="note") if note else None
    return tag("section", tag("h2", title), said, *children)


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table; cells that are numbers as text or `Html` are the caller's to format."""
    top = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head]))
    body = tag("tbody", [tag("tr", [tag("td", cell) for cell in row]) for row in rows])
    return tag("div", tag("table", top, body), class_="scroll")


def figure(title: str, svg: str, keys: Sequence[tuple[str, int]] = ()) -> Html:
    """Return a chart under its title; `keys` are the names and page colours of its lines."""
    legend = [tag("span", name, class_=f"key c{colour}") for name, colour in keys]
    return tag("figure", tag("figcaption", tag("b", title), legend), Html(svg))


def picture(image: Image.Image, *, size: int = 128) -> Html:
    """Return a picture inside the page, fitted into size × size pixels; its alt text is empty."""
    small = image.convert("RGB")
    tiny = max(small.size) <= 64  # shown larger: with its pixels
    small.thumbnail((size, size))
    out = io.BytesIO()
    small.save(out, format="PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    source = f"data:image/png;base64,{data}"
    return tag("img", class_="tiny" if tiny else None, src=source, alt="")


def count(number: int) -> str:
    """Return a whole number with thousands set apart."""
    return f"{number:,}"


def percent(share: float, digits: int = 1) -> str:
    """Return a fraction in percent."""
    return f"{100 * share:.{digits}f} %"


def size(number: float) -> str:
    """Return bytes in the unit that suits them; 1 GB = 1e9 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f} bytes"


def duration(seconds: float) -> str:
    """Return seconds as a person says them."""
    if seconds < 59.95:  # rounds to less than 60.0 s
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


CSS = """
:root {
  color-scheme: light dark;
  --paper: #f6f7f9; --panel: #ffffff; --ink: #1b2330; --muted: #5c6778; --line: #e1e5eb;
  --series-1: #2563c9; --series-2: #c2651a; --series-3: #23856b; --series-4: #8a4fb8;
  --good: #1d7a4f; --bad: #b3392f; --heat: 37, 99, 201;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161c; --panel: #1a2028; --ink: #e4e8ee; --muted: #98a3b3; --line: #2d3541;
    --series-1: #6ea3f5; --series-2: #e79a5b; --series-3: #5cc3a3; --series-4: #bb8fe0;
    --good: #63c798; --bad: #ee8a80; --heat: 110, 163, 245;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 var(--font); font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
header { margin-bottom: 24px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; font-weight: 650;
  overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 12px; font-weight: 650; }
h3 { font-size: 14px; margin: 20px 0 8px; font-weight: 600; }
p { margin: 0 0 12px; max-width: 72ch; }
header p, .note, small, figcaption { color: var(--muted); }
section, .cards > div { background: var(--panel); border: 1px solid var(--line);
  border-radius: 10px; }
section { padding: 20px 22px; margin-top: 16px; }
.note { font-size: 13.5px; margin-top: -6px; }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); }
.cards > div { padding: 14px 16px; }
.cards small { display: block; font-size: 12.5px; line-height: 1.4; }
.cards strong { display: block; font-size: 25px; line-height: 1.3; font-weight: 650;
  letter-spacing: -0.01em; }
.charts { display: grid; gap: 18px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
.sides { display: grid; gap: 20px 32px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); }
.pair { display: grid; gap: 0 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
.trade-offs { display: grid; gap: 12px 20px;
  grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
.trade-offs figure { max-width: 620px; }
figure { margin: 0; }
.pair > *, .sides > *, .charts > *, .samples > *, .bars > * { min-width: 0; }
figcaption { font-size: 13px; margin-bottom: 4px; }
figcaption b { color: var(--ink); font-weight: 600; margin-right: 12px; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: var(--font); }
.wide-chart { max-width: 460px; }
.key { margin-right: 12px; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 3px;
  margin-right: 5px; background: var(--muted); }
.c1::before, .bar .c1 { background: var(--series-1); }
.c2::before, .bar .c2 { background: var(--series-2); }
.c3::before, .bar .c3 { background: var(--series-3); }
.c4::before, .bar .c4 { background: var(--series-4); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; }
th { color: var(--muted); font-weight: 500; text-align: left; white-space: nowrap; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; }
.grid th, .grid td { border: 0; padding: 0 2px; text-align: center; vertical-align: middle; }
.grid td { min-width: 32px; height: 28px; border: 1px solid var(--panel); border-radius: 5px;
  background: rgba(var(--heat), var(--share, 0)); white-space: nowrap; }
.grid td.zero { color: var(--muted); opacity: 0.45; }
.grid td.dense { color: var(--panel); }
.grid td.total { background: none; color: var(--muted); padding-left: 10px; text-align: right; }
.grid tbody th { text-align: right; padding-right: 10px; max-width: 180px; overflow: hidden;
  text-overflow: ellipsis; }
.grid thead th { vertical-align: bottom; padding: 0 6px 6px; }
.grid thead .upright { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 120px;
  overflow: hidden; text-overflow: ellipsis; margin: 0 auto; text-align: left; }
.bars { display: grid; grid-template-columns: fit-content(45%) 1fr max-content; gap: 8px 14px;
  align-items: center; font-size: 13.5px; margin-bottom: 12px; }
.bars > span { color: var(--muted); }
.bar { display: flex; height: 16px; background: var(--paper); border-radius: 5px;
  overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--muted); min-width: 1px; }
.samples { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(145px, 1fr)); }
.samples.text { grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
.samples > div { border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px;
  font-size: 13.5px; overflow-wrap: anywhere; }
.samples img { display: block; width: 100%; height: 120px; object-fit: contain;
  background: var(--paper); border-radius: 5px; margin-bottom: 8px; }
.samples img.tiny { image-rendering: pixelated; }
.samples q { display: block; quotes: none; margin-bottom: 6px; }
.right { color: var(--good); } .wrong { color: var(--bad); }
code, pre { font-family: var(--mono); font-size: 12.5px; }
p code { overflow-wrap: anywhere; }
pre { background: var(--paper); border-radius: 6px; padding: 12px 14px; overflow-x: auto;
  margin: 0 0 12px; }
details summary { cursor: pointer; color: var(--muted); margin-bottom: 8px; }
footer { color: var(--muted); font-size: 13px; margin-top: 24px; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
