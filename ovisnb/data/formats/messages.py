"""Messages: conversations as Hugging Face data sets hold them (role and content, pictures in a column beside).

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}

What is taken:

- `messages` (or `conversations`) with roles system, user, assistant and tool; or `prompt` and `completion` as TRL has
  them, each a list of messages or text (an assistant's turn of the prompt then carries no loss:
  `ignored_gpt`); or `texts` of `{"user", "assistant"}` pairs, as FineVision has them.
- preferences as TRL has them: `chosen` is read as the answer, `rejected` stays in `Record.meta`, with a sentence in
  `Record.notes`.
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ovisnb.data import markup
from ovisnb.data.formats.parts import is_number, picture, plain, refuse_keys, refused, removed, short
from ovisnb.data.formats.rows import Entry, Options, Reader
from ovisnb.data.record import IMAGE, VIDEO, Note, Record, RecordError, Turn

_ROLES = {"system": "system", "user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt", "model": "gpt"}
_ROLES["tool"] = "tool"
_ANSWERS = ("gpt", "ignored_gpt")
_WRITTEN = {"system": "system", "human": "user", "gpt": "assistant", "ignored_gpt": "assistant"}
_CONTENT = ("content", "reasoning_content", "tool_calls")
_PAYLOADS = {"image": ("image", "image_url", "url", "path", "bytes"), "video": ("video", "video_url", "url", "path")}
_KINDS = {kind: kind.split("_")[0] for kind in ("text", "image", "image_url", "video", "video_url")}
_PLACEHOLDERS = {"image": IMAGE, "video": VIDEO}
_OPEN, _CLOSE = "<tool_response>", "</tool_response>"
_Message = tuple[str, str, dict]  # its place for an error, the record's role or "tool", the message


def matches(entry: Any) -> bool:
    """Whether a row has `messages`, `prompt`, `chosen` and `rejected`, `texts` or `conversations` of role and content."""
    if not isinstance(entry, dict):
        return False
    if "messages" in entry or "prompt" in entry or {"chosen", "rejected"} <= entry.keys():
        return True
    return _first_has(entry.get("conversations"), "role") or _first_has(entry.get("texts"), "user")


def entries(entry: dict, options: Options) -> Iterator[dict]:
    """The one conversation of a row."""
    used, messages = _messages(entry)
    media, turns = _Media(entry, messages), []
    for where, role, message in messages:
        try:
            _add(turns, role, message, media)
        except RecordError as error:
            raise error.at(where) from None
    media.settle(turns)
    notes = [removed(turn.removed, f"turn {n}") for n, turn in enumerate(turns, start=1) if turn.removed]
    if "conversations" in entry and "conversations" not in used:
        notes.append(f"the row has `{used[0]}` and `conversations`: only `{used[0]}` is read")
    if "chosen" in used and "rejected" in entry:
        notes.append(Note("of the two answers `chosen` is read, and `rejected` is only kept in `meta`", "remark"))
    taken = (*used, "images", "image", "videos", "video", "conversations")
    row = Entry({key: value for key, value in entry.items() if key not in taken})
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


READER = Reader("messages", "messages, or prompt and completion", matches, entries, rows)


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

    def __init__(self, row: dict, messages: Sequence[_Message]) -> None:
        parts = [part for _, _, message in messages for part in _listed(message.get("content"))]
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
            if count and not any(_has_whole(turn.text, placeholder) for turn in turns):
                if first is None:
                    raise RecordError(f"`{kind}s` has {count} but there is no user message to put them in")
                first.text = f"{placeholder}\n" * count + first.text
        if (count := len(self.placed["video"])) > 1:
            raise RecordError(f"the row has {count} videos, and a record has one: split it")


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


def _messages(row: dict) -> tuple[tuple[str, ...], list[_Message]]:
    """-> (the keys read, the messages)."""
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return (key,), _of(row[key], key)
    if row.get("texts") is not None and "prompt" not in row:
        return ("texts",), _of(_from_pairs(row["texts"]), "texts")
    prompt, completion, key = row.get("prompt"), row.get("completion"), "completion"
    if completion is None and (completion := row.get("chosen")) is not None:
        key = "chosen"
        if isinstance(completion, list) and not isinstance(prompt, list):
            return (key,), _of(completion, key)  # it begins with the prompt
        if prompt is None:
            raise RecordError("`chosen` is text, and there is no `prompt` that it answers: give one")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if completion is None:
        return ("prompt", key), _of(prompt, "prompt")
    return ("prompt", key), _of(prompt, "prompt", "ignored_gpt") + _of(completion, key)


def _of(messages: Any, key: str, answer: str = "gpt") -> list[_Message]:
    """The messages under a key; the assistant's get the role `answer`."""
    if not isinstance(messages, (list, tuple)):
        raise RecordError(f'`{key}` is a list of messages: write [{{"role": "user", "content": "..."}}]')
    found = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number} of `{key}`"
        if not isinstance(message, dict) or message.keys().isdisjoint(_CONTENT):
            raise RecordError(f'{where} is not of the form {{"role": ..., "content": ...}}')
        said = message.get("role")
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            told = f"{where} has the role {short(said)}: use system, user, assistant or tool"
            raise RecordError(told, kind="unknown_role")
        found.append((where, answer if role == "gpt" else role, message))
    return found


def _from_pairs(pairs: Any) -> list[dict]:
    """`texts` of user and assistant pairs -> messages."""
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise RecordError('`texts` is a list of pairs: write [{"user": ..., "assistant": ...}]')
    roles = ("user", "assistant")
    return [{"role": role, "content": pair[role]} for pair in pairs for role in roles if pair.get(role) is not None]


def _add(turns: list[_Turn], role: str, message: dict, media: _Media) -> None:
    """Put a message behind the turns: as one of its own, or in the assistant's turn that it goes on in."""
    parts, count = _parts(message, media), 0
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
            raise RecordError("it goes on after a tool's answer in the prompt: begin the completion with the call")
        last.text += "\n" + "\n".join(text for _, text in parts)
        last.answered = False
    else:
        turns.append(_Turn(role, "\n".join(text for _, text in parts)))
    turns[-1].removed += count


def _parts(message: dict, media: _Media) -> list[tuple[str, str]]:
    """What a message holds: (kind, text), where the text of a picture or video is its placeholder."""
    content, thought = message.get("content"), message.get("reasoning_content")
    parts: list[tuple[str, str]] = []
    if isinstance(content, str):
        parts.append(("text", content))
    elif isinstance(content, (list, tuple)):
        for number, part in enumerate(content, start=1):
            try:
                parts.append(_part(part, media))
            except RecordError as error:
                raise error.at(f"part {number}") from None
    elif content is not None:
        raise RecordError(f"its `content` is text or a list of parts, not {short(content)}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise RecordError("its `tool_calls` are no list: write the calls in the text")
    parts += [("text", _call(call)) for call in calls]
    if thought is None or thought == "":
        return parts
    if not isinstance(thought, str):
        raise RecordError("its `reasoning_content` is text")
    return [("text", f"<think>\n{thought.strip()}\n</think>\n"), *(parts or [("text", "")])]


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
    """Whether `text` has a placeholder that is no crop's."""
    return text.count(placeholder) > text.count(f"</tool_call>{placeholder}")


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


def _first_has(listed: Any, key: str) -> bool:
    return isinstance(listed, list) and bool(listed) and isinstance(listed[0], dict) and key in listed[0]
