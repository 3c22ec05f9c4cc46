"""The record form: `{"id", "image", "video", "kind", "conversations": [{"from", "value"}, ...]}`.

    {"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, ...]}

The project's own format, read and written as it is: `Record.from_dict` and `Record.to_dict`. Where the
picture's size can be known, a crop that reaches outside its picture is reported (opening it cuts it to the
picture); the words of the call stay as they were written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ovisnb.data import boxes
from ovisnb.data.formats.rows import Options, Reader
from ovisnb.data.keys import beside
from ovisnb.data.media import Folder, MediaError, folder_of, image_size
from ovisnb.data.record import Note, Record, RecordError


def matches(entry: Any) -> bool:
    """Whether a row has `conversations` with turns of from/value.

    Turns of role/content are messages, and so is a row that says beside its turns what only messages do.
    """
    if not isinstance(entry, dict) or "conversations" not in entry:
        return False
    turns = entry["conversations"]
    first = turns[0] if isinstance(turns, list) and turns else None
    return not (isinstance(first, dict) and "role" in first and "from" not in first) and not beside(entry)


def entries(entry: Any, options: Options) -> Iterator[dict]:
    """The row as it is."""
    yield entry


def rows(records: Iterable[Record]) -> Iterator[dict]:
    """Each record's own dict."""
    return (record.to_dict() for record in records)


def crops_noted(record: Record, image_folder: Folder) -> Record:
    """The record with a note for each crop that reaches outside its picture; without an `image_folder`, as it is.

    Pictures that cannot be read say nothing here. RecordError for a crop of which nothing lies inside.
    """
    notes = []
    sizes: dict[str, tuple[int, int] | None] = {}
    crops = enumerate(record.images if image_folder is not None and len(record.images) > 1 else [], start=1)
    for number, media in crops:
        if media.box is None or media.path is None:
            continue
        if media.path not in sizes:
            try:
                sizes[media.path] = image_size(media.whole, folder_of(record, image_folder))
            except MediaError:
                sizes[media.path] = None  # opening it says why
        if (size := sizes[media.path]) is None:
            continue
        box = boxes.convert(media.box, media.coordinates, "pixels", size)
        inside = boxes.clip(box, size)
        told = f"image {number}: the box {list(media.box)} ({media.coordinates})"
        picture = f"the picture of {size[0]}x{size[1]} pixels"
        if boxes.area(inside) <= 0:
            error = RecordError(f"{told} lies outside {picture}: correct it", kind="box_outside")
            raise error.of(record.id, record.source)
        if any(abs(a - b) > 0.01 for a, b in zip(inside, box)):  # what rounding can do is no mistake
            cut = ", ".join(boxes.write_numbers(inside, "pixels"))
            notes.append(Note(f"{told} reaches outside {picture}: only [{cut}] is cut out", "box_outside"))
    return record.model_copy(update={"notes": (*record.notes, *notes)}) if notes else record


READER = Reader("records", "conversations", matches, entries, rows)
