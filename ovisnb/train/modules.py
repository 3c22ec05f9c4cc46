"""Which parameters train: the names of `train_modules` as parts of the model."""

from __future__ import annotations

from torch import nn

from ovisnb.train.settings import Settings, SettingsError

# The released code's names for the parts, as prefixes of this model's parameter names.
PREFIXES = {
    "llm": ("model.language_model.", "lm_head."),
    "visual_tokenizer": ("model.vision_tower.",),
    "visual_tokenizer.vit": ("model.vision_tower.transformer.",),
    "visual_tokenizer.head": ("model.vision_tower.head_linear.", "model.vision_tower.head_norm."),
    "vte": ("model.visual_embeddings_table.",),
}


def prefixes(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every name of train_modules but "all" as prefixes of this model's parameter names."""
    blocks = len(model.model.vision_tower.transformer.encoder.layers)
    last = f"model.vision_tower.transformer.encoder.layers.{blocks - 1}."
    return PREFIXES | {"visual_tokenizer.vit.last_block": (last,)}


def freeze(model: nn.Module, settings: Settings) -> dict[str, int]:
    """Set `requires_grad` of every parameter as train_modules, freeze_llm and freeze_vision_tower say.

    Returns how many numbers train in each of llm, visual_tokenizer.vit, visual_tokenizer.head and vte.
    Raises SettingsError when nothing is left to train.
    """
    frozen = [
        name
        for name, on in (("llm", settings.freeze_llm), ("visual_tokenizer.vit", settings.freeze_vision_tower))
        if on
    ]
    counts = dict.fromkeys(("llm", "visual_tokenizer.vit", "visual_tokenizer.head", "vte"), 0)
    places = prefixes(model)
    for name, parameter in model.named_parameters():
        chosen = "all" in settings.trained or any(name.startswith(places[part]) for part in settings.trained)
        parameter.requires_grad_(chosen and not any(name.startswith(places[part]) for part in frozen))
        if parameter.requires_grad:
            for part in counts:
                counts[part] += parameter.numel() * name.startswith(places[part])
    if not any(counts.values()):
        raise SettingsError(
            f'Nothing is left to train: train_modules is "{settings.modules}" and {" and ".join(frozen)} is frozen.'
        )
    return counts
