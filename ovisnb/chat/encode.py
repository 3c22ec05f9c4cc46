"""The one encoder: a record becomes token ids, labels, pixel values, and for every token the reason of its label."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import torch

from ovisnb.chat import template
from ovisnb.chat.template import IGNORE_INDEX, ROLES, chat_tokens
from ovisnb.data.media import folder_of, image_size, naming, open_image
from ovisnb.data.record import Record, RecordError, Turn
from ovisnb.data.video import frame_count, frame_size, open_frames, sample_frames

REASONS = (
    "answer",  # the assistant's own words up to <|im_end|>: the only reason that carries loss
    "system",
    "user",
    "header",  # <|im_start|>role and its newline
    "empty_think",  # the prefix of an answer without thinking
    "image",
    "video",
    "tool_response",  # what a tool said inside an assistant turn, its tags included
    "ignored",  # an ignored_gpt turn, or an earlier answer in a prompt
    "separator",  # the newline after <|im_end|>
)


class EncodeError(RecordError):
    """A sound record that cannot become a sample."""


def _refused(record: Record, said: str) -> EncodeError:
    return EncodeError(said, kind="not_encodable", record_id=record.id, source=record.source)


@dataclass(frozen=True)
class Span:
    """The tokens [start, end): one reason, one turn, text or one picture.

    `role` is "system", "user" or "assistant"; `turn` indexes the record's turns (one past the last for the header a
    prompt ends with); `kind` is "text", "image" or "video"; `media` indexes the record's images (0 for the video).
    """

    start: int
    end: int
    role: str
    turn: int
    reason: str
    kind: str = "text"
    media: int | None = None

    @property
    def supervised(self) -> bool:
        """Whether these tokens carry loss."""
        return self.reason == "answer"


@dataclass
class Encoded:
    """One sample, ready for `collate`.

    `input_ids`, `labels`: int64 [tokens]. `spans` tile the tokens. `pixel_values`, `pixel_values_videos`: float32
    [patches, channels * temporal_patch_size * patch_size ** 2] or None; `image_grid_thw`, `video_grid_thw`: int64
    [n, 3] in patches or None. `dropped`: one sentence for each thing that the length limit cost; empty when nothing.
    """

    id: str
    input_ids: torch.Tensor
    labels: torch.Tensor
    spans: list[Span]
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    pixel_values_videos: torch.Tensor | None
    video_grid_thw: torch.Tensor | None
    pad_token_id: int
    dropped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)


def encode(
    record: Record | dict,
    processor,
    *,
    image_folder=None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    max_length: int | None = None,
    train: bool = True,
    enable_thinking: bool | None = None,
    mask_tool_responses: bool = True,
    pixels: bool = True,
) -> Encoded:
    """Encode a record (or the plain dict of a data file) with an Ovis2_5Processor.

    `min_pixels`, `max_pixels` bound each picture's area in pixels (None: the processor's own), `min_frames` and
    `max_frames` the frames of a video, taken evenly (None: as many as there are). `max_length` bounds the tokens:
    whole trailing turns are dropped first, never leaving a question without its answer; where even the first answer
    does not fit, its end is cut off. A picture is never cut, and those of dropped turns are not read.

    With `train=False` the result is a prompt: a trailing answer is left out, earlier answers lose their thinking,
    an assistant header follows (with the empty-think prefix unless `enable_thinking`), and no token has a label.

    In training, the empty-think prefix stands before answers without thinking. `enable_thinking=True` leaves it out;
    False takes the thinking out of the answers instead, with the pictures in it. `mask_tool_responses=False` learns
    what tools said as if the assistant had said it: to compare with, not to train on.

    With `pixels=False` pictures are measured from their files' headers and not decoded: the same tokens, labels,
    spans and grids, `pixel_values` None.

    Raises EncodeError when placeholders and media do not match, when the length limit leaves nothing to learn, and
    when a prompt is longer than the limit; RecordError and MediaError come from reading the record.
    """
    if isinstance(record, dict):
        record = Record.from_dict(record)
    _check_placeholders(record)
    options = _Options(
        image_folder=folder_of(record, image_folder),
        limits={"min_pixels": min_pixels, "max_pixels": max_pixels},
        frames={"min_frames": min_frames, "max_frames": max_frames},
        train=train,
        enable_thinking=enable_thinking,
        mask_tool_responses=mask_tool_responses,
        pixels=pixels,
    )
    sample = _Sample(record, processor, options)
    dropped = []
    if train:
        dropped = _write_training(sample, max_length)
    else:
        _write_prompt(sample, max_length)
    return sample.finish(dropped)


@dataclass(frozen=True)
class _Options:
    """The arguments of `encode` that decide how a turn is written."""

    image_folder: str | os.PathLike | None
    limits: dict[str, int | None]
    frames: dict[str, int | None]
    train: bool
    enable_thinking: bool | None
    mask_tool_responses: bool
    pixels: bool


def _check_placeholders(record: Record) -> None:
    for placeholder, media in ((template.IMAGE, len(record.images)), (template.VIDEO, 1 if record.video else 0)):
        written = sum(turn.text.count(placeholder) for turn in record.turns)
        if written != media:
            have = f"{media} {placeholder[1:-1]}{'' if media == 1 else 's'}"
            said = f"it has {have} but its text holds {written} {placeholder}: write one for each, in order"
            raise _refused(record, said)


def _write_training(sample: _Sample, max_length: int | None) -> list[str]:
    """Write as many turns as fit; returns what was dropped, a sentence each."""
    record, turns = sample.record, sample.record.turns
    if all(turn.role != "gpt" for turn in turns):
        raise _refused(record, "it has no gpt turn, so there is nothing to learn: add one or leave it out")
    fits = None  # tokens and turns of the longest beginning within the limit that ends in an answer, or of all
    for index, turn in enumerate(turns):
        sample.add_turn(turn, index)
        answer = turn.role == "gpt"
        last = index == len(turns) - 1
        if last and not answer:  # only after a final answer is the separator left out
            sample.add_separator(turn, index)
        too_long = max_length is not None and len(sample.ids) > max_length
        if too_long and (answer or fits):
            break
        if answer or last:
            fits = len(sample.ids), index + 1
        if not last:
            sample.add_separator(turn, index)
    dropped = []
    if fits:
        tokens, kept = fits
        sample.cut(tokens)
    else:
        kept = index + 1
        dropped.append(_cut_answer(sample, index, max_length))
    if kept < len(turns):
        dropped.append(
            f"Turns {kept + 1} to {len(turns)} of {len(turns)} were dropped to stay within {max_length} tokens."
        )
    lost = len(record.images) - len(sample.used("image")) - sample.left_out
    if lost:
        dropped.append(f"With that text went {lost} of {len(record.images)} images.")
    if record.video and not sample.used("video"):
        dropped.append("With that text went the video.")
    if not any(span.supervised for span in sample.spans):
        said = "it has nothing but unfinished tool responses to learn from: add an answer or leave it out"
        raise _refused(record, said)
    return dropped


def _cut_answer(sample: _Sample, turn: int, max_length: int) -> str:
    """Cut the end off the only answer, behind its last supervised token within the limit; returns what was cut."""
    length = len(sample.ids)
    for span in reversed(sample.spans):
        if span.supervised and span.start < max_length:
            end = sample.whole_characters(span.start, min(span.end, max_length))
            if end > span.start:
                sample.cut(end)
                return (
                    f"The answer in turn {turn + 1} lost the last {length - end} of its tokens "
                    f"to stay within {max_length} tokens."
                )
    said = (
        f"it takes {length} tokens up to the end of its first answer, and a max_length of {max_length} leaves "
        "nothing of that answer: raise max_length or lower max_pixels"
    )
    raise _refused(sample.record, said)


def _write_prompt(sample: _Sample, max_length: int | None) -> None:
    turns = list(sample.record.turns)
    while turns and ROLES[turns[-1].role] == "assistant":
        turns.pop()
    if not turns:
        raise _refused(sample.record, "it has no turn before its answer: add a human turn to make a prompt")
    for index, turn in enumerate(turns):
        sample.add_turn(turn, index)
        sample.add_separator(turn, index)
    sample.add_header("gpt", len(turns), empty_think=not sample.options.enable_thinking)
    if max_length is not None and len(sample.ids) > max_length:
        said = (
            f"its prompt takes {len(sample.ids)} tokens, more than the max_length of {max_length}: "
            "raise max_length or lower max_pixels"
        )
        raise _refused(sample.record, said)


class _Sample:
    """Token ids and spans being written, and the pictures that they stand for."""

    def __init__(self, record: Record, processor, options: _Options):
        self.record = record
        self.processor = processor
        self.options = options
        self.tokens = chat_tokens(processor)
        self.ids: list[int] = []
        self.spans: list[Span] = []
        self.pictures: dict = {}  # index in the record -> PIL image
        self.frames: list = []  # of the video
        self.grids: dict[tuple[str, int], tuple[int, int, int]] = {}  # ("image" or "video", index) -> t, h, w
        self.next_image = 0
        self.left_out = 0  # images, with the thinking that they stood in

    def add(self, ids: list[int], role: str, turn: int, reason: str, kind: str = "text", media: int | None = None):
        """Append tokens, to the last span where nothing but the text goes on."""
        if not ids:
            return
        start = len(self.ids)
        self.ids += ids
        last = self.spans[-1] if self.spans else None
        if kind == "text" and last and (last.role, last.turn, last.reason) == (role, turn, reason):
            self.spans[-1] = replace(last, end=len(self.ids))
        else:
            self.spans.append(Span(start, len(self.ids), role, turn, reason, kind, media))

    def add_header(self, role: str, turn: int, empty_think: bool) -> None:
        self.add(self.tokens.headers[role], ROLES[role], turn, "header")
        if empty_think:
            self.add(self.tokens.empty_think, ROLES[role], turn, "empty_think")

    def add_separator(self, turn: Turn, index: int) -> None:
        self.add(self.tokens.separator, ROLES[turn.role], index, "separator")

    def add_turn(self, turn: Turn, index: int) -> None:
        """Append a turn up to its `<|im_end|>`; an assistant's without its thinking where the options say so."""
        role, text, options = ROLES[turn.role], turn.text, self.options
        learn = turn.role == "gpt" and options.train
        reason = "answer" if learn else "ignored" if role == "assistant" else role
        if role == "assistant" and (not options.train or options.enable_thinking is False):
            text = self._without_thinking(text)
        pieces, in_tool = template.split_answer(text) if learn else (template.split_media(text), False)
        tool_reason = "tool_response" if options.mask_tool_responses else reason
        if learn:
            # The answer starts on a token boundary, also where its first newline could join the header's.
            empty_think = not options.enable_thinking and not template.has_thinking(text)
            self.add_header(turn.role, index, empty_think)
        else:
            first = pieces.pop(0)[1] if pieces and pieces[0][0] == "text" else ""
            head, body = self.tokens.with_header(turn.role, first)
            self.add(head, role, index, "header")
            self.add(body, role, index, reason)
        for kind, piece in pieces:
            if kind == "image":
                self._add_image(role, index)
            elif kind == "video":
                self._add_video(role, index)
            else:
                self.add(self.tokens.text_ids(piece), role, index, reason if kind == "text" else tool_reason)
        self.add([self.tokens.turn_end], role, index, tool_reason if in_tool else reason)

    def _without_thinking(self, text: str) -> str:
        """What follows the thinking; the images in it are passed over."""
        rest = text.split("</think>")[-1].lstrip("\n")
        thought = text.removesuffix(rest)
        self.next_image += thought.count(template.IMAGE)
        self.left_out += thought.count(template.IMAGE)
        return rest

    def _add_image(self, role: str, turn: int) -> None:
        index, ids = self.next_image, self.processor.visual_ids
        self.next_image += 1
        media, folder = self.record.images[index], self.options.image_folder
        with naming(self.record, f"image {index + 1}"):
            if self.options.pixels:
                picture = self.pictures[index] = open_image(media, folder)
                size = picture.size
            else:
                size = image_size(media, folder)
        atoms = self._atoms("image", index, 1, size)
        self.add([ids.image_start, *atoms, ids.image_end], role, turn, "image", "image", index)

    def _add_video(self, role: str, turn: int) -> None:
        ids, video, folder = self.processor.visual_ids, self.record.video, self.options.image_folder
        with naming(self.record, "video"):
            if self.options.pixels:
                self.frames = open_frames(video, folder, **self.options.frames)
                count, size = len(self.frames), self.frames[0].size
            else:
                count = len(sample_frames(frame_count(video, folder), **self.options.frames))
                size = frame_size(video, folder, **self.options.frames)
        steps = -(-count // self.processor.image_processor.temporal_patch_size)
        atoms = self._atoms("video", 0, steps, size)
        self.add([ids.video_start, *atoms, ids.video_end], role, turn, "video", "video", 0)

    def _atoms(self, kind: str, index: int, steps: int, size: tuple[int, int]) -> list[int]:
        """The visual tokens of a picture of `size` (width, height) pixels, or of `steps` such frames."""
        width, height = size
        grid = (steps, *self.processor.image_processor.grid(height, width, **self.options.limits))
        self.grids[kind, index] = grid
        return [self.processor.visual_ids.atom] * self.processor.tokens_per(grid)

    def cut(self, end: int) -> None:
        """Drop all tokens from `end` on; the caller does not cut inside a picture."""
        del self.ids[end:]
        while self.spans[-1].start >= end:
            self.spans.pop()
        self.spans[-1] = replace(self.spans[-1], end=end)

    def whole_characters(self, start: int, end: int) -> int:
        """`end`, or up to three tokens less, so that [start, end) ends no character in the middle of its bytes."""
        for shorter in range(end, max(start, end - 4), -1):
            if not self.tokens.is_broken(self.ids[start:shorter]):
                return shorter
        return start

    def used(self, kind: str) -> list[int]:
        """Indices in the record of the media that the tokens stand for."""
        return [span.media for span in self.spans if span.kind == kind]

    def _pixels(self) -> dict[str, torch.Tensor]:
        """The patches of the pictures that the tokens stand for; only here are they resized."""
        images, media = [self.pictures[index] for index in self.used("image")], {}
        if images:
            media |= self.processor.image_processor(images=images, **self.options.limits, return_tensors="pt")
        if self.used("video"):
            media |= self.processor.video_processor(videos=[self.frames], **self.options.limits, return_tensors="pt")
        return media

    def _grids(self) -> dict[str, torch.Tensor]:
        """What `_pixels` gives, without the patches."""
        used = {kind: [self.grids[kind, index] for index in self.used(kind)] for kind in ("image", "video")}
        return {f"{kind}_grid_thw": torch.tensor(grids) for kind, grids in used.items() if grids}

    def finish(self, dropped: list[str]) -> Encoded:
        """The tensors."""
        labels = [IGNORE_INDEX] * len(self.ids)
        for span in self.spans:
            if span.supervised:
                labels[span.start : span.end] = self.ids[span.start : span.end]
        media = self._pixels() if self.options.pixels else self._grids()
        return Encoded(
            id=self.record.id,
            input_ids=torch.tensor(self.ids, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            spans=self.spans,
            pixel_values=media.get("pixel_values"),
            image_grid_thw=media.get("image_grid_thw"),
            pixel_values_videos=media.get("pixel_values_videos"),
            video_grid_thw=media.get("video_grid_thw"),
            pad_token_id=self.tokens.pad,
            dropped=dropped,
        )
