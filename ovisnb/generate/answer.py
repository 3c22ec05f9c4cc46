"""From what the model wrote to an `Answer`: thinking, answer, boxes and points.

    answer = parse("<ref>red apple</ref><box>(0.100,0.200),(0.300,0.400)</box>", image_size=(640, 480))
    answer.boxes[0].label, answer.boxes[0].pixels     # 'red apple', (64.0, 96.0, 192.0, 192.0)

Reading is lenient, because models slip: a space inside a number ("0. 483"), a list in square
brackets, a missing closing tag. What cannot be read for certain is never guessed: it stays out of
`boxes` and `points` and is listed, one sentence each, in `Answer.problems`. Writing is strict and
lives in `ovisnb.data.boxes` (`format_box`, `format_point`); the tags' grammar is `ovisnb.data.markup`'s.

Every scan is linear in the length of the text: generated text is input like any other, and may be
100,000 characters of "<box>".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ovisnb.data.boxes import convert
from ovisnb.data.markup import regions, short

_ANSWER_OPEN, _ANSWER_CLOSE = re.compile("<answer>", re.IGNORECASE), re.compile("</answer>", re.IGNORECASE)
# Repeats are bounded ({0,3}) so that no text makes a pattern backtrack more than a constant.
_FINAL = re.compile(r"final answer\s{0,3}:", re.IGNORECASE)


def _pixels(corners: tuple[float, float, float, float], size: tuple[int, int] | None) -> tuple:
    if size is None:
        raise ValueError("This answer knows no image size, so no pixels: parse(text, image_size=(width, height)).")
    return tuple(convert(corners, "normalised", "pixels", size))


@dataclass(frozen=True)
class Box:
    """A rectangle, normalised to [0, 1] with the origin at the top left; `tuple(box)` is (x1, y1, x2, y2)."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str | None = None
    image_size: tuple[int, int] | None = field(default=None, repr=False, compare=False)

    def __iter__(self) -> Iterator[float]:
        return iter((self.x1, self.y1, self.x2, self.y2))

    @property
    def pixels(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) in pixels of the original image; ValueError when its size is unknown."""
        return _pixels((self.x1, self.y1, self.x2, self.y2), self.image_size)


@dataclass(frozen=True)
class Point:
    """A place, normalised to [0, 1] with the origin at the top left; `tuple(point)` is (x, y)."""

    x: float
    y: float
    label: str | None = None
    image_size: tuple[int, int] | None = field(default=None, repr=False, compare=False)

    def __iter__(self) -> Iterator[float]:
        return iter((self.x, self.y))

    @property
    def pixels(self) -> tuple[float, float]:
        """(x, y) in pixels of the original image; ValueError when its size is unknown."""
        return _pixels((self.x, self.y, self.x, self.y), self.image_size)[:2]


@dataclass(frozen=True)
class Answer:
    """What one generation said.

    text        all of it, as decoded (`str(answer)` too)
    thinking    what stood inside <think>, stripped; "" if there was none
    answer      inside <answer>, else after "Final answer:", else all that follows </think>, stripped
    boxes       `Box`es of the answer, not of the thinking, in the order written
    points      `Point`s likewise
    image_size  (width, height) of the first image in pixels, or None
    usage       prompt_tokens, image_tokens, new_tokens, seconds, stop
    prompt      the prompt's text as sent, with <image> where an image stood
    problems    one sentence for each thing that could not be read as written

    `answer["response"]`, `answer["parsed"]["think_content"]` and `["answer_content"]` work too.
    """

    text: str
    thinking: str = ""
    answer: str = ""
    boxes: list[Box] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    image_size: tuple[int, int] | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    problems: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        values = {
            "response": self.text,
            "parsed": {"think_content": self.thinking, "answer_content": self.answer},
        }
        if key not in values:
            raise KeyError(f"An Answer has no {key!r}: its keys are {', '.join(map(repr, values))}.")
        return values[key]

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        parts = [repr(short(self.answer or self.text, 60))]
        for name in ("boxes", "points", "problems"):
            if count := len(getattr(self, name)):
                parts.append(f"{count} {name if count > 1 else name.removesuffix('es' if name == 'boxes' else 's')}")
        if self.thinking:
            parts.append(f"{len(self.thinking)} characters of thinking")
        return f"Answer({', '.join(parts)})"


def parse(
    text: str, image_size: tuple[int, int] | None = None, *, usage: dict[str, Any] | None = None, prompt: str = ""
) -> Answer:
    """Read `text`, what a model wrote, leniently; `image_size` is (width, height) in pixels.

    Coordinates are Ovis2.5's own: normalised to [0, 1). A value outside [0, 1] (a pixel, a share of
    1000) is not rescaled by guess: its box is kept out and named in `problems`. Swapped corners are
    put in order, and named too. Raises nothing, whatever the text.
    """
    problems: list[str] = []
    thinking, rest = _split_thinking(text, problems)
    boxes, points = _regions(text if rest is None else rest, image_size, problems)
    return Answer(
        text=text,
        thinking=thinking,
        answer=_final_answer(text, rest),
        boxes=boxes,
        points=points,
        image_size=image_size,
        usage=usage or {},
        prompt=prompt,
        problems=problems,
    )


def _split_thinking(text: str, problems: list[str]) -> tuple[str, str | None]:
    """-> (thinking, what follows it), the latter None when the text has no </think>.

    The LAST </think> counts, as it does in the chat template.
    """
    start = text.find("<think>")
    end = text.rfind("</think>")
    if end >= 0:
        begin = start + len("<think>") if 0 <= start < end else 0
        return text[begin:end].strip(), text[end + len("</think>") :]
    if start >= 0:
        problems.append("The text opens <think> and never closes it: it was cut, or the thinking did not end.")
        return text[start + len("<think>") :].strip(), None
    return "", None


def _final_answer(text: str, rest: str | None) -> str:
    part = text if rest is None else rest
    openings = list(_ANSWER_OPEN.finditer(part))
    if openings:
        begin = openings[-1].end()
        close = _ANSWER_CLOSE.search(part, begin)
        return part[begin : close.start() if close else len(part)].strip()
    if rest is None and "<think>" in part:
        return ""  # still thinking when it ended: nothing was answered
    finals = list(_FINAL.finditer(part))
    if finals:
        final = part[finals[-1].end() :].strip().lstrip("*").strip()  # "**Final answer:** 12"
        if final:
            return final
    return part.strip()


def _regions(text: str, image_size: tuple[int, int] | None, problems: list[str]) -> tuple[list[Box], list[Point]]:
    """All boxes and points of `text`; each takes the label of the nearest <ref> before it."""
    boxes: list[Box] = []
    points: list[Point] = []
    written = 0
    for region in regions(text):
        if region.kind == "ref":
            continue
        written += 1
        name = f"{region.kind.capitalize()} {written}"
        if region.fault:
            problems.append(f"{name} {region.fault}.")
        elif not all(0.0 <= number <= 1.0 for number in region.numbers):
            problems.append(f"{name} has values outside [0, 1], so it is not normalised: {short(region.text)!r}.")
        elif region.kind == "point":
            points.append(Point(*region.numbers, label=region.label, image_size=image_size))
        else:
            x1, y1, x2, y2 = region.numbers
            if x1 > x2 or y1 > y2:
                problems.append(f"{name} had its corners swapped, {short(region.text)!r}: they were put in order.")
            corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
            boxes.append(Box(*corners, label=region.label, image_size=image_size))
    return boxes, points
