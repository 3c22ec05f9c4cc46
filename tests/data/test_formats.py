from __future__ import annotations

import codecs
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import Media, Record, RecordError, Turn, open_media, read_records, write_records
from ovisnb.data.formats import read_entries, read_rows
from tests.data.told import told


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


STRAY = [{}, None, 7, entry("ann")["conversations"][0], {"messages": [{"role": "user", "content": "Hi"}]}]


@pytest.mark.parametrize("stray", STRAY, ids=["empty", "null", "number", "turn", "messages"])
@pytest.mark.parametrize("name, indent", [("a.json", None), ("a.json", 2), ("a.jsonl", None)])
def test_the_first_entry_alone_does_not_tell_the_wrapped_list(tmp_path, name, indent, stray):
    (tmp_path / name).write_text(json.dumps({"conversations": [stray, *ENTRIES]}, indent=indent))
    assert [row.entry for row in read_rows(tmp_path / name)] == [stray, *ENTRIES]
    alone = {"conversations": [stray, *entry("ann")["conversations"]]}  # nor one record
    (tmp_path / name).write_text(json.dumps(alone, indent=indent))
    assert stray is STRAY[-1] or [row.entry for row in read_rows(tmp_path / name)] == [alone]


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
        ("\n\nhello", 3, "no JSON, for it begins with 'hello'"),
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
    with pytest.raises(RecordError, match="is a folder"):
        read_records(tmp_path)
    for content in (b"", b" \n\n", codecs.BOM_UTF8):
        (tmp_path / "empty.json").write_bytes(content)
        assert "empty.json is empty" in told(tmp_path / "empty.json")
    (tmp_path / "none.json").write_text("[]")
    assert "none.json holds no record" in told(tmp_path / "none.json")


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
        min_size=1,
        max_size=4,
    )
)
def test_written_records_are_read_back(tmp_path_factory, name, records):
    path = write_records(records, tmp_path_factory.mktemp("out") / name)
    assert [record.to_dict() for record in read_records(path)] == [record.to_dict() for record in records]
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
    with pytest.raises(RecordError, match="end its name in .json, .jsonl or .parquet"):
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


def problems(path) -> list[tuple[int, str | None]]:
    return [(row.line, row.problem and row.problem.partition(":")[0]) for row in read_rows(path)]


def test_lines_go_on_after_a_broken_one(tmp_path):
    path = tmp_path / "train.jsonl"
    good, bad = json.dumps(ENTRIES[0]).encode(), b'{"id": "b", "conversations": ['
    path.write_bytes(b"\n".join([good, bad, b"", "é".encode("latin-1"), good, b"[" * 100_000, b"NaN", good]))
    rows = list(read_rows(path))
    assert [row.line for row in rows if row.problem] == [2, 4, 6]
    assert [row.line for row in rows if row.entry == ENTRIES[0]] == [1, 5, 8]
    assert "broken JSON at column" in rows[1].problem and "not UTF-8 (byte 0xe9)" in rows[2].problem
    assert "nested too deeply" in rows[4].problem


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_a_line_that_breaks_off_says_at_which_column(tmp_path, end):
    path, broken = tmp_path / "train.jsonl", b'{"id": "b", "conversations": []'
    path.write_bytes(json.dumps(ENTRIES[0]).encode() + b"\n" + broken + end)
    assert f"broken JSON at column {len(broken) + 1} " in list(read_rows(path))[1].problem


BREAKS = {
    "a colon is missing": lambda text: text.replace('"note": {', '"note" {', 1),
    "a bracket is not closed": lambda text: text.replace('"note": {', '"note": [{', 1),
    "a quote is not closed": lambda text: text.replace('"Who is bé', '"Who" is bé', 1),
    "the entry ends early": lambda text: text.replace('"note": {', '"note": ', 1),
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("form", ["list, pretty", "list, one entry a line", "wrapped, pretty"])
def test_a_list_goes_on_at_the_next_entry(tmp_path, form, name):
    path = tmp_path / "data.json"
    entries = [entry("ann"), ENTRIES[1], entry("cy"), entry("di")]
    whole = {"conversations": entries} if form.startswith("wrapped") else entries
    text = json.dumps(whole, indent=2 if "pretty" in form else None, ensure_ascii=False)
    if form == "list, one entry a line":
        text = "[\n" + ",\n".join(json.dumps(e, ensure_ascii=False) for e in entries) + "\n]"
    broken = BREAKS[name](text)
    assert broken != text
    path.write_text(broken, "utf-8")
    rows = list(read_rows(path))
    assert [row.entry and row.entry["id"] for row in rows] == ["ann", None, "cy", "di"]
    assert "broken JSON" in rows[1].problem and rows[0].line <= rows[1].line < rows[2].line
    lines = broken.split("\n")
    assert all('"id"' in lines[row.line - 1] or '"id"' in lines[row.line] for row in rows if row.entry)


def test_what_is_lost_in_a_list_is_said(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"id": 1}, {"id": 2 "x"}, {"id": 3}]')  # one line: no telling where the third begins
    rows = list(read_rows(path))
    assert rows[0].entry == {"id": 1} and len(rows) == 2
    assert rows[1].problem.endswith("what follows it in the file was not read")
    path.write_text('[\n{"id": 1}\n{"id": 2}\n]')  # a comma is missing between two good entries: none is lost
    rows = list(read_rows(path))
    assert [row.entry for row in rows] == [{"id": 1}, None, {"id": 2}]
    assert (rows[1].line, rows[2].line) == (3, 3) and "Expecting ','" in rows[1].problem
    path.write_text('[\n{"id": 1},\n{"id": 2},\n')
    assert [row.problem is None for row in read_rows(path)] == [True, True, False]


def test_a_list_in_latin1_gives_the_entries_that_are_whole(tmp_path):
    path = tmp_path / "data.json"
    rows = [json.dumps(entry(name), ensure_ascii=False).encode("latin-1") for name in ("ann", "bé", "cy")]
    path.write_bytes(b"[\n" + b",\n".join(rows) + b"\n]")
    assert problems(path) == [(2, None), (3, "not UTF-8 (byte 0xe9)"), (4, None)]


def test_many_broken_entries_take_linear_time(tmp_path):
    path = tmp_path / "data.json"
    bad = '{"a": [[[[\n'
    path.write_text("[\n" + bad * 50_000 + '{"id": 1}\n]')
    rows = list(read_rows(path))
    assert len(rows) == 50_001 and rows[-1].entry == {"id": 1} and rows[-1].line == 50_002
    path.write_text("[\n{]\n" + '{"a": 1},' * 50_000 + '{"id": 1}\n]')  # many on the one line after a broken one
    assert len(list(read_rows(path))) == 50_002


@given(
    st.binary(max_size=80) | st.text('[]{}",:\n 1ab\\', max_size=120).map(str.encode),
    st.sampled_from([".json", ".jsonl"]),
)
def test_any_bytes_are_rows_or_problems(tmp_path_factory, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data)
    lines = data.count(b"\n") + 1
    try:
        for row in read_rows(path):
            assert 1 <= row.line <= lines and (row.problem is None or "\n" not in row.problem)
    except RecordError as error:
        assert any(said in str(error) for said in ("is empty", "is no parquet file", "by its first bytes"))
    try:
        list(read_records(path))
    except RecordError as error:
        assert "\n" not in str(error).replace(repr(data), "")


TURNS = [{"from": "human", "value": "<image>\nWho?"}]


def talk(answer: str, **more) -> dict:
    return {"id": "x", "image": "a.png", "conversations": [*TURNS, {"from": "gpt", "value": answer}], **more}


def read_one(path, data: dict, image_folder=None) -> Record:
    path = path / "train.jsonl"
    path.write_text(json.dumps(entry("first")) + "\n" + json.dumps(data))
    return list(read_records(path, image_folder=image_folder))[1]


def test_the_tool_form_gets_its_crops_from_a_file(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    answer = (
        "<think>\nLet me crop the person first.\n<tool_call>Crop [10,20,100,90]</tool_call><image>\nNow identify them.\n"
        "<tool_call>Identify [10,20,100,90]</tool_call><tool_response>John Doe</tool_response>\n"
        "<tool_call>[0, 0, 20.5, 30]</tool_call><image></think>\n<answer>John Doe.</answer>"
    )
    record = read_one(tmp_path, talk(answer), tmp_path)
    assert record.images == [Media(path="a.png", box=box) for box in (None, (10, 20, 100, 90), (0, 0, 20.5, 30))]
    assert record.turns[1].text == answer and record.notes == ()
    assert [image.size for image in open_media(record, tmp_path)[0]] == [(200, 100), (90, 70), (21, 30)]
    thousand = read_one(
        tmp_path, talk("<tool_call>[0,0,500,500]</tool_call><image>", call_coordinates="thousand"), tmp_path
    )
    assert thousand.notes == () and open_media(thousand, tmp_path)[0][1].size == (100, 50)


def test_a_crop_outside_its_picture_is_reported_where_the_size_is_known(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    data = talk("<tool_call>Crop [150, 20, 300, 90]</tool_call><image> It.")
    record = read_one(tmp_path, data, tmp_path)
    assert record.turns[1].text == data["conversations"][1]["value"]
    [note] = record.notes
    assert "image 2: the box [150.0, 20.0, 300.0, 90.0] (pixels) reaches outside the picture of 200x100 pixels" in note
    assert "only [150, 20, 200, 90] is cut out" in note
    assert open_media(record, tmp_path)[0][1].size == (50, 70)
    assert read_one(tmp_path, data).notes == ()  # nobody said where the pictures are
    assert read_one(tmp_path, {**data, "image": "gone.png"}, tmp_path).notes == ()
    with pytest.raises(RecordError, match=r"train.jsonl:2.*lies outside the picture of 200x100 pixels"):
        read_one(tmp_path, talk("<tool_call>[300, 20, 400, 90]</tool_call><image>"), tmp_path)


@pytest.mark.parametrize("box", ["[5, 5, 5, 9]", "[9, 5, 5, 9]", "Crop [1, 1, 1, 1]"])
def test_a_crop_without_area_is_an_error_with_its_line(tmp_path, box):
    with pytest.raises(RecordError, match=r"record 'x' \(.*train.jsonl:2\): turn 2: the call .*x1 < x2"):
        read_one(tmp_path, talk(f"<tool_call>{box}</tool_call><image>"))


def test_a_row_of_no_format_names_the_formats(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps(ENTRIES[0]) + '\n{"id": "b", "picture": "b.jpg"}\n' + json.dumps(ENTRIES[2]))
    rows = list(read_entries(path))
    assert [row.problem is None for row in rows] == [True, False, True]
    with pytest.raises(RecordError, match=r"odd.jsonl:2: record 'b': .*records \(conversations\); annotations \("):
        list(read_records(path))
    with pytest.raises(RecordError, match="the format 'llava' is unknown: use .*records"):
        read_records(path, format="llava")  # at once


def test_the_format_can_be_forced(tmp_path):
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps({**ENTRIES[0], "image_path": "a.jpg", "QnA": [{"Q": "Who?", "A3": "Ann."}]}))
    assert next(read_records(path)).id == "ann"
    assert next(read_records(path, format="annotations")).turns[1].text == "Ann."
    path.write_text(json.dumps(ENTRIES[0]))
    with pytest.raises(RecordError, match="both.jsonl:1: record 'ann': `image_path` is the path"):
        next(read_records(path, format="annotations"))
