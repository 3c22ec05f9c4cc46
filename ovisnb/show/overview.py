"""A data set at a glance: the numbers of `ovisnb.data.stats` as a table, bars and figures.

    stats = summarise(records, processor, image_folder="images")
    display(overview_table(stats), kind_table(stats), overview_figure(stats, max_length=4096))

Nothing that the data wrote gets into a figure, where `$` would be mathematics and a foreign script boxes:
kinds and sentences stand in the tables, which are HTML, escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ovisnb.data import boxes
from ovisnb.data.checks.faults import KINDS
from ovisnb.data.stats import Stats

from .html import BLUE, FONT, GREY, MUTED, ORANGE, RED, Html, Plot, more, table, warnings, words
from .pieces import one_line
from .shelf import Shelf

ROWS = 20  # kinds that are listed
MOST = 400  # boxes that are drawn
EXAMPLES = 3  # faults of a kind that are listed


def overview_table(stats: Stats, shelf: Shelf | None = None, *, max_length: int | None = None) -> Html:
    """The totals as a small table; with the `shelf` it says how much of the file was read."""
    read = f"{stats.records:,}" + (f" ({shelf.read})" if shelf is not None and shelf.read else "")
    rows: list[tuple] = [("records", read)]
    rows += [("pictures and frames", stats.sizes.total), ("records with a video", stats.videos)]
    if stats.smallest and stats.largest:
        rows.append(("smallest, largest picture", "{}×{}, {}×{}".format(*stats.smallest, *stats.largest)))
    marks = (stats.boxes.total, stats.points.total, stats.crops.total)
    if any(marks):
        rows.append(("boxes, points, tool calls", ", ".join(f"{count:,}" for count in marks)))
    if len(stats.tokens):
        total, trained = sum(stats.tokens), sum(stats.supervised)
        middle, high = (f"{stats.tokens.quantile(share):,}" for share in (0.5, 0.95))
        rows += [("tokens", total), ("supervised tokens", f"{trained:,} ({trained / total:.1%})")]
        rows.append(("tokens of a record: median, 95th percentile", f"{middle}, {high}"))
        rows.append(("longest record in tokens", max(stats.tokens)))
        if max_length:
            over = stats.tokens.above(max_length)
            rows.append((f"records over {max_length:,} tokens", f"{over:,} ({over / len(stats.tokens):.1%})"))
    if stats.problems.total:
        rows.append(("records not counted in full", stats.problems.total))
    short = shelf.without_folders if shelf is not None else str
    some = warnings([short(said) for said in stats.problems][:EXAMPLES])
    return Html(table(rows) + some + more(stats.problems.total - EXAMPLES, "record"))


def kind_table(stats: Stats) -> Html:
    """Records by kind, most frequent first, each with a bar."""
    kinds = stats.kinds.most_common()
    rows = []
    for kind, count in kinds[:ROWS]:
        style = f"width:{max(2, round(260 * count / kinds[0][1]))}px;height:11px;margin-top:4px;background-color:{BLUE}"
        bar = Html(f'<div style="{style}"></div>')
        rows.append((Html(words(kind, 60)), count, f"{count / stats.records:.1%}", bar))
    return Html(table(rows, head=("kind", "records", "share", "")) + more(len(kinds) - ROWS, "kind"))


def problem_table(shelf: Shelf) -> Html:
    """What is wrong with the data, by kind: how often, what it means, and the first few of each."""
    rows = []
    for kind, count in shelf.counts.items():
        parts = [f"<div>{words(KINDS.get(kind, ''))}</div>"]
        for fault in islice((fault for fault in shelf.faults if fault.kind == kind), EXAMPLES):
            place = [words(fault.id, 60)] if fault.id is not None else []
            place += [f"line {fault.line}"] if fault.line is not None else []
            place = f'<span style="{MUTED}">{", ".join(place)}</span> '
            parts.append(f"<div>{place}{words(shelf.without_folders(fault.message), 300)}</div>")
        rows.append((one_line(kind, 60), count, Html("".join(parts) + more(count - EXAMPLES, "problem"))))
    return Html(f'<div style="{FONT}"><b>{words(shelf.verdict, 400)}</b></div>{table(rows)}')


def overview_figure(
    stats: Stats, *, max_length: int | None = None, limits: Sequence[int | None] = (None, None)
) -> Plot:
    """Turns and pictures a record, picture sizes, and, where there are any, tokens a record, boxes and tool calls.

    `max_length` tokens is drawn as the limit; `limits` (smallest and largest area in pixels of a resized picture)
    as curves among the sizes.
    """
    marked = stats.boxes.total or stats.crops.total
    panels = [  # whether there is anything to draw, what draws it, with what
        (True, _counts, ()),
        (stats.sizes.total, _sizes, (limits,)),
        (len(stats.tokens), _tokens, (max_length,)),
        (marked or stats.points.total, _places, ()),
        (marked, _areas, ()),
        (any(stats.calls.keys() - {0}), _calls, ()),
    ]
    panels = [(draw, options) for there_is, draw, options in panels if there_is]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (draw, options) in zip(axes, panels):
        draw(axis, stats, *options)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return Plot(figure)


def _counts(axis, stats: Stats) -> None:
    for offset, colour, name in ((-0.2, BLUE, "turns"), (0.2, ORANGE, "images")):
        _bars(axis, getattr(stats, name), colour, offset=offset, width=0.4, label=name)
    axis.set(title="Turns and images a record", xlabel="number in one record", ylabel="records")
    _legend_above(axis)


def _calls(axis, stats: Stats) -> None:
    _bars(axis, stats.calls, BLUE)
    axis.set(title="Tool calls an answer", xlabel="tool calls in one answer", ylabel="answers")


def _bars(axis, counts: Counter, colour: str, *, offset: float = 0, width: float = 0.7, most: int = 12, **more) -> None:
    """Bars at whole numbers up to `most`; what is above is one bar."""
    kept = Counter()
    for number, count in counts.items():
        kept[min(number, most + 1)] += count
    axis.bar([number + offset for number in sorted(kept)], [kept[n] for n in sorted(kept)], width, color=colour, **more)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f">{most}" if x > most else f"{x:.0f}"))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def _sizes(axis, stats: Stats, limits: Sequence[int | None]) -> None:
    points = Counter(stats.sizes)
    across, down = [width for width, _ in points], [height for _, height in points]
    areas = [20 + 15 * min(number, 20) for number in points.values()]
    axis.scatter(across, down, s=areas, color=BLUE, alpha=0.6, lw=0)
    spans = [max(sides) / min(sides) for sides in (across, down)]
    if max(spans) > 50:
        axis.set(xscale="log", yscale="log")
        left, right, top = min(across) / 1.5, max(across) * 1.5, max(down) * 1.5
        axis.set(xlim=(left, right), ylim=(min(down) / 1.5, top))
    else:
        left, right, top = 0, max(across) * 1.08, max(down) * 1.08
        axis.set(xlim=(0, right), ylim=(0, top))
    steps = [right * 0.02 + (right * 0.98) * number / 200 for number in range(201)]
    for limit, name, style in zip(limits, ("min_pixels", "max_pixels"), (":", "--")):
        if limit and 0.03 < limit / (right * top) < 1:  # else it hugs a corner
            axis.plot(steps, [limit / x for x in steps], color=GREY, ls=style, lw=1.2, label=name)
    if axis.lines:
        axis.legend(frameon=False)
    axis.set(title="Picture sizes", xlabel="width in pixels", ylabel="height in pixels")


def _tokens(axis, stats: Stats, max_length: int | None) -> None:
    count, longest = min(40, max(8, len(stats.tokens) // 2)), max(stats.tokens)
    bins: int | list[float] = count
    if longest > 20 * stats.tokens.quantile(0.5):  # a few far out would leave the others one bar
        shortest = max(1, min(stats.tokens))
        bins = [shortest * (longest / shortest) ** (step / count) for step in range(count + 1)]
        bins[-1] = longest
        axis.set_xscale("log")
    axis.hist(list(stats.tokens), bins=bins, color=BLUE)
    axis.set(title="Length of a record", xlabel="tokens", ylabel="records")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    if max_length:
        over = stats.tokens.above(max_length)
        axis.axvline(max_length, color=RED, lw=1.5, ls="--")
        axis.set_title(f"Length of a record: {over:,} over {max_length:,}")
        if max_length > 4 * longest:  # far away: the line would squeeze the rest to nothing
            axis.set_xlim(axis.get_xlim()[0] if axis.get_xscale() == "log" else 0, longest * 1.1)
            axis.set_title(f"Length of a record: all within {max_length:,}")


def _places(axis, stats: Stats) -> None:
    """Boxes one upon the other, the fainter the more there are, on one square for all pictures; of many an even part."""
    for sample, colour, name in ((stats.boxes, BLUE, "boxes"), (stats.crops, ORANGE, "tool calls")):
        some = sample[:: 1 + len(sample) // MOST]
        if not some:
            continue
        faint = max(0.2, min(1, 60 / len(some)))
        corners = [((x1, y1), (x2, y1), (x2, y2), (x1, y2)) for x1, y1, x2, y2 in some]
        faces, edges = to_rgba(colour, 0.08 * faint), to_rgba(colour, 0.5 * faint)
        axis.add_collection(PolyCollection(corners, facecolor=faces, edgecolor=edges))
        x, y = ([(box[at] + box[at + 2]) / 2 for box in some] for at in (0, 1))
        axis.scatter(x, y, s=9, color=colour, alpha=faint, lw=0, label=name)
    if stats.points:
        axis.scatter(*zip(*stats.points), s=16, marker="x", color=RED, lw=1, label="points")
    axis.set(title="Where boxes, points and calls lie", xlim=(0, 1), ylim=(1, 0), xlabel="share of the width")
    axis.set(ylabel="share of the height", aspect="equal")
    legend = axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), markerscale=2)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _areas(axis, stats: Stats) -> None:
    edges = [10 ** (-4 + step / 5) for step in range(21)]
    samples = [(stats.boxes, BLUE, "boxes"), (stats.crops, ORANGE, "tool calls")]
    samples = [some for some in samples if some[0]]
    kept = [[min(max(boxes.area(box), edges[0]), 1) for box in sample] for sample, _, _ in samples]
    colours, names = [colour for _, colour, _ in samples], [name for _, _, name in samples]
    axis.hist(kept, bins=edges, stacked=True, color=colours, label=names)
    axis.set(title="Area of a box", xlabel="share of its picture", ylabel="boxes", xscale="log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2%}" if x < 0.01 else f"{x:.0%}"))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(axis)


def _legend_above(axis) -> None:
    """A legend in one row over the bars, which leave room for it: among them it cannot be read."""
    axis.set_ylim(top=1.2 * axis.get_ylim()[1])
    axis.legend(frameon=False, loc="upper center", ncols=2)
