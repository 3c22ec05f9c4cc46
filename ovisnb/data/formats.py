"""Data files -> records, and back.

    for record in read_records("train.jsonl"): ...
    write_records(records, "half.json")

Told apart by what is in the file, not by its name:

- JSON lines: one record a line. Read as a stream: memory stays that of one line.
- a JSON list of records, and the wrapped form `{"conversations": [record, ...]}`. The text is held,
  the records are parsed one at a time as they are asked for.
- one record alone.

UTF-8, with or without a byte order mark; blank lines are skipped. Every record knows its line
("train.json:12"), and so does every error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ovisnb.data.record import FIELDS, Record, RecordError

_LINES_SUFFIXES = (".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"
_decode = json.JSONDecoder().raw_decode
_space = re.compile(r"[ \t\n\r]*").match


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a data file, in order, each checked as it is reached.

    Raises RecordError, one sentence with file and line, for a missing or empty file, text that is
    not UTF-8, broken JSON and a record that is not sound; records before it have been given out.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"there is no data file at {path}: give the path of a .json or .jsonl file")
    return _records(path)


def write_records(records: Iterable[Record], path: str | os.PathLike[str]) -> Path:
    """Write a JSON list (`.json`) or JSON lines (`.jsonl`, `.ndjson`), one record a line either way.

    The file appears whole or not at all, so `records` may be read from the very file that is
    replaced. Raises RecordError for another suffix and for a record that JSON cannot hold (a PIL
    image, say). Returns the path.
    """
    path = Path(path)
    lines = path.suffix in _LINES_SUFFIXES
    if not lines and path.suffix != ".json":
        raise RecordError(f"cannot tell the format of {path}: end its name in .json or .jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # the same folder: replace() cannot cross disks
    try:
        with unfinished.open("wb") as file:
            between = b"" if lines else b"[\n"
            for record in records:
                file.write(between + _to_json(record))
                between = b"\n" if lines else b",\n"
            file.write(between if lines else b"\n]\n" if between == b",\n" else b"[]\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _to_json(record: Record) -> bytes:
    try:
        return json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise RecordError(
            f"record {record.id!r} ({record.source or 'made in memory'}) cannot be written as JSON ({error}): "
            "save pictures as files, and keep `meta` to numbers, text, lists and dicts"
        ) from None


def _records(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        entries = _line_entries(file, path) if _is_lines(file, path) else _document_entries(file, path)
        for index, (line, entry) in enumerate(entries):
            yield Record.from_dict(entry, source=f"{path}:{line}", index=index)


def _is_lines(file: BinaryIO, path: Path) -> bool:
    """Whether the first line that is not blank holds a whole object; leaves `file` at its start."""
    first = next((line for line in file if line.removeprefix(_BOM).strip()), b"")
    file.seek(0)
    first = first.removeprefix(_BOM).strip()
    if first.startswith(b"["):
        return False  # not parsed: a list written on one line can be the whole of a large file
    if path.suffix in _LINES_SUFFIXES:
        return True
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _line_entries(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _broken(path, number, error) from None
        conversations = entry.get("conversations") if isinstance(entry, dict) else None
        if isinstance(conversations, list) and conversations and _is_record(conversations[0]):
            yield from ((number, record) for record in conversations)  # the wrapped form, on one line
        else:
            yield number, entry


def _document_entries(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    data = file.read().removeprefix(_BOM)
    if not data.strip():
        raise RecordError(f"{path} is empty: a data file holds at least one record")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _broken(path, data.count(b"\n", 0, error.start) + 1, error) from None
    del data  # a data file can be large, and this would be its second copy
    line, counted = 1, 0
    try:
        for start, entry in _parse(text):
            line, counted = line + text.count("\n", counted, start), start
            yield line, entry
    except json.JSONDecodeError as error:
        raise _broken(path, error.lineno, error) from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, line, error) from None


def _parse(text: str) -> Iterator[tuple[int, Any]]:
    """(where it starts, entry) for each entry of a document: a list, the wrapped form or one record."""
    start = _skip(text, 0)
    if text.startswith("[", start):
        end = yield from _parse_list(text, start)
    elif text.startswith("{", start):
        end = yield from _parse_object(text, start)
    else:
        raise json.JSONDecodeError("Expecting a list or an object", text, start)
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _parse_list(text: str, start: int) -> Generator[tuple[int, Any], None, int]:
    position = _skip(text, start + 1)
    if text.startswith("]", position):
        return _skip(text, position + 1)
    while True:
        entry, end = _decode(text, position)
        yield position, entry
        end = _skip(text, end)
        if text.startswith("]", end):
            return _skip(text, end + 1)
        position = _expect(",", text, end)


def _parse_object(text: str, start: int) -> Generator[tuple[int, Any], None, int]:
    """The entries under "conversations" if they are records, else the object itself as the entry."""
    wrapper = False
    position = _skip(text, start + 1)
    while text.startswith('"', position):
        key, position = _decode(text, position)
        position = _expect(":", text, _skip(text, position))
        if key == "conversations" and _holds_records(text, position):
            wrapper = True
            position = yield from _parse_list(text, position)
        else:  # what a wrapper holds beside its records is passed over, but it must be whole
            position = _skip(text, _decode(text, position)[1])
        if not text.startswith(",", position):
            break
        position = _expect(",", text, position)
    if wrapper:
        return _expect("}", text, position)
    entry, end = _decode(text, start)
    yield start, entry
    return _skip(text, end)


def _holds_records(text: str, start: int) -> bool:
    """Whether the value at `start` is a list of records; only its first entry is read."""
    first = _skip(text, start + 1)
    return text.startswith("[", start) and text.startswith("{", first) and _is_record(_decode(text, first)[0])


def _is_record(entry: Any) -> bool:
    """Whether an entry under "conversations" is a record rather than a turn of one."""
    return isinstance(entry, dict) and "from" not in entry and not entry.keys().isdisjoint(FIELDS)


def _skip(text: str, position: int) -> int:
    """The position of the next character that is not white space."""
    return _space(text, position).end()


def _expect(character: str, text: str, position: int) -> int:
    """The position after `character` and white space; JSONDecodeError if something else stands there."""
    if not text.startswith(character, position):
        raise json.JSONDecodeError(f"Expecting '{character}'", text, position)
    return _skip(text, position + 1)


def _broken(path: Path, line: int, error: Exception) -> RecordError:
    if isinstance(error, json.JSONDecodeError):
        return RecordError(
            f"{path}:{line}: broken JSON at column {error.colno} ({error.msg}): repair or drop this line"
        )
    if isinstance(error, UnicodeDecodeError):
        return RecordError(f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}): save the file as UTF-8")
    if isinstance(error, RecursionError):
        return RecordError(f"{path}:{line}: JSON nested too deeply to read: flatten this record")
    return RecordError(f"{path}:{line}: JSON that cannot be read ({error}): repair or drop this line")
