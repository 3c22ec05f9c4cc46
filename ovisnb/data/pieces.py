"""Data files in pieces: small parts that are read on their own, each with all of its records and no other's.

    files = [File("train-*.jsonl", ...)]; pieces = cut(files)
    for place, row in read_piece(files[piece.file], piece, Random(0)): ...

A piece is a range of bytes of JSON lines (the lines that start in it), a row group of a parquet file, or samples of
a tar (`ovisnb.data.tar`). Small data are cut down to single records, so that many processes have something each; large
data into pieces of at most `LARGEST` bytes, or whole row groups if there are several. A piece is read at once, and its
records come in random order. Row groups and tars may be larger than memory: of these a few rows, or the captions, are
read at once.

A place is where a record stands in its file: "@812333" for the line that starts at that byte, because counting lines
means reading all that is before them (`with_line` does that, for an error), "17" for a row, the key of a sample.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from ovisnb.data import tar
from ovisnb.data.formats import Options, Row, entries_of, reader_of
from ovisnb.data.formats.rows import line_rows
from ovisnb.data.media import shown
from ovisnb.data.record import RecordError

LARGEST = 8 << 20
"""Bytes of a piece of JSON lines."""
PIECES = 1024
"""How many pieces are made, if the data are large enough for it but not so large that they would be above `LARGEST`."""
SMALL = 64 << 20
"""Bytes of a file that is looked through to cut it well."""
FEWEST = 16
"""Pieces of large parquet files and tars, where these have fewer: processes without one would all read the same."""
_TAR_PIECE = 256 << 20  # larger, because every piece looks through all the headers of its tar
_BLOCK = 1 << 20


@dataclass(frozen=True)
class File:
    """A data file, and how it is read."""

    path: Path
    kind: str
    """"lines", "parquet" or "tar"."""
    options: Options
    format: str | None = None
    folder: str | None = None
    """The image folder of its own (`Record.folder`), which is that of `options` too."""


class Piece(NamedTuple):
    """A part of a file."""

    file: int
    """Number of the file."""
    start: int
    """The first byte of the lines, or the row group."""
    end: int
    """The byte after the lines."""
    part: int = 0
    """This is the part with this number ..."""
    parts: int = 1
    """... of so many, in rows or samples: of the row group, or of the whole tar."""


class Example(NamedTuple):
    """An entry in the record form, or an error, and where it was found."""

    place: str
    index: str
    """What names a record without an id: "812333", and "812333.1" for the second record of that row."""
    row: Row
    pictures: dict[str, tar.Stored] | None = None
    """Where the pictures of a sample lie, which are not read yet, by the names that stand for them in the entry."""


def files_of(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files that paths or patterns name, in order; RecordError for a pattern that names none."""
    files = []
    for text in map(os.fspath, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        folder = next(filter(os.path.isdir, Path(text).parents), Path())  # it is there: its name is no pattern
        names = str(Path(text).relative_to(folder))
        pattern = glob.has_magic(names) and not os.path.exists(text)
        named = glob.glob(os.path.join(glob.escape(str(folder)), names), recursive=True) if pattern else [text]
        found = sorted(filter(os.path.isfile, named)) if pattern else named
        if not found:
            raise RecordError(f"no file has a name like {text}: correct the pattern")
        files += map(Path, found)
    return files


def cut(files: Sequence[File]) -> list[Piece]:
    """The pieces of all files, in order; every record is in exactly one."""
    total = sum(file.path.stat().st_size for file in files)
    step = min(max(total // PIECES, 1), LARGEST)
    pieces: list[Piece] = []
    for number, file in enumerate(files):
        pieces += _CUT[file.kind](number, file, step)
    # those cut without a look at their rows; lines are cut by bytes, finely enough
    large = {at for at, file in enumerate(files) if file.kind != "lines" and file.path.stat().st_size > SMALL}
    times = max(FEWEST // max(len(pieces), 1), 1)
    return [part for piece in pieces for part in _parts(piece, times if piece.file in large else 1)]


def read_piece(file: File, piece: Piece, chance: Random) -> Iterator[Example]:
    """The entries of a piece, in an order drawn from `chance`; broken ones as a `Row` with an error."""
    reader = None if file.format is None else reader_of(file.format)
    return _READ[file.kind](file, piece, chance, reader)


def with_line(source: str) -> str:
    """A source with the line in place of the byte, "train.jsonl:@812333" -> "train.jsonl:4711".

    Reads the file up to there. Other sources stay as they are.
    """
    match = re.fullmatch(r"(.*):@(\d+)", source, re.DOTALL)
    if match is None:
        return source
    path, left, lines = match[1], int(match[2]), 1
    try:
        with open(path, "rb") as file:
            while left and (block := file.read(min(left, _BLOCK))):
                lines, left = lines + block.count(b"\n"), left - len(block)
    except OSError:
        return source  # the byte is still right
    return f"{path}:{lines}"


def _parts(piece: Piece, times: int) -> list[Piece]:
    """The piece in so many parts."""
    numbers = range(piece.part * times, (piece.part + 1) * times)
    return [piece._replace(part=number, parts=piece.parts * times) for number in numbers]


def _cut_lines(number: int, file: File, step: int) -> Iterator[Piece]:
    size = file.path.stat().st_size
    marks = list(range(0, size, step))
    if len(marks) > 1 and size <= SMALL:
        marks = list(_starts(file.path, step))
    for start, end in itertools.pairwise([*marks, size]):
        yield Piece(number, start, end)


def _starts(path: Path, step: int) -> Iterator[int]:
    """The first line that starts at or after each multiple of `step`, each once: no piece without a line."""
    start, wanted = 0, 0
    with open(path, "rb") as file:
        for line in file:
            if start >= wanted:
                yield start
                wanted = (start // step + 1) * step
            start += len(line)


def _read_lines(file: File, piece: Piece, chance: Random, reader: Any) -> Iterator[Example]:
    start = piece.start
    with open(file.path, "rb") as data:
        if start:
            data.seek(start - 1)
            start += len(data.readline()) - 1  # a line that starts before the piece is another's
        if start >= piece.end:
            return
        block = data.read(piece.end - start)
        if not block.endswith(b"\n"):
            block += data.readline()
    lines = block.split(b"\n")
    starts = list(itertools.accumulate((len(line) + 1 for line in lines), initial=start))
    rows = list(_counted(entries_of(line_rows(lines), reader, file.options)))
    chance.shuffle(rows)
    for number, row in rows:
        byte = starts[row.line - 1]
        yield Example(f"@{byte}", f"{byte}{number}", row)


def _cut_parquet(number: int, file: File, step: int) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file.path)
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RecordError(f"{file.path} is no parquet file that can be read ({error}): write it anew") from None
    small = file.path.stat().st_size <= SMALL
    # every part of a row group decodes the group up to its end, so a large one stays whole, if there are FEWEST
    most = max(64 // max(len(rows), 1), 1) if small else 1
    for group, count in enumerate(rows):
        parts = min(count, most)
        for part in range(parts):
            yield Piece(number, group, sum(rows[:group]), part, parts)


def _read_parquet(file: File, piece: Piece, chance: Random, reader: Any) -> Iterator[Example]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ovisnb.data.formats.parquet import batch_rows, rows_at_once

    before = piece.end  # rows of the groups before this one
    try:
        with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 16) as table:
            group = table.metadata.row_group(piece.start)
            first, last = (group.num_rows * part // piece.parts for part in (piece.part, piece.part + 1))
            at = 0
            batches = table.iter_batches(rows_at_once(group), row_groups=[piece.start], use_threads=False)
            while at < last and (batch := next(batches, None)) is not None:
                start, stop = max(first - at, 0), min(last - at, batch.num_rows)
                found = batch_rows(batch.slice(start, max(stop - start, 0)))
                rows = [Row(before + at + start + place, *row) for place, row in enumerate(found, start=1)]
                at += batch.num_rows
                chance.shuffle(rows)
                for number, row in _counted(entries_of(rows, reader, file.options)):
                    yield Example(str(row.line), f"{row.line - 1}{number}", row)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RecordError(
            f"{file.path}: the table is damaged ({' '.join(str(error).split())}): write it anew"
        ) from None


def _cut_tar(number: int, file: File, step: int) -> Iterator[Piece]:
    size = file.path.stat().st_size
    parts = min(len(tar.samples(file.path)), 64) if size <= SMALL else -(-size // _TAR_PIECE)
    for part in range(parts):
        yield Piece(number, 0, size, part, parts)


def _read_tar(file: File, piece: Piece, chance: Random, reader: Any) -> Iterator[Example]:
    samples = tar.samples(file.path)
    first, last = (len(samples) * part // piece.parts for part in (piece.part, piece.part + 1))
    numbers = list(range(first, last))
    chance.shuffle(numbers)
    for number in numbers:
        sample = samples[number]
        for place, row in _counted(entries_of([tar.row(file.path, sample, number)], reader, file.options)):
            yield Example(shown(sample.key), f"{number}{place}", row, sample.pictures)


def _counted(entries: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Entries, each after what tells it from the others of its row: "" for the first, then ".1", ".2", ..."""
    for _, some in itertools.groupby(entries, key=lambda row: row.line):
        for number, row in enumerate(some):
            yield f".{number}" if number else "", row


_CUT = {"lines": _cut_lines, "parquet": _cut_parquet, "tar": _cut_tar}
_READ = {"lines": _read_lines, "parquet": _read_parquet, "tar": _read_tar}
