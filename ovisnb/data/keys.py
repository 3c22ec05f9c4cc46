"""The keys of a turn, whoever wrote it: which say that it carries no loss, and which must not be lost.

    role_of({"from": "gpt", "value": "No.", "loss": False}, "gpt")     # 'ignored_gpt'
    unread({"from": "human", "value": "Hi", "mood": "glad"}, ("from", "value"))    # ['mood']

One rule for the turns of every format, and for the parts of a message. A key that holds nothing (null, false, "", [], {})
is as if it were not there. Of the others:

- `loss` (ms-swift), `weight` (OpenAI), `train` or `training` (Axolotl), false or 0, makes an answer one without loss:
  `ignored_gpt`. True or 1 is what holds anyway. Any other value, and true on a turn that is no answer,
  ask for what does not exist here: refused.
- a key that is not read is refused where it names a picture, a video, sound, a file, loss, a call or text: what is learnt
  would be another thing than was written.
- any other key that is not read is told in a remark, except `NAMES`, which teach nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from PIL import Image

from ovisnb.data.base import Note, RecordError

# Keys of a data file with a meaning here; every other key is kept in `meta`.
FIELDS = ("id", "image", "video", "kind", "box_coordinates", "call_coordinates", "conversations")
_FIELDS = frozenset(FIELDS)
UNREAD = {
    "images": "name it `image`",
    "videos": "name it `video`, of which a record has one",
    "audio": "sound has no form here, so drop it",
    "audios": "sound has no form here, so drop the record",
    "system": "write it as the first turn, of role system",
    "system_prompt": "write it as the first turn, of role system",
    "history": "write it as turns",
    "messages": "write all turns in `conversations`",
}
"""Keys of a record that others read and the record form does not, and what to do: none of them is kept in `meta`."""
_FILES = re.compile(
    r"(image|img|picture|photo|video)s?_?(?:path|file|file_?name|name|ur[il]|\d{1,2})?s?", re.IGNORECASE
)
"""Keys under which others name the picture or video of a row, beside our own (`_MEDIA`)."""
_MEDIA = ("image", "images", "video", "videos")
_PICTURE_FILE = re.compile(r"\.(?:jpe?g|png|webp|gif|bmp|tiff?)\Z", re.IGNORECASE)
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")  # how the bytes of one begin
OBJECTS = {"<ref-object>": "ref", "<bbox>": "bbox"}
"""ms-swift's placeholders for what stands in `objects`, and the key there."""
FLAGS = ("loss", "weight", "train", "training")
NAMES = ("id", "name", "source", "tool_call_id")
_CARRIES = re.compile(
    r"image|img|photo|picture|video|audio|loss|weight|train|mask|function_call|tool_calls|^(?:text|content|value|path|url|bytes|base64)$",
    re.IGNORECASE,
)


def holds(value: Any) -> bool:
    """Whether a key with this value says anything."""
    return not (value is None or value is False or (isinstance(value, (str, list, tuple, dict)) and not value))


def beside(row: Mapping[str, Any]) -> dict[str, str]:
    """What a row of from/value turns says that the record form has not: key -> what to do.

    The keys of `UNREAD`, LLaMA-Factory's `chosen` and `kto_tag`, `objects` for which the text has placeholders, and
    the name of a picture under another key where the row has none: it would be learnt without.
    """
    if row.keys() <= _FIELDS:  # most rows, and a million of them
        return {}
    found = {key: advice for key, advice in UNREAD.items() if key in row and holds(row[key])}
    if not any(holds(row.get(key)) for key in _MEDIA):
        found |= {key: f"it is a {what}, so name it `{name}`" for key, what, name in _named(row)}
    if isinstance(row.get("chosen"), dict):
        found["chosen"] = "write it as the last turn"
    if row.get("kto_tag") is False:
        found["kto_tag"] = "it marks an answer that is not to be learnt, so drop the record"
    if isinstance(row.get("objects"), dict) and isinstance(turns := row.get("conversations"), (list, tuple)):
        texts = [turn["value"] for turn in turns if isinstance(turn, dict) and isinstance(turn.get("value"), str)]
        if any(placeholder in text for text in texts for placeholder in OBJECTS):
            found["objects"] = "write its names and boxes into the text"
    return found


def _named(row: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(key, what it is, our key for it) for each picture or video under another name than ours."""
    for key, value in row.items():
        if not isinstance(key, str) or key in _MEDIA:
            continue
        found = _FILES.fullmatch(key) if isinstance(value, (str, list)) and value else None
        if found and found[1].lower() == "video":
            yield key, "video", "video"
        elif found or _is_picture(value) or (key in ("file_name", "filename") and _PICTURE_FILE.search(str(value))):
            yield key, "picture", "image"


def _is_picture(value: Any) -> bool:
    """Whether a value is a picture itself, or the first of a list is: as the image columns of data sets hold it."""
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        return isinstance(value.get("bytes"), bytes) or bool(_PICTURE_FILE.search(str(value.get("path"))))
    return isinstance(value, Image.Image) or (isinstance(value, bytes) and value.startswith(_PICTURES))


def role_of(turn: Mapping[str, Any], role: str) -> str:
    """`role`, or "ignored_gpt" for a "gpt" whose flags say that it is not learnt; RecordError for flags of no meaning."""
    for key in FLAGS:
        flag = turn.get(key)
        if flag is None:
            continue
        if not isinstance(flag, (bool, int, float)) or flag not in (0, 1):
            said = f"its `{key}` is {flag!r:.40}: an answer is learnt or it is not, so write true or false"
            raise RecordError(said)
        if flag and role not in ("gpt", "ignored_gpt"):
            raise RecordError(f"its `{key}` is {flag!r}, but only answers are learnt: write false, or drop the key")
        if not flag and role == "gpt":
            role = "ignored_gpt"
    return role


def unread(turn: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """The keys beside `read` that say something; RecordError for one without which the turn says another thing."""
    known = (*read, *FLAGS, *NAMES)
    found = [str(key) for key, value in turn.items() if key not in known and holds(value)]
    for key in found:
        if _CARRIES.search(key):
            said = (
                f"its key {key!r:.40} is not read: drop it, or say it as the form does (a picture or video is listed "
            )
            raise RecordError(f"{said}beside the turns, with <image> or <video> where it goes)", kind="unknown_key")
    return found


def told(keys: Collection[str], place: str) -> list[Note]:
    """A note for each key that is not read."""
    return [Note(f"{place}: the key {key!r:.40} is not read: drop or rename it", "remark") for key in keys]
