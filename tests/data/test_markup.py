"""The grammar of a turn's text: read leniently, never by guess, never an exception, in linear time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovisnb.data import markup
from ovisnb.data.boxes import format_box, format_point, write_numbers
from ovisnb.data.markup import annotation_calls, calls, regions, unclosed


def call(inside: str) -> markup.Call:
    [found] = calls(f"a <tool_call>{inside}</tool_call> b")
    return found


@pytest.mark.parametrize(
    ("inside", "name", "label"),
    [
        ("[10, 20, 100, 200]", "crop", None),
        ("Crop [10,20,100,200]", "crop", None),
        ("Crop person [10, 20, 100, 200]", "crop", "person"),
        ("Crop the man on the left [10, 20, 100, 200]", "crop", "the man on the left"),
        ("Identify [10,20,100,200]", "identify", None),
        ("  cROP\n[ 10 ,20.0, 1e2 ,200 ] ", "crop", None),
        ("Crop: [10, 20, 100, 200]", "crop", None),
        ("Crop[(10,20),(100,200)]", "crop", None),
        ("[10 20 100 200]", "crop", None),
        ("[10, 2 0, 100, 200]", "crop", None),
        ("[10. 0, 20, 100, 200]", "crop", None),
        ("[10, 20, 100, 200", "crop", None),
        ("Crop 人 [+10, 20, 100, 200]", "crop", "人"),
    ],
)
def test_calls_are_read(inside, name, label):
    found = call(inside)
    assert found.numbers == (10, 20, 100, 200) and found.problem is None
    assert (found.name, found.label, found.text) == (name, label, inside)


@pytest.mark.parametrize(
    ("inside", "problem"),
    [
        ("", "no box"),
        ("Crop", "no box"),
        ("Crop person 1, 2, 3, 4", "no box"),
        ("[]", "0 numbers instead of 4"),
        ("[1, 2, 3]", "3 numbers instead of 4"),
        ("[1,2,3,4],[5,6,7,8]", "8 numbers"),
        ("[1, 2, 3, nan]", "'nan' where a number"),
        ("[1, 2, 3, inf]", "'inf' where a number"),
        ("[1, 2, 3, 1e999]", "outside every picture"),
        ("[x1, y1, x2, y2]", "'x1' where a number"),
        ("[1_0, 2, 3, 4]", "where a number"),
        ("[1, 2, 3, 4] please", "goes on after its box"),
        ("Zoom [1, 2, 3, 4]", "begins with 'Zoom'"),
        ('{"name": "crop", "arguments": {}}', "not with Crop, Identify or a box"),
        ("[" + "1," * 10_000 + "]", "10000 numbers instead of 4"),
        ("[" + "9" * 5_000 + ",2,3,4]", "where a number"),
    ],
)
def test_what_is_no_call_is_named(inside, problem):
    found = call(inside)
    assert found.numbers is None and problem in found.problem
    assert "\n" not in found.problem and len(found.problem) < 250


def test_calls_know_their_places():
    text = "x<tool_call>[1,2,3,4]</tool_call><image>y< Tool_Call >Identify [1,2,3,4]</ tool_call>z"
    assert [text[found.start : found.end] for found in calls(text)] == [
        "<tool_call>[1,2,3,4]</tool_call>",
        "< Tool_Call >Identify [1,2,3,4]</ tool_call>",
    ]


def test_calls_that_are_not_closed():
    text = "<tool_call>[1,2,3,4]<tool_call>[1,2,3,4]</tool_call></tool_call><tool_call>[1,2,3"
    found = calls(text)
    assert [one.problem is None for one in found] == [False, True, False]
    assert "never closed" in found[0].problem and "never closed: '[1,2,3'" in found[2].problem
    assert text[found[0].start : found[0].end] == "<tool_call>[1,2,3,4]"


@given(
    st.sampled_from(markup.TOOLS),
    st.tuples(*[st.floats(0, 20_000)] * 4),
    st.none() | st.text("ab é漢:,.'1", min_size=1, max_size=9).map(str.strip).filter(bool),
)
def test_what_is_written_is_read(name, numbers, label):
    found = calls(markup.write_call(name, write_numbers(numbers, "pixels"), label))
    assert [(one.name, one.label, one.problem) for one in found] == [(name, label, None)]
    assert found[0].numbers == pytest.approx(numbers, abs=0.006)


def test_annotation_calls():
    text = (
        "{Crop person [0.00, 141.43, 79.23, 480.00]} { crop [1,2,3,4] }{Identify[1, 2,3,4]} {crop, wheat} {Cropped [1]}"
    )
    found = annotation_calls(text)
    assert [(one.name, one.label, one.numbers) for one in found] == [
        ("crop", "person", (0, 141.43, 79.23, 480)),
        ("crop", None, (1, 2, 3, 4)),
        ("identify", None, (1, 2, 3, 4)),
    ]
    assert [text[one.start] + text[one.end - 1] for one in found] == ["{}"] * 3
    [cut] = annotation_calls("{Crop person [1, 2, 3, 4]")
    assert cut.numbers is None and "never closed" in cut.problem


def test_regions():
    text = "<ref> cat </ref>[<box>(0.1,0.2),(0.3,0.4)</box>,<box>(1,2)</box>] <point>(500,20)</point>"
    found = regions(text)
    assert [(one.kind, one.label, one.numbers) for one in found] == [
        ("ref", "cat", None),
        ("box", "cat", (0.1, 0.2, 0.3, 0.4)),
        ("box", "cat", None),
        ("point", "cat", (500, 20)),
    ]
    assert [text[one.start : one.end] for one in found][1] == "<box>(0.1,0.2),(0.3,0.4)</box>"
    assert found[2].problem == "the box has 2 numbers instead of 4: '(1,2)'" and found[1].problem is None
    [cut] = regions("x<box>(0.1,0.2),(0.3,0.4) then")
    assert "x<box>(0.1,0.2),(0.3,0.4) then"[cut.start : cut.end].strip() == "<box>(0.1,0.2),(0.3,0.4)"


@pytest.mark.parametrize(
    ("text", "loose"),
    [
        ("<think>a</think><answer>b</answer>", []),
        ("<think><tool_call>[1,2,3,4]</tool_call><tool_response>x</tool_response></think>", []),
        ("<think>a", ["<think>@0"]),
        ("a</answer>", ["</answer>@1"]),
        ("<think><box></think></box>", ["<box>@7", "</box>@20"]),
        ("<answer><answer>a</answer>", ["<answer>@0"]),
        ("<think>a</think>b</think>", ["</think>@17"]),
        ("< THINK >a</ think >", []),
        ("<b>bold</i> 1 < 2 <image><video>", []),
    ],
)
def test_unclosed(text, loose):
    found = unclosed(text)
    assert [f"<{'/' * tag.closing}{tag.name}>@{tag.start}" for tag in found] == loose
    for tag in found:
        assert tag.problem.endswith("closes nothing" if tag.closing else "is never closed")
        assert f"character {tag.start}" in tag.problem


HOSTILE = [
    "<tool_call>" * 9_100,
    "</tool_call>" * 9_100,
    "<tool_call>[" + "1," * 50_000 + "]</tool_call>",
    "<tool_call>[1,2,3,4]</tool_call>" * 3_000,
    "<tool_call>" + "[" * 100_000 + "</tool_call>",
    "<tool_call>" + "]" * 100_000,
    "<tool_call>" + "a " * 50_000 + "</tool_call>",
    "<tool_call>[0" + " " * 100_000 + ".5,1,2,3]</tool_call>",
    "{crop" * 20_000,
    "{crop [1" * 12_000,
    "{" + " " * 100_000,
    "{ " * 50_000,
    "{crop " + "a " * 50_000,
    "{Crop [" + "1" * 100_000 + "]}",
    "<" * 100_000,
    "< /" * 33_000,
    "<" + " " * 100_000 + "think>",
    "<think>" * 14_000,
    "<think><box>" * 4_000 + "</think>" * 4_000,
    "<think>" * 7_000 + "</box>" * 7_000,
    "<box>" * 20_000,
    "<ref>" + "a" * 100_000 + "<box>(0,0),(1,1)</box>" * 100,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_work_is_linear(text):
    start = time.process_time()
    for read in (calls, annotation_calls, regions, unclosed):
        read(text)
    assert time.process_time() - start < 2.0  # milliseconds when linear, minutes when quadratic


pieces = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "<box>",
        "</box>",
        "<ref>",
        "</ref>",
        "<point>",
        "{Crop ",
        "}",
    ]
)
hostile = st.lists(pieces | st.text(max_size=9) | st.text("[](),.0123456789 -+e", max_size=30), max_size=12).map(
    "".join
)


@given(hostile | st.text())
def test_any_text_is_read(text):
    for one in [*calls(text), *annotation_calls(text)]:
        assert 0 <= one.start < one.end <= len(text) and one.text in text[one.start : one.end]
        assert (one.numbers is None) == (one.problem is not None)
        assert one.numbers is None or len(one.numbers) == 4
    for one in regions(text):
        assert 0 <= one.start < one.end <= len(text)
        assert (one.kind == "ref") + (one.numbers is not None) + (one.fault is not None) == 1
    found = unclosed(text)
    assert found == sorted(found) and all(text[tag.start] == "<" and text[tag.end - 1] == ">" for tag in found)


@given(st.lists(st.sampled_from(markup.PAIRED), max_size=6), st.data())
def test_balanced_text_has_nothing_loose_and_cutting_a_tag_shows(names, data):
    text = "".join(f"<{name}>" for name in names) + "x" + "".join(f"</{name}>" for name in reversed(names))
    assert unclosed(text) == []
    if names:
        gone = data.draw(st.sampled_from(list(markup.tags_in(text))))
        assert unclosed(text[: gone.start] + text[gone.end :])


unit = st.floats(0, 1, exclude_max=True)


@given(st.lists(st.tuples(unit, unit, unit, unit), max_size=5), st.lists(st.tuples(unit, unit), max_size=5))
def test_grounding_reads_back(boxes, points):
    found = regions(",".join([*map(format_box, boxes), *map(format_point, points)]))
    assert [len(one.numbers) for one in found] == [4] * len(boxes) + [2] * len(points)
    for one, numbers in zip(found, [*boxes, *points]):
        assert one.numbers == pytest.approx(numbers, abs=0.001)


@pytest.mark.parametrize(
    "text, found",
    [
        ('[{"bbox_2d": [10, 20, 300, 400]}]', "[10, 20, 300, 400]"),
        ("{<22><42><56><88>}", "<22><42><56><88>"),
        ("<|box_start|>(221,423), (569,886)<|box_end|>", "(221,423), (569,886)"),
        ("at [0.1,0.2,0.3,0.4].", "[0.1,0.2,0.3,0.4]"),
        ("<bbox>150,300,450,700</bbox>", ">150,300,450,700<"),
        ("<loc0300><loc0100><loc0900><loc0700> cat", "<loc0300><loc0100><loc0900><loc0700>"),
        ('<point x="10.5" y="20.0" alt="cup">cup</point>', '<point x="10.5" y="20.0" alt="cup">'),
        ("<point>(0.1,0.2)</point>", None),
        ("<box>(0.1,0.2),(0.3,0.4)</box>", None),
        ("<tool_call>[1,2,3,4]</tool_call>", None),
        ("from 10, 20, 30 to 40", None),
        ("[1, 2, 3]", None),
    ],
)
def test_boxes_of_other_models(text, found):
    assert markup.foreign_box(text) == found
