"""A small Qwen-style tokenizer for models of a few million parameters.

    tokenizer = tiny_tokenizer([*shapes.texts(3000), *english], vocab_size=1024)

It is a Qwen2 tokenizer (byte-level BPE, Qwen2's pre-tokenizer, NFC) with Qwen3's own 26 added tokens in Qwen3's
order, so everything that works with the released tokenizer works with it. Between the BPE vocabulary and those 26
it has tokens that fit the task: one for each grounding tag and one for each coordinate on a grid of 1/64. An object
with its box then takes about 15 tokens; digit by digit it would be 40, and a tiny model has to get each one right.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

# From Qwen2's tokenizer.json: letters with one leading mark, single digits, marks, line ends, spaces.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen3's added tokens in their order (ids 151643 to 151668 there).
QWEN3_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN3_ORDINARY = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

GROUNDING_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<point>", "</point>")
COORDINATES = (*(f"{step / 64:.3f}" for step in range(64)), "0.999")  # 0.999 is how the far edge is written


def tiny_tokenizer(texts: Iterable[str], vocab_size: int = 1024, *, model_max_length: int = 4096) -> Qwen2Tokenizer:
    """Train a tokenizer of at most `vocab_size` entries, added tokens included, on `texts`.

    The same texts in the same order give the same tokenizer. Any text round-trips (after NFC), because all 256
    bytes are in the vocabulary.

    Raises:
        ValueError: vocab_size leaves no room for the bytes and the added tokens.
    """
    added = _added_tokens()
    smallest = 256 + len(added)
    if vocab_size < smallest:
        raise ValueError(
            f"tiny_tokenizer: vocab_size is {vocab_size}, give at least {smallest} (bytes and added tokens)."
        )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_between_added_tokens(texts), trainer)
    tokenizer.add_tokens(added)
    return _as_qwen2(tokenizer, added, model_max_length)


def _added_tokens() -> list[AddedToken]:
    """In the order of their ids. Coordinates only match as a whole number, so "10.125" stays ordinary text."""
    ordinary = [AddedToken(tag, normalized=False) for tag in GROUNDING_TAGS]
    ordinary += [AddedToken(number, normalized=False, single_word=True) for number in COORDINATES]
    special = [AddedToken(token, normalized=False, special=True) for token in QWEN3_SPECIAL]
    return ordinary + special + [AddedToken(token, normalized=False) for token in QWEN3_ORDINARY]


def _between_added_tokens(texts: Iterable[str]) -> Iterator[str]:
    """What the BPE will see in use: the text between added tokens, so no merge is spent on the tokens themselves."""
    pattern = re.compile("|".join(re.escape(token.content) for token in _added_tokens()))
    for text in texts:
        yield from filter(None, pattern.split(text))


def _as_qwen2(tokenizer: Tokenizer, added: list[AddedToken], model_max_length: int) -> Qwen2Tokenizer:
    """The same tokenizer as transformers' Qwen2 class, by way of the files of a Qwen folder.

    The class's own constructor would put its end token before all other added tokens; loading keeps every id.
    `additional_special_tokens` stays unset: the entries say themselves which of them are special, and transformers 5
    would save it in a form that stops transformers 4 from opening the folder.
    """
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token.content)): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token in added
        },
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": model_max_length,
    }
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder, "tokenizer.json")))
        tokenizer.model.save(folder)  # vocab.json and merges.txt
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return Qwen2Tokenizer.from_pretrained(folder)
