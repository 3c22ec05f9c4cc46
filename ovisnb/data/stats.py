"""Stats: the numbers of a data set, in memory that does not grow with it.

    stats = summarise(read_records("train.jsonl"), processor, image_folder="images", max_length=4096)
    stats.records, stats.kinds.most_common(3), stats.tokens.quantile(0.5), stats.tokens.above(4096)

What is counted is exact. Of what could be different in every record (picture sizes, boxes) an even
sample of `SAMPLE` is kept: all of them, in order, as long as they are no more than that. A record
with something wrong is counted as a problem and the rest goes on; `ovisnb.data.checks` says more.
Without a processor nothing of torch is imported.
"""

from __future__ import annotations

import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from ovisnb.data import boxes, markup
from ovisnb.data.checks.faults import plain
from ovisnb.data.formats import Options, read_entries, record_of
from ovisnb.data.media import Folder, folder_of, image_size
from ovisnb.data.record import IMAGE, Record, RecordError

SAMPLE = 4096
KINDS = 200  # different kinds that are counted by name; more are no kinds but free text
OTHER_KINDS = "(other kinds)"
NO_KIND = "(none)"


class Sample(list):
    """An even sample of at most `limit` of the items added; `total` counts all of them.

    The same items in the same order give the same sample.
    """

    def __init__(self, limit: int = SAMPLE):
        super().__init__()
        self.total, self.limit, self._chance = 0, limit, Random(0)

    def add(self, item: Any) -> None:
        self.total += 1
        if len(self) < self.limit:
            self.append(item)
        elif (at := self._chance.randrange(self.total)) < self.limit:
            self[at] = item


class Numbers(array):
    """Whole numbers of 0 or more, one a record, in order: 4 bytes each."""

    def __new__(cls):
        return super().__new__(cls, "I")

    add = array.append

    def above(self, limit: int) -> int:
        """How many are more than `limit`."""
        return sum(number > limit for number in self)

    def quantile(self, share: float) -> int:
        """The smallest number that at least `share` (0 to 1) of them do not exceed; ValueError for none."""
        return quantiles(self, share)[0]


def quantiles(values: Iterable[float], *shares: float) -> list[float]:
    """For each of `shares` (0 to 1) the smallest value that at least so many do not exceed; ValueError for no values."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("there are no numbers to take a quantile of")
    return [ordered[max(math.ceil(share * len(ordered)), 1) - 1] for share in shares]


@dataclass
class Stats:
    """What `summarise` counts."""

    records: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Records by kind: at most KINDS of them and "(other kinds)"; "(none)" where a record says none."""
    turns: Counter[int] = field(default_factory=Counter)
    """Number of turns -> records."""
    images: Counter[int] = field(default_factory=Counter)
    """Number of pictures (crops included) -> records."""
    videos: int = 0
    """Records with a video."""
    calls: Counter[int] = field(default_factory=Counter)
    """Number of tool calls -> answers (gpt turns)."""
    sizes: Sample = field(default_factory=Sample)
    """(width, height) in pixels of the pictures and frames as the model gets them, crops included."""
    smallest: tuple[int, int] | None = None
    """By area, of all pictures; `largest` likewise."""
    largest: tuple[int, int] | None = None
    boxes: Sample = field(default_factory=Sample)
    """Boxes in the text, as shares of their picture (normalised x1, y1, x2, y2)."""
    crops: Sample = field(default_factory=Sample)
    """Boxes of the tool calls, likewise."""
    points: Sample = field(default_factory=Sample)
    """Points in the text: normalised x, y."""
    outside: int = 0
    """Boxes, points and calls that are in none of the three samples: over a hundredth off their picture."""
    tokens: Numbers = field(default_factory=Numbers)
    """Tokens of each record that could be encoded, nothing cut off. Empty without a processor."""
    pictures: Numbers = field(default_factory=Numbers)
    """Pictures and frames of each of these records: what a batch's budget of images counts."""
    supervised: Numbers = field(default_factory=Numbers)
    """Tokens with a label, of each of these records."""
    problems: Sample = field(default_factory=lambda: Sample(20))
    """One sentence for each record that is not counted in full."""

    def add_size(self, size: tuple[int, int]) -> None:
        self.sizes.add(size)
        self.smallest = min(self.smallest or size, size, key=math.prod)
        self.largest = max(self.largest or size, size, key=math.prod)


def summarise(
    records: Iterable[Record | RecordError],
    processor=None,
    *,
    image_folder: Folder = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
) -> Stats:
    """Count `records`; with an Ovis2_5Processor also their tokens at these pixel limits.

    Pictures are measured from their headers, never decoded. What is wrong with a record's pictures is one of
    `problems`, as is an error in place of a record; ValueError for limits that cross.
    """
    stats = Stats()
    if processor is not None:
        processor.image_processor.limits(min_pixels, max_pixels)  # a mistake in these is no fault of any record
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels, "min_frames": min_frames, "max_frames": max_frames}
    for record in records:
        if isinstance(record, RecordError):
            stats.problems.add(" ".join(str(record).split()))
            continue
        _count(stats, record)
        try:
            _count_pictures(stats, record, folder_of(record, image_folder))
            if processor is not None:
                _count_tokens(stats, record, processor, {"image_folder": image_folder, **limits})
        except RecordError as error:
            stats.problems.add(" ".join(str(error.of(record.id, record.source)).split()))
    return stats


def summarise_file(
    path: str | os.PathLike[str],
    processor=None,
    *,
    image_folder: Folder = None,
    format: str | None = None,
    template: str | None = None,
    progress: bool = False,
    **limits: int | None,
) -> Stats:
    """`summarise` for a data file: a row that cannot be read is one of `problems`, and the next ones are read.

    `limits` are those of `summarise`. Raises RecordError for a file that is missing or empty.
    """
    from tqdm import tqdm

    path = Path(path)
    options = Options(path, image_folder, template)

    def records() -> Iterator[Record | RecordError]:
        rows = read_entries(path, image_folder=image_folder, format=format, template=template)
        for index, row in enumerate(rows):
            bar.update()
            try:
                record = record_of(row, index, options)
            except RecordError as refused:
                record = refused
            yield record

    with tqdm(desc=plain(path.name, 40), unit=" records", disable=None if progress else True) as bar:
        return summarise(records(), processor, image_folder=image_folder, **limits)


def _count(stats: Stats, record: Record) -> None:
    stats.records += 1
    kind = record.kind or NO_KIND
    stats.kinds[kind if kind in stats.kinds or len(stats.kinds) < KINDS else OTHER_KINDS] += 1
    stats.turns[len(record.turns)] += 1
    stats.images[len(record.images)] += 1
    stats.videos += record.video is not None
    for turn in record.turns:
        if turn.role == "gpt":
            stats.calls[len(markup.calls(turn.text))] += 1


def _count_pictures(stats: Stats, record: Record, folder: Folder) -> None:
    """Sizes, and the boxes and points of all turns as shares of the last whole picture before them."""
    # how many frames a video file has, only its reader knows
    for media in [*record.images, *(frame for frame in record.video or [] if not frame.is_video)]:
        stats.add_size(image_size(media, folder))
    kept = {"box": stats.boxes, "call": stats.crops, "point": stats.points}
    images, whole, size = iter(record.images), None, None
    for turn in record.turns:
        found = [(region.start, region.kind, region.numbers) for region in markup.regions(turn.text)]
        found += [(call.start, "call", call.numbers) for call in markup.calls(turn.text)]
        found += [(match.start(), "image", None) for match in re.finditer(IMAGE, turn.text)]
        for _, kind, numbers in sorted(found, key=lambda item: item[0]):
            if kind == "image":
                media = next(images)
                whole, size = (media, None) if media.box is None else (whole, size)
            elif numbers is not None:
                of = record.call_coordinates if kind == "call" else record.box_coordinates
                if of == "pixels":
                    if whole is None:
                        continue  # pixels of no picture
                    size = size or image_size(whole, folder)
                change = boxes.convert_point if kind == "point" else boxes.convert
                shares = tuple(change(numbers, of, "normalised", size))
                if all(-0.01 <= share <= 1.01 for share in shares):
                    kept[kind].add(shares)
                else:
                    stats.outside += 1


def _count_tokens(stats: Stats, record: Record, processor, options: dict) -> None:
    from ovisnb.chat.batching import length_of
    from ovisnb.chat.encode import encode

    encoded = encode(record, processor, pixels=False, **options)
    tokens, pictures = length_of(encoded)
    stats.tokens.add(tokens)
    stats.pictures.add(pictures)
    stats.supervised.add(int((encoded.labels != -100).sum()))
