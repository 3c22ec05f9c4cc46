"""The one settings object of a training run.

    Settings.from_json("sft.json")
    Settings.from_dict({"model_path": "data/tiny-ovis", ...})        # notebook parameters
    Settings.from_args(["sft.json", "--learning_rate", "1e-4", "--bf16"])   # flags, over a file

All three take the same names and give the same object.  The names are those of the earlier Ovis
scripts, of transformers' `TrainingArguments` and of PEFT's `LoraConfig`; where the earlier scripts had
several names for one thing, the others are accepted as aliases (`ovisnb.train.names`).  What contradicts
something else, or would have no effect, is refused (`ovisnb.train.checks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from ovisnb.train.checks import GRPO, MODULES, check, idle, parse_modules
from ovisnb.train.names import SettingsError, help_page, parse_flags, read_json, renamed, with_files

__all__ = ["MODULES", "Settings", "SettingsError"]

# Heading of the help page -> the first setting below it.
GROUPS = {
    "what to train on what, and where the run goes": "model_path",
    "a new Ovis, in place of model_path": "llm_name_or_path",
    "what trains": "stage",
    "LoRA": "use_lora",
    "how long and how fast": "num_train_epochs",
    "arithmetic and memory": "bf16",
    "the loss": "accepts_loss_kwargs",
    "reading and batches": "packing",
    "how a record becomes tokens (no default: the processor's own limit)": "multimodal_max_length",
    "evaluation": "eval_steps",
    "what is written, and how often": "logging_steps",
    "several processes": "num_processes",
    "the GRPO stage": "grpo_config",
}

# What `train_modules` is where none is given, by stage.
STAGE_MODULES = {"1": "visual_tokenizer.vit.last_block|visual_tokenizer.head|vte"}


class Settings(BaseModel):
    """Settings of one fine-tuning run.

    Lengths are in tokens, pixels in image area (height * width), steps in optimizer steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    model_path: str | None = Field(None, description="checkpoint folder or hub id to start from")
    data_path: list[str] = Field([], description="training data file, or several (concatenated)")
    eval_data_path: list[str] = Field([], description="data file(s) for eval_loss")
    image_folder: str | None = Field(None, description="folder that the data's image paths are relative to")
    allow_absolute: bool = Field(False, description="absolute image paths may lead out of image_folder")
    output_dir: str = Field("outputs/sft", description="the run folder")
    resume: bool = Field(
        True,
        description="continue from the latest complete checkpoint in output_dir, if there is one; false refuses an "
        "output_dir that is not empty",
    )
    streaming: bool = Field(
        False,
        description="read data_path piece by piece while training (.jsonl, .parquet, .tar, patterns); needs max_steps",
    )
    data_name: str | None = Field(
        None, description='a name for the data; of a data-info file, the sets to train on ("photos|captions")'
    )
    data_type: Literal["conversation", "caption"] = Field(
        "conversation", description='"conversation", in any format that is read, or "caption" (picture and caption)'
    )
    caption_template: str | None = Field(
        None, description='the question before a caption, with one <image>; not given: the default of "caption" data'
    )
    on_bad_record: Literal["fail", "skip"] = Field(
        "fail", description="a record that cannot be read or encoded: stop, or leave it out and count it"
    )

    llm_name_or_path: str | None = Field(None, description="language model of a new Ovis: folder or hub id")
    vit_name_or_path: str | None = Field(None, description="its SigLIP or SigLIP2 vision transformer: folder or hub id")
    visual_vocab_size: int = Field(65536, gt=4, description="rows of its visual table")
    vit_hidden_stride: int = Field(2, ge=1, description="patches on a side of one visual token")
    vit_window_size: int = Field(112, ge=1, description="pixels on a side of a window of the vision attention")
    vit_temporal_patch_size: int = Field(1, ge=1, description="frames of one patch")
    vit_fullatt_block_indexes: str | None = Field(
        None, description='vision blocks that attend to the whole picture, such as "7|15"; not given: all'
    )
    vit_preserve_original_pe: bool = Field(True, description="keep the learned positions of the vision transformer")
    vit_use_rope: bool = Field(True, description="rotary positions in the vision transformer")
    model_init_seed: int = Field(0, ge=0, lt=2**32, description="of its new weights")
    conversation_formatter_class: Literal["Qwen3ConversationFormatter"] = Field(
        "Qwen3ConversationFormatter", description="the one chat format there is"
    )

    stage: Literal["sft", "grpo", "both", 1, 2] = Field(
        "sft",
        description="1 (captions: last vision block, head, vte), 2 (everything), sft or 3 (instructions), grpo, or both "
        "(sft, then grpo); 1 and 2 save final/ as pytorch_model.bin",
    )
    trainer: Literal["transformers", "trl"] = Field(
        "transformers", description="transformers, or trl for its SFTTrainer"
    )
    train_modules: str | None = Field(
        None,
        description=f'some of {", ".join(MODULES)}, joined by "|", each with its own learning rate if you like: '
        '"visual_tokenizer.head:1e-4|llm:2e-5"; not given: all, and in stage 1 what that trains',
    )
    freeze_vision_tower: bool = Field(False, description="the vision transformer stays as it is")
    freeze_llm: bool = Field(False, description="the language model stays as it is")

    use_lora: bool = Field(False, description="train adapters; any lora_ setting turns it on")
    lora_preset: Literal["llm", "llm+vision", "all-linear"] = Field(
        "llm", description="where the adapters go: llm, llm+vision, all-linear"
    )
    lora_target_modules: list[str] = Field(
        [], description="in place of lora_preset: names of the linear layers, several words or joined by commas"
    )
    lora_modules_to_save: list[str] = Field([], description="modules trained whole and saved beside the adapters")
    lora_r: int = Field(32, ge=1, description="rank")
    lora_alpha: float = Field(64, gt=0, description="the update is scaled by lora_alpha / lora_r")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(lora_r)")
    use_dora: bool = Field(False, description="train the weights' magnitudes apart from their directions")
    load_in_4bit: bool = Field(False, description="the frozen base in 4 bits (NF4); needs use_lora")

    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data; max_steps wins over it")
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1: num_train_epochs decides")
    per_device_train_batch_size: int = Field(1, ge=1, description="samples of one forward")
    per_device_eval_batch_size: int | None = Field(None, ge=1, description="not given: as in training")
    gradient_accumulation_steps: int = Field(1, ge=1, description="forwards of one optimizer step")
    learning_rate: float = Field(2e-5, ge=0)
    lr_scheduler_type: str = Field("cosine", description="any name transformers has: linear, cosine, constant, ...")
    lr_scheduler_kwargs: dict[str, Any] | None = Field(None, description='JSON, such as {"min_lr": 1e-6}')
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of the steps; or give warmup_steps")
    warmup_steps: int = Field(0, ge=0)
    optim: str = Field("adamw_torch", description="any optimizer name transformers' Trainer has")
    optim_args: str | None = Field(None, description='arguments of that optimizer, "name=value,name=value"')
    weight_decay: float = Field(0.0, ge=0, description="never applied to biases, norms and embeddings")
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    seed: int = Field(42, ge=0, lt=2**32, description="order of the samples, dropout")

    bf16: bool = Field(False, description="bfloat16 autocast over float32 weights")
    fp16: bool = Field(False, description="float16 autocast over float32 weights; needs a GPU")
    tf32: bool | None = Field(None, description="TensorFloat-32 products on a GPU; not given: as torch has it")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward: less memory")
    memory_efficient: bool = Field(
        False, description="turns gradient_checkpointing on; the optimizer stays whole and where it is"
    )
    attn_implementation: str | None = Field(
        None, description="sdpa, eager, flash_attention_2; not given: the model's own"
    )
    torch_compile: bool = Field(False, description="compile the model; the first steps take minutes")
    torch_compile_backend: str | None = Field(None, description="not given: inductor")
    torch_compile_mode: str | None = Field(None, description="default, reduce-overhead, max-autotune")
    torch_empty_cache_steps: int | None = Field(None, ge=1, description="steps between emptying the GPU's cache")
    vision_cache: str | None = Field(None, description="folder for the features of a vision part that does not train")

    accepts_loss_kwargs: bool = Field(
        True,
        description="the loss is the mean over the supervised tokens of a whole optimizer step; false: the mean of its "
        "forwards' means",
    )
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all tokens")
    neftune_noise_alpha: float | None = Field(None, gt=0, description="noise on the text embeddings while training")

    packing: bool = Field(False, description="samples one behind the other in one row, attention within each sample")
    max_batch_tokens: int | None = Field(
        None, ge=1, description="in place of per_device_train_batch_size: as many samples as fit into so many tokens"
    )
    group_by_length: bool = Field(False, description="samples of like length together")
    dataloader_num_workers: int = Field(0, ge=0, description="processes that read and encode; 0: the main one")
    dataloader_prefetch_factor: int | None = Field(None, ge=1, description="batches each of them reads ahead")

    multimodal_max_length: int = Field(8192, ge=1, description="longest sequence of a record with images or a video")
    text_max_length: int = Field(4096, ge=1, description="longest sequence of a record without")
    single_image_min_pixels: int | None = Field(None, ge=1)
    single_image_max_pixels: int | None = Field(None, ge=1)
    multiple_image_min_pixels: int | None = Field(None, ge=1)
    multiple_image_max_pixels: int | None = Field(None, ge=1)
    video_min_pixels: int | None = Field(None, ge=1, description="of each frame")
    video_max_pixels: int | None = Field(None, ge=1, description="of each frame")
    min_frames: int | None = Field(None, ge=1, description="fewest frames of a video; shorter ones repeat frames")
    max_frames: int | None = Field(None, ge=1, description="most frames of a video, taken evenly; not given: all")

    eval_steps: int | None = Field(None, ge=1, description="not given: evaluate at the end of every epoch")
    eval_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None, description="no, steps, epoch; not given: steps if eval_steps is given, else epoch"
    )
    eval_on_start: bool = Field(False, description="evaluate before the first step too")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations without a better eval_loss"
    )
    early_stopping_threshold: float = Field(0.0, ge=0, description="how much lower is better")
    load_best_model_at_end: bool = Field(False, description="final/ is the checkpoint of the lowest eval_loss")
    metric_for_best_model: Literal["eval_loss"] = Field("eval_loss", description="the one metric that is measured")

    logging_steps: int = Field(10, ge=1)
    logging_first_step: bool = Field(False, description="log the first step too")
    save_steps: int = Field(500, ge=0, description="0: no checkpoints, only the final model")
    save_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None, description="no, steps, epoch; not given: steps, unless save_steps is 0"
    )
    save_total_limit: int | None = Field(2, ge=1, description="older checkpoints are deleted; none keeps all")
    report_to: str = Field("tensorboard", description='"tensorboard", "wandb", both with a comma between, or "none"')
    run_name: str | None = Field(None, description="what the run is called where it is reported")

    num_processes: int | None = Field(None, ge=1, description="another number of processes is refused")
    deepspeed: str | None = Field(
        None, description="a DeepSpeed JSON file, or zero0, zero1, zero2, zero2_offload, zero3, zero3_offload"
    )
    fsdp: bool = Field(False, description="PyTorch's fully sharded data parallel (FSDP2)")
    ddp_find_unused_parameters: bool | None = Field(
        None, description="look for parameters without a gradient; none is expected"
    )
    ddp_timeout: int = Field(1800, ge=1, description="seconds that a process waits for the others")

    grpo_config: dict[str, Any] | None = Field(
        None, description="with stage both: a JSON file of the settings that differ in the grpo stage"
    )
    grpo_output_dir: str = Field("outputs/grpo", description="its run folder; with stage grpo, output_dir means it too")
    beta: float = Field(0.1, ge=0, description="weight of the divergence from the reference model")
    num_generations: int = Field(4, ge=2, description="answers compared with each other")
    tool_usage_weight: float = Field(0.4, ge=0, description="weight of a reward")
    bbox_validity_weight: float = Field(0.3, ge=0, description="weight of a reward")
    reasoning_quality_weight: float = Field(0.3, ge=0, description="weight of a reward")

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Paths as text; a switch is no number; an empty word, such as an unset shell variable leaves, is no value."""
        for entry in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(entry, str) and not entry.strip():
                raise ValueError("It is empty: give a value, or remove the setting")
            if isinstance(entry, str) and "\0" in entry:
                raise ValueError("It holds a character that no path has")
        annotation = str(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and ("int" in annotation or "float" in annotation):
            raise ValueError("Input should be a number")
        return str(value) if isinstance(value, Path) else value

    @field_validator("data_path", "eval_data_path", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        entries = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return [str(entry) if isinstance(entry, Path) else entry for entry in entries]

    @field_validator("lora_target_modules", "lora_modules_to_save", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        entries = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if not all(isinstance(entry, str) for entry in entries):
            return entries
        return [word.strip() for entry in entries for word in entry.split(",") if word.strip()]

    @field_validator("vit_fullatt_block_indexes", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        entries = value if isinstance(value, (list, tuple)) else [value]
        whole = all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries)
        return "|".join(map(str, entries)) if whole else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _reporters(cls, value: Any) -> Any:
        if value is None or value == []:
            return "none"
        entries = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(entry, str) for entry in entries):
            return value
        return ",".join(word.strip() for entry in entries for word in entry.split(",") if word.strip())

    @field_validator("stage", mode="before")
    @classmethod
    def _stage_by_name(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return str(value)
        return {"1": 1, "2": 2, "3": "sft"}.get(str(value), value)

    @field_validator("metric_for_best_model", mode="before")
    @classmethod
    def _loss_by_name(cls, value: Any) -> Any:
        return "eval_loss" if value in ("loss", None) else value

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from a plain dict; raises SettingsError."""
        return cls._checked(with_files(renamed(values, cls.model_fields), cls.model_fields))

    @classmethod
    def _checked(cls, given: dict[str, Any]) -> Settings:
        """Settings from values of canonical names, filled in where one setting implies another."""
        if "stage" not in given and not given.keys().isdisjoint(GRPO):
            given["stage"] = "grpo"
        if given.get("stage") == "grpo" and "output_dir" in given:
            folder = given.pop("output_dir")
            if given.setdefault("grpo_output_dir", folder) != folder:
                raise SettingsError(
                    "output_dir and grpo_output_dir differ, and stage grpo has one run folder: keep one."
                )
        filled = dict(given)
        if given.get("train_modules") is None:
            filled["train_modules"] = STAGE_MODULES.get(str(given.get("stage")), "all")
        try:
            settings = cls(**filled)
        except ValidationError as error:
            raise SettingsError(_one_sentence(error)) from None
        fields = cls.model_fields
        on = {name for name in given if getattr(settings, name) or getattr(settings, name) != fields[name].default}
        implied = {}
        if "use_lora" not in given and any(name.startswith(LORA_PREFIXES) for name in on):
            implied["use_lora"] = True
        if settings.memory_efficient and "gradient_checkpointing" not in given:
            implied["gradient_checkpointing"] = True
        settings = settings.model_copy(update=implied)
        check(settings, on)
        if settings.grpo_config is not None:
            cls.from_dict(settings._grpo_values())
        return settings

    @classmethod
    def from_json(cls, path: str | Path) -> Settings:
        """Settings from a JSON file holding one object; raises SettingsError."""
        return cls.from_dict(read_json(path))

    @classmethod
    def from_args(cls, argv: Sequence[str]) -> Settings:
        """Settings from command-line words: an optional CONFIG.json, then `--name value` flags over it.

        A switch is `--bf16` or `--bf16 true`; a list takes one word or several; `--name=value` works too.
        """
        words = list(argv)
        file = read_json(words.pop(0)) if words and not words[0].startswith("-") else {}
        flags = renamed(parse_flags(words, cls.model_fields), cls.model_fields)
        values = renamed(file, cls.model_fields) | flags
        return cls._checked(with_files(values, cls.model_fields, flags))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of every setting that has an effect, ready for JSON; from_dict gives the same settings back."""
        return {name: value for name, value in self.model_dump().items() if name not in idle(self)}

    @classmethod
    def help(cls) -> str:
        """Every setting with its default and meaning, for `ovisnb train --help`."""
        return help_page(cls.model_fields, GROUPS)

    @property
    def saves(self) -> bool:
        """Whether checkpoints are written on the way."""
        return self.save_strategy == "epoch" or (self.save_strategy != "no" and self.save_steps > 0)

    @property
    def modules(self) -> str:
        """train_modules, or what the stage trains."""
        return self.train_modules or STAGE_MODULES.get(str(self.stage), "all")

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate of every module named in train_modules; learning_rate where none stands there."""
        named = parse_modules(self.modules)
        return {name: self.learning_rate if rate is None else rate for name, rate in named.items()}

    @property
    def trained(self) -> tuple[str, ...]:
        """The names in train_modules."""
        return tuple(self.rates)

    @property
    def frozen(self) -> list[str]:
        """The parts that freeze_llm and freeze_vision_tower keep as they are, whatever is trained."""
        switches = {"llm": self.freeze_llm, "visual_tokenizer.vit": self.freeze_vision_tower}
        return [part for part, on in switches.items() if on]

    def _grpo_values(self) -> dict[str, Any]:
        """The settings of the grpo stage of stage "both"."""
        values = self.to_dict() | {"stage": "grpo"}
        del values["grpo_config"], values["output_dir"]
        folder = {"grpo_output_dir": self.grpo_config["output_dir"]} if "output_dir" in self.grpo_config else {}
        return values | {name: value for name, value in self.grpo_config.items() if name != "output_dir"} | folder


LORA_PREFIXES = ("lora_", "use_rslora", "use_dora")


def _one_sentence(error: ValidationError) -> str:
    """The first complaint of pydantic, with the setting's name and the value given."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"Setting '{name}' cannot be {first['input']!r}: {message[0].lower()}{message[1:]}."
