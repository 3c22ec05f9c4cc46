"""What of a training step one of several processes holds: DDP, DeepSpeed's ZeRO and FSDP2, as formulas.

Sources: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054) for what is shared out; DeepSpeed's runtime/zero/
stage_1_and_2.py, stage3.py and bf16_optimizer.py and torch's DistributedDataParallel and fully_shard for the buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ovisnb.train.configs import LAYERS, deepspeed_config, wants_fsdp
from ovisnb.train.ledger import COPIES, GATHERED, TRAFFIC
from ovisnb.train.settings import Settings

BUCKET = 500_000_000  # numbers: DeepSpeed's own reduce_bucket_size and allgather_bucket_size
LIVE = 1_000_000_000  # its stage3_max_live_parameters


@dataclass(frozen=True)
class Parallel:
    """How a run is spread over processes."""

    name: str
    """Such as "2 processes, DDP"."""
    world: int
    factors: Mapping[str, float] = field(default_factory=dict)
    """Part -> the share of it that one GPU holds."""
    dtype: torch.dtype | None = None
    """What the weights are held in; None: as in one process."""
    buffers: Callable[[nn.Module], dict[str, int]] = lambda model: {}
    """Part -> bytes of what is there besides."""
    gathers: bool = False
    """Whether each call of a module gathers its weights, so that some chunks are not cut."""
    master: float = 0.0
    """Bytes of float32 copies of a trained number, kept with the optimizer's state."""


def parallel_of(settings: Settings, world: int) -> Parallel:
    """How the settings spread a run over `world` processes; raises SettingsError as the run would."""
    config = deepspeed_config(settings, world)
    if config is not None:
        return _deepspeed(config, settings, world)
    if wants_fsdp(settings):
        return _fsdp(settings, world)
    if world == 1:
        return Parallel("one process", 1)
    # gradient_as_bucket_view is off in accelerate: the buckets are a second copy of all gradients
    return Parallel(f"{world} processes, DDP", world, buffers=lambda model: {TRAFFIC: _bytes(model, trained=True)})


def _deepspeed(config: Mapping[str, Any], settings: Settings, world: int) -> Parallel:
    zero = config["zero_optimization"]
    stage = zero["stage"]
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((half[name] for name in half if _on(config.get(name), getattr(settings, name))), None)
    offloads = {part: (zero.get(f"offload_{part}") or {}).get("device", "none") != "none" for part in _OFFLOADED}
    factors = {
        "optimizer": 0.0 if offloads["optimizer"] else 1 / world if stage else 1.0,
        "gradients": 1 / world if stage >= 2 else 1.0,
        "weights": 0.0 if offloads["param"] else 1 / world if stage == 3 else 1.0,
    }
    factors["optimizer step"] = factors["optimizer"]
    if offloads["optimizer"] and stage >= 2:
        factors["gradients"] = 0.0  # they go to the host as they are made

    def buffers(model: nn.Module) -> dict[str, int]:
        trained, size = _bytes(model, trained=True), 2 if dtype else 4
        hidden = model.config.get_text_config().hidden_size
        found = {TRAFFIC: 0.0, GATHERED: 0.0}
        if stage:
            twice = 2 if zero.get("overlap_comm", stage == 3) else 1
            bucket = _number(zero.get("reduce_bucket_size"), hidden**2, BUCKET) * size * twice
            found[TRAFFIC] += min(bucket, trained * twice)
        if stage in (1, 2):
            found[TRAFFIC] += min(_number(zero.get("allgather_bucket_size"), BUCKET, BUCKET) * size, trained)
        if stage == 3:
            live = _number(zero.get("stage3_max_live_parameters"), LIVE, LIVE) * size
            live += _number(zero.get("stage3_prefetch_bucket_size"), 0.9 * hidden**2, BUCKET / 10) * size
            found[GATHERED] += min(live, _bytes(model))
        return {part: int(size) for part, size in found.items()}

    name = f"{world} process{'es' if world > 1 else ''}, DeepSpeed ZeRO-{stage}"
    moved = [part for part in _OFFLOADED if offloads[part]]
    if moved:
        name += f" ({' and '.join(moved)} on the host)"
    # float32 weights of its own, and for the step a float32 gradient
    master = (4.0 if stage or dtype else 0.0) + (4.0 if dtype else 0.0)
    return Parallel(name, world, factors, dtype, buffers, gathers=stage == 3, master=master)


_OFFLOADED = ("optimizer", "param")


def _fsdp(settings: Settings, world: int) -> Parallel:
    half = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None
    share = 1 / world
    factors = {"weights": share, "gradients": share, "optimizer": share, "optimizer step": share}
    factors[COPIES] = 0.0  # what is gathered is in half precision already, and backward gathers it again

    def buffers(model: nn.Module) -> dict[str, int]:
        """What is gathered at a time: two layers, this one and the next, and all that is in no layer."""
        layers = [module for module in model.modules() if type(module).__name__ in LAYERS]
        within = sum(_bytes(layer) for layer in layers)
        gathered = _bytes(model) - within + 2 * max(map(_bytes, layers), default=0)
        reduced = max(map(_bytes, layers), default=0)  # gradients of one layer on their way
        scale = 0.5 if half else 1.0
        return {GATHERED: int(gathered * scale), TRAFFIC: int(reduced * scale)}

    return Parallel(f"{world} processes, FSDP2", world, factors, buffers=buffers, gathers=True)


def _bytes(model: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)


def _on(section: Any, auto: bool) -> bool:
    value = section.get("enabled", False) if isinstance(section, Mapping) else False
    return auto if value == "auto" else bool(value)


def _number(value: Any, auto: float, missing: float) -> float:
    return missing if value is None else auto if value == "auto" else float(value)
