"""Data-info files: several data sets in one file, each with its own folder, format and weight.

    {"photos":   {"meta_file": "photos.jsonl", "image_dir": "photos", "weight": 3},
     "captions": {"meta_file": "captions.parquet", "data_format": "caption", "weight": 1}}

    for data_set in read_info("data_info.json"): print(data_set.name, data_set.path, data_set.weight)

The file that the original Ovis calls a data info works as it is. Keys of a data set:

    meta_file or data_path                  the data file; needed
    image_dir or image_folder               its pictures; null or none: the image folder given to the reader
    data_format, format or data_type        "conversation" (its rows tell which form, the default), "caption", or the
                                            name of a format of `ovisnb.data.formats`, such as "refcoco:xyxy"
    caption_template or template            the question that goes with captions
    weight                                  a number above 0, for all sets or for none
    storage_type                            of the original; says nothing here

Relative paths start in the folder of the data-info file. Without weights the sets follow one another, each
with its natural share. With weights each next record comes from a set drawn with these weights (seeded: always
the same order); a set that ends begins again, until every set has been read to its end once
("all_exhausted" of `datasets.interleave_datasets`). A data set may not be a data-info file itself.
"""

from __future__ import annotations

import difflib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ovisnb.data.formats.parts import is_number
from ovisnb.data.formats.rows import Entry, Options, Reader, Row, data_file, kind_of, read_rows, some
from ovisnb.data.media import Folder, folder_or
from ovisnb.data.record import RecordError

KEYS = {
    "path": ("meta_file", "data_path"),
    "folder": ("image_dir", "image_folder"),
    "format": ("data_format", "format", "data_type"),
    "template": ("caption_template", "template"),
    "weight": ("weight",),
    "storage_type": ("storage_type",),
}
"""What a data set says -> the keys that say it."""

# The original's names of formats; "conversation" is any form of conversation, which the rows tell.
_FORMATS = {"conversation": None, "conversations": None, "caption": "captions"}
# Keys that no row of another format has: what a data-info file is known by.
_TELLING = {"meta_file", "data_path", "image_dir", "data_format", "storage_type"}
_LARGEST = 16 << 20  # bytes; a data-info file is written by hand
_T = TypeVar("_T")


@dataclass(frozen=True)
class DataSet:
    """One data set of a data-info file."""

    name: str
    path: Path
    """The data file."""
    folder: str | None = None
    """The folder of its pictures, or None."""
    format: str | None = None
    """The name of a format, or None where the rows tell."""
    weight: float | None = None
    """How often a record comes from here, beside the other sets' weights; None where no set has one."""
    template: str | None = None
    """The question that goes with captions, or None."""

    def options(self, image_folder: Folder = None, template: str | None = None) -> Options:
        """What its reader needs; the arguments are for a set without a folder or template of its own."""
        return Options(self.path, folder_or(self.folder, image_folder), self.template or template)


def read_info(path: str | os.PathLike[str], names: str | None = None) -> list[DataSet]:
    """The data sets of a data-info file, in its order, or those in `names` ("photos|captions", also with commas).

    Whether the data files exist is not looked at. Raises RecordError, one sentence with the file and the
    data set, for anything else that is wrong.
    """
    path = Path(path)
    entry = _object(path)
    try:
        return data_sets(entry, path.parent, names)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None


def sets_of(
    path: str | os.PathLike[str], *, names: str | None = None, format: str | None = None, template: str | None = None
) -> list[DataSet]:
    """The data sets of a data-info file, as `read_info` gives them, or a data file itself as the only one."""
    return read_info(path, names) if is_info(path) else [DataSet("", Path(path), None, format, None, template)]


def is_info(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a data-info file; quick also for large files, and False for one that cannot be read."""
    try:
        return matches(_object(Path(path)))
    except RecordError:
        return False


def _object(path: Path) -> Any:
    """The JSON value in a file, None where it is too large for a data-info file; RecordError if it cannot be read."""
    try:
        return json.loads(data_file(path).read_text("utf-8-sig")) if path.stat().st_size <= _LARGEST else None
    except OSError as error:
        raise RecordError(f"the data-info file {path} cannot be read ({error.strerror}): give its path") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is no JSON that can be read ({error}): repair it") from None


def data_sets(entry: Any, base: Path, names: str | None = None) -> list[DataSet]:
    """As `read_info`, from the object that the file holds; `base` is where relative paths start."""
    if not isinstance(entry, dict) or not entry:
        raise RecordError('a data-info file is an object of data sets: write {"a name": {"meta_file": "train.jsonl"}}')
    sets = [_data_set(str(name), fields, base) for name, fields in entry.items()]
    if names is not None:
        sets = _chosen(sets, names)
    without = [data_set.name for data_set in sets if data_set.weight is None]
    if 0 < len(without) < len(sets):
        raise RecordError(f"the data set {without[0]!r} has no `weight` but others have: give all of them one, or none")
    return sets


def mixed(openers: Sequence[Callable[[], Iterator[_T]]], weights: Sequence[float], seed: int = 0) -> Iterator[_T]:
    """Items drawn from several streams with these weights, until each stream has ended once.

    A stream that ends begins again: `openers` open one from its start. The order depends on `seed` and the
    weights alone. Raises RecordError for a stream without items.
    """
    rng, ended = random.Random(seed), set()
    streams, end = [opener() for opener in openers], object()
    while streams:
        [drawn] = rng.choices(range(len(streams)), weights)
        item = next(streams[drawn], end)
        if item is end:
            ended.add(drawn)
            if len(ended) == len(streams):
                return
            streams[drawn] = openers[drawn]()
            item = next(streams[drawn], end)
            if item is end:
                raise RecordError("a data set with a weight holds no record: drop it")
        yield item


def matches(entry: Any) -> bool:
    """Whether an object is that of a data-info file: objects under names, with keys that only a data set has."""
    return (
        isinstance(entry, dict)
        and bool(entry)
        and all(isinstance(fields, dict) for fields in entry.values())
        and any(not _TELLING.isdisjoint(fields) for fields in entry.values())
    )


def entries(entry: dict, options: Options) -> Iterator[dict | RecordError]:
    """The entries of all its data sets, mixed by weight; one that cannot be read is an error, and the others follow."""
    sets = data_sets(entry, options.path.parent)
    if sets[0].weight is None:
        for data_set in sets:
            try:
                yield from _entries_of(data_set, options)
            except RecordError as error:  # no file, say: the other sets follow
                yield error
        return
    openers = [lambda data_set=data_set: _entries_of(data_set, options) for data_set in sets]
    yield from mixed(openers, [data_set.weight for data_set in sets])


READER = Reader("info", "data sets by name, each with meta_file", matches, entries)


def _data_set(name: str, fields: Any, base: Path) -> DataSet:
    where = f"the data set {name!r}"
    if not isinstance(fields, dict):
        raise RecordError(f'{where} is not an object: write {{"meta_file": "train.jsonl", "image_dir": "images"}}')
    known = [key for keys in KEYS.values() for key in keys]
    for key in fields:
        if key not in known:
            raise RecordError(f"{where} has the unknown key {key!r}: {_near(key, known)}")
    values = {meaning: _value(fields, keys, where) for meaning, keys in KEYS.items()}
    path = values["path"]
    if path is None:
        raise RecordError(f"{where} has no `meta_file`: give the path of its data file")
    format = values["format"]
    return DataSet(
        name=name,
        path=base / path,
        folder=None if values["folder"] is None else str(base / values["folder"]),
        format=_FORMATS.get(format, format),
        weight=values["weight"],
        template=values["template"],
    )


def _value(fields: dict, keys: tuple[str, ...], where: str) -> Any:
    """The value under one of `keys`, None if there is none: text, and of a weight a number above 0."""
    given = [key for key in keys if fields.get(key) is not None]
    if len(given) > 1:
        raise RecordError(f"{where} has both `{given[0]}` and `{given[1]}`, which say the same: drop one")
    if not given:
        return None
    value = fields[given[0]]
    if given[0] == "weight":
        if not is_number(value) or value <= 0:
            raise RecordError(f"{where}: `weight` is not a number above 0: correct it, or drop the set")
        return float(value)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise RecordError(f"{where}: `{given[0]}` is not a text with something in it: correct it")
    return value


def _chosen(sets: list[DataSet], names: str) -> list[DataSet]:
    by_name = {data_set.name: data_set for data_set in sets}
    wanted = [name.strip() for name in names.replace(",", "|").split("|") if name.strip()]
    if not wanted:
        raise RecordError(f"no data set is named: give some of {', '.join(by_name)}, joined by |")
    for name in wanted:
        if name not in by_name:
            raise RecordError(f"there is no data set {name!r}: {_near(name, by_name)}")
    return [by_name[name] for name in dict.fromkeys(wanted)]


def _near(name: str, known: Iterable[str]) -> str:
    """What may have been meant by an unknown name."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"use some of {', '.join(map(repr, known))}"


def _entries_of(data_set: DataSet, options: Options) -> Iterator[Entry | RecordError]:
    """The entries of one data set, each with its own source and folder."""
    from ovisnb.data import formats  # which knows this reader
    from ovisnb.data.tar import tar_entries  # which leans on it

    options = data_set.options(options.image_folder, options.template)
    # A data-info file in a data-info file may name itself, and would never end.
    nested = "it is a data-info file itself: name the data files that it lists"
    try:
        reader = None if data_set.format is None else formats.reader_of(data_set.format)
        if kind_of(data_set.path) == "tar":
            entries = tar_entries(data_set.path, reader, options)
        else:
            rows = read_rows(data_set.path)
            rows = (Row(row.line, None, RecordError(nested)) if matches(row.entry) else row for row in rows)
            entries = formats.entries_of(rows, reader, options)
    except RecordError as error:
        raise error.at(f"the data set {data_set.name!r}") from None
    entries = some(entries, data_set.path)
    for index, (line, entry, error) in enumerate(entries):
        source = f"{data_set.path}:{line}"
        if error is None and not isinstance(entry, dict):
            error = RecordError("a row is an object")
        if error is not None:
            yield RecordError(error.message, kind=error.kind, record_id=error.record_id, source=source)
            continue
        known = entry if isinstance(entry, Entry) else Entry(entry)
        known.source, known.index, known.folder = source, index, data_set.folder
        yield known
