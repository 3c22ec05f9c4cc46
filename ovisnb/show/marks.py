"""What of a record's text can be drawn on one of its pictures: boxes, points and the places of crops.

    marks = marks_on(record, 0, image.size)
    draw_regions(image, marks.boxes, marks.points, width=420, height=300)

Everything is normalised here, whatever convention the record holds; what cannot be drawn is said in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ovisnb.data import boxes, markup
from ovisnb.data.record import Record
from ovisnb.generate.answer import Box, Point

from .pieces import one_line

MOST = 60  # marks drawn on one picture: more cover it


@dataclass
class Marks:
    """`boxes` and `points` are normalised and inside the picture; `left_out` is a sentence for each thing not drawn."""

    boxes: list[Box] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def marks_on(record: Record, at: int, size: tuple[int, int]) -> Marks:
    """The marks on the record's picture number `at`, a picture of `size` (width, height) pixels.

    The text of questions and answers is only drawn where there is one whole picture: with several it does not
    say which is meant. Crops that are cut from the picture are drawn always.
    """
    marks, media = Marks(), record.images[at]
    if media.box is not None:
        return marks
    written, called = list(_written(record)), []
    if sum(other.box is None for other in record.images) == 1:
        for mark in written:
            _draw(marks, record, size, *mark)
        called = [numbers for kind, _, numbers, _ in written if kind == "crop" and numbers is not None]
        called = [_normalised(numbers, record.call_coordinates, size) for numbers in called]
    elif drawable := sum(numbers is not None for kind, _, numbers, _ in written if kind != "crop"):
        some = "1 box or point is" if drawable == 1 else f"{drawable:,} boxes and points are"
        marks.left_out.append(f"{some} not drawn: with several pictures the text does not say which is meant")
    for crop in record.images:
        if crop.box is not None and crop.origin == media.origin:
            place = _normalised(crop.box, crop.coordinates, size)
            if all(boxes.iou(call, place) <= 0.8 for call in called):  # else it is drawn, with the call's label
                _draw_box(marks, place, "crop")
    for name in ("boxes", "points"):
        drawn = getattr(marks, name)
        if len(drawn) > MOST:
            marks.left_out.append(f"{len(drawn) - MOST:,} more {name} are not drawn")
            del drawn[MOST:]
    marks.left_out[4:] = [f"{len(marks.left_out) - 4:,} more are not drawn"] if len(marks.left_out) > 4 else []
    return marks


def _written(record: Record) -> Iterator[tuple[str, str | None, Sequence[float] | None, str | None]]:
    """(kind, label, numbers, problem) of each box, point and call; a call's kind is its tool, such as "crop"."""
    for turn in record.turns:
        if turn.role == "system":
            continue
        for region in markup.regions(turn.text):
            if region.kind != "ref" and (region.numbers is not None or turn.role != "human"):
                yield region.kind, region.label, region.numbers, region.problem
        if turn.role != "human":
            for call in markup.calls(turn.text):
                yield call.name, call.label, call.numbers, call.problem


def _draw(marks: Marks, record: Record, size: tuple[int, int], kind: str, label, numbers, problem) -> None:
    """Add one of `_written`, or say why not."""
    if numbers is None:
        marks.left_out.append(f"not drawn: {problem}")
    elif kind == "box":
        _draw_box(marks, _normalised(numbers, record.box_coordinates, size), label)
    elif kind == "point":
        x, y = boxes.convert_point(numbers, record.box_coordinates, "normalised", size)
        if 0 <= x <= 1 and 0 <= y <= 1:
            _add(marks.points, Point(x, y, label=_label(label)))
        else:
            marks.left_out.append("not drawn: a point outside the picture")
    else:
        _draw_box(marks, _normalised(numbers, record.call_coordinates, size), f"{kind} {label or ''}".strip())


def _draw_box(marks: Marks, place: boxes.Box, label: str | None) -> None:
    box = boxes.clip(place)
    if boxes.area(box):
        _add(marks.boxes, Box(*box, label=_label(label)))
    else:
        marks.left_out.append("not drawn: a box without area inside the picture")


def _normalised(numbers: Sequence[float], convention: str, size: tuple[int, int]) -> boxes.Box:
    """A box as a share of the picture, its corners in order."""
    x1, y1, x2, y2 = boxes.convert(numbers, convention, "normalised", size)
    return boxes.Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


def _add(drawn: list, mark) -> None:
    if mark not in drawn[: MOST + 1]:  # thinking and answer often say the same
        drawn.append(mark)


def _label(label: str | None) -> str | None:
    """A label fit to be drawn: one line, nothing invisible."""
    return one_line(label, 60) if label else None
