"""Split: one data file into train, val and test, with all records of a picture in the same one.

    done = split("full.json", train_ratio=0.8, val_ratio=0.1, test_ratio=0.1, seed=0, image_folder="images")
    done.paths["train"], done.counts["train"]    # full_train.json, 812

Pictures are the same if their paths lead to the same file or the files have the same bytes; a record
with several pictures or frames binds all of them together. The groups that arise so are dealt out, the
largest first and otherwise in an order that the seed decides, each to the split that lacks most: the
shares come as close to the ratios as the groups allow. Rows are written as they stand in the file.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from ovisnb.data.checks.faults import plain
from ovisnb.data.checks.pictures import file_number, number_of
from ovisnb.data.files import to_json, written, written_rows
from ovisnb.data.formats import Options, entries_of, read_rows, reader_of
from ovisnb.data.formats.info import is_info
from ovisnb.data.formats.rows import kind_of
from ovisnb.data.media import Folder, MediaError, find_file
from ovisnb.data.record import RecordError

SPLITS = ("train", "val", "test")


@dataclass
class Split:
    """What `split` wrote; only splits with a ratio above 0 are there."""

    paths: dict[str, Path]
    counts: dict[str, int]
    """Rows of each."""
    ratios: dict[str, float]
    groups: int
    """Groups of rows that share pictures."""
    largest: int
    """Rows of the largest group."""
    notes: list[str] = field(default_factory=list)
    """One sentence for each thing a person should know."""

    def text(self) -> str:
        """For a person."""
        total = sum(self.counts.values())
        lines = []
        for name, path in self.paths.items():
            share = self.counts[name] / total if total else 0
            lines.append(f"{path}: {self.counts[name]:,} of {total:,} ({share:.1%}, asked for {self.ratios[name]:.1%})")
        lines.append(f"groups that share no picture: {self.groups:,}; records in the largest: {self.largest:,}")
        return "\n".join(lines + self.notes)


def split(
    path: str | os.PathLike[str],
    *,
    train_ratio: float = 0.8,
    val_ratio: float = 0.1,
    test_ratio: float = 0.1,
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    image_folder: Folder = None,
    format: str | None = None,
    progress: bool = False,
) -> Split:
    """Write FILE_train, FILE_val and FILE_test into `output_dir` (by default beside the file), in the file's form.

    The same file, ratios and seed give the same splits. Every row is in exactly one of them. A file that
    holds everything in one object (COCO) is written as records. Raises ValueError for ratios that are no
    shares of one whole; RecordError for a row that cannot be read.
    """
    path = Path(path)
    ratios = dict(zip(SPLITS, (train_ratio, val_ratio, test_ratio)))
    check_ratios({f"{name}_ratio": ratio for name, ratio in ratios.items()})
    if is_info(path):
        raise RecordError(f"{path} names several data sets: split their files one by one")
    rows = _Rows(path, Options(path, image_folder), format)
    groups = _Groups(image_folder)
    from tqdm import tqdm

    with tqdm(desc=plain(path.name, 40), unit=" rows", disable=None if progress else True) as bar:
        for entries in rows.entries():
            groups.add(picture for entry in entries for picture in _pictures(entry))
            bar.update()
    places, sizes = _dealt(groups.roots(), ratios, seed)
    if not places:
        raise RecordError(f"{path} holds no record: there is nothing to split")
    folder = path.parent if output_dir is None else Path(output_dir)
    files = {name: folder / f"{path.stem}_{name}{path.suffix}" for name in SPLITS}
    paths = {name: file for name, file in files.items() if ratios[name]}
    rows.write(places, [paths.get(name) for name in SPLITS])
    tally = Counter(places)
    done = Split(paths, {name: tally[SPLITS.index(name)] for name in paths}, ratios, len(sizes), max(sizes))
    if rows.whole:
        done.notes.append(f"{path.name} holds everything in one object: its splits are written as records")
    if groups.missing:
        many = "1 picture was" if groups.missing == 1 else f"{groups.missing:,} pictures were"
        done.notes.append(f"{many} not found, so that one with two names is taken for two: give the image_folder")
    done.notes += [f"{name} is empty: its share is less than a group" for name in paths if not done.counts[name]]
    for name, file in files.items():
        if name not in paths and file.exists():
            done.notes.append(f"{file} is of an earlier split and may hold the same pictures: remove it")
    return done


class _Groups:
    """Which rows belong together: a forest over their numbers, joined wherever a picture is met again."""

    def __init__(self, image_folder: Folder):
        self.folder = image_folder
        self.parent = array("q")
        self.seen: dict[int, int] = {}  # number of a file, or of its bytes -> a row with it
        self.alone: dict[int, tuple[Path, int] | None] = {}  # size in bytes -> the only file of it, not yet read
        self.missing = 0
        """Pictures that are known by their paths alone."""

    def add(self, pictures: Iterable[str | bytes]) -> None:
        """The next row, with the paths or bytes of its pictures."""
        row = len(self.parent)
        self.parent.append(row)
        for picture in pictures:
            if isinstance(picture, bytes):
                self._meet(number_of(picture), row)
                continue
            try:
                path = find_file(picture, self.folder)
            except MediaError:  # missing: the same name is the same picture
                self.missing += not self._meet(file_number(picture, self.folder), row)
                continue
            if not self._meet(number_of(os.path.realpath(path)), row):
                self._compare(path, row)

    def roots(self) -> list[int]:
        """The root of each row's group."""
        return [self._root(row) for row in range(len(self.parent))]

    def _compare(self, path: Path, row: int) -> None:
        """Join the rows of files with the same bytes; a file is read only if another has its size."""
        try:
            size = path.stat().st_size
            if size not in self.alone:
                self.alone[size] = (path, row)
                return
            first, self.alone[size] = self.alone[size], None
            for file, its in [first, (path, row)] if first else [(path, row)]:
                self._meet(number_of(file.read_bytes()), its)
        except OSError:
            return  # no right to read it: its path must do

    def _root(self, row: int) -> int:
        parent = self.parent
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    def _meet(self, number: int, row: int) -> bool:
        """Join a row with the one that showed this picture first; whether there is one."""
        known = number in self.seen
        one, other = self._root(row), self._root(self.seen.setdefault(number, row))
        self.parent[max(one, other)] = min(one, other)
        return known


class _Rows:
    """The rows of a file, and the way back into files of its form."""

    def __init__(self, path: Path, options: Options, format: str | None):
        next(read_rows(path), None)  # refuses a file that is missing or empty
        self.path, self.options, self.kind = path, options, kind_of(path)
        self.reader = None if format is None else reader_of(format)
        first = list(islice(self._read(), 2)) if self.kind == "document" else []
        self.whole = len(first) == 1 and len(first[0]) > 1
        """Whether one object holds everything, so that its records are what is dealt out."""

    def entries(self) -> Iterator[list[Any]]:
        """The entries of each row in order; RecordError, with file and line, for one that cannot be read."""
        return ([entry] for entries in self._read() for entry in entries) if self.whole else self._read()

    def write(self, places: list[int], paths: list[Path | None]) -> None:
        """Row number i into the file of place `places[i]`."""
        if self.kind == "parquet":
            _write_parquet(self.path, places, paths)
            return
        rows = (entry for [entry] in self.entries()) if self.whole else (row.entry for row in read_rows(self.path))
        with ExitStack() as stack:
            writers = [path and stack.enter_context(written_rows(path, self.kind == "lines")) for path in paths]
            count = 0
            for count, (place, row) in enumerate(zip(places, rows), start=1):
                writers[place](to_json(row, strict=False))
            if count != len(places) or next(rows, rows) is not rows:
                raise RecordError(f"{self.path} changed while it was split: split it again")

    def _read(self) -> Iterator[list[Any]]:
        for row in read_rows(self.path):
            entries = list(entries_of([row], self.reader, self.options))
            for one in entries:
                if one.problem is not None:
                    advice = "; `ovisnb data validate FILE --fix` leaves such rows out"
                    raise RecordError(f"{self.path}:{one.line}: {one.problem}{advice}")
            yield [one.entry for one in entries]


def _pictures(entry: Any) -> Iterator[str | bytes]:
    """Paths and bytes of an entry's pictures, as far as they can be told."""
    for key in ("image", "video"):
        listed = entry.get(key) if isinstance(entry, Mapping) else None
        for item in listed if isinstance(listed, (list, tuple)) else [listed]:
            if isinstance(item, Mapping):
                data = item.get("bytes") or item.get("data")
                item = data if isinstance(data, bytes) else item.get("path")
            if isinstance(item, (str, bytes)) and item:
                yield item


def _dealt(roots: list[int], ratios: Mapping[str, float], seed: int) -> tuple[list[int], list[int]]:
    """(the place in SPLITS of each row, the sizes of the groups)."""
    sizes = Counter(roots)
    order = sorted(sizes)
    Random(seed).shuffle(order)
    order.sort(key=lambda root: -sizes[root])  # stable: equal groups keep their chance order
    lack = [ratios[name] * len(roots) for name in SPLITS]
    place = {}
    for root in order:
        place[root] = max(range(len(SPLITS)), key=lambda at: lack[at])
        lack[place[root]] -= sizes[root]
    return [place[root] for root in roots], list(sizes.values())


def check_ratios(ratios: Mapping[str, float]) -> None:
    """ValueError unless the ratios, by the names of their options, are shares of one whole."""
    for name, ratio in ratios.items():
        if not 0 <= ratio <= 1:
            raise ValueError(f"{name} is {ratio:g}: a share is a number from 0 to 1")
    if abs(sum(ratios.values()) - 1) > 1e-6:
        raise ValueError(
            f"the ratios are shares of one whole, but {' + '.join(f'{ratio:g}' for ratio in ratios.values())} is "
            f"{sum(ratios.values()):g}: give train_ratio, val_ratio and test_ratio that sum to 1"
        )


def _write_parquet(path: Path, places: list[int], paths: list[Path | None]) -> None:
    """Rows of a parquet file into parquet files with its columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file, ExitStack() as stack:
        schema, at = file.schema_arrow, 0
        outs = [p and stack.enter_context(written(p)) for p in paths]
        writers = [out and stack.enter_context(pq.ParquetWriter(out, schema)) for out in outs]
        for batch in file.iter_batches(batch_size=256):
            here = places[at : at + batch.num_rows]
            at += batch.num_rows
            for place, writer in enumerate(writers):
                if writer and place in here:
                    writer.write_batch(batch.filter(pa.array([one == place for one in here])))
