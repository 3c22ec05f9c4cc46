"""Fixtures for what checks a data file: a folder of sound and broken pictures, and a check of a few entries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ovisnb.data.checks import validate


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder with one sound picture and one of everything that can be wrong with one."""
    folder = tmp_path_factory.mktemp("pictures")
    image = Image.effect_noise((80, 60), 90).convert("RGB")
    image.save(folder / "good.png")
    image.save(folder / "copy.png")
    image.save(folder / "good.jpg", quality=95)
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:-1500])
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:-4000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "words.jpg").write_text("no picture at all")
    (folder / "folder.jpg").mkdir()
    (folder / "loop.jpg").symlink_to("loop.jpg")
    image.save(folder / "moving.gif", save_all=True, append_images=[image.rotate(9), image.rotate(18)])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    Image.new("1", (70_000, 1)).save(folder / "sliver.png")
    return folder


@pytest.fixture
def check(tmp_path, pictures):
    """check(entry, ...) -> {(kind, id)} of a file of these entries; `check.report` is the whole."""

    def run(*entries, folder=pictures, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        run.report = validate(path, folder, **options)
        return [(fault.kind, fault.id) for fault in run.report]

    return run
