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

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from ovisnb.data.base import IMAGE, ROLES, VIDEO, VIDEO_SUFFIXES, Entry, Frozen, Media, Note, RecordError, Turn, where
from ovisnb.data.boxes import Convention
from ovisnb.data.markup import tags_in
from ovisnb.data.reading import FIELDS, Reading, mismatch, no_turns

# Also what records are made of, so that nobody needs to know which of these files has it.
__all__ = ["FIELDS", "IMAGE", "ROLES", "VIDEO", "VIDEO_SUFFIXES", "Entry", "Media", "Note", "Record", "RecordError"]
__all__ += ["Turn"]


class Record(Frozen):
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
        taken = [key for key in self.meta if key in FIELDS]
        if taken:
            problem = RecordError(f"`meta` may not hold {taken[0]!r}, which is a field of its own")
        elif not self.turns:
            problem = no_turns()
        else:
            problem = mismatch([turn.text for turn in self.turns], len(self.images), self.video, self.meta)
        if problem is not None:
            raise problem.of(self.id, self.source)
        return self

    @property
    def where(self) -> str:
        """How an error names it: "record 'cat-1' (train.json:12)"."""
        return where(self.id, self.source)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "", index: int = 0) -> Record:
        """From the dict of a data file (keys `id`, `image`, `video`, `kind`, `box_coordinates`,
        `call_coordinates`, `conversations`).

        `source` and `index` name a record without an id: "train.json:12" and 3 make "train-3". An `Entry`
        brings its own, where it has them.
        An `<image>` right after a crop call for which `image` has no entry gets the crop.
        Raises RecordError, one sentence naming the record, the source and the turn or picture.
        """
        return cls.of(Reading(data, source, index))

    @classmethod
    def of(cls, reading: Reading) -> Record:
        """The record of an entry that was read; raises the first of its problems, a RecordError."""
        record = cls(**reading.fields())
        entry = reading.data if isinstance(reading.data, Entry) else Entry()
        if entry.notes or entry.folder or reading.notes:
            return record.model_copy(update={"notes": (*entry.notes, *reading.notes), "folder": entry.folder})
        return record

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
        tags = {tag.name for turn in self.turns for tag in tags_in(turn.text)}
        if tags & {"box", "point"}:
            data["box_coordinates"] = self.box_coordinates
        if "tool_call" in tags:
            data["call_coordinates"] = self.call_coordinates
        data["conversations"] = [{"from": turn.role, "value": turn.text} for turn in self.turns]
        return {**data, **self.meta}
