"""Boxes and points drawn on a picture, with crops beside it, and grids of many.

All coordinates are normalised to [0, 1) as in `Answer.boxes`; anything with x1, y1, x2, y2
(or x, y) attributes or a plain tuple will do, and a `label` attribute is written beside it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .pictures import fit

# Okabe & Ito's colour-blind-safe set, strong ones first
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
SHARP = 2  # stored pixels per shown pixel: lettering stays sharp on fine screens
INK = "#1a1a1a"
_LINE = 16 * SHARP  # height of a line of text in stored pixels


class Picture:
    """A drawn picture: `.image` is the PIL image, a notebook shows it at half its stored size."""

    def __init__(self, image: Image.Image):
        self.image = image

    def _repr_jpeg_(self) -> tuple[bytes, dict]:
        stream = io.BytesIO()
        self.image.save(stream, "JPEG", quality=90, subsampling=0)
        return stream.getvalue(), {"width": self.image.width // SHARP, "height": self.image.height // SHARP}

    def save(self, path: str | Path) -> None:
        self.image.save(path)


def draw_regions(
    image: Image.Image, boxes: Sequence = (), points: Sequence = (), truth: Sequence = (), *, width: int, height: int
) -> Image.Image:
    """`image` scaled to fit `width` x `height` shown pixels, with solid coloured `boxes` and `points`
    and dashed black-and-white `truth` boxes. Labels go where they cover the least."""
    image = image.convert("RGB")
    size = fit(image.size, width * SHARP, height * SHARP)
    canvas = image.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas)
    drawn = [_pixels(box, size) for box in boxes]
    taken = [*drawn, *(_pixels(box, size) for box in truth)]
    for at, box in enumerate(drawn):
        for grow, colour, line in ((2, "#ffffff", 2 + SHARP * 2), (0, COLOURS[at % len(COLOURS)], SHARP * 2)):
            draw.rectangle(_grown(box, grow // 2), outline=colour, width=line)
    for box in truth:
        _dashed(draw, _pixels(box, size))
    radius = 5 * SHARP
    for at, point in enumerate(points, start=len(boxes)):
        x, y = (value * side for value, side in zip(_point(point), size))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), COLOURS[at % len(COLOURS)], "#ffffff", SHARP)
        taken.append((x - radius, y - radius, x + radius, y + radius))
    for at, item in enumerate([*boxes, *points]):
        text = getattr(item, "label", None)
        anchor = taken[at] if at < len(boxes) else taken[at + len(truth)]
        if text:
            taken.append(_label(draw, str(text), anchor, taken, size, COLOURS[at % len(COLOURS)]))
    return canvas


def show_regions(
    image: Image.Image,
    boxes: Sequence = (),
    points: Sequence = (),
    *,
    truth: Sequence = (),
    title: str = "",
    crops: bool = False,
    width: int = 520,
) -> Picture:
    """`image` with its regions, at most `width` shown pixels wide; `crops` adds each box cut from the
    original at full resolution in a column beside it."""
    main = draw_regions(image, boxes, points, truth, width=width, height=width)
    tiles = [_crop(image, box, COLOURS[at % len(COLOURS)]) for at, box in enumerate(boxes)] if crops else []
    return Picture(_titled(_beside(main, [tile for tile in tiles if tile is not None]), title))


def gallery(items: Sequence[dict], *, columns: int = 4, tile: int = 240) -> Picture:
    """A grid of pictures, each `tile` shown pixels: `items` are dicts with `image` and optionally
    `boxes`, `points`, `truth` and `caption` (a few lines, wrapped under its picture)."""
    if not items:
        raise ValueError("gallery needs at least one picture, but its list is empty.")
    columns = min(columns, len(items))
    return Picture(_stacked([_row(items[at : at + columns], columns, tile) for at in range(0, len(items), columns)]))


def _row(items: Sequence[dict], columns: int, tile: int) -> Image.Image:
    """Up to `columns` items of a gallery beside each other, standing on one line, their captions below it."""
    gap, side = 10 * SHARP, tile * SHARP
    regions = [{key: item.get(key, ()) for key in ("boxes", "points", "truth")} for item in items]
    images = [draw_regions(item["image"], **some, width=tile, height=tile) for item, some in zip(items, regions)]
    captions = [_wrap(item.get("caption", ""), side) for item in items]
    bottom = gap + max(image.height for image in images)
    height = bottom + _LINE * max(map(len, captions)) + gap
    row = Image.new("RGB", (columns * (side + gap) + gap, height), "white")
    for column, (image, lines) in enumerate(zip(images, captions)):
        left = gap + column * (side + gap)
        row.paste(image, (left + (side - image.width) // 2, bottom - image.height))
        _write(row, lines, left, bottom + gap // 3)
    return row


def _stacked(rows: list[Image.Image]) -> Image.Image:
    """Pictures of one width below each other."""
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for at, row in enumerate(rows):
        sheet.paste(row, (0, sum(above.height for above in rows[:at])))
    return sheet


def _pixels(box, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A normalised box in canvas pixels, its corners in order."""
    x1, y1, x2, y2 = (box.x1, box.y1, box.x2, box.y2) if hasattr(box, "x1") else box
    (x1, x2), (y1, y2) = sorted((x1, x2)), sorted((y1, y2))
    return x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1]


def _point(point) -> tuple[float, float]:
    return (point.x, point.y) if hasattr(point, "x") else tuple(point)


def _grown(box, by: float) -> tuple[float, float, float, float]:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _dashed(draw: ImageDraw.ImageDraw, box) -> None:
    """A rectangle of alternating black and white dashes: visible on any background and on any box."""
    x1, y1, x2, y2 = box
    dash = 5 * SHARP
    for (ax, ay), (bx, by) in (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))):
        length = max(abs(bx - ax), abs(by - ay), 1)
        for number, start in enumerate(range(0, int(length), dash)):
            a, b = start / length, min(start + dash, length) / length
            line = (ax + (bx - ax) * a, ay + (by - ay) * a, ax + (bx - ax) * b, ay + (by - ay) * b)
            draw.line(line, fill="#000000" if number % 2 else "#ffffff", width=SHARP + 1)


def _label(draw, text: str, anchor, taken: list, size: tuple[int, int], colour: str):
    """Write `text` around `anchor` where it covers the least of `taken`; returns the place it took."""
    font, pad = _font(), 2 * SHARP
    text = text if len(text) <= 40 else text[:39] + "…"
    width, height = draw.textlength(text, font=font) + 2 * pad, _LINE
    x1, y1, x2, y2 = anchor
    places = [(x1, y1 - height - 3), (x1, y2 + 3), (x2 - width, y1 - height - 3), (x2 - width, y2 + 3)]
    places += [(x2 + 3, y1), (x1 - width - 3, y1), (x2 + 3, y2 - height), (x1 - width - 3, y2 - height)]

    def cost(order: int) -> float:
        left, top = places[order]
        spot = (left, top, left + width, top + height)
        inside = _overlap(spot, (0, 0, *size))
        return 3 * (width * height - inside) + sum(_overlap(spot, other) for other in taken) + order

    left, top = places[min(range(len(places)), key=cost)]
    left, top = max(0, min(left, size[0] - width)), max(0, min(top, size[1] - height))
    draw.rounded_rectangle((left, top, left + width, top + height), 3 * SHARP, fill=colour)
    dark = sum(int(colour[at : at + 2], 16) * weight for at, weight in ((1, 0.3), (3, 0.59), (5, 0.11))) < 150
    draw.text((left + pad, top + pad // 2), text, fill="#ffffff" if dark else INK, font=font)
    return left, top, left + width, top + height


def _overlap(a, b) -> float:
    """Area that two pixel boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _crop(image: Image.Image, box, colour: str) -> Image.Image | None:
    """The box cut from the original, framed in its colour; None when it holds no whole pixel."""
    x1, y1, x2, y2 = _pixels(box, image.size)
    cut = (max(0, int(x1)), max(0, int(y1)), min(image.width, round(x2)), min(image.height, round(y2)))
    if cut[2] - cut[0] < 1 or cut[3] - cut[1] < 1:
        return None
    crop = image.convert("RGB").crop(cut)
    crop = crop.resize(fit(crop.size, 200 * SHARP, 130 * SHARP), Image.Resampling.LANCZOS)
    return ImageOps.expand(crop, 3 * SHARP, colour)


def _beside(main: Image.Image, tiles: list[Image.Image]) -> Image.Image:
    """`tiles` in columns to the right of `main`, filling a column to main's height before the next."""
    gap, places, left, top, widest = 8 * SHARP, [], main.width + 8 * SHARP, 0, 0
    for tile in tiles:
        if top and top + tile.height > main.height:
            left, top, widest = left + widest + gap, 0, 0
        places.append((left, top))
        top, widest = top + tile.height + gap, max(widest, tile.width)
    right = max([main.width, *(x + tile.width for (x, _), tile in zip(places, tiles))])
    bottom = max([main.height, *(y + tile.height for (_, y), tile in zip(places, tiles))])
    sheet = Image.new("RGB", (right, bottom), "white")
    sheet.paste(main, (0, 0))
    for place, tile in zip(places, tiles):
        sheet.paste(tile, place)
    return sheet


def _titled(image: Image.Image, title: str) -> Image.Image:
    """`image` on white with `title` above it, as many lines as it needs."""
    pad = 6 * SHARP
    lines = _wrap(title, max(image.width, 320 * SHARP))
    wider = max([0, *(round(_font().getlength(line)) - image.width for line in lines)])
    sheet = ImageOps.expand(image, (pad, pad + _LINE * len(lines), pad + wider, pad), "white")
    _write(sheet, lines, pad, pad // 2)
    return sheet


def _write(sheet: Image.Image, lines: list[str], left: int, top: int) -> None:
    for number, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((left, top + number * _LINE), line, fill=INK, font=_font())


def _wrap(text: str, width: int) -> list[str]:
    """`text` in lines no wider than `width` stored pixels, at most six of them."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and _font().getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines if len(lines) <= 6 else [*lines[:5], lines[5] + " …"]


@cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and covers Latin, Greek, Cyrillic and symbols."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 12 * SHARP)
