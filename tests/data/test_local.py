"""Local files as a sequence: the same records as read_records, by number, from a table that is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from datetime import date
from pathlib import Path

import pytest
from PIL import Image

from ovisnb.data import local
from ovisnb.data.formats import read_records
from ovisnb.data.local import LocalRecords
from ovisnb.data.record import RecordError

REPOSITORY = Path(__file__).resolve().parents[2]
TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    rows = [
        {"id": 7, "conversations": TURNS, "score": 1e400, "odd": {"1": [None, {"x": "\ud800"}]}},
        {"conversations": TURNS, "score": "a text where there was a number", "odd": []},
        {
            "image": ["a.jpg", {"path": "b.jpg", "box": [1, 2, 3, 4]}],
            "box_coordinates": "thousand",
            "conversations": [{"from": "human", "value": "<image><image>é"}, TURNS[1]],
        },
        *({"conversations": TURNS, "number": number} for number in range(2500)),
    ]
    return write(tmp_path / "some.jsonl", rows)


def test_the_same_records_by_number(file, cache):
    wanted = list(read_records(file))
    records = LocalRecords(file, cache_folder=cache)
    assert len(records) == len(wanted) and list(records) == wanted
    assert records[3:2000:700] == wanted[3:2000:700]
    assert records[-1] == wanted[-1] and records[0].meta == wanted[0].meta
    assert [record.source for record in records[:2]] == [f"{file}:1", f"{file}:2"]
    with pytest.raises(IndexError):
        records[len(wanted)]
    again = pickle.loads(pickle.dumps(records))  # what a worker that is spawned gets
    assert again[1234] == wanted[1234]


def test_a_file_is_read_once(file, cache, monkeypatch, tmp_path):
    first = LocalRecords(file, cache_folder=cache)
    read, write_table = [], local._write
    monkeypatch.setattr(local, "_write", lambda *some: read.append(some[1].path) or write_table(*some))
    assert list(LocalRecords(file, cache_folder=cache)) == list(first) and not read
    other = write(tmp_path / "other.jsonl", [{"conversations": TURNS}] * 2)
    both = LocalRecords([file, tmp_path / "oth*.jsonl"], cache_folder=cache)
    assert read == [other] and len(both) == len(first) + 2 and both[-1].source == f"{other}:2"
    os.utime(other, ns=(1, 1))  # changed since then
    LocalRecords(other, cache_folder=cache)
    LocalRecords(other, cache_folder=cache, image_folder=tmp_path)  # another folder, other sizes of pictures
    monkeypatch.setattr(local, "_reader_version", lambda: "other code")
    LocalRecords(other, cache_folder=cache)
    assert read == [other] * 4


def test_a_file_of_the_same_size_and_time_is_not_the_same_file(tmp_path, cache):
    path, other = (write(tmp_path / f"{name}.jsonl", [{"id": name, "conversations": TURNS}]) for name in "ab")
    assert LocalRecords(path, cache_folder=cache)[0].id == "a"
    told = path.stat()

    def set_time(file):
        while True:  # until the system's clock has moved on, some milliseconds
            os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))
            if file.stat().st_ctime_ns > told.st_ctime_ns:
                return file.stat()

    set_time(other)
    os.replace(other, path)  # as `mv` does, and rsync
    assert LocalRecords(path, cache_folder=cache)[0].id == "b"
    told = path.stat()
    write(path, [{"id": "c", "conversations": TURNS}])
    now = set_time(path)
    assert (now.st_mtime_ns, now.st_size) == (told.st_mtime_ns, told.st_size)
    assert LocalRecords(path, cache_folder=cache)[0].id == "c"


def test_pictures_in_the_data_and_odd_values(tmp_path, cache):
    path = tmp_path / "some.jsonl"
    write(path, [{"conversations": [{"from": "human", "value": "<image>"}, TURNS[1]], "image": "a.jpg"}])
    [record] = read_records(path)
    pictures: list[bytes] = []
    entry = {
        "id": "x",
        "image": [{"bytes": b"\xff\0", "path": None}],
        "raw": b"raw",
        "when": date(2024, 1, 2),
    }
    entry["odd"] = {local._BYTES: 99}
    entry["conversations"] = [{"from": "human", "value": "<image>"}]
    text = local._to_json(entry, pictures, record)
    assert pictures == [b"\xff\0", b"raw"]
    row = {"record": text, "pictures": pictures, "source": "s:1", "folder": None, "notes": ["a note"], "bad": None}
    back = local._record(row)
    assert back.images[0].data == b"\xff\0" and back.notes == ("a note",) and back.source == "s:1"
    assert back.meta == {"raw": b"raw", "when": "2024-01-02", "odd": {local._BYTES: 99}}


def test_errors_are_those_of_reading(tmp_path, cache):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"conversations": TURNS}) + '\n{"conversations": [\n')
    with pytest.raises(RecordError, match=rf"^{re.escape(str(path))}:2: broken JSON at column"):
        LocalRecords(path, cache_folder=cache)
    write(path, [{"conversations": TURNS}, {"id": "x", "conversations": [{"from": "user", "value": ""}]}])
    with pytest.raises(
        RecordError, match=rf"^record 'x' \({re.escape(str(path))}:2\): turn 1: the role 'user' is unknown"
    ):
        LocalRecords(path, cache_folder=cache)
    with pytest.raises(RecordError, match="there is no data file at"):
        LocalRecords(tmp_path / "none.jsonl", cache_folder=cache)
    with pytest.raises(RecordError, match="no file has a name like"):
        LocalRecords(tmp_path / "none-*.jsonl", cache_folder=cache)
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(path, "1.json")
    with pytest.raises(RecordError, match="is a tar, which is only streamed: set streaming"):
        LocalRecords(tmp_path / "some.tar", cache_folder=cache)
    assert not [name for name in os.listdir(cache) if not name.endswith(".lock")]


def test_a_killed_reader_leaves_nothing_that_counts(file, cache):
    killed = """
import os, sys
from ovisnb.data import local
rows = local._rows
def until_killed(*some):
    for number, row in enumerate(rows(*some)):
        if number == 2300:
            os.kill(os.getpid(), 9)
        yield row
local._rows = until_killed
local.LocalRecords(sys.argv[1], cache_folder=sys.argv[2])
"""
    done = subprocess.run(
        [sys.executable, "-c", killed, str(file), str(cache)], check=False, capture_output=True, cwd=REPOSITORY
    )
    assert done.returncode == -9, done.stderr
    left = list(cache.glob("*.tmp"))
    assert left and left[0].stat().st_size > 0 and not list(cache.glob("*.arrow"))
    assert len(LocalRecords(file, cache_folder=cache)) == 2503
    assert not list(cache.glob("*.tmp"))


def test_several_processes_read_it_once(file, cache):
    together = """
import sys
import tarfile
from ovisnb.data import local
write = local._write
local._write = lambda *some: print("read") or write(*some)
print(len(local.LocalRecords(sys.argv[1], cache_folder=sys.argv[2])))
"""
    run = [sys.executable, "-c", together, str(file), str(cache)]
    processes = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for _ in range(3)]
    printed = [process.communicate()[0].split() for process in processes]
    assert sorted(printed) == [["2503"], ["2503"], ["read", "2503"]]


def test_a_folder_that_cannot_be_written(file, cache, monkeypatch, tmp_path):
    LocalRecords(file, cache_folder=cache)
    with pytest.raises(OSError, match=r"no cache can be kept here \([\w ]+\): set HF_DATASETS_CACHE to a folder that"):
        LocalRecords(file, cache_folder=file)

    def refuse(*some, **more):
        raise PermissionError(errno.EACCES, "Permission denied", "x.lock")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert len(LocalRecords(file, cache_folder=cache)) == 2503  # as of a folder that others have filled
    with pytest.raises(OSError, match=r"no cache can be kept here \(Permission denied\)") as caught:
        LocalRecords(file, cache_folder=tmp_path / "other")
    assert caught.value.filename == str(tmp_path / "other")


def test_a_table_takes_the_place_of_older_ones_that_nobody_has_open(tmp_path, cache):
    path = tmp_path / "some.jsonl"

    def opened(count, **options):
        write(path, [{"conversations": TURNS}] * count)  # another size
        return LocalRecords(path, cache_folder=cache, **options)

    def tables():
        return len(list(cache.glob("*.arrow")))

    kept = [opened(1), opened(1, image_folder=tmp_path)]
    assert tables() == 2  # other options, another table
    kept.append(opened(2))
    assert tables() == 3
    assert len(pickle.loads(pickle.dumps(kept[0]))[:]) == 1  # a worker that starts now still finds it
    del kept[0]
    kept.append(opened(3))
    assert tables() == 3
    kept = []
    assert len(opened(4)) == 4 and tables() == 2  # and that of the other options
    holding = (
        "import sys; from ovisnb.data import LocalRecords; r = LocalRecords(sys.argv[1], cache_folder=sys.argv[2])"
    )
    run = [sys.executable, "-c", holding + "; print(len(r), flush=True); input(); print(len(r[:]))", path, cache]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout.readline() == "4\n"
        assert len(opened(5)) == 5 and tables() == 3
        assert process.communicate("\n")[0] == "4\n"
    assert len(opened(6)) == 6 and tables() == 2


def test_a_file_that_changes_while_it_is_read(file, cache, monkeypatch):
    rows = local._rows

    def changing(*some):
        yield from rows(*some)
        with file.open("a") as more:
            more.write("\n")

    monkeypatch.setattr(local, "_rows", changing)
    with pytest.raises(RecordError, match="changed while it was read"):
        LocalRecords(file, cache_folder=cache)
    assert not list(cache.glob("*.arrow"))


def test_sets_are_mixed_by_weight(tmp_path, cache):
    for name in "ab":
        rows = [{"id": f"{name}{n}", "conversations": TURNS} for n in range(5)]
        write(tmp_path / f"{name}.jsonl", rows)
    info = {name: {"meta_file": f"{name}.jsonl", "image_dir": name} for name in "ab"}
    path = tmp_path / "info.json"
    path.write_text(json.dumps(info))
    records = LocalRecords(path, cache_folder=cache)
    assert list(records) == list(read_records(path))
    assert [record.id for record in records] == [f"{name}{n}" for name in "ab" for n in range(5)]
    assert records[0].folder == str(tmp_path / "a")
    assert [record.id for record in LocalRecords(path, names="b", cache_folder=cache)] == [f"b{n}" for n in range(5)]
    with pytest.raises(RecordError, match="'c'"):
        LocalRecords(path, names="c", cache_folder=cache)
    info["a"]["weight"], info["b"]["weight"] = 5, 1
    path.write_text(json.dumps(info))
    records = LocalRecords([path, tmp_path / "a.jsonl"], cache_folder=cache)
    mixed = list(read_records(path))
    assert list(records)[: len(mixed)] == mixed and len(records) == len(mixed) + 5
    counts = [sum(record.id.startswith(name) for record in mixed) for name in "ab"]
    assert counts[0] > 2 * counts[1] >= 10


def test_what_reading_changed_is_told_with_its_line(tmp_path, cache):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    rows = [
        {"image_path": "a.png", "QnA": [{"Q": "What?", "A3": f"{{Crop cup [{x}, 5, {x + 20}, 20]}}"}]} for x in (5, 30)
    ]
    records = LocalRecords(write(tmp_path / "a.jsonl", rows), image_folder=tmp_path, cache_folder=cache)
    [note] = records.notes()
    assert note.startswith(f"{tmp_path / 'a.jsonl'}:2: the box [30.0, 5.0, 50.0, 20.0]") and "cut to" in note
    assert note.endswith(records[1].notes[0]) and not records[0].notes
