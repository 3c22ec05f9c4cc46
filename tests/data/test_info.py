from __future__ import annotations

import io
import json
import tarfile
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import Record, RecordError, open_media, read_records
from ovisnb.data.formats import read_entries
from ovisnb.data.formats.info import DataSet, is_info, mixed, read_info
from tests.data.told import told


def lines(folder, name: str, count: int, **more) -> None:
    rows = [{"conversations": [{"from": "human", "value": f"{name} {n}"}], **more} for n in range(count)]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(map(json.dumps, rows)))


def info(folder, **sets):
    path = folder / "data_info.json"
    path.write_text(json.dumps(sets, indent=1))
    return path


def shard(path, *samples: tuple[str, str]):
    """A WebDataset tar of pictures with captions."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 6)).save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        for name, content in [
            (f"{key}.{end}", data)
            for key, text in samples
            for end, data in (("png", picture.getvalue()), ("txt", text.encode()))
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def texts(path) -> list[str]:
    return [record.turns[0].text for record in read_records(path)]


def test_the_originals_file_works_as_it_is(tmp_path):
    original = {"meta_file": "geo.json", "storage_type": "hybrid", "data_format": "conversation", "image_dir": "images"}
    text_only = {"meta_file": "/data/text.json", "image_dir": None, "data_format": "conversation"}
    captions = {
        "meta_file": "c.parquet",
        "image_dir": "c",
        "data_format": "caption",
        "caption_template": "<image>\nText:",
    }
    path = info(tmp_path, geometry=original, text=text_only, captions=captions)
    assert read_info(path) == [
        DataSet("geometry", tmp_path / "geo.json", str(tmp_path / "images")),
        DataSet("text", type(tmp_path)("/data/text.json")),
        DataSet("captions", tmp_path / "c.parquet", str(tmp_path / "c"), "captions", template="<image>\nText:"),
    ]
    assert is_info(path)


def test_some_sets_by_name(tmp_path):
    path = info(tmp_path, **{name: {"data_path": f"{name}.json", "weight": 2} for name in ("geo", "ocr", "talk")})
    assert [data_set.name for data_set in read_info(path, "talk| geo")] == ["talk", "geo"]
    assert [data_set.name for data_set in read_info(path, "ocr,ocr")] == ["ocr"]
    with pytest.raises(RecordError, match="data_info.json: there is no data set 'tak': did you mean 'talk'"):
        read_info(path, "tak")
    with pytest.raises(RecordError, match="no data set is named"):
        read_info(path, "|")


def test_without_weights_the_sets_follow_one_another(tmp_path):
    lines(tmp_path, "a/one.jsonl", 2)
    lines(tmp_path, "b/two.jsonl", 3)
    path = info(tmp_path, a={"meta_file": "a/one.jsonl", "image_dir": "a"}, b={"data_path": "b/two.jsonl"})
    records = list(read_records(path))
    assert [record.turns[0].text for record in records] == [f"a/one.jsonl {n}" for n in range(2)] + [
        f"b/two.jsonl {n}" for n in range(3)
    ]
    assert [record.folder for record in records] == [str(tmp_path / "a")] * 2 + [None] * 3
    assert records[3].source == f"{tmp_path / 'b/two.jsonl'}:2" and records[3].id == "two-1"


def test_weights_draw_until_every_set_was_read(tmp_path):
    lines(tmp_path, "large.jsonl", 600)
    lines(tmp_path, "small.jsonl", 20)
    path = info(
        tmp_path, large={"meta_file": "large.jsonl", "weight": 3}, small={"meta_file": "small.jsonl", "weight": 1}
    )
    drawn = texts(path)
    assert drawn == texts(path)  # seeded
    counts = Counter(text.split(".")[0] for text in drawn)
    assert len(set(drawn)) == 620 and 2.5 < counts["large"] / counts["small"] < 3.6
    large = [text for text in drawn if text.startswith("large")]
    assert large[:600] == [f"large.jsonl {n}" for n in range(600)]


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 9)), min_size=1, max_size=4), st.integers(0, 9))
def test_mixing_gives_every_item_at_least_once(sets, seed):
    openers = [lambda n=n, size=size: iter([(n, i) for i in range(size)]) for n, (size, _) in enumerate(sets)]
    drawn = list(mixed(openers, [weight for _, weight in sets], seed))
    for n, (size, _) in enumerate(sets):
        own = [i for which, i in drawn if which == n]
        assert own == [i % size for i in range(len(own))] and len(own) >= size


def test_a_set_without_records_cannot_be_mixed(tmp_path):
    (tmp_path / "none.json").write_text("[]")
    lines(tmp_path, "a.jsonl", 3)
    path = info(tmp_path, a={"meta_file": "a.jsonl", "weight": 1}, none={"meta_file": "none.json", "weight": 1})
    assert "none.json holds no record" in told(path)


def test_each_set_has_its_own_folder_format_and_template(tmp_path):
    for folder, colour in (("reds", "red"), ("blues", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 20), colour).save(tmp_path / folder / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"file_name": "a.png", "text": "Red."}')
    boxes = {"image": "a.png", "sent": "all", "bbox": [10, 5, 20, 10]}
    (tmp_path / "boxes.json").write_text(json.dumps([boxes]))
    path = info(
        tmp_path,
        captions={
            "meta_file": "captions.jsonl",
            "image_folder": "reds",
            "data_type": "caption",
            "template": "<image>?",
        },
        boxes={"meta_file": "boxes.json", "image_folder": "blues", "format": "refcoco:xywh"},
    )
    red, blue = read_records(path, image_folder="/nowhere")
    assert red.turns[0].text == "<image>?" and red.kind == "caption"
    assert blue.turns[1].text == "<ref>all</ref><box>(0.250,0.250),(0.750,0.750)</box>"
    assert open_media(red)[0][0].getpixel((0, 0)) == (255, 0, 0)
    assert open_media(blue, "/nowhere")[0][0].getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    "sets, part",
    [
        (
            {"a": {"meta_fil": "a.json", "image_dir": "x"}},
            "the data set 'a' has the unknown key 'meta_fil': did you mean 'meta_file'",
        ),
        ({"a": {"meta_file": "a.json"}, "b": {"format": "x"}}, "the data set 'b' has no `meta_file`"),
        ({"a": {"meta_file": "a.json", "data_path": "b.json"}}, "has both `meta_file` and `data_path`"),
        ({"a": {"meta_file": "a.json", "weight": 0}}, "`weight` is not a number above 0"),
        ({"a": {"meta_file": "a.json", "weight": True}}, "`weight` is not a number above 0"),
        ({"a": {"meta_file": 3}}, "`meta_file` is not a text"),
        (
            {"a": {"meta_file": "a.json", "weight": 1}, "b": {"meta_file": "b.json"}},
            "'b' has no `weight` but others have",
        ),
        ({"a": {"meta_file": "a.json", "format": "captoins"}}, "the data set 'a': the format 'captoins' is unknown"),
        ({"a": {"meta_file": "no.json"}}, "the data set 'a': there is no data file at"),
    ],
)
def test_mistakes_are_named(tmp_path, sets, part):
    sentence = told(info(tmp_path, **sets))
    assert part in sentence and "data_info.json" in sentence


def test_a_set_that_is_missing_costs_no_other(tmp_path):
    lines(tmp_path, "a.jsonl", 2)
    rows = list(read_entries(info(tmp_path, no={"meta_file": "no.jsonl"}, a={"meta_file": "a.jsonl"})))
    assert [row.problem is None for row in rows] == [False, True, True]
    (tmp_path / "a.jsonl").write_text('{"conversations": \n7\n{"conversations": [{"from": "human", "value": "x"}]}')
    rows = list(read_entries(info(tmp_path, a={"meta_file": "a.jsonl"})))
    assert [row.problem is None for row in rows] == [False, False, True]
    assert "a.jsonl:1: broken JSON" in rows[0].problem and "a.jsonl:2: a row is an object" in rows[1].problem


def test_a_data_info_file_names_no_other(tmp_path):
    path = info(tmp_path, self={"meta_file": "data_info.json"})
    assert "it is a data-info file itself: name the data files that it lists" in told(path)
    weighted = info(tmp_path, self={"meta_file": "data_info.json", "weight": 1})
    assert "it is a data-info file itself" in told(weighted)
    assert "data-info file itself" in told(info(tmp_path, self={"meta_file": "data_info.json", "format": "info"}))


def test_what_is_no_data_info_file(tmp_path):
    lines(tmp_path, "a.jsonl", 2)
    assert not is_info(tmp_path / "a.jsonl") and not is_info(tmp_path) and not is_info(tmp_path / "no.json")
    for content in (b"", b"[]", b"{}", b'{"a": 1}', b'{"image": {"path": "a.png"}}', b"{" * 100_000, b'{"a": "\xff"}'):
        (tmp_path / "x.json").write_bytes(content)
        assert not is_info(tmp_path / "x.json")
        with pytest.raises(RecordError, match="x.json"):
            read_info(tmp_path / "x.json")
    with pytest.raises(RecordError, match="cannot be read"):
        read_info(tmp_path / "no.json")


keys = st.sampled_from(
    [
        "meta_file",
        "data_path",
        "image_dir",
        "image_folder",
        "data_format",
        "format",
        "data_type",
        "weight",
        "template",
        "x",
    ]
)
values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("any.json") | st.just([1])
)


@given(st.dictionaries(st.text(max_size=3), st.dictionaries(keys, values, max_size=4) | values, max_size=3))
def test_any_object_is_sets_or_a_sentence(tmp_path_factory, sets):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(sets))
    for read in (read_info, lambda path: list(read_records(path))):
        try:
            assert all(isinstance(one, (DataSet, Record)) for one in read(path))
        except RecordError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("weight", [None, 1])
def test_a_data_set_may_be_a_tar(tmp_path, weight):
    lines(tmp_path, "talks.jsonl", 2)
    shard(tmp_path / "shard.tar", ("a", "A cat."), ("b", "A dog."))
    captions = {"meta_file": "shard.tar", "data_format": "caption", "caption_template": "<image> What?"}
    talks = {"meta_file": "talks.jsonl"}
    records = list(
        read_records(info(tmp_path, captions=captions | {"weight": weight}, talks=talks | {"weight": weight}))
    )
    found = {record.id: record for record in records if record.images}
    assert [(name, record.turns[0].text, record.turns[1].text) for name, record in sorted(found.items())] == [
        ("a", "<image> What?", "A cat."),
        ("b", "<image> What?", "A dog."),
    ]
    assert {record.source for record in found.values()} == {f"{tmp_path / 'shard.tar'}:{n}" for n in (1, 2)}
    assert open_media(found["a"])[0][0].size == (8, 6)
