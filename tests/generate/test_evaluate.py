"""Grounding accuracy: rows, matching, intervals."""

from __future__ import annotations

import pytest
from PIL import Image

from ovisnb.data.record import Record
from ovisnb.generate import Ovis25Inference, grounding_accuracy, label_accuracy, parse, summary, wilson


class Scripted:
    """Answers with given texts, in order; keeps the options it was called with."""

    def __init__(self, *texts):
        self.texts, self.options = list(texts), None

    def answer_records(self, records, **options):
        self.options = options
        return [parse(self.texts.pop(0), (64, 64)) for _ in records]


def record(expected: str, objects=2, **more):
    return Record.from_dict(
        {
            "id": "r",
            "image": [Image.new("RGB", (64, 64))],
            "objects": objects,
            "kind": "find",
            **more,
            "conversations": [{"from": "human", "value": "<image>\nFind it."}, {"from": "gpt", "value": expected}],
        }
    )


HALF, NEAR, FAR = "<box>(0,0),(0.5,0.5)</box>", "<box>(0,0),(0.5,0.4)</box>", "<box>(0.6,0.6),(0.9,0.9)</box>"


def test_rows_of_single_boxes():
    asked = [
        record(HALF),
        record(f"<ref>a</ref>{HALF}", objects=[{}, {}, {}], kinds=["count", "find"]),
        record(HALF, objects=None),
    ]
    model = Scripted(NEAR + FAR, FAR, "I cannot see it.")
    rows = grounding_accuracy(model, asked, batch_size=2, progress=False, max_new_tokens=5)
    assert [row["iou"] for row in rows] == pytest.approx([0.8, 0.0, 0.0])
    assert [row["hit"] for row in rows] == [True, False, False]
    assert [row["objects"] for row in rows] == [2, 3, None]
    assert [row["label"] for row in rows] == [None, "a", None]
    assert [row["kind"] for row in rows] == ["find", "find", "find"]
    assert rows[0]["predicted"] == (0.0, 0.0, 0.5, 0.4) and rows[2]["predicted"] is None
    assert rows[0]["expected"] == (0.0, 0.0, 0.5, 0.5) and rows[2]["text"] == "I cannot see it."
    assert model.options == {"image_folder": None, "batch_size": 2, "do_sample": False, "max_new_tokens": 5}


def test_several_boxes_are_matched_by_label():
    asked = record(f"<ref>a</ref>[{HALF},{FAR}]<ref>b</ref>{FAR}")
    rows = grounding_accuracy(Scripted(f"<ref>B</ref>{FAR}<ref>a</ref>{NEAR}"), [asked], progress=False)
    assert [(row["label"], row["hit"], row["predicted"] is None) for row in rows] == [
        ("a", True, False),
        ("a", False, True),
        ("b", True, False),
    ]


def test_a_record_without_a_box_is_named():
    with pytest.raises(ValueError, match="Record 'r'.*no box to compare"):
        grounding_accuracy(Scripted("x"), [record("Three.")], progress=False)


def test_labels_are_compared_by_their_words():
    asked = [record("red circle", objects=count) for count in (1, 2, 2)]
    model = Scripted("<think>\nIt is blue.\n</think>\n\nRed  circle.", "red", "The red circle")
    rows = label_accuracy(model, asked, progress=False, max_new_tokens=5)
    assert [row["hit"] for row in rows] == [True, False, False]
    assert rows[0]["text"] == "Red  circle." and rows[0]["expected"] == "red circle"
    one, two, every = summary(rows)
    assert (one["accuracy"], two["accuracy"], every["n"]) == (1.0, 0.0, 3) and "mean_iou" not in every
    assert model.options == {"image_folder": None, "batch_size": 16, "do_sample": False, "max_new_tokens": 5}
    question = Record.from_dict({"id": "q", "conversations": [{"from": "human", "value": "What?"}]})
    with pytest.raises(ValueError, match="'q'.*does not end in a gpt turn"):
        label_accuracy(Scripted("x"), [question], progress=False)


def test_summary_by_number_of_objects():
    rows = [
        {"objects": n, "hit": hit, "iou": float(hit)} for n, hit in ((3, True), (1, True), (3, False), (None, False))
    ]
    lines = summary(rows)
    assert [(line["objects"], line["n"], line["hits"]) for line in lines] == [
        (1, 1, 1),
        (3, 2, 1),
        (None, 1, 0),
        ("all", 4, 2),
    ]
    assert lines[1]["accuracy"] == 0.5 == lines[1]["mean_iou"]
    assert all(line["low"] <= line["accuracy"] <= line["high"] for line in lines)
    assert summary([]) == []


def test_wilson_known_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert all(wilson(0, n)[0] == 0.0 and wilson(n, n)[1] == 1.0 for n in range(1, 40))
    for hits, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no rate"):
            wilson(hits, n)


def test_with_the_golden_model(golden_model, golden_processor):
    ovis = Ovis25Inference(model=golden_model, processor=golden_processor)
    rows = grounding_accuracy(
        ovis,
        [record(HALF), record(FAR)],
        batch_size=2,
        progress=False,
        max_new_tokens=3,
        min_pixels=4096,
        max_pixels=16384,
    )
    assert [row["hit"] for row in rows] == [False, False]  # random weights write no box
    assert rows[0]["text"] == rows[1]["text"] != ""  # the same picture and question, whatever the expected box
