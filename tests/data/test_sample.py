"""A sample is real data: sound by our own checks, with pictures that open, written whole or not at all."""

from __future__ import annotations

import errno
import json

import pytest

from ovisnb.data import Media, RecordError, open_media, read_records
from ovisnb.data import sample as sample_module
from ovisnb.data.checks import validate
from ovisnb.data.sample import FORMS, make_sample


@pytest.mark.parametrize("name", ["sample.json", "deep/sample.jsonl"])
def test_a_sample_covers_the_forms_and_is_clean(tmp_path, name):
    path = make_sample(tmp_path / name, num_samples=24)
    report = validate(path, path.parent)
    assert report.clean, report.text()
    records = list(read_records(path))
    assert len(records) == 24 and {record.kind for record in records} == set(FORMS)
    for record in records:
        images, frames = open_media(record, path.parent)
        assert all(image.size == (256, 256) for image, media in zip(images, record.images) if media.box is None)
        assert frames is None or len(frames) == 5
    crop = next(record for record in records if record.kind == "crop")
    assert "<tool_call>Crop" in crop.turns[1].text and crop.images[1].box is not None
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, "sample_images"]


def test_what_the_answers_say_is_in_the_pictures(tmp_path):
    path = make_sample(tmp_path / "s.json", 16, seed=5)
    for record in read_records(path):
        if record.kind == "several_pictures":
            first, second = (open_media(record, tmp_path)[0][at] for at in (0, 1))
            assert first.tobytes() != second.tobytes()


def test_the_same_seed_gives_the_same_sample_and_another_does_not(tmp_path):
    def made(name, seed):
        path = make_sample(tmp_path / name / "s.json", 9, seed=seed)
        return {file.name: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}

    assert made("a", 1) == made("b", 1) != made("c", 2)


def test_kinds_can_be_chosen(tmp_path):
    path = make_sample(tmp_path / "t.jsonl", 3, kinds=["text"])
    assert {record.kind for record in read_records(path)} == {"text"}
    with pytest.raises(ValueError, match="no kind 'txt'"):
        make_sample(tmp_path / "x.jsonl", 3, kinds=["txt"])
    with pytest.raises(ValueError, match="num_samples is 0"):
        make_sample(tmp_path / "x.jsonl", 0)
    with pytest.raises(RecordError, match=r"end its name in .json or .jsonl"):
        make_sample(tmp_path / "x.txt")


def test_nothing_that_is_there_is_replaced_and_nothing_half_done_is_left(tmp_path, monkeypatch):
    path = make_sample(tmp_path / "s.json", 1)
    before = path.read_bytes()
    with pytest.raises(RecordError, match="is there already"):
        make_sample(path, 2)
    path.rename(tmp_path / "other.json")
    with pytest.raises(RecordError, match="s_images is there already"):
        make_sample(path, 2)
    assert (tmp_path / "other.json").read_bytes() == before

    def broken(scene, turn):
        raise OSError("disk gone")

    monkeypatch.setitem(sample_module.FORMS, "text", broken)
    with pytest.raises(OSError, match="disk gone"):
        make_sample(tmp_path / "new" / "n.json", 9)
    assert list((tmp_path / "new").iterdir()) == []


def test_paths_start_in_the_folder_of_the_file(tmp_path):
    path = make_sample(tmp_path / "s.json", 2)
    [first, _] = json.loads(path.read_text())
    assert first["image"] == "s_images/0000a.png"
    assert Media(path=first["image"]).path.startswith("s_images/")


def test_a_full_disk_names_the_sample(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in ("PIL.Image.Image.save", "json.dumps", "tempfile.mkdtemp"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(OSError, match=r"\] cannot be written \(No space left on device\): write") as caught:
                make_sample(tmp_path / "s.json", 1)
        assert caught.value.filename == str(tmp_path / "s.json") and not list(tmp_path.iterdir())
