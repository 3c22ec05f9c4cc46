from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import ROLES, Media, Record, RecordError, Turn
from ovisnb.data.boxes import CONVENTIONS
from ovisnb.data.checks.faults import KINDS
from ovisnb.data.record import FIELDS

TOOL_CALL = {
    "id": "who",
    "image": ["street.jpg", {"path": "street.jpg", "box": [10, 20, 100, 200]}],
    "kind": "read",
    "call_coordinates": "pixels",
    "conversations": [
        {"from": "system", "value": "You have access to Crop and Identify tools..."},
        {"from": "human", "value": "<image>\nWho is the person on the left?"},
        {
            "from": "gpt",
            "value": "<think>\n<tool_call>Crop [10,20,100,200]</tool_call><image>\nJohn.\n</think>\n\n<answer>John</answer>",
        },
    ],
    "licence": "CC0",
    "objects": [{"name": "person", "box": [10, 20, 100, 200]}],
}


def told(data, **place) -> str:
    """The one sentence that refuses `data`."""
    with pytest.raises(RecordError) as refusal:
        Record.from_dict(data, **place)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def talk(*turns, **fields):
    return {**fields, "conversations": [{"from": role, "value": text} for role, text in turns]}


def test_reads_turns_pictures_and_everything_else():
    record = Record.from_dict(TOOL_CALL, source="tools.json:3")
    assert record.id == "who" and record.source == "tools.json:3" and record.kind == "read"
    assert [turn.role for turn in record.turns] == ["system", "human", "gpt"]
    assert record.images == [Media(path="street.jpg"), Media(path="street.jpg", box=(10, 20, 100, 200))]
    assert record.video is None
    assert record.meta == {"licence": "CC0", "objects": TOOL_CALL["objects"]}
    assert record.to_dict() == TOOL_CALL


def test_one_picture_may_be_a_string_a_path_or_an_image():
    image = Image.new("RGB", (4, 4))
    for entry, media in [
        ("a.jpg", Media(path="a.jpg")),
        (["a.jpg"], Media(path="a.jpg")),
        (Path("a.jpg"), Media(path="a.jpg")),
        (image, Media(image=image)),
        ({"image": image, "box": [0, 0, 2, 2]}, Media(image=image, box=(0, 0, 2, 2))),
    ]:
        record = Record.from_dict(talk(("human", "<image>?"), image=entry))
        assert record.images == [media]
        assert Record.from_dict(record.to_dict()) == record


def test_text_only_and_video():
    assert Record.from_dict(talk(("human", "Hi"), ("gpt", "Hello"))).images == []
    record = Record.from_dict(talk(("human", "<video>\nWhat happens?"), video=["1.jpg", "2.jpg"], image=None))
    assert record.video == [Media(path="1.jpg"), Media(path="2.jpg")]
    both = Record.from_dict(talk(("human", "<video> or <image>?"), video=["1.jpg"], image="a.jpg"))
    assert len(both.images) == len(both.video) == 1


def test_a_text_may_say_nothing():
    data = talk(("system", ""), ("human", " \n"), ("gpt", ""), id="quiet")
    record = Record.from_dict(data)
    assert [turn.text for turn in record.turns] == ["", " \n", ""] and record.to_dict() == data


def test_a_record_without_id_is_named_after_its_file():
    assert Record.from_dict(talk(("gpt", "x")), source="sets/train.json:12", index=3).id == "train-3"
    assert Record.from_dict(talk(("gpt", "x")), index=3).id == "record-3"
    assert Record.from_dict(talk(("gpt", "x"), id=17)).id == "17"


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
plain = text.filter(lambda words: "<image>" not in words and "<video>" not in words)
numbers = st.floats(0, 1000, allow_nan=False)
crops = st.tuples(numbers, numbers, numbers, numbers).map(
    lambda box: (*(min(box[i], box[i + 2]) for i in (0, 1)), *(max(box[i], box[i + 2]) + 1 for i in (0, 1)))
)
media = st.builds(Media, path=text, box=st.none() | crops).filter(lambda picture: not picture.is_video)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def sound_records(draw):
    images = draw(st.lists(media, max_size=3))
    video = draw(st.none() | st.lists(media, min_size=1, max_size=3))
    marks = draw(st.permutations(["<image>"] * len(images) + ["<video>"] * (video is not None)))
    words = [draw(plain) for _ in range(draw(st.integers(1, 4)))]
    for mark in marks:
        turn = draw(st.integers(0, len(words) - 1))
        words[turn] = draw(st.sampled_from([mark + words[turn], words[turn] + mark]))
    return Record(
        id=draw(text),
        turns=[Turn(role=draw(st.sampled_from(ROLES)), text=word) for word in words],
        images=images,
        video=video,
        kind=draw(st.none() | text),
        box_coordinates=draw(st.sampled_from(CONVENTIONS)) if "<box>" in "".join(words) else "normalised",
        source=draw(st.sampled_from(["", "train.json:12", "shapes:7"])),
        meta=draw(st.dictionaries(text.filter(lambda key: key not in FIELDS), json_values, max_size=3)),
    )


@given(sound_records())
def test_round_trip(record):
    data = record.to_dict()
    assert Record.from_dict(data, source=record.source) == record
    assert Record.from_dict(json.loads(json.dumps(data)), source=record.source) == record


def test_more_placeholders_than_pictures():
    sentence = told(talk(("human", "<image><image>"), id="cat", image="a.jpg"), source="train.json:4")
    assert sentence.startswith("record 'cat' (train.json:4): the turns hold 2 <image> but `image` lists 1 picture")
    calls = "<tool_call>Crop [1,2,3,4]</tool_call><image>" * 2
    sentence = told(talk(("human", "<image>"), ("gpt", calls), image=["a.jpg", "b.jpg"]))
    assert "list the picture of every <image>, or leave out those of all crop calls" in sentence
    assert "the key is `image`, not `imag`" in told(talk(("human", "<image>"), imag=["a.jpg"]))


def calling(text, image="street.jpg", **fields):
    return talk(("human", "<image>\nWho?"), ("gpt", text), image=image, **fields)


def test_a_crop_call_without_a_picture_gets_the_crop():
    text = (
        "<think>\n<tool_call>Crop [10,20,100,200]</tool_call><image>\nNow identify them.\n"
        "<tool_call>Identify [10,20,100,200]</tool_call><tool_response>John Doe</tool_response>\n</think>\nJohn."
    )
    record = Record.from_dict(calling(text))
    assert record.images == [Media(path="street.jpg"), Media(path="street.jpg", box=(10, 20, 100, 200))]
    assert Record.from_dict(record.to_dict()) == record
    assert record.to_dict()["image"] == TOOL_CALL["image"]


def test_several_calls_get_one_crop_each_in_order():
    one, two = "<tool_call>[1, 2, 3, 4]</tool_call>", "<tool_call>Crop dog [5, 6, 7, 8]</tool_call>"
    wanted = [None, (1, 2, 3, 4), (5, 6, 7, 8)]
    for text in (f"{one}<image>{two}\n<image>", f"{one}{two}<image><image>"):
        assert [media.box for media in Record.from_dict(calling(text)).images] == wanted


def test_a_picture_belongs_to_the_call_right_before_it():
    one, two = "<tool_call>[1, 2, 3, 4]</tool_call>", "<tool_call>Crop dog [5, 6, 7, 8]</tool_call>"
    for text, wanted in (
        (f"{one} {two}<image>", [(5, 6, 7, 8)]),  # the first call has no picture
        (f"{one}\n{one}{two}<image><image>", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        (f"{one}{two}<image>{one}<image>", [(5, 6, 7, 8), (1, 2, 3, 4)]),
        (f"{one} so {two}<image>", [(5, 6, 7, 8)]),
    ):
        assert [media.box for media in Record.from_dict(calling(text)).images] == [None, *wanted]


def test_a_crop_is_cut_from_the_last_whole_picture_before_it():
    data = talk(
        ("human", "<image><image>"),
        ("gpt", "<tool_call>[1, 2, 3, 4]</tool_call><image>"),
        ("human", "<image>"),
        ("gpt", "<tool_call>[0.1, 0.2, 0.3, 0.4]</tool_call><image>"),
        image=["a.jpg", "b.jpg", "c.jpg"],
        call_coordinates="normalised",
    )
    images = Record.from_dict(data).images
    assert [media.path for media in images] == ["a.jpg", "b.jpg", "b.jpg", "c.jpg", "c.jpg"]
    assert images[4] == Media(path="c.jpg", box=(0.1, 0.2, 0.3, 0.4), coordinates="normalised")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (
            calling("<tool_call>[5, 6, 5, 8]</tool_call><image>"),
            "turn 2: the call [5, 6, 5, 8]: a box needs x1 < x2",
        ),
        (calling("<tool_call>[5, 6]</tool_call><image>"), "turn 2: "),
        (
            talk(("human", "Hi"), ("gpt", "<tool_call>[1, 2, 3, 4]</tool_call><image>")),
            "turn 2: there is no picture before",
        ),
        (calling("<tool_call>[1, 2, 3, 4]</tool_call> so <image>"), "the turns hold 2 <image> but `image` lists 1"),
        (talk(("human", "<image><tool_call>[1, 2, 3, 4]</tool_call><image>"), image="a"), "the turns hold 2 <image>"),
    ],
)
def test_a_crop_that_cannot_be_cut_is_one_sentence(data, part):
    assert part in told(data, source="train.json:12")


def test_listed_pictures_are_taken_as_they_are():
    crop = {"path": "other.jpg"}
    record = Record.from_dict(calling("<tool_call>[1, 2, 3, 4]</tool_call><image>", image=["street.jpg", crop]))
    assert record.images == [Media(path="street.jpg"), Media(path="other.jpg")]


def test_an_encoded_picture_is_bytes_as_hugging_face_has_them():
    record = Record.from_dict(talk(("human", "<image>"), image={"bytes": b"\x89PNG", "path": "gone.png"}))
    assert record.images == [Media(data=b"\x89PNG")] and "PNG" not in repr(record)
    assert record.images[0].crop((1, 2, 3, 4)) == Media(data=b"\x89PNG", box=(1, 2, 3, 4))
    assert Record.from_dict(talk(("human", "<image>"), image={"bytes": None, "path": "a.png"})).images == [
        Media(path="a.png")
    ]


def test_a_video_file_stands_alone():
    record = Record.from_dict(talk(("human", "<video>"), video="clip.MP4"))
    assert record.video == [Media(path="clip.MP4")] and record.video[0].is_video
    assert Record.from_dict(record.to_dict()) == record


def test_every_record_with_coordinates_says_which():
    grounded = talk(("gpt", "<box>(0.1,0.1),(0.2,0.2)</box>"))
    assert Record.from_dict(grounded).to_dict()["box_coordinates"] == "normalised"
    assert Record.from_dict({**grounded, "box_coordinates": "thousand"}).box_coordinates == "thousand"
    assert "box_coordinates" not in Record.from_dict(talk(("gpt", "x"))).to_dict()


def test_fewer_placeholders_than_pictures():
    assert "hold 0 <image> but `image` lists 2 pictures" in told(talk(("human", "Hi"), image=["a", "b"]))
    assert "remove `video`" in told(talk(("human", "Hi"), video=["a"]))
    assert "give the file or the frames in `video`" in told(talk(("human", "<video>")))
    assert "hold 2 <video>" in told(talk(("human", "<video><video>"), video=["a"]))
    assert "a video stands where <video> is, write that instead" in told(talk(("human", "<image>"), video="a.mp4"))


@pytest.mark.parametrize(
    "role, near", [("assistant", "gpt"), ("user", "human"), ("Human", "human"), ("sytem", "system"), ("GPT", "gpt")]
)
def test_unknown_role_names_the_four_and_the_nearest(role, near):
    sentence = told(talk(("human", "Hi"), (role, "Hello"), id="cat"), source="train.jsonl:9")
    assert sentence.startswith(f"record 'cat' (train.jsonl:9): turn 2: the role {role!r} is unknown")
    assert "system, human, gpt or ignored_gpt" in sentence and f"did you mean {near!r}?" in sentence


@pytest.mark.parametrize("role", [None, 3, [], "xyzzy"])
def test_a_role_unlike_any_other_gets_no_guess(role):
    sentence = told(talk((role, "Hello")))
    assert "is unknown" in sentence and "did you mean" not in sentence


@pytest.mark.parametrize(
    "data, part",
    [
        ({"conversations": []}, "has no turns"),
        ({"messages": []}, "`conversations` is missing"),
        ({"conversations": "Hi"}, "a list of turns, not text"),
        ({"conversations": [{"role": "user", "content": "Hi"}]}, 'turn 1 is not of the form {"from": role'),
        ({"conversations": ["Hi"]}, "turn 1 is not of the form"),
        (talk(("human", "a"), ("gpt", 5)), "turn 2: its value is text, not the number 5"),
        (talk(("human", None)), "turn 1: its value is text, not null"),
        (talk(("human", "a\ud800b")), "lone surrogate) at position 1"),
        (talk(("human", "a"), id=["x"]), "`id` is text or a whole number, not a list"),
        (talk(("human", "a"), id=True), "`id` is text or a whole number, not true or false"),
        (talk(("human", "a"), kind=4), "`kind` is text, not the number 4"),
        (talk(("human", "<image>"), image=""), "entry 1 of `image`: a picture's path is empty"),
        (talk(("human", "<image>"), image=7), "entry 1 of `image`: a picture is a path"),
        (talk(("human", "<image>"), image={}), "needs a path, an image or data"),
        (
            talk(("human", "<image>"), image={"path": "a", "bytes": 1}),
            "`data`: input should be a valid bytes",
        ),
        (talk(("human", "<image>"), image={"path": 3}), "entry 1 of `image`: `path`: input should be a valid string"),
        (talk(("human", "<image>"), image={"path": "a", "box": [1, 2, 3]}), "a box is four numbers"),
        (talk(("human", "<image>"), image={"path": "a", "box": [5, 2, 3, 4]}), "a box needs x1 < x2"),
        (talk(("human", "<image>"), image={"path": "a", "box": "all"}), "`box`: input should be a valid tuple"),
        (talk(("human", "<video>"), video=["a.mp4", "b.jpg"]), "`video` mixes a video file with other frames"),
        (talk(("human", "Hi"), box_coordinates="percent"), "`box_coordinates` is 'percent': use pixels, normalised or"),
        (talk(("human", "Hi"), call_coordinates=["pixels"]), "`call_coordinates` is ['pixels']: use pixels,"),
        (talk(("human", "<video>"), video=[]), "`video` has no frames"),
        ("Hi", "a record is an object with `conversations`, not text"),
        ([1], "a record is an object with `conversations`, not a list"),
    ],
)
def test_bad_data_gets_one_sentence(data, part):
    sentence = told(data, source="train.json:12")
    assert part in sentence
    assert "train.json:12" in sentence


@pytest.mark.parametrize(
    "data, kind",
    [
        (talk(("wizard", "Hi"), id="a"), "unknown_role"),
        (talk(("human", "\ud800"), id="a"), "not_utf8"),
        (talk(("human", "<image>"), id="a"), "placeholder_count"),
        (talk(id="a"), "no_answer"),
        (talk(("human", "<image>"), id="a", image={"path": "a", "box": [5, 2, 3, 4]}), "inverted_box"),
        (talk(("human", "<image>"), id="a", image={"path": "a", "box": [5, 2, 5, 4]}), "empty_box"),
        (talk(("human", "<image>"), id="a", image={"path": "a", "box": "all"}), "unreadable_box"),
        (talk(("human", "<image>"), id="a", image={"path": "a", "bx": 1}), "unknown_key"),
        (talk(("human", "Hi"), id="a", kind=4), "wrong_form"),
    ],
)
def test_an_error_carries_what_it_is_and_whose_also_to_another_process(data, kind):
    with pytest.raises(RecordError) as refusal:
        Record.from_dict(data, source="a.json:3")
    error = refusal.value
    assert (error.kind, error.record_id, error.source) == (kind, "a", "a.json:3") and kind in KINDS
    assert str(error) == f"record 'a' (a.json:3): {error.message}"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.kind) == (str(error), kind)
    assert str(RecordError("a sentence")) == "a sentence"


def test_what_is_built_in_code_is_checked_too():
    with pytest.raises(RecordError, match="record 'x': the turns hold 1 <image> but `image` lists 0"):
        Record(id="x", turns=[Turn(role="human", text="<image>")])
    with pytest.raises(RecordError, match="the key `pictures` is unknown here"):
        Record(id="x", turns=[Turn(role="human", text="Hi")], pictures=[])
    with pytest.raises(RecordError, match="`meta` may not hold 'image'"):
        Record(id="x", turns=[Turn(role="human", text="Hi")], meta={"image": "a"})
    with pytest.raises(RecordError, match="the role 'bot' is unknown"):
        Record(id="x", turns=[{"role": "bot", "text": "Hi"}])
    with pytest.raises(RecordError, match="needs a path, an image or data"):
        Media(path="a", image=Image.new("RGB", (1, 1)))


def test_a_record_cannot_change_and_leaves_its_data_alone():
    before = json.dumps(TOOL_CALL)
    record = Record.from_dict(TOOL_CALL)
    assert json.dumps(TOOL_CALL) == before
    with pytest.raises(ValueError, match="frozen"):
        record.id = "other"


def test_data_needs_no_torch():
    code = "import sys, ovisnb.data; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("tag", ["box", "BOX", " box ", "point"])
def test_what_numbers_count_is_written_however_their_tag_is(tag):
    answer = f"<{tag}>(1,2),(3,4)</{tag}> <{tag.replace('box', 'tool_call').replace('BOX', 'Tool_Call')}>"
    entry = talk(("human", "Where?"), ("gpt", answer), box_coordinates="pixels", call_coordinates="thousand")
    record = Record.from_dict(entry)
    assert Record.from_dict(record.to_dict()).box_coordinates == "pixels"
    if tag != "point":
        assert Record.from_dict(record.to_dict()).call_coordinates == "thousand"
