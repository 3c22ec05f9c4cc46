"""A data set that is already open in Python -> records, each made when it is asked for.

    from datasets import load_dataset
    records = from_dataset(load_dataset("HuggingFaceH4/llava-instruct-mix-vsft", split="train"))
    records[7].turns

Any format that gives one record a row works, with pictures as PIL images, bytes or paths. Pictures of a
`datasets.Dataset` are not decoded here but taken as they lie in its table, so that they are opened as safely as files are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovisnb.data.formats import Options, Row, entries_of, reader_of, to_record
from ovisnb.data.formats.parts import present
from ovisnb.data.record import Record, RecordError


class RecordsOf(Sequence[Record]):
    """The records of rows: as many, in their order, and none of them kept."""

    def __init__(self, rows: Any, name: str, options: Options, format: str | None) -> None:
        self.rows, self.name, self.options = rows, name, options
        self.reader = None if format is None else reader_of(format)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """The record of row `index`; RecordError, one sentence with the row, if it is not sound."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} records, but number {index} was asked for")
        index %= len(self)
        source = f"{self.name}:{index + 1}"
        entries = list(entries_of([Row(index + 1, _row(self.rows[index]))], self.reader, self.options))
        problem = entries[0].problem if entries else "the row holds no record"
        if problem is None and len(entries) > 1:
            problem = f"the row holds {len(entries)} records, and here each is to hold one: write them to a file"
        if problem is not None:
            raise RecordError(f"{source}: {problem}")
        return to_record(entries[0].entry, source=source, index=index, options=self.options)


def from_dataset(
    dataset: Any,
    *,
    image_folder: str | os.PathLike[str] | None = None,
    format: str | None = None,
    template: str | None = None,
    name: str = "dataset",
) -> RecordsOf:
    """The records of a `datasets.Dataset`, or of any sequence of dicts, in its order.

    The arguments are those of `read_records`; `name` stands for the file in `Record.source` and in errors
    ("dataset:8" is its eighth row). A dataset with a transform of its own gives its rows through it.
    TypeError for a stream or several splits, which have no order to index.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, Mapping):
        raise TypeError("a data set has rows by number: choose a split, and read a stream with ovisnb.data.stream")
    from datasets import Dataset

    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        dataset = dataset.with_format("arrow")  # which decodes no picture
    return RecordsOf(dataset, name, Options(Path(name), image_folder, template), format)


def _row(row: Any) -> Any:
    if hasattr(row, "to_pylist"):  # a table of one row
        [row] = row.to_pylist()
    return present(dict(row)) if isinstance(row, Mapping) else row
