"""The mask lens on a sample of 8,000 tokens: Python's part, and the browser's, for static HTML and for the widget.

    python benchmarks/lens.py [--tokens 8000] [--repeats 7]

Python: the payload without pictures, thumbnails (of full-size photographs too), HTML. Browser (a headless Chromium
without a GPU; playwright is in the dev extra): from the call until the first picture of the page is painted, the
longest frame while scrolling through all of it and while pointing at 40 tokens, and each switch of the widget until
it is painted. All in milliseconds, medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ovisnb.chat import encode
from ovisnb.data import Record
from ovisnb.model import load_processor
from ovisnb.paths import resolve
from ovisnb.show import MaskLens, show_tokens
from ovisnb.show.payload import payload

LINE = "The astronaut smiles, number {}; behind her stands a shuttle on its carrier.\n"
PHOTOS = ("astronaut.jpg", "cat.jpg", "coffee.jpg", "rocket.jpg")

PAGE = """
const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)));
const host = () => { const el = document.createElement("div"); document.body.replaceChildren(el); return el; };
async function drawHtml(html) {
  const el = host(); await frame();
  const begun = performance.now(); el.innerHTML = html; await frame();
  return performance.now() - begun;
}
const state = { only_supervised: false, token_ids: false, whitespace: true, selected: null }, listeners = {};
const model = {
  get: name => state[name], on: (name, f) => (listeners[name] ??= []).push(f), off() {}, save_changes() {},
  set(name, value) { state[name] = value; (listeners["change:" + name] ?? []).forEach(f => f()); },
};
async function drawLens(lens) {
  const el = host(); await frame();
  const begun = performance.now(); lens.render({ model, el }); await frame();
  return performance.now() - begun;
}
async function turn(name) {
  const begun = performance.now(); model.set(name, !state[name]); await frame();
  return performance.now() - begun;
}
let frames = [], watching = false;
async function watch() {
  frames = []; watching = true;
  for (let last = performance.now(); watching;) {
    await new Promise(requestAnimationFrame);
    const now = performance.now(); frames.push(now - last); last = now;
  }
}
async function scroll() {
  const body = document.querySelector(".ovisnb-lens .body") ?? document.scrollingElement;
  body.scrollTop = 0; await frame(); watch();
  for (let last = -1; body.scrollTop !== last;) { last = body.scrollTop; body.scrollTop += 200; await frame(); }
  watching = false; body.scrollTop = 0; await frame();
  return Math.max(...frames);
}
"""


def milliseconds(call, repeats: int) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def sample(tokens: int, processor, folder: Path) -> tuple[Record, object]:
    """A record of at least `tokens` tokens of text with four photographs, and its encoding."""
    lines, wanted = tokens // 60, 0
    while wanted < tokens:
        lines += lines // 50 + 1
        text = "".join(LINE.format(n) for n in range(lines))
        turns = [
            {"from": "human", "value": "<image>\n" * len(PHOTOS) + text[: len(text) // 3]},
            {"from": "gpt", "value": text},
        ]
        record = Record.from_dict({"id": "long", "image": list(PHOTOS), "conversations": turns})
        encoded = encode(record, processor, image_folder=folder, pixels=False)
        wanted = sum(span.end - span.start for span in encoded.spans if span.kind == "text")
    return record, encoded


def pointing(page: Page) -> float:
    """The longest frame while the pointer goes over 40 tokens."""
    places = page.evaluate("""() => [...document.querySelectorAll(".token, [title^=position]")].slice(0, 40)
        .map(e => { const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })""")
    page.evaluate("() => { watch() }")
    for x, y in places:
        page.mouse.move(x, y)
    return page.evaluate("() => { watching = false; return Math.max(...frames) }")


def browser(html: str, data: dict, repeats: int) -> dict[str, list[float]]:
    """Every figure of the browser, `repeats` times."""
    found: dict[str, list[float]] = {}
    note = lambda name, value: found.setdefault(name, []).append(value)
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        for _ in range(repeats):
            page = chromium.new_page(viewport={"width": 1200, "height": 900})
            page.add_script_tag(content=PAGE)
            note("static HTML: until painted", page.evaluate("html => drawHtml(html)", html))
            note("static HTML: longest frame, scrolling", page.evaluate("scroll()"))
            note("static HTML: longest frame, pointing", pointing(page))
            page.close()
            page = chromium.new_page(viewport={"width": 1200, "height": 900})
            page.add_script_tag(content=PAGE)
            page.add_style_tag(content=str(MaskLens._css))
            page.add_script_tag(content=str(MaskLens._esm).replace("export default", "window.lens ="), type="module")
            page.evaluate("data => { state.payload = data }", data)
            note("widget: until painted", page.evaluate("drawLens(lens)"))
            note("widget: longest frame, scrolling", page.evaluate("scroll()"))
            note("widget: longest frame, pointing", pointing(page))
            for name in ("only_supervised", "token_ids", "whitespace"):
                note(f"widget: switch {name} on or off", page.evaluate("name => turn(name)", name))
                note(f"widget: switch {name} on or off", page.evaluate("name => turn(name)", name))
            page.close()
        chromium.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    processor, folder = load_processor(resolve("data/tiny-ovis")), resolve("data/photos")
    record, encoded = sample(options.tokens, processor, folder)
    shown = {"record": record, "image_folder": folder}
    html, data = str(show_tokens(encoded, processor, **shown)), payload(encoded, processor, **shown)
    drawn = sum(len(part["ids"]) for run in data["sides"][0]["runs"] for part in run.get("parts", ()))
    print(f"{len(encoded):,} tokens, {drawn:,} of text drawn, {len(PHOTOS)} photographs; HTML {len(html) / 1e6:.1f} MB")

    # photographs as a telephone takes them: 12 million pixels
    pictures = [Image.open(Path(folder) / name).convert("RGB").resize((4000, 3000)) for name in PHOTOS]
    large = Record.from_dict({**record.to_dict(), "image": pictures})
    figures = {
        "Python: payload without pictures": lambda: payload(encoded, processor),
        "Python: payload": lambda: payload(encoded, processor, **shown),
        "Python: payload, decoded pictures of 12 megapixels": lambda: payload(encoded, processor, record=large),
        "Python: static HTML without pictures": lambda: show_tokens(encoded, processor),
        "Python: static HTML": lambda: show_tokens(encoded, processor, **shown),
    }
    for name, call in figures.items():
        print(f"{name:>52}: {milliseconds(call, options.repeats):7.1f} ms")
    for name, values in browser(html, data, options.repeats).items():
        print(f"{name:>52}: {statistics.median(values):7.1f} ms (worst of {len(values)}: {max(values):.1f})")


if __name__ == "__main__":
    main()
