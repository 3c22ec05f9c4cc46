"""From a record to tokens, labels and the reason of each label, and from there to a batch.

    encoded = encode(record, processor, image_folder="data/photos", max_length=4096)
    batch = collate([encoded, ...])
    loss = model(**batch).loss

Training, inference and the mask viewer all read what `encode` returns; nothing derives a mask again.
"""

from __future__ import annotations

from ovisnb.chat.collate import collate
from ovisnb.chat.encode import REASONS, Encoded, EncodeError, Span, encode
from ovisnb.chat.template import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "REASONS", "EncodeError", "Encoded", "Span", "collate", "encode"]
