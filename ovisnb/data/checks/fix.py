"""Fix: a cleaned copy of a data file; the file itself is never touched.

    fixed = fix("train.jsonl", image_folder="images")    # writes train_clean.jsonl
    print(fixed.text())

What can be repaired for certain is repaired (`ovisnb.data.checks.repair`; an id that is taken becomes "id-2"),
records that still have a fault are left out, and both are listed by kind and id. The copy is then
checked again, until nothing is found but `LEFT`, which is in the pictures and not in the records.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ovisnb.data.checks import faults_of, validate
from ovisnb.data.checks.faults import Fault, Report, plain
from ovisnb.data.checks.pictures import Pictures, number_of
from ovisnb.data.checks.record import Checked, Found, check_entry
from ovisnb.data.checks.repair import repair
from ovisnb.data.checks.whole import near
from ovisnb.data.files import LINES_SUFFIXES, wants_lines, write_rows
from ovisnb.data.formats import Row, read_entries
from ovisnb.data.formats.info import is_info
from ovisnb.data.media import Folder
from ovisnb.data.record import RecordError

LEFT = ("animated_picture", "turned_picture")
"""Kinds that stay in a cleaned copy: the records are sound, and pictures are not rewritten."""


@dataclass
class Fixed:
    """What `fix` did; `repaired` and `left_out` list it by kind and id, with the lines of the input."""

    path: Path
    """The cleaned copy, which is not written if no record is left."""
    records: int
    """Records in the cleaned copy."""
    repaired: Report
    """Also of records that were left out afterwards; `repaired.faulty` counts those that are in the copy."""
    left_out: Report
    """One line for each reason; `left_out.faulty` counts the records."""
    remaining: Report
    """What checking the copy found last: nothing but kinds of LEFT and ignored ones."""

    def text(self) -> str:
        """For a person; safe to print."""
        out = self.left_out.faulty
        there = ", and what is there stays" if not self.records and self.path.exists() else ""
        written = f"{self.records:,} {'record' if self.records == 1 else 'records'} written"
        lines = [f"{plain(str(self.path))}: {written}, {self.repaired.faulty:,} of them repaired, {out:,} left out"]
        if not self.records:
            lines = [f"{plain(str(self.path))} is not written{there}: no record is left, {out:,} left out"]
        for title, report in (("repaired", self.repaired), ("left out", self.left_out), ("stays", self.remaining)):
            for line in report.listing(sentences=False):
                lines.append(f"  {line}" if line.startswith(" ") else f"  {title}: {line}")
        return "\n".join(lines)


def clean_name(path: str | os.PathLike[str]) -> Path:
    """Where the cleaned copy goes by default: "train_clean.jsonl" beside "train.jsonl"."""
    path = Path(path)
    suffix = path.suffix if path.suffix in (*LINES_SUFFIXES, ".json") else ".jsonl"
    return path.with_name(f"{path.stem}_clean{suffix}")


def fix(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    image_folder: Folder = None,
    *,
    ignore: Iterable[str] = (),
    format: str | None = None,
    template: str | None = None,
    pictures: Pictures | None = None,
    **options: Any,
) -> Fixed:
    """Write a cleaned copy of `path` to `out` (a JSON list or JSON lines, by its name) in the record form.

    `format`, `template`, `pictures` and `options` are those of `validate`; kinds in `ignore` are neither repaired
    nor a reason to leave a record out.
    Nothing is written if no record is left.
    Raises RecordError if `out` is the input itself or one of the files checked `against`, and for a file
    with a sound row that holds its picture, or of several folders: `ovisnb data convert` makes one of those first.
    """
    path, out = Path(path), clean_name(path) if out is None else Path(out)
    wants_lines(out)  # refuses a name that says nothing
    if out.is_symlink():
        raise RecordError(f"the cleaned copy {out} is a link to {os.path.realpath(out)}: give another name")
    for taken in (path, *map(Path, options.get("against", ()))):
        if out.exists() and taken.exists() and out.samefile(taken):
            raise RecordError(f"the cleaned copy {out} would replace {taken}, which is only read: give another name")
    if is_info(path):
        raise RecordError(f"{path} names several data sets: clean their files one by one")
    ignore = tuple(ignore)
    repaired, left_out = Report(os.fspath(path)), Report(os.fspath(path))
    contents = bool(options.get("against"))
    looking = pictures or Pictures(image_folder, max_area=options.get("max_area"), contents=contents)
    with nullcontext(looking) if pictures else looking, tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"{out.stem}.jsonl"
        rows = read_entries(path, image_folder=image_folder, format=format, template=template)
        work = _Work(path, looking, repaired, left_out, ignore)
        write_rows(work.rows(rows), copy)
        remaining = Report(os.fspath(out), ignore)
        while work.lines:
            remaining = validate(copy, image_folder, ignore=ignore, pictures=looking, format="records", **options)
            drop = work.drop((fault for fault in remaining if fault.kind not in LEFT), copy.stem)
            if not drop:
                remaining.file = os.fspath(out)
                break
            write_rows(_entries(copy, drop), copy)  # it appears when all of it is written, so it may be read meanwhile
            remaining = Report(os.fspath(out), ignore)
        if work.lines:
            write_rows(_entries(copy), out)
    repaired.faulty = sum(line.mended for line in work.lines)
    return Fixed(out, len(work.lines), repaired, left_out, remaining)


def _entries(copy: Path, without: Collection[int] = ()) -> Iterator[dict[str, Any]]:
    return (row.entry for row in read_entries(copy, format="records") if row.line not in without)


class _Line(NamedTuple):
    """A line of the copy."""

    source: int
    """The line of the input that it was."""
    mended: bool
    """Whether something in it was repaired."""
    unnamed: int | None
    """The number in the input of a record without id."""


class _Work:
    """Repairs entries one after another, and remembers which line of the input each line of the copy was."""

    def __init__(self, path: Path, pictures: Pictures, repaired: Report, left_out: Report, ignore: tuple[str, ...]):
        self.path, self.pictures, self.ignore = path, pictures, ignore
        self.repaired, self.left_out = repaired, left_out
        self.lines: list[_Line] = []
        self.ids: set[int] = set()
        self.near: set[int] = set()

    def rows(self, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
        """The repaired entries of the rows that can be read."""
        for index, row in enumerate(rows):
            if row.error is not None or not isinstance(row.entry, dict):
                error = row.error or RecordError("a record is an object")
                self._leave_out(error.kind, error.record_id, row.line, error.message)
                continue
            checked = check_entry(row.entry, source=f"{self.path}:{row.line}", index=index)
            if any(picture.media.data is not None for picture in checked.pictures):
                if faults := self._faults(row.entry, checked):
                    self._leave_out(faults[0].kind, checked.name, row.line, faults[0].message)
                    for found in faults[1:]:
                        self.left_out.add(found.kind, checked.name, row.line, found.message)
                    continue
                raise RecordError(
                    f"{self.path}:{row.line}: pictures lie in the rows: write them as files first: "
                    "`ovisnb data convert IN OUT --pictures DIR`"
                )
            entry, done = self._repaired(row.entry, checked)
            done += [found for found in checked.faults if found.message in getattr(row.entry, "notes", ())]
            done += self._own_id(entry)
            try:
                text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
                text.encode("utf-8")
            except (TypeError, ValueError, RecursionError) as error:
                kind = "not_utf8" if isinstance(error, UnicodeEncodeError) else "broken_json"
                self._leave_out(kind, checked.name, row.line, "cannot be written as JSON in UTF-8")
                continue
            for found in done:
                self.repaired.add(found.kind, checked.name, row.line, found.message)
            self.lines.append(_Line(row.line, bool(done), index if entry.get("id") is None else None))
            yield entry

    def _leave_out(self, kind: str, name: str | None, line: int, message: str) -> None:
        self.left_out.add(kind, name, line, message)
        self.left_out.faulty += 1

    def _faults(self, entry: dict, checked: Checked) -> list[Found]:
        """What would still be wrong with an entry once it is repaired, for which it is left out."""
        again = check_entry(self._repaired(entry, checked)[0])
        seen = [(one, self.pictures.look(one.media, one.folder).result()) for one in again.pictures]
        return [found for found in faults_of(again, seen) if found.kind not in (*LEFT, *self.ignore)]

    def drop(self, faults: Iterable[Fault], stem: str) -> set[int]:
        """The lines of the copy, whose name is `stem`, with these faults: they are left out from now on."""
        dropped = set()
        for fault in faults:
            dropped.add(fault.line)
            line, said = self.lines[fault.line - 1], fault.of_two
            name = fault.id if line.unnamed is None else self._name(line)
            if said:
                other, before = self.lines[said.line - 1], said.before
                if other.unnamed is not None:  # it has its name in the copy from the copy
                    before = before.replace(repr(f"{stem}-{said.line - 1}"), repr(self._name(other)))
                said = said._replace(before=before, line=other.source)
            self.left_out.add(fault.kind, name, line.source, said or fault.message)
        self.left_out.faulty += len(dropped)
        self.lines = [line for at, line in enumerate(self.lines, 1) if at not in dropped]
        return dropped

    def _name(self, line: _Line) -> str:
        """What the input calls a record without id."""
        return f"{self.path.stem}-{line.unnamed}"

    def _repaired(self, entry: dict, checked: Checked) -> tuple[dict, list[Found]]:
        looks = [(one, self.pictures.look(one.media, one.folder).result().size) for one in checked.pictures]
        whole = [size for one, size in looks if one.media.box is None]
        crops = {(one.key, one.at): size for one, size in looks if one.media.box is not None}
        return repair(entry, whole if all(size for _, size in looks) else None, self.ignore, crops)

    def _own_id(self, entry: dict) -> list[Found]:
        """Give the entry an id of its own if its id, or one nearly the same, was there before."""
        name = entry.get("id")
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            return []
        own, number = str(name), 2
        kind = "duplicate_id" if number_of(own) in self.ids else "near_duplicate_id"
        while kind not in self.ignore and number_of(near(own)) in self.near:
            own, number = f"{name}-{number}", number + 1
        self.ids.add(number_of(str(name)))
        self.near.add(number_of(near(own)))
        if own == str(name):
            return []
        entry["id"] = own
        taken = "was taken" if kind == "duplicate_id" else "is nearly that of another record"
        return [Found(kind, f"the id {str(name)!r} {taken}: this one became {own!r}")]
