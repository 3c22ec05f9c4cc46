"""Objects: the boxes that ms-swift keeps beside the text, put where the text has a placeholder for them.

    filled(["find <ref-object>", "<bbox>"], {"ref": ["sheep"], "bbox": [[90, 160, 135, 212]]})
    # (["find <ref>sheep</ref>", "<box>(90,160),(135,212)</box>"], "pixels")

`bbox_type` says what the numbers count: "real" (pixels of the picture, the default), "norm1" or "norm1000". They are
written as they are, and the record says which it holds. A bbox of two numbers is a point. Which of several pictures a
box lies in (`image_id`) has no form here, as boxes in text have none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ovisnb.data.boxes import Convention, write_numbers
from ovisnb.data.formats.parts import is_number, short
from ovisnb.data.keys import OBJECTS
from ovisnb.data.record import RecordError

_PLACEHOLDER = re.compile("|".join(OBJECTS))
_UNITS: dict[str, Convention] = {"real": "pixels", "norm1": "normalised", "norm1000": "thousand"}


def are_placed(objects: Any, texts: Sequence[str]) -> bool:
    """Whether `objects` of a row is of this form, and the text has places for them; others keep other things there."""
    return (
        isinstance(objects, dict) and any(map(_PLACEHOLDER.search, texts)) and bool(objects.keys() & OBJECTS.values())
    )


def filled(texts: Sequence[str], objects: dict[str, Any]) -> tuple[list[str], Convention]:
    """The texts with their objects, each in its turn, and what the numbers count; RecordError if they do not match."""
    counts = objects.get("bbox_type") or "real"
    unit = _UNITS.get(counts) if isinstance(counts, str) else None
    if unit is None:
        raise RecordError(f"`bbox_type` of `objects` is {short(counts)}: use {', '.join(_UNITS)}")
    waiting = {}
    for placeholder, key in OBJECTS.items():
        listed, count = objects.get(key) or [], sum(text.count(placeholder) for text in texts)
        if not isinstance(listed, (list, tuple)):
            raise RecordError(f"`{key}` of `objects` is {short(listed)}: write a list")
        if len(listed) != count:
            said = f"the text holds {count} {placeholder} but `{key}` of `objects` has {len(listed)}"
            raise RecordError(f"{said}: make the two match")
        waiting[placeholder] = iter([_ref(one) if key == "ref" else _box(one, unit) for one in listed])
    return [_PLACEHOLDER.sub(lambda found: next(waiting[found[0]]), text) for text in texts], unit


def _ref(name: Any) -> str:
    if not isinstance(name, str):
        raise RecordError(f"`ref` of `objects` holds {short(name)}: write the names as text")
    return f"<ref>{name}</ref>"


def _box(numbers: Any, unit: Convention) -> str:
    if not isinstance(numbers, (list, tuple)) or len(numbers) not in (2, 4) or not all(map(is_number, numbers)):
        raise RecordError(f"`bbox` of `objects` holds {short(numbers)}: write four numbers, or two for a point")
    try:
        written = write_numbers(numbers, unit)
    except ValueError as error:
        raise RecordError(f"`bbox` of `objects` holds {short(numbers)}: {error}", kind="box_outside") from None
    tag, pairs = "box" if len(numbers) == 4 else "point", zip(written[::2], written[1::2])
    return f"<{tag}>{','.join(f'({x},{y})' for x, y in pairs)}</{tag}>"
