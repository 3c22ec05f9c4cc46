"""The tiny tokenizer: Qwen's habits, one token a coordinate, any text, the same every time."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ovisnb.data import boxes, shapes
from ovisnb.model.tiny import COORDINATES, GROUNDING_TAGS, QWEN3_ORDINARY, QWEN3_SPECIAL, tiny_tokenizer

ENGLISH = ["The quick brown fox jumps over the lazy dog, and it doesn't look back.", "She reads 3 of 12 pages."] * 20


@pytest.fixture(scope="module")
def corpus():
    return [*shapes.texts(800), *ENGLISH]


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return tiny_tokenizer(corpus, vocab_size=640)


def tokens(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


def test_the_added_tokens_end_the_vocabulary_in_qwen3_order(tokenizer, golden):
    released = json.loads((golden / "checkpoint/tokenizer_config.json").read_text())["added_tokens_decoder"]
    ours = tokenizer.added_tokens_decoder
    last = sorted(ours)[-len(released) :]
    assert [(ours[i].content, ours[i].special) for i in last] == [
        (entry["content"], entry["special"]) for _, entry in sorted(released.items(), key=lambda item: int(item[0]))
    ]
    assert [ours[i].content for i in last] == [*QWEN3_SPECIAL, *QWEN3_ORDINARY]
    assert last[-1] == len(tokenizer) - 1
    fitting = [tokenizer.convert_tokens_to_ids(token) for token in (*GROUNDING_TAGS, *COORDINATES)]
    assert fitting == list(range(last[0] - len(fitting), last[0]))
    assert not any(ours[i].special for i in fitting)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)


def test_the_pipeline_is_the_released_one(tokenizer, golden):
    def pipeline(text: str) -> dict:
        whole = json.loads(text)
        return {key: whole[key] for key in ("normalizer", "pre_tokenizer")} | {"model": whole["model"]["type"]}

    assert pipeline(tokenizer.backend_tokenizer.to_str()) == pipeline(
        (golden / "checkpoint/tokenizer.json").read_text()
    )


def test_every_coordinate_of_the_grid_is_one_token(tokenizer):
    for step in range(65):
        text = boxes.format_point((step / 64, 1 - step / 64))
        assert len(tokens(tokenizer, text)) == 7, text
    assert tokens(tokenizer, "<ref>red circle</ref><box>(0.125,0.250),(0.375,0.999)</box>") == [
        "<ref>", "red", "Ġcircle", "</ref>", "<box>", "(", "0.125", ",", "0.250", "),(", "0.375", ",", "0.999", ")",
        "</box>",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["10.125", "0.1250", "v0.125", "0.126", "0. 125"])
def test_a_coordinate_is_a_whole_number_on_the_grid(tokenizer, text):
    assert not set(tokens(tokenizer, text)) & set(COORDINATES)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_common_words_are_one_token(tokenizer):
    for word in ("user", "assistant", "red", " red", " circle", "Find", " bounding", " coordinates", " left"):
        assert len(tokenizer(word).input_ids) == 1, word


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x024F)) | st.text("aé 中🙂\n\t0.125<>|/ref"))
def test_any_text_comes_back(tokenizer, text):
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(tokenizer(text).input_ids) == normal


def test_the_same_texts_give_the_same_tokenizer(tokenizer, corpus):
    again = tiny_tokenizer(corpus, vocab_size=640)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "Qwen2Tokenizer" and loaded.get_vocab() == tokenizer.get_vocab()
    text = "<|im_start|>user\n<ref>red star</ref> 0.125 10.125<|im_end|>\n<think>\n\n</think>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    skipped = loaded.decode(loaded(text).input_ids, skip_special_tokens=True)
    assert skipped == "user\n<ref>red star</ref> 0.125 10.125\n<think>\n\n</think>"
    # transformers 4 dies on a list here
    assert "extra_special_tokens" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_the_size_is_a_limit(corpus):
    assert len(tiny_tokenizer(corpus, vocab_size=500)) == 500
    assert len(tiny_tokenizer(["one text"], vocab_size=1024)) < 400
    with pytest.raises(ValueError, match="vocab_size is 300, give at least 353"):
        tiny_tokenizer(corpus, vocab_size=300)
