"""An even sample of a file: how many, which, with which lines, and how little is read for it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovisnb.data import spread as module
from ovisnb.data.formats import read_entries
from ovisnb.data.record import RecordError
from ovisnb.data.spread import spread

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


def rows(count: int, **more) -> list[dict]:
    return [{"conversations": TURNS, "number": number, **more} for number in range(count)]


def write(path, entries, lines=True):
    text = "".join(json.dumps(entry) + "\n" for entry in entries) if lines else json.dumps(entries, indent=1)
    path.write_text(text)
    return path


@pytest.mark.parametrize("lines", [True, False])
@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 60), n=st.integers(0, 80))
def test_the_sample_is_even_and_knows_its_lines(tmp_path_factory, lines, count, n):
    path = write(tmp_path_factory.mktemp("spread") / "some.json", [{"id": "x", **row} for row in rows(count)], lines)
    by_number = {row.entry["number"]: row for row in read_entries(path)}
    found = list(spread(path, n))
    numbers = [row.entry["number"] for row in found]
    assert len(found) == min(n, count) and numbers == sorted(set(numbers))
    assert found == [by_number[number] for number in numbers]
    if numbers:
        gaps = [after - before for before, after in zip(numbers, [*numbers[1:], count])]
        assert numbers[0] == 0 and max(gaps) <= 2 * (count / len(found))


def test_lines_across_blocks_and_without_a_last_newline(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 64)  # shorter than most lines
    path = write(tmp_path / "some.jsonl", rows(31))
    path.write_bytes(path.read_bytes().rstrip())
    assert list(spread(path, 1000)) == list(read_entries(path))
    assert [row.entry["number"] for row in spread(path, 3)] == [0, 10, 20]


def test_of_a_very_large_file_only_the_sample_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "some.jsonl", rows(2000))
    counted = {row.entry["number"]: row for row in spread(path, 2000)}
    monkeypatch.setattr(module, "COUNTED", 1000)
    monkeypatch.setattr(module, "_counted", None)
    found = list(spread(path, 10))
    numbers = [row.entry["number"] for row in found]
    assert len(numbers) == 10 and all(abs(number - 200 * place) < 20 for place, number in enumerate(numbers))
    assert all(row.entry == counted[number].entry for row, number in zip(found, numbers))
    data = path.read_bytes()
    for row in found:
        assert json.loads(data[-row.line :].splitlines()[0])["number"] == row.entry["number"]


def test_a_broken_row_is_named_or_passed(tmp_path):
    path = tmp_path / "some.jsonl"
    lines = [json.dumps(row) for row in rows(6)]
    path.write_text("\n".join([*lines[:3], '{"conver', "", *lines[3:]]) + "\n")
    assert [row.line for row in spread(path, 10)] == [1, 2, 3, 4, 6, 7, 8]  # line 5 is blank
    assert [row.problem is None for row in spread(path, 10)] == [True] * 3 + [False] + [True] * 3
    with pytest.raises(RecordError, match="there is no data file at"):
        next(spread(tmp_path / "none.jsonl", 3))
    with pytest.raises(RecordError, match="the format 'nonsense' is unknown"):
        next(spread(path, 3, format="nonsense"))


def test_a_row_of_several_records_gives_one(tmp_path):
    lines = [
        {"image_path": "a.jpg", "QnA": [{"Q": f"{line}{number}?", "A3": "Yes."} for number in range(3)]}
        for line in range(5)
    ]
    path = write(tmp_path / "some.jsonl", lines)
    questions = [row.entry["conversations"][0]["value"].removeprefix("<image>\n") for row in spread(path, 5)]
    assert questions == ["00?", "11?", "22?", "30?", "41?"]
