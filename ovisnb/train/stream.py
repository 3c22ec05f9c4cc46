"""Training on a stream: each process's workers read their own part, and a checkpoint knows how far its steps came.

Every batch comes from one worker and carries where that worker's stream stood after it, so what the workers have read
ahead is not in a checkpoint. Batches take turns among the workers; a run that continues does so at the
next worker, in the order of the run that was never stopped.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import TrainerCallback, TrainingArguments

from ovisnb.chat import Encoded
from ovisnb.data.record import Record, RecordError
from ovisnb.data.stream import RecordStream
from ovisnb.train.dataset import Encoder, RecordEncodingError, collate_samples
from ovisnb.train.faults import Skipped
from ovisnb.train.settings import SettingsError

PLACES = "data_position.json"


class Place(NamedTuple):
    """Where a worker's stream stands after a sample."""

    worker: int
    state: dict[str, Any]
    progress: float
    """Epochs read, by this worker."""


class StreamSamples(IterableDataset):
    """The samples of this process's part of a stream, without end, each with its Place; `places` makes them go on."""

    def __init__(self, stream: RecordStream, encoder: Encoder, places: Places):
        self.stream, self.encoder, self.places = stream, encoder, places

    def __iter__(self) -> Iterator[tuple[Encoded | Skipped, Place]]:
        info = get_worker_info()
        workers = self.places.workers
        worker = (self.places.next + (info.id if info else 0)) % workers
        try:
            stream = self.stream.shard(worker, workers)
            if self.places.states[worker] is not None:
                stream.load_state_dict(self.places.states[worker])
            while True:
                for record in stream.with_errors():
                    sample = self.encoder.sample(functools.partial(_given, record))
                    yield sample, Place(worker, stream.state_dict(), stream.progress)
        except RecordError as error:
            raise RecordEncodingError(str(error)) from error


def _given(record: Record | RecordError) -> Record:
    if isinstance(record, RecordError):
        raise record
    return record


class Places:
    """Where the streams of this process's workers stand, by the batches that were trained on."""

    def __init__(self, workers: int):
        self.workers = max(workers, 1)
        self.states: list[dict | None] = [None] * self.workers
        self.progress = [0.0] * self.workers
        self.next = 0
        """The worker whose batch comes next."""

    def advance(self, place: Place) -> None:
        """Note that a batch with this place was taken."""
        self.states[place.worker], self.progress[place.worker] = place.state, place.progress
        self.next = (place.worker + 1) % self.workers

    def save(self, checkpoint: Path, arguments: TrainingArguments) -> None:
        """Write those of all processes into a checkpoint; every process calls this."""
        ranks = gather_object([{"next": self.next, "states": self.states, "progress": self.progress}])
        if arguments.process_index == 0:
            (checkpoint / PLACES).write_text(json.dumps({"ranks": ranks}), encoding="utf-8")

    def load(self, checkpoint: Path, arguments: TrainingArguments) -> None:
        """Continue where a checkpoint stands; SettingsError if it has other processes or workers."""
        if not (checkpoint / PLACES).exists():
            raise SettingsError(
                f"{checkpoint} was not trained on a stream: choose another output_dir, or no streaming."
            )
        ranks = json.loads((checkpoint / PLACES).read_text(encoding="utf-8"))["ranks"]
        then, now = (len(ranks), len(ranks[0]["states"])), (arguments.world_size, self.workers)
        if then != now:
            raise SettingsError(
                f"{checkpoint} was trained by {then[0]} processes with {then[1]} readers each, and here are {now[0]} "
                f"with {now[1]}: a stream continues with the same number of processes and dataloader_num_workers."
            )
        own = ranks[arguments.process_index]
        self.next, self.states, self.progress = own["next"], own["states"], own["progress"]


class EpochOfStream(TrainerCallback):
    """Let the run's epoch be how often this process's data were read, not the share of max_steps."""

    def __init__(self, places: Places):
        self.places = places

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = sum(self.places.progress) / self.places.workers


def collate_places(items: list[tuple[Encoded | Skipped, Place]], packed: bool = False) -> dict[str, Any]:
    """A batch as `collate_samples` makes it, and under "place" where its worker stands after it."""
    samples, places = zip(*items, strict=True)
    return collate_samples(list(samples), packed=packed) | {"place": places[-1]}


def stream_loader(
    dataset: StreamSamples, batch_size: int, arguments: TrainingArguments, packed: bool = False
) -> DataLoader:
    """The batches of a stream, `packed` or padded; not accelerate's, which would share them out once more."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=functools.partial(collate_places, packed=packed),
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
        # its own: drawing from the global generator would set a continued run's dropout off by one draw
        generator=torch.Generator().manual_seed(arguments.seed),
    )
