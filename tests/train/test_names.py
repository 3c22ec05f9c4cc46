"""Names of settings: other names, misspelt ones, files of settings, flags, the help page."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ovisnb.train import Settings, SettingsError
from ovisnb.train.names import ALIASES, FILES, SPREAD, edits, nearest

NAMES = [*Settings.model_fields, *ALIASES, *SPREAD, *FILES]
LETTERS = string.ascii_lowercase + string.digits + "_"


def slip(name: str, kind: str, place: int, letter: str) -> str:
    """`name` with one letter left out, put in, changed, or swapped with the next one."""
    place %= len(name)
    if kind == "out":
        return name[:place] + name[place + 1 :]
    if kind == "in":
        return name[:place] + letter + name[place:]
    if kind == "changed":
        return name[:place] + letter + name[place + 1 :]
    return name[:place] + name[place : place + 2][::-1] + name[place + 2 :]


@given(
    st.sampled_from(NAMES),
    st.sampled_from(["out", "in", "changed", "swapped"]),
    st.integers(0),
    st.sampled_from(LETTERS),
)
@example("use_dora", "swapped", 4, "a")
@example("adam_beta1", "in", 8, "1")
def test_one_slip_is_always_put_right(name, kind, place, letter):
    wrong = slip(name, kind, place, letter)
    assume(wrong not in NAMES)
    assert edits(wrong, name) == 1
    as_near = {other for other in NAMES if edits(wrong, other) == 1}
    with pytest.raises(SettingsError, match=f"Unknown setting '{wrong}': did you mean ") as caught:
        Settings.from_dict({wrong: 1})
    assert nearest(wrong, NAMES) in as_near
    if as_near == {name}:
        assert str(caught.value).endswith(f"did you mean '{name}'?")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("Learning-Rate", "learning_rate"),
        ("num_train_epoch", "num_train_epochs"),
        ("lora_rank", "lora_r"),
        ("lora_target_module", "lora_target_modules"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
        ("label_smoothing", "label_smoothing_factor"),
        ("neftune_alpha", "neftune_noise_alpha"),
        ("freeze_vit", "freeze_llm"),
        ("single_image_max_pixel", "single_image_max_pixels"),
    ],
)
def test_other_slips(wrong, right):
    assert nearest(wrong, NAMES) == right


@given(st.text(LETTERS, max_size=8), st.text(LETTERS, max_size=8), st.text(LETTERS, max_size=8))
def test_edits_is_a_distance(a, b, c):
    assert edits(a, a) == 0 and edits(a, b) == edits(b, a) >= abs(len(a) - len(b))
    assert (edits(a, b) == 0) == (a == b)
    assert edits(a + c, b + c) <= edits(a, b)


def test_a_name_that_resembles_nothing_points_to_the_help():
    with pytest.raises(SettingsError, match="Unknown setting 'zero_optimization': `ovisnb train --help` lists"):
        Settings.from_dict({"zero_optimization": {"stage": 2}})


@pytest.mark.parametrize("alias", ALIASES)
def test_every_other_name_leads_to_a_setting(alias):
    assert ALIASES[alias] in Settings.model_fields and alias not in Settings.model_fields


def test_one_name_for_several_gives_way_to_a_settings_own():
    settings = Settings.from_dict({"max_pixels": 448448, "video_max_pixels": 300000, "max_length": 2048})
    assert settings.single_image_max_pixels == settings.multiple_image_max_pixels == 448448
    assert settings.video_max_pixels == 300000
    assert settings.multimodal_max_length == settings.text_max_length == 2048


def write(folder, name, **values):
    (folder / name).write_text(json.dumps(values))
    return str(folder / name)


def test_files_are_merged_and_flags_win(tmp_path):
    model = write(tmp_path, "model.json", model_name="m", attn_implementation="sdpa")
    data = write(tmp_path, "data.json", train_data="t.jsonl", image_base_path="images", max_length=1024)
    sft = write(tmp_path, "sft.json", learning_rate=2e-5, bf16=True, lora_r=128, num_train_epochs=3)
    argv = ["--model_config", model, "--data_config", data, "--sft_config", sft, "--num_epochs", "1", "--stage", "sft"]
    settings = Settings.from_args(argv)
    assert (settings.model_path, settings.data_path, settings.image_folder) == ("m", ["t.jsonl"], "images")
    assert (settings.learning_rate, settings.bf16, settings.lora_r, settings.use_lora) == (2e-5, True, 128, True)
    assert (settings.num_train_epochs, settings.text_max_length) == (1.0, 1024)
    # the same in one file, or in a notebook
    whole = write(tmp_path, "whole.json", model_config=model, data_config=data, sft_config=sft, num_epochs=1)
    assert Settings.from_json(whole) == settings
    assert (
        Settings.from_dict({"model_config": model, "data_config": data, "sft_config": sft, "num_epochs": 1}) == settings
    )
    # pixels for all kinds as a flag win over one kind in a file
    some = write(tmp_path, "some.json", single_image_max_pixels=900000)
    assert Settings.from_args([some, "--max_pixels", "448448"]).single_image_max_pixels == 448448


def test_files_that_differ_are_told(tmp_path):
    one, two = write(tmp_path, "1.json", bf16=True), write(tmp_path, "2.json", bf16=False)
    with pytest.raises(SettingsError, match="model_config and sft_config give 'bf16' different values, True and False"):
        Settings.from_args(["--model_config", one, "--sft_config", two])
    with pytest.raises(SettingsError, match="grpo_config has no effect on stage 'sft'"):
        Settings.from_args(["--grpo_config", two])
    with pytest.raises(SettingsError, match="sft_config has no effect on stage 'grpo'"):
        Settings.from_args(["--stage", "grpo", "--sft_config", two])
    with pytest.raises(SettingsError, match=r"no settings file .*missing\.json"):
        Settings.from_args(["--sft_config", str(tmp_path / "missing.json")])
    inner = write(tmp_path, "3.json", sft_config="1.json")
    with pytest.raises(SettingsError, match="model_config names another file of settings, sft_config"):
        Settings.from_args(["--model_config", inner])
    with pytest.raises(SettingsError, match="cannot be read"):
        Settings.from_json(tmp_path)


def test_both_stages(tmp_path):
    sft = write(tmp_path, "sft.json", output_dir="one", learning_rate=2e-5)
    grpo = write(tmp_path, "grpo.json", output_dir="two", learning_rate=5e-6, beta=0.2, bf16=False)
    argv = ["--stage", "both", "--sft_config", sft, "--grpo_config", grpo, "--bf16", "--model_path", "m"]
    settings = Settings.from_args(argv)
    assert (settings.output_dir, settings.learning_rate, settings.bf16, settings.beta) == ("one", 2e-5, True, 0.1)
    # what is no flag differs in the second stage
    assert settings.grpo_config == {"output_dir": "two", "learning_rate": 5e-6, "beta": 0.2}
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    second = Settings.from_dict(settings._grpo_values())
    assert (second.stage, second.grpo_output_dir, second.learning_rate, second.bf16) == ("grpo", "two", 5e-6, True)
    bad = write(tmp_path, "bad.json", learning_rat=1)
    with pytest.raises(SettingsError, match="did you mean 'learning_rate'"):
        Settings.from_args(["--stage", "both", "--grpo_config", bad])
    bad = write(tmp_path, "bad.json", num_generations=1)
    with pytest.raises(SettingsError, match="'num_generations' cannot be 1"):
        Settings.from_args(["--stage", "both", "--grpo_config", bad])


def test_the_grpo_stage_has_one_run_folder():
    assert Settings.from_dict({"stage": "grpo", "output_dir": "here"}).grpo_output_dir == "here"
    assert Settings.from_dict({"stage": "grpo"}).grpo_output_dir == "outputs/grpo"
    with pytest.raises(SettingsError, match="output_dir and grpo_output_dir differ"):
        Settings.from_dict({"stage": "grpo", "output_dir": "here", "grpo_output_dir": "there"})


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--lora_target_modules", "q_proj,k_proj"], "lora_target_modules", ["q_proj", "k_proj"]),
        (["--lora_target_modules", "q_proj", "k_proj"], "lora_target_modules", ["q_proj", "k_proj"]),
        (
            ["--lora_modules_to_save=vte, visual_tokenizer.head"],
            "lora_modules_to_save",
            ["vte", "visual_tokenizer.head"],
        ),
        (["--report_to", "tensorboard,wandb"], "report_to", "tensorboard,wandb"),
        (["--lr_scheduler_kwargs", '{"num_cycles": 2}'], "lr_scheduler_kwargs", {"num_cycles": 2}),
        (["--learning-rate", "1e-4"], "learning_rate", 1e-4),
        (["--bf16", "True"], "bf16", True),
        (["--resume", "no"], "resume", False),
        (["--deepspeed", "zero2"], "deepspeed", "zero2"),
        (["--vit_fullatt_block_indexes", "7|15", "--llm_name_or_path", "l", "--vit_name_or_path", "v"],)
        + ("vit_fullatt_block_indexes", "7|15"),
        (["--eval_steps", "null"], "eval_steps", None),
        (["--adam_epsilon=1e-6"], "adam_epsilon", 1e-6),
    ],
)
def test_values_of_flags(argv, name, value):
    assert getattr(Settings.from_args(argv), name) == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bf16", "--bf16"], "--bf16 is given twice"),
        (["--lr_scheduler_kwargs", "num_cycles=2"], "--lr_scheduler_kwargs takes JSON"),
        (["--data_path"], "--data_path needs a value"),
        (["--sft_config"], "--sft_config needs a value"),
        (["--", "x"], "Unknown setting ''"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(SettingsError, match=message):
        Settings.from_args(argv)


def test_the_help_page_names_everything_once_and_fits():
    page = Settings.help()
    lines = page.splitlines()
    for name in NAMES:
        assert (
            sum(line.startswith(f"  --{name} ") or line == f"  --{name}" for line in lines) <= 1 and f"--{name}" in page
        )
    assert max(map(len, lines)) <= 116
    assert sum(line.endswith(":") and not line.startswith(" ") for line in lines) == 14


EARLIER = {
    "staged": "--llm_name_or_path Qwen/Qwen3-8B --vit_name_or_path google/siglip2-so400m-patch16-512 "
    "--visual_vocab_size 65536 --data_path ./data/train_data.json --image_folder ./data/images --train_modules all "
    "--output_dir ./checkpoints/my_ovis_model --num_train_epochs 3 --per_device_train_batch_size 1 "
    "--gradient_accumulation_steps 16 --learning_rate 2e-5 --multimodal_max_length 4096 "
    "--single_image_min_pixels 200704 --single_image_max_pixels 2408448 --multiple_image_max_pixels 802816 "
    "--video_max_pixels 802816 --text_max_length 4096 --multiple_image_min_pixels 200704 --video_min_pixels 200704 "
    "--stage 1 --monitor_step 100 --model_init_seed 0 --data_type caption --accepts_loss_kwargs true "
    "--attn_implementation flash_attention_2 --conversation_formatter_class Qwen3ConversationFormatter "
    "--vit_hidden_stride 2 --vit_window_size 112 --vit_temporal_patch_size 1 --vit_preserve_original_pe true "
    "--vit_use_rope true --bf16 --report_to tensorboard",
    "both": "--stage both --train_data data/train.jsonl --val_data data/val.jsonl --image_base_path data/images "
    "--use_lora --lora_r 128 --lora_alpha 256 --learning_rate 2e-5 --gradient_accumulation_steps 8 --bf16",
    "sft": "--stage sft --train_data data/train.jsonl --val_data data/val.jsonl --image_base_path data/images "
    "--model_name AIDC-AI/Ovis2.5-9B --use_lora --lora_r 128 --lora_alpha 256 --learning_rate 2e-5 --num_epochs 3 "
    "--gradient_accumulation_steps 8 --sft_output_dir outputs/sft --bf16 --memory_efficient --max_pixels 448448 "
    "--batch_size 1",
    "grpo": "--stage grpo --train_data data/train.jsonl --image_base_path data/images "
    "--sft_checkpoint outputs/sft/final_model --learning_rate 5e-6 --beta 0.1 --gradient_accumulation_steps 16 "
    "--grpo_output_dir outputs/grpo --bf16",
}


@pytest.mark.parametrize("command", EARLIER)
def test_the_earlier_commands_as_they_are(command):
    settings = Settings.from_args(EARLIER[command].split())
    assert Settings.from_dict(settings.to_dict()) == settings
    found = {
        "staged": (settings.stage, settings.logging_steps, settings.modules.count("|"), settings.vit_use_rope),
        "both": (settings.stage, settings.lora_r, settings.lora_alpha, settings.eval_data_path),
        "sft": (settings.stage, settings.model_path, settings.gradient_checkpointing, settings.video_max_pixels),
        "grpo": (settings.stage, settings.model_path, settings.beta, settings.grpo_output_dir),
    }[command]
    assert (
        found
        == {
            "staged": (1, 100, 0, True),  # train_modules all, said in so many words
            "both": ("both", 128, 256, ["data/val.jsonl"]),
            "sft": ("sft", "AIDC-AI/Ovis2.5-9B", True, 448448),
            "grpo": ("grpo", "outputs/sft/final_model", 0.1, "outputs/grpo"),
        }[command]
    )


@pytest.mark.parametrize(
    "values",
    [
        {
            "model_path": "AIDC-AI/Ovis2.5-9B",
            "data_path": "./data/train_data.json",
            "output_dir": "./checkpoints/ovis25_finetune",
            "deepspeed": "./Ovis/scripts/zero_configs/zero2_cp.json",
            "num_train_epochs": 2,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 32,
            "learning_rate": 5e-5,
        },
        {
            "lora_r": 32,
            "lora_alpha": 64,
            "lora_target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
            "learning_rate": 1e-4,
        },
        {
            "output_dir": "outputs/sft",
            "learning_rate": 2e-5,
            "num_train_epochs": 3,
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "gradient_accumulation_steps": 8,
            "bf16": True,
            "use_lora": True,
            "lora_r": 128,
            "lora_alpha": 256,
            "lora_dropout": 0.1,
        },
        {"train_modules": "vte", "freeze_vision_tower": True, "freeze_llm": True},
        {
            "gradient_checkpointing": True,
            "bf16": True,
            "torch_compile": True,
            "attn_implementation": "flash_attention_2",
        },
    ],
)
def test_the_earlier_files_as_they_are(values):
    settings = Settings.from_dict(values)
    for name, value in values.items():
        found = getattr(settings, name)
        assert found == (
            value.split(",") if name == "lora_target_modules" else [value] if name == "data_path" else value
        )
    assert settings.use_lora == ("lora_r" in values)


def test_the_earlier_grpo_file_says_its_stage_by_what_it_holds():
    file = {
        "sft_model_path": "./Ovis/checkpoints/ovis25_finetune_final",
        "num_generations": 4,
        "tool_usage_weight": 0.4,
        "bbox_validity_weight": 0.3,
        "reasoning_quality_weight": 0.3,
    }
    settings = Settings.from_dict(file)
    assert (settings.stage, settings.model_path) == ("grpo", "./Ovis/checkpoints/ovis25_finetune_final")
    assert Settings.from_dict(settings.to_dict()) == settings
    with pytest.raises(SettingsError, match="bbox_validity_weight has no effect here: it is for the grpo stage"):
        Settings.from_dict(file | {"stage": "sft"})
