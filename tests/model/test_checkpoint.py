"""Opening and saving: both layouts, bit-equal round trips, one sentence for what is no checkpoint, no foreign code."""

import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_flash_attn_2_available

from ovisnb.model import CheckpointError, Ovis2_5Config, load, load_processor, released, save, weights


class Marker:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of the golden checkpoint, released layout, to spoil."""
    return shutil.copytree(golden / "checkpoint", tmp_path / "released")


def edit(file, **changes):
    """Change top-level entries of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def tensors(folder):
    """All tensors of a folder, whatever its shards."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_bit_equal(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def contains(found: dict, wanted: dict, where=""):
    """Every entry of wanted stands in found, at any depth."""
    for key, value in wanted.items():
        if isinstance(value, dict):
            contains(found[key], value, f"{where}{key}.")
        else:
            assert found[key] == value, f"{where}{key}"


# What the released remote code, vLLM and ms-swift read; the rest of a transformers 4 config is its defaults.
READ_ANYWHERE = ("model_type", "architectures", "conversation_formatter_class", "hidden_size", "visual_vocab_size")
READ_OF_LLM = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "attention_bias",
    "tie_word_embeddings", "max_position_embeddings", "use_sliding_window", "architectures", "attention_dropout",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_round_trip_is_bit_equal(golden, tmp_path, dtype):
    source = golden / "checkpoint"
    model, processor = load(source, dtype=dtype)
    save(model, processor, tmp_path / "again", layout="released")
    wanted = {name: tensor.to(dtype) for name, tensor in tensors(source).items()}
    assert_bit_equal(tensors(tmp_path / "again"), wanted)

    old, new = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "again"))
    contains(new, {key: old[key] for key in READ_ANYWHERE})
    contains(new["llm_config"], {key: old["llm_config"][key] for key in READ_OF_LLM})
    contains(new["vit_config"], {key: old["vit_config"][key] for key in (*released.VISION_FIELDS, "model_type")})
    assert new["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert {value.split("--")[-1] for value in new["auto_map"].values()} == set(old["auto_map"].values())


def test_released_round_trip_keeps_tokenizer_and_preprocessor(golden, tmp_path):
    source, again = golden / "checkpoint", tmp_path / "again"
    model, processor = load(source)
    save(model, processor, again, layout="released")
    for name in ("vocab.json", "added_tokens.json"):
        assert json.loads((again / name).read_text()) == json.loads((source / name).read_text())

    def merges(folder):
        return [line for line in (folder / "merges.txt").read_text().splitlines() if not line.startswith("#")]

    assert merges(again) == merges(source)
    old, new = (json.loads((f / "tokenizer_config.json").read_text()) for f in (source, again))
    contains(new, {key: old[key] for key in old if key not in ("model_max_length", "additional_special_tokens")})
    assert sorted(new["additional_special_tokens"]) == sorted(old["additional_special_tokens"])
    old, new = (json.loads((f / "preprocessor_config.json").read_text()) for f in (source, again))
    contains(new, old)
    old, new = (json.loads((f / "tokenizer.json").read_text()) for f in (source, again))
    assert new["added_tokens"] == old["added_tokens"] and new["model"]["vocab"] == old["model"]["vocab"]


def test_a_server_makes_the_same_patches(golden_pair, golden, tmp_path):
    """The remote code and vLLM resize and normalise with the folder's SigLIP processor, then cut patches as here."""
    model, processor = golden_pair
    save(model, processor, tmp_path / "released", layout="released")
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "released", backend="pil")
    assert type(theirs).__name__.startswith("SiglipImageProcessor")
    picture = Image.open(golden / "images" / "photo.png").convert("RGB")
    made = processor.image_processor([picture], min_pixels=4096, max_pixels=16384)
    _, rows, columns = made["image_grid_thw"][0].tolist()
    pixels = np.asarray(theirs.preprocess(picture, size={"height": 16 * rows, "width": 16 * columns})["pixel_values"])
    blocks = pixels.reshape(1, 1, 3, rows // 2, 2, 16, columns // 2, 2, 16).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    np.testing.assert_allclose(blocks.reshape(rows * columns, -1), made["pixel_values"], rtol=0, atol=1e-6)


def test_native_round_trip_is_bit_equal(golden_pair, tmp_path):
    model, processor = golden_pair
    save(model, processor, tmp_path / "native")
    again, processor_again = load(tmp_path / "native")
    assert_bit_equal(again.state_dict(), model.state_dict())
    own = {"_name_or_path": "", "transformers_version": ""}
    assert again.config.to_dict() | own == model.config.to_dict() | own
    assert processor_again.visual_ids == processor.visual_ids
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert not again.training
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["model_type"] == "ovis2_5" and config["architectures"] == ["Ovis2_5ForConditionalGeneration"]
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "native"), Ovis2_5Config)


def test_native_to_released_to_native(golden_pair, tmp_path):
    model, processor = golden_pair
    save(model, processor, tmp_path / "a", layout="released")
    first, its_processor = load(tmp_path / "a")
    save(first, its_processor, tmp_path / "b", layout="native")
    second, _ = load(tmp_path / "b")
    assert_bit_equal(second.state_dict(), model.state_dict())


def test_save_pretrained_after_released_writes_native_names(golden, tmp_path):
    model, processor = load(golden / "checkpoint")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert all(name.startswith(("model.", "lm_head.")) for name in tensors(tmp_path))
    assert_bit_equal(load(tmp_path)[0].state_dict(), model.state_dict())


@pytest.mark.parametrize("layout", ["native", "released"])
def test_untied_embeddings_stay_apart(golden, tmp_path, layout):
    model, processor = load(golden / "checkpoint")
    config = Ovis2_5Config(**{**model.config.to_dict(), "tie_word_embeddings": False})
    untied = type(model)(config)
    untied.load_state_dict(model.state_dict())
    with torch.no_grad():
        untied.lm_head.weight.mul_(2)
    save(untied, processor, tmp_path / "untied", layout=layout)
    again, _ = load(tmp_path / "untied")
    assert_bit_equal(again.state_dict(), untied.state_dict())
    assert torch.equal(again.lm_head.weight, 2 * again.get_input_embeddings().weight)


def test_shards_and_their_index(golden_pair, tmp_path, monkeypatch):
    model, processor = golden_pair
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 500_000)
    save(model, processor, tmp_path / "sharded", layout="released")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["weight_map"].keys() == tensors(tmp_path / "sharded").keys()
    again, _ = load(tmp_path / "sharded")
    assert_bit_equal(again.state_dict(), model.state_dict())


def test_a_folder_of_the_original_trainer_gets_the_released_identity(folder, golden_model, tmp_path):
    edit(folder / "config.json", model_type="ovis", architectures=["Ovis"], auto_map=None)
    model, processor = load(folder)
    assert_bit_equal(model.state_dict(), golden_model.state_dict())
    save(model, processor, tmp_path / "saved", layout="released")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "ovis2_5" and config["architectures"] == ["Ovis2_5"]


def test_window_settings_survive(golden, tmp_path):
    model, processor = load(golden / "checkpoint")
    model.config.vision_config.fullatt_block_indexes = "0|2"
    for layout in ("native", "released"):
        save(model, processor, tmp_path / layout, layout=layout)
        again, _ = load(tmp_path / layout)
        assert again.config.vision_config.fullatt_block_indexes == "0|2"
        assert again.config.vision_config.window_size == 64


def test_pixel_limits_survive(golden, tmp_path):
    model, processor = load(golden / "checkpoint")
    assert (processor.image_processor.min_pixels, processor.image_processor.max_pixels) == (448 * 448, 1344 * 1792)
    processor.image_processor.min_pixels, processor.image_processor.max_pixels = 4096, 8192
    for layout in ("native", "released"):
        save(model, processor, tmp_path / layout, layout=layout)
        images = load_processor(tmp_path / layout).image_processor
        assert (images.min_pixels, images.max_pixels) == (4096, 8192)


def test_saving_replaces_a_checkpoint_whole_and_keeps_other_files(golden_pair, tmp_path, monkeypatch):
    model, processor = golden_pair
    target = save(model, processor, tmp_path / "model", layout="released")
    (target / "README.md").write_text("mine")
    (target / "settings.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    def fails(*args, **kwargs):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        patch.setattr(processor, "save_pretrained", fails)
        save(model, processor, target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing half-written is left

    save(model, processor, target)
    assert (target / "README.md").read_text() == "mine" and (target / "settings.json").read_text() == "{}"
    assert not (target / "vocab.json").exists()  # the released layout's
    assert "text_config" in json.loads((target / "config.json").read_text())


def test_the_old_checkpoint_comes_back_where_the_new_one_cannot_take_its_place(golden_pair, tmp_path, monkeypatch):
    target = save(*golden_pair, tmp_path / "model", layout="released")
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    replace = os.replace

    def fails_once(source, destination):
        if os.path.basename(source) == "new":
            raise OSError("device is busy")
        replace(source, destination)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="device is busy"):
        patch.setattr(os, "replace", fails_once)
        save(*golden_pair, target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_through_a_link_fills_the_folder_behind_it(golden_pair, tmp_path):
    real = save(*golden_pair, tmp_path / "real", layout="released")
    (tmp_path / "link").symlink_to(real)
    save(*golden_pair, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (real / "processor_config.json").exists()


def test_saving_does_not_bury_a_folder_of_something_else(golden_pair, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files but no checkpoint"):
        save(*golden_pair, tmp_path)
    with pytest.raises(ValueError, match="thesis.txt is a file"):
        save(*golden_pair, tmp_path / "thesis.txt")
    with pytest.raises(ValueError, match="'native' or 'released'"):
        save(*golden_pair, tmp_path / "x", layout="gguf")


def break_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def rename_tensor(folder):
    saved = load_file(folder / "model.safetensors")
    saved["llm.model.norm.wait"] = saved.pop("llm.model.norm.weight")
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_tensor(folder):
    saved = load_file(folder / "model.safetensors")
    saved["vte.weight"] = saved["vte.weight"][:-1].clone()
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(folder):
    """A tokenizer with so many entries that the visual tokens have no rows."""
    tokens = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    extra = {**tokens["542"], "special": False}
    tokens |= {str(543 + i): {**extra, "content": f"<extra{i}>"} for i in range(120)}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=tokens)


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "model_type 'llama', not an Ovis2.5"),
        (lambda f: edit(f / "config.json", model_type="llava", llm_config=None), "model_type 'llava'"),
        (lambda f: (f / "model.safetensors").unlink(), "no readable safetensors weights"),
        (break_weights, "no readable safetensors weights"),
        (rename_tensor, "llm.model.norm.wait|model.language_model.norm.weight"),
        (reshape_tensor, "visual_embeddings_table|do not fit"),
        (lambda f: [g.unlink() for g in f.glob("*token*")] + [(f / "vocab.json").unlink()], "has no tokenizer"),
        (other_tokenizer, "the visual tokens the ids"),
    ],
)
def test_what_is_no_checkpoint_gets_one_sentence(folder, spoil, told):
    spoil(folder)
    with pytest.raises(CheckpointError, match=told) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_missing_folder_a_file_and_a_hub_id_without_a_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file", "nobody/no-such-ovis"):
        with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
            load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, told",
    [
        (
            {"attn_implementation": "flash_attention_2"},
            r"flash_attention_2' needs a package that is not here .*ovisnb\[gpu\]",
        ),
        ({"attn_implementation": "flashy"}, "'flashy' is not known; use 'sdpa'"),
        ({"dtype": "float33"}, "'float33' is not a floating point dtype"),
        ({"dtype": torch.int8}, "torch.int8 is not a floating point dtype"),
    ],
)
def test_options_that_cannot_be_had_get_one_sentence(golden, options, told):
    if "flash_attention_2" in options.values() and is_flash_attn_2_available():
        pytest.skip("flash-attn is installed here")
    with pytest.raises(CheckpointError, match=told):
        load(golden / "checkpoint", **options)


def test_loading_says_nothing_of_its_own(golden, folder, capfd):
    load(golden / "checkpoint")
    rename_tensor(folder)
    with pytest.raises(CheckpointError):
        load(folder)
    assert capfd.readouterr() == ("", "")


def test_nothing_is_unpickled(folder, tmp_path):
    """Weights that exist only as a pickle are refused, and never opened."""
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "marker"
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(Marker(marker), file)
    with pytest.raises(CheckpointError, match="safetensors"):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("layout", ["released", "native"])
def test_python_named_by_a_checkpoint_never_runs(golden_pair, tmp_path, layout, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    folder, marker = tmp_path / "checkpoint", tmp_path / "marker"
    save(*golden_pair, folder, layout=layout)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\n")
    classes = (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoTokenizer",
        "AutoProcessor",
        "AutoImageProcessor",
    )
    for name in ("config", "tokenizer_config", "processor_config", "preprocessor_config", "generation_config"):
        if (folder / f"{name}.json").exists():
            auto_map = {
                kind: "evil.Evil" if kind != "AutoTokenizer" else ["evil.Evil", "evil.Evil"] for kind in classes
            }
            edit(folder / f"{name}.json", auto_map=auto_map)
    if layout == "native":
        content = json.loads((folder / "processor_config.json").read_text())
        content["image_processor"]["auto_map"] = {"AutoImageProcessor": "evil.Evil"}
        (folder / "processor_config.json").write_text(json.dumps(content))
    model, _ = load(folder)
    assert model.num_parameters() and not marker.exists()
