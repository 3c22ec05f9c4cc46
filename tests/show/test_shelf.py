"""The shelf: everything that can be read is read, and every fault is at its record."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from ovisnb.data import Record, RecordError, spread
from ovisnb.data.checks.faults import Fault
from ovisnb.show import Shelf, open_shelf
from ovisnb.show import shelf as shelf_module

from .hostile import write_hostile


def row(name: str | None, kind: str | None = None, answer: str = "a", **more) -> dict:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": answer}]
    named = {} if name is None else {"id": name}
    return {**named, "conversations": turns, **({"kind": kind} if kind else {}), **more}


def write(path, rows, broken=()) -> None:
    lines = [json.dumps(one) for one in rows]
    for at in broken:
        lines.insert(at, '{"id": ')
    path.write_text("\n".join(lines))


def test_a_broken_row_stops_nothing_and_is_on_the_shelf(tmp_path):
    write(tmp_path / "a.jsonl", [row("x", "k"), row("y"), {"id": "z"}], broken=[1])
    shelf = open_shelf(tmp_path / "a.jsonl")
    assert [record.id for record in shelf.records] == ["x", "y"] and len(shelf) == 4
    assert [[fault.line for fault in shelf[at]] for at in (2, 3)] == [[2], [4]]
    assert shelf.kinds == {"k": [0], "(none)": [1]}
    assert shelf.problems == {"broken_json": [2], "unknown_format": [3]}
    assert shelf.read == "" and shelf.verdict.startswith("Pictures not checked: 2 problems")


def test_kinds_and_problems_filter_together(tmp_path):
    rows = [row("x", "k", "<box>"), row("y", "k"), row("z", "l", "<box>"), row("w", "l", "")]
    write(tmp_path / "a.jsonl", rows)
    shelf = open_shelf(tmp_path / "a.jsonl")
    assert list(shelf.chosen()) == [0, 1, 2, 3] and shelf.chosen("k") == [0, 1]
    assert shelf.chosen(problem="unclosed_tag") == [0, 2] and shelf.chosen("k", "unclosed_tag") == [0]
    assert shelf.chosen("k", "no_answer") == [] and shelf.chosen("l", "no_answer") == [3]
    assert [fault.kind for fault in shelf.faults_at(0)] == ["unclosed_tag"] and shelf.faults_at(1) == ()


def test_a_check_finds_what_only_pictures_and_the_whole_set_show(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    picture = {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}
    rows = [{"id": "there", "image": "a.png", "conversations": picture}, row("twice"), row("twice", answer="b")]
    rows.append({"id": "gone", "image": "b.png", "conversations": picture})
    write(tmp_path / "a.jsonl", rows, broken=[0])
    shelf = open_shelf(tmp_path / "a.jsonl", image_folder=tmp_path)
    assert shelf.check() is shelf
    assert shelf.problems["missing_file"] == [3] and shelf.problems["broken_json"] == [4]
    assert shelf.counts["missing_file"] == 1 and shelf.verdict.startswith("a.jsonl: ")
    assert shelf.problems["duplicate_id"] in ([1, 2], [2])


def test_records_without_an_id_meet_their_faults(tmp_path):
    write(tmp_path / "a.jsonl", [row(None), row(None, answer="<box>"), row(None, answer="")], broken=[0, 2])
    shelf = open_shelf(tmp_path / "a.jsonl").check()
    assert shelf.problems["unclosed_tag"] == [1] and shelf.problems["no_answer"] == [2]
    assert len(shelf) == 5


def test_a_large_file_gives_an_even_sample_and_is_not_checked_whole(tmp_path):
    write(tmp_path / "a.jsonl", [row(str(at), answer="" if at == 0 else "a") for at in range(1000)])
    shelf = open_shelf(tmp_path / "a.jsonl", 10)
    assert [int(record.id) for record in shelf.records] == list(range(0, 1000, 100))
    assert shelf.read == "an even sample of 10 of 1,000 rows"
    assert "checked whole or not at all" in shelf.check().verdict and shelf.problems == {"no_answer": [0]}
    assert open_shelf(tmp_path / "a.jsonl", 1000).read == "" == open_shelf(tmp_path / "a.jsonl").read


def test_a_list_is_sampled_too(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([row(str(at)) for at in range(50)]))
    shelf = open_shelf(tmp_path / "a.json", 5)
    assert shelf.read == "an even sample of 5 of 50 rows" and shelf.records[-1].id >= "40"


def test_where_lines_are_not_counted_places_are_bytes(tmp_path, monkeypatch):
    for module in (spread, shelf_module):
        monkeypatch.setattr(module, "COUNTED", 1000)
    write(tmp_path / "a.jsonl", [row(str(at), answer="" if at == 0 else "a") for at in range(1000)])
    shelf = open_shelf(tmp_path / "a.jsonl", 10)
    assert shelf.read == "an even sample of 10 rows" and shelf.problems == {"no_answer": [0]}
    assert shelf.records[1].source.startswith(f"{tmp_path / 'a.jsonl'}:@")


def test_the_sets_of_a_data_info_file_lie_on_one_shelf(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [row(f"{name}{at}", name, "" if at == 1 else "x") for at in range(5)])
    info = {name: {"meta_file": f"{name}.jsonl", "image_dir": "."} for name in "ab"}
    (tmp_path / "info.json").write_text(json.dumps(info))
    shelf = open_shelf(tmp_path / "info.json").check()
    assert {kind: len(places) for kind, places in shelf.kinds.items()} == {"a": 5, "b": 5}
    assert [shelf[at].id for at in shelf.problems["no_answer"]] == ["a1", "b1"]
    assert open_shelf(tmp_path / "info.json", 4).read == "an even sample of 4 of 10 rows"


def test_a_fault_of_one_set_is_not_put_to_the_same_line_of_another(tmp_path):
    write(tmp_path / "a.jsonl", [row(f"a{at}", answer=str(at)) for at in range(4)])
    write(tmp_path / "b.jsonl", [row("b0", answer="x"), row("b1", answer="")], broken=[1])
    info = {name: {"meta_file": f"{name}.jsonl", "image_dir": "."} for name in "ab"}
    (tmp_path / "info.json").write_text(json.dumps(info))
    shelf = open_shelf(tmp_path / "info.json")
    for _ in range(2):  # what reading finds, and what a check finds
        assert len(shelf) == 7 and isinstance(shelf[6], tuple)
        assert shelf.problems == {"broken_json": [6], "no_answer": [5]} and shelf[5].id == "b1"
        shelf.check()


def test_records_need_no_file():
    records = [Record.from_dict(row("x", "k"))]
    shelf = Shelf(records, [Fault("k", "x", None, "m", ""), Fault("k", "gone", None, "m", "")])
    assert shelf.problems == {"k": [0, 1]} and shelf[1][0].id == "gone"
    assert "checked whole or not at all" in shelf.check().verdict


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(RecordError, match="there is no data file at"):
        open_shelf(tmp_path / "a.jsonl")


def test_of_a_hostile_set_everything_is_on_the_shelf(tmp_path):
    path = write_hostile(tmp_path)
    shelf = open_shelf(path, image_folder=tmp_path / "images").check()
    assert len(shelf) == len(path.read_bytes().splitlines()) == 23
    for place in ("picture-0", "picture-6", "picture-7"):
        [at] = [at for at, record in enumerate(shelf.records) if record.id == place]
        assert shelf.faults_at(at)


def test_a_record_that_cannot_be_encoded_is_a_sentence(tmp_path, golden_processor):
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": "gone", "image": "gone.png", "conversations": turns}, {"id": "none", "conversations": turns}]
    rows.append({"id": "good", "image": "good.png", "conversations": turns})
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "good.png")
    lines = [*map(json.dumps, rows), '{"id": "broken']
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    shelf = open_shelf(tmp_path / "data.jsonl", image_folder=tmp_path)
    encoded = [shelf.encode(record, golden_processor, pixels=False) for record in shelf.records]
    assert len(encoded[-1]) > 5 and shelf.records[-1].id == "good"
    assert encoded[0].startswith("record 'gone' (data.jsonl:1): image 1: there is no picture at gone.png")
    assert any(said.startswith("line 4: broken JSON") for said in shelf.unread)
    assert len(encoded) + len(shelf.unread) == 4
    with pytest.raises(ValueError, match="min_pixels 9 is above max_pixels 4"):  # no record is to blame
        [shelf.encode(record, golden_processor, min_pixels=9, max_pixels=4) for record in shelf.records]
