"""The rows of a data file, whatever they hold, and what a reader of a format is.

    for line, entry, error in read_rows("train.jsonl"): ...

Told apart by what is in the file, not by its name:

- JSON lines: one row a line. Read as a stream: memory stays that of one line.
- a JSON list, and the wrapped form `{"conversations": [record, ...]}`. The text is held, the rows
  are parsed one at a time as they are asked for.
- one object alone.
- parquet: one row a row.

JSON is UTF-8, with or without a byte order mark; blank lines are skipped. A broken row becomes a
`Row` with an error and the rows after it follow: the next line of JSON lines, or in a list the next
line that starts an entry where the broken one started.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from ovisnb.data.files import LINES_SUFFIXES
from ovisnb.data.record import FIELDS, Entry, Record, RecordError

_BOM = b"\xef\xbb\xbf"
_BOMS_32, _BOMS_16 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), (b"\xff\xfe", b"\xfe\xff")
_PARQUET = b"PAR1"
_UNPACK = "unpack it, and give the data file in it"
_ARROW = "an Arrow file", "write it as parquet (`to_parquet` of a Hugging Face data set)"
_PICKLE = "a Python pickle", "what is pickled is never loaded here, write JSON lines"
_PICTURE = "a picture", "give the data file that lists it"
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"\x1f\x8b", "compressed with gzip", _UNPACK),
    (b"BZh", "compressed with bzip2", _UNPACK),
    (b"\xfd7zXZ\0", "compressed with xz", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK),
    (b"ARROW1", *_ARROW),
    (b"\xff\xff\xff\xff", *_ARROW),  # a stream of it, as data sets of Hugging Face lie on the disk
    *((bytes([0x80, version]), *_PICKLE) for version in range(2, 6)),
    (b"\x89PNG", *_PICTURE),
    (b"\xff\xd8\xff", *_PICTURE),
)
"""How files begin that are no data files, what they are, and what to do."""
_T = TypeVar("_T")
_decode = json.JSONDecoder().raw_decode
_space = re.compile(r"[ \t\n\r]*").match
_ESCAPED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8


class Row(NamedTuple):
    """One row of a file: `entry` is what it holds, or None if there is an `error`, which lacks file and line."""

    line: int
    entry: Any | None
    error: RecordError | None = None

    @property
    def problem(self) -> str | None:
        """The sentence of `error`."""
        return None if self.error is None else str(self.error)


@dataclass(frozen=True)
class Options:
    """What a reader may need beside its row."""

    path: Path
    """The file being read; paths in the row that are no pictures start in its folder."""
    image_folder: str | os.PathLike[str] | None = None
    template: str | None = None
    """The question that goes with a caption; None for the format's own."""


@dataclass(frozen=True)
class Reader:
    """One format: rows of a file <-> entries of the record form.

    `entries` raises RecordError (one sentence without file and line, which the caller adds) for a row
    that cannot be read; where only one of several entries is broken it may yield the error instead.
    """

    name: str
    keys: str
    """What a row holds, for the sentence about a row that nothing reads: "conversations"."""
    matches: Callable[[Any], bool]
    """Whether a row (any JSON value) is of this format; looks at its keys only."""
    entries: Callable[[Any, Options], Iterator[Entry | dict | RecordError]]
    rows: Callable[[Iterable[Record]], Iterator[dict]] | None = None
    """Records -> rows of this format, if it can be written; RecordError for a record that it cannot hold."""
    choose: Callable[[str], Reader] | None = None
    """The reader with choices, written after its name and a colon ("refcoco:xyxy"); RecordError for an unknown one."""


def read_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """The rows of a data file, in order, broken ones as a `Row` with an error.

    Raises RecordError for a file that is missing or none of ours (at once), empty, or cannot be read at all.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind == "tar":
        raise RecordError(f"{path} is a tar: `ovisnb data convert` writes it as a data file, with --pictures DIR")
    return _rows(path, kind)


def data_file(path: str | os.PathLike[str]) -> Path:
    """The path, if it leads to a file; RecordError, one sentence, if not. A pipe is not opened: it may never end."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecordError(f"{path} is a folder: give the data file in it")
    if path.exists():
        raise RecordError(f"{path} is a pipe or a device, and a data file is read more than once: save it as a file")
    raise RecordError(f"there is no data file at {path}: give the path of a .json, .jsonl, .parquet or .tar file")


def kind_of(path: Path) -> str:
    """What a data file is, told by its contents: "lines", "document" (other JSON), "parquet" or "tar".

    Raises RecordError, one sentence, for what is no data file: a folder, a zip archive, ...
    """
    with data_file(path).open("rb") as file:
        head = file.read(512)
        file.seek(0)
        for start, what, advice in _FOREIGN:
            if head.startswith(start):
                raise RecordError(f"{path} is {what}, by its first bytes: {advice}")
        if head.startswith(_PARQUET):
            return "parquet"
        if head[257:262] == b"ustar" or (path.suffix.lower() == ".tar" and _is_empty_tar(file)):
            return "tar"
        return "lines" if is_lines(file, path) else "document"


def _is_empty_tar(file: BinaryIO) -> bool:
    """Whether there is nothing but the end of a tar."""
    end = file.read(10_241)  # 2 to 20 blocks of 512 bytes, all of them zeros (POSIX pax, "ustar Interchange Format")
    file.seek(0)
    return 1024 <= len(end) <= 10_240 and not any(end)


def some(rows: Iterable[_T], path: Path) -> Iterator[_T]:
    """The rows; RecordError if there are none."""
    rows = iter(rows)
    for row in rows:
        yield row
        yield from rows
        return
    raise RecordError(f"{path} holds no record: a data file holds at least one")


def _rows(path: Path, kind: str) -> Iterator[Row]:
    if kind == "parquet":
        from ovisnb.data.formats.parquet import parquet_rows  # needs pyarrow, which JSON does not

        yield from parquet_rows(path)
        return
    with path.open("rb") as file:
        if (head := file.read(4)) in _BOMS_32 or head.startswith(_BOMS_16):
            said = f"not UTF-8 but UTF-{32 if head in _BOMS_32 else 16}, by its first bytes: save the file as UTF-8"
            yield Row(1, None, RecordError(said, kind="not_utf8"))
            return
        file.seek(0)
        yield from line_rows(file) if kind == "lines" else _document_rows(file, path)


def is_lines(file: BinaryIO, path: Path) -> bool:
    """Whether the first line that is not blank holds a whole object; leaves `file` at its start."""
    first = next((line for line in file if line.removeprefix(_BOM).strip()), b"")
    alone = file.tell() == path.stat().st_size
    file.seek(0)
    first = first.removeprefix(_BOM).strip()
    if first.startswith(b"["):
        return False  # not parsed: a list written on one line can be the whole of a large file
    if path.suffix in LINES_SUFFIXES:
        return True
    if alone:
        return False  # neither is one object
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def line_rows(file: Iterable[bytes]) -> Iterator[Row]:
    """The rows of lines of JSON, counted from 1; blank ones count and are skipped."""
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8").rstrip("\r\n"))  # else a break at the end has column 1
        except (ValueError, RecursionError) as error:
            yield Row(number, None, _broken(error))
            continue
        conversations = entry.get("conversations") if isinstance(entry, dict) else None
        if isinstance(conversations, list) and not _are_turns(conversations) and _are_records(conversations):
            yield from (Row(number, record) for record in conversations)  # the wrapped form, on one line
        else:
            yield Row(number, entry)


def _document_rows(file: BinaryIO, path: Path) -> Iterator[Row]:
    data = file.read().removeprefix(_BOM)
    if not data.strip():
        raise RecordError(f"{path} is empty: a data file holds at least one record")
    text = data.decode("utf-8", errors="surrogateescape")
    del data  # a data file can be large, and this would be its second copy
    line, counted = 1, 0
    for found in _Document(text).rows():
        line, counted = line + text.count("\n", counted, found.start), max(found.start, counted)
        yield Row(line + text.count("\n", found.start, found.place), found.entry, found.error)


class _Found(NamedTuple):
    """An entry of a document, or the error in its stead."""

    start: int
    """The character it starts at."""
    place: int
    """The character that its line is told by: `start`, or where the error is."""
    entry: Any | None
    error: RecordError | None = None


class _Document:
    """A list, the wrapped form or one object, parsed one entry at a time."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.escaped = None if text.isascii() else _ESCAPED.search(text)

    def rows(self) -> Iterator[_Found]:
        text, end = self.text, None
        try:
            start = _skip(text, 0)
            if text.startswith("[", start):
                end = yield from self.list(start)
            elif text.startswith("{", start):
                end = yield from self.object(start)
            else:
                begins = text[start : start + 20].split("\n")[0]
                said = f"no JSON, for it begins with {begins!r}: write JSON lines, a JSON list or a parquet file"
                yield _Found(start, start, None, RecordError(said, kind="broken_json"))
                return
            if end is not None and end != len(text):
                raise json.JSONDecodeError("Extra data", text, end)
        except (ValueError, RecursionError) as error:
            position = error.pos if isinstance(error, json.JSONDecodeError) else 0
            yield _Found(position, position, None, _broken(error))

    def list(self, start: int) -> Generator[_Found, None, int | None]:
        """The entries of the list at `start`; returns its end, or None if that was not found.

        Once an entry is broken, each is read from the piece of text up to the next start: what an
        unclosed bracket swallows must not be read again for every entry.
        """
        text = self.text
        position = _skip(text, start + 1)
        if text.startswith("]", position):
            return _skip(text, position + 1)
        next_start = _starts(text, position)
        piece, first, last = text, 0, len(text)
        whole = True
        while position is not None:
            if position >= last and not whole:
                first, last = position, next_start(position) or len(text)
                piece = text[first:last]
            try:
                entry, end = _decode(piece, position - first)
                end += first
            except (ValueError, RecursionError) as error:
                if whole:
                    whole, last = False, position  # once more, in pieces: the problem is then where it begins
                    continue
                following = next_start(position)
                yield self.broken(error, position, first, following)
                position = following
                continue
            yield self.found(position, entry, end)
            end = _skip(text, end)
            if text.startswith("]", end):
                return _skip(text, end + 1)
            if text.startswith(",", end):
                position = _skip(text, end + 1)
                continue
            position = end if text.startswith("{", end) else next_start(end)
            yield self.broken(json.JSONDecodeError("Expecting ',' delimiter", "", end - first), end, first, position)
        return None

    def wraps(self, start: int) -> bool:
        """Whether the list at `start` holds records; broken entries and those that are neither do not tell."""
        return _are_records(found.entry for found in self.list(start))

    def found(self, start: int, entry: Any, end: int | None = None) -> _Found:
        """The entry read from `start` to `end`, unless bytes in there are not UTF-8."""
        bad = self.escaped and _ESCAPED.search(self.text, start, len(self.text) if end is None else end)
        return _Found(start, bad.start(), None, _not_utf8(ord(bad[0]) & 0xFF)) if bad else _Found(start, start, entry)

    def broken(self, error: Exception, start: int, first: int, following: int | None) -> _Found:
        """The error of an entry at `start`, read from a piece that begins at `first`; the next one is at `following`."""
        place, column = start, None
        if isinstance(error, json.JSONDecodeError):
            place = first + error.pos
            column = place - self.text.rfind("\n", 0, place)
        lost = "" if following else "; what follows it in the file was not read"
        return _Found(start, place, None, _broken(error, column, lost))

    def object(self, start: int) -> Generator[_Found, None, int | None]:
        """The entries under "conversations" if they are records, else the object itself as the entry."""
        text, entry, wrapper = self.text, {}, False
        position = _skip(text, start + 1)
        while text.startswith('"', position):
            key, position = _decode(text, position)
            position = _expect(":", text, _skip(text, position))
            if key == "conversations" and text.startswith("[", position) and self.wraps(position):
                wrapper = True
                position = yield from self.list(position)
                if position is None:
                    return None
            else:  # what a wrapper holds beside its records is passed over, but it must be whole
                entry[key], position = _decode(text, position)
                position = _skip(text, position)
            if not text.startswith(",", position):
                break
            position = _expect(",", text, position)
        end = _expect("}", text, position)
        if not wrapper:
            yield self.found(start, entry)
        return end


def _starts(text: str, position: int) -> Callable[[int], int | None]:
    """-> where the next entry starts after a position: on a line of its own, indented as the entry at `position`."""
    indent = text[text.rfind("\n", 0, position) + 1 : position]
    if indent.strip() or not text.startswith("{", position):
        return lambda after: None
    find = re.compile("\n" + re.escape(indent) + r"\{").search

    def next_start(after: int) -> int | None:
        match = find(text, after)
        return match and match.end() - 1

    return next_start


def _are_turns(entries: list) -> bool:
    """Whether both ends of a list are turns, which almost every line of a file answers at once."""
    return bool(entries) and all(isinstance(entry, dict) and "from" in entry for entry in (entries[0], entries[-1]))


def _are_records(entries: Iterable[Any]) -> bool:
    """Whether entries under "conversations" are records rather than turns of one, told by a hundred of them at most."""
    records = turns = 0
    for entry in islice((entry for entry in entries if isinstance(entry, dict)), 100):
        if any(isinstance(entry.get(key), list) for key in ("conversations", "messages", "QnA")):
            return True
        turn = "from" in entry or "role" in entry
        turns, records = turns + turn, records + (not turn and not entry.keys().isdisjoint(FIELDS))
    return records > turns


def _skip(text: str, position: int) -> int:
    """The position of the next character that is not white space."""
    return _space(text, position).end()


def _expect(character: str, text: str, position: int) -> int:
    """The position after `character` and white space; JSONDecodeError if something else stands there."""
    if not text.startswith(character, position):
        raise json.JSONDecodeError(f"Expecting '{character}'", text, position)
    return _skip(text, position + 1)


def _broken(error: Exception, column: int | None = None, lost: str = "") -> RecordError:
    """What decoding or parsing raised, as the error of a row; `column` is counted in the file's own line."""
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(error.object[error.start])
    if isinstance(error, json.JSONDecodeError):
        said = f"broken JSON at column {column or error.colno} ({error.msg}): repair or drop this line"
    elif isinstance(error, RecursionError):
        said = "JSON nested too deeply to read: flatten this record"
    else:
        said = "a number of thousands of digits cannot be read: repair or drop this line"
    return RecordError(said + lost, kind="broken_json")


def _not_utf8(byte: int) -> RecordError:
    return RecordError(f"not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8", kind="not_utf8")
