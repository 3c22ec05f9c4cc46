"""Bad records stop a run or are left out and counted; a loss or gradient that is no number stops it before the step."""

from __future__ import annotations

import json
import re

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

import ovisnb.model
from ovisnb.chat import collate
from ovisnb.data.formats.parquet import write_parquet
from ovisnb.train import run_sft
from ovisnb.train.callbacks import read_metrics
from ovisnb.train.checkpoints import last_checkpoint
from ovisnb.train.dataset import Encoder, RecordEncodingError, collate_samples
from ovisnb.train.faults import JUDGED, SKIPPED_STEPS, BadDataError, BadRecords, Skipped, StopOnNaN

from .test_sft import StopAt, weights


def logged(folder):
    return [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def without_times(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    measured = ("seconds", "peak", "runtime", "per_second")
    return [{k: v for k, v in line.items() if not any(some in k for some in measured)} for line in lines]


def spoil(data, image_folder):
    """Make four of the eight records bad, each in another way."""
    lines = data.read_text().splitlines()
    (image_folder / "1.png").write_bytes((image_folder / "1.png").read_bytes()[:60])  # unreadable from its middle on
    lines[2] = lines[2][:40]  # broken JSON
    nothing = json.loads(lines[4])
    nothing["conversations"][1]["from"] = "ignored_gpt"
    lines[4] = json.dumps(nothing)  # nothing supervised
    long = json.loads(lines[5])
    long["conversations"][0]["value"] = "Hello " * 200
    lines[5] = json.dumps(long)  # too long to reach its answer
    data.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_left_out_and_counted(toy, data, tmp_path, capsys, workers):
    spoil(data, tmp_path)
    changes = {"on_bad_record": "skip", "text_max_length": 100, "dataloader_num_workers": workers, "max_steps": 8}
    whole = run_sft(toy("whole", **changes))
    printed = capsys.readouterr().out
    told = re.findall(r"^left out: (.*)$", printed, re.MULTILINE)
    assert len(told) == 3 and printed.count("further records that are left out are counted and not shown") == 1
    assert all("data.jsonl:" in sentence for sentence in told)
    assert "left out 8 of 16 training records" in printed
    lines = logged(whole)
    assert [line["samples_seen"] + line["skipped"] for line in lines] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert lines[3]["skipped"] == 4 and lines[-1]["skipped"] == 8
    assert all(line["loss"] >= 0 for line in lines)  # NaN is not
    run_sft(toy("stopped", **changes), callbacks=[StopAt(3)])
    stopped = run_sft(toy("stopped", **changes))
    assert f"left out {8 - lines[2]['skipped']} of 10 training records, and {lines[2]['skipped']} before" in (
        capsys.readouterr().out
    )
    assert without_times(whole) == without_times(stopped)
    one, other = weights(whole / "final"), weights(stopped / "final")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_others_of_a_batch_train_as_they_would_alone(toy, data, tmp_path, golden):
    """Eight records in one forward, four of them bad: the loss and the gradient of the good four."""
    good = [line for number, line in enumerate(data.read_text().splitlines()) if number in (0, 3, 6, 7)]
    spoil(data, tmp_path)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(line + "\n" for line in good))
    changes = {"max_steps": 1, "save_steps": 0, "text_max_length": 100}
    one = logged(run_sft(toy("one", **changes, on_bad_record="skip", per_device_train_batch_size=8)))[0]
    two = logged(run_sft(toy("two", **changes, data_path=str(few), per_device_train_batch_size=4)))[0]
    for name in ("supervised_tokens", "samples_seen"):
        assert one[name] == two[name]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("kind", "workers"), [("jsonl", 0), ("parquet", 2)])
def test_a_stream_leaves_them_out_too(toy, tmp_path, kind, workers, capsys):
    entries = [
        {
            "id": f"r{number}",
            "conversations": [{"from": "human", "value": f"{number}?"}, {"from": "gpt", "value": "well " * 3}],
        }
        for number in range(24)
    ]
    for number in (3, 4, 5, 17):
        entries[number]["conversations"] = []
    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        write_parquet(entries, file)
    else:
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries).replace('{"id": "r5"', "{id: r5"))
    changes = {"data_path": str(file), "streaming": True, "on_bad_record": "skip", "dataloader_num_workers": workers}
    changes |= {"max_steps": 12, "save_steps": 5, "image_folder": None}
    whole = run_sft(toy("whole", **changes))
    assert "left out 4 of 24 training records" in capsys.readouterr().out
    assert logged(whole)[-1]["skipped"] == 4 and logged(whole)[-1]["samples_seen"] == 20
    run_sft(toy("stopped", **changes), callbacks=[StopAt(6)])
    stopped = run_sft(toy("stopped", **changes))
    assert without_times(whole) == without_times(stopped)
    one, other = weights(whole / "final"), weights(stopped / "final")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", ["unsupervised", "long"])
def test_by_default_a_record_without_anything_to_learn_stops_the_run(toy, data, case):
    lines = data.read_text().splitlines()
    entry = json.loads(lines[5])
    if case == "unsupervised":
        entry["conversations"][1]["from"] = "ignored_gpt"
    else:
        entry["conversations"][0]["value"] = "Hello " * 200
    data.write_text("".join(line + "\n" for line in [*lines[:5], json.dumps(entry), *lines[6:]]))
    with pytest.raises(RecordEncodingError, match=rf"^record 'r5' \({re.escape(str(data))}:6\): ") as caught:
        run_sft(toy(text_max_length=100))
    assert "\n" not in str(caught.value)


def test_data_that_is_mostly_bad_stops_the_run(toy, data, tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.png").unlink()
    data.write_text("".join(line + "\n" for line in data.read_text().splitlines() if '"image"' in line))
    with pytest.raises(BadDataError, match=r"^7 of the last 7 training records cannot be used, the last one") as caught:
        run_sft(toy(on_bad_record="skip", per_device_train_batch_size=1, max_steps=9))
    assert "\n" not in str(caught.value) and "there is no picture at" in str(caught.value)


def test_evaluation_data_may_be_bad_too(toy, data, tmp_path, capsys):
    bad = tmp_path / "evaluation.jsonl"
    bad.write_text(data.read_text().replace('"6.png"', '"none.png"'))
    folder = run_sft(
        toy(max_steps=2, eval_data_path=str(bad), eval_steps=1, on_bad_record="skip", per_device_eval_batch_size=1)
    )
    printed = capsys.readouterr().out
    assert printed.count("left out: record 'r6'") == 1 and "left out 1 of 8 evaluation records" in printed
    lines = read_metrics(folder / "metrics.jsonl")
    assert all(line["eval_loss"] > 0 for line in lines if "eval_loss" in line)
    assert [line["skipped"] for line in logged(folder)] == [0, 0]
    with pytest.raises(RecordEncodingError, match="^record 'r6'"):
        run_sft(toy("strict", max_steps=2, eval_data_path=str(bad), eval_steps=1))


def test_counting_bad_records(capsys):
    count = BadRecords(None)
    for _ in range(JUDGED // 2):
        count.note(1, ["a picture is gone."])
    assert (count.good, count.bad) == (50, 50)
    assert len(capsys.readouterr().out.splitlines()) == 4
    for _ in range(JUDGED):
        count.note(3, ["a picture is gone."])
    with pytest.raises(BadDataError, match="51 of the last 100 training records .* because of another is gone; "):
        for _ in range(JUDGED):
            count.note(0, ["a picture is gone.", "another is gone."])
    BadRecords(10).note(1, ["gone."] * 9)
    with pytest.raises(BadDataError, match="10 of the last 10 evaluation"):
        BadRecords(10, "evaluation").note(0, ["gone."] * 10)


def test_a_batch_of_nothing_is_a_forward_of_loss_zero(golden):
    model, processor = ovisnb.model.load(golden / "checkpoint")
    gone = Skipped("record 'r': gone.", processor.tokenizer.pad_token_id)
    for packed in (False, True):
        batch = collate_samples([gone, gone], packed=packed)
        assert (batch.pop("ids"), batch.pop("dropped"), batch.pop("skipped")) == ([], [], [gone.sentence] * 2)
        assert (batch["labels"] == -100).all() and batch["input_ids"].numel() == 2
        model.train()
        loss = model(**batch).loss
        loss.backward()
        assert loss == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        assert any(p.grad is not None for p in model.parameters())


class Poison(TrainerCallback):
    """Let the embedding of one word be no number, or all gradients of the embeddings."""

    def __init__(self, word=None):
        self.word = word

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        rows = model.get_input_embeddings()
        if self.word is None:
            rows.weight.register_hook(lambda gradient: gradient * float("inf"))
        else:
            rows.register_forward_hook(
                lambda module, ids, out: torch.where((ids[0] == self.word)[..., None], float("nan"), out)
            )


@pytest.mark.parametrize("batch", [1, 2])
def test_a_loss_that_is_no_number_stops_before_the_step(toy, data, golden, batch):
    settings = toy(save_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=2, max_steps=8 // batch)
    _, processor = ovisnb.model.load(golden / "checkpoint")
    encoder = Encoder(processor, settings)
    samples = {entry["id"]: encoder(entry) for entry in map(json.loads, data.read_text().splitlines())}
    others = torch.cat([sample.input_ids for name, sample in samples.items() if name != "r5"])
    [word, *_] = [word for word in samples["r5"].input_ids.tolist() if word not in others]
    with pytest.raises(FloatingPointError) as caught:
        run_sft(settings, callbacks=[Poison(word)])
    said = str(caught.value)
    found = re.match(r"The loss of step (\d+) is (\w+), from the records ([\w, ]+) \(", said)
    assert found, said
    step, value, ids = found.groups()
    assert "\n" not in said and value == "nan" and "r5" in ids.split(", ") and len(ids.split(", ")) == batch
    assert "before that step changed the weights" in said
    checkpoint = last_checkpoint(settings.output_dir, None)
    assert (checkpoint.name if checkpoint else "checkpoint-0") == f"checkpoint-{int(step) - 1}"
    if checkpoint:
        assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint).values())


def test_a_gradient_that_is_no_number_stops_before_the_step(toy, golden):
    with pytest.raises(
        FloatingPointError, match=r"^The gradient of step 1 is (nan|inf), from the records \w+, \w+; \w+, "
    ):
        run_sft(toy(save_steps=1, gradient_accumulation_steps=2, max_grad_norm=0), callbacks=[Poison()])


def test_steps_that_float16_leaves_out():
    guard = StopOnNaN(Accelerator(cpu=True))
    guard.accelerator.scaler = torch.amp.GradScaler("cpu")
    guard.begin([["a"]])
    guard.note(torch.tensor(1.0))
    guard.check(1, torch.tensor(float("inf")))  # an overflow, which the scaler leaves out
    guard.stepped(1)

    class Skips:
        step_was_skipped = True

    guard.accelerator._optimizers = [Skips()]
    for step in range(2, SKIPPED_STEPS + 1):
        guard.stepped(step)
    with pytest.raises(
        FloatingPointError, match=f"The gradients of the last {SKIPPED_STEPS} steps up to step 51 overflowed"
    ):
        guard.stepped(SKIPPED_STEPS + 1)
    guard.accelerator.scaler = None
    guard.note(torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match="The loss of step 52 is nan, from the records b"):
        guard.begin([["a"], ["b"]])
        guard.note(torch.tensor(1.0))
        guard.note(torch.tensor(float("nan")))
        assert guard.complete
        guard.check(52)


def test_a_sample_without_labels_beside_another(golden):
    """The model's side of it: the loss of the other sample alone."""
    model, processor = ovisnb.model.load(golden / "checkpoint")
    blank = Skipped("gone", processor.tokenizer.pad_token_id).blank()
    from ovisnb.chat import encode

    sample = encode(
        {"id": "r", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho ho"}]}, processor
    )
    assert model(**collate([sample, blank])).loss.item() == pytest.approx(
        model(**collate([sample])).loss.item(), rel=1e-5
    )
