"""Records streamed from files larger than anyone wants to open: in parts, in random order, from where one left off.

    stream = RecordStream(["train-*.jsonl", "more/*.parquet", "shards/*.tar"], seed=0)
    for record in stream.shard(rank, world): ...          # this process's part of one epoch; the next loop is the next
    state = stream.state_dict()                           # plain JSON; stream.load_state_dict(state) continues there

The files are cut into pieces (`ovisnb.data.pieces`), which Hugging Face's `datasets.IterableDataset` goes through. Each
epoch has the pieces in another order, and the records of each piece; every record comes once an epoch, in one of
the shards. Nothing is buffered across pieces, so a stream that continues reads the unfinished piece again, but for the
pictures of those of its records that were given before, and nothing else of what was read.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

from ovisnb.data import tar
from ovisnb.data.formats import to_record
from ovisnb.data.formats.info import DataSet, sets_of
from ovisnb.data.formats.rows import kind_of
from ovisnb.data.media import Folder
from ovisnb.data.pieces import Example, File, Piece, cut, files_of, read_piece, with_line
from ovisnb.data.record import Record, RecordError


class RecordStream:
    """The records of JSON lines, parquet files and WebDataset tars, endlessly: each loop over it is one epoch.

    `paths`: files, patterns ("train-*.jsonl", "**" for any folders) and data-info files. The sets of a data-info
    file that have weights are mixed by them; an epoch then ends when every set has been read once, and shorter
    sets have begun again by then; `names` ("photos|captions") chooses some of its sets.
    `seed` makes the order; the other arguments are those of `read_records`. A record's
    `source` tells the byte of its line ("train.jsonl:@812333"); errors tell the line. A loop that was broken off
    is taken up by the next one.

    Raises RecordError, one sentence with file and line, for files that cannot be streamed, at once, and for a
    record that is not sound when it is reached.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        image_folder: Folder = None,
        format: str | None = None,
        template: str | None = None,
        names: str | None = None,
        seed: int = 0,
    ):
        self.seed, self.epoch, self.drawn = seed, 0, 0
        self.index, self.count = 0, 1
        plain, self.sources = [], []
        for path in (found := files_of(paths)):
            sets = sets_of(path, names=names, format=format, template=template)
            files = [_file(data_set, image_folder, template) for data_set in sets]
            if sets[0].weight is None:
                plain += files
            else:
                self.sources += [_Source([file], some.weight) for file, some in zip(files, sets, strict=True)]
        if plain and self.sources:
            raise RecordError("a data-info file with weights is streamed alone: name the other files in it")
        if not self.sources:
            self.sources = [_Source(plain, 1.0)]
        for source in self.sources:
            if not source.pieces:
                raise RecordError(
                    f"there is no record in {' or '.join(map(str, found))}: a data file holds at least one"
                )

    def shard(self, index: int, count: int) -> RecordStream:
        """Part `index` of `count` of this stream, from its start; the parts together are the whole.

        With fewer pieces than parts some have none in an epoch, and others in the next.
        """
        if not 0 <= index < count:
            raise ValueError(f"there is no part {index} of {count}: parts count from 0")
        part = copy.copy(self)
        part.index, part.count = self.index + self.count * index, self.count * count
        part.epoch = part.drawn = 0
        part.sources = [_Source(source.files, source.weight, source.pieces) for source in self.sources]
        return part

    @property
    def progress(self) -> float:
        """Epochs read so far, by pieces."""
        return self.epoch + min(0.0 if source.ended else source.share for source in self.sources)

    def __iter__(self) -> Iterator[Record]:
        for record in self.with_errors():
            if isinstance(record, RecordError):
                raise record
            yield record

    def with_errors(self) -> Iterator[Record | RecordError]:
        """The records of a loop, and in the place of one that is not sound the error that a loop would raise."""
        while not all(source.ended for source in self.sources):
            source = self._drawn()
            found = source.next(self)
            if found is not None:  # a set at its end keeps its turn, or small ones would come too seldom
                self.drawn += 1
                try:
                    record = _record(*found)
                except RecordError as error:
                    record = error
                yield record
        self.epoch += 1
        for source in self.sources:
            source.ended = False

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, after the last record that it gave: plain JSON."""
        sources = [[source.epoch, source.ended, source.position] for source in self.sources]
        return {**self._identity(), "epoch": self.epoch, "drawn": self.drawn, "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; RecordError if that was another part, or of other data."""
        known = self._identity()
        for name, what in (
            ("data", "the data files changed, or what they are read with,"),
            ("seed", "the seed changed"),
            ("shard", "the number of processes or of their workers changed"),
        ):
            if state[name] != known[name]:
                raise RecordError(f"the stream cannot continue: {what} since its state was taken; start anew")
        self.epoch, self.drawn = state["epoch"], state["drawn"]
        for source, (epoch, ended, position) in zip(self.sources, state["sources"], strict=True):
            source.epoch, source.ended, source.position, source.examples = epoch, ended, position, None

    def _identity(self) -> dict[str, Any]:
        data = "".join(source.digest for source in self.sources)
        return {"data": data, "seed": self.seed, "shard": [self.index, self.count]}

    def _drawn(self) -> _Source:
        if len(self.sources) == 1:
            return self.sources[0]
        chance = Random(f"{self.seed} {self.index} {self.drawn}")  # from the number alone: nothing to be saved
        [source] = chance.choices(self.sources, [source.weight for source in self.sources])
        return source


class _Source:
    """Files that are shuffled together, and where their stream stands."""

    def __init__(self, files: list[File], weight: float, pieces: list[Piece] | None = None):
        self.files, self.weight = tuple(files), weight
        self.pieces = cut(files) if pieces is None else pieces
        facts = [[file.path.name, file.path.stat().st_size, file.format, file.options.template] for file in files]
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.epoch, self.ended = 0, False
        self.position: dict | None = None
        """What datasets says of where it stands; None at the start of an epoch."""
        self.share = 0.0
        """How much of the epoch's pieces has been read."""
        self.examples: Iterator[tuple[File, Example]] | None = None
        self.empty = 0

    def next(self, stream: RecordStream) -> tuple[File, Example] | None:
        """The next example, or None at the end of an epoch; after it the next epoch begins."""
        self.examples = self.examples or self._epoch(stream)
        found = next(self.examples, None)
        if found is not None:
            self.empty = 0
            return found
        self.examples, self.position, self.share = None, None, 0.0
        self.epoch, self.ended, self.empty = self.epoch + 1, True, self.empty + 1
        if self.empty > 10 * stream.count:  # in so many epochs every piece has been everyone's
            raise RecordError(f"{self.files[0].path} and what is read with it hold no record: leave them out")
        return None

    def _epoch(self, stream: RecordStream) -> Iterator[tuple[File, Example]]:
        """The examples of the epoch from `position` on, which moves with them."""
        from datasets import IterableDataset

        pieces = list(self.pieces)
        Random(f"{stream.seed} {self.epoch}").shuffle(pieces)
        # whose turn it is moves on, so that of too few pieces everyone has one in some epoch
        mine = [tuple(piece) for piece in pieces[(stream.index - self.epoch) % stream.count :: stream.count]]
        arguments = {"pieces": mine, "files": self.files, "order": (stream.seed, self.epoch)}
        dataset = IterableDataset.from_generator(_examples, gen_kwargs=arguments)
        if self.position is not None:
            dataset.load_state_dict({"examples_iterable": self.position, "epoch": 0})
        for found in dataset.iter(batch_size=1):  # unlike iter(), the same in a DataLoader's worker
            self.position = dataset.state_dict()["examples_iterable"]
            self.share = self.position["shard_idx"] / len(mine)
            yield self.files[found["file"][0]], found["example"][0]


def _examples(pieces: list[tuple], files: tuple[File, ...], order: tuple[int, int]) -> Iterator[dict[str, Any]]:
    for piece in map(Piece._make, pieces):
        chance = Random(f"{order} {piece}")
        for example in read_piece(files[piece.file], piece, chance):
            yield {"file": piece.file, "example": example}


def _record(file: File, example: Example) -> Record:
    source = f"{file.path}:{example.place}"
    _, entry, error = example.row
    if error is not None:
        raise RecordError(f"{with_line(source)}: {error}", kind=error.kind)
    try:
        if example.pictures and isinstance(entry, dict):
            entry = tar.with_pictures(entry, example.pictures)
        record = to_record(entry, source=source, index=example.index, options=file.options)
    except RecordError as refused:
        raise refused.of(refused.record_id, with_line(source)) from None
    return record if file.folder is None else record.model_copy(update={"folder": file.folder})


def _file(data_set: DataSet, image_folder: Folder, template: str | None) -> File:
    path, kind = data_set.path, kind_of(data_set.path)
    if kind == "document":
        raise RecordError(
            f"{path} is no JSON lines, parquet or tar file, and others cannot be streamed: convert it to JSON lines, "
            "or read it without streaming"
        )
    return File(path, kind, data_set.options(image_folder, template), data_set.format, data_set.folder)
