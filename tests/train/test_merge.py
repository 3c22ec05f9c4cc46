"""Merging: the same logits as the adapter's, either layout, and folders that are whole or not there."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

import ovisnb
from ovisnb.model import CheckpointError, Ovis2_5ForConditionalGeneration
from ovisnb.train import merge as module
from ovisnb.train.merge import MergeError, merge
from tests.train.test_lora import TINY, WAYS, logits, opened, steps


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """way -> (adapter folder, batch, the adapter's logits over the base in whole weights)."""
    made = {}

    def make(way: str):
        if way not in made:
            model, processor, batch = opened(**WAYS[way])
            steps(model, batch, rate=1e-2)
            folder = ovisnb.save(model, processor, tmp_path_factory.mktemp("adapter") / "final")
            made[way] = folder, batch, logits(ovisnb.load(folder, dtype="float32")[0], batch)
        return made[way]

    return make


@pytest.mark.parametrize("layout", ["native", "released"])
@pytest.mark.parametrize("way", WAYS)
def test_the_merged_model_has_the_adapters_logits(way, layout, trained, tmp_path):
    folder, batch, expected = trained(way)
    out = merge(folder, tmp_path / "merged", layout=layout)
    model, processor = ovisnb.load(out)
    assert isinstance(model, Ovis2_5ForConditionalGeneration) and model.dtype == torch.float32
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=0)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.get_input_embeddings().weight
    assert processor.tokenizer.get_vocab() == ovisnb.load(TINY)[1].tokenizer.get_vocab()


def test_the_layouts_hold_the_same_tensors_and_survive_another_round(trained, tmp_path):
    folder, _, _ = trained("all-linear, DoRA")
    models = [ovisnb.load(merge(folder, tmp_path / layout, layout=layout)) for layout in ("native", "released")]
    ovisnb.save(*models[1], tmp_path / "again")
    native, released, again = (m.state_dict() for m in (models[0][0], models[1][0], ovisnb.load(tmp_path / "again")[0]))
    for other in (released, again):
        assert native.keys() == other.keys() and all(torch.equal(native[name], other[name]) for name in native)


def test_a_released_folder_has_all_that_servers_ask_for(trained, tmp_path):
    out = merge(trained("llm")[0], tmp_path / "merged", layout="released", dtype="bfloat16")
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("ovis2_5", ["Ovis2_5"])
    assert config["torch_dtype"] == config["llm_config"]["torch_dtype"] == "bfloat16"
    names = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in names.values()} == {torch.bfloat16}
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    assert "quantization_config" not in config
    for name in ("generation_config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt"):
        assert (out / name).is_file()
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=False).eos_token == "<|im_end|>"
    assert not [path.name for path in out.iterdir() if path.name.startswith("adapter")]


def test_the_weights_have_the_dtype_that_training_had(trained, tmp_path):
    folder, _, _ = trained("llm")  # a base stored in bfloat16, trained in float32
    assert ovisnb.load(merge(folder, tmp_path / "a"))[0].dtype == torch.float32
    assert ovisnb.load(merge(folder, tmp_path / "b", dtype="bfloat16"))[0].dtype == torch.bfloat16
    copy = shutil.copytree(folder, tmp_path / "plain")
    (copy / "adapter_base.json").unlink()  # as plain PEFT leaves it
    assert ovisnb.load(merge(copy, tmp_path / "c"))[0].dtype == torch.bfloat16
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "a" / "model.safetensors").items()}
    for other in "bc":  # rounded once, whatever the dtype
        found = load_file(tmp_path / other / "model.safetensors")
        assert all(torch.equal(found[name], rounded[name]) for name in rounded)


@pytest.mark.parametrize("plain", [False, True])
def test_a_whole_base_is_not_rounded_before_the_adapter_is_added(plain, trained, tmp_path):
    """A base stored in float32, written in bfloat16: rounding the base and then the sum gives other weights."""
    base, processor = ovisnb.load(TINY, dtype="float32")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1 + 2**-9 / 3)  # between bfloat16's numbers
    ovisnb.save(base, processor, tmp_path / "base")
    adapter = shutil.copytree(trained("llm")[0], tmp_path / "adapter")
    if plain:
        (adapter / "adapter_base.json").unlink()
    whole, written = (
        load_file(merge(adapter, tmp_path / name, base_model=tmp_path / "base", dtype=name) / "model.safetensors")
        for name in ("float32", "bfloat16")
    )
    assert all(tensor.dtype == torch.bfloat16 for tensor in written.values())
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in whole.items())


def test_an_adapter_of_a_4_bit_base_says_what_it_is_merged_into(trained, tmp_path, capsys):
    folder, _, _ = trained("4 bit")
    merge(folder, tmp_path / "merged")
    assert "trained on a base in 4 bit: it is merged into the whole weights of that base" in capsys.readouterr().out
    merge(trained("llm")[0], tmp_path / "other")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("layout", ["native", "released"])
def test_plain_peft_adapters_merge_too_and_what_they_untied_stays_untied(layout, tmp_path):
    base, _ = ovisnb.load(TINY, dtype="float32")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["embed_tokens"]))
    batch = opened()[2]
    steps(model, batch, rate=1e-2)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    out = merge(tmp_path / "adapter", tmp_path / "merged", base_model=TINY, layout=layout, dtype="float32")
    merged, _ = ovisnb.load(out)
    assert not merged.config.tie_word_embeddings and not merged.config.text_config.tie_word_embeddings
    assert not torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-4, rtol=0)


def test_nothing_is_overwritten_and_nothing_is_left_half(trained, tmp_path, monkeypatch):
    folder, _, _ = trained("llm")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for target in (taken, taken / "notes.txt", folder):
        with pytest.raises(MergeError, match="is not empty: choose an empty or a new folder"):
            merge(folder, target)
    assert (taken / "notes.txt").read_text() == "mine"

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ovisnb.model.checkpoint.write_released", fail)
    with pytest.raises(OSError, match="No space left"):
        merge(folder, tmp_path / "new", layout="released")
    assert not (tmp_path / "new").exists() and {path.name for path in tmp_path.iterdir()} == {"taken"}
    (tmp_path / "empty").mkdir()
    assert (merge(folder, tmp_path / "empty") / "model.safetensors").is_file()


def test_what_cannot_be_merged_is_one_sentence(trained, tmp_path):
    folder, _, _ = trained("llm")
    for given, error, sentence in (
        ((TINY, tmp_path / "x"), MergeError, "holds no adapter .adapter_config.json., so there is nothing to merge"),
        ((tmp_path / "gone", tmp_path / "x"), ValueError, "gone"),
    ):
        with pytest.raises(error, match=sentence) as caught:
            merge(*given)
        assert "\n" not in str(caught.value)
    with pytest.raises(MergeError, match="layout 'vllm' is not 'native' or 'released'"):
        merge(folder, tmp_path / "x", layout="vllm")
    with pytest.raises(CheckpointError, match="dtype 'int8' is not a floating point dtype"):
        merge(folder, tmp_path / "x", dtype="int8")
    with pytest.raises(CheckpointError, match="nowhere, the base model of .* is no checkpoint here"):
        merge(folder, tmp_path / "x", base_model=tmp_path / "nowhere")
    assert not (tmp_path / "x").exists() and module.LAYOUTS == ("native", "released")
