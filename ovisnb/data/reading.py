"""Reading: one walk over an entry of the record form, and everything that keeps it from being a record.

    reading = Reading({"conversations": [{"from": "user", "value": "<image>"}]}, "train.jsonl:1")
    [problem.kind for problem in reading.problems]    # ['unknown_role', 'placeholder_count']

`Record.from_dict` raises the first problem, `ovisnb.data.checks` lists them all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ovisnb.data import markup
from ovisnb.data.base import IMAGE, VIDEO, Entry, Media, Note, RecordError, Turn, kind_of, known_role
from ovisnb.data.boxes import CONVENTIONS
from ovisnb.data.keys import FIELDS, beside, role_of, told, unread

_NAMED = re.compile(r"<img>[^<>]{1,400}</img>")  # Qwen-VL's form of a picture in text
_UNREAD = Media(path="unread")  # stands in for a picture entry that cannot be read


class Reading:
    """One walk over an entry of the record form, whatever it holds: what can be read of it, and all `problems`.

    Each piece is read by itself, so that one that is broken hides no other.
    """

    id: str | None = None
    """Its id, or the one that it gets from its source; None where it is no record at all."""

    def __init__(self, data: Any, source: str = "", index: int = 0) -> None:
        if isinstance(data, Entry):
            source, index = data.source or source, index if data.index is None else data.index
        self.data, self.source = data, source
        self.problems: list[RecordError] = []
        """All that is wrong. If nothing is but placeholders that do not match, it is `Record` that says so."""
        self.uncut: list[RecordError] = []
        """Why crops cannot be cut as their calls say, apart from `problems`: the text can be read all the same."""
        self.notes: list[Note] = []
        """What reading passed over."""
        self.said: list[tuple[str | None, str | None]] = []
        """(role, text) of each turn; None for what is not there. An unknown role that means one of ours counts as it."""
        self.turns: list[Turn] = []
        self.images: list[Media | None] = []
        """The pictures as they are listed, None for one that cannot be read; no crops of calls."""
        self.video: list[Media | None] | None = None
        self.options: dict[str, str] = {}
        """`kind`, `box_coordinates` and `call_coordinates`, where the entry has them."""
        if not isinstance(data, Mapping):
            self._add(f"a record is an object with `conversations`, not {kind_of(data)}")
            return
        self._read_id(index)
        self._read_turns()
        self.images = self._read_media("image") or []
        self.video = self._read_media("video")
        self._read_options()
        for key, advice in beside(data).items():
            self._add(RecordError(f"the key `{key}` is not read: {advice}", kind="unknown_key"))
        self.meta = {key: value for key, value in data.items() if key not in FIELDS}
        self._whole_images = self._match()

    def fields(self) -> dict[str, Any]:
        """What `Record` is made with; raises the first problem, a RecordError, if there is one."""
        for error in self.problems or self.uncut:
            raise error
        media = {"images": self._whole_images, "video": self.video}
        return {"id": self.id, "turns": self.turns, **media, **self.options, "source": self.source, "meta": self.meta}

    def _add(self, problem: RecordError | str) -> None:
        error = RecordError(problem) if isinstance(problem, str) else problem
        source = self.source or ("a record" if self.id is None else "")
        self.problems.append(error.of(self.id, source))

    def _read_id(self, index: int) -> None:
        name = self.data.get("id")
        if name is None:
            self.id = f"{PurePath(self.source.rpartition(':')[0] or self.source).stem or 'record'}-{index}"
        elif isinstance(name, (str, int)) and not isinstance(name, bool):
            self.id = str(name)
        else:
            self._add(f"`id` is text or a whole number, not {kind_of(name)}")

    def _read_options(self) -> None:
        kind = self.data.get("kind")
        if isinstance(kind, str):
            self.options["kind"] = kind
        elif kind is not None:
            self._add(f"`kind` is text, not {kind_of(kind)}")
        for key in ("box_coordinates", "call_coordinates"):
            value = self.data.get(key)
            if value in CONVENTIONS:
                self.options[key] = value
            elif value is not None:
                self._add(f"`{key}` is {value!r}: use {', '.join(CONVENTIONS[:-1])} or {CONVENTIONS[-1]}")

    def _read_turns(self) -> None:
        turns = self.data.get("conversations")
        if "conversations" not in self.data:
            self._add("the key `conversations` is missing")
        elif not isinstance(turns, (list, tuple)):
            self._add(f"`conversations` is a list of turns, not {kind_of(turns)}")
        elif not turns:
            self._add(no_turns())
        else:
            for number, turn in enumerate(turns, start=1):
                try:
                    read = self._turn(turn, f"turn {number}")
                except (RecordError, TypeError, LookupError) as error:
                    self._refuse_turn(number, turn, error)
                else:
                    self.turns.append(read)
                    self.said.append((read.role, read.text))

    def _turn(self, turn: Any, place: str) -> Turn:
        read = Turn(role=turn["from"], text=turn["value"])
        if read.role == "human" and (named := "<img>" in read.text and _NAMED.search(read.text)):
            said = f"{named[0]} names a picture: list it under `image`, and write {IMAGE} there"
            raise RecordError(said, kind="placeholder_count")
        if len(turn) == 2:
            return read
        self.notes += told(unread(turn, ("from", "value")), place)
        return Turn(role=role_of(turn, read.role), text=read.text)

    def _refuse_turn(self, number: int, turn: Any, error: Exception) -> None:
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        self.said.append((known_role(role), text if isinstance(text, str) else None))
        if not isinstance(error, RecordError):
            self._add(f'turn {number} is not of the form {{"from": role, "value": text}}')
        elif not isinstance(text, str):
            self._add(f"turn {number}: its value is text, not {kind_of(text)}")
        else:
            self._add(error.at(f"turn {number}"))

    def _read_media(self, key: str) -> list[Media | None] | None:
        entries = self.data.get(key)
        if entries is None or (key == "video" and entries == [] and not self._asks_for(VIDEO)):
            return None  # a table has every column in every row
        media = []
        for number, entry in enumerate(entries if isinstance(entries, (list, tuple)) else [entries], start=1):
            try:
                media.append(Media.from_entry(entry))
            except RecordError as error:
                media.append(self._refuse_picture(entry, f"entry {number} of `{key}`", error))
        return media

    def _asks_for(self, placeholder: str) -> bool:
        return any(placeholder in text for _, text in self.said if text is not None)

    def _refuse_picture(self, entry: Any, place: str, error: RecordError) -> Media | None:
        self._add(error.at(place))
        if error.kind not in ("empty_box", "inverted_box"):
            return None
        try:
            return Media.from_entry({**entry, "box": None})  # the whole picture may be sound all the same
        except RecordError as more:
            self._add(more.at(place))
            return None

    def _match(self) -> list[Media | None]:
        """The pictures with those cut for crop calls; placeholders are held against them, too.

        If nothing else is wrong, that is left to `Record`, which must hold them against each other anyway.
        """
        texts = [text for _, text in self.said if text is not None]
        images = self.images
        missing = sum([text.count(IMAGE) for text in texts]) - len(images)
        if missing > 0 and any("</tool_call>" in text for text in texts):
            slots = [(number, call) for number, said in enumerate(self.said, start=1) for call in _slots(*said)]
            if missing == sum(call is not None for _, call in slots):
                images = self._cut(slots)
        if self.problems and texts and images is not None:
            problem = mismatch(texts, len(images), self.video, self.meta)
            if problem is not None:
                self._add(problem)
        return images

    def _cut(self, slots: Sequence[tuple[int, markup.Call | None]]) -> list[Media | None] | None:
        """The pictures, with a crop for each `<image>` that follows its call; None if there is nothing to cut from."""
        images, whole, rest = [], None, iter(self.images)
        for number, call in slots:
            if call is None:
                images.append(picture := next(rest))
                whole = (picture or _UNREAD) if picture is None or picture.box is None else whole
                continue
            place = f"turn {number}"
            if whole is None:
                said = f"{place}: there is no picture before the call {call.text} to cut from"
                self._add(RecordError(said, kind="placeholder_count"))
                return None
            images.append(self._crop(whole, call, place))
        return images

    def _crop(self, whole: Media, call: markup.Call, place: str) -> Media | None:
        if call.numbers is None:
            error = RecordError(f"{place}: {call.problem}", kind="unreadable_box")
        else:
            try:
                return whole.crop(call.numbers, self.options.get("call_coordinates", "pixels"))
            except RecordError as refusal:
                error = refusal.at(f"{place}: the call {call.text}")
        self.uncut.append(error.of(self.id, self.source))
        return None


def _slots(role: str | None, text: str | None) -> Iterator[markup.Call | None]:
    """For each `<image>` of a turn the crop call that it answers, or None.

    Calls and the pictures behind them pair up in order; of more calls than pictures, the last ones have them.
    """
    text, waiting, shown = text or "", [], 0
    calls = markup.calls(text) if role in ("gpt", "ignored_gpt", None) else []
    found = [(call.start, call.end, call) for call in calls]
    found += [(match.start(), match.end(), None) for match in re.finditer(IMAGE, text)]
    last = 0
    for start, end, call in sorted(found, key=lambda item: item[0]):
        if text[last:start].strip() or (call is not None and shown):
            yield from _paired(waiting, shown)
            waiting, shown = [], 0
        last = end
        if call is None:
            shown += 1
        elif call.name == "crop":
            waiting.append(call)
    yield from _paired(waiting, shown)


def _paired(calls: Sequence[markup.Call], pictures: int) -> list[markup.Call | None]:
    """The call of each of so many pictures that stand behind calls, None for those behind the last one's."""
    answered = calls[max(len(calls) - pictures, 0) :]
    return [*answered, *[None] * (pictures - len(answered))]


def no_turns() -> RecordError:
    """What is wrong with a conversation of no turns."""
    return RecordError("the conversation has no turns: `conversations` needs at least one", kind="no_answer")


def mismatch(
    texts: Sequence[str], listed: int, video: Sequence[Media | None] | None, meta: Mapping[str, Any]
) -> RecordError | None:
    """What is wrong between the placeholders of the turns and so many pictures and a video, if anything is."""
    if video is not None:
        if not video:
            return RecordError("`video` has no frames: list them or leave `video` out")
        if len(video) > 1 and any(frame is not None and frame.is_video for frame in video):
            said = "`video` mixes a video file with other frames: give one video file or a list of pictures"
            return RecordError(said)
    images = sum(text.count(IMAGE) for text in texts)
    if images != listed:
        said = f"the turns hold {images} {IMAGE} but `image` lists {listed} {'picture' if listed == 1 else 'pictures'}"
        return RecordError(f"{said}: {_image_advice(texts, images, listed, video, meta)}", kind="placeholder_count")
    videos = sum(text.count(VIDEO) for text in texts)
    if videos != (video is not None):
        advice = "remove `video` or" if video is not None else "give the file or the frames in `video` or"
        have = "has one" if video is not None else "has none"
        said = f"the turns hold {videos} {VIDEO} but the record {have}: {advice} make the two match"
        return RecordError(said, kind="placeholder_count")
    return None


def _image_advice(
    texts: Sequence[str], images: int, listed: int, video: Sequence[Media | None] | None, meta: Mapping[str, Any]
) -> str:
    if video is not None and not listed and not any(VIDEO in text for text in texts):
        return f"a video stands where {VIDEO} is, write that instead"
    misspelt = difflib.get_close_matches("image", filter(lambda key: isinstance(key, str), meta), 1, 0.8)
    if misspelt and not listed:
        return f"the key is `image`, not `{misspelt[0]}`"
    if images < listed:
        return f"write {IMAGE} in the text where each picture belongs, or drop a picture"
    if any(f"</tool_call>{IMAGE}" in text for text in texts):
        return (
            f"list the picture of every {IMAGE}, or leave out those of all crop calls, "
            "which are then cut from the picture before them"
        )
    return f"list one picture for each {IMAGE}, in order"
