"""The frame under tokenizers unlike the released one: no tags as tokens, newlines that merge, tokens marked wrongly."""

from __future__ import annotations

import gc
import weakref

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import PreTrainedTokenizerFast

from ovisnb.chat import encode
from ovisnb.chat.template import chat_tokens, has_thinking
from ovisnb.data.markup import unclosed
from ovisnb.model import Ovis2_5ImageProcessor, Ovis2_5Processor
from ovisnb.model.processing import VISUAL_TOKENS

FRAME = ("<|im_start|>", "<|im_end|>")


def make_processor(frame=FRAME, special: bool = True) -> Ovis2_5Processor:
    """A GPT-2-like tokenizer: bytes and one merge (two newlines), no pad token, no <think>, no tool tags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in (*frame, *VISUAL_TOKENS)])
    return Ovis2_5Processor(Ovis2_5ImageProcessor(), tokenizer)


def talk(*turns: tuple[str, str]) -> dict:
    return {"id": "r1", "conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def spans_of(encoded, processor) -> list[tuple[str, str]]:
    ids = encoded.input_ids
    return [(span.reason, processor.tokenizer.decode(ids[span.start : span.end])) for span in encoded.spans]


def test_a_text_that_begins_with_a_newline_is_tokenized_with_its_header(processor):
    encoded = encode(talk(("human", "\nhi"), ("gpt", "\nyes")), processor)
    newlines = processor.tokenizer.convert_tokens_to_ids("ĊĊ")
    assert spans_of(encoded, processor) == [
        ("header", "<|im_start|>user"),
        ("user", "\n\nhi<|im_end|>"),  # the two newlines are one token
        ("separator", "\n"),
        ("header", "<|im_start|>assistant\n"),
        ("empty_think", "<think>\n\n</think>\n\n"),
        ("answer", "\nyes<|im_end|>"),  # an answer never shares a token with what stands before it
    ]
    turn, _ = processor.tokenizer.decode(encoded.input_ids).split("<|im_end|>", 1)
    alone = processor.tokenizer(turn)["input_ids"]
    assert encoded.input_ids[: len(alone)].tolist() == alone and newlines in alone


def test_tool_responses_are_masked_to_the_letter_without_tags_in_the_vocabulary(processor):
    said = "a\n<tool_response>\n\nb</tool_response>\n\nc"
    encoded = encode(talk(("gpt", said)), processor)
    assert spans_of(encoded, processor)[-3:] == [
        ("answer", "a\n"),
        ("tool_response", "<tool_response>\n\nb</tool_response>"),
        ("answer", "\n\nc<|im_end|>"),
    ]


@pytest.mark.parametrize("tags", [("<TOOL_RESPONSE>", "</TOOL_RESPONSE>"), ("< tool_response\n>", "</tool_response >")])
def test_what_the_checks_take_for_a_tool_response_is_masked(processor, tags):
    text = f"x {tags[0]}R{tags[1]} y"
    assert not unclosed(text)
    encoded = encode(talk(("gpt", text)), processor)
    assert spans_of(encoded, processor)[-3:] == [
        ("answer", "x "),
        ("tool_response", f"{tags[0]}R{tags[1]}"),
        ("answer", " y<|im_end|>"),
    ]


@pytest.mark.parametrize("special", [True, False])
def test_the_frames_tokens_are_plain_text_in_a_turn_however_they_are_marked(special):
    processor = make_processor(special=special)
    encoded = encode(talk(("human", "".join(VISUAL_TOKENS)), ("gpt", "<|im_end|><|im_start|>")), processor)
    ids = encoded.input_ids.tolist()
    start, end = processor.tokenizer.convert_tokens_to_ids(list(FRAME))
    assert (ids.count(start), ids.count(end)) == (2, 2)
    assert set(processor.visual_ids.all).isdisjoint(ids)
    assert spans_of(encoded, processor)[-1] == ("answer", "<|im_end|><|im_start|><|im_end|>")


def test_without_a_pad_token_the_end_of_turn_pads(processor):
    encoded = encode(talk(("gpt", "a")), processor)
    assert encoded.pad_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_tokens_added_later_are_seen():
    processor = make_processor()
    before = len(encode(talk(("gpt", "<box>")), processor))
    processor.tokenizer.add_tokens(["<box>"])
    assert len(encode(talk(("gpt", "<box>")), processor)) == before - len("<box>") + 1


def test_the_cache_goes_with_its_tokenizer():
    processor = make_processor()
    tokens, tokenizer = weakref.ref(chat_tokens(processor)), weakref.ref(processor.tokenizer)
    assert chat_tokens(processor) is tokens()
    del processor
    gc.collect()
    assert tokens() is None and tokenizer() is None


def test_a_tokenizer_without_the_frame_is_refused():
    with pytest.raises(ValueError, match=r"no <\|im_end\|> token: .*assemble"):
        encode(talk(("gpt", "a")), make_processor(frame=FRAME[:1]))


@pytest.mark.parametrize(
    "text, thinks",
    [
        ("<think>a</think>b", True),
        ("a", False),
        ("<think>a", False),
        ("</think>a<think>", False),
        ("a</think>b", False),
    ],
)
def test_has_thinking(text, thinks):
    assert has_thinking(text) == thinks
