"""A run at toy size: what it leaves behind, resume, what trains, what it says when it cannot."""

from __future__ import annotations

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

import ovisnb.model
from ovisnb.chat import collate
from ovisnb.train import Settings, SettingsError, run_sft
from ovisnb.train.callbacks import MetricsFile, read_metrics
from ovisnb.train.dataset import EncodedStream, Encoder, RecordEncodingError
from ovisnb.train.modules import freeze
from ovisnb.train.sft import SftTrainer, last_checkpoint


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


class StopAt(TrainerCallback):
    """Stop as a killed run would: after the checkpoint of this step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_run_leaves_a_run_folder(toy, data, golden, capsys):
    settings = toy(max_steps=4, eval_data_path=str(data), eval_steps=2, save_steps=2, report_to="tensorboard")
    folder = run_sft(settings)
    assert Settings.from_json(folder / "settings.json") == settings

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    assert [line["samples_seen"] for line in trained] == [2, 4, 6, 8]
    assert {"epoch", "learning_rate", "grad_norm", "tokens_seen", "seconds"} <= trained[0].keys()
    _, processor = ovisnb.model.load(golden / "checkpoint")
    encoder = Encoder(processor, settings)
    samples = [encoder(json.loads(line)) for line in data.read_text().splitlines()]
    # four steps of two are the whole file once
    assert trained[-1]["supervised_tokens"] == sum(int((sample.labels != -100).sum()) for sample in samples)
    assert trained[-1]["tokens_seen"] == sum(len(sample) for sample in samples)
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert evaluated[1]["eval_loss"] < evaluated[0]["eval_loss"]

    assert list((folder / "tensorboard").glob("events*"))
    model, _ = ovisnb.model.load(folder / "final")
    from_checkpoint, _ = ovisnb.model.load(folder / "checkpoint-4")
    start, _ = ovisnb.model.load(golden / "checkpoint")
    batch = collate(samples[:3])
    with torch.no_grad():
        assert model(**batch).loss < start(**batch).loss
        assert torch.equal(model(**batch).loss, from_checkpoint(**batch).loss)
    printed = capsys.readouterr().out
    assert "step 4/4  loss" in printed and "eta 0:00" in printed and "eval_loss" in printed
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_ends_in_the_same_weights(toy, capsys, workers):
    whole = run_sft(toy("whole", num_train_epochs=2, dataloader_num_workers=workers))
    stopped = run_sft(toy("stopped", num_train_epochs=2, dataloader_num_workers=workers), callbacks=[StopAt(3)])
    assert last_checkpoint(stopped).name == "checkpoint-3"
    with (stopped / "metrics.jsonl").open("a") as file:  # what a run killed after its checkpoint had logged
        file.write('{"step": 4, "loss": 9.0}\n{"step": 5, "lo')
    run_sft(toy("stopped", num_train_epochs=2, dataloader_num_workers=workers))
    printed = capsys.readouterr().out
    assert "continuing from checkpoint-3" in printed and "settings changed" not in printed
    one, other = weights(whole / "final"), weights(stopped / "final")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (whole, stopped)
    ]
    assert lines[0] == lines[1]


def test_a_finished_run_is_not_trained_further(toy, capsys):
    folder = run_sft(toy(max_steps=3))
    before, metrics = weights(folder / "final"), (folder / "metrics.jsonl").read_text()
    run_sft(toy(max_steps=3))
    assert "nothing is left to train" in capsys.readouterr().out
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(folder / "final").items())
    assert (folder / "metrics.jsonl").read_text() == metrics


def test_a_run_can_go_on_with_other_settings(toy, capsys):
    run_sft(toy(max_steps=3))
    folder = run_sft(toy(max_steps=4, learning_rate=5e-4))
    assert "settings changed since then: max_steps 3 -> 4, learning_rate 0.001 -> 0.0005" in capsys.readouterr().out
    with pytest.raises(
        SettingsError, match=f"train_modules was 'all' in the run in {re.escape(str(folder))} and is 'llm' now"
    ):
        run_sft(toy(max_steps=5, train_modules="llm"))
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert Settings.from_json(folder / "settings.json").max_steps == 4


def test_changed_rates_and_decays_hold_from_the_next_step(toy):
    """And so does a schedule that ends elsewhere: neither comes back with the states in the checkpoint."""
    run_sft(toy(max_steps=2, save_steps=2, lr_scheduler_type="linear", train_modules="llm:1e-3|vte:2e-3"))
    changes = {"learning_rate": 1e-4, "weight_decay": 0.1, "adam_beta1": 0.5, "lr_scheduler_type": "linear"}
    folder = run_sft(toy(max_steps=4, save_steps=4, train_modules="llm:1e-3|vte:2e-3", **changes))
    rates = [line["learning_rate"] for line in read_metrics(folder / "metrics.jsonl")]
    assert rates == pytest.approx([2e-3, 1e-3, 1e-3, 5e-4])  # those of the first group
    groups = torch.load(folder / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    assert {group["betas"] for group in groups} == {(0.5, 0.999)}
    run_sft(toy("other", max_steps=1, save_steps=1, lr_scheduler_type="constant"))
    folder = run_sft(toy("other", max_steps=2, save_steps=2, lr_scheduler_type="constant", learning_rate=1e-4))
    assert [line["learning_rate"] for line in read_metrics(folder / "metrics.jsonl")] == pytest.approx([1e-3, 1e-4])


def test_a_final_model_of_an_earlier_end_is_replaced(toy, monkeypatch):
    """A run that was given more steps and was killed between its last checkpoint and final/."""
    folder = run_sft(toy(max_steps=3))

    def gone(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("ovisnb.train.sft.save", gone)
        run_sft(toy(max_steps=6))
    run_sft(toy(max_steps=6))
    final, last = weights(folder / "final"), weights(folder / "checkpoint-6")
    assert all(torch.equal(final[name], tensor) for name, tensor in last.items())


@pytest.mark.parametrize(
    "tail", [b"7\n", b'{"loss": 1}\n', b"\xff\xfe", b"\x00" * 40], ids=["number", "no step", "bytes", "zeros"]
)
def test_metrics_end_where_a_line_is_none(tmp_path, tail):
    """A power cut may leave any bytes: the run goes on."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 2.0}\n' + tail)
    assert read_metrics(file) == [{"step": 1, "loss": 2.0}]


def test_what_a_run_killed_in_final_left_is_removed(toy, tmp_path):
    (tmp_path / "run" / ".final-x1y2" / "new").mkdir(parents=True)
    (tmp_path / "run" / ".final-x1y2" / "new" / "model.safetensors").write_bytes(b"half")
    folder = run_sft(toy(max_steps=1, save_steps=0))
    assert {path.name for path in folder.iterdir()} == {"settings.json", "metrics.jsonl", "final", "final.json"}


def test_data_that_grew_since_the_checkpoint_is_told(toy, data, capsys):
    run_sft(toy(max_steps=3))
    with data.open("a") as file:
        file.write(data.read_text().splitlines()[5].replace("r5", "r8") + "\n")
    run_sft(toy(max_steps=4))
    told = "the training data held 8 records then and holds 9 now: its order is another, and some may come again"
    assert told in capsys.readouterr().out


def test_resume_false_refuses_a_folder_in_use(toy):
    folder = run_sft(toy(max_steps=1))
    with pytest.raises(SettingsError, match="is not empty and resume is false"):
        run_sft(toy(max_steps=1, resume=False))
    assert folder.exists()


def test_accumulation_weighs_tokens_not_batches(toy):
    """One step of eight samples, at once or in pieces: the same loss and gradient, though lengths differ."""
    lines = []
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        folder = run_sft(
            toy(
                f"run{batch}",
                max_steps=1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                save_steps=0,
            )
        )
        lines += read_metrics(folder / "metrics.jsonl")
    assert lines[0]["samples_seen"] == lines[1]["samples_seen"] == lines[2]["samples_seen"] == 8
    for line in lines[1:]:
        assert line["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-4)


def test_eval_loss_is_the_mean_over_tokens(toy, data):
    losses = []
    for batch in (1, 3, 8):
        folder = run_sft(
            toy(
                f"run{batch}",
                max_steps=1,
                learning_rate=0,
                eval_data_path=str(data),
                save_steps=0,
                per_device_eval_batch_size=batch,
            )
        )
        losses += [line["eval_loss"] for line in read_metrics(folder / "metrics.jsonl") if "eval_loss" in line]
    assert len(losses) == 3
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "moving"),
    [
        (
            {"train_modules": "visual_tokenizer.head|vte"},
            ("model.vision_tower.head_", "model.visual_embeddings_table."),
        ),
        ({"train_modules": "visual_tokenizer"}, ("model.vision_tower.",)),
        ({"train_modules": "llm"}, ("model.language_model.", "lm_head.")),
        (
            {"freeze_llm": True, "freeze_vision_tower": True},
            ("model.vision_tower.head_", "model.visual_embeddings_table."),
        ),
    ],
)
def test_only_the_named_modules_move(toy, golden, changes, moving):
    folder = run_sft(toy(max_steps=2, weight_decay=0.1, save_steps=0, **changes))
    before = ovisnb.model.load(golden / "checkpoint")[0].state_dict()
    after = ovisnb.model.load(folder / "final")[0].state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(moving) for name in moved)
    assert all(any(name.startswith(prefix) for name in moved) for prefix in moving if prefix != "lm_head.")


def test_frozen_parameters_get_no_gradient(golden, toy):
    model, processor = ovisnb.model.load(golden / "checkpoint")
    settings = toy(train_modules="visual_tokenizer.vit")
    counts = freeze(model, settings)
    assert counts["visual_tokenizer.vit"] > 0 and counts["llm"] == counts["vte"] == 0
    record = {
        "id": "r",
        "image": Image.new("RGB", (64, 64), "red"),
        "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "red"}],
    }
    model(**collate([Encoder(processor, settings)(record)])).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient and all(name.startswith("model.vision_tower.transformer.") for name in with_gradient)


def test_nothing_left_to_train(golden, toy):
    model, _ = ovisnb.model.load(golden / "checkpoint")
    with pytest.raises(SettingsError, match="Nothing is left to train"):
        freeze(model, toy(train_modules="visual_tokenizer.vit").model_copy(update={"freeze_vision_tower": True}))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_that_cannot_be_encoded_is_named(toy, tmp_path, data, workers):
    (tmp_path / "6.png").unlink()
    with pytest.raises(RecordEncodingError) as caught:
        run_sft(toy(dataloader_num_workers=workers))
    start = f"record 'r6' ({data}:7): image 1: there is no picture at {tmp_path / '6.png'}: "
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)
    turns = [{"from": "user", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    with pytest.raises(RecordEncodingError, match="^record 'x': turn 1: the role 'user' is unknown.*$"):
        run_sft(
            toy("dicts", data_path=None, dataloader_num_workers=workers),
            train_dataset=[{"id": "x", "conversations": turns}],
        )


@pytest.mark.parametrize("name", ["lr_scheduler_type", "optim"])
def test_a_name_that_the_trainer_does_not_know(toy, name):
    with pytest.raises(SettingsError, match="do not suit transformers' Trainer: cosin is not a valid") as caught:
        run_sft(toy(**{name: "cosin"}))
    assert "\n" not in str(caught.value)


def test_datasets_in_place_of_files(toy, golden, tmp_path):
    model, processor = ovisnb.model.load(golden / "checkpoint")
    records = [
        {"id": str(n), "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho " * n}]}
        for n in range(1, 6)
    ]
    settings = toy(model_path=None, data_path=None, max_steps=4, dataloader_num_workers=2, save_steps=0)

    class Stream:
        def __iter__(self):
            return iter(records)

    folder = run_sft(settings, train_dataset=Stream(), eval_dataset=records, model=model, processor=processor)
    lines = read_metrics(folder / "metrics.jsonl")
    assert max(line["step"] for line in lines) == 4 and any("eval_loss" in line for line in lines)
    with pytest.raises(SettingsError, match="give max_steps"):
        run_sft(toy(data_path=None, max_steps=-1), train_dataset=Stream())
    with pytest.raises(SettingsError, match="data_path and a dataset are both given"):
        run_sft(toy(), train_dataset=records)
    with pytest.raises(SettingsError, match="nothing to train on"):
        run_sft(toy(data_path=None))
    with pytest.raises(SettingsError, match="holds no record"):
        run_sft(toy(data_path=None), train_dataset=[])
    with pytest.raises(SettingsError, match="model and processor come together"):
        run_sft(toy(), model=model)
    with pytest.raises(SettingsError, match="either as model_path or as model"):
        run_sft(toy(model_path=None))


def test_workers_share_a_stream_without_repeats():
    class Plain:
        def sample(self, read):
            return read()

    stream = EncodedStream(range(10), encoder=Plain())
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(loader) == list(range(10))


def test_pixel_and_length_limits_follow_the_kind_of_record(golden, toy):
    _, processor = ovisnb.model.load(golden / "checkpoint")
    limits = {"single_image_max_pixels": 96 * 96, "multiple_image_max_pixels": 64 * 64, "video_max_pixels": 32 * 32}
    encoder = Encoder(processor, toy(**limits, multimodal_max_length=60, text_max_length=30))
    big = Image.new("RGB", (256, 256))
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x y z " * 40}]
    one = encoder({"id": "1", "image": big, "conversations": turns})
    two = encoder(
        {"id": "2", "image": [big, big], "conversations": [{"from": "human", "value": "<image><image>"}, turns[1]]}
    )
    film = encoder({"id": "3", "video": [big, big], "conversations": [{"from": "human", "value": "<video>"}, turns[1]]})
    text = encoder({"id": "4", "conversations": [{"from": "human", "value": "Hi"}, turns[1]]})
    assert [grid.tolist() for grid in (one.image_grid_thw, two.image_grid_thw, film.video_grid_thw)] == [
        [[1, 6, 6]],
        [[1, 4, 4], [1, 4, 4]],
        [[2, 2, 2]],
    ]
    assert [len(sample) for sample in (one, two, film, text)] == [60, 60, 60, 30]
    assert all(sample.dropped for sample in (one, two, film, text))


def test_truncation_is_told_a_few_times(toy, capsys):
    folder = run_sft(toy(max_steps=4, multimodal_max_length=40, text_max_length=30, save_steps=0))
    printed = capsys.readouterr().out
    assert printed.count("further truncated records are not shown") == 1
    assert (folder / "final").exists()


def test_a_run_continues_at_other_rates_of_the_same_parts(toy, capsys):
    run_sft(toy(train_modules="vte|llm:1e-4", max_steps=1, save_steps=1))
    folder = run_sft(toy(train_modules="vte:1e-5|llm:2e-4", max_steps=2, save_steps=1))
    assert "continuing from checkpoint-1" in capsys.readouterr().out
    assert (folder / "checkpoint-2").is_dir()
    with pytest.raises(SettingsError, match="train_modules was .* which its optimizer's state does not fit"):
        run_sft(toy(train_modules="vte:1e-5|llm:0", max_steps=3, save_steps=1))


def test_an_image_folder_that_is_none_is_refused_at_once(toy):
    with pytest.raises(SettingsError, match="image_folder nowhere is not a folder"):
        run_sft(toy(image_folder="nowhere", model_path="neither"))


def test_embeddings_and_norms_are_not_decayed(golden, toy):
    model, _ = ovisnb.model.load(golden / "checkpoint")
    decayed = SftTrainer.get_decay_parameter_names(SftTrainer.__new__(SftTrainer), model)
    assert any("q_proj.weight" in name for name in decayed)
    assert not [name for name in decayed if "embed" in name and "patch" not in name or "norm" in name or "bias" in name]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    class State:
        global_step = 7
        is_world_process_zero = True

    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(FloatingPointError, match="nan by step 7: lower learning_rate"):
        metrics.on_log(None, State(), None, logs={"loss": float("nan"), "grad_norm": float("inf"), "epoch": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 7, "loss": None, "grad_norm": None, "epoch": 1.0}]


def test_checkpointed_activations_and_bfloat16_change_little(toy):
    """What saves memory gives the same run: exactly so for recomputed activations, nearly so for bfloat16."""
    runs = {"plain": {}, "recomputed": {"gradient_checkpointing": True, "train_modules": "visual_tokenizer"}}
    runs |= {"same": {"train_modules": "visual_tokenizer"}, "bf16": {"bf16": True}}
    losses = {}
    for name, changes in runs.items():
        folder = run_sft(toy(name, max_steps=3, save_steps=0, **changes))
        losses[name] = [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
    assert losses["recomputed"] == pytest.approx(losses["same"], rel=1e-5)
    assert losses["bf16"][0] == pytest.approx(losses["plain"][0], rel=1e-3)
    # Adam's first steps go by the gradient's sign, so rounding shows more in what follows
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=5e-2)
    assert losses["bf16"] != losses["plain"]
