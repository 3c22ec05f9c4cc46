"""Everything that can be told wrong about one record from what stands in it, without its pictures.

    checked = check_entry({"conversations": [{"from": "human", "value": "<image>"}]}, source="a.json:1")
    [fault.kind for fault in checked.faults]    # ['placeholder_count', 'no_answer']

What keeps an entry from being a record, `ovisnb.data.reading` finds; what a record may hold and had
better not (control tokens, tags that do not close, boxes that are none, no answer) is found here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from ovisnb.data import boxes, markup
from ovisnb.data.formats.records import crops_noted
from ovisnb.data.keys import UNREAD
from ovisnb.data.media import Folder, shown
from ovisnb.data.reading import Reading
from ovisnb.data.record import IMAGE, Entry, Media, Note, Record, RecordError

CONTROL = r"<\|[A-Za-z0-9_]{1,40}\|>|<ovis_[a-z_]{1,40}>"
"""Control tokens as they are written, whatever the model: `<|im_start|>`, `<ovis_visual_atom>`."""
ANSWERS = ("gpt", "ignored_gpt")
_GROUNDING = ("ref", "box", "point", "tool_response")
_AFTER_CALL = re.compile(r"\s{0,9}(<image>|<tool_call>|<tool_response>|\Z)?")
_DIGIT = re.compile(r"(?<![^\W\d_])\d")  # "(x1,y1)" in a prompt describes a box and is none


class Found(NamedTuple):
    """A fault of one record: its kind and its message."""

    kind: str
    message: str


class Place(NamedTuple):
    """A box (4 numbers) or point (2) written in a turn, still to be held against the pictures."""

    name: str
    numbers: tuple[float, ...]
    convention: str
    key: str
    """The key of the record that says its convention."""


class Picture(NamedTuple):
    """A picture, frame or video file that the record lists: entry `at` (from 1) of `key`, "image" or "video"."""

    key: str
    at: int
    media: Media
    folder: str | None
    """The image folder of its data set."""

    @property
    def name(self) -> str:
        """How a fault names it."""
        return f"entry {self.at} of `{self.key}`"


@dataclass
class Checked:
    """What is known of one entry before its pictures are looked at."""

    name: str | None
    """Its id, or the one that reading gives it; None where it is no record at all."""
    record: Record | None = None
    """None if `Record.from_dict` refuses the entry."""
    faults: list[Found] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What reading assumed or passed over, sentences that are no faults."""
    answer: tuple[bool, bool] | None = None
    """(whether the last answer reasons or calls a tool, whether it has `<answer>`); None without an answer."""

    def add(self, kind: str, message: str) -> None:
        """Note a fault."""
        self.faults.append(Found(kind, message))


def check_entry(
    entry: Any, *, source: str = "", index: int = 0, image_folder: Folder = None, control: str = CONTROL
) -> Checked:
    """Check one entry of the record form; `control` is a pattern of what is written like a control token.

    With an `image_folder`, or one of the entry's own, crops that reach outside their picture are told.
    Never raises, whatever JSON value `entry` is.
    """
    reading = Reading(entry, source, index)
    checked = Checked(reading.id)
    if isinstance(entry, Mapping):
        if checked.name is not None and not _is_text(checked.name):
            checked.add("not_utf8", "its id holds half a character (a lone surrogate): write it as UTF-8")
        for key, near in misspelt(entry):
            checked.add("unknown_key", f"the key {key!r} is not read: did you mean {near!r}?")
    _check_form(reading, image_folder, checked)
    _check_pictures(reading, entry.folder if isinstance(entry, Entry) else None, checked)
    pictured = reading.images or reading.video or any(IMAGE in (text or "") for _, text in reading.said)
    for number, (role, text) in enumerate(reading.said, start=1):
        if pictured and text is not None and role in ANSWERS and (found := markup.foreign_box(text)):
            said = f"no box is read in an answer that holds what looks like one: {found}"
            checked.remarks.append(f"{said}: write it as <box>(x1,y1),(x2,y2)</box>")
        if text is not None and ("<" in text or control is not CONTROL):
            _check_text(f"turn {number}", role, text, reading.options, checked, control, pictured=bool(pictured))
    _check_answers(reading.said, checked)
    return checked


def box_faults(
    numbers: Sequence[float], of: str, sizes: Sequence[tuple[float, float]] | None, key: str = "box_coordinates"
) -> Iterator[Found]:
    """What is wrong with a box (or point) in the convention `of`, which `key` says; the messages lack their subject.

    `sizes` are those of the pictures in pixels that it may lie in (it has to fit one of them); with none,
    pixels are not held against anything. With None, only faults of the shape are found.
    """
    written = f"[{', '.join(f'{number:g}' for number in numbers)}]"
    flaw = boxes.flaw(numbers)
    if flaw == "empty_box":
        yield Found(flaw, f"has no area: {written}")
        return
    if flaw == "inverted_box":
        yield Found(flaw, f"is inverted: {written} has its second corner before its first")
    if said := boxes.misread(numbers, of):
        there = "; in an annotation line write pixels" if key == "call_coordinates" else ""  # which has no such key
        yield Found("unreadable_box", f'{said}: say so (`{key}`: "normalised") or correct it{there}')
        return
    if sizes is None:
        return
    limits = sizes if of == "pixels" else [boxes.extent(of)]
    slack = 0.01 if of == "pixels" else 1e-9  # files round pixels to two decimals
    if not limits or any(_inside(numbers, limit, slack) for limit in limits):
        return
    if of == "pixels":
        extent = "its picture of " + " or ".join(f"{width}x{height}" for width, height in limits[:3]) + " pixels"
    else:
        extent = f"0 to {limits[0][0]}"
    guess = ""
    if of == "normalised" and max(numbers) > 2:
        fits = any(_inside(numbers, size, 0.01) for size in sizes)
        likely = '"pixels" or "thousand"' if fits else '"thousand" or "pixels"'
        guess = f" (if the numbers count 0 to 1000 or pixels, say so: `{key}`: {likely})"
    yield Found("box_outside", f"reaches out of {extent}: {written}{guess}")


@lru_cache(maxsize=1024)
def _slip(key: str) -> str | None:
    """The field that `key` looks like a slip for."""
    fields = ("image", "video", "conversations", "box_coordinates", "call_coordinates")
    return next(iter(difflib.get_close_matches(key.strip().lower()[:40], fields, 1, 0.8)), None)


def misspelt(entry: Mapping) -> Iterator[tuple[str, str]]:
    """(key, the field that it looks like a slip for), for fields that the entry does not have."""
    for key, value in entry.items():
        near = _slip(key) if isinstance(key, str) and value and key not in UNREAD else None
        if near and near not in entry:
            yield key, near


def _check_form(reading: Reading, image_folder: Folder, checked: Checked) -> None:
    """The record, and what reading it changed; or all that keeps the entry from being one."""
    try:
        record = Record.of(reading)
        checked.record = crops_noted(record, record.folder or image_folder)
    except RecordError as error:
        for problem in reading.problems or [error]:
            if problem not in reading.uncut:  # what is wrong with a call, all calls are checked for
                checked.add(problem.kind, problem.message)
        return
    checked.name = checked.record.id
    for note in checked.record.notes:
        kind = note.kind if isinstance(note, Note) else "changed_on_reading"
        if kind == "remark":
            checked.remarks.append(note)
        else:
            checked.add(kind, note)


def _check_pictures(reading: Reading, folder: str | None, checked: Checked) -> None:
    for key, listed in (("image", reading.images), ("video", reading.video or ())):
        for at, media in enumerate(listed, start=1):
            if media is None:
                continue
            picture = Picture(key, at, media, folder)
            if media.path is not None and not _is_text(media.path):
                checked.add("not_utf8", f"{picture.name}: its path holds half a character: write it as UTF-8")
            elif key == "image" and media.is_video:
                said = f"{shown(repr(media.path))} is a video: list it under `video`, and write <video> where it goes"
                checked.add("wrong_form", f"{picture.name}: {said}")
            else:
                checked.pictures.append(picture)


def _check_text(
    turn: str,
    role: str | None,
    text: str,
    options: Mapping[str, str],
    checked: Checked,
    control: str,
    *,
    pictured: bool,
) -> None:
    """Control tokens, tags, boxes and calls of one turn of a record with or without pictures."""
    tokens = sorted({match[0] for match in re.finditer(control, text)})
    if tokens:
        listed = ", ".join(tokens[:4]) + (" and others" if len(tokens) > 4 else "")
        said = f"{turn} holds {listed}, encoded as plain text, never as a control token: remove it"
        checked.add("control_token", said)
    answer = role in ANSWERS or role is None
    loose = [tag for tag in markup.unclosed(text) if answer or tag.name in _GROUNDING]
    if not answer and loose and not _DIGIT.search(text):
        loose = []  # a prompt that speaks of tags
    if loose:
        more = f" (and {len(loose) - 1} more)" if len(loose) > 1 else ""
        checked.add("unclosed_tag", f"{turn}: {loose[0].problem}{more}")
    told = {tag.start for tag in loose}
    found = [(f"the {region.kind}", region, "box") for region in markup.regions(text) if region.kind != "ref"]
    if answer:
        calls = markup.calls(text)
        found += [("the tool call", call, "call") for call in calls]
        _check_crops_shown(turn, text, calls, checked)
    for name, item, kind in found:
        key = f"{kind}_coordinates"
        convention = options.get(key, "normalised" if kind == "box" else "pixels")
        if item.problem:
            if item.start not in told and (answer or _DIGIT.search(item.text)):
                checked.add("unreadable_box", f"{turn}: {item.problem}")
        elif item.numbers is not None:
            faults = list(box_faults(item.numbers, convention, None, key))
            checked.faults += [Found(kind, f"{turn}: {name} {said}") for kind, said in faults]
            if any(kind in ("empty_box", "unreadable_box") for kind, _ in faults):
                continue
            if answer and not pictured and not checked.places:  # a prompt of words may give boxes of its own
                checked.add("box_outside", f"{turn}: {name} lies in no picture, and the record lists none: list it")
                continue
            checked.places.append(Place(f"{turn}: {name}", item.numbers, convention, key))
            if answer and convention == "normalised" and 1 in item.numbers:
                said = "a coordinate of exactly 1 is read as the far edge; Ovis2.5 itself writes 0.999 at most"
                checked.remarks.append(f"{said}: {turn}, {name}")


def _check_crops_shown(turn: str, text: str, calls: Sequence[markup.Call], checked: Checked) -> None:
    """A crop call that goes on without its picture where another has one; at the end of a turn the tool comes next."""
    after = [(call, _AFTER_CALL.match(text, call.end)[1]) for call in calls if call.name == "crop"]
    if any(shown == IMAGE for _, shown in after):
        for call, shown in after:
            if shown is None:
                said = f"{turn}: no {IMAGE} follows the call {markup.short(call.text)}, as it does others: write it"
                checked.add("placeholder_count", said)


def _check_answers(turns: Sequence[tuple[str | None, str | None]], checked: Checked) -> None:
    """Answers that are missing or empty; one whose text is none has a fault of its own."""
    answers = [(number, text) for number, (role, text) in enumerate(turns, start=1) if role == "gpt"]
    if not answers and any(text is not None for _, text in turns):
        checked.add("no_answer", "the conversation has no gpt turn: add the answer")
    answers = [(number, text) for number, text in answers if text is not None]
    for number, text in answers:
        if not text.strip():
            checked.add("no_answer", f"turn {number}: the gpt turn is empty: write its answer")
    if answers and turns[-1][0] == "human":
        checked.remarks.append("the last question has no answer, so that nothing is learnt from it")
    if answers and answers[-1][1].strip():
        last = answers[-1][1]
        checked.answer = ("<think>" in last or "<tool_call>" in last, "<answer>" in last)


def _inside(numbers: Sequence[float], limit: tuple[float, float], slack: float) -> bool:
    sides = (limit[0], limit[1]) * 2
    return all(-slack <= number <= side + slack for number, side in zip(numbers, sides))


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
