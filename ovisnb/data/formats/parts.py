"""What several formats need: text that holds no placeholder, and pictures however a row writes them.

    plain("a <image> tag")                                  # ("a  tag", 1)
    picture("data:image/png;base64,iVBORw0KGgo...")         # {"bytes": b"..."}

Nothing is downloaded: a picture is a path, the bytes of a picture, or a PIL image.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import unquote

from PIL import Image

from ovisnb.data import boxes
from ovisnb.data.boxes import Box
from ovisnb.data.record import IMAGE, VIDEO, Note, Record, RecordError

LARGEST_DATA_URL = 64 << 20  # characters: 48 MB of picture
_SHOWN_CROP = f"</tool_call>{IMAGE}"
assert len(IMAGE) == len(VIDEO)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{1,20})://")


def plain(text: str, keep_crops: bool = False) -> tuple[str, int]:
    """`text` without `<image>` and `<video>`, and how many of them it held; `keep_crops` keeps `</tool_call><image>`.

    The original takes such words out of captions, and the released chat template out of text. Also what
    only becomes one by taking out another ("<im<image>age>") is taken out; in time linear in the text.
    """
    if IMAGE not in text and VIDEO not in text:
        return text, 0
    kept: list[str] = []
    count = 0
    for character in text:
        kept.append(character)
        if character != ">":
            continue
        end = "".join(kept[-len(_SHOWN_CROP) :])
        if end.endswith((IMAGE, VIDEO)) and not (keep_crops and end == _SHOWN_CROP):
            del kept[-len(IMAGE) :]
            count += 1
    return "".join(kept), count


def removed(count: int, what: str) -> str:
    """The note for `plain`: what reading took out."""
    return f"{count} {IMAGE} or {VIDEO} in {what} {'was' if count == 1 else 'were'} text, and taken out"


def picture(value: Any) -> Any:
    """An entry of the record form for a picture as files write it; RecordError, one sentence, for what is none.

    Taken are paths, `file://` and `data:` URLs, bytes, PIL images, and objects with `bytes`, `path` or `url`.
    """
    if isinstance(value, bytes):
        return {"bytes": value}
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict):
        if value.get("bytes") is not None or value.get("path") is not None:
            known = ("bytes", "path", "box", "coordinates")
            return {key: value[key] for key in known if value.get(key) is not None}
        value = value.get("url", value)
    if not isinstance(value, str):
        raise RecordError(f"a picture is a path, a data: URL, bytes or a PIL image, not {short(value)}")
    if value[:5].lower() == "data:":
        return {"bytes": _decoded(value)}
    if value[:7].lower() == "file://":
        return unquote(value[7:])
    if url := _URL.match(value):
        raise RecordError(f"a picture lies at an address ({url[1]}://), and nothing is downloaded: save it as a file")
    return value


def pictures(value: Any) -> list[Any]:
    """The pictures of a column: a list of them, one alone, or none (None)."""
    if value is None:
        return []
    return [picture(item) for item in value] if isinstance(value, (list, tuple)) else [picture(value)]


def present(value: Any) -> Any:
    """`value` without the keys that are None, at any depth: a table has every column in every row."""
    if isinstance(value, dict):
        return {key: present(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [present(item) for item in value]
    return value


def first_of(row: dict, keys: Iterable[str], meaning: str) -> tuple[str, Any]:
    """The first of `keys` that a row has, and its value; RecordError, naming `meaning`, if it has none."""
    for key in keys:
        if row.get(key) is not None:
            return key, row[key]
    raise RecordError(f"the key `{meaning}` is missing")


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that may be a coordinate: finite, and not beyond every picture."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def cut(box: Sequence[float], size: Sequence[float], named: str, where: str) -> tuple[Box | None, Note | None]:
    """-> (the part of a box inside a picture of `size`, None if there is none; what is wrong with the box, or None)."""
    if boxes.area(box) <= 0:
        return None, Note(f"{named} has no area", boxes.flaw(box) or "empty_box")
    inside = boxes.clip(box, size)
    if boxes.area(inside) <= 0:
        return None, Note(f"{named} lies outside {where}", "box_outside")
    if inside == box:
        return inside, None
    left = ", ".join(f"{number:g}" for number in inside)
    return inside, Note(f"{named} reaches outside {where}: it was cut to [{left}]", "box_outside")


def refused(record: Record, form: str, reason: str) -> RecordError:
    """The error about a record that a format has no form for: "... cannot be written as messages: ..."."""
    return RecordError(f"{record.where} cannot be written as {form}: {reason}")


def refuse_keys(record: Record, form: str, keys: Iterable[str]) -> None:
    """RecordError for a record whose `meta` holds one of `keys`, which mean something else in the format."""
    if taken := [key for key in record.meta if key in keys]:
        raise refused(record, form, f"`meta` holds {taken[0]!r}, which is a key of the format")


def short(value: Any) -> str:
    """A value as an error shows it: on one line, not endless."""
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:60]}..."


def _decoded(url: str) -> bytes:
    """The bytes of a `data:` URL."""
    if len(url) > LARGEST_DATA_URL:
        raise RecordError(f"a data: URL has {len(url):,} characters, more than {LARGEST_DATA_URL:,}: save the picture")
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RecordError("a data: URL is not of the form data:image/png;base64,...: save the picture as a file")
    try:
        return base64.b64decode(unquote(content) if "%" in content else content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(f"a data: URL is no base64 that can be read ({error}): save the picture as a file") from None
