"""Adapters in two processes: the same losses and adapters as in one, under DDP and ZeRO-3, and resumed."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import ovisnb
from ovisnb.train import run_sft
from ovisnb.train.callbacks import read_metrics

from .test_distributed import STEPS, mixed, together
from .together import needs_compiler

__all__ = ["mixed"]

LORA = {"lora_preset": "llm+vision", "lora_r": 4, "lora_modules_to_save": ["vte"]}


@pytest.fixture
def alone(toy, mixed):
    """The run in one process: four samples a step."""
    return run_sft(toy("alone", max_steps=STEPS, per_device_train_batch_size=4, save_steps=0, **LORA))


def adapter(folder):
    return load_file(folder / "final" / "adapter_model.safetensors")


def check_same(folder, alone):
    losses, wanted = ([line["loss"] for line in read_metrics(path / "metrics.jsonl")] for path in (folder, alone))
    assert losses == pytest.approx(wanted, rel=1e-4)
    one, other = adapter(folder), adapter(alone)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        # Adam moves a weight by its gradient's sign: where that is all but zero, rounding decides it
        assert ((one[name] - tensor).abs() > 2e-5).float().mean() < 0.02, name
    assert isinstance(ovisnb.load(folder / "final")[0], PeftModel)


def test_ddp_trains_adapters_as_one_process_and_resumes(toy, tmp_path, alone):
    together(toy, tmp_path, {"ddp": LORA, "again-stopped": LORA, "again-resumed": LORA})
    check_same(tmp_path / "ddp", alone)
    one, other = adapter(tmp_path / "again"), adapter(tmp_path / "ddp")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_zero_3_trains_adapters_as_one_process_and_resumes(toy, tmp_path, alone):
    needs_compiler()
    three = LORA | {"deepspeed": "zero3"}
    together(toy, tmp_path, {"zero3": three, "again-stopped": three, "again-resumed": three})
    for name in ("zero3", "again"):
        check_same(tmp_path / name, alone)
    assert not list((tmp_path / "zero3" / "checkpoint-4").glob("model*.safetensors"))
