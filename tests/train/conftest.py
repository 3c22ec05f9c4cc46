"""What tests of runs share: a small data file, and settings of a short run on it."""

from __future__ import annotations

import json
import random

import pytest
from PIL import Image

from ovisnb.train import Settings

PIXELS = {
    f"{kind}_{side}_pixels": value
    for kind in ("single_image", "multiple_image", "video")
    for side, value in (("min", 32 * 32), ("max", 64 * 64))
}


def write_data(folder, sizes):
    """A file of a record for each size of picture, with answers of very different lengths, one of text only, one of two
    images."""
    chance = random.Random(0)
    records = []
    for number, size in enumerate(sizes):
        name = f"{number}.png"
        Image.new("RGB", size, tuple(chance.randrange(256) for _ in range(3))).save(folder / name)
        records.append(
            {
                "id": f"r{number}",
                "image": name,
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is this?"},
                    {"from": "gpt", "value": "a colour " * (1 + number)},
                ],
            }
        )
    records[3]["image"] = ["3.png", "4.png"]
    records[3]["conversations"][0]["value"] = "<image> and <image>?"
    del records[5]["image"]
    records[5]["conversations"][0]["value"] = "Hello"
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def data(tmp_path):
    """Eight records in a file."""
    return write_data(tmp_path, [(64, 48)] * 8)


@pytest.fixture
def toy(golden, data, tmp_path):
    """Settings of a short run, with changes."""

    def make(folder="run", **changes):
        values = (
            {
                "model_path": str(golden / "checkpoint"),
                "data_path": str(data),
                "image_folder": str(tmp_path),
                "output_dir": str(tmp_path / folder),
                "max_steps": 6,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "save_steps": 3,
                "report_to": "none",
            }
            | PIXELS
            | changes
        )
        return Settings.from_dict(values)

    return make
