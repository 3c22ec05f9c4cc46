"""Checks: everything that is wrong with a data file, in one pass.

    report = validate("train.jsonl", "images", against=["test.jsonl"])
    for fault in report:
        print(fault.kind, fault.id, fault.line, fault.message)

Every fault of every record is listed, not only the first; `ovisnb.data.checks.faults.KINDS` names the kinds.
Rows are read as a stream, pictures are looked at once each in a pool of threads, and of a record only
numbers stay in memory, so that a file of a million lines needs some hundred megabytes at most.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ovisnb.data.checks.faults import OfTwo, Report, plain
from ovisnb.data.checks.pictures import Pictures, Seen
from ovisnb.data.checks.record import CONTROL, Checked, Found, Picture, box_faults, check_entry
from ovisnb.data.checks.whole import Ledger, Others, digest
from ovisnb.data.formats import Row, read_entries
from ovisnb.data.formats.info import is_info, read_info
from ovisnb.data.media import Folder, folder_or
from ovisnb.data.record import Record, RecordError

WINDOW = 64  # rows whose pictures are looked at while the next rows are read


def validate(
    path: str | os.PathLike[str],
    image_folder: Folder = None,
    *,
    processor=None,
    max_length: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    max_area: int | None = None,
    against: Iterable[str | os.PathLike[str]] = (),
    format: str | None = None,
    template: str | None = None,
    ignore: Sequence[str] = (),
    progress: bool = False,
    pictures: Pictures | None = None,
) -> Report:
    """Check a data file and its pictures.

    With an Ovis2_5Processor each sample is also encoded, from its pictures' sizes alone, and held
    against `max_length` tokens at these limits of pixels and frames. `max_area` is the most pixels a
    picture may have (None: what Pillow opens safely). `against` are files of other splits whose
    pictures must not be in this one; a key "split" of the records is held against itself.
    `ignore` names kinds of `KINDS` that are not wanted. `progress` shows a bar on stderr. `pictures`, made
    with the same folder and `max_area`, remembers files from one check to the next.

    Raises RecordError for a file that is missing or empty, here or in `against`, and for an
    `image_folder` that is none; ValueError for options that do not fit together.
    """
    if max_length is not None and processor is None:
        raise ValueError("max_length counts tokens, and those depend on the model: give its processor too")
    if processor is not None:
        processor.image_processor.limits(min_pixels, max_pixels)
    _check_folder(image_folder)
    report = Report(os.fspath(path), tuple(ignore))
    sources = _sources(Path(path), image_folder, format, template)
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels, "min_frames": min_frames, "max_frames": max_frames}
    against = list(against)
    looking = nullcontext(pictures) if pictures else Pictures(image_folder, max_area=max_area, contents=bool(against))
    with looking as looker, _bar(progress, Path(path).name) as bar:
        others = [(os.fspath(other), Others(contents(other, looker, format))) for other in against]
        looker.recount()  # those of the other files are not of this one
        for source in sources:
            checker = _Checker(report, looker, others, source, control_pattern(processor))
            if processor is not None:
                checker.encode = _encoder(processor, source.folder, max_length, limits)
            for row in source.rows():
                checker.take(row)
                bar.update()
            checker.finish()
        report.pictures = looker.count
    return report


class _Source(NamedTuple):
    """A data file and how it is read; a data-info file names several."""

    path: Path
    folder: Folder
    format: str | None
    template: str | None
    own: str | None = None
    """`folder`, where it is not that of the whole check."""

    def rows(self) -> Iterator[Row]:
        return read_entries(self.path, image_folder=self.folder, format=self.format, template=self.template)


def _sources(path: Path, image_folder: Folder, format: str | None, template: str | None) -> list[_Source]:
    """The files to check. Sets of a data-info file are checked each by itself and once, whatever their weight."""
    if format is not None or not is_info(path):
        sources = [_Source(path, image_folder, format, template)]
    else:
        sources = []
        for one in read_info(path):
            folder = folder_or(one.folder, image_folder)
            _check_folder(folder)
            sources.append(_Source(one.path, folder, one.format, one.template or template, one.folder))
    for source in sources:
        next(source.rows(), None)  # a RecordError about a file as a whole comes before any work
    return sources


def _check_folder(folder: Folder) -> None:
    if folder is not None and not Path(folder).is_dir():
        raise RecordError(f"the image folder {os.fspath(folder)} is not a folder: give the folder of the pictures")


class _Checker:
    """Takes rows one after another; what a row waits for (its pictures) is fetched `WINDOW` rows later."""

    encode: Callable[[Record], tuple[str, str] | None] | None = None

    def __init__(
        self, report: Report, pictures: Pictures, others: list[tuple[str, Others]], source: _Source, control: str
    ) -> None:
        self.report, self.pictures, self.others, self.control = report, pictures, others, control
        self.path, self.folder = source.path, source.own
        self.ledger = Ledger()
        self.splits: dict[int, tuple[str, int]] = {}  # number of a picture -> the split it is in, and the line
        self.index = 0
        self.waiting: deque[tuple[Row, Checked | None, list[tuple[Picture, Future[Seen]]]]] = deque()

    def take(self, row: Row) -> None:
        self.report.rows += 1
        checked, looks = None, []
        if row.error is None:
            source = f"{self.path}:{row.line}"
            checked = check_entry(row.entry, source=source, index=self.index, control=self.control)
            looks = [(one, self.pictures.look(one.media, one.folder or self.folder)) for one in checked.pictures]
        self.index += 1  # rows that cannot be read count, as they do where a file is read or fixed
        self.waiting.append((row, checked, looks))
        if len(self.waiting) > WINDOW:
            self._check(*self.waiting.popleft())

    def finish(self) -> None:
        """Check what still waits, and then what only the whole set shows."""
        while self.waiting:
            self._check(*self.waiting.popleft())
        for fault in self.ledger.faults():
            self._add(*fault)

    def _add(self, kind: str, name: str | None, line: int, message: str | OfTwo) -> None:
        self.report.add(kind, name, line, message, os.fspath(self.path))

    def _check(self, row: Row, checked: Checked | None, looks: list[tuple[Picture, Future[Seen]]]) -> None:
        report, before = self.report, len(self.report)
        if checked is None:
            self._add(row.error.kind, row.error.record_id, row.line, row.error.message)
            report.faulty += len(report) > before
            return
        report.records += 1
        for said in checked.remarks:
            report.remark(checked.name, row.line, said, os.fspath(self.path))
        seen = [(picture, look.result()) for picture, look in looks]
        for found in faults_of(checked, seen):
            self._add(found.kind, checked.name, row.line, found.message)
        if checked.name is not None:
            self._check_beside(row, checked, seen)
        report.faulty += len(report) > before

    def _check_beside(self, row: Row, checked: Checked, seen: list[tuple[Picture, Seen]]) -> None:
        """What a record shares with others, also if it cannot be read; and what becomes of one that can."""
        try:
            number = digest(row.entry)
        except (ValueError, RecursionError, TypeError) as error:
            if checked.record is None:  # its own faults say why
                return
            if isinstance(error, UnicodeEncodeError):
                said = "a text beside its turns holds half a character (a lone surrogate): write it as UTF-8"
                self._add("not_utf8", checked.name, row.line, said)
            else:
                said = "holds what JSON has not, such as NaN or Infinity: repair or drop it"
                self._add("broken_json", checked.name, row.line, said)
            return
        self.ledger.add(row.line, checked.name, number, checked.answer)
        self._check_leaks(row, checked, seen, number)
        if self.encode is None or checked.record is None or any(one.size is None for _, one in seen):
            return
        if any(turn.role == "gpt" for turn in checked.record.turns):  # a record without one has that fault
            problem = self.encode(checked.record)
            if problem:
                self._add(problem[0], checked.name, row.line, problem[1])

    def _check_leaks(self, row: Row, checked: Checked, seen: list[tuple[Picture, Seen]], number: int) -> None:
        named = [(picture.name, value) for picture, one in seen for value in (one.file, one.content)]
        split = row.entry.get("split")
        told = set()
        for name, value in [*named, ("the whole record", number)] if self.others else named:
            if value is None or name in told or (told and name == "the whole record"):
                continue
            for file, others in self.others:
                if (line := others.line(value)) is not None:
                    told.add(name)
                    said = f"{name} is also in {file}, line {line}: keep it in one split"
                    self._add("split_leak", checked.name, row.line, said)
            if isinstance(split, str):
                other, line = self.splits.setdefault(value, (split, row.line))
                if other != split:
                    told.add(name)
                    said = OfTwo(
                        f"{name} is in the split {split!r} here and in {other!r} in line ", line, ": keep it in one"
                    )
                    self._add("split_leak", checked.name, row.line, said)


def contents(path: str | os.PathLike[str], pictures: Pictures, format: str | None = None) -> Iterator[tuple[int, int]]:
    """(number, line) of every picture of a data file, by its place and by its bytes, and of every record."""
    waiting: deque[tuple[int, list[Future[Seen]]]] = deque()

    def numbers() -> Iterator[tuple[int, int]]:
        line, looks = waiting.popleft()
        for look in looks:
            seen = look.result()
            yield from ((number, line) for number in (seen.file, seen.content) if number is not None)

    for index, row in enumerate(read_entries(path, image_folder=pictures.image_folder, format=format)):
        if row.error is not None:
            continue
        checked = check_entry(row.entry, source=f"{path}:{row.line}", index=index)
        try:
            yield digest(row.entry), row.line
        except (AttributeError, TypeError, ValueError, RecursionError):
            pass  # no record that JSON can hold: it is in no other file either
        waiting.append((row.line, [pictures.look(one.media, one.folder) for one in checked.pictures]))
        if len(waiting) > WINDOW:
            yield from numbers()
    while waiting:
        yield from numbers()


def control_pattern(processor=None) -> str:
    """A pattern of what is written like a control token: of any model, and all of this processor's own."""
    if processor is None:
        return CONTROL
    tokenizer = processor.tokenizer
    own = {*tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens(list(processor.visual_ids.all))}
    own -= {"<image>", "<video>"}  # placeholders: what they stand for is written by the encoder
    return "|".join([*sorted(map(re.escape, filter(None, own)), key=len, reverse=True), CONTROL])


def faults_of(checked: Checked, seen: list[tuple[Picture, Seen]]) -> Iterator[Found]:
    """What is wrong with an entry by itself: its text, its pictures, and places in those."""
    return chain(checked.faults, _picture_faults(seen), _place_faults(checked, seen))


def _picture_faults(seen: list[tuple[Picture, Seen]]) -> Iterator:
    """What the files are, and boxes of entries that reach out of their pictures; each file's faults once a record."""
    said = set()
    for picture, one in seen:
        for found in one.faults:
            if found not in said:
                said.add(found)
                yield found._replace(message=f"{picture.name}: {found.message}")
        if picture.media.box is not None and one.size is not None:
            for found in box_faults(picture.media.box, picture.media.coordinates, [one.size], "coordinates"):
                if found.kind in ("box_outside", "unreadable_box"):
                    yield found._replace(message=f"{picture.name}: its box {found.message}")


def _place_faults(checked: Checked, seen: list[tuple[Picture, Seen]]) -> Iterator:
    """Boxes and points of the text that lie in none of the record's pictures; not told while one has no size."""
    unknown = any(one.size is None for _, one in seen)
    sizes = [] if unknown else list(dict.fromkeys(one.size for picture, one in seen if picture.media.box is None))
    for place in checked.places:
        for found in box_faults(place.numbers, place.convention, sizes, place.key):
            if found.kind == "box_outside":
                yield found._replace(message=f"{place.name} {found.message}")


def _encoder(
    processor, image_folder: Folder, max_length: int | None, limits: dict[str, Any]
) -> Callable[[Record], tuple[str, str] | None]:
    """A function that says why a record makes no sample within the limit: (kind, message), or None."""
    from ovisnb.chat.encode import encode  # only here: it imports torch

    def problem(record: Record) -> tuple[str, str] | None:
        try:
            tokens = len(encode(record, processor, image_folder=image_folder, pixels=False, **limits).input_ids)
        except RecordError as error:
            return "not_encodable", error.message
        if max_length is None or tokens <= max_length:
            return None
        remedy = "shorten it or lower max_pixels" if record.images or record.video else "shorten it"
        return "too_long", f"takes {tokens:,} tokens, and the limit is {max_length:,}: {remedy}"

    return problem


def _bar(wanted: bool, name: str):
    """A progress bar of rows on stderr, and none where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(desc=plain(name, 40), unit=" rows", disable=None if wanted else True)
