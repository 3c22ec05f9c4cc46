"""The Trainer of supervised fine-tuning: transformers' own, that counts what it saw and takes every rate asked for.

`Counting` holds what is ours, over any Trainer of transformers; `SftTrainer` is the one that runs use.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ovisnb.data.files import write_json
from ovisnb.train.callbacks import last_counts
from ovisnb.train.settings import Settings
from ovisnb.train.stream import StreamSamples, stream_loader
from ovisnb.train.vision_cache import VisionCache

SHOWN_TRUNCATIONS = 3
COUNT = "data_records.json"


class Counting:
    """Over a Trainer: counts what it saw, weighs eval_loss by tokens, and saves the processor with the model."""

    def __init__(self, *args: Any, processor: Any, settings: Settings, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.processor, self.settings = processor, settings
        self.seen: dict[str, Any] | None = None
        self.truncated = 0
        self.vision_cache: VisionCache | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = None
        return super().train(*args, **kwargs)

    def planned_steps(self) -> int:
        """Optimizer steps of the whole run, resumed part included."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        per_epoch = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
        return math.ceil(self.args.num_train_epochs * per_epoch)

    def get_train_dataloader(self) -> Any:
        if isinstance(self.train_dataset, StreamSamples):
            return stream_loader(self.train_dataset, self._train_batch_size, self.args)
        return super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one optimizer step and their number of supervised tokens, counted on the way."""
        batches, supervised = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.seen is None:
            self._begin_counting()
        for batch in batches:
            batch.pop("ids")
            self._report_dropped(batch.pop("dropped"))
            if "place" in batch:
                self.train_dataset.places.advance(batch.pop("place"))
            self.seen["samples_seen"] += len(batch["input_ids"]) * self.args.world_size
            self.seen["tokens_seen"] += batch["attention_mask"].sum() * self.args.world_size
        if supervised is not None:
            # a float tensor in some versions, which would lose count above 16.7 million
            self.seen["supervised_tokens"] += torch.as_tensor(supervised).round().long()
        return batches, supervised

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # .item() only here: on a GPU it waits for the device
            logs |= {name: int(value) for name, value in self.seen.items()}
            logs["seconds"] = round(time.monotonic() - self._began, 3)
        super().log(logs, start_time)

    def _begin_counting(self) -> None:
        """Start the counters at zero, or where the checkpoint's last log left them."""
        self.seen = last_counts(self.state.log_history)
        self._began = time.monotonic() - self.seen.pop("seconds")

    def _report_dropped(self, sentences: list[str]) -> None:
        for sentence in sentences:
            self.truncated += 1
            if self.truncated <= SHOWN_TRUNCATIONS:
                print(sentence, flush=True)
            if self.truncated == SHOWN_TRUNCATIONS:
                print("further truncated records are not shown", flush=True)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch where the model is, with kept features in the place of its pixels if vision_cache is set."""
        if self.settings.vision_cache:
            if self.vision_cache is None:  # not before a checkpoint's weights are there
                self.vision_cache = VisionCache(self.model, self.settings.vision_cache, self.accelerator.autocast)
            inputs = self.vision_cache(inputs)
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs.pop("ids")
        self._report_dropped(inputs.pop("dropped"))
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        sums = self.accelerator.gather(torch.stack([loss * tokens, tokens.to(loss.dtype)])[None])
        self._eval_sums += sums.double().sum(0).cpu()
        return loss, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The loop of Trainer, with a loss that is the mean over supervised tokens whatever the batch size."""
        self._eval_sums = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self._eval_sums.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / tokens if tokens else math.nan
        return output

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's choice (no biases, no norms) without embeddings: a rare row would shrink each step unseen."""
        embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        return [name for name in super().get_decay_parameter_names(model) if name not in embeddings]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Trainer's count walks over every module in every step and knows nothing of the vision tower's patches.
        return 0

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if isinstance(self.train_dataset, StreamSamples):
            self.train_dataset.places.save(checkpoint, self.args)
        elif self.is_world_process_zero():
            write_json(count_of(self.train_dataset), checkpoint / COUNT)
        super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.processor.save_pretrained(output_dir or self.args.output_dir)


class SftTrainer(Counting, Trainer):
    """The Trainer of a supervised run."""


def count_of(records: Any) -> int | None:
    """How many records there are, which is what their order is drawn from; None if they have no number."""
    return len(records) if hasattr(records, "__len__") else None
