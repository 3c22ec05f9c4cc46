"""Ask a model about pictures.

    ovis = Ovis25Inference("AIDC-AI/Ovis2.5-2B")
    answer = ovis.single_image_inference("cat.jpg", "Describe this image.", enable_thinking=True)
    answer = ovis.grounding_inference("cat.jpg", "Find the <ref>cat</ref> in the image.", request_type="box")
    answers = ovis.batch([("a.jpg", "What is it?"), ("b.jpg", "How many?")], batch_size=2)

The prompt is what `ovisnb.chat.encode` makes of a record, the same encoder that training uses; one
row or many take the same path, padded on the left.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList

from ovisnb.chat import collate, encode
from ovisnb.data.markup import BOX_REQUEST, POINT_REQUEST
from ovisnb.data.media import open_image
from ovisnb.data.record import Media, Record, Turn
from ovisnb.generate.answer import Answer, parse
from ovisnb.generate.budget import ThinkingBudget, closing_ids, think_end_id, token_id
from ovisnb.model import load

MAX_NEW_TOKENS = 1024
MAX_NEW_TOKENS_THINKING = 3072
THINKING_BUDGET = 2048
REQUESTS = {"box": BOX_REQUEST, "point": POINT_REQUEST}
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


class Ovis25Inference:
    """A model and its processor, ready to be asked.

    `Ovis25Inference(model_path)` loads a folder or hub id, onto the GPU where there is one unless
    `device` says otherwise (dtype and attn_implementation as in `ovisnb.load`; `CheckpointError` if it
    is no checkpoint); `Ovis25Inference(model=model, processor=processor)` takes a loaded pair.

    Options of every call, all by name:
      enable_thinking          let the model think first (default False)
      enable_thinking_budget   close the thinking after `thinking_budget` new tokens (default True);
      thinking_budget          both mean nothing when enable_thinking is False
      max_new_tokens           all new tokens, thinking included; by default 1024, or 3072 with
                               thinking, or what the model's positions leave room for if that is less
      min_pixels, max_pixels   limits of one image's resized area; by default the processor's
      do_sample, temperature, top_p, top_k, repetition_penalty
                               by default the checkpoint's generation_config; giving temperature,
                               top_p or top_k means sampling, temperature 0 means greedy
      seed                     of the sampling; repeats exactly for the same rows in the same batches
    """

    def __init__(
        self,
        model_path: str | Path | None = None,
        *,
        model=None,
        processor=None,
        device=None,
        dtype=None,
        attn_implementation: str | None = None,
    ):
        if (model_path is None) == (model is None) or (model is None) != (processor is None):
            raise ValueError("Ovis25Inference takes either a model_path, or both model= and processor=.")
        if model is None:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            model, processor = load(model_path, dtype=dtype, device=device, attn_implementation=attn_implementation)
        elif not (device is None and dtype is None and attn_implementation is None):
            raise ValueError(
                "device, dtype and attn_implementation belong to loading: leave them out with a loaded model."
            )
        self.model, self.processor = model, processor

    def single_image_inference(self, image_input: str | Path | Image.Image, text_prompt: str, **options: Any) -> Answer:
        """Ask about one picture. The image goes first, unless `text_prompt` itself says where with <image>."""
        return self.batch([(image_input, text_prompt)], batch_size=1, **options)[0]

    def grounding_inference(
        self, image_input: str | Path | Image.Image, text_prompt: str, request_type: str = "box", **options: Any
    ) -> Answer:
        """Ask where something is: "Find the <ref>red apple</ref> in the image.", as "box" or "point"."""
        return self.single_image_inference(image_input, grounding_prompt(text_prompt, request_type), **options)

    def batch(
        self,
        requests: Iterable[tuple[str | Path | Image.Image, str]],
        *,
        request_type: str | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> list[Answer]:
        """Many (image, prompt) pairs, `batch_size` at a time; `request_type` makes them grounding requests."""
        records = (
            _as_record(
                image, prompt if request_type is None else grounding_prompt(prompt, request_type), f"request {i}"
            )
            for i, (image, prompt) in enumerate(requests)
        )
        return self.answer_records(records, batch_size=batch_size, **options)

    def answer_records(
        self,
        records: Iterable[Record | dict],
        *,
        image_folder: str | Path | None = None,
        batch_size: int = 8,
        enable_thinking: bool = False,
        enable_thinking_budget: bool = True,
        thinking_budget: int = THINKING_BUDGET,
        max_new_tokens: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> list[Answer]:
        """Answer the open question of each record: a trailing gpt turn is left out of the prompt.

        `records` may be a stream: only `batch_size` of them are held at a time.
        Raises RecordError, MediaError, and ValueError for options that contradict each other.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1.")
        budget = thinking_budget if enable_thinking and enable_thinking_budget else None
        if max_new_tokens is not None:
            self._check_lengths(max_new_tokens, budget)
        sampling = _sampling(do_sample, temperature, top_p, top_k, repetition_penalty)
        answers: list[Answer] = []
        for chunk in _chunks(records, batch_size):
            began = time.perf_counter()
            rows, sizes = [], []
            for record in chunk:
                record, size = _with_opened_image(record, image_folder)
                sizes.append(size)
                rows.append(
                    encode(
                        record,
                        self.processor,
                        image_folder=image_folder,
                        min_pixels=min_pixels,
                        max_pixels=max_pixels,
                        train=False,
                        enable_thinking=enable_thinking,
                    )
                )
            with _evaluating(self.model), _seeded(seed, len(answers), self.model.device):
                new_ids = self._generate(rows, enable_thinking, budget, max_new_tokens, sampling)
            seconds = (time.perf_counter() - began) / len(rows)
            answers += [self._answer(*row, seconds) for row in zip(rows, sizes, new_ids, strict=True)]
        return answers

    @torch.no_grad()
    def _generate(
        self, rows, thinking: bool, budget: int | None, max_new_tokens: int | None, sampling: dict
    ) -> list[list[int]]:
        """The new ids of each row, up to and including its end token."""
        tokenizer = self.processor.tokenizer
        batch = collate(rows, padding_side="left")
        batch.pop("labels", None)
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        width = batch["input_ids"].shape[1]
        longest = max(len(row.input_ids) for row in rows)
        limit = self._new_token_limit(longest, thinking, max_new_tokens)
        processors = LogitsProcessorList()
        if budget is not None:
            self._check_lengths(limit, budget)
            processors.append(ThinkingBudget(width, budget, closing_ids(tokenizer), think_end_id(tokenizer)))
        ends = _end_ids(tokenizer)
        output = self.model.generate(
            **batch,
            max_new_tokens=limit,
            logits_processor=processors,
            eos_token_id=ends,
            pad_token_id=rows[0].pad_token_id,
            **sampling,
        )
        return [_until_end(ids, ends) for ids in output[:, width:].tolist()]

    def _new_token_limit(self, prompt_length: int, thinking: bool, max_new_tokens: int | None) -> int:
        room = self.model.config.get_text_config().max_position_embeddings - prompt_length
        wanted = max_new_tokens or (MAX_NEW_TOKENS_THINKING if thinking else MAX_NEW_TOKENS)
        if room < 1 or (max_new_tokens is not None and max_new_tokens > room):
            raise ValueError(
                f"The prompt has {prompt_length} tokens, which leaves room for {max(room, 0)} new ones in this model, "
                f"not {wanted}: lower max_new_tokens or max_pixels."
            )
        return min(wanted, room)

    def _check_lengths(self, max_new_tokens: int, budget: int | None) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be at least 1.")
        if budget is None:
            return
        if budget < 1:
            raise ValueError(
                f"thinking_budget is {budget}: it must be at least 1; pass enable_thinking=False to not think."
            )
        closing = len(closing_ids(self.processor.tokenizer))
        if budget + closing >= max_new_tokens:
            raise ValueError(
                f"thinking_budget {budget} and the {closing} tokens that close the thinking leave no room for an "
                f"answer in max_new_tokens {max_new_tokens}: lower thinking_budget or raise max_new_tokens."
            )

    def _answer(self, row, size: tuple[int, int] | None, ids: list[int], seconds: float) -> Answer:
        tokenizer = self.processor.tokenizer
        usage = {
            "prompt_tokens": len(row.input_ids),
            "image_tokens": int((row.input_ids == self.processor.visual_ids.atom).sum()),
            "new_tokens": len(ids),
            "seconds": seconds,  # the batch's time, loading pictures included, divided by its rows
            "stop": "end" if ids and ids[-1] in _end_ids(tokenizer) else "length",
        }
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return parse(text, size, usage=usage, prompt=_prompt_text(row, tokenizer))


def grounding_prompt(text: str, request_type: str = "box") -> str:
    """`text` followed by Ovis2.5's request for a "box" or a "point", unless it is there already."""
    if request_type not in REQUESTS:
        raise ValueError(f"request_type is {request_type!r}: it must be 'box' or 'point'.")
    request = REQUESTS[request_type]
    return text if request.casefold() in text.casefold() else f"{text.rstrip()} {request}".lstrip()


def _as_record(image: str | Path | Image.Image, prompt: str, name: str) -> Record:
    if isinstance(image, Image.Image):
        media = Media(image=image)
    elif isinstance(image, (str, Path)):
        media = Media(path=str(image))
    else:
        raise TypeError(f"An image is a path or a PIL image, not {type(image).__name__} ({name}).")
    text = prompt if "<image>" in prompt else f"<image>\n{prompt}"
    return Record(id=name, turns=[Turn(role="human", text=text)], images=[media], source="inference")


def _with_opened_image(record: Record | dict, image_folder) -> tuple[Record, tuple[int, int] | None]:
    """The record with its first image opened (once, here), and that image's (width, height)."""
    if not isinstance(record, Record):
        record = Record.from_dict(record)
    if not record.images:
        return record, None
    image = open_image(record.images[0], image_folder)
    return record.model_copy(update={"images": [Media(image=image), *record.images[1:]]}), image.size


def _prompt_text(row, tokenizer) -> str:
    """The prompt as sent, each run of visual tokens written as its placeholder again."""
    parts: list[str] = []
    ids: list[int] = []
    for span in row.spans:
        if span.kind == "text":
            ids.extend(row.input_ids[span.start : span.end].tolist())
        else:
            parts += [tokenizer.decode(ids), f"<{span.kind}>"]
            ids = []
    return "".join([*parts, tokenizer.decode(ids)])


def _sampling(do_sample, temperature, top_p, top_k, repetition_penalty) -> dict[str, Any]:
    """The arguments for `generate`: only what the caller decided, the rest is generation_config's."""
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in given.items() if value is not None}
    if bad := [name for name in ("temperature", "top_k") if given.get(name, 0) < 0]:
        raise ValueError(f"{bad[0]} is {given[bad[0]]}: it must be at least 0.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: it must be above 0 and at most 1.")
    if repetition_penalty is not None and repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty is {repetition_penalty}: it must be above 0.")
    if temperature == 0:
        if do_sample:
            raise ValueError("temperature 0 means greedy, and do_sample=True means sampling: give one of them.")
        do_sample = False
    elif given:
        if do_sample is False:
            raise ValueError(f"do_sample=False ignores {', '.join(given)}: leave that out, or leave do_sample out.")
        do_sample = True
    options: dict[str, Any] = {} if do_sample is None else {"do_sample": do_sample}
    if do_sample is False:
        given = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # transformers' neutral values: it warns about others
    options.update(given)
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    return options


def _end_ids(tokenizer) -> list[int]:
    ends = {token_id(tokenizer, name) for name in _END_TOKENS} | {tokenizer.eos_token_id}
    return sorted(ends - {None})


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    chunk: list = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@contextmanager
def _evaluating(model) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _seeded(seed: int | None, offset: int, device: torch.device) -> Iterator[None]:
    """Sample from a stream of our own, which leaves the caller's random numbers as they were.

    `offset`, the rows answered so far, gives each batch of a call other numbers.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + offset)
        yield
