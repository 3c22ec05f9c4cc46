"""The memory plan of a run as one bar: what of a card's memory each purpose takes."""

from __future__ import annotations

from html import escape
from typing import Any

from .html import BLUE, FONT, GREY, MUTED, ORANGE, RED, Html, table, words

# of Okabe & Ito's colour-blind-safe set, in the order of the bar
COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", RED, "#f0e442", GREY)
LEAST = 0.01
"""Share of the peak below which parts are put together as "rest"."""


def show_plan(plan: Any, gpu_memory: float | None = None) -> Html:
    """The parts of `plan`, an ovisnb.train.plan.MemoryPlan, at the peak of a training step, as a stacked bar and a table.

    gpu_memory: GiB of a card, to whose size the bar is drawn; what does not fit is said in red. None: the peak fills
    the bar.
    """
    whole = max(plan.total, 1)
    shown = {part: size for part, size in plan.parts.items() if size >= LEAST * whole}
    rest = plan.total - sum(shown.values())
    parts = [(part, size, plan.formulas[part]) for part, size in shown.items()]
    if rest > 0:
        parts.append(("rest", rest, "parts of less than a hundredth each"))
    width = max(whole, (gpu_memory or 0) * 2**30)
    pieces, rows = [], []
    for at, (part, size, formula) in enumerate(parts):
        colour = COLOURS[at % len(COLOURS)]
        title = escape(f"{part}: {plan.in_words(size)}", quote=True)
        style = f"width:{100 * size / width:.3f}%;background:{colour};height:22px"
        pieces.append(f'<div style="{style}" title="{title}"></div>')
        swatch = f'<span style="display:inline-block;width:10px;height:10px;background:{colour}"></span>'
        rows.append((Html(f"{swatch} {words(part, 60)}"), plan.in_words(size), Html(words(formula, 200))))
    bar = f'<div style="display:flex;background:rgba(127,127,127,.25);max-width:860px">{"".join(pieces)}</div>'
    head = f"<b>{escape(plan.in_words(plan.total))}</b> planned at the peak, in the {words(plan.when, 40)}"
    if gpu_memory is not None:
        fits = plan.fits(gpu_memory)
        said = "it fits on" if fits else "it does not fit on"
        colour = "inherit" if fits else RED
        head += f'; <span style="color:{colour}">{said} a card of {gpu_memory:g} GiB</span>'
    if plan.mean is not None:
        head += f"; {escape(plan.in_words(plan.mean))} with a middling batch"
    foot = f'<div style="{MUTED};font-size:12px">{words(f"{plan.parallel}; batch: {plan.batch}", 400)}</div>'
    return Html(f'<div style="{FONT}">{head}{bar}{table(rows)}{foot}</div>')
