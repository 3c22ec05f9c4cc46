"""Batches by length and by a budget of tokens: every sample once, every process its own, the same when a run continues."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler

from ovisnb.chat import encode
from ovisnb.chat.batching import Length, length_of, padding
from ovisnb.train import Settings, SettingsError, batches, run_sft
from ovisnb.train.batches import LENGTHS, UNKNOWN, PlannedBatches, measure_records
from ovisnb.train.callbacks import read_metrics
from ovisnb.train.dataset import EncodedRecords, Encoder, RecordEncodingError, open_records
from ovisnb.train.trainer import SftTrainer
from tests.train.conftest import PIXELS, write_data
from tests.train.test_sft import StopAt, weights

lengths = st.lists(st.builds(Length, st.integers(1, 300), st.integers(0, 3)), min_size=1, max_size=60)


def every(one):
    return [PlannedBatches(rank=rank, world=3, **one) for rank in range(3)]


@given(lengths=lengths, budget=st.none() | st.integers(300, 900), packed=st.booleans(), seed=st.integers(0, 5))
def test_every_process_takes_part_in_as_many_batches_with_its_own_samples(lengths, budget, packed, seed):
    ranks = every({"lengths": lengths, "batch_size": 4, "max_tokens": budget, "packed": packed, "seed": seed})
    for epoch in (0, 1):
        for rank in ranks:
            rank.set_epoch(epoch)
        taken = [list(rank) for rank in ranks]
        assert [len(some) for some in taken] == [len(ranks[0])] * 3  # in every epoch
        assert all(batch for some in taken for batch in some)
        indices = [index for some in taken for batch in some for index in batch]
        assert set(indices) == set(range(len(lengths)))
        if len(lengths) >= 3 * len(ranks[0]) or len(indices) == len(lengths):
            assert len(indices) == len(lengths)
        else:  # nothing could be cut in two any more
            assert all(len(batch) == 1 for some in taken for batch in some)
            assert len(indices) - len(lengths) < max(3, len(lengths) + 3)
        for batch in (batch for some in taken for batch in some):
            tokens = [lengths[index].tokens for index in batch]
            if budget is None:
                assert len(batch) <= 4
            else:
                assert (sum(tokens) if packed else len(tokens) * max(tokens)) <= budget
        assert taken == [list(rank) for rank in ranks]


@given(world=st.integers(1, 4), packed=st.booleans())
def test_what_is_computed_at_the_same_time_costs_about_the_same(world, packed):
    chance = random.Random(world)
    some = [Length(int(chance.lognormvariate(4.5, 0.8)) + 1, 0) for _ in range(800)]
    plan = PlannedBatches(some, max_tokens=2048, packed=packed, world=world)
    steps = plan.steps(0)
    costs = [[plan.cost(batch)[0] for batch in step] for step in steps]
    spread = [1 - min(step) / max(step) for step in costs]
    assert sorted(spread)[-3] < 0.2  # all but those that hold what was left, or cut in two
    assert sum(spread) / len(spread) < 0.1
    assert max(costs[0]) == max(max(step) for step in costs)  # what does not fit shows at once
    if packed:
        assert sum(map(sum, costs)) > 0.9 * 2048 * len(steps) * world
    else:
        assert padding(some, [batch for step in steps for batch in step]).share < 0.1
    again = plan.steps(1)
    assert again != steps and len(again) == len(steps)
    assert {frozenset(batch) for step in again for batch in step} != {frozenset(b) for step in steps for b in step}


def test_grouping_by_length_pads_less_and_stays_shuffled():
    chance = random.Random(0)
    some = [Length(chance.randint(10, 500), 0) for _ in range(4000)]
    plan = PlannedBatches(some, batch_size=8, seed=1)
    grouped = [step[0] for step in plan.steps(0)]
    order = list(SequentialSampler(some))
    plain = [order[at : at + 8] for at in range(0, 4000, 8)]
    assert padding(some, grouped).share < 0.05
    assert padding(some, plain).share > 0.3
    first = [index for batch in grouped[:50] for index in batch]
    assert min(first) < 400 and max(first) > 3600


def test_a_sample_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="sample 1 has 90 tokens, more than max_tokens 80"):
        PlannedBatches([Length(5, 0), Length(90, 1)], max_tokens=80, packed=True)


@pytest.fixture
def data(tmp_path):
    """Twelve records, with pictures of three sizes."""
    return write_data(tmp_path, [(32 * (1 + number % 3), 48) for number in range(12)])


@pytest.fixture
def toy(golden, data, tmp_path):
    def make(folder="run", **changes):
        values = {
            "model_path": str(golden / "checkpoint"),
            "data_path": str(data),
            "image_folder": str(tmp_path),
            "output_dir": str(tmp_path / folder),
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 3,
            "report_to": "none",
        }
        return Settings.from_dict(values | PIXELS | changes)

    return make


def samples_of(settings, processor):
    return EncodedRecords(open_records(settings.data_path, settings), Encoder(processor, settings))


def test_lengths_are_those_of_the_samples_and_kept_until_something_changes(toy, data, golden_processor, monkeypatch):
    settings = toy()
    dataset = samples_of(settings, golden_processor)
    measured = measure_records(dataset, settings.output_dir)
    assert measured == [length_of(sample) for sample in dataset]
    measuring = []
    monkeypatch.setattr(batches, "length_of", lambda encoded: measuring.append(encoded) or length_of(encoded))
    assert measure_records(dataset, settings.output_dir) == measured and not measuring

    other = samples_of(toy(single_image_max_pixels=32 * 32), golden_processor)
    assert measure_records(other, settings.output_dir) != measured and len(measuring) == 12
    measuring.clear()
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    dataset = samples_of(settings, golden_processor)
    assert measure_records(dataset, settings.output_dir) == measured[::-1] and len(measuring) == 12
    measuring.clear()
    file = data.parent / "run" / LENGTHS
    file.write_text(file.read_text()[:-20])  # as nothing of ours leaves it
    assert measure_records(dataset, settings.output_dir) == measured[::-1] and len(measuring) == 12


def test_lengths_of_records_in_memory_are_measured_by_workers_and_kept_nowhere(toy, golden_processor, tmp_path, capsys):
    settings = toy()
    records = list(open_records(settings.data_path, settings))
    dataset = EncodedRecords(records, Encoder(golden_processor, settings))
    assert measure_records(dataset, settings.output_dir, workers=2) == [length_of(sample) for sample in dataset]
    assert not (tmp_path / "run").exists() and not capsys.readouterr().out


def test_measuring_many_is_told(toy, golden_processor, monkeypatch, capsys):
    monkeypatch.setattr(batches, "_TOLD_FROM", 12)
    settings = toy()
    measure_records(samples_of(settings, golden_processor), settings.output_dir)
    assert capsys.readouterr().out.splitlines() == ["measuring the lengths of 12 records, once", "measured 12 of 12"]


def test_a_record_that_cannot_be_measured(toy, golden_processor, tmp_path):
    (tmp_path / "7.png").write_bytes(b"no picture")
    settings = toy()
    with pytest.raises(RecordEncodingError, match="r7"):
        measure_records(samples_of(settings, golden_processor), settings.output_dir)
    dataset = samples_of(toy(on_bad_record="skip"), golden_processor)
    measured = measure_records(dataset, settings.output_dir)
    assert measured[7] == UNKNOWN and UNKNOWN not in measured[:7] + measured[8:]


def test_packed_training_is_padded_training(toy):
    changes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 0}
    changes |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    changes |= {"eval_data_path": str(toy().data_path[0]), "eval_steps": 2, "per_device_eval_batch_size": 5}
    padded, packed = run_sft(toy("padded", **changes)), run_sft(toy("packed", packing=True, **changes))
    for one, other in zip(*(read_metrics(folder / "metrics.jsonl") for folder in (padded, packed)), strict=True):
        names = {"loss", "eval_loss", "step", "epoch", "samples_seen", "tokens_seen", "supervised_tokens"} & one.keys()
        assert {name: one[name] for name in names} == pytest.approx({name: other[name] for name in names}, abs=1e-5)
    one, other = weights(padded / "final"), weights(packed / "final")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_batch_tokens": 220, "packing": True},
        {"max_batch_tokens": 220, "gradient_accumulation_steps": 2},
        {"group_by_length": True, "per_device_train_batch_size": 2, "packing": True},
    ],
)
def test_a_stopped_run_of_planned_batches_ends_in_the_same_weights(toy, capsys, monkeypatch, changes):
    changes |= {"num_train_epochs": 2}
    whole = run_sft(toy("whole", save_steps=0, **changes))
    steps = [line["step"] for line in read_metrics(whole / "metrics.jsonl")]
    middle = len(steps) // 2 + 1  # in the second epoch
    changes |= {"save_steps": middle}
    run_sft(toy("stopped", **changes), callbacks=[StopAt(middle)])
    capsys.readouterr()
    monkeypatch.setattr(batches, "length_of", None)  # nothing is measured again
    stopped = run_sft(toy("stopped", **changes))
    assert f"continuing from checkpoint-{middle}\n" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(stopped / "metrics.jsonl")] == steps and middle < steps[-1]
    one, other = weights(whole / "final"), weights(stopped / "final")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_epoch_of_planned_batches_is_every_record_once(toy, golden_processor, monkeypatch):
    seen = []
    note = SftTrainer.note_step
    monkeypatch.setattr(
        SftTrainer, "note_step", lambda self, some: seen.extend(b["ids"] for b in some) or note(self, some)
    )
    settings = toy(max_batch_tokens=220, packing=True, num_train_epochs=2, save_steps=0)
    folder = run_sft(settings)
    assert sorted(name for ids in seen for name in ids) == sorted([f"r{number}" for number in range(12)] * 2)
    half = len(seen) // 2
    assert seen[:half] != seen[half:] and max(map(len, seen)) > 1
    last = read_metrics(folder / "metrics.jsonl")[-1]
    tokens = sum(length.tokens for length in measure_records(samples_of(settings, golden_processor), folder))
    assert last["samples_seen"] == 24 and last["tokens_seen"] == 2 * tokens and last["epoch"] == 2


def test_what_cannot_be_planned_is_refused(toy, golden_processor):
    with pytest.raises(
        SettingsError, match=r"max_batch_tokens is 60, and \d+ of the training records are longer, .* r11 "
    ):
        run_sft(toy(max_batch_tokens=60))
    record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    settings = toy("other", data_path=[], max_batch_tokens=60, max_steps=2)
    with pytest.raises(SettingsError, match="max_batch_tokens needs the lengths of all records"):
        run_sft(settings, train_dataset=iter([record] * 9))
    assert len(encode(record, golden_processor)) < 60
