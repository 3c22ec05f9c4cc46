"""The settings of a run in the words of transformers' Trainer."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from ovisnb.train.settings import Settings, SettingsError


def training_arguments(settings: Settings, evaluates: bool) -> TrainingArguments:
    """TrainingArguments of transformers 5.17 to 5.23; raises SettingsError for what this machine cannot do."""
    on_gpu = torch.cuda.is_available()
    if settings.fp16 and not on_gpu:
        raise SettingsError("fp16 needs a GPU: use bf16, or neither.")
    known = TrainingArguments.__dataclass_fields__
    # a setting with a name of transformers' means what it means there
    same = settings.model_dump(exclude={"gradient_checkpointing", "warmup_ratio"})
    values = {name: value for name, value in same.items() if name in known}
    # renamed in 5.20; the old name warns there
    renamed = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    reporters = [name for name in settings.report_to.split(",") if name not in ("none", "tensorboard")]
    values |= {
        renamed: settings.gradient_checkpointing,
        "warmup_steps": settings.warmup_ratio or settings.warmup_steps,  # a share of the steps when below one
        "per_device_eval_batch_size": settings.per_device_eval_batch_size or settings.per_device_train_batch_size,
        # bfloat16 on the CPU asks for it in so many words
        "use_cpu": not (on_gpu or torch.backends.mps.is_available()),
        "dataloader_persistent_workers": settings.dataloader_num_workers > 0,
        "dataloader_pin_memory": on_gpu,
        # the filter waits for the GPU in every step, and hides what MetricsFile stops the run for
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "eval_strategy": "no" if not evaluates else "steps" if settings.eval_steps else "epoch",
        "report_to": reporters or "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cache": True,  # what is saved in config.json; SftTrainer trains without
    }
    try:
        arguments = TrainingArguments(**values)
    except ValueError as error:  # such as the name of no optimizer
        raise SettingsError(
            f"These settings do not suit transformers' Trainer: {' '.join(str(error).split())}."
        ) from None
    if arguments.n_gpu > 1:
        # One process drives one GPU: DataParallel would cut pixel_values at the wrong patches.
        print(f"{arguments.n_gpu} GPUs are visible and one is used: torchrun --nproc_per_node starts one process each")
        arguments._n_gpu = 1
    return arguments
