"""Batches of like length, or of a budget of tokens, for one process or many, the same again when a run continues.

    lengths = measure_records(dataset, folder, workers=4)        # before a picture is decoded, kept in the run folder
    batches = PlannedBatches(lengths, max_tokens=8192, packed=True, seed=42, rank=0, world=2)
    PlannedLoader(dataset, batch_sampler=batches, collate_fn=...)

The batches of an epoch follow from the lengths, the seed and the epoch alone, and every epoch has as many of them, so a
run that continues in the middle of an epoch passes over those it has had.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

import ovisnb.chat
from ovisnb.chat.batching import WINDOW_BATCHES, Length, length_of, plan_batches, plan_rows
from ovisnb.data.files import written
from ovisnb.data.local import LocalRecords
from ovisnb.data.record import RecordError
from ovisnb.train.dataset import EncodedRecords, RecordEncodingError
from ovisnb.train.settings import Settings, SettingsError

LENGTHS = "lengths.json"
UNKNOWN = Length(1, 0)
"""Of a record that cannot be encoded, where on_bad_record leaves it out: training will count it."""
_TOLD_FROM = 2000  # records: fewer are measured in seconds
_FINENESS = 32


class PlannedBatches(Sampler[list[int]]):
    """Lists of sample indices, one a batch: those of process `rank` of `world`, in the order of the epoch.

    With `max_tokens`, as many samples as fit: `packed`, their tokens add up to at most that; padded, their number times
    the longest does. Which lengths come together is the same in every epoch, and which samples of (nearly) the same
    length those are is drawn anew. Without, `batch_size` samples of like length: they are shuffled and then sorted
    within as many as fill 50 batches.

    Every process has as many batches, and those that are taken at the same time cost about the same. Each sample
    comes once an epoch: what is left over is made up by cutting batches in two. Only where all hold one sample do
    some of them come again, as with torch's DistributedSampler. The costliest batches come first, so that what
    does not fit into memory shows at once; the others come in random order.

    Raises ValueError for a sample over the budget.
    """

    def __init__(
        self,
        lengths: Sequence[Length],
        *,
        batch_size: int = 1,
        max_tokens: int | None = None,
        packed: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.lengths, self.batch_size_, self.packed = lengths, batch_size, packed
        self.seed, self.rank, self.world, self.epoch = seed, rank, world, 0
        self.max_tokens, self._plan = max_tokens, None
        if max_tokens is not None:
            rounded = [Length(min(_rounded(tokens), max(max_tokens, tokens)), images) for tokens, images in lengths]
            self._plan = (plan_rows if packed else plan_batches)(rounded, max_tokens=max_tokens)
            self._alike = defaultdict(list)
            for index, length in enumerate(rounded):
                self._alike[length.tokens].append(index)
        self._count = len(self.steps(0))

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return (step[self.rank] for step in self.steps(self.epoch))

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """The batches of all processes: for each forward, one batch a process."""
        chance = random.Random(f"{self.seed} {epoch}")  # unlike a tuple's hash, the same in every process
        batches = self._by_length(chance) if self._plan is None else self._within_budget(chance)
        _even(batches, self.world)
        batches.sort(key=self.cost, reverse=True)
        steps = [batches[start : start + self.world] for start in range(0, len(batches), self.world)]
        for step in steps:
            chance.shuffle(step)
        first, others = steps[:1], steps[1:]
        chance.shuffle(others)
        return first + others

    def cost(self, batch: Sequence[int]) -> tuple[int, int]:
        """Tokens that a batch computes, padding included, and its longest sample."""
        tokens = [self.lengths[index].tokens for index in batch]
        return sum(tokens) if self.packed else len(tokens) * max(tokens), max(tokens)

    def _by_length(self, chance: random.Random) -> list[list[int]]:
        order, size = list(range(len(self.lengths))), self.batch_size_
        chance.shuffle(order)
        window = WINDOW_BATCHES * size * self.world
        batches = []
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window], key=lambda index: self.lengths[index], reverse=True)
            batches += [part[at : at + size] for at in range(0, len(part), size)]
        return batches

    def _within_budget(self, chance: random.Random) -> list[list[int]]:
        """The plan, with samples of the same rounded length in each other's places."""
        instead = {}
        for some in self._alike.values():
            instead.update(zip(some, chance.sample(some, len(some)), strict=True))
        return [[instead[index] for index in batch] for batch in self._plan]


class PlannedLoader(DataLoader):
    """A DataLoader whose `batch_sampler` is a PlannedBatches; not accelerate's, which would share them out once more."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def planned_loader(
    dataset: Dataset, batches: PlannedBatches, collate: Callable[[list], Any], arguments: TrainingArguments
) -> PlannedLoader:
    """The planned batches, read and encoded as the arguments say."""
    return PlannedLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=arguments.dataloader_num_workers,
        prefetch_factor=arguments.dataloader_prefetch_factor,
        persistent_workers=arguments.dataloader_persistent_workers,
        pin_memory=arguments.dataloader_pin_memory,
        # its own: drawing from the global generator would set a continued run's dropout off by one draw
        generator=torch.Generator().manual_seed(arguments.seed),
    )


def _rounded(tokens: int) -> int:
    """A length rounded up by at most 1/32, so that many samples are of one length."""
    step = max(1, (1 << tokens.bit_length() - 1) // _FINENESS)
    return -(-tokens // step) * step


def _even(batches: list[list[int]], world: int) -> None:
    """Make the number of batches a multiple of `world`, at least one each."""
    while len(batches) % world:
        largest = max(range(len(batches)), key=lambda index: len(batches[index]))
        if len(batches[largest]) == 1:
            batches += islice(cycle(batches[:]), -len(batches) % world)
            return
        batch = batches[largest]
        batches[largest : largest + 1] = [batch[::2], batch[1::2]]


def plans(settings: Settings) -> bool:
    """Whether the settings ask for batches that are planned by length."""
    return settings.group_by_length or settings.max_batch_tokens is not None


def planned_batches(dataset: Any, settings: Settings, rank: int, world: int) -> PlannedBatches:
    """The batches that the settings ask for, one process's; every process calls this. Raises SettingsError."""
    name = "max_batch_tokens" if settings.max_batch_tokens else "group_by_length"
    if not isinstance(dataset, EncodedRecords):
        raise SettingsError(
            f"{name} needs the lengths of all records before the first step, and a stream knows none: remove it, or train "
            "on files without streaming."
        )
    lengths = measure_records(dataset, settings.output_dir, settings.dataloader_num_workers, rank, world)
    budget = settings.max_batch_tokens
    if budget and (over := [index for index, length in enumerate(lengths) if length.tokens > budget]):
        longest = max(over, key=lambda index: lengths[index].tokens)
        name = dataset.encoder(dataset.records[longest], pixels=False).id
        raise SettingsError(
            f"max_batch_tokens is {budget:,}, and {len(over):,} of the training records are longer, the longest being "
            f"{name} with {lengths[longest].tokens:,} tokens: raise max_batch_tokens, or lower multimodal_max_length, "
            "text_max_length or max_pixels."
        )
    return PlannedBatches(
        lengths,
        batch_size=settings.per_device_train_batch_size,
        max_tokens=budget,
        packed=settings.packing,
        seed=settings.seed,
        rank=rank,
        world=world,
    )


def measure_records(
    dataset: EncodedRecords, folder: str | Path, workers: int = 0, rank: int = 0, world: int = 1
) -> list[Length]:
    """The length of every sample; each process measures its share, with `workers` processes, and all get all.

    Those of data files are kept in `folder`/lengths.json and read from there while the files, the limits and
    the processor are the same; a picture that is replaced by one of another size is not noticed. Raises
    RecordEncodingError for a record that cannot be encoded, unless such are skipped: then it counts for one token.
    """
    file = Path(folder) / LENGTHS
    key = _key(dataset)
    kept = [_kept(file, key, len(dataset)) if rank == 0 else None]
    if world > 1:  # as process 0 sees it: a folder need not be everybody's
        broadcast_object_list(kept)
    if kept[0] is not None:
        return kept[0]
    mine = range(rank, len(dataset), world)
    tells = rank == 0 and len(dataset) >= _TOLD_FROM
    if tells:
        print(f"measuring the lengths of {len(dataset):,} records, once", flush=True)
    measured: list[Length] = []
    fault = None
    try:
        for lengths in DataLoader(_Lengths(dataset), sampler=mine, batch_size=64, num_workers=workers, collate_fn=list):
            before, after = len(measured), len(measured) + len(lengths)
            measured += lengths
            if tells and after * 10 // len(mine) > before * 10 // len(mine):
                print(f"measured {after * world:,} of {len(dataset):,}", flush=True)
    except RecordEncodingError as error:
        fault = error
    shares = gather_object([(measured, fault)]) if world > 1 else [(measured, fault)]
    if faults := [fault for _, fault in shares if fault is not None]:
        raise faults[0]  # in every process: none waits for another
    every: list[Any] = [None] * len(dataset)
    for start, (lengths, _) in enumerate(shares):
        every[start::world] = lengths
    if rank == 0 and key is not None:
        with written(file) as out:
            out.write(json.dumps({"key": key, "lengths": every}).encode())
    return every


class _Lengths(Dataset):
    """The length of each sample of a dataset, from its pictures' sizes alone."""

    def __init__(self, dataset: EncodedRecords):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Length:
        encoder = self.dataset.encoder
        try:
            return length_of(encoder(self.dataset.records[index], pixels=False))
        except (RecordEncodingError, RecordError) as error:
            if encoder.settings.on_bad_record == "fail":
                raise RecordEncodingError(str(error)) from error
            return UNKNOWN


def _key(dataset: EncodedRecords) -> str | None:
    """A digest of all that lengths follow from; None for records that are not read from files."""
    records, encoder = dataset.records, dataset.encoder
    if not isinstance(records, LocalRecords):
        return None
    settings, processor = encoder.settings.model_dump(), encoder.processor
    limits = {name: value for name, value in settings.items() if name.endswith(("_length", "_pixels", "_frames"))}
    digest = hashlib.sha256(records.numbers.tobytes())
    # a table's name tells its file's path, size and times, and the readers' code
    facts = [
        [Path(table["filename"]).name for table in records.table.cache_files],
        limits,
        settings["on_bad_record"],
        processor.image_processor.to_dict(),
        processor.tokenizer.backend_tokenizer.to_str(),
    ]
    digest.update(json.dumps(facts, default=str).encode())
    for file in sorted(Path(ovisnb.chat.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _kept(file: Path, key: str | None, count: int) -> list[Length] | None:
    """The lengths in a file, if they are those of `key`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        lengths = [Length(*length) for length in found["lengths"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return lengths if found["key"] == key is not None and len(lengths) == count else None
