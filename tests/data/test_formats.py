from __future__ import annotations

import codecs
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import Media, Record, RecordError, Turn, read_records, write_records


def entry(name: str, **more) -> dict:
    return {"id": name, "conversations": [{"from": "human", "value": f"Who is {name}?"}], **more}


ENTRIES = [entry("ann", image="ann.jpg"), entry("bé\u2028b", note={"a": [1, None]}), entry("cy", video=["1", "2"])]
ENTRIES[0]["conversations"][0]["value"] += "<image>"
ENTRIES[2]["conversations"][0]["value"] += "<video>"

FORMS = {
    "list, pretty": json.dumps(ENTRIES, indent=2),
    "list, one line": json.dumps(ENTRIES, ensure_ascii=False),
    "list, one entry a line": "[\n" + ",\n".join(map(json.dumps, ENTRIES)) + "\n]",
    "wrapped, pretty": json.dumps({"conversations": ENTRIES}, indent=2),
    "wrapped, one line": json.dumps({"conversations": ENTRIES}),
    "wrapped among other keys": json.dumps({"version": [1, {"a": "]"}], "conversations": ENTRIES, "n": 3}, indent=1),
    "lines": "\n".join(map(json.dumps, ENTRIES)),
    "lines, blank lines between": "\n\n"
    + "\r\n \r\n".join(json.dumps(e, ensure_ascii=False) for e in ENTRIES)
    + "\n\n",
}


def told(path) -> str:
    """The one sentence that refuses the file."""
    with pytest.raises(RecordError) as refusal:
        list(read_records(path))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8], ids=["plain", "bom"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ""])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records(tmp_path, form, suffix, bom):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(bom + FORMS[form].encode("utf-8"))
    if suffix == ".jsonl" and form in ("wrapped, pretty", "wrapped among other keys"):
        # With this name an opening brace is a record of one line: reading on for its end could take the whole file.
        assert "data.jsonl:1: broken JSON" in told(path)
    else:
        assert [record.to_dict() for record in read_records(str(path))] == ENTRIES


def lines_of(path) -> list[str]:
    return [record.source.removeprefix(str(path)) for record in read_records(path)]


def test_every_record_knows_its_line(tmp_path):
    path = tmp_path / "data.json"
    expected = {
        "list, pretty": None,
        "list, one line": [":1", ":1", ":1"],
        "list, one entry a line": [":2", ":3", ":4"],
        "wrapped, one line": [":1", ":1", ":1"],
        "lines": [":1", ":2", ":3"],
        "lines, blank lines between": [":3", ":5", ":7"],
    }
    for form, lines in expected.items():
        text = FORMS[form]
        path.write_bytes(text.encode("utf-8"))
        if lines is None:
            lines = [f":{n}" for n, line in enumerate(text.split("\n"), 1) if line == "  {"]
            assert len(lines) == 3
        assert lines_of(path) == lines, form


def test_one_record_alone_is_told_from_the_wrapped_list(tmp_path):
    path = tmp_path / "one.json"
    alone = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "note": 1}
    for indent in (None, 2):
        path.write_text(json.dumps(alone, indent=indent))
        [record] = read_records(path)
        assert record.to_dict() == {"id": "one-0", **alone}
    path.write_text(json.dumps({"conversations": [{"id": "x", "image": "a.jpg"}]}, indent=2))
    assert "record 'x'" in told(path) and "`conversations` is missing" in told(path)
    path.write_text('{"conversations": []}')
    assert "no turns" in told(path)


def test_records_without_id_count_through_the_file(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text('\n{"conversations": [{"from": "human", "value": "Hi"}]}\n' * 3)
    assert [record.id for record in read_records(path)] == ["talks-0", "talks-1", "talks-2"]


def test_broken_line_is_named_after_the_good_ones_were_given(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps(ENTRIES[0]), "", '{"id": "b", "conversations": [', json.dumps(ENTRIES[2])]))
    records = read_records(path)
    assert next(records).id == "ann"
    with pytest.raises(RecordError, match=r"train\.jsonl:3: broken JSON at column \d+ \(Expecting value"):
        next(records)


@pytest.mark.parametrize(
    "text, line, part",
    [
        ('[\n{"id": "a"\n"b": 1}]', 3, "Expecting ',' delimiter"),
        (json.dumps(ENTRIES, indent=2)[:-3], None, "broken JSON"),
        (json.dumps({"conversations": ENTRIES}, indent=2)[:-1], None, "broken JSON"),
        (json.dumps(ENTRIES) + "\n\n,", 3, "Extra data"),
        ('{"conversations": [\n' + json.dumps(ENTRIES[0]) + '\n], "n": }', 3, "Expecting value"),
        ('{"a" 1}', 1, "Expecting"),
        ("\n\nhello", 3, "Expecting a list or an object"),
        ("[" * 100_000, 1, "nested too deeply"),
        ("[\n" + "1" * 5000 + "]", None, "cannot be read"),
        ('{"id": "a",\n "conversations": [{"from": "human", "value": 3}]}', 1, "turn 1: its value is text"),
        (json.dumps([ENTRIES[0], {"id": "b"}]).replace("}, {", "},\n{"), 2, "record 'b'"),
        ("[1]", 1, "a record is an object"),
    ],
)
def test_broken_document_names_the_line(tmp_path, text, line, part):
    path = tmp_path / "data.json"
    path.write_text(text)
    sentence = told(path)
    assert part in sentence
    assert f"data.json:{line or ''}" in sentence


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(RecordError, match="there is no data file at .*nowhere.json"):
        read_records(tmp_path / "nowhere.json")  # at once, not at the first record
    with pytest.raises(RecordError, match="there is no data file"):
        read_records(tmp_path)
    for content in (b"", b" \n\n", codecs.BOM_UTF8):
        (tmp_path / "empty.json").write_bytes(content)
        assert "empty.json is empty" in told(tmp_path / "empty.json")
    (tmp_path / "none.json").write_text("[]")
    assert list(read_records(tmp_path / "none.json")) == []


@pytest.mark.parametrize("name, line", [("a.jsonl", 2), ("a.json", 3)])
def test_text_that_is_not_utf8(tmp_path, name, line):
    rows = [json.dumps(ENTRIES[0]).encode(), json.dumps(entry("bé"), ensure_ascii=False).encode("latin-1")]
    data = b"\n".join(rows) if name == "a.jsonl" else b"[\n" + b",\n".join(rows) + b"]"
    (tmp_path / name).write_bytes(data)
    assert f"{name}:{line}: not UTF-8 (byte 0xe9): save the file as UTF-8" in told(tmp_path / name)


@pytest.mark.parametrize("name", ["out.json", "out.jsonl", "out.ndjson"])
@given(
    records=st.lists(
        st.builds(
            Record,
            id=st.text(st.characters(exclude_categories=["Cs"])),
            turns=st.just([Turn(role="human", text="<image> \u2028 é 漢\x00")]),
            images=st.just([Media(path="a b.jpg", box=(1, 2, 3.5, 4))]),
            meta=st.dictionaries(st.sampled_from("abc"), st.integers() | st.text("xé\u2028\n", max_size=4)),
        ),
        max_size=4,
    )
)
def test_written_records_are_read_back(tmp_path_factory, name, records):
    path = write_records(records, tmp_path_factory.mktemp("out") / name)
    back = list(read_records(path)) if path.stat().st_size else []
    assert [record.to_dict() for record in back] == [record.to_dict() for record in records]
    if name == "out.json":
        assert json.loads(path.read_text("utf-8")) == [record.to_dict() for record in records]


def test_writing_is_all_or_nothing(tmp_path):
    path = write_records(map(Record.from_dict, ENTRIES), tmp_path / "new" / "data.jsonl")
    before = path.read_bytes()

    def failing():
        yield Record.from_dict(ENTRIES[0])
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write_records(failing(), path)
    assert path.read_bytes() == before
    write_records((record for record in read_records(path) if record.id != "cy"), path)  # onto the file it reads
    assert [record.id for record in read_records(path)] == ["ann", "bé\u2028b"]
    assert [file.name for file in path.parent.iterdir()] == ["data.jsonl"]


def test_what_cannot_be_written(tmp_path):
    turns = [Turn(role="human", text="<image>")]
    picture = Record(id="p", turns=turns, images=[Media(image=Image.new("RGB", (2, 2)))], source="shapes:7")
    with pytest.raises(
        RecordError, match=r"record 'p' \(shapes:7\) cannot be written as JSON .*save pictures as files"
    ):
        write_records([picture], tmp_path / "a.json")
    nan = Record.from_dict(entry("n", score=float("nan")))
    with pytest.raises(RecordError, match="record 'n' .* cannot be written"):
        write_records([nan], tmp_path / "a.jsonl")
    half = Record.from_dict(entry("h", note="\ud800"))
    with pytest.raises(RecordError, match="record 'h' .* cannot be written"):
        write_records([half], tmp_path / "a.jsonl")
    with pytest.raises(RecordError, match="end its name in .json or .jsonl"):
        write_records([], tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


def test_json_lines_are_streamed(tmp_path):
    path = tmp_path / "large.jsonl"
    line = json.dumps(entry("a", note="x" * 1000)) + "\n"
    with path.open("w") as file:
        file.writelines(line for _ in range(20_000))  # 21 MB
    tracemalloc.start()
    count = sum(1 for _ in read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 1_000_000
