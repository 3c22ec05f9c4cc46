"""From one convention of coordinates, or one file format, to another.

    convert_record(record, boxes="thousand", image_folder="images")     # <box>(100,200),(300,400)</box>
    convert_file("annotations.jsonl", "records.json", boxes="normalised", image_folder="images")

Nothing is converted unless it is asked for, and a record says afterwards what its numbers count. Numbers
are written as their convention writes them (`ovisnb.data.boxes`), so there and back is exact to that
precision. Where pixels come in, a picture's size is needed: a call counts in the last whole picture before
it; a `<box>` in the whole pictures of the record, which must then be of one size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ovisnb.data import markup
from ovisnb.data.boxes import Convention, checked_convention, convert_point, misread, write_numbers
from ovisnb.data.files import written
from ovisnb.data.formats import read_records, write_records
from ovisnb.data.formats.info import sets_of
from ovisnb.data.media import Folder, folder_of, image_size, inspect_image
from ovisnb.data.record import IMAGE, Media, Record, RecordError, Turn
from ovisnb.data.video import frame_size

_ANSWERS = ("gpt", "ignored_gpt")
Size = tuple[int, int]


@dataclass(frozen=True)
class Converted:
    """What `convert_file` did."""

    path: Path
    records: int
    notes: tuple[str, ...]
    """One sentence for each thing that was changed beside what was asked for, with the record's source."""


def convert_record(
    record: Record,
    *,
    boxes: Convention | None = None,
    calls: Convention | None = None,
    image_folder: Folder = None,
) -> Record:
    """The record with `<box>` and `<point>` (`boxes`) and tool calls (`calls`) in these conventions; None leaves them.

    Every turn is rewritten, and so is the crop that belongs to a call, so that it stays what the call
    says. Raises RecordError, naming record and turn, for an answer with a box or call that cannot be
    read, a coordinate off the picture, a crop too small for the convention's precision, and a size that is
    needed but not known: the picture is missing, or a box may lie in any of several sizes. Other turns
    may hold what cannot be read ("write <box>(x1,y1),(x2,y2)</box>"): it is left as it is.
    """
    try:
        return _Conversion(record, boxes, calls, image_folder).record()
    except ValueError as error:
        raise RecordError(f"{record.where}: {error}") from None


def convert_file(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str | None = None,
    boxes: Convention | None = None,
    calls: Convention | None = None,
    image_folder: Folder = None,
    pictures: str | os.PathLike[str] | None = None,
    format: str | None = None,
    template: str | None = None,
) -> Converted:
    """Write the records of `src`, a file of any format, to `dst` in the format `to` ("records" by default).

    `format`, `template` and `image_folder` are those of `read_records`, `boxes` and `calls` those of
    `convert_record`. Pictures that lie in the file itself (a parquet file, say) are saved in the folder
    `pictures`, under names made of their content, and paths then start there. `src` is never written to;
    `dst` appears whole or not at all. Raises RecordError, one sentence with file and line, at the first
    record that cannot be read or converted.
    """
    src, dst = Path(src), Path(dst)
    for name in (boxes, calls):
        if name is not None:
            checked_convention(name)
    read = [src, *(data_set.path for data_set in sets_of(src))]
    if dst.exists() and any(path.exists() and dst.samefile(path) for path in read):
        raise RecordError(f"{dst} is one of the files that are read: give another name to write to")
    notes: list[str] = []
    unread: list[str] = []
    count = 0

    def converted() -> Iterator[Record]:
        nonlocal count
        for record in read_records(src, image_folder=image_folder, format=format, template=template):
            record = convert_record(record, boxes=boxes, calls=calls, image_folder=image_folder)
            notes.extend(f"{record.where}: {note}" for note in record.notes)
            if boxes is not None:
                answers = (turn.text for turn in record.turns if turn.role in _ANSWERS)
                unread.extend(f"{record.where}: {found}" for found in map(markup.foreign_box, answers) if found)
            count += 1
            yield _with_files(record, image_folder, pictures)

    path = write_records(converted(), dst, format=to)
    if unread:
        many = "an answer that holds" if len(unread) == 1 else f"{len(unread):,} answers that hold"
        form = "write boxes as <box>(x1,y1),(x2,y2)</box>"
        notes.insert(0, f"no box was found in {many} what looks like one ({unread[0]}): {form}")
    return Converted(path, count, tuple(notes))


class _Conversion:
    """One record on its way; sizes are looked up once, and only if pixels come in."""

    def __init__(self, record: Record, boxes: Convention | None, calls: Convention | None, image_folder: Folder):
        self.was, self.folder = record, folder_of(record, image_folder)
        self.of_boxes, self.of_calls = record.box_coordinates, record.call_coordinates
        self.boxes = self.of_boxes if boxes is None else checked_convention(boxes)
        self.calls = self.of_calls if calls is None else checked_convention(calls)
        self.sizes: dict[object, Size] = {}
        self.crops: dict[tuple, tuple[float, ...]] = {}  # (picture, old numbers) of a call -> its new numbers

    def record(self) -> Record:
        if (self.boxes, self.calls) == (self.of_boxes, self.of_calls):
            return self.was
        turns, pictures = [], 0
        for number, turn in enumerate(self.was.turns, start=1):
            try:
                turns.append(Turn(role=turn.role, text=self.text(turn, pictures)))
            except ValueError as error:
                raise RecordError(f"turn {number}: {error}") from None
            pictures += turn.text.count(IMAGE)
        images = [self.crop(media) for media in self.was.images]
        own = {"turns": turns, "images": images, "box_coordinates": self.boxes, "call_coordinates": self.calls}
        return Record(**{**dict(self.was), **own})

    def text(self, turn: Turn, pictures: int) -> str:
        """A turn's text, before which `pictures` of the record's images stand."""
        found: list[markup.Region | markup.Call] = []
        found += markup.regions(turn.text) if self.boxes != self.of_boxes else []
        found += markup.calls(turn.text) if self.calls != self.of_calls else []
        parts, last = [], 0
        for one in sorted(found, key=lambda one: one.start):
            if one.numbers is None:
                if one.problem and turn.role in _ANSWERS:
                    raise RecordError(f"{one.problem}: repair it before converting")
                continue
            if one.start < last:
                raise RecordError(f"{markup.short(turn.text[one.start : one.end])!r} stands inside a call: repair it")
            if isinstance(one, markup.Region):
                new = self.region(one)
            else:
                new = self.call(one, pictures + turn.text.count(IMAGE, 0, one.start))
            parts += [turn.text[last : one.start], new]
            last = one.end
        return "".join([*parts, turn.text[last:]])

    def region(self, region: markup.Region) -> str:
        numbers = self.moved(region.numbers, self.of_boxes, self.boxes, self.size_of_boxes)
        pairs = [f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2])]
        return f"<{region.kind}>{','.join(pairs)}</{region.kind}>"

    def call(self, call: markup.Call, before: int) -> str:
        """A call with new numbers; its name and label stay as they were written."""
        whole = next((media for media in reversed(self.was.images[:before]) if media.box is None), None)

        def size() -> Size:
            if whole is None:
                raise RecordError(f"there is no picture before the call {call.text}, so its pixels cannot be converted")
            return self.size(whole)

        written = self.moved(call.numbers, self.of_calls, self.calls, size)
        if whole is not None:
            self.crops[whole.origin, call.numbers] = tuple(map(float, written))
        head = call.text.partition("[")[0]
        return f"<tool_call>{head}[{', '.join(written)}]</tool_call>"

    def crop(self, media: Media) -> Media:
        """The picture of a call, cut where the call now says; every other picture as it is."""
        box = self.crops.get((media.origin, media.box))
        if box is None or media.coordinates != self.of_calls:
            return media
        try:
            return media.whole.crop(box, self.calls)
        except RecordError:
            raise RecordError(f"the crop {list(media.box)} is too small to be written as {self.calls}") from None

    def moved(self, numbers, of: Convention, to: Convention, size: Callable[[], Size]) -> list[str]:
        try:
            write_numbers(numbers, of)  # refuses what is no coordinate in `of`
            if fault := misread(numbers, of):
                raise ValueError(f"a box or point {fault}")
        except ValueError as error:
            said = "say what the numbers count (`box_coordinates`, `call_coordinates`), then convert"
            raise RecordError(f"{error}: {said}") from None
        known = size() if "pixels" in (of, to) else None
        points = zip(numbers[::2], numbers[1::2])
        return write_numbers([number for point in points for number in convert_point(point, of, to, known)], to)

    def size_of_boxes(self) -> Size:
        whole = [media for media in self.was.images if media.box is None]
        sizes = {self.size(media) for media in whole}
        if self.was.video is not None:
            sizes.add(frame_size(self.was.video, self.folder))
        if len(sizes) == 1:
            return sizes.pop()
        told = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise RecordError(
            f"its pictures have the sizes {told}, and nothing says which of them a box is in: convert to or from "
            "normalised and thousand only"
            if sizes
            else "it has no whole picture, so pixels cannot be converted"
        )

    def size(self, media: Media) -> Size:
        if media.origin not in self.sizes:
            self.sizes[media.origin] = image_size(media, self.folder)
        return self.sizes[media.origin]


def _with_files(record: Record, image_folder: Folder, pictures: str | os.PathLike[str] | None) -> Record:
    """The record with every picture a path from the image folder, as a file needs it."""

    def placed(media: Media) -> Media:
        if media.data is not None and pictures is not None:
            return media.model_copy(update={"data": None, "path": _saved(media, Path(pictures), record)})
        if media.path is None or record.folder is None:
            return media
        path = Path(record.folder) / media.path
        if image_folder is not None:
            found, start = path.resolve(), Path(image_folder).resolve()
            path = found.relative_to(start) if found.is_relative_to(start) else path.absolute()
        return media.model_copy(update={"path": path.as_posix()})

    images = [placed(media) for media in record.images]
    video = None if record.video is None else [placed(media) for media in record.video]
    return record.model_copy(update={"images": images, "video": video, "folder": None})


def _saved(media: Media, folder: Path, record: Record) -> str:
    """Write an encoded picture into `folder` -> its name there, made of its content."""
    facts = inspect_image(media.whole)
    if facts.format is None:
        raise RecordError(f"{record.where}: a picture cannot be saved: {facts.problem}")
    suffix = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}.get(facts.format, facts.format.lower())
    name = f"{facts.digest[:20]}.{suffix}"
    if not (folder / name).exists():
        with written(folder / name) as file:
            file.write(media.data)
    return name
