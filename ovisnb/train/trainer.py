"""The Trainer of supervised fine-tuning: transformers' own, that counts what it saw and takes every rate asked for.

`Counting` holds what is ours, over any Trainer of transformers; `SftTrainer` is the one that runs use.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from ovisnb.data.files import write_json
from ovisnb.model.adapters import write_adapter
from ovisnb.train.batches import PlannedBatches, planned_batches, planned_loader, plans
from ovisnb.train.callbacks import last_counts
from ovisnb.train.guard import Guarded
from ovisnb.train.memory import Watched
from ovisnb.train.modules import parameter_groups
from ovisnb.train.settings import Settings, SettingsError
from ovisnb.train.stream import StreamSamples, stream_loader
from ovisnb.train.vision_cache import VisionCache

SHOWN_TRUNCATIONS = 3
COUNT = "data_records.json"
ASKED = ("lr", "weight_decay", "betas", "eps")  # what the settings say of a group of weights


class Counting(Watched, Guarded):
    """Over a Trainer: counts what it saw, weighs eval_loss by tokens, and saves the processor with the model."""

    def __init__(self, *args: Any, processor: Any, settings: Settings, **kwargs: Any):
        super().__init__(*args, settings=settings, **kwargs)
        self.processor = processor
        self.model_accepts_loss_kwargs = settings.accepts_loss_kwargs
        self.seen: dict[str, Any] | None = None
        self.truncated = 0
        self.asked: list[dict[str, Any]] | None = None
        self.vision_cache: VisionCache | None = None
        self.batches: PlannedBatches | None = None

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
            return stream_loader(self.train_dataset, self._train_batch_size, self.args, self.settings.packing)
        if not plans(self.settings):
            return super().get_train_dataloader()
        if self.batches is None:
            arguments = self.args
            self.batches = planned_batches(
                self.train_dataset, self.settings, arguments.process_index, arguments.world_size
            )
        return planned_loader(self.train_dataset, self.batches, self.data_collator, self.args)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one optimizer step and their number of supervised tokens, counted on the way."""
        batches, supervised = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.seen is None:
            self._begin_counting()
        self.here["samples_seen"] += self.note_step(batches)
        for batch in batches:
            self._report_dropped(batch.pop("dropped"))
            if "place" in batch:
                self.train_dataset.places.advance(batch.pop("place"))
            mask = batch.get("attention_mask")  # a packed row has none: nothing in it is padding
            tokens = batch["input_ids"].numel() if mask is None else mask.sum()
            self.here["tokens_seen"] += tokens
        if supervised is not None:
            # a float tensor in some versions, which would lose count above 16.7 million
            self.seen["supervised_tokens"] += torch.as_tensor(supervised).round().long()
            supervised = torch.as_tensor(supervised).clamp(min=1)  # none where every record was left out
        return batches, supervised

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            here = torch.stack([torch.as_tensor(value, device=self.args.device) for value in self.here.values()])
            for name, value in zip(self.here, self.accelerator.reduce(here, "sum"), strict=True):
                self.seen[name] += value
                self.here[name] = 0
            # .item() only here: on a GPU it waits for the device
            logs |= {name: int(value) for name, value in self.seen.items()}
            logs["seconds"] = round(time.monotonic() - self._began, 3)
        super().log(logs, start_time)

    def _begin_counting(self) -> None:
        """Start the counters at zero, or where the checkpoint's last log left them."""
        self.seen = last_counts(self.state.log_history)
        self.here = {"samples_seen": 0, "tokens_seen": 0}  # of this process, since the last log
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
        if not model.training:  # the mean over this process's own tokens, which prediction_step weighs by their number
            kwargs["num_items_in_batch"] = None
        return super().compute_loss(model, {**inputs, **self.model_options(model.training)}, *args, **kwargs)

    def model_options(self, training: bool) -> dict[str, Any]:
        """What a forward is told besides its batch; eval_loss is that of the plain targets."""
        smoothing = self.settings.label_smoothing_factor if training else 0.0
        return {"use_cache": False, "skip_logits": True, "label_smoothing": smoothing}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer over the groups of train_modules; SettingsError for one that makes groups of its own."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = parameter_groups(trained, self.settings, self.get_decay_parameter_names(trained))
            own = {"params", "model", "optimizer_dict"} & options.keys()
            if own or not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
                if {group["lr"] for group in groups} != {self.args.learning_rate}:
                    raise SettingsError(
                        f'optim "{self.settings.optim}" has one learning rate for all it trains: give train_modules without '
                        "rates, or another optim, such as adamw_torch."
                    )
            else:
                self.optimizer_cls_and_kwargs = kind, options | {"params": groups}  # which Trainer takes for the groups
        optimizer = super().create_optimizer(model)
        self.asked = [{name: group[name] for name in ASKED if name in group} for group in optimizer.param_groups]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, with the settings as they are now: the states bring back the rates and decays of then."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.asked is None:  # a DeepSpeed file may bring an optimizer of its own
            return
        for group, asked in zip(self.optimizer.param_groups, self.asked, strict=True):
            group.update(asked, lr=group["lr"])
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # within accelerate's
        if not isinstance(scheduler, LambdaLR):
            return  # such as reduce_lr_on_plateau, whose rate follows from what was
        scheduler.base_lrs = [asked["lr"] for asked in self.asked]
        for group, base, share in zip(
            self.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["initial_lr"], group["lr"] = base, base * share(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's choice (no biases, no norms) without embeddings: a rare row would shrink each step unseen."""
        embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        return [name for name in super().get_decay_parameter_names(model) if name not in embeddings]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Trainer's count walks over every module in every step and knows nothing of the vision tower's patches.
        return 0

    def save_data_position(self, checkpoint: Path) -> None:
        """How far a stream came, or how many records there are."""
        if isinstance(self.train_dataset, StreamSamples):
            self.train_dataset.places.save(checkpoint, self.args)
        elif self.is_world_process_zero():
            write_json(count_of(self.train_dataset), checkpoint / COUNT)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            if self.args.should_save:
                write_adapter(model, self.processor, folder, state_dict)
            return
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.processor.save_pretrained(folder)


class SftTrainer(Counting, Trainer):
    """The Trainer of a supervised run."""


def count_of(records: Any) -> int | None:
    """How many records there are, which is what their order is drawn from; None if they have no number."""
    return len(records) if hasattr(records, "__len__") else None
