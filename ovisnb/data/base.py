"""What a record is made of, turns and references to pictures, and the error that says what is wrong with one.

    Turn(role="human", text="<image>\\nWhat is this?")
    Media(path="cat.jpg", box=(10, 20, 90, 80))

An error carries what it is: `kind` is one of `ovisnb.data.checks.faults.KINDS`, so that nobody reads it out of the
sentence. `ovisnb.data.record` offers all of this together with `Record`; import it from there.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ovisnb.data import boxes
from ovisnb.data.boxes import Convention

Role = Literal["system", "human", "gpt", "ignored_gpt"]
ROLES: tuple[str, ...] = get_args(Role)
IMAGE, VIDEO = "<image>", "<video>"
# What other formats call our roles: closer in meaning than anything spelling could tell.
OTHER_NAMES = {
    "user": "human",
    "assistant": "gpt",
    "model": "gpt",
    "bot": "gpt",
    "chatgpt": "gpt",
    "developer": "system",
}
# What marks an entry of `video` as a video file rather than a picture of one frame. Whether it is one that is read here
# (MP4, MOV, MKV, WebM, AVI) its bytes say, and `ovisnb.data.containers`.
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi")
VIDEO_SUFFIXES += (".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".vob", ".wmv", ".flv", ".ogv")
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # how JPEG, PNG, GIF and WebP begin


class RecordError(ValueError):
    """Something is wrong with the data: as text one sentence, which names the record and what to do.

    `kind` is one of `ovisnb.data.checks.faults.KINDS`, `message` the sentence without the record, and `record_id`
    and `source` ("train.json:12") say which record, as far as that is known.
    """

    def __init__(
        self, message: str, *, kind: str = "wrong_form", record_id: str | None = None, source: str = ""
    ) -> None:
        super().__init__(message)
        self.message, self.kind, self.record_id, self.source = message, kind, record_id, source

    def __str__(self) -> str:
        return ": ".join(filter(None, (where(self.record_id, self.source), self.message)))

    def of(self, record_id: str | None, source: str = "") -> RecordError:
        """This error, from now on told of this record."""
        self.record_id, self.source = record_id, source
        return self

    def at(self, place: str) -> RecordError:
        """The same error, told of a place in the record: "turn 2: ..."."""
        return RecordError(f"{place}: {self.message}", kind=self.kind, record_id=self.record_id, source=self.source)


def where(record_id: str | None, source: str) -> str:
    """ "record 'cat-1' (train.json:12)", or as much of it as is known."""
    if record_id is None:
        return source
    return f"record {record_id!r}" + (f" ({source})" if source else "")


class Note(str):
    """A sentence about something that reading changed or assumed, with its `kind`.

    That is the kind of fault it is ("changed_on_reading", "box_outside"), or "remark" if it is none: a
    convention that was assumed, something that was left out for good reason.
    """

    kind: str

    def __new__(cls, sentence: str, kind: str = "changed_on_reading") -> Self:
        note = super().__new__(cls, sentence)
        note.kind = kind
        return note


class Entry(dict):
    """The RECORD FORM (the keys of `Record.from_dict`), and what else the reader of a format knows about it."""

    notes: tuple[str, ...] = ()
    """A `Note` for each thing that reading changed; a sentence that is no `Note` is one of its usual kind."""
    folder: str | None = None
    """The image folder of its own."""
    source: str | None = None
    """Where it comes from, if not from this row's file and line ("other.json:12")."""
    index: int | None = None
    """Its number in `source`, which names a record without an id."""


class Frozen(BaseModel):
    """A frozen model whose errors are one sentence (pydantic's own report takes several lines)."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as report:
            raise self._refusal(report.errors(include_url=False)[0]) from None

    @classmethod
    def _refusal(cls, first: Mapping[str, Any]) -> RecordError:
        """The first problem of pydantic's report."""
        if first["type"] == "value_error":  # raised by our own validators: all of them raise this
            return first["ctx"]["error"]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            *most, last = cls.model_fields
            return RecordError(
                f"the key `{field}` is unknown here: use {', '.join(most)} or {last}", kind="unknown_key"
            )
        kind = "unreadable_box" if first["loc"][0] == "box" else "wrong_form"
        return RecordError(f"`{field}`: {first['msg'][:1].lower()}{first['msg'][1:]}", kind=kind)


class Media(Frozen):
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
        if not (isinstance(box, (list, tuple)) and all(isinstance(number, (int, float)) for number in box)):
            return box  # pydantic refuses whatever is no list of numbers
        try:
            return tuple(boxes.checked(box))
        except ValueError as error:
            raise RecordError(str(error), kind=boxes.flaw(box) or "unreadable_box") from None

    @model_validator(mode="after")
    def _one_origin(self) -> Media:
        if (self.path, self.image, self.data).count(None) != 2:
            raise RecordError("a picture needs a path, an image or data (one of them)")
        if self.path is not None and not self.path.strip():
            raise RecordError("a picture's path is empty")
        if self.path is not None and len(self.path) > 100 and self.path.startswith(_BASE64):
            said = (
                "is the picture itself, as base64, and not its path: save it as a file, or its bytes in a parquet file"
            )
            raise RecordError(f"{self.path[:12]}... {said}")
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
                if str(fields.get("path")).lower().endswith(VIDEO_SUFFIXES):
                    raise RecordError("a video in the row itself is not read: save it as a file and give its path")
                fields = {**fields, "data": data, "path": None}  # its path is only where the bytes once lay
            return cls(**fields)
        raise RecordError(
            f'a picture is a path, {{"path": ..., "box": [x1, y1, x2, y2]}} or a PIL image, not {kind_of(entry)}'
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


class Turn(Frozen):
    """One turn of a conversation; `<image>` and `<video>` may stand anywhere in the text, which may be empty."""

    role: Role
    text: str

    @field_validator("text")
    @classmethod
    def _text_can_be_written(cls, text: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            said = f"its text holds half a character (a lone surrogate) at position {error.start}: write it as UTF-8"
            raise RecordError(said, kind="not_utf8") from None
        return text

    @classmethod
    def _refusal(cls, first: Mapping[str, Any]) -> RecordError:
        if first["loc"] != ("role",) or first["type"] == "missing":
            return super()._refusal(first)
        role = first["input"]
        near = OTHER_NAMES.get(role) if isinstance(role, str) else None
        near = near or next(iter(difflib.get_close_matches(str(role).lower(), ROLES, 1)), None)
        hint = f" (did you mean {near!r}?)" if near else ""
        known = f"{', '.join(ROLES[:-1])} or {ROLES[-1]}"
        return RecordError(f"the role {role!r} is unknown: use {known}{hint}", kind="unknown_role")


def kind_of(value: Any) -> str:
    """What `value` is, in JSON's words where it has one."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"the number {value}"
    return names.get(type(value), type(value).__name__)


def known_role(role: Any) -> str | None:
    """The role that is meant for certain: one of ours in any case and spacing, or another format's name for it."""
    if role in ROLES:
        return role
    word = role.strip().lower() if isinstance(role, str) else None
    return word if word in ROLES else OTHER_NAMES.get(word)
