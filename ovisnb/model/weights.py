"""Tensors in files: safetensors, or pytorch_model.bin for those who expect it; in shards where they are many.

A .bin file is a pickle: it is read with `torch.load(weights_only=True)`, which builds tensors and containers of them
and refuses everything else, and in no other way.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from .files import CheckpointError, find_file, first_line, read_json

MAX_SHARD_BYTES = 5_000_000_000
SAFE, BIN = ("model", "safetensors"), ("pytorch_model", "bin")


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict on the CPU, each tied tensor once and under its first name."""
    found: dict[tuple, str] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and found.setdefault(key, name) != name:
            continue
        tensor = tensor.detach().contiguous()
        # a view would take the whole of what it looks at with it
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        tensors[name] = tensor.cpu() if whole else tensor.clone().cpu()
    return tensors


def write_tensors(tensors: dict[str, torch.Tensor], folder: Path, safe: bool = True) -> None:
    """model.safetensors (or pytorch_model.bin), or numbered shards and their index above MAX_SHARD_BYTES."""
    shards, sizes = [{}], [0]
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if shards[-1] and sizes[-1] + bytes_ > MAX_SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += bytes_
    stem, kind = SAFE if safe else BIN
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.{kind}" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{kind}"
        if safe:
            save_file(shard, folder / name, metadata={"format": "pt"})
        else:
            torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{stem}.{kind}.index.json").write_text(text, encoding="utf-8")


def has_only_bin(path_or_id) -> bool:
    """Whether a checkpoint's weights are .bin files, and no safetensors are beside them."""
    if any(find_file(path_or_id, ".".join(SAFE) + end) for end in ("", ".index.json")):
        return False
    return any(find_file(path_or_id, ".".join(BIN) + end) for end in ("", ".index.json"))


def read_bin(path_or_id) -> dict[str, torch.Tensor]:
    """The tensors of pytorch_model.bin, or of its shards, mapped from the disk. Nothing else is ever unpickled.

    Raises CheckpointError for a file that holds anything but tensors by name, for a damaged one, and a missing shard.
    """
    if file := find_file(path_or_id, ".".join(BIN)):
        return _read(file)
    weight_map = read_json(path_or_id, f"{'.'.join(BIN)}.index.json").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path_or_id}: pytorch_model.bin.index.json has no weight_map; copy the folder again.")
    tensors = {}
    for name in dict.fromkeys(weight_map.values()):
        if Path(name).name != name:
            raise CheckpointError(f"{path_or_id}: its index names {name!r}, which is no file of the folder.")
        if not (file := find_file(path_or_id, name)):
            raise CheckpointError(f"{path_or_id} lacks {name}, a shard that its index names; copy the folder again.")
        tensors |= _read(file)
    return tensors


def _read(file: str) -> dict[str, torch.Tensor]:
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of before torch 1.6 cannot be mapped; a damaged one fails again
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file} holds more than tensors, or is damaged, and is not unpickled; convert it to safetensors with a tool "
            "you trust, or copy it again."
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({first_line(error)}); copy it again.") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(f"{file} is no state dict of tensors by name; give the folder of a saved model.")
    return content
