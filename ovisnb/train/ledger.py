"""What lives in memory: the bytes of all tensors by what they are for, and where they peak.

    with Ledger(model) as ledger:
        trainer.train()
    ledger.peak, ledger.at_peak["gradients"]

The same ledger counts the tensors of a run on the CPU and the fake tensors of a plan. It sees every tensor that an
operator takes or makes, and not what a kernel uses within itself: as torch.distributed._tools.mem_tracker does.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ovisnb.model.modeling import Ovis2_5Model

aten = torch.ops.aten
COPIES = "half-precision copies"  # of weights, which autocast makes and backward keeps
GATHERED = "gathered weights"  # of other processes, while they are used
TRAFFIC = "communication"  # buffers that gradients and weights travel in
PARTS = (
    "weights",
    COPIES,
    GATHERED,
    "gradients",
    TRAFFIC,
    "optimizer",
    "optimizer step",
    "language activations",
    "vision activations",
    "visual softmax",
    "logits",
    "batch",
    "other",
)


class Ledger(TorchDispatchMode):
    """Counts live tensor bytes while it is entered.

    `live` [part -> bytes] is what there is now, `at_peak` what there was at the `peak` (bytes); `when` is the `phase`
    of that moment. `factors` [part -> share] count only a share of a part, as where it is spread over processes.
    """

    def __init__(self, model: nn.Module | None = None, factors: Mapping[str, float] | None = None):
        super().__init__()
        self.factors = factors or {}
        self.live: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.part, self.phase, self.when = "other", "forward", ""
        self._parts: Any = WeakIdKeyDictionary(ref_type=weakref.ref)  # storage -> its entry [part, bytes]
        self._handles: list[Any] = []
        if model is not None:
            self.watch(model)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.see(func, (*args, *(kwargs or {}).values()), out)
        return out

    def see(self, func: Any, args: Any, out: Any, inputs: bool = True) -> None:
        """Count the tensors that an operator made, and with `inputs` those that it took."""
        for tensor in tensors_in(args) if inputs else ():
            self.add(tensor, self.part)
        part = self.part
        if func is aten._to_copy.default and self.part_of(args[0]) == "weights":
            part = COPIES
        elif func is aten.embedding_dense_backward.default:
            part = "gradients"
        elif self.phase == "backward" and func is aten.add.Tensor and self.part_of(args[0]) == "gradients":
            part = "gradients"  # of a tied weight, from both its places
        for tensor in tensors_in((out,)):
            self.add(tensor, part)

    def add(self, tensor: torch.Tensor, part: str) -> None:
        """Count the storage of a tensor, once, until it is freed."""
        if tensor.is_sparse or type(tensor) is torch.nn.parameter.UninitializedParameter:
            return
        storage = tensor.untyped_storage()
        if storage in self._parts:
            return
        entry = [part, storage.nbytes()]
        self._parts[storage] = entry
        weakref.finalize(storage, self._freed, entry).atexit = False
        self._count(part, entry[1])

    def move(self, tensor: torch.Tensor | None, part: str) -> None:
        """Count a tensor that is there as of another part."""
        entry = None if tensor is None else self._parts.get(tensor.untyped_storage())
        if entry is not None and entry[0] != part:
            self._count(entry[0], -entry[1])
            entry[0] = part
            self._count(part, entry[1])

    def hold(self, part: str, size: int) -> None:
        """Count so many bytes that are in no tensor which is seen."""
        self._count(part, size)

    def part_of(self, tensor: Any) -> str | None:
        entry = self._parts.get(tensor.untyped_storage()) if isinstance(tensor, torch.Tensor) else None
        return entry and entry[0]

    def reset_peak(self) -> None:
        """Forget the peak so far: what is live now is the peak."""
        self.peak, self.at_peak, self.when = self.total, dict(self.live), self.phase

    def _freed(self, entry: list) -> None:
        self._count(entry[0], -entry[1])

    def _count(self, part: str, size: int) -> None:
        size = round(size * self.factors.get(part, 1))
        self.live[part] += size
        self.total += size
        if self.total > self.peak:
            self.reset_peak()

    def watch(self, model: nn.Module) -> None:
        """Count a model's weights, and what its forwards and backwards make, by the parts of an Ovis2.5 model."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.add(tensor.data, "weights")
        for parameter in model.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook
                self._handles.append(hook(lambda parameter: self.move(parameter.grad, "gradients")))
        core = next(module for module in model.modules() if isinstance(module, Ovis2_5Model))
        self._section(core.vision_tower.transformer, "vision activations", "visual softmax")
        self._section(core.language_model, "language activations", "logits")

    def _section(self, module: nn.Module, inside: str, after: str) -> None:
        """From the call of a module on all is `inside`, and from its return on `after`; backward the other way round."""

        def enter(module, args, kwargs):
            self._turn(next((x for x in tree_leaves((args, kwargs)) if _has_graph(x)), None), "visual softmax")
            self.part, self.phase = inside, "forward"

        def leave(module, args, out):
            self._turn(
                next((x for x in tree_leaves(dict(out) if hasattr(out, "keys") else out) if _has_graph(x)), None),
                inside,
            )
            self.part = after

        self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(module.register_forward_hook(leave))

    def _turn(self, tensor: torch.Tensor | None, part: str) -> None:
        """When the gradient of a tensor is there, backward has come to `part`."""
        if tensor is not None:
            tensor.register_hook(partial(self._backward, part))

    def _backward(self, part: str, gradient: torch.Tensor) -> None:
        self.part, self.phase = part, "backward"

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return super().__exit__(*error)


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operator's arguments, or in lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def _has_graph(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and value.is_floating_point()
