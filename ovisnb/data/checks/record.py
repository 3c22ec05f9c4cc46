"""Everything that can be told wrong about one record from what stands in it, without its pictures.

    checked = check_entry({"conversations": [{"from": "human", "value": "<image>"}]}, source="a.json:1")
    [fault.kind for fault in checked.faults]    # ['placeholder_count', 'no_answer']

`Record.from_dict` says the first thing that is wrong; this looks at each piece by itself and lists
them all. What `from_dict` refuses is never passed over here, because it is asked first.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ovisnb.data import boxes, markup
from ovisnb.data.formats import Options, to_record
from ovisnb.data.media import shown
from ovisnb.data.record import OTHER_NAMES, ROLES, Media, Record, RecordError

CONTROL = r"<\|[A-Za-z0-9_]{1,40}\|>|<ovis_[a-z_]{1,40}>"
"""Control tokens as they are written, whatever the model: `<|im_start|>`, `<ovis_visual_atom>`."""
ANSWERS = ("gpt", "ignored_gpt")
# How the notes begin that say nothing against the data: a convention that was assumed, a crowd not asked about.
_REMARKS = ("nothing says that ", "no question about ")
_GROUNDING = ("ref", "box", "point", "tool_response")
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


class Picture(NamedTuple):
    """A picture, frame or video file that the record lists: `media` is the whole of it, `box` what is cut out."""

    name: str
    media: Media
    box: tuple[float, ...] | None
    convention: str
    folder: str | None


@dataclass
class Checked:
    """What is known of one entry before its pictures are looked at."""

    name: str | None
    """Its id, or the one that reading gives it; None where it is no record at all."""
    record: Record | None
    """None if `Record.from_dict` refuses the entry."""
    faults: list[Found] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What reading assumed or passed over, sentences that are no faults."""
    answer: tuple[bool, bool] | None = None
    """(whether the last answer reasons or calls a tool, whether it has `<answer>`); None without an answer."""


def check_entry(
    entry: Any, *, source: str = "", index: int = 0, options: Options | None = None, control: str = CONTROL
) -> Checked:
    """Check one entry of the record form; `control` is a pattern of what is written like a control token.

    Never raises, whatever JSON value `entry` is.
    """
    options = options or Options(Path(source.rpartition(":")[0] or "."))
    try:
        record, refusal = to_record(entry, source=source, index=index, options=options), None
    except RecordError as error:
        record, refusal = None, str(error)
    checked = Checked(_name(entry, source, index) if record is None else record.id, record)
    if not isinstance(entry, Mapping):
        checked.faults.append(Found("wrong_form", _bare(refusal, checked.name, source)))
        return checked
    if checked.name is not None and not _is_text(checked.name):
        checked.faults.append(Found("not_utf8", "its id holds half a character (a lone surrogate): write it as UTF-8"))
    for key, near in misspelt(entry):
        checked.faults.append(Found("unknown_key", f"the key {key!r} is not read: did you mean {near!r}?"))
    if record is None:
        checked.faults += _check_fields(entry)
    else:
        for note in record.notes:
            if note.startswith(_REMARKS):
                checked.remarks.append(note)
                continue
            checked.faults.append(Found("box_outside" if "outside" in note else "changed_on_reading", note))
    turns = [(number, *turn) for number, turn in enumerate(_turns(entry), start=1) if turn[1] is not None]
    _check_pictures(entry, checked)
    for number, role, text in turns:
        _check_text(number, role, text, entry, checked, control)
    if record is None:
        _check_placeholders(entry, turns, checked)
        if not any(map(_refuses, checked.faults)):
            checked.faults.append(Found("wrong_form", _bare(refusal, checked.name, source)))
    spoiled = any(role == "gpt" and text is None for role, text in _turns(entry))
    _check_answers(turns, spoiled, checked)
    return checked


def _refuses(found: Found) -> bool:
    """Whether a fault is one for which reading refuses a record: a slip in a record's own keys alone is none."""
    return found.kind not in ("control_token", "unknown_key") or " is unknown here" in found.message


def box_faults(numbers: Sequence[float], of: str, sizes: Sequence[tuple[float, float]] | None) -> Iterator[Found]:
    """What is wrong with a box (or point) in the convention `of`; the messages lack their subject.

    `sizes` are those of the pictures in pixels that it may lie in (it has to fit one of them); with None,
    or none, pixels are not held against anything. Without `sizes`, faults of the shape alone are found.
    """
    if len(numbers) == 4:
        x1, y1, x2, y2 = numbers
        if x1 == x2 or y1 == y2:
            yield Found("empty_box", f"has no area: {_written(numbers)}")
            return
        if x1 > x2 or y1 > y2:
            yield Found("inverted_box", f"is inverted: {_written(numbers)} has its second corner before its first")
    if sizes is None:
        return
    limits = sizes if of == "pixels" else [boxes.extent(of)]
    slack = 0.01 if of == "pixels" else 1e-9  # files round pixels to two decimals
    if limits and not any(_inside(numbers, limit, slack) for limit in limits):
        yield Found("box_outside", f"reaches out of {_extent(of, limits)}: {_written(numbers)}{_guess(numbers, of)}")


def _name(entry: Any, source: str, index: int) -> str | None:
    """The id of an entry that is no sound record."""
    if not isinstance(entry, Mapping):
        return None
    name = entry.get("id")
    if isinstance(name, (str, int)) and not isinstance(name, bool):
        return str(name)
    return f"{Path(source.rpartition(':')[0] or source).stem or 'record'}-{index}" if name is None else None


def _bare(refusal: str, name: str | None, source: str) -> str:
    """The sentence of a RecordError without the record and the place, which the report names itself."""
    for start in (f"record {name!r} ({source}): ", f"record {name!r}: ", f"{source}: ", "a record: "):
        refusal = refusal.removeprefix(start)
    return refusal


@lru_cache(maxsize=1024)
def _slip(key: str) -> str | None:
    """The field that `key` looks like a slip for."""
    fields = ("image", "video", "conversations", "box_coordinates", "call_coordinates")
    return next(iter(difflib.get_close_matches(key.strip().lower()[:40], fields, 1, 0.8)), None)


def misspelt(entry: Mapping) -> Iterator[tuple[str, str]]:
    """(key, the field that it looks like a slip for), for fields that the entry does not have."""
    for key, value in entry.items():
        near = _slip(key) if isinstance(key, str) and value else None
        if near and near not in entry:
            yield key, near


def _check_fields(entry: Mapping) -> Iterator[Found]:
    """Faults of the fields and turns, each by itself: a sound stand-in is asked with only that piece in it."""
    sound = {"conversations": [{"from": "human", "value": "?"}]}
    for key in ("id", "kind", "box_coordinates", "call_coordinates"):
        if entry.get(key) is not None:
            yield from _refusal({**sound, key: entry[key]}, "wrong_form")
    turns = entry.get("conversations")
    if not isinstance(turns, (list, tuple)):
        yield from _refusal({key: entry[key] for key in ("conversations",) if key in entry}, "wrong_form")
        return
    if not turns:
        yield Found("no_answer", "the conversation has no turns: `conversations` needs at least one")
    for number, turn in enumerate(turns, start=1):
        for found in _refusal({"conversations": [_without_media(turn)]}, "wrong_form"):
            kind = "unknown_role" if "the role " in found.message else found.kind
            kind = "not_utf8" if "half a character" in found.message else kind
            yield Found(kind, found.message.replace("turn 1", f"turn {number}", 1))


def _without_media(turn: Any) -> Any:
    """A turn whose text has no placeholders, so that nothing but its own form can be refused."""
    if isinstance(turn, Mapping) and isinstance(turn.get("value"), str):
        return {**turn, "value": turn["value"].replace("<image>", "").replace("<video>", "")}
    return turn


def _refusal(entry: Mapping, kind: str) -> Iterator[Found]:
    try:
        Record.from_dict(entry)
    except RecordError as error:
        said = re.sub(r"^(record '.*?': |a record: )", "", str(error), count=1, flags=re.DOTALL)
        yield Found(kind, said)


def _turns(entry: Mapping) -> Iterator[tuple[str | None, str | None]]:
    """(role, text) of each turn; None for what is not there. An unknown role that means one of ours counts as it."""
    turns = entry.get("conversations")
    for turn in turns if isinstance(turns, (list, tuple)) else []:
        role = turn.get("from") if isinstance(turn, Mapping) else None
        text = turn.get("value") if isinstance(turn, Mapping) else None
        yield known_role(role), text if isinstance(text, str) else None


def known_role(role: Any) -> str | None:
    """The role that is meant for certain: one of ours in any case and spacing, or another format's name for it."""
    if not isinstance(role, str):
        return None
    word = role.strip().lower()
    return word if word in ROLES else OTHER_NAMES.get(word)


def _check_pictures(entry: Mapping, checked: Checked) -> None:
    folder = checked.record.folder if checked.record else getattr(entry, "folder", None)
    for key in ("image", "video"):
        listed = entry.get(key)
        listed = [] if listed is None else listed if isinstance(listed, (list, tuple)) else [listed]
        for number, item in enumerate(listed, start=1):
            name = f"entry {number} of `{key}`"
            box, convention = None, "pixels"
            if isinstance(item, Mapping) and item.get("box") is not None:
                box, convention = item["box"], item.get("coordinates", "pixels")
                numbers = isinstance(box, (list, tuple)) and len(box) == 4 and all(map(_is_number, box))
                found = list(box_faults(box, "pixels", None)) if numbers else []
                checked.faults += [Found(kind, f"{name}: its box {said}") for kind, said in found]
                if found or not numbers:
                    box = None
                if found or numbers:
                    item = {other: value for other, value in item.items() if other != "box"}
            try:
                media = Media.from_entry(item)
            except RecordError as error:
                kind = "unknown_key" if " is unknown here" in str(error) else "wrong_form"
                kind = (
                    "unreadable_box" if isinstance(item, Mapping) and "box" in item and kind != "unknown_key" else kind
                )
                checked.faults.append(Found(kind, f"{name}: {error}"))
                continue
            if media.path is not None and not _is_text(media.path):
                checked.faults.append(Found("not_utf8", f"{name}: its path holds half a character: write it as UTF-8"))
                continue
            if key == "image" and media.is_video:
                said = f"{shown(repr(media.path))} is a video: list it under `video`, and write <video> where it goes"
                checked.faults.append(Found("wrong_form", f"{name}: {said}"))
                continue
            checked.pictures.append(Picture(name, media.whole, box, convention, folder))


def _check_text(number: int, role: str | None, text: str, entry: Mapping, checked: Checked, control: str) -> None:
    """Control tokens, tags, boxes and calls of one turn."""
    if "<" not in text and control is CONTROL:
        return
    add, turn = checked.faults.append, f"turn {number}"
    tokens = sorted({match[0] for match in re.finditer(control, text)})
    if tokens:
        listed = ", ".join(tokens[:4]) + (" and others" if len(tokens) > 4 else "")
        add(
            Found("control_token", f"{turn} holds {listed}, encoded as plain text, never as a control token: remove it")
        )
    answer = role in ANSWERS or role is None
    loose = [tag for tag in markup.unclosed(text) if answer or tag.name in _GROUNDING]
    if not answer and loose and not _DIGIT.search(text):
        loose = []  # a prompt that speaks of tags
    if loose:
        more = f" (and {len(loose) - 1} more)" if len(loose) > 1 else ""
        add(Found("unclosed_tag", f"{turn}: {loose[0].problem}{more}"))
    told = {tag.start for tag in loose}
    found = [(f"the {region.kind}", region, _convention(entry, "box_coordinates", "normalised"))
             for region in markup.regions(text) if region.kind != "ref"]  # fmt: skip
    if answer:
        found += [
            ("the tool call", call, _convention(entry, "call_coordinates", "pixels")) for call in markup.calls(text)
        ]
    for name, item, convention in found:
        if item.problem:
            if item.start not in told and (answer or _DIGIT.search(item.text)):
                add(Found("unreadable_box", f"{turn}: {item.problem}"))
        elif item.numbers is not None:
            faults = list(box_faults(item.numbers, convention, None))
            checked.faults += [Found(kind, f"{turn}: {name} {said}") for kind, said in faults]
            if not any(kind == "empty_box" for kind, _ in faults):
                checked.places.append(Place(f"{turn}: {name}", item.numbers, convention))


def _check_placeholders(entry: Mapping, turns: Sequence[tuple[int, str | None, str]], checked: Checked) -> None:
    """Whether placeholders and media match, of an entry that is refused: with stand-ins for all that may be wrong."""
    if not turns:
        return
    stand_in: dict[str, Any] = {"id": "x"}
    for key in ("image", "video"):
        listed = entry.get(key)
        if listed is not None:
            listed = listed if isinstance(listed, (list, tuple)) else [listed]
            stand_in[key] = [
                item if key == "video" and isinstance(item, str) and item.strip() else "x" for item in listed
            ]
    stand_in["conversations"] = [
        {"from": role or "gpt", "value": text.encode("utf-8", "replace").decode("utf-8")} for _, role, text in turns
    ]
    for found in _refusal(stand_in, "placeholder_count"):
        # a call that cannot be cut is named by its own fault, unless there is no picture to cut it from
        if not found.message.startswith("turn ") or "no picture before" in found.message:
            mixed = "mixes" in found.message or "no frames" in found.message
            checked.faults.append(Found("wrong_form", found.message) if mixed else found)


def _check_answers(turns: Sequence[tuple[int, str | None, str]], spoiled: bool, checked: Checked) -> None:
    """Answers that are missing or empty; `spoiled`: there is one whose text is none, which has a fault of its own."""
    answers = [(number, text) for number, role, text in turns if role == "gpt"]
    empty = [number for number, text in answers if not text.strip()]
    if not answers and turns and not spoiled:
        checked.faults.append(Found("no_answer", "the conversation has no gpt turn: add the answer"))
    for number in empty:
        checked.faults.append(Found("no_answer", f"turn {number}: the gpt turn is empty: write its answer"))
    if answers and answers[-1][1].strip():
        last = answers[-1][1]
        checked.answer = ("<think>" in last or "<tool_call>" in last, "<answer>" in last)


def _convention(entry: Mapping, key: str, usual: str) -> str:
    value = entry.get(key)
    return value if isinstance(value, str) and value in boxes.CONVENTIONS else usual


def _inside(numbers: Sequence[float], limit: tuple[float, float], slack: float) -> bool:
    sides = (limit[0], limit[1]) * 2
    return all(-slack <= number <= side + slack for number, side in zip(numbers, sides))


def _extent(of: str, limits: Sequence[tuple[float, float]]) -> str:
    if of == "normalised":
        return "0 to 1"
    if of == "thousand":
        return "0 to 1000"
    return "its picture of " + " or ".join(f"{width}x{height}" for width, height in limits[:3]) + " pixels"


def _guess(numbers: Sequence[float], of: str) -> str:
    """What may be meant by numbers that are far from their convention."""
    key = "box_coordinates"
    if of == "normalised" and max(numbers) > 2:
        return f' (if these are pixels, say so: `{key}`: "pixels")'
    return ""


def _written(numbers: Sequence[float]) -> str:
    return "[" + ", ".join(f"{number:g}" for number in numbers) + "]"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
