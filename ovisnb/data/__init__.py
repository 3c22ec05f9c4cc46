"""From files to records, and from records to pictures.

    for record in read_records("train.jsonl"):
        images, frames = open_media(record, "images")

Needs Pillow and pydantic, never torch.
"""

from __future__ import annotations

from ovisnb.data.convert import convert_record
from ovisnb.data.formats import read_records, write_records
from ovisnb.data.formats.in_memory import from_dataset
from ovisnb.data.local import LocalRecords
from ovisnb.data.media import ImageFolder, MediaError, image_size, open_image, open_media
from ovisnb.data.record import ROLES, Media, Record, RecordError, Turn
from ovisnb.data.stream import RecordStream

__all__ = [
    "ROLES",
    "ImageFolder",
    "LocalRecords",
    "Media",
    "MediaError",
    "Record",
    "RecordError",
    "RecordStream",
    "Turn",
    "convert_record",
    "from_dataset",
    "image_size",
    "open_image",
    "open_media",
    "read_records",
    "write_records",
]
