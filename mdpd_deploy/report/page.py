"""HTML that is escaped by construction, and the look of the run report.

`tag` escapes every text it is given; only `Html`, which `tag` makes, passes as it is. The page
needs nothing from outside: system fonts, its own CSS, no script.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from mdpd_deploy.text import shown

VOID = frozenset({"img", "meta"})
CSS = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")


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
