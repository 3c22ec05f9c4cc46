"""Ovis2.5: a vision tower that speaks in visual words, one table that embeds them, a causal language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration import INDICATORS, Ovis2_5Config
from .loss import LanguageHead, calls_are_counted, cross_entropy, mean_loss, summed_loss, supervised
from .packed import prepare_packed, rows_of
from .vision import Ovis2_5VisionModel, trains

MEDIA_KEYS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


class Ovis2_5VisualEmbeddingTable(nn.Embedding):
    """The table of visual words: an expectation for probabilities over the words, a row for an index."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        if words.is_floating_point():
            return words.to(self.weight.dtype) @ self.weight[:-INDICATORS]
        return super().forward(words)


class Ovis2_5PreTrainedModel(PreTrainedModel):
    config_class = Ovis2_5Config
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Ovis2_5VisionLayer", "Qwen3DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


@dataclass
class Medium:
    """One kind of media in a batch: its ids, its patches and where they come from, for one error message."""

    name: str
    start: int
    end: int
    pixel_values: torch.Tensor | None
    grid_thw: torch.Tensor | None


class Ovis2_5Model(Ovis2_5PreTrainedModel):
    def __init__(self, config: Ovis2_5Config):
        super().__init__(config)
        self.vision_tower = Ovis2_5VisionModel(config.vision_config)
        self.visual_embeddings_table = Ovis2_5VisualEmbeddingTable(config.visual_vocab_size, config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_visual_features(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Embeddings [visual tokens, hidden_size] of pictures or videos, one behind the other."""
        tower, table = self.vision_tower, self.visual_embeddings_table
        return tower(pixel_values.to(tower.dtype), grid_thw, table=table).pooler_output

    def embed(
        self, input_ids: torch.Tensor, media: list[Medium], visual_features: torch.Tensor | None, cu_seq_lens=None
    ) -> torch.Tensor:
        """Text embeddings [batch, length, hidden] with every visual placeholder row replaced; `cu_seq_lens` of a
        packed row, int32 [samples + 1], let an error name the sample."""
        embeds = self.get_input_embeddings()(input_ids)
        config = self.config
        atoms = input_ids == config.image_token_id
        # a placeholder without its pixels must not pass for a text
        given = visual_features is not None or any(medium.pixel_values is not None for medium in media)
        if given or holds_placeholders(input_ids, config):
            rows = input_ids if cu_seq_lens is None else rows_of(input_ids, cu_seq_lens)
            check_placeholders(rows, rows == config.image_token_id, media, config, visual_features)
            features = self.media_features(media, visual_features)
            video_start, video_end = config.video_start_token_id, config.video_end_token_id
            depth = (input_ids == video_start).long() - (input_ids == video_end).long()
            in_video = depth.cumsum(1) > 0
            for piece, where in zip(features, (atoms & ~in_video, atoms & in_video), strict=True):
                embeds = embeds.masked_scatter(where[..., None], piece.to(embeds.dtype))
        if (visual_features is not None or not given) and self.needs_vision():
            embeds = embeds + 0.0 * self.unseen_image(input_ids.device).to(embeds.dtype)
        first = config.visual_vocab_size - INDICATORS
        for row, token in enumerate(config.visual_token_ids[1:]):
            mark = (input_ids == token)[..., None]
            row_embedding = self.visual_embeddings_table(torch.tensor(first + row, device=input_ids.device))
            embeds = torch.where(mark, row_embedding.to(embeds.dtype), embeds)
        return embeds

    def media_features(self, media: list[Medium], visual_features: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Features of each kind of media, [its visual tokens, hidden_size], from ONE pass of the vision tower: under
        ZeRO-3 a rank with pictures and videos must gather the tower as often as a rank with neither."""
        given = [medium for medium in media if medium.grid_thw is not None]
        if visual_features is None:
            visual_features = self.get_visual_features(
                torch.cat([medium.pixel_values for medium in given]), torch.cat([medium.grid_thw for medium in given])
            )
        stride = self.vision_config.hidden_stride**2
        sizes = [0 if m.grid_thw is None else int(m.grid_thw.prod(1).sum()) // stride for m in media]
        return visual_features.split(sizes)

    def needs_vision(self) -> bool:
        """Whether a batch without any picture must still run the vision tower: every rank has to touch the same
        parameters, or DDP waits for a gradient, and ZeRO-3 and FSDP for a gather, that never comes."""
        return calls_are_counted(self.vision_tower) or (self.training and trains(self.vision_tower))

    def unseen_image(self, device) -> torch.Tensor:
        """Sum of the features of the smallest grey picture, a scalar."""
        config = self.vision_config
        side, depth = config.hidden_stride, config.num_channels * config.temporal_patch_size
        pixels = torch.zeros(side**2, depth * config.patch_size**2, device=device)
        return self.get_visual_features(pixels, torch.tensor([[1, side, side]], device=device)).sum()

    @property
    def vision_config(self):
        return self.config.vision_config

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        visual_features: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,  # accepted for TRL; the ids say as much
        **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give the model either input_ids or inputs_embeds, not both and not neither.")
        config = self.config
        media = [
            Medium("image", config.image_start_token_id, config.image_end_token_id, pixel_values, image_grid_thw),
            Medium(
                "video", config.video_start_token_id, config.video_end_token_id, pixel_values_videos, video_grid_thw
            ),
        ]
        cu_seq_lens = kwargs.get("cu_seq_lens_q")
        if cu_seq_lens is not None:
            row = input_ids if inputs_embeds is None else inputs_embeds
            if attention_mask is not None or past_key_values is not None or position_ids is None:
                raise ValueError(
                    "A packed row comes with position_ids, and without attention_mask and past_key_values."
                )
            attention_mask, kwargs = prepare_packed(self.language_model, row, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, media, visual_features, cu_seq_lens)
        elif visual_features is not None or any(medium.pixel_values is not None for medium in media):
            raise ValueError("Pictures are placed by the placeholders in input_ids; pass input_ids, not inputs_embeds.")
        new_prompt = past_key_values is None or past_key_values.get_seq_length() == 0
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2 and new_prompt:
            # Positions count real tokens, so that padding on the left does not shift a sample.
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class Ovis2_5ForConditionalGeneration(Ovis2_5PreTrainedModel, GenerationMixin):
    def __init__(self, config: Ovis2_5Config):
        super().__init__(config)
        self.model = Ovis2_5Model(config)
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size, bias=False)
        table = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is table)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        visual_features: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Any batch in one forward: rows with no picture, one, many, a video, padded on either side.

        Args:
            input_ids: int64 [batch, length]; visual placeholder ids where the processor wrote them.
            attention_mask: [batch, length], 1 for tokens, 0 for padding.
            pixel_values: [patches of all images, 3*tp*patch**2]; image_grid_thw: int64 [images, 3] in patches,
                both in the order of the batch's placeholders. The same for videos.
            visual_features: [visual tokens, hidden_size], what `get_visual_features` gives of the images and, behind
                them, of the videos; in place of both pixel_values, with the grids.
            labels: int64 [batch, length], -100 where a token carries no loss.
            position_ids, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: of samples packed into one row
                without padding, as `ovisnb.chat.collate(samples, packed=True)` gives them; no attention_mask then.
            logits_to_keep: logits of the last so many positions only (0: all).
            skip_logits: with labels, make the loss chunk by chunk and no logits; None: so it is in training mode.
            label_smoothing: float, the share of each target that is spread evenly over all words, as in
                F.cross_entropy; 0 unless given.
            num_items_in_batch: what the summed loss is divided by, as the Trainer gives it, in place of the
                batch's supervised tokens.

        Returns logits [batch, length or logits_to_keep, vocab_size], None where skipped, and, with labels, the mean
        cross-entropy over supervised tokens in float32; it is 0 where no token is supervised.
        Raises ValueError, naming the sample, if placeholders and features do not match.
        """
        # not in the signature: the Trainer takes every argument with "label" in its name for labels of the data
        label_smoothing = kwargs.pop("label_smoothing", 0.0)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            visual_features=visual_features,
            mm_token_type_ids=mm_token_type_ids,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits = loss = None
        skips = labels is not None and (self.training if skip_logits is None else skip_logits)
        if not skips:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        if labels is not None:
            if skips or logits.shape[1] != hidden.shape[1]:
                states, targets = supervised(hidden, labels)
                total = summed_loss(self.lm_head, states, targets, label_smoothing, self.config.vocab_size)
            else:
                scores, targets = supervised(logits, labels)
                total = cross_entropy(scores, targets, label_smoothing)
            loss = mean_loss(total, len(targets), num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def generate(self, inputs=None, generation_config=None, logits_processor=None, **kwargs):
        """transformers' generate; visual placeholder ids are never sampled, whatever the settings."""
        banned = LogitsProcessorList([*(logits_processor or []), NeverVisual(self.config.visual_token_ids)])
        return super().generate(inputs, generation_config, logits_processor=banned, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for key in (*MEDIA_KEYS, "visual_features"):
                inputs.pop(key, None)  # the cache holds them
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Beams and several return sequences: a row's patches repeat as a whole, not patch by patch."""
        media = {key: model_kwargs.pop(key) for key in MEDIA_KEYS if model_kwargs.get(key) is not None}
        if expand_size > 1 and media:
            starts = (self.config.image_start_token_id, self.config.video_start_token_id)
            for values, grid, start in zip(MEDIA_KEYS[::2], MEDIA_KEYS[1::2], starts, strict=True):
                if values in media:
                    counts = (input_ids == start).sum(1).tolist()
                    media |= repeat_media(media[values], media[grid], counts, expand_size, values, grid)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | media


def repeat_media(values, grids, counts: list[int], times: int, values_key: str, grid_key: str) -> dict:
    """Patches and grids of each row (it has counts[row] media) repeated `times` times, row after row."""
    rows = grids.split(counts)
    patches = values.split([int(row.prod(1).sum()) for row in rows])
    return {
        values_key: torch.cat([piece for piece in patches for _ in range(times)]),
        grid_key: torch.cat([row for row in rows for _ in range(times)]),
    }


def holds_placeholders(input_ids: torch.Tensor, config) -> bool:
    """Whether any id stands for something visual; not looked for in one token of a cached generation (it waits for
    the GPU), where none can be sampled."""
    if input_ids.shape[1] == 1:
        return False
    return bool(torch.isin(input_ids, torch.tensor(config.visual_token_ids, device=input_ids.device)).any())


def check_placeholders(
    input_ids: torch.Tensor, atoms: torch.Tensor, media: list[Medium], config, visual_features: torch.Tensor | None
) -> None:
    """ValueError, naming the sample, unless each run of atoms is as long as its picture's or video's features."""
    stride = config.vision_config.hidden_stride**2
    so_far = atoms.long().cumsum(1)
    spare = so_far[:, -1].tolist()  # atoms of each sample that no picture or video has claimed
    for medium in media:
        if visual_features is not None and medium.pixel_values is not None:
            raise ValueError("Give the model either visual_features or pixels, not both; the grids come with either.")
        if visual_features is None and (medium.pixel_values is None) != (medium.grid_thw is None):
            raise ValueError(
                f"The batch has pixels or grids of {medium.name}s without the other; pass both, or neither."
            )
        grids = [] if medium.grid_thw is None else (medium.grid_thw.prod(1) // stride).tolist()
        starts, ends = (input_ids == medium.start).nonzero(), (input_ids == medium.end).nonzero()
        if len(starts) != len(grids) or starts[:, 0].tolist() != ends[:, 0].tolist():
            by_sample = torch.bincount(starts[:, 0], minlength=len(input_ids)).tolist()
            broken = next((i for i in range(len(input_ids)) if (ends[:, 0] == i).sum() != by_sample[i]), None)
            cause = (
                f"sample {broken} has an unclosed {medium.name}: it was cut inside one"
                if broken is not None
                else f"the samples' counts are {by_sample}: a picture was left out or passed in another order"
            )
            raise ValueError(
                f"The batch's ids hold {len(starts)} {medium.name} placeholders but {len(grids)} {medium.name} grids "
                f"were passed; {cause}; build batches with ovisnb.chat.collate."
            )
        lengths = (so_far[ends[:, 0], ends[:, 1]] - so_far[starts[:, 0], starts[:, 1]]).tolist()
        for number, (length, tokens) in enumerate(zip(lengths, grids, strict=True)):
            sample = int(starts[number, 0])
            spare[sample] -= length
            if length != tokens:
                raise ValueError(
                    f"Sample {sample}: {medium.name} {number} of the batch has {length} placeholder tokens but its grid "
                    f"{medium.grid_thw[number].tolist()} gives {tokens} features; likely it was cut by truncation or "
                    "encoded with other min_pixels/max_pixels than its placeholders."
                )
    for sample, count in enumerate(spare):
        if count:
            raise ValueError(
                f"Sample {sample} has {count} visual placeholder tokens outside any image or video; do not write "
                "placeholder tokens by hand, use the processor or ovisnb.chat.encode."
            )
    asked = int(atoms.sum())
    if visual_features is not None and len(visual_features) != asked:
        raise ValueError(
            f"The grids ask for {asked} visual tokens but visual_features has {len(visual_features)}; pass the features "
            "of the batch's own pictures, images before videos."
        )


class NeverVisual(LogitsProcessor):
    """Bans the visual placeholder ids: they stand for pixels that no sampled token has."""

    def __init__(self, ids: tuple[int, ...]):
        self.ids = list(ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self.ids] = -float("inf")
        return scores
