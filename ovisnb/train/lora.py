"""LoRA through PEFT: which linear layers get an adapter, which modules train whole, how large the update became.

    model = adapted(model, settings)             # a plain PeftModel; everything else is frozen
    trained_shares(model)                        # {"llm": (trained numbers, all numbers of the base), ...}
    update_norms(model)                          # ||update|| / ||weight|| of every adapted layer

Hu et al. 2021 (arXiv 2106.09685); rsLoRA: arXiv 2312.03732; DoRA: arXiv 2402.09353.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from ovisnb.model import load
from ovisnb.model.adapters import ADAPTER_WEIGHTS, base_path, is_quantized
from ovisnb.train.names import SettingsError, nearest
from ovisnb.train.settings import Settings

LLM, VIT = "model.language_model", "model.vision_tower.transformer"
PARTS = {
    "llm": (f"{LLM}.", "lm_head."),
    "visual_tokenizer.vit": (f"{VIT}.",),
    "visual_tokenizer.head": ("model.vision_tower.head_linear.", "model.vision_tower.head_norm."),
    "vte": ("model.visual_embeddings_table.",),
}
# The released code's names for modules that can be trained whole.
WHOLE = {
    "vte": ("model.visual_embeddings_table",),
    "visual_tokenizer": ("model.vision_tower",),
    "visual_tokenizer.vit": (VIT,),
    "visual_tokenizer.head": ("model.vision_tower.head_linear", "model.vision_tower.head_norm"),
}
ALL_LINEAR = "all-linear"
ADAPTER = "default"  # what PEFT calls the only adapter of a model


# Settings on which the shapes of what trains depend, and so those of the optimizer's state.
LORA_SHAPE = {"use_lora", "lora_preset", "lora_target_modules", "lora_modules_to_save", "lora_r", "use_dora"}


def open_base(settings: Settings) -> tuple[nn.Module, Any]:
    """Model and processor of model_path as a frozen base: in bfloat16 with bf16, in float16 with fp16, else in float32.

    With load_in_4bit its linear layers are in 4 bit, on this process's GPU from the start where there is one.
    Raises SettingsError for 4 bit under ZeRO-3 or FSDP, which would cut the packed weights into parts.
    """
    if settings.load_in_4bit and (is_deepspeed_zero3_enabled() or settings.fsdp):
        raise SettingsError(
            "load_in_4bit holds the base whole on every GPU, and ZeRO-3 and FSDP hold it in parts: use ZeRO-2, or no 4 bit."
        )
    dtype = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": settings.attn_implementation}
    if settings.load_in_4bit:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        options |= {"quantization": "4bit", "device": device}
    return load(settings.model_path, **options)


def adapted(model: nn.Module, settings: Settings) -> PeftModel:
    """`model` as a PeftModel with a new adapter, which does not change its answers yet; all of the base is frozen.

    The same seed gives the same adapter. Adapter weights are float32, whatever the base; so are modules that train whole
    where bf16 or fp16 is set, or where the base is.
    Raises SettingsError for targets or modules that the model does not have or that cannot be trained so, and for a
    model that lies in no folder and has no hub id: its adapter could not be opened again.
    """
    base = base_path(model)
    if base is None:
        raise SettingsError(
            "use_lora needs a base model in a folder, which its adapter can name: write it with ovisnb.save, and give "
            "that folder as model_path."
        )
    if settings.load_in_4bit and not is_quantized(model):
        raise SettingsError(
            'load_in_4bit is for a base that the run opens itself: give model_path, or ovisnb.load(..., quantization="4bit").'
        )
    whole = saved_modules(model, settings.lora_modules_to_save)
    targets = target_modules(model, settings)
    _check_targets(model, targets, whole, settings)
    tied = model.config.tie_word_embeddings and any(name.endswith(("embed_tokens", "lm_head")) for name in whole)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        modules_to_save=whole or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        ensure_weight_tying=tied,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, on what it asks of transformers
        torch.manual_seed(settings.seed)
        model = get_peft_model(model, config)
    model.peft_config[ADAPTER].base_model_name_or_path = base
    if settings.bf16 or settings.fp16:  # else nothing would bring the types together
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.modules_to_save.float()
    return model


def load_weights(model: PeftModel, folder: str | os.PathLike) -> None:
    """Put the weights of an adapter folder, one of the same settings, into a model's adapter."""
    set_peft_model_state_dict(model, load_file(os.path.join(folder, ADAPTER_WEIGHTS)), adapter_name=ADAPTER)


def target_modules(model: nn.Module, settings: Settings) -> str:
    """The settings' preset or own targets as PEFT's `target_modules`: a regular expression on a module's whole name, or
    "all-linear".

    An own target is
    - a bare name such as q_proj: those of the language model, where it has any (the vision tower has a q_proj too);
      fc1, out_proj or head_linear, which it has not, are then the vision tower's;
    - a name with dots: the modules whose name ends so, in all of the model, as PEFT takes it;
    - with any of \\ * + ? ( ) [ ] { } | ^ $, a regular expression on the whole name, as PEFT takes it;
    - all-linear.
    """
    linear = linear_layers(model)
    if not settings.lora_target_modules:
        if settings.lora_preset == ALL_LINEAR:
            return ALL_LINEAR
        roots = (LLM, VIT) if settings.lora_preset == "llm+vision" else (LLM,)
        return "|".join(_within(root, _last_names(linear, root)) for root in roots)
    own = list(dict.fromkeys(settings.lora_target_modules))
    if ALL_LINEAR in own:
        if len(own) > 1:
            raise SettingsError(f"lora_target_modules: {ALL_LINEAR} takes every linear layer: leave the others out.")
        return ALL_LINEAR
    language, patterns = [], []
    names = [name for name, _ in model.named_modules() if name]
    for target in own:
        if re.search(r"[\\*+?()\[\]{}|^$]", target):
            patterns.append(_expression(target, names))
        elif "." not in target and target in _last_names(linear, LLM):
            language.append(target)
        else:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise SettingsError(f"lora_target_modules: {_unknown(target, linear)}")
            patterns.append(rf"(?:.*\.)?{re.escape(target)}")
    return "|".join([_within(LLM, language)] * bool(language) + [f"(?:{pattern})" for pattern in patterns])


def saved_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Whole names of the modules that `names` mean: vte, visual_tokenizer and its parts, or as PEFT takes them, a
    module's name or the end of it. Raises SettingsError for one that is not there, or cannot be trained whole."""
    modules = dict(model.named_modules())
    found: list[str] = []
    for name in names:
        here = [each for each in modules if each and (each == name or each.endswith(f".{name}"))]
        chosen = list(WHOLE.get(name, ())) or here
        if name in ("all", "llm", "language_model", LLM):
            raise SettingsError(
                f"lora_modules_to_save: {name} whole is no LoRA any more: remove use_lora, or name smaller modules."
            )
        if not chosen:
            raise SettingsError(f"lora_modules_to_save: {_unknown(name, [*WHOLE, *modules])}")
        for each in chosen:
            parameters = list(modules[each].parameters())
            if not parameters or isinstance(modules[each], (nn.ModuleList, nn.ModuleDict)):
                raise SettingsError(f"lora_modules_to_save: {each} has no weights of its own: name what is in it.")
            if not all(parameter.is_floating_point() for parameter in parameters):
                raise SettingsError(f"lora_modules_to_save: {each} is in 4 bit, which cannot train: leave one out.")
        found += chosen
    found = list(dict.fromkeys(found))
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers but the output layer, in the model's order."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def _check_targets(model: nn.Module, targets: str, whole: list[str], settings: Settings) -> None:
    """SettingsError unless every target is a linear layer that may train, and some are left beside `whole`."""
    linear = set(linear_layers(model))
    chosen = [name for name, _ in model.named_modules() if targets != ALL_LINEAR and re.fullmatch(targets, name)]
    if wrong := [name for name in chosen if name not in linear]:
        module = model.get_submodule(wrong[0])
        embeds = isinstance(module, (nn.Embedding, nn.Linear))  # of linear layers only the output layer is left
        instead = "give it as lora_modules_to_save" if embeds else "name the linear layers in it"
        raise SettingsError(
            f"lora_target_modules: {wrong[0]} ({type(module).__name__}) is no linear layer below the output: {instead}."
        )
    left = [name for name in chosen or linear if not any(name == each or name.startswith(f"{each}.") for each in whole)]
    if not left:
        raise SettingsError("lora_modules_to_save trains every target whole, so no adapter is left: remove use_lora.")
    if settings.freeze_vision_tower and (tower := [name for name in [*left, *whole] if name.startswith(VIT)]):
        raise SettingsError(f"freeze_vision_tower contradicts LoRA's settings, which train {tower[0]}: remove one.")


def _last_names(linear: list[str], root: str) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear if name.startswith(f"{root}.")))


def _within(root: str, names: list[str]) -> str:
    """A regular expression on whole names: the modules called so anywhere under `root`."""
    return rf"{re.escape(root)}\..*\.({'|'.join(map(re.escape, names))})"


def _expression(target: str, names: list[str]) -> str:
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise SettingsError(f"lora_target_modules: {target} is no regular expression ({error}), and no name.") from None
    if not any(pattern.fullmatch(name) for name in names):
        raise SettingsError(
            f"lora_target_modules: the expression {target} matches no module: it is matched with the whole name, such "
            f"as {LLM}.layers.0.self_attn.q_proj."
        )
    return target


def _unknown(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a module that is not there."""
    last = {each.rpartition(".")[2]: None for each in known if not each.rpartition(".")[2].isdigit()}
    near = nearest(name, [*WHOLE, *last])
    hint = f"did you mean {near}?" if near else f"linear layers are called {', '.join(last)}."
    return f"the model has no module {name}: {hint}"


def trained_shares(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(numbers that train, numbers of the base) in each of llm, visual_tokenizer.vit, visual_tokenizer.head and vte.

    Of a PeftModel the first counts adapters and modules trained whole, also of one that was opened to be asked only;
    the second counts neither.
    """
    counts = {part: [0, 0] for part in PARTS}
    extra = _extra_parameters(model)
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.")
        part = next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), None)
        if part is not None:
            added = id(parameter) in extra
            counts[part][0] += _numbers(parameter) * (added or parameter.requires_grad)
            counts[part][1] += _numbers(parameter) * (not added)
    return {part: (trained, base) for part, (trained, base) in counts.items()}


def _extra_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that PEFT put beside those of the base."""
    extra = set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            added = (getattr(module, name) for name in module.adapter_layer_names)
            extra |= {id(parameter) for part in added for parameter in part.parameters()}
        elif isinstance(module, ModulesToSaveWrapper):
            extra |= {id(parameter) for parameter in module.modules_to_save.parameters()}
    return extra


def _numbers(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds; in 4 bit two lie in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


@dataclass(frozen=True)
class Update:
    """How far training moved one layer: Frobenius norms of its update and of the weight below it."""

    module: str
    """Its whole name in the base model."""
    part: str
    """llm, visual_tokenizer.vit, visual_tokenizer.head or vte."""
    layer: int | None
    """The number of its layer, where it is in one."""
    projection: str
    """The last part of its name."""
    update: float
    weight: float

    @property
    def ratio(self) -> float:
        """||update|| / ||weight||; 0 for a weight of zeros that did not move."""
        return self.update / self.weight if self.weight else float(bool(self.update))


@torch.no_grad()
def update_norms(model: PeftModel) -> list[Update]:
    """One Update for every layer with an adapter and every module that trained whole, in the model's order.

    The update is what merging would add to the weight: scale * B A for LoRA and rsLoRA; for DoRA the whole change,
    magnitudes included.
    """
    updates = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.active_adapters:
            delta, weight = _lora_update(module)
        elif isinstance(module, ModulesToSaveWrapper):
            pairs = zip(module.modules_to_save[ADAPTER].parameters(), module.original_module.parameters(), strict=True)
            new, old = (torch.cat([one.float().flatten() for one in side]) for side in zip(*pairs, strict=True))
            delta, weight = new - old, old
        else:
            continue
        name = name.removeprefix("base_model.model.")
        part = next((part for part, prefixes in PARTS.items() if f"{name}.".startswith(prefixes)), "")
        number = re.search(r"\.(\d+)\.", name)
        updates.append(
            Update(
                module=name,
                part=part,
                layer=int(number[1]) if number else None,
                projection=name.rpartition(".")[2],
                update=delta.norm().item(),
                weight=weight.norm().item(),
            )
        )
    return updates


def _lora_update(module: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """(update, weight) of an adapted linear layer, float32 and in one orientation."""
    weight = dequantize_module_weight(module.get_base_layer()).float()
    delta = module.get_delta_weight(ADAPTER).float()
    if ADAPTER in module.lora_magnitude_vector:
        by_output = 0 if module.fan_in_fan_out else 1  # the dimension that the norm of an output's weights runs over
        magnitude = module.lora_magnitude_vector[ADAPTER].weight.float().unsqueeze(by_output)
        turned = weight + delta
        delta = magnitude * turned / turned.norm(dim=by_output, keepdim=True) - weight
    return delta, weight
