"""`Ovis2_5Processor`: text, pictures and videos to model inputs, with transformers' habits.

For prompts and single calls. Training data goes through `ovisnb.chat.encode`, which uses this processor's
tokenizer and patches and also knows the labels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import BatchFeature

from .image_processing import Ovis2_5ImageProcessor, Ovis2_5VideoProcessor, clips_of, flatten

IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER = "<image>", "<video>"
# In the order of their ids; the last four stand for the last four rows of the visual vocabulary.
VISUAL_TOKENS = (
    "<ovis_visual_atom>",
    "<ovis_image_start>",
    "<ovis_image_end>",
    "<ovis_video_start>",
    "<ovis_video_end>",
)

# The released template's behaviour: three roles, parts joined by newlines, placeholders only from media parts,
# earlier thinking cut from assistant turns, an empty thought in the generation prompt when thinking is off.
CHAT_TEMPLATE = """\
{%- macro plain(text) -%}{{ text | replace('<image>', '') | replace('<video>', '') }}{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('Role ' ~ message.role ~ ' is not one of system, user, assistant.') -}}
{%- endif -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' -}}
{%- set said = namespace(text='') -%}
{%- if message.content is string -%}
{%- set said.text = plain(message.content) -%}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}
{%- set said.text = said.text ~ plain(part.text) -%}
{%- elif part.type in ['image', 'video'] and message.role != 'assistant' -%}
{%- set said.text = said.text ~ '<' ~ part.type ~ '>' -%}
{%- else -%}
{{- raise_exception('A part of type ' ~ part.type ~ ' cannot stand in a message of role ' ~ message.role ~ '.') -}}
{%- endif -%}
{%- if not loop.last -%}{%- set said.text = said.text ~ '\\n' -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message.role == 'assistant' -%}
{%- set said.text = said.text.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- said.text ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


@dataclass(frozen=True)
class VisualIds:
    """Token ids of the five visual placeholder tokens, looked up by name."""

    atom: int
    image_start: int
    image_end: int
    video_start: int
    video_end: int

    @property
    def all(self) -> tuple[int, ...]:
        return (self.atom, self.image_start, self.image_end, self.video_start, self.video_end)


class Ovis2_5Processor(ProcessorMixin):
    """Tokenizer, image processor and chat template of one Ovis2.5 checkpoint.

    `<image>` and `<video>` in a text are placeholders; each becomes start + one atom per visual token + end.
    """

    image_token, video_token = IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

    def __init__(self, image_processor: Ovis2_5ImageProcessor, tokenizer: PreTrainedTokenizerBase, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in VISUAL_TOKENS if token not in vocabulary]:
            raise ValueError(
                f"The tokenizer lacks the visual tokens {', '.join(missing)}; open the folder with ovisnb.load, "
                "or make a model with ovisnb.model.assemble."
            )
        self.visual_ids = VisualIds(*(vocabulary[token] for token in VISUAL_TOKENS))
        self.image_token_id = self.visual_ids.atom

    @property
    def video_processor(self) -> Ovis2_5VideoProcessor:
        return Ovis2_5VideoProcessor(self.image_processor)

    @property
    def model_input_names(self) -> list[str]:
        media = self.image_processor.model_input_names + self.video_processor.model_input_names
        return list(self.tokenizer.model_input_names) + media

    def tokens_per(self, grid_thw) -> int:
        """Visual tokens (atoms) of one picture or video of this grid (t, h, w in patches)."""
        t, h, w = (int(side) for side in grid_thw)
        return t * h * w // self.image_processor.hidden_stride**2

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        videos=None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        return_tensors: str | None = None,
        **tokenizer_kwargs,
    ) -> BatchFeature:
        """Model inputs of one text or a batch of texts with their pictures and videos, in order of placeholders.

        Args:
            images: PIL images or uint8 arrays, flat or one list a text. videos: clips of them, flat or one list a text.
            min_pixels, max_pixels: limits on the area of each resized picture, in pixels.
            tokenizer_kwargs: `padding`, `padding_side`, `truncation` is refused (it would cut inside a picture).

        Returns `input_ids`, `attention_mask` and, where there are media, `pixel_values`, `image_grid_thw`,
        `pixel_values_videos`, `video_grid_thw` (all media of the batch along the first axis).
        Raises ValueError if placeholders and media differ in number.
        """
        if tokenizer_kwargs.get("truncation"):
            raise ValueError("truncation could cut inside a picture; use ovisnb.chat.encode(max_length=...) instead.")
        for kind in ("text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs"):
            nested = dict(tokenizer_kwargs.pop(kind, None) or {})
            min_pixels, max_pixels = nested.pop("min_pixels", min_pixels), nested.pop("max_pixels", max_pixels)
            return_tensors = nested.pop("return_tensors", return_tensors)
            tokenizer_kwargs |= nested
        images = list(flatten(images)) if images is not None else []
        videos = list(clips_of(videos)) if videos is not None else []
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        media = {}
        if images:
            media |= self.image_processor(images, **limits, return_tensors=return_tensors)
        if videos:
            media |= self.video_processor(videos, **limits, return_tensors=return_tensors)
        if text is None:
            return BatchFeature(media)
        expanded = self._expand([text] if isinstance(text, str) else list(text), media)
        encoded = self.tokenizer(expanded, return_tensors=return_tensors, **tokenizer_kwargs)
        return BatchFeature({**encoded, **media})

    def _expand(self, texts: list[str], media: dict) -> list[str]:
        """The texts with each placeholder written out as visual tokens."""
        grids = {
            IMAGE_PLACEHOLDER: list(media.get("image_grid_thw", [])),
            VIDEO_PLACEHOLDER: list(media.get("video_grid_thw", [])),
        }
        for placeholder, given in grids.items():
            asked = sum(text.count(placeholder) for text in texts)
            if asked != len(given):
                raise ValueError(
                    f"The text has {asked} {placeholder} placeholders but {len(given)} {placeholder[1:-1]}s were "
                    "passed; write one placeholder for each, in order."
                )
        atom, image_start, image_end, video_start, video_end = VISUAL_TOKENS
        ends = {IMAGE_PLACEHOLDER: (image_start, image_end), VIDEO_PLACEHOLDER: (video_start, video_end)}
        queues = {placeholder: iter(given) for placeholder, given in grids.items()}

        def written_out(match):
            start, end = ends[match.group()]
            return start + atom * self.tokens_per(next(queues[match.group()])) + end

        return [re.sub(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}", written_out, text) for text in texts]

    def apply_chat_template(self, conversation, *args, tokenize=True, return_dict=None, return_tensors="pt", **kwargs):
        """Prompt of a list of messages (or of a batch of such lists), as text or, by default, as model inputs.

        `enable_thinking=False` closes the thought at once; unset or True leaves it to the model.
        """
        if not tokenize:
            return super().apply_chat_template(conversation, *args, tokenize=False, **kwargs)
        return super().apply_chat_template(
            conversation,
            *args,
            tokenize=True,
            return_dict=True if return_dict is None else return_dict,
            return_tensors=return_tensors,
            **kwargs,
        )
