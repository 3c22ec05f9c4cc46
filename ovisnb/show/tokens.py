"""The mask view: every token of an encoded record, coloured by why it does or does not carry loss.

    show_tokens(encode(record, processor), processor, record=record)
    show_tokens({"large": encode(record, processor), "small": encode(record, processor, max_pixels=65536)}, processor)

Static HTML that survives papermill and HTML export; `ovisnb.show.lens` draws the same payload as a widget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from ovisnb.chat import Encoded

from .html import FONT, MONO, MUTED, Html, table, warnings
from .payload import MOST_TOKENS, in_order, payload, token_summary
from .pictures import img
from .pieces import one_line


def reason_table(encoded: Iterable[Encoded | str], *, limit: int = 40) -> Html:
    """One row for each of the first `limit` `Encoded`: its id, tokens, tokens of each reason that occurs, share
    of supervised tokens; the last row is the sum over all of them. Sentences on what could not be encoded
    (`Shelf.encode`) stand below."""
    rows, said = [], []
    for one in encoded:
        if isinstance(one, str):
            said.append(one)
        else:
            rows.append(token_summary(one))
    reasons = in_order(reason for row in rows for reason in row["reasons"])
    head = ("record", "tokens", *reasons, "supervised")
    counts = [[row["reasons"].get(reason, {"tokens": 0})["tokens"] for reason in reasons] for row in rows]
    lines = [
        (one_line(row["id"], 80), row["tokens"], *some, f"{row['share']:.1%}")
        for row, some in zip(rows[:limit], counts)
    ]
    lines += [(f"… {len(rows) - limit:,} more", *[""] * (len(head) - 1))] if len(rows) > limit else []
    total, supervised = (sum(row[key] for row in rows) for key in ("tokens", "supervised"))
    lines.append(("all", total, *map(sum, zip(*counts)), f"{supervised / total:.1%}" if total else ""))
    return Html(table(lines, head=head) + warnings(said))


def show_tokens(
    encoded: Encoded | dict[str, Encoded],
    processor,
    *,
    record=None,
    image_folder: str | Path | None = None,
    only_supervised: bool = False,
    token_ids: bool = False,
    whitespace: bool = True,
    limit: int = MOST_TOKENS,
) -> Html:
    """The mask view of `encoded` as static HTML, all text escaped.

    A dict name -> Encoded of one record under several settings stands side by side, turn by turn, below a table of
    the tokens of each reason, with the difference of two.

    With `record` (and `image_folder`, as for `encode`) each run of visual tokens shows its picture;
    without it only its grid t x h x w in patches and its number of tokens. Position, id, label, reason, role
    and turn of a token are its tooltip. `only_supervised` folds everything without a label; `token_ids` also
    writes the id below a token; `whitespace=False` leaves spaces and newlines unmarked. No more than `limit` text
    tokens of a side are drawn, and the view says so. Raises ValueError for an empty dict.
    """
    data = payload(encoded, processor, record=record, image_folder=image_folder, limit=limit)
    return Html(_View(data, only_supervised, token_ids, whitespace).html())


class _View:
    """One payload on its way to HTML. Everything that is written passes `escape`, numbers apart."""

    def __init__(self, data: dict, only_supervised: bool, token_ids: bool, whitespace: bool):
        self.data, self.only_supervised, self.token_ids = data, only_supervised, token_ids
        breaks = lambda count: "<br>" * count
        self.texts = [
            (escape(visible if whitespace else plain) or "&#8203;", breaks(count))
            for visible, plain, count in data["pieces"]
        ]
        self.styles = {
            reason: f"display:inline-block;background-color:{background};color:{colour};border-radius:3px;"
            f"padding:0 2px;margin:1px;white-space:pre;vertical-align:top{'' if whitespace else ';min-width:3px'}"
            for reason, (background, colour, _) in data["reasons"].items()
        }

    def html(self) -> str:
        sides = self.data["sides"]
        head = self._columns([_header(side, self.data["reasons"]) for side in sides])
        if self.data["table"]:
            first, *rows = self.data["table"]
            head = table([tuple(row) for row in rows], head=tuple(first)) + head
        rows = [
            self._columns(["".join(self._runs(side["runs"], indices)) for side, indices in zip(sides, row)])
            for row in self.data["rows"]
        ]
        body = f'<div style="{MONO};font-size:12px;line-height:1.65;margin-top:8px">{"".join(rows)}</div>'
        return (
            f'<div dir="ltr" style="{FONT};margin:8px 0 20px 0">{head}{body}{self._columns(map(_spans, sides))}</div>'
        )

    def _columns(self, cells: Iterable[str]) -> str:
        """One cell over the whole width, several beside each other."""
        cells = list(cells)
        if len(cells) == 1:
            return f'<div style="margin:6px 0 0 0">{cells[0]}</div>'
        inner = "".join(f'<div style="flex:1 1 0;min-width:0">{cell}</div>' for cell in cells)
        return f'<div style="display:flex;gap:20px;margin:6px 0 0 0">{inner}</div>'

    def _runs(self, runs: list[dict], indices: list[int]) -> Iterator[str]:
        for index in indices:
            run = runs[index]
            if self.only_supervised and not run["trains"]:
                yield _folded(run)
            elif "media" in run:
                yield self._media(run)
            else:
                yield from self._tokens(run)

    def _tokens(self, run: dict) -> Iterator[str]:
        style, where, texts = self.styles[run["reason"]], escape(run["where"]), self.texts
        last = run["start"]
        for part in run["parts"]:
            if part["at"] > last:
                yield _gap(last, part["at"])
            last = part["at"] + len(part["ids"])
            labels = part["labels"] or [-100] * len(part["ids"])
            for at, token, label, place in zip(range(part["at"], last), part["ids"], labels, part["pieces"]):
                text, breaks = texts[place]
                named = "none" if label == -100 else label
                below = f'<div style="font-size:9px;opacity:0.75">{token}</div>' if self.token_ids else ""
                yield (
                    f'<span style="{style}" title="position {at} · id {token} · label {named} · {where}">'
                    f"{text}{below}</span>{breaks}"
                )
        if last < run["end"]:
            yield _gap(last, run["end"])

    def _media(self, run: dict) -> str:
        """One box for a run of visual tokens: thumbnails, the patch grid, the token count."""
        background, colour, _ = self.data["reasons"][run["reason"]]
        media = self.data["media"][run["media"]]
        thumbnails = "".join(map(img, media["pictures"]))
        lines = [media["title"], *run["lines"], *([media["note"]] if media["note"] else [])]
        text = "".join(f"<div>{escape(line)}</div>" for line in lines)
        title = f"positions {run['start']} to {run['end'] - 1} · no label · {escape(run['where'])}"
        return (
            f'<div style="display:inline-block;vertical-align:top;background-color:{background};color:{colour};'
            f'border-radius:4px;padding:3px 6px;margin:2px;max-width:95%" title="{title}">'
            f'<div style="display:flex;flex-wrap:wrap;gap:4px">{thumbnails}<div>{text}</div></div></div>'
        )


def _folded(run: dict) -> str:
    """What stands for a run that is not drawn."""
    name = escape(run.get("media", run["reason"]))
    return (
        f'<span style="{MUTED};border:1px solid #9a9a9a;border-radius:8px;padding:0 6px;margin:1px;'
        f'display:inline-block;vertical-align:top" title="positions {run["start"]} to {run["end"] - 1} · {escape(run["where"])}">'
        f"{name} · {run['end'] - run['start']:,}</span>"
    )


def _gap(start: int, end: int) -> str:
    return (
        f'<div style="{MUTED};margin:4px 0">… {end - start:,} tokens, {start:,} to {end - 1:,}, are not drawn …</div>'
    )


def _header(side: dict, reasons: dict) -> str:
    """What it is, one bar of all shares, and a chip with count and share for each reason that occurs."""
    name = f"<b>{escape(side['name'])}</b> · " if side["name"] else ""
    notes = "".join(f"<div>⚠ {escape(text)}</div>" for text in side["notes"])
    bar, chips = [], []
    for reason, count, share in side["shares"]:
        background, colour, meaning = reasons[reason]
        tip = escape(f"{reason}: {meaning}" if meaning else reason)
        bar.append(f'<div style="width:{share * 100:.2f}%;background-color:{background}" title="{tip}"></div>')
        chips.append(
            f'<span style="margin-right:14px;display:inline-block" title="{tip}"><span style="background-color:'
            f'{background};color:{colour};border-radius:3px;padding:0 6px">{escape(reason)}</span> '
            f'{count:,} <span style="{MUTED}">{share:.1%}</span></span>'
        )
    return (
        f"<div>{name}<b>{escape(side['id'])}</b> · {escape(side['facts'])}</div>{notes}"
        '<div style="display:flex;height:12px;border-radius:4px;overflow:hidden;margin:6px 0;max-width:900px">'
        f"{''.join(bar)}</div><div>{''.join(chips)}</div>"
    )


def _spans(side: dict) -> str:
    """The spans as a table, folded away."""
    rows = [
        (f"{run['start']:,} to {run['end'] - 1:,}", run["end"] - run["start"])
        + (run["role"], run["turn"], run["reason"], run["kind"])
        for run in side["runs"]
    ]
    inner = table(rows, head=("positions", "tokens", "role", "turn", "reason", "kind"))
    return f'<details><summary style="{MUTED}">{len(rows)} spans</summary>{inner}</details>'
