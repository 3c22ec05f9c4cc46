"""The rows of other trainers: every answer, picture, thought and mark of loss is read, or one sentence says what is not."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ovisnb.data import Media, Record, RecordError, from_dataset, read_records


def read(folder, row: dict, suffix: str = "jsonl", **options) -> Record:
    path = folder / f"data.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row))
    [record] = read_records(path, **options)
    return record


def refused(folder, row: dict) -> str:
    with pytest.raises(RecordError) as refusal:
        read(folder, row)
    assert "\n" not in str(refusal.value) and "data.jsonl:1" in str(refusal.value)
    return str(refusal.value)


def said(record: Record) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in record.turns]


def talk(*texts: str, **last) -> list[dict]:
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * len(texts), texts)]
    turns[-1] |= last
    return turns


def shared(*texts: str, **last) -> list[dict]:
    turns = [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * len(texts), texts)]
    turns[-1] |= last
    return turns


PLAIN = [("human", "<image>\nWho?"), ("gpt", "A cat.")]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": shared("<image>\nWho?", "A cat."), "image": "a.jpg", "id": "1"},  # LLaVA-Instruct
        {"conversations": shared("<image>\nWho?", "A cat."), "image": "a.jpg", "data_source": "x"},  # LLaVA-OneVision
        {"texts": [{"user": "Who?", "assistant": "A cat.", "source": "x"}], "images": ["a.jpg"]},  # the_cauldron
        {"texts": [{"user": "Who?", "assistant": "A cat."}], "images": ["a.jpg"], "ratings": [5]},  # FineVision
        {"messages": talk("<image>\nWho?", "A cat."), "images": ["a.jpg"]},  # ms-swift, LLaMA-Factory
        {"query": "<image>\nWho?", "response": "A cat.", "images": ["a.jpg"]},  # ms-swift, earlier
        {"conversations": shared("<image>\nWho?", "A cat."), "images": ["a.jpg"]},  # LLaMA-Factory
        {"conversations": shared("Who?", "A cat."), "images": ["a.jpg"]},
        {"instruction": "<image>", "input": "Who?", "output": "A cat.", "images": ["a.jpg"]},
        {"image": "a.jpg", "prompt": "Who?", "response": "A cat."},
        {
            "prompt": talk("Who?"),
            "completion": [{"role": "assistant", "content": "A cat."}],
            "images": ["a.jpg"],
        },  # TRL
    ],
)
def test_one_conversation_in_every_dialect(tmp_path, row):
    for suffix in ("jsonl", "parquet"):
        record = read(tmp_path, row, suffix)
        assert said(record) == PLAIN and record.images == [Media(path="a.jpg")] and record.notes == ()
    [record] = from_dataset([row])
    assert said(record) == PLAIN


def test_openai_and_axolotl_lines(tmp_path):
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
    content = [{"type": "text", "text": "Who?"}, url]
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]}
    row["messages"].append({"role": "assistant", "content": "A cat.", "weight": 1, "refusal": None})
    assert said(read(tmp_path, row)) == [("system", "Be brief."), ("human", "Who?\n<image>"), ("gpt", "A cat.")]
    parts = [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "Who?"}]
    row = {"messages": [{"role": "user", "content": parts}, *talk("", "A cat.")[1:]]}
    assert said(read(tmp_path, row)) == PLAIN


@pytest.mark.parametrize(
    "flag", [{"loss": False}, {"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}]
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_answer_that_is_not_to_be_learnt_carries_no_loss(tmp_path, flag, suffix):
    for row in (
        {"messages": [*talk("q", "a", **flag), *talk("r", "b")]},
        {"conversations": [*shared("q", "a", **flag), *shared("r", "b")]},
        {"conversations": [*shared("q", "a", **flag), *shared("r", "b")], "system": "Be brief."},
        {"texts": [{"user": "q", "assistant": "a", **flag}, {"user": "r", "assistant": "b"}]},
    ):
        record = read(tmp_path, row, suffix)
        assert [turn.role for turn in record.turns[-4:]] == ["human", "ignored_gpt", "human", "gpt"]
        assert record.notes == ()
    row = {"messages": talk("q", "a", loss=True, weight=1, train=None)}
    assert said(read(tmp_path, row)) == [("human", "q"), ("gpt", "a")]


@pytest.mark.parametrize(
    "turn, part",
    [
        ({"weight": 0.5}, "its `weight` is 0.5: an answer is learnt or it is not"),
        ({"loss": "no"}, "its `loss` is 'no'"),
        ({"loss_scale": 0.3}, "its key 'loss_scale' is not read"),
        ({"train_detail": [{"begin_offset": 0, "train": False}]}, "its key 'train_detail' is not read"),
        ({"images": ["iVBOR"]}, "its key 'images' is not read"),
        ({"image": "a.jpg"}, "its key 'image' is not read"),
        ({"audio": {"id": "x"}}, "its key 'audio' is not read"),
        ({"function_call": {"name": "f"}}, "its key 'function_call' is not read"),
        ({"base64": "AAAA"}, "its key 'base64' is not read"),
        ({"text": "more"}, "its key 'text' is not read"),
    ],
)
def test_what_a_turn_says_beside_its_words_is_not_lost(tmp_path, turn, part):
    for row in (
        {"messages": talk("q", "a", **turn)},
        {"conversations": shared("q", "a", **turn)},
        {"texts": [{"user": "q", "assistant": "a", **turn}]},
    ):
        assert part in refused(tmp_path, row)
    with pytest.raises(RecordError, match="turn 2: its"):
        Record.from_dict({"conversations": shared("q", "a", **turn)})
    if "weight" in turn or "loss" in turn:
        assert "its `train` is True, but only answers are learnt" in refused(
            tmp_path, {"messages": talk("q", train=True)}
        )


def test_other_keys_of_a_turn_are_told(tmp_path):
    row = {"messages": talk("q", "a", mood="glad", name="Bob", id=3, refusal=None, annotations=[])}
    [note] = read(tmp_path, row).notes
    assert note == "message 2 of `messages`: the key 'mood' is not read: drop or rename it" and note.kind == "remark"
    [note] = read(tmp_path, {"conversations": shared("q", "a", mood="glad", id="x")}).notes
    assert note == "turn 2: the key 'mood' is not read: drop or rename it" and note.kind == "remark"
    part = {"type": "image", "image": "a.jpg", "max_pixels": 3}
    [note] = read(tmp_path, {"messages": [{"role": "user", "content": [part]}]}).notes
    assert note.startswith("message 1 of `messages`, part 1: the key 'max_pixels'")


@pytest.mark.parametrize(
    "part, key",
    [
        ({"type": "text", "text": "q", "image": "a.jpg"}, "image"),
        ({"text": "q", "image_url": {"url": "a.jpg"}}, "image_url"),
        ({"type": "image", "image": "a.jpg", "text": "q"}, "text"),
        ({"type": "image", "image": "a.jpg", "video": "a.mp4"}, "video"),
    ],
)
def test_a_part_is_one_thing(tmp_path, part, key):
    row = {"messages": [{"role": "user", "content": [part]}, *talk("", "a")[1:]]}
    assert f"message 1 of `messages`: part 1: its key '{key}' is not read" in refused(tmp_path, row)


def test_system_messages_and_thoughts_beside_the_words(tmp_path):
    for key in ("system", "system_prompt"):
        for row in (
            {"messages": talk("q", "a")},
            {"conversations": shared("q", "a")},
            {"prompt": "q", "response": "a"},
        ):
            record = read(tmp_path, {**row, key: "Be brief."})
            assert said(record) == [("system", "Be brief."), ("human", "q"), ("gpt", "a")] and record.meta == {}
            assert len(read(tmp_path, {**row, key: ""}).turns) == 2
    row = {"messages": [{"role": "system", "content": "x"}, *talk("q", "a")], "system": "y"}
    assert "the row has `system` and another system message: keep one" in refused(tmp_path, row)
    pairs = [{"system": "Be brief.", "user": "q", "assistant": "a"}, {"system": "", "user": "r", "assistant": "b"}]
    assert [turn.role for turn in read(tmp_path, {"texts": pairs}).turns] == ["system", *["human", "gpt"] * 2]
    for key in ("reasoning", "thinking", "reasoning_content"):
        assert (
            read(tmp_path, {"messages": talk("q", "4", **{key: "2 + 2"})}).turns[1].text.startswith("<think>\n2 + 2\n")
        )
    assert "keep one" in refused(tmp_path, {"messages": talk("q", "4", reasoning="a", thinking="b")})
    for key in ("history", "audios", "audio"):
        assert f"the key `{key}` is not read" in refused(tmp_path, {"query": "q", "response": "a", key: [["p", "b"]]})


def test_what_the_record_form_has_not_is_no_record(tmp_path):
    for key in ("images", "videos", "audios", "system", "system_prompt", "history", "messages"):
        with pytest.raises(RecordError, match=f"the key `{key}` is not read") as refusal:
            Record.from_dict({"conversations": shared("q", "a"), key: ["a.jpg"]})
        assert refusal.value.kind == "unknown_key"
        assert Record.from_dict({"conversations": shared("q", "a"), key: []}).meta == {key: []}
    for key, value in (("chosen", {"value": "a"}), ("kto_tag", False), ("objects", {"bbox": [[1, 2, 3, 4]]})):
        with pytest.raises(RecordError, match=f"the key `{key}` is not read"):
            Record.from_dict({"conversations": shared("q", "<bbox>"), key: value})
    record = Record.from_dict({"conversations": shared("q", "a"), "objects": {"bbox": [[1, 2, 3, 4]]}})
    assert record.meta == {"objects": {"bbox": [[1, 2, 3, 4]]}}
    record = read(tmp_path, {"conversations": shared("<video>q", "a"), "videos": ["a.mp4"]})
    assert record.video == [Media(path="a.mp4")]
    row = {"conversations": shared("Picture 1: <img>a.jpg</img>\nWho?", "A cat.")}
    assert "turn 1: <img>a.jpg</img> names a picture" in refused(tmp_path, row)
    assert "turn 1: <img>" in refused(tmp_path, {"messages": talk("<img>a.jpg</img>Who?", "A cat.")})


def test_the_bytes_of_a_video_are_called_what_they_are():
    video = {"bytes": b"x", "path": "a.mp4"}
    for row in (
        {"conversations": shared("<video>", "a"), "video": video},
        {"messages": talk("q", "a"), "videos": [video]},
    ):
        with pytest.raises(RecordError, match="a video in the row itself is not read: save it as a file"):
            list(from_dataset([row]))


def test_base64_alone_is_called_what_it_is(tmp_path):
    data = "iVBORw0KGgo" + "A" * 200
    for row in (
        {"conversations": shared("<image>", "a"), "image": data},
        {"messages": talk("q", "a"), "images": [data]},
    ):
        assert "is the picture itself, as base64" in refused(tmp_path, row)


def test_of_two_conversations_one_is_read_and_told(tmp_path):
    record = read(tmp_path, {"messages": talk("q", "a"), "conversations": shared("r", "b")})
    assert said(record) == [("human", "q"), ("gpt", "a")]
    assert record.notes == ("the row has `messages` and `conversations`: only `messages` is read",)

    row = {"messages": talk("q"), "chosen": talk("", "a")[1:], "rejected": [], "tools": [{"name": "f"}]}
    notes = read(tmp_path, row).notes
    assert notes[0] == "the row has `messages` and `chosen`: only `messages` is read"
    assert notes[1].startswith("`tools` is only kept in `meta`") and notes[1].kind == "unknown_key"


def test_preferences_and_marks_of_bad_answers(tmp_path):
    row = {"messages": talk("q", "a"), "rejected_response": "b"}  # ms-swift
    record = read(tmp_path, row)
    assert said(record) == [("human", "q"), ("gpt", "a")] and record.meta == {"rejected_response": "b"}
    assert record.notes == ("of the two answers `messages` is read, and `rejected_response` is only kept in `meta`",)
    answers = {name: {"from": "gpt", "value": name} for name in ("chosen", "rejected")}
    record = read(tmp_path, {"conversations": shared("q", "a", "r"), **answers})  # LLaMA-Factory
    assert said(record) == [("human", "q"), ("ignored_gpt", "a"), ("human", "r"), ("gpt", "chosen")]
    for row in (
        {"prompt": "q", "completion": "a", "label": False},
        {"prompt": "q", "completion": "a", "label": 0},
        {"prompt": "q", "completion": "a", "label": "False"},
        {"messages": talk("q", "a"), "label": False},
        {"conversations": shared("q", "a"), "kto_tag": False},
    ):
        assert ", which marks an answer that is not to be learnt" in refused(tmp_path, row)
    assert read(tmp_path, {"prompt": "q", "label": False}).meta == {"label": False}  # what a rollout is to find
    assert read(tmp_path, {"prompt": "q", "completion": "a", "label": True}).meta == {"label": True}
    assert read(tmp_path, {"conversations": shared("q", "a"), "label": False}).meta == {"label": False}


def test_a_chosen_answer_follows_its_prompt_once(tmp_path):
    whole, alone = talk("q", "a", "r", "b"), talk("r", "b")[1:]
    four = [("human", "q"), ("ignored_gpt", "a"), ("human", "r"), ("gpt", "b")]
    for key, chosen in (("chosen", alone), ("chosen", whole), ("completion", alone), ("completion", whole)):
        assert said(read(tmp_path, {"prompt": whole[:3], key: chosen})) == four
    for chosen in ("b", alone, talk("r", "b")):
        for asked in ({"prompt": "r"}, {"query": "r"}, {"instruction": "", "input": "r"}):
            assert said(read(tmp_path, {**asked, "chosen": chosen, "rejected": "c"})) == [("human", "r"), ("gpt", "b")]
    assert said(read(tmp_path, {"prompt": "r", "completion": talk("r", "b")})) == [("human", "r"), ("gpt", "b")]
    assert "begins with a question" in refused(tmp_path, {"prompt": "q", "completion": talk("r", "b")})
    assert "there is no `prompt`" in refused(tmp_path, {"chosen": alone, "rejected": alone})
    [note] = read(tmp_path, {"prompt": "r", "chosen": "b", "rejected": "c", "system": "s"}).notes
    assert note.startswith("of the two answers `chosen` is read")


@pytest.mark.parametrize(
    "key", ["image_path", "img", "imgs", "image_file", "image_url", "file_name", "image_1", "video_path"]
)
def test_a_picture_under_another_name_is_not_left_out(tmp_path, key):
    named = {key: "a.mp4" if key == "video_path" else "a.jpg"}
    advice = "a video, so name it `video`" if key == "video_path" else "a picture, so name it `image`"
    rows = (
        {"messages": talk("q", "a")},
        {"prompt": "q", "completion": "a"},
        {"conversations": shared("q", "a")},
        {"instruction": "q", "output": "a"},
    )
    for row in rows:
        assert f"the key `{key}` is not read: it is {advice}" in refused(tmp_path, {**row, **named})
        assert said(read(tmp_path, {**row, key: None})) == [("human", "q"), ("gpt", "a")]
    assert read(tmp_path, {**rows[0], **named, "images": ["b.jpg"]}).images == [Media(path="b.jpg")]
    assert read(tmp_path, {**rows[0], "image_id": 3, "file_name": "notes.txt"}).images == []


@pytest.mark.parametrize("place", ["<Image>", "<ImageHere>", "<image_1>", "<image_placeholder>", "<|image|>"])
def test_the_place_of_a_picture_as_others_write_it(tmp_path, place):
    row = {"messages": talk(f"See {place} there", "a"), "images": ["a.jpg"]}
    assert f"{place} looks like the place of a picture" in refused(tmp_path, row)
    assert said(read(tmp_path, {"messages": talk(f"See {place}", "a")}))[0] == ("human", f"See {place}")
    row = {"messages": talk("<video>q", "a"), "images": ["a.jpg"], "videos": ["a.mp4"]}
    assert said(read(tmp_path, row))[0] == ("human", "<image>\n<video>q")


def test_thinking_stands_once(tmp_path):
    row = {"messages": talk("q", "<think>\nhm\n</think>\n\na", reasoning_content="hm")}
    assert "its thinking stands in its content and beside it: keep one" in refused(tmp_path, row)


def test_what_says_nothing_is_not_told(tmp_path):
    row = {"messages": talk("q", "a"), "tools": "[]", "videos": [], "objects": {"ref": [], "bbox": []}}
    assert read(tmp_path, row).notes == ()
    for suffix in ("jsonl", "parquet"):
        row = {"conversations": shared("<image>q", "a"), "image": ["a.jpg"], "video": [], "images": [], "history": []}
        assert read(tmp_path, row, suffix).video is None


def test_a_picture_in_a_column_of_another_name_is_not_left_out():
    image = Image.new("RGB", (4, 4))
    file = io.BytesIO()
    image.save(file, "PNG")
    data = file.getvalue()
    for value in (image, data, {"bytes": data, "path": None}, [{"bytes": data}], {"bytes": None, "path": "a.PNG"}):
        for key in ("screenshot", "img"):
            with pytest.raises(RecordError, match=f"the key `{key}` is not read: it is a picture, so name it `image`"):
                list(from_dataset([{"messages": talk("q", "a"), key: value}]))
        [record] = from_dataset([{"messages": talk("q", "a"), "image": "a.jpg", "thumbnail": value}])
        assert record.images == [Media(path="a.jpg")]
    [record] = from_dataset([{"messages": talk("q", "a"), "hash": b"1234"}])
    assert record.images == []


def test_a_developer_is_the_system(tmp_path):
    turns = [("system", "Count."), ("human", "2 + 2?"), ("gpt", "4")]
    first = {"role": "developer", "content": "Count."}
    assert said(read(tmp_path, {"messages": [first, *talk("2 + 2?", "4")]})) == turns
    assert said(read(tmp_path, {"conversations": [first, *talk("2 + 2?", "4")]})) == turns
    assert "another system message" in refused(tmp_path, {"messages": [first, *talk("q", "a")], "system": "Be brief."})
