"""The mask lens under a person's hands: point, click, switch and type in JupyterLab, and what Python then holds."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

from ovisnb.chat import encode
from ovisnb.show import show_tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "ovis2_5"

EVIL = (
    "<script>window.pwned=1</script><img src=x onerror=alert(1)><b onclick=alert(2)>b</b></span></div>"
    "<style>*{display:none}</style><iframe src=http://example.invalid></iframe> &lt;i&gt; ]]> $x^2$ \\(y\\) \u202e\u2066\u200f אבג\x00\x1b[31m"
)
SETUP = f"""
import torch
from ovisnb.chat import encode
from ovisnb.model import load_processor
from ovisnb.show import MaskLens, show_tokens
folder, processor = {str(GOLDEN / "images")!r}, load_processor({str(GOLDEN / "checkpoint")!r})
def chat(*texts, **more):
    turns = [{{"from": ["human", "gpt"][at % 2], "value": text}} for at, text in enumerate(texts)]
    return {{"id": "test", "conversations": turns, **more}}
def small(record, **more):
    return encode(record, processor, image_folder=folder, min_pixels=1024, **{{"max_pixels": 16384, **more}})
evil = {EVIL!r}
thought = "<think>\\nwhy\\n</think>\\n\\nA  cat.\\n<tool_response>ok</tool_response>Yes."
record = chat("Look <image> here", thought, "And <image>?", "No.", image=["photo.png", {{"path": "tall.png", "box": [1, 2, 30, 40]}}])
encoded = small(record)
"""
CELLS = (
    SETUP,
    "lens = MaskLens(encoded, processor, record=record, image_folder=folder); lens",
    """sides = {'large': encoded, 'small': small(record, max_pixels=4096, enable_thinking=False)}
two = MaskLens(sides, processor, record=record, image_folder=folder); two""",
    """bad = small(chat(evil, evil) | {'id': evil}); bad.dropped.append(evil)
broken = small(chat(evil * 4, 'a')); broken.input_ids[:] = torch.arange(len(broken)) % (len(processor.tokenizer) + 9)
worst = MaskLens({evil: bad, 'broken': broken}, processor); worst""",
    "show_tokens(bad, processor)",
    "show_tokens({evil: bad, 'broken': broken}, processor, whitespace=False)",
    "long = small(chat('What? ' * 2000, 'The quick brown fox. ' * 400)); many = MaskLens(long, processor); many",
    "huge = MaskLens(small(chat('x' * 1_000_000, 'a' * 1_000_000)), processor); huge",
    "show_tokens(small(chat('x' * 1_000_000, 'a')), processor)",
    "lens",
    "'the last cell'",
)
LENS, TWO, WORST, STATIC, STATIC_TWO, LONG, HUGE, HUGE_STATIC, AGAIN, LAST = range(1, 11)
# the elements that the views make themselves
OURS = {
    "div",
    "span",
    "b",
    "bdi",
    "br",
    "img",
    "input",
    "label",
    "table",
    "tbody",
    "tr",
    "td",
    "th",
    "details",
    "summary",
}


@pytest.fixture(scope="module")
def notebook(lab):
    notebook = lab.open(*CELLS)
    notebook.run_all()
    yield notebook
    notebook.unharmed()
    notebook.close()


@pytest.fixture
def view(notebook):
    """The widget of `lens`, with nothing selected and every switch as it began."""
    view = notebook.output(LENS).locator(".ovisnb-lens")
    view.wait_for()
    notebook.page.mouse.move(2, 2)
    for name, value in (("only supervised", False), ("token ids", False), ("mark white space", True)):
        view.get_by_label(name).set_checked(value)
    notebook.becomes("(lens.only_supervised, lens.token_ids, lens.whitespace)", (False, False, True))
    return view


# the lens scrolls once more when a frame was drawn
FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))"


def shown(view, selector: str) -> int:
    """How many elements have a place on the page."""
    return view.locator(selector).evaluate_all("all => all.filter(e => e.getClientRects().length).length")


def test_every_token_and_picture_is_there(notebook, view):
    text = notebook.value("[s.end - s.start for s in encoded.spans if s.kind == 'text']")
    assert view.locator(".token").count() == sum(text)
    assert view.locator(".media").count() == view.locator(".media img").count() == 2
    texts = view.locator(".media").all_text_contents()  # also of what is off the screen, and so not laid out
    assert "image 2 · crop [1, 2, 30, 40]" in texts[1] and re.search(r"1×\d+×\d+ patches\d+ tokens$", texts[0])
    assert view.locator("img").evaluate_all("all => all.every(e => e.complete && e.naturalWidth > 1)")


def test_pointing_at_a_token_tells_position_id_label_and_span(notebook, view):
    at = notebook.value("[s.start for s in encoded.spans if s.supervised][0]")
    token, turn = notebook.value(f"(int(encoded.input_ids[{at}]), [s.turn for s in encoded.spans if s.supervised][0])")
    view.locator(".idle .token").first.hover()
    tip = view.locator(".tip")
    assert tip.inner_text().startswith("position 0 · id ") and "label none\nheader (user, turn 0)" in tip.inner_text()
    view.locator(".run:not(.idle) .token").first.hover()
    assert tip.inner_text() == f"position {at} · id {token} · label {token}\nanswer (assistant, turn {turn})"
    view.locator(".media").first.hover()
    assert re.fullmatch(r"positions \d+ to \d+ · no label\nimage \(user, turn 0\)", tip.inner_text())
    notebook.page.mouse.move(2, 2)
    assert not tip.is_visible()


def test_a_click_reaches_python(notebook, view):
    view.locator(".run:not(.idle) .token").nth(1).click()
    at = notebook.value("[s.start for s in encoded.spans if s.supervised][0]") + 1
    notebook.becomes("lens.selected and lens.selected['position']", at)
    selected = notebook.value("lens.selected")
    span = notebook.value(f"[vars(s) for s in encoded.spans if s.start <= {at} < s.end][0]")
    assert selected["id"] == selected["label"] == notebook.value(f"int(encoded.input_ids[{at}])")
    assert {key: selected[key] for key in ("start", "end", "role", "turn", "reason", "kind")} == {
        key: span[key] for key in ("start", "end", "role", "turn", "reason", "kind")
    }
    assert view.locator(".selected").count() == 1
    assert f"selected: position {at} · " in view.locator(".detail").inner_text()
    view.locator(".media").nth(1).click()
    notebook.becomes("lens.selected['kind'], lens.selected['id'], lens.selected['turn']", ("image", None, 2))


def test_only_supervised_folds_the_rest(notebook, view):
    everything = view.locator(".token").count()
    view.get_by_label("only supervised").check()
    notebook.becomes("lens.only_supervised", True)
    assert shown(view, ".token") == notebook.value("int((encoded.labels != -100).sum())") < everything
    assert shown(view, ".media") == 0
    assert shown(view, ".folded") == notebook.value("len([s for s in encoded.spans if not s.supervised])")
    view.get_by_label("only supervised").uncheck()
    notebook.becomes("lens.only_supervised", False)
    assert shown(view, ".token") == everything and shown(view, ".folded") == 0


def test_token_ids_are_written_below(notebook, view):
    below = "e => [getComputedStyle(e, '::after').content, e.getBoundingClientRect().height]"
    token = view.locator(".token").first
    assert token.evaluate(below)[0] == "none"
    before = token.evaluate(below)[1]
    view.get_by_label("token ids").check()
    notebook.becomes("lens.token_ids", True)
    content, height = token.evaluate(below)
    assert content == f'"{notebook.value("int(encoded.input_ids[0])")}"' and height > before + 5


def test_white_space_is_marked_or_not(notebook, view):
    texts = lambda: "".join(view.locator(".token").evaluate_all("all => all.map(e => e.textContent)"))
    assert "A··cat.↵" in texts()
    breaks = view.locator("br").count()
    view.get_by_label("mark white space").uncheck()
    notebook.becomes("lens.whitespace", False)
    assert "A  cat." in texts() and not re.search("[·↵]", texts())
    assert view.locator("br").count() == breaks


def test_the_switches_work_from_the_keyboard_and_the_notebook_does_not_hear_it(notebook, view):
    cells = notebook.page.locator(".jp-Cell").count()
    view.get_by_label("only supervised").focus()
    for name in ("only_supervised", "token_ids", "whitespace"):
        before = notebook.value(f"lens.{name}")
        notebook.page.keyboard.press("Space")
        notebook.becomes(f"lens.{name}", not before)
        notebook.page.keyboard.press("Space")
        notebook.becomes(f"lens.{name}", before)
        notebook.page.keyboard.press("Tab")
    assert view.locator(".body").evaluate("e => e === document.activeElement")
    notebook.page.keyboard.press("Escape")
    notebook.becomes("lens.selected", None)
    assert view.locator(".body").evaluate("e => getComputedStyle(e).outlineWidth") == "2px"  # where the keys go is seen
    last = notebook.value("len(encoded) - 1")
    keys = [
        ("ArrowRight", 0),
        ("ArrowRight", 1),
        ("ArrowLeft", 0),
        ("ArrowLeft", 0),
        ("End", last),
        ("ArrowRight", last),
    ]
    for key, at in [*keys, ("Home", 0), ("ArrowRight", 1)]:
        notebook.page.keyboard.press(key)
        notebook.becomes("lens.selected and lens.selected['position']", at)
    notebook.page.keyboard.type("ddab")  # commands of the notebook: delete the cell, insert one
    assert notebook.page.locator(".jp-Cell").count() == cells


def test_after_a_click_shortcuts_are_jupyterlabs_and_plain_keys_are_not(notebook):
    page, cell, path = notebook.page, notebook.cell(AGAIN), notebook.lab.folder / notebook.name
    active, view = page.locator(".jp-mod-active"), ".ovisnb-lens:not([data-old]) "
    cells = [(one.cell_type, one.source) for one in nbformat.read(path, 4).cells]

    def saved():
        """The cells in the file, once Ctrl+S has written it; JupyterLab passes over one while it still saves."""
        before, until = path.stat().st_mtime_ns, time.monotonic() + 180
        while time.monotonic() < until:
            page.keyboard.press("Control+s")
            page.wait_for_timeout(1000)
            with suppress(ValueError):  # half written
                if path.stat().st_mtime_ns != before:
                    return [(one["cell_type"], "".join(one["source"])) for one in json.loads(path.read_text())["cells"]]
        pytest.fail("Ctrl+S did not save the notebook")

    def runs(keys: str):
        """These keys, after a click, run the cell: a new view comes in place of the old one."""
        cell.locator(view + ".token").first.click()
        cell.locator(view + ".body:focus").wait_for()
        cell.locator(".ovisnb-lens").evaluate("e => e.dataset.old = 1")
        page.keyboard.press(keys)
        cell.locator(view + ".token").first.wait_for()
        notebook.wait_idle()

    for clicked, focused in ((".token", ".body:focus"), ("[name=token_ids]", "[name=token_ids]:focus")):
        cell.locator(view + clicked).first.click()
        cell.locator(view + focused).wait_for()
        cell.and_(active).wait_for()
        for key in ("d", "d", "a", "b", "x", "m", "Shift+M", "ArrowDown", "ArrowUp", "Shift+ArrowDown", "Enter"):
            page.keyboard.press(key)
        assert saved() == cells  # what the keys before it did would be in the file
        assert cell.locator(view + focused).count() == cell.and_(active).count() == 1
        assert page.locator(".jp-Cell.jp-mod-selected").count() == 1
    runs("Control+Enter")
    cell.and_(active).wait_for()
    runs("Shift+Enter")
    notebook.cell(LAST).and_(active).wait_for()


def test_python_moves_the_view(notebook, view):
    at = notebook.value("[s.start for s in encoded.spans if s.reason == 'tool_response'][0]")
    lines = f"lens.selected = {{'side': '', 'position': {at}}}; lens.only_supervised = True"
    notebook.value(f"exec({lines!r})")
    view.locator(".only-supervised").wait_for()
    assert view.get_by_label("only supervised").is_checked()
    view.locator(".token.selected").wait_for(state="attached")
    assert f"position {at} · " in view.locator(".detail").inner_text()


def test_a_lens_shown_twice_follows_and_does_not_move_the_page(notebook, view):
    again = notebook.output(AGAIN).locator(".ovisnb-lens")
    again.locator(".token").first.wait_for()
    view.locator(".token").nth(8).scroll_into_view_if_needed()
    top = view.bounding_box()["y"]
    view.locator(".token").nth(8).click()
    notebook.becomes("lens.selected and lens.selected['position']", 8)
    again.locator(".token.selected").wait_for()
    notebook.page.evaluate(FRAMES)
    assert view.bounding_box()["y"] == top


def test_what_python_selects_is_seen_among_the_tokens(notebook):
    view = notebook.output(LONG).locator(".ovisnb-lens")
    view.scroll_into_view_if_needed()
    for at in ("7000", "20", "len(long) - 1"):
        notebook.value(f"setattr(many, 'selected', {{'side': '', 'position': {at}}})")
        view.locator(".detail", has_text=f"position {notebook.value(at)} ").wait_for()
        notebook.page.evaluate(FRAMES)
        inside = """e => { const [a, b] = [e, e.closest('.body')].map(x => x.getBoundingClientRect());
            return a.top >= b.top && a.bottom <= b.bottom }"""
        assert view.locator(".token.selected").evaluate(inside), at


def test_two_settings_stand_side_by_side(notebook):
    view = notebook.output(TWO).locator(".ovisnb-lens")
    view.wait_for()
    assert view.locator("th").all_inner_texts() == ["", "large", "small", "difference"]
    places = view.locator(".body .columns > div").evaluate_all(
        "all => all.map(e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.width] })"
    )
    assert len(places) == 2 * 4  # one row a turn
    for left, right in zip(places[::2], places[1::2]):
        assert left[0] + left[2] <= right[0] and left[1] == right[1] and left[2] == pytest.approx(right[2], abs=2)
    thinking = notebook.value("[len(one) - len(two_) for one, two_ in [sides.values()]][0]")
    assert f"{-thinking:+,}" in view.locator("tr").nth(1).inner_text()
    view.locator(".columns > div:nth-child(2) .token").first.click()
    notebook.becomes("two.selected and (two.selected['side'], two.selected['position'])", ("small", 0))
    view.get_by_label("only supervised").check()
    notebook.becomes("two.only_supervised", True)
    assert shown(view, ".token") == notebook.value("sum(int((e.labels != -100).sum()) for e in sides.values())")


@pytest.mark.parametrize("cell", [WORST, STATIC, STATIC_TWO, HUGE, HUGE_STATIC])
def test_text_of_the_data_stays_text(notebook, cell):
    output = notebook.output(cell)
    output.locator(":text('test'), :text('tokens')").first.wait_for()
    root = output.locator(".ovisnb-lens, [dir=ltr]").first
    tags = root.evaluate("e => [...new Set([...e.querySelectorAll('*')].map(e => e.localName))]")
    assert set(tags) <= OURS
    handlers = "e => [...e.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => n.startsWith('on'))"
    assert root.evaluate(handlers) == []
    assert notebook.page.evaluate("window.pwned") is None
    notebook.unharmed()


@pytest.mark.parametrize("cell", [WORST, STATIC])
def test_marks_of_direction_do_not_move_a_token(notebook, cell):
    """Tokens stand from left to right and from top to bottom, whatever is written in them."""
    tokens = notebook.output(cell).locator(
        ".columns > div:first-child .token" if cell == WORST else "[title^=position]"
    )
    tokens.first.wait_for()
    places = tokens.evaluate_all("all => all.map(e => { const r = e.getBoundingClientRect(); return [r.top, r.left] })")
    assert len(places) > 50
    for (top, left), (next_top, next_left) in pairwise(places):
        assert next_top > top + 8 or (abs(next_top - top) <= 8 and next_left > left)


def test_a_long_sample_is_whole_and_a_huge_one_says_what_is_left_out(notebook):
    assert notebook.output(LONG).locator(".token").count() == notebook.value("len(long)") > 8000
    last = notebook.output(LONG).locator(".token").last
    last.scroll_into_view_if_needed()
    last.hover()
    tip = notebook.output(LONG).locator(".tip").inner_text()
    assert tip.startswith(f"position {notebook.value('len(long) - 1')} · ")
    huge = notebook.output(HUGE)
    assert huge.locator(".token").count() <= 12_000
    assert re.search(r"… [\d,]+ tokens, [\d,]+ to [\d,]+, are not drawn …", huge.locator(".gap").first.text_content())
    assert "text tokens are drawn" in huge.locator(".note").inner_text()


def test_a_notebook_that_papermill_ran_keeps_its_looks(lab, golden, golden_processor):
    """JupyterLab does not trust outputs it has not made, and takes style sheets and scripts out of them."""
    turns = [{"from": "human", "value": "Look <image> here"}, {"from": "gpt", "value": "A  cat.\n"}]
    record = {"id": "test", "conversations": turns, "image": "photo.png"}
    encoded = encode(record, golden_processor, image_folder=golden / "images", max_pixels=65536, min_pixels=1024)
    options = {"record": record, "image_folder": golden / "images"}
    html = str(show_tokens({"a": encoded, "b": encoded}, golden_processor, **options))
    html += str(show_tokens(encoded, golden_processor, **options, only_supervised=True))
    html += "<style id=ours></style>"  # to see that this output is not trusted
    output = nbformat.v4.new_output("display_data", {"text/html": html})
    cells = [nbformat.v4.new_code_cell("1", outputs=[output], execution_count=1)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), lab.folder / "papermill.ipynb")
    notebook = lab.open(name="papermill.ipynb")
    area = notebook.output(0)
    area.locator("[title^=position]").first.wait_for()
    assert area.locator("[title^=position]").count() > 20 and area.locator("style").count() == 0
    chip = area.locator("[title*='· answer ']").first
    style = (
        "e => { const s = getComputedStyle(e); return [s.backgroundColor, s.color, s.whiteSpaceCollapse, s.display] }"
    )
    assert chip.evaluate(style) == ["rgb(0, 114, 178)", "rgb(255, 255, 255)", "preserve", "inline-block"]
    assert area.locator("img").count() == 2
    assert area.locator("img").evaluate_all("all => all.every(e => e.complete && e.naturalWidth > 1)")
    left, right = area.locator("div:has(> [title^=position])").evaluate_all(
        "all => all.slice(0, 2).map(e => e.getBoundingClientRect().toJSON())"
    )
    assert left["right"] <= right["left"] and left["top"] == right["top"]
    notebook.unharmed()
    notebook.close()
