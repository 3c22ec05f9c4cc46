"""Record: one conversation with its pictures, whatever file it came from.

    record = Record.from_dict({"image": "cat.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]})

A record that exists is sound: its turns and its pictures have been checked against each other, so
nothing after this point counts placeholders again. Pictures are references; `ovisnb.data.media`
opens them. All objects are frozen.

A crop call followed by `<image>`, "<tool_call>Crop [10, 20, 90, 80]</tool_call><image>", needs no entry in
`image`: it gets that part of the last whole picture before it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, get_args

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ovisnb.data import boxes, markup
from ovisnb.data.boxes import CONVENTIONS, Convention

Role = Literal["system", "human", "gpt", "ignored_gpt"]
ROLES: tuple[str, ...] = get_args(Role)
IMAGE, VIDEO = "<image>", "<video>"

# What other formats call our roles: closer in meaning than anything spelling could tell.
OTHER_NAMES = {"user": "human", "assistant": "gpt", "model": "gpt", "bot": "gpt", "chatgpt": "gpt"}
# Keys of a data file with a meaning here; every other key is kept in `meta`.
FIELDS = ("id", "image", "video", "kind", "box_coordinates", "call_coordinates", "conversations")
# What marks an entry of `video` as a video file rather than a picture of one frame.
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")


class RecordError(ValueError):
    """Something is wrong with the data: one sentence that names the record and what to do."""


class _Frozen(BaseModel):
    """A frozen model whose errors are one sentence (pydantic's own report takes several lines)."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as report:
            raise RecordError(_sentence(report, tuple(type(self).model_fields))) from None


class Media(_Frozen):
    """One picture or video frame, or a crop of it: a file, a PIL image or the bytes of an encoded picture.

    In `Record.video` it may also be a video file, which then is the whole video.
    """

    path: str | None = None
    image: Image.Image | None = Field(default=None, repr=False)
    data: bytes | None = Field(default=None, repr=False)
    """A picture as it stands in a file (JPEG, PNG, ...), from a cell of a table or a member of an archive."""
    box: tuple[float, float, float, float] | None = None
    """x1, y1, x2, y2 of the original, counted in `coordinates`: this picture is that crop."""
    coordinates: Convention = "pixels"

    @field_validator("path", mode="before")
    @classmethod
    def _path_as_text(cls, path: Any) -> Any:
        return os.fspath(path) if isinstance(path, os.PathLike) else path

    @field_validator("box", mode="before")
    @classmethod
    def _box_is_a_box(cls, box: Any) -> Any:
        numbers = isinstance(box, (list, tuple)) and all(isinstance(number, (int, float)) for number in box)
        return tuple(boxes.checked(box)) if numbers else box  # pydantic refuses whatever is no list of numbers

    @model_validator(mode="after")
    def _one_origin(self) -> Media:
        if (self.path, self.image, self.data).count(None) != 2:
            raise ValueError("a picture needs a path, an image or data (one of them)")
        if self.path is not None and not self.path.strip():
            raise ValueError("a picture's path is empty")
        return self

    @property
    def is_video(self) -> bool:
        """Whether this is a video file, by its name."""
        return self.path is not None and self.path.lower().endswith(VIDEO_SUFFIXES)

    @property
    def whole(self) -> Media:
        """The picture that this is a crop of; of a whole picture, itself."""
        return self if self.box is None else self.model_copy(update={"box": None, "coordinates": "pixels"})

    @property
    def origin(self) -> object:
        """A key for the whole picture, the same for all crops of it: its path, its bytes or which PIL image it is."""
        return self.path or self.data or id(self.image)

    def crop(self, box: Sequence[float], coordinates: Convention = "pixels") -> Media:
        """The crop of this whole picture; RecordError for a box without area."""
        return Media(path=self.path, image=self.image, data=self.data, box=box, coordinates=coordinates)

    @classmethod
    def from_entry(cls, entry: Any) -> Media:
        """From an entry of `image` or `video`: a path, a PIL image, or a dict of this class's fields.

        The dict of a Hugging Face image that is not decoded works too: `{"bytes": ..., "path": ...}`.
        """
        if isinstance(entry, (str, os.PathLike)):
            return cls(path=entry)
        if isinstance(entry, Image.Image):
            return cls(image=entry)
        if isinstance(entry, Mapping) and all(isinstance(key, str) for key in entry):
            fields = dict(entry)
            if (data := fields.pop("bytes", None)) is not None:
                fields = {**fields, "data": data, "path": None}  # its path is only where the bytes once lay
            return cls(**fields)
        raise RecordError(
            f'a picture is a path, {{"path": ..., "box": [x1, y1, x2, y2]}} or a PIL image, not {_kind_of(entry)}'
        )

    def to_entry(self) -> Any:
        """The shortest entry that `from_entry` reads back to this."""
        name = next(name for name in ("path", "image", "data") if getattr(self, name) is not None)
        entry = {name: getattr(self, name)}
        if self.box is not None:
            entry["box"] = list(self.box)
        if self.coordinates != "pixels":
            entry["coordinates"] = self.coordinates
        return entry[name] if len(entry) == 1 and name != "data" else entry


class Turn(_Frozen):
    """One turn of a conversation; `<image>` and `<video>` may stand anywhere in the text, which may be empty."""

    role: Role
    text: str

    @field_validator("role", mode="before")
    @classmethod
    def _known_role(cls, role: Any) -> Any:
        if role in ROLES:
            return role
        near = OTHER_NAMES.get(role) if isinstance(role, str) else None
        near = near or next(iter(difflib.get_close_matches(str(role).lower(), ROLES, 1)), None)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise ValueError(f"the role {role!r} is unknown: use {', '.join(ROLES[:-1])} or {ROLES[-1]}{hint}")

    @field_validator("text")
    @classmethod
    def _text_can_be_written(cls, text: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"its text holds half a character (a lone surrogate) at position {error.start}: write it as UTF-8"
            ) from None
        return text


class Record(_Frozen):
    """One conversation.

    `images` stand in the order of their `<image>` placeholders over all turns; `video` is the frames
    of the one video behind `<video>`, or one entry that is a video file. `source` says where the record
    came from ("train.json:12", "shapes:7"); `meta` keeps every other field of the data as it was.

    `box_coordinates` says what the numbers in `<box>` and `<point>` of the text count, and
    `call_coordinates` those in `<tool_call>`: a convention of `ovisnb.data.boxes`. `folder` is the image
    folder of this record's data set, where it has one of its own. `notes` has one sentence for each thing
    that reading changed (a clipped box, say). Neither of the last two is written to a file.
    """

    id: str
    turns: list[Turn]
    images: list[Media] = Field(default_factory=list)
    video: list[Media] | None = None
    kind: str | None = None
    box_coordinates: Convention = "normalised"
    call_coordinates: Convention = "pixels"
    source: str = ""
    folder: str | None = None
    notes: tuple[str, ...] = ()
    meta: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _pieces_match(self) -> Record:
        problem = self._problem()
        if problem:
            raise ValueError(f"{self.where}: {problem}")
        return self

    @property
    def where(self) -> str:
        """How an error names it: "record 'cat-1' (train.json:12)"."""
        return _where(self.id, self.source)

    def _problem(self) -> str | None:
        if not self.turns:
            return "the conversation has no turns: `conversations` needs at least one"
        if self.video is not None and not self.video:
            return "`video` has no frames: list them or leave `video` out"
        if self.video is not None and len(self.video) > 1 and any(frame.is_video for frame in self.video):
            return "`video` mixes a video file with other frames: give one video file or a list of pictures"
        taken = [key for key in self.meta if key in FIELDS]
        if taken:
            return f"`meta` may not hold {taken[0]!r}, which is a field of its own"
        images = sum(turn.text.count(IMAGE) for turn in self.turns)
        if images != len(self.images):
            return (
                f"the turns hold {images} {IMAGE} but `image` lists {len(self.images)} "
                f"{'picture' if len(self.images) == 1 else 'pictures'}: {self._image_advice(images)}"
            )
        videos = sum(turn.text.count(VIDEO) for turn in self.turns)
        if videos != (self.video is not None):
            advice = "remove `video` or" if self.video is not None else "list the frames in `video` or"
            have = "has one" if self.video is not None else "has none"
            return f"the turns hold {videos} {VIDEO} but the record {have}: {advice} make the two match"
        return None

    def _image_advice(self, images: int) -> str:
        misspelt = difflib.get_close_matches("image", self.meta, 1, 0.8)
        if misspelt and not self.images:
            return f"the key is `image`, not `{misspelt[0]}`"
        if images < len(self.images):
            return f"write {IMAGE} in the text where each picture belongs, or drop a picture"
        if any(f"</tool_call>{IMAGE}" in turn.text for turn in self.turns):
            return (
                f"list the picture of every {IMAGE}, or leave out those of all crop calls, "
                "which are then cut from the picture before them"
            )
        return f"list one picture for each {IMAGE}, in order"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "", index: int = 0) -> Record:
        """From the dict of a data file (keys `id`, `image`, `video`, `kind`, `box_coordinates`,
        `call_coordinates`, `conversations`).

        `source` and `index` name a record without an id: "train.json:12" and 3 make "train-3".
        An `<image>` right after a crop call for which `image` has no entry gets the crop.
        Raises RecordError, one sentence naming the record, the source and the turn or picture.
        """
        if not isinstance(data, Mapping):
            raise RecordError(
                f"{_where(None, source)}: a record is an object with `conversations`, not {_kind_of(data)}"
            )
        name = data.get("id")
        if name is None:
            name = f"{_stem(source)}-{index}"
        elif isinstance(name, bool) or not isinstance(name, (str, int)):
            raise RecordError(f"{_where(None, source)}: `id` is text or a whole number, not {_kind_of(name)}")
        where = _where(str(name), source)
        fields = {
            "id": str(name),
            "turns": _read_turns(data, where),
            "images": _read_media(data, "image", where) or [],
            "video": _read_media(data, "video", where),
            "meta": {key: value for key, value in data.items() if key not in FIELDS},
        }
        kind = data.get("kind")
        if not (kind is None or isinstance(kind, str)):
            raise RecordError(f"{where}: `kind` is text, not {_kind_of(kind)}")
        for key in ("box_coordinates", "call_coordinates"):
            if (value := data.get(key)) is not None:
                if value not in CONVENTIONS:
                    known = f"{', '.join(CONVENTIONS[:-1])} or {CONVENTIONS[-1]}"
                    raise RecordError(f"{where}: `{key}` is {value!r}: use {known}")
                fields[key] = value
        fields["images"] = _with_crops(fields, where)
        return cls(**fields, kind=kind, source=source)

    def to_dict(self) -> dict[str, Any]:
        """The dict `from_dict` reads back; `source` is not in it (it belongs to the file)."""
        data: dict[str, Any] = {"id": self.id}
        if self.images:
            entries = [media.to_entry() for media in self.images]
            data["image"] = entries[0] if len(entries) == 1 and isinstance(entries[0], str) else entries
        if self.video is not None:
            data["video"] = [media.to_entry() for media in self.video]
        if self.kind is not None:
            data["kind"] = self.kind
        if any("<box>" in turn.text or "<point>" in turn.text for turn in self.turns):
            data["box_coordinates"] = self.box_coordinates
        if any("<tool_call>" in turn.text for turn in self.turns):
            data["call_coordinates"] = self.call_coordinates
        data["conversations"] = [{"from": turn.role, "value": turn.text} for turn in self.turns]
        return {**data, **self.meta}


def _read_turns(data: Mapping[str, Any], where: str) -> list[Turn]:
    if "conversations" not in data:
        raise RecordError(f"{where}: the key `conversations` is missing")
    if not isinstance(data["conversations"], (list, tuple)):
        raise RecordError(f"{where}: `conversations` is a list of turns, not {_kind_of(data['conversations'])}")
    turns = []
    for number, turn in enumerate(data["conversations"], start=1):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise RecordError(f'{where}: turn {number} is not of the form {{"from": role, "value": text}}')
        if not isinstance(turn["value"], str):
            raise RecordError(f"{where}: turn {number}: its value is text, not {_kind_of(turn['value'])}")
        try:
            turns.append(Turn(role=turn["from"], text=turn["value"]))
        except RecordError as error:
            raise RecordError(f"{where}: turn {number}: {error}") from None
    return turns


def _read_media(data: Mapping[str, Any], key: str, where: str) -> list[Media] | None:
    entries = data.get(key)
    if entries is None:
        return None
    if not isinstance(entries, (list, tuple)):
        entries = [entries]
    media = []
    for number, entry in enumerate(entries, start=1):
        try:
            media.append(Media.from_entry(entry))
        except RecordError as error:
            raise RecordError(f"{where}: entry {number} of `{key}`: {error}") from None
    return media


def _with_crops(fields: Mapping[str, Any], where: str) -> list[Media]:
    """The pictures, with a crop for each `<image>` that follows its call and has no picture in the data."""
    turns, listed = fields["turns"], fields["images"]
    missing = sum(turn.text.count(IMAGE) for turn in turns) - len(listed)
    if missing <= 0 or not any("</tool_call>" in turn.text for turn in turns):
        return listed
    slots = [(number, call) for number, turn in enumerate(turns, start=1) for call in _slots(turn)]
    if missing != sum(call is not None for _, call in slots):
        return listed  # the record's own check says what is wrong with these
    images, whole, rest = [], None, iter(listed)
    for number, call in slots:
        if call is None:
            images.append(next(rest))
            whole = images[-1] if images[-1].box is None else whole
            continue
        if whole is None:
            raise RecordError(f"{where}: turn {number}: there is no picture before the call {call.text} to cut from")
        if call.numbers is None:
            raise RecordError(f"{where}: turn {number}: {call.problem}")
        try:
            images.append(whole.crop(call.numbers, fields.get("call_coordinates", "pixels")))
        except RecordError as error:
            raise RecordError(f"{where}: turn {number}: the call {call.text}: {error}") from None
    return images


def _slots(turn: Turn) -> Iterator[markup.Call | None]:
    """For each `<image>` of a turn the crop call that it answers, or None; calls and pictures pair up in order."""
    text, waiting = turn.text, deque()
    calls = markup.calls(text) if turn.role in ("gpt", "ignored_gpt") else []
    found = [(call.start, call.end, call) for call in calls]
    found += [(match.start(), match.end(), None) for match in re.finditer(IMAGE, text)]
    last = 0
    for start, end, call in sorted(found, key=lambda item: item[0]):
        if text[last:start].strip():
            waiting.clear()
        last = end
        if call is None:
            yield waiting.popleft() if waiting else None
        elif call.name == "crop":
            waiting.append(call)


def _where(name: str | None, source: str) -> str:
    """ "record 'cat-1' (train.json:12)", or as much of it as is known."""
    if name is None:
        return source or "a record"
    return f"record {name!r}" + (f" ({source})" if source else "")


def _stem(source: str) -> str:
    return PurePath(source.rpartition(":")[0] or source).stem or "record"


def _kind_of(value: Any) -> str:
    """What `value` is, in JSON's words where it has one."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"the number {value}"
    return names.get(type(value), type(value).__name__)


def _sentence(report: ValidationError, fields: tuple[str, ...]) -> str:
    """The first problem of a pydantic report about a model with these fields, as one sentence."""
    first = report.errors(include_url=False)[0]
    if first["type"] == "value_error":  # raised by our own validators: already a sentence
        return str(first["ctx"]["error"])
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"the key `{field}` is unknown here: use {', '.join(fields[:-1])} or {fields[-1]}"
    return f"`{field}`: {first['msg'][:1].lower()}{first['msg'][1:]}"
