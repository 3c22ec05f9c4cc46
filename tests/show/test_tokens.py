"""The mask view: every token once, in its colour, escaped, and the same numbers as the encoding."""

from __future__ import annotations

import re
import time
from html import unescape
from html.parser import HTMLParser

import pytest

from ovisnb.chat import REASONS, encode
from ovisnb.show import reason_table, show_tokens, token_summary
from ovisnb.show.tokens import REASON_COLOURS, _pieces, _visible

TOKEN = re.compile(r'<span style="([^"]*)" title="position (\d+) · id (\d+) · label (\w+) · (\w+) [^"]*">(.*?)</span>')


def record(*turns: tuple[str, str], **more) -> dict:
    return {"id": "test", "conversations": [{"from": role, "value": text} for role, text in turns], **more}


def pictured(golden) -> tuple[dict, dict]:
    names = ["photo", "photo_b", "photo_c", "photo_d"]
    many = record(
        ("system", "Look closely."),
        ("human", "First <image> then <image>.\nWhich?"),
        (
            "gpt",
            "<think>\nCrop it.\n<tool_call>Crop [1,2,30,40]</tool_call><image>\n<tool_response>a cat</tool_response></think>\n\nThe 2nd.",
        ),
        ("human", "Sure?"),
        ("ignored_gpt", "No."),
        ("human", "Now?"),
        ("gpt", "Yes."),
        image=["photo.png", "tall.png", {"path": "photo.png", "box": [1, 2, 30, 40]}],
    )
    video = record(("human", "<video>\nWhat happens?"), ("gpt", "A ring."), video=[f"{name}.png" for name in names])
    return many, video


@pytest.fixture(params=[0, 1], ids=["images", "video"])
def seen(request, golden, golden_processor):
    """(record, encoded, html) with pictures."""
    data = pictured(golden)[request.param]
    encoded = encode(data, golden_processor, image_folder=golden / "images", min_pixels=4096, max_pixels=25600)
    return data, encoded, str(show_tokens(encoded, golden_processor, record=data, image_folder=golden / "images"))


def test_every_text_token_is_a_chip_with_its_position_id_and_label(seen):
    _, encoded, html = seen
    chips = {int(found[1]): found for found in TOKEN.findall(html)}
    expected = {at: span for span in encoded.spans if span.kind == "text" for at in range(span.start, span.end)}
    assert sorted(chips) == sorted(expected)
    for at, (style, _, token_id, label, reason, _) in chips.items():
        assert int(token_id) == encoded.input_ids[at]
        assert label == ("none" if encoded.labels[at] == -100 else str(int(encoded.labels[at])))
        assert reason == expected[at].reason
        assert f"background-color:{REASON_COLOURS[reason][0]};" in style


def test_pictures_are_one_box_each_with_thumbnail_grid_and_count(seen):
    data, encoded, html = seen
    media = [span for span in encoded.spans if span.kind != "text"]
    assert html.count("<img ") == (4 if "video" in data else 3)
    assert html.count('src="data:image/jpeg;base64,') == html.count("<img ")
    for span in media:
        grids = encoded.video_grid_thw if span.kind == "video" else encoded.image_grid_thw
        t, h, w = grids[span.media].tolist()
        assert f"{t}×{h}×{w} patches</div><div>{span.end - span.start:,} tokens" in html
        assert f"positions {span.start} to {span.end - 1} · no label" in html


def test_without_the_record_the_boxes_have_no_picture(golden, golden_processor):
    data = pictured(golden)[0]
    encoded = encode(data, golden_processor, image_folder=golden / "images", min_pixels=4096, max_pixels=25600)
    html = str(show_tokens(encoded, golden_processor))
    assert "<img " not in html
    assert "image 3" in html


def test_the_summary_has_the_encodings_numbers(seen):
    _, encoded, html = seen
    summary = token_summary(encoded)
    assert summary["tokens"] == len(encoded.input_ids) == sum(r["tokens"] for r in summary["reasons"].values())
    assert summary["supervised"] == int((encoded.labels != -100).sum()) == summary["reasons"]["answer"]["tokens"]
    assert sum(reason["share"] for reason in summary["reasons"].values()) == pytest.approx(1)
    assert f"{summary['tokens']:,} tokens, {summary['supervised']:,} of them train ({summary['share']:.1%})" in html
    for reason, count in summary["reasons"].items():
        assert re.search(rf">{reason}</span> {count['tokens']:,} <span[^>]*>{count['share']:.1%}<", html)


def test_every_reason_of_the_encoder_has_a_colour_of_its_own():
    assert set(REASONS) == set(REASON_COLOURS)
    assert len({background for background, _, _ in REASON_COLOURS.values()}) == len(REASONS)


def luminance(colour: str) -> float:
    """WCAG relative luminance of "#rrggbb"."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("reason", REASON_COLOURS)
def test_text_is_readable_and_what_trains_stands_out_without_colour(reason):
    background, text, _ = REASON_COLOURS[reason]
    assert contrast(background, text) > 4.5  # WCAG AA
    if reason != "answer":
        assert contrast(background, REASON_COLOURS["answer"][0]) > 3  # by lightness, whatever colours an eye sees


class Tags(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.tags, self.open = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)> & </span></div> \'"'


def test_text_of_the_data_stays_text(golden_processor):
    data = record(("human", EVIL), ("gpt", f"{EVIL} <|im_end|>")) | {"id": EVIL}
    encoded = encode(data, golden_processor)
    encoded.dropped.append(EVIL)
    for html in (str(show_tokens(encoded, golden_processor)), str(reason_table([encoded]))):
        page = Tags(html)
        assert page.open == []
        assert page.tags <= {"div", "span", "b", "br", "details", "summary", "table", "tr", "th", "td"}
    shown = "".join(unescape(found[5]) for found in TOKEN.findall(str(show_tokens(encoded, golden_processor))))
    assert EVIL.replace(" ", "·") in shown


def test_the_chips_read_as_the_text_and_white_space_is_visible(golden_processor):
    text = "a  b\tc\n\nd é 漢字 😀 x\r\ny"
    encoded = encode(record(("human", "q"), ("gpt", text)), golden_processor)
    chips = TOKEN.findall(str(show_tokens(encoded, golden_processor)))
    shown = "".join(unescape(found[5]) for found in chips if found[4] == "answer")
    raw = re.sub(r"⟨([0-9a-f ]+)⟩", lambda found: found[1].replace(" ", ""), shown)  # partial bytes, as hex
    for part in ("a··b⇥c↵↵d·", "x␍↵y"):
        assert part in shown
    for character in "é漢字😀":
        assert character in shown or character.encode().hex() in raw
    assert str(show_tokens(encoded, golden_processor)).count("<br>") >= 3


def test_a_character_that_cannot_be_seen_is_named():
    assert "".join(map(_visible, "a\u202e\u200d\u00a0é")) == "a⟨U+202E⟩⟨U+200D⟩⟨U+00A0⟩é"


def test_a_token_that_is_no_whole_character_is_hex(golden_processor):
    tokenizer = golden_processor.tokenizer
    ids = tokenizer.encode("€", add_special_tokens=False)
    assert len(ids) > 1  # the golden tokenizer is too small to know the sign
    assert "".join(_pieces(ids, tokenizer)[token] for token in ids).replace("⟩⟨", " ") == "⟨e2 82 ac⟩"


def test_token_ids_are_written_where_they_are_asked_for(golden_processor):
    encoded = encode(record(("human", "q"), ("gpt", "yes")), golden_processor)
    html = str(show_tokens(encoded, golden_processor, token_ids=True))
    for token in encoded.input_ids.tolist():
        assert f">{token}</div>" in html
    assert f">{token}</div>" not in str(show_tokens(encoded, golden_processor))


def test_what_truncation_dropped_is_said(golden_processor):
    data = record(("human", "one"), ("gpt", "two"), ("human", "three " * 40), ("gpt", "four"))
    encoded = encode(data, golden_processor, max_length=60)
    assert encoded.dropped
    assert encoded.dropped[0] in unescape(str(show_tokens(encoded, golden_processor)))


def test_reason_table_sums_all_and_shows_the_first(golden_processor):
    encoded = [encode(record(("human", "q"), ("gpt", "a" * n)) | {"id": f"r{n}"}, golden_processor) for n in (1, 2, 3)]
    html = str(reason_table(encoded, limit=2))
    assert "r2" in html and "r3" not in html and "1 more" in html
    assert f">{sum(len(one.input_ids) for one in encoded)}<" in html


def test_eight_thousand_tokens_take_less_than_a_third_of_a_second(golden_processor):
    encoded = encode(record(("human", "What? " * 2000), ("gpt", "The quick brown fox. " * 400)), golden_processor)
    assert len(encoded.input_ids) > 8000
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        show_tokens(encoded, golden_processor)
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.3
