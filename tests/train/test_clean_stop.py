"""A signal ends a run after its step, with a checkpoint, on all ranks; an error of several ranks is said once."""

from __future__ import annotations

import json
import os
import signal
import time

import psutil
import pytest
from transformers import TrainerCallback

from ovisnb.train import distributed as ours
from ovisnb.train import run_sft
from ovisnb.train.checkpoints import last_checkpoint
from ovisnb.train.distributed import Stopped

from .together import TORCHRUN, finish, start


class Signals(TrainerCallback):
    """Send a signal to this process, so many times, while it is in step 2."""

    def __init__(self, number, times=1):
        self.number, self.times = number, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code", "workers"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 0)])
def test_a_run_stops_after_its_step(toy, capsys, number, code, workers):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    settings = toy(max_steps=4, save_steps=0, dataloader_num_workers=workers)
    with pytest.raises(Stopped) as caught:
        run_sft(settings, callbacks=[Signals(number)])
    assert caught.value.args[0] == code
    assert caught.value.args[1].startswith(f"stopped by {number.name} after step 2: checkpoint-2 is whole")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    folder = run_sft(settings)
    assert "continuing from checkpoint-2" in capsys.readouterr().out and (folder / "final").is_dir()


def test_a_signal_in_the_last_step_changes_nothing(toy):
    folder = run_sft(toy(max_steps=2, save_steps=0), callbacks=[Signals(signal.SIGTERM)])
    assert (folder / "final").is_dir() and last_checkpoint(folder) is None


def test_a_second_signal_ends_at_once(toy, monkeypatch, tmp_path):
    monkeypatch.setattr(ours, "SAME_SIGNAL", -1.0)
    with pytest.raises(KeyboardInterrupt) as caught:
        run_sft(toy(max_steps=4, save_steps=0), callbacks=[Signals(signal.SIGTERM, times=2)])
    assert not isinstance(caught.value, Stopped) and caught.value.args == (143,)
    assert last_checkpoint(tmp_path / "run") is None


def test_the_same_signal_sent_on_is_one(toy, monkeypatch):
    monkeypatch.setattr(ours, "SAME_SIGNAL", 1000.0)
    with pytest.raises(Stopped, match="stopped by SIGINT"):
        run_sft(toy(max_steps=4, save_steps=0), callbacks=[Signals(signal.SIGINT, times=3)])


def command(settings, tmp_path):
    (tmp_path / "sft.json").write_text(json.dumps(settings.to_dict()))
    return [*TORCHRUN, "-m", "ovisnb", "train", str(tmp_path / "sft.json")]


def test_a_signal_to_one_rank_stops_both(toy, tmp_path):
    printed = tmp_path / "printed.txt"
    settings = toy(max_steps=10_000, save_steps=0, per_device_train_batch_size=1)
    process = start(command(settings, tmp_path), printed)
    while "step 1/10000" not in printed.read_text() and process.poll() is None:
        time.sleep(0.05)
    ranks = {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}
    ranks["1"].send_signal(signal.SIGTERM)
    status, text = finish(process, printed)
    assert status == 1 and "exitcode  : 143" in text, text  # torchrun's own code, and the rank's
    step = last_checkpoint(tmp_path / "run").name.partition("-")[2]
    assert text.count(f"ovisnb: stopped by SIGTERM after step {step}: checkpoint-{step} is whole") == 1


def test_an_error_of_both_ranks_is_said_once(toy, tmp_path, data):
    data.write_text(data.read_text().replace('"0.png"', '"none.png"').replace('"1.png"', '"none.png"'))
    printed = tmp_path / "printed.txt"
    settings = toy(max_steps=4, save_steps=0, per_device_train_batch_size=4)
    status, text = finish(start(command(settings, tmp_path), printed), printed)
    assert status == 1
    said = [line for line in text.splitlines() if line.startswith("ovisnb: ")]
    assert len(said) == 1 and "there is no picture" in said[0], text
    assert "[rank" not in text, text  # no traceback of a rank, above all not of what follows from the error
