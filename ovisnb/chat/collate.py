"""Samples to a batch: token rows are padded to the longest or packed into one, pictures put one after the other."""

from __future__ import annotations

from typing import Any

import torch

from ovisnb.chat.encode import Encoded
from ovisnb.chat.template import IGNORE_INDEX

_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def collate(samples: list[Encoded], padding_side: str = "right", packed: bool = False) -> dict[str, Any]:
    """A batch for `model(**batch)`.

    `input_ids`, `labels`, `attention_mask`: int64 [samples, longest], padded with each sample's pad token, -100 and 0
    on the `padding_side` ("right" for training, "left" for generation). `pixel_values` and the like: those of all
    samples in order, along the first axis; the key is absent where no sample has any.

    `packed`: one row without padding and no `attention_mask`. `input_ids`, `labels`, `position_ids` (from 0 in every
    sample): int64 [1, total]; `cu_seq_lens_q` and `cu_seq_lens_k`, where the samples begin and the last one ends:
    int32 [samples + 1]; `max_length_q` and `max_length_k`, the longest sample: int. Each sample's first label is -100:
    nothing before it predicts it.

    Raises ValueError for an empty list and for another padding side.
    """
    if not samples:
        raise ValueError("Cannot collate an empty list of samples: give at least one Encoded.")
    if padding_side not in ("left", "right"):
        raise ValueError(f'padding_side is {padding_side!r}: use "left" or "right".')
    batch = _one_row(samples) if packed else _padded(samples, padding_side)
    for name in _MEDIA:
        parts = [value for sample in samples if (value := getattr(sample, name)) is not None]
        if parts:
            batch[name] = torch.cat(parts)
    return batch


def _padded(samples: list[Encoded], padding_side: str) -> dict[str, torch.Tensor]:
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
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _one_row(samples: list[Encoded]) -> dict[str, Any]:
    lengths = [len(sample) for sample in samples]
    if 0 in lengths:
        raise ValueError(f"Sample {samples[lengths.index(0)].id!r} has no token: leave it out of the packed row.")
    ends = torch.tensor([0, *lengths]).cumsum(0)
    labels = torch.cat([sample.labels for sample in samples])
    labels[ends[:-1]] = IGNORE_INDEX
    return {
        "input_ids": torch.cat([sample.input_ids for sample in samples])[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends.to(torch.int32),
        "cu_seq_lens_k": ends.to(torch.int32),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
