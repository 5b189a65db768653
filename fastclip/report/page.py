"""One page with the verdicts and the charts in it, which needs no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .charts import Picture
from .log import Run
from .verdict import Verdict

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } figure { margin: 2rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #555; } li { margin: .3rem 0; } .headline { font-size: 1.25rem; font-weight: 600; }
"""


def write(path: Path, runs: Sequence[Run], verdicts: Sequence[Verdict], pictures: Sequence[Picture]) -> Path:
    """Writes the page; returns its path."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>Gradients: {escape(', '.join(run.name for run in runs))}</title><style>{_STYLE}</style></head><body>",
        "<h1>Gradients</h1>",
    ]
    for run, verdict in zip(runs, verdicts, strict=True):
        parts += [f"<h2>{escape(run.name)}</h2>", f'<p class="headline">{escape(verdict.headline)}</p>', "<ul>"]
        parts += [f"<li>{escape(line)}</li>" for line in [*verdict.lines, *run.notes]]
        parts.append("</ul>")
    for picture in pictures:
        data = base64.b64encode(picture.path.read_bytes()).decode()
        caption = escape(picture.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    path.write_text("\n".join([*parts, "</body></html>", ""]), encoding="utf-8")
    return path
