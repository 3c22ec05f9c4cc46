"""Packed rows: samples one behind another in one row, without padding, each attending within itself.

A packed batch names its samples as transformers' flash attention does: `cu_seq_lens_q` = `cu_seq_lens_k`, int32
[samples + 1] from 0 to the row's length, and `max_length_q` = `max_length_k`, the longest sample; `position_ids`
start at 0 in every sample. flash_attention_2 and later take that themselves; eager and flex_attention get the mask
that transformers draws from the positions. For sdpa, which would get a mask of [total, total] too, the function here
stands in.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA = "packed_sdpa"
"""transformers' sdpa, and for packed rows sdpa within each sample."""


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sample_lengths: tuple[int, ...] | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of query [1, heads, total, head_dim] over key and value [1, kv_heads, total, head_dim].

    With `sample_lengths`, which add up to total, no sample sees another; without, this is transformers' sdpa.
    Returns [1, total, heads, head_dim] and no weights.
    """
    if sample_lengths is None:
        if attention_mask is not None and attention_mask.shape[-2:] == (1, 1) and query.shape[2] > 1:
            raise ValueError(
                f"{type(module).__name__} is not told where the samples of a packed row begin: its text model passes no "
                "sample_lengths on to the attention; train it without packing."
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a bias for positions of the whole row to its attention, which packed rows do "
            "not keep within a sample: set packing to false."
        )
    if takes_varlen(query, value) and not dropout and kwargs.get("softcap") is None:
        return varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    pieces = [
        sdpa_attention_forward(module, *sample, None, dropout, scaling, **kwargs | {"is_causal": True})[0]
        for sample in zip(*(x.split(sample_lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, dim=1), None


def takes_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's flash kernel for samples of any length runs on such tensors."""
    head = query.shape[-1]
    halves = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and halves and head == value.shape[-1] <= 256 and head % 8 == 0


def varlen(query, key, value, ends: torch.Tensor, longest: int, scaling: float | None) -> torch.Tensor:
    """The same in one kernel: [1, heads, total, head_dim] in, [1, total, heads, head_dim] out; `ends` are cu_seq_lens."""
    from torch.nn.attention.varlen import varlen_attn  # only where there is a GPU: it registers CUDA operators

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    shared = q.shape[1] != k.shape[1]
    # a window that is open to the left and closed to the right: causal
    out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=shared)
    return out[None]


AttentionInterface.register(SDPA, packed_sdpa)
AttentionMaskInterface.register(SDPA, sdpa_mask)


def check_packable(language_model: torch.nn.Module) -> None:
    """ValueError unless the attention of this text model can be kept within the samples of a packed row."""
    config = language_model.config
    kind, kinds = config.model_type, set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"The text model ({kind}) has layers of another attention than full causal attention (a sliding window, "
            "chunks or none), which packed rows do not keep within a sample: set packing to false."
        )
    if not language_model._supports_attention_backend:
        raise ValueError(
            f"The attention of the text model ({kind}) is its own and not one of transformers' functions, which alone "
            "can be kept within the samples of a packed row: set packing to false."
        )


def prepare_packed(
    language_model: torch.nn.Module, row: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """attention_mask and keyword arguments for a text model's forward of a packed `row` [1, total, ...].

    `kwargs` are the forward's, with cu_seq_lens_q. ValueError where they do not fit the row, or for a text model that
    cannot be packed.
    """
    config = language_model.config
    check_packable(language_model)
    ends = kwargs["cu_seq_lens_q"]
    lengths = tuple(ends.diff().tolist())
    if len(row) != 1 or sum(lengths) != row.shape[1] or min(lengths, default=0) < 1:
        raise ValueError(
            f"A packed batch is one row whose samples' lengths add up to its own, and this one is {tuple(row.shape[:2])} "
            f"with cu_seq_lens_q {ends.tolist()}: build it with ovisnb.chat.collate(samples, packed=True)."
        )
    # with a cache, transformers would not look for samples in the positions
    kwargs = kwargs | {"use_cache": False}
    if config._attn_implementation == "sdpa":
        config._attn_implementation = SDPA
    if config._attn_implementation != SDPA:
        return None, kwargs
    # transformers hands a mask of four dimensions on as it is: this one only keeps it from drawing its own
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.device), kwargs | {"sample_lengths": lengths}


def rows_of(input_ids: torch.Tensor, cu_seq_lens: torch.Tensor) -> torch.Tensor:
    """The samples of packed ids [1, total] in rows of their own, int64 [samples, longest], filled up with -1."""
    samples = input_ids[0].split(cu_seq_lens.diff().tolist())
    return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=-1)
