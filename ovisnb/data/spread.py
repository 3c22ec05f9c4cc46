"""A fair sample of a file of any size: rows evenly spread over it, in its order.

    for line, entry, problem in spread("train.jsonl", 200): ...

The first records of a file are seldom like the others. Of JSON lines only the sampled lines are parsed: the
others are counted, as bytes, and of files above `COUNTED` bytes not even looked at. Of other files every
row is read, but only the sampled ones are kept. Memory is that of the sample (and a JSON list's text).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ovisnb.data.formats import Options, Row, entries_of, read_entries, reader_of
from ovisnb.data.formats.rows import kind_of, line_rows

COUNTED = 4 << 30
"""Bytes of a file whose lines are counted (under a second a gigabyte, if the disk is as fast)."""
_BLOCK = 1 << 20


def spread(
    path: str | os.PathLike[str],
    n: int,
    *,
    image_folder: str | os.PathLike[str] | None = None,
    format: str | None = None,
    template: str | None = None,
) -> Iterator[Row]:
    """At most `n` rows of a data file, evenly spread over it, as `read_entries` gives them: all if there are no more.

    Of a row that holds several records one is taken. In JSON lines above `COUNTED` bytes the places are even in bytes
    rather than rows, and `line` is 0 or less: minus the byte that the line starts at. The arguments and the errors
    are those of `read_entries`.
    """
    path, reader = Path(path), None if format is None else reader_of(format)
    options = Options(path, image_folder, template)
    kind = kind_of(path)  # refuses a file that is missing
    if n < 1:
        return
    if kind != "lines":
        yield from _every(read_entries(path, image_folder=image_folder, format=format, template=template), n)
        return
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        places = _counted(file, n) if size <= COUNTED else _seeking(file, n, size)
        for number, (place, line) in enumerate(places):
            entries = list(entries_of(line_rows([line]), reader, options))
            if entries:
                yield entries[number % len(entries)]._replace(line=place)


def _counted(file: BinaryIO, n: int) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of `n` lines; the file is read once to count, and again where a line is wanted."""
    counts, last = [], b"\n"
    while block := file.read(_BLOCK):
        counts.append(block.count(b"\n"))
        last = block[-1:]
    lines = sum(counts) + (last != b"\n")
    n = min(n, lines)
    before = number = 0  # lines that end before this block; number of the block
    for wanted in (place * lines // n for place in range(n)):
        while number < len(counts) and before + counts[number] < wanted:
            before, number = before + counts[number], number + 1
        file.seek(number * _BLOCK)
        for _ in range(wanted - before):
            file.readline()
        yield wanted + 1, file.readline()


def _seeking(file: BinaryIO, n: int, size: int) -> Iterator[tuple[int, bytes]]:
    """(minus the byte it starts at, line) of the lines that follow `n` even places."""
    for wanted in (place * size // n for place in range(n)):
        if wanted > file.tell():
            file.seek(wanted - 1)
            file.readline()  # the rest of a line that starts before this place
        start = file.tell()
        if line := file.readline():
            yield -start, line


def _every(rows: Iterable[Row], n: int) -> Iterable[Row]:
    """`n` of the rows, without knowing how many there are: every second, fourth, ... one is kept."""
    step, kept, seen = 1, [], 0
    for seen, row in enumerate(rows, start=1):
        if (seen - 1) % step == 0:
            kept.append(row)
        if len(kept) > 2 * n:
            step, kept = 2 * step, kept[::2]
    places = sorted({place * seen // n // step for place in range(n)}) if seen > n else range(len(kept))
    return (kept[place] for place in places)
