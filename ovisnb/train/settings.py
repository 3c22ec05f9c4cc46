"""The one settings object of a training run.

    Settings.from_json("sft.json")
    Settings.from_dict({"model_path": "data/tiny-ovis", ...})        # notebook parameters
    Settings.from_args(["sft.json", "--learning_rate", "1e-4", "--bf16"])   # flags, over a file

All three take the same names and give the same object.  The names are those of the earlier Ovis
scripts and of transformers' `TrainingArguments`; where the earlier scripts had several names for one
thing, the others are accepted as aliases.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

ALIASES = {
    "model_name": "model_path",
    "ovis_pretrained_path": "model_path",
    "sft_model_path": "model_path",
    "train_data": "data_path",
    "val_data": "eval_data_path",
    "image_base_path": "image_folder",
    "sft_output_dir": "output_dir",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}

# What `train_modules` may name, joined by "|".
MODULES = ("all", "llm", "visual_tokenizer", "visual_tokenizer.head", "visual_tokenizer.vit", "vte")


class SettingsError(ValueError):
    """A setting that is unknown, has a bad value, or contradicts another; the message is one sentence."""


class Settings(BaseModel):
    """Settings of one supervised fine-tuning run.

    Lengths are in tokens, pixels in image area (height * width), steps in optimizer steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # What to train on what, and where the run goes
    model_path: str | None = Field(None, description="checkpoint folder or hub id to start from")
    data_path: list[str] = Field([], description="training data file, or several (concatenated)")
    eval_data_path: list[str] = Field([], description="data file(s) for eval_loss")
    image_folder: str | None = Field(None, description="folder that the data's image paths are relative to")
    allow_absolute: bool = Field(False, description="absolute image paths may lead out of image_folder")
    output_dir: str = Field("outputs/sft", description="the run folder")
    resume: bool = Field(
        True,
        description="continue from the latest complete checkpoint in output_dir, if there "
        "is one; false refuses an output_dir that is not empty",
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
        None, description='the question before a caption, with one <image>; None: the default of "caption" data'
    )
    stage: Literal["sft"] = Field("sft", description='"sft", which the Ovis scripts call 3, is the only stage')

    # How long and how fast
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data; max_steps wins over it")
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1: num_train_epochs decides")
    per_device_train_batch_size: int = Field(1, ge=1, description="samples of one forward")
    per_device_eval_batch_size: int | None = Field(None, ge=1, description="None: as in training")
    gradient_accumulation_steps: int = Field(1, ge=1, description="forwards of one optimizer step")
    learning_rate: float = Field(2e-5, ge=0)
    lr_scheduler_type: str = Field("cosine", description="any name transformers has: linear, cosine, constant, ...")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of the steps; or give warmup_steps")
    warmup_steps: int = Field(0, ge=0)
    optim: str = Field("adamw_torch", description="any optimizer name transformers' Trainer has")
    weight_decay: float = Field(0.0, ge=0, description="never applied to biases, norms and embeddings")
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    bf16: bool = Field(False, description="bfloat16 autocast over float32 weights")
    fp16: bool = Field(False, description="float16 autocast over float32 weights; needs a GPU")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward: less memory")
    attn_implementation: str | None = Field(None, description="sdpa, eager, flash_attention_2; None: the model's own")
    seed: int = Field(42, ge=0, description="order of the samples, dropout")
    dataloader_num_workers: int = Field(0, ge=0, description="processes that read and encode; 0: the main one")

    # What trains
    train_modules: str = Field("all", description=f'some of {", ".join(MODULES)}, joined by "|"')
    freeze_vision_tower: bool = Field(False, description="the vision transformer stays as it is")
    freeze_llm: bool = Field(False, description="the language model stays as it is")

    # How a record becomes tokens; None: the processor's own limit
    multimodal_max_length: int = Field(8192, ge=1, description="longest sequence of a record with images or a video")
    text_max_length: int = Field(4096, ge=1, description="longest sequence of a record without")
    single_image_min_pixels: int | None = Field(None, ge=1)
    single_image_max_pixels: int | None = Field(None, ge=1)
    multiple_image_min_pixels: int | None = Field(None, ge=1)
    multiple_image_max_pixels: int | None = Field(None, ge=1)
    video_min_pixels: int | None = Field(None, ge=1, description="of each frame")
    video_max_pixels: int | None = Field(None, ge=1, description="of each frame")
    min_frames: int | None = Field(None, ge=1, description="fewest frames of a video; shorter ones repeat frames")
    max_frames: int | None = Field(None, ge=1, description="most frames of a video, taken evenly; None: all")

    # What is written, and how often
    logging_steps: int = Field(10, ge=1)
    save_steps: int = Field(500, ge=0, description="0: no checkpoints, only the final model")
    save_total_limit: int | None = Field(2, ge=1, description="older checkpoints are deleted; None keeps all")
    eval_steps: int | None = Field(None, ge=1, description="None: evaluate at the end of every epoch")
    report_to: str = Field("tensorboard", description='"tensorboard", "wandb", ..., or "none"')

    @field_validator("data_path", "eval_data_path", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        entries = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return [str(entry) if isinstance(entry, Path) else entry for entry in entries]

    @field_validator("model_path", "image_folder", "output_dir", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("stage", mode="before")
    @classmethod
    def _stage_by_name(cls, value: Any) -> Any:
        return "sft" if str(value) == "3" else value

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from a plain dict; raises SettingsError."""
        try:
            settings = cls(**_canonical(values))
        except ValidationError as error:
            raise SettingsError(_one_sentence(error)) from None
        settings._check()
        return settings

    @classmethod
    def from_json(cls, path: str | Path) -> Settings:
        """Settings from a JSON file holding one object; raises SettingsError."""
        return cls.from_dict(_read_json(Path(path)))

    @classmethod
    def from_args(cls, argv: Sequence[str]) -> Settings:
        """Settings from command-line words: an optional CONFIG.json, then `--name value` flags over it.

        A switch is `--bf16` or `--bf16 true`; `--data_path` takes one or several values; `--name=value` works too.
        """
        words = list(argv)
        values = _canonical(_read_json(Path(words.pop(0)))) if words and not words[0].startswith("--") else {}
        flags: dict[str, Any] = {}
        while words:
            flag, equals, value = words.pop(0).removeprefix("--").partition("=")
            given = [value] if equals else []
            while words and not words[0].startswith("--"):
                given.append(words.pop(0))
            name = _known(flag)
            if name in ("data_path", "eval_data_path"):
                flags[flag] = given
            elif len(given) > 1:
                raise SettingsError(f"--{flag} takes one value, not {len(given)}: {' '.join(given)}.")
            elif not given and cls.model_fields[name].annotation is not bool:
                raise SettingsError(f"--{flag} needs a value.")
            elif not given:
                flags[flag] = True
            else:
                optional = type(None) in get_args(cls.model_fields[name].annotation)
                flags[flag] = None if optional and given[0].lower() in ("none", "null") else given[0]
        return cls.from_dict(values | _canonical(flags))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of every setting, ready for JSON; from_dict gives the same settings back."""
        return self.model_dump()

    @property
    def trained(self) -> tuple[str, ...]:
        """The names in train_modules."""
        return tuple(part.strip() for part in self.train_modules.split("|"))

    def _check(self) -> None:
        """Raise SettingsError for values that contradict each other."""
        if self.caption_template is not None and self.data_type != "caption":
            raise SettingsError('caption_template is given, but data_type is not "caption": change one of them.')
        if self.allow_absolute and self.image_folder is None:
            raise SettingsError("allow_absolute is given without an image_folder: give the folder of relative paths.")
        for name in self.trained:
            if ":" in name:
                raise SettingsError(
                    f'train_modules "{name}": a learning rate per module is not available yet, '
                    "give the module's name alone."
                )
            if name not in MODULES:
                raise SettingsError(f'train_modules "{name}" is no module; the modules are {", ".join(MODULES)}.')
        for switch, name in (("freeze_llm", "llm"), ("freeze_vision_tower", "visual_tokenizer.vit")):
            if getattr(self, switch) and name in self.trained:
                raise SettingsError(f'{switch} contradicts train_modules "{self.train_modules}": remove one.')
        if self.max_steps == 0:
            raise SettingsError("max_steps is 0: give at least 1, or -1 to go by num_train_epochs.")
        if self.streaming and self.max_steps < 1:
            raise SettingsError("streaming has no number of steps of its own: give max_steps.")
        for one, other, what in (("bf16", "fp16", "on"), ("warmup_ratio", "warmup_steps", "given")):
            if getattr(self, one) and getattr(self, other):
                raise SettingsError(f"{one} and {other} are both {what}: choose one.")
        for what in ("single_image_{}_pixels", "multiple_image_{}_pixels", "video_{}_pixels", "{}_frames"):
            low, high = (getattr(self, what.format(end)) for end in ("min", "max"))
            if low and high and low > high:
                raise SettingsError(f"{what.format('min')} {low} is above {what.format('max')} {high}.")


def _known(name: str) -> str:
    """The canonical name of a setting; SettingsError naming the nearest for one that does not exist."""
    name = ALIASES.get(name, name)
    if name not in Settings.model_fields:
        near = difflib.get_close_matches(name, [*Settings.model_fields, *ALIASES], n=1, cutoff=0.65)
        hint = f"did you mean '{near[0]}'?" if near else "ovisnb.train.Settings lists the settings there are."
        raise SettingsError(f"Unknown setting '{name}': {hint}")
    return name


def _canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under canonical names; two aliases of one setting must agree."""
    if not isinstance(values, Mapping):
        raise SettingsError(f"Settings are an object of names and values, not a {type(values).__name__}.")
    result: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for key, value in values.items():
        name = _known(key)
        if name in result and result[name] != value:
            raise SettingsError(
                f"'{given_as[name]}' and '{key}' mean the same setting but differ: {result[name]!r} and {value!r}."
            )
        result[name], given_as[name] = value, key
    return result


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SettingsError(f"There is no settings file {path}.") from None
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path} is no valid JSON (line {error.lineno}: {error.msg}).") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8: save it as UTF-8.") from None


def _one_sentence(error: ValidationError) -> str:
    """The first complaint of pydantic, with the setting's name and the value given."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    return f"Setting '{name}' cannot be {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}."
