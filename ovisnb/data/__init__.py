"""From files to records, and from records to pictures.

    for record in read_records("train.jsonl"):
        images, frames = open_media(record, "images")

Needs Pillow and pydantic, never torch.
"""

from __future__ import annotations

from ovisnb.data.formats import read_records, write_records
from ovisnb.data.media import MediaError, open_image, open_media
from ovisnb.data.record import ROLES, Media, Record, RecordError, Turn

__all__ = [
    "ROLES",
    "Media",
    "MediaError",
    "Record",
    "RecordError",
    "Turn",
    "open_image",
    "open_media",
    "read_records",
    "write_records",
]
