"""Runs that train adapters: what they leave, resume, bfloat16 and 4-bit bases."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import ovisnb.model
from ovisnb.train import SettingsError, run_sft
from ovisnb.train.callbacks import read_metrics
from tests.train.test_sft import StopAt

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def lora(toy):
    """`toy`, with adapters."""
    return lambda folder="run", **changes: toy(folder, **{"use_lora": True, "lora_r": 4, **changes})


def test_a_run_leaves_adapters_alone_and_the_base_as_it_was(lora, golden, capsys):
    folder = run_sft(lora(lora_modules_to_save=["vte"], lora_preset="llm+vision", save_steps=3))
    printed = capsys.readouterr().out
    assert "training llm" in printed and "vte" in printed and "visual_tokenizer.head" not in printed
    for name in ("checkpoint-3", "checkpoint-6", "final"):
        files = {path.name for path in (folder / name).iterdir()}
        assert {"adapter_config.json", ADAPTER, "adapter_base.json", "processor_config.json"} <= files
        assert not {"model.safetensors", "config.json"} & files
        model, _ = ovisnb.model.load(folder / name, dtype="float32")
        assert isinstance(model, PeftModel)
    assert json.loads((folder / "final" / "adapter_base.json").read_text()) == {
        "dtype": "float32",
        "quantization": None,
    }
    assert json.loads((folder / "final" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        golden / "checkpoint"
    )
    trained, base = model.get_base_model().state_dict(), ovisnb.model.load(golden / "checkpoint")[0].state_dict()
    kept = [name for name in base if name in trained]
    assert kept and all(torch.equal(trained[name], base[name]) for name in kept)
    losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.3}, {"use_dora": True, "lora_modules_to_save": ["embed_tokens"]}]
)
def test_a_stopped_run_resumes_to_the_same_adapter(lora, changes):
    whole = run_sft(lora("whole", **changes))
    run_sft(lora("stopped", **changes), callbacks=[StopAt(3)])
    shutil.rmtree(whole.parent / "stopped" / "final")
    resumed = run_sft(lora("stopped", **changes))
    expected, found = (load_file(run / "final" / ADAPTER) for run in (whole, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    shutil.rmtree(resumed / "final")  # the end of the run, and its final/ was never written
    again = load_file(run_sft(lora("stopped", **changes)) / "final" / ADAPTER)
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_another_shape_does_not_continue(lora):
    run_sft(lora(max_steps=3))
    with pytest.raises(SettingsError, match="lora_r was 4 in the run .* and is 8 now"):
        run_sft(lora(lora_r=8))


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True, "lora_modules_to_save": ["vte", "visual_tokenizer.head", "embed_tokens"]},
        {"load_in_4bit": True, "gradient_checkpointing": True},
        {"load_in_4bit": True, "bf16": True, "lora_preset": "all-linear", "use_dora": True, "eval": True},
        {"gradient_checkpointing": True, "lora_preset": "llm+vision"},
    ],
)
def test_every_kind_of_base_learns(lora, data, changes):
    if changes.pop("eval", False):
        changes |= {"eval_data_path": str(data), "eval_steps": 2}
    folder = run_sft(lora(save_steps=0, max_steps=8, learning_rate=5e-3, **changes))
    losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    about = json.loads((folder / "final" / "adapter_base.json").read_text())
    assert about["dtype"] == ("bfloat16" if "bf16" in changes else "float32")
    assert bool(about["quantization"]) == ("load_in_4bit" in changes)
    assert {tensor.dtype for tensor in load_file(folder / "final" / ADAPTER).values()} == {torch.float32}


def test_an_adapter_is_no_start_of_a_run(lora, toy):
    folder = run_sft(lora(max_steps=1, save_steps=0))
    for again in (lora("next", model_path=str(folder / "final")), toy("next", model_path=str(folder / "final"))):
        with pytest.raises(SettingsError, match="is an adapter over its base: merge it with ovisnb merge"):
            run_sft(again)


def test_4_bit_is_for_a_base_that_the_run_opens(lora, golden):
    model, processor = ovisnb.model.load(golden / "checkpoint")
    with pytest.raises(SettingsError, match="load_in_4bit is for a base that the run opens itself"):
        run_sft(lora(load_in_4bit=True, model_path=None), model=model, processor=processor)


def test_a_released_base_and_rates_by_module(lora):
    """The golden checkpoint has the released layout, which plain transformers cannot read; vte has its own rate."""
    folder = run_sft(lora(train_modules="llm:1e-3|vte:0.0", lora_modules_to_save=["vte"], save_steps=2, max_steps=2))
    tensors = load_file(folder / "final" / ADAPTER)
    base = ovisnb.model.load(lora().model_path)[0].model.visual_embeddings_table.weight
    assert torch.equal(tensors["base_model.model.model.visual_embeddings_table.weight"], base)
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
