"""Reading what a model wrote: leniently, never by guess, in linear time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovisnb.data.boxes import format_box, format_point
from ovisnb.generate.answer import Answer, Box, parse


def test_box_with_ref_and_pixels():
    answer = parse("The <ref>red apple</ref> is here: <box>(0.100,0.200),(0.300,0.400)</box>.", (640, 480))
    assert answer.boxes == [Box(0.1, 0.2, 0.3, 0.4, label="red apple")]
    assert answer.boxes[0].pixels == pytest.approx((64.0, 96.0, 192.0, 192.0))
    assert tuple(answer.boxes[0]) == (0.1, 0.2, 0.3, 0.4)
    assert answer.points == [] and answer.problems == []


def test_point_with_pixels():
    answer = parse("<ref>star</ref><point>(0.250,0.500)</point>", (200, 100))
    assert [(p.x, p.y, p.label) for p in answer.points] == [(0.25, 0.5, "star")]
    assert answer.points[0].pixels == (50.0, 50.0)
    assert answer.boxes == []


def test_pixels_without_image_size_is_one_sentence():
    box = parse("<box>(0.1,0.2),(0.3,0.4)</box>").boxes[0]
    with pytest.raises(ValueError, match="knows no image size"):
        _ = box.pixels


def test_list_takes_the_label_of_the_ref_before_it():
    text = (
        "<ref>cat</ref>[<box>(0.1,0.1),(0.2,0.2)</box>, <box>(0.3,0.3),(0.4,0.4)</box>] and "
        "<ref>dog</ref><box>(0.5,0.5),(0.6,0.6)</box>"
    )
    assert [box.label for box in parse(text).boxes] == ["cat", "cat", "dog"]


def test_box_before_any_ref_has_no_label():
    assert [b.label for b in parse("<box>(0,0),(0.5,0.5)</box><ref>a</ref><box>(0,0),(0.1,0.1)</box>").boxes] == [
        None,
        "a",
    ]


@pytest.mark.parametrize(
    "written",
    [
        "<box>(0. 123,0.456),(0.7,0.8)</box>",  # seen: a space inside a number
        "<box>(0 .123, 0.456), (0.7 , 0.8)</box>",
        "<box>( 0.12 3 ,0.456),(0.7,0.8)</box>",
        "<box>[0.123,0.456,0.700,0.800]</box>",
        "<box>(0.123 0.456),(0.7 0.8)</box>",
        "<box>0. 123 0.456 0.7 0.8</box>",
        "<box>(0.123,0.456)(0.7,0.8)</box>",
        "<box>(0.123,0.456),(0.7,0.8)",  # closing tag missing
        "<box>(0.123,0.456),(0.7,0.8)</bo",  # closing tag cut
        "<box>(0.123,0.456),(0.7,0.8)\nThat is where it is, at 3 o'clock.",
        "<box>(0.123,0.456),(0.7,0.8</box>",  # parenthesis missing
        "< box >(.123,+0.456),(7e-1,0.8)</ box >",
        "<BOX>(0.123,0.456),(0.7,0.8)</BOX>",
        "<box>(0.123,0.456),(0.7,0.8)<box>",  # opened again instead of closed
    ],
)
def test_slips_are_read(written):
    assert parse(written).boxes[0] == Box(0.123, 0.456, 0.7, 0.8)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("<box>(0.1,0.2),(0.3,0.4", "cut off"),  # 0.4 may have been 0.49
        ("<box>(0.1,0.2),(0.3,0.", "cut off"),
        ("<box>", "cut off"),
        ("<box></box>", "0 numbers instead of 4"),
        ("<box>(0.1,0.2)</box>", "2 numbers instead of 4"),
        ("<box>(0.1,0.2),(0.3,0.4),(0.5,0.6)</box>", "6 numbers instead of 4"),
        ("<box>(100,200),(300,400)</box>", "outside"),  # thousandths or pixels: not for us to guess
        ("<box>(0.1,0.2),(0.3,1.001)</box>", "outside"),
        ("<box>(-0.1,0.2),(0.3,0.4)</box>", "outside"),
        ("<box>(nan,0.2),(0.3,0.4)</box>", "'nan' where a number"),
        ("<box>(inf,0.2),(0.3,0.4)</box>", "'inf' where a number"),
        ("<box>(1e999,0.2),(0.3,0.4)</box>", "outside"),
        ("<box>(1_0,0.2),(0.3,0.4)</box>", "where a number"),  # Python's float would take it for 10
        ("<box>(x1,y1),(x2,y2)</box>", "'x1' where a number"),
        ("<box>(0." + "1" * 500 + ",0.2),(0.3,0.4)</box>", "where a number"),
    ],
)
def test_what_is_uncertain_is_named_and_kept_out(written, problem):
    answer = parse(written)
    assert answer.boxes == []
    assert len(answer.problems) == 1 and problem in answer.problems[0] and "Box 1" in answer.problems[0]
    assert len(answer.problems[0]) < 250


def test_point_with_four_numbers_is_a_problem():
    answer = parse("<point>(0.1,0.2),(0.3,0.4)</point>")
    assert answer.points == [] and "Point 1 has 4 numbers instead of 2" in answer.problems[0]


def test_a_bad_box_does_not_hide_its_neighbours():
    answer = parse("<box>(0.1,0.1),(0.2,0.2)</box><box>(7,8),(9,10)</box><box>(0.3,0.3),(0.4,0.4)</box>")
    assert [box.x1 for box in answer.boxes] == [0.1, 0.3]
    assert len(answer.problems) == 1 and answer.problems[0].startswith("Box 2 ")


def test_swapped_corners_are_put_in_order_and_named():
    answer = parse("<box>(0.7,0.2),(0.1,0.6)</box>")
    assert answer.boxes == [Box(0.1, 0.2, 0.7, 0.6)]
    assert "swapped" in answer.problems[0]


def test_thinking_and_answer_tags():
    thinking = "<think>\nIt is at <box>(0.1,0.1),(0.2,0.2)</box>.\n</think>\n\n"
    text = thinking + "<answer> K </answer> <box>(0.3,0.3),(0.4,0.4)</box>"
    answer = parse(text)
    assert answer.thinking == "It is at <box>(0.1,0.1),(0.2,0.2)</box>."
    assert answer.answer == "K"
    assert [box.x1 for box in answer.boxes] == [0.3]  # the box of the thinking is no answer
    assert answer.text == text == str(answer) == answer["response"]
    assert answer["parsed"] == {"think_content": answer.thinking, "answer_content": "K"}


def test_labels_do_not_leak_out_of_the_thinking():
    assert parse("<think><ref>cat</ref></think><box>(0,0),(0.5,0.5)</box>").boxes[0].label is None


def test_without_thinking_the_answer_is_the_text():
    assert (parse(" A circle.\n").answer, parse(" A circle.\n").thinking) == ("A circle.", "")


def test_think_end_alone_as_with_a_prompt_that_opened_it():
    answer = parse("hm\n</think>\n\nTwelve")
    assert (answer.thinking, answer.answer) == ("hm", "Twelve")


def test_the_last_think_end_counts():
    assert parse("<think>a</think>b</think> c").answer == "c"


def test_thinking_cut_off():
    answer = parse("<think>It may be at <box>(0.1,0.1),(0.2,0.2)</box>, or")
    assert answer.thinking.startswith("It may be at") and answer.answer == ""
    assert len(answer.boxes) == 1  # no </think>: boxes are read from the whole text
    assert any("never closes it" in problem for problem in answer.problems)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So it is.\nFinal answer: 12", "12"),
        ("**Final Answer:** 12", "12"),
        ("final answer : a\nFinal answer: b", "b"),
        ("Final answer: 12 <answer>13</answer>", "13"),
        ("<answer>K", "K"),  # closing tag missing
        ("<answer>a</answer> no: <answer>b</answer>", "b"),
        ("<answer></answer>", ""),
        ("Final answer:", "Final answer:"),
        ("", ""),
    ],
)
def test_where_the_answer_is(text, expected):
    assert parse(text).answer == expected


def test_unknown_key_names_the_known_ones():
    with pytest.raises(KeyError, match="response.*parsed"):
        parse("x")["answer"]


def test_repr_is_short():
    answer = parse("<think>hm</think>" + "word " * 1000 + "<box>(0,0),(1,1)</box>")
    assert repr(answer).startswith("Answer('word word") and "1 box" in repr(answer) and len(repr(answer)) < 150
    assert repr(parse("<box>(0,0),(1,1)</box>" * 2 + "<point>(0,0)</point>")).endswith("2 boxes, 1 point)")
    assert repr(Answer(text="")) == "Answer('')"


@pytest.mark.parametrize(
    "text",
    [
        "<box>" * 20_000,
        "<" * 100_000,
        "< " * 50_000,
        "<" + " " * 100_000,
        "<box>(" + "0.5," * 10_000 + ")</box>",
        "<box>" + "(" * 100_000,
        "<box>" + "1" * 100_000,
        "<box>(0" + " " * 100_000 + ".5,0.1),(0.2,0.3)</box>",
        "<box>" + "0 " * 50_000 + "</box>",
        "<box>(0.1,0.1),(0.2,0.2)</box>" * 3_000,
        "<answer>" * 12_000,
        "final answer" * 8_000 + " " * 10_000,
        "<think>" * 14_000,
        "</think>" * 12_000,
        "<ref>" + "a" * 100_000 + "<box>(0,0),(1,1)</box>" * 100,
    ],
)
def test_time_is_linear(text):
    start = time.process_time()
    parse(text)
    assert time.process_time() - start < 2.0  # milliseconds when linear, minutes when quadratic


unit = st.floats(0, 1, exclude_max=True)


@given(st.lists(st.tuples(unit, unit, unit, unit), max_size=5), st.lists(st.tuples(unit, unit), max_size=5))
def test_what_is_written_strictly_reads_back(boxes, points):
    ordered = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in boxes]
    text = "[" + ",".join(map(format_box, ordered)) + "]" + ",".join(map(format_point, points))
    answer = parse(text, (100, 50))
    assert answer.problems == []
    assert len(answer.boxes) == len(ordered) and len(answer.points) == len(points)
    for found, wanted in [*zip(answer.boxes, ordered), *zip(answer.points, points)]:
        assert tuple(found) == pytest.approx(wanted, abs=0.001)  # 0.9996 is written 0.999: below 1


@given(st.text(alphabet="<>/boxrefpintha(),.[]0123456789 -e\n", max_size=200) | st.text(max_size=100))
def test_any_text_gives_only_valid_regions(text):
    answer = parse("<box>" + text)
    for box in answer.boxes:
        assert 0 <= box.x1 <= box.x2 <= 1 and 0 <= box.y1 <= box.y2 <= 1
    for point in answer.points:
        assert 0 <= point.x <= 1 and 0 <= point.y <= 1
    assert answer.text == "<box>" + text
