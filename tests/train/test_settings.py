"""One settings object from a file, flags or a dict: the same names, the same result, one-sentence errors."""

from __future__ import annotations

import json
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ovisnb.train import Settings, SettingsError


def test_file_flags_and_dict_agree(tmp_path):
    values = {
        "model_path": "m",
        "data_path": ["a.json", "b.json"],
        "bf16": True,
        "learning_rate": 1e-4,
        "train_modules": "visual_tokenizer.head|vte",
        "save_total_limit": None,
        "max_steps": 7,
    }
    file = tmp_path / "sft.json"
    file.write_text(json.dumps(values))
    flags = [
        "--model_path",
        "m",
        "--data_path",
        "a.json",
        "b.json",
        "--bf16",
        "--learning_rate=1e-4",
        "--train_modules",
        "visual_tokenizer.head|vte",
        "--save_total_limit",
        "none",
        "--max_steps",
        "7",
    ]
    settings = Settings.from_dict(values)
    assert settings.bf16 is True and settings.learning_rate == 1e-4 and settings.max_steps == 7
    assert Settings.from_json(file) == settings
    assert Settings.from_args(flags) == settings
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "sft.json"
    file.write_text(json.dumps({"num_epochs": 3, "bf16": True, "output_dir": "here"}))
    settings = Settings.from_args([str(file), "--num_train_epochs", "1", "--bf16", "false"])
    assert (settings.num_train_epochs, settings.bf16, settings.output_dir) == (1.0, False, "here")


@pytest.mark.parametrize(
    ("alias", "name", "value", "kept"),
    [
        ("model_name", "model_path", "AIDC-AI/Ovis2.5-9B", "AIDC-AI/Ovis2.5-9B"),
        ("ovis_pretrained_path", "model_path", "m", "m"),
        ("sft_model_path", "model_path", "m", "m"),
        ("train_data", "data_path", "train.jsonl", ["train.jsonl"]),
        ("val_data", "eval_data_path", "val.jsonl", ["val.jsonl"]),
        ("image_base_path", "image_folder", "images", "images"),
        ("sft_output_dir", "output_dir", "out", "out"),
        ("num_epochs", "num_train_epochs", 3, 3.0),
        ("batch_size", "per_device_train_batch_size", 4, 4),
    ],
)
def test_earlier_names(alias, name, value, kept):
    assert getattr(Settings.from_dict({alias: value}), name) == kept


def test_the_earlier_configuration_file_as_it_is():
    file = {
        "model_path": "AIDC-AI/Ovis2.5-9B",
        "data_name": "custom_data",
        "data_type": "conversation",
        "data_path": "./data/train_data.json",
        "image_folder": "./data/images",
        "output_dir": "./checkpoints/ovis25_finetune",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 2e-5,
        "train_modules": "all",
        "freeze_vision_tower": False,
        "freeze_llm": False,
        "ovis_pretrained_path": "AIDC-AI/Ovis2.5-9B",
        "stage": 3,
        "multimodal_max_length": 8192,
        "text_max_length": 4096,
        "single_image_max_pixels": 3211264,
        "multiple_image_max_pixels": 802816,
    }
    settings = Settings.from_dict(file)
    assert (settings.stage, settings.learning_rate, settings.single_image_max_pixels) == ("sft", 2e-5, 1792 * 1792)
    assert Settings.from_args(["--stage", "sft", "--train_data", "t.jsonl", "--bf16"]).data_path == ["t.jsonl"]


def test_two_names_of_one_setting():
    assert Settings.from_dict({"model_path": "m", "ovis_pretrained_path": "m"}).model_path == "m"
    with pytest.raises(SettingsError, match="'model_path' and 'ovis_pretrained_path' mean the same .*'m' and 'n'"):
        Settings.from_dict({"model_path": "m", "ovis_pretrained_path": "n"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "Unknown setting 'learning_rat': did you mean 'learning_rate'"),
        ({"freeze_vision": True}, "did you mean 'freeze_vision_tower'"),
        ({"lora_rk": 8}, "Unknown setting 'lora_rk': did you mean 'lora_r'"),
        ({"zzz": 1}, "Unknown setting 'zzz': `ovisnb train --help` lists"),
        ({"learning_rate": "fast"}, "'learning_rate' cannot be 'fast'"),
        ({"max_steps": 2.5}, "'max_steps' cannot be 2.5"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"bf16": "perhaps"}, "'bf16' cannot be 'perhaps'"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both on"),
        ({"warmup_ratio": 0.1, "warmup_steps": 10}, "warmup_ratio and warmup_steps are both given"),
        ({"video_min_pixels": 900, "video_max_pixels": 400}, "video_min_pixels 900 is above video_max_pixels 400"),
        ({"train_modules": "llm:fast|vte"}, "'fast' is no learning rate"),
        ({"train_modules": "vision"}, "is no module: .*The modules are all, llm"),
        ({"train_modules": "llm|vte", "freeze_llm": True}, "freeze_llm contradicts train_modules"),
        ({"data_type": "video"}, "'data_type' cannot be 'video': input should be 'conversation' or 'caption'"),
        ({"caption_template": "<image>"}, 'caption_template has no effect here: it is for data_type "caption"'),
        ({"allow_absolute": True}, "allow_absolute is given without an image_folder"),
        ({"min_frames": 9, "max_frames": 4}, "min_frames 9 is above max_frames 4"),
        ({"stage": "dpo"}, "'stage' cannot be 'dpo': input should be 'sft'"),
        ({"data_path": 5}, "cannot be 5: input should be a valid string"),
        ({"data_path": ["a.json", None]}, "cannot be None: input should be a valid string"),
        ({"output_dir": ""}, "'output_dir' cannot be '': it is empty"),
        ({"train_modules": " "}, "'train_modules' cannot be ' ': it is empty"),
        ({"data_path": ["a.json", ""]}, "'data_path' cannot be .*: it is empty"),
        ({"deepspeed": ""}, "'deepspeed' cannot be '': it is empty"),
        ({"output_dir": "a\0b"}, "'output_dir' cannot be .*: it holds a character that no path has"),
        ({"stage": True}, "'stage' cannot be 'True'"),
        ({"seed": 2**32}, "'seed' cannot be 4294967296: input should be less than"),
        ({"model_init_seed": 2**64, "llm_name_or_path": "l", "vit_name_or_path": "v"}, "'model_init_seed' cannot be"),
        ({"train_modules": "vit"}, "did you mean 'visual_tokenizer.vit'"),
        ({"train_modules": "head:1e-4|llm"}, "did you mean 'visual_tokenizer.head'"),
        ({3: 4}, "Unknown setting '3'"),
        ({None: 4}, "Unknown setting 'None'"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(values, message):
    with pytest.raises(SettingsError, match=message) as caught:
        Settings.from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rate"], "--learning_rate needs a value"),
        (["--output_dir", "a", "b"], "--output_dir takes one value, not 2"),
        (["--learning_rte", "1"], "did you mean 'learning_rate'"),
        (["missing.json"], "no settings file missing.json"),
        (["-lr", "1e-4"], "'-lr' is not a flag"),
        (["--output_dir="], "'output_dir' cannot be '': it is empty"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(SettingsError, match=message):
        Settings.from_args(argv)


def test_none_is_a_word_where_a_setting_cannot_be_none():
    settings = Settings.from_args(["--report_to", "none", "--save_total_limit", "none", "--image_folder=None"])
    assert (settings.report_to, settings.save_total_limit, settings.image_folder) == ("none", None, None)


def test_broken_file_names_the_line(tmp_path):
    file = tmp_path / "sft.json"
    file.write_text('{\n"bf16": true,\n"fp16" false}')
    with pytest.raises(SettingsError, match="line 3"):
        Settings.from_json(file)
    file.write_text("[1]")
    with pytest.raises(SettingsError, match="not a list"):
        Settings.from_json(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"max_steps": 3, "max_steps": 4}', "gives 'max_steps' twice, 3 and 4"),
        ('{"sft_config": {"bf16": true, "bf16": false}}', "gives 'bf16' twice"),
        ("[" * 100_000, "is no valid JSON"),
        ('{"max_steps": ' + "9" * 5000 + "}", "is no valid JSON"),
    ],
)
def test_a_file_that_json_lets_pass_or_cannot_read(tmp_path, text, message):
    file = tmp_path / "sft.json"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        Settings.from_json(file)
    assert len(str(caught.value)) < 300
    file.write_bytes("{}".encode("utf-16"))
    with pytest.raises(SettingsError, match="not UTF-8"):
        Settings.from_json(file)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_lora": False, "lora_r": 64}, "lora_r has no effect here: it needs use_lora"),
        ({"load_in_4bit": True}, "load_in_4bit has no effect here: it needs use_lora"),
        ({"lora_preset": "llm", "lora_target_modules": "q_proj"}, "lora_preset has no effect here: it gives way to"),
        ({"lora_r": 8, "stage": 1}, "use_lora contradicts stage 1"),
        ({"lora_r": 8, "freeze_llm": True}, "freeze_llm contradicts use_lora"),
        ({"lora_r": 8, "train_modules": "llm"}, 'train_modules "llm" has no effect with use_lora'),
        ({"lora_preset": "llm+vision", "freeze_vision_tower": True}, "freeze_vision_tower contradicts lora_preset"),
        ({"model_path": "m", "llm_name_or_path": "l"}, "model_path and llm_name_or_path are both given"),
        ({"llm_name_or_path": "l"}, "llm_name_or_path is given without vit_name_or_path"),
        ({"vit_name_or_path": "v"}, "vit_name_or_path has no effect here: it is for a new Ovis"),
        ({"model_path": "m", "visual_vocab_size": 1024}, "visual_vocab_size has no effect here"),
        ({"deepspeed": "zero2", "fsdp": True}, "deepspeed and fsdp both shard"),
        ({"packing": True, "attn_implementation": "eager"}, "packing needs attention within each sample"),
        ({"max_batch_tokens": 4096, "per_device_train_batch_size": 4}, "both decide how many samples"),
        ({"vision_cache": "c"}, "vision_cache keeps features .* visual_tokenizer.vit and .* would train"),
        ({"vision_cache": "c", "freeze_vision_tower": True}, "visual_tokenizer.head and vte would train"),
        ({"vision_cache": "c", "lora_preset": "all-linear"}, 'lora_preset "all-linear" trains them'),
        (
            {"train_modules": "visual_tokenizer.vit.last_block", "freeze_vision_tower": True},
            "freeze_vision_tower contradict",
        ),
        ({"train_modules": "llm|llm:1e-4"}, "names llm twice"),
        ({"train_modules": "visual_tokenizer.last_block"}, "did you mean 'visual_tokenizer.vit.last_block'"),
        ({"train_modules": "llm:-1"}, "'-1' is no learning rate"),
        ({"train_modules": "llm:nan"}, "'nan' is no learning rate"),
        (
            {"memory_efficient": True, "gradient_checkpointing": False},
            "memory_efficient turns gradient_checkpointing on",
        ),
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold has no effect here: it needs early_stopping_pat"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "early_stopping_patience needs evaluations"),
        ({"load_best_model_at_end": True, "save_steps": 0}, "load_best_model_at_end needs checkpoints"),
        ({"eval_strategy": "epoch", "eval_steps": 5}, 'eval_strategy is "epoch" and eval_steps is given'),
        ({"save_strategy": "epoch", "save_steps": 5}, "save_steps has no effect here"),
        ({"streaming": True, "max_steps": 5, "group_by_length": True}, "group_by_length needs the lengths"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor has no effect here"),
        ({"torch_compile_mode": "default"}, "torch_compile_mode has no effect here: it needs torch_compile"),
        ({"learning_rate": True}, "'learning_rate' cannot be True: input should be a number"),
        ({"learning_rate": "inf"}, "'learning_rate' cannot be 'inf'"),
        (
            {"conversation_formatter_class": "GemmaConversationFormatter"},
            "input should be 'Qwen3ConversationFormatter'",
        ),
    ],
)
def test_what_contradicts_or_has_no_effect(values, message):
    with pytest.raises(SettingsError, match=message) as caught:
        Settings.from_dict(values)
    assert "\n" not in str(caught.value)


def test_what_goes_together():
    assert Settings.from_dict({"vision_cache": "c", "train_modules": "llm"}).trained == ("llm",)
    assert Settings.from_dict({"vision_cache": "c", "lora_r": 8}).use_lora
    assert Settings.from_dict({"train_modules": "all|visual_tokenizer:0|vte:0", "vision_cache": "c"})
    assert Settings.from_dict({"memory_efficient": "true"}).gradient_checkpointing
    settings = Settings.from_dict({"learning_rate": "1e-4", "train_modules": "visual_tokenizer.head:2e-3|llm"})
    assert settings.rates == {"visual_tokenizer.head": 2e-3, "llm": 1e-4}
    assert Settings.from_dict({"lora_r": 8, "train_modules": "llm:1e-4"}).rates == {"llm": 1e-4}
    assert Settings.from_dict({"stage": 1}).trained == (
        "visual_tokenizer.vit.last_block",
        "visual_tokenizer.head",
        "vte",
    )
    assert [Settings.from_dict({"stage": stage}).stage for stage in (1, "2", 3, "3")] == [1, 2, "sft", "sft"]


def values_of(name):
    """Values that a setting may have by itself."""
    field = Settings.model_fields[name]
    kinds = [field.annotation, *get_args(field.annotation)]
    literals = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    none = [st.none()] if type(None) in kinds else []
    if literals:
        return st.one_of(st.sampled_from(literals), *none)
    if name == "train_modules":
        return st.sampled_from(["all", "llm", "llm:1e-5|vte", "visual_tokenizer.head:1e-4|llm:2e-5"])
    if name == "lr_scheduler_kwargs":
        return st.one_of(st.just({"num_cycles": 2}), *none)
    if list[str] in kinds:
        return st.lists(st.sampled_from(["a", "b.json", "c_d"]), max_size=2, unique=True)
    if bool in kinds:
        return st.one_of(st.booleans(), *none)
    if int in kinds:
        return st.one_of(st.integers(5, 9), *none)
    if float in kinds:
        return st.one_of(st.floats(0.001, 0.9), *none)
    return st.one_of(st.sampled_from(["word", "some words"]), *none)


@st.composite
def some_settings(draw):
    names = draw(
        st.lists(st.sampled_from(sorted(set(Settings.model_fields) - {"grpo_config"})), max_size=6, unique=True)
    )
    return {name: draw(values_of(name)) for name in names}


def made(values):
    try:
        return Settings.from_dict(values)
    except SettingsError as error:  # a contradiction
        assert "\n" not in str(error)
        return None


@given(some_settings())
def test_a_run_folders_settings_give_the_same_settings(values):
    settings = made(values)
    assume(settings)
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@given(some_settings())
def test_flags_json_and_dict_are_one(tmp_path_factory, values):
    settings = made(values)
    assume(settings)
    flags = []
    for name, value in values.items():
        words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
        if words:
            flags += [f"--{name}", *words]
    assert Settings.from_args(flags) == settings
    file = tmp_path_factory.getbasetemp() / "settings.json"
    file.write_text(json.dumps(values))
    assert Settings.from_json(file) == settings
    assert Settings.from_args([str(file)]) == settings


@given(st.sampled_from(sorted(Settings.model_fields)), st.data())
def test_each_setting_alone_is_taken_or_refused_in_a_sentence(name, data):
    value = data.draw(values_of(name))
    settings = made({name: value})
    if settings is not None and value not in (None, []):
        found = getattr(settings, name)
        assert found == value or found == pytest.approx(value)
