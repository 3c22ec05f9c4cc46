"""How often the model finds what it is asked for, and names what it is shown.

    rows = grounding_accuracy(inference, ShapesDataset("heldout", 500, seed=0, kinds={"find": 1}), batch_size=32)
    for line in summary(rows): print(line)
    rows = label_accuracy(inference, ShapesDataset("heldout", 500, seed=0, kinds={"reverse": 1}), batch_size=32)

A box is a hit when its intersection over union with the expected one is at least 0.5, as RefCOCO
counts. Intervals are Wilson's score interval (E. B. Wilson, JASA 22, 1927): honest for few records
and for rates near 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm  # the plain bar: tqdm.auto's widget stays at 0% in a headless notebook

from ovisnb.data.boxes import iou
from ovisnb.data.record import Record
from ovisnb.generate.answer import Answer, Box, parse

HIT_IOU = 0.5
_Z95 = 1.959963984540054  # the normal quantile of a two-sided 95% interval


def grounding_accuracy(
    inference,
    records: Iterable[Record | dict],
    *,
    batch_size: int = 16,
    image_folder=None,
    do_sample: bool | None = False,
    progress: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """One row for each expected box of each record; greedy unless `do_sample` says otherwise.

    inference: an Ovis25Inference; `options` are those of its `answer_records`
    records: their last gpt turn holds the expected <box>; `meta["objects"]` lists the scene's
        objects, or is their number, and `meta["kinds"]` the kind of each question (shapes has both);
        without them, objects is None and kind the record's own
    Row: id, objects, kind, label, expected and predicted (x1, y1, x2, y2 normalised; predicted None
    if the model gave no box), iou (0.0 then), hit (iou >= 0.5), text (all that the model wrote).
    Where one box is expected, the first that the model gives counts; where several are, each is
    compared with the first unused one of the same label.
    Raises ValueError for a record whose last gpt turn has no box.
    """
    options |= {"image_folder": image_folder, "batch_size": batch_size, "do_sample": do_sample}
    rows = []
    for about, boxes, answer in _answered(inference, records, _expected, "grounding", progress, options):
        for box, found in zip(boxes, _matched(boxes, answer.boxes), strict=True):
            overlap = 0.0 if found is None else float(iou(tuple(box), tuple(found)))
            rows.append(
                {
                    **about,
                    "label": box.label,
                    "expected": tuple(box),
                    "predicted": None if found is None else tuple(found),
                    "iou": overlap,
                    "hit": overlap >= HIT_IOU,
                    "text": answer.text,
                }
            )
    return rows


def label_accuracy(
    inference,
    records: Iterable[Record | dict],
    *,
    batch_size: int = 16,
    image_folder=None,
    do_sample: bool | None = False,
    progress: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """One row for each record, whose last gpt turn is the right answer in words: a name, a number.

    Arguments as those of `grounding_accuracy`. Row: id, objects, kind, expected, text (the answer, without thinking),
    hit (the same words, whatever the case, the spaces between them and a full stop at the end).
    Raises ValueError for a record that ends in no gpt turn.
    """
    options |= {"image_folder": image_folder, "batch_size": batch_size, "do_sample": do_sample}
    return [
        {**about, "expected": expected, "text": answer.answer, "hit": _words(answer.answer) == _words(expected)}
        for about, expected, answer in _answered(inference, records, _last_answer, "labels", progress, options)
    ]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `grounding_accuracy` or `label_accuracy` -> one line for each number of objects, and one for "all".

    Line: objects, n, hits, accuracy, low and high (Wilson 95%), and of boxes mean_iou.
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["objects"], []).append(row)
    lines = [_line(objects, groups[objects]) for objects in sorted(groups, key=lambda n: (n is None, n))]
    return [*lines, _line("all", rows)] if rows else []


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The Wilson 95% interval of a rate of `hits` in `n`; ValueError unless 0 <= hits <= n and n > 0."""
    if not (n > 0 and 0 <= hits <= n):
        raise ValueError(f"{hits} hits of {n} is no rate: 0 <= hits <= n and n > 0 are needed.")
    rate, z2 = hits / n, _Z95**2
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # exactly 0 and 1 at the ends, where rounding would leave 5e-17
    return 0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half


def _line(objects: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    n, hits = len(rows), sum(row["hit"] for row in rows)
    low, high = wilson(hits, n)
    line = {"objects": objects, "n": n, "hits": hits, "accuracy": hits / n, "low": low, "high": high}
    return line | ({"mean_iou": sum(row["iou"] for row in rows) / n} if "iou" in rows[0] else {})


def _answered(
    inference,
    records: Iterable[Record | dict],
    expected: Callable[[Record], Any],
    name: str,
    progress: bool,
    options: dict,
) -> Iterator[tuple[dict[str, Any], Any, Answer]]:
    """What each record is about, what is expected of it, and the answer to it."""
    asked: list[tuple[dict[str, Any], Any]] = []  # without the pictures: a stream of them may be long

    def stream() -> Iterator[Record]:
        for record in tqdm(records, disable=not progress, desc=name, unit="record"):
            record = record if isinstance(record, Record) else Record.from_dict(record)
            asked.append((_about(record), expected(record)))
            yield record

    answers = list(inference.answer_records(stream(), **options))
    for (about, wanted), answer in zip(asked, answers, strict=True):
        yield about, wanted, answer


def _about(record: Record) -> dict[str, Any]:
    objects = record.meta.get("objects")
    return {
        "id": record.id,
        "objects": len(objects) if isinstance(objects, (list, tuple)) else objects,
        "kind": (record.meta.get("kinds") or [record.kind])[-1],
    }


def _expected(record: Record) -> list[Box]:
    last = record.turns[-1]
    boxes = parse(last.text).boxes if last.role == "gpt" else []
    if not boxes:
        raise ValueError(
            f"Record {record.id!r} ({record.source}) does not end in a gpt turn with a <box>, so there is no box to "
            "compare with: pass records that ask for boxes only."
        )
    return boxes


def _last_answer(record: Record) -> str:
    last = record.turns[-1]
    if last.role != "gpt":
        raise ValueError(
            f"Record {record.id!r} ({record.source}) does not end in a gpt turn, so there is no answer to compare with: "
            "pass records with their answers."
        )
    return parse(last.text).answer


def _words(text: str) -> list[str]:
    return text.casefold().removesuffix(".").split()


def _matched(expected: list[Box], found: list[Box]) -> list[Box | None]:
    if len(expected) == 1:
        return [found[0] if found else None]
    unused = list(found)
    matches: list[Box | None] = []
    for box in expected:
        match = next((other for other in unused if _same(box.label, other.label)), None)
        if match is not None:
            unused.remove(match)
        matches.append(match)
    return matches


def _same(a: str | None, b: str | None) -> bool:
    return (a or "").casefold() == (b or "").casefold()
