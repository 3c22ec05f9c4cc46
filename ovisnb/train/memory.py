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
from transformers import TrainerCallback

from ovisnb.train.settings import Settings

if TYPE_CHECKING:
    from ovisnb.chat import Encoded
    from ovisnb.train.dataset import Encoder
    from ovisnb.train.plan import MemoryPlan
    from ovisnb.train.savings import Saving

SHOWN = 3
"""Changes and ids that an error names."""
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
    from ovisnb.train.plan_batch import STREAMED, read_samples
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

    trainer.savings = save
    if trainer.is_world_process_zero():
        try:
            with in_one_piece(arguments):  # ZeRO-3 would have every process part the model that is traced
                trainer.plan = memory_plan(
                    settings, samples=read(settings), device=arguments.device.type, middling=False, **of
                )
            print(trainer.plan.text(), flush=True)
        except (ValueError, OSError, RuntimeError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
            print(f"memory is not planned: {_first_sentence(error)}", flush=True)
    trainer.callback_handler.callbacks.insert(0, PeakMemory(trainer.plan))  # before what writes the log down


class PeakMemory(TrainerCallback):
    """Measures the peak of a run, and prints it at the end beside the plan.

    On a GPU it is the most bytes that torch's tensors of this process held at one time, and stands in every log as
    "peak_memory". On the CPU no one counts those: printed is by how much the most memory that the process ever had
    resident is above what it had when training began, with the allocator's spare room and code that is first used then.
    """

    def __init__(self, plan: MemoryPlan | None = None):
        self.plan = plan
        self.before = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        else:
            self.before = resident()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and args.device.type == "cuda":
            logs["peak_memory"] = self.measured(args)

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        from ovisnb.train.plan import size_of

        took = size_of(self.measured(args))
        if args.device.type == "cuda":
            planned = f", planned {size_of(self.plan.total)}" if self.plan else ""
            print(f"peak memory {took}{planned}", flush=True)
        else:
            beside = self.plan and self.plan.total - self.plan.parts.get("weights", 0)
            planned = f", planned {size_of(beside)} of tensors beside the weights" if self.plan else ""
            print(f"resident memory rose by {took} while training{planned}", flush=True)

    def measured(self, args: Any) -> int:
        """Bytes of this process until now."""
        if args.device.type == "cuda":
            return torch.cuda.max_memory_allocated(args.device)
        return max(0, peak_resident() - self.before)


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
    _doing = "before the first step"

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            said = _first_sentence(error)
        # out here nothing refers to the failed step any more, so that its tensors are gone
        raise OutOfMemory(explained(self._doing, said, self.plan, self.savings, self.settings))

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        forward = len(self.nan.losses)
        ids = self.nan.ids[forward] if forward < len(self.nan.ids) else []
        self._doing = f"in step {self.state.global_step + 1}, with {batch_in_words(inputs, ids)}"
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
