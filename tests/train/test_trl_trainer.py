"""The variant over TRL's SFTTrainer: the same batches, losses and weights."""

from __future__ import annotations

import pytest
import torch

from ovisnb.data.stream import RecordStream
from ovisnb.train import SettingsError, run_sft
from ovisnb.train.callbacks import read_metrics
from ovisnb.train.sft import last_checkpoint

from .test_sft import weights


def both(toy, **changes):
    """Run folders of Trainer's and of TRL's run with the same settings."""
    return [run_sft(toy(folder=trainer, trainer=trainer, **changes)) for trainer in ("transformers", "trl")]


def series(folder, name):
    return [line[name] for line in read_metrics(folder / "metrics.jsonl") if name in line]


@pytest.mark.parametrize("packing", [False, True])
def test_it_trains_as_trainer_does(toy, data, packing):
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "packing": packing}
    ours, theirs = both(toy, eval_data_path=str(data), eval_steps=2, save_steps=2, **options)
    for name in ("loss", "eval_loss", "grad_norm"):
        assert series(theirs, name) == pytest.approx(series(ours, name), rel=1e-4)
    for name in ("tokens_seen", "supervised_tokens", "learning_rate"):
        assert series(theirs, name) == series(ours, name)
    after = weights(theirs / "final")
    for name, tensor in weights(ours / "final").items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4)
    assert {"entropy", "mean_token_accuracy"} <= read_metrics(theirs / "metrics.jsonl")[0].keys()
    assert last_checkpoint(theirs).name == "checkpoint-4"


def test_what_it_cannot_do_is_refused(toy, data):
    with pytest.raises(SettingsError, match='trainer "trl" works without label_smoothing_factor'):
        toy(trainer="trl", label_smoothing_factor=0.1)
    with pytest.raises(SettingsError, match="stream"):
        run_sft(toy(trainer="trl", data_path=[]), train_dataset=RecordStream([str(data)]))
