"""What is drawn on a picture: every convention in its place, and in words what has none."""

from __future__ import annotations

import pytest

from ovisnb.data import Record
from ovisnb.show.marks import MOST, marks_on

SIZE = (200, 100)


def record(answer: str, question: str = "<image>", images=("a.png",), **more) -> Record:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return Record.from_dict({"id": "test", "image": list(images), "conversations": turns, **more})


@pytest.mark.parametrize(
    ("convention", "text"),
    [
        ("normalised", "<box>(0.1,0.2),(0.5,0.4)</box><point>(0.5,0.5)</point>"),
        ("pixels", "<box>(20,20),(100,40)</box><point>(100,50)</point>"),
        ("thousand", "<box>(100,200),(500,400)</box><point>(500,500)</point>"),
    ],
)
def test_every_convention_is_drawn_where_it_lies(convention, text):
    marks = marks_on(record(f"<ref>it</ref>{text}", box_coordinates=convention), 0, SIZE)
    assert tuple(marks.boxes[0]) == pytest.approx((0.1, 0.2, 0.5, 0.4))
    assert tuple(marks.points[0]) == pytest.approx((0.5, 0.5))
    assert {marks.boxes[0].label, marks.points[0].label} == {"it"} and not marks.left_out


@pytest.mark.parametrize(("convention", "numbers"), [("pixels", "20, 20, 100, 40"), ("thousand", "100, 200, 500, 400")])
def test_calls_are_drawn_with_their_label_and_a_crop_only_once(convention, numbers):
    crop = f"<tool_call>Crop name tag [{numbers}]</tool_call><image>"
    identify = f"<tool_call>Identify [{numbers}]</tool_call><tool_response>a tag</tool_response>"
    marks = marks_on(record(crop + identify, call_coordinates=convention), 0, SIZE)
    assert sorted(box.label for box in marks.boxes) == ["crop name tag", "identify"]
    assert all(tuple(box) == pytest.approx((0.1, 0.2, 0.5, 0.4)) for box in marks.boxes)
    assert marks_on(record(crop, call_coordinates=convention), 1, (80, 20)).boxes == []


def test_a_question_that_points_is_drawn_too():
    marks = marks_on(record("A cat.", "<image>What is in <box>(0.1,0.2),(0.5,0.4)</box>?"), 0, SIZE)
    assert len(marks.boxes) == 1


def test_what_thinking_and_answer_both_say_is_drawn_once():
    box = "<ref>it</ref><box>(0.1,0.2),(0.5,0.4)</box>"
    assert len(marks_on(record(f"<think>{box}</think>{box}"), 0, SIZE).boxes) == 1


def test_with_several_pictures_no_box_is_drawn_on_the_wrong_one():
    box = {"path": "b.png", "box": [20, 20, 100, 40]}
    two = record("<box>(0.1,0.1),(0.5,0.5)</box>", "<image><image><image>", ["a.png", "b.png", box])
    first, second = marks_on(two, 0, SIZE), marks_on(two, 1, SIZE)
    assert first.boxes == [] and [b.label for b in second.boxes] == ["crop"]
    assert first.left_out == ["1 box or point is not drawn: with several pictures the text does not say which is meant"]


def test_boxes_are_cut_to_the_picture_and_turned_the_right_way_round():
    marks = marks_on(record("<box>(0.5,0.4),(-0.1,0.2)</box><box>(0.5,0.5),(30,30)</box>"), 0, SIZE)
    assert [tuple(box) for box in marks.boxes] == [(0, 0.2, 0.5, 0.4), (0.5, 0.5, 1, 1)]


def test_what_cannot_be_drawn_is_said():
    text = "<box>(300,300),(400,400)</box><box>(0.1,0.2)</box><point>(7,8)</point><tool_call>Crop [1]</tool_call>"
    left = marks_on(record(text), 0, SIZE).left_out
    assert left == [
        "not drawn: a box without area inside the picture",
        "not drawn: the box has 2 numbers instead of 4: '(0.1,0.2)'",
        "not drawn: a point outside the picture",
        "not drawn: the tool call has 1 numbers instead of 4: '1'",
    ]


def test_a_label_is_one_short_line():
    marks = marks_on(record(f"<ref>a\n\u202eb{'c' * 500}</ref><box>(0.1,0.2),(0.5,0.4)</box>"), 0, SIZE)
    assert marks.boxes[0].label.startswith("a⟨U+000A⟩⟨U+202E⟩bccc") and len(marks.boxes[0].label) < 80


def test_of_very_many_boxes_some_are_drawn():
    many = "".join(f"<box>(0.1,0.2),(0.5,{0.4 + at / 1000})</box>" for at in range(MOST + 40))
    marks = marks_on(record(many), 0, SIZE)
    assert len(marks.boxes) == MOST and marks.left_out == ["40 more boxes are not drawn"]
