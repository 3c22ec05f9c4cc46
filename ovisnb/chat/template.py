"""The ChatML frame of an Ovis2.5 conversation, and the tokenizer that writes text into it.

A turn is `<|im_start|>` + role + newline + text + `<|im_end|>` + newline. Only the frame may write control tokens:
whatever a turn's text contains, it becomes ordinary text tokens.
"""

from __future__ import annotations

import json
import re
from os.path import commonprefix
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from ovisnb.data.markup import tags_in

IGNORE_INDEX = -100  # the label that torch's cross entropy skips

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SEPARATOR = "\n"  # stands between <|im_end|> and the next <|im_start|>
EMPTY_THINK = "<think>\n\n</think>\n\n"  # put before an answer that does no thinking

# role in the data -> role in the prompt
ROLES = {"system": "system", "human": "user", "gpt": "assistant", "ignored_gpt": "assistant"}

IMAGE = "<image>"
VIDEO = "<video>"

_MEDIA = re.compile(f"({IMAGE}|{VIDEO})")


def header(role: str) -> str:
    """What stands between `<|im_start|>` and the text of a turn; `role` as in the data."""
    return ROLES[role] + "\n"


def has_thinking(text: str) -> bool:
    """Whether an assistant's text holds a `<think>` that is closed by a later `</think>`."""
    opened = text.find("<think>")
    return opened >= 0 and text.find("</think>", opened) >= 0


def split_media(text: str) -> list[tuple[str, str]]:
    """Cut a turn's text at its placeholders: pairs (kind, text), kind one of "text", "image", "video".

    Empty texts are left out. No visual placeholder: one pair.
    """
    return [(_kind(part), part) for part in _MEDIA.split(text) if part]


def split_answer(text: str) -> tuple[list[tuple[str, str]], bool]:
    """Cut an assistant's text at its placeholders and at its tool responses.

    Returns pairs (kind, text) with the further kind "tool_response" (its tags included), and whether a tool response
    is still open at the end. Tags nest: a response lasts until its own closing tag. One that is never closed lasts to
    the end of the turn, and a closing tag without an opening one is a piece by itself, so that no tool tag and
    nothing that a tool wrote is ever learnt. What a tag is, `ovisnb.data.markup` says: also "< TOOL_RESPONSE >".

    Cutting here does not change the ids of a tokenizer that has the tags as tokens (they are boundaries anyway); for
    one that spells them out, it gives the ids that a tool loop gets, which appends a response to what was sampled.
    """
    tags = [tag for tag in tags_in(text) if tag.name == "tool_response"]
    pieces: list[tuple[str, str]] = []
    depth, last = 0, 0
    for tag in [*tags, None]:
        between = split_media(text[last : len(text) if tag is None else tag.start])
        found = [("tool_response" if depth and kind == "text" else kind, part) for kind, part in between]
        if tag is not None:
            found.append(("tool_response", text[tag.start : tag.end]))
            depth, last = max(0, depth + (-1 if tag.closing else 1)), tag.end
        for kind, part in found:
            if pieces and kind == pieces[-1][0] == "tool_response":
                pieces[-1] = (kind, pieces[-1][1] + part)
            else:
                pieces.append((kind, part))
    return pieces, depth > 0


def _kind(part: str) -> str:
    return "image" if part == IMAGE else "video" if part == VIDEO else "text"


class ChatTokens:
    """The frame's token ids for one tokenizer, and `text_ids`, which never yields a control token.

    It owns a copy of the tokenizer's backend: in the shared one, reading special tokens as text is a mutable switch
    that every other caller (and thread) would see.
    """

    def __init__(self, tokenizer, control: tuple[int, ...] = ()):
        """`tokenizer`: a fast tokenizer; `control`: ids that text must never become, besides its special tokens."""
        self.size = len(tokenizer)
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in (TURN_START, TURN_END) if token not in vocabulary]:
            raise ValueError(
                f"The tokenizer has no {' and no '.join(missing)} token: "
                "build the model with ovisnb.model.assemble, which adds what is missing."
            )
        self.turn_start, self.turn_end = vocabulary[TURN_START], vocabulary[TURN_END]
        self.pad = tokenizer.pad_token_id
        if self.pad is None:  # GPT-2 and the like; padding is never attended to, so that any id will do
            self.pad = self.turn_end
        control = {*control, *tokenizer.all_special_ids, self.turn_start, self.turn_end}
        self._backend = _text_backend(tokenizer.backend_tokenizer, control)
        self.separator = self.text_ids(SEPARATOR)
        self.headers = {role: [self.turn_start, *self.text_ids(header(role))] for role in ROLES}
        self.empty_think = self.text_ids(EMPTY_THINK)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text; `<think>`, `<tool_call>` and the like stay one token where the tokenizer has them."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def with_header(self, role: str, text: str) -> tuple[list[int], list[int]]:
        """Ids of a turn's header and of the text behind it, tokenized as one, as the released code does.

        Where the text begins with a newline, the header's newline may join it in one token, which then counts as text.
        """
        expected = self.headers[role]
        ids = [self.turn_start, *self.text_ids(header(role) + text)]
        if ids[: len(expected)] == expected:
            return expected, ids[len(expected) :]
        same = len(commonprefix([ids, expected]))
        return ids[:same], ids[same:]

    def is_broken(self, ids: list[int]) -> bool:
        """Whether the ids end inside a character (of several bytes, and so perhaps of several tokens)."""
        return self._backend.decode(ids, skip_special_tokens=False).endswith("\N{REPLACEMENT CHARACTER}")


def _text_backend(backend: Tokenizer, control: set[int]) -> Tokenizer:
    """A copy of the tokenizer that reads control tokens in a text as the characters they are written with."""
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["id"] in control
    state["truncation"] = state["padding"] = state["post_processor"] = None
    copy = Tokenizer.from_str(json.dumps(state))
    copy.encode_special_tokens = True
    return copy


_CHAT_TOKENS: WeakKeyDictionary = WeakKeyDictionary()


def chat_tokens(processor) -> ChatTokens:
    """The ChatTokens of a processor, made once and forgotten with it; made anew after tokens were added."""
    tokenizer = processor.tokenizer
    tokens = _CHAT_TOKENS.get(tokenizer)
    if tokens is None or tokens.size != len(tokenizer):
        tokens = _CHAT_TOKENS[tokenizer] = ChatTokens(tokenizer, processor.visual_ids.all)
    return tokens
