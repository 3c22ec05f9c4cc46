"""Which parameters train, and at which rate: the names of `train_modules` as parts of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ovisnb.train.checks import PARTS, parse_modules, specificity
from ovisnb.train.settings import Settings, SettingsError

# The released code's names for the parts, as prefixes of this model's parameter names.
PREFIXES = {
    "all": ("",),
    "llm": ("model.language_model.", "lm_head."),
    "visual_tokenizer": ("model.vision_tower.",),
    "visual_tokenizer.vit": ("model.vision_tower.transformer.",),
    "visual_tokenizer.head": ("model.vision_tower.head_linear.", "model.vision_tower.head_norm."),
    "vte": ("model.visual_embeddings_table.",),
}
BLOCKS = "model.vision_tower.transformer.encoder.layers."
OTHER = "other"  # group of what trains outside every module named, such as an adapter

# What PEFT, torch.compile and parallel wrappers put before a model's own names.
WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.")
# Parts of a PEFT adapter that stand for an embedding or a norm: of an embedding's LoRA, and DoRA's magnitudes.
UNDECAYED = ("lora_embedding_", "lora_magnitude_vector")


def own_name(name: str) -> str:
    """A parameter's name in the model itself, without the prefixes of what wraps it."""
    while wrapper := next((wrapper for wrapper in WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(wrapper)
    return name


def module_of(names: Iterable[str], modules: Iterable[str]) -> dict[str, str | None]:
    """For each of all parameter names of a model, the most specific of `modules` that it is in, or None."""
    names = list(names)
    own = {name: own_name(name) for name in names}
    numbers = [int(each.removeprefix(BLOCKS).partition(".")[0]) for each in own.values() if each.startswith(BLOCKS)]
    prefixes = PREFIXES | {"visual_tokenizer.vit.last_block": (f"{BLOCKS}{max(numbers, default=0)}.",)}
    ordered = sorted(modules, key=specificity, reverse=True)
    return {name: next((each for each in ordered if own[name].startswith(prefixes[each])), None) for name in names}


def freeze(model: nn.Module, settings: Settings) -> dict[str, int]:
    """Set `requires_grad` of every parameter as train_modules, freeze_llm and freeze_vision_tower say.

    A module of rate 0 is frozen. Returns how many numbers train in each of llm, visual_tokenizer.vit,
    visual_tokenizer.head and vte. Raises SettingsError when nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    named = module_of(parameters, settings.trained)
    parts = module_of(parameters, PARTS)
    rates = parse_modules(settings.modules)
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in parameters.items():
        trains = named[name] is not None and rates[named[name]] != 0 and parts[name] not in settings.frozen
        parameter.requires_grad_(trains)
        if trains:
            counts[parts[name]] += getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3's parts are empty here
    if not any(counts.values()):
        raise SettingsError(
            f'Nothing is left to train: the model has nothing of train_modules "{settings.modules}" that is not frozen.'
        )
    return counts


def parameter_groups(model: nn.Module, settings: Settings, decay_names: Iterable[str]) -> list[dict[str, Any]]:
    """The optimizer's groups: what trains of `model`, by module of train_modules and by weight decay.

    A parameter has the rate of the most specific module that names it, and learning_rate where none does (adapters of
    PEFT beside the modules that have a rate). Weight decay falls on `decay_names` alone, without embeddings that go
    by another name: a tied output layer, and the adapters of embeddings and norms.

    Returns a list of {"params", "lr", "weight_decay", "name"}, empty ones left out.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    modules = module_of([name for name, _ in model.named_parameters()], settings.trained)
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    decay_names = set(decay_names)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in trained.items():
        decays = name in decay_names and id(parameter) not in embeddings and not any(part in name for part in UNDECAYED)
        module = modules[name] or OTHER
        group = groups.setdefault(
            (module, decays),
            {
                "params": [],
                "lr": settings.rates.get(module, settings.learning_rate),
                "weight_decay": settings.weight_decay if decays else 0.0,
                "name": module if decays else f"{module} (no decay)",
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
