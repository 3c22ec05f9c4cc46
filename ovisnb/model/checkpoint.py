"""Opening and saving checkpoints: the native layout and the released one, without code or pickles from a folder."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .adapters import (
    ADAPTER_CONFIG,
    adapter_files,
    is_quantized,
    keep_gradients,
    open_adapter,
    quantized,
    write_adapter,
)
from .configuration import Ovis2_5Config
from .files import CheckpointError, find_file, first_line, read_json
from .image_processing import Ovis2_5ImageProcessor
from .modeling import Ovis2_5ForConditionalGeneration
from .processing import VISUAL_TOKENS, Ovis2_5Processor
from .released import RELEASED_TO_NATIVE, native_config, write_released
from .weights import has_only_bin, own_tensors, read_bin, write_tensors

if TYPE_CHECKING:
    from peft import PeftModel

# What a checkpoint is made of, in either layout and by any transformers; everything else in a folder is its owner's.
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "*processor_config.json",
    "model*.safetensors",
    "pytorch_model*.bin",
    "*.index.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
    "adapter_*.json",
    "adapter_model*.safetensors",
)


def load(
    path_or_id: str | os.PathLike,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    quantization: str | BitsAndBytesConfig | None = None,
    base_model: str | os.PathLike | None = None,
) -> tuple[Ovis2_5ForConditionalGeneration | PeftModel, Ovis2_5Processor]:
    """Model (in evaluation mode) and processor of a native folder, a released-layout folder, an adapter folder or a
    hub id of one of these.

    Args:
        dtype: of the weights; None keeps the checkpoint's own.
        device: None means the CPU.
        attn_implementation: "sdpa" (default), "eager" or "flash_attention_2" (needs the flash-attn package).
        quantization: "4bit" (NF4) or a BitsAndBytesConfig opens the linear layers in so many bits; both embedding
            tables, lm_head and the visual head stay whole, in `dtype`.
        base_model: of an adapter folder, the base to open it over, in place of the one that it names.

    An adapter folder gives a PeftModel: the base with the adapter over it, not merged (`ovisnb merge` does that).
    Never runs Python from the folder, and of pytorch_model.bin, which is read where there are no safetensors, takes
    tensors alone. Raises CheckpointError if there is no Ovis2.5 checkpoint, or if its tensors are not exactly the
    model's.
    """
    if adapter := adapter_files(path_or_id):
        model, processor = load(adapter.base(base_model), dtype, device, attn_implementation, quantization)
        if adapter.has_processor:
            processor = load_processor(path_or_id, base_model)
        return open_adapter(model, adapter).eval(), processor
    if base_model is not None:
        raise CheckpointError(f"{path_or_id} is no adapter folder, so there is no use for base_model {base_model}.")
    raw, config = read_config(path_or_id)
    released = "llm_config" in raw
    processor = load_processor(path_or_id)
    if released:  # its config.json does not know the native placeholders
        ids = processor.visual_ids
        config.image_token_id = ids.atom
        config.image_start_token_id, config.image_end_token_id = ids.image_start, ids.image_end
        config.video_start_token_id, config.video_end_token_id = ids.video_start, ids.video_end
    check_token_ids(path_or_id, config, processor)
    dtype = "auto" if dtype is None else torch_dtype(dtype)
    options = {}
    if quantization is not None:
        options = quantized(quantization, config.dtype if dtype == "auto" else dtype, device)
    bins = {"state_dict": read_bin(path_or_id)} if has_only_bin(path_or_id) else {}
    try:
        with quiet():
            model, info = Ovis2_5ForConditionalGeneration.from_pretrained(
                None if bins else path_or_id,
                config=config,
                key_mapping=RELEASED_TO_NATIVE if released else None,
                use_safetensors=True,
                dtype=dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                trust_remote_code=False,
                **bins,
                **options,
            )
    except ImportError as error:
        if options:
            raise CheckpointError(
                f"quantization {quantization!r} cannot be done here ({first_line(error)}); load without it."
            ) from error
        raise CheckpointError(
            f"attn_implementation {attn_implementation!r} needs a package that is not here ({first_line(error)}); install "
            "ovisnb[gpu], or use 'sdpa'."
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path_or_id} has no readable safetensors weights ({first_line(error)}); convert .bin files to safetensors "
            "with a tool you trust, or copy the folder again."
        ) from error
    except ValueError as error:
        if "attn_implementation" in str(error) or "attention" in str(error).lower():
            raise CheckpointError(
                f"attn_implementation {attn_implementation!r} is not known; use 'sdpa', 'eager' or 'flash_attention_2'."
            ) from error
        raise
    except RuntimeError as error:
        raise CheckpointError(
            f"{path_or_id}: the weights do not fit config.json ({first_line(error)}); both must come from one checkpoint."
        ) from error
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names and kind != "error_msgs"}
    if wrong:
        told = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items())
        raise CheckpointError(f"{path_or_id}: the tensors are not those of its config.json ({told}).")
    # The names were translated once, on the way in; saving writes native names.
    model._weight_conversions = None
    model.generation_config = generation_defaults(read_json(path_or_id, "generation_config.json"), processor.tokenizer)
    if is_quantized(model):
        keep_gradients(model)
    elif device is not None:
        model.to(device)
    return model.eval(), processor


@contextmanager
def quiet():
    """Without transformers' bars and reports: what is wrong is said once, by us."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with no_bars():
            yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def no_bars():
    """Without the bars that transformers draws for every checkpoint it writes or reads."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype or its name; CheckpointError for a name that is none."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"dtype {dtype!r} is not a floating point dtype of torch; use 'bfloat16' or 'float32'.")
    return found


def load_processor(path_or_id: str | os.PathLike, base_model: str | os.PathLike | None = None) -> Ovis2_5Processor:
    """The processor alone, without touching the weights; `base_model` and what is raised are as for `load`."""
    adapter = adapter_files(path_or_id)
    if adapter and not adapter.has_processor:
        return load_processor(adapter.base(base_model))
    raw, config = read_config(adapter.base(base_model) if adapter else path_or_id)
    tokenizer = load_tokenizer(path_or_id, config)
    add_visual_tokens(tokenizer)
    vision = config.vision_config
    # Released defaults: 1344*1792 for the 2B model, 1792*1792 for the 9B one (hidden size 4096).
    limits = {"max_pixels": 1792 * 1792 if config.hidden_size >= 4096 else 1344 * 1792}
    saved = read_json(path_or_id, "processor_config.json").get("image_processor", {}) | read_json(
        path_or_id, "preprocessor_config.json"
    )
    limits |= {key: saved[key] for key in ("min_pixels", "max_pixels", "image_mean", "image_std") if key in saved}
    image_processor = Ovis2_5ImageProcessor(
        patch_size=vision.patch_size,
        hidden_stride=vision.hidden_stride,
        temporal_patch_size=vision.temporal_patch_size,
        **limits,
    )
    # The released template gives the same ids as ours but is not ours to run; a native folder keeps its own.
    template = None
    if ("llm_config" not in raw or adapter) and (file := find_file(path_or_id, "chat_template.jinja")):
        template = Path(file).read_text(encoding="utf-8")
    return Ovis2_5Processor(image_processor, tokenizer, chat_template=template)


def save(
    model: Ovis2_5ForConditionalGeneration | PeftModel,
    processor: Ovis2_5Processor,
    path: str | os.PathLike,
    layout: str = "native",
    safe: bool = True,
) -> Path:
    """Write a checkpoint folder, which appears whole or not at all; an existing checkpoint there is replaced.

    Files of yours in that folder (a README, a curve) stay.

    Args:
        layout: "native" for transformers, "released" for the released remote code, vLLM and ms-swift. The released
            config.json refers to the remote code where it was published; none is copied into the folder.
        safe: False writes pytorch_model.bin, as the earlier scripts' stages 1 and 2 did, in place of safetensors.

    A PeftModel gives an adapter folder: the adapter and the processor, not the base.
    Raises ValueError for another layout, or for a released layout of an adapter, of a quantized model, or of a
    language model that is not Qwen3.
    """
    if layout not in ("native", "released"):
        raise ValueError(f"layout {layout!r} is not 'native' or 'released'.")
    adapter = not isinstance(model, PreTrainedModel)
    if layout == "released" and adapter:
        raise ValueError("The released layout holds no adapter; merge it with ovisnb merge.")
    if layout == "released" and is_quantized(model):
        raise ValueError("The released layout holds no 4-bit or 8-bit weights; load the model without quantization.")
    if not safe and (adapter or is_quantized(model)):
        raise ValueError("Adapters and 4-bit or 8-bit weights are saved as safetensors only; leave safe as it is.")
    path = Path(path)
    if path.is_file() or (path.is_dir() and not is_checkpoint(path) and any(path.iterdir())):
        kind = "is a file" if path.is_file() else "holds files but no checkpoint"
        raise ValueError(f"{path} {kind}; choose an empty or a new folder.")
    target = path.resolve()  # through a link, the folder behind it
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        whole, old = Path(scratch) / "new", Path(scratch) / "old"
        if adapter:
            write_adapter(model, processor, whole)
        elif layout == "released":
            write_released(model, processor, whole, safe)
        elif not safe:
            write_native_bin(model, processor, whole)
        else:
            model.save_pretrained(whole)
            processor.save_pretrained(whole)
        for file in whole.iterdir():
            file.chmod(0o644)  # some of the writers make files that only their owner can read
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(whole, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        for file in old.glob("*"):
            if not any(file.match(pattern) for pattern in CHECKPOINT_FILES):
                os.replace(file, target / file.name)
    return path


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter, of whatever kind."""
    return (folder / "config.json").exists() or (folder / ADAPTER_CONFIG).exists()


def write_native_bin(model, processor, folder: Path) -> None:
    """What save_pretrained writes, with the tensors in .bin files."""
    folder.mkdir(parents=True)
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_tensors(own_tensors(model), folder, safe=False)


def read_config(path_or_id) -> tuple[dict, Ovis2_5Config]:
    """config.json as it stands, and as a native config."""
    if os.path.isfile(path_or_id):
        raise CheckpointError(f"{path_or_id} is a file; give the checkpoint's folder.")
    if not (file := find_file(path_or_id, "config.json")):
        kind = (
            "has no config.json" if os.path.isdir(path_or_id) else "is neither a folder nor a hub id that can be read"
        )
        raise CheckpointError(
            f"{path_or_id} {kind}; give a folder that ovisnb.save wrote, a released one, or a hub id."
        )
    raw = read_json(path_or_id, "config.json")
    if "llm_config" in raw and raw.get("model_type") in ("ovis2_5", "ovis"):
        return raw, native_config(raw)
    if raw.get("model_type") != "ovis2_5" or "text_config" not in raw:
        raise CheckpointError(
            f"{file} is of model_type {raw.get('model_type')!r}, not an Ovis2.5 checkpoint; "
            "make one from a language model and a vision tower with ovisnb.model.assemble."
        )
    return raw, Ovis2_5Config(**{key: value for key, value in raw.items() if key != "auto_map"})


def load_tokenizer(path_or_id, config: Ovis2_5Config) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, of the kind that the language model's config asks for."""
    try:
        return AutoTokenizer.from_pretrained(path_or_id, config=config.text_config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path_or_id} has no tokenizer that can be read ({first_line(error)}).") from error


def add_visual_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """The five visual placeholders, right after the tokenizer's own entries, where it lacks them."""
    missing = [token for token in VISUAL_TOKENS if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)


def check_token_ids(path_or_id, config: Ovis2_5Config, processor: Ovis2_5Processor) -> None:
    """CheckpointError unless config and tokenizer agree on the visual placeholders and the ids have rows."""
    ids = processor.visual_ids.all
    if ids != config.visual_token_ids or max(ids) >= config.vocab_size:
        raise CheckpointError(
            f"{path_or_id}: the tokenizer gives the visual tokens the ids {list(ids)}, the model has "
            f"{list(config.visual_token_ids)} in {config.vocab_size} rows; tokenizer and weights must come from one "
            "checkpoint."
        )


def generation_defaults(saved: dict, tokenizer) -> GenerationConfig:
    """What generation_config.json says, with the ends of an answer looked up by name where it lacks them."""
    generation = GenerationConfig(**saved)
    vocabulary = tokenizer.get_vocab()
    ends = [vocabulary[name] for name in ("<|im_end|>", "<|endoftext|>") if name in vocabulary]
    stated = generation.eos_token_id
    stated = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
    generation.eos_token_id = list(dict.fromkeys(stated + ends)) or None
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    return generation
