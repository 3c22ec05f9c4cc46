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

from ovisnb.data.checks.faults import Fault
from ovisnb.data.media import Folder, folder_of, open_image, open_media
from ovisnb.data.record import IMAGE, VIDEO, Media, Record
from ovisnb.data.video import frame_count, open_frames, sample_frames

from .html import FONT, MUTED, Html, picture
from .marks import marks_on
from .pieces import one_line, readable
from .regions import draw_regions

ROLE_COLOURS = {"system": "#9a6fb0", "human": "#e69f00", "gpt": "#0072b2", "ignored_gpt": "#8a8a8a"}
WARNING = "#d55e00"
LONGEST = 6000  # characters of a turn that are shown
TURNS, PICTURES, FRAMES, PROBLEMS = 40, 12, 8, 12  # of one record that are shown
_BREAKS = {" ": " ", "\n": "\n", "\t": "\t", "\u200c": "\u200c", "\u200d": "\u200d"}  # joiners: emoji, Persian
_BOX = f"{FONT};border-top:1px solid #9a9a9a;padding:10px 0 16px 0"
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
    opened = _Pictures(record, image_folder)
    near = opened.folder, os.path.dirname(record.source)
    facts = [record.kind or "", _file(record.source)]
    facts = " · ".join(f"<bdi>{words(fact, 80)}</bdi>" for fact in facts if fact)
    notes = [("", note) for note in record.notes] + [(fault.kind, without(fault.message, *near)) for fault in faults]
    left = _shots(record, opened, height) + _frames(record, image_folder, height // 3)
    left = f'<div style="flex:0 1 420px;display:flex;flex-wrap:wrap;align-content:flex-start;gap:10px">{left}</div>'
    right = f'<div style="flex:1 1 380px;min-width:300px">{_turns(record, opened)}</div>'
    return Html(
        f'<div style="{_BOX}"><div><b><bdi>{words(record.id)}</bdi></b> <span style="{MUTED}">{facts}</span></div>'
        f'{_problems(notes)}<div style="display:flex;flex-wrap:wrap;gap:20px;margin-top:8px">'
        f"{left if record.images or record.video else ''}{right}</div></div>"
    )


def show_faults(faults: Sequence[Fault]) -> Html:
    """The card of what is no record: a row that cannot be read, with the sentences that say why."""
    first = faults[0]
    name = "a row that is no record" if first.id is None else words(first.id)
    place = _file(first.file) + (f":{first.line}" if first.line is not None else "")
    lines = _problems([(fault.kind, fault.message) for fault in faults])
    head = f'<b><bdi>{name}</bdi></b> <span style="{MUTED}"><bdi>{words(place)}</bdi></span>'
    return Html(f'<div style="{_BOX}"><div>{head}</div>{lines}</div>')


def regions_of(record: Record, image_folder: Folder = None, *, at: int = 0) -> dict:
    """`image`, `boxes` and `points` of the record's picture number `at`, as `show_regions` takes them.

    Boxes and points come from the text, on records of one whole picture (with several the words do not say
    which is meant); the places of crops cut from the picture are added. MediaError for a broken picture.
    """
    image = open_media(record, image_folder)[0][at]
    marks = marks_on(record, at, image.size)
    return {"image": image, "boxes": marks.boxes, "points": marks.points}


def with_regions(records: Iterable[Record], image_folder: Folder = None) -> Iterator[dict]:
    """For each picture with a box on it the arguments of `show_regions`; broken pictures are passed over."""
    for record in records:
        opened = _Pictures(record, image_folder)
        for at, media in enumerate(record.images):
            if media.box is not None or isinstance(image := opened.open(at), str):
                continue
            marks = marks_on(record, at, image.size)
            if marks.boxes:
                title = one_line(record.id, 60)
                yield {"image": image, "boxes": marks.boxes, "points": marks.points, "title": title}


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


def words(text: object, limit: int = 200) -> str:
    """Text of the data on one line, escaped: nothing invisible in it, and cut at `limit` characters."""
    return escape(one_line(str(text), limit))


def _file(source: str) -> str:
    """The name of the file in a record's source; what names no file ("shapes:train/0/2") as it is."""
    name = source.replace("\\", "/").rpartition("/")[2]
    return name if "." in name or os.path.isabs(source) else source


def without(sentence: str, *folders: Folder) -> str:
    """`sentence` with these folders left out of its paths."""
    for folder in filter(None, folders):
        for spelt in {os.fspath(folder), os.path.realpath(folder)} - {"/", "."}:
            sentence = sentence.replace(spelt.rstrip("/") + "/", "")
    return sentence


class _Pictures:
    """The pictures of one record, each opened when it is asked for; what several are cut from is read once."""

    def __init__(self, record: Record, image_folder: Folder):
        self.record, self.folder, self.known = record, folder_of(record, image_folder), {}

    def open(self, at: int):
        """The PIL image, or the sentence that says why there is none."""
        media = self.record.images[at]
        if media.origin not in self.known:
            self.known[media.origin] = _or_sentence(lambda: open_image(media.whole, self.folder), self.folder)
        whole = self.known[media.origin]
        if media.box is None or isinstance(whole, str):
            return whole
        return _or_sentence(lambda: open_image(Media(image=whole).crop(media.box, media.coordinates)), self.folder)


def _or_sentence(read, folder: Folder):
    try:
        return read()
    except ValueError as error:  # a MediaError, or a box that no picture has
        return without(str(error), folder)


def _shots(record: Record, opened: _Pictures, height: int) -> str:
    """The whole pictures, with what can be drawn on them, and in words what cannot."""
    wholes = [at for at, media in enumerate(record.images) if media.box is None]
    shots = []
    for at in wholes[:PICTURES]:
        image, name = opened.open(at), f"image {at + 1}"
        if isinstance(image, str):
            shots.append(_broken(name, image))
            continue
        tall = height if len(wholes) < 3 else height // 2
        marks = marks_on(record, at, image.size)
        name += f" · {image.width}×{image.height}"
        if marks.boxes or marks.points:  # drawn for the size it is shown at, so that labels are readable
            image = draw_regions(image, marks.boxes, marks.points, width=420, height=tall)
        shots.append(_shot(image, name, tall, marks.left_out))
    return "".join(shots) + _more(len(wholes) - PICTURES, "picture")


def _frames(record: Record, image_folder: Folder, height: int) -> str:
    """An even sample of the video's frames."""
    if record.video is None:
        return ""

    folder = folder_of(record, image_folder)
    try:
        count = frame_count(record.video, folder)
        wanted = sample_frames(count, max_frames=FRAMES)
        frames = open_frames(record.video, folder, max_frames=FRAMES)
    except ValueError as error:
        return _broken("the video", without(str(error), folder))
    shots = [_shot(frame, f"frame {at + 1} of {count:,}", height) for at, frame in zip(wanted, frames)]
    return "".join(shots)


def _turns(record: Record, opened: _Pictures) -> str:
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
                    shown += _crop(record, opened, number)
                    piece = piece.removeprefix("\n")  # the picture has a line of its own already
            shown += _prose(piece)
        at += turn.text.count(IMAGE)
        rest = len(turn.text) - LONGEST
        more = f"… {rest:,} more characters of this turn are not shown" if rest > 0 else ""
        colour = ROLE_COLOURS.get(turn.role, "#8a8a8a")
        parts.append(
            f'<div style="border-left:3px solid {colour};padding:0 0 0 10px;margin:0 0 10px 0;overflow:hidden">'
            f'<div style="{MUTED};font-size:12px">{escape(turn.role)}</div>'
            f'<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere">{shown}</div>'
            f"{_muted(more) if more else ''}</div>"
        )
    return "".join(parts) + _more(crops - PICTURES, "crop") + _more(len(record.turns) - TURNS, "turn")


def _crop(record: Record, opened: _Pictures, at: int) -> str:
    media, image = record.images[at], opened.open(at)
    if isinstance(image, str):
        return _broken(f"image {at + 1}", image)
    box = ", ".join(f"{side:.4g}" if media.coordinates == "normalised" else f"{side:.0f}" for side in media.box)
    counted = "" if media.coordinates == "pixels" else f" ({media.coordinates})"
    return _shot(image, f"crop [{box}]{counted} · {image.width}×{image.height}", 110, width=320)


def _shot(image, name: str, height: int, left_out: Iterable[str] = (), width: int = 420) -> str:
    captions = "".join(_muted(words(line)) for line in (name, *left_out))
    shown = picture(image, height=height, width=width, alt=name)
    return f'<div style="white-space:normal;max-width:{width}px">{shown}{captions}</div>'


def _broken(name: str, sentence: str) -> str:
    """What stands where a picture would."""
    return (
        f'<div style="white-space:normal;border:1px dashed {WARNING};border-radius:4px;padding:6px 10px;max-width:400px;'
        f'overflow-wrap:anywhere"><b>{escape(name)}</b> cannot be shown: <bdi>{words(sentence, 500)}</bdi></div>'
    )


def _problems(notes: Sequence[tuple[str, str]]) -> str:
    lines = []
    for kind, message in notes[:PROBLEMS]:
        kind = f"<b>{words(kind, 60)}</b> " if kind else ""
        lines.append(f'<div style="overflow-wrap:anywhere">⚠ {kind}<bdi>{words(message, 500)}</bdi></div>')
    if not lines:
        return ""
    return (
        f'<div style="border-left:3px solid {WARNING};padding-left:10px;margin:6px 0">'
        + "".join(lines)
        + (_more(len(notes) - PROBLEMS, "problem") + "</div>")
    )


def _prose(text: str) -> str:
    """Text of a turn, escaped, its line breaks kept and what cannot be seen spelt out."""
    shown = escape("".join(readable(character, _BREAKS) for character in text))
    return shown.replace(escape(VIDEO), f'<span style="{_CHIP}">video</span>')


def _muted(line: str) -> str:
    return f'<div style="{MUTED};font-size:12px">{line}</div>'


def _more(count: int, name: str) -> str:
    if count <= 0:
        return ""
    return _muted(f"… {count:,} more {name}{'s are' if count > 1 else ' is'} not shown")
