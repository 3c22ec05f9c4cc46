"""What is no data file, by its kind and its first bytes: one sentence each, from everything that reads data."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ovisnb import cli
from ovisnb.data import RecordError, read_records
from ovisnb.data.checks import validate
from ovisnb.data.convert import convert_file
from ovisnb.data.formats import read_entries
from ovisnb.data.formats.info import is_info
from ovisnb.data.local import LocalRecords
from ovisnb.data.split import split
from ovisnb.data.spread import spread
from ovisnb.data.stats import summarise_file
from ovisnb.data.stream import RecordStream

TALK = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "A cat."}]
LINE = json.dumps({"id": "a", "image": "a.png", "conversations": TALK}).encode() + b"\n"
READERS = {
    "records": lambda path: list(read_records(path)),
    "validate": validate,
    "stats": summarise_file,
    "convert": lambda path: convert_file(path, path.parent / "out" / "out.jsonl"),
    "split": lambda path: split(path, output_dir=path.parent / "out"),
    "local": lambda path: LocalRecords(path, cache_folder=path.parent / "out"),
    "stream": lambda path: list(RecordStream(path)),
    "spread": lambda path: list(spread(path, 3)),
}


def table(rows: int = 1) -> pa.Table:
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    return pa.table({"conversations": pa.array([TALK] * rows, turns)})


def packed(kind: str) -> bytes:
    """A data file in another wrapping."""
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("a.jsonl", LINE)
    elif kind == "arrow":
        with pa.ipc.new_file(out, table().schema) as writer:
            writer.write_table(table())
    elif kind == "stream":
        with pa.ipc.new_stream(out, table().schema) as writer:
            writer.write_table(table())
    elif kind == "png":
        Image.new("RGB", (9, 9)).save(out, "PNG")
    elif kind == "jpg":
        Image.new("RGB", (9, 9)).save(out, "JPEG")
    else:
        pack = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "pickle": pickle.dumps}[kind]
        out.write(pack(LINE))
    return out.getvalue()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.bin"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("zip", "is a zip archive, by its first bytes: unpack it"),
        ("gzip", "is compressed with gzip, by its first bytes: unpack it"),
        ("bzip2", "is compressed with bzip2"),
        ("xz", "is compressed with xz"),
        ("arrow", "is an Arrow file, by its first bytes: write it as parquet"),
        ("stream", "is an Arrow file"),
        ("pickle", "is a Python pickle, by its first bytes: what is pickled is never loaded here, write JSON lines"),
        ("png", "is a picture, by its first bytes: give the data file that lists it"),
        ("jpg", "is a picture"),
    ],
)
def test_another_kind_of_file_is_called_what_it_is(kind, said, name, reader, tmp_path):
    path = tmp_path / name
    path.write_bytes(packed(kind))
    with pytest.raises(RecordError) as caught:
        READERS[reader](path)
    assert str(caught.value).startswith(f"{path} {said}")


def test_a_table_of_text_is_no_json(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,image,answer\n1,a.png,A cat.\n")
    [fault] = validate(path)
    assert (fault.kind, fault.line) == ("broken_json", 1)
    assert fault.message == (
        "no JSON, for it begins with 'id,image,answer': write JSON lines, a JSON list or a parquet file"
    )


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_folder_and_a_pipe_are_no_data_file(kind, reader, tmp_path):
    path = tmp_path / "a.jsonl"
    (os.mkdir if kind == "folder" else os.mkfifo)(path)
    with pytest.raises(RecordError) as caught:
        READERS[reader](path)
    said = {"folder": "is a folder: give the data file in it", "pipe": "is a pipe or a device, and a data file is read"}
    assert str(caught.value).startswith(f"{path} {said[kind]}") and not is_info(path)


@pytest.mark.parametrize("command", ["validate", "stats", "split", "convert"])
def test_what_is_piped_in_is_to_be_saved_first(command, tmp_path):
    words = [sys.executable, "-m", "ovisnb.cli", "data", command, "/dev/stdin"]
    words += [str(tmp_path / "out.json")] if command == "convert" else []
    done = subprocess.run(words, input=LINE, capture_output=True, check=False, timeout=120)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert b"/dev/stdin is a pipe or a device, and a data file is read more than once: save it as a file" in done.stderr


@pytest.mark.parametrize("reader", [name for name in READERS if name not in ("stream", "spread")])
@pytest.mark.parametrize("name", ["none.json", "none.jsonl", "blank.jsonl", "none.parquet"])
def test_a_file_without_a_record_is_an_error(name, reader, tmp_path):
    path = tmp_path / name
    texts = {"none.json": "[]", "blank.jsonl": "\n \n"}
    path.write_text(texts.get(name, ""))
    if name == "none.parquet":
        pq.write_table(table(0), path)
    with pytest.raises(RecordError, match="holds no record|is empty"):
        READERS[reader](path)
    assert not [file for file in (tmp_path / "out").glob("*") if not file.name.endswith(".lock")]


def test_data_sets_of_a_data_info_file_hold_records(tmp_path, capsys):
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "some.jsonl").write_bytes(LINE)
    (tmp_path / "info.json").write_text(
        json.dumps({name: {"meta_file": f"{name}"} for name in ("some.jsonl", "none.json")})
    )
    assert cli.main(["data", "validate", str(tmp_path / "info.json")]) == 1
    assert "none.json holds no record" in capsys.readouterr().err
    [row, error] = read_entries(tmp_path / "info.json")
    assert row.entry["id"] == "a" and "none.json holds no record" in error.problem


@pytest.fixture
def shard(tmp_path) -> Path:
    """A WebDataset shard: a conversation, a caption, a sample without text."""
    picture = packed("png")
    members = {"b.json": LINE.replace(b'"a"', b'"b"'), "b.png": picture, "c.txt": b"A dog.", "c.png": picture}
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, data in {**members, "d.png": picture}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return tmp_path / "shard.tar"


def test_a_tar_is_checked_counted_and_converted_as_a_table_is(shard, capsys):
    assert [(row.line, row.error is None) for row in read_entries(shard)] == [(1, True), (2, True), (3, False)]
    report = validate(shard)
    [fault] = report
    assert (fault.line, report.records, report.pictures) == (3, 2, 2) and "no .json or .txt" in fault.message
    found = summarise_file(shard)
    assert (found.records, found.largest, found.problems.total) == (2, (9, 9), 1)
    with pytest.raises(RecordError, match=r"shard\.tar:3: the sample has \.png but no"):
        list(read_records(shard))
    assert [row.line for row in spread(shard, 2)] == [1, 2]
    with pytest.raises(RecordError, match=r"shard\.tar is a tar: `ovisnb data convert` writes it as a data file"):
        split(shard)


def test_a_tar_of_a_folder_is_to_be_unpacked(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "a.jsonl", "all/a.jsonl")
    with pytest.raises(RecordError, match="all.tar is a tar without .json or .txt members: unpack it"):
        validate(tmp_path / "all.tar")


def test_a_tar_that_is_cut_off_is_one_sentence(shard):
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(RecordError, match="is no tar file that can be read"):
        validate(shard)


def test_a_number_of_very_many_digits_is_to_be_repaired(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE + b'{"width": ' + b"9" * 5000 + b"}\n")
    [_, row] = read_entries(tmp_path / "a.jsonl")
    assert (row.line, row.problem) == (2, "a number of thousands of digits cannot be read: repair or drop this line")


@pytest.mark.parametrize("number", ["NaN", "-Infinity"])
def test_what_json_has_not_is_to_be_repaired(number, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE.replace(b'"id"', f'"width": {number}, "id"'.encode()))
    with pytest.raises(RecordError) as caught:
        convert_file(path, tmp_path / "b.jsonl")
    assert "--pictures" not in str(caught.value) and "NaN" in str(caught.value)


def test_a_width_that_is_no_number_is_named(tmp_path):
    coco = {"images": [{"id": 1, "file_name": "a.png", "width": float("nan"), "height": 9}]}
    coco |= {"annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]}
    coco |= {"categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    [row] = read_entries(tmp_path / "coco.json")
    assert row.problem == "image 1: `width` is nan: give the picture's size in pixels, or neither of the two"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("order", ["utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"])
def test_the_encoding_of_a_file_is_called_what_it_is(name, order, tmp_path):
    (tmp_path / name).write_bytes(("\ufeff" + LINE.decode()).encode(order))
    [fault] = validate(tmp_path / name)
    assert (fault.kind, fault.line) == ("not_utf8", 1) and f"not UTF-8 but {order[:6].upper()}," in fault.message
