"""One training step without its memory: the model's own code on fake tensors, which have shapes and no numbers.

Whole numbers stay real (token ids, masks, grids, and what is made of them), since the model decides by them; every
floating-point tensor is fake. So a step of the released 9B shape is traced on a laptop in seconds, with whatever the
installed transformers, PEFT and torch keep for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from ovisnb.train.ledger import Ledger, tensors_in

aten = torch.ops.aten
_COUNTING = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class FakeLedger(Ledger):
    """A ledger of fake tensors; whole numbers, and whatever is made of real tensors alone, stay real and uncounted.

    To be entered within a FakeTensorMode that allows real inputs.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = list(tensors_in((*args, *kwargs.values())))
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not fake and (tensors or _makes_whole_numbers(func, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in _INDEXED:  # by a mask: how many it chooses, only its real numbers say
            args = (args[0], [part for index in args[1] for part in _places(index)], *args[2:])
        out = func(*args, **kwargs)
        self.see(func, args, out, inputs=False)  # a fake input is a weight, or was made by an operator
        return out

    def add(self, tensor: torch.Tensor, part: str) -> None:
        if isinstance(tensor, FakeTensor):
            super().add(tensor, part)


def _makes_whole_numbers(func: Any, kwargs: Mapping[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    return func in _COUNTING if dtype is None else not dtype.is_floating_point


def _places(index: torch.Tensor | None) -> Iterable[torch.Tensor | None]:
    """An index of `aten.index`, a mask [...] as the places of its ones, int64 [ones] for each of its axes."""
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return [index]
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)


@dataclass(frozen=True)
class Step:
    """Everything that decides the memory of one process' training step."""

    build: Callable[[], nn.Module]
    """Makes the model on the meta device, in training mode, with what trains and what does not."""
    batch: Mapping[str, Any]
    """Inputs of the model: real whole numbers."""
    pixels: Mapping[str, tuple[int, ...]]
    """Shapes of the float32 inputs."""
    optimize: Callable[[nn.Module], tuple[int, int]]
    """Of a model whose gradients are there: (bytes of the optimizer's state, bytes that its step takes besides)."""
    loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]
    """Of a model and a batch, with its graph."""
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    accumulates: bool = False
    """Whether there are gradients of an earlier forward already."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Part -> the share of it that this process holds."""
    held: Callable[[nn.Module], Mapping[str, int]] = lambda model: {}
    """Part -> bytes that are there from beginning to end and in no tensor of the trace."""


@dataclass(frozen=True)
class Traced:
    """What a step takes: `parts` [part -> bytes] at its peak, and `when` that is; `peaks` [phase -> bytes]."""

    parts: Mapping[str, int]
    when: str
    peaks: Mapping[str, int]
    trained: int
    """Numbers that train."""
    weights: int
    """Numbers in the model, buffers included."""


def trace(step: Step) -> Traced:
    """Run one step on fake tensors, the optimizer first, so that forward and backward find its state there."""
    with torch.device("meta"):
        model = step.build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        if step.checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with FakeLedger(model, step.factors) as ledger:
            batch = dict(step.batch) | {name: torch.empty(shape) for name, shape in step.pixels.items()}
            for name in step.pixels:
                ledger.move(batch[name], "batch")
            for part, size in step.held(model).items():
                ledger.hold(part, size)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                ledger.move(parameter.grad, "gradients")
            state, besides = step.optimize(model)
            ledger.hold("optimizer", state)
            ledger.phase = "optimizer step"
            ledger.hold("optimizer step", besides)
            ledger.reset_peak()
            stepping = ledger.peak, ledger.at_peak, ledger.when
            ledger.hold("optimizer step", -besides)
            if not step.accumulates:
                for parameter in trained:
                    parameter.grad = None
            ledger.part, ledger.phase = "other", "forward"
            ledger.reset_peak()
            with nullcontext() if step.autocast is None else torch.autocast("cpu", step.autocast):
                loss = step.loss(model, batch)
            if loss.requires_grad:
                loss.backward()
            running = ledger.peak, ledger.at_peak, ledger.when
        _, parts, when = max(stepping, running, key=lambda found: found[0])
        return Traced(
            parts={part: size for part, size in parts.items() if size},
            when=when,
            peaks={"forward and backward": running[0], "optimizer step": stepping[0]},
            trained=sum(parameter.numel() for parameter in trained),
            weights=sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())),
        )


def _make_fake(model: nn.Module) -> None:
    """Put fake tensors, which say that they are on the CPU, in the places of a model's meta tensors."""
    made: dict[int, torch.Tensor] = {}  # a tied tensor is one
    for module in model.modules():
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is None:
                continue
            if id(old) not in made:
                new = torch.empty(old.shape, dtype=old.dtype)
                is_parameter = isinstance(old, nn.Parameter)
                made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
            (module._parameters if name in module._parameters else module._buffers)[name] = made[id(old)]


def optimizer_memory(
    groups: Iterable[Iterable[nn.Parameter]], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], at_once: bool
) -> tuple[int, int]:
    """(bytes of state, bytes that a step takes besides) of the optimizer that `make` makes.

    Measured on small tensors where bytes depend on how many numbers a parameter has and not on its shape, and else
    traced for each shape. `at_once`: it works on all parameters of a group in one go ("foreach"), and not on one after
    the other.
    """
    lines: dict[torch.dtype, Callable[[int], list[int]] | None] = {}
    traced: dict[tuple, list[int]] = {}
    state = besides = 0
    for group in groups:
        together = before = 0
        for parameter in group:
            if parameter.dtype not in lines:
                lines[parameter.dtype] = _line(parameter.dtype, make)
            line, key = lines[parameter.dtype], (parameter.shape, parameter.dtype)
            if key not in traced:
                traced[key] = line(parameter.numel()) if line else _stepped(*key, make, FakeLedger)
            kept, takes, leaves = traced[key]
            state += kept
            together += takes
            besides = max(besides, together if at_once else takes + before)
            before = leaves
    return state, besides


def _line(dtype: torch.dtype, make: Callable) -> Callable[[int], list[int]] | None:
    """Numbers of a parameter -> what `_stepped` gives, as a straight line; None where the shape counts too."""
    with unset_fake_temporarily():  # real tensors are many times as fast
        flat, square, tall = (_stepped(shape, dtype, make, Ledger) for shape in ((4096,), (64, 64), (128, 64)))
    if flat != square:
        return None
    return lambda numbers: [low + (high - low) * (numbers - 4096) // 4096 for low, high in zip(flat, tall, strict=True)]


def _stepped(shape: Sequence[int], dtype: torch.dtype, make: Callable, kind: type[Ledger]) -> list[int]:
    """[bytes of state, bytes besides, bytes that a loop's variables still hold while it works on the next parameter] of
    an optimizer in its second step."""
    found = []
    for count in (1, 2):
        parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for _ in range(count)]
        with kind() as ledger:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
                ledger.add(parameter.data, "weights")
                ledger.add(parameter.grad, "gradients")
            before = ledger.total
            optimizer = make(parameters)
            optimizer.step()
            state = ledger.total - before
            ledger.reset_peak()
            optimizer.step()
            found.append((state, ledger.peak - state - before))
    (state, besides), (_, both) = found
    return [state, besides, both - besides]
