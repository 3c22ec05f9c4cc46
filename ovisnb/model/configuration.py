"""Configuration of Ovis2.5 with the field names of the native transformers port."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig
from transformers.models.qwen3 import Qwen3Config

INDICATORS = 4  # the last rows of the visual vocabulary: image begin, image end, video begin, video end


class Ovis2_5VisionConfig(PretrainedConfig):
    """SigLIP2 made native-resolution, and the head that turns its patches into words of a visual vocabulary.

    Args:
        image_size: the learned position table has (image_size / patch_size)**2 rows.
        hidden_stride: patches of one visual token along each side.
        window_size: side of an attention window in pixels, for the layers that `fullatt_block_indexes`
            ("0|2" or [0, 2]) leaves out; None means that every layer attends to its whole frame.
        vocab_size: visual words, the four indicators among them.
    """

    model_type = "ovis2_5_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 1152,
        intermediate_size: int = 4304,
        num_hidden_layers: int = 27,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        patch_size: int = 16,
        image_size: int = 512,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        hidden_stride: int = 2,
        window_size: int = 112,
        fullatt_block_indexes: str | int | list[int] | None = None,
        temporal_patch_size: int = 1,
        preserve_original_pe: bool = True,
        use_rope: bool = True,
        vocab_size: int = 65536,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.image_size = image_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.hidden_stride = hidden_stride
        self.window_size = window_size
        self.fullatt_block_indexes = fullatt_block_indexes
        self.temporal_patch_size = temporal_patch_size
        self.preserve_original_pe = preserve_original_pe
        self.use_rope = use_rope
        self.vocab_size = vocab_size
        self.initializer_range = initializer_range
        if (hidden_size // num_attention_heads) % 4 or hidden_size % num_attention_heads:
            raise ValueError(
                f"vision hidden_size {hidden_size} over {num_attention_heads} heads gives heads whose size is not a "
                "multiple of 4, which two-dimensional rotary positions need; change num_attention_heads."
            )

    def windowed(self, layer: int) -> bool:
        """Whether this encoder layer attends within windows only."""
        full = self.fullatt_block_indexes
        if full is None:
            return False
        if isinstance(full, (int, str)):
            full = [index for index in str(full).split("|") if index]
        return layer not in {int(index) for index in full}


class Ovis2_5Config(PretrainedConfig):
    """A language model, a vision tower and the table between them.

    Args:
        text_config: config (or its dict) of any transformers causal language model; Qwen3 when None.
        visual_vocab_size: rows of the visual embedding table, the four indicators among them.
        image_token_id: text-vocabulary row that stands for one visual token ("atom") of an image or a video.
        image_start_token_id, image_end_token_id, video_start_token_id, video_end_token_id: the rows that stand
            for the last four rows of the visual table, in this order.
    """

    model_type = "ovis2_5"
    sub_configs = {"text_config": AutoConfig, "vision_config": Ovis2_5VisionConfig}

    def __init__(
        self,
        text_config: PretrainedConfig | dict | None = None,
        vision_config: PretrainedConfig | dict | None = None,
        visual_vocab_size: int = 65536,
        image_token_id: int = 151669,
        image_start_token_id: int = 151670,
        image_end_token_id: int = 151671,
        video_start_token_id: int = 151672,
        video_end_token_id: int = 151673,
        tie_word_embeddings: bool | None = None,
        **kwargs,
    ):
        if "llm_config" in kwargs:
            raise ValueError("This config.json has the released layout (llm_config); open its folder with ovisnb.load.")
        if text_config is None:
            text_config = Qwen3Config()
        elif isinstance(text_config, dict):
            text_config = dict(text_config)
            text_config = AutoConfig.for_model(text_config.pop("model_type", "qwen3"), **text_config)
        if vision_config is None:
            vision_config = Ovis2_5VisionConfig(vocab_size=visual_vocab_size)
        elif isinstance(vision_config, dict):
            vision_config = Ovis2_5VisionConfig(
                **{k: v for k, v in vision_config.items() if k not in ("model_type", "vocab_size")},
                vocab_size=visual_vocab_size,
            )
        self.text_config = text_config
        self.vision_config = vision_config
        self.visual_vocab_size = visual_vocab_size
        self.image_token_id = image_token_id
        self.image_start_token_id = image_start_token_id
        self.image_end_token_id = image_end_token_id
        self.video_start_token_id = video_start_token_id
        self.video_end_token_id = video_end_token_id
        if tie_word_embeddings is None:
            tie_word_embeddings = bool(getattr(text_config, "tie_word_embeddings", False))
        self.tie_word_embeddings = tie_word_embeddings
        text_config.tie_word_embeddings = tie_word_embeddings
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def visual_token_ids(self) -> tuple[int, int, int, int, int]:
        """Atom, image start, image end, video start, video end: never sampled, never a training target."""
        return (
            self.image_token_id,
            self.image_start_token_id,
            self.image_end_token_id,
            self.video_start_token_id,
            self.video_end_token_id,
        )
