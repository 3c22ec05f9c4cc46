"""An adapter merged into its base: one model again, without PEFT.

ovisnb merge --model_path outputs/sft/final --output_dir merged --layout released --dtype bfloat16
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ovisnb.model import CheckpointError, load, save
from ovisnb.model.adapters import ADAPTER_BASE, adapter_files, is_quantized
from ovisnb.model.checkpoint import read_config, torch_dtype
from ovisnb.model.files import read_json

LAYOUTS = ("native", "released")


class MergeError(ValueError):
    """An adapter that cannot be merged, or an output folder that is taken; one sentence."""


def merge(
    adapter: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    base_model: str | os.PathLike | None = None,
    layout: str = "native",
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write the model that an adapter folder and its base make together; the folder appears whole or not at all.

    Args:
        base_model: the base to merge into; None: the one that the adapter names.
        layout: "native", or "released" for the released remote code, vLLM and ms-swift.
        dtype: of the weights written. None: the one the base had while the adapter was trained, where its folder says
            so (adapter_base.json), else the base's own.

    Each weight is merged in float32 and then rounded once, so that a float32 model gives the adapter's logits. An adapter
    of a 4-bit base is merged into the whole weights, which it was not trained on: the answers may differ a little.
    Raises MergeError for an output_dir that holds something, and CheckpointError as `ovisnb.load` does.
    """
    target = Path(output_dir)
    if layout not in LAYOUTS:
        raise MergeError(f"layout {layout!r} is not 'native' or 'released'.")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise MergeError(f"{target} is not empty: choose an empty or a new folder.")
    found = adapter_files(adapter)
    if found is None:
        raise MergeError(
            f"{adapter} holds no adapter (adapter_config.json), so there is nothing to merge: give an adapter's folder, such as the final of a run."
        )
    about = read_json(adapter, ADAPTER_BASE)
    if about.get("quantization"):
        bits = "4" if about["quantization"].get("load_in_4bit") else "8"
        print(f"the adapter was trained on a base in {bits} bit: it is merged into the whole weights of that base")
    opened = about.get("dtype")
    if dtype is not None:  # no narrower than the base was trained on: it is rounded with its update, not before
        written = torch_dtype(dtype)
        before = opened or read_config(found.base(base_model))[1].dtype or torch.float32
        opened = torch.promote_types(torch_dtype(before), written)
    model, processor = load(adapter, dtype=opened, base_model=base_model)
    if is_quantized(model.get_base_model()):
        raise CheckpointError(
            f"{found.base(base_model)} itself is quantized: give base_model, the same in whole weights."
        )
    merged = merged_model(model)
    save(merged if dtype is None else merged.to(written), processor, target, layout=layout)
    return target


def merged_model(model: PeftModel) -> nn.Module:
    """The base of `model` with the adapter in its weights; `model` is of no use afterwards.

    Layer by layer in float32, so that no second copy of the model is needed. A base with tied embeddings of which the
    adapter trained only one is untied: opened again they would be one, and the other lost.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says of every layer that is merged here that it is merged
        for module in model.modules():
            if isinstance(module, LoraLayer):
                layer = module.get_base_layer()
                before = layer.weight.dtype
                layer.weight.data = layer.weight.data.float()
                module.merge(safe_merge=True)
                layer.weight.data = layer.weight.data.to(before)
        merged = model.merge_and_unload()
    table, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    if merged.config.text_config.tie_word_embeddings and not (table is head or torch.equal(table, head)):
        merged.config.tie_word_embeddings = merged.config.text_config.tie_word_embeddings = False
    return merged
