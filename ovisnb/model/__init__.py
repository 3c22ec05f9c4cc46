"""Ovis2.5 as a native transformers model: configuration, vision tower, modeling, processor, checkpoints, assemble."""

import os

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

# by its module: without torchvision, transformers 5.17 holds a placeholder under the short name
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .assemble import assemble
from .checkpoint import CheckpointError, load, load_processor, save
from .configuration import Ovis2_5Config, Ovis2_5VisionConfig
from .image_processing import Ovis2_5ImageProcessor, Ovis2_5VideoProcessor, smart_resize
from .modeling import Ovis2_5ForConditionalGeneration, Ovis2_5Model
from .processing import Ovis2_5Processor, VisualIds
from .vision import Ovis2_5VisionModel

__all__ = [
    "CheckpointError",
    "Ovis2_5Config",
    "Ovis2_5ForConditionalGeneration",
    "Ovis2_5ImageProcessor",
    "Ovis2_5Model",
    "Ovis2_5Processor",
    "Ovis2_5VideoProcessor",
    "Ovis2_5VisionConfig",
    "Ovis2_5VisionModel",
    "VisualIds",
    "assemble",
    "load",
    "load_processor",
    "save",
    "smart_resize",
]

if not torch.cuda.is_available():
    # accelerate imports deepspeed, which otherwise prints that it looked for a GPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# exist_ok: a later transformers may bring its own ovis2_5.
AutoConfig.register("ovis2_5_vision", Ovis2_5VisionConfig, exist_ok=True)
AutoConfig.register("ovis2_5", Ovis2_5Config, exist_ok=True)
AutoModel.register(Ovis2_5VisionConfig, Ovis2_5VisionModel, exist_ok=True)
AutoModel.register(Ovis2_5Config, Ovis2_5Model, exist_ok=True)
AutoModelForCausalLM.register(Ovis2_5Config, Ovis2_5ForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(Ovis2_5Config, Ovis2_5ForConditionalGeneration, exist_ok=True)
AutoProcessor.register(Ovis2_5Config, Ovis2_5Processor, exist_ok=True)
AutoImageProcessor.register(Ovis2_5Config, image_processor_classes={"pil": Ovis2_5ImageProcessor}, exist_ok=True)
