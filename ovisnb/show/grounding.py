"""Rows of `ovisnb.generate.grounding_accuracy` beside the pictures they are about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from ovisnb.data.media import open_media
from ovisnb.data.record import Record
from ovisnb.generate.answer import Box, parse
from ovisnb.generate.inference import REQUESTS


def with_box(records: Iterable[Record]) -> list[Record]:
    """The records that show one picture and end in an answer with a box: those grounding can be measured on."""
    return [
        record
        for record in records
        if len(record.images) == 1 and record.turns[-1].role == "gpt" and parse(record.turns[-1].text).boxes
    ]


def compared(
    records: Sequence[Record], rows: Sequence[dict], image_folder=None, *, worst_first: bool = False
) -> list[dict]:
    """Items for `gallery`: each record's picture, the model's boxes, the true ones dashed, and in words
    the question and the IoU (the mean where an answer has several boxes)."""
    by_record, items = _by_record(rows), []
    for record in records:
        mine = by_record[record.id]
        overlap = _mean_iou(mine)
        caption = f"IoU {overlap:.2f}{_missing(mine)} · {question_of(record)}"
        items.append((overlap, _item(record, mine, image_folder) | {"caption": caption}))
    return [item for _, item in (sorted(items, key=lambda pair: pair[0]) if worst_first else items)]


def before_after(
    records: Sequence[Record], before: Sequence[dict], after: Sequence[dict], image_folder=None
) -> list[dict]:
    """Items for `gallery`, two a record: the boxes before training and those after it."""
    items = []
    for record in records:
        for name, rows in (("before", _by_record(before)), ("after", _by_record(after))):
            mine = rows[record.id]
            caption = f"{name}: IoU {_mean_iou(mine):.2f}{_missing(mine)} · {record.id}"
            items.append(_item(record, mine, image_folder) | {"caption": caption})
    return items


def question_of(record: Record) -> str:
    """The record's last question, without placeholder, tags and the standing request that ends it."""
    question = next((turn.text for turn in reversed(record.turns) if turn.role == "human"), "")
    for word in ("<image>", "<ref>", "</ref>", *REQUESTS.values()):
        question = question.replace(word, "")
    return " ".join(question.split())


def pair_up(images: str, questions: str) -> list[tuple[Path, str]]:
    """(picture, question) pairs from two notebook parameters: pictures separated by commas, one question
    for each separated by |, or one question for all; ValueError when the numbers do not match."""
    from ovisnb.paths import resolve

    paths = [resolve(path.strip()) for path in images.split(",") if path.strip()]
    asked = [question.strip() for question in questions.split("|") if question.strip()]
    if len(asked) == 1:
        asked *= len(paths)
    if len(asked) != len(paths):
        raise ValueError(
            f"There are {len(paths)} images and {len(asked)} questions: give one for each, or one for all."
        )
    return list(zip(paths, asked))


def _by_record(rows: Sequence[dict]) -> dict[str, list[dict]]:
    found = defaultdict(list)
    for row in rows:
        found[row["id"]].append(row)
    return found


def _mean_iou(rows: Sequence[dict]) -> float:
    return sum(row["iou"] for row in rows) / len(rows)


def _missing(rows: Sequence[dict]) -> str:
    missing = sum(row["predicted"] is None for row in rows)
    return "" if not missing else " (no box)" if len(rows) == 1 else f" ({missing} of {len(rows)} boxes missing)"


def _item(record: Record, rows: Sequence[dict], image_folder) -> dict:
    boxes = [Box(*row["predicted"], label=row["label"]) for row in rows if row["predicted"]]
    return {"image": open_media(record, image_folder)[0][0], "boxes": boxes, "truth": [row["expected"] for row in rows]}
