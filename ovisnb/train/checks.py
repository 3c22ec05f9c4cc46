"""Settings that contradict each other, or that have no effect on this run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ovisnb.train.names import SettingsError, nearest

if TYPE_CHECKING:
    from ovisnb.train.settings import Settings

# What `train_modules` may name, joined by "|".
MODULES = (
    "all",
    "llm",
    "visual_tokenizer",
    "visual_tokenizer.head",
    "visual_tokenizer.vit",
    "visual_tokenizer.vit.last_block",
    "vte",
)

# The parts that together are the model.
PARTS = ("llm", "visual_tokenizer.vit", "visual_tokenizer.head", "vte")

# Settings of the grpo stage; any of them means that stage where none is given.
GRPO = (
    "grpo_output_dir",
    "beta",
    "num_generations",
    "tool_usage_weight",
    "bbox_validity_weight",
    "reasoning_quality_weight",
)

# Settings that only mean something under a condition: names, the condition, and why they are idle without it.
CONDITIONS: tuple[tuple[tuple[str, ...], Callable[[Settings], bool], str], ...] = (
    (
        (
            "vit_name_or_path",
            "visual_vocab_size",
            "vit_hidden_stride",
            "vit_window_size",
            "vit_temporal_patch_size",
            "vit_fullatt_block_indexes",
            "vit_preserve_original_pe",
            "vit_use_rope",
            "model_init_seed",
        ),
        lambda s: s.llm_name_or_path is not None,
        "is for a new Ovis: give llm_name_or_path, or remove it",
    ),
    (
        (
            "lora_preset",
            "lora_target_modules",
            "lora_modules_to_save",
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "use_dora",
            "load_in_4bit",
        ),
        lambda s: s.use_lora,
        "needs use_lora: turn that on, or remove it",
    ),
    (("lora_preset",), lambda s: not s.lora_target_modules, "gives way to lora_target_modules: choose one"),
    (
        GRPO,
        lambda s: s.stage in ("grpo", "both"),
        "is for the grpo stage: give stage grpo or both, or remove it",
    ),
    (("output_dir",), lambda s: s.stage != "grpo", "is grpo_output_dir in stage grpo: give that"),
    (("caption_template",), lambda s: s.data_type == "caption", 'is for data_type "caption": change one of them'),
    (("torch_compile_backend", "torch_compile_mode"), lambda s: s.torch_compile, "needs torch_compile"),
    (("dataloader_prefetch_factor",), lambda s: s.dataloader_num_workers > 0, "needs dataloader_num_workers"),
    (
        ("early_stopping_threshold",),
        lambda s: s.early_stopping_patience is not None,
        "needs early_stopping_patience",
    ),
    (
        ("save_steps",),
        lambda s: s.save_strategy in (None, "steps"),
        "is for saving by steps: remove it, or save_strategy",
    ),
    (("save_total_limit",), lambda s: s.saves, "limits checkpoints, and none is saved: remove it, or save some"),
)


def idle(settings: Settings) -> set[str]:
    """Names of the settings that have no effect beside the others."""
    return {name for names, condition, _ in CONDITIONS if not condition(settings) for name in names}


def parse_modules(text: str) -> dict[str, float | None]:
    """train_modules as {module: learning rate, or None where none stands}; raises SettingsError."""
    found: dict[str, float | None] = {}
    for entry in text.split("|"):
        name, colon, rate = (part.strip() for part in entry.partition(":"))
        if name not in MODULES:
            near = next((each for each in MODULES if each.endswith(f".{name}")), None) or nearest(name, MODULES)
            hint = f"did you mean '{near}'? " if near else ""
            raise SettingsError(f'train_modules "{name}" is no module: {hint}The modules are {", ".join(MODULES)}.')
        if name in found:
            raise SettingsError(f'train_modules "{text}" names {name} twice: keep one.')
        found[name] = _rate(name, rate) if colon else None
    return found


def specificity(module: str) -> int:
    """How narrow a module is: "all" 0, "visual_tokenizer" 1, "visual_tokenizer.vit.last_block" 3."""
    return 0 if module == "all" else 1 + module.count(".")


def trained_parts(settings: Settings) -> list[str]:
    """The PARTS of which something trains, by train_modules and what is frozen; a module of rate 0 does not train."""
    named = parse_modules(settings.modules)
    found = []
    for part in PARTS:
        around = [name for name in named if name == "all" or part == name or part.startswith(f"{name}.")]
        within = [name for name in named if name.startswith(f"{part}.")]
        decisive = [*within, *sorted(around, key=specificity)[-1:]]
        if part not in settings.frozen and any(named[name] != 0 for name in decisive):
            found.append(part)
    return found


def _rate(name: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 <= rate < math.inf:
        raise SettingsError(f'train_modules "{name}:{text}": {text!r} is no learning rate, such as 1e-4.')
    return rate


def check(settings: Settings, given: set[str]) -> None:
    """Raise SettingsError for the first contradiction; `given` are the settings that were switched on or given."""
    _check_start(settings)
    for names, condition, why in CONDITIONS:
        if not condition(settings) and (useless := sorted(given & set(names))):
            raise SettingsError(f"{useless[0]} has no effect here: it {why}.")
    _check_what_trains(settings)
    _check_lora(settings)
    _check_length_and_batches(settings)
    _check_evaluation(settings)


def _refuse(*contradictions: tuple[object, str]) -> None:
    """Raise SettingsError with the sentence of the first pair whose condition holds."""
    for holds, sentence in contradictions:
        if holds:
            raise SettingsError(sentence)


def _check_start(s: Settings) -> None:
    _refuse(
        (
            s.model_path and s.llm_name_or_path,
            (
                "model_path and llm_name_or_path are both given: continue a checkpoint with model_path, or start a new Ovis "
                "with llm_name_or_path and vit_name_or_path."
            ),
        ),
        (
            s.llm_name_or_path and not s.vit_name_or_path,
            "llm_name_or_path is given without vit_name_or_path: a new Ovis needs both.",
        ),
        (
            s.allow_absolute and s.image_folder is None,
            "allow_absolute is given without an image_folder: give the folder of relative paths.",
        ),
        (s.deepspeed and s.fsdp, "deepspeed and fsdp both shard the model: choose one."),
        (s.bf16 and s.fp16, "bf16 and fp16 are both on: choose one."),
    )


def _check_what_trains(s: Settings) -> None:
    for switch, frozen in (
        ("freeze_llm", ("llm",)),
        ("freeze_vision_tower", ("visual_tokenizer.vit", "visual_tokenizer.vit.last_block")),
    ):
        if getattr(s, switch) and (both := [name for name in s.trained if name in frozen]):
            raise SettingsError(f'{switch} contradicts train_modules "{s.modules}", which names {both[0]}: remove one.')
    parts = trained_parts(s)
    if not parts:
        frozen = f" and {' and '.join(s.frozen)} is frozen" if s.frozen else ""
        raise SettingsError(f'Nothing is left to train: train_modules is "{s.modules}"{frozen}.')
    seen = [part for part in parts if part != "llm"]
    _refuse(
        (
            s.vision_cache and not s.use_lora and seen,
            (
                f"vision_cache keeps features of parts that do not change, and {' and '.join(seen)} would train: "
                'give train_modules "llm", or remove vision_cache.'
            ),
        ),
        (
            s.vision_cache and s.use_lora and s.lora_preset != "llm",
            (
                f'vision_cache keeps features of parts that do not change, and lora_preset "{s.lora_preset}" trains them: '
                "remove one."
            ),
        ),
        (
            s.neftune_noise_alpha and s.stage in ("grpo",),
            "neftune_noise_alpha is for supervised stages: remove it, or change stage.",
        ),
    )


def _check_lora(s: Settings) -> None:
    if not s.use_lora:
        return
    bare = [name for name, rate in parse_modules(s.modules).items() if rate is None and name != "all"]
    vision = s.freeze_vision_tower and not s.lora_target_modules and s.lora_preset != "llm"
    _refuse(
        (s.stage in (1, 2), f"use_lora contradicts stage {s.stage}, which trains whole modules: use stage sft."),
        (s.llm_name_or_path, "use_lora contradicts llm_name_or_path, whose new parts have to train whole: remove one."),
        (s.freeze_llm, "freeze_llm contradicts use_lora, which puts adapters into the language model: remove one."),
        (vision, f'freeze_vision_tower contradicts lora_preset "{s.lora_preset}": remove it, or give lora_preset llm.'),
        (
            s.train_modules and bare,
            (
                f'train_modules "{s.train_modules}" has no effect with use_lora, where lora_preset, lora_target_modules and '
                "lora_modules_to_save choose what trains: remove it, or give only rates, such as llm:1e-4."
            ),
        ),
    )


def _check_length_and_batches(s: Settings) -> None:
    _refuse(
        (s.max_steps == 0, "max_steps is 0: give at least 1, or -1 to go by num_train_epochs."),
        (s.streaming and s.max_steps < 1, "streaming has no number of steps of its own: give max_steps."),
        (s.warmup_ratio and s.warmup_steps, "warmup_ratio and warmup_steps are both given: choose one."),
        (
            s.memory_efficient and not s.gradient_checkpointing,
            "memory_efficient turns gradient_checkpointing on, and that is set to false: remove one.",
        ),
        (
            s.packing and s.attn_implementation == "eager",
            "packing needs attention within each sample, which eager attention has not: use sdpa or flash_attention_2.",
        ),
        (
            s.max_batch_tokens and s.per_device_train_batch_size > 1,
            "max_batch_tokens and per_device_train_batch_size both decide how many samples a forward takes: choose one.",
        ),
        *(
            (
                s.trainer == "trl" and getattr(s, name),
                f'trainer "trl" works without {name}: remove it, or take trainer "transformers".',
            )
            for name in ("streaming", "label_smoothing_factor", "vision_cache", "max_batch_tokens", "group_by_length")
        ),
        (
            s.streaming and s.group_by_length,
            "group_by_length needs the lengths of all records, and streaming knows none: remove one.",
        ),
    )
    for what in ("single_image_{}_pixels", "multiple_image_{}_pixels", "video_{}_pixels", "{}_frames"):
        low, high = (getattr(s, what.format(end)) for end in ("min", "max"))
        if low and high and low > high:
            raise SettingsError(f"{what.format('min')} {low} is above {what.format('max')} {high}: change one of them.")


def _check_evaluation(s: Settings) -> None:
    _refuse(
        (
            s.eval_strategy == "steps" and not s.eval_steps,
            'eval_strategy is "steps" and eval_steps is not given: give it.',
        ),
        (
            s.eval_strategy in ("no", "epoch") and s.eval_steps,
            f'eval_strategy is "{s.eval_strategy}" and eval_steps is given: remove one.',
        ),
        (
            s.eval_strategy == "no" and s.eval_data_path,
            'eval_data_path has no effect with eval_strategy "no": remove one.',
        ),
        *(
            (
                s.eval_strategy == "no" and getattr(s, name),
                f'{name} needs evaluations, and eval_strategy is "no": remove one.',
            )
            for name in ("early_stopping_patience", "load_best_model_at_end", "eval_on_start")
        ),
        (
            s.load_best_model_at_end and not s.saves,
            "load_best_model_at_end needs checkpoints: give save_steps or save_strategy.",
        ),
    )
