"""What encode does when it is told to: measure without pixels, thinking, the mask, folders, videos."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovisnb.chat import EncodeError, encode
from ovisnb.data import MediaError, Record
from tests.chat.conversations import LIMITS, records
from tests.chat.test_encode import modest, picture, supervised_text, talk, text_of


@modest
@given(record=records(), data=st.data())
def test_measuring_gives_the_same_sample_without_pixels(record, data, golden_processor):
    options = LIMITS | {
        "train": data.draw(st.booleans()),
        "enable_thinking": data.draw(st.sampled_from([None, False, True])),
    }
    if options["train"]:
        options["max_length"] = data.draw(st.none() | st.integers(20, 300))
    try:
        whole = encode(record, golden_processor, **options)
    except EncodeError as error:
        with pytest.raises(EncodeError) as again:
            encode(record, golden_processor, pixels=False, **options)
        assert str(again.value) == str(error)
        return
    measured = encode(record, golden_processor, pixels=False, **options)
    assert measured.spans == whole.spans and measured.dropped == whole.dropped
    for name in ("input_ids", "labels", "image_grid_thw", "video_grid_thw"):
        one, other = getattr(measured, name), getattr(whole, name)
        assert (one is other is None) or (torch.equal(one, other) and one.dtype == other.dtype), name
    assert measured.pixel_values is measured.pixel_values_videos is None


def test_measuring_reads_no_picture(golden_processor, tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:60]  # the size stands at the front
    (tmp_path / "cut.png").write_bytes(cut)
    record = talk(("human", "<image>"), ("gpt", "b"), image="cut.png")
    with pytest.raises(MediaError):
        encode(record, golden_processor, image_folder=tmp_path)
    measured = encode(record, golden_processor, image_folder=tmp_path, pixels=False)
    whole = encode(record | {"image": "whole.png"}, golden_processor, image_folder=tmp_path)
    assert torch.equal(measured.image_grid_thw, whole.image_grid_thw)


THOUGHTFUL = talk(
    ("human", "<image>?"), ("gpt", "<think>\nI see <image>.\n</think>\n\nA."), image=[picture(), picture(32, 32)]
)


def test_thinking_can_be_left_out_of_what_is_learnt(golden_processor):
    as_written = encode(THOUGHTFUL, golden_processor, **LIMITS)
    without = encode(THOUGHTFUL, golden_processor, enable_thinking=False, **LIMITS)
    assert "</think>" in supervised_text(as_written, golden_processor)
    assert supervised_text(without, golden_processor) == "A.<|im_end|>"
    assert text_of(without, golden_processor, "empty_think") == ["<think>\n\n</think>\n\n"]
    assert len(as_written.image_grid_thw) == 2 and len(without.image_grid_thw) == 1
    assert without.dropped == []  # nothing was lost to a limit


def test_with_thinking_on_no_prefix_says_that_there_was_none(golden_processor):
    plain = talk(("human", "Hi"), ("gpt", "A."))
    on, off = (encode(plain, golden_processor, enable_thinking=switch) for switch in (True, None))
    assert "empty_think" in {span.reason for span in off.spans} - {span.reason for span in on.spans}
    assert supervised_text(on, golden_processor) == supervised_text(off, golden_processor) == "A.<|im_end|>"


def test_the_mask_of_tool_responses_can_be_lifted_to_compare(golden_processor):
    record = talk(
        ("human", "Who?"), ("gpt", "<tool_call>Identify [1,2,3,4]</tool_call><tool_response>Jo</tool_response>Jo.")
    )
    masked, lifted = (encode(record, golden_processor, mask_tool_responses=switch) for switch in (True, False))
    assert torch.equal(masked.input_ids, lifted.input_ids)
    assert "tool_response" not in supervised_text(masked, golden_processor)
    assert "<tool_response>Jo</tool_response>" in supervised_text(lifted, golden_processor)
    assert "tool_response" not in {span.reason for span in lifted.spans}


def test_a_record_may_have_a_folder_of_its_own(golden_processor, tmp_path):
    (tmp_path / "own").mkdir()
    picture().save(tmp_path / "own" / "a.png")
    record = Record.from_dict(talk(("human", "<image>"), ("gpt", "b"), image="a.png"))
    own = record.model_copy(update={"folder": str(tmp_path / "own")})
    assert len(encode(own, golden_processor, image_folder=tmp_path)) > 0
    with pytest.raises(MediaError):
        encode(record, golden_processor, image_folder=tmp_path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a video file of ten frames, 64x32 pixels, each of its own grey."""
    import av

    folder = tmp_path_factory.mktemp("clips")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for grey in range(10):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 32), (grey * 20,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return folder


@pytest.mark.parametrize(("frames", "count"), [({}, 10), ({"max_frames": 4}, 4), ({"min_frames": 12}, 12)])
def test_a_video_file_becomes_its_sampled_frames(golden_processor, clip, frames, count):
    record = talk(("human", "<video>\nWhat?"), ("gpt", "Grey."), video="clip.mp4")
    steps = -(-count // golden_processor.image_processor.temporal_patch_size)
    for pixels in (True, False):
        encoded = encode(record, golden_processor, image_folder=clip, pixels=pixels, **LIMITS, **frames)
        assert encoded.video_grid_thw[0, 0] == steps
        assert (encoded.pixel_values_videos is not None) == pixels
    if max_frames := frames.get("max_frames"):
        listed = record | {"video": [Image.new("RGB", (64, 32), (grey * 20,) * 3) for grey in range(10)]}
        same = encode(listed, golden_processor, max_frames=max_frames, **LIMITS)
        assert torch.equal(same.input_ids, encoded.input_ids)


def test_a_broken_video_is_named_with_its_record(golden_processor, clip):
    (clip / "text.mp4").write_text("no video")
    record = talk(("human", "<video>\nWhat?"), ("gpt", "Grey."), video="text.mp4")
    with pytest.raises(MediaError, match="'r1'.*video.*text.mp4"):
        encode(record, golden_processor, image_folder=clip)
