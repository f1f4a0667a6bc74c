"""A page to look through images: one file that needs no other but the images beside it."""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

PAGE = Path(__file__).parent / "gallery.html"
_FIGURE = """<figure>
  <a href="{link}"><img src="{link}" loading="lazy" alt="{prompt}"{size}></a>
  <figcaption>{prompt} <small>line {line}, seed {seed}</small>
  <details><summary>settings</summary><pre>{settings}</pre></details></figcaption>
</figure>"""


def page(entries: Sequence[dict[str, Any]], title: str) -> str:
    """The page's HTML; all text from outside is escaped.

    Args:
        entries: as `Store.entries` gives them; files lie beside the page.
        title: its heading.
    """
    figures = [_figure(entry) for entry in entries]
    values = {"title": html.escape(title), "n": str(len(figures)), "figures": "\n".join(figures)}
    return re.sub(r"%(title|n|figures)%", lambda name: values[name[1]], PAGE.read_text())


def _figure(entry: dict[str, Any]) -> str:
    settings = entry["settings"]
    width, height = settings.get("width"), settings.get("height")
    known = type(width) is int and type(height) is int  # the page does not jump while images load
    return _FIGURE.format(
        link=html.escape(quote(entry["file"])),
        prompt=html.escape(str(settings.get("prompt", ""))),
        size=f' width="{width}" height="{height}"' if known else "",
        line=entry["line"],
        seed=entry["seed"],
        settings=html.escape(json.dumps(settings, indent=1, ensure_ascii=False)),
    )
