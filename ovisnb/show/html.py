"""Static HTML: one small object a notebook displays, escaped text, pictures as data URIs.

JupyterLab removes <style> and <script> from the outputs of a notebook it has not run itself
(every notebook that papermill executed), so all looks are inline styles and nothing is scripted.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from .pieces import one_line

FONT = "font-family:system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;font-size:13px;line-height:1.5"
MONO = "font-family:ui-monospace,'SFMono-Regular',Menlo,'DejaVu Sans Mono',monospace"
MUTED = "color:#7f7f7f"  # contrast of at least 3.9 on white and on JupyterLab's dark grey


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


def data_uri(image: Image.Image, *, height: int | None = None, width: int | None = None) -> str:
    """`image` shrunk to fit `height` and `width` in pixels (never enlarged) as a JPEG data URI."""
    image = image if image.mode == "RGB" else image.convert("RGB")  # convert always copies
    scale = min(1.0, (height or image.height) / image.height, (width or image.width) / image.width)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)  # shrunk in two steps: six times as fast
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def picture(image: Image.Image, *, height: int, width: int | None = None, alt: str = "") -> str:
    """An <img> at most `height` x `width` CSS pixels; twice that in stored pixels, for sharp screens."""
    limit = {"height": height * 2, "width": width * 2 if width else None}
    scale = min(height / image.height, width / image.width if width else height / image.height)
    shown = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return (
        f'<img src="{data_uri(image, **limit)}" alt="{escape(alt)}" width="{shown[0]}" height="{shown[1]}" '
        f'style="max-width:100%;height:auto;border-radius:4px;display:block">'
    )


def table(rows: list[tuple], *, head: tuple = ()) -> str:
    """A plain table; names in the first column, numbers right-aligned in the others, all text escaped."""

    def line(values: tuple, tag: str) -> str:
        cells = []
        for column, value in enumerate(values):
            text = f"{value:,}" if isinstance(value, (int, float)) else str(value)
            align = "left" if column == 0 else "right"
            style = f"text-align:{align};padding:2px 10px 2px 0;white-space:nowrap"
            cells.append(f'<{tag} style="{style}">{escape(text)}</{tag}>')
        return f"<tr>{''.join(cells)}</tr>"

    lines = [line(head, "th")] if head else []
    lines += [line(row, "td") for row in rows]
    return f'<table style="{FONT};border-collapse:collapse;margin:6px 0">{"".join(lines)}</table>'


def warnings(sentences: list[str], *, limit: int = 10) -> str:
    """The first `limit` sentences on what is wrong, a line each, all text escaped; "" for none."""
    lines = [f"⚠ <bdi>{escape(one_line(sentence, 500))}</bdi>" for sentence in sentences[:limit]]
    lines += [f"… and {len(sentences) - limit:,} more"] if len(sentences) > limit else []
    return "".join(f'<div style="{FONT};overflow-wrap:anywhere">{line}</div>' for line in lines)


class Plot:
    """A matplotlib figure a notebook shows sharply: `.figure` is the figure, stored at two pixels a point."""

    def __init__(self, figure):
        self.figure = figure

    def _repr_png_(self) -> tuple[bytes, dict]:
        stream = io.BytesIO()
        self.figure.savefig(stream, format="png", dpi=160, facecolor="white")
        width, height = (round(80 * side) for side in self.figure.get_size_inches())
        return stream.getvalue(), {"width": width, "height": height}

    def save(self, path: str | Path) -> None:
        self.figure.savefig(path, dpi=160, facecolor="white")
