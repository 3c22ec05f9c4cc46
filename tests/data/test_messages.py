from __future__ import annotations

import base64
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import Media, Record, RecordError, Turn, open_media, read_records, write_records


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(file, "PNG")
    return file.getvalue()


def user(*parts, **more) -> dict:
    return {
        "role": "user",
        "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts),
        **more,
    }


def assistant(text, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


PICTURE = {"type": "image"}


def read(folder, *rows: dict, **options) -> list[Record]:
    path = folder / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return list(read_records(path, **options))


def one(folder, *messages, **row) -> Record:
    [record] = read(folder, {"messages": list(messages), **row})
    return record


def refused(folder, row: dict) -> str:
    with pytest.raises(RecordError) as refusal:
        read(folder, row)
    assert "\n" not in str(refusal.value) and "talk.jsonl:1" in str(refusal.value)
    return str(refusal.value)


def texts(record: Record) -> list[str]:
    return [turn.text for turn in record.turns]


def test_parts_and_pictures_beside_them(tmp_path):
    record = one(
        tmp_path,
        {"role": "system", "content": "Be brief."},
        user(PICTURE, text("What is"), PICTURE, text("this?")),
        assistant([text("A cat.")]),
        images=["a.png", {"bytes": None, "path": "b.png"}],
        id=3,
        solution="cat",
    )
    assert texts(record) == ["Be brief.", "<image>\nWhat is\n<image>\nthis?", "A cat."]
    assert [turn.role for turn in record.turns] == ["system", "human", "gpt"]
    assert record.images == [Media(path="a.png"), Media(path="b.png")]
    assert (record.id, record.meta, record.notes) == ("3", {"solution": "cat"}, ())


def test_pictures_that_no_part_places_go_before_the_first_user_message(tmp_path):
    record = one(tmp_path, assistant("Hi."), user("Who?"), user("And?"), images=["a.png", "b.png"])
    assert texts(record) == ["Hi.", "<image>\n<image>\nWho?", "And?"]
    assert one(tmp_path, user("Who?"), image="a.png").images == [Media(path="a.png")]
    assert "no user message" in refused(tmp_path, {"messages": [assistant("Hi.")], "images": ["a.png"]})


def test_pictures_go_where_plain_text_says(tmp_path):
    record = one(tmp_path, user("See <image> and"), user("<image>?"), images=["a.png", "b.png"])
    assert texts(record) == ["See <image> and", "<image>?"] and record.notes == ()
    for turns in ([user("q"), assistant("the <image> tag")], [{"role": "system", "content": "<image>"}, user("q")]):
        said = refused(tmp_path, {"messages": turns, "images": ["a.png"]})
        assert "write <image> in the user message that the image belongs to" in said
    row = {"messages": [user("See <image>")], "images": ["a.png", "b.png"]}
    assert "the turns hold 1 <image> but `image` lists 2" in refused(tmp_path, row)


def test_a_placeholder_in_text_beside_parts_is_text(tmp_path):
    record = one(tmp_path, user(PICTURE, text("the <image> tag, <im<video>age>")), assistant("<image>?"), images=["a"])
    assert texts(record) == ["<image>\nthe  tag, ", "?"]
    assert record.notes == (
        "3 <image> or <video> in turn 1 were text, and taken out",
        "1 <image> or <video> in turn 2 was text, and taken out",
    )


def test_a_crop_call_in_text_keeps_its_picture(tmp_path):
    call = "<tool_call>Crop [1, 2, 30, 40]</tool_call><image>\nA bell."
    for content in (user(PICTURE, text("What?")), user("What?")):
        record = one(tmp_path, content, assistant(call), images=["a.png"])
        assert texts(record) == ["<image>\nWhat?", call]
        assert record.images == [Media(path="a.png"), Media(path="a.png", box=(1, 2, 30, 40))]


def test_parts_with_a_picture_of_their_own(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    record = one(
        tmp_path,
        user({"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": url}}, PICTURE),
        user({"type": "image", "url": "file:///b.png"}, {"type": "image", "path": "c.png"}, {"image": "d.png"}),
        images=["e.png"],
    )
    assert [media.path for media in record.images] == ["a.png", None, "e.png", "/b.png", "c.png", "d.png"]
    assert record.images[1].data == png()
    for address in ("https://example.org/a.png", "HTTP://x/a.png", "hf://x/y"):
        row = {"messages": [user({"type": "image_url", "image_url": {"url": address}})]}
        assert "message 1 of `messages`: part 1: a picture lies at an address" in refused(tmp_path, row)


def test_the_index_of_a_part_says_which_picture(tmp_path):
    parts = [{"type": "image", "text": None, "index": 1}, {"type": "text", "text": "Who?", "index": None}]
    record = one(tmp_path, user(*parts), images=["a.png", "b.png"])
    assert record.images == [Media(path="b.png")] and texts(record) == ["<image>\nWho?"]


@pytest.mark.parametrize(
    "row, part",
    [
        (
            {"messages": [user(PICTURE, PICTURE)], "images": ["a.png"]},
            "message 1 of `messages`: part 2: a part of type",
        ),
        ({"messages": [user(PICTURE)], "images": ["a.png", "b.png"]}, "`images` has 2 but the parts place 1"),
        ({"messages": [user({"type": "image", "index": 4})], "images": ["a"]}, "asks for image 5, but `images` has 1"),
        ({"messages": [user(PICTURE)], "images": ["a.png"], "image": "a.png"}, "both `images` and `image`"),
        ({"messages": [user({"type": "audio"})]}, "part 1: it has the type 'audio'"),
        ({"messages": [user("x", "y")]}, "part 1: it is not of the form"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "the role 'boss': use system, user, assistant or tool"),
        ({"messages": [{"role": "user"}]}, "message 1 of `messages`: it is not of the form"),
        ({"messages": "x"}, "`messages` is a list of messages"),
        ({"messages": None}, "`messages` is a list of messages"),
        ({"query": None, "response": "a"}, "`query` is a list of messages"),
        ({"messages": []}, "the conversation has no turns"),
        ({"chosen": "a", "rejected": "b"}, "`chosen` is only an answer, and there is no `prompt` that it answers"),
        ({"prompt": "q", "chosen": 3}, "`chosen` is a list of messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "no message of the assistant stands before it"),
        ({"messages": [user("q"), assistant("c"), {"role": "tool", "content": "</tool_response>"}]}, "end it early"),
        ({"messages": [user("q")], "videos": ["a.mp4", "b.mp4"]}, "2 videos, and a record has one"),
    ],
)
def test_what_is_refused(tmp_path, row, part):
    assert part in refused(tmp_path, row)


def test_a_tool_answers_in_the_assistants_turn(tmp_path):
    call = "<tool_call>Identify [1, 2, 3, 4]</tool_call>"
    record = one(
        tmp_path,
        user("Who?"),
        assistant(call),
        {"role": "tool", "content": "a cat"},
        assistant("It is a cat."),
        user("?"),
    )
    assert texts(record) == ["Who?", f"{call}<tool_response>a cat</tool_response>\nIt is a cat.", "?"]
    shown = [PICTURE, text("</tool_<image>response>")]  # a tag, once the placeholder in its middle is taken out
    row = {"messages": [user("q"), assistant(call), {"role": "tool", "content": shown}], "images": ["a.png"]}
    assert "end it early" in refused(tmp_path, row)
    crop = assistant("", tool_calls=[{"function": {"name": "crop", "arguments": '{"bbox_2d": [1, 2, 3.5, 4]}'}}])
    record = one(
        tmp_path, user("Who?"), crop, {"role": "tool", "content": [PICTURE]}, assistant("A cat."), images=["a"]
    )
    assert texts(record)[1] == "\n<tool_call>[1, 2, 3.5, 4]</tool_call><image>\nA cat."


def test_structured_calls_of_other_tools_are_refused(tmp_path):
    call = {"type": "function", "function": {"name": "search", "arguments": {"q": "x"}}}
    row = {"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert "the call of 'search' in `tool_calls` has no form here" in refused(tmp_path, row)
    call["function"] = {"name": "crop", "arguments": {"bbox": [1, 2, 3, 10**400]}}
    assert "has no box of four numbers" in refused(tmp_path, row)


def test_reasoning_becomes_thinking(tmp_path):
    record = one(tmp_path, user("q"), assistant("Four.", reasoning_content="2 + 2\n"))
    assert texts(record)[1] == "<think>\n2 + 2\n</think>\n\nFour."


def test_prompt_and_completion(tmp_path):
    prompt = [user(PICTURE, text("Who?")), assistant("A cat."), user("And?")]
    [record] = read(tmp_path, {"prompt": prompt, "completion": [assistant("A dog.")], "images": ["a.png"]})
    assert [turn.role for turn in record.turns] == ["human", "ignored_gpt", "human", "gpt"]
    [record] = read(tmp_path, {"prompt": "2 + 2?", "completion": "4"})
    assert [(turn.role, turn.text) for turn in record.turns] == [("human", "2 + 2?"), ("gpt", "4")]
    [record] = read(tmp_path, {"prompt": [user("2 + 2?")], "image": "a.png", "solution": "4"})  # for rollouts
    assert texts(record) == ["<image>\n2 + 2?"] and record.meta == {"solution": "4"}
    [record] = read(tmp_path, {"prompt": "a topic", "messages": [user("q")]})
    assert texts(record) == ["q"] and record.meta == {"prompt": "a topic"}
    assert record.notes == ("the row has `messages` and `prompt`: only `messages` is read",)
    assert record.notes[0].kind == "remark"
    [record] = read(tmp_path, {"prompt": "2 + 2?", "answer": "4"})
    assert texts(record) == ["2 + 2?"] and record.meta == {"answer": "4"}
    assert record.notes == ("`answer` is only kept in `meta`: name it `completion` if it is the answer to learn",)


def test_of_preferences_the_chosen_answer_is_read(tmp_path):
    """TRL's preference forms: text or messages, the prompt beside the answers or at their beginning."""
    asked, good, bad = user(PICTURE, text("Who?")), assistant("A cat."), assistant("A dog.")
    talk = {"images": ["a.png"], "chosen": [asked, good], "rejected": [asked, bad]}
    for row in (
        {"prompt": [asked], "chosen": [good], "rejected": [bad], "images": ["a.png"]},
        {"prompt": "<image>\nWho?", "chosen": "A cat.", "rejected": "A dog.", "images": ["a.png"]},
        talk,
        {**talk, "prompt": "Who?"},  # as UltraFeedback repeats its question
    ):
        [record] = read(tmp_path, row)
        assert [(turn.role, turn.text) for turn in record.turns] == [("human", "<image>\nWho?"), ("gpt", "A cat.")]
        assert record.meta["rejected"] == row["rejected"] and "chosen" not in record.meta
        assert record.notes == ("of the two answers `chosen` is read, and `rejected` is only kept in `meta`",)
        assert record.notes[0].kind == "remark"  # no fault
        [back] = read_records(write_records([record], tmp_path / "back.jsonl", format="messages"))
        assert back.to_dict() == record.to_dict()
    [record] = read(tmp_path, {"prompt": "q", "completion": "a", "chosen": "b", "rejected": "c"})
    assert texts(record) == ["q", "a"] and record.meta == {"chosen": "b", "rejected": "c"}


def test_other_names_of_the_same_form(tmp_path):
    [record] = read(tmp_path, {"conversations": [user("q"), assistant("a")]})
    assert texts(record) == ["q", "a"]
    [record] = read(tmp_path, {"texts": [{"user": "q", "assistant": "a", "source": "x"}], "images": ["a.png"]})
    assert texts(record) == ["<image>\nq", "a"]
    row = {"messages": [user("q")], "conversations": [{"role": "user", "content": "other"}]}
    assert read(tmp_path, row)[0].notes == ("the row has `messages` and `conversations`: only `messages` is read",)


def test_videos(tmp_path):
    film = {"type": "video"}
    for row, video in [
        ({"videos": ["a.mp4"]}, [Media(path="a.mp4")]),
        ({"video": "a.mp4"}, [Media(path="a.mp4")]),
        ({"video": ["1.png", "2.png"], "videos": None}, [Media(path="1.png"), Media(path="2.png")]),
        ({"videos": [["1.png", "2.png"]]}, [Media(path="1.png"), Media(path="2.png")]),
    ]:
        for content in (user("What?"), user(film, text("What?"))):
            record = one(tmp_path, content, **row)
            assert texts(record) == ["<video>\nWhat?"] and record.video == video
    record = one(tmp_path, user({"type": "video", "video": ["1.png"]}, text("What?")))
    assert record.video == [Media(path="1.png")]
    row = {"messages": [user({"type": "video_url", "video_url": {"url": "http://x/a.mp4"}})]}
    assert "nothing is downloaded" in refused(tmp_path, row)


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=8)
said = st.lists(words | st.sampled_from(["<image>", "\n", "<image>\n", "\n<image>"]), max_size=5).map("".join)


@st.composite
def conversations(draw) -> Record:
    roles = draw(st.lists(st.sampled_from(["human", "ignored_gpt"]), max_size=2))
    roles += draw(st.lists(st.sampled_from(["human", "gpt", "system"]), min_size=1, max_size=3))
    if "gpt" not in roles and "ignored_gpt" in roles:
        roles.append("gpt")
    turns = [Turn(role=role, text=draw(said)) for role in roles]
    count = sum(turn.text.count("<image>") for turn in turns)
    images = [Media(path=f"{n}.png", box=draw(st.none() | st.just((1, 2, 3, 4)))) for n in range(count)]
    film = draw(st.none() | st.just([Media(path="1.png"), Media(path="2.png")]) | st.just([Media(path="a.mp4")]))
    if film:
        turns.append(Turn(role="human", text="<video>\nWhat?"))
    more = draw(st.fixed_dictionaries({}, optional={"kind": words, "box_coordinates": st.just("thousand")}))
    meta = draw(st.dictionaries(st.sampled_from(["a", "source"]), words, max_size=2))
    return Record(id=draw(words), turns=turns, images=images, video=film, meta=meta, **more)


@pytest.mark.parametrize("name", ["back.jsonl", "back.json", "back.parquet"])
@settings(deadline=None)  # pyarrow is imported on the way
@given(record=conversations())
def test_there_and_back(tmp_path_factory, name, record):
    path = tmp_path_factory.getbasetemp() / name
    try:
        write_records([record], path, format="messages")
    except RecordError as error:
        assert "inside a line of an answer" in str(error)
        return
    [again] = read_records(path)
    assert again.to_dict() == record.to_dict() and again.notes == ()


def test_trl_and_datasets_take_what_is_written(tmp_path):
    datasets = pytest.importorskip("datasets")
    from trl.data_utils import prepare_multimodal_messages

    turns = [Turn(role="human", text="<image>\nWhat colour?"), Turn(role="gpt", text="Red.")]
    records = [Record(id=str(n), turns=turns, images=[Media(data=png())]) for n in range(3)]
    path = write_records(records, tmp_path / "talk.parquet", format="messages")
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    messages = prepare_multimodal_messages(table[1]["messages"], table[1]["images"])
    assert messages[0]["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)
    back = list(read_records(path))
    assert [record.images[0].data for record in back] == [png()] * 3
    assert open_media(back[0])[0][0].size == (3, 2)


def test_what_has_no_form(tmp_path):
    roles = ["human", "gpt", "human", "ignored_gpt"]
    record = Record(id="a", turns=[Turn(role=role, text="x") for role in roles], source="t.json:3")
    with pytest.raises(
        RecordError, match=r"record 'a' \(t.json:3\) cannot be written as messages: a turn without loss"
    ):
        write_records([record], tmp_path / "a.jsonl", format="messages")
    crop = Turn(role="gpt", text="<tool_call>[1, 2, 3, 4]</tool_call><image>")
    record = Record(id="a", turns=[crop], images=[Media(path="crop.png")])
    with pytest.raises(RecordError, match="it shows crops but no whole picture"):
        write_records([record], tmp_path / "a.jsonl", format="messages")
    record = Record(id="a", turns=[Turn(role="human", text="x")], meta={"images": 3})
    with pytest.raises(RecordError, match="`meta` holds 'images'"):
        write_records([record], tmp_path / "a.jsonl", format="messages")


keys = st.sampled_from(
    ["messages", "prompt", "completion", "texts", "conversations", "images", "image", "videos", "video", "id", "kind"]
    + ["role", "content", "type", "text", "url", "index", "tool_calls", "function", "name", "arguments", "bbox", "user"]
    + ["chosen", "rejected", "image_url", "bytes", "path", "reasoning_content", "assistant", "box", "from", "value"]
    + ["query", "response", "instruction", "input", "output", "system", "objects", "ref", "loss", "weight", "thinking"]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**20)
    | st.floats()
    | st.sampled_from(
        ["user", "assistant", "tool", "text", "image", "video", "<image>", "crop", "data:;base64,A", "\ud800", ""]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": values | st.just("<bbox><ref-object>")},
    optional={"loss": values, "thinking": values, "image": values},
)
objects = st.fixed_dictionaries({}, optional={"ref": values, "bbox": values, "bbox_type": values})
more = {"images": values, "videos": values, "system": values, "label": values, "objects": values | objects}


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(keys, values, max_size=5)
    | st.fixed_dictionaries({"messages": st.lists(message, max_size=4)}, optional=more)
    | st.fixed_dictionaries({"conversations": st.lists(message, max_size=4)}, optional=more),
    st.sampled_from([None, "messages", "records"]),
)
def test_any_row_is_a_record_or_a_sentence(tmp_path_factory, row, format):
    try:
        for record in read(tmp_path_factory.getbasetemp(), row, format=format):
            assert isinstance(record, Record)
    except RecordError as error:
        assert "\n" not in str(error)


def test_a_data_set_in_memory(tmp_path):
    datasets = pytest.importorskip("datasets")
    from ovisnb.data.formats.in_memory import from_dataset

    rows = [{"messages": [user(PICTURE, text(f"Who is {n}?")), assistant([text("Me.")])], "n": n} for n in range(3)]
    plain_rows = [{**row, "images": [Image.new("RGB", (3, 2), "blue")]} for row in rows]
    embedded = [{**row, "images": [{"bytes": png("blue"), "path": "x.png"}]} for row in rows]
    pictures = datasets.Dataset.from_list(embedded).cast_column("images", datasets.List(datasets.Image()))
    for data in (plain_rows, embedded, datasets.Dataset.from_list(embedded), pictures):
        records = from_dataset(data, name="blues")
        assert len(records) == 3 and [record.meta["n"] for record in records] == [0, 1, 2]
        assert records[-1].turns[0].text == "<image>\nWho is 2?" and records[1].source == "blues:2"
        assert open_media(records[1])[0][0].getpixel((0, 0)) == (0, 0, 255)
        with pytest.raises(IndexError, match="3 records, but number 3"):
            records[3]
    assert records[0].images[0].data == png("blue")  # as it lies in the table, not decoded
    broken = from_dataset([{"messages": 3}, {"image": "a", "caption": ["a", "b"]}, 7])
    for index, part in enumerate(["`messages` is a list", "the row holds 2 records", "a record is an object"]):
        with pytest.raises(RecordError, match=f"dataset:{index + 1}.*{part}"):
            broken[index]
    with pytest.raises(TypeError, match="choose a split"):
        from_dataset(datasets.DatasetDict({"train": pictures}))
    with pytest.raises(TypeError, match="read a stream"):
        from_dataset(pictures.to_iterable_dataset())


def test_a_video_right_after_a_call_is_no_crop(tmp_path):
    asked = "After <tool_call>Crop [1, 2, 30, 40]</tool_call><video> what?"
    [record] = read(tmp_path, {"messages": [user(asked), assistant("A cat.")], "videos": ["a.mp4"]})
    assert record.turns[0].text == asked and [media.path for media in record.video] == ["a.mp4"]
    assert list(read_records(write_records([record], tmp_path / "back.json", format="messages"))) == [
        record.model_copy(update={"source": f"{tmp_path / 'back.json'}:2"})
    ]
