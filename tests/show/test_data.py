"""Record cards: the data as it is, as text only, whatever it holds."""

from __future__ import annotations

from html import escape

import av
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import Media, MediaError, Record, shapes
from ovisnb.data.checks.faults import Fault
from ovisnb.show import examples, regions_of, select, show_record, with_regions
from ovisnb.show.data import LONGEST, PICTURES, show_faults

from .page import elements, text_of

READ = next(shapes.records("heldout", seed=1, size=512, kinds={"read": 1}))
FIND = next(shapes.records("heldout", seed=1, size=64, kinds={"find": 1}))


def record(*turns: tuple[str, str], **more) -> Record:
    return Record.from_dict({"id": "test", "conversations": [{"from": r, "value": v} for r, v in turns], **more})


def test_a_card_shows_pictures_and_every_turn():
    html = str(show_record(READ))
    assert html.count("<img ") == 2
    for turn in READ.turns:
        for piece in turn.text.split("<image>"):
            assert escape(piece.removeprefix("\n")) in html


def test_a_crop_stands_in_the_turn_that_asks_for_it():
    html = str(show_record(READ))
    box = ", ".join(f"{side:.0f}" for side in READ.images[1].box)
    call, crop, rest = (html.index(text) for text in ("&lt;/tool_call&gt;", f"crop [{box}]", "&lt;/think&gt;"))
    assert call < html.index(">image 2<") < crop < rest
    assert "image 1 · 512×512" in html[:call]


def test_a_card_of_a_video_shows_its_frames(golden):
    video = record(("human", "<video>\nWhat?"), ("gpt", "A ring."), video=["photo.png", "photo_b.png"])
    html = str(show_record(video, golden / "images"))
    assert "frame 1 of 2" in html and html.count("<img ") == 2


def test_a_card_of_a_video_file_shows_an_even_sample_of_its_frames(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as clip:
        stream = clip.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(40):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (6 * shade, 0, 0)))
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode())
    html = str(show_record(record(("human", "<video>\nWhat?"), ("gpt", "Red."), video="clip.mp4"), tmp_path))
    assert html.count("<img ") == 8
    assert [f"frame {number} of 40" in html for number in (3, 8, 38)] == [True] * 3


def test_a_broken_picture_is_a_sentence_and_the_others_are_shown(golden, tmp_path):
    (tmp_path / "cut.png").write_bytes((golden / "images" / "photo.png").read_bytes()[:300])
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    turns = ("human", "<image> <image> <image>"), ("gpt", "<image>")
    images = ["none.png", "cut.png", "good.png", {"path": "none.png", "box": [0, 0, 4, 4]}]
    card = show_record(record(*turns, image=images), tmp_path)
    assert str(card).count("<img ") == 1
    text = text_of(card)
    assert "image 1 cannot be shown: there is no picture at" in text
    assert "image 2 cannot be shown:" in text and "image 4 cannot be shown: there is no picture at" in text
    with pytest.raises(MediaError, match="test"):
        regions_of(record(*turns, image=images), tmp_path)


def test_a_broken_video_is_a_sentence(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    card = show_record(record(("human", "<video>"), ("gpt", "a"), video="clip.mp4"), tmp_path)
    assert "the video cannot be shown:" in text_of(card)


def test_a_crop_without_a_pixel_in_its_picture_is_a_sentence(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    crop = {"path": "a.png", "box": [100, 100, 200, 200]}
    card = show_record(record(("human", "<image><image>"), ("gpt", "a"), image=["a.png", crop]), tmp_path)
    assert "image 2 cannot be shown:" in text_of(card) and str(card).count("<img ") == 1


def test_text_of_the_data_stays_text():
    evil = "<script>alert(1)</script><img src=x onerror=y>"
    one = record(("human", evil), ("gpt", evil), kind=evil).model_copy(update={"id": evil, "notes": (evil,)})
    card = show_record(one, faults=[Fault(evil, evil, 1, evil, evil)])
    assert elements(card) <= {"div", "span", "b", "bdi"}
    assert str(card).count(escape(evil)) >= 6


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(), st.text(st.characters(exclude_categories=["Cs"])), st.text(min_size=1))
def test_whatever_is_written_the_card_is_sound_html(name, text, kind):
    text = text.replace("<image>", "").replace("<video>", "")
    one = record(("human", text), ("gpt", f"<ref>{text}</ref><box>(0.1,0.2),(0.3,0.4)</box>"), kind=kind)
    html = str(show_record(one.model_copy(update={"id": name})))
    html.encode("utf-8")
    assert elements(html) <= {"div", "span", "b", "bdi"}


def test_what_cannot_be_seen_is_spelt_out():
    hidden = "a\u202eb\x00c\ufeffd"
    card = text_of(
        show_record(record(("human", hidden), ("gpt", "👩‍🚀 می‌خواهم שלום")).model_copy(update={"id": hidden}))
    )
    assert card.count("a⟨U+202E⟩b⟨U+0000⟩c⟨U+FEFF⟩d") == 2
    assert "👩‍🚀 می‌خواهم שלום" in card  # joiners are part of writing


def test_what_looks_like_mathematics_is_left_alone():
    shown = show_record(record(("human", "$x$"), ("gpt", "\\(y\\)")))._repr_html_()
    assert shown.startswith('<div class="mathjax_ignore tex2jax_ignore">')


def test_what_is_endless_is_shortened_and_says_so(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    long = show_record(record(("human", "x" * 1_000_000), ("gpt", "a")).model_copy(update={"id": "i" * 100_000}))
    assert f"… {1_000_000 - LONGEST:,} more characters are not shown" in text_of(long)
    assert len(str(long)) < 3 * LONGEST
    turns = [("human", "<image>" * (PICTURES + 3))] + [("gpt", f"{at}") for at in range(100)]
    many = text_of(show_record(record(*turns, image=["a.png"] * (PICTURES + 3)), tmp_path))
    assert "… 3 more pictures are not shown" in many and "… 61 more turns are not shown" in many


def test_a_card_tells_the_file_and_line_but_not_the_folder():
    html = str(show_record(record(("human", "q"), ("gpt", "a")).model_copy(update={"source": "/home/me/train.json:7"})))
    assert "train.json:7" in html and "/home/me" not in html
    assert READ.source.startswith("shapes:") and READ.source in str(show_record(READ))


def test_a_card_tells_what_is_wrong_and_what_reading_changed():
    one = record(("human", "q"), ("gpt", "a")).model_copy(update={"notes": ("a box was clipped",)})
    faults = [Fault("no_answer", "test", 3, f"sentence {at}", "a.json") for at in range(20)]
    text = text_of(show_record(one, faults=faults))
    assert "⚠ a box was clipped" in text and "⚠ no_answer sentence 0" in text
    assert "… 9 more problems are not shown" in text
    assert text_of(show_faults(faults[:1])) == "test a.json:3⚠ no_answer sentence 0"
    assert "a row that is no record" in text_of(show_faults([Fault("broken_json", None, 3, "broken", "a.json")]))


def test_regions_are_the_texts_boxes_and_the_crops():
    found = regions_of(FIND)
    target = next(item for item in FIND.meta["objects"] if item["name"] == found["boxes"][0].label)
    assert tuple(found["boxes"][0]) == pytest.approx(target["box"], abs=0.0011)
    crop = regions_of(READ)["boxes"]
    assert [box.label for box in crop] == ["crop"]
    assert tuple(crop[0]) == pytest.approx([side / 512 for side in READ.images[1].box])
    assert regions_of(READ, at=1)["boxes"] == []


def test_the_pictures_with_boxes_are_what_show_regions_takes(tmp_path):
    gone = record(("human", "<image>"), ("gpt", "<box>(0.1,0.1),(0.2,0.2)</box>"), image="none.png")
    found = list(with_regions([gone, FIND, record(("human", "q"), ("gpt", "a"))], tmp_path))
    assert [item["title"] for item in found] == [FIND.id]
    assert found[0]["image"].size == (64, 64) and len(found[0]["boxes"]) == 1


def test_bytes_are_a_picture_too(golden):
    media = Media(data=(golden / "images" / "photo.png").read_bytes())
    one = Record(id="test", turns=record(("human", "<image>"), image=["x"]).turns, images=[media])
    assert str(show_record(one)).count("<img ") == 1


def test_examples_are_one_record_of_each_kind_of_conversation():
    plain, text = FIND, record(("human", "q"), ("gpt", "a"))
    video = record(("human", "<video>"), ("gpt", "a"), video=["a.png"])
    tool = record(("human", "q"), ("gpt", "<think>x<tool_response>y</tool_response></think>z"))
    found = examples([plain, plain, text, READ, video, tool])
    assert found == {
        "one picture": plain,
        "text only": text,
        "a tool call and the crop it returns": READ,
        "a tool's answer": tool,
        "a video": video,
    }


def test_select_takes_ids_in_order_and_names_one_that_is_missing():
    text = record(("human", "q"), ("gpt", "a"))
    assert select([FIND, text], f"test, {FIND.id}") == [text, FIND]
    with pytest.raises(ValueError, match="None of the 1 records read has the id 'tets': did you mean 'test'"):
        select([record(("human", "q"), ("gpt", "a"))], "tets")
