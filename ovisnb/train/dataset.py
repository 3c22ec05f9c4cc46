"""Records as training samples: encoded one at a time, in the DataLoader's workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ovisnb.chat import Encoded, collate, encode
from ovisnb.chat.template import chat_tokens
from ovisnb.data.base import where
from ovisnb.data.local import LocalRecords
from ovisnb.data.media import ImageFolder
from ovisnb.data.pieces import with_line
from ovisnb.data.record import Record, RecordError
from ovisnb.data.stream import RecordStream
from ovisnb.train.faults import Skipped, sound
from ovisnb.train.settings import Settings


class RecordEncodingError(ValueError):
    """A record that cannot be encoded; the message, one sentence, names its id and where it comes from."""

    def __init__(self, sentence: str):
        # What a DataLoader's worker raises, torch raises again with the worker's traceback for a message.
        super().__init__(sentence.rpartition("RecordEncodingError: ")[2].strip())


@dataclass(frozen=True)
class Encoder:
    """Record -> Encoded with the limits that the settings give for its kind of media."""

    processor: Any
    settings: Settings

    def __call__(self, record: Record | dict, pixels: bool = True) -> Encoded:
        settings = self.settings
        if isinstance(record, dict):
            try:
                record = Record.from_dict(record)
            except RecordError as error:
                raise RecordEncodingError(str(error)) from error
        kind = "video" if record.video else "multiple_image" if len(record.images) > 1 else "single_image"
        has_media = bool(record.video or record.images)
        try:
            return encode(
                record,
                self.processor,
                image_folder=image_folder(settings),
                min_pixels=getattr(settings, f"{kind}_min_pixels"),
                max_pixels=getattr(settings, f"{kind}_max_pixels"),
                min_frames=settings.min_frames,
                max_frames=settings.max_frames,
                max_length=settings.multimodal_max_length if has_media else settings.text_max_length,
                pixels=pixels,
            )
        except (ValueError, OSError) as error:
            said = error.message if isinstance(error, RecordError) else str(error)
            place = where(record.id, with_line(record.source))  # a stream knows the byte
            raise RecordEncodingError(f"{place}: {said}") from error

    def sample(self, read: Callable[[], Record | dict]) -> Encoded | Skipped:
        """The sample of the record that `read` gives; a bad one raises, or is Skipped, as on_bad_record says."""
        try:
            try:
                return self(read())
            except RecordError as error:  # from reading it
                raise RecordEncodingError(str(error)) from error
        except RecordEncodingError as error:
            if self.settings.on_bad_record == "fail":
                raise
            return Skipped(str(error), chat_tokens(self.processor).pad)


class EncodedRecords(Dataset):
    """Any indexable collection of records, encoded when asked for; blank ones make up a multiple of `multiple`."""

    def __init__(self, records: Sequence[Record | dict], encoder: Encoder, multiple: int = 1):
        self.records, self.encoder, self.multiple = records, encoder, multiple

    def __len__(self) -> int:
        return -(-len(self.records) // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> Encoded | Skipped:
        if len(self.records) <= index < len(self):
            return Skipped("", chat_tokens(self.encoder.processor).pad)
        return self.encoder.sample(lambda: self.records[index])


class EncodedStream(IterableDataset):
    """Any iterable of records, encoded as they come; each worker takes its share of them."""

    def __init__(self, records: Any, encoder: Encoder):
        self.records, self.encoder = records, encoder

    def __iter__(self) -> Iterator[Encoded | Skipped]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for record in islice(self.records, first, None, step):
            yield self.encoder.sample(lambda record=record: record)


def encoded_dataset(records: Any, encoder: Encoder, multiple: int = 1) -> EncodedRecords | EncodedStream:
    """A dataset over records: indexable ones can be shuffled and resumed exactly, others stream in their order.

    `multiple`: samples that all processes take at once. What is missing in the end of indexable records is blank;
    accelerate would take the first ones again, which then count twice.
    """
    indexable = hasattr(records, "__len__") and hasattr(records, "__getitem__")
    return EncodedRecords(records, encoder, multiple) if indexable else EncodedStream(records, encoder)


def image_folder(settings: Settings) -> ImageFolder | None:
    """Where pictures lie, and whether absolute paths may lead out of it."""
    return None if settings.image_folder is None else ImageFolder(settings.image_folder, settings.allow_absolute)


def open_records(
    paths: Sequence[str], settings: Settings, *, names: str | None = None, streaming: bool = False
) -> LocalRecords | RecordStream:
    """The records of several data files, read as the settings say: by number, or as a stream in random order.

    `names` are the sets wanted of a data-info file.
    """
    reading = {
        "image_folder": image_folder(settings),
        "format": "captions" if settings.data_type == "caption" else None,
        "template": settings.caption_template,
        "names": names,
    }
    return (
        RecordStream(paths, **reading, seed=settings.seed)
        if streaming
        else LocalRecords(paths, **reading, keep_bad=settings.on_bad_record == "skip")
    )


def notes_of(records: Any, most: int = 3) -> list[str]:
    """The first sentences on what reading changed in the records, and how many there are, if any and if known."""
    if not isinstance(records, LocalRecords):
        return []
    notes = records.notes()
    shown = list(islice(notes, most))
    more = sum(1 for _ in notes)
    return [*shown, f"reading changed {more:,} records more: ovisnb data validate lists them"] if more else shown


def collate_samples(samples: list[Encoded | Skipped], packed: bool = False) -> dict[str, Any]:
    """A batch for the model, the samples' "ids", and sentences: what truncation took from them ("dropped"), and why
    others were left out ("skipped"). A blank sample stands where none is left."""
    there, skipped = sound(samples)
    batch = collate(there or [samples[0].blank()], packed=packed)
    batch["ids"] = [sample.id for sample in there]
    batch["dropped"] = [f"Record {sample.id}: {sentence}" for sample in there for sentence in sample.dropped]
    batch["skipped"] = skipped
    return batch
