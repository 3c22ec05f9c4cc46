"""Two processes: the same losses and weights as one with the same global batch, under every wrapper; what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ovisnb
from ovisnb.train import SettingsError, run_sft
from ovisnb.train.callbacks import read_metrics
from ovisnb.train.configs import wanted_deepspeed
from ovisnb.train.distributed import check_free, check_world, check_wrapper, held, says_error, words_of_its_own

from .together import TORCHRUN, finish, needs_compiler, start

WORKER = Path(__file__).with_name("distributed_worker.py")
STEPS = 4


@pytest.fixture
def mixed(data):
    """The data file with three records of text only: in some steps one rank has a picture and the other has none."""
    records = [json.loads(line) for line in data.read_text().splitlines()]
    for record in records[1], records[6]:
        del record["image"]
        record["conversations"][0]["value"] = "Hello"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return data


@pytest.fixture
def evaluation(mixed):
    """Changes of a run that evaluates in its end, on a number of records that two processes do not share evenly."""
    file = mixed.with_name("evaluation.jsonl")
    file.write_text("".join(line + "\n" for line in mixed.read_text().splitlines()[3:]))
    return {"eval_data_path": str(file), "eval_steps": STEPS, "per_device_eval_batch_size": 4}


@pytest.fixture
def alone(toy, mixed, evaluation):
    """The run in one process: four samples a step."""
    return run_sft(toy("alone", max_steps=STEPS, per_device_train_batch_size=4, save_steps=0, **evaluation))


def together(toy, tmp_path, cases):
    """Run cases, name -> changes, in two processes, two forwards of one sample each a step; what they ran under."""
    same = {"max_steps": STEPS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_processes": 2}
    same |= {"save_steps": 2, "save_total_limit": None}
    settings = {name: toy(name.rpartition("-")[0] or name, **same, **changes) for name, changes in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps({name: value.to_dict() for name, value in settings.items()}))
    printed = tmp_path / "printed.txt"
    status, text = finish(start([*TORCHRUN, str(WORKER), str(tmp_path)], printed), printed)
    assert status == 0, text[-6000:]
    assert text.count("run folder") == len(cases)  # only one rank prints
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    return ranks[0]


def check_same(folder, alone):
    """The losses are those of one process, and so are the weights of final/, which opens."""
    here, there = (
        [line for line in read_metrics(path / "metrics.jsonl") if "loss" in line] for path in (folder, alone)
    )
    assert [line["step"] for line in here] == [line["step"] for line in there] == list(range(1, STEPS + 1))
    for line, wanted in zip(here, there, strict=True):
        for name in ("samples_seen", "tokens_seen", "supervised_tokens"):
            assert line[name] == wanted[name], f"step {line['step']}: {name}"
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-4), f"step {line['step']}"
        if "grad_norm" in line:  # DeepSpeed's stage 0 tells none in float32
            assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3), f"step {line['step']}"
    evaluated = [
        [line["eval_loss"] for line in read_metrics(path / "metrics.jsonl") if "eval_loss" in line]
        for path in (folder, alone)
    ]
    assert len(evaluated[0]) == 1 and evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)
    one, other = (load_file(path / "final" / "model.safetensors") for path in (folder, alone))
    assert one.keys() == other.keys()
    for name, wanted in other.items():
        # Adam moves a weight by its gradient's sign: where that is all but zero, rounding decides it
        far = (one[name] - wanted).abs() > 2e-5
        assert far.float().mean() < 0.01, name
    ovisnb.load(folder / "final")


def test_two_processes_train_as_one(toy, tmp_path, alone, evaluation):
    cases = {"ddp": evaluation, "again-stopped": {}, "again-resumed": {}}
    seen = together(toy, tmp_path, cases)
    assert seen == {name: [2, "DistributedDataParallel", "2 processes, DDP"] for name in cases}
    check_same(tmp_path / "ddp", alone)
    check_resumed(tmp_path / "again", tmp_path / "ddp")


def test_zero_trains_as_one_process(toy, tmp_path, alone, evaluation):
    needs_compiler()
    cases = {f"zero{stage}": {"deepspeed": f"zero{stage}"} | evaluation for stage in range(3)}
    cases |= {"again-stopped": {"deepspeed": "zero2"}, "again-resumed": {"deepspeed": "zero2"}}
    cases |= {"zero3": {"deepspeed": "zero3"} | evaluation}
    seen = together(toy, tmp_path, cases)
    stages = {name: values["deepspeed"].removeprefix("zero") for name, values in cases.items()}
    assert seen == {
        name: [2, "DeepSpeedEngine", f"2 processes, DeepSpeed ZeRO-{stage}"] for name, stage in stages.items()
    }
    for stage in range(4):
        check_same(tmp_path / f"zero{stage}", alone)
    check_resumed(tmp_path / "again", tmp_path / "zero2")


def check_resumed(folder, whole):
    """A run that was stopped after a checkpoint ends in the same weights, bit for bit."""
    one, other = (load_file(path / "final" / "model.safetensors") for path in (folder, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert len(read_metrics(folder / "metrics.jsonl")) == STEPS


class Wrapped:
    """A trainer as far as check_wrapper looks."""

    def __init__(self, model, processes=1):
        self.model_wrapped = model
        self.accelerator = type("Accelerator", (), {"num_processes": processes})


@pytest.mark.parametrize(
    ("changes", "environment", "sentence"),
    [
        ({"num_processes": 2}, {}, "^num_processes is 2, and here is 1: start it with torchrun --nproc_per_node 2"),
        ({"num_processes": 2}, {"WORLD_SIZE": "3", "RANK": "0"}, "^num_processes is 2, and here are 3"),
        ({}, {"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "29500"}, "told several processes and started one"),
        ({}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed_precision bf16, and the settings say nothing of it"),
        ({"fsdp": True}, {"RANK": "0"}, "fsdp needs GPUs, and on the CPU accelerate would run DistributedDataParallel"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "fsdp needs GPUs"),
        ({"fsdp": False, "deepspeed": "zero2"}, {"ACCELERATE_USE_FSDP": "true"}, "both asked for: choose one"),
    ],
)
def test_a_start_that_was_not_meant_is_refused(toy, monkeypatch, changes, environment, sentence):
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=sentence) as caught:
        check_world(toy(**changes))
    assert "\n" not in str(caught.value)


def test_the_wrapper_is_looked_at(toy, monkeypatch):
    linear = torch.nn.Linear(2, 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert check_world(toy()) == 1
    assert check_wrapper(Wrapped(linear), toy()) == "1 process"
    with pytest.raises(SettingsError, match="ask for DeepSpeed ZeRO-2, and the model was wrapped as Linear"):
        check_wrapper(Wrapped(linear), toy(deepspeed="zero2"))
    with pytest.raises(SettingsError, match="ask for FSDP2, and the model was wrapped as Linear"):
        check_wrapper(Wrapped(linear), toy(fsdp=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="The launcher started 2 processes, and 1 train together"):
        check_wrapper(Wrapped(linear), toy())


def test_two_runs_do_not_train_into_one_folder(toy, tmp_path):
    settings = toy(max_steps=1, save_steps=0)
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run"), pytest.raises(SettingsError, match="A run is training into .*run now: wait for it"):
        run_sft(settings)
    run_sft(settings)


def test_what_a_killed_run_forked_does_not_keep_its_folder(tmp_path):
    """A DataLoader's workers see only after seconds that their run is gone; the same command is given at once."""
    come, go = os.pipe(), os.pipe()
    if not (run := os.fork()):
        with held(tmp_path):
            if not os.fork():
                os.close(go[1])
                os.write(come[1], b"x")
                os.read(go[0], 1)  # until the test ends
                os._exit(0)
            os.read(come[0], 1)
            os._exit(0)  # as by SIGKILL: nothing is cleaned up
    os.waitpid(run, 0)
    check_free(tmp_path)
    for end in (*come, *go):
        os.close(end)


def test_a_process_alone_says_its_errors():
    assert says_error() and says_error()


def test_a_run_leaves_no_word_that_the_next_would_take_for_a_launchers(toy, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    with words_of_its_own():
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as accelerate does in a run with DeepSpeed
    assert wanted_deepspeed(toy()) is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with words_of_its_own():
        pass
    assert wanted_deepspeed(toy()) == "zero2"
