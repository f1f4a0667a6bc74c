"""A page to look through images: one file that needs no other but the images beside it."""

import html
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif; }}
  body {{ margin: 1rem; }}
  header {{ position: sticky; top: 0; padding: .5rem 0; background: Canvas; display: flex; gap: 1rem; flex-wrap: wrap;
            align-items: baseline; }}
  h1 {{ font-size: 1.2rem; margin: 0; }}
  input {{ font: inherit; flex: 1; min-width: 12rem; padding: .3rem .5rem; }}
  main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }}
  figure {{ margin: 0; overflow-wrap: anywhere; }}
  img {{ width: 100%; height: auto; background: #8882; }}
  small, pre {{ opacity: .7; }}
  pre {{ white-space: pre-wrap; font-size: 12px; }}
  [hidden] {{ display: none; }}
</style>
<header>
  <h1>{title}</h1>
  <input type="search" placeholder="Filter" aria-label="Filter" autofocus>
  <output>{n} of {n}</output>
</header>
<main>
{figures}
</main>
<script>
  const figures = [...document.querySelectorAll("figure")];
  const texts = figures.map((figure) => figure.textContent.toLowerCase());
  document.querySelector("input").addEventListener("input", (event) => {{
    const words = event.target.value.toLowerCase().split(/\\s+/);
    let shown = 0;
    figures.forEach((figure, i) => {{
      figure.hidden = !words.every((word) => texts[i].includes(word));
      shown += !figure.hidden;
    }});
    document.querySelector("output").textContent = `${{shown}} of ${{figures.length}}`;
  }});
</script>
</html>
"""

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
    return _PAGE.format(title=html.escape(title), n=len(figures), figures="\n".join(figures))


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
