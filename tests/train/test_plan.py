"""The plan against what the Trainer then takes: bytes of live tensors, counted on the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Qwen2Tokenizer, Qwen3Config, SiglipVisionConfig

from ovisnb.chat import Encoded
from ovisnb.model import Ovis2_5Config, Ovis2_5ForConditionalGeneration, Ovis2_5VisionConfig
from ovisnb.model.assemble import assemble
from ovisnb.train import Settings, SettingsError
from ovisnb.train import plan as planning
from ovisnb.train.arguments import training_arguments
from ovisnb.train.dataset import collate_samples
from ovisnb.train.ledger import Ledger
from ovisnb.train.lora import adapted
from ovisnb.train.modules import freeze
from ovisnb.train.plan import PARTS, memory_plan, size_of
from ovisnb.train.plan_model import planned_model
from ovisnb.train.savings import savings
from ovisnb.train.trainer import SftTrainer

LONG = [(96, 0)] * 3
PICTURES = [(90, 4)] * 3
MIXED = [(60, 1), (24, 0), (40, 2), (30, 1)]
ROWS = {
    "pictures": ({}, PICTURES),
    "batch": ({"per_device_train_batch_size": 4}, MIXED * 3),
    "packed": ({"per_device_train_batch_size": 4, "packing": True}, MIXED * 3),
    "accumulation": ({"gradient_accumulation_steps": 2}, PICTURES * 2),
    "bf16": ({"bf16": True}, PICTURES),
    "bf16, checkpointing": ({"bf16": True, "gradient_checkpointing": True}, PICTURES),
    "only llm": ({"train_modules": "llm"}, PICTURES),
    "frozen tower": ({"freeze_vision_tower": True}, PICTURES),
    "adafactor": ({"optim": "adafactor"}, LONG),
    "eager": ({"attn_implementation": "eager"}, LONG),
    "lora": ({"use_lora": True, "lora_r": 8}, PICTURES),
    "lora, bf16": ({"use_lora": True, "lora_preset": "all-linear", "lora_r": 8, "bf16": True}, PICTURES),
}


def shape(hidden=64, layers=2, vocab=1500, visual=600) -> Ovis2_5Config:
    text = Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=3 * hidden,
        vocab_size=vocab,
        tie_word_embeddings=True,
    )
    vision = Ovis2_5VisionConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        intermediate_size=96,
        num_attention_heads=2,
        image_size=64,
        vocab_size=visual,
    )
    ids = {f"{kind}_token_id": vocab - 5 + at for at, kind in enumerate(("image", "image_start", "image_end"))}
    ids |= {"video_start_token_id": vocab - 2, "video_end_token_id": vocab - 1}
    return Ovis2_5Config(text_config=text, vision_config=vision, visual_vocab_size=visual, **ids)


def samples_of(sizes, config, pixels=False):
    """Samples of so many tokens and pictures of 8 x 8 patches; half of the text is supervised."""
    atom, start, end = config.visual_token_ids[:3]
    made = []
    for number, (tokens, pictures) in enumerate(sizes):
        picture = [start, *[atom] * 16, end]
        text = torch.arange(tokens - len(picture) * pictures)
        ids = torch.cat([torch.tensor(picture * pictures, dtype=torch.int64), text])
        labels = torch.where(torch.arange(len(ids)) < len(ids) - len(text) // 2, -100, ids)
        grid = torch.tensor([[1, 8, 8]] * pictures) if pictures else None
        values = torch.zeros(64 * pictures, 768) if pictures and pixels else None
        made.append(Encoded(str(number), ids, labels, [], values, grid, None, None, 0))
    return made


class Lazily(torch.utils.data.Dataset):
    """The samples with their pixels, made when they are asked for, as a run reads them."""

    def __init__(self, sizes, config):
        self.sizes, self.config = sizes, config

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return samples_of([self.sizes[index]], self.config, pixels=True)[0]


def measured(settings, config, sizes) -> Ledger:
    """What three steps of the Trainer take."""
    torch.manual_seed(0)
    config._attn_implementation = settings.attn_implementation or "sdpa"
    model = Ovis2_5ForConditionalGeneration(config)
    if settings.use_lora:
        model.config.name_or_path = "base"
        model = adapted(model.to(torch.bfloat16 if settings.bf16 else torch.float32), settings)
    else:
        freeze(model, settings)
    trainer = SftTrainer(
        model=model,
        args=training_arguments(settings, evaluates=False),
        processor=None,
        settings=settings,
        data_collator=lambda some: collate_samples(some, packed=settings.packing),
        train_dataset=Lazily(sizes, config),
    )
    with Ledger(model) as ledger:
        trainer.train()
    return ledger


def of(tmp_path, **changes) -> Settings:
    values = {"output_dir": str(tmp_path / "run"), "max_steps": 3, "save_strategy": "no", "report_to": "none"}
    return Settings.from_dict(values | changes)


@pytest.mark.parametrize("row", ROWS)
def test_the_plan_is_within_fifteen_hundredths_of_what_a_run_takes(row, tmp_path):
    changes, sizes = ROWS[row]
    config, settings = shape(), of(tmp_path, **changes)
    plan = memory_plan(settings, config, samples_of(sizes, config), device="cpu")
    found = measured(settings, config, sizes)
    assert plan.total == pytest.approx(found.peak, rel=0.15)
    assert plan.parts["weights"] == pytest.approx(found.at_peak["weights"], rel=0.01)


def test_the_released_shape_is_planned_from_its_config_alone():
    text = Qwen3Config(
        hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=6144, vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    settings = Settings.from_dict({"train_modules": "vte", "multimodal_max_length": 300, "text_max_length": 10})
    plan = memory_plan(settings, Ovis2_5Config(text_config=text), device="cuda")
    assert plan.parts["weights"] == pytest.approx(4 * 2.57e9, rel=0.01)
    # AdamW's two numbers for each of the table's
    assert plan.parts["optimizer"] == pytest.approx(8 * 65536 * 2048, rel=0.01)


def test_the_parts_add_up_and_each_says_where_it_comes_from(tmp_path):
    plan = memory_plan(of(tmp_path), config := shape(), samples_of(PICTURES, config))
    assert sum(plan.parts.values()) == plan.total == max(plan.peaks.values())
    assert plan.parts.keys() <= set(PARTS)
    text = plan.text()
    for part, size in plan.parts.items():
        assert part in text and (size < plan.total / 1000 or size_of(size) in text and plan.formulas[part] in text)
    assert "rest " not in text or min(plan.parts.values()) < plan.total / 1000
    assert "3 samples" not in text and "1 sample, 90 tokens" in text


def test_the_worst_batch_is_planned_and_a_middling_one_told(tmp_path):
    config = shape()
    settings = of(tmp_path, per_device_train_batch_size=1)
    sizes = [(30, 0)] * 8 + [(90, 4)]
    plan = memory_plan(settings, config, samples_of(sizes, config))
    assert plan.batch.tokens == 90 and plan.batch.patches == 256
    assert plan.mean < plan.total
    lone = memory_plan(settings, config, samples_of([(30, 0)], config))
    assert lone.total == lone.mean == plan.mean


def test_without_data_the_limits_of_the_settings_count(tmp_path):
    limits = {"text_max_length": 50, "single_image_max_pixels": 64 * 64, "single_image_min_pixels": 32 * 32}
    long, short = (memory_plan(of(tmp_path, multimodal_max_length=n, **limits), shape()) for n in (400, 100))
    assert (long.batch.tokens, short.batch.tokens) == (400, 100)
    assert long.batch.patches == short.batch.patches == 16  # a picture of 64 x 64 pixels
    assert long.mean is None and long.total > short.total
    twice = memory_plan(of(tmp_path, multimodal_max_length=100, per_device_train_batch_size=2, **limits), shape())
    assert twice.batch.tokens == 200


def test_processes_share_what_their_wrapper_shares(tmp_path):
    config, sizes = shape(), PICTURES

    def parts(world=4, **changes):
        settings = of(tmp_path, gradient_accumulation_steps=2, **changes)
        return memory_plan(settings, config, samples_of(sizes, config), world, "cuda").parts

    one, ddp = parts(world=1), parts()
    assert ddp["communication"] == one["gradients"]  # the buckets are a second copy
    assert ddp["weights"] == one["weights"]
    zero = {stage: parts(deepspeed=f"zero{stage}") for stage in range(4)}
    assert zero[1]["optimizer"] == pytest.approx((one["optimizer"] + one["weights"]) / 4, rel=0.01)  # and its own copy
    assert zero[1]["gradients"] == one["gradients"]
    assert zero[2]["gradients"] == pytest.approx(one["gradients"] / 4, rel=0.3)
    assert zero[3]["weights"] == pytest.approx(one["weights"] / 4, rel=0.01)
    assert "optimizer" not in parts(deepspeed="zero2_offload")
    half = parts(deepspeed="zero3", bf16=True)
    assert half["weights"] == pytest.approx(one["weights"] / 8, rel=0.01)
    fsdp = parts(fsdp=True)
    assert fsdp["weights"] == pytest.approx(one["weights"] / 4, rel=0.01) and "gathered weights" in fsdp


def test_four_bits_take_half_a_byte_and_their_scales(golden, tmp_path):
    config = shape(hidden=128, vocab=600)
    lora = {"use_lora": True, "lora_r": 4, "bf16": True, "model_path": str(golden / "checkpoint")}
    whole, small = (
        memory_plan(of(tmp_path, **lora, load_in_4bit=four), config, samples_of(LONG, config)) for four in (False, True)
    )
    hidden, layers = 128, 2
    linear = layers * (2 * hidden * 64 + 2 * hidden * 32 + 3 * hidden * 3 * hidden)  # q, o; k, v; three of the MLP
    linear += layers * (4 * 32 * 32 + 2 * 32 * 96)  # of the tower
    assert whole.parts["weights"] - small.parts["weights"] == pytest.approx(linear * (2 - 0.516), rel=0.01)


def test_eight_bits_of_state(tmp_path):
    config = shape()
    plan = memory_plan(of(tmp_path, optim="adamw_bnb_8bit"), config, samples_of(LONG, config))
    whole = memory_plan(of(tmp_path), config, samples_of(LONG, config))
    kept = 0
    for name, parameter in Ovis2_5ForConditionalGeneration(config).named_parameters():
        size = parameter.numel()  # small tensors and embeddings stay in 32 bit
        tables = ("embed_tokens.weight", "position_embedding.weight", "embeddings_table.weight")
        kept += size * (8 if size < 4096 or name.endswith(tables) else 2 + 8 / 256)
    assert plan.parts["optimizer"] == pytest.approx(kept, rel=0.001)
    assert plan.parts["optimizer"] < 0.7 * whole.parts["optimizer"]
    assert (
        "optimizer" not in memory_plan(of(tmp_path, optim="paged_adamw_8bit"), config, samples_of(LONG, config)).parts
    )


def test_an_optimizer_that_cannot_be_planned_is_named(tmp_path):
    with pytest.raises(SettingsError, match='optim "galore_adamw" cannot be planned'):
        memory_plan(of(tmp_path, optim="galore_adamw"), config := shape(), samples_of(LONG, config))


def test_savings_come_in_their_order_with_what_each_leaves(tmp_path):
    config, settings = shape(layers=4), of(tmp_path, per_device_train_batch_size=4)
    samples = samples_of([(90, 4)] * 4, config)
    plan = memory_plan(settings, config, samples, device="cuda")
    found = savings(settings, plan, config, read=lambda changed: samples)
    assert [each.saves for each in found] == sorted((each.saves for each in found), reverse=True)
    changes = [each.changes for each in found]
    assert {"gradient_checkpointing": True} in changes
    assert not any("attn_implementation" in change for change in changes)
    half = next(each for each in found if "per_device_train_batch_size" in each.changes)
    assert half.changes == {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert half.saves == plan.total - half.left
    assert str(half).startswith("--per_device_train_batch_size 2 --gradient_accumulation_steps 2: saves ")
    again = memory_plan(Settings.from_dict(settings.to_dict() | half.changes), config, samples, device="cuda")
    assert again.total == half.left


def test_a_new_ovis_is_planned_from_the_configs_of_its_parts(golden, tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = Qwen3Config(vocab_size=640, num_key_value_heads=1, head_dim=16, **small)
    text.save_pretrained(tmp_path / "llm")
    Qwen2Tokenizer.from_pretrained(golden / "checkpoint").save_pretrained(tmp_path / "llm")
    SiglipVisionConfig(image_size=64, patch_size=16, **small).save_pretrained(tmp_path / "vit")
    parts = {"llm_name_or_path": str(tmp_path / "llm"), "vit_name_or_path": str(tmp_path / "vit")}
    limits = {"visual_vocab_size": 64, "multimodal_max_length": 60, "text_max_length": 60, "stage": 1}
    plan = memory_plan(of(tmp_path, **parts, **limits))
    vit = SiglipVisionConfig(image_size=64, patch_size=16, **small)
    model, _ = assemble(
        text, vit, visual_vocab_size=64, tokenizer=Qwen2Tokenizer.from_pretrained(golden / "checkpoint")
    )
    assert plan.parts["weights"] == sum(parameter.nbytes for parameter in model.parameters()) + sum(
        buffer.nbytes for buffer in model.buffers()
    )
    named, read = planned_model(of(tmp_path, **parts, **limits))
    assert named.visual_token_ids == model.config.visual_token_ids and read(of(tmp_path)) is None
    with pytest.raises(SettingsError, match="No Ovis can be planned of llm_name_or_path"):
        memory_plan(of(tmp_path, **parts | {"vit_name_or_path": str(tmp_path / "gone")}))


def test_a_step_of_the_same_shape_is_traced_once(tmp_path, monkeypatch):
    config, calls = shape(), []
    monkeypatch.setattr("ovisnb.train.plan.trace", lambda step, trace=planning.trace: calls.append(1) or trace(step))
    planning._trace_once.cache_clear()
    one, two = samples_of([(33, 1), (33, 1)], config)
    two.input_ids[-3:] += 1
    first = memory_plan(of(tmp_path), config, [one])
    again = memory_plan(of(tmp_path / "other", seed=7), config, [two])
    assert len(calls) == 1 and again.parts == first.parts
    for changes in ({"bf16": True}, {"freeze_vision_tower": True}, {"optim": "sgd"}, {"label_smoothing_factor": 0.1}):
        memory_plan(of(tmp_path, **changes), config, [one])
    memory_plan(of(tmp_path), shape(layers=3), [one])
    memory_plan(of(tmp_path), config, [one], device="cuda")
    assert len(calls) == 7


def test_a_table_of_attention_scores_is_named_where_it_can_be_left_out(tmp_path):
    config, settings = shape(), of(tmp_path, attn_implementation="eager")
    samples = samples_of([(700, 0)], config)
    found = savings(settings, memory_plan(settings, config, samples), config, read=lambda changed: samples)
    assert {"attn_implementation": "sdpa"} in [each.changes for each in found[:2]]


def test_data_is_read_where_the_settings_name_it(golden, tmp_path):
    record = {
        "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day to you."}],
        "id": "a",
    }
    broken = {"id": "b", "image": "none.png", "conversations": [{"from": "human", "value": "<image>"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(broken) + "\n")
    settings = of(tmp_path, model_path=str(golden / "checkpoint"), data_path=str(tmp_path / "data.jsonl"))
    plan = memory_plan(settings)
    assert plan.batch.samples == 1 and plan.batch.patches == 0
    assert plan.batch.tokens < 40
