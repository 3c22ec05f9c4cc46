"""Properties of encode on generated conversations, and its rules one at a time."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ovisnb.chat import IGNORE_INDEX, REASONS, EncodeError, encode
from ovisnb.data import MediaError, Record, RecordError
from tests.chat.conversations import LIMITS, PLAIN, learnt, records, texts

modest = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def talk(*turns: tuple[str, str], **fields) -> dict:
    return {"id": "r1", "conversations": [{"from": role, "value": text} for role, text in turns], **fields}


def picture(width: int = 64, height: int = 64) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 30, 30))


def supervised_text(encoded, processor) -> str:
    return processor.tokenizer.decode(encoded.input_ids[encoded.labels != IGNORE_INDEX])


def text_of(encoded, processor, reason: str) -> list[str]:
    spans = [span for span in encoded.spans if span.reason == reason]
    return [processor.tokenizer.decode(encoded.input_ids[span.start : span.end]) for span in spans]


def has_words_of_its_own(record: dict) -> bool:
    return any(learnt(turn["value"]) for turn in record["conversations"] if turn["from"] == "gpt")


@modest
@given(record=records())
def test_spans_tile_the_ids_and_decide_the_labels(record, golden_processor):
    if not has_words_of_its_own(record):
        with pytest.raises(EncodeError, match="generated"):
            encode(record, golden_processor, **LIMITS)
        return
    encoded = encode(record, golden_processor, **LIMITS)
    assert encoded.input_ids.ndim == encoded.labels.ndim == 1 and len(encoded) == len(encoded.labels)
    assert [span.start for span in encoded.spans] == [0, *(span.end for span in encoded.spans[:-1])]
    assert encoded.spans[-1].end == len(encoded)
    for span in encoded.spans:
        assert span.start < span.end and span.reason in REASONS
        ids, labels = (row[span.start : span.end].tolist() for row in (encoded.input_ids, encoded.labels))
        assert labels == (ids if span.supervised else [IGNORE_INDEX] * len(ids))
        assert span.supervised == (span.reason == "answer")
    assert encoded.dropped == []


@modest
@given(record=records())
def test_supervised_tokens_decode_to_the_assistants_words(record, golden_processor):
    if has_words_of_its_own(record):
        encoded = encode(record, golden_processor, **LIMITS)
        said = [learnt(turn["value"]) for turn in record["conversations"] if turn["from"] == "gpt"]
        assert supervised_text(encoded, golden_processor) == "".join(said)


@modest
@given(record=records())
def test_only_the_frame_writes_control_tokens(record, golden_processor):
    if not has_words_of_its_own(record):
        return
    encoded = encode(record, golden_processor, **LIMITS)
    tokenizer, visual = golden_processor.tokenizer, golden_processor.visual_ids
    ids = encoded.input_ids.tolist()
    turns, pictures, videos = len(record["conversations"]), len(record.get("image", [])), int("video" in record)
    grids = [] if encoded.image_grid_thw is None else encoded.image_grid_thw.tolist()
    grids += [] if encoded.video_grid_thw is None else encoded.video_grid_thw.tolist()
    wanted = {
        tokenizer.convert_tokens_to_ids("<|im_start|>"): turns,
        tokenizer.convert_tokens_to_ids("<|im_end|>"): turns,
        visual.atom: sum(t * h * w // 4 for t, h, w in grids),
        visual.image_start: pictures,
        visual.image_end: pictures,
        visual.video_start: videos,
        visual.video_end: videos,
    }
    assert {index: ids.count(index) for index in wanted} == wanted
    rest = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} - set(wanted)
    assert len(rest) > 5 and rest.isdisjoint(ids)


@modest
@given(record=records())
def test_pictures_stand_where_their_placeholders_do(record, golden_processor):
    if not has_words_of_its_own(record):
        return
    encoded = encode(record, golden_processor, **LIMITS)
    media = [span for span in encoded.spans if span.kind == "image"]
    assert [span.media for span in media] == list(range(len(record.get("image", []))))
    places = [turn for turn, said in enumerate(record["conversations"]) for _ in range(said["value"].count("<image>"))]
    assert [span.turn for span in media] == places
    for span, grid in zip(media, encoded.image_grid_thw if media else [], strict=True):
        assert span.end - span.start == int(grid.prod()) // 4 + 2
    if media:
        alone = golden_processor.image_processor(images=record["image"], return_tensors="pt", **LIMITS)
        assert torch.equal(encoded.pixel_values, alone["pixel_values"])


@modest
@given(record=records(), data=st.data())
def test_truncation_keeps_whole_turns_and_whole_pictures(record, data, golden_processor):
    if not has_words_of_its_own(record):
        return
    full = encode(record, golden_processor, **LIMITS)
    limit = data.draw(st.integers(1, len(full) + 2))
    try:
        short = encode(record, golden_processor, max_length=limit, **LIMITS)
    except EncodeError as error:
        assert "generated" in str(error)
        first = next(index for index, turn in enumerate(record["conversations"]) if turn["from"] == "gpt")
        supervised = [span for span in full.spans if span.supervised and span.turn == first]
        # Refused only if nothing of the first answer fits (a character of up to 4 tokens counts as one).
        assert not supervised or limit <= supervised[0].start + 3 or "tool responses" in str(error)
        return
    assert len(short) <= limit
    assert short.input_ids.tolist() == full.input_ids[: len(short)].tolist()
    assert short.labels.tolist() == full.labels[: len(short)].tolist()
    assert (short.labels != IGNORE_INDEX).any()
    assert [span for span in short.spans if span.kind != "text"] == [
        span for span in full.spans if span.kind != "text" and span.start < len(short)
    ]
    for name in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"):
        ours, whole = getattr(short, name), getattr(full, name)
        assert ours is None or torch.equal(ours, whole[: len(ours)])
    pictures = sum(span.kind == "image" for span in short.spans)
    assert pictures == (0 if short.image_grid_thw is None else len(short.image_grid_thw))
    assert (len(short) < len(full)) == bool(short.dropped)
    ends = [  # tokens up to the end of each answer
        max(span.end for span in full.spans if span.turn == index and span.reason != "separator")
        for index, turn in enumerate(record["conversations"])
        if turn["from"] == "gpt"
    ]
    fitting = [end for end in [*ends, len(full)] if end <= limit]
    if fitting:
        assert len(short) == max(fitting)
    else:
        assert short.spans[-1].supervised and any("lost the last" in line for line in short.dropped)


@modest
@given(turns=st.lists(st.tuples(texts(), texts()), min_size=1, max_size=3), thinking=st.booleans())
def test_a_prompt_has_no_labels_and_ends_in_an_assistant_header(turns, thinking, golden_processor):
    turns = [(role, text.replace("<image>", "")) for pair in turns for role, text in zip(("human", "gpt"), pair)]
    turns = [(role, text if text.strip() else "x") for role, text in turns]
    encoded = encode(talk(*turns), golden_processor, train=False, enable_thinking=thinking)
    assert (encoded.labels == IGNORE_INDEX).all()
    assert not any(span.supervised for span in encoded.spans)
    prompt = ""
    for role, text in turns[:-1]:
        if role == "gpt":
            text = text.split("</think>")[-1].lstrip("\n")
        prompt += f"<|im_start|>{'user' if role == 'human' else 'assistant'}\n{text}<|im_end|>\n"
    prompt += "<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n\n")
    assert golden_processor.tokenizer.decode(encoded.input_ids) == prompt


@modest
@given(text=PLAIN.filter(str.strip), answer=PLAIN)
def test_a_prompt_has_the_chat_templates_ids(text, answer, golden_processor):
    """Also where a text begins with the newlines that the header's own newline may merge with."""
    messages = [("system", text), ("user", f"\n{text}"), ("assistant", f"\n\n{answer}x"), ("user", text)]
    turns = [({"user": "human", "assistant": "gpt"}.get(role, role), said) for role, said in messages]
    encoded = encode(talk(*turns), golden_processor, train=False)
    wanted = golden_processor.apply_chat_template(
        [{"role": role, "content": said} for role, said in messages], add_generation_prompt=True, enable_thinking=False
    )
    assert encoded.input_ids.tolist() == wanted["input_ids"][0].tolist()


@modest
@given(text=st.lists(st.one_of(PLAIN, st.sampled_from(["<tool_response>", "</tool_response>"])), max_size=7))
def test_masking_tool_responses_leaves_the_ids_alone(text, golden_processor):
    said = "x" + "".join(text)
    encoded = encode(talk(("gpt", said)), golden_processor)
    prompt = f"<|im_start|>assistant\n<think>\n\n</think>\n\n{said}<|im_end|>"
    assert encoded.input_ids.tolist() == golden_processor.tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize(
    "said, masked",
    [
        ("a<tool_response>b</tool_response>c", ["<tool_response>b</tool_response>"]),
        ("<tool_response>a<tool_response>b</tool_response>c</tool_response>d",
         ["<tool_response>a<tool_response>b</tool_response>c</tool_response>"]),
        ("a<tool_response>b</tool_response>c<tool_response>d</tool_response>",
         ["<tool_response>b</tool_response>", "<tool_response>d</tool_response>"]),
        ("a<tool_response>b", ["<tool_response>b<|im_end|>"]),
        ("a</tool_response>b", ["</tool_response>"]),
        ("no tags", []),
    ],
)  # fmt: skip
def test_what_a_tool_said_carries_no_loss(said, masked, golden_processor):
    encoded = encode(talk(("human", "q"), ("gpt", said)), golden_processor)
    assert text_of(encoded, golden_processor, "tool_response") == masked
    assert supervised_text(encoded, golden_processor) == learnt(said)


def test_a_picture_inside_a_tool_response_and_an_answer(golden_processor):
    said = "<think>a<tool_response>seen: <image>!</tool_response>b</think><image>c"
    encoded = encode(talk(("gpt", said), image=[picture(), picture()]), golden_processor, **LIMITS)
    reasons = [span.reason for span in encoded.spans]
    assert reasons == ["header", "answer", "tool_response", "image", "tool_response", "answer", "image", "answer"]


def test_tool_tags_of_a_user_are_the_users_words(golden_processor):
    encoded = encode(talk(("human", "a<tool_response>b"), ("gpt", "c")), golden_processor)
    assert text_of(encoded, golden_processor, "user") == ["a<tool_response>b<|im_end|>"]


def test_reasons_of_a_whole_conversation(golden_processor):
    record = talk(
        ("system", "Be kind."), ("human", "<image>\nWhat?"), ("gpt", "A ring."), ("ignored_gpt", "No."), ("gpt", "\nYes."),
        image=[picture()],
    )  # fmt: skip
    encoded = encode(record, golden_processor, **LIMITS)
    seen = [
        (span.role, span.turn, span.reason, golden_processor.tokenizer.decode(encoded.input_ids[span.start : span.end]))
        for span in encoded.spans
        if span.reason not in ("separator", "image")
    ]
    assert seen == [
        ("system", 0, "header", "<|im_start|>system\n"),
        ("system", 0, "system", "Be kind.<|im_end|>"),
        ("user", 1, "header", "<|im_start|>user\n"),
        ("user", 1, "user", "\nWhat?<|im_end|>"),
        ("assistant", 2, "header", "<|im_start|>assistant\n"),
        ("assistant", 2, "empty_think", "<think>\n\n</think>\n\n"),
        ("assistant", 2, "answer", "A ring.<|im_end|>"),
        ("assistant", 3, "header", "<|im_start|>assistant\n"),
        ("assistant", 3, "ignored", "No.<|im_end|>"),
        ("assistant", 4, "header", "<|im_start|>assistant\n"),
        ("assistant", 4, "empty_think", "<think>\n\n</think>\n\n"),
        ("assistant", 4, "answer", "\nYes.<|im_end|>"),
    ]
    assert [span.turn for span in encoded.spans if span.reason == "separator"] == [0, 1, 2, 3]


def test_a_record_and_its_dict_encode_alike(golden_processor):
    data = talk(("human", "<image>?"), ("gpt", "A."), image=[picture()])
    one, other = (encode(form, golden_processor) for form in (data, Record.from_dict(data)))
    assert one.input_ids.equal(other.input_ids) and one.spans == other.spans and one.id == other.id == "r1"
    low = golden_processor.image_processor.min_pixels
    assert 256 * int(one.image_grid_thw.prod()) >= low  # without limits, the processor's own hold


def test_dropped_turns_take_their_pictures_along_unread(golden_processor):
    turns = [("human", "<image>?"), ("gpt", "One."), ("human", "<image>?"), ("gpt", "Two."), ("human", "<image>?")]
    record = talk(*turns, ("gpt", "Three."), image=[picture(), picture(), "nowhere.png"])
    first = encode(talk(*turns[:2], image=[picture()]), golden_processor, **LIMITS)
    short = encode(record, golden_processor, max_length=len(first), **LIMITS)
    assert short.input_ids.tolist() == first.input_ids.tolist()
    assert torch.equal(short.pixel_values, first.pixel_values)
    assert short.dropped == [
        f"Turns 3 to 6 of 6 were dropped to stay within {len(first)} tokens.",
        "With that text went 2 of 3 images.",
    ]


def test_a_question_is_not_left_without_its_answer(golden_processor):
    turns = [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d" * 50)]
    first = encode(talk(*turns[:2]), golden_processor)
    short = encode(talk(*turns), golden_processor, max_length=len(first) + 20)
    assert short.input_ids.tolist() == first.input_ids.tolist()


def test_a_long_first_answer_is_cut_behind_its_last_word(golden_processor):
    said = "first words <image> last words"
    record = talk(("human", "<video>a"), ("gpt", said), image=[picture()], video=[picture(), picture()])
    full = encode(record, golden_processor, **LIMITS)
    image = next(span for span in full.spans if span.kind == "image")
    for limit in range(image.start, image.end + 1):
        short = encode(record, golden_processor, max_length=limit, **LIMITS)
        assert len(short) == image.start and short.pixel_values is None and short.image_grid_thw is None
        assert supervised_text(short, golden_processor) == "first words "
        assert short.dropped == [
            f"The answer in turn 2 lost the last {len(full) - image.start} of its tokens to stay within {limit} tokens.",
            "With that text went 1 of 1 images.",
        ]
    short = encode(record, golden_processor, max_length=image.end + 1, **LIMITS)
    assert len(short) == image.end + 1 and torch.equal(short.pixel_values, full.pixel_values)
    assert short.input_ids[-1] != golden_processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_cut_ends_at_a_whole_character(golden_processor):
    record = talk(("human", "a"), ("gpt", "🎈日🎈"))
    full = encode(record, golden_processor)
    start = next(span.start for span in full.spans if span.supervised)
    seen = set()
    for limit in range(start + 4, len(full)):
        short = encode(record, golden_processor, max_length=limit)
        seen.add(supervised_text(short, golden_processor))
    assert seen == {"🎈", "🎈日", "🎈日🎈"}


def test_a_limit_that_leaves_no_answer_is_refused(golden_processor):
    record = talk(("human", "<image>" + "a b " * 30), ("gpt", "c"), image=[picture()])
    with pytest.raises(
        EncodeError, match=r"'r1': it takes \d+ tokens .* max_length of 40 .* raise max_length or lower max_p"
    ):
        encode(record, golden_processor, max_length=40, **LIMITS)
    with pytest.raises(EncodeError, match=r"record 'r1': its prompt takes \d+ tokens, more than the max_length of 40"):
        encode(record, golden_processor, max_length=40, train=False, **LIMITS)


def test_records_with_nothing_to_learn_are_refused(golden_processor):
    with pytest.raises(EncodeError, match="'r1': it has no gpt turn"):
        encode(talk(("human", "a"), ("ignored_gpt", "b")), golden_processor)
    with pytest.raises(EncodeError, match="'r1': it has nothing but unfinished tool responses"):
        encode(talk(("gpt", "<tool_response>b")), golden_processor)
    with pytest.raises(EncodeError, match="'r1': it has no turn before its answer"):
        encode(talk(("gpt", "b")), golden_processor, train=False)


def test_placeholders_must_match_the_media(golden_processor):
    with pytest.raises(RecordError, match="r1"):
        encode(talk(("human", "<image><image>"), ("gpt", "b"), image=[picture()]), golden_processor)
    record = Record.from_dict(talk(("human", "<image>"), ("gpt", "b"), image=[picture()]))
    record.images.clear()  # a record is checked where it is made, and its lists are lists
    with pytest.raises(EncodeError, match="record 'r1': it has 0 images but its text holds 1 <image>"):
        encode(record, golden_processor)


def test_a_missing_picture_is_named_with_its_record(golden_processor, tmp_path):
    record = talk(("human", "<image><image>"), ("gpt", "b"), image=[picture(), "none.png"])
    with pytest.raises(MediaError, match="'r1'.*image 2.*none.png"):
        encode(record, golden_processor, image_folder=tmp_path)


def test_a_prompt_leaves_out_thoughts_with_their_pictures(golden_processor):
    colours = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    record = talk(
        ("human", "<image>?"),
        ("gpt", "<think><image></think>\n\nA."),
        ("human", "<image>?"),
        ("gpt", "B."),
        image=colours,
    )
    encoded = encode(record, golden_processor, train=False, **LIMITS)
    assert [span.media for span in encoded.spans if span.kind == "image"] == [0, 2]
    alone = golden_processor.image_processor(images=[colours[0], colours[2]], return_tensors="pt", **LIMITS)
    assert torch.equal(encoded.pixel_values, alone["pixel_values"])
    assert text_of(encoded, golden_processor, "ignored") == ["A.<|im_end|>"]
    assert encoded.spans[-1].turn == 3 and encoded.spans[-1].reason == "empty_think"


def test_the_shared_tokenizer_is_left_as_it_was(golden_processor):
    """Reading special tokens as text is a switch in the tokenizer's backend: ours is a copy, in every thread."""
    tokenizer = golden_processor.tokenizer
    control, wrong = "<|im_end|>", []
    single = tokenizer(control)["input_ids"]
    assert len(single) == 1
    done = threading.Event()

    def watch():
        while not done.is_set():
            if tokenizer.backend_tokenizer.encode(control).ids != single:
                wrong.append(control)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(200):
            encoded = encode(talk(("human", control), ("gpt", control)), golden_processor)
            assert encoded.input_ids.tolist().count(single[0]) == 2
    finally:
        done.set()
        watcher.join()
    assert not wrong and tokenizer.backend_tokenizer.encode_special_tokens is False
