"""A new Ovis from any causal language model and a SigLIP or SigLIP2 vision tower."""

from __future__ import annotations

import math
import os

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from .checkpoint import add_visual_tokens, generation_defaults
from .configuration import INDICATORS, Ovis2_5Config, Ovis2_5VisionConfig
from .image_processing import Ovis2_5ImageProcessor
from .modeling import Ovis2_5ForConditionalGeneration, Ovis2_5VisualEmbeddingTable
from .processing import Ovis2_5Processor
from .vision import Ovis2_5VisionModel

# Chat and thinking tokens that Qwen3's tokenizer has and others may lack; the first two are control tokens.
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>")
POSITION_SPREAD = 0.5
TEXT_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def assemble(
    llm: str | os.PathLike | PretrainedConfig,
    vit: str | os.PathLike | PretrainedConfig,
    *,
    visual_vocab_size: int = 65536,
    seed: int = 0,
    tokenizer=None,
    dtype: torch.dtype = torch.float32,
    hidden_stride: int = 2,
    window_size: int = 112,
    temporal_patch_size: int = 1,
    fullatt_block_indexes: str | None = None,
    preserve_original_pe: bool = True,
    use_rope: bool = True,
    min_pixels: int = 448 * 448,
    max_pixels: int = 1344 * 1792,
) -> tuple[Ovis2_5ForConditionalGeneration, Ovis2_5Processor]:
    """Model (in training mode) and processor; same inputs and seed, same weights.

    Args:
        llm: folder or hub id of a causal language model, or its config (random weights, then `tokenizer` is needed).
        vit: folder or hub id of a SigLIP or SigLIP2 model, or a config of one (random weights).
        visual_vocab_size: rows of the visual table, the four indicators among them.
        tokenizer: tokenizer of the language model, when it is not in `llm`.
        hidden_stride ... use_rope: fields of `Ovis2_5VisionConfig`.

    New parts are initialised so that a visual embedding starts as large as a text embedding: after the head's layer
    norm the logits z are standard normal, so softmax(z) averages about V/e words, and the table's rows need a
    standard deviation of sqrt(V/e) times that of the text embeddings.

    Raises ValueError for a language model whose output layer has a bias or whose logits are scaled or capped after it,
    and for another kind of vision tower.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        language, tokenizer = open_language_model(llm, tokenizer, dtype)
        vision_options = {
            "hidden_stride": hidden_stride,
            "window_size": window_size,
            "temporal_patch_size": temporal_patch_size,
            "fullatt_block_indexes": fullatt_block_indexes,
            "preserve_original_pe": preserve_original_pe,
            "use_rope": use_rope,
            "vocab_size": visual_vocab_size,
        }
        vision = open_vision_tower(vit, vision_options, dtype)
        prepare_tokenizer(tokenizer)
        fit_embeddings(language, len(tokenizer))
        atom = tokenizer.convert_tokens_to_ids("<ovis_visual_atom>")
        config = Ovis2_5Config(
            text_config=language.config,
            vision_config=vision.config,
            visual_vocab_size=visual_vocab_size,
            image_token_id=atom,
            image_start_token_id=atom + 1,
            image_end_token_id=atom + 2,
            video_start_token_id=atom + 3,
            video_end_token_id=atom + 4,
            dtype=dtype,
        )
        table = Ovis2_5VisualEmbeddingTable(visual_vocab_size, config.hidden_size, dtype=dtype)
        initialise_table(table, language.get_input_embeddings().weight)
    with torch.device("meta"):
        model = Ovis2_5ForConditionalGeneration(config)
    model.model.vision_tower = vision
    model.model.visual_embeddings_table = table
    model.model.language_model = language.base_model
    model.lm_head.weight = language.get_output_embeddings().weight  # in our head, which never makes whole logits
    model.tie_weights()
    processor = Ovis2_5Processor(
        Ovis2_5ImageProcessor(
            patch_size=vision.config.patch_size,
            hidden_stride=hidden_stride,
            temporal_patch_size=temporal_patch_size,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        ),
        tokenizer,
    )
    model.generation_config = generation_defaults({}, tokenizer)
    return model.train(), processor


def open_language_model(llm, tokenizer, dtype):
    """(causal language model, tokenizer) from a folder, a hub id or a config."""
    if isinstance(llm, PretrainedConfig):
        if tokenizer is None:
            raise ValueError("A language model given by its config has no tokenizer; pass tokenizer=... as well.")
        language = AutoModelForCausalLM.from_config(llm, dtype=dtype, trust_remote_code=False)
    else:
        language = open_whole(AutoModelForCausalLM, llm, dtype)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(llm, trust_remote_code=False)
    head = language.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"The output layer of {language.config.model_type} is not a Linear without bias, which Ovis needs; "
            "choose a language model such as Qwen3, Llama or GPT-2."
        )
    check_logits(language)
    return language, tokenizer


@torch.no_grad()
def check_logits(language) -> None:
    """ValueError for a language model whose logits are not its output layer's alone: scaled (Granite, Cohere) or capped
    (Gemma 2). Ovis's head would leave that out, and configs call it by many names, so a few tokens are tried."""
    hidden, plain = [], []
    head, training = language.get_output_embeddings(), language.training
    hooks = [
        language.base_model.register_forward_hook(lambda module, inputs, output: hidden.append(output[0].clone())),
        head.register_forward_hook(lambda module, inputs, output: plain.extend((inputs[0].clone(), output.clone()))),
    ]
    try:
        ids = torch.arange(min(16, head.out_features), device=language.device)[None]
        logits = language.eval()(input_ids=ids, use_cache=False).logits
    finally:
        language.train(training)
        for hook in hooks:
            hook.remove()
    inside = not hidden or torch.equal(hidden[0], plain[0])  # OPT calls the decoder in its base model, not that
    if not (inside and torch.equal(logits, plain[1].to(logits.dtype))):
        raise ValueError(
            f"{language.config.model_type} scales or caps its logits beside the output layer, which "
            "Ovis does not; choose a language model such as Qwen3, Llama or GPT-2."
        )


def open_whole(auto_class, path_or_id, dtype):
    """The pretrained model; ValueError where tensors are missing, which transformers would fill with random numbers."""
    model, info = auto_class.from_pretrained(path_or_id, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    if missing := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ValueError(
            f"{path_or_id} lacks {len(missing)} tensors that its config.json asks for, {missing[0]} among them; "
            "copy the folder again."
        )
    return model


def open_vision_tower(vit, options: dict, dtype) -> Ovis2_5VisionModel:
    """The vision tower with a new head, with the weights of a SigLIP or SigLIP2 model where a folder or id is given."""
    config = vit if isinstance(vit, PretrainedConfig) else AutoConfig.from_pretrained(vit, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    kinds = ("siglip_vision_model", "siglip2_vision_model", Ovis2_5VisionConfig.model_type)
    if config.model_type not in kinds:
        raise ValueError(f"The vision tower is a {config.model_type}; give a SigLIP or a SigLIP2 model.")
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    fields += ("patch_size", "hidden_act", "layer_norm_eps", "attention_dropout")
    given = {field: getattr(config, field) for field in fields}
    if config.model_type == "siglip2_vision_model":  # NaFlex: a table of num_patches positions, for any resolution
        given["image_size"] = math.isqrt(config.num_patches) * config.patch_size
    else:
        given["image_size"] = config.image_size
    given["initializer_range"] = getattr(config, "initializer_range", 0.02)
    tower = Ovis2_5VisionModel(Ovis2_5VisionConfig(**given, **options)).to(dtype)
    if isinstance(vit, PretrainedConfig):
        initialise_vision(tower)
    else:
        copy_vision_weights(vit, tower, dtype)
    return tower


def initialise_vision(tower: Ovis2_5VisionModel) -> None:
    """Start a tower without weights so that its visual tokens differ.

    Plain filters mostly see a picture's mean brightness, which is the same everywhere: visual tokens then start, and
    for a long time stay, almost equal, and nothing can be located. So the filters' means are taken out, and
    positions are as spread as what the filters say of a patch of some contrast.
    """
    embeddings = tower.transformer.embeddings
    with torch.no_grad():
        weight = embeddings.patch_embedding.weight
        weight -= weight.mean(dim=(1, 2, 3), keepdim=True)
        if tower.config.preserve_original_pe:
            embeddings.position_embedding.weight.normal_(std=POSITION_SPREAD)


def copy_vision_weights(vit, tower: Ovis2_5VisionModel, dtype) -> None:
    """Copy every tensor of the transformer from a SigLIP or SigLIP2 model; ValueError if one is missing."""
    source = open_whole(AutoModel, vit, dtype).state_dict()
    source = {name.split("vision_model.")[-1]: tensor for name, tensor in source.items() if "text_model" not in name}
    target = tower.transformer.state_dict()
    weight = source["embeddings.patch_embedding.weight"]
    config = tower.config
    if weight.dim() == 2:  # NaFlex patches are flattened as (row, column, channel)
        size = config.patch_size
        weight = weight.view(-1, size, size, config.num_channels).permute(0, 3, 1, 2)
    if config.temporal_patch_size > 1:  # a still clip gives what its frame gave
        weight = weight.repeat_interleave(config.temporal_patch_size, dim=1) / config.temporal_patch_size
    source["embeddings.patch_embedding.weight"] = weight.contiguous()
    if missing := [name for name in target if name not in source or source[name].shape != target[name].shape]:
        raise ValueError(
            f"{vit} lacks the vision tensor {missing[0]} of shape {list(target[missing[0]].shape)} "
            f"(and {len(missing) - 1} more); give a SigLIP or a SigLIP2 model."
        )
    tower.transformer.load_state_dict({name: source[name] for name in target})


def prepare_tokenizer(tokenizer) -> None:
    """Add the chat, thinking, tool and visual tokens that the tokenizer lacks; the visual ones come last."""
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in CONTROL_TOKENS if token not in vocabulary], special_tokens=True)
    tokenizer.add_tokens([token for token in TEXT_TOKENS if token not in vocabulary])
    tokenizer.eos_token = "<|im_end|>"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|endoftext|>" if "<|endoftext|>" in vocabulary else "<|im_end|>"
    add_visual_tokens(tokenizer)


def fit_embeddings(language, tokens: int) -> None:
    """Grow the language model's embeddings to hold every token; spare rows are used first."""
    if language.get_input_embeddings().weight.shape[0] < tokens:
        language.resize_token_embeddings(tokens, pad_to_multiple_of=64)


def initialise_table(table: Ovis2_5VisualEmbeddingTable, text: torch.Tensor) -> None:
    """Random rows: words sqrt(V/e) times as spread as the text embeddings, indicators just as spread."""
    words = table.num_embeddings - INDICATORS
    spread = text.detach().float().std().item()
    with torch.no_grad():
        table.weight[:words].normal_(std=spread * math.sqrt(words / math.e))
        table.weight[words:].normal_(std=spread)
