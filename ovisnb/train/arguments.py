"""The settings of a run in the words of transformers' Trainer."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ovisnb.train.configs import deepspeed_config, fsdp_config, tell_build_locks, wants_fsdp
from ovisnb.train.distributed import check_world, join
from ovisnb.train.settings import Settings, SettingsError

# Of the same name as Trainer's or TRL's, but done by us: the model's own loss smooths labels, our collator packs, and
# the best model is saved whatever save_steps is.
OURS = {"label_smoothing_factor", "fsdp", "packing", "load_best_model_at_end"}


def training_arguments(settings: Settings, evaluates: bool) -> TrainingArguments:
    """TrainingArguments of transformers 5.17 to 5.23; raises SettingsError for what this machine cannot do."""
    if settings.stage in ("grpo", "both"):
        raise SettingsError(f'stage "{settings.stage}" cannot run yet: R-GRPO is not in this version; use stage sft.')
    if not evaluates:
        for name in ("early_stopping_patience", "load_best_model_at_end", "eval_on_start", "eval_steps"):
            if getattr(settings, name):
                raise SettingsError(f"{name} needs evaluation data: give eval_data_path, or remove it.")
    on_gpu = torch.cuda.is_available()
    if settings.fp16 and not on_gpu:
        raise SettingsError("fp16 needs a GPU: use bf16, or neither.")
    world = check_world(settings)
    fsdp = wants_fsdp(settings)
    kind = TrainingArguments
    if settings.trainer == "trl":
        from trl import SFTConfig as kind
    known = kind.__dataclass_fields__
    # a setting with a name of transformers' means what it means there
    same = settings.model_dump(exclude={"gradient_checkpointing", "warmup_ratio", *OURS})
    values = {name: value for name, value in same.items() if name in known}
    # renamed in 5.20; the old name warns there
    renamed = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    reporters = _reporters(settings)
    values |= {
        renamed: settings.gradient_checkpointing and not fsdp,  # FSDP recomputes within its own units
        "deepspeed": deepspeed_config(settings, world),
        "fsdp": fsdp,
        "fsdp_config": fsdp_config(settings) if fsdp else None,
        # every parameter that trains has a gradient in every step, also where a batch has no picture
        "ddp_find_unused_parameters": bool(settings.ddp_find_unused_parameters),
        "warmup_steps": settings.warmup_ratio or settings.warmup_steps,  # a share of the steps when below one
        "per_device_eval_batch_size": settings.per_device_eval_batch_size or settings.per_device_train_batch_size,
        # bfloat16 on the CPU asks for it in so many words
        "use_cpu": not (on_gpu or torch.backends.mps.is_available()),
        "dataloader_persistent_workers": settings.dataloader_num_workers > 0,
        "dataloader_pin_memory": on_gpu,
        # the filter waits for the GPU in every step, and hides what MetricsFile stops the run for
        "logging_nan_inf_filter": False,
        "save_strategy": (settings.save_strategy or "steps") if settings.saves else "no",
        "save_steps": settings.save_steps or 500,
        "eval_strategy": "no"
        if not evaluates
        else settings.eval_strategy or ("steps" if settings.eval_steps else "epoch"),
        "report_to": reporters or "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cache": True,  # what is saved in config.json; SftTrainer trains without
    }
    if settings.trainer == "trl":
        values |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}  # the encoder did both
    if values["deepspeed"]:
        tell_build_locks()
    try:
        arguments = kind(**values)
    except ValueError as error:  # such as the name of no optimizer
        raise SettingsError(
            f"These settings do not suit transformers' Trainer: {' '.join(str(error).split())}."
        ) from None
    _check_optimizer(settings, arguments)
    join(arguments)
    if arguments.n_gpu > 1:
        # One process drives one GPU: DataParallel would cut pixel_values at the wrong patches.
        print(f"{arguments.n_gpu} GPUs are visible and one is used: torchrun --nproc_per_node starts one process each")
        arguments._n_gpu = 1
    return arguments


def _check_optimizer(settings: Settings, arguments: TrainingArguments) -> None:
    """SettingsError for arguments of scheduler or optimizer that Trainer would stumble over with the model loaded."""
    for pair in (settings.optim_args or "").split(","):
        if settings.optim_args and pair.count("=") != 1:
            raise SettingsError(f'optim_args "{pair.strip()}" is no name=value: give "name=value,name=value".')
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Linear(1, 1))
    except (ImportError, ValueError) as error:  # such as a package that is not here
        raise SettingsError(
            f'optim "{settings.optim}" cannot be made: {" ".join(str(error).split()).rstrip(".")}.'
        ) from None
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    try:
        get_scheduler(settings.lr_scheduler_type, optimizer, 0, 100, settings.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f'lr_scheduler_type "{settings.lr_scheduler_type}" cannot be made with lr_scheduler_kwargs '
            f"{settings.lr_scheduler_kwargs or {}}: {' '.join(str(error).split()).rstrip('.')}."
        ) from None


def _reporters(settings: Settings) -> list[str]:
    """What transformers reports to, tensorboard aside; SettingsError for what it does not know or is not installed."""
    names = [name.strip() for name in settings.report_to.split(",")]
    names = [name for name in names if name not in ("none", "tensorboard")]
    for name in names:
        if name not in (*INTEGRATION_TO_CALLBACK, "all"):
            raise SettingsError(
                f'report_to "{name}" is unknown: use none, all, or some of {", ".join(INTEGRATION_TO_CALLBACK)}.'
            )
        package = {"azure_ml": "azureml", "flyte": "flytekit"}.get(name, name)
        if name != "all" and find_spec(package) is None:
            offline = " (WANDB_MODE=offline keeps its runs on this machine)" if name == "wandb" else ""
            raise SettingsError(f'report_to "{name}" needs its package: pip install {package}{offline}, or remove it.')
    return names
