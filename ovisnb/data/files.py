"""Files that appear whole or not at all.

with written("out.json") as file: file.write(b"...")
write_rows(rows, "half.jsonl")
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ovisnb.data.record import RecordError

LINES_SUFFIXES = (".jsonl", ".ndjson")
"""Endings of JSON lines."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE)  # what only writing comes to


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write that appears at `path` when the with block ends, and not if it raises.

    A link stays a link, and its file appears. A pipe or a device is written into as it is. Raises OSError that names
    `path` for what cannot be written.
    """
    path = Path(path)
    if _is_stream(path):
        with naming(path), path.open("wb") as file:
            yield file
        return
    real = Path(os.path.realpath(path))
    real.parent.mkdir(parents=True, exist_ok=True)
    unfinished = real.with_name(f".{real.name}.{os.getpid()}.tmp")  # the same folder: replace() cannot cross disks
    with naming(path, unfinished):
        try:
            with unfinished.open("wb") as file:
                yield file
            os.replace(unfinished, real)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, unfinished: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Where `path` is written, under names that begin with `unfinished` at first: an OSError about those names `path`.

    So does one of a full disk, which names nothing. Others are of files that are read meanwhile.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            ours = error.errno in _FULL
        else:
            ours = unfinished is not None and str(error.filename).startswith(os.fspath(unfinished))
        if not ours:
            raise
        raise OSError(
            error.errno, f"cannot be written ({os.strerror(error.errno)}): write elsewhere", str(path)
        ) from None


def _is_stream(path: Path) -> bool:
    """Whether a path leads to what is no file but can be written into: a pipe, a device. OSError for a folder."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, where a file shall be written: write elsewhere", str(path))
    return not stat.S_ISREG(mode)


def wants_lines(path: str | os.PathLike[str]) -> bool:
    """Whether a data file's name asks for JSON lines rather than a JSON list; RecordError for neither."""
    suffix = Path(path).suffix
    if suffix not in (*LINES_SUFFIXES, ".json"):
        raise RecordError(f"cannot tell the format of {os.fspath(path)}: end its name in .json or .jsonl")
    return suffix != ".json"


def write_json(value: Any, path: str | os.PathLike[str]) -> None:
    """Write one JSON value, indented."""
    with written(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace") + b"\n")


def write_rows(rows: Iterable[Any], path: str | os.PathLike[str]) -> None:
    """Write JSON values as a JSON list (`.json`) or JSON lines (`.jsonl`), one a line either way.

    Raises RecordError for another suffix and for what JSON in UTF-8 cannot hold (NaN, half a character).
    """
    with written_rows(path, wants_lines(path)) as write:
        for row in rows:
            try:
                write(to_json(row))
            except (TypeError, ValueError, RecursionError) as error:
                raise RecordError(f"a row of {os.fspath(path)} cannot be written as JSON ({error})") from None


@contextmanager
def written_rows(path: str | os.PathLike[str], lines: bool) -> Iterator[Callable[[bytes], None]]:
    """A function that writes the JSON of one row to `path`, which appears whole or not at all.

    `lines`: JSON lines, otherwise a JSON list, one row a line either way.
    """
    with written(path) as file:
        between = b"" if lines else b"[\n"

        def write(row: bytes) -> None:
            nonlocal between
            file.write(between + row)
            between = b"\n" if lines else b",\n"

        yield write
        file.write(between if lines else b"\n]\n" if between == b",\n" else b"[]\n")


def to_json(value: Any, strict: bool = True) -> bytes:
    """One JSON value in UTF-8, on one line.

    TypeError, ValueError or RecursionError for what that cannot hold; without `strict`, NaN and half a character
    are written as Python reads them back.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=not strict).encode("utf-8")
    except UnicodeEncodeError:
        if strict:
            raise
        return json.dumps(value).encode("ascii")
