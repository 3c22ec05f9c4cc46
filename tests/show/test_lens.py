"""The payload and the widget: the encoding's own numbers, as plain data. `tests/browser` looks at what is drawn."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image
from traitlets import TraitError

from ovisnb.chat import encode
from ovisnb.show import Html, MaskLens, mask_lens, pictures, reason_table
from ovisnb.show.lens import MaskLens as Lens
from ovisnb.show.payload import payload

from .page import elements, text_of
from .test_tokens import EVIL, pictured, record


@pytest.fixture(params=[0, 1], ids=["images", "video"])
def seen(request, golden, golden_processor):
    """(record, encoded, payload)"""
    data = pictured(golden)[request.param]
    encoded = encode(data, golden_processor, image_folder=golden / "images", min_pixels=4096, max_pixels=25600)
    return data, encoded, payload(encoded, golden_processor, record=data, image_folder=golden / "images")


def test_runs_are_the_spans_and_labels_the_labels(seen):
    _, encoded, data = seen
    (side,) = data["sides"]
    keys = ("start", "end", "role", "turn", "reason", "kind")
    assert [[run[key] for key in keys] for run in side["runs"]] == [
        [getattr(span, key) for key in keys] for span in encoded.spans
    ]
    ids, labels = encoded.input_ids.tolist(), encoded.labels.tolist()
    for run in side["runs"]:
        assert run["trains"] == any(label != -100 for label in labels[run["start"] : run["end"]])
        for part in run.get("parts", ()):
            end = part["at"] + len(part["ids"])
            assert part["ids"] == ids[part["at"] : end]
            assert (part["labels"] or [-100] * len(part["ids"])) == labels[part["at"] : end]
    drawn = [len(part["ids"]) for run in side["runs"] for part in run.get("parts", ())]
    assert sum(drawn) == sum(span.end - span.start for span in encoded.spans if span.kind == "text")


def test_pictures_and_crops_stand_in_their_turns(seen, golden):
    data, encoded, drawn = seen
    media = [run for run in drawn["sides"][0]["runs"] if "media" in run]
    assert [(run["turn"], run["start"]) for run in media] == [
        (span.turn, span.start) for span in encoded.spans if span.kind != "text"
    ]
    shown = [drawn["media"][run["media"]] for run in media]
    if "video" in data:
        assert [len(one["pictures"]) for one in shown] == [4] and shown[0]["note"] == "4 of its frames"
    else:
        assert [one["title"] for one in shown] == ["image 1", "image 2", "image 3 · crop [1, 2, 30, 40]"]
    for run, one in zip(media, shown):
        assert run["lines"][1] == f"{run['end'] - run['start']:,} tokens"
        assert all(re.fullmatch(r"data:image/jpeg;base64,[\w+/=]+", picture["src"]) for picture in one["pictures"])


def test_a_picture_keeps_its_grid_when_thinking_takes_one_before_it_away(golden, golden_processor):
    data = record(
        ("human", "<image> and?"),
        ("gpt", "<think>a <image></think>\n\nb <image>"),
        image=["photo.png", "tall.png", "photo.png"],
    )
    options = {"image_folder": golden / "images", "min_pixels": 4096, "max_pixels": 25600}
    full = encode(data, golden_processor, **options)
    short = encode(data, golden_processor, enable_thinking=False, **options)
    sides = payload({"full": full, "short": short}, golden_processor)["sides"]
    grids = [{run["media"]: run["lines"] for run in side["runs"] if "media" in run} for side in sides]
    assert list(grids[0]) == ["image 1", "image 2", "image 3"]
    assert grids[1] == {name: grids[0][name] for name in ("image 1", "image 3")}


def test_a_record_measured_without_pixels_draws_the_same(golden, golden_processor):
    data = pictured(golden)[0]
    decoded, measured = (
        encode(data, golden_processor, image_folder=golden / "images", pixels=pixels) for pixels in (True, False)
    )
    assert payload({"": decoded}, golden_processor) == payload({"": measured}, golden_processor)


def test_the_payload_is_plain_data_of_a_modest_size(golden_processor):
    encoded = encode(record(("human", EVIL), ("gpt", "The quick brown fox. " * 1000)), golden_processor)
    text = json.dumps(payload({"a": encoded, "b": encoded}, golden_processor))
    assert len(text) < 40 * 2 * len(encoded)
    encoded = encode(record(("human", "x" * 1_000_000), ("gpt", "a")), golden_processor)
    assert len(json.dumps(payload(encoded, golden_processor))) < 1_000_000


def test_only_the_first_pictures_have_thumbnails(golden, golden_processor, monkeypatch):
    monkeypatch.setattr("ovisnb.show.payload.MOST_PICTURES", 2)
    data = pictured(golden)[0]
    encoded = encode(data, golden_processor, image_folder=golden / "images")
    media = payload(encoded, golden_processor, record=data, image_folder=golden / "images")["media"]
    assert [len(one["pictures"]) for one in media.values()] == [1, 1, 0]
    assert media["image 3"]["note"] == "no thumbnail: the first 2 have one"


def test_large_pictures_are_decoded_small_and_once_for_their_crops(tmp_path, golden_processor, monkeypatch):
    decoded, open_image = [], pictures.open_image

    def noting(media, *folder, **options):
        image = open_image(media, *folder, **options)
        if media.path is not None:
            decoded.append((media.path, image.size))
        return image

    monkeypatch.setattr(pictures, "open_image", noting)
    Image.effect_noise((2400, 1600), 80).save(tmp_path / "a.jpg")
    Image.effect_noise((1200, 3000), 80).save(tmp_path / "b.jpg")
    crops = [{"path": "a.jpg", "box": [at, 0, 500, 900]} for at in range(3)]
    data = record(("human", "<image>" * 5), ("gpt", "a"), image=["a.jpg", *crops, "b.jpg"])
    encoded = encode(data, golden_processor, image_folder=tmp_path, pixels=False)
    media = payload(encoded, golden_processor, record=data, image_folder=tmp_path)["media"]
    assert decoded == [("a.jpg", (600, 400)), ("a.jpg", (2400, 1600)), ("b.jpg", (600, 1500))]
    sizes = [(one["pictures"][0]["width"], one["pictures"][0]["height"]) for one in media.values()]
    assert sizes == [(108, 72), (40, 72), (40, 72), (40, 72), (29, 72)]


def test_the_widget_holds_the_payload_and_the_switches(seen, golden, golden_processor):
    record_, encoded, drawn = seen
    lens = MaskLens(encoded, golden_processor, record=record_, image_folder=golden / "images", token_ids=True)
    state = lens.get_state()
    assert state["payload"] == drawn
    names = ("only_supervised", "token_ids", "whitespace", "selected")
    assert [state[name] for name in names] == [False, True, True, None]
    with pytest.raises(TraitError):
        lens.whitespace = "no"
    with pytest.raises(ValueError, match="nothing to show"):
        Lens({}, golden_processor)


def test_the_script_makes_no_markup_and_asks_for_nothing():
    source = Lens._esm.read_text() if hasattr(Lens._esm, "read_text") else str(Lens._esm)
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "fetch(",
        "http",
        "import ",
    ):
        assert word not in source


def test_a_sentence_in_place_of_an_encoding_is_shown(golden_processor):
    good = encode(record(("human", "?"), ("gpt", "a")), golden_processor)
    assert isinstance(mask_lens(good, golden_processor), Html)
    assert isinstance(mask_lens({"a": good, "b": good}, golden_processor, interactive=True), MaskLens)
    for encoded in (EVIL, {"a": good, "b": EVIL}):
        shown = mask_lens(encoded, golden_processor, interactive=True)
        assert text_of(shown).startswith("⚠ <script>") and elements(shown) == {"div", "bdi"}
    shown = reason_table([EVIL, good, *["no"] * 20])
    assert elements(shown) <= {"table", "tr", "th", "td", "div", "bdi"}
    assert "⚠ <script>" in text_of(shown) and text_of(shown).endswith("⚠ no… 9 more problems are not shown")
