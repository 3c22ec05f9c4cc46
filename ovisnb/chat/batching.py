"""Batches planned by length: how long a record will be is known before a picture is decoded.

lengths = [measure(record, processor, image_folder="data/photos") for record in records]
batches = plan_batches(lengths, max_tokens=8192, max_images=32, seed=0)   # lists of indices
padding(lengths, batches).share                                          # 0.03: 3% of what is computed is padding
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ovisnb.chat.encode import Encoded, encode
from ovisnb.data.record import Record

# A shuffled plan sorts by length within as many samples as fill this many batches, like the mega-batches of
# transformers' LengthGroupedSampler: enough for little padding, few enough that an epoch stays shuffled.
WINDOW_BATCHES = 50


class Length(NamedTuple):
    """What one sample takes: `tokens` of its sequence, visual ones included, and `images` (pictures and video frames)."""

    tokens: int
    images: int


class Padding(NamedTuple):
    """`tokens` of the samples, and the tokens of `padding` that their batches add."""

    tokens: int
    padding: int

    @property
    def share(self) -> float:
        """Padding as a share of all that is computed, 0 to 1; 0 for no batches."""
        return self.padding / (self.tokens + self.padding) if self.padding else 0.0


def measure(record: Record | dict, processor, **options: Any) -> Length:
    """The length of a record encoded with `options` (those of `encode`), from its pictures' sizes alone.

    Raises what `encode` raises.
    """
    return length_of(encode(record, processor, pixels=False, **options))


def length_of(encoded: Encoded) -> Length:
    """The length of an encoded sample, with or without its pixels."""
    pictures = 0 if encoded.image_grid_thw is None else len(encoded.image_grid_thw)
    frames = 0 if encoded.video_grid_thw is None else int(encoded.video_grid_thw[:, 0].sum())
    return Length(len(encoded), pictures + frames)


def plan_batches(
    lengths: Sequence[Length], *, max_tokens: int, max_images: int | None = None, seed: int | None = None
) -> list[list[int]]:
    """Indices of all samples in batches that stay within the budgets and waste little on padding.

    A batch of n samples takes n times its longest sample: that is at most `max_tokens`. Its pictures and frames are
    at most `max_images` (None: no limit). Without `seed`, all samples are sorted, the longest first: the least
    padding, and what needs most memory comes at once. With a seed, samples are shuffled, sorted within windows of
    about 50 batches, and the batches shuffled; the same seed gives the same plan.

    Raises ValueError for a sample that is over a budget by itself.
    """
    _check_budgets(lengths, max_tokens, max_images)
    order, batches = list(range(len(lengths))), []
    chance = None if seed is None else random.Random(seed)
    window = max(len(order), 1)
    if chance:
        chance.shuffle(order)
        tokens = sum(length.tokens for length in lengths)
        window = WINDOW_BATCHES * len(order) * max_tokens // max(tokens, 1) + 1
    for start in range(0, len(order), window):
        sorted_by_length = sorted(order[start : start + window], key=lambda index: lengths[index], reverse=True)
        batches += _filled(sorted_by_length, lengths, max_tokens, max_images)
    if chance:
        chance.shuffle(batches)
    return batches


def plan_rows(lengths: Sequence[Length], *, max_tokens: int) -> list[list[int]]:
    """Indices of all samples in packed rows, whose samples' tokens add up to at most `max_tokens`.

    Each sample, the longest first, goes where it leaves the least room (best fit decreasing: at most 11/9 of the fewest
    rows there can be, and one; Johnson 1973). Raises ValueError for a sample that is over the budget by itself.
    """
    _check_budgets(lengths, max_tokens, None)
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), the fullest row first; those that take no more are left out
    least = min((length.tokens for length in lengths), default=0)
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index].tokens, reverse=True):
        tokens = lengths[index].tokens
        at = bisect_left(room, (tokens, 0))
        left, row = room.pop(at) if at < len(room) else (max_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if left - tokens >= least:
            insort(room, (left - tokens, row))
    return rows


def padding(lengths: Sequence[Length], batches: Iterable[Sequence[int]]) -> Padding:
    """What the batches take beyond the samples' own tokens, each sample padded to the longest of its batch."""
    tokens = padded = 0
    for batch in batches:
        rows = [lengths[index].tokens for index in batch]
        tokens += sum(rows)
        padded += len(rows) * max(rows, default=0)
    return Padding(tokens, padded - tokens)


def _check_budgets(lengths: Sequence[Length], max_tokens: int, max_images: int | None) -> None:
    """ValueError for a sample that is over a budget by itself."""
    for index, (tokens, images) in enumerate(lengths):
        for needs, limit, name in ((tokens, max_tokens, "tokens"), (images, max_images, "images")):
            if limit is not None and needs > limit:
                raise ValueError(
                    f"sample {index} has {needs:,} {name}, more than max_{name} {limit:,}: "
                    f"raise max_{name}, or shorten it with max_length or max_pixels"
                )


def _filled(
    window: list[int], lengths: Sequence[Length], max_tokens: int, max_images: int | None
) -> Iterator[list[int]]:
    """Batches of neighbours in `window`, whose samples get shorter: the first of a batch is its longest."""
    batch, images = [], 0
    for index in window:
        within = not batch or (
            (len(batch) + 1) * lengths[batch[0]].tokens <= max_tokens
            and (max_images is None or images + lengths[index].images <= max_images)
        )
        if not within:
            yield batch
            batch, images = [], 0
        batch.append(index)
        images += lengths[index].images
    if batch:
        yield batch
