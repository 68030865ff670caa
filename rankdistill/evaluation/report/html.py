"""HTML that is escaped by construction, and whole pages that need nothing but themselves.

`tag` escapes every text it is given; only what `tag` made is taken as markup. A page carries its style and scripts with
a Content-Security-Policy that names their hashes: nothing else runs, nothing is fetched, and no attribute of an element
can hold style or code.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parents[1] / "page"  # shared with the search page
VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "circle", "line", "path", "polyline", "rect", "use"})
NOTHING = "'none'"  # as a Content-Security-Policy writes it
NAME = re.compile(r"[a-zA-Z][\w:.-]*")


class Markup(str):
    """Text that is markup already. Made by this module alone."""


Attribute = str | int | float | bool | None
Content = Markup | str | int | None | Iterable["Content"]


def escaped(content: Content) -> str:
    """Content as markup: text is escaped, sequences are joined, None is nothing."""
    if content is None:
        return ""
    if isinstance(content, Markup):
        return str(content)
    if isinstance(content, str):
        return html.escape(content)
    if isinstance(content, int):
        return str(content)
    return "".join(escaped(part) for part in content)


def tag(name: str, attributes: Mapping[str, Attribute] | None = None, *content: Content) -> Markup:
    """An element.

    Args:
        attributes: name → value; True stands alone, None and False leave the attribute out.
        content: children; text is escaped.

    Raises:
        ValueError: a name that is none, or an attribute that would hold style or code.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no element")
    parts = [name]
    for key, value in (attributes or {}).items():
        if not NAME.fullmatch(key) or key == "style" or key.startswith("on"):
            raise ValueError(f"{key!r} is no attribute that a page may have")
        if value is True:
            parts.append(key)
        elif value is not None and value is not False:
            parts.append(f'{key}="{html.escape(f"{value:g}" if isinstance(value, float) else str(value))}"')
    if name in VOID and not content:
        return Markup(f"<{' '.join(parts)}{'/' if name in SVG_VOID else ''}>")
    return Markup(f"<{' '.join(parts)}>{escaped(content)}</{name}>")


SVG_VOID = frozenset({"circle", "line", "path", "polyline", "rect", "use"})


def join(*content: Content) -> Markup:
    """Several pieces as one."""
    return Markup(escaped(content))


def embedded_json(value: Any) -> str:
    """JSON that may stand in a script element: whatever the texts hold, it cannot end the element or open a comment.

    Raises:
        ValueError: NaN or an infinite number, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # The separators U+2028 and U+2029 end a line for some readers of JavaScript.
    for mark, escape in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("&", "\\u0026"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(mark, escape)
    return text


@cache
def asset(name: str) -> str:
    """A file of the folder `page`."""
    return (ASSETS / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """A source expression of a Content-Security-Policy: the hash of an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page(
    title: str,
    body: Content,
    *,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    data: dict[str, Any] | None = None,
    connect: str = NOTHING,
) -> str:
    """A whole document with everything inline.

    Args:
        styles, scripts: names of files in the folder `page`, in order.
        data: element id → value, embedded as JSON.
        connect: where the page's scripts may send requests; nowhere unless given.
    """
    style = "\n".join(asset(name) for name in styles)
    code = [asset(name) for name in scripts]
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src {digest(style)}",
            f"script-src {' '.join(digest(text) for text in code) or NOTHING}",
            f"connect-src {connect}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    head = join(
        tag("meta", {"charset": "utf-8"}),
        tag("meta", {"name": "generator", "content": "rankdistill"}),  # by which a later report may replace it
        tag("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("meta", {"name": "color-scheme", "content": "light dark"}),
        tag("meta", {"name": "referrer", "content": "no-referrer"}),
        tag("title", None, title),
        Markup(f"<style>{style}</style>"),
    )
    blocks = [
        Markup(f'<script type="application/json" id="{html.escape(name)}">{embedded_json(value)}</script>')
        for name, value in (data or {}).items()
    ]
    blocks += [Markup(f"<script>{text}</script>") for text in code]
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>{escaped([body, blocks])}</body>\n</html>\n'
