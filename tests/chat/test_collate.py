"""A batch is its samples, padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovisnb.chat import IGNORE_INDEX, EncodeError, collate, encode
from tests.chat.conversations import LIMITS, records


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(chosen=st.lists(records(), min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_batch_equals_singles(chosen, side, golden_processor):
    samples = []
    for record in chosen:
        try:
            samples.append(encode(record, golden_processor, **LIMITS))
        except EncodeError:  # a generated record may hold nothing to learn
            continue
    if not samples:
        return
    batch = collate(samples, padding_side=side)
    pad = golden_processor.tokenizer.pad_token_id
    assert batch["input_ids"].shape == (len(samples), max(len(sample) for sample in samples))
    for row, sample in enumerate(samples):
        mask = batch["attention_mask"][row].bool()
        assert int(mask.sum()) == len(sample) and mask[0 if side == "right" else -1]
        assert int((mask[1:] != mask[:-1]).sum()) == (len(sample) < len(mask))  # padding on one side only
        assert torch.equal(batch["input_ids"][row][mask], sample.input_ids)
        assert torch.equal(batch["labels"][row][mask], sample.labels)
        assert (batch["input_ids"][row][~mask] == pad).all() and (batch["labels"][row][~mask] == IGNORE_INDEX).all()
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        parts = [getattr(sample, name) for sample in samples if getattr(sample, name) is not None]
        if parts:
            assert torch.equal(batch[name], torch.cat(parts))
        else:
            assert name not in batch


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_model_sees_a_batch_as_it_sees_singles(side, golden, golden_processor, golden_model):
    turns = [[("human", "<image>\nWhat?"), ("gpt", "A ring.")], [("human", "<video>?"), ("gpt", "Yes.")]]
    turns.append([("human", "Where is the red circle?"), ("gpt", "<think>\nhm\n</think>\n\nThere is no image.")])
    media = [{"image": "photo.png"}, {"video": ["gray.png", "gray.png"]}, {}]
    samples = [
        encode(
            {"conversations": [{"from": role, "value": text} for role, text in said], **pictures},
            golden_processor,
            image_folder=golden / "images",
            **LIMITS,
        )
        for said, pictures in zip(turns, media)
    ]
    batch = collate(samples, padding_side=side)
    with torch.no_grad():
        together = golden_model(**batch).logits
        for row, sample in enumerate(samples):
            alone = golden_model(**collate([sample])).logits[0]
            mask = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][mask], alone, atol=1e-4, rtol=1e-4)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(chosen=st.lists(records(), min_size=1, max_size=4))
def test_a_packed_row_is_its_samples_one_behind_another(chosen, golden_processor):
    samples = []
    for record in chosen:
        try:
            samples.append(encode(record, golden_processor, **LIMITS))
        except EncodeError:
            continue
    if not samples:
        return
    row, padded = collate(samples, packed=True), collate(samples)
    lengths = [len(sample) for sample in samples]
    ends = row["cu_seq_lens_q"]
    assert ends.dtype == torch.int32 and torch.equal(ends, row["cu_seq_lens_k"])
    assert ends.diff().tolist() == lengths and row["max_length_q"] == row["max_length_k"] == max(lengths)
    assert "attention_mask" not in row and row["input_ids"].shape == row["labels"].shape == (1, sum(lengths))
    assert row["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    for sample, start in zip(samples, ends.tolist(), strict=False):
        place = slice(start, start + len(sample))
        assert torch.equal(row["input_ids"][0, place], sample.input_ids)
        assert row["labels"][0, start] == IGNORE_INDEX
        assert torch.equal(row["labels"][0, place][1:], sample.labels[1:])
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        assert (name in row) == (name in padded) and (name not in row or torch.equal(row[name], padded[name]))


def test_the_first_label_of_a_packed_sample_is_not_predicted_by_the_one_before(golden_processor):
    sample = encode({"conversations": [{"from": "gpt", "value": "a"}]}, golden_processor)
    sample.labels[0] = sample.input_ids[0]
    row = collate([sample, sample], packed=True)
    assert row["labels"][0, [0, len(sample)]].tolist() == [IGNORE_INDEX] * 2 and sample.labels[0] != IGNORE_INDEX
    sample.input_ids = sample.labels = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="has no token"):
        collate([sample], packed=True)


def test_no_samples_and_no_such_side(golden_processor):
    with pytest.raises(ValueError, match="empty list"):
        collate([])
    sample = encode({"conversations": [{"from": "gpt", "value": "a"}]}, golden_processor)
    with pytest.raises(ValueError, match="'middle'"):
        collate([sample], padding_side="middle")
