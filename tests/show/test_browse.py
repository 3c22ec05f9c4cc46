"""Browsing: the first of each filter on a page, one at a time with controls, the same cards in both."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from traitlets import TraitError

from ovisnb.data import Record
from ovisnb.data.checks.faults import Fault
from ovisnb.show import Browser, Html, Shelf, browse, open_shelf
from ovisnb.show.browse import CHOICES, KINDS, card

from .hostile import write_hostile
from .page import elements, text_of

CARD = {"div", "span", "b", "bdi", "img"}


def record(name: str, kind: str | None = None, text: str = "q") -> Record:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": f"answer of {name}"}]
    return Record.from_dict({"id": name, "kind": kind, "conversations": turns})


@pytest.fixture
def shelf() -> Shelf:
    records = [record(f"{kind}{at}", kind) for at in range(4) for kind in "ab"] + [record("c0", "c")]
    faults = [
        Fault("no_answer", "b1", None, "it has none", "x.json"),
        Fault("no_answer", "c0", None, "nor it", "x.json"),
    ]
    return Shelf(records, [*faults, Fault("broken_json", None, 9, "no JSON", "x.json")])


def test_the_page_holds_the_first_of_each_kind_and_of_each_problem(shelf):
    page = browse(shelf, cards=2)
    assert isinstance(page, Html) and elements(page) <= CARD | {"details", "summary"}
    parts = str(page).split("<details")[1:]
    assert [text_of("<details" + part).split("human")[0] for part in parts] == [
        "a 4 records, the first 2a0 a",
        "b 4 records, the first 2b0 b",
        "c 1 recordc0 c⚠ no_answer nor it",
        "⚠ no_answer 2 recordsb1 b⚠ no_answer it has none",
        "⚠ broken_json 1 recorda row that is no record x.json:9⚠ broken_json no JSON",
    ]
    assert [part.startswith(" open") for part in parts] == [True, False, False, False, False]
    assert "answer of a1" in parts[0] and "answer of a2" not in str(page)


def test_a_page_of_very_many_kinds_shows_the_most_frequent():
    page = browse([record(str(at), str(at)) for at in range(KINDS + 5)] + [record("x", "7")], cards=1)
    assert "… 5 more kinds with 5 records" in text_of(page)
    assert text_of(page).startswith("7 2 records")


def test_the_controls_go_through_the_records(shelf):
    seen = []
    browser = browse(shelf, interactive=True)
    browser.observe(lambda change: seen.append(browser.item.id), "position")
    assert isinstance(browser, Browser) and browser.item.id == "a0" and browser.position == 0
    browser.go(1)
    browser.go(1)
    browser.go(-5)
    assert seen == ["b0", "a1", "a0"]
    browser.unobserve_all("position")
    browser.go(1000)
    assert browser.position == 9 and browser.item[0].kind == "broken_json"


def test_the_controls_show_the_same_card_as_the_page(shelf):
    browser = browse(shelf, interactive=True)
    for position in range(len(shelf)):
        assert browser.position == position
        assert browser._card.value == str(card(shelf, position))
        browser.go(1)
    assert browser._said.value == '<span role="status">10 of 10</span>'


def test_the_filters_leave_what_they_say(shelf):
    browser = browse(shelf, interactive=True)
    browser.go(3)
    browser.kind = "b"
    assert browser.item.id == "b0" and browser._slider.max == 4
    browser.problem = "no_answer"
    assert browser.item.id == "b1" and browser._slider.max == 1
    assert "1 of 1" in browser._said.value
    browser.kind = "a"
    assert browser.item is None and browser.position is None and browser._card.value == ""
    assert "no record is of this kind and has this problem" in browser._said.value
    browser.kind = browser.problem = None
    assert browser.item.id == "a0" and browser._slider.max == 10 and "1 of 10" in browser._said.value
    with pytest.raises(TraitError):
        browser.kind = "d"


def test_the_slider_is_never_told_of_an_end_below_its_value(shelf):
    browser, told = browse(shelf, interactive=True), {"value": 10, "max": 10}
    browser.go(9)

    def tell(change):
        told[change["name"]] = change["new"]
        assert told["value"] <= told["max"]  # a browser would clip the value and send that back

    browser._slider.observe(tell, ["value", "max"])
    browser.kind = "b"
    assert told == {"value": 1, "max": 4} and browser.item.id == "b0"


def test_who_observes_may_go_on_while_a_filter_is_set(shelf):
    browser = browse(shelf, interactive=True)
    browser.go(4)
    browser.observe(lambda change: browser.kind == "c" and browser.go(1), "position")
    browser.kind = "c"
    assert browser.item.id == "c0" and "1 of 1" in browser._said.value and browser._slider.value == 1


def test_python_sets_the_position(shelf):
    browser, seen = browse(shelf, interactive=True), []
    browser.observe(lambda change: seen.append((change["new"], browser.item.id)), "position")
    browser.position = 3
    assert browser.item.id == "b1" and browser._slider.value == 4 and "4 of 10" in browser._said.value
    assert browser._card.value == str(card(shelf, 3))
    browser.go(1)
    browser.kind = "b"
    browser.position = 7
    assert browser.item.id == "b3" and "4 of 4" in browser._said.value
    for elsewhere in (0, 10, -1):  # 0 is of another kind
        with pytest.raises(TraitError, match="is none of the 4 that the filters leave"):
            browser.position = elsewhere
    assert browser.position == 7 and browser.item.id == "b3"
    assert seen == [(3, "b1"), (4, "a2"), (1, "b0"), (7, "b3")]


def test_the_choices_say_how_many_there_are_and_are_one_short_line_each():
    kinds = ["<b>\n\u202e\ud800" + "k" * 10_000, "$x$"]
    browser = browse([record(str(at), kind) for at, kind in enumerate(kinds)], interactive=True)
    labels = browser._kind._options_labels
    assert labels[0] == "all kinds (2)" and labels[2] == "$x$ (1)"
    assert labels[1].startswith("<b>⟨U+000A⟩⟨U+202E⟩⟨U+D800⟩kkk") and len(labels[1]) < 120
    browser.kind = kinds[0]
    assert browser.item.kind == kinds[0]
    many = browse([record(str(at), str(at)) for at in range(CHOICES + 50)], interactive=True)
    assert len(many._kind.options) == CHOICES + 1


def test_an_empty_set_is_browsed_too():
    assert text_of(browse([])) == ""
    browser = browse([], interactive=True)
    browser.go(1)
    assert browser.item is None


def test_cards_are_made_when_they_are_looked_at():
    made = []

    class Records(Sequence):
        def __len__(self):
            return 100_000

        def __getitem__(self, index):
            made.append(index)
            return record(str(index))

        def __iter__(self):
            return iter([record("x")] * 100_000)  # kinds are counted, no card is made

    browser = browse(Records(), interactive=True)
    browser.go(54_321)
    assert browser.item.id == "54321" and set(made) == {0, 54_321}


def test_a_click_while_a_cell_runs(shelf, monkeypatch):
    browser = browse(shelf, interactive=True)
    drawing, done = threading.Event(), threading.Event()

    def slowly(*some):
        if threading.current_thread() is click:
            drawing.set()
            done.wait(0.5)
        return card(*some)

    monkeypatch.setitem(browse.__globals__, "card", slowly)
    click = threading.Thread(target=browser.go, args=[5])  # JupyterLab has clicks handled in a thread of their own
    click.start()
    assert drawing.wait(60)
    browser.kind = "b"
    done.set()
    click.join()
    assert (browser.position, browser.item.id) == (1, "b0")
    assert "1 of 4" in browser._said.value and "answer of b0" in browser._card.value


def test_of_a_hostile_set_every_card_is_made_of_text(tmp_path):
    shelf = open_shelf(write_hostile(tmp_path), image_folder=tmp_path / "images").check()
    page = str(browse(shelf, cards=30))
    page.encode("utf-8")
    assert elements(page) <= CARD | {"details", "summary"}
    begun = time.monotonic()
    browser = browse(shelf, interactive=True)
    for position in range(len(shelf)):
        assert browser.position == position and elements(browser._card.value) <= CARD
        browser.go(1)
    assert time.monotonic() - begun < 60  # no card that never ends
    browser._kind.get_state()  # can be sent


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.text(), st.text(), st.one_of(st.none(), st.integers(1, 9)), st.text()), max_size=6))
def test_whatever_the_faults_say_it_is_text(faults):
    shelf = Shelf([record("x")], [Fault(kind, name, line, said, name) for kind, name, line, said in faults])
    assert elements(browse(shelf, cards=9)) <= CARD | {"details", "summary"}
    assert len(browse(shelf, interactive=True)._problem.options) == 1 + len({kind for kind, *_ in faults})
