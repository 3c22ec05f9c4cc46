"""Features of a frozen vision part on disk: the same numbers, the same weights, and no picture encoded twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ovisnb.chat import collate, encode
from ovisnb.model import load, loss
from ovisnb.train import Settings, run_sft, vision_cache
from ovisnb.train.vision_cache import VisionCache


@pytest.fixture
def model(golden):
    model, _ = load(golden / "checkpoint", dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    model.model.visual_embeddings_table.requires_grad_(False)
    return model


def picture(number: int, size=(64, 48)) -> Image.Image:
    return Image.new("RGB", size, (40 * number % 256, 90, 200))


def record(number: int, images: list, video: list | None = None) -> dict:
    human = "<image>" * len(images) + ("<video>" if video else "") + "What is this?"
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": "a colour " * (number + 1)}]
    made = {"id": f"r{number}", "image": images, "conversations": turns}
    return made | ({"video": video} if video else {})


@pytest.fixture
def batch(golden_processor):
    """A picture, two pictures (one of them seen before), a video, and a text."""
    records = [
        record(0, [picture(0)]),
        record(1, [picture(1, (96, 64)), picture(0)]),
        record(2, [], video=[picture(2), picture(3)]),
        record(3, []),
    ]
    limits = {"min_pixels": 32 * 32, "max_pixels": 64 * 64}
    return collate([encode(one, golden_processor, **limits) for one in records])


def files(folder) -> list:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_features_are_those_that_the_model_makes(model, batch, tmp_path):
    cache = VisionCache(model.train(), tmp_path)
    first, second = cache(batch), cache(batch)
    assert (cache.misses, cache.hits) == (3, 1 + 4) and len(files(tmp_path)) == 3
    assert not any(key.startswith("pixel_values") for key in first) and "pixel_values" in batch
    assert torch.equal(first["visual_features"], second["visual_features"])
    assert not first["visual_features"].requires_grad
    with torch.no_grad():
        alone = []
        for pixels, grids in vision_cache.KINDS:
            pieces = batch[pixels].split(batch[grids].prod(1).tolist())
            alone += [
                model.model.get_visual_features(*pair) for pair in zip(pieces, batch[grids].split(1), strict=True)
            ]
        assert torch.equal(first["visual_features"], torch.cat(alone))
        wanted = model(**batch, use_cache=False).loss
        torch.testing.assert_close(model(**first, use_cache=False).loss, wanted, rtol=0, atol=1e-5)
    assert model.model.vision_tower.training


def test_a_batch_without_pictures_stays_as_it_is(model, batch, tmp_path):
    text = {"input_ids": batch["input_ids"][3:], "labels": batch["labels"][3:]}
    cache = VisionCache(model, tmp_path)
    assert cache(text) == text and cache.misses == cache.hits == 0


def test_other_weights_and_other_pixels_have_other_keys(model, batch, tmp_path):
    VisionCache(model, tmp_path)(batch)
    again = VisionCache(model, tmp_path)
    again(batch | {"pixel_values": batch["pixel_values"] + 1e-3})
    assert (again.misses, again.hits) == (2, 2)  # the video is as it was, and the repeated picture a hit
    seen = {again.fingerprint}
    for parameter in (model.model.vision_tower.head_norm.bias, model.model.visual_embeddings_table.weight):
        with torch.no_grad():
            parameter[0] += 1e-3
        changed = VisionCache(model, tmp_path)
        changed(batch)
        assert changed.misses == 3
        seen.add(changed.fingerprint)
    seen.add(VisionCache(model, tmp_path, lambda: torch.autocast("cpu", torch.bfloat16)).fingerprint)
    seen.add(VisionCache(model.to(torch.bfloat16), tmp_path).fingerprint)
    assert len(seen) == 5


def test_autocast_is_the_forwards(model, batch, tmp_path):
    cache = VisionCache(model, tmp_path, lambda: torch.autocast("cpu", torch.bfloat16))
    found = cache(batch)["visual_features"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, cache(batch)["visual_features"])


@pytest.mark.parametrize("at", [0, 20, -1, None])
def test_a_damaged_file_is_told_and_made_again(model, batch, tmp_path, capsys, at):
    """A changed byte in the header's length, the header and the numbers; an empty file."""
    wanted = VisionCache(model, tmp_path)(batch)["visual_features"]
    file = files(tmp_path)[1]
    good = file.read_bytes()
    spoilt = bytearray(good if at is not None else b"")
    if at is not None:
        spoilt[at] ^= 1
    file.write_bytes(spoilt)
    cache = VisionCache(model, tmp_path)
    assert torch.equal(cache(batch)["visual_features"], wanted)
    assert cache.misses == 1 and file.read_bytes() == good
    assert capsys.readouterr().out == f"{file} is damaged: its picture is encoded again\n"


def test_a_full_disk_is_told_once_and_training_goes_on(model, batch, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vision_cache.os, "replace", full)
    cache = VisionCache(model, tmp_path)
    assert len(cache(batch)["visual_features"]) and not files(tmp_path)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and told.startswith("no more features are written to the vision cache: ")
    assert "cannot be written (No space left on device)" in told


def test_many_writers_of_one_file_leave_a_whole_one(model, tmp_path, capsys):
    """Threads, who meet at the same files as processes do."""
    cache, features = VisionCache(model, tmp_path), torch.randn(300, 96)
    path = cache.folder / "ab" / "abc.safetensors"
    cache._write(path, features)

    def turns(_):
        for _ in range(30):
            cache._write(path, features)
            assert torch.equal(cache._read(path), features)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(turns, range(4)))
    assert files(tmp_path) == [path] and not capsys.readouterr().out


def test_where_it_cannot_work_it_says_so(model, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is no folder that can be written .*: choose another"):
        VisionCache(model, file)
    model.model.visual_embeddings_table.requires_grad_(True)
    with pytest.raises(ValueError, match="or the visual embedding table trains"):
        VisionCache(model, tmp_path)
    model.requires_grad_(False)
    monkeypatch.setattr(loss, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="use ZeRO 0, 1 or 2"):
        VisionCache(model, tmp_path)


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_with_the_cache_ends_in_the_same_weights_and_encodes_each_picture_once(
    golden, tmp_path, monkeypatch, lora
):
    """With one picture a batch, bit for bit."""
    records = [record(number, [picture(number)]) for number in range(3)] + [record(3, [])]
    encoded = []
    real = VisionCache._encode
    monkeypatch.setattr(VisionCache, "_encode", lambda self, *given: encoded.append(1) or real(self, *given))
    weights = {}
    for name, cache in (("without", None), ("with", "features"), ("again", "features")):
        settings = {
            "model_path": str(golden / "checkpoint"),
            "output_dir": str(tmp_path / name),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-3,
            "save_steps": 0,
            "report_to": "none",
            "single_image_min_pixels": 32 * 32,
            "single_image_max_pixels": 64 * 64,
        }
        settings |= {"use_lora": True, "lora_preset": "llm", "lora_r": 4} if lora else {"train_modules": "llm"}
        settings |= {"vision_cache": str(tmp_path / cache)} if cache else {}
        encoded.clear()
        folder = run_sft(Settings.from_dict(settings), train_dataset=records)
        assert len(encoded) == (3 if name == "with" else 0)
        weights[name] = {file.name: load_file(file) for file in (folder / "final").glob("*.safetensors")}
    for name in ("with", "again"):
        assert weights[name].keys() == weights["without"].keys() and weights[name]
        for file, wanted in weights["without"].items():
            assert all(torch.equal(weights[name][file][key], tensor) for key, tensor in wanted.items())
