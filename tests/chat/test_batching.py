"""Lengths without pixels are those of the encoded record; plans hold their budgets and every sample once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovisnb.chat import encode
from ovisnb.chat.batching import Length, Padding, length_of, measure, padding, plan_batches, plan_rows
from tests.chat.conversations import LIMITS
from tests.chat.test_encode import picture, talk

sample = st.builds(Length, st.integers(1, 400), st.integers(0, 6))
samples = st.lists(sample, max_size=60)


@given(
    lengths=samples,
    max_tokens=st.integers(400, 2000),
    max_images=st.none() | st.integers(6, 20),
    seed=st.none() | st.integers(0, 9),
)
def test_every_sample_is_in_one_batch_within_both_budgets(lengths, max_tokens, max_images, seed):
    batches = plan_batches(lengths, max_tokens=max_tokens, max_images=max_images, seed=seed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch and len(batch) * max(lengths[index].tokens for index in batch) <= max_tokens
        assert max_images is None or sum(lengths[index].images for index in batch) <= max_images
    assert batches == plan_batches(lengths, max_tokens=max_tokens, max_images=max_images, seed=seed)


@given(batch=st.integers(2, 5), full=st.integers(2, 12), data=st.data())
def test_batches_by_size_pad_no_more_than_batches_in_the_datas_order(batch, full, data):
    """For full batches: with a shorter one at the end, whichever holds the longest decides."""
    lengths = data.draw(st.lists(sample, min_size=batch * full, max_size=batch * full))
    plain = [range(at, at + batch) for at in range(0, len(lengths), batch)]
    by_size = sorted(range(len(lengths)), key=lambda index: lengths[index].tokens, reverse=True)
    ordered = [[by_size[at] for at in some] for some in plain]
    assert padding(lengths, ordered).padding <= padding(lengths, plain).padding


@given(lengths=samples, max_tokens=st.integers(400, 2000))
def test_every_sample_is_in_one_packed_row_within_the_budget(lengths, max_tokens):
    rows = plan_rows(lengths, max_tokens=max_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[index].tokens for index in row) for row in rows)
    assert all(tokens <= max_tokens for tokens in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > max_tokens  # no two rows would go into one
    assert rows == plan_rows(lengths, max_tokens=max_tokens)


def test_rows_are_filled_up_with_what_fits_best():
    lengths = [Length(tokens, 0) for tokens in (60, 30, 50, 40, 10)]
    assert plan_rows(lengths, max_tokens=100) == [[0, 3], [2, 1, 4]]
    with pytest.raises(ValueError, match="sample 0 has 60 tokens, more than max_tokens 59"):
        plan_rows(lengths, max_tokens=59)


def test_padding_is_counted():
    lengths = [Length(10, 1), Length(4, 0), Length(7, 2)]
    assert padding(lengths, [[0, 1], [2]]) == Padding(tokens=21, padding=6)
    assert padding(lengths, [[0, 1], [2]]).share == pytest.approx(6 / 27)
    assert padding(lengths, []) == Padding(0, 0) and padding(lengths, []).share == 0.0


def test_the_longest_comes_first_without_a_seed_and_a_seed_shuffles():
    lengths = [Length(tokens, 0) for tokens in range(1, 101)]
    plan = plan_batches(lengths, max_tokens=100)
    assert plan[0] == [99] and plan[-1][-1] == 0
    assert plan_batches(lengths, max_tokens=100, seed=1) != plan_batches(lengths, max_tokens=100, seed=2)


def test_a_shuffled_plan_of_many_samples_mixes_the_data_and_still_pads_little():
    lengths = [Length(1 + at * 7919 % 500, 0) for at in range(4000)]
    plan = plan_batches(lengths, max_tokens=1000, seed=3)
    assert padding(lengths, plan).share < 0.05
    first = [index for batch in plan[:50] for index in batch]
    assert min(first) < 400 and max(first) > 3600  # not a run of neighbours of the file


@pytest.mark.parametrize(
    ("length", "part"),
    [(Length(11, 0), "sample 1 has 11 tokens, more than max_tokens 10"), (Length(5, 4), "sample 1 has 4 images")],
)
def test_a_sample_over_a_budget_is_named(length, part):
    with pytest.raises(ValueError, match=part):
        plan_batches([Length(1, 0), length], max_tokens=10, max_images=3)


def test_a_length_is_that_of_the_encoded_record(golden_processor):
    record = talk(
        ("human", "<image>\nand <video>?"),
        ("gpt", "Look: <image> there."),
        image=[picture(), picture(96, 32)],
        video=[picture(64, 64)] * 3,
    )
    whole = encode(record, golden_processor, **LIMITS)
    assert measure(record, golden_processor, **LIMITS) == length_of(whole)
    assert length_of(whole) == Length(len(whole.input_ids), 2 + int(whole.video_grid_thw[0, 0]))
    text = talk(("human", "Hi"), ("gpt", "Hello"))
    assert measure(text, golden_processor).images == 0
