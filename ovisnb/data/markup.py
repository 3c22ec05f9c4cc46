"""The grammar of a turn's text: tool calls, grounding tags, and tags that do not close.

    calls("<tool_call>Crop person [10, 20, 100, 200]</tool_call>")[0].numbers    # (10.0, 20.0, 100.0, 200.0)
    regions("<ref>cat</ref><box>(0.100,0.200),(0.300,0.400)</box>")[1].label     # 'cat'
    unclosed("<think>so")[0].problem                                             # '<think> at character 0 is never closed'

The one place with patterns for them; records, files, answers and checks all read through it.
Reading is lenient, because people and models slip: spacing, case, integers, a space inside a number
("0. 483"), a missing bracket. What cannot be read for certain is never guessed: its `numbers` are
None and `problem` says why. Nothing here raises, whatever the text, and every scan is linear in its
length: a text may be 100,000 characters of "<box>". What the numbers mean (pixels, shares) is not
decided here but by the record that holds the text: see `ovisnb.data.boxes`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

# How a question ends that asks for coordinates, as Ovis2.5's own do.
BOX_REQUEST = "Please provide the bounding box coordinates."
POINT_REQUEST = "Please provide the point coordinates."
TOOLS = ("crop", "identify")
PAIRED = ("think", "answer", "tool_call", "tool_response", "ref", "box", "point")
"""Tags that `unclosed` watches."""

# Repeats are bounded ({0,3}) so that no text makes a pattern backtrack more than a constant.
_TAG = re.compile(rf"<\s{{0,3}}(/?)\s{{0,3}}({'|'.join(PAIRED)})\s{{0,3}}>", re.IGNORECASE)
_BRACES = re.compile(r"\{\s{0,8}(?:crop|identify)(?![^\W\d])[^{}]*(\}?)", re.IGNORECASE)
_CALL_LIKE = re.compile(r"[\[\d]")  # "{crop, wheat}" is prose
_COORDINATES = re.compile(r"[\s\d.,;()\[\]+\-eE]*")  # what may stand in a box whose closing tag is missing
_SPACED_DOT = re.compile(r"(?<=\d)\s{0,8}\.\s{0,8}(?=\d)")  # "0. 483", "0 .483"
_FOUR = re.compile(  # also PaliGemma's <loc0100><loc0200>... and Molmo's <point x="10.5" y="20">
    r"[\[({<>](?:loc|\s)?(?:\d{1,5}(?:\.\d{1,6})?[\s,;<>()\[\]]{1,4}(?:loc)?){3}\d{1,5}(?:\.\d{1,6})?\s?[\])}<>]"
    r"|<points?\s{1,8}x1?\s?=[^<>]{0,80}>?",
    re.ASCII,
)
_NUMBER = re.compile(r"[+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,4})?", re.ASCII)
_SEPARATORS = str.maketrans("()[];", ",,,,,")
_COUNT = {"box": 4, "point": 2}


class Call(NamedTuple):
    """One tool call: `text[call.start:call.end]` is all of it, braces or tags included."""

    start: int
    end: int
    name: str
    """"crop" (also where only a box is written), "identify", else the word it begins with, in lower case."""
    label: str | None
    """What stands between the name and the box: `Crop person [..]`."""
    numbers: tuple[float, ...] | None
    """x1, y1, x2, y2 as written, in any order of corners; None if there is a `problem`."""
    problem: str | None
    """One sentence; None for a sound call."""
    text: str
    """What stands between the tags or braces."""


class Region(NamedTuple):
    """One `<ref>`, `<box>` or `<point>`: `text[region.start:region.end]` is all of it, tags included."""

    start: int
    end: int
    kind: Literal["ref", "box", "point"]
    label: str | None
    """What the nearest `<ref>` before it holds (of a ref: what it holds itself)."""
    numbers: tuple[float, ...] | None
    """4 of a box (x1, y1, x2, y2), 2 of a point, as written; None for a ref or if there is a `fault`."""
    fault: str | None
    """"has 2 numbers instead of 4: '(0.1,0.2)'": what is wrong, without its subject."""
    text: str
    """What stands between the tags."""

    @property
    def problem(self) -> str | None:
        """`fault` as a sentence."""
        return self.fault and f"the {self.kind} {self.fault}"


class Tag(NamedTuple):
    """One tag of `PAIRED`, opening or closing: `text[tag.start:tag.end]`."""

    start: int
    end: int
    name: str
    closing: bool

    @property
    def problem(self) -> str:
        """What is wrong with it where `unclosed` lists it."""
        if self.closing:
            return f"</{self.name}> at character {self.start} closes nothing"
        return f"<{self.name}> at character {self.start} is never closed"


def calls(text: str) -> list[Call]:
    """The calls in `<tool_call>..</tool_call>`: `[x1, y1, x2, y2]`, `Crop [..]`, `Crop person [..]`, `Identify [..]`."""
    found = []
    tags = [tag for tag in tags_in(text) if tag.name == "tool_call"]
    for tag, following in zip(tags, [*tags[1:], None]):
        if tag.closing:
            continue
        if following is not None and following.closing:
            content = text[tag.end : following.start]
            found.append(_call(tag.start, following.end, content))
        else:
            content = text[tag.end : following.start if following else len(text)].partition("<")[0]
            cut = f"the tool call is never closed: {short(content)!r}"
            found.append(_call(tag.start, tag.end + len(content), content)._replace(numbers=None, problem=cut))
    return found


def write_call(name: str, numbers: Iterable[str], label: str | None = None) -> str:
    """A call as it is written: `<tool_call>[10, 20, 100, 200]</tool_call>`, a crop without a label by its box alone."""
    head = name.capitalize() + (f" {label}" if label else "") if name != "crop" or label else ""
    return f"<tool_call>{head}{' ' if head else ''}[{', '.join(numbers)}]</tool_call>"


def annotation_calls(text: str) -> list[Call]:
    """The calls of annotation files: `{Crop person [0.00, 141.43, 79.23, 480.00]}`, `{Identify [..]}`."""
    found = []
    for match in _BRACES.finditer(text):
        content = match[0][1:].removesuffix("}")
        if not _CALL_LIKE.search(content):
            continue
        call = _call(match.start(), match.end(), content)
        if not match[1]:
            call = call._replace(numbers=None, problem=f"the tool call is never closed: {short(content)!r}")
        found.append(call)
    return found


def regions(text: str) -> list[Region]:
    """The `<ref>`, `<box>` and `<point>` tags of `text`, in order; each takes the label of the nearest ref before it."""
    found: list[Region] = []
    label: str | None = None
    tags = [tag for tag in tags_in(text) if tag.name in ("ref", "box", "point")]
    for tag, following in zip(tags, [*tags[1:], None]):
        if tag.closing:
            continue
        content = text[tag.end : following.start if following else len(text)]
        closed = following is not None and following.closing and following.name == tag.name
        end = following.end if closed else tag.end + len(content)
        numbers, fault = None, None
        if tag.name == "ref":
            label = content.strip() or None
        else:
            stem = content if closed else _COORDINATES.match(content)[0]
            whole, content = len(stem) == len(content), stem
            if not closed:
                end = tag.end + len(stem)
            if not closed and following is None and whole and not stem.rstrip().endswith((")", "]")):
                fault = f"is cut off after {short(stem)!r}"  # the last digits may be missing
            else:
                numbers, fault = read_numbers(content, _COUNT[tag.name])
        found.append(Region(tag.start, end, tag.name, label, numbers, fault, content))
    return found


def unclosed(text: str) -> list[Tag]:
    """The tags of `PAIRED` that are opened and not closed, or closed and not opened, in order."""
    loose: list[Tag] = []
    stack: list[Tag] = []
    depth: Counter[str] = Counter()
    for tag in tags_in(text):
        if not tag.closing:
            stack.append(tag)
            depth[tag.name] += 1
        elif not depth[tag.name]:
            loose.append(tag)
        else:  # whatever was opened inside and is still open ends with it
            while (top := stack.pop()).name != tag.name:
                depth[top.name] -= 1
                loose.append(top)
            depth[tag.name] -= 1
    return sorted(loose + stack)


def foreign_box(text: str) -> str | None:
    """What looks like a box of other models in a text that holds none in tags or calls: "[10, 20, 300, 400]"."""
    found = _FOUR.search(text)
    if found is None or calls(text) or any(region.kind != "ref" for region in regions(text)):
        return None
    return found[0]


def tags_in(text: str) -> Iterator[Tag]:
    """Every tag of `PAIRED`, in order."""
    return (Tag(match.start(), match.end(), match[2].lower(), bool(match[1])) for match in _TAG.finditer(text))


def read_numbers(text: str, count: int) -> tuple[tuple[float, ...] | None, str | None]:
    """The `count` finite numbers that `text` holds -> (numbers, None), or (None, what is wrong)."""
    fields = [part.strip() for part in text.translate(_SEPARATORS).split(",")]
    fields = [part for part in fields if part]
    if len(fields) == count:
        fields = ["".join(part.split()) for part in fields]  # a comma between each two: any space is a slip
    else:  # "0.1 0.2, 0.3 0.4": only the spaces around a dot are slips
        fields = [word for part in fields for word in _SPACED_DOT.sub(".", part).split()]
    if len(fields) != count:
        return None, f"has {len(fields)} numbers instead of {count}: {short(text)!r}"
    for part in fields:
        if not _NUMBER.fullmatch(part):  # also 'nan', 'inf' and numbers of absurd length
            return None, f"has {short(part)!r} where a number should be: {short(text)!r}"
    numbers = tuple(float(part) + 0.0 for part in fields)  # + 0.0 turns -0.0 into 0.0
    if not all(map(math.isfinite, numbers)):
        return None, f"has a number outside every picture: {short(text)!r}"
    return numbers, None


def _call(start: int, end: int, content: str) -> Call:
    """What stands in a call: a name, a label and a box, the first two of which may be missing."""
    head, bracket, tail = content.partition("[")
    words = head.split(None, 1)
    name = words[0].rstrip(":").lower() if words else "crop"
    label = words[1].strip() if len(words) > 1 else None
    inside, _, after = tail.rpartition("]") if "]" in tail else (tail, "", "")
    numbers = None
    if name not in TOOLS:
        problem = f"the tool call begins with {short(words[0])!r}, not with Crop, Identify or a box: {short(content)!r}"
    elif not bracket:
        problem = f"the tool call has no box [x1, y1, x2, y2]: {short(content)!r}"
    elif after.strip():
        problem = f"the tool call goes on after its box: {short(content)!r}"
    else:
        numbers, fault = read_numbers(inside, 4)
        problem = fault and f"the tool call {fault}"
    return Call(start, end, name, label, numbers, problem, content)


def short(text: str, limit: int = 48) -> str:
    """The beginning of `text` on one line, for a sentence."""
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else text[:limit] + "..."
