"""Repairs of one record: only what there is no doubt about.

    entry, done = repair({"conversations": [{"from": "user", "value": "Hi"}, ...]}, sizes=[(640, 480)])
    done    # [Found(kind="unknown_role", message="turn 1: the role 'user' became 'human'")]

- a role in another format's name, or in other case, becomes ours;
- what a chat template left at the ends of a turn (`<|im_start|>user`, `<|im_end|>`) goes;
- a box whose corners are the wrong way round gets them put in order;
- a box that reaches out of its picture is cut to it, if at least half of it lies inside;
- a misspelt key gets its name, if the record is sound with it and not without.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ovisnb.data import boxes, markup
from ovisnb.data.base import known_role
from ovisnb.data.checks.record import ANSWERS, Found, box_faults, misspelt
from ovisnb.data.record import ROLES, Record, RecordError

_START = re.compile(r"\A\s{0,9}<\|im_start\|>\s{0,9}(?:(?:system|user|assistant)\s{0,9}\n)?")
_END = ("<|im_end|>", "<|endoftext|>")
Sizes = Sequence[tuple[int, int]]


def repair(
    entry: Mapping[str, Any],
    sizes: Sizes | None = None,
    ignore: Collection[str] = (),
    crops: Mapping[tuple[str, int], tuple[int, int] | None] = MappingProxyType({}),
) -> tuple[dict[str, Any], list[Found]]:
    """(the entry with its repairs, what was done).

    `sizes` are (width, height) in pixels of its whole pictures, None where one is not known: nothing is
    then cut to pixels. `crops` are those of the pictures that its entries with a sound box are crops of, by key and
    number ("image", 2). Kinds in `ignore` are left as they are.
    """
    entry, done = dict(entry), []
    if "unknown_key" not in ignore:
        entry = _with_keys(entry, done)
    for key in ("image", "video"):
        listed = entry.get(key)
        if isinstance(listed, (list, tuple)):
            entry[key] = [
                _picture(item, f"entry {at} of `{key}`", crops.get((key, at)), ignore, done)
                for at, item in enumerate(listed, start=1)
            ]
        elif listed is not None:
            entry[key] = _picture(listed, f"entry 1 of `{key}`", crops.get((key, 1)), ignore, done)
    turns = entry.get("conversations")
    if isinstance(turns, (list, tuple)):
        limits = {"box": _limits(entry, "box_coordinates", "normalised", sizes)}
        limits["call"] = _limits(entry, "call_coordinates", "pixels", sizes)
        entry["conversations"] = [_turn(turn, f"turn {at}", limits, ignore, done) for at, turn in enumerate(turns, 1)]
    return entry, done


def box_in(box: Sequence[float], convention: str, sizes: Sizes | None) -> tuple[tuple[float, ...], list[str]]:
    """(the box put in order and cut to its picture where that is certain, the kinds of fault it had)."""
    mended, kinds = tuple(box), []
    for found in box_faults(box, convention, sizes or []):
        kinds.append(found.kind)
        if found.kind == "inverted_box":
            x1, y1, x2, y2 = mended
            mended = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        elif found.kind == "box_outside":
            limits = sizes if convention == "pixels" else [boxes.extent(convention)]
            inside = boxes.clip(mended, limits[0]) if len(limits) == 1 and len(mended) == 4 else mended
            if boxes.area(inside) * 2 >= boxes.area(mended) > 0:
                mended = tuple(inside)
    return mended, kinds


def _with_keys(entry: dict[str, Any], done: list[Found]) -> dict[str, Any]:
    """The entry with misspelt keys put right, if that makes it sound and it was not."""
    slips = dict(misspelt(entry))
    if not slips or _is_sound(entry):
        return entry
    mended = {slips.get(key, key): value for key, value in entry.items()}
    if len(mended) < len(entry) or not _is_sound(mended):
        return entry
    done += [Found("unknown_key", f"the key {key!r} became {name!r}") for key, name in slips.items()]
    return mended


def _is_sound(entry: Mapping[str, Any]) -> bool:
    try:
        Record.from_dict(entry)
    except RecordError:
        return False
    return True


def _limits(entry: Mapping, key: str, usual: str, sizes: Sizes | None) -> tuple[str, Sizes | None]:
    convention = entry.get(key, usual)
    return (convention if convention in boxes.CONVENTIONS else usual), list(dict.fromkeys(sizes or [])) or None


def _picture(item: Any, place: str, size: tuple[int, int] | None, ignore: Collection[str], done: list[Found]) -> Any:
    """A picture entry whose box has its corners in order, or is cut to its picture of `size` if that is certain."""
    box = item.get("box") if isinstance(item, Mapping) else None
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return item
    if not all(isinstance(number, (int, float)) and abs(number) < 1e300 for number in box):
        return item
    convention = item.get("coordinates", "pixels") if size else "pixels"
    mended, kinds = box_in(box, convention, size and [size])
    kind = "box_outside" if size else "inverted_box"
    if kinds != [kind] or kind in ignore or mended == tuple(box):
        return item
    done.append(Found(kind, f"{place}: its box {list(box)} {'was cut to' if size else 'became'} {list(mended)}"))
    return {**item, "box": list(mended)}


def _turn(turn: Any, place: str, limits: dict, ignore: Collection[str], done: list[Found]) -> Any:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        return turn
    turn = dict(turn)
    role, meant = turn.get("from"), known_role(turn.get("from"))
    if role not in ROLES and meant and "unknown_role" not in ignore:
        turn["from"] = meant
        done.append(Found("unknown_role", f"{place}: the role {role!r} became {meant!r}"))
    text = turn["value"]
    if "control_token" not in ignore and "<|" in text:
        stripped = _without_end(_START.sub("", text, count=1))
        if stripped != text:
            done.append(Found("control_token", f"{place}: what a chat template left at its ends was taken off"))
            text = stripped
    turn["value"] = _text(text, meant, place, limits, ignore, done)
    return turn


def _without_end(text: str) -> str:
    """`text` without the tokens of _END at its end; untouched if there are none."""
    stripped = text.rstrip()
    while stripped.endswith(_END):
        for token in _END:
            stripped = stripped.removesuffix(token)
        text = stripped = stripped.rstrip()
    return text


def _text(text: str, role: str | None, place: str, limits: dict, ignore: Collection[str], done: list[Found]) -> str:
    """A turn's text with its boxes and calls mended."""
    found = [("box", item) for item in markup.regions(text) if item.kind == "box"]
    if role in ANSWERS:
        found += [("call", item) for item in markup.calls(text)]
    pieces, last = [], 0
    for name, item in sorted(found, key=lambda pair: pair[1].start):
        if item.numbers is None or item.start < last:  # a box inside a call goes with it
            continue
        convention, sizes = limits[name]
        mended, kinds = box_in(item.numbers, convention, sizes)
        if mended == item.numbers or not set(kinds) - set(ignore):
            continue
        try:
            numbers = boxes.write_numbers(mended, convention)
        except ValueError:  # far off its convention: no repair is certain
            continue
        old = text[item.start : item.end]
        if name == "box":
            new = "<box>({},{}),({},{})</box>".format(*numbers)
        else:
            new = re.sub(r"\[[^\]]*\]?", f"[{', '.join(numbers)}]", old, count=1)
        pieces += [text[last : item.start], new]
        last = item.end
        kind = "box_outside" if "box_outside" in kinds else "inverted_box"
        done.append(Found(kind, f"{place}: {old} became {new}"))
    return "".join([*pieces, text[last:]])
