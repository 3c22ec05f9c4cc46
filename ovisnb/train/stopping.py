"""Early stopping on evaluation data, and the best checkpoint: kept through rotation and resume, and final/ in the end.

A checkpoint is written whenever the evaluation is the best so far, whatever save_steps says, and knows the evaluation
of its own step: so evaluations come before checkpoints, those at the end of an epoch too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ovisnb.train.checkpoints import STATE, fault_of
from ovisnb.train.settings import Settings


class EvaluateFirst(TrainerCallback):
    """Evaluate at the last step of an epoch and not after it.

    After it, the step's checkpoint may be written already, and a run that continues from that would never evaluate.
    """

    def __init__(self):
        self.evaluated = -1

    def on_step_end(self, args, state, control, **kwargs):
        ends = control.should_training_stop or float(state.epoch).is_integer()
        if args.eval_strategy == IntervalStrategy.EPOCH and ends and args.eval_delay <= state.epoch:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.evaluated == state.global_step:
            control.should_evaluate = False


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, which counts on where the checkpoint stood, and stops with a checkpoint."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks.setdefault(type(self).__name__, {})  # absent where a run was begun without
        self.early_stopping_patience_counter = _counter(state.stateful_callbacks)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        before = control.should_training_stop
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop and not before and state.is_world_process_zero:
            counter, best = self.early_stopping_patience_counter, state.best_metric
            by = f"{self.early_stopping_threshold:g} " if self.early_stopping_threshold else ""
            print(
                f"stopped early at step {state.global_step}: {args.metric_for_best_model} was not {by}below {best:.4f} in "
                f"the last {counter} evaluation{'s' * (counter > 1)}",
                flush=True,
            )
        if control.should_training_stop and args.save_strategy != IntervalStrategy.NO:
            control.should_save = True


def stopping(settings: Settings) -> list[TrainerCallback]:
    """The callbacks that the settings ask for; they go behind those that ask for evaluations and checkpoints."""
    patience, threshold = settings.early_stopping_patience, settings.early_stopping_threshold
    return [EvaluateFirst(), *([EarlyStopping(patience, threshold)] if patience else [])]


def keeps_best(settings: Settings) -> bool:
    """Whether the checkpoint of the best evaluation is written and kept."""
    return settings.load_best_model_at_end or settings.early_stopping_patience is not None


def is_best(args: TrainingArguments, state: Any, metrics: dict[str, Any]) -> bool:
    """Whether these metrics are better than all before them; call it before Trainer takes note of them."""
    value = metrics[args.metric_for_best_model]
    if state.best_metric is None:
        return True
    return value > state.best_metric if args.greater_is_better else value < state.best_metric


def stopped_early(checkpoint: Path, settings: Settings) -> bool:
    """Whether the run of this checkpoint was stopped for lack of progress, which the settings still call so."""
    if settings.early_stopping_patience is None:
        return False
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return _counter(state["stateful_callbacks"]) >= settings.early_stopping_patience


class Best(NamedTuple):
    """The checkpoint of the best evaluation, and its eval_loss."""

    checkpoint: Path
    metric: float

    def __str__(self) -> str:
        return f"the best model, of {self.checkpoint.name} (eval_loss {self.metric:.4f})"


def best_of(checkpoint: Path) -> Best | None:
    """The best one that a checkpoint knows of; None if there is none that is complete."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if not state.get("best_global_step"):
        return None
    best = checkpoint.with_name(f"checkpoint-{state['best_global_step']}")
    return Best(best, state["best_metric"]) if fault_of(best) is None else None


def best_in(state: TrainerState) -> Best | None:
    """The best one that Trainer has loaded at the end of training."""
    return Best(Path(state.best_model_checkpoint), state.best_metric) if state.best_model_checkpoint else None


def _counter(callbacks: dict[str, Any]) -> int:
    """Evaluations without progress that a checkpoint's state tells."""
    state = callbacks.get(EarlyStopping.__name__, {})
    state = state[0] if isinstance(state, list) else state
    return state.get("attributes", {}).get("early_stopping_patience_counter", 0)
