"""What a run took of memory, and the one error of a run that does not fit: what to change, with numbers from the plan."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from ovisnb.train.ledger import Ledger
from ovisnb.train.settings import Settings

if TYPE_CHECKING:
    from ovisnb.chat import Encoded
    from ovisnb.train.dataset import Encoder
    from ovisnb.train.plan import MemoryPlan
    from ovisnb.train.plan_batch import Load
    from ovisnb.train.savings import Saving

SHOWN = 3
"""Changes and ids that an error names."""
PLANLESS = (ValueError, OSError, RuntimeError, TypeError, AttributeError, KeyError, NotImplementedError)
"""What a plan may raise, which no run ends with."""
ALIKE = 0.02
"""Share by which two batches may differ that have one plan."""
_HOST = re.compile(r"can't allocate memory|not enough memory|bad_alloc|[Cc]annot allocate memory|[Uu]nable to allocate")


class OutOfMemory(ValueError):
    """A training step that did not fit into memory: what it was, what was planned, what to change."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's memory, or the machine's, was not enough."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's allocator of the CPU has no error class of its own
    return isinstance(error, (RuntimeError, OSError)) and bool(_HOST.search(str(error)))


def plan_run(trainer: Any, records: Any, encoder: Encoder) -> None:
    """Give a Watched trainer the plan of its run, print it, and have the peak measured; one process prints.

    What cannot be planned is said in one line, and the run goes on.
    """
    from ovisnb.data.stream import RecordStream
    from ovisnb.train.plan import memory_plan
    from ovisnb.train.plan_batch import STREAMED, cost, read_samples
    from ovisnb.train.savings import savings
    from ovisnb.train.start import in_one_piece

    settings, arguments = trainer.settings, trainer.args
    model = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    again = hasattr(records, "__getitem__") or isinstance(records, RecordStream)  # reading takes nothing from the run
    of = {"config": model.config, "world_size": arguments.world_size}

    def read(changed: Settings) -> Sequence[Encoded] | None:
        most = {"most": STREAMED} if isinstance(records, RecordStream) else {}
        return read_samples(changed, records, encoder.processor, **most) if again else ()

    def save() -> list[Saving]:
        with in_one_piece(arguments):  # what is traced is nobody's part
            plan = trainer.plan or memory_plan(settings, samples=read(settings), device=arguments.device.type, **of)
            return savings(settings, plan, read=read, **of)

    def replan(batch: Load) -> MemoryPlan:
        most, now = (cost(load.tokens, load.patches, model.config) for load in (trainer.plan.batch, batch))
        if abs(now - most) <= ALIKE * most or (now < most and trainer.plan.when == "optimizer step"):
            return trainer.plan  # tracing anew would tell little else
        return memory_plan(settings, device=arguments.device.type, batch=batch, **of)

    trainer.savings = save
    if trainer.is_world_process_zero():
        try:
            with in_one_piece(arguments):  # ZeRO-3 would have every process part the model that is traced
                trainer.plan = memory_plan(
                    settings, samples=read(settings), device=arguments.device.type, middling=False, **of
                )
            print(trainer.plan.text(), flush=True)
        except PLANLESS as error:
            print(f"memory is not planned: {_first_sentence(error)}", flush=True)
    trainer.peak = PeakMemory(trainer.plan, replan)
    trainer.callback_handler.callbacks.insert(0, trainer.peak)  # before what writes the log down


class PeakMemory(TrainerCallback):
    """Measures the peak of a run, and prints it beside the plan.

    On a GPU it is the most bytes that torch's tensors of this process held at one time: it stands in every log as
    "peak_memory", and is printed at the end beside the plan for the largest batch. On the CPU no one counts those, so
    the live tensors of one optimizer step are counted, the first that finds the optimizer's state there, and printed
    beside the plan for the largest batch of that step: later steps cost nothing. A run under DeepSpeed or FSDP, which
    move weights where no operator is seen, and a compiled one are not counted. Memory that the process ever had
    resident is printed at the end: with Python, torch and what the allocator keeps.
    """

    def __init__(self, plan: MemoryPlan | None = None, replan: Callable[[Load], MemoryPlan] | None = None):
        self.plan = plan
        self.replan = replan
        self.ledger: Ledger | None = None
        self.batch: Load | None = None
        self._done = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._done = False
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def begin(self, trainer: Any) -> None:
        """Before the batches of a step are made: count its tensors, if it is the step to count."""
        state = trainer.state
        here = self.plan is not None and trainer.args.device.type == "cpu" and state.is_world_process_zero
        unseen = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.settings.torch_compile
        stateless = state.global_step == 0 and state.max_steps > 1
        if self._done or not here or unseen or stateless:
            return
        self._done, self.batch, self.ledger = True, None, Ledger()
        for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
            self.ledger.add(tensor.data, "weights")
        for tensor in tree_leaves(dict(trainer.optimizer.state)):
            if isinstance(tensor, torch.Tensor):
                self.ledger.add(tensor, "optimizer")
        self.ledger.__enter__()

    def note(self, trainer: Any, inputs: dict[str, Any]) -> None:
        """Before a forward: keep the costliest batch of the step that is counted, without its pixels."""
        if self.ledger is None:
            return
        from ovisnb.train.plan_batch import cost, load_of

        config = trainer.accelerator.unwrap_model(trainer.model).config
        load = load_of(inputs, trainer.settings, config, "of the step that was measured")
        self.batch = max(self.batch or load, load, key=lambda load: cost(load.tokens, load.patches, config))

    def stop(self) -> Ledger | None:
        """Count no more; the ledger, if there was one."""
        ledger, self.ledger = self.ledger, None
        if ledger is not None:
            ledger.__exit__(None, None, None)
        return ledger

    def on_step_end(self, args, state, control, **kwargs):
        ledger = self.stop()
        if ledger is None or self.batch is None:
            return
        from ovisnb.train.plan import size_of

        said = f"memory of step {state.global_step} at its peak: {size_of(ledger.peak)} of tensors measured"
        try:
            plan = self.replan(self.batch)
        except PLANLESS as error:
            print(f"{said}; its batch is not planned: {_first_sentence(error)}", flush=True)
            return
        planned = plan.total
        if state.global_step == 1:  # forward and backward had no state of the optimizer beside them
            running = plan.peaks["forward and backward"] - plan.parts.get("optimizer", 0)
            planned = max(running, plan.peaks["optimizer step"])
        print(f"{said}, {size_of(planned)} planned for its batch", flush=True)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.stop()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and args.device.type == "cuda":
            logs["peak_memory"] = torch.cuda.max_memory_allocated(args.device)

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        from ovisnb.train.plan import size_of

        if args.device.type == "cuda":
            planned = f", planned {size_of(self.plan.total)} for the largest batch" if self.plan else ""
            print(f"peak memory {size_of(torch.cuda.max_memory_allocated(args.device))}{planned}", flush=True)
        else:
            print(f"peak memory of the whole process {size_of(peak_resident())}, with Python and torch", flush=True)


def resident() -> int:
    """Bytes of this process that are in memory now; where the system does not say, the most there ever were."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return peak_resident()
    return pages * resource.getpagesize()


def peak_resident() -> int:
    """The most bytes of this process that were in memory at one time, since it began."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


class Watched:
    """Over any Trainer: running out of memory becomes one OutOfMemory that says what to change.

    `plan` is the run's plan, where there is one, and `savings` makes the changes that would save most.
    """

    plan: MemoryPlan | None = None
    savings: Callable[[], Sequence[Saving]] | None = None
    peak: PeakMemory | None = None
    _doing = "before the first step"

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            said = _first_sentence(error)
        finally:
            if self.peak is not None:
                self.peak.stop()
        # out here nothing refers to the failed step any more, so that its tensors are gone
        raise OutOfMemory(explained(self._doing, said, self.plan, self.savings, self.settings))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.peak is not None:
            self.peak.begin(self)
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        forward = len(self.nan.losses)
        ids = self.nan.ids[forward] if forward < len(self.nan.ids) else []
        self._doing = f"in step {self.state.global_step + 1}, with {batch_in_words(inputs, ids)}"
        if self.peak is not None:
            self.peak.note(self, inputs)
        return super().training_step(model, inputs, *args, **kwargs)


def batch_in_words(inputs: dict[str, Any], ids: Sequence[str]) -> str:
    """Samples, tokens, pictures and the first ids of a batch."""
    grids = [inputs[name] for name in ("image_grid_thw", "video_grid_thw") if inputs.get(name) is not None]
    pictures, patches = sum(map(len, grids)), sum(int(grid.prod(1).sum()) for grid in grids)
    shown = ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
    samples = len(inputs["input_ids"]) if inputs.get("cu_seq_lens_q") is None else len(inputs["cu_seq_lens_q"]) - 1
    return (
        f"{samples:,} sample{'s' if samples > 1 else ''}"
        + (f" ({shown})" if ids else "")
        + f", {inputs['input_ids'].numel():,} tokens, {pictures:,} picture{'' if pictures == 1 else 's'} of {patches:,} patches"
    )


def explained(
    doing: str,
    said: str,
    plan: MemoryPlan | None,
    savings: Callable[[], Sequence[Saving]] | None,
    settings: Settings,
) -> str:
    """The message of an OutOfMemory: a line for what happened, for what was planned, and for each change that helps."""
    from ovisnb.train.plan import size_of

    lines = [f"Out of memory {doing} ({said})."]
    if plan is not None:
        largest = sorted(plan.parts.items(), key=lambda part: part[1], reverse=True)[: SHOWN + 1]
        parts = ", ".join(f"{part} {size_of(size)}" for part, size in largest)
        lines.append(f"Planned were {size_of(plan.total)}: {parts}.")
    if savings is None:
        lines.append("`ovisnb plan --gpu_memory GIB` with the same settings says what to change.")
        return "\n".join(lines)
    try:
        changes = list(savings())[:SHOWN]
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        lines.append(f"What would save most cannot be said here ({_first_sentence(error)}): run `ovisnb plan`.")
        return "\n".join(lines)
    lines.append("What saves most, each alone:" if changes else "No change of these settings would save more than 2%.")
    lines += [f"- {change}" for change in changes]
    return "\n".join(lines)


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[a-z)])\. |\. If | See documentation", text)[0].rstrip(".")[:200]
