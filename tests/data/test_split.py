"""Splits keep the records of one picture together, lose nothing, and come as close to the ratios as that allows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import RecordError, read_records
from ovisnb.data.checks import validate
from ovisnb.data.split import SPLITS, split

PHOTOS = Path(__file__).parents[2] / "data" / "photos"


def entry(name, *images: str, **more) -> dict:
    turns = [{"from": "human", "value": "<image>" * len(images) + f"What is {name}?"}, {"from": "gpt", "value": "It."}]
    return {"id": str(name), **({"image": list(images)} if images else {}), "conversations": turns, **more}


def write(path: Path, entries: list[dict], form: str = "lines") -> Path:
    if form == "lines":
        path.write_text("".join(json.dumps(one) + "\n" for one in entries))
    else:
        path.write_text(json.dumps(entries if form == "list" else {"conversations": entries}, indent=1))
    return path


def names(done) -> dict[str, list[str]]:
    return {
        name: [record.id for record in read_records(path)] if done.counts[name] else []
        for name, path in done.paths.items()
    }


@pytest.mark.parametrize(
    "name, form", [("full.jsonl", "lines"), ("full.json", "list"), ("full.json", "lines"), ("full.json", "wrapped")]
)
def test_every_record_is_in_exactly_one_file_of_the_same_form(tmp_path, name, form):
    entries = [entry(number, note=["é", number]) for number in range(50)]
    path = write(tmp_path / name, entries, form)
    done = split(path)
    assert [done.paths[part].name for part in SPLITS] == [name.replace("full", f"full_{part}") for part in SPLITS]
    assert done.counts == {"train": 40, "val": 5, "test": 5}
    found = []
    for part in SPLITS:
        text = done.paths[part].read_text("utf-8")
        rows = [json.loads(line) for line in text.splitlines()] if form == "lines" else json.loads(text)
        assert all("é" in one["note"] for one in rows)
        found += rows
    assert sorted(found, key=lambda one: int(one["id"])) == entries
    assert "40 of 50 (80.0%, asked for 80.0%)" in done.text()


def test_records_of_a_picture_stay_together_whatever_its_path_looks_like(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(folder / f"{number}.png")
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "link.png").symlink_to("0.png")
    zero = ["0.png", "./0.png", "sub/../0.png", "copy.png", "link.png", "images/../0.png"]
    entries = [entry(f"z{at}", image) for at, image in enumerate(zero[:-1])]
    entries += [
        entry("both", "1.png", "2.png"),
        entry("one", "1.png"),
        entry("two", "2.png"),
        entry("frames", video=["3.png"]),
    ]
    entries[-1]["conversations"][0]["value"] += "<video>"
    entries += [
        entry("three", "3.png"),
        entry("crop", "4.png", {"path": "0.png", "box": [0, 0, 4, 4]}),
        entry("four", "4.png"),
    ]
    path = write(tmp_path / "full.jsonl", entries)
    for seed in range(5):
        where = {name: part for part, ids in names(split(path, seed=seed, image_folder=folder)).items() for name in ids}
        assert len(where) == len(entries)
        assert len({where[f"z{at}"] for at in range(5)} | {where["crop"], where["four"]}) == 1
        assert where["both"] == where["one"] == where["two"] and where["frames"] == where["three"]


def test_the_splits_of_the_photographs_leak_nothing(tmp_path):
    done = split(
        PHOTOS / "photos.json", output_dir=tmp_path, train_ratio=0.6, val_ratio=0.2, test_ratio=0.2, image_folder=PHOTOS
    )
    assert sum(done.counts.values()) == 28 and not list(PHOTOS.glob("*_train*"))
    for part in done.paths:
        others = [path for other, path in done.paths.items() if other != part and done.counts[other]]
        if done.counts[part]:
            assert validate(done.paths[part], PHOTOS, against=others).clean


def test_the_same_seed_gives_the_same_splits_and_another_others(tmp_path):
    path = write(tmp_path / "full.jsonl", [entry(number) for number in range(40)])
    first, again, other = names(split(path, seed=1)), names(split(path, seed=1)), names(split(path, seed=2))
    assert first == again != other


@pytest.mark.parametrize("ratios", [(0.9, 0.1, 0.1), (0.5, 0.1, 0.1), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)])
def test_ratios_that_are_no_shares_are_refused(tmp_path, ratios):
    path = write(tmp_path / "full.jsonl", [entry(1)])
    with pytest.raises(ValueError, match=r"sum to 1|train_ratio is (1\.2|nan): a share is a number from 0 to 1"):
        split(path, train_ratio=ratios[0], val_ratio=ratios[1], test_ratio=ratios[2])
    assert [file.name for file in tmp_path.iterdir()] == ["full.jsonl"]


def test_a_split_without_a_share_is_not_written_and_an_old_one_is_pointed_at(tmp_path):
    path = write(tmp_path / "full.jsonl", [entry(number) for number in range(10)])
    split(path)
    done = split(path, train_ratio=0.9, val_ratio=0.1, test_ratio=0)
    assert done.counts == {"train": 9, "val": 1} and "full_test.jsonl is of an earlier split" in done.text()
    tiny = split(write(tmp_path / "tiny.jsonl", [entry(1), entry(2)]))
    assert tiny.counts["train"] == 2 and "test is empty" in tiny.text()


def test_pictures_that_are_not_found_are_told(tmp_path):
    rows = [{**entry(number), "image": image} for number, image in enumerate(["a.jpg", "a.jpg", "b.jpg"])]
    path = write(tmp_path / "full.jsonl", rows)
    said = "2 pictures were not found, so that one with two names is taken for two: give the image_folder"
    assert split(path).notes[0] == said
    (tmp_path / "a.jpg").write_bytes(b"a")
    assert split(path, image_folder=tmp_path).notes[0].startswith("1 picture was not found")
    (tmp_path / "b.jpg").write_bytes(b"b")
    assert "found" not in split(path, image_folder=tmp_path).text()


def test_a_row_that_cannot_be_read_stops_it_before_anything_is_written(tmp_path):
    path = tmp_path / "full.jsonl"
    path.write_text(json.dumps(entry(1)) + "\n{\n")
    with pytest.raises(RecordError, match=r"full\.jsonl:2: broken JSON.*--fix"):
        split(path)
    (tmp_path / "info.json").write_text(json.dumps({"a": {"meta_file": "full.jsonl"}}))
    with pytest.raises(RecordError, match="one by one"):
        split(tmp_path / "info.json")
    with pytest.raises(RecordError, match="there is no data file"):
        split(tmp_path / "none.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full.jsonl", "info.json"]


def test_annotation_lines_stay_annotation_lines(tmp_path):
    rows = [{"image_path": f"{n % 7}.png", "QnA": [{"Q": "What?", "A3": "It."}] * 2, "n": n} for n in range(21)]
    done = split(write(tmp_path / "a.jsonl", rows))
    back = [json.loads(line) for path in done.paths.values() for line in path.read_text().splitlines()]
    assert sorted(back, key=lambda row: row["n"]) == rows and done.groups == 7


def test_a_file_of_one_object_is_split_into_records(tmp_path):
    images = [{"id": at, "file_name": f"{at}.png", "width": 64, "height": 48} for at in range(10)]
    found = [{"id": at, "image_id": at % 10, "category_id": 1, "bbox": [5, 5, 20, 20]} for at in range(15)]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"images": images, "annotations": found, "categories": [{"id": 1, "name": "cat"}]}))
    done = split(path)
    assert done.counts == {"train": 8, "val": 1, "test": 1} and "written as records" in done.text()
    assert sum(len(ids) for ids in names(done).values()) == 10


def test_odd_values_survive(tmp_path):
    path = tmp_path / "full.jsonl"
    path.write_text(json.dumps(entry("a", note="\ud800", score=float("nan"))) + "\n" + json.dumps(entry("b")) + "\n")
    done = split(path, train_ratio=1, val_ratio=0, test_ratio=0)
    assert '"\\ud800"' in done.paths["train"].read_text() and "NaN" in done.paths["train"].read_text()


def test_parquet_stays_parquet_with_its_pictures(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pixels = []
    for number in range(10):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "p.png")
        pixels.append((tmp_path / "p.png").read_bytes())
    rows = [entry(number, "x") | {"image": [{"bytes": pixels[number % 10], "path": None}]} for number in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "full.parquet")
    done = split(tmp_path / "full.parquet", train_ratio=0.5, val_ratio=0.3, test_ratio=0.2)
    assert done.counts == {"train": 10, "val": 6, "test": 4} and done.groups == 10
    tables = [pq.read_table(path) for path in done.paths.values()]
    assert sorted(row["id"] for table in tables for row in table.to_pylist()) == sorted(row["id"] for row in rows)
    assert all(table.schema == tables[0].schema for table in tables)


def test_a_table_of_one_row_of_several_records_stays_a_table(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"image_path": "a.png", "QnA": [{"Q": "What?", "A3": "It."}] * 2}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "full.parquet")
    done = split(tmp_path / "full.parquet", train_ratio=1, val_ratio=0, test_ratio=0)
    assert pq.read_table(done.paths["train"]).to_pylist() == [row] and done.counts == {"train": 1}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pictures=st.lists(st.lists(st.integers(0, 25), max_size=2), min_size=1, max_size=60),
    parts=st.tuples(*[st.integers(0, 5)] * 3).filter(any),
    seed=st.integers(0, 99),
)
def test_any_set(tmp_path, pictures, parts, seed):
    entries = [entry(at, *(f"{one}.png" for one in images)) for at, images in enumerate(pictures)]
    ratios = [part / sum(parts) for part in parts]
    done = split(
        write(tmp_path / "any.jsonl", entries),
        train_ratio=ratios[0],
        val_ratio=ratios[1],
        test_ratio=ratios[2],
        seed=seed,
    )
    found = names(done)
    assert Counter(name for ids in found.values() for name in ids) == Counter(str(at) for at in range(len(entries)))
    seen = {part: {image for name in ids for image in pictures[int(name)]} for part, ids in found.items()}
    for one, its in seen.items():
        assert not any(its & seen[other] for other in seen if other != one)
    for part, ratio in zip(SPLITS, ratios):
        assert abs(done.counts.get(part, 0) - ratio * len(entries)) <= 2 * done.largest
