"""What to change in a run that does not fit: each change planned anew, the one that saves most first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ovisnb.model import Ovis2_5Config
from ovisnb.train.plan import MemoryPlan, memory_plan, size_of
from ovisnb.train.plan_model import Read, image_limits, planned_model
from ovisnb.train.settings import Settings, SettingsError

LEAST = 0.02
"""Share of the plan that a change must save to be named."""


@dataclass(frozen=True)
class Saving:
    """One change of the settings, and the bytes of a GPU that it saves by itself."""

    changes: dict[str, Any]
    saves: int
    left: int
    """The peak with it."""
    remark: str = ""

    def __str__(self) -> str:
        given = " ".join(f"--{name} {_word(value)}" for name, value in self.changes.items())
        return f"{given}: saves {size_of(self.saves)}, leaves {size_of(self.left)}" + (
            f" ({self.remark})" if self.remark else ""
        )


def savings(
    settings: Settings,
    plan: MemoryPlan,
    config: Ovis2_5Config | None = None,
    read: Read | None = None,
    world_size: int = 1,
) -> list[Saving]:
    """The changes that save memory, the most first. `plan` is that of the settings as they are; `read` gives samples
    of the data under changed limits (None: those of data_path are read)."""
    if config is None:
        config, reads = planned_model(settings)
        read = read or reads
    found = []
    for asked, remark in _changes(settings, config, plan, world_size):
        changes = {name: value for name, value in asked.items() if getattr(settings, name) != value}
        try:
            changed = Settings.from_dict(settings.to_dict() | changes)
            samples = read(changed) if read else None
            other = memory_plan(changed, config, samples, world_size, plan.device)
        except SettingsError:
            continue  # it contradicts another setting
        saved = plan.total - other.total
        if saved > LEAST * plan.total:
            found.append(Saving(changes, saved, other.total, remark))
    return sorted(found, key=lambda saving: saving.saves, reverse=True)


def _changes(
    settings: Settings, config: Ovis2_5Config, plan: MemoryPlan, world: int
) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes that may help, each with what it costs or keeps."""
    if not settings.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, "about a third slower, the same result"
    if settings.attn_implementation == "eager":
        yield {"attn_implementation": "sdpa"}, "the same attention, without its table of scores"
    size, steps = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    if size > 1:
        half = size // 2
        yield (
            {"per_device_train_batch_size": half, "gradient_accumulation_steps": steps * size // half},
            "the same samples a step",
        )
    if settings.max_batch_tokens:
        yield {"max_batch_tokens": settings.max_batch_tokens // 2}, ""
    if not settings.bf16 and not settings.fp16:
        yield {"bf16": True}, ""
    if plan.batch.patches:
        names = ("single_image_max_pixels", "multiple_image_max_pixels", "video_max_pixels")
        highest = image_limits(settings).max_pixels
        yield {name: (getattr(settings, name) or highest) // 2 for name in names}, "smaller pictures"
        name = "multimodal_max_length"
    else:
        name = "text_max_length"
    longest = min(getattr(settings, name), plan.batch.tokens)
    yield {name: longest // 2}, "longer samples lose their last turns"
    if world > 1 and settings.deepspeed is None and not settings.fsdp:
        yield {"deepspeed": "zero2"}, ""
        yield {"deepspeed": "zero3"}, "more traffic between GPUs"
    if not settings.use_lora and plan.device == "cuda" and settings.deepspeed in (None, "zero2", "zero3"):
        yield {"deepspeed": "zero3_offload" if settings.deepspeed == "zero3" else "zero2_offload"}, "the host holds it"
    if not settings.use_lora:
        if settings.optim != "adafactor":
            yield {"optim": "adafactor"}, "another optimizer"
        if "8bit" not in settings.optim and settings.optim != "adafactor":
            yield {"optim": "adamw_bnb_8bit"}, "the optimizer's state in 8 bit"
        if not settings.freeze_vision_tower:
            yield {"freeze_vision_tower": True}, "the vision transformer stays as it is"
        yield (
            {"use_lora": True, "train_modules": None, "freeze_vision_tower": False, "freeze_llm": False},
            "adapters only",
        )
    elif not settings.load_in_4bit:
        yield {"load_in_4bit": True}, "the base in 4 bit"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
