"""Running out of memory is one error that says what to change; a run measures its peak."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ovisnb.model.modeling import Ovis2_5Model
from ovisnb.train import Settings, run_sft
from ovisnb.train.callbacks import read_metrics
from ovisnb.train.memory import OutOfMemory, batch_in_words, explained, is_out_of_memory, peak_resident, resident
from ovisnb.train.plan import memory_plan
from ovisnb.train.savings import Saving

# A process that may have little more memory than it has when the model is there, and a batch that needs far more.
STARVED = """
import resource, sys
from ovisnb.cli import main
from ovisnb.train import memory, savings

savings._changes = lambda *of: [({"gradient_checkpointing": True}, "")]

def starve(trainer, records, encoder, plan_run=memory.plan_run):
    plan_run(trainer, records, encoder)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 200 * 2**20,) * 2)

memory.plan_run = starve
sys.exit(main(sys.argv[1:]))
"""


def one_change(*args):
    """In place of all that would be planned anew."""
    return [({"gradient_checkpointing": True}, "")]


@pytest.fixture
def values(golden, tmp_path):
    """Settings of a run over three records of text."""
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "a colour " * 8}]
    records = [{"id": f"r{number}", "conversations": turns} for number in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "model_path": str(golden / "checkpoint"),
        "data_path": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "save_steps": 0,
        "logging_steps": 1,
        "report_to": "none",
    }


def test_a_gpu_that_is_full_is_one_error_with_the_step_its_batch_and_what_helps(values, monkeypatch):
    forward = Ovis2_5Model.forward

    def full(self, *args, **kwargs):
        if isinstance(next(self.parameters()), FakeTensor):  # the plan's
            return forward(self, *args, **kwargs)
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB"
        )

    monkeypatch.setattr(Ovis2_5Model, "forward", full)
    monkeypatch.setattr("ovisnb.train.savings._changes", one_change)
    with pytest.raises(OutOfMemory) as caught:
        run_sft(Settings.from_dict(values | {"per_device_train_batch_size": 2, "multimodal_max_length": 64}))
    said = str(caught.value)
    assert said.startswith("Out of memory in step 1, with 2 samples (r")
    assert "0 pictures of 0 patches (CUDA out of memory" in said
    assert "\nPlanned were " in said and "optimizer " in said and "weights " in said
    assert "\nWhat saves most, each alone:\n- --gradient_checkpointing true: saves " in said
    assert caught.value.__context__ is None and caught.value.__cause__ is None  # its tensors are gone


def test_the_changes_that_save_most_are_named():
    changes = [Saving({"gradient_checkpointing": True}, 3 * 2**30, 2**30), *[Saving({"bf16": True}, 2**20, 2**30)] * 5]
    said = explained("in step 3", "no room", None, lambda: changes, Settings())
    assert said.splitlines() == [
        "Out of memory in step 3 (no room).",
        "What saves most, each alone:",
        "- --gradient_checkpointing true: saves 3.00 GiB, leaves 1.00 GiB",
        *["- --bf16 true: saves 1 MiB, leaves 1.00 GiB"] * 2,
    ]
    assert "ovisnb plan" in explained("in step 3", "no room", None, None, Settings())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_a_machine_that_is_full_is_one_sentence_of_the_command(values, tmp_path):
    """A real failure of the CPU's allocator, in a process whose address space ends soon."""
    long = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "colour " * 6000}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"id": "long one", "conversations": long}) + "\n")
    flags = [f"--{name}={value}" for name, value in values.items()]
    flags += ["--text_max_length=8000", "--attn_implementation=eager"]
    ended = subprocess.run(
        [sys.executable, "-c", STARVED, "train", *flags], check=False, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith("ovisnb: Out of memory in step 1, with 1 sample (long one), ")
    assert len(ended.stderr.splitlines()) == 1 and "Planned were" in ended.stderr
    assert "Traceback" not in ended.stderr and "- --gradient_checkpointing true: saves " in ended.stderr


def test_other_errors_stay_what_they_are(values, monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("ovisnb.model.modeling.Ovis2_5Model.forward", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_sft(Settings.from_dict(values))


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_is_out_of_memory(error, full):
    assert is_out_of_memory(error) == full


def test_the_cpus_allocator_speaks_as_we_expect():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_a_batch_in_words():
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    ids = torch.zeros(3, 50, dtype=torch.int64)
    assert (
        batch_in_words({"input_ids": ids, "image_grid_thw": grid}, ["a", "b", "c", "d"])
        == "3 samples (a, b, c and 1 more), 150 tokens, 2 pictures of 28 patches"
    )
    packed = {"input_ids": ids[:1], "cu_seq_lens_q": torch.tensor([0, 20, 50])}
    assert batch_in_words(packed, []) == "2 samples, 50 tokens, 0 pictures of 0 patches"


def test_a_run_prints_its_plan_and_measures_its_peak(values, capsys):
    folder = run_sft(Settings.from_dict(values))
    said = capsys.readouterr().out
    assert said.index("memory of one process on the CPU, planned") < said.index("step 1/2")
    assert pair(said)[0] == 2
    # a run that continues logs what one that never stopped does
    assert not any("peak_memory" in line for line in read_metrics(folder / "metrics.jsonl"))


def pair(said: str) -> tuple[int, float, float]:
    """(step, measured, planned) of the one line that a run on the CPU prints, in MiB."""
    line = r"memory of step (\d+) at its peak: ([\d.]+) MiB of tensors measured, ([\d.]+) MiB planned for its batch"
    ((step, measured, planned),) = re.findall(line, said)
    return int(step), float(measured), float(planned)


MEASURED = {
    "as it is": {},
    "frozen": {"freeze_vision_tower": True, "gradient_checkpointing": True},
    "packed, accumulated": {"packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "adapters": {"use_lora": True, "lora_r": 8},
    "trl": {"trainer": "trl"},
    "one step": {"max_steps": 1},
}


@pytest.mark.parametrize("row", MEASURED)
def test_what_a_run_measures_is_near_what_it_planned(values, tmp_path, row, capsys):
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "a colour " * 150}]
    records = [{"id": f"r{number}", "conversations": turns} for number in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run_sft(Settings.from_dict(values | MEASURED[row]))
    step, measured, planned = pair(capsys.readouterr().out)
    assert step == min(2, MEASURED[row].get("max_steps", 2))
    assert planned == pytest.approx(measured, rel=0.15)


def test_a_small_batch_is_measured_beside_its_own_plan(values, tmp_path, capsys):
    """The data's largest batch, which the plan at the start is for, does not come in the steps that are measured."""
    records = []
    for number in range(40):
        turns = [
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "a colour " * (900 if number == 7 else 4)},
        ]
        records.append({"id": f"r{number}", "conversations": turns})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {"train_modules": "vte", "text_max_length": 2000}  # which leaves little besides the activations
    run_sft(Settings.from_dict(values | changes))
    said = capsys.readouterr().out
    _, measured, planned = pair(said)
    assert planned == pytest.approx(measured, rel=0.15)
    peak = float(re.search(r"peak +([\d.]+) MiB", said)[1])
    assert peak > 2 * planned


def test_counting_a_step_changes_nothing_of_a_run(values, tmp_path, monkeypatch, capsys):
    counted = run_sft(Settings.from_dict(values | {"output_dir": str(tmp_path / "counted"), "max_steps": 3}))
    monkeypatch.setattr("ovisnb.train.memory.PeakMemory.begin", lambda self, trainer: None)
    plain = run_sft(Settings.from_dict(values | {"output_dir": str(tmp_path / "plain"), "max_steps": 3}))
    one, other = (load_file(folder / "final" / "model.safetensors") for folder in (counted, plain))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    untimed = [
        [
            {name: value for name, value in line.items() if name != "seconds"}
            for line in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (counted, plain)
    ]
    assert untimed[0] == untimed[1]


def test_a_step_that_fails_is_counted_no_longer(values, monkeypatch):
    calls = []

    def broken(self, model, inputs, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no more")
        return torch.zeros(())

    monkeypatch.setattr("transformers.Trainer.training_step", broken)
    with pytest.raises(RuntimeError, match="no more"):
        run_sft(Settings.from_dict(values))
    assert not _get_current_dispatch_mode_stack()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_peak_stands_in_the_log_and_near_the_plan(values, capsys):
    folder = run_sft(Settings.from_dict(values))
    peak = read_metrics(folder / "metrics.jsonl")[-1]["peak_memory"]
    plan = memory_plan(Settings.from_dict(values))
    assert peak == pytest.approx(plan.total, rel=0.15, abs=64 * 2**20)  # cuBLAS has a workspace of its own
    assert "peak memory" in capsys.readouterr().out


def test_what_cannot_be_planned_is_said_and_the_run_goes_on(values, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise ValueError("that shape is unknown")

    monkeypatch.setattr("ovisnb.train.plan.memory_plan", refuse)
    assert (run_sft(Settings.from_dict(values)) / "final").exists()
    assert "memory is not planned: that shape is unknown" in capsys.readouterr().out


def test_the_system_says_what_is_resident():
    before = peak_resident()
    held = torch.ones(8 * 2**20)
    assert resident() >= held.nbytes and peak_resident() >= before
