"""Asking the golden tiny model: prompts, golden tokens, batches, budget, options and errors."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from ovisnb.data.media import MediaError
from ovisnb.data.record import Record, RecordError
from ovisnb.generate import Ovis25Inference, grounding_prompt
from ovisnb.generate.budget import CLOSING_TEXT, closing_ids, think_end_id
from ovisnb.model import CheckpointError

SMALL = {"min_pixels": 4096, "max_pixels": 16384}
GREEDY = {**SMALL, "do_sample": False}


@pytest.fixture(scope="module")
def ovis(golden_model, golden_processor):
    return Ovis25Inference(model=golden_model, processor=golden_processor)


@pytest.fixture
def photo(golden):
    return golden / "images" / "photo.png"


@pytest.fixture
def spied(ovis, monkeypatch):
    """The calls of model.generate: a list of (arguments, output ids)."""
    calls = []
    generate = ovis.model.generate

    def spy(**arguments):
        output = generate(**arguments)
        calls.append((arguments, output))
        return output

    monkeypatch.setattr(ovis.model, "generate", spy)
    return calls


def new_ids(call, row=0):
    arguments, output = call
    return output[row, arguments["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ["generate_no_think", "generate_think", "generate_text", "generate_video"])
def test_golden_prompt_and_tokens(name, golden, golden_cases, golden_numbers, ovis, spied):
    expected = golden_numbers[0]
    preface = golden_cases["prefaces"][name]
    case = golden_cases["conversations"][preface["case"]]
    files = {
        key: [str(golden / "images" / f"{picture}.png") for picture in case[plural]]
        for key, plural in (("image", "images"), ("video", "video"))
        if case[plural]
    }
    record = Record.from_dict({**files, "conversations": case["conversations"]}, source=name)
    ovis.answer_records(
        [record], enable_thinking=preface["preface"] == "", enable_thinking_budget=False, max_new_tokens=24, **GREEDY
    )
    ids = ovis.processor.visual_ids
    native = {-300: ids.atom, -301: ids.image_start, -302: ids.image_end, -303: ids.video_start, -304: ids.video_end}
    prompt = [native.get(token, token) for token in expected[f"generate/{name}/input_ids"].reshape(-1).tolist()]
    assert spied[0][0]["input_ids"][0].tolist() == prompt
    assert new_ids(spied[0]) == expected[f"generate/{name}/new_ids"].reshape(-1).tolist()


def test_single_image_inference(ovis, photo, golden_numbers):
    answer = ovis.single_image_inference(photo, "What is it?", max_new_tokens=6, **GREEDY)
    assert answer.image_size == Image.open(photo).size
    assert answer.prompt == (
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert answer.usage["new_tokens"] == 6 and answer.usage["stop"] == "length"
    assert answer.usage["image_tokens"] == golden_numbers[0]["encode/single/grid_thws"].prod() // 4
    assert answer.usage["prompt_tokens"] > answer.usage["image_tokens"]
    assert answer.usage["seconds"] > 0
    assert answer["response"] == answer.text


def test_pil_and_path_agree_and_image_may_stand_in_the_text(ovis, photo):
    by_path = ovis.single_image_inference(str(photo), "See <image> there.", max_new_tokens=4, **GREEDY)
    by_picture = ovis.single_image_inference(Image.open(photo), "See <image> there.", max_new_tokens=4, **GREEDY)
    assert by_path.text == by_picture.text
    assert by_path.prompt.startswith("<|im_start|>user\nSee <image> there.<|im_end|>")


def test_batch_equals_singles(ovis, golden):
    names = ["photo", "tall", "gray", "alpha", "photo_b"]
    requests = [(golden / "images" / f"{name}.png", "Where is the star? " * (i + 1)) for i, name in enumerate(names)]
    singles = [ovis.single_image_inference(*request, max_new_tokens=10, **GREEDY) for request in requests]
    for size in (2, 5):
        batch = ovis.batch(iter(requests), batch_size=size, max_new_tokens=10, **GREEDY)
        assert [a.text for a in batch] == [a.text for a in singles]
        assert [a.usage["prompt_tokens"] for a in batch] == [a.usage["prompt_tokens"] for a in singles]
        assert [a.image_size for a in batch] == [a.image_size for a in singles]


def test_text_and_pictures_in_one_batch(ovis, photo):
    records = [
        {"conversations": [{"from": "human", "value": "Where is the red circle?"}]},
        {
            "image": str(photo),
            "conversations": [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "x"}],
        },
    ]
    answers = ovis.answer_records(records, max_new_tokens=5, **GREEDY)
    assert [a.image_size for a in answers] == [None, Image.open(photo).size]
    assert answers[0].usage["image_tokens"] == 0 and answers[0].prompt.count("<image>") == 0
    alone = ovis.answer_records(records[:1], max_new_tokens=5, **GREEDY)[0]
    assert alone.text == answers[0].text


def test_ended_rows_are_cut_at_their_end_token(ovis, photo, monkeypatch):
    end = ovis.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    pad = ovis.processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def generate(**arguments):
        rows = torch.tensor([[10, end, pad, pad], [10, 11, 12, 13]])
        return torch.cat([arguments["input_ids"], rows], dim=1)

    monkeypatch.setattr(ovis.model, "generate", generate)
    first, second = ovis.batch([(photo, "a"), (photo, "b")], max_new_tokens=4, **GREEDY)
    assert (first.usage["new_tokens"], first.usage["stop"]) == (2, "end")
    assert (second.usage["new_tokens"], second.usage["stop"]) == (4, "length")
    assert second.text.startswith(first.text) and "<|" not in first.text


def test_decoding_keeps_think_and_tool_tags(ovis, photo, monkeypatch):
    text = "<think>\nhm <tool_call>[1, 2, 3, 4]</tool_call>\n</think>\n\nYes."
    ids = ovis.processor.tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)

    def generate(**arguments):
        return torch.cat([arguments["input_ids"], torch.tensor([ids])], dim=1)

    monkeypatch.setattr(ovis.model, "generate", generate)
    answer = ovis.single_image_inference(photo, "a", **GREEDY)
    assert answer.text == text and answer.answer == "Yes." and answer.thinking.startswith("hm <tool_call>")


@pytest.mark.parametrize(
    ("kind", "request_text"),
    [("box", "Please provide the bounding box coordinates."), ("point", "Please provide the point coordinates.")],
)
def test_grounding_prompts(ovis, photo, kind, request_text):
    text = "Find the <ref>red apple</ref> in the image."
    answer = ovis.grounding_inference(photo, text, request_type=kind, max_new_tokens=2, **GREEDY)
    assert f"<image>\n{text} {request_text}<|im_end|>" in answer.prompt
    assert grounding_prompt(f"{text} {request_text}", kind) == f"{text} {request_text}"
    batch = ovis.batch([(photo, text)], request_type=kind, max_new_tokens=2, **GREEDY)
    assert batch[0].prompt == answer.prompt


def test_unknown_request_type(ovis, photo):
    with pytest.raises(ValueError, match="'mask'.*'box' or 'point'"):
        ovis.grounding_inference(photo, "x", request_type="mask")


def test_budget_forces_the_closing_text_in_one_call(ovis, golden, spied, monkeypatch):
    closing = closing_ids(ovis.processor.tokenizer)
    total = 5 + len(closing) + 4
    passes = []
    tower = ovis.model.model.vision_tower
    monkeypatch.setattr(tower, "forward", lambda *a, _f=tower.forward, **k: passes.append(1) or _f(*a, **k))
    requests = [(golden / "images" / f"{name}.png", "Think. " * n) for name, n in (("photo", 1), ("tall", 3))]
    free = ovis.batch(requests, max_new_tokens=5, enable_thinking=True, enable_thinking_budget=False, **GREEDY)
    passes.clear()
    answers = ovis.batch(requests, max_new_tokens=total, enable_thinking=True, thinking_budget=5, **GREEDY)
    assert len(spied) == 2 and len(passes) == 1  # one generate call, pictures encoded once
    for row, answer in enumerate(answers):
        ids, before = new_ids(spied[1], row), new_ids(spied[0], row)
        assert ids[:5] == before  # untouched up to the budget
        assert ids[5 : 5 + len(closing)] == closing
        assert answer.usage["new_tokens"] <= total
        assert free[row].text + CLOSING_TEXT in answer.text
        assert answer.answer == answer.text.split(CLOSING_TEXT)[1].strip()


def test_budget_leaves_a_row_alone_that_closed_by_itself(ovis, photo, spied, monkeypatch):
    think_end = think_end_id(ovis.processor.tokenizer)

    class CloseAtTwo:  # as if the model itself had wanted </think> there
        def __init__(self, budget):
            self.budget = budget

        def __call__(self, input_ids, scores):
            scores = scores.clone()
            if input_ids.shape[1] - self.budget.prompt_length == 2:
                scores[:, think_end] = 1e4
            return self.budget(input_ids, scores)

    from ovisnb.generate import inference

    made = inference.ThinkingBudget
    monkeypatch.setattr(inference, "ThinkingBudget", lambda *a: CloseAtTwo(made(*a)))
    closing = closing_ids(ovis.processor.tokenizer)
    answer = ovis.single_image_inference(
        photo, "x", enable_thinking=True, thinking_budget=5, max_new_tokens=len(closing) + 8, **GREEDY
    )
    assert new_ids(spied[0])[2] == think_end
    assert CLOSING_TEXT.strip() not in answer.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thinking_budget": 100, "max_new_tokens": 100}, "thinking_budget 100 .* no room .* max_new_tokens 100"),
        ({"thinking_budget": 95, "max_new_tokens": 100}, "no room for an answer"),  # the closing text counts too
        ({"thinking_budget": 0}, "thinking_budget is 0"),
    ],
)
def test_budgets_that_cannot_work(ovis, photo, options, message):
    with pytest.raises(ValueError, match=message):
        ovis.single_image_inference(photo, "x", enable_thinking=True, **options)


def test_budget_means_nothing_without_thinking(ovis, photo):
    answer = ovis.single_image_inference(photo, "x", thinking_budget=2048, max_new_tokens=3, **GREEDY)
    assert answer.usage["new_tokens"] <= 3 and CLOSING_TEXT.strip() not in answer.text


def test_default_lengths(ovis, photo, spied, monkeypatch):
    wanted = []

    def generate(**arguments):
        wanted.append((arguments["max_new_tokens"], [p.budget for p in arguments["logits_processor"]]))
        return torch.cat([arguments["input_ids"], torch.tensor([[10]])], dim=1)

    monkeypatch.setattr(ovis.model, "generate", generate)
    ovis.single_image_inference(photo, "x", **GREEDY)
    ovis.single_image_inference(photo, "x", enable_thinking=True, **GREEDY)
    assert wanted == [(1024, []), (3072, [2048])]


def test_more_tokens_than_the_model_has_positions(ovis, photo):
    with pytest.raises(ValueError, match="leaves room for .* lower max_new_tokens"):
        ovis.single_image_inference(photo, "x", max_new_tokens=4096, **GREEDY)


def test_sampling_is_seeded_and_leaves_the_callers_stream_alone(ovis, photo):
    options = {**SMALL, "max_new_tokens": 12, "temperature": 1.5, "top_k": 0}
    requests = [(photo, "x")] * 3
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = [a.text for a in ovis.batch(requests, batch_size=1, seed=1, **options)]
    assert torch.equal(torch.rand(2), expected)
    again = [a.text for a in ovis.batch(requests, batch_size=1, seed=1, **options)]
    other = [a.text for a in ovis.batch(requests, batch_size=1, seed=2, **options)]
    assert first == again and first != other
    assert len(set(first)) == 3  # each batch draws its own numbers


def test_sampling_arguments(ovis, photo, spied):
    def given(**options):
        ovis.single_image_inference(photo, "x", max_new_tokens=1, **SMALL, **options)
        return {
            k: v
            for k, v in spied[-1][0].items()
            if k in ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")
        }

    assert given() == {}  # all left to the checkpoint's generation_config
    assert given(top_p=0.9) == {"do_sample": True, "top_p": 0.9}
    assert given(temperature=0)["do_sample"] is False
    assert given(do_sample=False, repetition_penalty=1.05)["repetition_penalty"] == 1.05
    with pytest.raises(ValueError, match="do_sample=False ignores temperature"):
        given(do_sample=False, temperature=0.7)
    with pytest.raises(ValueError, match="greedy"):
        given(do_sample=True, temperature=0)
    for name, value in (
        ("temperature", -0.5),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", 0),
    ):
        with pytest.raises(ValueError, match=f"^{name} is {value}: it must be "):
            given(**{name: value})


def test_training_mode_is_put_back(ovis, photo):
    ovis.model.train()
    try:
        ovis.single_image_inference(photo, "x", max_new_tokens=1, **GREEDY)
        assert ovis.model.training
    finally:
        ovis.model.eval()


def test_missing_and_broken_images(ovis, tmp_path):
    with pytest.raises(MediaError, match="nowhere.png"):
        ovis.single_image_inference(tmp_path / "nowhere.png", "x")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(MediaError, match="broken.png"):
        ovis.single_image_inference(tmp_path / "broken.png", "x")
    with pytest.raises(TypeError, match="path or a PIL image, not int"):
        ovis.single_image_inference(3, "x")
    with pytest.raises(RecordError, match="<image>"):
        ovis.single_image_inference(Image.new("RGB", (64, 64)), "<image> and <image>?")


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError):
        Ovis25Inference(tmp_path)


def test_constructor_takes_one_of_the_two(golden, golden_model, golden_processor):
    for arguments in (
        {},
        {"model": golden_model},
        {"model_path": "x", "model": golden_model, "processor": golden_processor},
    ):
        with pytest.raises(ValueError, match="either a model_path"):
            Ovis25Inference(**arguments)
    with pytest.raises(ValueError, match="belong to loading"):
        Ovis25Inference(model=golden_model, processor=golden_processor, device="cpu")
    assert isinstance(Ovis25Inference(golden / "checkpoint"), Ovis25Inference)


@pytest.mark.parametrize(("there", "asked", "used"), [(True, None, "cuda"), (False, None, "cpu"), (True, "cpu", "cpu")])
def test_a_model_is_loaded_onto_the_gpu_where_there_is_one(monkeypatch, there, asked, used):
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr("ovisnb.generate.inference.load", lambda *_, device, **__: devices.append(device) or (0, 0))
    Ovis25Inference("owner/model", device=asked)
    assert devices == [used]
