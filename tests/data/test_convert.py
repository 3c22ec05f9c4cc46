"""Conventions and formats converted: explicit, there and back, the input untouched."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import Media, Record, RecordError, boxes, markup, open_media, read_records, write_records
from ovisnb.data.convert import convert_file, convert_record
from ovisnb.data.media import ImageFolder

SIZE = (640, 480)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    Image.new("RGB", SIZE).save(path / "a.png")
    Image.new("RGB", (100, 50)).save(path / "b.png")
    Image.new("RGB", SIZE).save(path / "c.png")
    return path


def talk(*texts: str, image="a.png", **more) -> Record:
    turns = [{"from": role, "value": text} for role, text in zip(("human", "gpt", "human", "gpt"), texts)]
    return Record.from_dict({"id": "x", "image": image, "conversations": turns, **more})


def texts(record: Record) -> list[str]:
    return [turn.text for turn in record.turns]


def test_boxes_and_calls(folder):
    record = talk(
        "<image>\nWhat is in <box>(0.100,0.200),(0.300,0.400)</box>?",
        "<tool_call>Crop cat [64, 96, 192, 192]</tool_call><image>At <ref>cat</ref><point>(0.5,0. 25)</point>.",
    )
    pixels = convert_record(record, boxes="pixels", image_folder=folder)
    assert texts(pixels) == [
        "<image>\nWhat is in <box>(64,96),(192,192)</box>?",
        "<tool_call>Crop cat [64, 96, 192, 192]</tool_call><image>At <ref>cat</ref><point>(320,120)</point>.",
    ]
    assert (pixels.box_coordinates, pixels.call_coordinates) == ("pixels", "pixels")
    both = convert_record(pixels, boxes="thousand", calls="thousand", image_folder=folder)
    assert texts(both) == [
        "<image>\nWhat is in <box>(100,200),(300,400)</box>?",
        "<tool_call>Crop cat [100, 200, 300, 400]</tool_call><image>At <ref>cat</ref><point>(500,250)</point>.",
    ]
    assert both.images == [Media(path="a.png"), Media(path="a.png", box=(100, 200, 300, 400), coordinates="thousand")]
    assert open_media(both, folder)[0][1].size == open_media(record, folder)[0][1].size == (128, 96)
    assert Record.from_dict(both.to_dict()).to_dict() == both.to_dict()
    back = convert_record(both, boxes="normalised", calls="pixels", image_folder=folder)
    assert texts(back)[0] == texts(record)[0] and back.images == record.images
    assert convert_record(record, boxes="normalised", calls="pixels") is record  # nothing to do, nothing touched


def test_pixels_are_only_needed_where_pixels_come_in(folder):
    record = talk("<image>", "<box>(0.1,0.2),(0.3,0.4)</box>", image="gone.png")
    assert texts(convert_record(record, boxes="thousand"))[1] == "<box>(100,200),(300,400)</box>"
    with pytest.raises(RecordError, match="record 'x': .*there is no picture at") as refusal:
        convert_record(record, boxes="pixels", image_folder=folder)
    assert "\n" not in str(refusal.value)


def test_several_pictures(folder):
    answer = "<box>(0.1,0.2),(0.3,0.4)</box><tool_call>[10,10,50,50]</tool_call><image>"
    same = talk("<image><image>", answer, image=["a.png", "c.png"])
    assert "<box>(64,96),(192,192)</box>" in texts(convert_record(same, boxes="pixels", image_folder=folder))[1]
    other = talk("<image><image>", answer, image=["a.png", "b.png"])
    with pytest.raises(RecordError, match="the sizes 100x50, 640x480, and nothing says which of them a box is in"):
        convert_record(other, boxes="pixels", image_folder=folder)
    # A call counts in the last whole picture before it, as its crop is cut from that.
    moved = convert_record(other, calls="thousand", image_folder=folder)
    assert "[100, 200, 500, 1000]" in texts(moved)[1]
    assert moved.images[2] == Media(path="b.png", box=(100, 200, 500, 1000), coordinates="thousand")


def test_the_same_box_in_two_pictures_keeps_its_two_crops(folder):
    call = "<tool_call>[10,10,50,50]</tool_call><image>"
    record = talk("<image>", call, "<image>", call, image=["a.png", "b.png"])
    moved = convert_record(record, calls="normalised", image_folder=folder)
    assert [media.box for media in moved.images if media.box] == [(0.016, 0.021, 0.078, 0.104), (0.1, 0.2, 0.5, 0.999)]


def test_a_video_has_a_size(folder):
    frames = {"image": None, "video": ["a.png", "c.png"]}
    record = talk("<video>", "<box>(0.1,0.2),(0.3,0.4)</box>", **frames)
    assert texts(convert_record(record, boxes="pixels", image_folder=folder))[1] == "<box>(64,96),(192,192)</box>"


@pytest.mark.parametrize(
    ("record", "target", "problem"),
    [
        (talk("<image>", "<box>(0.1,0.2)</box>"), {"boxes": "pixels"}, "turn 2: the box has 2 numbers instead of 4"),
        (talk("<image>", "<box>(64,96),(192,192)</box>"), {"boxes": "thousand"}, "turn 2: .* but got 64"),
        (
            talk("<image>", "<box>(221,423),(569,886)</box>"),
            {"boxes": "pixels"},
            "but got 221, .*`box_coordinates`",
        ),
        (
            talk("<image>", "<box>(0.1,0.1),(0.5,0.5)</box>", box_coordinates="thousand"),
            {"boxes": "pixels"},
            "turn 2: a box or point is .*, which are shares of a picture",
        ),
        (talk("<image>", "<tool_call>[0,0,1,1]</tool_call>"), {"calls": "thousand"}, "which are shares of a picture"),
        (talk("<image>", "<tool_call>[1,2]</tool_call>"), {"calls": "thousand"}, "turn 2: the tool call has 2 numbers"),
        (
            talk("Hi", "<tool_call>[1,2,3,4]</tool_call>", image=None),
            {"calls": "thousand"},
            "no picture before the call",
        ),
        (talk("Hi", "<point>(0.1,0.1)</point>", image=None), {"boxes": "pixels"}, "no whole picture"),
        (
            talk("<image>", "<tool_call>[1,1,1.1,2]</tool_call><image>"),
            {"calls": "thousand"},
            "too small to be written",
        ),
        (
            talk("<image>", "<box>(0,0),(1,1)</box>"),
            {"boxes": "percent"},
            "pixels, normalised or thousand, not 'percent'",
        ),
    ],
)
def test_what_cannot_be_converted(folder, record, target, problem):
    with pytest.raises(RecordError, match=f"record 'x': .*{problem}"):
        convert_record(record, image_folder=folder, **target)


def test_questions_may_explain_the_form(folder):
    record = talk("<image>Write <box>(x1,y1),(x2,y2)</box> or <tool_call>Crop [x1,y1,x2,y2]</tool_call>.", "No.")
    moved = convert_record(record, boxes="thousand", calls="thousand", image_folder=folder)
    assert texts(moved) == texts(record) and moved.box_coordinates == "thousand"


unit = st.integers(0, 999).map(lambda n: n / 1000)
spans = st.tuples(st.integers(0, 400), st.integers(450, 1000)).map(lambda span: (span[0] / 1000, span[1] / 1000))


@given(spans, spans, st.tuples(unit, unit), *[st.sampled_from(boxes.CONVENTIONS)] * 3)
def test_there_and_back_within_the_written_precision(folder, across, down, point, of, to, calls):
    box = boxes.convert((across[0], down[0], across[1], down[1]), "normalised", of, SIZE)
    at = boxes.convert_point(point, "normalised", of, SIZE)
    numbers = boxes.write_numbers(box, of)
    text = (
        f"<box>({numbers[0]},{numbers[1]}),({numbers[2]},{numbers[3]})</box>"
        f"<point>({','.join(boxes.write_numbers(at, of))})</point>{markup.write_call('crop', numbers)}<image>"
    )
    record = talk("<image>", text, box_coordinates=of, call_coordinates=of)
    there = convert_record(record, boxes=to, calls=calls, image_folder=folder)
    back = convert_record(there, boxes=of, calls=of, image_folder=folder)
    assert (back.box_coordinates, back.call_coordinates) == (of, of)
    step = 2 * 0.0011  # a share of the picture: the coarsest last digit, on the way there and on the way back
    for one, other in zip(markup.regions(back.turns[1].text), markup.regions(text)):
        for a, b in zip(one.numbers, other.numbers):
            side = max(SIZE) if of == "pixels" else 1000 if of == "thousand" else 1
            assert abs(a - b) <= step * side
    [call] = markup.calls(back.turns[1].text)
    assert back.images[1].box == call.numbers and back.images[1].coordinates == of
    assert back.turns[0] == record.turns[0]
    if of == to == calls:
        assert back == record


pieces = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<box>",
        "</box>",
        "<point>",
        "</point>",
        "<ref>",
        "[1,2,3,4]",
        "(0.1,0.2),(0.3,0.4)",
    ]
)


@given(st.lists(pieces | st.text(max_size=8), max_size=10).map("".join), st.sampled_from(boxes.CONVENTIONS))
def test_any_text_is_converted_or_refused_in_words(folder, text, to):
    for role in ("human", "gpt"):
        turns = [{"from": "human", "value": "<image>"}, {"from": role, "value": text}]
        try:
            record = Record.from_dict({"id": "x", "image": "a.png", "conversations": turns})
            there = convert_record(record, boxes=to, calls=to, image_folder=folder)
        except RecordError as error:
            assert str(error).startswith("record 'x': ")
        else:
            found = markup.calls(there.turns[1].text), markup.calls(text)
            assert [call.numbers is None for call in found[0]] == [call.numbers is None for call in found[1]]


ANNOTATION = {"image_path": "a.png", "QnA": [{"Q": "What?", "A3": "{Crop cat [-64, 96, 192, 192]} It is a cat."}]}


def test_a_file_is_converted_and_left_alone(tmp_path, folder):
    src = tmp_path / "train.jsonl"
    src.write_text("\n".join([json.dumps(ANNOTATION)] * 2))
    before = src.read_bytes()
    done = convert_file(src, tmp_path / "records.json", calls="thousand", image_folder=folder)
    assert (done.path, done.records) == (tmp_path / "records.json", 2)
    assert len(done.notes) == 2 and "record 'train-0'" in done.notes[0] and "train.jsonl:1" in done.notes[0]
    record, _ = read_records(done.path, image_folder=folder)
    assert record.turns[1].text == "<tool_call>[0, 200, 300, 400]</tool_call><image> It is a cat."
    assert record.call_coordinates == "thousand" and record.notes == ()
    back = convert_file(done.path, tmp_path / "back.jsonl", to="annotations", calls="pixels", image_folder=folder)
    lines = [json.loads(line) for line in back.path.read_text().splitlines()]
    assert lines[0]["QnA"][0]["A3"] == "{Crop cat [0, 96, 192, 192]} It is a cat."
    assert src.read_bytes() == before


def test_a_file_is_not_written_over_itself(tmp_path):
    src = tmp_path / "train.jsonl"
    src.write_text(json.dumps(ANNOTATION))
    (tmp_path / "link.jsonl").symlink_to(src)
    for dst in (src, tmp_path / "link.jsonl"):
        with pytest.raises(RecordError, match="is one of the files that are read: give another name"):
            convert_file(src, dst)
    assert json.loads(src.read_text()) == ANNOTATION


def test_a_broken_record_leaves_no_file(tmp_path):
    src, dst = tmp_path / "train.jsonl", tmp_path / "out.json"
    src.write_text(json.dumps(ANNOTATION) + "\n{")
    with pytest.raises(RecordError, match="train.jsonl:2: broken JSON"):
        convert_file(src, dst)
    assert [file.name for file in tmp_path.iterdir()] == ["train.jsonl"]
    with pytest.raises(RecordError, match="the format 'pdf' is unknown"):
        convert_file(src, dst, to="pdf")
    with pytest.raises(ValueError, match="not 'percent'"):
        convert_file(src, dst, boxes="percent")


def test_boxes_in_no_tag_are_told(tmp_path, folder):
    src = tmp_path / "train.jsonl"
    answers = ['```json\n[{"bbox_2d": [10,20,300,400]}]\n```', "{<22><42><56><88>}", "It is (1), not (2).", "A cat."]
    src.write_text("\n".join(json.dumps(talk("<image>", answer).to_dict()) for answer in answers))
    [note] = convert_file(src, tmp_path / "out.json", boxes="normalised", image_folder=folder).notes
    assert note.startswith("no box was found in 2 answers that hold what looks like one (record 'x' (")
    assert "train.jsonl:1): [10,20,300,400]): write boxes as <box>" in note
    assert not convert_file(src, tmp_path / "out.json", image_folder=folder).notes


def test_pictures_inside_a_file_become_files(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "JPEG")
    answer = "<tool_call>[1,2,30,20]</tool_call><image>"
    record = talk("<image>", answer, image={"bytes": buffer.getvalue(), "path": "x.jpg"})
    src = write_records([record], tmp_path / "in.parquet")
    with pytest.raises(RecordError, match="record 'x' .* cannot be written as JSON"):
        convert_file(src, tmp_path / "out.json")
    convert_file(src, tmp_path / "out.json", pictures=tmp_path / "pictures")
    [file] = (tmp_path / "pictures").iterdir()
    assert file.suffix == ".jpg" and file.read_bytes() == buffer.getvalue()
    [back] = read_records(tmp_path / "out.json")
    assert [image.size for image in open_media(back, tmp_path / "pictures")[0]] == [(40, 30), (29, 18)]
    assert texts(back) == texts(record)
    convert_file(
        tmp_path / "out.json", tmp_path / "again.parquet", calls="thousand", image_folder=tmp_path / "pictures"
    )
    assert next(read_records(tmp_path / "again.parquet")).call_coordinates == "thousand"


def test_a_folder_of_its_own_goes_into_the_paths(tmp_path, folder):
    (tmp_path / "part.jsonl").write_text(json.dumps(talk("<image>", "A cat.").to_dict()))
    info = tmp_path / "sets.json"
    info.write_text(json.dumps({"cats": {"meta_file": "part.jsonl", "image_dir": str(folder)}}))
    convert_file(info, tmp_path / "out.jsonl", image_folder=folder.parent)
    [back] = read_records(tmp_path / "out.jsonl")
    assert back.images == [Media(path=f"{folder.name}/a.png")]
    assert open_media(back, folder.parent)[0][0].size == SIZE
    with pytest.raises(RecordError, match="part.jsonl is one of the files that are read"):
        convert_file(info, tmp_path / "part.jsonl")


def test_a_folder_outside_the_image_folder_is_written_as_a_whole_path(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("part.jsonl").write_text(json.dumps(talk("<image>", "A cat.").to_dict()))
    Path("sets.json").write_text(
        json.dumps({"cats": {"meta_file": "part.jsonl", "image_dir": os.path.relpath(folder)}})
    )
    Path("elsewhere").mkdir()
    convert_file("sets.json", "out.jsonl", image_folder="elsewhere")
    [back] = read_records("out.jsonl")  # from the image folder, a path from the current folder would lead nowhere
    assert open_media(back, ImageFolder("elsewhere", allow_absolute=True))[0][0].size == SIZE
