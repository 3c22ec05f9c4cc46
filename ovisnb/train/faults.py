"""What goes wrong while a run trains, and what becomes of the run.

Records that cannot be read or encoded (an unreadable picture, a broken line, an answer beyond the length limit) stop the
run or are left out and counted, as `on_bad_record` says. A record that is left out leaves its place in the batch empty,
so the others, and a run that continues, stand where they would stand anyway. A loss or a gradient that is no number
stops the run before the optimizer takes it over into the weights.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ovisnb.chat import Encoded
from ovisnb.chat.template import IGNORE_INDEX

SHOWN = 3
JUDGED = 100
"""A run is stopped when more than half of so many records, one after the other, are bad."""
SKIPPED_STEPS = 50
"""float16's scale is halved with every step that overflows: after so many in a row it is 0 and nothing trains."""


class BadDataError(ValueError):
    """Most of the records are bad; the message is one sentence."""


@dataclass(frozen=True)
class Skipped:
    """In the place of a sample: why there is none, "" if none is missed, and the token to fill an empty batch with."""

    sentence: str
    pad_token_id: int

    def __len__(self) -> int:
        return 0

    def blank(self) -> Encoded:
        """A sample that nothing is learnt from: every process runs a forward of every batch, or the others wait."""
        ids = torch.full((2,), self.pad_token_id)
        labels = torch.full_like(ids, IGNORE_INDEX)
        return Encoded("", ids, labels, [], None, None, None, None, self.pad_token_id)


def sound(samples: Sequence[Encoded | Skipped]) -> tuple[list[Encoded], list[str]]:
    """The samples of a batch that are there, and a sentence for each of the others."""
    skipped = [sample.sentence for sample in samples if isinstance(sample, Skipped) and sample.sentence]
    return [sample for sample in samples if not isinstance(sample, Skipped)], skipped


class BadRecords:
    """Counts the records that were left out, tells the first few, and stops a run whose data are mostly bad."""

    def __init__(self, records: int | None, kind: str = "training", shown: int = SHOWN):
        """`records`: how many there are for this process, None if that is not known; `shown`: how many are told."""
        self.records = min(JUDGED, records or JUDGED)
        self.kind, self.shown, self.good, self.bad = kind, shown, 0, 0
        self._last: deque[bool] = deque(maxlen=JUDGED)

    def note(self, good: int, sentences: Sequence[str]) -> None:
        """Count those of a batch; BadDataError when more than half of the last hundred were bad, or all there are."""
        for sentence in sentences:
            self.bad += 1
            if self.bad <= self.shown:
                print(f"left out: {sentence}", flush=True)
            if self.bad == self.shown:
                print("further records that are left out are counted and not shown", flush=True)
        self.good += good
        self._last.extend([False] * good + [True] * len(sentences))
        bad, last = sum(self._last), len(self._last)
        if sentences and (2 * bad > last == JUDGED or (not self.good and self.bad >= self.records)):
            raise BadDataError(
                f"{bad:,} of the last {last:,} {self.kind} records cannot be used, the last one because of "
                f"{sentences[-1].rstrip('.')}; correct the data or image_folder: ovisnb data validate lists what is wrong."
            )


class StopOnNaN(TrainerCallback):
    """Stops a run before a step that would spoil its weights, naming the samples it comes from.

    begin(ids) opens an optimizer step with the ids of the samples of each of its forwards, note(loss) follows each
    forward, and check() comes before the optimizer's step: it waits for the device, once. Every process calls all of
    them, and every process stops. As a callback it sees the steps that float16's scaler leaves out.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.ids: list[list[str]] = []
        self.losses: list[torch.Tensor] = []
        self.skipped_steps = 0

    def begin(self, ids: list[list[str]]) -> None:
        self.ids, self.losses = ids, []

    def note(self, loss: torch.Tensor) -> None:
        """`loss`: a scalar of one forward, before its backward."""
        self.losses.append(loss.detach())

    @property
    def complete(self) -> bool:
        """Whether every forward of the step has been noted."""
        return len(self.losses) == len(self.ids)

    def check(self, step: int, norm: torch.Tensor | float | None = None, taken: bool = False) -> None:
        """FloatingPointError if a loss, or the gradients' `norm`, is no finite number in this `step`.

        `taken`: whether the optimizer has taken it already. With float16 the norm is not looked at: its scaler leaves
        out steps that overflow, which is normal.
        """
        if norm is None or self.accelerator.scaler is not None:
            norm = 0.0
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        values = [torch.as_tensor(value, device=self.accelerator.device).float() for value in (*self.losses, norm)]
        fine = torch.isfinite(torch.stack(values))
        bad = torch.stack([~fine[:-1].all(), ~fine[-1]]).long()
        if not (bad := self.accelerator.reduce(bad, "sum")).any():
            return
        losses = [float(loss) for loss in self.losses]
        mine = [ids for ids, loss in zip(self.ids, losses, strict=False) if not math.isfinite(loss)]
        what, value = "loss", next((loss for loss in losses if not math.isfinite(loss)), None)
        if not bad[0]:  # the losses are numbers, so any of the samples may be the one
            what, mine, value = "gradient", self.ids, float(norm)
        told = gather_object([(ids, value) for ids in mine])
        value = next((value for _, value in told if value is not None), math.nan)
        shown = "; ".join(", ".join(ids) or "none" for ids, _ in told)
        raise FloatingPointError(
            f"The {what} of step {step} is {value}, from the records {shown} (those of one forward between "
            f"semicolons), and the run was stopped {'after' if taken else 'before'} that step changed the weights: look "
            "at these records, lower learning_rate, add warmup_steps or use bf16 in place of fp16, and the same "
            "command continues from the last checkpoint."
        )

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.stepped(state.global_step + 1)

    def stepped(self, step: int) -> None:
        """After the optimizer's step: FloatingPointError when float16's scaler has left out too many in a row."""
        self.skipped_steps = self.skipped_steps + 1 if self.accelerator.optimizer_step_was_skipped else 0
        if self.accelerator.scaler is not None and self.skipped_steps >= SKIPPED_STEPS:
            raise FloatingPointError(
                f"The gradients of the last {self.skipped_steps} steps up to step {step} overflowed in float16, so that "
                "none of them trained: use bf16 in place of fp16, or lower learning_rate."
            )
