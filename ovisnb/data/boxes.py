"""Coordinates: the one place that says what a box and a point mean.

    convert((64, 96, 192, 192), "pixels", "normalised", (640, 480))    # Box(0.1, 0.2, 0.3, 0.4)

Three conventions, and every number is in one of them (a record says which its text holds):

- **pixels**: of the original picture as it is seen (after EXIF orientation, before any resizing),
  origin at the top left, x to the right, y down. Crops, tool calls and `Media.box` use pixels.
- **normalised**: pixels divided by width or height, in [0, 1), written with three decimals.
  Questions, answers and the Ovis2.5 grounding tags use normalised coordinates.
- **thousand**: normalised times 1000, 0 to 1000, written as whole numbers, as other models do.

Nothing converts by itself and nothing guesses a convention from the size of a number; numbers that
cannot be in the one that is said are refused (`misread`). Resizing a
picture is `scaled`; a crop's own pixels are reached with `into_crop` and left with `out_of_crop`.

A box is (x1, y1, x2, y2) with x1 < x2 and y1 < y2; (x2, y2) is the far edge, so a box over a whole
picture of w x h pixels is (0, 0, w, h). A size is (width, height), Pillow's order. Functions take
any sequence of four numbers and give back a `Box`. Reading coordinates out of text is
`ovisnb.data.markup`'s work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Convention = Literal["pixels", "normalised", "thousand"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)
LARGEST = 0.999  # the largest number that [0, 1) holds with three decimals


class Box(NamedTuple):
    """x1, y1, x2, y2: left, top, right, bottom; in any one convention."""

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


def flaw(box: Sequence[float]) -> Literal["empty_box", "inverted_box"] | None:
    """The kind of fault of four finite numbers whose corners make no box; None for a sound one and for other numbers."""
    if len(box) != 4 or not all(math.isfinite(number) for number in box):
        return None
    x1, y1, x2, y2 = box
    if x1 == x2 or y1 == y2:
        return "empty_box"
    return "inverted_box" if x1 > x2 or y1 > y2 else None


def misread(numbers: Sequence[float], of: Convention) -> str | None:
    """What is wrong with a box or point in pixels or thousandths whose numbers are all at most 1; None for any other.

    They are shares of the picture for which nobody said so. The one real box that this refuses is the corner pixel.
    """
    if of == "normalised" or not any(numbers) or not all(-1 <= number <= 1 for number in numbers):
        return None
    written = ", ".join(f"{number:g}" for number in numbers)
    return f"is [{written}], which are shares of a picture (normalised) rather than {of}"


def convert(box: Sequence[float], of: Convention, to: Convention, size: tuple[int, int] | None = None) -> Box:
    """`box` from one convention to another. Nothing is rounded or clipped.

    `size` is the whole picture's (width, height) in pixels; only the way from or to pixels needs it.
    ValueError for a convention that does not exist and for a size that is needed and missing.
    """
    x1, y1, x2, y2 = box
    return Box(*convert_point((x1, y1), of, to, size), *convert_point((x2, y2), of, to, size))


def convert_point(
    point: Sequence[float], of: Convention, to: Convention, size: tuple[int, int] | None = None
) -> tuple[float, float]:
    """(x, y) from one convention to another, as `convert` does for a box."""
    x, y = point
    if checked_convention(of) == checked_convention(to):
        return x, y
    (width, height), (new_width, new_height) = extent(of, size), extent(to, size)
    return x / width * new_width, y / height * new_height


def checked_convention(name: str) -> Convention:
    """`name` if it is a convention; ValueError otherwise."""
    if name not in CONVENTIONS:
        raise ValueError(f"coordinates are {', '.join(CONVENTIONS[:-1])} or {CONVENTIONS[-1]}, not {name!r}")
    return name


def extent(convention: Convention, size: tuple[int, int] | None = None) -> tuple[float, float]:
    """The width and height of a whole picture in a convention's own unit; ValueError for pixels without `size`."""
    if convention == "normalised":
        return 1, 1
    if convention == "thousand":
        return 1000, 1000
    if size is None:
        raise ValueError("pixels need the picture's size (width, height) to be converted")
    return _checked_size(size)


def scaled(box: Sequence[float], from_size: tuple[float, float], to_size: tuple[float, float]) -> Box:
    """A pixel box of a picture of `from_size` on the same picture resized to `to_size` (width, height)."""
    (width, height), (new_width, new_height) = _checked_size(from_size), _checked_size(to_size)
    x1, y1, x2, y2 = box
    return Box(x1 / width * new_width, y1 / height * new_height, x2 / width * new_width, y2 / height * new_height)


def into_crop(box: Sequence[float], crop: Sequence[float]) -> Box:
    """Pixels of the picture -> pixels of the picture cut out of it with the pixel box `crop`.

    A crop is grown to whole pixels (`crop_bounds`), so its corner is `crop`'s rounded down, and never
    outside the picture. What lies outside the crop keeps its place: `clip` cuts it off.
    """
    left, top = _corner(crop)
    x1, y1, x2, y2 = box
    return Box(x1 - left, y1 - top, x2 - left, y2 - top)


def out_of_crop(box: Sequence[float], crop: Sequence[float]) -> Box:
    """Pixels of the crop -> pixels of the picture: the way back from `into_crop`."""
    left, top = _corner(crop)
    x1, y1, x2, y2 = box
    return Box(x1 + left, y1 + top, x2 + left, y2 + top)


def clip(box: Sequence[float], size: tuple[float, float] = (1, 1)) -> Box:
    """The part of `box` inside a picture of `size`; (1, 1), the default, is for normalised boxes.

    A box that lies outside comes back with area 0.
    """
    width, height = size
    x1, y1, x2, y2 = box
    return Box(min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height))


def crop_bounds(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Whole pixels to cut for a pixel box: clipped to the picture, then grown to full pixels.

    ValueError if nothing of the box lies inside the picture, or its numbers are no pixels (`misread`).
    """
    if fault := misread(box, "pixels"):
        raise ValueError(f"the box {fault}")
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


def write_numbers(numbers: Sequence[float], convention: Convention) -> list[str]:
    """Coordinates of one box or point as text: "0.100" normalised, "100" in thousandths.

    Pixels are whole numbers where all of them are, and have two decimals otherwise ("141.43").
    ValueError for a number that is not finite or, outside pixels, lies off the picture by over a hundredth.
    """
    if checked_convention(convention) == "normalised":
        return [_three_decimals(number) for number in numbers]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"coordinates are finite numbers, but got {list(numbers)}")
    if convention == "thousand":
        return [_thousandth(number) for number in numbers]
    if all(round(number, 2) == round(number) for number in numbers):
        return [str(round(number)) for number in numbers]
    return [f"{round(number, 2) + 0.0:.2f}" for number in numbers]  # + 0.0: never "-0.00"


def _three_decimals(number: float) -> str:
    # A number far outside [0, 1] is a pixel in the wrong place: clipping it would hide the mistake.
    if not -0.01 <= number <= 1.01:
        raise ValueError(
            f"a normalised coordinate lies in [0, 1], but got {number:g}, which counts pixels or 0 to 1000"
        )
    return f"{min(max(number, 0.0), LARGEST):.3f}"


def _thousandth(number: float) -> str:
    if not -10 <= number <= 1010:
        raise ValueError(f"a coordinate in thousandths lies in 0 to 1000, but got {number}: it may be a pixel")
    return str(min(max(round(number), 0), 1000))


def _corner(crop: Sequence[float]) -> tuple[int, int]:
    x1, y1, _, _ = checked(crop)
    return max(math.floor(x1), 0), max(math.floor(y1), 0)


def _checked_size(size: tuple[float, float]) -> tuple[float, float]:
    width, height = size
    if width <= 0 or height <= 0:
        raise ValueError(f"a picture's size is (width, height) above 0, but got {tuple(size)}")
    return width, height
