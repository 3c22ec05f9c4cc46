from __future__ import annotations

import base64
import io
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import Media, Record, RecordError, Turn, open_media, read_records, write_records
from ovisnb.data.formats.captions import TEMPLATE
from ovisnb.data.formats.parts import LARGEST_DATA_URL, picture, plain


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(file, "PNG")
    return file.getvalue()


def read(folder, *rows: dict, **options) -> list[Record]:
    path = folder / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return list(read_records(path, **options))


def refused(folder, row: dict, **options) -> str:
    with pytest.raises(RecordError) as refusal:
        read(folder, row, **options)
    assert "\n" not in str(refusal.value) and "captions.jsonl:1" in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("key, value", [("image", "a.png"), ("image_path", "a.png"), ("image", ["a.png"])])
def test_a_caption_becomes_a_question_and_its_answer(tmp_path, key, value):
    [record] = read(tmp_path, {key: value, "caption": " A cat. ", "id": 7, "url": "x"})
    assert record.turns == [Turn(role="human", text=TEMPLATE), Turn(role="gpt", text="A cat.")]
    assert record.images == [Media(path="a.png")]
    assert (record.id, record.kind, record.meta, record.notes) == ("7", "caption", {"url": "x"}, ())


def test_the_template_is_the_rows_own_then_the_given_one(tmp_path):
    row = {"image": "a.png", "caption": "A cat."}
    own = {**row, "caption_template": "<image>'s caption: "}
    texts = [record.turns[0].text for record in read(tmp_path, row, own, template="<image>\nText:")]
    assert texts == ["<image>\nText:", "<image>'s caption: "]
    for template in ("no picture", "<image><image>", "<image><video>", ""):
        assert "does not hold one <image>" in refused(tmp_path, row, template=template)


def test_placeholders_in_a_caption_are_text(tmp_path):
    [record] = read(tmp_path, {"image": "a.png", "caption": "An <image> tag, <im<image>age> and a <video>."})
    assert record.turns[1].text == "An  tag,  and a ."
    assert record.notes == ("4 <image> or <video> in the caption were text, and taken out",)
    assert "the caption is empty" in refused(tmp_path, {"image": "a.png", "caption": " <image> "})


@pytest.mark.parametrize("key, value", [("bbox", [1, 2, 3, 4]), ("answer", "Red."), ("conversation", [{"user": "q"}])])
def test_what_else_a_row_says_of_its_picture_is_told(tmp_path, key, value):
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"image": "a.jpg", "caption": "A cat.", key: value}))
    [record] = read_records(path)
    assert record.notes[0].startswith(f"the row has `{key}`, and ") and record.notes[0].kind == "changed_on_reading"


def test_several_captions_of_one_picture(tmp_path):
    records = read(tmp_path, {"image": "a.png", "caption": ["A cat.", "A pet."], "id": "x"})
    assert [(record.id, record.turns[1].text) for record in records] == [("x-0", "A cat."), ("x-1", "A pet.")]
    assert "caption 2: a caption is text" in refused(tmp_path, {"image": "a.png", "caption": ["A cat.", 3]})
    assert "empty list" in refused(tmp_path, {"image": "a.png", "caption": []})


def test_other_names_where_the_format_is_said(tmp_path):
    row = {"file_name": "a.png", "text": "A cat."}
    assert "no other format fits" in refused(tmp_path, row)
    [record] = read(tmp_path, row, format="captions")
    assert record.images == [Media(path="a.png")] and record.turns[1].text == "A cat."
    assert "the key `caption` is missing" in refused(tmp_path, {"image": "a.png"}, format="captions")


def test_pictures_in_the_row(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    [record] = read(tmp_path, {"image": url, "caption": "Red."})
    assert open_media(record)[0][0].getpixel((0, 0)) == (255, 0, 0)
    assert read(tmp_path, {"image": "file:///tmp/a%20b.png", "caption": "Red."})[0].images[0].path == "/tmp/a b.png"
    for value, part in {
        "https://example.org/a.png": "nothing is downloaded",
        "s3://bucket/a.png": "nothing is downloaded",
        "data:image/png;base64,###": "no base64 that can be read",
        "data:image/png,raw": "is not of the form",
        3: "a picture is a path",
        (): "has 0 pictures",
        ("a.png", "b.png"): "has 2 pictures",
    }.items():
        assert part in refused(tmp_path, {"image": value, "caption": "Red."})
    with pytest.raises(RecordError, match="more than"):
        picture("data:image/png;base64," + "A" * LARGEST_DATA_URL)


texts = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), min_size=1, max_size=12)
    .map(str.strip)
    .filter(bool)
)
captions = st.fixed_dictionaries(
    {"id": texts, "image": texts | st.just({"path": "a b.png", "box": [1, 2, 3, 4]}), "caption": texts},
    optional={"caption_template": st.just("<image>\nText:"), "kind": st.just("ocr"), "n": st.integers(0, 9)},
)


@pytest.mark.parametrize("name", ["back.jsonl", "back.json", "back.parquet"])
@settings(deadline=None)  # pyarrow is imported on the way
@given(
    written=st.lists(
        captions.filter(lambda row: not re.match("(?i)data:|.*://", str(row["image"]))), min_size=1, max_size=3
    )
)
def test_there_and_back(tmp_path_factory, name, written):
    folder = tmp_path_factory.mktemp("captions")
    records = read(folder, *written)
    again = list(read_records(write_records(records, folder / name, format="captions")))
    assert [record.to_dict() for record in again] == [record.to_dict() for record in records]
    if name == "back.json":
        assert json.loads((folder / name).read_text("utf-8")) == written


def test_pictures_are_embedded_in_parquet(tmp_path):
    turns = [Turn(role="human", text=TEMPLATE), Turn(role="gpt", text="Blue.")]
    media = [Media(image=Image.new("RGB", (3, 2), "blue")), Media(data=png("blue")), Media(path="blue.png")]
    Image.new("RGB", (3, 2), "blue").save(tmp_path / "blue.png")
    records = [Record(id=str(n), turns=turns, images=[picture]) for n, picture in enumerate(media)]
    path = write_records(records, tmp_path / "c.parquet", format="captions")
    back = list(read_records(path))
    assert [record.kind for record in back] == ["caption"] * 3 and back[2].images == [media[2]]
    for record in back:
        assert open_media(record, tmp_path)[0][0].getpixel((2, 1)) == (0, 0, 255)
    with pytest.raises(RecordError, match="record '0' .* cannot be written as JSON"):
        write_records(records, tmp_path / "c.jsonl", format="captions")


@pytest.mark.parametrize(
    "change, part",
    [
        ({"turns": [Turn(role="human", text="<image>")]}, "not one question about one picture"),
        ({"turns": [Turn(role="human", text="x"), Turn(role="gpt", text="<image>")]}, "does not stand in the question"),
        ({"turns": [Turn(role="human", text="<image>"), Turn(role="gpt", text=" ")]}, "its answer is empty"),
        ({"meta": {"text": "x"}}, "`meta` holds 'text'"),
    ],
)
def test_what_is_no_caption(tmp_path, change, part):
    turns = [Turn(role="human", text="<image>"), Turn(role="gpt", text="A cat.")]
    record = Record(**{"id": "a", "turns": turns, "images": [Media(path="a.png")], **change})
    with pytest.raises(RecordError, match="record 'a' cannot be written as a caption: .*" + part):
        write_records([record], tmp_path / "a.jsonl", format="captions")


@given(st.text("<>imagevdo/tl_c", max_size=60), st.booleans())
def test_what_is_plain_holds_no_placeholder(text, keep_crops):
    left, count = plain(text, keep_crops)
    cut = left.replace("</tool_call><image>", "") if keep_crops else left
    assert "<image>" not in cut and "<video>" not in cut
    assert len(left) == len(text) - 7 * count


def test_plain_is_linear():
    assert plain("<im" * 50_000 + "<image>" + "age>" * 50_000)[0] == ""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("<image>"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["bytes", "path", "url", "box", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["caption", "image", "image_path", "images", "text", "caption_template", "id", "kind", "video"]
        ),
        json_values,
        max_size=6,
    ),
    st.sampled_from([None, "captions"]),
)
def test_any_row_is_a_record_or_a_sentence(tmp_path_factory, row, format):
    try:
        for record in read(tmp_path_factory.getbasetemp(), row, format=format):
            assert isinstance(record, Record)
    except RecordError as error:
        assert "\n" not in str(error).replace(repr(row), "")
