"""Preprocessing parity with the original, and the processor's habits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ovisnb.model import Ovis2_5ForConditionalGeneration, Ovis2_5ImageProcessor, Ovis2_5Processor, smart_resize
from ovisnb.model.processing import VISUAL_TOKENS

PICTURES = ["photo", "tall", "tiny", "gray", "alpha", "palette", "huge", "sliver", "sliver2"]


@pytest.mark.parametrize("name", PICTURES)
def test_pixel_values_equal_the_golden_ones(golden, golden_cases, golden_numbers, golden_processor, name):
    arrays, _ = golden_numbers
    picture = Image.open(golden / "images" / f"{name}.png")
    made = golden_processor.image_processor(images=[picture], **golden_cases["pixel_limits"][name], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == arrays[f"preprocess/{name}/grid_thw"].tolist()
    np.testing.assert_allclose(made["pixel_values"], arrays[f"preprocess/{name}/pixel_values"], rtol=0, atol=1e-6)


def test_smart_resize_equals_the_golden_rows(golden_numbers):
    rows = golden_numbers[0]["smart_resize"]
    differing = 0
    for height, width, factor, low, high, *wanted in rows.tolist():
        found = smart_resize(height, width, factor, low, high)
        if min(wanted) == 0:  # the original's extreme sliver, which it then cannot resize
            assert found == tuple(max(side, factor) for side in wanted)
            differing += 1
        else:
            assert found == tuple(wanted)
    assert differing < len(rows) / 100


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64), st.integers(0, 400))
def test_smart_resize_stays_on_the_grid(height, width, low, extra):
    min_pixels, max_pixels = low * 32 * 32, (low + extra) * 32 * 32
    new_height, new_width = smart_resize(height, width, 32, min_pixels, max_pixels)
    assert new_height % 32 == new_width % 32 == 0 and min(new_height, new_width) >= 32
    sliver = max(height, width) / min(height, width)
    if 32 in (new_height, new_width):  # a side cannot shrink further, so the area may exceed the limit
        assert new_height * new_width <= max(max_pixels, 32 * 32 * (max(sliver, 200) + 1))
    else:  # growing to min_pixels rounds each side up, by less than its own length where it is above 32
        assert new_height * new_width <= max(max_pixels, 4 * min_pixels)


def test_a_picture_without_area_and_crossed_limits_are_refused():
    with pytest.raises(ValueError, match="0x5"):
        smart_resize(5, 0, 32, 1024, 4096)
    with pytest.raises(ValueError, match="min_pixels 5000 is above max_pixels 4000"):
        Ovis2_5ImageProcessor()(Image.new("RGB", (64, 64)), min_pixels=5000, max_pixels=4000)


def test_grid_is_known_without_decoding(golden_processor):
    images = golden_processor.image_processor
    for size in [(64, 64), (200, 37), (31, 500)]:
        made = images([Image.new("RGB", size)], min_pixels=4096, max_pixels=25600)
        assert made["image_grid_thw"][0].tolist() == [1, *images.grid(size[1], size[0], 4096, 25600)]


def test_video_repeats_its_last_frame_to_whole_clips():
    images = Ovis2_5ImageProcessor(temporal_patch_size=2, min_pixels=1024, max_pixels=4096)
    frames = [Image.new("RGB", (64, 64), (value, 0, 0)) for value in (0, 100, 200)]
    patches = images.patchify(frames, 4, 4)
    assert patches.shape == (2 * 16, 3 * 2 * 256)
    last = patches[16].reshape(3, 2, 16, 16)
    np.testing.assert_array_equal(last[:, 0], last[:, 1])


def test_frames_take_the_first_frames_size(golden_processor):
    frames = [Image.new("RGB", (64, 96)), Image.new("RGB", (300, 20))]
    made = golden_processor.video_processor([frames], min_pixels=1024, max_pixels=25600, return_tensors="pt")
    assert made["video_grid_thw"].tolist() == [[2, 6, 4]]
    assert made["pixel_values_videos"].shape == (48, 768)


def test_arrays_are_pictures_too(golden_processor, golden):
    picture = Image.open(golden / "images" / "photo.png").convert("RGB")
    array = np.asarray(picture)
    wanted = golden_processor(text="<image> x", images=picture, max_pixels=25600, min_pixels=1024, return_tensors="pt")
    for images in (array, [array], [[array]], array.transpose(2, 0, 1)):
        made = golden_processor(text="<image> x", images=images, max_pixels=25600, min_pixels=1024, return_tensors="pt")
        assert torch.equal(made["pixel_values"], wanted["pixel_values"])
    clip = golden_processor.video_processor([[picture, picture]], max_pixels=25600, min_pixels=1024)
    for videos in (
        np.stack([array, array]),
        [np.stack([array, array])],
        [[array, array]],
        [array, array],
        [[[array] * 2]],
    ):
        made = golden_processor.video_processor(videos, max_pixels=25600, min_pixels=1024)
        assert (
            made["video_grid_thw"].tolist()
            == clip["video_grid_thw"].tolist()
            == [[2, *wanted["image_grid_thw"][0, 1:]]]
        )
        np.testing.assert_array_equal(made["pixel_values_videos"], clip["pixel_values_videos"])
    for wrong, told in (
        (array / 255, "float64 array"),
        ("cat.jpg", "not a str"),
        (torch.zeros(3, 8, 8), "not a Tensor"),
    ):
        with pytest.raises(TypeError, match=told):
            golden_processor.image_processor(wrong)
    with pytest.raises(TypeError, match="not a str"):
        golden_processor.video_processor("clip.mp4")
    with pytest.raises(ValueError, match="without frames"):
        golden_processor.video_processor([[]])


def test_text_and_pictures_make_inputs_of_any_batch(golden_processor):
    picture, wide = Image.new("RGB", (64, 64)), Image.new("RGB", (96, 64))
    made = golden_processor(
        text=["a <image> b <image>", "none", "<video> c"],
        images=[[picture, wide], []],
        videos=[[picture, picture]],
        min_pixels=1024,
        max_pixels=25600,
        padding=True,
        return_tensors="pt",
    )
    assert made["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6]]
    atoms = (made["input_ids"] == golden_processor.visual_ids.atom).sum(1)
    assert atoms.tolist() == [4 + 6, 0, 8]
    assert made["attention_mask"].shape == made["input_ids"].shape


def test_missing_pictures_are_told(golden_processor):
    with pytest.raises(ValueError, match="2 <image> placeholders but 1 images"):
        golden_processor(text="<image> <image>", images=[Image.new("RGB", (64, 64))])
    with pytest.raises(ValueError, match="truncation"):
        golden_processor(text="x", truncation=True, max_length=3)


def test_chat_template_gives_the_released_prompts(golden_processor, golden_cases):
    messages = [
        {"role": "system", "content": "Be <image>brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is <video>it?"}]},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA circle."},
        {"role": "user", "content": "Sure?"},
    ]
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
    head += "<|im_start|>assistant\nA circle.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
    render = golden_processor.apply_chat_template
    assert render(messages, tokenize=False) == head
    opened = render(messages, tokenize=False, add_generation_prompt=True)
    assert opened == head + "<|im_start|>assistant\n"
    closed = render(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert closed == head + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for bad in (
        [{"role": "tool", "content": "x"}],
        [{"role": "assistant", "content": [{"type": "image"}]}],
    ):
        with pytest.raises(Exception, match="tool|image"):
            render(bad, tokenize=False)


def test_chat_template_tokenizes_with_pictures(golden_processor, golden, golden_numbers):
    arrays, _ = golden_numbers
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.open(golden / "images" / "photo.png")},
                {"type": "text", "text": "What do you see in this image?"},
            ],
        }
    ]
    made = golden_processor.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, min_pixels=4096, max_pixels=16384
    )
    ids = arrays["generate/generate_no_think/input_ids"]
    visual = dict(zip((-300, -301, -302, -303, -304), golden_processor.visual_ids.all, strict=True))
    assert made["input_ids"][0].tolist() == [visual.get(i, i) for i in ids.tolist()]


def test_the_auto_classes_open_what_was_saved(golden_processor, golden_model, tmp_path):
    golden_processor.save_pretrained(tmp_path)
    golden_model.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, Ovis2_5Processor)
    assert again.visual_ids == golden_processor.visual_ids
    assert again.chat_template == golden_processor.chat_template
    assert again.image_processor.to_dict() == golden_processor.image_processor.to_dict()
    images = AutoImageProcessor.from_pretrained(tmp_path, max_pixels=4096)
    assert isinstance(images, Ovis2_5ImageProcessor) and images.max_pixels == 4096
    assert images.min_pixels == golden_processor.image_processor.min_pixels
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, Ovis2_5ForConditionalGeneration)
    assert not any(info.values())
    wanted = golden_model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_visual_tokens_follow_the_tokenizers_own(golden_processor):
    assert golden_processor.visual_ids.all == (543, 544, 545, 546, 547)
    assert [golden_processor.tokenizer.convert_ids_to_tokens(i) for i in golden_processor.visual_ids.all] == list(
        VISUAL_TOKENS
    )


def test_a_tokenizer_without_visual_tokens_is_refused(golden_processor, golden):
    from transformers import Qwen2Tokenizer

    plain = Qwen2Tokenizer.from_pretrained(golden / "checkpoint")
    with pytest.raises(ValueError, match="lacks the visual tokens"):
        Ovis2_5Processor(golden_processor.image_processor, plain)


def test_pixels_are_float32_in_range(golden_processor):
    made = golden_processor.image_processor([Image.new("RGB", (64, 64), (255, 0, 128))], return_tensors="pt")
    assert made["pixel_values"].dtype == torch.float32
    assert made["pixel_values"].min() == -1 and made["pixel_values"].max() == 1
