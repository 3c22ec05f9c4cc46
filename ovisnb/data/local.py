"""Local data files of any size as a sequence of records, in memory that does not grow with them.

    records = LocalRecords(["train.jsonl", "more.parquet", "data_info.json"])
    len(records), records[812_333]

A file is read and checked once, record by record, into a table in the cache folder, which later runs map
into memory: they open it at once, and what they do not touch is never read. A table belongs to its file's path,
size and time of change, to the options it was read with, and to the code of the readers; anything else is read
anew, and takes the place of older tables of the same path and options that nobody has open. What reading learned from
pictures (a box that was cut to its picture) stays as it was then. The folder may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from ovisnb.data.files import written
from ovisnb.data.formats import Options, read_entries, record_of
from ovisnb.data.formats.info import DataSet, mixed, sets_of
from ovisnb.data.formats.rows import Row, kind_of
from ovisnb.data.media import Folder
from ovisnb.data.pieces import files_of
from ovisnb.data.record import Record, RecordError

_BATCH_ROWS, _BATCH_BYTES = 1000, 8 << 20
_READ_ROWS = 32  # read at once by a loop: few, because a row may hold pictures
_BYTES = "\0bytes"  # the key that stands in JSON for a picture's bytes, beside their number


class LocalRecords(Sequence[Record]):
    """The records of data files, one file after the other, by number.

    `paths`: one file or several, also patterns ("train-*.jsonl"), in any format that `read_records` reads but tars. The
    sets of a data-info file that have weights are mixed as `ovisnb.data.formats.info` says, and `names`
    ("photos|captions") chooses some of them. The other arguments are those of `read_records`; `cache_folder` is by
    default a folder in that of Hugging Face's datasets. Several processes may open the same files at once: one reads,
    and the others wait for it.

    Raises RecordError, one sentence with file and line, where `read_records` would: at once, or, with `keep_bad`, when
    that record is asked for. Pictures are not opened.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        image_folder: Folder = None,
        format: str | None = None,
        template: str | None = None,
        names: str | None = None,
        cache_folder: str | os.PathLike[str] | None = None,
        keep_bad: bool = False,
    ):
        from datasets import concatenate_datasets, config

        cache = Path(cache_folder or Path(config.HF_DATASETS_CACHE) / "ovisnb_records")
        held = ExitStack()
        weakref.finalize(self, held.close)
        tables, self.numbers, start = [], array("q"), 0
        for path in files_of(paths):
            sets, ranges = sets_of(path, names=names, format=format, template=template), []
            for data_set in sets:
                tables.append(_open(data_set, data_set.options(image_folder, template), cache, held, keep_bad))
                ranges.append(range(start, start := start + len(tables[-1])))
            if sets[0].weight is None:
                self.numbers.extend(chain.from_iterable(ranges))
            else:
                weights = [data_set.weight for data_set in sets]
                self.numbers.extend(mixed([functools.partial(iter, some) for some in ranges], weights))
        self.table = concatenate_datasets(tables).with_format("arrow") if tables else ()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return list(self._records(self.numbers[index]))
        [row] = self.table[self.numbers[index]].to_pylist()
        return _record(row)

    def __iter__(self) -> Iterator[Record]:
        return self._records(self.numbers)

    def notes(self) -> Iterator[str]:
        """What reading changed, a sentence each, with the record's place: "train.jsonl:12: the box ... was cut"."""
        if not self.numbers:
            return
        for rows in self.table.select_columns(["source", "notes"]).iter(batch_size=10_000):
            for row in rows.filter([bool(notes) for notes in rows["notes"].to_pylist()]).to_pylist():
                yield from (f"{row['source']}: {note}" for note in row["notes"])

    def _records(self, numbers: array) -> Iterator[Record]:
        for start in range(0, len(numbers), _READ_ROWS):
            for row in self.table[numbers[start : start + _READ_ROWS].tolist()].to_pylist():
                yield _record(row)


def _open(data_set: DataSet, options: Options, cache: Path, held: ExitStack, keep_bad: bool) -> Any:
    """The table of one data file as a datasets.Dataset, written first if it is not there, and `held` open."""
    from datasets import Dataset

    if kind_of(data_set.path) == "tar":  # a table would hold all of its pictures once more
        raise RecordError(f"{data_set.path} is a tar, which is only streamed: set streaming, or use RecordStream")
    source, version = _key(data_set, options, keep_bad)
    file = cache / f"{source}-{version}.arrow"
    if not _hold(file, held):
        with _alone(cache, source):
            if not file.exists():
                for older in cache.glob(f"*{source}-*"):
                    _remove(older)
                _write(file, data_set, options, keep_bad)
            _hold(file, held)
    return Dataset.from_file(str(file))


def _hold(file: Path, held: ExitStack) -> bool:
    """Keep a table from being removed until `held` is closed; False if there is none. The folder may be read-only."""
    try:
        handle = file.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return False
    fcntl.flock(held.enter_context(handle), fcntl.LOCK_SH)
    return file.exists()  # not removed just before


@contextmanager
def _alone(cache: Path, source: str) -> Iterator[None]:
    """Let one process at a time write tables of a source. OSError that says what to do where none can be written."""
    from filelock import FileLock

    lock = FileLock(cache / f"{source}.lock")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        said = f"no cache can be kept here ({error.strerror}): set HF_DATASETS_CACHE to a folder that can be written"
        raise OSError(error.errno, said, str(cache)) from None
    try:
        yield
    finally:
        lock.release()


def _remove(file: Path) -> None:
    """Remove a table, or what a killed process left of one, unless some process has it open.

    What is mapped would outlive its name, but a worker that is started later opens it by that.
    """
    with file.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        file.unlink()


def _key(data_set: DataSet, options: Options, keep_bad: bool) -> tuple[str, str]:
    """What a table is known by: digests of where its rows come from, and of the version of the file and the readers."""
    folder = options.image_folder
    source = [
        str(data_set.path),
        str(data_set.path.absolute()),
        data_set.format,
        data_set.folder,
        options.template,
        folder and (os.path.abspath(folder), getattr(folder, "allow_absolute", False)),
        keep_bad,
    ]
    told = data_set.path.stat()
    # the second time, of the file's own change, is that of a file that keeps the first: `cp -p`, `mv` over another
    version = [_reader_version(), told.st_size, told.st_mtime_ns, told.st_ctime_ns]
    return tuple(hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32] for facts in (source, version))


@functools.cache
def _reader_version() -> str:
    """A digest of the code that turns a file into records: tables written by other code are not trusted."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _write(file: Path, data_set: DataSet, options: Options, keep_bad: bool) -> None:
    """The table of a data file: whole, under its name, or not at all."""
    import pyarrow as pa

    fields = {"record": pa.binary(), "pictures": pa.list_(pa.binary()), "source": pa.string()}
    schema = pa.schema({**fields, "folder": pa.string(), "notes": pa.list_(pa.string()), "bad": pa.string()})
    before = _key(data_set, options, keep_bad)
    with written(file) as out:
        with pa.ipc.new_stream(out, schema) as writer:
            for rows in _batches(_rows(data_set, options, keep_bad)):
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
        if _key(data_set, options, keep_bad) != before:
            raise RecordError(f"{data_set.path} changed while it was read: start again")
        out.flush()
        os.fsync(out.fileno())  # the name must not outlive a power cut that the contents do not


def _rows(data_set: DataSet, options: Options, keep_bad: bool) -> Iterator[dict[str, Any]]:
    """Each record of a file, checked, as a row of its table; with `keep_bad` what is wrong with it in its place."""
    rows = read_entries(
        data_set.path, image_folder=options.image_folder, format=data_set.format, template=options.template
    )
    for index, row in enumerate(rows):
        try:
            yield _row(row, index, data_set, options)
        except RecordError as error:
            if not keep_bad:
                raise
            yield {
                "record": b"",
                "pictures": [],
                "source": f"{options.path}:{row.line}",
                "notes": [],
                "bad": str(error),
            }


def _row(row: Row, index: int, data_set: DataSet, options: Options) -> dict[str, Any]:
    record = record_of(row, index, options)
    pictures: list[bytes] = []
    return {
        "record": _to_json({**row.entry, "id": record.id}, pictures, record),
        "pictures": pictures,
        "source": record.source,
        "folder": data_set.folder or record.folder,
        "notes": list(record.notes),
    }


def _to_json(entry: dict, pictures: list[bytes], record: Record) -> bytes:
    """The record form as JSON; bytes go to `pictures`, and what JSON has no form for (a date, say) becomes text."""

    def other(value: Any) -> Any:
        if isinstance(value, (bytes, bytearray, memoryview)):
            pictures.append(bytes(value))
            return {_BYTES: len(pictures) - 1}
        return str(value)

    try:
        return json.dumps(entry, ensure_ascii=False, default=other).encode("utf-8", "surrogatepass")
    except (RecursionError, TypeError, ValueError) as error:
        raise RecordError(f"{record.where} cannot be kept ({error}): simplify it") from None


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows in batches of a bounded size in memory."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row["record"]) + sum(map(len, row["pictures"]))
        if len(batch) == _BATCH_ROWS or size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _record(values: dict[str, Any]) -> Record:
    """The record of a row of the table; RecordError in the place of a bad one."""
    if values["bad"] is not None:
        raise RecordError(values["bad"])
    pictures = values["pictures"]

    def with_bytes(value: dict) -> Any:
        number = value.get(_BYTES) if len(value) == 1 else None
        return pictures[number] if isinstance(number, int) and 0 <= number < len(pictures) else value

    text = values["record"].decode("utf-8", "surrogatepass")
    record = Record.from_dict(json.loads(text, object_hook=with_bytes if pictures else None), source=values["source"])
    if values["folder"] is None and not values["notes"]:
        return record
    return record.model_copy(update={"folder": values["folder"], "notes": tuple(values["notes"])})
