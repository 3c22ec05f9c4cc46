"""Training on a stream: the order of the run that was never stopped, nothing read twice, each process its own part."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ovisnb.data import pieces
from ovisnb.data.formats.parquet import write_parquet
from ovisnb.data.record import RecordError
from ovisnb.data.stream import RecordStream
from ovisnb.train import Settings, SettingsError, run_sft
from ovisnb.train.callbacks import read_metrics
from ovisnb.train.dataset import RecordEncodingError
from ovisnb.train.sft import last_checkpoint
from ovisnb.train.stream import PLACES

from .conftest import PIXELS
from .test_sft import StopAt, weights

REPOSITORY = Path(__file__).resolve().parents[2]


def rows(count):
    return [
        {
            "id": f"r{number}",
            "conversations": [
                {"from": "human", "value": f"Number {number}?"},
                {"from": "gpt", "value": "well " * (1 + number % 7)},
            ],
        }
        for number in range(count)
    ]


@pytest.fixture
def toy(golden, tmp_path):
    """Settings of a short run on a stream of 24 records, with changes."""

    def make(folder="run", count=24, **changes):
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
        values = {
            "model_path": str(golden / "checkpoint"),
            "data_path": str(tmp_path / "*.jsonl"),
            "streaming": True,
            "output_dir": str(tmp_path / folder),
            "max_steps": 9,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 4,
            "report_to": "none",
        }
        return Settings.from_dict(values | PIXELS | changes)

    return make


def lines(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(("workers", "accumulate", "kind"), [(0, 1, "jsonl"), (0, 2, "jsonl"), (2, 1, "parquet")])
def test_a_stopped_run_ends_in_the_same_weights(toy, tmp_path, capsys, workers, accumulate, kind):
    write_parquet(rows(24), tmp_path / "data.parquet")
    changes = {
        "data_path": str(tmp_path / f"*.{kind}"),
        "dataloader_num_workers": workers,
        "gradient_accumulation_steps": accumulate,
    }
    whole = run_sft(toy("whole", **changes))
    stopped = run_sft(toy("stopped", **changes), callbacks=[StopAt(5)])
    assert last_checkpoint(stopped).name == "checkpoint-4"
    run_sft(toy("stopped", **changes))
    assert "continuing from checkpoint-4" in capsys.readouterr().out
    one, other = weights(whole / "final"), weights(stopped / "final")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert lines(whole) == lines(stopped)
    epochs = [line["epoch"] for line in lines(whole)]
    assert epochs == sorted(epochs) and epochs[-1] == pytest.approx(9 * 2 * accumulate / 24, abs=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_read_is_not_read_again(toy, tmp_path, monkeypatch, workers):
    read = tmp_path / "read.txt"
    read_piece = pieces.read_piece

    def noting(file, piece, chance):
        for example in read_piece(file, piece, chance):
            with read.open("a") as note:  # from the workers too
                note.write(example.row.entry["id"] + "\n")
            yield example

    monkeypatch.setattr("ovisnb.data.stream.read_piece", noting)
    monkeypatch.setattr("ovisnb.train.sft.plan_run", lambda *run: None)  # it looks at some of the data first
    settings = toy(count=600, max_steps=100, save_steps=100, dataloader_num_workers=workers, learning_rate=0)
    run_sft(settings)
    first = read.read_text().split()
    read.unlink()
    run_sft(settings.model_copy(update={"max_steps": 104}))
    again = read.read_text().split()
    ahead = 2 * 2 * 2  # batches that two workers have ready when the run ends
    assert 200 <= len(first) <= 200 + 2 * ahead and len(set(first)) == len(first)
    # 8 new ones, what the workers read ahead, and one unfinished piece for each
    assert 8 <= len(again) <= 8 + 2 * ahead + 2 * workers
    assert len(set(first[:200]) & set(again)) <= 2 * ahead + 2 * workers


def test_a_stream_of_ones_own(toy, tmp_path):
    toy()
    settings = toy(data_path=None, streaming=False, max_steps=3, save_steps=0)
    folder = run_sft(settings, train_dataset=RecordStream(tmp_path / "data.jsonl", seed=3))
    assert [line["samples_seen"] for line in lines(folder)] == [2, 4, 6]


def test_what_does_not_go_together_is_refused(toy, tmp_path):
    with pytest.raises(SettingsError, match="streaming has no number of steps of its own: give max_steps"):
        toy(max_steps=-1)
    folder = run_sft(toy(max_steps=2, save_steps=2))
    assert (folder / "checkpoint-2" / PLACES).exists()
    with pytest.raises(SettingsError, match="1 processes with 1 readers each, and here are 1 with 2"):
        run_sft(toy(max_steps=3, dataloader_num_workers=2))
    with pytest.raises(SettingsError, match="was trained on a stream"):
        run_sft(toy(max_steps=3, streaming=False, data_path=str(tmp_path / "data.jsonl")))
    with pytest.raises((RecordError, RecordEncodingError), match="the seed changed since its state was taken"):
        run_sft(toy(max_steps=3, seed=7))
    plain = {"output_dir": str(tmp_path / "plain"), "data_path": str(tmp_path / "data.jsonl")}
    run_sft(toy(max_steps=2, save_steps=2, streaming=False, **plain))
    with pytest.raises(SettingsError, match="was not trained on a stream"):
        run_sft(toy(max_steps=3, **plain))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_record_is_named_by_its_line(toy, tmp_path, workers):
    settings = toy(max_steps=12, save_steps=0, dataloader_num_workers=workers)
    file = tmp_path / "data.jsonl"
    entries = rows(24)
    entries[10]["image"] = "none.png"
    entries[10]["conversations"][0]["value"] = "<image>"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(RecordEncodingError) as caught:
        run_sft(settings)
    assert str(caught.value).startswith(f"record 'r10' ({file}:11): image 1: ") and "\n" not in str(caught.value)
    file.write_text(file.read_text().replace('"r10"', "r10"))
    with pytest.raises(RecordEncodingError, match=f"^{re.escape(str(file))}:11: broken JSON at column") as caught:
        run_sft(settings)
    assert "\n" not in str(caught.value)


def test_two_processes_read_their_own_parts(toy, tmp_path):
    toy(max_steps=6)
    settings = toy(max_steps=6, save_steps=2)
    (tmp_path / "settings.json").write_text(json.dumps(settings.to_dict()))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = Path(__file__).with_name("stream_worker.py")
    printed = tmp_path / "printed.txt"
    with printed.open("wb") as out:
        process = subprocess.Popen(
            [*run, str(worker), str(tmp_path / "settings.json"), str(tmp_path)],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(600)
        except subprocess.TimeoutExpired:
            status = "it hangs"
            os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, "\n".join(printed.read_text(errors="replace").splitlines()[-40:])
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    # 6 steps of 2 in each process are every record once
    assert sorted(name for rank in ranks for name in rank["whole"]) == sorted(f"r{number}" for number in range(24))
    assert [rank["stopped"] for rank in ranks] == [rank["whole"] for rank in ranks]
    one, other = weights(tmp_path / "whole" / "final"), weights(tmp_path / "stopped" / "final")
    assert all(torch.equal(one[name], other[name]) for name in one)
