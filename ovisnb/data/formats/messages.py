"""Messages: conversations as Hugging Face data sets hold them (role and content, pictures in a column beside).

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}

What is taken:

- `messages` (or `conversations`) with roles system, user, assistant and tool; or `prompt` and `completion` as TRL has
  them, each a list of messages or text (an assistant's turn of the prompt then carries no loss:
  `ignored_gpt`); or `texts` of `{"user", "assistant"}` pairs, as FineVision has them.
- content that is text or a list of parts: `text`, `image`, `image_url`, `video`, `video_url`. A part with no picture
  of its own takes the next of `images` (or `image`), or the one that its `index` says; so for `videos` (or `video`).
- pictures as paths, `data:` and `file://` URLs, `{"bytes", "path"}` or PIL images. Nothing is downloaded.

How they become turns: the parts of a message are joined by a newline, as the released chat template does. Pictures
that no part places go before the first user message, as TRL does; where the text itself holds as
many `<image>` as there are pictures, they go there. Where parts place pictures, `<image>` in text is text and taken
out, as the released template does, with a sentence in `Record.notes` (not `</tool_call><image>`: that is a
crop). A tool's answer stands in the assistant's turn that called it, as `<tool_response>..</tool_response>`, and the
next assistant message goes on in that turn. `tool_calls` of the tools crop and identify become
`<tool_call>Crop [..]</tool_call>`; `reasoning_content` becomes `<think>..</think>`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ovisnb.data import markup
from ovisnb.data.formats.parts import is_number, picture, pictures, plain, refused, removed, short
from ovisnb.data.formats.rows import Entry, Options, Reader
from ovisnb.data.record import IMAGE, VIDEO, Record, RecordError, Turn

_ROLES = {"system": "system", "user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt", "model": "gpt"}
_WRITTEN = {"system": "system", "human": "user", "gpt": "assistant", "ignored_gpt": "assistant"}
_CONTENT = ("content", "reasoning_content", "tool_calls")
_PAYLOADS = {"image": ("image", "image_url", "url", "path", "bytes"), "video": ("video", "video_url", "url", "path")}
_KINDS = {kind: kind.split("_")[0] for kind in ("text", "image", "image_url", "video", "video_url")}
_OPEN, _CLOSE = "<tool_response>", "</tool_response>"


def matches(entry: Any) -> bool:
    """Whether a row has `messages`, `prompt`, `texts` or `conversations` of role and content."""
    if not isinstance(entry, dict):
        return False
    if "messages" in entry or "prompt" in entry or {"chosen", "rejected"} <= entry.keys():
        return True
    return _first_has(entry.get("conversations"), "role") or _first_has(entry.get("texts"), "user")


def entries(entry: dict, options: Options) -> Iterator[dict]:
    """The one conversation of a row."""
    media, turns = _Media(entry), []
    used, messages = _messages(entry)
    for where, role, message in messages:
        try:
            _add(turns, role, message, media)
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from None
    notes = _settle(turns, media)
    if "conversations" in entry and "conversations" not in used:
        notes.append(f"the row has `{used[0]}` and `conversations`: only `{used[0]}` is read")
    taken = (*used, *media.columns, "conversations")
    row = Entry({key: value for key, value in entry.items() if key not in taken})
    if media.images:
        row["image"] = media.images
    if media.videos:
        row["video"] = media.videos[0]
    row["conversations"] = [{"from": turn.role, "value": "".join(text for _, text in turn.pieces)} for turn in turns]
    row.notes = tuple(notes)
    yield row


def rows(records: Iterable[Record]) -> Iterator[dict]:
    """Records -> messages; with `ignored_gpt` before the first `gpt`, as prompt and completion."""
    for record in records:
        yield _row(record)


READER = Reader("messages", "messages, or prompt and completion", matches, entries, rows)


@dataclass
class _Turn:
    """A turn as it is put together."""

    role: str
    pieces: list[tuple[str, str]]
    """(kind, text): "text" is the data's own, "image" and "video" are placeholders, "frame" is what stands between."""
    answered: bool = False
    """Whether it ends in a tool's answer, after which the assistant goes on."""


@dataclass
class _Media:
    """The pictures and videos of a row: those that wait in its columns, and those that have their place."""

    row: dict
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    by_part: bool = False
    """Whether any part of a message places one."""
    by_index: bool = False

    def __post_init__(self) -> None:
        self.columns: list[str] = []
        self.waiting = {"image": pictures(self._column("images", "image"))}
        videos = self._column("videos", "video")
        if videos is None or "videos" in self.columns:
            videos = videos if isinstance(videos, list) else [videos] if videos is not None else []
        else:
            videos = [videos]  # `video` is one: a file, or the list of its frames
        self.waiting["video"] = [_video(value) for value in videos]
        self.next = {"image": 0, "video": 0}

    def _column(self, *names: str) -> Any:
        given = [name for name in names if self.row.get(name) is not None]
        if len(given) > 1:
            raise RecordError(f"the row has both `{given[0]}` and `{given[1]}`: drop one")
        self.columns += [name for name in names if name in self.row]
        return self.row[given[0]] if given else None

    def place(self, kind: str, part: dict) -> str:
        """Give the next place to a part's own picture or video, or to the one of the column; the placeholder."""
        self.by_part = True
        own = next((part[key] for key in _PAYLOADS[kind] if part.get(key) is not None), None)
        if own is None:
            value = self._of_column(kind, part.get("index"))
        else:
            value = picture(own) if kind == "image" else _video(own)
        (self.images if kind == "image" else self.videos).append(value)
        return IMAGE if kind == "image" else VIDEO

    def _of_column(self, kind: str, index: Any) -> Any:
        waiting = self.waiting[kind]
        if isinstance(index, int) and not isinstance(index, bool) and kind == "image":
            self.by_index = True
        else:
            index = self.next[kind]
            self.next[kind] += 1
        if not 0 <= index < len(waiting):
            have = f"`{kind}s` has {len(waiting)}"
            raise RecordError(f"a part of type {kind} asks for {kind} {index + 1}, but {have}: list one for each part")
        return waiting[index]


def _messages(row: dict) -> tuple[tuple[str, ...], Iterator[tuple[str, str, dict]]]:
    """-> (the keys read, (where, role, message) for each); the role is the record's, or "tool"."""
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return (key,), _of(row[key], key, "gpt")
    if row.get("texts") is not None and "prompt" not in row:
        return ("texts",), _of(_from_pairs(row["texts"]), "texts", "gpt")
    if "chosen" in row or "rejected" in row:
        raise RecordError("`chosen` and `rejected` are preferences, which are not read: keep the better answer alone")
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    asked = _of(prompt, "prompt", "gpt" if completion is None else "ignored_gpt")
    answered = () if completion is None else _of(completion, "completion", "gpt")
    return ("prompt", "completion"), chain(asked, answered)


def _of(messages: Any, key: str, answer: str) -> Iterator[tuple[str, str, dict]]:
    if not isinstance(messages, (list, tuple)):
        raise RecordError(f'`{key}` is a list of messages: write [{{"role": "user", "content": "..."}}]')
    for number, message in enumerate(messages, start=1):
        where = f"message {number} of `{key}`"
        if not isinstance(message, dict) or message.keys().isdisjoint(_CONTENT):
            raise RecordError(f'{where} is not of the form {{"role": ..., "content": ...}}')
        role = message.get("role")
        known = _ROLES.get(role) if isinstance(role, str) else None
        if known is None and role != "tool":
            raise RecordError(f"{where} has the role {short(role)}: use system, user, assistant or tool")
        yield where, answer if known == "gpt" else known or "tool", message


def _from_pairs(pairs: Any) -> list[dict]:
    """`texts` of user and assistant pairs -> messages."""
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise RecordError('`texts` is a list of pairs: write [{"user": ..., "assistant": ...}]')
    roles = ("user", "assistant")
    return [{"role": role, "content": pair[role]} for pair in pairs for role in roles if pair.get(role) is not None]


def _add(turns: list[_Turn], role: str, message: dict, media: _Media) -> None:
    """Put a message behind the turns: as one of its own, or in the assistant's turn that it goes on in."""
    pieces = _pieces(message, media)
    last = turns[-1] if turns else None
    if role == "tool":
        if last is None or last.role not in ("gpt", "ignored_gpt"):
            raise RecordError("a tool answers, but no message of the assistant stands before it: correct the order")
        last.pieces += _tool_answer(pieces)
        last.answered = True
    elif last is not None and last.answered and role in ("gpt", "ignored_gpt"):
        if role != last.role:
            raise RecordError("it goes on after a tool's answer in the prompt: begin the completion with the call")
        last.pieces += [("frame", "\n"), *pieces]
        last.answered = False
    else:
        turns.append(_Turn(role, pieces))


def _pieces(message: dict, media: _Media) -> list[tuple[str, str]]:
    """What a message holds, its parts joined by newlines."""
    content = message.get("content")
    parts: list[tuple[str, str]] = []
    if isinstance(content, str):
        parts.append(("text", content))
    elif isinstance(content, (list, tuple)):
        parts += [_part(part, number, media) for number, part in enumerate(content, start=1)]
    elif content is not None:
        raise RecordError(f"its `content` is text or a list of parts, not {short(content)}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise RecordError("its `tool_calls` are no list: write the calls in the text")
    parts += [("text", _call(call)) for call in calls]
    joined = [piece for part in parts for piece in (("frame", "\n"), part)][1:]
    thought = message.get("reasoning_content")
    if thought is None or thought == "":
        return joined
    if not isinstance(thought, str):
        raise RecordError("its `reasoning_content` is text")
    return [("text", f"<think>\n{thought.strip()}\n</think>\n\n"), *joined]


def _part(part: Any, number: int, media: _Media) -> tuple[str, str]:
    if not isinstance(part, dict):
        raise RecordError(f"part {number} is not of the form {{'type': 'text', 'text': ...}}")
    said = part.get("type")
    if said is None:
        said = next((kind for kind in ("text", "image", "video") if part.get(kind) is not None), None)
    kind = _KINDS.get(said) if isinstance(said, str) else None
    if kind is None:
        raise RecordError(f"part {number} has the type {short(said)}: use text, image or video")
    if kind != "text":
        try:
            return kind, media.place(kind, part)
        except RecordError as error:
            raise RecordError(f"part {number}: {error}") from None
    text = part.get("text")
    if not isinstance(text, str):
        raise RecordError(f"part {number} is of type text but its `text` is {short(text)}")
    return "text", text


def _tool_answer(pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A tool's message in the turn that called it: its pictures, then its words in tags that keep them out of the loss."""
    shown = [piece for piece in pieces if piece[0] in ("image", "video")]
    said = "\n".join(text for kind, text in pieces if kind == "text")
    if _OPEN in said or _CLOSE in said:
        raise RecordError(f"a tool's answer holds {_OPEN} or {_CLOSE}, which would end it early: take it out")
    if not said and shown:
        return shown
    return [*shown, ("frame", _OPEN), ("text", said), ("frame", _CLOSE)]


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


def _settle(turns: list[_Turn], media: _Media) -> list[str]:
    """Give every picture its place, and take out what only looks like one; the notes."""
    if not media.by_part:
        for kind, placeholder in (("image", IMAGE), ("video", VIDEO)):
            _settle_column(turns, media.waiting[kind], kind, placeholder)
        media.images, media.videos = media.waiting["image"], media.waiting["video"]
    else:
        for kind, waiting in media.waiting.items():
            if media.next[kind] < len(waiting) and not (kind == "image" and media.by_index):
                raise RecordError(
                    f"`{kind}s` has {len(waiting)} but the parts place {media.next[kind]}: place them all"
                )
    if len(media.videos) > 1:
        raise RecordError(f"the row has {len(media.videos)} videos, and a record has one: split it")
    return _without_placeholders(turns) if media.by_part else []


def _settle_column(turns: list[_Turn], waiting: list[Any], kind: str, placeholder: str) -> None:
    """Put what no part places before the first user message, unless the text says where it goes."""
    texts = [text for turn in turns for piece, text in turn.pieces if piece == "text"]
    if not waiting or any(_has_whole(text, placeholder) for text in texts):
        return
    first = next((turn for turn in turns if turn.role == "human"), None)
    if first is None:
        raise RecordError(f"`{kind}s` has {len(waiting)} but there is no user message to put them in")
    first.pieces[:0] = [(kind, placeholder), ("frame", "\n")] * len(waiting)


def _has_whole(text: str, placeholder: str) -> bool:
    """Whether `text` has a placeholder that is no crop's."""
    return text.count(placeholder) > text.count(f"</tool_call>{placeholder}")


def _without_placeholders(turns: list[_Turn]) -> list[str]:
    notes = []
    for number, turn in enumerate(turns, start=1):
        count = 0
        for place, (kind, text) in enumerate(turn.pieces):
            if kind == "text":
                text, taken = plain(text, keep_crops=turn.role in ("gpt", "ignored_gpt"))
                turn.pieces[place], count = (kind, text), count + taken
        if count:
            notes.append(removed(count, f"turn {number}"))
    return notes


def _video(value: Any) -> Any:
    """An entry of `video`: a path, or a list of frames."""
    if isinstance(value, (list, tuple)):
        return [picture(frame) for frame in value]
    found = picture(value)
    if isinstance(found, dict) and found.get("bytes") is not None:
        raise RecordError("a video in the row itself is not read: save it as a file and give its path")
    return found


def _row(record: Record) -> dict[str, Any]:
    """One record -> one row."""
    taken = [key for key in record.meta if key in ("messages", "prompt", "completion", "texts", "images", "videos")]
    if taken:
        raise refused(record, "messages", f"`meta` holds {taken[0]!r}, which is a key of the format")
    if record.images and not any(_has_whole(turn.text, IMAGE) for turn in record.turns):
        raise refused(record, "messages", "it shows crops but no whole picture, and they would be read as whole")
    own = record.to_dict()
    row = {key: own[key] for key in ("id", "kind", "box_coordinates", "call_coordinates") if key in own}
    by_part = not any(_inline(turn.text) for turn in record.turns)
    messages = [{"role": _WRITTEN[turn.role], "content": _parts(turn, by_part)} for turn in record.turns]
    roles = [turn.role for turn in record.turns]
    if "ignored_gpt" in roles:
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


def _inline(text: str) -> bool:
    """Whether a placeholder shares its line with text: parts are joined by newlines and could not say that."""
    return any(line not in (IMAGE, VIDEO) and (IMAGE in line or VIDEO in line) for line in text.split("\n"))


def _parts(turn: Turn, by_part: bool) -> list[dict[str, str]]:
    """The parts that give the turn's text when they are joined by newlines."""
    parts: list[dict[str, str]] = []
    if not by_part:
        return [{"type": "text", "text": turn.text}]
    for line in turn.text.split("\n"):
        if line in (IMAGE, VIDEO):
            parts.append({"type": line.strip("<>")})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += f"\n{line}"
        else:
            parts.append({"type": "text", "text": line})
    return parts


def _first_has(listed: Any, key: str) -> bool:
    return isinstance(listed, list) and bool(listed) and isinstance(listed[0], dict) and key in listed[0]
