"""Killed at any moment, by SIGKILL: the run that continues ends in the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ovisnb.train import run_sft
from ovisnb.train.callbacks import read_metrics
from ovisnb.train.checkpoints import fault_of, last_checkpoint

from .killed_worker import watch
from .test_sft import StopAt, weights

RUNS = {
    "noise and accumulation": {"neftune_noise_alpha": 5, "gradient_accumulation_steps": 2, "save_total_limit": 1},
    "workers and evaluation": {"neftune_noise_alpha": 5, "dataloader_num_workers": 2, "load_best_model_at_end": True},
    "packed": {
        "per_device_train_batch_size": 1,
        "packing": True,
        "max_batch_tokens": 300,
        "neftune_noise_alpha": 5,
        "dataloader_num_workers": 1,
    },
    "a stream": {"streaming": True, "max_steps": 7, "neftune_noise_alpha": 5, "dataloader_num_workers": 2},
    "adapters": {"lora_dropout": 0.3, "lora_r": 4, "max_steps": 5},
    "some skipped": {"on_bad_record": "skip", "neftune_noise_alpha": 5, "group_by_length": True},
}


def settings_of(toy, data, tmp_path, run, folder):
    changes = {"max_steps": -1, "num_train_epochs": 2, "save_steps": 1, "image_folder": str(tmp_path)} | RUNS[run]
    if "evaluation" in run:
        changes |= {"eval_data_path": str(data), "eval_steps": 2}
    if "skipped" in run:
        (tmp_path / "3.png").unlink(missing_ok=True)
    return toy(folder, **changes)


def without_times(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    measured = ("seconds", "peak", "runtime", "per_second")
    return [{k: v for k, v in line.items() if not any(some in k for some in measured)} for line in lines]


def killed_at(settings, file, event):
    """Run in a process of its own that is gone at the event with this number."""
    file.write_text(json.dumps(settings.to_dict()))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_worker.py")), str(file), str(event)],
        capture_output=True,
        check=False,
        text=True,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def same(one, other, adapters=False):
    name = "adapter_model.safetensors" if adapters else "model.safetensors"
    one, other = ((folder / "final", folder)[not (folder / "final" / name).exists()] for folder in (one, other))
    one, other = weights(one, name), weights(other, name)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("run", RUNS)
def test_a_killed_run_ends_in_the_same_weights(toy, data, tmp_path, capsys, run):
    torch.set_num_threads(1)
    events = []
    settings = settings_of(toy, data, tmp_path, run, "whole")
    watch(Path(settings.output_dir), lambda: events.append(1))
    whole = run_sft(settings)
    settings = settings_of(toy, data, tmp_path, run, "killed")
    chance = random.Random(run)
    # the second life begins where the first was ended, and has fewer events than a whole run
    first = chance.randrange(len(events) // 4, 3 * len(events) // 4)
    killed_at(settings, tmp_path / "killed.json", first)
    left = [path for path in (tmp_path / "killed").glob("checkpoint-*") if fault_of(path)]
    good = last_checkpoint(tmp_path / "killed", None)
    capsys.readouterr()
    killed = run_sft(settings)
    printed = capsys.readouterr().out
    if good:
        assert f"continuing from {good.name}" in printed
    for path in left:
        assert f"{path.name} (it was not written to its end)" in printed or (good and path < good)
    assert without_times(whole) == without_times(killed)
    assert same(whole, killed, adapters=run == "adapters")
    assert not [path for path in killed.glob("checkpoint-*") if fault_of(path)]


def test_killed_three_times_at_random(toy, data, tmp_path):
    """Whatever file it is at: each time the run goes on, and loses no more than what came after its last checkpoint."""
    events = []
    changes = {"save_steps": 1, "save_total_limit": 1, "max_steps": 5, "neftune_noise_alpha": 5}
    whole = toy("whole", **changes)
    watch(Path(whole.output_dir), lambda: events.append(1))
    run_sft(whole)
    killed, chance, reached = toy("killed", **changes), random.Random(7), 0
    for _ in range(3):
        killed_at(killed, tmp_path / "killed.json", chance.randrange(10, len(events) // 3))
        last = last_checkpoint(tmp_path / "killed", None)
        step = int(last.name.removeprefix("checkpoint-")) if last else 0
        assert step >= reached
        reached = step
    run_sft(killed)
    assert same(tmp_path / "whole", tmp_path / "killed")
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "killed")


@pytest.mark.parametrize("run", ["noise and accumulation", "workers and evaluation"])
def test_stopped_after_any_step(toy, data, tmp_path, run):
    """In the middle of an epoch and at its end: random numbers are drawn as if nothing had been."""
    whole = run_sft(settings_of(toy, data, tmp_path, run, "whole"))
    for step in (1, 2) if run.startswith("noise") else (1, 4):  # an epoch has 2, or 4
        settings = settings_of(toy, data, tmp_path, run, f"stopped{step}")
        run_sft(settings, callbacks=[StopAt(step)])
        shutil.rmtree(tmp_path / f"stopped{step}" / "final")
        stopped = run_sft(settings)
        assert same(whole, stopped), step
        assert without_times(whole) == without_times(stopped)
