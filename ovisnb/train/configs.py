"""What a run in several processes is told: the DeepSpeed config that suits the settings, and FSDP2's.

The shipped files are in ovisnb/configs: zero0 ... zero3_offload for DeepSpeed, ddp.yaml and fsdp2.yaml for accelerate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovisnb.train.settings import Settings, SettingsError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SHIPPED = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
# What may be left to the settings. A key that is missing would be DeepSpeed's own default: it clips gradients to 1.
FROM_SETTINGS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
GATHER = "stage3_gather_16bit_weights_on_model_save"
LAYERS = ["Qwen3DecoderLayer", "Ovis2_5VisionLayer"]


def wanted_deepspeed(settings: Settings) -> str | None:
    """The shipped name or file to use: of the settings, else of `accelerate launch --use_deepspeed`; None: no DeepSpeed."""
    if settings.deepspeed is not None or not _is_on("ACCELERATE_USE_DEEPSPEED"):
        return settings.deepspeed
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        return file
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    devices = {os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE", "none") for part in ("OPTIMIZER", "PARAM")}
    return f"zero{stage}" + ("_offload" if "cpu" in devices else "")


def tell_build_locks() -> None:
    """Print which locks DeepSpeed will wait for, which it does without a word; one process of a machine prints."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.rglob("lock")) if os.environ.get("LOCAL_RANK", "0") == "0" else []:
        print(
            f"DeepSpeed waits until {lock} is gone: if nothing is being built (a run that is killed while it builds "
            "leaves its lock), delete that file",
            flush=True,
        )


def wants_fsdp(settings: Settings) -> bool:
    """Whether the settings or `accelerate launch --use_fsdp` ask for fully sharded data parallel."""
    return settings.fsdp or _is_on("ACCELERATE_USE_FSDP")


def deepspeed_config(settings: Settings, world_size: int) -> dict[str, Any] | None:
    """The DeepSpeed config of a run in `world_size` processes, its missing keys left to the settings; None: no DeepSpeed.

    An "optimizer" or "scheduler" section that leaves its rate to the settings is dropped: Trainer's own optimizer
    takes the rate of each module. Raises SettingsError for a file that cannot be read or contradicts the settings.
    """
    wanted = wanted_deepspeed(settings)
    if wanted is None:
        return None
    config = _read(wanted)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    stage = zero.setdefault("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        raise SettingsError(f"deepspeed {wanted}: zero_optimization.stage is {stage!r}, and ZeRO has 0, 1, 2 and 3.")
    if isinstance(compiles := config.get("compile"), dict):  # keys of DeepSpeed's earlier versions, refused by this one
        config["compile"] = {
            key: value for key, value in compiles.items() if key not in ("enabled", "backend", "kwargs")
        }
    for key in FROM_SETTINGS:
        config.setdefault(key, "auto")
    for half in ("bf16", "fp16"):
        section = config.setdefault(half, {})
        if not isinstance(section, dict):
            raise SettingsError(
                f'deepspeed {wanted}: {half} is {section!r}, and it is an object such as {{"enabled": "auto"}}.'
            )
        section.setdefault("enabled", "auto")
    if stage == 3 and not zero.setdefault(GATHER, True):
        raise SettingsError(
            f"deepspeed {wanted}: {GATHER} is false, which would leave no model to open: set it to true."
        )
    for key, found, setting, value in _fixed(config, settings, world_size):
        if found not in ("auto", None) and found != value:
            raise SettingsError(
                f'deepspeed {wanted} says {key} {found!r}, and the settings say {setting} {value!r}: write "auto" there, '
                "or change the setting."
            )
    for section in ("optimizer", "scheduler"):
        config.pop(section, None)
    return config


def unused_parts(settings: Settings) -> list[str]:
    """Sentences on what a DeepSpeed file says and a run does not take from it."""
    wanted = wanted_deepspeed(settings)
    config = {} if wanted is None else _read(wanted)
    sentences = []
    if isinstance(compiles := config.get("compile"), dict) and compiles.get("enabled"):
        sentences.append(
            f"deepspeed {wanted}: compile.enabled is of earlier versions of DeepSpeed; torch_compile compiles"
        )
    for section, setting in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if section in config:
            sentences.append(f"deepspeed {wanted}: the settings' {setting} is used in place of its {section}")
    return sentences


def fsdp_config(settings: Settings) -> dict[str, Any]:
    """`fsdp_config` of transformers' TrainingArguments: FSDP2, each transformer layer a unit, whole weights when saving."""
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": LAYERS,
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
        # recomputed within FSDP's units; Trainer's own way would gather every layer once more
        "activation_checkpointing": settings.gradient_checkpointing,
    }


def _read(wanted: str) -> dict[str, Any]:
    path = CONFIGS / f"{wanted}.json" if wanted in SHIPPED else Path(wanted).expanduser()
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SettingsError(
            f"deepspeed {wanted} is no file and none of the shipped configs {', '.join(SHIPPED)}: name one of them."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise SettingsError(f"deepspeed {wanted} is no JSON file ({error}).") from None
    if not isinstance(config, dict):
        raise SettingsError(f"deepspeed {wanted} holds a {type(config).__name__}, and a config is one JSON object.")
    return config


def _fixed(config: Mapping[str, Any], settings: Settings, world_size: int) -> list[tuple[str, Any, str, Any]]:
    """(key, its value, setting, its value) of all that a config and the settings both say."""
    per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * world_size
    optimizer = _params(config.get("optimizer"))
    pairs = [
        ("train_batch_size", f"a batch in {world_size} processes of", per_step),
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size", settings.per_device_train_batch_size),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", settings.gradient_accumulation_steps),
        ("gradient_clipping", "max_grad_norm", settings.max_grad_norm),
    ]
    found = [(key, config[key], setting, value) for key, setting, value in pairs]
    for half in ("bf16", "fp16"):
        found.append((f"{half}.enabled", config[half].get("enabled"), half, getattr(settings, half)))
    for key, setting in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        found.append((f"optimizer.params.{key}", optimizer.get(key), setting, getattr(settings, setting)))
    rate = _params(config.get("scheduler")).get("warmup_max_lr")
    found.append(("scheduler.params.warmup_max_lr", rate, "learning_rate", settings.learning_rate))
    return found


def _params(section: Any) -> dict[str, Any]:
    params = section.get("params") if isinstance(section, dict) else None
    return params if isinstance(params, dict) else {}


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")
