"""A cleaned copy is clean, the input is never touched, and everything that was done is said."""

from __future__ import annotations

import codecs
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import RecordError, read_records
from ovisnb.data.checks import validate
from ovisnb.data.checks.fix import LEFT, clean_name, fix
from ovisnb.data.checks.repair import repair
from ovisnb.data.formats.parquet import write_parquet

from .test_checks import box_of, talk
from .test_checks_fuzz import GOOD, JSON, spots


@pytest.fixture
def folder(tmp_path):
    Image.effect_noise((80, 60), 90).convert("RGB").save(tmp_path / "good.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60), "red").save(tmp_path / "turned.jpg", exif=exif)
    return tmp_path


def cleaned(folder, *entries, name="data.jsonl", **options):
    """The entries of the cleaned copy; `cleaned.fixed` says what was done."""
    path = folder / name
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    before = path.read_bytes()
    cleaned.fixed = fix(path, image_folder=folder, **options)
    assert path.read_bytes() == before
    return [record.to_dict() for record in read_records(cleaned.fixed.path)] if cleaned.fixed.records else []


def said(report) -> list[tuple[str, str | None, int]]:
    return [(fault.kind, fault.id, fault.line) for fault in report]


def test_what_is_certain_is_repaired(folder):
    entry = {
        "id": "one",
        "image": ["good.png", {"path": "good.png", "box": [30, 40, 10, 20]}],
        "box_coordinates": "pixels",
        "conversations": [
            {"from": "User", "value": "<|im_start|>user\n<image><image> Where?<|im_end|>\n"},
            {"from": "assistant", "value": box_of(70, 10, 50, 61) + "<tool_call>Crop cat [0,0,88,60]</tool_call> So."},
        ],
    }
    [good] = cleaned(folder, entry)
    assert good["image"][1] == {"path": "good.png", "box": [10, 20, 30, 40]}
    assert good["conversations"] == [
        {"from": "human", "value": "<image><image> Where?"},
        {"from": "gpt", "value": box_of(50, 10, 70, 60) + "<tool_call>Crop cat [0, 0, 80, 60]</tool_call> So."},
    ]
    assert [fault.kind for fault in cleaned.fixed.repaired] == [
        "unknown_role", "unknown_role", "control_token", "inverted_box", "box_outside", "box_outside",
    ]  # fmt: skip
    assert cleaned.fixed.left_out.clean and cleaned.fixed.remaining.clean
    assert validate(cleaned.fixed.path, folder).clean


def test_the_box_of_a_picture_entry_is_cut_to_its_picture(folder):
    crop = {"path": "good.png", "box": [5, 5, 100, 20]}
    good, kept = cleaned(folder, talk(image=crop, id="a"), talk("<video>?", video=["good.png", crop], id="b"))
    assert good["image"] == [{"path": "good.png", "box": [5, 5, 80, 20]}]
    assert kept["video"] == ["good.png", {"path": "good.png", "box": [5, 5, 80, 20]}]
    messages = [fault.message for fault in cleaned.fixed.repaired]
    assert messages[0] == "entry 1 of `image`: its box [5, 5, 100, 20] was cut to [5, 5, 80, 20]"
    assert cleaned(folder, talk(image=crop, id="a"), ignore=["box_outside"])[0]["image"] == [crop]


def test_what_cannot_be_repaired_is_left_out_and_named(folder):
    entries = [
        talk(image="good.png", id="good"),
        talk(image="none.png", id="lost"),
        talk("Hi", "a <|im_start|> b", id="control"),
        talk("Hi", "<think>a", id="open"),
        talk("Hi", box_of(0.5, 0.5, 120, 200), id="pixels"),
        talk("Hi", box_of(0.5, 0.5, 0.5, 0.7), id="flat"),
        talk("Hi", "", id="silent"),
    ]
    assert [entry["id"] for entry in cleaned(folder, *entries)] == ["good"]
    fixed = cleaned.fixed
    assert said(fixed.left_out) == [
        ("no_answer", "silent", 7),
        ("control_token", "control", 3),
        ("unclosed_tag", "open", 4),
        ("empty_box", "flat", 6),
        ("box_outside", "pixels", 5),
        ("missing_file", "lost", 2),
    ]
    assert fixed.left_out.faulty == 6
    assert "1 record written, 0 of them repaired, 6 left out" in fixed.text() and "lost, line 2" in fixed.text()


def test_ids_become_unique_and_twice_the_same_record_is_left_out(folder):
    names = ["a", "a", "A ", "a-2", "b"]
    entries = [talk("Hi", f"{number}", id=name) for number, name in enumerate(names)]
    assert [entry["id"] for entry in cleaned(folder, *entries, talk("Hi", "0", id="c"))] == [
        "a",
        "a-2",
        "A -3",
        "a-2-2",
        "b",
    ]
    assert said(cleaned.fixed.left_out) == [("duplicate_record", "c", 6)]
    assert said(cleaned.fixed.repaired)[0] == ("duplicate_id", "a", 2)


def test_what_is_left_out_after_its_repair_does_not_count_as_repaired(folder):
    entries = [talk("Hi", "Yes"), talk("Ho", "See <think>", id="open")]
    for entry in entries:
        entry["conversations"][0]["from"] = "user"
    assert len(cleaned(folder, *entries)) == 1
    assert "1 record written, 1 of them repaired, 1 left out" in cleaned.fixed.text()


def test_leaving_out_goes_on_until_nothing_is_found(folder):
    # Once the two answers without a picture file are gone, nearly all that is left has <answer>.
    entries = [talk(f"Hi {name}", "<think>b</think><answer>1</answer>", id=name) for name in "xyz"]
    entries += [talk(f"Ha {name}", "plain", id=name, video="none.mp4") for name in "ab"]
    for entry in entries[3:]:
        entry["conversations"][0]["value"] += "<video>"
    entries.append(talk("Ho", "plain", id="plain"))
    assert [entry["id"] for entry in cleaned(folder, *entries)] == ["x", "y", "z"]
    assert ("missing_answer_tag", "plain", 6) in said(cleaned.fixed.left_out)
    assert validate(cleaned.fixed.path, folder).clean


def test_pictures_are_left_as_they_are(folder):
    assert len(cleaned(folder, talk(image="turned.jpg"))) == 1
    assert [fault.kind for fault in cleaned.fixed.remaining] == ["turned_picture"]
    assert "stays: turned_picture (1)\n    data-0, line 1: " in cleaned.fixed.text().replace("data_clean", "data")


def test_a_misspelt_key_gets_its_name_if_that_makes_the_record_sound(folder):
    [good] = cleaned(folder, talk(imag="good.png", id="a"), talk("Hi", imag="good.png", id="b"))
    assert good["image"] == "good.png" and [kind for kind, *_ in said(cleaned.fixed.left_out)] == ["unknown_key"]


def test_broken_rows_and_the_byte_order_mark_go(folder):
    path = folder / "data.json"
    rows = [json.dumps(talk("Hi", "é", id="é"), ensure_ascii=False), '{"id": ', json.dumps(talk("Ho", "b", id="b"))]
    path.write_bytes(codecs.BOM_UTF8 + ("[\n" + ",\n".join(rows) + "\n]").encode())
    fixed = fix(path, folder / "out" / "good.json")
    assert [entry["id"] for entry in json.loads(fixed.path.read_bytes())] == ["é", "b"]
    assert said(fixed.left_out) == [("broken_json", None, 4)] or said(fixed.left_out) == [("broken_json", None, 3)]


def test_annotation_lines_become_records_with_their_boxes_cut(folder):
    line = {"image_path": "good.png", "QnA": [{"Q": "What?", "A3": "{Crop cat [10, 10, 90, 50]} A cat."}]}
    [good] = cleaned(folder, line)
    assert "[10, 10, 80, 50]" in good["conversations"][1]["value"]
    assert [kind for kind, *_ in said(cleaned.fixed.repaired)] == ["box_outside"]


def test_the_input_is_never_the_output(folder):
    path = folder / "data.jsonl"
    path.write_text(json.dumps(talk("Hi", "a")))
    (folder / "link.jsonl").symlink_to(path)
    for out in (path, folder / "link.jsonl", folder / "." / "data.jsonl"):
        with pytest.raises(RecordError, match="give another name"):
            fix(path, out)
    (folder / "data_clean.jsonl").symlink_to(folder / "other.txt")
    with pytest.raises(RecordError, match="is a link to .*other.txt: give another name"):
        fix(path)
    with pytest.raises(RecordError, match=r"end its name in .json or .jsonl"):
        fix(path, folder / "data.txt")
    assert clean_name("a/train.json").name == "train_clean.json" and clean_name("a/t.parquet").name == "t_clean.jsonl"


def test_nothing_left_is_no_copy(folder):
    assert cleaned(folder, talk("Hi", ""), name="data.json") == []
    assert not cleaned.fixed.path.exists()
    assert "data_clean.json is not written: no record is left, 1 left out" in cleaned.fixed.text()
    cleaned.fixed.path.write_text("earlier")
    assert cleaned(folder, talk("Hi", ""), name="data.json") == []
    assert cleaned.fixed.path.read_text() == "earlier"
    assert "data_clean.json is not written, and what is there stays: no" in cleaned.fixed.text()


def test_a_faulty_row_with_its_picture_in_it_is_left_out_and_a_good_one_refused(folder):
    bad, good = ({"bytes": data, "path": None} for data in (b"none", (folder / "good.png").read_bytes()))
    rows = [talk("Hi", "A.", id="a"), talk(image=bad, id="b"), talk("Hi", "", image=good, id="c")]
    path = folder / "data.parquet"
    write_parquet(rows, path)
    fixed = fix(path, image_folder=folder)
    assert [record.id for record in read_records(fixed.path)] == ["a"] and fixed.left_out.faulty == 2
    found = [("placeholder_count", "c", 3), ("no_answer", "c", 3), ("unreadable_picture", "b", 2)]
    assert said(fixed.left_out) == found
    repairable = talk(image=good, id="d")
    repairable["conversations"][0]["from"] = "user"
    for entry in (talk(image=good, id="d"), repairable):
        write_parquet([*rows, entry], path)
        with pytest.raises(RecordError, match=r"data.parquet:4: pictures lie in the rows"):
            fix(path, image_folder=folder)


def test_a_record_left_out_as_another_names_that_one_as_the_input_does(folder):
    rows = [talk("Hi", ""), talk("Ho", "a"), talk("Ho", "a", id="twice")]
    assert len(cleaned(folder, *rows)) == 1
    assert "the same as record 'data-1' of line 2: drop" in list(cleaned.fixed.left_out)[-1].message


def test_ignored_kinds_stay(folder):
    found = cleaned(folder, talk(answer=box_of(0.3, 0.2, 0.1, 0.4), image="good.png", id="a"), ignore=["inverted_box"])
    assert len(found) == 1 and cleaned.fixed.repaired.clean and cleaned.fixed.left_out.clean


def test_numbers_far_off_are_not_guessed_at():
    for answer in (box_of(0.5, 0.5, 120, 200), "<point>(3,4)</point>", "<tool_call>[500,500,600,600]</tool_call>"):
        entry, done = repair(talk(answer=answer, image="good.png"), [(80, 60)])
        assert entry["conversations"][1]["value"] == answer and not done


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_copy_of_anything_is_clean(folder, data):
    rows = []
    for number in range(data.draw(st.integers(1, 4))):
        entry = json.loads(json.dumps({**GOOD, "id": data.draw(st.sampled_from(["a", "A", "a-2", f"b{number}"]))}))
        *way, last = data.draw(st.sampled_from([spot for spot in spots(entry) if spot]))
        piece = entry
        for key in way:
            piece = piece[key]
        if data.draw(st.booleans()):
            piece[last] = data.draw(
                JSON | st.sampled_from(["user", "good.png", box_of(0.7, 0.1, 0.2, 1.1), "turned.jpg"])
            )
        rows.append(entry)
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    fixed = fix(path, image_folder=folder)
    if fixed.records:
        assert {fault.kind for fault in validate(fixed.path, folder)} <= set(LEFT)
    assert fixed.records + fixed.left_out.faulty >= len(rows)


def test_what_is_left_out_is_named_by_its_place_in_the_input(folder):
    path = folder / "data.jsonl"
    rows = [
        talk(image="good.png", split="train"),
        talk("<image>\nElse?", image="good.png", split="test"),
        {"id": "odd"},
        talk("Hi", ""),
    ]
    path.write_text("\n".join(["{broken", *map(json.dumps, rows)]))
    fixed = fix(path, image_folder=folder)
    assert said(fixed.left_out) == [
        ("broken_json", None, 1),
        ("unknown_format", "odd", 4),
        ("no_answer", "data-4", 5),
        ("split_leak", "data-2", 3),
    ]
    assert "in 'train' in line 2: keep" in list(fixed.left_out)[-1].message


def test_messages_do_not_name_the_place_of_the_work(folder, golden_processor):
    rows = [{"id": "a", "conversations": [{"from": "human", "value": "<image>"}], "image": "good.png"}]
    cleaned(folder, *rows, processor=golden_processor)
    assert all("tmp" not in fault.message for fault in cleaned.fixed.left_out)
