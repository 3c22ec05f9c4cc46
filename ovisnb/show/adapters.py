"""What an adapter trains, and how far it moved each layer; the numbers come from `ovisnb.train.lora`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from .html import BLUE, Html, Plot, table

WRITTEN = 80  # cells of a map up to which each holds its number


def show_shares(shares: Mapping[str, tuple[int, int]]) -> Html:
    """A table of `trained_shares`: numbers that train and numbers of the base, by part of the model and in all."""
    rows = [(part, trained, base) for part, (trained, base) in shares.items()]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = [(part, trained, base, f"{100 * trained / base:.2f} %" if base else "") for part, trained, base in rows]
    return Html(table(lines, head=("part", "trained", "of the base", "share")))


def show_updates(updates: Sequence[Any]) -> Plot:
    """`update_norms` as pictures: for each part of the model a map of ||update|| / ||weight|| over layers and
    projections, all in one scale, and bars for what is in no layer. ValueError where nothing was adapted."""
    if not updates:
        raise ValueError("There are no updates to show: give those of a model with an adapter.")
    parts = list(dict.fromkeys(update.part for update in updates if update.layer is not None))
    single = [update for update in updates if update.layer is None]
    layers = {part: sorted({u.layer for u in updates if u.part == part and u.layer is not None}) for part in parts}
    names = {
        part: list(dict.fromkeys(u.projection for u in updates if u.part == part and u.layer is not None))
        for part in parts
    }
    heights = [len(names[part]) for part in parts] + [len(single)] * bool(single)
    widest = max([len(layers[part]) for part in parts], default=0)
    size = (min(11.0, max(6.5, 2.5 + 0.55 * widest)), 0.9 * len(heights) + 0.36 * sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    top = max(update.ratio for update in updates) or 1.0
    for axis, part in zip(axes, parts):
        found = {(u.projection, u.layer): u.ratio for u in updates if u.part == part and u.layer is not None}
        cells = [[found.get((name, layer), float("nan")) for layer in layers[part]] for name in names[part]]
        image = axis.imshow(cells, vmin=0, vmax=top, cmap="Blues", aspect="auto")
        axis.set_yticks(range(len(names[part])), names[part])
        step = max(1, len(layers[part]) // 12)
        axis.set_xticks(range(0, len(layers[part]), step), layers[part][::step])
        axis.set(title=part, xlabel="layer")
        if len(found) <= WRITTEN:
            for (name, layer), ratio in found.items():
                place = layers[part].index(layer), names[part].index(name)
                colour = "white" if ratio > 0.6 * top else "#333333"
                axis.text(*place, f"{ratio:.2g}", ha="center", va="center", fontsize=8, color=colour)
    if parts:
        figure.colorbar(image, ax=axes[: len(parts)], label="‖update‖ / ‖weight‖")
    if single:
        axis = axes[-1]
        axis.barh(range(len(single)), [update.ratio for update in single], color=BLUE)
        axis.set_yticks(range(len(single)), [update.projection for update in single])
        axis.invert_yaxis()
        axis.set(title="in no layer", xlabel="‖update‖ / ‖weight‖", xlim=(0, top))
        axis.spines[["top", "right"]].set_visible(False)
    return Plot(figure)
