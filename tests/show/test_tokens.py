"""The mask view: every token once, in its colour, escaped, and the same numbers as the encoding."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovisnb.chat import REASONS, encode
from ovisnb.show import reason_table, show_tokens, token_summary
from ovisnb.show.payload import REASON_COLOURS, _even_limit
from ovisnb.show.pieces import PLAIN, VISIBLE, piece, pieces, readable

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
    for white_space in (VISIBLE, PLAIN):
        shown = "".join(readable(character, white_space) for character in "a\u202e\u200d\u00a0é\0\x1b")
        assert shown == "a⟨U+202E⟩⟨U+200D⟩⟨U+00A0⟩é⟨U+0000⟩⟨U+001B⟩"
    assert piece("\ud800", byte_level=False).visible == "⟨U+D800⟩"


def test_a_token_that_is_no_whole_character_is_hex(golden_processor):
    tokenizer = golden_processor.tokenizer
    ids = tokenizer.encode("€", add_special_tokens=False)
    assert len(ids) > 1  # the golden tokenizer is too small to know the sign
    found = pieces(ids, tokenizer)
    assert "".join(found[token].visible for token in ids).replace("⟩⟨", " ") == "⟨e2 82 ac⟩"
    assert "".join(found[token].plain for token in ids).replace("⟩⟨", " ") == "⟨e2 82 ac⟩"
    assert pieces([10**6], tokenizer)[10**6].visible == "[id 1000000: not in the tokenizer]"


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


def test_white_space_is_marked_or_left_as_it_is(golden_processor):
    encoded = encode(record(("human", "q"), ("gpt", "a  b\tc\n\nd ↵ e")), golden_processor)
    plain = str(show_tokens(encoded, golden_processor, whitespace=False))
    shown = "".join(unescape(found[5]) for found in TOKEN.findall(plain) if found[4] == "answer")
    raw = "".join(shown.split("⟨")[0].replace("\u200b", ""))
    assert raw.startswith("a  b\tcd ") and "·" not in raw
    marked = str(show_tokens(encoded, golden_processor))
    assert (
        plain.count("<br>")
        == marked.count("<br>")
        == sum(text.count("\n") for text in texts(encoded, golden_processor))
    )


def texts(encoded, processor) -> list[str]:
    return [processor.tokenizer.decode([token]) for token in encoded.input_ids.tolist()]


def test_only_supervised_folds_the_rest_and_keeps_its_size(seen, golden_processor):
    _, encoded, _ = seen
    html = str(show_tokens(encoded, golden_processor, only_supervised=True))
    chips = {int(found[1]) for found in TOKEN.findall(html)}
    assert chips == {at for at, label in enumerate(encoded.labels.tolist()) if label != -100}
    for span in encoded.spans:
        if not span.supervised:
            name = {"text": span.reason, "video": "video", "image": f"image {(span.media or 0) + 1}"}[span.kind]
            assert f">{name} · {span.end - span.start:,}</span>" in html


def test_two_settings_stand_side_by_side_with_the_difference(golden, golden_processor):
    data = pictured(golden)[0]
    options = {"image_folder": golden / "images", "min_pixels": 1024}
    small, large = (encode(data, golden_processor, max_pixels=n, **options) for n in (4096, 25600))
    html = str(
        show_tokens({"small": small, "<b>large": large}, golden_processor, record=data, image_folder=golden / "images")
    )
    assert Tags(html).open == []
    assert len(TOKEN.findall(html)) == sum(s.end - s.start for e in (small, large) for s in e.spans if s.kind == "text")
    visual = [sum(s.end - s.start for s in e.spans if s.kind == "image") for e in (small, large)]
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", html)
    at = cells.index("image")
    assert cells[:4] == ["", "small", "&lt;b&gt;large", "difference"]
    assert cells[at : at + 4] == ["image", *(f"{n:,}" for n in visual), f"{visual[1] - visual[0]:+,}"]
    assert html.count("<img ") == 6
    with pytest.raises(ValueError, match="nothing to show"):
        show_tokens({}, golden_processor)


def test_sides_of_different_turns_are_matched_by_turn(golden_processor):
    data = record(("human", "q"), ("gpt", "<think>\nlong\n</think>\n\nyes"), ("human", "more"), ("gpt", "no"))
    full, short = encode(data, golden_processor), encode(data, golden_processor, max_length=40)
    assert short.spans[-1].turn < full.spans[-1].turn
    html = str(show_tokens({"full": full, "short": short}, golden_processor))
    assert html.count("display:flex;gap:20px") == 2 + 4  # heads, spans, and a row for each turn


def test_the_ends_of_a_long_turn_are_drawn_and_the_rest_is_said(golden_processor):
    encoded = encode(record(("human", "short one"), ("gpt", "The quick brown fox. " * 500)), golden_processor)
    html = str(show_tokens(encoded, golden_processor, limit=100))
    chips = [int(found[1]) for found in TOKEN.findall(html)]
    assert len(chips) <= 100 and chips == sorted(chips)
    question = [at for span in encoded.spans if span.role == "user" for at in range(span.start, span.end)]
    assert set(question) <= set(chips) and chips[-1] == len(encoded) - 1
    missing = len(encoded) - len(chips)
    assert f"… {missing:,} tokens, " in html
    assert f"{len(chips):,} of {len(encoded):,} text tokens are drawn" in html


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(0, 200))
def test_the_even_limit_uses_what_there_is(sizes, total):
    most = _even_limit(sizes, total)
    cut = lambda limit: sum(min(size, limit) for size in sizes)
    assert cut(most) <= total
    assert most >= max(sizes, default=0) or cut(most + 1) > total


def test_a_megabyte_of_text_gives_a_page_that_a_browser_can_show(golden_processor):
    encoded = encode(record(("human", "x" * 1_000_000), ("gpt", "a")) | {"id": "i" * 1_000_000}, golden_processor)
    html = str(show_tokens(encoded, golden_processor))
    assert len(html) < 4_000_000 and "are not drawn" in html
    assert len(str(reason_table([encoded]))) < 10_000


def test_many_spans_are_counted_and_the_first_drawn(golden_processor, monkeypatch):
    monkeypatch.setattr("ovisnb.show.payload.MOST_RUNS", 3)
    encoded = encode(record(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")), golden_processor)
    html = str(show_tokens(encoded, golden_processor))
    assert f"The first 3 of {len(encoded.spans)} spans are drawn" in html
    assert max(int(found[1]) for found in TOKEN.findall(html)) == encoded.spans[2].end - 1


def test_a_picture_that_cannot_be_read_says_why_in_its_box(tmp_path, golden_processor):
    from PIL import Image

    Image.effect_noise((64, 64), 60).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    data = record(("human", "<image>q"), ("gpt", "a"), image="cut.png")
    encoded = encode(data, golden_processor, image_folder=tmp_path, pixels=False)
    html = unescape(str(show_tokens(encoded, golden_processor, record=data, image_folder=tmp_path)))
    assert re.search("<div>image 1</div>.*<div>cannot be shown: .*cut.png", html) and "<img " not in html
    assert str(tmp_path) not in html


def test_bytes_that_are_no_text_and_marks_that_turn_it_round_do_no_harm(golden_processor):
    """Whatever ids there are, also those that no text gives, every chip stays in its place."""
    encoded = encode(record(("human", "q\u202eabc\u2066\u200f אבג"), ("gpt", "a")), golden_processor)
    size = len(golden_processor.tokenizer)
    encoded.input_ids[:] = torch.randint(0, size + 5, encoded.input_ids.shape)
    html = str(show_tokens(encoded, golden_processor))
    assert [int(found[1]) for found in TOKEN.findall(html)] == list(range(len(encoded)))
    assert not set(html) & set(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F]))
    assert not [character for character in html if ord(character) < 32 and character != "\n"]
