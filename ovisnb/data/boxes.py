"""Coordinates: the one place that says what a box and a point mean.

Two conventions, and every number is in one of them:

- **pixels**: of the original picture as it is seen (after EXIF orientation, before any resizing),
  origin at the top left, x to the right, y down. Crops, tool calls and `Media.box` use pixels.
- **normalised**: pixels divided by width or height, in [0, 1), written with three decimals.
  Questions, answers and the Ovis2.5 grounding tags use normalised coordinates.

A box is (x1, y1, x2, y2) with x1 < x2 and y1 < y2; (x2, y2) is the far edge, so a box over a whole
picture of w x h pixels is (0, 0, w, h). A size is (width, height), Pillow's order. Functions take
any sequence of four numbers and give back a `Box`. Reading coordinates out of a model's text is
`ovisnb.generate.answer`'s work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LARGEST = 0.999  # the largest number that [0, 1) holds with three decimals


class Box(NamedTuple):
    """x1, y1, x2, y2: left, top, right, bottom; pixels or normalised."""

    x1: float
    y1: float
    x2: float
    y2: float


def checked(box: Sequence[float]) -> Box:
    """`box` as a `Box`; ValueError unless it is four finite numbers with x1 < x2 and y1 < y2."""
    if len(box) != 4:
        raise ValueError(f"a box is four numbers x1, y1, x2, y2, but {list(box)} has {len(box)}")
    if not all(math.isfinite(number) for number in box):
        raise ValueError(f"a box needs finite numbers, but got {list(box)}")
    x1, y1, x2, y2 = box
    if x1 >= x2 or y1 >= y2:
        raise ValueError(f"a box needs x1 < x2 and y1 < y2, but got {list(box)}")
    return Box(x1, y1, x2, y2)


def normalise(box: Sequence[float], size: tuple[int, int]) -> Box:
    """Pixels -> normalised, for a picture of `size` (width, height) pixels. Nothing is clipped."""
    width, height = _checked_size(size)
    x1, y1, x2, y2 = box
    return Box(x1 / width, y1 / height, x2 / width, y2 / height)


def to_pixels(box: Sequence[float], size: tuple[int, int]) -> Box:
    """Normalised -> pixels (floats), for a picture of `size` (width, height) pixels."""
    width, height = _checked_size(size)
    x1, y1, x2, y2 = box
    return Box(x1 * width, y1 * height, x2 * width, y2 * height)


def clip(box: Sequence[float], size: tuple[float, float] = (1, 1)) -> Box:
    """The part of `box` inside a picture of `size`; (1, 1), the default, is for normalised boxes.

    A box that lies outside comes back with area 0.
    """
    width, height = size
    x1, y1, x2, y2 = box
    return Box(min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height))


def crop_bounds(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Whole pixels to cut for a pixel box: clipped to the picture, then grown to full pixels.

    ValueError if nothing of the box lies inside the picture.
    """
    x1, y1, x2, y2 = clip(checked(box), size)
    if x1 >= x2 or y1 >= y2:
        raise ValueError(f"the box {list(box)} lies outside the picture of {size[0]}x{size[1]} pixels")
    return math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)


def area(box: Sequence[float]) -> float:
    """Width times height; 0 for a box turned inside out."""
    x1, y1, x2, y2 = box
    return max(x2 - x1, 0) * max(y2 - y1, 0)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes in the same convention, in [0, 1]; 0 if both are empty."""
    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - shared
    return shared / union if union > 0 else 0.0


def format_box(box: Sequence[float]) -> str:
    """A normalised box as Ovis2.5 writes it: `<box>(0.123,0.456),(0.700,0.800)</box>`."""
    x1, y1, x2, y2 = (_three_decimals(number) for number in box)
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def format_point(point: Sequence[float]) -> str:
    """A normalised point as Ovis2.5 writes it: `<point>(0.123,0.456)</point>`."""
    x, y = (_three_decimals(number) for number in point)
    return f"<point>({x},{y})</point>"


def _three_decimals(number: float) -> str:
    # A number far outside [0, 1] is a pixel in the wrong place: clipping it would hide the mistake.
    if not -0.01 <= number <= 1.01:
        raise ValueError(f"a normalised coordinate lies in [0, 1], but got {number}; divide pixels by the size first")
    return f"{min(max(number, 0.0), LARGEST):.3f}"


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    if width <= 0 or height <= 0:
        raise ValueError(f"a picture's size is (width, height) above 0, but got {tuple(size)}")
    return width, height
