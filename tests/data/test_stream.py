"""Streams: every record once over all parts, continued without reading again what was read."""

from __future__ import annotations

import builtins
import io
import json
import pickle
import re
import tarfile
from itertools import chain, islice, repeat

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import pieces
from ovisnb.data.formats import read_records
from ovisnb.data.pieces import with_line
from ovisnb.data.record import RecordError
from ovisnb.data.stream import RecordStream

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


def row(name, text="Ho"):
    return {"id": str(name), "conversations": [TURNS[0], {"from": "gpt", "value": text}]}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def write_parquet(path, rows, group=4):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(colour, size=(8, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def write_shard(path, rows):
    members = []
    for number, one in enumerate(rows):
        members += [(f"{number:04}.png", png((number % 256, 0, 0))), (f"{number:04}.json", json.dumps(one).encode())]
    return write_tar(path, members)


WRITERS = {"jsonl": write_lines, "parquet": write_parquet, "tar": write_shard}


def written(kind, path, count):
    rows = [row(n, "Ho " * (n * 7 % 40)) for n in range(count)]
    if kind == "tar":
        for one in rows:
            one["conversations"][0] = {"from": "human", "value": "<image>"}
    return WRITERS[kind](path.with_suffix(f".{kind}"), rows)


def ids(records):
    return [record.id for record in records]


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=3), world=st.integers(1, 4), workers=st.integers(1, 3))
def test_every_record_once_over_all_parts(tmp_path_factory, kind, counts, world, workers):
    folder = tmp_path_factory.mktemp("stream")
    wanted = []
    for number, count in enumerate(counts):
        path = written(kind, folder / f"{number}", count)
        if kind == "jsonl":  # without a last newline
            path.write_bytes(path.read_bytes().rstrip())
        wanted += [str(n) for n in range(count)]
    stream = RecordStream(folder / f"*.{kind}", seed=3)
    parts = [stream.shard(rank, world).shard(worker, workers) for rank in range(world) for worker in range(workers)]
    for _ in range(2):
        assert sorted(name for part in parts for name in ids(part)) == sorted(wanted)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("small", [True, False])
def test_it_continues_anywhere(tmp_path, kind, small, monkeypatch):
    if not small:  # few pieces of many records, cut without a look at them
        monkeypatch.setattr(pieces, "SMALL", 0)
        monkeypatch.setattr(pieces, "PIECES", 5)
    written(kind, tmp_path / "a", 23)
    written(kind, tmp_path / "b", 9)
    paths = [tmp_path / f"{name}.{kind}" for name in "ab"]
    whole = RecordStream(paths, seed=5).shard(1, 2)
    states, records = [whole.state_dict()], []
    for _ in range(3):
        for record in whole:
            records.append(record)
            states.append(json.loads(json.dumps(whole.state_dict())))
    assert len(records) > 30 and ids(records)[:16] != ids(records)[16:32]
    for taken in range(0, len(states), 3):
        stream = RecordStream(paths, seed=5).shard(1, 2)
        stream.load_state_dict(states[taken])
        rest = []
        while len(rest) < len(records) - taken:
            rest += list(stream)
        assert rest[: len(records) - taken] == records[taken:]


def test_records_are_those_of_reading(tmp_path):
    for kind in ("jsonl", "parquet"):
        path = written(kind, tmp_path / "some", 50)
        wanted = {record.id: record for record in read_records(path)}
        for record in RecordStream(path):
            same = wanted.pop(record.id)
            assert record.turns == same.turns and record.meta == same.meta and with_line(record.source) == same.source
        assert not wanted
    lines = {"image_path": "a.jpg", "QnA": [{"Q": f"{n}?", "A3": "Yes."} for n in range(3)]}
    path = write_lines(tmp_path / "questions.jsonl", [lines, lines])
    assert sorted(record.turns[0].text[-2:] for record in RecordStream(path)) == sorted(["0?", "1?", "2?"] * 2)


def test_order_goes_by_seed_and_epoch(tmp_path):
    path = written("jsonl", tmp_path / "some", 60)
    one, same, other = RecordStream(path, seed=1), RecordStream(path, seed=1), RecordStream(path, seed=2)
    first, second = ids(one), ids(one)
    assert [ids(same), ids(same)] == [first, second]
    assert first != second and ids(other) != first and sorted(first) == sorted(second)
    assert ids(pickle.loads(pickle.dumps(RecordStream(path, seed=1)))) == first


class Counting:
    """open, counting the bytes that are read."""

    def __init__(self):
        self.bytes = 0

    def __call__(self, path, mode="r", *more, **named):
        file = builtins.open(path, mode, *more, **named)  # noqa: SIM115 (the caller closes it)
        count = self

        class Counted:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def __iter__(self):
                for line in file:
                    count.bytes += len(line)
                    yield line

            def read(self, *size):
                data = file.read(*size)
                count.bytes += len(data)
                return data

            def readline(self):
                data = file.readline()
                count.bytes += len(data)
                return data

            def __getattr__(self, name):
                return getattr(file, name)

        return Counted()


@pytest.fixture
def counted(monkeypatch):
    count = Counting()
    for module in (pieces, pieces.tar):
        monkeypatch.setattr(module, "open", count, raising=False)
    return count


def resumed_after(taken: int, path, counted) -> list:
    """What is left of a stream resumed after so many records; only what that reads is counted."""
    stream = RecordStream(path)
    list(islice(stream, taken))
    state = stream.state_dict()
    stream = RecordStream(path)
    counted.bytes = 0
    stream.load_state_dict(state)
    return list(stream)


def test_lines_that_were_read_are_not_read_again(tmp_path, counted, monkeypatch):
    monkeypatch.setattr(pieces, "PIECES", 40)
    path = written("jsonl", tmp_path / "some", 2000)
    size = path.stat().st_size
    assert len(resumed_after(1500, path, counted)) == 500
    assert size / 4 < counted.bytes < size * (1 / 4 + 2 / 40)  # a quarter is left, and one of 40 pieces comes again


def test_pictures_that_were_read_are_not_read_again(tmp_path, counted):
    path = write_shard(tmp_path / "some.tar", [row(n) for n in range(3)])
    members = []
    turns = [{"from": "human", "value": "<image>"}, TURNS[1]]
    for number in range(64):
        members += [(f"{number}.png", bytes(10_000)), (f"{number}.json", json.dumps({"conversations": turns}).encode())]
    write_tar(path, members)
    assert len(resumed_after(48, path, counted)) == 16
    assert 16 * 10_000 < counted.bytes < 16 * 10_000 + 64 * 200  # the captions are small


def test_row_groups_that_were_read_are_not_read_again(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "some.parquet", [row(n) for n in range(400)], group=10)
    read, open_table = [], pq.ParquetFile

    class Watched(open_table):
        def iter_batches(self, size, row_groups, **named):
            for batch in super().iter_batches(size, row_groups=row_groups, **named):
                read.append(batch.num_rows)
                yield batch

    monkeypatch.setattr(pieces, "SMALL", 0)
    stream = RecordStream(path)
    list(islice(stream, 305))
    state = stream.state_dict()
    stream = RecordStream(path)
    stream.load_state_dict(state)
    monkeypatch.setattr(pq, "ParquetFile", Watched)
    assert len(list(stream)) == 95 and sum(read) == 100


def test_a_folder_may_have_a_name_like_a_pattern(tmp_path):
    folder = tmp_path / "set [v2]*"
    folder.mkdir()
    files = [write_lines(folder / f"{name}.jsonl", [row(name)]) for name in "ab"]
    assert pieces.files_of(folder / "*.jsonl") == pieces.files_of(tmp_path / "**" / "?.jsonl") == files
    assert pieces.files_of(files[0]) == files[:1]
    with pytest.raises(RecordError, match="no file has a name like"):
        RecordStream(folder / "none-*.jsonl")
    with pytest.raises(RecordError, match="there is no data file at"):
        RecordStream(folder / "none.jsonl")


def test_errors_name_file_and_line(tmp_path):
    path = write_lines(tmp_path / "some.jsonl", [row(n) for n in range(30)])
    lines = path.read_text().splitlines()
    lines[17] = '{"conversations": ['
    path.write_text("\n".join(lines))
    with pytest.raises(RecordError, match=rf"^{re.escape(str(path))}:18: broken JSON at column"):
        list(RecordStream(path))
    lines[17] = json.dumps({"id": "x", "conversations": [{"from": "user", "value": ""}]})
    path.write_text("\n".join(lines))
    with pytest.raises(
        RecordError, match=rf"^record 'x' \({re.escape(str(path))}:18\): turn 1: the role 'user' is unknown"
    ):
        list(RecordStream(path))
    table = write_parquet(tmp_path / "some.parquet", [{**row(n), "image": "a" * (n == 7)} for n in range(12)])
    with pytest.raises(RecordError, match=rf"^record '\d+' \({re.escape(str(table))}:\d+\): "):
        list(RecordStream(table))
    for text, match in (
        ("[]", "is no JSON lines, parquet or tar"),
        ("", "is no JSON lines"),
        ("\n\n", "no JSON lines"),
    ):
        path.write_text(text)
        with pytest.raises(RecordError, match=match):
            RecordStream(path.rename(tmp_path / "some.json"))
    with pytest.raises(RecordError, match="no file has a name like"):
        RecordStream(tmp_path / "none-*.jsonl")
    with pytest.raises(RecordError, match="there is no data file at"):
        RecordStream(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RecordError, match=r"there is no record in .*empty\.jsonl: a data file holds at least one"):
        RecordStream(tmp_path / "empty.jsonl")
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n \n\n")
    stream = RecordStream(blank)
    with pytest.raises(RecordError, match="hold no record"):
        for _ in range(20):
            list(stream)


def test_a_state_belongs_to_its_data_and_its_part(tmp_path):
    path = written("jsonl", tmp_path / "some", 10)
    state = RecordStream(path).state_dict()
    for other, match in (
        (RecordStream(path, seed=1), "the seed changed"),
        (RecordStream(path).shard(0, 2), "the number of processes or of their workers changed"),
        (RecordStream([path, path]), "the data files changed"),
    ):
        with pytest.raises(RecordError, match=match):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="there is no part 2 of 2"):
        RecordStream(path).shard(2, 2)


def test_weights_mix_and_continue(tmp_path):
    info = {}
    for name, count, weight in (("a", 40, 3), ("b", 10, 1), ("c", 4, 1)):
        write_lines(tmp_path / f"{name}.jsonl", [row(f"{name}{n}") for n in range(count)])
        info[name] = {"meta_file": f"{name}.jsonl", "weight": weight, "image_dir": name}
    path = tmp_path / "info.json"
    path.write_text(json.dumps(info))
    stream = RecordStream(path, seed=1)
    records, states = [], []
    for _ in range(2):
        for record in stream:
            records.append(record)
            states.append(json.loads(json.dumps(stream.state_dict())))
    names = ids(records)
    assert set(names) == {f"{name}{n}" for name, count in (("a", 40), ("b", 10), ("c", 4)) for n in range(count)}
    assert 2 < sum(name[0] == "a" for name in names) / sum(name[0] == "b" for name in names) < 5
    assert records[0].folder == str(tmp_path / records[0].id[0])
    for taken in (1, 30, 60, len(names) // 2):
        stream = RecordStream(path, seed=1)
        stream.load_state_dict(states[taken - 1])
        rest = [*stream, *stream]
        assert ids(rest)[:40] == names[taken : taken + 40]
    with pytest.raises(RecordError, match="streamed alone"):
        RecordStream([path, tmp_path / "a.jsonl"])


def test_a_small_set_comes_as_often_as_its_weight_says(tmp_path):
    info = {}
    for name, records, weight in (("a", 1, 1), ("b", 60, 2)):
        write_lines(tmp_path / f"{name}.jsonl", [row(f"{name}{n}") for n in range(records)])
        info[name] = {"meta_file": f"{name}.jsonl", "weight": weight}
    (tmp_path / "info.json").write_text(json.dumps(info))
    endless = chain.from_iterable(repeat(RecordStream(tmp_path / "info.json", seed=1)))
    share = sum(record.id == "a0" for record in islice(endless, 300)) / 300
    assert share == pytest.approx(1 / 3, abs=0.08)  # three standard deviations; 0.2 if its ends cost it a turn


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_records_of_one_row_are_told_apart(tmp_path, kind):
    rows = [{"image_path": "a.jpg", "QnA": [{"Q": f"{n}?", "A3": "Yes."} for n in range(3)]}] * 5
    path = tmp_path / f"some.{kind}"
    if kind == "tar":
        write_tar(path, [(f"{number}.json", json.dumps(row).encode()) for number, row in enumerate(rows)])
    else:
        WRITERS[kind](path, rows)
    names = ids(RecordStream(path))
    assert len(set(names)) == len(names) == 15


def test_an_empty_shard_has_no_records(tmp_path):
    for kind, write in WRITERS.items():
        path = tmp_path / f"empty.{kind}"
        write(path, [row(0)] if kind == "parquet" else [])
        if kind == "parquet":
            pq.write_table(pq.read_table(path).slice(0, 0), path)
        full = written(kind, tmp_path / "full", 5)
        assert len(list(RecordStream([path, full]))) == 5
        with pytest.raises(RecordError, match="there is no record in"):
            RecordStream(path)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_single_large_shard_is_shared_out(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(pieces, "SMALL", 0)
    monkeypatch.setitem(WRITERS, "parquet", lambda path, rows: write_parquet(path, rows, group=len(rows)))
    stream = RecordStream(written(kind, tmp_path / "one", 150), seed=1)
    parts = [ids(stream.shard(rank, 4)) for rank in range(4)]
    assert sorted(chain(*parts), key=int) == [str(number) for number in range(150)]
    assert all(30 <= len(part) <= 45 for part in parts)
