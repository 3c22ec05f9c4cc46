"""Rows of grounding accuracy beside their pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovisnb.data import Record, shapes
from ovisnb.generate import grounding_accuracy, parse
from ovisnb.show import before_after, compared, gallery, pair_up, question_of, with_box

SCENES = list(shapes.records("heldout", seed=2, count=3, size=64, kinds={"find": 1}))
LIST = next(shapes.records("heldout", seed=2, size=64, n_objects=3, kinds={"list": 1}))


class Parrot:
    """Stands for a model: says what it is told to."""

    def __init__(self, *texts: str):
        self.texts = texts

    def answer_records(self, records, **options):
        return [parse(text, record.images[0].image.size) for text, record in zip(self.texts, records, strict=True)]


def test_with_box_keeps_records_that_end_in_a_box_on_one_picture():
    words = Record.from_dict(
        {"id": "words", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    )
    read = next(shapes.records("heldout", size=512, kinds={"read": 1}))
    assert with_box([words, *SCENES, read, LIST]) == [*SCENES, LIST]


def test_items_have_the_models_boxes_the_truth_and_the_iou():
    right, nothing = SCENES[0].turns[-1].text, "I do not know."
    wrong = "<box>(0.000,0.000),(0.010,0.010)</box>"
    rows = grounding_accuracy(Parrot(right, nothing, wrong), SCENES, progress=False)
    items = compared(SCENES, rows)
    assert [len(item["boxes"]) for item in items] == [1, 0, 1]
    assert [tuple(box) for box in items[0]["boxes"]] == items[0]["truth"]
    assert items[0]["caption"] == f"IoU 1.00 · {question_of(SCENES[0])}"
    assert items[1]["caption"].startswith("IoU 0.00 (no box) · ")
    assert [item["caption"][:8] for item in compared(SCENES, rows, worst_first=True)] == [
        "IoU 0.00",
        "IoU 0.00",
        "IoU 1.00",
    ]
    assert gallery(items).image.width > 0


def test_an_answer_of_several_boxes_has_their_mean_iou():
    lines = LIST.turns[-1].text.splitlines()
    rows = grounding_accuracy(Parrot("\n".join(lines[:2])), [LIST], progress=False)
    (item,) = compared([LIST], rows)
    assert len(item["boxes"]) == 2 and len(item["truth"]) == 3
    assert item["caption"].startswith("IoU 0.67 (1 of 3 boxes missing)")


def test_before_and_after_stand_side_by_side():
    texts = [record.turns[-1].text for record in SCENES]
    before = grounding_accuracy(Parrot("", "", ""), SCENES, progress=False)
    after = grounding_accuracy(Parrot(*texts), SCENES, progress=False)
    captions = [item["caption"] for item in before_after(SCENES, before, after)]
    assert captions[:2] == [f"before: IoU 0.00 (no box) · {SCENES[0].id}", f"after: IoU 1.00 · {SCENES[0].id}"]
    assert len(captions) == 6


def test_a_question_is_shown_without_its_markup():
    assert question_of(SCENES[0]).startswith("Find the ")
    assert "<" not in question_of(SCENES[0]) and "provide" not in question_of(SCENES[0])


def test_pictures_and_questions_are_paired():
    a, b = str(Path("/x/a.png")), str(Path("/x/b.png"))
    assert pair_up(f"{a}, {b}", "one | two") == [(Path(a), "one"), (Path(b), "two")]
    assert pair_up(f"{a},{b}", "one, or two?") == [(Path(a), "one, or two?"), (Path(b), "one, or two?")]
    with pytest.raises(ValueError, match="2 images and 3 questions: give one for each, or one for all"):
        pair_up(f"{a},{b}", "1|2|3")
