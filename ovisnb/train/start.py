"""The model that a run starts from: a checkpoint, a base for adapters, or a new Ovis.

A new Ovis is trained in stages, each from the final/ of the one before:
    ovisnb train --stage 1 --llm_name_or_path L --vit_name_or_path V --data_type caption --output_dir one ...
    ovisnb train --stage 2 --model_path one/final --output_dir two ...
    ovisnb train --stage 3 --model_path two/final --output_dir three ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ovisnb.model import assemble, load
from ovisnb.model.checkpoint import quiet
from ovisnb.model.files import first_line
from ovisnb.train.settings import Settings, SettingsError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def starting_model(
    settings: Settings, checkpoint: Path | None = None, arguments: TrainingArguments | None = None
) -> tuple[nn.Module, Any]:
    """Model and processor that the settings name, weights in float32: steps of 1e-5 vanish in bfloat16's 8 bits.

    A new Ovis is assembled, the same one for the same model_init_seed, unless the run continues from `checkpoint`,
    which then needs neither the language model nor the vision transformer. `arguments` are the run's, which under
    ZeRO-3 ask for models in parts from the start: a new Ovis is made whole and parted later.

    Raises SettingsError where the settings name no model, or parts that cannot be opened; CheckpointError as `load`.
    """
    if settings.use_lora:
        from ovisnb.train.lora import open_base

        return open_base(settings)
    options = {"dtype": torch.float32, "attn_implementation": settings.attn_implementation}
    if settings.model_path:
        return load(settings.model_path, **options)
    if not settings.llm_name_or_path:
        raise SettingsError(
            "There is no model to start from: give model_path, or llm_name_or_path and vit_name_or_path for a new Ovis."
        )
    if checkpoint and any((checkpoint / name).is_file() for name in WEIGHTS):
        return load(checkpoint, **options)
    with quiet(), in_one_piece(arguments):
        return new_ovis(settings)


def new_ovis(settings: Settings) -> tuple[nn.Module, Any]:
    """A new Ovis of llm_name_or_path and vit_name_or_path; SettingsError for parts that cannot be opened."""
    try:
        model, processor = assemble(
            settings.llm_name_or_path,
            settings.vit_name_or_path,
            visual_vocab_size=settings.visual_vocab_size,
            seed=settings.model_init_seed,
            hidden_stride=settings.vit_hidden_stride,
            window_size=settings.vit_window_size,
            temporal_patch_size=settings.vit_temporal_patch_size,
            fullatt_block_indexes=settings.vit_fullatt_block_indexes,
            preserve_original_pe=settings.vit_preserve_original_pe,
            use_rope=settings.vit_use_rope,
        )
        if settings.attn_implementation:
            model.set_attn_implementation(settings.attn_implementation)  # looks whether it is here
            model.config._attn_implementation = settings.attn_implementation  # and passes over the vision tower
    except (OSError, ValueError, ImportError) as error:
        raise SettingsError(
            f"No Ovis can be made of llm_name_or_path {settings.llm_name_or_path} and vit_name_or_path "
            f"{settings.vit_name_or_path}: {first_line(error)}."
        ) from error
    return model, processor


@contextmanager
def in_one_piece(arguments: TrainingArguments | None) -> Iterator[None]:
    """Without ZeRO-3's parting of every model at its birth: parts are joined and initialised whole."""
    config = getattr(arguments, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)
