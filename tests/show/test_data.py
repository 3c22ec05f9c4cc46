"""Record cards and overviews: the data as it is, and as text only."""

from __future__ import annotations

from html import escape

import pytest

from ovisnb.chat import encode
from ovisnb.data import MediaError, Record, shapes
from ovisnb.show import examples, overview_figure, overview_table, regions_of, select, show_record, summarise

READ = next(shapes.records("heldout", seed=1, size=512, kinds={"read": 1}))
FIND = next(shapes.records("heldout", seed=1, size=64, kinds={"find": 1}))


def record(*turns: tuple[str, str], **more) -> Record:
    return Record.from_dict({"id": "test", "conversations": [{"from": r, "value": v} for r, v in turns], **more})


def test_a_card_shows_pictures_and_every_turn():
    html = str(show_record(READ))
    assert html.count("<img ") == 2
    assert "crop [" in html
    for turn in READ.turns:
        assert escape(turn.text) in html


def test_a_card_of_a_video_shows_its_frames(golden):
    video = record(("human", "<video>\nWhat?"), ("gpt", "A ring."), video=["photo.png", "photo_b.png"])
    html = str(show_record(video, golden / "images"))
    assert "frame 1 of 2" in html and html.count("<img ") == 2


def test_text_of_the_data_stays_text():
    evil = "<script>alert(1)</script><img src=x onerror=y>"
    html = str(show_record(record(("human", evil), ("gpt", evil), kind=evil).model_copy(update={"id": evil})))
    assert "<script" not in html and "<img" not in html and html.count(escape(evil)) == 4


def test_a_card_tells_the_file_and_line_but_not_the_folder():
    html = str(show_record(record(("human", "q"), ("gpt", "a")).model_copy(update={"source": "/home/me/train.json:7"})))
    assert "train.json:7" in html and "/home/me" not in html


def test_a_missing_picture_is_an_error_that_names_the_record(tmp_path):
    with pytest.raises(MediaError, match="test"):
        show_record(record(("human", "<image>\nq"), ("gpt", "a"), image="none.png"), tmp_path)


def test_regions_are_the_answers_boxes_and_the_crops():
    found = regions_of(FIND)
    target = next(item for item in FIND.meta["objects"] if item["name"] == found["boxes"][0].label)
    assert tuple(found["boxes"][0]) == pytest.approx(target["box"], abs=0.0011)
    crop = regions_of(READ)["boxes"]
    assert [box.label for box in crop] == ["crop"]
    assert tuple(crop[0]) == pytest.approx([side / 512 for side in READ.images[1].box])
    assert regions_of(READ, at=1)["boxes"] == []


def test_with_several_pictures_no_box_is_drawn_on_the_wrong_one(golden):
    two = record(
        ("human", "<image> <image> Where?"), ("gpt", "<box>(0.1,0.1),(0.5,0.5)</box>"), image=["photo.png", "tall.png"]
    )
    assert regions_of(two, golden / "images")["boxes"] == regions_of(two, golden / "images", at=1)["boxes"] == []


def test_the_summary_counts_what_is_there(golden_processor):
    records = [FIND, READ, record(("human", "q"), ("gpt", "a"))]
    summary = summarise(records, golden_processor)
    assert summary["records"] == 3
    assert summary["kinds"] == {"find": 1, "read": 1, "(none)": 1}
    assert summary["turns"] == {2: 3}
    assert summary["images"] == {0: 1, 1: 1, 2: 1}
    assert summary["sizes"][:2] == [(64, 64), (512, 512)]
    assert summary["tokens"] == [len(encode(one, golden_processor).input_ids) for one in records]
    table = str(overview_table(summary))
    assert f"{sum(summary['tokens']):,}" in table and "64×64, 512×512" in table
    kinds, _, sizes, tokens = overview_figure(summary).figure.axes
    assert sorted(bar.get_width() for bar in kinds.patches) == [1, 1, 1]
    assert sum(bar.get_height() for bar in tokens.patches) == 3
    assert len(sizes.collections[0].get_offsets()) == len(set(summary["sizes"]))


def test_an_overview_of_text_alone_or_of_nothing_is_drawn():
    for records in ([record(("human", "q"), ("gpt", "a"))], []):
        summary = summarise(records)
        assert str(len(records)) in str(overview_table(summary))
        assert overview_figure(summary)._repr_png_()[0][:4] == b"\x89PNG"


def test_examples_are_one_record_of_each_kind_of_conversation(golden):
    plain, text = FIND, record(("human", "q"), ("gpt", "a"))
    video = record(("human", "<video>"), ("gpt", "a"), video=["a.png"])
    tool = record(("human", "q"), ("gpt", "<think>x<tool_response>y</tool_response></think>z"))
    found = examples([plain, plain, text, READ, video, tool])
    assert found == {
        "one picture": plain,
        "text only": text,
        "a tool call and the crop it returns": READ,
        "a tool's answer": tool,
        "a video": video,
    }


def test_select_takes_ids_in_order_and_names_one_that_is_missing():
    text = record(("human", "q"), ("gpt", "a"))
    assert select([FIND, text], f"test, {FIND.id}") == [text, FIND]
    with pytest.raises(ValueError, match="None of the 1 records read has the id 'tets': did you mean 'test'"):
        select([record(("human", "q"), ("gpt", "a"))], "tets")
