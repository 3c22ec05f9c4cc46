"""The thinking budget: which ids are forced, on which rows, at which positions."""

from __future__ import annotations

import pytest
import torch

from ovisnb.generate.budget import CLOSING_TEXT, ThinkingBudget, closing_ids, think_end_id

THINK_END, CLOSING = 7, [3, 4, 7, 5]


def forced(processor, rows: list[list[int]]) -> list[int | None]:
    """For each row: the only id that may follow, or None when the scores are left alone."""
    scores = torch.arange(len(rows) * 10, dtype=torch.float32).reshape(len(rows), 10)
    after = processor(torch.tensor(rows), scores.clone())
    return [
        None if torch.equal(new, old) else int(new.argmax()) if torch.isneginf(new).sum() == 9 else -1
        for new, old in zip(after, scores, strict=True)
    ]


def test_closing_text_is_forced_id_by_id_after_the_budget():
    processor = ThinkingBudget(prompt_length=2, budget=3, closing=CLOSING, think_end=THINK_END)
    row, seen = [0, 0], []
    for _ in range(9):
        choice = forced(processor, [row])[0]
        seen.append(choice)
        row.append(1 if choice is None else choice)
    assert seen == [None] * 3 + CLOSING + [None] * 2


def test_rows_are_judged_one_by_one():
    processor = ThinkingBudget(prompt_length=1, budget=3, closing=CLOSING, think_end=THINK_END)
    assert forced(processor, [[0, 1, 1, 1], [0, 1, 7, 1], [0, 1, 1, 7]]) == [3, None, None]
    # later, the </think> that was forced does not count as the row's own
    assert forced(processor, [[0, 1, 1, 1, 3, 4, 7], [0, 1, 7, 1, 2, 2, 2]]) == [5, None]


def test_a_think_end_in_the_prompt_does_not_count():
    processor = ThinkingBudget(prompt_length=2, budget=1, closing=CLOSING, think_end=THINK_END)
    assert forced(processor, [[7, 7, 1]]) == [3]


def test_closing_text_as_tokens(golden_processor):
    tokenizer = golden_processor.tokenizer
    ids = closing_ids(tokenizer)
    assert tokenizer.decode(ids) == CLOSING_TEXT
    assert ids.count(think_end_id(tokenizer)) == 1


def test_tokenizer_without_think_end_is_named():
    class Plain:
        def convert_tokens_to_ids(self, name):
            return 0  # the id of its unknown token

        def convert_ids_to_tokens(self, token):
            return "<unk>"

    with pytest.raises(ValueError, match="no token '</think>'"):
        think_end_id(Plain())
