"""Captions: a picture and the text that describes it.

    {"image": "cat.jpg", "caption": "A cat on a table."}

Becomes a question and an answer: the template as the human turn, the caption as the answer. Keys as in the
original: `image` or `image_path` (a path, a list with one, or the picture itself), `caption`, and
`caption_template` where a row has a template of its own. A list of captions gives one record for each. Where the format
is named, `text` is taken for `caption` and `file_name` for `image` too (the metadata of an image folder).

The template holds one `<image>`; by default it is "<image>\\nDescribe the image.". The original writes
template, picture and caption one after the other without roles; here they are turns, as everywhere else,
and the caption carries the loss as it does there. Also as there, `<image>` in a caption is taken out
(and `<video>`), with a sentence in `Record.notes`, and spaces around it are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ovisnb.data.formats.parts import first_of, pictures, plain, refuse_keys, refused, removed
from ovisnb.data.formats.rows import Entry, Options, Reader
from ovisnb.data.keys import holds
from ovisnb.data.record import IMAGE, VIDEO, Note, Record, RecordError

TEMPLATE = "<image>\nDescribe the image."
KIND = "caption"
"""The `kind` of a record whose row says none."""

_PICTURE = ("image", "image_path", "images", "file_name")
_TEXT = ("caption", "captions", "text")
_TEMPLATE = "caption_template"
_PART = ("bbox", "box", "bbox_xyxy", "bbox_xywh")
"""Keys of a part of the picture."""


def matches(entry: Any) -> bool:
    """Whether a row has a caption and a picture."""
    return isinstance(entry, dict) and "caption" in entry and not entry.keys().isdisjoint(_PICTURE)


def entries(entry: dict, options: Options) -> Iterator[dict | RecordError]:
    """One entry for each caption."""
    key, captions = first_of(entry, _TEXT, "caption")
    picture, value = first_of(entry, _PICTURE, "image")
    found = pictures(value)
    if len(found) != 1:
        raise RecordError(f"`{picture}` has {len(found)} pictures, and a caption goes with one: give one")
    rest = {name: value for name, value in entry.items() if name not in (key, picture, _TEMPLATE)}
    if taken := next((name for name in ("conversations", "video", "image") if name in rest), None):
        raise RecordError(f"a row with a caption may not have `{taken}` as well as `{picture}`: rename it")
    asked = _template(entry.get(_TEMPLATE), options.template)
    beside = [Note(f"{said}: drop or rename the key, or {advice}") for said, advice in _beside(rest)]
    many = isinstance(captions, list)
    if many and not captions:
        raise RecordError(f"`{key}` is an empty list: write a caption or drop the row")
    for number, caption in enumerate(captions if many else [captions]):
        try:
            text, notes = _caption(caption)
        except RecordError as error:
            yield error.at(f"caption {number + 1}") if many else error
            continue
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": text}]
        row = Entry({"kind": KIND, **rest, "image": found, "conversations": turns})
        if many and isinstance(rest.get("id"), (str, int)) and not isinstance(rest["id"], bool):
            row["id"] = f"{rest['id']}-{number}"
        row.notes = (*notes, *beside)
        yield row


def _beside(rest: dict) -> Iterator[tuple[str, str]]:
    """(what is said, what to do) for keys of a row that make its caption something else, or are another conversation."""
    for key in _PART:
        if holds(rest.get(key)):
            yield (
                f"the row has `{key}`, and its caption is learnt as one of the whole picture",
                "write rows of `image`, `expression` and `bbox`",
            )
    for key in ("answer", "answers", "conversation", "qa_pairs"):
        if holds(rest.get(key)):
            yield f"the row has `{key}`, and only its caption is learnt", "write the rest as rows of `messages`"


def rows(records: Iterable[Record]) -> Iterator[dict]:
    """Records -> captions; only a record of one question about one picture and its answer can be one."""
    return map(_row, records)


READER = Reader("captions", "image and caption", matches, entries, rows)


def _template(own: Any, given: str | None) -> str:
    template = own if own is not None else given if given is not None else TEMPLATE
    if not isinstance(template, str) or template.count(IMAGE) != 1 or VIDEO in template:
        raise RecordError(f"the caption template {template!r} does not hold one {IMAGE}: write {TEMPLATE!r}, say")
    return template


def _caption(caption: Any) -> tuple[str, tuple[str, ...]]:
    if not isinstance(caption, str):
        raise RecordError("a caption is text: correct or drop it")
    text, count = plain(caption)
    if not text.strip():
        raise RecordError("the caption is empty: write one or drop the row")
    return text.strip(), (removed(count, "the caption"),) if count else ()


def _row(record: Record) -> dict[str, Any]:
    roles = [turn.role for turn in record.turns]
    if roles != ["human", "gpt"] or len(record.images) != 1 or record.video is not None:
        raise refused(record, "a caption", "it is not one question about one picture and its answer")
    asked, caption = (turn.text for turn in record.turns)
    if IMAGE not in asked:
        raise refused(record, "a caption", f"its {IMAGE} does not stand in the question")
    if not caption.strip():
        raise refused(record, "a caption", "its answer is empty")
    refuse_keys(record, "a caption", (*_PICTURE, *_TEXT, _TEMPLATE))
    row = {"id": record.id, "image": record.images[0].to_entry(), "caption": caption}
    if asked != TEMPLATE:
        row[_TEMPLATE] = asked
    own = record.to_dict()
    kept = [key for key in ("kind", "box_coordinates", "call_coordinates") if own.get(key) not in (None, KIND)]
    return row | {key: own[key] for key in kept} | record.meta
