"""Records as a person looks at them: a card of pictures and conversation.

    show_record(record, "images")    # in a notebook

Whatever the data holds, a card is made: text is shown as text, with what cannot be seen spelt out and what is
endless cut short; a picture that cannot be opened is replaced by the sentence that says why.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from PIL import Image

from ovisnb.data.checks.faults import Fault
from ovisnb.data.media import Folder, MediaError, folder_of, naming, open_image
from ovisnb.data.record import IMAGE, VIDEO, Record

from .html import FONT, MUTED, RED, Html, more, muted, warnings, words
from .marks import marks_on
from .pictures import Pictures, crop_name, img, thumbnail, without
from .pieces import one_line, readable
from .regions import draw_regions

ROLE_COLOURS = {"system": "#9a6fb0", "human": "#e69f00", "gpt": "#0072b2", "ignored_gpt": "#8a8a8a"}
LONGEST = 6000  # characters of a turn that are shown
TURNS, PICTURES, FRAMES = 40, 12, 8  # of one record that are shown
WIDTH = 420  # of a whole picture in CSS pixels
_BREAKS = {" ": " ", "\n": "\n", "\t": "\t", "\u200c": "\u200c", "\u200d": "\u200d"}  # joiners: emoji, Persian
_CHIP = "border:1px solid #9a9a9a;border-radius:3px;padding:0 4px;font-size:11px"


def show_record(
    record: Record | dict, image_folder: Folder = None, *, height: int = 300, faults: Sequence[Fault] = ()
) -> Html:
    """One record as a card: its whole pictures and frames left, the conversation right, all text escaped.

    Crops stand in the turn that asks for them. On a record of one whole picture the boxes and points of its
    text are drawn on it, and the places of its crops. `height` limits a picture's shown height in pixels;
    `faults` (of `ovisnb.data.checks`) are listed above. A picture that cannot be opened is a sentence.
    """
    record = Record.from_dict(record) if isinstance(record, dict) else record
    opened = Pictures(record, image_folder)
    near = opened.folder, os.path.dirname(record.source)
    facts = " · ".join(words(fact, 80) for fact in (record.kind, _file(record.source)) if fact)
    problems = [*record.notes, *((fault.kind, without(fault.message, *near)) for fault in faults)]
    left, right = _shots(record, opened, height) + _frames(opened, height // 3), _turns(record, opened)
    if left:
        left = f'<div style="flex:0 1 {WIDTH}px;display:flex;flex-wrap:wrap;align-content:flex-start;gap:10px">{left}</div>'
    body = f'{left}<div style="flex:1 1 380px;min-width:min(300px,100%)">{right}</div>'
    return _card(words(record.id), facts, problems, body)


def show_faults(faults: Sequence[Fault]) -> Html:
    """The card of what is no record: a row that cannot be read, with the sentences that say why."""
    first = faults[0]
    name = "a row that is no record" if first.id is None else words(first.id)
    place = _file(first.file) + (f":{first.line}" if first.line is not None else "")
    return _card(name, words(place), [(fault.kind, fault.message) for fault in faults], "")


def _card(name: str, facts: str, problems: Sequence, body: str) -> Html:
    return Html(
        f'<div style="{FONT};border-top:1px solid #9a9a9a;padding:10px 0 16px 0">'
        f'<div><b>{name}</b> <span style="{MUTED}">{facts}</span></div>{warnings(problems)}'
        f'<div style="display:flex;flex-wrap:wrap;gap:20px;margin-top:8px">{body}</div></div>'
    )


def regions_of(record: Record, image_folder: Folder = None, *, at: int = 0) -> dict:
    """`image`, `boxes` and `points` of the record's picture number `at`, as `show_regions` takes them.

    Boxes and points come from the text, on records of one whole picture (with several the words do not say
    which is meant); the places of crops cut from the picture are added. MediaError for a broken picture.
    """
    with naming(record, f"image {at + 1}"):
        image = open_image(record.images[at], folder_of(record, image_folder))
    marks = marks_on(record, at, image.size)
    return {"image": image, "boxes": marks.boxes, "points": marks.points}


def with_regions(records: Iterable[Record], image_folder: Folder = None) -> Iterator[dict]:
    """For each picture with a box on it the arguments of `show_regions`; broken pictures are passed over."""
    for record in records:
        for at, media in enumerate(record.images):
            try:
                found = regions_of(record, image_folder, at=at) if media.box is None else {"boxes": []}
            except MediaError:
                continue
            if found["boxes"]:
                yield found | {"title": one_line(record.id, 60)}


def examples(records: Iterable[Record]) -> dict[str, Record]:
    """The first record of each kind of conversation there is, by what is special about it."""
    tests = {
        "a video": lambda record, text: record.video is not None,
        "a tool's answer": lambda record, text: "</tool_response>" in text,
        "a tool call and the crop it returns": lambda record, text: "</tool_call>" in text,
        "several pictures": lambda record, text: len(record.images) > 1,
        "an answer not to learn from": lambda record, text: any(turn.role == "ignored_gpt" for turn in record.turns),
        "text only": lambda record, text: not record.images,
        "thinking": lambda record, text: "</think>" in text,
        "a system prompt": lambda record, text: record.turns[0].role == "system",
        "several turns": lambda record, text: len(record.turns) > 2,
        "one picture": lambda record, text: True,
    }
    found: dict[str, Record] = {}
    for record in records:
        text = "".join(turn.text for turn in record.turns if turn.role == "gpt")
        name = next((name for name, test in tests.items() if test(record, text)), None)
        if name and name not in found:
            found[name] = record
    return {name: found[name] for name in reversed(tests) if name in found}


def select(records: Iterable[Record], ids: str) -> list[Record]:
    """The records named in `ids` (separated by commas), in that order; ValueError for one that is not there."""
    records = list(records)
    wanted = [name.strip() for name in ids.split(",") if name.strip()]
    known = [record.id for record in records]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) or known[:1]
            hint = f"did you mean {near[0]!r}?" if near else "no record was read."
            raise ValueError(f"None of the {len(known)} records read has the id {name!r}: {hint}")
    return [record for name in wanted for record in records if record.id == name]


def _file(source: str) -> str:
    """The name of the file in a record's source; what names no file ("shapes:train/0/2") as it is."""
    name = source.replace("\\", "/").rpartition("/")[2]
    return name if "." in name or os.path.isabs(source) else source


def _shots(record: Record, opened: Pictures, height: int) -> str:
    """The whole pictures, with what can be drawn on them, and in words what cannot."""
    wholes = [at for at, media in enumerate(record.images) if media.box is None]
    tall, shots = height if len(wholes) < 3 else height // 2, []
    for at in wholes[:PICTURES]:
        image, name, left_out = opened.open(at), f"image {at + 1}", ()
        if isinstance(image, Image.Image):
            name += f" · {image.width}×{image.height}"
            marks = marks_on(record, at, image.size)
            left_out = marks.left_out
            if marks.boxes or marks.points:  # drawn for the size it is shown at, so that labels are readable
                image = draw_regions(image, marks.boxes, marks.points, width=WIDTH, height=tall)
        shots.append(_shot(image, name, tall, left_out))
    return "".join(shots) + more(len(wholes) - PICTURES, "picture")


def _frames(opened: Pictures, height: int) -> str:
    """An even sample of the video's frames."""
    if opened.record.video is None:
        return ""
    frames = opened.frames(FRAMES)
    if isinstance(frames, str):
        return _shot(frames, "the video", height)
    return "".join(_shot(frame, name, height) for name, frame in frames.items())


def _turns(record: Record, opened: Pictures) -> str:
    """The conversation, each `<image>` as the number of its picture, a crop with its picture below."""
    parts, at, crops = [], 0, 0
    for turn in record.turns[:TURNS]:
        shown, *pieces = turn.text[:LONGEST].split(IMAGE)
        shown = _prose(shown)
        for number, piece in enumerate(pieces, start=at):
            shown += f'<span style="{_CHIP}">image {number + 1}</span>'
            if record.images[number].box is not None:
                crops += 1
                if crops <= PICTURES:
                    shown += _crop(opened, number)
                    piece = piece.removeprefix("\n")  # the picture has a line of its own already
            shown += _prose(piece)
        at += turn.text.count(IMAGE)
        colour = ROLE_COLOURS.get(turn.role, "#8a8a8a")
        parts.append(
            f'<div style="border-left:3px solid {colour};padding:0 0 0 10px;margin:0 0 10px 0;overflow:hidden">'
            f"{muted(escape(turn.role))}"
            f'<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere">{shown}</div>'
            f"{more(len(turn.text) - LONGEST, 'character')}</div>"
        )
    return "".join(parts) + more(crops - PICTURES, "crop") + more(len(record.turns) - TURNS, "turn")


def _crop(opened: Pictures, at: int) -> str:
    media, image = opened.record.images[at], opened.open(at)
    if isinstance(image, str):
        return _shot(image, f"image {at + 1}", 110)
    return _shot(image, f"{crop_name(media)} · {image.width}×{image.height}", 110, width=320)


def _shot(image: Image.Image | str, name: str, height: int, left_out: Iterable[str] = (), width: int = WIDTH) -> str:
    """A picture with its name and what is not drawn on it below, or the sentence that stands in its place."""
    if isinstance(image, str):
        style = f"border:1px dashed {RED};border-radius:4px;padding:6px 10px;overflow-wrap:anywhere"
        shown = f'<div style="{style}"><b>{escape(name)}</b> cannot be shown: {words(image, 500)}</div>'
    else:
        shown = img(thumbnail(image, width, height), name) + "".join(muted(words(line)) for line in (name, *left_out))
    return f'<div style="white-space:normal;max-width:min({width}px,100%)">{shown}</div>'


def _prose(text: str) -> str:
    """Text of a turn, escaped, its line breaks kept and what cannot be seen spelt out."""
    shown = escape("".join(readable(character, _BREAKS) for character in text))
    return shown.replace(escape(VIDEO), f'<span style="{_CHIP}">video</span>')
