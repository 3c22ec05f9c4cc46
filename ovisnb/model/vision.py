"""The vision tower: patches of any number of pictures and frames to words of the visual vocabulary.

All pictures of a batch lie one behind the other along the patch axis, in 2x2 block order; attention runs within
segments of that axis (a frame, or a window of a frame) and never crosses them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from .configuration import INDICATORS, Ovis2_5VisionConfig
from .loss import calls_are_counted, rows_at_once


class Segments:
    """How the patch axis [patches] is cut for attention.

    `order` gathers the patches so that every segment is contiguous (None: they already are); `lengths` are the
    segments' lengths in that order. `blocks` groups segments of equal length, so that plain attention kernels run
    on [segments, length] without padding.
    """

    def __init__(self, lengths: list[int], order: torch.Tensor | None, device):
        self.lengths, self.order = lengths, order
        self.inverse = None if order is None else torch.argsort(order)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        self.cu_seqlens = ends.to(device=device, dtype=torch.int32)
        self.max_length = max(lengths)
        starts = ends[:-1]
        sizes = torch.tensor(lengths)
        self.blocks = []
        for length in sorted(set(lengths)):
            rows = starts[sizes == length][:, None] + torch.arange(length)
            self.blocks.append(rows.to(device))
        # from the blocks' order back to the segments', once for all layers
        self.unblock = torch.argsort(torch.cat([rows.flatten() for rows in self.blocks]))


def frame_segments(grids: list[list[int]], device) -> Segments:
    """Full attention: one segment of h*w patches a frame."""
    return Segments([h * w for t, h, w in grids for _ in range(t)], None, device)


def window_segments(grids: list[list[int]], config: Ovis2_5VisionConfig, device) -> Segments:
    """Windowed attention: each frame's merged grid cut from the top left into m x m cells (edge windows smaller),
    m = window_size // hidden_stride // patch_size."""
    stride = config.hidden_stride
    side = config.window_size // stride // config.patch_size
    order, lengths, offset = [], [], 0
    for t, h, w in grids:
        cells = torch.arange(t * (h // stride) * (w // stride)).view(t, h // stride, w // stride)
        for frame in cells:
            for strip in frame.split(side, dim=0):
                for window in strip.split(side, dim=1):
                    patches = window.reshape(-1, 1) * stride**2 + torch.arange(stride**2)
                    order.append(offset + patches.flatten())
                    lengths.append(patches.numel())
        offset += t * h * w
    return Segments(lengths, torch.cat(order).to(device), device)


def block_order(h: int, w: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every patch of an h x w grid, int64 [h*w] each, in block order."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return tuple(
        grid.reshape(h // stride, stride, w // stride, stride).transpose(1, 2).flatten() for grid in (rows, columns)
    )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in float32, first half of the head with its second half. x [patches, heads, head_dim]."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


class Ovis2_5PatchEmbedding(nn.Conv2d):
    """The patch convolution, run as the matrix product it is (kernel = stride = patch)."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Ovis2_5VisionEmbeddings(nn.Module):
    def __init__(self, config: Ovis2_5VisionConfig):
        super().__init__()
        self.config = config
        self.side = config.image_size // config.patch_size
        channels = config.num_channels * config.temporal_patch_size
        self.patch_embedding = Ovis2_5PatchEmbedding(
            channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        if config.preserve_original_pe:
            self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def positions(self, grids: list[list[int]]) -> torch.Tensor:
        """The learned table, bicubically interpolated to each picture's grid; [patches, hidden]."""
        every = torch.arange(self.side**2, device=self.position_embedding.weight.device)
        table = self.position_embedding(every).view(1, self.side, self.side, -1).permute(0, 3, 1, 2).float()
        stride, made = self.config.hidden_stride, {}
        for h, w in {(h, w) for _, h, w in grids}:
            at = F.interpolate(table, size=(h, w), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
            blocks = at.reshape(h // stride, stride, w // stride, stride, -1).transpose(1, 2)
            made[h, w] = blocks.reshape(h * w, -1)
        return torch.cat([made[h, w].repeat(t, 1) for t, h, w in grids])

    def forward(self, pixel_values: torch.Tensor, grids: list[list[int]]) -> torch.Tensor:
        hidden = self.patch_embedding(pixel_values)
        if self.config.preserve_original_pe:
            hidden = hidden + self.positions(grids).to(hidden.dtype)
        return hidden


class Ovis2_5VisionAttention(nn.Module):
    def __init__(self, config: Ovis2_5VisionConfig):
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.scaling = (config.hidden_size // self.heads) ** -0.5
        self.is_causal = False
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor, segments: Segments, rotary) -> torch.Tensor:
        """hidden [patches, hidden_size]; attention within each segment."""
        q, k, v = (
            projection(hidden).view(len(hidden), self.heads, -1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if segments.order is not None:
            q, k, v = q[segments.order], k[segments.order], v[segments.order]
        out = self.attend(q, k, v, segments).flatten(1)
        if segments.order is not None:
            out = out[segments.inverse]
        return self.out_proj(out)

    def attend(self, q, k, v, segments: Segments) -> torch.Tensor:
        """q, k, v [patches, heads, head_dim], segments contiguous; returns the same shape."""
        kind = self.config._attn_implementation or "sdpa"
        dropout = self.config.attention_dropout if self.training else 0.0
        ends, longest = segments.cu_seqlens, segments.max_length
        if "flash" in kind:
            out, _ = ALL_ATTENTION_FUNCTIONS[kind](
                self,
                *(x.transpose(0, 1)[None] for x in (q, k, v)),
                attention_mask=None,
                scaling=self.scaling,
                dropout=dropout,
                cu_seq_lens_q=ends,
                cu_seq_lens_k=ends,
                max_length_q=longest,
                max_length_k=longest,
                is_causal=False,
            )
            return out[0]
        if kind == "sdpa" and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and not dropout:
            from torch.nn.attention.varlen import varlen_attn  # only where there is a GPU: it registers CUDA operators

            # not causal and scaled by head_dim**-0.5 unless told otherwise, which each torch spells in its own way
            return varlen_attn(q, k, v, ends, ends, longest, longest)
        if len(segments.blocks) == 1:
            shape = (len(segments.lengths), longest, self.heads, -1)
            return self.dense(q.view(shape), k.view(shape), v.view(shape), kind, dropout).reshape(q.shape)
        pieces = [self.dense(q[rows], k[rows], v[rows], kind, dropout).flatten(0, 1) for rows in segments.blocks]
        return torch.cat(pieces)[segments.unblock]

    def dense(self, q, k, v, kind: str, dropout: float) -> torch.Tensor:
        """Attention of [segments, length, heads, head_dim], every segment of one length."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if kind == "eager":
            weights = torch.softmax(q @ k.transpose(-1, -2) * self.scaling, dim=-1, dtype=torch.float32).to(q.dtype)
            out = F.dropout(weights, dropout) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scaling)
        return out.transpose(1, 2)


class Ovis2_5VisionMLP(nn.Module):
    def __init__(self, config: Ovis2_5VisionConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


class Ovis2_5VisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: Ovis2_5VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Ovis2_5VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Ovis2_5VisionMLP(config)

    def forward(self, hidden: torch.Tensor, segments: Segments, rotary) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), segments, rotary)
        return hidden + self.mlp(self.layer_norm2(hidden))


class Ovis2_5VisionEncoder(nn.Module):
    def __init__(self, config: Ovis2_5VisionConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Ovis2_5VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def rotary(self, grids: list[list[int]], device):
        """cos, sin float32 [patches, 1, head_dim / 2] of the angles [row * inv_freq, column * inv_freq]."""
        head = self.config.hidden_size // self.config.num_attention_heads
        inv_freq = 10000.0 ** (-torch.arange(0, head // 2, 2, dtype=torch.float32) / (head // 2))
        made = {}
        for h, w in {(h, w) for _, h, w in grids}:
            rows, columns = block_order(h, w, self.config.hidden_stride)
            made[h, w] = torch.cat([rows[:, None] * inv_freq, columns[:, None] * inv_freq], dim=1)
        angles = torch.cat([made[h, w].repeat(t, 1) for t, h, w in grids]).to(device)[:, None]
        return angles.cos(), angles.sin()

    def forward(self, hidden: torch.Tensor, grids: list[list[int]]) -> torch.Tensor:
        config, device = self.config, hidden.device
        rotary = self.rotary(grids, device) if config.use_rope else None
        windowed = [config.windowed(index) for index in range(len(self.layers))]
        frames = frame_segments(grids, device)
        windows = window_segments(grids, config, device) if any(windowed) else None
        grad, below = torch.is_grad_enabled(), hidden.requires_grad
        for layer, within in zip(self.layers, windowed, strict=True):
            if grad and not below and trains(layer):
                below = True
                if layer.gradient_checkpointing:
                    hidden.requires_grad_()  # or reentrant checkpointing gives the layer no gradient
            with torch.set_grad_enabled(grad and below):  # nothing is kept of what lies below all that trains
                hidden = layer(hidden, windows if within else frames, rotary)
        return hidden


class Ovis2_5UnreadNorm(nn.Module):
    """Scale and shift of a layer norm that checkpoints hold but nothing reads.

    Buffers, which are loaded and saved like parameters: DDP would wait for the gradient of a parameter for ever.
    """

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(size))
        self.register_buffer("bias", torch.zeros(size))


class Ovis2_5VisionTransformer(nn.Module):
    """Returns the last encoder layer's output BEFORE post_layernorm, which the checkpoint holds but nothing reads."""

    def __init__(self, config: Ovis2_5VisionConfig):
        super().__init__()
        self.embeddings = Ovis2_5VisionEmbeddings(config)
        self.encoder = Ovis2_5VisionEncoder(config)
        self.post_layernorm = Ovis2_5UnreadNorm(config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, grids: list[list[int]]) -> torch.Tensor:
        below = torch.is_grad_enabled() and (pixel_values.requires_grad or trains(self.embeddings))
        with torch.set_grad_enabled(below):
            hidden = self.embeddings(pixel_values, grids)
        # enable_input_require_grads marks the patches as trained, and with them all that is frozen above
        return self.encoder(hidden if below else hidden.detach(), grids)


def trains(module: nn.Module) -> bool:
    """Whether any of its parameters does."""
    return any(parameter.requires_grad for parameter in module.parameters())


class Ovis2_5VisionModel(PreTrainedModel):
    """Vision transformer and head: the probabilities of each visual token over the visual vocabulary."""

    config_class = Ovis2_5VisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Ovis2_5VisionLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: Ovis2_5VisionConfig):
        super().__init__(config)
        self.transformer = Ovis2_5VisionTransformer(config)
        words = config.vocab_size - INDICATORS
        self.head_linear = nn.Linear(config.hidden_size * config.hidden_stride**2, words, bias=False)
        self.head_norm = nn.LayerNorm(words)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.embeddings.patch_embedding

    def forward(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, table: nn.Module | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """pixel_values [patches, 3*tp*patch**2], grid_thw int64 [media, 3] in patches.

        Returns `last_hidden_state` [patches, hidden_size] and `pooler_output` [visual tokens, vocab_size - 4],
        probabilities whose softmax was taken in float32; with the table of visual words, `pooler_output` is what the
        table makes of them, [visual tokens, its width], and the probabilities exist for one chunk of visual tokens
        at a time, in backward too. ValueError if patches and grids differ.
        """
        grids = grid_thw.tolist()
        asked = sum(t * h * w for t, h, w in grids)
        if asked != len(pixel_values):
            raise ValueError(
                f"The grids ask for {asked} patches but pixel_values has {len(pixel_values)}; pass the "
                "pixel_values and the grid that the processor made together."
            )
        hidden = self.transformer(pixel_values, grids)
        merged = hidden.view(-1, hidden.shape[-1] * self.config.hidden_stride**2)
        pooled = self.words(merged) if table is None else self.embedded_words(merged, table)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    def words(self, merged: torch.Tensor) -> torch.Tensor:
        """Probabilities [visual tokens, words] of merged patches [visual tokens, stride**2 * hidden_size]."""
        logits = self.head_norm(self.head_linear(merged))
        return torch.softmax(logits, dim=-1, dtype=torch.float32).to(logits.dtype)

    def embedded_words(self, merged: torch.Tensor, table: nn.Module) -> torch.Tensor:
        """`table` of `words`, chunk by chunk, and made again in backward; in one chunk where every rank must call
        the head and the table equally often."""
        below = merged.requires_grad or any(trains(part) for part in (self.head_linear, self.head_norm, table))
        one_call = calls_are_counted(self.head_linear, self.head_norm, table)
        rows = len(merged) if one_call else rows_at_once(self.config.vocab_size - INDICATORS, merged.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and below):
            pieces = [
                checkpoint(lambda piece: table(self.words(piece)), piece, use_reentrant=False)
                for piece in merged.split(rows)
            ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
