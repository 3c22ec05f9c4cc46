from __future__ import annotations

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import Media, Record, RecordError, Turn, open_media, read_records, write_records
from ovisnb.data.formats import read_rows
from ovisnb.data.formats.parquet import parquet_rows, write_parquet
from tests.data.told import told


def entry(name: str, **more) -> dict:
    return {"id": name, "conversations": [{"from": "human", "value": f"Who is {name}?"}], **more}


def table(path, rows: list[dict], **options):
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path, **options)
    return path


def test_rows_are_numbered_and_told_by_what_is_in_the_file(tmp_path):
    path = table(tmp_path / "data.bin", [entry(str(n), note=n) for n in range(10)], row_group_size=3)
    records = list(read_records(path))
    assert [record.id for record in records] == [str(n) for n in range(10)]
    assert [record.source for record in records] == [f"{path}:{n}" for n in range(1, 11)]
    assert [row.line for row in read_rows(path)] == list(range(1, 11))
    assert records[3].meta == {"note": 3}


def test_an_empty_cell_is_a_key_that_is_not_there(tmp_path):
    rows = [entry("a", image="a.png", score=None), entry("b", score=0.5), entry("c", where={"x": 1, "y": None})]
    rows[0]["conversations"][0]["value"] += "<image>"
    records = list(read_records(table(tmp_path / "a.parquet", rows)))
    assert [record.meta for record in records] == [{}, {"score": 0.5}, {"where": {"x": 1}}]
    assert [len(record.images) for record in records] == [1, 0, 0]


def png(folder) -> bytes:
    Image.new("RGB", (4, 2), "red").save(folder / "red.png")
    return (folder / "red.png").read_bytes()


def test_pictures_in_the_table(tmp_path):
    data = png(tmp_path)
    turns = [{"from": "human", "value": "<image>"}]
    for image in (data, [data], {"bytes": data, "path": "red.png"}, [{"bytes": None, "path": "red.png"}], "red.png"):
        [record] = read_records(table(tmp_path / "a.parquet", [{"image": image, "conversations": turns}]))
        assert open_media(record, tmp_path)[0][0].size == (4, 2)
    [record] = read_records(table(tmp_path / "a.parquet", [{"image": b"no picture", "conversations": turns}]))
    with pytest.raises(RecordError, match="record 'a-0' .* the picture in the data is no picture"):
        open_media(record)


def test_a_broken_file_is_one_sentence(tmp_path):
    rows = [entry(str(n), note="x" * 1000) for n in range(2000)]
    whole = table(tmp_path / "a.parquet", rows, row_group_size=500, compression="none").read_bytes()
    for broken in (whole[:100], whole[:-5], b"PAR1", b"PAR1" * 50, whole[:-8] + b"\xff" * 4 + b"PAR1"):
        (tmp_path / "b.parquet").write_bytes(broken)
        assert "b.parquet is no parquet file that can be read" in told(tmp_path / "b.parquet")


def test_the_rows_before_the_damage_are_given(tmp_path):
    rows = [entry(str(n), note=str(n) * 200) for n in range(2000)]
    path = table(tmp_path / "a.parquet", rows, row_group_size=500, compression="zstd")
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[start : start + 200] = b"\x00" * 200
    path.write_bytes(data)
    found = list(parquet_rows(path))
    assert [row.entry["id"] for row in found[:-1]] == [str(n) for n in range(1000)]
    assert found[-1].line == 1001 and "the table is damaged from here on" in found[-1].problem


def test_a_cell_that_cannot_be_read_costs_its_row_alone(tmp_path):
    bad = pa.array([b"ann", b"\xff\xfe", b"cy"]).view(pa.string())
    pq.write_table(pa.table({"caption": bad, "image": ["1", "2", "3"]}), tmp_path / "a.parquet")
    found = list(parquet_rows(tmp_path / "a.parquet"))
    assert [row.entry and row.entry["caption"] for row in found] == ["ann", None, "cy"]
    assert found[1].line == 2 and "a cell that cannot be read" in found[1].problem


def test_values_that_json_has_not(tmp_path):
    import datetime
    import decimal

    more = {"day": datetime.date(2020, 1, 1), "n": decimal.Decimal("1.5"), "b": b"\x00", "t": datetime.timedelta(1)}
    [record] = read_records(table(tmp_path / "a.parquet", [entry("a", **more)]))
    assert record.meta == more
    with pytest.raises(RecordError, match="record 'a' .* cannot be written as JSON"):
        write_records([record], tmp_path / "a.jsonl")


def test_reading_and_writing_take_little_memory(tmp_path):
    def rows():
        for number in range(20_000):
            yield entry(str(number), note="x" * 1000)

    before = pa.total_allocated_bytes()
    tracemalloc.start()
    write_parquet(rows(), tmp_path / "large.parquet")  # 21 MB
    most = 0
    for count, _ in enumerate(parquet_rows(tmp_path / "large.parquet"), start=1):
        most = max(most, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 8_000_000 and most < 8_000_000


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
meta = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(-(2**60), 2**60),
        "x": st.floats(allow_nan=False),
        "a": st.lists(st.integers(0, 9), min_size=1, max_size=3),
        "o": st.fixed_dictionaries({"k": texts}, optional={"l": texts, "m": st.booleans()}),
    },
)
medias = st.sampled_from(
    [Media(path="a.png"), Media(data=b"x"), Media(path="b", box=(1, 2, 3.5, 4)), Media(data=b"y", box=(0, 0, 1, 1))]
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(texts, texts, st.none() | medias, meta), min_size=1, max_size=5))
def test_any_records_come_back(tmp_path_factory, drawn):
    records = [
        Record(
            id=name,
            turns=[Turn(role="human", text=text.replace("<", "") + ("<image>" if image else ""))],
            images=[image] if image else [],
            meta=more,
        )
        for name, text, image, more in drawn
    ]
    path = write_records(records, tmp_path_factory.getbasetemp() / "any.parquet")
    assert [record.to_dict() for record in read_records(path)] == [record.to_dict() for record in records]


def test_rows_that_change_far_into_the_file(tmp_path):
    rows = [{"caption": "x", "image": "a.png"}] * 300 + [
        {"caption": "y", "image": Image.new("RGB", (2, 2)), "n": {"k": 1}}
    ]
    rows += [{"caption": "z", "image": {"path": "a.png", "box": [1, 2, 3, 4]}, "n": {"l": [0.5]}}]
    write_parquet(rows, tmp_path / "a.parquet")
    found = [row.entry for row in parquet_rows(tmp_path / "a.parquet")]
    assert found[0] == {"caption": "x", "image": {"path": "a.png"}}
    assert found[300]["image"]["bytes"].startswith(b"\x89PNG") and found[300]["n"] == {"k": 1}
    assert found[301] == {"caption": "z", "image": {"path": "a.png", "box": [1, 2, 3, 4]}, "n": {"l": [0.5]}}


@pytest.mark.parametrize(
    "rows",
    [[{"a": 1}, {"a": "x"}], [{"a": {}}], [{"a": 2**70}], [{"a": object()}], [{"a": "\ud800"}], [{"a": [1, "x"]}]],
)
def test_what_is_no_table(tmp_path, rows):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"before")
    with pytest.raises(RecordError, match="these rows are no table .*: give each key values of one type") as refusal:
        write_parquet([{"a": None}] * 300 + rows, path)
    assert "\n" not in str(refusal.value)
    assert path.read_bytes() == b"before" and [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


def test_datasets_knows_the_pictures(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"image": {"bytes": png(tmp_path), "path": None}, "caption": "Red."}]
    write_parquet(rows, tmp_path / "a.parquet")
    [row] = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))
    assert row["image"].size == (4, 2) and row["caption"] == "Red."


def test_no_rows(tmp_path):
    write_parquet([], tmp_path / "a.parquet")
    with pytest.raises(RecordError, match="a.parquet holds no record"):
        list(read_records(tmp_path / "a.parquet"))


def test_json_lines_and_parquet_give_the_same(tmp_path):
    rows = [
        {"image": "a.png", "caption": "A cat.", "id": "x"},
        {"messages": [{"role": "user", "content": "q"}], "id": "y"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = list(read_records(tmp_path / "a.jsonl"))
    again = list(read_records(table(tmp_path / "a.parquet", rows)))
    assert [record.to_dict() for record in again] == [record.to_dict() for record in records]
