"""The model a run starts from, and a new Ovis trained in stages."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from transformers import (
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ovisnb.model import load, save
from ovisnb.train import Settings, SettingsError, run_sft
from ovisnb.train.callbacks import read_metrics
from ovisnb.train.start import starting_model

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT, LLM = "model.vision_tower.transformer.", "model.language_model."
LAST, HEAD, TABLE = f"{VIT}encoder.layers.1.", "model.vision_tower.head_", "model.visual_embeddings_table."


@pytest.fixture(scope="module")
def parts(golden, tmp_path_factory):
    """Folders of a small Qwen3 and a small SigLIP, as settings of a new Ovis."""
    llm, vit = (tmp_path_factory.mktemp(name) for name in ("llm", "vit"))
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=640, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, **SMALL)
    Qwen3ForCausalLM(config).save_pretrained(llm)
    Qwen2Tokenizer.from_pretrained(golden / "checkpoint").save_pretrained(llm)
    SiglipVisionModel(SiglipVisionConfig(image_size=64, patch_size=16, **SMALL)).save_pretrained(vit)
    return {"llm_name_or_path": str(llm), "vit_name_or_path": str(vit), "visual_vocab_size": 64}


def same(model, other):
    return {name for name, tensor in model.state_dict().items() if torch.equal(tensor, other.state_dict()[name])}


def test_a_new_ovis_is_what_the_settings_say(parts):
    values = parts | {
        "model_init_seed": 3,
        "vit_hidden_stride": 1,
        "vit_window_size": 32,
        "vit_temporal_patch_size": 2,
        "vit_fullatt_block_indexes": "1",
        "vit_preserve_original_pe": False,
        "vit_use_rope": False,
        "attn_implementation": "eager",
    }
    model, processor = starting_model(Settings.from_dict(values))
    vision = model.config.vision_config
    assert (vision.hidden_stride, vision.window_size, vision.temporal_patch_size) == (1, 32, 2)
    assert (vision.fullatt_block_indexes, vision.preserve_original_pe, vision.use_rope) == ("1", False, False)
    assert model.config.visual_vocab_size == 64 and processor.image_processor.hidden_stride == 1
    assert model.config.text_config._attn_implementation == vision._attn_implementation == "eager"
    again, _ = starting_model(Settings.from_dict(values))
    assert same(model, again) == set(model.state_dict())
    other, _ = starting_model(Settings.from_dict(values | {"model_init_seed": 4}))
    assert "model.vision_tower.head_linear.weight" not in same(model, other)


def test_a_checkpoint_goes_before_the_parts(parts, tmp_path):
    settings = Settings.from_dict(parts)
    model, processor = starting_model(settings)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    checkpoint = tmp_path / "checkpoint-3"
    assert "lm_head.weight" not in same(model, starting_model(settings, checkpoint)[0])  # has no weights yet
    save(model, processor, checkpoint)
    gone = Settings.from_dict(parts | {"llm_name_or_path": "gone", "vit_name_or_path": "gone"})
    assert same(model, starting_model(gone, checkpoint)[0]) == set(model.state_dict())


def test_a_model_path_is_opened_in_float32(golden, golden_model):
    model, _ = starting_model(Settings.from_dict({"model_path": str(golden / "checkpoint"), "bf16": True}))
    assert same(model, golden_model) == set(model.state_dict()) and model.dtype == torch.float32


def test_a_new_ovis_under_zero_3_is_made_whole(parts, tmp_path):
    """As transformers has it, a model is parted at its birth, before its table could be initialised."""
    config = tmp_path / "zero3.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}))
    arguments = TrainingArguments(str(tmp_path), deepspeed=str(config), use_cpu=True, report_to="none")
    try:
        assert is_deepspeed_zero3_enabled()
        model, _ = starting_model(Settings.from_dict(parts), arguments=arguments)
        assert is_deepspeed_zero3_enabled()
    finally:
        del arguments  # transformers holds it by a weak reference
    assert not is_deepspeed_zero3_enabled()
    assert model.model.visual_embeddings_table.weight.shape == (64, 32)


@pytest.mark.parametrize("name", ["llm_name_or_path", "vit_name_or_path"])
def test_parts_that_are_not_there_are_told(parts, tmp_path, name):
    with pytest.raises(SettingsError, match=f"No Ovis can be made of .*{name} {tmp_path}/gone") as caught:
        starting_model(Settings.from_dict(parts | {name: str(tmp_path / "gone")}))
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match="no model to start from: give model_path, or llm_name_or_path"):
        starting_model(Settings())


def test_an_attention_that_is_not_here_is_told(parts):
    with pytest.raises(SettingsError, match="No Ovis can be made of"):
        starting_model(Settings.from_dict(parts | {"attn_implementation": "nonsense"}))


@pytest.fixture
def pictures(tmp_path):
    """A file of captions and one of conversations, on four pictures."""
    captions, talks = [], []
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / f"{number}.png")
        captions.append({"id": f"c{number}", "image": f"{number}.png", "caption": f"It is {colour}."})
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": colour}]
        talks.append({"id": f"t{number}", "image": f"{number}.png", "conversations": turns})
    for name, rows in (("captions", captions), ("talks", talks)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def stage(number, pictures, **values):
    """The settings of one stage: three steps, large enough to be seen."""
    common = {
        "stage": number,
        "data_path": str(pictures / ("talks.json" if number == 3 else "captions.json")),
        "data_type": "conversation" if number == 3 else "caption",
        "image_folder": str(pictures),
        "output_dir": str(pictures / f"stage{number}"),
        "min_pixels": 32 * 32,
        "max_pixels": 64 * 64,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
    }
    return Settings.from_dict(common | values)


def changed(before, after):
    return set(before.state_dict()) - same(before, after)


def test_three_stages(parts, pictures):
    first = stage(1, pictures, **parts)
    new, _ = starting_model(first)
    one = run_sft(first) / "final"
    assert [file.name for file in one.iterdir() if "model" in file.name] == ["pytorch_model.bin"]
    captioned, _ = load(one)
    assert {name.startswith((LAST, HEAD, TABLE)) for name in changed(new, captioned)} == {True}
    for part in (LAST, HEAD, TABLE):
        assert any(name.startswith(part) for name in changed(new, captioned)), part

    two = run_sft(stage(2, pictures, model_path=str(one))) / "final"
    assert [file.name for file in two.iterdir() if "model" in file.name] == ["pytorch_model.bin"]
    everything, _ = load(two)
    for part in (LLM, VIT, HEAD, TABLE, f"{VIT}encoder.layers.0.", f"{VIT}embeddings."):
        assert any(name.startswith(part) for name in changed(captioned, everything)), part

    three = run_sft(stage(3, pictures, model_path=str(two))) / "final"
    assert [file.name for file in three.iterdir() if "model" in file.name] == ["model.safetensors"]
    assert changed(everything, load(three)[0]) >= changed(captioned, everything)
    for number in (1, 2, 3):
        losses = [
            line["loss"] for line in read_metrics(pictures / f"stage{number}" / "metrics.jsonl") if "loss" in line
        ]
        assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)


def test_a_stopped_first_stage_goes_on_to_the_same_weights(parts, pictures):
    """Its language model and vision transformer may be gone by then."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 2

    whole = run_sft(stage(1, pictures, **parts))
    stopped = stage(1, pictures, **parts, output_dir=str(pictures / "again"))
    run_sft(stopped, callbacks=[Stop()])
    shutil.rmtree(pictures / "again" / "final")
    gone = {"llm_name_or_path": str(pictures / "gone"), "vit_name_or_path": str(pictures / "gone")}
    resumed = run_sft(Settings.from_dict(stopped.to_dict() | gone))
    models = [load(folder / "final")[0] for folder in (whole, resumed)]
    assert same(*models) == set(models[0].state_dict())
