"""Over any Trainer: nothing is lost. Whole checkpoints, bad records left out, no step on a loss that is no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from ovisnb.train.checkpoints import rotate, writing
from ovisnb.train.faults import SHOWN, BadRecords, StopOnNaN
from ovisnb.train.settings import Settings
from ovisnb.train.stopping import keeps_best


class Guarded:
    """Over a Trainer; what comes from `ovisnb.train.checkpoints`, `faults` and `stopping` meets it here."""

    def __init__(self, *args: Any, settings: Settings, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.settings = settings
        # Trainer would remove older checkpoints before the new one is complete, and all but the best in the end,
        # and it takes the best one only from evaluations that fall on save_steps.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.args.load_best_model_at_end = settings.load_best_model_at_end
        self.nan = StopOnNaN(self.accelerator)
        self.add_callback(self.nan)
        self.bad: dict[str, BadRecords] = {}
        self.skipped_before = 0
        self.saved_step = -1

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.bad.clear()
        output = super().train(*args, **kwargs)
        self._tell_skipped("training")
        return output

    def note_step(self, batches: list[dict[str, Any]]) -> int:
        """Take "ids" and "skipped" out of the batches of one optimizer step; returns how many samples they have."""
        if "training" not in self.bad:
            self.bad["training"] = self._counter("training", self.train_dataset)
            logs = (log["skipped"] for log in reversed(self.state.log_history) if "skipped" in log)
            self.skipped_before = next(logs, 0)
        ids = [batch.pop("ids") for batch in batches]
        self.nan.begin(ids)
        for batch, some in zip(batches, ids, strict=True):
            self.bad["training"].note(len(some), batch.pop("skipped"))
        return sum(map(len, ids))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.settings.on_bad_record == "skip":
            logs["skipped"] = self.skipped_before + self._of_all("training")[0]
        super().log(logs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.nan.note(found[0] if isinstance(found, tuple) else found)
            if self._steps_in_backward and self.nan.complete:
                self.nan.check(self.state.global_step + 1)
        return found

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self.nan.check(self.state.global_step + 1, norm, taken=self._steps_in_backward)
        return norm

    @property
    def _steps_in_backward(self) -> bool:
        """DeepSpeed's optimizer takes its step at the end of the backward."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def get_train_dataloader(self) -> Any:
        """Trainer's, with a generator of its own: where its workers start anew, which in a run that continues is
        elsewhere than before, they draw a number, and dropout and noise would be others from there on."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # what accelerate's own iterates over
        loader.generator = inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, which leaves the training's random numbers as they are.

        A loader draws one when its workers start, which in a run that continues is another evaluation than before.
        """
        first = "evaluation" not in self.bad
        self.bad["evaluation"] = self._counter("evaluation", self.eval_dataset, SHOWN if first else 0)
        with torch.random.fork_rng(devices=[]):
            metrics = super().evaluate(*args, **kwargs)
        if first:
            self._tell_skipped("evaluation")
        return metrics

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.bad["evaluation"].note(len(inputs.pop("ids")), inputs.pop("skipped"))
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _counter(self, kind: str, samples: Any, shown: int = SHOWN) -> BadRecords:
        records = getattr(samples, "records", samples)  # without the blank ones of an evaluation
        count = len(records) // self.args.world_size if hasattr(records, "__len__") else None
        return BadRecords(count, kind, shown)

    def _of_all(self, kind: str) -> list[int]:
        """Records left out, and the others, of all processes since this run was started or continued."""
        counts = torch.tensor([self.bad[kind].bad, self.bad[kind].good], device=self.accelerator.device)
        return self.accelerator.reduce(counts, "sum").tolist()

    def _tell_skipped(self, kind: str) -> None:
        if self.settings.on_bad_record != "skip" or kind not in self.bad:
            return
        bad, good = self._of_all(kind)
        before = f", and {self.skipped_before:,} before" if kind == "training" and self.skipped_before else ""
        if (bad or before) and self.is_world_process_zero():
            print(f"left out {bad:,} of {bad + good:,} {kind} records{before}", flush=True)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # A checkpoint remembers the last log, so a log at its step makes the counters exact after a resume.
        if self.control.should_save or self.control.should_evaluate:
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        is_best = super()._determine_best_metric(*args, **kwargs)
        if is_best and keeps_best(self.settings) and self.settings.saves:
            self.control.should_save = True
        return is_best

    def _save_checkpoint(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        folder, step = Path(self.args.output_dir), self.state.global_step
        if step != self.saved_step:
            with writing(folder, step, self.accelerator, self.model) as checkpoint:
                self.save_data_position(checkpoint)
                super()._save_checkpoint(model, *args, **kwargs)
            self.saved_step = step
        elif self.state.best_global_step == step:  # an evaluation after it says so
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{step}")
        if self.is_world_process_zero():
            rotate(folder, self.save_total_limit, self.state.best_global_step if keeps_best(self.settings) else None)

    def save_data_position(self, checkpoint: Path) -> None:
        """What a checkpoint knows of the data."""
