"""Samples to a batch: token rows are padded to the longest, pictures are put one after the other."""

from __future__ import annotations

import torch

from ovisnb.chat.encode import Encoded
from ovisnb.chat.template import IGNORE_INDEX

_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def collate(samples: list[Encoded], padding_side: str = "right") -> dict[str, torch.Tensor]:
    """A batch for `model(**batch)`.

    `input_ids`, `labels`, `attention_mask`: int64 [samples, longest], padded with each sample's pad token, -100 and 0
    on the `padding_side` ("right" for training, "left" for generation). `pixel_values` and the like: those of all
    samples in order, along the first axis; the key is absent where no sample has any. Raises ValueError for an empty
    list and for another padding side.
    """
    if not samples:
        raise ValueError("Cannot collate an empty list of samples: give at least one Encoded.")
    if padding_side not in ("left", "right"):
        raise ValueError(f'padding_side is {padding_side!r}: use "left" or "right".')
    longest = max(len(sample) for sample in samples)
    input_ids = torch.empty((len(samples), longest), dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    attention_mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):
        length = len(sample)
        place = slice(length) if padding_side == "right" else slice(longest - length, longest)
        input_ids[row].fill_(sample.pad_token_id)
        input_ids[row, place] = sample.input_ids
        labels[row, place] = sample.labels
        attention_mask[row, place] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    for name in _MEDIA:
        parts = [value for sample in samples if (value := getattr(sample, name)) is not None]
        if parts:
            batch[name] = torch.cat(parts)
    return batch
