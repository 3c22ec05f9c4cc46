"""Validation: every kind of fault is found, all of them in one pass, and nothing in a data file makes it raise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ovisnb.data import RecordError
from ovisnb.data.checks import validate
from ovisnb.data.checks.faults import KINDS, plain
from ovisnb.data.media import ImageFolder

PHOTOS = Path(__file__).parents[2] / "data" / "photos"


def talk(question: str = "<image>\nWhat is it?", answer: str = "A cat.", **more) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def kinds(found) -> list[str]:
    return [kind for kind, _ in found]


def test_the_shipped_photographs_are_clean():
    report = validate(PHOTOS / "photos.json", PHOTOS)
    assert (
        report.clean and report.records == 28 and report.text().endswith("nothing wrong in 28 records and 19 pictures")
    )


def test_every_fault_of_one_record_is_listed_at_once(check):
    entry = {
        "id": "bad",
        "image": ["good.png", "none.png", {"path": "good.png", "box": [30, 5, 10, 20]}],
        "kind": 3,
        "conversations": [
            {"from": "hooman", "value": "<image> <|im_start|>system"},
            {"from": "gpt", "value": "<think>so <box>(0.1,0.2),(1.4,0.9)</box><box>(0.3,0.3),(0.3,0.4)</box>"},
            {"from": "gpt", "value": ""},
            {"value": "x"},
        ],
    }
    found = kinds(check(entry))
    assert sorted(found) == sorted(
        ["wrong_form", "wrong_form", "unknown_role", "placeholder_count", "no_answer", "control_token", "unclosed_tag"]
        + ["inverted_box", "empty_box", "box_outside", "missing_file"]
    )
    assert all(fault.id == "bad" and fault.line == 1 for fault in check.report)


@pytest.mark.parametrize(
    "entry, kind, said",
    [
        (talk(image=["good.png", "good.png"]), "placeholder_count", "hold 1 <image> but `image` lists 2"),
        (talk(), "placeholder_count", "hold 1 <image> but `image` lists 0"),
        (talk("<video> What?", image=[]), "placeholder_count", "1 <video> but the record has none"),
        (talk("What?", imag="good.png"), "unknown_key", "did you mean 'image'"),
        (talk("Hi", history=[["q", "a"]]), "unknown_key", "the key `history` is not read: write it as turns"),
        (talk(image={"path": "good.png", "bx": 1}), "unknown_key", "`bx` is unknown"),
        (talk(image=3), "wrong_form", "entry 1 of `image`"),
        (talk(image="good.png", id=[1]), "wrong_form", "`id` is text"),
        (talk(image="good.png", box_coordinates="metres"), "wrong_form", "box_coordinates"),
        ([1, 2], "wrong_form", "a record is an object"),
        ({"conversations": []}, "no_answer", "no turns"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "no_answer", "no gpt turn"),
        (talk("Hi", " \n"), "no_answer", "turn 2: the gpt turn is empty"),
        (talk("Hi", "a<|im_end|>"), "control_token", "encoded as plain text, never as a control token"),
        (talk("Hi <ovis_visual_atom>", "a"), "control_token", "turn 1 holds <ovis_visual_atom>"),
        (talk("Hi", "</think>a"), "unclosed_tag", "closes nothing"),
        (talk("Hi", "<tool_call>Crop [1,2,3,4]"), "unclosed_tag", "<tool_call> at character 0 is never closed"),
        (talk("Hi", "<box>(0.1,0.2),(x,0.4)</box>"), "unreadable_box", "where a number should be"),
        (talk("Hi", "<tool_call>Crop cat</tool_call>"), "unreadable_box", "has no box"),
        (talk("Hi", "\ud800"), "not_utf8", "half a character"),
        (talk("Hi", "a", id="\ud800"), "not_utf8", "half a character"),
        (talk(image="\ud800.png"), "not_utf8", "half a character"),
        (talk("Hi", "a", note="\ud800"), "not_utf8", "half a character"),
        (talk("Hi", "a", score=float("nan")), "broken_json", "NaN"),
        ({"id": "x", "text": "Hi"}, "unknown_format", "no other format fits"),
    ],
)  # fmt: skip
def test_faults_of_the_form_and_the_text(check, entry, kind, said):
    found = check(entry)
    assert kind in kinds(found), check.report.text()
    assert said in "".join(fault.message for fault in check.report.of(kind))


def box_of(*corners: float) -> str:
    return "<ref>cat</ref><box>({},{}),({},{})</box>".format(*corners)


@pytest.mark.parametrize(
    "answer, more, expected",
    [
        (box_of(0, 0, 1, 0.999), {}, []),
        (box_of(0.5, 0.1, 0.2, 0.3), {}, ["inverted_box"]),
        (box_of(0.5, 0.1, 0.2, 1.3), {}, ["inverted_box", "box_outside"]),
        (box_of(-0.1, 0.1, 0.2, 0.3), {}, ["box_outside"]),
        (box_of(10, 10, 70, 50), {}, ["box_outside"]),
        (box_of(10, 10, 70, 50), {"box_coordinates": "pixels"}, []),
        (box_of(10, 10, 81, 50), {"box_coordinates": "pixels"}, ["box_outside"]),
        (box_of(10, 10, 1000, 50), {"box_coordinates": "thousand"}, []),
        (box_of(10, 10, 1001, 50), {"box_coordinates": "thousand"}, ["box_outside"]),
        ("<point>(1.2,0.5)</point>", {}, ["box_outside"]),
        ("<tool_call>Crop [0, 0, 80, 60]</tool_call> So.", {}, []),
        ("<tool_call>Crop [0, 0, 80, 60.5]</tool_call> So.", {}, ["box_outside"]),
        ("<tool_call>Identify [30, 0, 20, 60]</tool_call> So.", {}, ["inverted_box"]),
        ("<tool_call>[0, 0, 0, 60]</tool_call> So.", {}, ["empty_box"]),
        ("<tool_call>[0, 0, 0.5, 0.6]</tool_call> So.", {"call_coordinates": "normalised"}, []),
        ("<tool_call>[0, 0, 0.5, 6]</tool_call> So.", {"call_coordinates": "normalised"}, ["box_outside"]),
    ],
)
def test_boxes_in_tags_and_calls(check, answer, more, expected):
    assert kinds(check(talk(answer=answer, image="good.png", **more))) == expected, check.report.text()


def test_boxes_of_picture_entries_and_of_crops_cut_for_a_call(check):
    call = "<tool_call>Crop [0, 0, 90, 60]</tool_call><image> So."
    assert kinds(check(talk(answer=call, image="good.png"))) == ["box_outside"]
    assert kinds(check(talk(image={"path": "good.png", "box": [0, 0, 80, 61]}))) == ["box_outside"]
    assert kinds(check(talk(image={"path": "good.png", "box": [0, 0, 0, 61]}))) == ["empty_box"]
    assert kinds(check(talk(image={"path": "good.png", "box": [0, 0, 1, "a"]}))) == ["unreadable_box"]
    good = {"path": "good.png", "box": [0.1, 0.1, 1, 1], "coordinates": "normalised"}
    assert kinds(check(talk(image=good))) == []


def test_a_box_of_several_pictures_may_lie_in_any_and_a_turned_one_counts_as_seen(check):
    two = talk("<image><image>?", box_of(0, 0, 80, 60), image=["good.png", "turned.jpg"], box_coordinates="pixels")
    tall = talk(answer=box_of(0, 0, 60, 80), image="turned.jpg", box_coordinates="pixels")
    assert kinds(check(two, tall)) == ["turned_picture"] * 2
    assert "60x80 pixels" in next(iter(check.report)).message


def test_a_broken_turn_does_not_shift_the_numbers_of_the_next(check):
    turns = [{"from": "human"}, {"from": "gpt", "value": "<tool_call>Crop [1,2,3,4]</tool_call><image>"}]
    assert kinds(check({"conversations": turns})) == ["wrong_form", "placeholder_count"]
    assert "turn 2: there is no picture before the call" in next(check.report.of("placeholder_count")).message


def test_prompts_that_describe_tags_are_not_faults(check):
    system = "Write <box>(x1,y1),(x2,y2)</box>, call between <tool_call> and </tool_call>, and put it in <answer>."
    entry = {"conversations": [{"from": "system", "value": system}, *talk("Hi", "<answer>a</answer>")["conversations"]]}
    assert check(entry) == []


@pytest.mark.parametrize(
    "path, kind, said",
    [
        ("none.png", "missing_file", "there is no picture at"),
        ("../good.png", "path_outside", "leads out of the image_folder"),
        ("/etc/hostname", "path_outside", "leads out of the image_folder"),
        ("https://example.org/a.png", "path_outside", "is a URL"),
        ("empty.jpg", "unreadable_picture", "0 bytes"),
        ("words.jpg", "unreadable_picture", "no picture in a format"),
        ("folder.jpg", "unreadable_picture", "is not a file"),
        ("loop.jpg", "unreadable_picture", "cannot be followed"),
        ("a\0b.jpg", "unreadable_picture", "cannot be followed"),
        ("cut.jpg", "truncated_picture", "image file is truncated"),
        ("cut.png", "truncated_picture", "image file is truncated"),
        ("huge.png", "huge_picture", "too large to open safely"),
        ("sliver.png", "huge_picture", "70000x1"),
        ("moving.gif", "animated_picture", "3 frames"),
        ("turned.jpg", "turned_picture", "EXIF orientation 6, which is applied"),
    ],
)
def test_pictures(check, path, kind, said):
    assert kinds(check(talk(image=path, id="one"), talk(image="good.png", id="two"))) == [kind]
    [fault] = check.report
    assert said in fault.message and fault.id == "one" and fault.message.startswith("entry 1 of `image`: ")


@pytest.mark.parametrize(
    "video, expected",
    [
        ("words.mp4", ["unreadable_video"]),
        ("none.mp4", ["missing_file"]),
        (["good.png", "none.png"], ["missing_file"]),
        (["good.png", "words.mp4"], ["wrong_form", "unreadable_video"]),
        ([], ["wrong_form"]),
    ],
)
def test_videos(check, pictures, video, expected):
    (pictures / "words.mp4").write_text("no video at all")
    assert kinds(check(talk("<video> What?", video=video))) == expected, check.report.text()
    assert "there is no picture at none.mp4" not in check.report.text().replace(f"{pictures}/", "")


def test_absolute_paths_are_taken_where_they_are_allowed(check, pictures):
    entry = talk(image=str(pictures / "good.png"))
    assert kinds(check(entry, folder=pictures.parent)) == []
    assert kinds(check(entry, folder=PHOTOS)) == ["path_outside"]
    assert kinds(check(entry, folder=ImageFolder(PHOTOS, allow_absolute=True))) == []
    assert kinds(check(talk(image="../good.png"), folder=ImageFolder(PHOTOS, allow_absolute=True))) == ["path_outside"]


def test_pictures_larger_than_wanted_and_a_folder_that_is_none(check, tmp_path):
    assert kinds(check(talk(image="good.png"), max_area=80 * 60)) == []
    assert kinds(check(talk(image="good.png"), max_area=80 * 60 - 1)) == ["huge_picture"]
    with pytest.raises(RecordError, match="is not a folder"):
        check(talk(image="good.png"), folder=tmp_path / "none")


def test_broken_lines_are_listed_and_the_next_ones_read(tmp_path):
    path = tmp_path / "data.jsonl"
    good = json.dumps(talk("Hi", "a", id="good")).encode()
    late = json.dumps(talk("Hi", "", id="late")).encode()
    path.write_bytes(b"\n".join([good, b'{"id": ', b'{"id": "\xe9"}', b"[" * 5000, b"", late]))
    report = validate(path)
    assert [(fault.kind, fault.line, fault.id) for fault in report] == [
        ("broken_json", 2, None),
        ("broken_json", 4, None),
        ("not_utf8", 3, None),
        ("no_answer", 6, "late"),
    ]
    assert (report.rows, report.records, report.faulty) == (5, 2, 4)


def test_samples_too_long_for_the_limit(check, golden_processor):
    entry = talk(image="good.png", id="one")
    assert check(entry, processor=golden_processor, max_length=4000) == []
    assert check(entry, processor=golden_processor, max_length=20) == [("too_long", "one")]
    assert "the limit is 20: shorten it or lower max_pixels" in next(iter(check.report)).message
    check(talk("Hi", "no picture here " * 9), processor=golden_processor, max_length=20)
    assert next(iter(check.report)).message.endswith("the limit is 20: shorten it")
    with pytest.raises(ValueError, match="give its processor"):
        check(entry, max_length=20)


def test_all_control_tokens_of_the_processor_count(check, golden_processor):
    own = golden_processor.tokenizer.all_special_tokens
    for token in own:
        assert kinds(check(talk("Hi", f"a {token} b"), processor=golden_processor)) == ["control_token"], token


def test_kinds_can_be_ignored_and_a_slip_in_them_is_told(check):
    entry = talk("Hi", "", image="none.png")
    assert kinds(check(entry, ignore=["missing_file", "placeholder_count"])) == ["no_answer"]
    with pytest.raises(ValueError, match="did you mean 'missing_file'"):
        check(entry, ignore=["missing_files"])


def test_the_text_groups_by_kind_and_spells_out_what_could_move_a_terminal(check):
    evil = "a\x1b[2J\u202e\n" + "x" * 500
    check(*[talk("Hi", "", id=f"{evil}{number}") for number in range(7)])
    text = check.report.text()
    assert "no_answer (7): The conversation has no gpt turn" in text and "... and 2 more" in text
    assert "\x1b" not in text and "\u202e" not in text and "\\u202e" in text
    assert max(map(len, text.splitlines())) < 600
    assert plain("é 漢 <b>") == "é 漢 <b>" and plain("\ud800\t") == "\\ud800\\t"


def test_the_json_has_one_entry_a_fault(check, tmp_path):
    check(talk("Hi", "", id="é"), talk("Hi", image="none.png", id="\ud800"))
    check.report.write_json(tmp_path / "out" / "faults.json")
    rows = json.loads((tmp_path / "out" / "faults.json").read_text())
    assert len(rows) == len(check.report) and rows[0]["id"] == "\ud800"
    assert {"kind", "id", "line", "message", "file"} == set(rows[0])
    check(talk("Hi", "a"))
    check.report.write_json(tmp_path / "faults.json")
    assert json.loads((tmp_path / "faults.json").read_text()) == []


def test_many_faults_wait_on_disk(check):
    check(*[talk(f"Hi {number}", "", id=str(number)) for number in range(300)], folder=None)
    check.report._spool.rollover()
    assert [fault.line for fault in check.report] == list(range(1, 301))
    assert check.report.counts == {"no_answer": 300}


FORMATS = {
    "messages": ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown_role"),
    "captions": ({"image": "cut.jpg", "caption": "A cat."}, "truncated_picture"),
    "annotations": ({"image_path": "good.png", "QnA": [{"Q": "?", "A3": "{Crop [5, 5, 5, 9]} x"}]}, "empty_box"),
    "annotations, cut": (
        {"image_path": "good.png", "QnA": [{"Q": "?", "A3": "{Crop [5, 5, 99, 9]} x"}]},
        "box_outside",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_checked_as_they_are_read(check, name):
    entry, kind = FORMATS[name]
    assert kinds(check(entry)) == [kind] and next(iter(check.report)).line == 1


def test_pictures_in_the_rows_of_a_table_are_checked(tmp_path, pictures):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": (pictures / name).read_bytes(), "path": None} for name in ("good.png", "cut.jpg", "words.jpg")]
    rows = [{"image": cell, "caption": f"Number {at}."} for at, cell in enumerate(cells)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [(fault.kind, fault.line) for fault in validate(tmp_path / "a.parquet")]
    assert found == [("unreadable_picture", 3), ("truncated_picture", 2)]


def test_kinds_are_named_plainly():
    assert all(
        kind == kind.lower() and kind.isidentifier() and sentence.endswith(".") for kind, sentence in KINDS.items()
    )


def test_rows_that_cannot_be_read_say_their_id(check):
    questions = [{"Q": "a?", "A3": "{Crop x [5, 5, 5, 9]}"}, {"id": "it's", "Q": "b?", "A3": "{Crop x [5, 5, 5, 9]}"}]
    rows = [
        {"id": "line", "image_path": "good.png", "QnA": questions},
        {"id": 7, "image": "good.png", "caption": 5},
        {"id": "ref", "image": "none.png", "expression": "cat", "bbox_xywh": [1, 2, 3, 4]},
        {"id": 8, "messages": [{"role": "tool", "content": "x"}]},
        {"id": "odd"},
    ]
    assert check(*rows) == [
        ("unknown_format", "odd"),
        ("wrong_form", "7"),
        ("wrong_form", "8"),
        ("empty_box", "line-0"),
        ("empty_box", "it's"),
        ("missing_file", "ref"),
    ]
    assert [fault.line for fault in check.report] == [5, 2, 4, 1, 1, 3]
    assert not any(fault.message.startswith("record ") for fault in check.report)


def test_a_record_without_id_has_the_name_that_reading_gives_it(tmp_path, pictures):
    path = tmp_path / "data.jsonl"
    path.write_text("{broken\n" + json.dumps(talk("Hi", "")))
    assert [fault.id for fault in validate(path)] == [None, "data-1"]


def test_no_answer_is_one_fault(check, golden_processor):
    assert check({"id": "a", "conversations": [{"from": "human", "value": "Hi"}]}, processor=golden_processor) == [
        ("no_answer", "a")
    ]
    silent = {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": None}]}
    assert check(silent) == [("wrong_form", "b")]


def test_an_unknown_key_of_a_picture_is_one_fault(check):
    assert check(talk(image={"path": "good.png", "bx": 1}, id="a")) == [("unknown_key", "a")]


def test_a_video_among_the_pictures_is_told(check):
    assert check(talk(image="clip.mp4", id="a")) == [("wrong_form", "a")]
    assert "list it under `video`" in next(iter(check.report)).message


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_file_in_utf_16_is_one_fault(tmp_path, order, name):
    path = tmp_path / name
    path.write_bytes(("\ufeff" + json.dumps([talk("Hi", "a")]) + "\n\n").encode(order))
    [fault] = validate(path)
    assert (fault.kind, fault.line) == ("not_utf8", 1) and "UTF-16" in fault.message
