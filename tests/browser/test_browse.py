"""Browsing under a person's hands: choose, go on and back with mouse and keys, and what Python then holds."""

from __future__ import annotations

import re

import pytest

from ovisnb.data import shapes
from ovisnb.data.formats import write_records
from ovisnb.show import open_shelf
from ovisnb.show.browse import card
from tests.show.hostile import write_hostile

CELLS = (
    """from ovisnb.data.stats import summarise
from ovisnb.show import browse, kind_table, open_shelf, overview_figure, overview_table, problem_table
shelf = open_shelf("{path}", image_folder="{folder}").check()
browser = browse(shelf, interactive=True); browser""",
    "browse(shelf, cards=30)",
    """from IPython.display import display
stats = summarise(shelf.records, image_folder="{folder}")
display(problem_table(shelf), kind_table(stats), overview_table(stats, shelf), overview_figure(stats))""",
)


def fill(cells, path, folder):
    return [cell.replace('"{path}"', repr(str(path))).replace('"{folder}"', repr(str(folder))) for cell in cells]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A data file of shapes, one of its records with a box that does not close."""
    folder = tmp_path_factory.mktemp("plain")
    records = []
    for at, kind in enumerate(["find", "count", "find", "count", "find"]):
        [one] = shapes.records("train", seed=at, count=1, size=96, kinds={kind: 1})
        one.images[0].image.save(folder / f"{at}.png")
        entry = one.to_dict() | {"id": f"{kind}-{at}", "image": f"{at}.png", "kind": kind}
        records.append(type(one).from_dict(entry))
    broken = records[1].to_dict() | {"id": "broken"}
    broken["conversations"][-1]["value"] += "<box>(0.1"
    records.append(type(records[1]).from_dict(broken))
    return write_records(records, folder / "data.jsonl"), folder


@pytest.fixture(scope="module")
def at_work(lab, plain):
    notebook = lab.open(*fill(CELLS[:1], *plain))
    notebook.run_all()
    yield notebook
    notebook.close()


def choose(notebook, name, label):
    select = notebook.output(0).get_by_label(name)
    [number] = [
        at for at, text in enumerate(select.locator("option").all_inner_texts()) if words(text).startswith(label)
    ]
    select.select_option(index=number)


def words(text: str) -> str:
    return " ".join(text.split())  # ipywidgets writes spaces that do not break


def chosen(notebook) -> list[str]:
    """What the lists show."""
    return [words(text) for text in notebook.output(0).locator("option:checked").all_inner_texts()]


def test_next_and_previous_show_another_card_and_python_knows_which(at_work):
    area = at_work.output(0)
    area.get_by_text("1 of 6").wait_for()
    area.get_by_text("find-0", exact=True).wait_for()  # the card is drawn on its own
    assert chosen(at_work) == ["all kinds (6)", "with or without (6)"] and area.locator("img").count() == 1
    area.get_by_role("button", name="next").click()
    area.get_by_text("2 of 6").wait_for()
    area.get_by_text("count-1", exact=True).wait_for()
    at_work.becomes("browser.item.id", "count-1")
    area.get_by_role("button", name="previous").click()
    area.get_by_text("find-0", exact=True).wait_for()
    at_work.becomes("browser.position", 0)
    at_work.unharmed()


def test_a_kind_and_a_problem_are_chosen_from_lists(at_work):
    area = at_work.output(0)
    choose(at_work, "kind", "count (3)")
    area.get_by_text("1 of 3").wait_for()
    at_work.becomes("(browser.kind, browser.item.id)", ("count", "count-1"))
    choose(at_work, "problem", "unclosed_tag")
    area.get_by_text("⚠ unclosed_tag").wait_for()
    at_work.becomes("(browser.problem, browser.item.id)", ("unclosed_tag", "broken"))
    choose(at_work, "kind", "find")
    area.get_by_text("no record is of this kind and has this problem").wait_for()
    at_work.becomes("browser.item", None)
    choose(at_work, "problem", "with or without")
    choose(at_work, "kind", "all kinds")
    area.get_by_text("1 of 6").wait_for()
    at_work.unharmed()


def test_everything_is_reached_with_the_keyboard(at_work):
    area, page = at_work.output(0), at_work.page
    area.get_by_label("kind").focus()
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(document.activeElement.title || document.activeElement.className).trim()"))
    assert reached[1:3] == ["previous record", "next record"] and "noUi-handle" in reached[3]
    page.keyboard.press("ArrowRight")
    area.get_by_text("2 of 6").wait_for()
    at_work.becomes("browser.item.id", "count-1")
    page.keyboard.press("End")
    area.get_by_text("6 of 6").wait_for()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    area.get_by_text("5 of 6").wait_for()
    at_work.becomes("browser.item.id", "find-4")
    at_work.unharmed()


def test_python_moves_the_controls(at_work):
    at_work.value("setattr(browser, 'kind', 'find')")
    area = at_work.output(0)
    area.get_by_text("1 of 3").wait_for()
    assert words(area.get_by_label("kind").locator("option:checked").inner_text()) == "find (3)"
    at_work.value("browser.go(2)")
    area.get_by_text("find-4", exact=True).wait_for()
    at_work.value("setattr(browser, 'kind', None)")
    at_work.value("setattr(browser, 'position', 3)")
    area.get_by_text("4 of 6").wait_for()
    assert chosen(at_work) == ["all kinds (6)", "with or without (6)"]
    area.get_by_text("count-3", exact=True).wait_for()
    at_work.unharmed()


def test_hostile_records_stay_text(lab, tmp_path):
    path = write_hostile(tmp_path)
    shelf = open_shelf(path, image_folder=tmp_path / "images").check()
    notebook = lab.open(*fill(CELLS, path, tmp_path / "images"))
    notebook.run_all()
    area = notebook.output(0)
    for number in range(1, len(shelf) + 1):
        area.get_by_text(f"{number} of {len(shelf)}", exact=True).wait_for()
        images = str(card(shelf, number - 1)).count("<img ")
        notebook.page.wait_for_function(f"{HTML}.at(-1).querySelectorAll('img').length === {images}")
        area.get_by_role("button", name="next").click()
    for name in ("kind", "problem"):
        select = area.get_by_label(name)
        for option in select.locator("option").all():
            select.select_option(value=option.get_attribute("value"))
            notebook.wait_idle()
            select.select_option(index=0)
    for cell in range(3):
        found = notebook.output(cell).evaluate(ELEMENTS)
        assert set(found) <= OURS, cell
        assert not notebook.output(cell).evaluate(HANDLERS)
    assert re.search("<script>alert", notebook.output(1).text_content())
    notebook.page.wait_for_timeout(200)
    notebook.unharmed()
    notebook.close()


HTML = "Array.from(document.querySelectorAll('.widget-html-content'))"
INSIDE = ".widget-html-content *, .jp-RenderedHTMLCommon *, select *"  # what the views made; the rest is JupyterLab's
ELEMENTS = f"e => Array.from(e.querySelectorAll('{INSIDE}'), x => x.localName)"
HANDLERS = """e => Array.from(e.querySelectorAll('*')).flatMap(x => Array.from(x.attributes))
    .filter(a => a.name.startsWith('on') || (a.name === 'src' && !a.value.startsWith('data:image/')))
    .map(a => a.name + '=' + a.value)"""
OURS = {"div", "span", "b", "bdi", "img", "details", "summary", "table", "tbody", "tr", "th", "td", "option"}
