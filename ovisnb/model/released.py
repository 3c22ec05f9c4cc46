"""The released checkpoint layout: the one that its remote code, vLLM and ms-swift read and write."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .configuration import Ovis2_5Config
from .processing import CHAT_TEMPLATE, VISUAL_TOKENS
from .weights import write_tensors

# Regular expression on a released tensor name -> native name.
RELEASED_TO_NATIVE = {
    r"^llm\.model\.": "model.language_model.",
    r"^llm\.lm_head\.": "lm_head.",
    r"^visual_tokenizer\.vit\.vision_model\.": "model.vision_tower.transformer.",
    r"^visual_tokenizer\.head\.0\.": "model.vision_tower.head_linear.",
    r"^visual_tokenizer\.head\.1\.": "model.vision_tower.head_norm.",
    r"^vte\.": "model.visual_embeddings_table.",
}
# The same pairs as prefixes, for writing; a prefix never begins another.
PREFIXES = {
    "model.language_model.": "llm.model.",
    "lm_head.": "llm.lm_head.",
    "model.vision_tower.transformer.": "visual_tokenizer.vit.vision_model.",
    "model.vision_tower.head_linear.": "visual_tokenizer.head.0.",
    "model.vision_tower.head_norm.": "visual_tokenizer.head.1.",
    "model.visual_embeddings_table.": "vte.",
}
# Where the released Python lives. Servers that trust it fetch it from there; nothing here ever runs it.
REMOTE_CODE = "AIDC-AI/Ovis2.5-2B--"


def native_config(raw: dict) -> Ovis2_5Config:
    """Native config of a released config.json; token ids follow from the tokenizer's size at load time."""
    text = {key: value for key, value in raw["llm_config"].items() if value is not None}
    rope = text.pop("rope_scaling", None)
    if rope is None and "rope_theta" in text and "rope_parameters" not in text:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    elif rope is not None:
        text["rope_scaling"] = rope
    vision = {key: value for key, value in raw["vit_config"].items() if key in VISION_FIELDS}
    config = Ovis2_5Config(
        text_config=text,
        vision_config=vision,
        visual_vocab_size=raw["visual_vocab_size"],
        dtype=raw.get("torch_dtype") or raw.get("dtype"),
    )
    return config


VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "patch_size",
    "image_size",
    "hidden_act",
    "attention_dropout",
    "layer_norm_eps",
    "hidden_stride",
    "window_size",
    "fullatt_block_indexes",
    "temporal_patch_size",
    "preserve_original_pe",
    "use_rope",
)


def released_config(config: Ovis2_5Config, dtype: torch.dtype) -> dict:
    """config.json of the released identity (model_type "ovis2_5", class "Ovis2_5"), whatever was loaded."""
    text = config.text_config.to_dict()
    rope = dict(text.pop("rope_parameters", None) or {})
    text["rope_theta"] = rope.pop("rope_theta", 10000.0)
    scaled = rope.get("rope_type", "default") != "default"
    text["rope_scaling"] = rope if scaled else None
    name = str(dtype).removeprefix("torch.")
    text.pop("dtype", None)
    text |= {"torch_dtype": name, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    vision = {key: getattr(config.vision_config, key) for key in VISION_FIELDS}
    return {
        "architectures": ["Ovis2_5"],
        "auto_map": {
            "AutoConfig": f"{REMOTE_CODE}configuration_ovis2_5.Ovis2_5_Config",
            "AutoModelForCausalLM": f"{REMOTE_CODE}modeling_ovis2_5.Ovis2_5",
        },
        "conversation_formatter_class": "Qwen3ConversationFormatter",
        "hidden_size": config.hidden_size,
        "llm_config": text,
        "model_type": "ovis2_5",
        "torch_dtype": name,
        "transformers_version": "4.51.3",
        "use_cache": True,
        "visual_vocab_size": config.visual_vocab_size,
        "vit_config": vision | {"model_type": "siglip2_navit", "num_patches": -1},
    }


def released_name(native: str) -> str:
    for prefix, released in PREFIXES.items():
        if native.startswith(prefix):
            return released + native.removeprefix(prefix)
    raise ValueError(f"The tensor {native} has no place in the released layout; merge adapters before saving.")


def write_released(model, processor, folder: Path, safe: bool = True) -> None:
    """Every file of a released checkpoint folder, tensors in .bin files unless `safe`.

    ValueError if the language model is not a Qwen3.
    """
    config = model.config
    if config.text_config.model_type != "qwen3":
        raise ValueError(
            f"The released layout holds a Qwen3 language model, this one is {config.text_config.model_type}; "
            "save it with layout='native'."
        )
    folder.mkdir(parents=True)
    tied = config.tie_word_embeddings
    tensors = {
        released_name(name): tensor.detach().contiguous().cpu()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    write_tensors(tensors, folder, safe)
    write_json(folder / "config.json", released_config(config, model.dtype))
    generation = model.generation_config.to_diff_dict() | {"transformers_version": "4.51.3"}
    write_json(folder / "generation_config.json", generation)
    images = processor.image_processor
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": images.image_mean,
            "image_processor_type": "SiglipImageProcessor",
            "image_std": images.image_std,
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": 512, "width": 512},  # never used: the target size is chosen for each picture
            # Not read by the released code, which takes its limits as arguments; kept for opening here.
            "min_pixels": images.min_pixels,
            "max_pixels": images.max_pixels,
        },
    )
    write_tokenizer(processor.tokenizer, folder)


def write_tokenizer(tokenizer, folder: Path) -> None:
    """Qwen2 tokenizer files as transformers 4.51 reads them, without the native visual placeholder tokens."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] not in VISUAL_TOKENS]
    whole["padding"] = whole["truncation"] = None
    write_json(folder / "tokenizer.json", whole)
    write_json(folder / "vocab.json", whole["model"]["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    write_json(folder / "added_tokens.json", {token["content"]: token["id"] for token in whole["added_tokens"]})
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    special = [token["content"] for token in whole["added_tokens"] if token["special"]]
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token["id"]): {flag: token[flag] for flag in flags} for token in whole["added_tokens"]
            },
            "additional_special_tokens": [t for t in special if t != tokenizer.pad_token],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": tokenizer.pad_token,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def write_json(file: Path, content) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
