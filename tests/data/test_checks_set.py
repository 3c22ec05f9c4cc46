"""Validation of a set as a whole: ids and records twice, answers unlike the others, leaks between splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ovisnb.data.checks import validate
from tests.data.test_checks import talk


def test_ids_that_are_twice_or_nearly(check):
    names = ["img_7", "img_7", "IMG_7 ", "img_007", "img_70", "0.1", "0.01", 12, "012", None]
    entries = [talk("Hi", f"answer {number}", id=name) for number, name in enumerate(names)]
    found = check(*entries)
    assert found == [
        ("duplicate_id", "img_7"),
        ("near_duplicate_id", "IMG_7 "),
        ("near_duplicate_id", "img_007"),
        ("near_duplicate_id", "012"),
    ]
    assert [fault.line for fault in check.report] == [2, 3, 4, 9]


def test_the_id_and_the_pictures_of_a_record_that_cannot_be_read_count_too(check):
    broken = {"conversations": [{"from": "nobody", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
    sound = talk("<image>?", "a", id="7", image="good.png", split="train")
    found = check(
        sound, {**broken, "id": "07", "image": "good.png", "split": "test"}, {**broken, "id": "7", "image": "good.jpg"}
    )
    assert sorted(found) == [
        ("duplicate_id", "7"),
        ("near_duplicate_id", "07"),
        ("split_leak", "07"),
        ("unknown_role", "07"),
        ("unknown_role", "7"),
    ]


def test_records_that_are_twice(check):
    assert check(talk("Hi", "a", id="a"), talk("Hi", "b", id="b"), talk("Hi", "a", id="c")) == [
        ("duplicate_record", "c")
    ]
    assert "record 'a' of line 1" in next(iter(check.report)).message


def answers(*texts: str) -> list[dict]:
    return [talk(f"Question {number}", text, id=str(number)) for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    "texts, lacking",
    [
        (["<answer>1</answer>", "2", "<answer>3</answer>"], ["1"]),
        (["1", "2"], []),
        (["<think>a</think><answer>1</answer>", "<think>a</think>2", "3", "4"], ["1"]),
        (["<think>a</think><answer>1</answer>", "2", "3"], []),
        (["<think>a</think><answer>1</answer>", "<think>b</think><answer>1</answer>", "3"], ["2"]),
    ],
)
def test_answers_without_answer_where_others_like_them_have_it(check, texts, lacking):
    assert check(*answers(*texts)) == [("missing_answer_tag", name) for name in lacking]


def test_one_other_answer_is_no_answers(check):
    for texts, expected in [
        (
            ("<think>a</think><answer>1</answer>", "<think>a</think>2"),
            "1 other answer that thinks or calls tools has one",
        ),
        (("<answer>1</answer>", "2"), "1 other answer without thinking has one"),
        (("<answer>1</answer>", "<answer>2</answer>", "3"), "2 other answers without thinking have one"),
    ]:
        check(*answers(*texts))
        assert next(iter(check.report)).message.endswith(f", and {expected}")


def test_pictures_of_the_other_splits_are_not_counted(tmp_path, pictures):
    for name, images in (("train", ["good.png"]), ("test", ["good.png", "good.jpg", "words.jpg"])):
        rows = [talk("<image>?", image=image, id=image) for image in images]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = validate(tmp_path / "train.jsonl", pictures, against=[tmp_path / "test.jsonl"])
    assert (report.records, report.pictures) == (1, 1)


def test_leaks_between_files_by_place_and_by_content(tmp_path, pictures):
    def file(name: str, *images: str) -> Path:
        path = tmp_path / name
        rows = [talk("<image>?", image=image, id=f"{name}-{at}-{image}") for at, image in enumerate(images)]
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    train = file("train.jsonl", "good.png", "./sub/../good.png", "copy.png", "good.jpg")
    test = file("test.jsonl", "words.jpg", "good.png")
    report = validate(train, pictures, against=[test])
    assert [(fault.kind, fault.line) for fault in report] == [("split_leak", 1), ("split_leak", 2), ("split_leak", 3)]
    assert "is also in" in next(iter(report)).message and "line 2" in next(iter(report)).message
    assert validate(train, pictures).clean
    assert [fault.kind for fault in validate(train, against=[train])].count("split_leak") == 4  # no folder: by path


def test_leaks_within_a_file_that_names_splits(check):
    rows = [
        talk("<image>?", f"{n}", image="good.png", id=str(n), split=s) for n, s in enumerate(["train", "train", "test"])
    ]
    assert check(*rows) == [("split_leak", "2")]


def test_each_set_of_a_data_info_file_is_checked_once_in_its_own_folder(tmp_path, pictures):
    for name in ("one", "two"):
        rows = [talk(image="good.png", id="same"), talk(image="none.png", id=name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sets = {
        n: {"meta_file": f"{n}.jsonl", "image_dir": str(pictures), "weight": w} for n, w in (("one", 9), ("two", 1))
    }
    (tmp_path / "info.json").write_text(json.dumps(sets))
    report = validate(tmp_path / "info.json")
    assert [(fault.kind, fault.id, Path(fault.file).name, fault.line) for fault in report] == [
        ("missing_file", "one", "one.jsonl", 2),
        ("missing_file", "two", "two.jsonl", 2),
    ]
    assert (report.rows, report.records, report.pictures) == (4, 4, 2)
    assert "one, line 2, of " in report.text()
