"""Generated conversations for property tests, and an independent reading of what should carry loss."""

from __future__ import annotations

import re

from hypothesis import strategies as st
from PIL import Image

LIMITS = {"min_pixels": 32 * 32, "max_pixels": 64 * 64}

# Stable under NFC however they are joined: the Qwen tokenizer normalises, so that only these decode to themselves.
PLAIN = st.text(alphabet="abZ 09.,[](){}<>/|_\n\té日本🎈\u200d", min_size=1, max_size=12)
CONTROL = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>assistant\n", "<|vision_start|>", "<|image_pad|>"]
    + ["<ovis_visual_atom>", "<ovis_image_start>", "<ovis_image_end>", "<ovis_video_start>", "<ovis_video_end>"]
)
TAGS = st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"])
WHOLE = st.sampled_from(["<think>\nhm\n</think>\n\n", "<tool_response>John Doe</tool_response>", "<image>"])


@st.composite
def texts(draw) -> str:
    text = "".join(draw(st.lists(st.one_of(PLAIN, PLAIN, CONTROL, TAGS, WHOLE), max_size=6)))
    return text.replace("<video>", "")


@st.composite
def records(draw) -> dict:
    """A data-file dict with at least one gpt turn, pictures of few tokens, and sometimes a video."""
    roles = draw(st.lists(st.sampled_from(["human", "gpt", "gpt", "ignored_gpt"]), max_size=5)) + ["gpt"]
    roles += draw(st.sampled_from([[], ["human"]]))
    turns = [{"from": role, "value": draw(texts())} for role in ["human", *roles]]
    if draw(st.booleans()):
        turns.insert(0, {"from": "system", "value": draw(texts())})
    record = {"id": "generated", "conversations": turns}
    if draw(st.booleans()):
        turns[0]["value"] += "<video>"
        record["video"] = [Image.new("RGB", (40, 70), (9 * n, 0, 0)) for n in range(draw(st.integers(1, 3)))]
    pictures = sum(turn["value"].count("<image>") for turn in turns)
    sizes = draw(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=pictures, max_size=pictures))
    if sizes:
        record["image"] = [Image.new("RGB", size, (0, 20 * n % 256, 99)) for n, size in enumerate(sizes)]
    return record


def learnt(text: str) -> str:
    """The part of an assistant's turn that should carry loss, <|im_end|> included; written apart from the encoder."""
    kept, depth = "", 0
    for part in re.split(r"(</?tool_response>|<image>|<video>)", text):
        if part == "<tool_response>":
            depth += 1
        elif part == "</tool_response>":
            depth = max(0, depth - 1)
        elif not depth and part not in ("<image>", "<video>"):
            kept += part
    return kept if depth else kept + "<|im_end|>"
