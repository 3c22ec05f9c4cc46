"""Adapter folders (PEFT) over a checkpoint, and checkpoints whose linear layers are opened in 4 bit.

An adapter folder holds
    adapter_config.json, adapter_model.safetensors    PEFT's own: `PeftModel.from_pretrained(base, folder)` opens them
    adapter_base.json                                 how the base was opened while it was trained: dtype, quantization
    the processor's files
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import BitsAndBytesConfig

from .files import CheckpointError, find_file, read_json

if TYPE_CHECKING:  # peft brings bitsandbytes in: seconds, which only those pay who use an adapter
    from peft import PeftModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_BASE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"

# What stays whole in a 4-bit model, besides what is no linear layer (both embedding tables, norms, the patch filters):
# lm_head, whose errors are errors of the answer itself (and which may be the text table), and the linear layer of the
# visual head, whose outputs go through a softmax over all visual words that turns small errors into other words.
KEPT_WHOLE = ("lm_head", "head_linear")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder or hub id; `config` is its adapter_config.json, `weights` the local path of its tensors."""

    path: str
    config: dict[str, Any]
    weights: str

    @property
    def has_processor(self) -> bool:
        return find_file(self.path, "processor_config.json") is not None

    def base(self, instead: str | os.PathLike | None = None) -> str:
        """Where its base model is: `instead`, or what it names; CheckpointError where that cannot be opened."""
        base = str(instead or self.config.get("base_model_name_or_path") or "")
        if not base:
            raise CheckpointError(f"{self.path} does not name its base model: give base_model.")
        try:
            kind = adapter_files(base)
            known = kind is not None or find_file(base, "config.json") is not None
        except CheckpointError:
            known, kind = False, None
        if kind:
            raise CheckpointError(f"{base}, the base model of {self.path}, is an adapter itself: merge that one first.")
        if not known:
            raise CheckpointError(f"{base}, the base model of {self.path}, is no checkpoint here: give base_model.")
        return base


def adapter_files(path_or_id: str | os.PathLike) -> Adapter | None:
    """What `path_or_id` holds of an adapter; None where it holds none, or a model as well.

    CheckpointError for an adapter without safetensors.
    """
    if os.path.isfile(path_or_id) or find_file(path_or_id, "config.json"):
        return None
    if not find_file(path_or_id, ADAPTER_CONFIG):
        return None
    if not (weights := find_file(path_or_id, ADAPTER_WEIGHTS)):
        raise CheckpointError(f"{path_or_id} has no {ADAPTER_WEIGHTS}: save the adapter anew, as safetensors.")
    return Adapter(str(path_or_id), read_json(path_or_id, ADAPTER_CONFIG), weights)


def quantized(quantization: str | BitsAndBytesConfig, dtype: torch.dtype | None, device) -> dict[str, Any]:
    """The arguments of from_pretrained that quantize, tensor by tensor and where the model shall be.

    "4bit" is NF4 with double quantization (QLoRA, arXiv 2305.14314) that computes in `dtype`; a BitsAndBytesConfig is
    taken as it is. KEPT_WHOLE stays whole unless that says something else in `llm_int8_skip_modules`.
    Raises CheckpointError for another word.
    """
    if isinstance(quantization, BitsAndBytesConfig):
        values = quantization.to_dict()
    elif quantization == "4bit":
        values = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        values["bnb_4bit_compute_dtype"] = dtype or torch.float32
    else:
        raise CheckpointError(f"quantization {quantization!r} is not known; use '4bit' or a BitsAndBytesConfig.")
    if values.get("llm_int8_skip_modules") is None:
        values["llm_int8_skip_modules"] = list(KEPT_WHOLE)
    return {
        "quantization_config": BitsAndBytesConfig.from_dict(values),
        "device_map": {"": "cpu" if device is None else device},
    }


def keep_gradients(model: torch.nn.Module) -> None:
    """Let 4-bit layers on the CPU pass gradients after an evaluation too.

    On a CPU with AVX512-BF16 bitsandbytes (0.50) packs a layer's weight anew in its first forward in evaluation mode, and
    from then on that layer gives what lies below it no gradient, in training mode too and without an error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether the model's linear layers are held in 4 or 8 bit."""
    return bool(getattr(model, "is_quantized", False))  # from_pretrained sets it where there is something to set


def base_path(model: torch.nn.Module) -> str | None:
    """Where a model was loaded from: a folder's absolute path, or a hub id; None for one that was made in memory."""
    name = model.config.name_or_path
    if not name:
        return None
    return os.path.abspath(name) if os.path.isdir(name) else name


def open_adapter(base: torch.nn.Module, adapter: Adapter) -> PeftModel:
    """`base` under an adapter, unmerged; CheckpointError where the adapter's tensors are not those of this base."""
    from peft import PeftModel, get_peft_model_state_dict

    if adapter.config.get("peft_type") != "LORA" or adapter.config.get("megatron_config"):
        raise CheckpointError(
            f"{adapter.path} holds an adapter of peft_type {adapter.config.get('peft_type')!r}: give a LoRA, rsLoRA or "
            "DoRA adapter of PEFT, without a megatron_config."
        )
    over = f"{adapter.path} does not fit its base model {base.config.name_or_path}"
    try:
        with safe_open(adapter.weights, "pt") as file:
            found = set(file.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is said below, as an error
            model = PeftModel.from_pretrained(base, os.path.dirname(adapter.weights), torch_device=str(base.device))
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        raise CheckpointError(f"{over} ({reason}).") from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    wrong = {"missing": expected - found, "unexpected": found - expected - model.state_dict().keys()}
    if told := [f"{kind}: {min(names)}, {len(names)} in all" for kind, names in wrong.items() if names]:
        raise CheckpointError(f"{over} ({'; '.join(told)}).")
    return model


def write_adapter(model: PeftModel, processor, folder: Path, state_dict: dict | None = None) -> None:
    """Every file of an adapter folder; `state_dict` is the whole model's, where it has to be gathered first."""
    folder = Path(folder)
    # "auto" would open the base's config.json with transformers, which cannot read the released one
    model.save_pretrained(folder, save_embedding_layers=False, state_dict=state_dict)
    base = model.get_base_model()
    quantization = base.config.quantization_config if is_quantized(base) else None
    about = {
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": quantization.to_dict() if hasattr(quantization, "to_dict") else quantization,
    }
    (folder / ADAPTER_BASE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    processor.save_pretrained(folder)
