"""pytorch_model.bin: written for those who expect it, read without ever unpickling more than tensors."""

import io
import json
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from ovisnb.model import CheckpointError, load, save, weights
from ovisnb.model.weights import own_tensors, read_bin


class Touch:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def assert_same(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
        assert tensor.dtype == other.state_dict()[name].dtype


def kinds(folder):
    return sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".safetensors"))


@pytest.mark.parametrize("layout", ["native", "released"])
@pytest.mark.parametrize("shard", [None, 500_000])
def test_bin_folders_round_trip(golden_pair, tmp_path, monkeypatch, layout, shard):
    if shard:
        monkeypatch.setattr(weights, "MAX_SHARD_BYTES", shard)
    save(*golden_pair, tmp_path / "bin", layout=layout, safe=False)
    files = kinds(tmp_path / "bin")
    if shard:
        assert len(files) > 2 and all(name.startswith("pytorch_model-0000") for name in files)
        index = json.loads((tmp_path / "bin" / "pytorch_model.bin.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
    else:
        assert files == ["pytorch_model.bin"]
    again, processor = load(tmp_path / "bin")
    assert_same(again, golden_pair[0])
    assert processor.visual_ids == golden_pair[1].visual_ids
    assert again.lm_head.weight is again.get_input_embeddings().weight  # tied, and there once
    names = read_bin(tmp_path / "bin").keys()
    assert sum("embed_tokens" in name or "lm_head" in name for name in names) == 1


def test_a_bin_folder_has_the_files_of_a_safe_one(golden_pair, tmp_path):
    for name, safe in (("safe", True), ("bin", False)):
        save(*golden_pair, tmp_path / name, safe=safe)
    files = {name: {file.name for file in (tmp_path / name).iterdir()} for name in ("safe", "bin")}
    assert files["bin"] - files["safe"] == {"pytorch_model.bin"} and files["safe"] - files["bin"] == {
        "model.safetensors"
    }
    for name in files["safe"] & files["bin"]:
        assert (tmp_path / "safe" / name).read_bytes() == (tmp_path / "bin" / name).read_bytes(), name


def test_one_kind_replaces_the_other(golden_pair, tmp_path):
    for safe, file in ((True, "model.safetensors"), (False, "pytorch_model.bin"), (True, "model.safetensors")):
        save(*golden_pair, tmp_path / "final", safe=safe)
        assert kinds(tmp_path / "final") == [file]


def test_safetensors_are_read_first(golden_pair, tmp_path):
    save(*golden_pair, tmp_path / "both")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(b"never opened")
    assert_same(load(tmp_path / "both")[0], golden_pair[0])


def test_another_dtype(golden_pair, tmp_path):
    save(*golden_pair, tmp_path / "bin", safe=False)
    again = load(tmp_path / "bin", dtype="bfloat16")[0]
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.bfloat16}


def test_the_originals_names_in_its_own_file(golden, golden_model, tmp_path):
    folder = shutil.copytree(golden / "checkpoint", tmp_path / "stage2")
    torch.save(
        load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    (folder / "model.safetensors").unlink()
    assert_same(load(folder, dtype=torch.float32)[0], golden_model)


def test_a_view_takes_nothing_with_it(golden_pair, tmp_path):
    class Views(torch.nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.zeros(1000, 10)
            self.part, self.across = torch.nn.Parameter(whole[:2]), torch.nn.Parameter(whole[2:4].T)

    found = own_tensors(Views())
    assert {name: tensor.untyped_storage().nbytes() for name, tensor in found.items()} == {"part": 80, "across": 80}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_never_executed(golden_pair, tmp_path, zipped, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, marker = tmp_path / "bin", tmp_path / "marker"
    save(*golden_pair, folder, safe=False)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "extra": Touch(marker)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin holds more than tensors.*is not unpickled"
    ) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(Touch(marker), file)
    with pytest.raises(CheckpointError, match="is not unpickled|cannot be read"):
        load(folder)
    assert not marker.exists()


def test_a_hostile_shard_is_never_executed(golden_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 500_000)
    folder, marker = tmp_path / "bin", tmp_path / "marker"
    save(*golden_pair, folder, safe=False)
    shard = max(folder.glob("*.bin"))
    torch.save({"x": Touch(marker)}, shard)
    with pytest.raises(CheckpointError, match=f"{shard.name} holds more than tensors"):
        load(folder)
    assert not marker.exists()


def _broken(folder, kind):
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    content = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
    }.get(kind)
    if kind == "list":
        buffer = io.BytesIO()
        torch.save([torch.zeros(2)], buffer)
        content = buffer.getvalue()
    if kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a", "b")
        content = buffer.getvalue()
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "list", "zip"])
def test_a_damaged_file_is_told_in_a_sentence(golden_pair, tmp_path, kind):
    save(*golden_pair, tmp_path / "bin", safe=False)
    _broken(tmp_path / "bin", kind)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin") as caught:
        load(tmp_path / "bin")
    assert "\n" not in str(caught.value)


def test_a_damaged_index_is_told(golden_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 500_000)
    folder = tmp_path / "bin"
    save(*golden_pair, folder, safe=False)
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    missing = max(folder.glob("*.bin"))
    missing.rename(tmp_path / "elsewhere.bin")
    with pytest.raises(CheckpointError, match=f"lacks {missing.name}"):
        load(folder)
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../elsewhere.bin")
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"'\.\./elsewhere.bin', which is no file of the folder"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load(folder)


def test_a_tensor_too_few_is_told(golden_pair, tmp_path):
    save(*golden_pair, tmp_path / "bin", safe=False)
    state = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    state.pop("model.visual_embeddings_table.weight")
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"missing keys: model\.visual_embeddings_table\.weight"):
        load(tmp_path / "bin")
