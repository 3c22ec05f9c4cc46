"""What one forward of a run takes: its batch, without pixels, from the data or from the settings' limits."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ovisnb.chat import Encoded, collate
from ovisnb.chat.batching import length_of
from ovisnb.chat.template import IGNORE_INDEX
from ovisnb.data.record import RecordError
from ovisnb.model import Ovis2_5Config, Ovis2_5ImageProcessor
from ovisnb.train.batches import PlannedBatches, plans
from ovisnb.train.dataset import Encoder, RecordEncodingError
from ovisnb.train.settings import Settings

READ = 512
"""Records that are measured, evenly spread over the data; of a stream, the first ones."""
STREAMED = 64
"""Of a stream, before a run: it may come from far."""
DRAWN = 2000
"""Random batches of them that are looked at, the largest of which is planned for."""
_MEDIA = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


@dataclass(frozen=True)
class Load:
    """One batch: `inputs` are its whole numbers as the model takes them, `pixels` [name -> shape] its float32 ones."""

    inputs: dict[str, Any]
    pixels: dict[str, tuple[int, int]]
    samples: int
    source: str
    """Where it comes from, in words."""

    @property
    def tokens(self) -> int:
        """Positions that are computed, padding included."""
        return self.inputs["input_ids"].numel()

    @property
    def supervised(self) -> int:
        """Tokens with a label."""
        return int((self.inputs["labels"][:, 1:] != IGNORE_INDEX).sum())

    @property
    def patches(self) -> int:
        """Of all its pictures and frames."""
        return sum(int(self.inputs[name].prod(1).sum()) for name in _MEDIA.values() if name in self.inputs)

    def __str__(self) -> str:
        pictures = sum(len(self.inputs[name]) for name in _MEDIA.values() if name in self.inputs)
        shown = f"{self.patches:,} patches of {_count(pictures, 'picture')}" if pictures else "no picture"
        return (
            f"{_count(self.samples, 'sample')}, {self.tokens:,} tokens ({self.supervised:,} supervised), {shown}; "
            f"{self.source}"
        )


def loads(
    settings: Settings, config: Ovis2_5Config, samples: Sequence[Encoded] | None, processor: Ovis2_5ImageProcessor
) -> tuple[Load, Load | None]:
    """(the largest batch to expect, a middling one): of `samples`, or, where there are none, of the settings' limits."""
    if not samples:
        size = 1 if settings.max_batch_tokens else settings.per_device_train_batch_size
        one = at_the_limits(settings, config, processor)
        if settings.max_batch_tokens:
            size = max(1, settings.max_batch_tokens // len(one))
        source = "as long and as large as the settings allow"
        return _load([one] * size, settings, config, source), None
    batches = sorted(_batches(samples, settings), key=lambda batch: _cost(batch, settings, config))
    of = f"the largest of {_count(len(batches), 'batch')} of the data"
    return (
        _load(batches[-1], settings, config, of),
        _load(batches[len(batches) // 2], settings, config, "the middling one of them"),
    )


def read_samples(settings: Settings, records: Any, processor: Any, most: int = READ) -> list[Encoded]:
    """Some of the records, encoded without their pixels; those that cannot be encoded are left out."""
    encoder, samples = Encoder(processor, settings), []
    if hasattr(records, "__len__") and hasattr(records, "__getitem__"):
        step = max(1, len(records) // most)
        reads = [lambda index=index: records[index] for index in range(0, len(records), step)]
    else:
        reads = [lambda record=record: record for record in islice(iter(records), most)]
    for read in reads:
        try:
            samples.append(encoder(read(), pixels=False))
        except (RecordEncodingError, RecordError):
            continue  # training says what is wrong with it
    return samples


def at_the_limits(settings: Settings, config: Ovis2_5Config, processor: Ovis2_5ImageProcessor) -> Encoded:
    """The costlier of two samples: multimodal_max_length tokens around a picture of single_image_max_pixels (as many of
    them as fit), and text_max_length tokens of text. All text is supervised."""
    vision = config.vision_config
    side = vision.patch_size * vision.hidden_stride
    most = max((settings.multimodal_max_length - 3) * side**2, side**2)
    lowest, highest = processor.limits(None, None)
    pixels = min(settings.single_image_max_pixels or max(highest, settings.single_image_min_pixels or 0), most)
    square = round(pixels**0.5)
    rows, columns = processor.grid(square, square, min(lowest, pixels), pixels)
    atom, start, end = config.visual_token_ids[:3]
    picture = [start, *[atom] * (rows * columns // vision.hidden_stride**2), end]
    grid = torch.tensor([[1, rows, columns]])
    made = [
        _sample([], settings.text_max_length, None),
        _sample(picture, max(settings.multimodal_max_length, len(picture) + 1), grid),
    ]
    return max(made, key=lambda sample: _cost([sample], settings, config))


def _sample(picture: list[int], length: int, grid: torch.Tensor | None) -> Encoded:
    ids = torch.tensor(picture + [0] * (length - len(picture)))
    labels = torch.where(torch.arange(length) < len(picture), IGNORE_INDEX, ids)
    return Encoded("limits", ids, labels, [], None, grid, None, None, 0)


def _batches(samples: Sequence[Encoded], settings: Settings) -> list[list[Encoded]]:
    """Batches of the samples as the run may form them."""
    if plans(settings):
        planned = PlannedBatches(
            [length_of(sample) for sample in samples],
            batch_size=settings.per_device_train_batch_size,
            max_tokens=settings.max_batch_tokens,
            packed=settings.packing,
            seed=settings.seed,
        )
        return [[samples[index] for index in step[0]] for step in planned.steps(0)]
    size, chance, batches = settings.per_device_train_batch_size, random.Random(settings.seed), []
    if size == 1:
        return [[sample] for sample in samples]
    if size >= len(samples):
        return [list(samples)[:size]]
    forwards = settings.max_steps * settings.gradient_accumulation_steps if settings.max_steps > 0 else DRAWN
    while len(batches) < min(forwards, DRAWN):
        order = chance.sample(samples, len(samples))
        batches += [order[at : at + size] for at in range(0, len(order) - size + 1, size)]
    return batches[: min(forwards, DRAWN)]


def _cost(batch: Sequence[Encoded], settings: Settings, config: Ovis2_5Config) -> int:
    lengths = [len(sample) for sample in batch]
    tokens = sum(lengths) if settings.packing else len(lengths) * max(lengths)
    grids = [grid for sample in batch for grid in (sample.image_grid_thw, sample.video_grid_thw) if grid is not None]
    return cost(tokens, sum(int(grid.prod(1).sum()) for grid in grids), config)


def cost(tokens: int, patches: int, config: Ovis2_5Config) -> int:
    """Numbers that a batch keeps for one of many per layer and position, roughly: enough to find the largest."""
    text, vision = config.text_config, config.vision_config
    return tokens * text.hidden_size * text.num_hidden_layers + patches * vision.hidden_size * vision.num_hidden_layers


def _load(batch: Sequence[Encoded], settings: Settings, config: Ovis2_5Config, source: str) -> Load:
    return load_of(collate(list(batch), packed=settings.packing), settings, config, source)


def load_of(batch: Mapping[str, Any], settings: Settings, config: Ovis2_5Config, source: str) -> Load:
    """What a collated batch takes, its pixels there or not. Text is all one token: it makes no difference, and batches
    of the same shape are the same."""
    inputs = {name: value for name, value in batch.items() if not _is_float(value)}
    visual = torch.tensor(config.visual_token_ids)
    text = next(number for number in range(len(visual) + 1) if number not in config.visual_token_ids)
    inputs["input_ids"] = inputs["input_ids"].where(torch.isin(inputs["input_ids"], visual), text)
    inputs["labels"] = inputs["labels"].where(inputs["labels"] == IGNORE_INDEX, text)
    vision, pixels = config.vision_config, {}
    numbers = vision.num_channels * vision.temporal_patch_size * vision.patch_size**2
    for name, grid in _MEDIA.items():
        if grid in inputs:
            pixels[name] = (int(inputs[grid].prod(1).sum()), numbers)
    if settings.vision_cache and pixels:
        patches = sum(rows for rows, _ in pixels.values())
        pixels = {"visual_features": (patches // vision.hidden_stride**2, config.hidden_size)}
    lengths = inputs.get("cu_seq_lens_q")
    return Load(inputs, pixels, len(inputs["input_ids"]) if lengths is None else len(lengths) - 1, source)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 'es' if name.endswith('ch') else 's'}"
