"""What a training run will take of a GPU's memory, before it starts: bytes by purpose at the moment of the peak.

    plan = memory_plan(settings)
    print(plan.text())
    for change in savings(settings): print(change)

One training step of the model's own code is traced on tensors without numbers (ovisnb.train.trace), at the model's full
size and with the largest batch to expect: config.json is enough, no weights are read, no GPU is needed. What several
processes share out is computed (ovisnb.train.plan_parallel).
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.utils import logging

from ovisnb.chat import Encoded
from ovisnb.model import Ovis2_5Config, Ovis2_5ForConditionalGeneration, loss, vision
from ovisnb.model.adapters import KEPT_WHOLE
from ovisnb.train.configs import deepspeed_config
from ovisnb.train.ledger import COPIES, GATHERED, PARTS, TRAFFIC
from ovisnb.train.lora import adapted
from ovisnb.train.modules import freeze, parameter_groups
from ovisnb.train.plan_batch import Load, loads
from ovisnb.train.plan_model import image_limits, planned_model
from ovisnb.train.plan_parallel import Parallel, parallel_of
from ovisnb.train.settings import Settings, SettingsError
from ovisnb.train.trace import Step, Traced, optimizer_memory, trace
from ovisnb.train.trainer import SftTrainer

CARDS = (24, 40, 80, 141)
"""GiB of memory of common GPUs."""
RESERVED = 2**30
"""Bytes of a card that CUDA itself takes (its context and kernels), and that no tensor can have; between 0.4 and 1 GiB."""
SPARE = 0.05
"""Share of what is planned that the allocator loses in pieces too small to use."""
_ELSEWHERE = {
    *("output_dir", "run_name", "model_path", "data_path", "eval_data_path", "image_folder", "data_name"),
    *("max_steps", "save_steps", "logging_steps", "num_train_epochs", "learning_rate", "seed", "report_to"),
}
"""Settings that no tensor of a step depends on, but through its model and batch."""
LEAST = 1 / 1000
"""Share of the peak below which parts are one line of a plan's text."""
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a number in NF4 with double quantization: blocks of 64 with a one-byte scale, 256 of these with a float32 one
(QLoRA, arXiv 2305.14314)."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one GPU (or, on the CPU, one process) holds at the peak of a training step."""

    parts: Mapping[str, int]
    """Part -> bytes at the peak; what is zero then is left out."""
    formulas: Mapping[str, str]
    """Part -> where the number comes from, in words."""
    when: str
    """"forward", "backward" or "optimizer step": the moment of the peak."""
    peaks: Mapping[str, int]
    """The highest of each half of a step: "forward and backward", "optimizer step"."""
    batch: Load
    mean: int | None
    """The peak with the middling batch of the data; None where there is none, or it was not asked for."""
    device: str
    """"cuda" or "cpu"."""
    parallel: str
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of all parts: what torch.cuda.max_memory_allocated will say."""
        return sum(self.parts.values())

    @staticmethod
    def in_words(size: float) -> str:
        """Bytes in words: "1.25 GiB"."""
        return size_of(size)

    def fits(self, gib: float, total: int | None = None) -> bool:
        """Whether a card of so many GiB has room for it (or for `total` bytes), with what CUDA and loose ends of the
        allocator take."""
        return (self.total if total is None else total) * (1 + SPARE) + RESERVED <= gib * 2**30

    def text(self) -> str:
        """A short table."""
        width = max(map(len, self.parts))
        lines = [f"memory of one {'GPU' if self.device == 'cuda' else 'process on the CPU'}, planned ({self.parallel})"]
        shown = {part: size for part, size in self.parts.items() if size >= LEAST * self.total}
        lines += [f"  {part:<{width}}  {size_of(size):>9}  {self.formulas[part]}" for part, size in shown.items()]
        if rest := self.total - sum(shown.values()):
            lines.append(
                f"  {'rest':<{width}}  {size_of(rest):>9}  {', '.join(part for part in self.parts if part not in shown)}"
            )
        lines.append(f"  {'peak':<{width}}  {size_of(self.total):>9}  in the {self.when}; batch: {self.batch}")
        for moment, size in self.peaks.items():
            if size < self.total:
                lines.append(f"  {'':<{width}}  {size_of(size):>9}  in the {moment}")
        if self.mean is not None:
            lines.append(f"  {'':<{width}}  {size_of(self.mean):>9}  with a middling batch")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def size_of(size: float) -> str:
    """Bytes in words: "1.25 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def memory_plan(
    settings: Settings,
    config: Ovis2_5Config | None = None,
    samples: Sequence[Encoded] | None = None,
    world_size: int = 1,
    device: str | None = None,
    middling: bool = True,
    batch: Load | None = None,
) -> MemoryPlan:
    """The plan of a run with these settings.

    config: the model's; None: that of model_path, or of a new Ovis, whose weights are not read. samples: some of the training data, as
    `ovisnb.train.plan_batch.read_samples` reads them; None: those of data_path, and without data a batch as large as
    the settings allow; the same for an empty list. device: "cuda" or "cpu", None: what this machine trains on.
    middling: plan a middling batch of the data as well. batch: plan this one, whatever the data.

    Raises SettingsError for settings that cannot be planned, and what opening the model's config and the data raises.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _quiet(), torch.random.fork_rng(devices=[]):
        reads = samples is None and batch is None and bool(settings.data_path)
        if config is None or reads:
            named, read = planned_model(settings)
            config, samples = config or named, read(settings) if reads else samples
        config = copy.deepcopy(config)
        parallel = parallel_of(settings, world_size)
        largest, other = (batch, None) if batch else loads(settings, config, samples, image_limits(settings))
        traced = _traced(settings, config, largest, parallel, device)
        mean = None
        if other is not None and middling:
            same = str(other).rpartition(";")[0] == str(largest).rpartition(";")[0]
            mean = max((traced if same else _traced(settings, config, other, parallel, device)).peaks.values())
    notes = ["torch.compile is not planned: it usually takes less"] if settings.torch_compile else []
    if settings.trainer == "trl" and device == "cuda":
        notes.append("TRL's output layer is planned for all tokens: on a GPU it takes only the supervised ones")
    return MemoryPlan(
        parts={part: traced.parts[part] for part in PARTS if part in traced.parts},
        formulas=_formulas(settings, config, traced, largest, parallel, device),
        when=traced.when,
        peaks=traced.peaks,
        batch=largest,
        mean=mean,
        device=device,
        parallel=parallel.name,
        notes=tuple(notes),
    )


def _step(settings: Settings, config: Ovis2_5Config, load: Load, parallel: Parallel, device: str) -> Step:
    # Trainer has the batches of a whole step on the device, and the first of the next one on its host
    waiting = settings.gradient_accumulation_steps - (device != "cpu")
    pixels = sum(4 * rows * columns for rows, columns in load.pixels.values())
    return Step(
        build=lambda: _build(settings, config, parallel.dtype),
        batch=load.inputs,
        pixels=load.pixels,
        optimize=_optimizing(settings, device),
        loss=_trl_loss if settings.trainer == "trl" else partial(_loss, smoothing=settings.label_smoothing_factor),
        autocast=None if parallel.dtype else _half(settings),
        checkpointing=settings.gradient_checkpointing,
        accumulates=settings.gradient_accumulation_steps > 1,
        factors=parallel.factors,
        held=lambda model: _held(settings, model, parallel) | {"batch": waiting * pixels},
    )


@dataclass(frozen=True)
class _Asked:
    """A step to trace, told apart by everything that decides its memory."""

    key: tuple
    step: Step = field(compare=False)
    device: str
    gathers: bool


def _traced(settings: Settings, config: Ovis2_5Config, load: Load, parallel: Parallel, device: str) -> Traced:
    """`trace`, which a process does once for the same settings, model, and shape of batch."""
    inputs = [(name, _bytes_of(value)) for name, value in sorted(load.inputs.items())]
    values = {name: value for name, value in settings.to_dict().items() if name not in _ELSEWHERE}
    texts = [config.to_json_string(use_diff=False), values, deepspeed_config(settings, parallel.world), load.pixels]
    key = (*map(str, texts), parallel.world, loss.CHUNK_BYTES, *inputs)
    return _trace_once(_Asked(key, _step(settings, config, load, parallel, device), device, parallel.gathers))


@lru_cache(maxsize=64)
def _trace_once(asked: _Asked) -> Traced:
    with _chunks(asked.device, asked.gathers):
        return trace(asked.step)


def _bytes_of(value: Any) -> Any:
    return (tuple(value.shape), value.dtype, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def _half(settings: Settings) -> torch.dtype | None:
    return torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None


def _loss(model: nn.Module, batch: Mapping[str, Any], smoothing: float) -> torch.Tensor:
    return model(**batch, use_cache=False, num_items_in_batch=1, label_smoothing=smoothing).loss


def _trl_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    return model(**batch, fused_lm_head=True).log_probs.sum()


def _build(settings: Settings, config: Ovis2_5Config, dtype: torch.dtype | None) -> nn.Module:
    # flash attention keeps for backward what sdpa keeps
    config._attn_implementation = "eager" if settings.attn_implementation == "eager" else "sdpa"
    model = Ovis2_5ForConditionalGeneration(config)
    if settings.trainer == "trl":
        from trl.trainer.utils import add_fused_lm_head  # TRL takes seconds to import

        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if settings.use_lora:
        model.config.name_or_path = settings.model_path or "model"
        whole = settings.model_copy(update={"load_in_4bit": False})  # what 4 bit saves is in `_held`
        return adapted(model.to(_half(settings) or torch.float32), whole).train()
    freeze(model, settings)
    return model.to(dtype or torch.float32).train()


def _held(settings: Settings, model: nn.Module, parallel: Parallel) -> dict[str, int]:
    """Bytes that no tensor of the trace stands for; below zero where it stands for less."""
    held = parallel.buffers(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    held["optimizer"] = int(trained * parallel.master)
    if settings.load_in_4bit:
        small = [
            module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not module.weight.requires_grad and not name.endswith(KEPT_WHOLE)
        ]
        held["weights"] = int(sum(weight.numel() * (FOUR_BIT - weight.element_size()) for weight in small))
        # each is made whole again while it is used
        held[COPIES] = max(weight.numel() * weight.element_size() for weight in small)
    return held


def _optimizing(settings: Settings, device: str) -> Callable[[nn.Module], tuple[int, int]]:
    """What `trace.Step.optimize` is for the settings' optimizer; raises SettingsError for one that cannot be planned."""
    asked = SimpleNamespace(
        **{name: getattr(settings, name) for name in ("optim_args", "learning_rate")},
        **{name: getattr(settings, name) for name in ("adam_beta1", "adam_beta2", "adam_epsilon")},
        optim=settings.optim,
    )
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(asked)
        if is_optimizer_factory(kind):
            raise ValueError("it needs the model itself")
    except (ValueError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f'The memory of optim "{settings.optim}" cannot be planned ({reason}).') from None
    if kind.__module__.startswith("bitsandbytes"):
        return lambda model: (_bitsandbytes(model, settings.optim), 0)
    # torch works on all parameters of a group at once on a GPU, and on one after the other on the CPU
    at_once = device == "cuda" and "foreach" in inspect.signature(kind).parameters and not options.get("fused")
    options = options | ({"foreach": True} if at_once else {})

    def optimize(model: nn.Module) -> tuple[int, int]:
        names = SftTrainer.get_decay_parameter_names(SftTrainer.__new__(SftTrainer), model)  # which reads no attribute
        groups = parameter_groups(model, settings, names)
        return optimizer_memory((group["params"] for group in groups), lambda some: kind(some, **options), at_once)

    return optimize


def _bitsandbytes(model: nn.Module, name: str) -> int:
    """Bytes of state of its optimizers: one byte a number and 4 for each block of 256 (Dettmers et al. 2021, arXiv
    2110.02861), or 4 bytes, also for tensors below 4,096 numbers and for embeddings, as Trainer has it. What is paged
    lies on the host."""
    if "paged" in name:
        return 0
    states = 1 if "lion" in name or "rmsprop" in name else 3 if "ademamix" in name else 2
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = 0.0
    for parameter in model.parameters():
        size = parameter.numel() if parameter.requires_grad else 0
        found += size * (4 if "8bit" not in name or size < 4096 or id(parameter) in tables else 1 + 4 / 256)
    return int(states * found)


def _formulas(
    settings: Settings, config: Ovis2_5Config, traced: Traced, load: Load, parallel: Parallel, device: str
) -> dict[str, str]:
    """Part -> where its bytes come from."""
    text, tower, visual = config.text_config, config.vision_config, config.visual_vocab_size
    parts, trained = traced.parts, max(traced.trained, 1)
    kept = "what is kept to recompute them" if settings.gradient_checkpointing else "kept for backward"
    base = f"base in {'4 bit' if settings.load_in_4bit else _name(_half(settings))}, adapters float32"
    kind = base if settings.use_lora else _name(parallel.dtype)

    def each(part: str, count: int, layers: int) -> str:
        return f"{layers} layers x {parts.get(part, 0) / max(count * layers, 1):,.0f} bytes, {kept}"

    atoms = load.patches // tower.hidden_stride**2
    formulas = {
        "weights": f"{_billions(traced.weights)} numbers, {kind}",
        COPIES: "of weights: " + ("whole again from 4 bit" if settings.load_in_4bit else "made by autocast"),
        GATHERED: f"of the layers in use, from {parallel.world} processes",
        "gradients": f"of {_billions(traced.trained)} trained numbers"
        + ("" if parts.get("gradients", 0) or traced.when == "optimizer step" else ", none at this moment"),
        TRAFFIC: f"buffers of {parallel.name}",
        "optimizer": f"{settings.optim}: {parts.get('optimizer', 0) / trained:.3g} bytes a trained number",
        "optimizer step": f"{settings.optim}: numbers in between",
        "language activations": f"{load.tokens:,} tokens x {each('language activations', load.tokens, text.num_hidden_layers)}",
        "vision activations": f"{load.patches:,} patches x "
        + each("vision activations", load.patches, tower.num_hidden_layers),
        "visual softmax": f"{atoms:,} visual tokens over {visual:,} words, {loss.rows_at_once(visual, device):,} at a time",
        "logits": f"{load.supervised:,} supervised tokens over {config.vocab_size:,} words, "
        f"{loss.rows_at_once(config.vocab_size, device):,} at a time, and the head's gradient",
        "batch": "pixels, float32, of the batches of a step",
        "other": "text embeddings, positions",
    }
    if settings.trainer == "trl":
        formulas["logits"] = f"{load.tokens:,} tokens over {config.vocab_size:,} words, in TRL's tiles"
    for part, share in parallel.factors.items():
        if part in formulas and share != 1:
            formulas[part] += f", 1/{parallel.world} of it" if share else ", on the host"
    return formulas


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"


@contextmanager
def _chunks(device: str, gathers: bool) -> Iterator[None]:
    """The model cuts its chunks as on `device`, and as where each call gathers weights: a trace is on the CPU, alone."""
    before = loss.CHUNK_BYTES, loss.calls_are_counted, vision.calls_are_counted
    loss.CHUNK_BYTES *= loss.CUDA_CHUNKS if device == "cuda" else 1
    if gathers:
        loss.calls_are_counted = vision.calls_are_counted = lambda *modules: True
    try:
        yield
    finally:
        loss.CHUNK_BYTES, loss.calls_are_counted, vision.calls_are_counted = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers and torch say of a model that is only traced."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
