"""A checkpoint is complete or absent: what is taken, what is passed over and said, what may be removed, a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as some
from safetensors import SafetensorError
from transformers import Trainer

from ovisnb.train import run_sft
from ovisnb.train.callbacks import read_metrics
from ovisnb.train.checkpoints import (
    MARKER,
    WriteError,
    fault_of,
    last_checkpoint,
    mark_complete,
    rotate,
    told_when_full,
    writing,
)

from .test_sft import StopAt, weights

FILES = {"model.safetensors": 64, "optimizer.pt": 128, "trainer_state.json": 2, "global_step3/rank_0.pt": 16}


def checkpoint_in(folder, step, complete=True):
    """A checkpoint folder of the usual files, and of a folder as DeepSpeed writes it."""
    checkpoint = Path(folder) / f"checkpoint-{step}"
    for name, size in FILES.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(b"x" * size)
    if complete:
        mark_complete(checkpoint)
    return checkpoint


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_the_newest_complete_one_is_taken_and_the_others_are_told(tmp_path, capsys):
    for step, complete in ((2, True), (10, True), (30, True), (40, False)):
        checkpoint_in(tmp_path, step, complete)
    (tmp_path / "checkpoint-30" / "optimizer.pt").write_bytes(b"x" * 100)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert capsys.readouterr().out == (
        f"passed over in {tmp_path}: checkpoint-40 (it was not written to its end), "
        "checkpoint-30 (optimizer.pt has 100 bytes in place of 128); the last complete one is checkpoint-10\n"
    )
    (tmp_path / "checkpoint-10" / "global_step3" / "rank_0.pt").unlink()
    (tmp_path / "checkpoint-2" / MARKER).write_text('{"files": ')
    told = []
    assert last_checkpoint(tmp_path, told.append) is None
    assert "checkpoint-10 (global_step3/rank_0.pt is missing), checkpoint-2 (its complete.json cannot" in told[0]
    assert told[0].endswith("no checkpoint is complete")
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert capsys.readouterr().out == ""


@given(cut=some.sampled_from(sorted(FILES)), size=some.integers(0, 127))
def test_whatever_is_cut_off_is_noticed(tmp_path_factory, cut, size):
    checkpoint = checkpoint_in(tmp_path_factory.mktemp("run"), 3)
    assert fault_of(checkpoint) is None
    with (checkpoint / cut).open("r+b") as file:
        file.truncate(size := size % FILES[cut])
    assert fault_of(checkpoint) == f"{cut} has {size:,} bytes in place of {FILES[cut]:,}"


@given(
    steps=some.sets(some.integers(1, 20), min_size=1, max_size=6),
    bad=some.sets(some.integers(1, 20), max_size=3),
    limit=some.none() | some.integers(1, 4),
    best=some.none() | some.integers(1, 20),
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path_factory, steps, bad, limit, best):
    folder = tmp_path_factory.mktemp("run")
    for step in steps | bad:
        checkpoint_in(folder, step, complete=step not in bad)
    rotate(folder, limit, best)
    left = {int(path.name.removeprefix("checkpoint-")) for path in folder.iterdir()}
    good = sorted(steps - bad)
    if not good or limit is None:
        assert left == steps | bad
        return
    assert good[-1] in left and (best not in good or best in left)
    kept = [step for step in good if step in left]
    assert len(kept) == min(len(good), max(limit, len({good[-1], best} & set(good))))
    assert kept[-limit:] == good[-limit:] or best in kept
    assert not {step for step in left & bad if step < good[-1]}


def test_unfinished_ones_go_when_the_next_is_begun(tmp_path):
    checkpoint_in(tmp_path, 2)
    checkpoint_in(tmp_path, 4, complete=False)
    damaged = checkpoint_in(tmp_path, 6)
    (damaged / "optimizer.pt").unlink()
    with writing(tmp_path, 8, Accelerator(cpu=True), torch.nn.Linear(2, 2)) as checkpoint:
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
        (checkpoint / "model.safetensors").write_bytes(b"weights")
        assert last_checkpoint(tmp_path, None).name == "checkpoint-2"
    assert last_checkpoint(tmp_path, None) == checkpoint
    assert json.loads((checkpoint / MARKER).read_text()) == {"files": {"model.safetensors": 7}}
    rotate(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-8"]


def test_a_step_that_is_written_again_is_absent_meanwhile(tmp_path):
    checkpoint_in(tmp_path, 2)
    (checkpoint_in(tmp_path, 4) / "optimizer.pt").unlink()
    with writing(tmp_path, 4, Accelerator(cpu=True), torch.nn.Linear(2, 2)) as checkpoint:
        assert names(checkpoint) == []
    assert fault_of(checkpoint) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "Permission denied"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "torch could not write"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "torch could not write"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(tmp_path, error, said):
    checkpoint_in(tmp_path, 2)
    with (
        pytest.raises(WriteError) as caught,
        writing(tmp_path, 4, Accelerator(cpu=True), torch.nn.Linear(2, 2)) as checkpoint,
    ):
        (checkpoint / "model.safetensors").write_bytes(b"wei")
        raise error
    sentence = str(caught.value)
    assert sentence.startswith(f"{tmp_path / 'checkpoint-4'} could not be written (") and "\n" not in sentence
    assert said in sentence and "it takes about 210 bytes" in sentence and "were free" in sentence
    assert sentence.endswith(
        "checkpoint-2 is complete and kept, and the same command continues from it once there is space."
    )
    assert names(tmp_path) == ["checkpoint-2"]


def test_other_errors_stay_what_they_are(tmp_path):
    with (
        pytest.raises(KeyError, match="bug"),
        writing(tmp_path, 4, Accelerator(cpu=True), torch.nn.Linear(2, 2)) as checkpoint,
    ):
        (checkpoint / "model.safetensors").write_bytes(b"wei")
        raise KeyError("bug")
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError), told_when_full(tmp_path, tmp_path):
        raise FileNotFoundError(errno.ENOENT, "there is none", "picture.png")
    said = "metrics.jsonl could not be written .*; no checkpoint was complete yet, and the same command starts anew"
    with pytest.raises(WriteError, match=said), told_when_full(tmp_path / "metrics.jsonl", tmp_path):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


def failing(monkeypatch, name, at):
    """Let the Trainer's method `name` fail, as on a full disk, when it is called in step `at`."""
    whole = getattr(Trainer, name)

    def fails(self, *args, **kwargs):
        if self.state.global_step == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, name, fails)


def test_a_run_on_a_full_disk_keeps_the_last_checkpoint(toy, tmp_path, monkeypatch, capsys):
    settings = toy("run", save_steps=2, save_total_limit=1)
    for name in ("_save", "_save_rng_state"):
        with monkeypatch.context() as full:
            failing(full, name, at=4)
            said = "checkpoint-4 could not be written .*: it takes about .*; checkpoint-2 is complete and kept"
            with pytest.raises(WriteError, match=said):
                run_sft(settings)
        assert "checkpoint-4" not in names(tmp_path / "run") and fault_of(tmp_path / "run" / "checkpoint-2") is None
    folder = run_sft(settings)
    assert "continuing from checkpoint-2" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


FULL = """
import resource, signal, sys
from ovisnb.train import Settings, checkpoints, run_sft
from transformers import TrainerCallback

class Fill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:  # from here on no file may be larger than this
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))

try:
    run_sft(Settings.from_json(sys.argv[1]), callbacks=[Fill()])
except checkpoints.WriteError as error:
    print("SAID", error)
"""


@pytest.mark.parametrize("largest", [0, 200_000])
def test_files_that_may_not_grow(toy, tmp_path, largest):
    """A real limit of the system on the size of files, in a process of its own: what the libraries make of it."""
    settings = toy("run", save_steps=3)
    (tmp_path / "settings.json").write_text(json.dumps(settings.to_dict()))
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "settings.json"), str(largest)],
        capture_output=True,
        check=False,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [said] = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert "could not be written" in said and "checkpoint-3 is complete and kept" in said
    assert last_checkpoint(tmp_path / "run", None).name == "checkpoint-3"
    assert not [name for name in names(tmp_path / "run") if name in ("checkpoint-6", "final")]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here; test_files_that_may_not_grow runs everywhere")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # what a traceback holds open may stay so


def test_a_disk_that_is_really_full(toy, small_disk, capsys):
    settings = toy("run", output_dir=str(small_disk / "run"), save_steps=2, save_total_limit=None)
    with pytest.raises(WriteError, match="could not be written") as caught:
        run_sft(settings)
    assert "\n" not in str(caught.value)
    assert not [path for path in (small_disk / "run").glob("checkpoint-*") if fault_of(path)]
    assert not list((small_disk / "run").glob(".*"))


def test_a_final_model_that_cannot_be_written(toy, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as disk:
        disk.setattr("ovisnb.train.sft.save", full)
        with pytest.raises(WriteError, match=r"final could not be written .*; checkpoint-6 is complete and kept"):
            run_sft(toy("run"))
    assert (run_sft(toy("run")) / "final" / "model.safetensors").exists()


def test_one_good_checkpoint_at_every_moment(toy, tmp_path, monkeypatch):
    """With save_total_limit 1: looked at before and after every file of a checkpoint, and every removal."""
    folder, seen = tmp_path / "run", []

    def watched(owner, name):
        whole = getattr(owner, name)

        def looks(*args, **kwargs):
            seen.append(last_checkpoint(folder, None))
            try:
                return whole(*args, **kwargs)
            finally:
                seen.append(last_checkpoint(folder, None))

        monkeypatch.setattr(owner, name, looks)

    for name in ("_save", "_save_optimizer_and_scheduler", "_save_rng_state", "_finalize_training"):
        watched(Trainer, name)
    for owner, name in ((shutil, "rmtree"), (os, "replace"), (Path, "unlink")):
        watched(owner, name)
    run_sft(toy("run", save_steps=2, save_total_limit=1))
    steps = [int(path.name.removeprefix("checkpoint-")) if path else 0 for path in seen]
    assert steps == sorted(steps) and {0, 2, 4, 6} == set(steps)
    assert [name for name in names(folder) if name.startswith("checkpoint-")] == ["checkpoint-6"]


def test_a_damaged_checkpoint_is_written_again(toy, tmp_path, capsys):
    folder = run_sft(toy("run", save_steps=2), callbacks=[StopAt(4)])
    whole = weights(run_sft(toy("whole", save_steps=2)) / "final")
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"PK")
    shutil.rmtree(folder / "final")
    run_sft(toy("run", save_steps=2))
    printed = capsys.readouterr().out
    assert "checkpoint-4 (optimizer.pt has 2 bytes in place of" in printed and "continuing from checkpoint-2" in printed
    resumed = weights(folder / "final")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert fault_of(folder / "checkpoint-4") is None and fault_of(folder / "checkpoint-6") is None
