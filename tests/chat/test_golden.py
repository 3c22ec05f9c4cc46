"""ids, labels, grids and pixels against the numbers of the original code (tests/golden/ovis2_5)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovisnb.chat import IGNORE_INDEX, collate, encode

FOLDER = Path(__file__).parents[1] / "golden" / "ovis2_5"
SPEC = json.loads((FOLDER / "cases.json").read_text())
CASES = SPEC["conversations"]
LIMITS = SPEC["case_pixel_limits"]


@pytest.fixture(scope="module")
def numbers(golden):
    return dict(np.load(golden / "expected.npz"))


def record_of(name: str) -> dict:
    case = CASES[name]
    record = {"id": name, "conversations": case["conversations"]}
    for key, kind in (("image", "images"), ("video", "video")):
        if case[kind]:
            record[key] = [f"{picture}.png" for picture in case[kind]]
    return record


@pytest.fixture(scope="module")
def encoded(golden, golden_processor):
    return {name: encode(record_of(name), golden_processor, image_folder=golden / "images", **LIMITS) for name in CASES}


def native(ids: np.ndarray, processor) -> list[int]:
    """The released code's negative visual ids as this tokenizer's."""
    visual = dict(zip(range(-300, -305, -1), processor.visual_ids.all))
    return [visual.get(i, i) for i in ids.reshape(-1).tolist()]


@pytest.mark.parametrize("name", CASES)
def test_ids_labels_and_grids(name, encoded, numbers, golden_processor):
    ours = encoded[name]
    assert ours.input_ids.dtype == ours.labels.dtype == torch.int64
    assert ours.input_ids.tolist() == native(numbers[f"encode/{name}/input_ids"], golden_processor)

    expected = numbers[f"encode/{name}/labels"].reshape(-1).copy()
    if name == "tool_call":  # the one place where the wanted labels differ
        ids = ours.input_ids.tolist()
        tags = golden_processor.tokenizer.convert_tokens_to_ids(["<tool_response>", "</tool_response>"])
        start, end = (ids.index(tag) for tag in tags)
        assert (expected[start : end + 1] != IGNORE_INDEX).all()
        expected[start : end + 1] = IGNORE_INDEX
    assert ours.labels.tolist() == expected.tolist()

    grids = ours.video_grid_thw if name == "video" else ours.image_grid_thw
    if name == "text_only":
        assert grids is None and ours.pixel_values is None
    else:
        assert grids.tolist() == numbers[f"encode/{name}/grid_thws"].tolist()


@pytest.mark.parametrize("picture", [name for name, limits in SPEC["pixel_limits"].items() if limits == LIMITS])
def test_pixels(picture, numbers, golden, golden_processor):
    record = {
        "image": f"{picture}.png",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Yes."}],
    }
    ours = encode(record, golden_processor, image_folder=golden / "images", **LIMITS)
    np.testing.assert_allclose(ours.pixel_values, numbers[f"preprocess/{picture}/pixel_values"], atol=1e-6)
    assert ours.image_grid_thw.tolist() == np.atleast_2d(numbers[f"preprocess/{picture}/grid_thw"]).tolist()


def test_pixel_limits_differ_only_for_other_pictures():
    """The parametrisation above is not empty: these pictures' limits are the conversations' limits."""
    same = [name for name, limits in SPEC["pixel_limits"].items() if limits == LIMITS]
    assert same == ["gray", "alpha"]


def test_batch(encoded, numbers, golden_processor):
    samples = json.loads((FOLDER / "expected.json").read_text())["batch"]["samples"]
    batch = collate([encoded[name] for name in samples])
    mask = numbers["batch/attention_mask"].astype(bool)
    ids = torch.tensor(native(numbers["batch/input_ids"], golden_processor)).reshape(mask.shape)
    assert batch["attention_mask"].tolist() == mask.astype(int).tolist()
    assert batch["input_ids"][mask].tolist() == ids[mask].tolist()
    assert batch["labels"].tolist() == numbers["batch/labels"].tolist()
    assert batch["image_grid_thw"].tolist() == numbers["batch/grid_thws"].tolist()
    assert len(batch["pixel_values"]) == batch["image_grid_thw"].prod(dim=1).sum()


@pytest.mark.parametrize("name", ["single", "multi_turn_system", "mixed_thinking", "multi_image", "video", "text_only"])
@pytest.mark.parametrize("enable_thinking", [False, True])
def test_prompt_is_the_chat_templates(name, enable_thinking, golden, golden_processor):
    """A prompt has the ids that apply_chat_template gives for the same conversation."""
    record = record_of(name)
    ours = encode(
        record, golden_processor, image_folder=golden / "images", train=False, enable_thinking=enable_thinking, **LIMITS
    )
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    pictures = {
        kind: [Image.open(golden / "images" / picture).convert("RGB") for picture in record.get(kind, [])]
        for kind in ("image", "video")
    }
    queue = iter(pictures["image"])
    messages = []
    for turn in record["conversations"][:-1]:
        text, content = turn["value"], []
        while text.startswith(("<image>\n", "<video>\n")):
            kind = text[1:6]
            content.append({"type": kind, kind: next(queue) if kind == "image" else pictures["video"]})
            text = text[8:]
        messages.append({"role": roles[turn["from"]], "content": [*content, {"type": "text", "text": text}]})
    prompt = golden_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, enable_thinking=enable_thinking
    )
    inputs = golden_processor(
        text=prompt,
        images=pictures["image"] or None,
        videos=[pictures["video"]] if pictures["video"] else None,
        return_tensors="pt",
        **LIMITS,
    )
    assert ours.input_ids.tolist() == inputs["input_ids"][0].tolist()
    assert (ours.labels == IGNORE_INDEX).all()
    for key in ("pixel_values", "pixel_values_videos"):
        if key in inputs:
            torch.testing.assert_close(getattr(ours, key), inputs[key])
