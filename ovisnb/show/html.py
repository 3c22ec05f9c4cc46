"""Static HTML: one small object a notebook displays, tables and lists of escaped text, and plots.

JupyterLab removes <style> and <script> from the outputs of a notebook it has not run itself
(every notebook that papermill executed), so all looks are inline styles and nothing is scripted.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .pieces import one_line

FONT = "font-family:system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;font-size:13px;line-height:1.5"
MONO = "font-family:ui-monospace,'SFMono-Regular',Menlo,'DejaVu Sans Mono',monospace"
MUTED = "color:#7f7f7f"  # contrast of at least 3.9 on white and on JupyterLab's dark grey
BLUE, ORANGE, RED, GREY = "#0072b2", "#e69f00", "#d55e00", "#8a8a8a"  # of Okabe & Ito's colour-blind-safe set


class Html:
    """A piece of HTML that a notebook shows as it is; `str(piece)` is its source."""

    def __init__(self, source: str):
        self.source = source

    def _repr_html_(self) -> str:
        # by these classes JupyterLab and exported pages leave alone what looks like mathematics in the data
        return f'<div class="mathjax_ignore tex2jax_ignore">{self.source}</div>'

    def __str__(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return f"Html({len(self.source):,} characters)"

    def save(self, path: str | Path) -> Path:
        """Write a page of its own (UTF-8) that opens in any browser."""
        path = Path(path)
        page = f'<!doctype html><meta charset="utf-8"><body style="margin:24px">{self.source}</body>'
        path.write_text(page, encoding="utf-8")
        return path


def words(text: object, limit: int = 200) -> str:
    """Text of the data on one line, escaped: nothing invisible in it, in its own direction, cut at `limit` characters."""
    return f"<bdi>{escape(one_line(str(text), limit))}</bdi>"


def muted(text: str) -> str:
    """A line of its own in small grey letters; `text` is HTML."""
    return f'<div style="{MUTED};font-size:12px">{text}</div>'


def more(count: int, name: str) -> str:
    """The line that says how many are left out; "" for none."""
    return muted(f"… {count:,} more {name}{'s are' if count > 1 else ' is'} not shown") if count > 0 else ""


def table(rows: Sequence[tuple], *, head: tuple = ()) -> str:
    """A plain table: names in the first column and `Html` left-aligned, numbers and the rest right-aligned and escaped."""

    def line(values: tuple, tag: str) -> str:
        cells = []
        for column, value in enumerate(values):
            text = f"{value:,}" if isinstance(value, (int, float)) else escape(str(value))
            style = f"text-align:{'right' if column else 'left'};white-space:nowrap"
            if isinstance(value, Html):
                text, style = str(value), "text-align:left;overflow-wrap:anywhere"
            cells.append(f'<{tag} style="{style};padding:2px 10px 2px 0;vertical-align:top">{text}</{tag}>')
        return f"<tr>{''.join(cells)}</tr>"

    lines = [line(head, "th")] if head else []
    lines += [line(row, "td") for row in rows]
    return f'<table style="{FONT};border-collapse:collapse;margin:6px 0">{"".join(lines)}</table>'


def warnings(problems: Sequence[str | tuple[str, str]], *, limit: int = 12) -> str:
    """The first `limit` sentences on what is wrong, or (kind, sentence), a line each, escaped; "" for none."""
    lines = []
    for problem in problems[:limit]:
        kind, sentence = ("", problem) if isinstance(problem, str) else problem
        kind = f"<b>{words(kind, 60)}</b> " if kind else ""
        lines.append(f'<div style="overflow-wrap:anywhere">⚠ {kind}{words(sentence, 500)}</div>')
    if not lines:
        return ""
    style = f"{FONT};border-left:3px solid {RED};padding-left:10px;margin:6px 0"
    return f'<div style="{style}">{"".join(lines)}{more(len(problems) - limit, "problem")}</div>'


class Plot:
    """A matplotlib figure a notebook shows sharply: `.figure` is the figure, stored at two pixels a point."""

    def __init__(self, figure):
        self.figure = figure

    def _repr_png_(self) -> tuple[bytes, dict]:
        stream = io.BytesIO()
        self.save(stream)
        width, height = (round(80 * side) for side in self.figure.get_size_inches())
        return stream.getvalue(), {"width": width, "height": height}

    def save(self, path: str | Path | io.BytesIO) -> None:
        """Write it in the format of its ending, or as PNG."""
        self.figure.savefig(path, dpi=160, facecolor="white")
