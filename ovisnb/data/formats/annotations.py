"""Annotation lines: questions about one picture, crops written in braces.

    {"image_path": "a.jpg", "QnA": [{"Q": "What is worn?", "A3": "{Crop person [0.00, 141.43, 79.23, 480.00]} A jacket."}]}

Each question becomes one record: a human turn `<image>\\nQ`, and A3 with every call written as
`<tool_call>[x1, y1, x2, y2]</tool_call><image>`, the crop following in the turn; `{Identify [..]}`
becomes `<tool_call>Identify [..]</tool_call>`. Other braces are text, but for those that hold four
numbers in brackets: no call that is known, an error. The word before a box is no part of the call that the
model learns to write; it goes to `meta["labels"]`, one for each call, and back from there. Other keys
of a question (A1, A2) go to `meta`, those of the line to `meta["line"]`; an `id` of a question names
its record, an `id` of the line is counted up ("7-0", "7-1").

Boxes are pixels of the original picture. One that reaches outside is cut to the picture, with a sentence
in `Record.notes`; one without area (also once it is cut) is an error. Where the picture is not
found, its size is not known, and only numbers below 0 are cut.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import count, groupby
from typing import Any

from ovisnb.data import boxes, markup
from ovisnb.data.formats.parts import cut, refuse_keys, refused
from ovisnb.data.formats.rows import Entry, Options, Reader
from ovisnb.data.media import MediaError, image_size
from ovisnb.data.record import FIELDS, IMAGE, Media, Note, Record, RecordError

_QUESTION, _ANSWER = "Q", "A3"
_OWN = ("kind", "box_coordinates")  # keys of a question that are the record's own
_TAKEN = {"line", "labels", *FIELDS}.difference(_OWN)  # names that no other key of a question may have
_PLAIN = re.compile(r"\d{1,9}(?:\.\d{1,9})?", re.ASCII)
_BRACKETS = re.compile(r"[{}]|\[[^\[\]{}]*\]")
_TEX_COMMAND = re.compile(r"\\[A-Za-z]+$")
_Size = Callable[[], tuple[float, float]]
"""Gives (width, height) of the picture in pixels; infinite if it cannot be read."""


def matches(entry: Any) -> bool:
    """Whether a row has `image_path` and `QnA`."""
    return isinstance(entry, dict) and "image_path" in entry and "QnA" in entry


def entries(entry: dict, options: Options) -> Iterator[dict | RecordError]:
    """One entry for each question; a question that cannot be read is an error, and the others follow."""
    path, questions = entry.get("image_path"), entry.get("QnA")
    if not isinstance(path, str) or not path.strip():
        raise RecordError("`image_path` is the path of a picture: write it as text")
    if not isinstance(questions, list):
        raise RecordError('`QnA` is a list of questions: write [{"Q": ..., "A3": ...}]')
    if not questions:
        raise RecordError("`QnA` has no question: write one or drop the line")
    line = {key: value for key, value in entry.items() if key not in ("image_path", "QnA")}

    @cache  # looked up once, and only where a call needs it
    def size() -> tuple[float, float]:
        try:
            return image_size(Media(path=path), options.image_folder)
        except MediaError:
            return math.inf, math.inf  # opening it later says why

    for number, question in enumerate(questions, start=1):
        try:
            yield _entry(question, number, line, path, size)
        except RecordError as error:
            name = _id(question, number, line)
            known = str(name) if isinstance(name, (str, int)) else None
            yield RecordError(f"question {number} of {path!r}: {error}", kind=error.kind, record_id=known)


def rows(records: Iterable[Record]) -> Iterator[dict]:
    """Records -> annotation lines; what came from one line (`Record.source`) goes back into one."""
    alone = count()

    def line_of(record: Record) -> Any:
        path = record.images[0].path if record.images else None
        return (record.source, path, record.meta.get("line")) if record.source else next(alone)

    for _, group in groupby(records, key=line_of):
        row: dict[str, Any] = {}
        for record in group:
            question = _question(record)
            row = row or {**_line(record), "QnA": []}
            row["QnA"].append(question)
        yield row


READER = Reader("annotations", "image_path and QnA", matches, entries, rows)


def _entry(question: Any, number: int, line: dict, path: str, size: _Size) -> Entry:
    if not isinstance(question, dict):
        raise RecordError('it is not of the form {"Q": ..., "A3": ...}')
    for key in (_QUESTION, _ANSWER):
        if not isinstance(question.get(key), str):
            raise RecordError(f"`{key}` is missing or no text")
    rest = {key: value for key, value in question.items() if key not in (_QUESTION, _ANSWER, "id")}
    if taken := next((key for key in rest if key in _TAKEN), None):
        raise RecordError(f"the key `{taken}` has a meaning of its own in a record: rename it")
    asked, answer = question[_QUESTION], question[_ANSWER]
    if IMAGE in answer and "</tool_call>" not in answer:
        said = f"`{_ANSWER}` holds {IMAGE}, and an annotation line writes a crop as {{Crop label [x1, y1, x2, y2]}}"
        raise RecordError(f"{said}, whose picture follows by itself: take {IMAGE} out", kind="placeholder_count")
    text, labels, notes = _with_calls(answer, size)
    entry = Entry(
        image=[path],
        conversations=[
            {"from": "human", "value": asked if IMAGE in asked else f"{IMAGE}\n{asked}"},
            {"from": "gpt", "value": text},
        ],
        **rest,
    )
    entry.notes = tuple(notes)
    if (name := _id(question, number, line)) is not None:
        entry["id"] = name
    if line:
        entry["line"] = line
    if any(labels):
        entry["labels"] = labels
    return entry


def _id(question: Any, number: int, line: dict) -> Any:
    """The id of the record of a question: its own, or that of its line, counted up; None if neither has one."""
    name = question.get("id") if isinstance(question, dict) else None
    if name is None and line.get("id") is not None:
        return f"{line['id']}-{number - 1}"
    return name


def _with_calls(answer: str, size: _Size) -> tuple[str, list[str | None], list[Note]]:
    """-> (the answer with its calls as tool calls, the label of each call, what was changed)."""
    text, labels, notes, last, rest = "", {}, [], 0, ""
    for call in markup.annotation_calls(answer):
        if call.problem:
            raise RecordError(call.problem, kind="unreadable_box")
        numbers, note = _numbers(call, size())
        notes += [note] if note else []
        text += answer[last : call.start]
        rest += answer[last : call.start]
        labels[len(text)] = call.label
        text += markup.write_call(call.name, numbers) + (IMAGE if call.name == "crop" else "")
        last = call.end
    text += answer[last:]
    if braces := _box_in_braces(rest + answer[last:]):
        said = f"the braces {markup.short(braces)} hold a box but are no call"
        advice = "write {Crop label [x1, y1, x2, y2]}, or the box without braces"
        raise RecordError(f"{said}: {advice}", kind="unreadable_box")
    # An answer may hold tool calls already, and the labels count those too.
    return text, [labels.get(call.start) for call in markup.calls(text)] if labels else [], notes


def _box_in_braces(text: str) -> str | None:
    """The first braces that hold four numbers in brackets and are neither JSON nor TeX; None if there are none."""
    opened, box = [], -1
    for match in _BRACKETS.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] != "}":
            box = match.start() if markup.read_numbers(match[0][1:-1], 4)[0] else box
        elif opened and (start := opened.pop()) < box and not _is_json_or_tex(text, start, match.end()):
            return text[start : match.end()]
    return None


def _is_json_or_tex(text: str, start: int, end: int) -> bool:
    """Whether the braces are an answer in JSON or the argument of a TeX command, such as \\boxed{[1, 2, 3, 4]}."""
    if _TEX_COMMAND.search(text, max(0, start - 40), start):
        return True
    try:
        return not {"crop", "identify"} & {key.lower() for key in json.loads(text[start:end])}
    except (ValueError, RecursionError):
        return False


def _numbers(call: markup.Call, size: tuple[float, float]) -> tuple[list[str], Note | None]:
    """The numbers of a call, cut to the picture -> (as text, what was changed)."""
    name = f"the box {list(call.numbers)} of the call {{{call.text}}}"
    where = "the picture" if math.inf in size else f"the picture of {size[0]}x{size[1]} pixels"
    box, note = cut(call.numbers, size, name, where)
    if box is None:
        raise RecordError(f"{note}: correct or drop it", kind=note.kind)
    return (None if note else _as_written(call)) or boxes.write_numbers(box, "pixels"), note


def _as_written(call: markup.Call) -> list[str] | None:
    """The numbers as the file has them, where nothing about them needs repair: digits are not changed for nothing."""
    fields = [field.strip() for field in _inside(call).split(",")]
    return fields if len(fields) == 4 and all(map(_PLAIN.fullmatch, fields)) else None


def _inside(call: markup.Call) -> str:
    """What stands between the brackets of a call."""
    return call.text.partition("[")[2].partition("]")[0]


def _line(record: Record) -> dict[str, Any]:
    """The picture and the line's own keys."""
    rest = record.meta.get("line", {})
    if not isinstance(rest, dict) or "QnA" in rest or "image_path" in rest:
        raise refused(record, "an annotation", "its `line` in `meta` does not hold the other keys of a line")
    return {"image_path": record.images[0].path, **rest}


def _question(record: Record) -> dict[str, Any]:
    """One record -> one question of a line."""
    if [turn.role for turn in record.turns] != ["human", "gpt"] or record.video is not None or not record.images:
        raise refused(record, "an annotation", "it is not one question about one picture")
    asked, answered = (turn.text for turn in record.turns)
    whole, *crops = record.images
    if whole.path is None or whole.box is not None:
        raise refused(record, "an annotation", "its picture is not a whole file")
    if record.call_coordinates != "pixels":
        raise refused(
            record, "an annotation", f"its calls hold {record.call_coordinates}, not pixels: convert the record first"
        )
    labels = record.meta.get("labels") or []
    if not isinstance(labels, list) or any(label is not None and not _is_label(label) for label in labels):
        raise refused(record, "an annotation", "its `labels` in `meta` are not one word or null for each call")
    if markup.annotation_calls(answered):
        raise refused(record, "an annotation", "its answer holds braces that would be read as a call")
    answer, cut = _with_braces(answered, labels)
    if IMAGE in answer or crops != [box and whole.crop(box) for box in cut]:
        raise refused(record, "an annotation", "its pictures are not one picture and the crops that its calls ask for")
    rest = {key: value for key, value in record.meta.items() if key not in ("line", "labels")}
    refuse_keys(record, "an annotation", (_QUESTION, _ANSWER))
    own = {"kind": record.kind} if record.kind is not None else {}
    if record.box_coordinates != "normalised":
        own["box_coordinates"] = record.box_coordinates
    return {"id": record.id, _QUESTION: asked.removeprefix(f"{IMAGE}\n"), _ANSWER: answer, **own, **rest}


def _is_label(label: Any) -> bool:
    return isinstance(label, str) and bool(label.strip()) and not set("[]{}<>") & set(label)


def _with_braces(text: str, labels: list[str | None]) -> tuple[str, list[tuple[float, ...] | None]]:
    """-> (the answer with its tool calls in braces, for each crop call its box, None where no picture follows it)."""
    parts, cut, last = [], [], 0
    for number, call in enumerate(markup.calls(text)):
        if call.problem:
            continue  # left as it is
        label = call.label or (labels[number] if number < len(labels) else None)
        head = call.name.capitalize() + (f" {label}" if label else "")
        parts += [text[last : call.start], f"{{{head} [{_inside(call).strip()}]}}"]
        last = call.end
        if call.name == "crop":
            shown = text.startswith(IMAGE, last)
            cut.append(call.numbers if shown else None)
            last += len(IMAGE) if shown else 0
    return "".join([*parts, text[last:]]), cut
