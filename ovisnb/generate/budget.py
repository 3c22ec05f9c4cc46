"""A thinking budget inside one `generate` call.

The rule (released Ovis2.5): generate up to `thinking_budget` tokens; a row that by then has neither
ended nor written </think> gets the closing text appended, and goes on up to max_new_tokens in all,
the closing text counted. The released code runs the whole prompt, images included, a second time
to do so. Here a logits processor forces the closing text token by token, row by row, so that a
batch is prefilled once and its images are encoded once.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

CLOSING_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking "
    "directly now.\n</think>\n\n"
)


def closing_ids(tokenizer) -> list[int]:
    """The closing text's token ids; ValueError when </think> is not one token of this tokenizer."""
    ids = tokenizer.encode(CLOSING_TEXT, add_special_tokens=False)
    if think_end_id(tokenizer) not in ids:
        raise ValueError(
            "This tokenizer does not keep '</think>' as one token inside a text: pass enable_thinking_budget=False."
        )
    return ids


def token_id(tokenizer, name: str) -> int | None:
    """The id of a token by its exact name, or None; unlike get_vocab it builds no table of 150,000 names."""
    found = tokenizer.convert_tokens_to_ids(name)  # an unknown name gives None or the unknown token's id
    return found if found is not None and tokenizer.convert_ids_to_tokens(found) == name else None


def think_end_id(tokenizer) -> int:
    """The id of </think>; ValueError when the tokenizer has no such token."""
    token = token_id(tokenizer, "</think>")
    if token is None:
        raise ValueError(
            "This tokenizer has no token '</think>', so no budget can close it: pass enable_thinking_budget=False."
        )
    return token


class ThinkingBudget(LogitsProcessor):
    """Forces `closing` onto every row whose first `budget` new tokens hold no `think_end`.

    prompt_length: width of the padded prompt (columns of input_ids before generation)
    budget: new tokens a row may spend before </think>, at least 1
    closing: ids to force, at new-token positions budget, budget + 1, ...
    It keeps no state: what to force follows from `input_ids` alone, so beams may be reordered and
    ended rows (padded by `generate` whatever the scores) need no care.
    """

    def __init__(self, prompt_length: int, budget: int, closing: list[int], think_end: int):
        self.prompt_length, self.budget, self.closing, self.think_end = prompt_length, budget, closing, think_end

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids [rows, length so far], scores [rows, vocabulary] -> scores."""
        position = input_ids.shape[1] - self.prompt_length - self.budget
        if not 0 <= position < len(self.closing):
            return scores
        spent = input_ids[:, self.prompt_length : self.prompt_length + self.budget]
        over = ~(spent == self.think_end).any(dim=1, keepdim=True)  # [rows, 1]
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.closing[position]] = 0.0
        return torch.where(over, forced, scores)
