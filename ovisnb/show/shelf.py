"""A shelf: the records of a data file, read so that nothing stops the reading, and what is wrong with them.

    shelf = open_shelf("train.jsonl", 2000, image_folder="images").check(processor, max_length=4096)
    shelf.chosen(kind="find"), shelf.chosen(problem="box_outside")    # positions on the shelf

A file with more rows than are wanted gives an even sample of them; a row that cannot be read is on the shelf
too, as the sentence that says why.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from ovisnb.chat import Encoded, encode
from ovisnb.data.checks import validate
from ovisnb.data.checks.faults import KINDS, Fault
from ovisnb.data.checks.record import check_entry
from ovisnb.data.formats import Row, read_entries
from ovisnb.data.formats.rows import is_lines
from ovisnb.data.media import Folder
from ovisnb.data.record import Record, RecordError
from ovisnb.data.spread import COUNTED, spread
from ovisnb.data.stats import NO_KIND

from .pictures import without

MOST = 10_000  # faults of one kind that are kept

Item = Record | tuple[Fault, ...]
"""What is browsed: a record, or the faults of a row that is none."""


class Shelf:
    """Records at positions 0, 1, ..., and after them the rows that are none.

    `records` may be any sequence, also one that makes its records when they are asked for. `faults` are those
    found so far, `counts` how many there are of each kind, `problems` the positions of what has each kind,
    `read` how much of the file this is ("" for all).
    """

    def __init__(
        self,
        records: Sequence[Record],
        faults: Iterable[Fault] = (),
        *,
        image_folder: Folder = None,
        path: str | os.PathLike[str] | None = None,
        read: str = "",
    ):
        self.records, self.image_folder, self.path, self.read = records, image_folder, path, read
        self._hold(faults)
        self.verdict = f"Pictures not checked: {len(self.faults):,} problems in what was read."

    def __len__(self) -> int:
        return len(self.records) + len(self._broken)

    def __getitem__(self, position: int) -> Item:
        beyond = position - len(self.records)
        return self.records[position] if beyond < 0 else self._broken[beyond]

    @cached_property
    def kinds(self) -> dict[str, Sequence[int]]:
        """Kind -> positions of its records, the most frequent kind first; "(none)" where a record says none."""
        found = defaultdict(list)
        for position, record in enumerate(self.records):
            found[record.kind or NO_KIND].append(position)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def faults_at(self, position: int) -> Sequence[Fault]:
        """What is wrong with the item at `position`."""
        return self._faults_at.get(position, ())

    def chosen(self, kind: str | None = None, problem: str | None = None) -> Sequence[int]:
        """The positions of this kind of record and with this kind of problem; None: of any."""
        if kind is None:
            return range(len(self)) if problem is None else self.problems.get(problem, ())
        if problem is None:
            return self.kinds.get(kind, ())
        with_it = set(self.problems.get(problem, ()))
        return [position for position in self.kinds.get(kind, ()) if position in with_it]

    @property
    def unread(self) -> list[str]:
        """A sentence for each row that is no record."""
        firsts = [faults[0] for faults in self._broken]
        return [(f"line {one.line}: " if one.line is not None else "") + one.message for one in firsts]

    def encode(self, record: Record, processor, **options: Any) -> Encoded | str:
        """A record encoded, or the sentence that says why it cannot be; `options` are those of `ovisnb.encode`.

        What no record is to blame for, such as limits that cross, is still raised.
        """
        try:
            return encode(record, processor, image_folder=self.image_folder, **options)
        except RecordError as error:
            return self.without_folders(str(error))

    def without_folders(self, sentence: str) -> str:
        """`sentence` with the image folder and the data file's folder left out of paths: nobody reads them twice."""
        return without(sentence, self.image_folder, None if self.path is None else Path(self.path).parent)

    def check(self, processor=None, **options: Any) -> Shelf:
        """Look for everything that is wrong, as `ovisnb data validate` does, in a file that was read whole.

        `options` are those of `ovisnb.data.checks.validate`. Returns itself.
        """
        if self.read or self.path is None:
            self.verdict += " A file is checked whole or not at all: `ovisnb data validate` takes any size."
            return self
        report = validate(self.path, self.image_folder, processor=processor, **options)
        self._hold(fault for kind in KINDS if report.counts[kind] for fault in islice(report.of(kind), MOST))
        self.counts = Counter({kind: report.counts[kind] for kind in KINDS if report.counts[kind]})
        self.verdict = self.without_folders(report.headline())
        return self

    def _hold(self, faults: Iterable[Fault]) -> None:
        """Put each fault to its record; those that have none here are items of their own, one for each row."""
        self.faults = list(faults)
        self.counts = Counter(fault.kind for fault in self.faults)
        of_source: dict[str, dict[str, int]] = defaultdict(dict)  # a row of annotations is several records
        of_id: dict[str, int] = {}
        for position, record in enumerate(self.records if self.faults else ()):
            of_source[record.source].setdefault(record.id, position)
            of_id.setdefault(record.id, position)
        found, broken = defaultdict(list), defaultdict(list)
        for fault in self.faults:
            row = of_source.get(f"{fault.file}:{fault.line}", {})
            near = of_id.get(fault.id) if fault.line is None else row.get(fault.id, next(iter(row.values()), None))
            if near is None:
                broken[fault.file, fault.line, fault.id].append(fault)
            else:
                found[near].append(fault)
        self._broken = [tuple(some) for _, some in sorted(broken.items(), key=lambda item: item[0][1] or 0)]
        self._faults_at = found | {len(self.records) + number: some for number, some in enumerate(self._broken)}
        self.problems = {kind: [] for kind in self.counts}
        for position, some in sorted(self._faults_at.items()):
            for kind in {fault.kind for fault in some}:
                self.problems[kind].append(position)


def open_shelf(
    path: str | os.PathLike[str], n: int = 0, *, image_folder: Folder = None, format: str | None = None
) -> Shelf:
    """The shelf of a data file: all of its rows, or an even sample of `n` if it has more (0: always all).

    Raises RecordError for a file that is missing, empty or cannot be read at all.
    """
    path, options = Path(path), {"image_folder": image_folder, "format": format}
    rows = list(islice(read_entries(path, **options), n + 1 if n else None))
    read = ""
    if n and len(rows) > n:
        rows = list(spread(path, n, **options))
        total = _count(path, options)
        read = f"an even sample of {len(rows):,} {f'of {total:,} ' if total else ''}rows"
    records, faults = [], []
    for index, row in enumerate(rows):  # rows that cannot be read count, as they do for `read_entries`
        record, found = _checked(row, path, index, image_folder)
        records += [record] if record is not None else []
        faults += found
    return Shelf(records, faults, image_folder=image_folder, path=path, read=read)


def _checked(row: Row, path: Path, index: int, image_folder: Folder) -> tuple[Record | None, list[Fault]]:
    """The record of a row, if it is one, and what is wrong with it, its pictures not looked at."""
    line = row.line if row.line > 0 else None  # a place in bytes
    if row.problem is not None:
        return None, [Fault(row.error.kind, None, line, row.problem, str(path))]
    source = f"{path}:{row.line}" if line else f"{path}:@{-row.line}"
    checked = check_entry(row.entry, source=source, index=index, image_folder=image_folder)
    if checked.record is not None:  # of a data-info file the row of its member
        source = checked.record.source
    file, _, line = source.rpartition(":")
    line = int(line) if line.isdecimal() else None
    return checked.record, [Fault(found.kind, checked.name, line, found.message, file) for found in checked.faults]


def _count(path: Path, options: dict[str, Any]) -> int | None:
    """The rows of a file; None where counting them would take long."""
    with path.open("rb") as file:
        if not is_lines(file, path):
            return sum(1 for _ in read_entries(path, **options))
        if path.stat().st_size > COUNTED:
            return None
        lines, last = 0, b"\n"
        while block := file.read(1 << 20):
            lines, last = lines + block.count(b"\n"), block
        return lines + (not last.endswith(b"\n"))
