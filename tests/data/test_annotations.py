"""Annotation lines: one record a question, crops in braces, and the way back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import Media, Record, RecordError, open_media, read_records, write_records
from ovisnb.data.formats import read_entries

WIDTH, HEIGHT = 640, 480
ANSWER = (
    "<think>\nI look at the person.\n{Crop person [0.00, 141.43, 79.23, 480.00]}\nIt shows.\n</think>\n\n"
    "<answer>A dark jacket.</answer>"
)
LINE = {"image_path": "a.png", "QnA": [{"Q": "What is worn?", "A1": "jacket", "A3": ANSWER}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    Image.new("RGB", (WIDTH, HEIGHT)).save(path / "a.png")
    Image.new("RGB", (100, 50)).save(path / "b.png")
    return path


def asked(answer: str, **more) -> dict:
    return {"image_path": "a.png", "QnA": [{"Q": "What?", "A3": answer}], **more}


def read(path, *lines: dict, folder=None) -> list[Record]:
    path = path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return list(read_records(path, image_folder=folder))


def answer_of(record: Record) -> str:
    return record.turns[1].text


def test_a_line_becomes_a_record_for_each_question(tmp_path, folder):
    line = {**LINE, "QnA": [*LINE["QnA"], {"Q": "Who?", "A3": "Ann.", "id": "ann"}], "split": "train"}
    first, second = read(tmp_path, line, folder=folder)
    assert first.turns[0].text == "<image>\nWhat is worn?"
    assert answer_of(first) == (
        "<think>\nI look at the person.\n<tool_call>[0.00, 141.43, 79.23, 480.00]</tool_call><image>\nIt shows.\n</think>\n\n"
        "<answer>A dark jacket.</answer>"
    )
    assert first.images == [Media(path="a.png"), Media(path="a.png", box=(0, 141.43, 79.23, 480))]
    assert first.meta == {"A1": "jacket", "line": {"split": "train"}, "labels": ["person"]}
    assert (first.id, second.id) == ("train-0", "ann")
    assert first.source.endswith("train.jsonl:1") and first.call_coordinates == "pixels" and first.notes == ()
    assert answer_of(second) == "Ann." and len(second.images) == 1
    images, _ = open_media(first, folder)
    assert [image.size for image in images] == [(640, 480), (80, 339)]


def test_each_call_gets_its_own_crop(tmp_path):
    [record] = read(tmp_path, asked("{Crop cat [1, 2, 30, 40]} and {Crop [5,6,70,80]}{Identify dog [1,1,9,9]} end"))
    assert answer_of(record) == (
        "<tool_call>[1, 2, 30, 40]</tool_call><image> and <tool_call>[5, 6, 70, 80]</tool_call><image>"
        "<tool_call>Identify [1, 1, 9, 9]</tool_call> end"
    )
    assert [media.box for media in record.images] == [None, (1, 2, 30, 40), (5, 6, 70, 80)]
    assert record.meta["labels"] == ["cat", None, "dog"]


@pytest.mark.parametrize(
    ("written", "call"),
    [
        ("{Crop [1, 2, 30, 40]}", "[1, 2, 30, 40]"),
        ("{ crop person[ 1,2 ,30,  40 ] }", "[1, 2, 30, 40]"),
        ("{CROP the man on the left [1.50, 2.00, 30.25, 40.00]}", "[1.50, 2.00, 30.25, 40.00]"),
        ("{Crop person\n[1, 2, 3 0, 40]}", "[1, 2, 30, 40]"),
        ("{Crop: [1. 5, 2, 30, 40]}", "[1.50, 2.00, 30.00, 40.00]"),
        ("{Crop person [(1,2),(30,40)]}", "[1, 2, 30, 40]"),
    ],
)
def test_slips_are_read(tmp_path, written, call):
    [record] = read(tmp_path, asked(f"a {written} b"))
    assert answer_of(record) == f"a <tool_call>{call}</tool_call><image> b"


@pytest.mark.parametrize(
    "text",
    [
        "{crop, wheat}",
        r"\frac{1}{2} of {x}",
        "{Cropped [1,2,3]}",
        "{}",
        "{1, 2}",
        "{a} [1,2,3,4] {b}",
        "} [1,2,3,4] {",
        '[{"bbox_2d": [10, 20, 30, 40], "label": "a"}]',
        r"\boxed{[1, 2, 3, 4]}",
    ],
)
def test_other_braces_are_left_alone(tmp_path, text):
    [record] = read(tmp_path, asked(text))
    assert answer_of(record) == text


def test_a_box_partly_outside_is_cut_and_reported(tmp_path, folder):
    [record] = read(tmp_path, asked("{Crop man [-5, 300.5, 700, 500]} {Crop [1, 1, 2, 2]}"), folder=folder)
    assert answer_of(record).startswith("<tool_call>[0.00, 300.50, 640.00, 480.00]</tool_call><image> ")
    assert record.images[1].box == (0, 300.5, 640, 480)
    [note] = record.notes
    assert note.kind == "box_outside"
    assert "[-5.0, 300.5, 700.0, 500.0]" in note and "outside the picture of 640x480 pixels" in note
    assert "cut to [0, 300.5, 640, 480]" in note and "\n" not in note
    assert "notes" not in json.dumps(record.to_dict())


def test_without_the_picture_only_what_is_below_zero_is_cut(tmp_path):
    [record] = read(tmp_path, asked("{Crop [-5, 3, 7000, 5000]}"))
    assert record.images[1].box == (0, 3, 7000, 5000)
    assert "reaches outside the picture: it was cut to [0, 3, 7000, 5000]" in record.notes[0]


@pytest.mark.parametrize(("box", "kind"), [("[5, 5, 5, 9]", "empty_box"), ("[9, 5, 5, 9]", "inverted_box")])
def test_no_area_and_inverted_are_kinds_of_their_own(tmp_path, folder, box, kind):
    with pytest.raises(RecordError, match="has no area") as refusal:
        read(tmp_path, asked(f"{{Crop {box}}}"), folder=folder)
    assert refusal.value.kind == kind


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("{Crop [5, 5, 5, 9]}", "has no area"),
        ("{Crop [9, 5, 5, 9]}", "has no area"),  # turned inside out: which corner was meant is not ours to say
        ("{Crop [700, 5, 800, 9]}", "lies outside the picture of 640x480 pixels"),
        ("{Crop [-9, 5, -1, 9]}", "lies outside"),
        ("{Crop [1, 2, 3]}", "3 numbers instead of 4"),
        ("{Crop [1, 2, 3, nan]}", "'nan' where a number"),
        ("{Crop [1, 2, 3, 1e999]}", "outside every picture"),
        ("{Crop person 1, 2, 3, 4}", "no box"),
        ("{Crop person [1, 2, 3, 4]", "never closed"),
        ("{Crop person {big} [10,20,30,40]} b", "{Crop person {big} [10,20,30,40]} hold a box but are no call"),
        ('{"crop": [10,20,30,40]}', '{"crop": [10,20,30,40]} hold a box'),
        ("{'Crop': [10,20,30,40]}", "the braces {'Crop': [10,20,30,40]} hold a box"),
        ("{Crop [1,1,9,9]} {Zoom person [10. 5,20,30,40]}", "{Zoom person [10. 5,20,30,40]} hold a box"),
        ("{Crop [1.001, 1, 1.002, 5]} {Crop [639.999, 1, 700, 5]}", "x1 < x2"),  # nothing is left of the second
    ],
)
def test_what_is_no_box_is_an_error_with_its_line(tmp_path, folder, written, problem):
    with pytest.raises(RecordError) as refusal:
        read(tmp_path, LINE, asked(f"a {written} b"), folder=folder)
    sentence = str(refusal.value)
    assert problem in sentence and "train.jsonl:2" in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"image_path": 3, "QnA": []}, "`image_path` is the path"),
        ({"image_path": "a.png", "QnA": {}}, "`QnA` is a list"),
        ({"image_path": "a.png", "QnA": ["Q"]}, "question 1 of 'a.png': it is not of the form"),
        ({"image_path": "a.png", "QnA": [{"Q": "What?"}]}, "`A3` is missing"),
        ({"image_path": "a.png", "QnA": [{"Q": None, "A3": ""}]}, "`Q` is missing or no text"),
        ({"image_path": "a.png", "QnA": [{"Q": "", "A3": "", "image": "b"}]}, "`image` has a meaning of its own"),
        ({"image_path": "a.png", "QnA": [{"Q": "", "A3": "<image>"}]}, "`A3` holds <image>, and"),
        ({"image_path": "a.png", "QnA": [{"Q": "", "A3": "{Crop [1,1,9,9]}<image>"}]}, "writes a crop as {Crop label"),
        ({"image_path": "a.png", "QnA": []}, "`QnA` has no question: write one or drop the line"),
    ],
)
def test_lines_of_the_wrong_shape(tmp_path, line, problem):
    with pytest.raises(RecordError, match="train.jsonl:1") as refusal:
        read(tmp_path, line)
    assert problem in str(refusal.value)


def test_a_broken_question_leaves_its_neighbours(tmp_path):
    path = tmp_path / "train.jsonl"
    questions = [{"Q": "a", "A3": "b"}, {"Q": "a", "A3": "{Crop [1,1,1,1]}"}, {"Q": "c", "A3": "d"}]
    path.write_text(json.dumps({"image_path": "a.png", "QnA": questions}))
    found = list(read_entries(path))
    assert [row.problem is None for row in found] == [True, False, True]
    assert found[1].error.kind == "empty_box"
    assert {row.line for row in found} == {1} and found[1].problem.startswith("question 2 of 'a.png': the box")


def test_ids(tmp_path):
    questions = [{"Q": "a", "A3": "b"}, {"Q": "c", "A3": "d", "id": 12}]
    records = read(tmp_path, {"image_path": "a.png", "id": 7, "QnA": questions}, LINE)
    assert [record.id for record in records] == ["7-0", "12", "train-2"]


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>{}[]"), max_size=12)
labels = st.none() | st.text("abc é漢", min_size=1, max_size=8).map(str.strip).filter(bool)
ends = st.tuples(st.integers(0, 40), st.integers(50, 90))


@st.composite
def calls(draw):
    (x1, x2), (y1, y2) = draw(ends), draw(ends)
    box = draw(st.sampled_from([f"[{x1}, {y1}, {x2}, {y2}]", f"[{x1}.00, {y1}.25, {x2}.5, {y2}.125]"]))
    label = draw(labels)
    return f"{{{draw(st.sampled_from(['Crop', 'Identify']))}{' ' + label if label else ''} {box}}}"


answers = st.lists(words | calls(), max_size=6).map("".join)
questions = st.fixed_dictionaries(
    {"id": st.uuids().map(str), "Q": words, "A3": answers}, optional={"A1": words, "A2": st.none() | st.integers()}
)
lines = st.fixed_dictionaries(
    {"image_path": st.sampled_from(["a.png", "b c.png"]), "QnA": st.lists(questions, min_size=1, max_size=3)},
    optional={"id": words | st.integers(), "n": st.integers()},
)


@pytest.mark.parametrize("name", ["back.jsonl", "back.json"])
@given(written=st.lists(lines, min_size=1, max_size=4))
def test_there_and_back(tmp_path_factory, name, written):
    path = tmp_path_factory.mktemp("lines")
    (path / "train.jsonl").write_text("\n".join(map(json.dumps, written)))
    records = list(read_records(path / "train.jsonl"))
    back = write_records(records, path / name, format="annotations")
    text = back.read_text("utf-8")
    assert (
        json.loads(text) if name == "back.json" else [json.loads(line) for line in text.split("\n") if line]
    ) == written
    again = list(read_records(back))
    assert [record.to_dict() for record in again] == [record.to_dict() for record in records]


def test_records_of_the_tool_form_are_written_as_annotations(tmp_path):
    answer = "<tool_call>Crop man [1, 2, 30, 40]</tool_call><image> <tool_call>Identify [1,2,3,4]</tool_call><tool_response>Al</tool_response>"
    talk = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": answer}]
    record = Record.from_dict({"id": "x", "image": "a.png", "kind": "tool", "conversations": talk})
    path = write_records([record, record], tmp_path / "out.jsonl", format="annotations")
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == second  # records that come from no line get one each
    assert first["QnA"] == [
        {
            "id": "x",
            "Q": "Who?",
            "A3": "{Crop man [1, 2, 30, 40]} {Identify [1,2,3,4]}<tool_response>Al</tool_response>",
            "kind": "tool",
        }
    ]
    back = next(read_records(path))
    assert back.images == record.images and back.kind == "tool"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": ["a.png", "b.png"], "conversations": [("human", "<image><image>"), ("gpt", "")]}, "one picture and"),
        ({"conversations": [("human", "<image>")]}, "not one question"),
        ({"image": None, "conversations": [("human", "Hi"), ("gpt", "Ho")]}, "not one question"),
        ({"call_coordinates": "thousand"}, "hold thousand, not pixels"),
        ({"image": [{"path": "a.png", "box": [1, 2, 3, 4]}]}, "not a whole file"),
        ({"conversations": [("human", "<image>"), ("gpt", "<tool_call>[1,2,3,4]</tool_call>")]}, "one picture and"),
        ({"conversations": [("human", "<image>"), ("gpt", "{Crop [1,2,3,4]}")]}, "braces that would be read as a call"),
        ({"Q": 1}, "`meta` holds 'Q'"),
        ({"labels": ["{"]}, "`labels`"),
        ({"line": 3}, "`line`"),
    ],
)
def test_what_is_no_annotation(tmp_path, change, reason):
    data = {"id": "x", "image": "a.png", "conversations": [("human", "<image>\nWho?"), ("gpt", "Ann")], **change}
    data["conversations"] = [{"from": role, "value": text} for role, text in data["conversations"]]
    with pytest.raises(RecordError, match="record 'x' cannot be written as an annotation") as refusal:
        write_records([Record.from_dict(data)], tmp_path / "out.jsonl", format="annotations")
    assert reason in str(refusal.value)


@given(st.text(max_size=60) | st.text("{Crop Identify[]0123456789,.-}<tool_cal>/mage ", max_size=80))
def test_any_answer_is_read_or_refused_in_words(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(asked(text)))
    try:
        [record] = read_records(path)
    except RecordError as error:
        assert "any.jsonl:1" in str(error)
    else:
        try:
            write_records([record], path.with_name("out.jsonl"), format="annotations")
        except RecordError as error:
            assert "cannot be written as an annotation" in str(error)
