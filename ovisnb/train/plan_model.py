"""The model that a run would start from and its data, as a memory plan needs them: no weights, no pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoTokenizer

from ovisnb.chat import Encoded
from ovisnb.model import Ovis2_5Config, Ovis2_5ImageProcessor, Ovis2_5Processor
from ovisnb.model.assemble import open_vision_tower, prepare_tokenizer
from ovisnb.model.checkpoint import load_processor, read_config, read_json
from ovisnb.model.files import first_line
from ovisnb.train.dataset import open_records
from ovisnb.train.plan_batch import read_samples
from ovisnb.train.settings import Settings, SettingsError

Read = Callable[[Settings], list[Encoded] | None]


def planned_model(settings: Settings) -> tuple[Ovis2_5Config, Read]:
    """The model's config, and what reads samples of data_path under changed limits (None without data), which opens
    data and tokenizer once. Raises SettingsError where the settings name no model, and what opening these raises."""
    processor = None
    if settings.model_path is not None:
        config = read_config(settings.model_path)[1]
        if settings.data_path:
            processor = load_processor(settings.model_path)
            ids = processor.visual_ids  # a released config.json does not know them
            config.image_token_id, config.image_start_token_id, config.image_end_token_id = ids.all[:3]
            config.video_start_token_id, config.video_end_token_id = ids.all[3:]
    elif settings.llm_name_or_path and settings.vit_name_or_path:
        config, processor = _new(settings)
    else:
        raise SettingsError(
            "A memory plan needs the shape of the model: give model_path, or llm_name_or_path and vit_name_or_path."
        )
    if not settings.data_path:
        return config, lambda changed: None
    records = open_records(settings.data_path, settings, names=settings.data_name, streaming=settings.streaming)
    return config, lambda changed: read_samples(changed, records, processor)


def image_limits(settings: Settings) -> Ovis2_5ImageProcessor:
    """The image processor of model_path, for its pixel limits; the defaults where it has none."""
    saved = read_json(settings.model_path, "preprocessor_config.json") if settings.model_path else {}
    names = ("patch_size", "hidden_stride", "temporal_patch_size", "min_pixels", "max_pixels")
    return Ovis2_5ImageProcessor(**{name: saved[name] for name in names if name in saved})


def _new(settings: Settings) -> tuple[Ovis2_5Config, Ovis2_5Processor]:
    """Those of a new Ovis, as `ovisnb.model.assemble` makes them, from configs and tokenizer alone."""
    language, vision = settings.llm_name_or_path, settings.vit_name_or_path
    fields = ("hidden_stride", "window_size", "temporal_patch_size", "fullatt_block_indexes")
    fields += ("preserve_original_pe", "use_rope")
    options = {name: getattr(settings, f"vit_{name}") for name in fields}
    try:
        text = AutoConfig.from_pretrained(language, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(language, trust_remote_code=False)
        with torch.device("meta"):
            shape = AutoConfig.from_pretrained(vision, trust_remote_code=False)
            options["vocab_size"] = settings.visual_vocab_size
            tower = open_vision_tower(shape, options, torch.float32).config
    except (OSError, ValueError, ImportError) as error:
        raise SettingsError(
            f"No Ovis can be planned of llm_name_or_path {language} and vit_name_or_path {vision}: {first_line(error)}."
        ) from error
    prepare_tokenizer(tokenizer)
    if text.vocab_size < len(tokenizer):
        text.vocab_size = -(-len(tokenizer) // 64) * 64
    images = Ovis2_5ImageProcessor(
        patch_size=tower.patch_size,
        hidden_stride=tower.hidden_stride,
        temporal_patch_size=tower.temporal_patch_size,
    )
    processor = Ovis2_5Processor(images, tokenizer)
    names = ("image_token_id", "image_start_token_id", "image_end_token_id")
    names += ("video_start_token_id", "video_end_token_id")
    ids = dict(zip(names, processor.visual_ids.all, strict=True))
    config = Ovis2_5Config(text_config=text, vision_config=tower, visual_vocab_size=settings.visual_vocab_size, **ids)
    return config, processor
