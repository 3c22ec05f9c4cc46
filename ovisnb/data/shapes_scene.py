"""Scenes of coloured shapes: a layout (what stands where, in grid units) and a drawing of it at any size.

The same seed gives the same layout at every size, so a model can start on small pictures and go on with large ones.
Every object has its own (colour, shape) pair, so "the red circle" means exactly one thing, and other objects often
share one half of the pair, so colour alone or shape alone does not find it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (220, 40, 40),
    "green": (35, 155, 70),
    "blue": (45, 90, 215),
    "yellow": (245, 205, 25),
    "purple": (140, 60, 180),
    "orange": (245, 130, 30),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
MIDDLE = {"triangle": 0.66, "star": 0.55}  # where a label stands, down from the top of the box; 0.5 otherwise
SIZES = ("small", "medium", "large")

LETTERS = "ABCDEFHJKLMNPRTUVXYZ"  # without those that are read as digits or as each other
DIGITS = "2345679"
LABEL_MIN_SIZE = 256  # pixels; below this no label is drawn, because nobody could read it
LABEL_HEIGHT = 2.5 / 64  # of the picture: 20 pixels of 512, but 2.5 pixels of 64

MIN_SIDE, MAX_SIDE = 8 / 64, 28 / 64  # an object's side as a share of the picture's
MEDIUM_SIDE, LARGE_SIDE = 13 / 64, 20 / 64
DEFAULT_COUNT = (1, 6)
MAX_OBJECTS = 16


@dataclass(frozen=True)
class SceneObject:
    """One shape. `box` is (x1, y1, x2, y2) as shares of the picture in [0, 1], exact multiples of 1/grid."""

    colour: str
    shape: str
    size: str
    label: str | None
    box: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        """What questions call it; unique in its scene."""
        return f"{self.colour} {self.shape}"

    def to_dict(self) -> dict:
        return {"name": self.name, "size": self.size, "label": self.label, "box": list(self.box)}


@dataclass(frozen=True)
class Layout:
    """What stands where, before anything is drawn. `paint` seeds what does not matter to any answer."""

    objects: tuple[SceneObject, ...]
    grid: int
    paint: int


@dataclass(frozen=True)
class Scene:
    """A layout drawn as an RGB picture of size x size pixels."""

    image: Image.Image
    objects: tuple[SceneObject, ...]
    seed: int | str
    grid: int = 64


def scene(
    seed: int | str,
    *,
    size: int = 512,
    n_objects: int | tuple[int, int] | None = None,
    grid: int = 64,
    labels: float = 0.3,
    alike: float = 2 / 3,
) -> Scene:
    """Draw the scene of this seed.

    Args:
        seed: any integer or string; it alone (with n_objects, grid, labels and alike) decides the layout.
        size: side of the square picture in pixels, 64 to 1024.
        n_objects: how many objects, or (lowest, highest); 1 to 6 if None.
        grid: boxes are multiples of 1/grid.
        labels: how probable a label is on an object that has room for one. Labels are only there from 256 pixels on.
        alike: how probable it is that an object takes its colour or its shape from an earlier one.

    Raises:
        ValueError: an option is outside its range.
    """
    check_options(size, grid, labels, alike)
    return draw(make_layout(seed, count_range(n_objects), grid, labels, alike), size, seed)


def layout_split(objects: tuple[SceneObject, ...]) -> str:
    """ "train" or "heldout", decided by which shapes stand where (labels, background and size play no part)."""
    lines = sorted(f"{o.name} " + " ".join(f"{edge:.6f}" for edge in o.box) for o in objects)
    digest = blake2b("\n".join(lines).encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % 10 == 0 else "train"


# ---------------------------------------------------------------- layout


def keyed_random(*parts: object) -> Random:
    """The same parts give the same numbers, on any machine and in any process."""
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return Random(int.from_bytes(digest, "big"))


def make_layout(seed: int | str, counts: tuple[int, int], grid: int, labels: float, alike: float) -> Layout:
    """The layout of a seed, with counts = (lowest, highest) number of objects and labels whatever the size."""
    rng = keyed_random("layout", seed)
    wanted = rng.randint(*counts)
    while True:  # a crowded start can leave no room for the last object: then all are placed anew
        boxes = _place(rng, wanted, grid)
        if boxes is not None:
            break
    objects = []
    for (colour, shape), (x, y, side) in zip(_pairs(rng, wanted, alike), boxes, strict=True):
        share = side / grid
        size = SIZES[(share >= MEDIUM_SIDE) + (share >= LARGE_SIDE)]
        label = _label(rng, shape, share, labels)
        box = (x / grid, y / grid, (x + side) / grid, (y + side) / grid)
        objects.append(SceneObject(colour, shape, size, label, box))
    return Layout(tuple(objects), grid, rng.getrandbits(32))


def _place(rng: Random, wanted: int, grid: int) -> list[tuple[int, int, int]] | None:
    """Squares (x, y, side) in grid units with at least one unit between any two; None if they did not fit."""
    low = round(MIN_SIDE * grid)
    high = max(low, min(round(MAX_SIDE * grid), int(0.9 * grid / math.sqrt(wanted))))
    placed: list[tuple[int, int, int]] = []
    for _ in range(wanted):
        for attempt in range(40):
            side = rng.randint(low, high if attempt < 20 else low + (high - low) // 3)
            x, y = rng.randint(0, grid - side), rng.randint(0, grid - side)
            if all(x > a + s or a > x + side or y > b + s or b > y + side for a, b, s in placed):
                placed.append((x, y, side))
                break
        else:
            return None
    return placed


def _pairs(rng: Random, wanted: int, alike: float) -> list[tuple[str, str]]:
    """Different (colour, shape) pairs; each takes one half from an earlier one with probability `alike`."""
    colours = list(COLOURS)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < wanted:
        colour, shape = rng.choice(colours), rng.choice(SHAPES)
        if pairs:
            draw, other = rng.random(), rng.choice(pairs)
            if draw < alike / 2:
                colour = other[0]
            elif draw < alike:
                shape = other[1]
        if (colour, shape) not in pairs:
            pairs.append((colour, shape))
    return pairs


def _label(rng: Random, shape: str, share: float, probability: float) -> str | None:
    """A letter or digit, on shapes that have a middle to print on and are small enough to be worth a crop."""
    drawn = rng.random() < probability
    character = rng.choice(LETTERS if rng.random() < 0.7 else DIGITS)
    return character if drawn and shape != "ring" and 10 / 64 <= share < LARGE_SIDE else None


def visible(objects: tuple[SceneObject, ...], size: int) -> tuple[SceneObject, ...]:
    """The objects as a picture of `size` pixels shows them: without labels where those would be unreadable."""
    if size >= LABEL_MIN_SIZE:
        return objects
    return tuple(replace(item, label=None) for item in objects)


def check_options(size: int, grid: int, labels: float, alike: float) -> None:
    """ValueError, naming the option, if one is outside its range."""
    if not 64 <= size <= 1024:
        raise ValueError(f"shapes: size is {size} pixels, give 64 to 1024.")
    if not 16 <= grid <= 512:
        raise ValueError(f"shapes: grid is {grid}, give 16 to 512.")
    for name, value in (("labels", labels), ("alike", alike)):
        if not 0 <= value <= 1:
            raise ValueError(f"shapes: {name} is {value}, give a probability from 0 to 1.")


def count_range(n_objects: int | tuple[int, int] | None) -> tuple[int, int]:
    """(lowest, highest) of what `n_objects` says; ValueError if it makes no sense."""
    if n_objects is None:
        return DEFAULT_COUNT
    low, high = (n_objects, n_objects) if isinstance(n_objects, int) else n_objects
    if not 1 <= low <= high <= MAX_OBJECTS:
        raise ValueError(
            f"shapes: n_objects is {n_objects}, give a number or (lowest, highest) from 1 to {MAX_OBJECTS}."
        )
    return low, high


# ---------------------------------------------------------------- drawing


def draw(layout: Layout, size: int, seed: int | str) -> Scene:
    """The layout as an RGB picture of size x size pixels; an object fills its box exactly."""
    rng = Random(layout.paint)
    image = _background(rng, size)
    objects = visible(layout.objects, size)
    for item in objects:
        x1, y1, x2, y2 = (edge * size for edge in item.box)
        left, top = math.floor(x1), math.floor(y1)
        colour = tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLOURS[item.colour])
        image.paste(colour, (left, top), _mask(item.shape, x1 - left, y1 - top, x2 - x1, y2 - y1))
        if item.label is not None:
            glyph = _glyph(item.label, round(LABEL_HEIGHT * size))
            ink = (20, 20, 20) if item.colour in ("yellow", "orange") else (255, 255, 255)
            x, y = (x1 + x2) / 2, y1 + (y2 - y1) * MIDDLE.get(item.shape, 0.5)
            image.paste(ink, (round(x - glyph.width / 2), round(y - glyph.height / 2)), glyph)
    return Scene(image, objects, seed, layout.grid)


def _background(rng: Random, size: int) -> Image.Image:
    """A light picture: plain, a gradient, soft blotches or fine grain."""
    first, second = (tuple(rng.randint(200, 255) for _ in range(3)) for _ in range(2))
    kind = rng.randrange(4)
    if kind == 1:
        ramp = _ramp(size, rng.randrange(4))
        return Image.composite(Image.new("RGB", (size, size), first), Image.new("RGB", (size, size), second), ramp)
    if kind == 0:
        return Image.new("RGB", (size, size), first)
    noise = np.random.default_rng(rng.getrandbits(32))
    if kind == 2:
        coarse = np.asarray(first) + noise.integers(-22, 23, (6, 6, 1))
        return Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    base = np.clip(np.asarray(first), 8, 247).astype(np.uint8)
    grain = noise.integers(0, 16, (size, size, 1), np.uint8)
    return Image.fromarray(base - np.uint8(8) + grain)


@lru_cache(maxsize=64)
def _ramp(size: int, quarter: int) -> Image.Image:
    ramp = Image.linear_gradient("L").resize((size, size), Image.Resampling.BILINEAR)
    return ramp if quarter == 0 else ramp.transpose(list(Image.Transpose)[1 + quarter])


def _star() -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        radius = 1 if corner % 2 == 0 else 0.42
        points.append((radius * math.sin(corner * math.pi / 5), -radius * math.cos(corner * math.pi / 5)))
    xs, ys = [x for x, _ in points], [y for _, y in points]  # stretched so that the tips touch all four sides
    return [((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in points]


def _cross() -> list[tuple[float, float]]:
    a, b = 1 / 3, 2 / 3
    top, right = [(a, a), (a, 0), (b, 0), (b, a)], [(1, a), (1, b), (b, b)]
    return [*top, *right, (b, 1), (a, 1), (a, b), (0, b), (0, a)]


POLYGONS = {
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "star": _star(),
    "cross": _cross(),
}


@lru_cache(maxsize=4096)
def _mask(shape: str, left: float, top: float, width: float, height: float) -> Image.Image:
    """Coverage (mode L) of a shape whose box starts (left, top) pixels, below 1, into the mask; antialiased.

    Kept because a grid allows few different masks, and pasting one takes microseconds where drawing takes a millisecond.
    """
    scale = 8 if width < 64 else 4
    canvas = (math.ceil(left + width) * scale, math.ceil(top + height) * scale)
    big = Image.new("L", canvas, 0)
    pen = ImageDraw.Draw(big)

    def inner(share: float) -> tuple[float, float, float, float]:
        margin = (1 - share) / 2
        x, y = (left + margin * width) * scale, (top + margin * height) * scale
        return x, y, x + share * width * scale - 1, y + share * height * scale - 1

    if shape in POLYGONS:
        x0, y0, x1, y1 = inner(1)
        pen.polygon([(x0 + x * (x1 - x0), y0 + y * (y1 - y0)) for x, y in POLYGONS[shape]], fill=255)
    else:
        pen.ellipse(inner(1), fill=255)
        if shape == "ring":
            pen.ellipse(inner(0.5), fill=0)
    return big.reduce(scale)


@lru_cache(maxsize=256)
def _glyph(character: str, height: int) -> Image.Image:
    """Coverage (mode L) of a character whose capitals are about `height` pixels tall."""
    font = ImageFont.load_default(size=height * 1.4)
    x1, y1, x2, y2 = font.getbbox(character, stroke_width=height * 0.04)
    glyph = Image.new("L", (math.ceil(x2 - x1), math.ceil(y2 - y1)), 0)
    ImageDraw.Draw(glyph).text((-x1, -y1), character, font=font, fill=255, stroke_width=height * 0.04)
    return glyph
