"""The numbers of a set are exact, and their memory does not grow with it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from ovisnb.data import Record, read_records
from ovisnb.data.stats import KINDS, OTHER_KINDS, Numbers, Sample, summarise, summarise_file
from ovisnb.data.stats_text import padding_of, stats_dict, stats_text

PHOTOS = Path(__file__).parents[2] / "data" / "photos"


def talk(question="Hi", answer="Ho", **more) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def test_the_photographs_are_counted():
    records = list(read_records(PHOTOS / "photos.json"))
    stats = summarise(records, image_folder=PHOTOS)
    assert stats.records == 28 and stats.videos == 2 and not list(stats.problems)
    assert stats.kinds == Counter(record.kind for record in records)
    assert stats.turns == Counter(len(record.turns) for record in records)
    assert sum(stats.calls.values()) == sum(turn.role == "gpt" for record in records for turn in record.turns)
    assert stats.sizes.total == sum(len(record.images) + len(record.video or []) for record in records)
    assert (stats.smallest, stats.largest) == ((44, 30), (640, 558))
    assert (stats.boxes.total, stats.crops.total, stats.points.total, stats.outside) == (20, 8, 5, 0)
    assert all(0 <= share <= 1 for box in stats.boxes for share in box)


def test_tokens_are_those_of_the_encoder(golden_processor):
    from ovisnb.chat import encode

    records = list(read_records(PHOTOS / "photos.json"))
    stats = summarise(records, golden_processor, image_folder=PHOTOS, max_pixels=300_000)
    encoded = [
        encode(record, golden_processor, image_folder=PHOTOS, max_pixels=300_000, pixels=False) for record in records
    ]
    assert list(stats.tokens) == [len(one) for one in encoded]
    assert sum(stats.supervised) == sum(int((one.labels != -100).sum()) for one in encoded)
    waste = padding_of(stats, 4096)
    assert waste.planned <= waste.plain and waste.batch_tokens == 4096
    with pytest.raises(ValueError, match="max_tokens"):
        padding_of(stats, 10)
    assert padding_of(stats, 100, max_length=50).batch_tokens == 100
    found = stats_dict(stats, 300, waste)
    assert json.dumps(found) and "<- limit" in stats_text(stats, 300, waste)
    assert found["tokens"]["median"] == stats.tokens.quantile(0.5)  # one median in the table and in the JSON


def test_boxes_are_shares_whatever_they_count(tmp_path):
    from PIL import Image

    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    texts = {"normalised": "(0.1,0.2),(0.5,0.6)", "thousand": "(100,200),(500,600)", "pixels": "(20,20),(100,60)"}
    records = [
        Record.from_dict(talk("<image>", f"<box>{text}</box>", image="a.png", box_coordinates=name, id=name))
        for name, text in texts.items()
    ]
    stats = summarise(records, image_folder=tmp_path)
    assert [pytest.approx(box) for box in stats.boxes] == [(0.1, 0.2, 0.5, 0.6)] * 3
    far = Record.from_dict(talk("<image>", "<box>(20,20),(100,60)</box>", image="a.png"))
    assert summarise([far], image_folder=tmp_path).outside == 1


def test_what_is_wrong_is_a_problem_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        json.dumps(talk(id="a")),
        "{",
        json.dumps({"conversations": []}),
        json.dumps(talk("<image>", image="no.png", id="b")),
    ]
    path.write_text("\n".join(rows))
    stats = summarise_file(path, image_folder=tmp_path)
    assert stats.records == 2 and stats.problems.total == 3
    assert "a.jsonl:2: broken JSON" in next(iter(stats.problems)) and "record 'b'" in list(stats.problems)[2]
    assert "could not be counted in full: 3" in stats_text(stats)


def test_an_empty_set_and_one_of_text():
    for records in ([], [Record.from_dict(talk())]):
        stats = summarise(records)
        assert stats_text(stats) and json.dumps(stats_dict(stats)) and padding_of(stats) is None


def test_kinds_that_are_free_text_do_not_pile_up():
    stats = summarise(Record.from_dict(talk(kind=f"kind {number}")) for number in range(KINDS + 50))
    assert len(stats.kinds) == KINDS + 1 and stats.kinds[OTHER_KINDS] == 50


def test_a_sample_is_whole_while_it_is_small_and_even_afterwards():
    sample = Sample(100)
    for number in range(100):
        sample.add(number)
    assert list(sample) == list(range(100))
    for number in range(100, 10_000):
        sample.add(number)
    assert len(sample) == 100 and sample.total == 10_000 and 3500 < sum(sample) / 100 < 6500


def test_numbers():
    numbers = Numbers()
    with pytest.raises(ValueError, match="no numbers"):
        numbers.quantile(0.5)
    for number in (5, 1, 3, 2, 4):
        numbers.add(number)
    assert [numbers.quantile(share) for share in (0, 0.2, 0.5, 0.9, 1)] == [1, 1, 3, 5, 5]
    assert numbers.above(3) == 2 and numbers[0] == 5 and len(numbers) == 5
