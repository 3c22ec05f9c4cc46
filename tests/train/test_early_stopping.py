"""Early stopping, the best checkpoint through rotation and resume, NEFTune's noise, and who is told of a run."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from transformers import TrainerCallback

from ovisnb.train import SettingsError, run_sft
from ovisnb.train.callbacks import read_metrics
from ovisnb.train.trainer import SftTrainer

from .test_sft import StopAt, weights


@pytest.fixture
def losses(monkeypatch):
    """Evaluations that give these eval_losses, one after the other by step: {step: loss}."""
    chosen = {}
    evaluate = SftTrainer.evaluation_loop

    def loop(self, *args, **kwargs):
        output = evaluate(self, *args, **kwargs)
        output.metrics["eval_loss"] = chosen[self.state.global_step]
        return output

    monkeypatch.setattr(SftTrainer, "evaluation_loop", loop)
    return chosen


def evaluations(folder):
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "eval_loss" in line]
    return [(line["step"], line["eval_loss"], line.get("best", False)) for line in lines]


def checkpoints(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def same(one, other):
    one, other = weights(one), weights(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_it_stops_when_nothing_gets_better_and_final_is_the_best(toy, data, losses, capsys):
    losses.update({1: 3.0, 2: 2.0, 3: 2.5, 4: 1.99, 5: 2.2, 6: 1.0})
    changes = {"eval_data_path": str(data), "eval_steps": 1, "max_steps": 6, "save_steps": 5, "save_total_limit": 1}
    changes |= {"early_stopping_patience": 2, "early_stopping_threshold": 0.1, "load_best_model_at_end": True}
    folder = run_sft(toy(**changes))
    printed = capsys.readouterr().out
    assert "stopped early at step 4: eval_loss was not 0.1 below 2.0000 in the last 2 evaluations" in printed
    assert "final: the best model, of checkpoint-4 (eval_loss 1.9900)" in printed
    assert evaluations(folder) == [(1, 3.0, True), (2, 2.0, True), (3, 2.5, False), (4, 1.99, True)]
    assert checkpoints(folder) == [4]
    before = (folder / "metrics.jsonl").read_text()
    run_sft(toy(**changes))
    assert "checkpoint-4 is the end of this run: nothing is left to train" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == before
    run_sft(toy(**changes | {"early_stopping_patience": 3}))  # more patience: it goes on
    assert [step for step, _, _ in evaluations(folder)] == [1, 2, 3, 4, 5]


def test_the_best_checkpoint_is_kept_through_rotation_and_resume(toy, data, losses, capsys):
    losses.update({2: 1.0, 4: 2.0, 6: 1.5})
    changes = {"eval_data_path": str(data), "eval_steps": 2, "save_steps": 3, "save_total_limit": 1}
    changes |= {"load_best_model_at_end": True}
    whole = run_sft(toy("whole", **changes))
    assert "whole/final: the best model, of checkpoint-2 (eval_loss 1.0000)" in capsys.readouterr().out
    assert checkpoints(whole) == [2, 6] and same(whole / "final", whole / "checkpoint-2")
    assert not same(whole / "final", whole / "checkpoint-6")
    run_sft(toy("stopped", **changes), callbacks=[StopAt(4)])
    assert checkpoints(whole.with_name("stopped")) == [2, 3]
    moved = whole.with_name("moved")
    shutil.move(whole.with_name("stopped"), moved)  # a best checkpoint is found again in a folder that was moved
    shutil.rmtree(moved / "final")
    run_sft(toy("moved", **changes))
    assert "moved/final: the best model, of checkpoint-2 (eval_loss 1.0000)" in capsys.readouterr().out
    assert same(whole / "final", moved / "final") and checkpoints(moved) == [2, 6]
    assert evaluations(whole) == evaluations(moved)
    shutil.rmtree(moved / "final")
    run_sft(toy("moved", **changes))  # nothing left to train: final/ is made again, of the same checkpoint
    assert "moved/final: the best model, of checkpoint-2" in capsys.readouterr().out
    assert same(whole / "final", moved / "final")


def test_patience_is_remembered_by_a_checkpoint(toy, data, losses, capsys):
    losses.update({1: 1.0, 2: 2.0, 3: 2.0, 4: 2.0, 5: 2.0, 6: 2.0})
    changes = {"eval_data_path": str(data), "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 3}
    run_sft(toy(**changes), callbacks=[StopAt(3)])
    folder = run_sft(toy(**changes))
    assert (
        "stopped early at step 4: eval_loss was not below 1.0000 in the last 3 evaluations" in capsys.readouterr().out
    )
    assert [step for step, _, _ in evaluations(folder)] == [1, 2, 3, 4]
    assert 1 in checkpoints(folder)  # the best one, though final/ is the last


def test_patience_may_come_later(toy, data, losses):
    losses.update({2: 1.0, 4: 2.0, 6: 2.0})
    changes = {"eval_data_path": str(data), "eval_steps": 2, "save_steps": 2}
    run_sft(toy(**changes), callbacks=[StopAt(2)])
    folder = run_sft(toy(**changes, early_stopping_patience=1))
    assert [step for step, _, _ in evaluations(folder)] == [2, 4]


def test_evaluations_come_before_their_checkpoint(toy, data):
    """At the end of an epoch and of the run as well, or a killed run would not make up for them."""
    folder = run_sft(toy(eval_data_path=str(data), max_steps=6, save_steps=2))
    assert [step for step, _, _ in evaluations(folder)] == [4, 6]
    for step in (4, 6):
        state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["log_history"][-1]["step"] == step and "eval_loss" in state["log_history"][-1]
        assert "samples_seen" in state["log_history"][-2]


def test_a_best_checkpoint_that_was_lost_is_not_final(toy, data, losses, capsys):
    losses.update({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0, 6: 2.0})
    changes = {"eval_data_path": str(data), "eval_steps": 1, "save_steps": 2, "load_best_model_at_end": True}
    folder = run_sft(toy(**changes))
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoint-2")
    run_sft(toy(**changes))
    assert "the best model" not in capsys.readouterr().out.splitlines()[-1]
    assert same(folder / "final", folder / "checkpoint-6")


class Embeddings(TrainerCallback):
    """What the embedding gives for the same tokens, in training and in evaluation."""

    def __init__(self):
        self.seen = {True: [], False: []}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        rows = model.get_input_embeddings()
        for training in (True, False):
            rows.train(training)
            self.seen[training].append((rows(torch.arange(8)[None]) - rows.weight[:8]).abs().max().item())
        rows.train(True)
        self.most = 5 / (8 * rows.embedding_dim) ** 0.5


@pytest.mark.parametrize("adapters", [{}, {"lora_r": 2}])
def test_noise_only_while_training(toy, adapters):
    watch = Embeddings()
    run_sft(toy(max_steps=2, save_steps=0, neftune_noise_alpha=5, **adapters), callbacks=[watch])
    assert all(0.9 * watch.most < noise <= watch.most * 1.001 for noise in watch.seen[True])
    assert watch.seen[False] == [0, 0]
    quiet = Embeddings()
    run_sft(toy("quiet", max_steps=1, save_steps=0, **adapters), callbacks=[quiet])
    assert quiet.seen[True] == [0]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
@pytest.mark.parametrize("asked", ["wandb", "tensorboard,wandb", ["wandb"]])
def test_a_reporter_that_is_not_installed_is_one_sentence(toy, asked):
    with pytest.raises(SettingsError, match="wandb") as caught:
        run_sft(toy(report_to=asked))
    assert "\n" not in str(caught.value) and "pip install wandb" in str(caught.value)
