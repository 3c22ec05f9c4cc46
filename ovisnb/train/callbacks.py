"""What a run writes while it trains: metrics.jsonl, plain progress lines, tensorboard.

Plain lines rather than a progress bar: a notebook run by papermill stores a bar as a widget stuck at 0%.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ovisnb.data.files import written
from ovisnb.train.checkpoints import told_when_full
from ovisnb.train.stopping import is_best


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to the first that is none, as where a killed run cut the last one short."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or "step" not in line:
            break
        lines.append(line)
    return lines


class MetricsFile(TrainerCallback):
    """Append every log as one JSON line to `path`: step, epoch, and whatever was measured.

    On resume the lines after the checkpoint's step are dropped first, so that no step stands there twice.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step and state.global_step]
        with told_when_full(self.path, self.path.parent), written(self.path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        line = {"step": state.global_step}
        for name, value in logs.items():
            # JSON has no NaN and no infinity
            line[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        if "eval_loss" in logs and is_best(args, state, logs):
            line["best"] = True
        with told_when_full(self.path, self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"The loss became {logs['loss']} by step {state.global_step}: lower learning_rate, add warmup_steps, "
                "or use bf16 in place of fp16, and start again from an earlier checkpoint."
            )


class ProgressLines(TrainerCallback):
    """Print a line at every log: step, loss, speed, time to go."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = self.last = time.monotonic()
        self.first_step = state.global_step
        self.before = last_counts(state.log_history)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        step = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            print(f"{step}  eval_loss {logs['eval_loss']:.4f}", flush=True)
        elif "loss" in logs:
            now, before = time.monotonic(), self.before
            seconds = max(now - self.last, 1e-9)
            self.last, self.before = now, last_counts([logs])
            samples, tokens = ((self.before[name] - before[name]) / seconds for name in ("samples_seen", "tokens_seen"))
            left = (now - self.begun) / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
            print(
                f"{step}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}"
                f"  {samples:.1f} samples/s  {tokens:.0f} tokens/s  eta {_clock(left)}",
                flush=True,
            )


def last_counts(logs: list[dict[str, Any]]) -> dict[str, float]:
    """What the last log that counts says was seen, and in how many seconds; zeros where none does."""
    last = next((log for log in reversed(logs) if "samples_seen" in log), {})
    return {name: last.get(name, 0) for name in ("samples_seen", "tokens_seen", "supervised_tokens", "seconds")}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
