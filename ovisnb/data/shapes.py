"""The embedded world: pictures of coloured shapes, with exact boxes and questions about them.

    for record in records("train", seed=0, count=3, size=64, n_objects=(1, 4)):
        print(record.turns[0].text, "->", record.turns[1].text)

`shapes_scene` draws the pictures, `shapes_text` asks the questions, and this file makes records of both.

Train and held-out are apart by construction: the arrangement of the objects itself decides to which of the two a
layout belongs (`layout_split`), and a drawn layout of the other split is thrown away. No seed, size or option can
make a held-out arrangement appear in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count as count_from

from . import shapes_text
from .record import Media, Record, Turn
from .shapes_scene import (
    LABEL_MIN_SIZE,
    Layout,
    Scene,
    SceneObject,
    check_options,
    count_range,
    draw,
    keyed_random,
    layout_split,
    make_layout,
    scene,
    visible,
)

__all__ = ["RecordMaker", "Scene", "SceneObject", "ShapesDataset", "layout_split", "records", "scene", "texts"]

SPLITS = ("train", "heldout")


def records(
    split: str = "train",
    seed: int = 0,
    start: int = 0,
    count: int | None = None,
    **options,
) -> Iterator[Record]:
    """Stream the records start, start + 1, ... of `ShapesDataset(split, ..., seed, **options)`; endless if count is None."""
    maker = RecordMaker(split, seed, **options)
    for index in count_from(start) if count is None else range(start, start + count):
        yield maker(index)


class ShapesDataset:
    """`count` records that can be indexed; record i depends on (split, seed, i) and the options only.

    Options are those of `RecordMaker`. Pictures are drawn when a record is asked for.
    """

    def __init__(self, split: str, count: int, seed: int = 0, **options):
        if count < 0:
            raise ValueError(f"ShapesDataset: count is {count}, give 0 or more.")
        self.count = count
        self.maker = RecordMaker(split, seed, **options)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        if not -self.count <= index < self.count:
            raise IndexError(f"ShapesDataset: index {index} is outside its {self.count} records.")
        return self.maker(index % self.count)


class RecordMaker:
    """Makes the record of an index.

    Args:
        split: "train" or "heldout".
        seed: another seed, other records.
        size, n_objects, grid, labels, alike: as for `scene`.
        kinds: weight of each kind of question; `shapes_text.KINDS` if None. Kinds that a scene cannot answer are
            passed over (read needs a labelled object, compare two objects, attribute a colour or shape of one object).
        turns: (lowest, highest) number of questions about one picture.

    Raises:
        ValueError: an option is outside its range, or no scene can answer any of the kinds.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        *,
        size: int = 512,
        n_objects: int | tuple[int, int] | None = None,
        grid: int = 64,
        labels: float = 0.3,
        alike: float = 2 / 3,
        kinds: Mapping[str, float] | None = None,
        turns: tuple[int, int] = (1, 1),
    ):
        if split not in SPLITS:
            raise ValueError(f"shapes: split is {split!r}, give one of {', '.join(SPLITS)}.")
        if not 1 <= turns[0] <= turns[1]:
            raise ValueError(f"shapes: turns is {turns}, give (lowest, highest) with 1 <= lowest <= highest.")
        check_options(size, grid, labels, alike)
        self.split, self.seed, self.size = split, seed, size
        self.grid, self.labels, self.alike = grid, labels, alike
        self.range = count_range(n_objects)
        self.kinds = shapes_text.check_kinds(kinds)
        self.turns = tuple(turns)

    def __call__(self, index: int) -> Record:
        """The record with its picture."""
        layout, questions, key = self.plan(index)
        picture = draw(layout, self.size, key)
        turns, images = [], [Media(image=picture.image)]
        for number, question in enumerate(questions):
            turns.append(Turn(role="human", text=("" if number else "<image>\n") + question.text))
            turns.append(Turn(role="gpt", text=question.answer))
            if question.crop is not None:
                images.append(Media(image=picture.image, box=question.crop))
        kinds = [question.kind for question in questions]
        return Record(
            id=f"shapes-{self.split}-{self.seed}-{index}",
            turns=turns,
            images=images,
            kind=kinds[0] if len(set(kinds)) == 1 else "mixed",
            source=f"shapes:{key}",
            meta={"objects": [o.to_dict() for o in picture.objects], "kinds": kinds},
        )

    def plan(self, index: int) -> tuple[Layout, list[shapes_text.Question], str]:
        """Layout, questions and scene seed of a record, without drawing anything."""
        for attempt in range(2000):
            key = f"{self.split}/{self.seed}/{index}/{attempt}"
            layout = make_layout(key, self.range, self.grid, self.labels, self.alike)
            if layout_split(layout.objects) != self.split:
                continue
            objects = visible(layout.objects, self.size)
            questions = shapes_text.ask(
                keyed_random("questions", key), objects, self.kinds, self.turns, self.size, self.grid
            )
            if questions:
                return layout, questions, key
        raise ValueError(
            f"shapes: none of the kinds {', '.join(self.kinds)} can be asked about scenes of {self.range[0]} to "
            f"{self.range[1]} objects at {self.size} pixels with labels={self.labels}: allow another kind, more "
            f"objects, or for read labels and at least {LABEL_MIN_SIZE} pixels."
        )


def texts(count: int, seed: int = 0, **options) -> Iterator[str]:
    """Role and words of every turn of `count` training records, without pictures: what a tokenizer is trained on."""
    maker = RecordMaker("train", seed, **options)
    for index in range(count):
        for question in maker.plan(index)[1]:
            yield f"user\n{question.text}"
            yield f"assistant\n{question.answer}"
