"""Messages: conversations as Hugging Face data sets hold them (role and content, pictures in a column beside).

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}

Which keys a row may have them under, `ovisnb.data.formats.dialogue` says; TRL's prompt and completion, preferences,
FineVision's pairs, ms-swift's and LLaMA-Factory's forms are among them. Of two answers the better one is read, and
the rejected one stays in `Record.meta`, with a sentence in `Record.notes`. What else is taken:

- content that is text or a list of parts: `text`, `image`, `image_url`, `video`, `video_url`. A part with no picture
  of its own takes the next of `images` (or `image`), or the one that its `index` says; so for `videos` (or `video`).
- pictures as paths, `data:` and `file://` URLs, `{"bytes", "path"}` or PIL images. Nothing is downloaded.
- `objects` of ms-swift, for the `<ref-object>` and `<bbox>` of the text.

How they become turns: the parts of a message are joined by a newline, as the released chat template does. Pictures
that no part places go before the first user message, as TRL does; where the text of the user holds as
many `<image>` as there are pictures, they go there (one that only an answer holds may be a word: refused). Where parts place pictures, `<image>` in text is text and taken
out, as the released template does, with a sentence in `Record.notes` (not `</tool_call><image>`: that is a
crop). A tool's answer stands in the assistant's turn that called it, as `<tool_response>..</tool_response>`, and the
next assistant message goes on in that turn. `tool_calls` of the tools crop and identify become
`<tool_call>Crop [..]</tool_call>`; `reasoning_content`, `reasoning` or `thinking` becomes `<think>..</think>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ovisnb.data import markup
from ovisnb.data.formats import dialogue
from ovisnb.data.formats.dialogue import THOUGHTS, Message
from ovisnb.data.formats.objects import are_placed, filled
from ovisnb.data.formats.parts import is_number, picture, plain, refuse_keys, refused, removed, short
from ovisnb.data.formats.rows import Entry, Options, Reader
from ovisnb.data.keys import holds, told, unread
from ovisnb.data.record import IMAGE, VIDEO, Note, Record, RecordError, Turn

_ANSWERS = ("gpt", "ignored_gpt")
_WRITTEN = {"system": "system", "human": "user", "gpt": "assistant", "ignored_gpt": "assistant"}
_PAYLOADS = {"image": ("image", "image_url", "url", "path", "bytes"), "video": ("video", "video_url", "url", "path")}
_KINDS = {kind: kind.split("_")[0] for kind in ("text", "image", "image_url", "video", "video_url")}
_PLACEHOLDERS = {"image": IMAGE, "video": VIDEO}
_LIKE = r"(?i)<\|?(?:%s)(?:[ _-]?(?:here|placeholder|pad|token|\d{1,3}))?\|?>"
"""How other models write the place of a picture or video."""
_NAMES = {"image": "image|img|picture", "video": "video"}
_OPEN, _CLOSE = "<tool_response>", "</tool_response>"
# What may stand beside `messages` or a question, unread: other conversations, questions repeated, another's answers.
_OTHERS, _REPEATED, _MAYBE = ("conversations", "texts", "chosen"), ("prompt", "query"), ("answer", "output", "target")
_REJECTED = ("rejected", "rejected_response", "rejected_messages")


def matches(entry: Any) -> bool:
    """Whether a row has messages under one of the keys of `ovisnb.data.formats.dialogue`."""
    return isinstance(entry, dict) and dialogue.matches(entry)


def entries(entry: dict, options: Options) -> Iterator[dict]:
    """The one conversation of a row."""
    used, messages = dialogue.dialogue(entry)
    media, turns = _Media(entry, messages), []
    for message in messages:
        try:
            _add(turns, message, media)
        except RecordError as error:
            raise error.at(message.where) from None
    media.settle(turns)
    notes = [removed(turn.removed, f"turn {n}") for n, turn in enumerate(turns, start=1) if turn.removed]
    notes += [note for message in messages for note in message.notes]
    notes += _left(entry, used)
    taken = (*used, "images", "image", "videos", "video", "conversations")
    row = Entry({key: value for key, value in entry.items() if key not in taken})
    if are_placed(entry.get("objects"), [turn.text for turn in turns]):
        notes += _fill(row, turns)
    if media.placed["image"]:
        row["image"] = media.placed["image"]
    if media.placed["video"]:
        row["video"] = media.placed["video"][0]
    row["conversations"] = [{"from": turn.role, "value": turn.text} for turn in turns]
    row.notes = tuple(notes)
    yield row


def rows(records: Iterable[Record]) -> Iterator[dict]:
    """Records -> messages; with `ignored_gpt` before the first `gpt`, as prompt and completion."""
    return map(_row, records)


READER = Reader("messages", "messages, prompt and completion, or query and response", matches, entries, rows)


@dataclass
class _Turn:
    """A turn as it is put together."""

    role: str
    text: str
    removed: int = 0
    """How many words that only look like placeholders were taken out."""
    answered: bool = False
    """Whether it ends in a tool's answer, after which the assistant goes on."""


class _Media:
    """The pictures and videos of a row: those that wait in its columns, and those that have their place."""

    def __init__(self, row: dict, messages: Sequence[Message]) -> None:
        parts = [part for message in messages for part in _listed(message.said["content"])]
        self.by_part = any(_kind_of(part) in _PLACEHOLDERS for part in parts)
        self.by_index = False
        self.waiting = {kind: _column(row, kind) for kind in _PLACEHOLDERS}
        self.taken = {"image": 0, "video": 0}
        self.placed: dict[str, list[Any]] = {"image": [], "video": []}

    def place(self, kind: str, part: dict) -> str:
        """Give the next place to a part's own picture or video, or to one of the column; the placeholder."""
        own = next((part[key] for key in _PAYLOADS[kind] if part.get(key) is not None), None)
        self.placed[kind].append(self._of_column(kind, part.get("index")) if own is None else _medium(kind, own))
        return _PLACEHOLDERS[kind]

    def _of_column(self, kind: str, index: Any) -> Any:
        if isinstance(index, int) and not isinstance(index, bool) and kind == "image":
            self.by_index = True
        else:
            index = self.taken[kind]
            self.taken[kind] += 1
        count = len(self.waiting[kind])
        if not 0 <= index < count:
            raise RecordError(
                f"a part of type {kind} asks for {kind} {index + 1}, but `{kind}s` has {count}: list one for each part"
            )
        return self.waiting[kind][index]

    def settle(self, turns: list[_Turn]) -> None:
        """See that all of the columns have a place; where no part gives one, the text or the first user message does."""
        first = next((turn for turn in turns if turn.role == "human"), None)
        for kind, waiting in self.waiting.items():
            count, taken, placeholder = len(waiting), self.taken[kind], _PLACEHOLDERS[kind]
            if self.by_part and taken < count and not (kind == "image" and self.by_index):
                raise RecordError(f"`{kind}s` has {count} but the parts place {taken}: place them all")
            if self.by_part:
                continue
            self.placed[kind] = waiting
            if count and _misplaced(turns, placeholder):
                raise RecordError(
                    f"{placeholder} stands in an answer or a system message and in no user message, where it may be a "
                    f"word: write {placeholder} in the user message that the {kind} belongs to"
                )
            if count and not any(_has_whole(turn.text, placeholder) for turn in turns):
                if first is None:
                    raise RecordError(f"`{kind}s` has {count} but there is no user message to put them in")
                if like := re.search(
                    _LIKE % _NAMES[kind], "\n".join(turn.text for turn in turns if turn.role == "human")
                ):
                    said = f"{like[0]} looks like the place of a picture or video, which is written {placeholder}"
                    raise RecordError(f"{said}: write that", kind="placeholder_count")
                first.text = f"{placeholder}\n" * count + first.text
        if (count := len(self.placed["video"])) > 1:
            raise RecordError(f"the row has {count} videos, and a record has one: split it")


def _left(row: dict, used: Sequence[str]) -> list[Note]:
    """A note for what may be another conversation or another answer, and is not read."""
    notes = []
    for key in (*_OTHERS, *_REPEATED):
        if used[0] in ("messages", "conversations") and key not in used and holds(row.get(key)):
            kind = "remark" if key in _REPEATED else "changed_on_reading"
            notes.append(Note(f"the row has `{used[0]}` and `{key}`: only `{used[0]}` is read", kind))
    for key in _REJECTED:
        if holds(row.get(key)) and (key != "rejected" or "chosen" in used):
            better = "chosen" if "chosen" in used else used[0]
            notes.append(Note(f"of the two answers `{better}` is read, and `{key}` is only kept in `meta`", "remark"))
    for key in _MAYBE:
        if used[0] == "prompt" and "completion" in used and row.get("completion") is None and holds(row.get(key)):
            said = f"`{key}` is only kept in `meta`: name it `completion` if it is the answer to learn"
            notes.append(Note(said, "remark"))
    if holds(row.get("tools")) and row["tools"] not in ("[]", "{}", "null"):
        said = "`tools` is only kept in `meta`: write what the model is to know of them into a system message"
        notes.append(Note(said, "unknown_key"))
    return notes


def _fill(row: Entry, turns: list[_Turn]) -> list[Note]:
    """Put the objects of a row into its turns; it then says what their numbers count."""
    texts, counts = filled([turn.text for turn in turns], row.pop("objects"))
    if row.setdefault("box_coordinates", counts) != counts:
        raise RecordError(f"`objects` count {counts}, but `box_coordinates` is another: drop `box_coordinates`")
    for turn, text in zip(turns, texts):
        turn.text = text
    said = f"the boxes of `objects` count {counts}: convert them (`ovisnb data convert --boxes normalised`)"
    return [] if counts == "normalised" else [Note(f"{said} to have them as Ovis2.5 writes them", "remark")]


def _column(row: dict, kind: str) -> list[Any]:
    """What a row has under `images` or `image`, `videos` or `video`."""
    several, single = row.get(f"{kind}s"), row.get(kind)
    if several is not None and single is not None:
        raise RecordError(f"the row has both `{kind}s` and `{kind}`: drop one")
    if single is not None:
        several = [single] if kind == "video" else single  # `video` is one: a file, or the list of its frames
    return [_medium(kind, value) for value in (_listed(several) if several is not None else ())]


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _medium(kind: str, value: Any) -> Any:
    """An entry of the record form for a picture or a video: a path, or of a video a list of frames."""
    if kind == "video" and isinstance(value, (list, tuple)):
        return [picture(frame) for frame in value]
    found = picture(value)
    if kind == "video" and isinstance(found, dict) and found.get("bytes") is not None:
        raise RecordError("a video in the row itself is not read: save it as a file and give its path")
    return found


def _add(turns: list[_Turn], message: Message, media: _Media) -> None:
    """Put a message behind the turns: as one of its own, or in the assistant's turn that it goes on in."""
    role, parts, count = message.role, _parts(message, media), 0
    if media.by_part:  # then what looks like a placeholder in text is text
        for place, (kind, text) in enumerate(parts):
            if kind == "text":
                text, taken = plain(text, keep_crops=role not in ("system", "human"))
                parts[place], count = (kind, text), count + taken
    last = turns[-1] if turns else _Turn("", "")
    if role == "tool":
        if last.role not in _ANSWERS:
            raise RecordError("a tool answers, but no message of the assistant stands before it: correct the order")
        last.text += _tool_answer(parts)
        last.answered = True
    elif last.answered and role in _ANSWERS:
        if role != last.role:
            raise RecordError(
                "it goes on after a tool's answer, but only one of the two carries loss: let both, and begin a completion "
                "with the call"
            )
        last.text += "\n" + "\n".join(text for _, text in parts)
        last.answered = False
    else:
        turns.append(_Turn(role, "\n".join(text for _, text in parts)))
    turns[-1].removed += count


def _parts(message: Message, media: _Media) -> list[tuple[str, str]]:
    """What a message holds: (kind, text), where the text of a picture or video is its placeholder."""
    content = message.said["content"]
    thoughts = [message.said[key] for key in THOUGHTS if holds(message.said.get(key))]
    parts: list[tuple[str, str]] = []
    if isinstance(content, str):
        parts.append(("text", content))
    elif isinstance(content, (list, tuple)):
        for number, part in enumerate(content, start=1):
            try:
                parts.append(_part(part, media))
                message.notes.extend(told(_unread(part, parts[-1][0]), f"{message.where}, part {number}"))
            except RecordError as error:
                raise error.at(f"part {number}") from None
    elif content is not None:
        raise RecordError(f"its `content` is text or a list of parts, not {short(content)}")
    calls = message.said.get("tool_calls") or []
    if not isinstance(calls, list):
        raise RecordError("its `tool_calls` are no list: write the calls in the text")
    parts += [("text", _call(call)) for call in calls]
    if not thoughts:
        return parts
    if not isinstance(thoughts[0], str) or thoughts.count(thoughts[0]) < len(thoughts):
        raise RecordError(f"its thinking ({', '.join(THOUGHTS)}) is text, and the same wherever it stands: keep one")
    if any("<think>" in text for _, text in parts):
        raise RecordError("its thinking stands in its content and beside it: keep one")
    return [("text", f"<think>\n{thoughts[0].strip()}\n</think>\n"), *(parts or [("text", "")])]


def _kind_of(part: Any) -> str | None:
    """ "text", "image" or "video"; None for anything else."""
    if not isinstance(part, dict):
        return None
    said = part.get("type")
    if said is None:
        said = next((kind for kind in ("text", "image", "video") if part.get(kind) is not None), None)
    return _KINDS.get(said) if isinstance(said, str) else None


def _part(part: Any, media: _Media) -> tuple[str, str]:
    if not isinstance(part, dict):
        raise RecordError("it is not of the form {'type': 'text', 'text': ...}")
    kind, text = _kind_of(part), part.get("text")
    if kind is None:
        raise RecordError(f"it has the type {short(part.get('type'))}: use text, image or video")
    if kind != "text":
        return kind, media.place(kind, part)
    if not isinstance(text, str):
        raise RecordError(f"it is of type text but its `text` is {short(text)}")
    return kind, text


def _unread(part: dict, kind: str) -> list[str]:
    """The keys of a part that are not read; RecordError where they would make it another."""
    return unread(part, ("type", "text") if kind == "text" else ("type", "index", *_PAYLOADS[kind]))


def _tool_answer(parts: list[tuple[str, str]]) -> str:
    """A tool's message in the turn that called it: its pictures, then its words in tags that keep them out of the loss."""
    shown = "".join(text for kind, text in parts if kind != "text")
    said = "\n".join(text for kind, text in parts if kind == "text")
    if _OPEN in said or _CLOSE in said:
        raise RecordError(f"a tool's answer holds {_OPEN} or {_CLOSE}, which would end it early: take it out")
    return shown if shown and not said else f"{shown}{_OPEN}{said}{_CLOSE}"


def _call(call: Any) -> str:
    """A structured call of a tool that exists here, as text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError("a call in `tool_calls` has no name: write the calls in the text")
    name, arguments = function["name"].lower(), function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if name not in markup.TOOLS or not isinstance(arguments, dict):
        raise RecordError(
            f"the call of {short(function['name'])} in `tool_calls` has no form here: only crop and identify with a "
            "box do; write it in the text"
        )
    box = next((arguments[key] for key in ("bbox_2d", "bbox", "box") if arguments.get(key) is not None), None)
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise RecordError(f"the call of {name} in `tool_calls` has no box of four numbers under `bbox_2d`: give one")
    label = arguments.get("label")
    label = label.strip() if isinstance(label, str) and not set(label) & set("[]<>") else None
    return markup.write_call(name, map(str, box), label or None)


def _row(record: Record) -> dict[str, Any]:
    """One record -> one row."""
    parted = any(turn.role == "ignored_gpt" for turn in record.turns)
    refuse_keys(record, "messages", ("messages", "images", "videos", *(("prompt", "completion") if parted else ())))
    if record.images and not any(_has_whole(turn.text, IMAGE) for turn in record.turns):
        raise refused(record, "messages", "it shows crops but no whole picture, and they would be read as whole")
    own = record.to_dict()
    row = {key: own[key] for key in ("id", "kind", "box_coordinates", "call_coordinates") if key in own}
    by_part = not any(_inline(turn.text) for turn in record.turns)
    for kind, placeholder in _PLACEHOLDERS.items():
        if not by_part and _misplaced(record.turns, placeholder):
            raise refused(record, "messages", f"its {kind} stands inside a line of an answer, and of no question")
    messages = [{"role": _WRITTEN[turn.role], "content": _written_parts(turn, by_part)} for turn in record.turns]
    if parted:
        roles = [turn.role for turn in record.turns]
        first = roles.index("gpt") if "gpt" in roles else len(roles)
        if "ignored_gpt" in roles[first:]:
            raise refused(
                record, "messages", "a turn without loss (ignored_gpt) follows one with loss, which has no form there"
            )
        row |= {"prompt": messages[:first], "completion": messages[first:]}
    else:
        row["messages"] = messages
    if record.images:
        row["images"] = [media.to_entry() for media in record.images]
    if record.video is not None:
        file = len(record.video) == 1 and record.video[0].is_video
        row["videos"] = [record.video[0].to_entry() if file else [media.to_entry() for media in record.video]]
    return row | record.meta


def _has_whole(text: str, placeholder: str) -> bool:
    """Whether `text` has a placeholder that is no crop's; a crop is a picture, never a video."""
    crops = text.count(f"</tool_call>{IMAGE}") if placeholder == IMAGE else 0
    return text.count(placeholder) > crops


def _misplaced(turns: Sequence[Turn | _Turn], placeholder: str) -> bool:
    """Whether turns hold a placeholder that is no crop's, but no human turn does: it may be a word."""
    roles = [turn.role for turn in turns if _has_whole(turn.text, placeholder)]
    return bool(roles) and "human" not in roles


def _inline(text: str) -> bool:
    """Whether a placeholder shares its line with text: parts are joined by newlines and could not say that."""
    return any(line not in (IMAGE, VIDEO) and (IMAGE in line or VIDEO in line) for line in text.split("\n"))


def _written_parts(turn: Turn, by_part: bool) -> list[dict[str, str]]:
    """The parts that give the turn's text when they are joined by newlines."""
    if not by_part:
        return [{"type": "text", "text": turn.text}]
    parts: list[dict[str, str]] = []
    for line in turn.text.split("\n"):
        if line in (IMAGE, VIDEO):
            parts.append({"type": line.strip("<>")})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += f"\n{line}"
        else:
            parts.append({"type": "text", "text": line})
    return parts
