"""Data files -> records, and back.

    for record in read_records("train.jsonl"): ...
    write_records(records, "half.json")

A file's format is told by its rows, not by its name; each format is a `Reader` in a file of its own:

    records       the project's own: `{"image": ..., "conversations": [{"from", "value"}, ...]}`
    annotations   `{"image_path", "QnA": [{"Q", "A3"}, ...]}`, crops as `{Crop person [x1, y1, x2, y2]}`
    messages      `{"messages": [{"role", "content"}, ...], "images"}`, as in Hugging Face data sets
    coco          detection: images, annotations and categories, into questions for boxes or points
    refcoco       `{"image", "expression", "bbox"}`, likewise; `format="refcoco:xyxy"` says what a bbox is
    captions      `{"image", "caption"}`, with a template for the question
    info          several data sets, each with its own folder, format and weight

How rows lie in a file (JSON lines, a JSON list, parquet) is `ovisnb.data.formats.rows`'s matter, samples of a
WebDataset tar are `ovisnb.data.tar`'s. Every record knows its line ("train.json:12"), and so does every error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ovisnb.data.files import LINES_SUFFIXES, to_json, written_rows
from ovisnb.data.formats.annotations import READER as ANNOTATIONS
from ovisnb.data.formats.captions import READER as CAPTIONS
from ovisnb.data.formats.grounding import COCO, REFCOCO
from ovisnb.data.formats.info import READER as INFO
from ovisnb.data.formats.messages import READER as MESSAGES
from ovisnb.data.formats.records import READER as RECORDS
from ovisnb.data.formats.records import crops_noted
from ovisnb.data.formats.rows import Entry, Options, Reader, Row, kind_of, read_rows, some
from ovisnb.data.record import Record, RecordError

__all__ = ["READERS", "Entry", "Options", "Reader", "Row", "read_entries", "read_records", "read_rows", "write_records"]

READERS: tuple[Reader, ...] = (
    RECORDS,
    ANNOTATIONS,
    MESSAGES,
    COCO,
    REFCOCO,
    CAPTIONS,
    INFO,
)
"""The formats, in the order in which a row is offered to them."""


def read_records(
    path: str | os.PathLike[str],
    *,
    image_folder: str | os.PathLike[str] | None = None,
    format: str | None = None,
    template: str | None = None,
) -> Iterator[Record]:
    """The records of a data file, in order, each checked as it is reached.

    `image_folder` is where the pictures lie: formats that need a picture's size look there, and crops
    that reach outside their picture are then named in `Record.notes`. `format` is the name of one of
    `READERS`, which then reads every row; by default each row's keys tell. `template` is the question
    that goes with captions.

    Raises RecordError, one sentence with file and line, for a file that is missing, no data file or without a
    record, text that is not UTF-8, broken JSON, a row of no known format and a record that is not sound; records before
    it have been given out. To go on after such a row, see `read_entries`.
    """
    options = Options(Path(path), image_folder, template)
    rows = read_entries(path, image_folder=image_folder, format=format, template=template)
    return (record_of(row, index, options) for index, row in enumerate(rows))


def read_entries(
    path: str | os.PathLike[str],
    *,
    image_folder: str | os.PathLike[str] | None = None,
    format: str | None = None,
    template: str | None = None,
) -> Iterator[Row]:
    """As `read_records`, but each entry as a `Row` in the RECORD FORM, before `Record.from_dict` has checked it.

    A row that cannot be read is a `Row` with an error, and those after it follow.
    """
    path, reader = Path(path), None if format is None else reader_of(format)
    options = Options(path, image_folder, template)
    if kind_of(path) == "tar":
        from ovisnb.data.tar import tar_entries  # which leans on this package

        return some(tar_entries(path, reader, options), path)
    return some(entries_of(read_rows(path), reader, options), path)


def record_of(row: Row, index: int, options: Options) -> Record:
    """The record of the row with this index of `read_entries`; RecordError, one sentence with file and line."""
    source = f"{options.path}:{row.line}"
    if row.error is not None:
        raise RecordError(f"{source}: {row.error}", kind=row.error.kind)
    return to_record(row.entry, source=source, index=index, options=options)


def to_record(entry: Mapping[str, Any], *, source: str, index: int, options: Options) -> Record:
    """The record of one entry of `read_entries`, with what its reader noted; RecordError, one sentence."""
    record = Record.from_dict(entry, source=source, index=index)
    return crops_noted(record, record.folder or options.image_folder)


def reader_of(format: str) -> Reader:
    """The reader with this name, which may go on with choices ("refcoco:xyxy"); RecordError if there is none."""
    name, _, choices = format.partition(":")
    for reader in READERS:
        if reader.name == name and (reader.choose or not choices):
            return reader.choose(choices) if choices else reader
    raise RecordError(f"the format {format!r} is unknown: use {_listed(reader.name for reader in READERS)}")


def write_records(records: Iterable[Record], path: str | os.PathLike[str], *, format: str | None = None) -> Path:
    """Write a JSON list (`.json`) or JSON lines (`.jsonl`, `.ndjson`), one row a line either way, or `.parquet`.

    `format` is the name of one of `READERS` that can be written; by default "records". The file appears
    whole or not at all, so `records` may be read from the very file that is replaced. Raises RecordError
    for another suffix or format and for a record that JSON or the format cannot hold (a PIL image, say, which
    parquet can).
    Returns the path.
    """
    path = Path(path)
    reader = reader_of(format or "records")
    if reader.rows is None:
        able = _listed(reader.name for reader in READERS if reader.rows)
        raise RecordError(f"the format {reader.name!r} is only read, not written: use {able}")
    if path.suffix == ".parquet":
        from ovisnb.data.formats.parquet import write_parquet  # needs pyarrow, which JSON does not

        write_parquet(reader.rows(records), path)
        return path
    lines = path.suffix in LINES_SUFFIXES
    if not lines and path.suffix != ".json":
        raise RecordError(f"cannot tell the format of {path}: end its name in .json, .jsonl or .parquet")
    with written_rows(path, lines) as write:
        for row in _json_rows(records, reader):
            write(row)
    return path


def entries_of(rows: Iterable[Row], forced: Reader | None, options: Options) -> Iterator[Row]:
    """Rows -> entries in the record form, read by `forced` or by the reader that each row's keys tell."""
    for row in rows:
        if row.error is not None or not isinstance(row.entry, dict):
            yield row  # a row that is no object is refused, in words, as a record
            continue
        try:
            reader = forced or _reader_for(row.entry)
            for entry in reader.entries(row.entry, options):
                failed = isinstance(entry, RecordError)
                yield Row(row.line, None, _named(entry, row.entry)) if failed else Row(row.line, entry)
        except RecordError as error:
            yield Row(row.line, None, _named(error, row.entry))


def _reader_for(row: Mapping[str, Any]) -> Reader:
    """The reader that the row's keys tell; RecordError if none does."""
    for reader in READERS:
        if reader.matches(row):
            return reader
    forms = "; ".join(f"{reader.name} ({reader.keys})" for reader in READERS)
    said = f"the key `conversations` is missing, and no other format fits: a row is one of {forms}"
    raise RecordError(said, kind="unknown_format")


def _named(error: RecordError, row: Mapping[str, Any]) -> RecordError:
    """The error with the id of its row, unless it names its record already."""
    name = row.get("id")
    if error.record_id is None and isinstance(name, (str, int)) and not isinstance(name, bool):
        error.record_id = str(name)
    return error


def _json_rows(records: Iterable[Record], reader: Reader) -> Iterator[bytes]:
    """The rows as JSON; an error names the record that was taken last."""
    taken: list[Record] = []

    def watched() -> Iterator[Record]:
        for record in records:
            taken[:] = [record]
            yield record

    for row in reader.rows(watched()):
        try:
            yield to_json(row)
        except (TypeError, ValueError, RecursionError) as error:
            advice = "repair the record, whose numbers or text are none of JSON's (NaN, half a character)"
            if isinstance(error, TypeError):  # bytes, say
                advice = "save pictures as files (`ovisnb data convert` does, with --pictures DIR), and keep `meta` to "
                advice += "numbers, text, lists and dicts"
            named = f"record {taken[0].id!r} ({taken[0].source or 'made in memory'})"
            raise RecordError(f"{named} cannot be written as JSON ({error}): {advice}") from None


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
