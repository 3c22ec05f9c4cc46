"""Records as a person looks at them: a card of pictures and conversation, and an overview of many."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ovisnb.data.boxes import normalise
from ovisnb.data.media import open_media
from ovisnb.data.record import Record
from ovisnb.generate.answer import Box, parse

from .html import FONT, MUTED, Html, Plot, picture, table
from .regions import draw_regions

ROLE_COLOURS = {"system": "#9a6fb0", "human": "#e69f00", "gpt": "#0072b2", "ignored_gpt": "#8a8a8a"}
BAR = "#0072b2"


def show_record(record: Record | dict, image_folder: str | Path | None = None, *, height: int = 300) -> Html:
    """One record as a card: its pictures left, the conversation right, all text escaped.

    On a record of one picture, the boxes and points of its answers and the places of its crops are
    drawn on it. `height` limits a picture's shown height in pixels.
    """
    record = Record.from_dict(record) if isinstance(record, dict) else record
    images, frames = open_media(record, image_folder)
    facts = [fact for fact in (record.kind, record.source.replace("\\", "/").rpartition("/")[2]) if fact]
    shots = []
    for at, (media, image) in enumerate(zip(record.images, images)):
        name = f"image {at + 1} · {image.width}×{image.height}"
        if media.box:
            name += " · crop " + str([round(side) for side in media.box])
        tall = height if media.box is None and len(images) < 3 else height // 2
        shots.append(_shot(_drawn(_regions(record, at, image), tall), name, tall))
    shots += [_shot(frame, f"frame {at + 1} of {len(frames)}", height // 3) for at, frame in enumerate(frames or [])]
    left = f'<div style="flex:0 1 420px;display:flex;flex-wrap:wrap;align-content:flex-start;gap:10px">{"".join(shots)}</div>'
    right = f'<div style="flex:1 1 380px;min-width:300px">{"".join(map(_turn, record.turns))}</div>'
    return Html(
        f'<div style="{FONT};border-top:1px solid #9a9a9a;padding:10px 0 16px 0">'
        f'<div><b>{escape(record.id)}</b> <span style="{MUTED}">{escape(" · ".join(facts))}</span></div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:20px;margin-top:8px">{left if shots else ""}{right}</div></div>'
    )


def regions_of(record: Record, image_folder: str | Path | None = None, *, at: int = 0) -> dict:
    """`image`, `boxes` and `points` of the record's picture number `at`, as `show_regions` takes them.

    Boxes and points come from the answers, on records of one whole picture (with several the words
    do not say which is meant); the places of crops cut from the picture are added.
    """
    return _regions(record, at, open_media(record, image_folder)[0][at])


def examples(records: Iterable[Record]) -> dict[str, Record]:
    """The first record of each kind of conversation there is, by what is special about it."""
    tests = {
        "a video": lambda record, text: record.video is not None,
        "a tool's answer": lambda record, text: "</tool_response>" in text,
        "a tool call and the crop it returns": lambda record, text: "</tool_call>" in text,
        "several pictures": lambda record, text: len(record.images) > 1,
        "an answer not to learn from": lambda record, text: any(turn.role == "ignored_gpt" for turn in record.turns),
        "text only": lambda record, text: not record.images,
        "thinking": lambda record, text: "</think>" in text,
        "a system prompt": lambda record, text: record.turns[0].role == "system",
        "several turns": lambda record, text: len(record.turns) > 2,
        "one picture": lambda record, text: True,
    }
    found: dict[str, Record] = {}
    for record in records:
        text = "".join(turn.text for turn in record.turns if turn.role == "gpt")
        name = next((name for name, test in tests.items() if test(record, text)), None)
        if name and name not in found:
            found[name] = record
    return {name: found[name] for name in reversed(tests) if name in found}


def select(records: Iterable[Record], ids: str) -> list[Record]:
    """The records named in `ids` (separated by commas), in that order; ValueError for one that is not there."""
    records = list(records)
    wanted = [name.strip() for name in ids.split(",") if name.strip()]
    known = [record.id for record in records]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) or known[:1]
            hint = f"did you mean {near[0]!r}?" if near else "no record was read."
            raise ValueError(f"None of the {len(known)} records read has the id {name!r}: {hint}")
    return [record for name in wanted for record in records if record.id == name]


def summarise(
    records: Iterable[Record], processor=None, *, image_folder=None, min_pixels=None, max_pixels=None
) -> dict:
    """Numbers of a data set: `records`, `kinds`, `turns` and `images` (Counters), `sizes` (width, height
    of every picture and frame in pixels) and, with a processor, `tokens` and `supervised` of each record."""
    summary = {"records": 0, "kinds": Counter(), "turns": Counter(), "images": Counter(), "videos": 0}
    summary |= {"sizes": [], "tokens": [], "supervised": []}
    for record in records:
        summary["records"] += 1
        summary["kinds"][record.kind or "(none)"] += 1
        summary["turns"][len(record.turns)] += 1
        summary["images"][len(record.images)] += 1
        summary["videos"] += record.video is not None
        images, frames = open_media(record, image_folder)
        summary["sizes"] += [image.size for image in [*images, *(frames or [])]]
        if processor is not None:
            from ovisnb.chat.encode import encode

            limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
            encoded = encode(record, processor, image_folder=image_folder, **limits)
            summary["tokens"].append(len(encoded.input_ids))
            summary["supervised"].append(int((encoded.labels != -100).sum()))
    return summary


def overview_table(summary: dict) -> Html:
    """The totals of `summarise` as a small table."""
    rows: list[tuple] = [("records", summary["records"])]
    rows += [("pictures and frames", len(summary["sizes"])), ("records with a video", summary["videos"])]
    if summary["sizes"]:
        areas = sorted(summary["sizes"], key=lambda size: size[0] * size[1])
        rows.append(("smallest, largest picture", "{}×{}, {}×{}".format(*areas[0], *areas[-1])))
    if summary["tokens"]:
        total, longest = sum(summary["tokens"]), max(summary["tokens"])
        rows += [("tokens", total), ("longest record in tokens", longest)]
        rows.append(("supervised tokens", f"{sum(summary['supervised']):,} ({sum(summary['supervised']) / total:.1%})"))
    return Html(table(rows))


def overview_figure(summary: dict) -> Plot:
    """Kinds, turns and pictures a record, picture sizes and (where counted) tokens a record."""
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    kinds, counts, sizes, tokens = figure.subplots(1, 4)
    names = [name for name, _ in summary["kinds"].most_common(12)][::-1]
    kinds.barh(names, [summary["kinds"][name] for name in names], color=BAR)
    kinds.set(title="Records by kind", xlabel="records")
    for offset, colour, key in ((-0.2, BAR, "turns"), (0.2, "#e69f00", "images")):
        at = sorted(summary[key])
        counts.bar([number + offset for number in at], [summary[key][n] for n in at], 0.4, color=colour, label=key)
    counts.set(title="Turns and images a record", xlabel="number in one record", ylabel="records")
    counts.legend(frameon=False)
    points = Counter(summary["sizes"])
    areas = [20 + 15 * min(number, 20) for number in points.values()]
    sizes.scatter([w for w, _ in points], [h for _, h in points], s=areas, color=BAR, alpha=0.6, lw=0)
    sizes.set(title="Picture sizes", xlabel="width in pixels", ylabel="height in pixels")
    sizes.set(xlim=(0, None), ylim=(0, None))
    if summary["tokens"]:
        tokens.hist(summary["tokens"], bins=min(30, max(5, len(summary["tokens"]) // 2)), color=BAR)
        tokens.set(title="Length of a record", xlabel="tokens", ylabel="records")
    else:
        tokens.set_axis_off()
    for axis, which in ((kinds, "x"), (counts, "both"), (tokens, "y")):
        getattr(axis, "xaxis" if which != "y" else "yaxis").set_major_locator(MaxNLocator(integer=True))
        if which == "both":
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (kinds, counts, sizes, tokens):
        axis.spines[["top", "right"]].set_visible(False)
    return Plot(figure)


def _regions(record: Record, at: int, image) -> dict:
    media, boxes, points = record.images[at], [], []
    if media.box is None and sum(other.box is None for other in record.images) == 1:
        for turn in record.turns:
            if turn.role == "gpt":
                answer = parse(turn.text, image.size)
                boxes, points = boxes + answer.boxes, points + answer.points
    for crop in record.images:
        if _cut_from(crop, media):
            boxes.append(Box(*normalise(crop.box, image.size), label="crop"))
    return {"image": image, "boxes": boxes, "points": points}


def _cut_from(crop, media) -> bool:
    """Whether `crop` was cut from `media`: the same file, or the same picture in memory."""
    return (
        crop.box is not None
        and crop is not media
        and (crop.image is media.image if crop.path is None else crop.path == media.path)
    )


def _drawn(regions: dict, height: int):
    """The picture itself, or with its regions drawn for the size it is shown at, so that labels are readable."""
    image = regions["image"]
    return draw_regions(**regions, width=420, height=height) if regions["boxes"] or regions["points"] else image


def _shot(image, name: str, height: int) -> str:
    caption = f'<div style="{MUTED};font-size:12px">{escape(name)}</div>'
    return f"<div>{picture(image, height=height, width=420, alt=name)}{caption}</div>"


def _turn(turn) -> str:
    colour = ROLE_COLOURS.get(turn.role, "#8a8a8a")
    return (
        f'<div style="border-left:3px solid {colour};padding:0 0 0 10px;margin:0 0 10px 0">'
        f'<div style="{MUTED};font-size:12px">{escape(turn.role)}</div>'
        f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{escape(turn.text)}</div></div>'
    )
