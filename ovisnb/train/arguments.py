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
    workers = settings.dataloader_num_workers
    # renamed in 5.20; the old name warns there
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    reporters = [name for name in settings.report_to.split(",") if name not in ("none", "tensorboard")]
    values = dict(
        output_dir=settings.output_dir,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_eval_batch_size or settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        # a share of the steps when below one
        warmup_steps=settings.warmup_ratio or settings.warmup_steps,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        use_cpu=not (on_gpu or torch.backends.mps.is_available()),  # bfloat16 on the CPU asks for it in so many words
        bf16=settings.bf16,
        fp16=settings.fp16,
        seed=settings.seed,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=on_gpu,
        logging_steps=settings.logging_steps,
        # the filter waits for the GPU in every step, and hides what MetricsFile stops the run for
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=settings.save_total_limit,
        eval_strategy="no" if not evaluates else "steps" if settings.eval_steps else "epoch",
        eval_steps=settings.eval_steps,
        report_to=reporters or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cache=True,  # what is saved in config.json; SftTrainer trains without
        **{checkpointing: settings.gradient_checkpointing},
    )
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
