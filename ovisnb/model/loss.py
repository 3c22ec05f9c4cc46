"""The cross-entropy of a language model's head without its whole logits.

Logits of 4,096 tokens over 151,936 words take 2.5 GB in float32, and a loss holds several copies of them. Here they
exist for one chunk of tokens at a time, and their gradient is taken while they exist: the method of Liger Kernel's
fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989), in plain torch.

torch.nn.functional.linear_cross_entropy with options does nearly this, but (torch 2.13) it falls back to whole logits
for label smoothing, returns the loss of bfloat16 weights rounded to bfloat16, and multiplies in float32 under autocast.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled

IGNORED = -100
CHUNK_BYTES = 128 * 2**20  # float32 logits, or visual words, that exist at one time
CUDA_CHUNKS = 4  # so many times as much on a GPU: each chunk reads the whole weight, and fewer rows would wait for it


def rows_at_once(words: int, device: torch.device | str = "cpu") -> int:
    """How many rows of `words` float32 numbers a chunk holds; at least 1."""
    size = CHUNK_BYTES * (CUDA_CHUNKS if torch.device(device).type == "cuda" else 1)
    return max(1, size // (4 * words))


def calls_are_counted(*modules: nn.Module) -> bool:
    """Whether a call of these modules gathers parameters from all ranks, so that each rank must make as many."""
    if is_deepspeed_zero3_enabled():
        return True
    return any(isinstance(part, FSDPModule) for module in modules for part in module.modules())


def supervised(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions that carry loss: (hidden [tokens, hidden_size], the word that follows each, int64 [tokens]).

    hidden is [batch, length, ...], labels int64 [batch, length] with -100 where a token carries no loss.
    """
    following = labels[:, 1:].to(hidden.device)
    chosen = following != IGNORED
    return hidden[:, :-1][chosen], following[chosen]


class LanguageHead(nn.Linear):
    """The linear map from hidden states to logits, which also takes their summed cross-entropy in the same ONE call:
    ZeRO-3 and FSDP gather its weight around a call, and every rank must call equally often whatever its tokens."""

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """Logits [..., words] of hidden [..., hidden_size]; with targets int64 [tokens] for hidden [tokens,
        hidden_size], the sum of their cross-entropies, a float32 scalar (0 for no tokens), smoothed as
        F.cross_entropy does."""
        if targets is None:
            return super().forward(hidden)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return chunked_cross_entropy(hidden, self.weight, self.bias, targets, label_smoothing)


@torch.compiler.disable  # or the number of chunks is compiled in, anew for other numbers of tokens
def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Summed cross-entropy of hidden [tokens, size] @ weight[words, size].T + bias [words], a float32 scalar."""
    return ChunkedCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing, torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of hidden @ weight.T + bias, chunk by chunk; the gradients are made in forward, so that
    backward makes no logits again and needs no weight. Gradient of a frozen weight or bias: none is made.

    Logits are made in hidden's dtype, as a linear layer makes them, and everything after in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, label_smoothing: float, wanted: bool):
        to_hidden, to_weight, to_bias = (wanted and needed for needed in ctx.needs_input_grad[:3])
        words, rows = len(weight), rows_at_once(len(weight), hidden.device)
        grad_hidden = torch.empty_like(hidden) if to_hidden else None
        # a sum over many chunks must not round to bfloat16 each time
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_weight = torch.zeros_like(weight, dtype=exact) if to_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if to_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            used = weight.to(hidden.dtype)
            used_bias = None if bias is None else bias.to(hidden.dtype)
            for start in range(0, len(hidden), rows):
                piece, target = hidden[start : start + rows], targets[start : start + rows, None]
                logits = F.linear(piece, used, used_bias).to(exact)
                logits -= logits.amax(1, keepdim=True)
                right = logits.gather(1, target)[:, 0]
                smooth = logits.mean(1) if label_smoothing else 0.0
                sums = logits.exp_().sum(1, keepdim=True)
                losses = sums.log()[:, 0] - (1 - label_smoothing) * right - label_smoothing * smooth
                total += losses.sum()
                if not (to_hidden or to_weight or to_bias):
                    continue
                logits /= sums
                if label_smoothing:
                    logits -= label_smoothing / words
                logits.scatter_add_(1, target, logits.new_full(target.shape, label_smoothing - 1))
                if to_bias:
                    grad_bias += logits.sum(0)
                logits = logits.to(hidden.dtype)
                if to_hidden:
                    torch.mm(logits, used, out=grad_hidden[start : start + rows])
                if to_weight and exact == hidden.dtype:
                    grad_weight.addmm_(logits.T, piece)
                elif to_weight:
                    grad_weight += logits.T @ piece
                del logits
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # In place, for a second table of the weight's size may not fit; autograd refuses a second backward.
        made = [
            None if piece is None else piece.mul_(grad).to(dtype)
            for piece, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *made, None, None, None


def summed_loss(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, label_smoothing: float, words: int
) -> torch.Tensor:
    """Summed cross-entropy, float32, of any module that makes logits [tokens, words] of hidden [tokens, hidden_size].

    A LanguageHead does it in one call. Another module (PEFT has put an adapter around the head) is called chunk by
    chunk, and again in backward; with the logits of all tokens where ranks must call equally often.
    """
    if isinstance(head, LanguageHead):
        return head(hidden, targets, label_smoothing)

    def piece_loss(piece: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(piece), target, label_smoothing)

    rows = max(1, len(hidden)) if calls_are_counted(head) else rows_at_once(words, hidden.device)
    # no token still makes one piece, and so one call
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return sum(checkpoint(piece_loss, *pair, use_reentrant=False) for pair in pieces)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Summed cross-entropy, float32, of logits [tokens, words] that are there already."""
    return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)


def mean_loss(total: torch.Tensor, tokens: int, num_items_in_batch: torch.Tensor | float | None) -> torch.Tensor:
    """The sum over the step's supervised tokens, where the Trainer gives their number, or else over this batch's;
    0, and never no number, where there are none."""
    if num_items_in_batch is None:
        return total / max(tokens, 1)
    if torch.is_tensor(num_items_in_batch):
        count = num_items_in_batch.to(total.device)
        return total / torch.where(count > 0, count, torch.ones_like(count))
    return total / (num_items_in_batch or 1)
