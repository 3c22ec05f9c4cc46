"""The mask view: every token of an encoded record, coloured by why it does or does not carry loss.

Draws what `ovisnb.chat.encode` returned and derives nothing again: colours come from the spans,
labels from the labels. The result is static HTML that survives papermill and HTML export.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from html import escape
from pathlib import Path

from .html import FONT, MONO, MUTED, Html, picture, table

# reason -> (background, text, what it means). Only "answer" is dark: what trains stands out by
# lightness alone; the pale ones are tints of the Okabe-Ito colour-blind-safe set.
REASON_COLOURS = {
    "answer": ("#0072b2", "#ffffff", "trains: the assistant's words"),
    "user": ("#fbe3b0", "#1a1a1a", "the user's words"),
    "system": ("#dccfe6", "#1a1a1a", "the system prompt"),
    "header": ("#cfcfcf", "#1a1a1a", "role headers and turn ends outside an answer"),
    "empty_think": ("#f3cfe0", "#1a1a1a", "the empty-think prefix put before a plain answer"),
    "image": ("#b5e3d3", "#1a1a1a", "an image's visual tokens"),
    "video": ("#c6e6f8", "#1a1a1a", "a video's visual tokens"),
    "tool_response": ("#f5c5a2", "#1a1a1a", "what a tool answered"),
    "ignored": ("#f5f0a8", "#1a1a1a", "an assistant turn marked ignored_gpt"),
    "separator": ("#ececec", "#1a1a1a", "the newline between turns"),
}
OTHER_COLOUR = ("#bcbcbc", "#1a1a1a", "")  # a reason this view has no colour for is still shown by name


def token_summary(encoded) -> dict:
    """Counts of one `Encoded`: id, tokens, supervised, share (0..1), images, video_frames, dropped,
    and `reasons`, a dict reason -> {"tokens": int, "share": float} with the most frequent first."""
    total = len(encoded.input_ids)
    counts: Counter = Counter()
    for span in encoded.spans:
        counts[span.reason] += span.end - span.start
    supervised = int((encoded.labels != -100).sum())
    share = lambda count: count / total if total else 0.0
    return {
        "id": encoded.id,
        "tokens": total,
        "supervised": supervised,
        "share": share(supervised),
        "images": 0 if encoded.image_grid_thw is None else len(encoded.image_grid_thw),
        "video_frames": 0 if encoded.video_grid_thw is None else int(encoded.video_grid_thw[:, 0].sum()),
        "dropped": list(encoded.dropped),
        "reasons": {r: {"tokens": n, "share": share(n)} for r, n in counts.most_common()},
    }


def reason_table(encoded: Iterable, *, limit: int = 40) -> Html:
    """One row for each of the first `limit` `Encoded`: its id, tokens, tokens of each reason that occurs, share
    of supervised tokens; the last row is the sum over all of them."""
    rows = [token_summary(one) for one in encoded]
    reasons = [reason for reason in REASON_COLOURS if any(reason in row["reasons"] for row in rows)]
    reasons += sorted({reason for row in rows for reason in row["reasons"]} - set(reasons))
    head = ("record", "tokens", *reasons, "supervised")
    counts = [[row["reasons"].get(reason, {"tokens": 0})["tokens"] for reason in reasons] for row in rows]
    lines = [(row["id"], row["tokens"], *some, f"{row['share']:.1%}") for row, some in zip(rows[:limit], counts)]
    lines += [(f"… {len(rows) - limit:,} more", *[""] * (len(head) - 1))] if len(rows) > limit else []
    total, supervised = (sum(row[key] for row in rows) for key in ("tokens", "supervised"))
    lines.append(("all", total, *map(sum, zip(*counts)), f"{supervised / total:.1%}" if total else ""))
    return Html(table(lines, head=head))


def show_tokens(
    encoded, processor, *, record=None, image_folder: str | Path | None = None, token_ids: bool = False
) -> Html:
    """The mask view of `encoded` as static HTML, all text escaped.

    With `record` (and `image_folder`, as for `encode`) each run of visual tokens shows its picture;
    without it only its grid t x h x w in patches and its number of tokens. Position, id and label of a
    token are its tooltip; `token_ids` also writes the id below it.
    """
    pictures, frames = _pictures(record, image_folder)
    pieces = _pieces(encoded.input_ids.tolist(), processor.tokenizer)
    ids, labels = encoded.input_ids.tolist(), encoded.labels.tolist()
    parts, turn = [], None
    for span in encoded.spans:
        if (span.turn, span.role) != turn:
            turn = (span.turn, span.role)
            parts.append("</div>" * bool(parts) + '<div style="margin:6px 0 0 0">')
        if span.kind in ("image", "video"):
            parts.append(_media_box(span, encoded, pictures, frames))
            continue
        background, colour, _ = REASON_COLOURS.get(span.reason, OTHER_COLOUR)
        style = (
            f"display:inline-block;background-color:{background};color:{colour};border-radius:3px;"
            "padding:0 2px;margin:1px;white-space:pre"
        )
        where = escape(f"{span.reason} ({span.role or 'no role'}, turn {span.turn})")
        for at in range(span.start, span.end):
            label = "none" if labels[at] == -100 else labels[at]
            title = f"position {at} · id {ids[at]} · label {label} · {where}"
            text = pieces[ids[at]]
            below = f'<div style="font-size:9px;opacity:0.75">{ids[at]}</div>' if token_ids else ""
            parts.append(f'<span style="{style}" title="{title}">{text}{below}</span>' + "<br>" * text.count("↵"))
    parts.append("</div>" if parts else "")
    body = f'<div style="{MONO};font-size:12px;line-height:1.65;margin-top:8px">{"".join(parts)}</div>'
    summary = token_summary(encoded)
    return Html(
        f'<div style="{FONT};margin:8px 0 20px 0">{_header(summary)}{_legend(summary)}{body}{_spans(encoded)}</div>'
    )


def _header(summary: dict) -> str:
    facts = f"{summary['tokens']:,} tokens, {summary['supervised']:,} of them train ({summary['share']:.1%})"
    if summary["images"]:
        facts += f" · {summary['images']} image{'s' * (summary['images'] > 1)}"
    if summary["video_frames"]:
        facts += f" · a video of {summary['video_frames']} frames"
    dropped = "".join(f"<div>⚠ {escape(text)}</div>" for text in summary["dropped"])
    return f"<div><b>{escape(str(summary['id']))}</b> · {facts}</div>{dropped}"


def _legend(summary: dict) -> str:
    """One bar of all shares, then a chip with count and share for each reason that occurs."""
    bar, chips = [], []
    known = [reason for reason in REASON_COLOURS if reason in summary["reasons"]]
    for reason in known + [reason for reason in summary["reasons"] if reason not in REASON_COLOURS]:
        count, share = summary["reasons"][reason]["tokens"], summary["reasons"][reason]["share"]
        background, colour, meaning = REASON_COLOURS.get(reason, OTHER_COLOUR)
        tip = escape(f"{reason}: {meaning}" if meaning else reason)
        bar.append(f'<div style="width:{share * 100:.2f}%;background-color:{background}" title="{tip}"></div>')
        chips.append(
            f'<span style="margin-right:14px;display:inline-block" title="{tip}"><span style="background-color:'
            f'{background};color:{colour};border-radius:3px;padding:0 6px">{escape(reason)}</span> '
            f'{count:,} <span style="{MUTED}">{share:.1%}</span></span>'
        )
    return (
        '<div style="display:flex;height:12px;border-radius:4px;overflow:hidden;margin:6px 0;max-width:900px">'
        f"{''.join(bar)}</div><div>{''.join(chips)}</div>"
    )


def _media_box(span, encoded, pictures: list, frames: list) -> str:
    """One box for a run of visual tokens: up to four thumbnails, the patch grid, the token count."""
    background, colour, _ = REASON_COLOURS.get(span.reason, OTHER_COLOUR)
    video = span.kind == "video"
    grids = encoded.video_grid_thw if video else encoded.image_grid_thw
    t, h, w = (int(side) for side in grids[span.media or 0])
    shown = frames[:4] if video else pictures[span.media : span.media + 1] if pictures else []
    thumbnails = "".join(f'<div style="margin:2px 0">{picture(image, height=72, width=160)}</div>' for image in shown)
    lines = [
        "video" if video else f"image {span.media + 1}",
        f"{t}×{h}×{w} patches",
        f"{span.end - span.start:,} tokens",
    ]
    if video and len(frames) > len(shown):
        lines.append(f"first {len(shown)} of {len(frames)} frames")
    text = "".join(f"<div>{line}</div>" for line in lines)
    title = f"positions {span.start} to {span.end - 1} · no label · {escape(span.reason)} (turn {span.turn})"
    return (
        f'<div style="display:inline-block;vertical-align:top;background-color:{background};color:{colour};'
        f'border-radius:4px;padding:3px 6px;margin:2px" title="{title}">'
        f'<div style="display:flex;gap:4px">{thumbnails}<div>{text}</div></div></div>'
    )


def _spans(encoded) -> str:
    """The spans as a table, folded away."""
    rows = [
        (f"{span.start:,} to {span.end - 1:,}", span.end - span.start, span.role, span.turn, span.reason, span.kind)
        for span in encoded.spans
    ]
    inner = table(rows, head=("positions", "tokens", "role", "turn", "reason", "kind"))
    return f'<details><summary style="{MUTED}">{len(rows)} spans</summary>{inner}</details>'


def _pictures(record, image_folder) -> tuple[list, list]:
    """(images, video frames) of a Record or data-file dict as PIL; both empty without a record."""
    if record is None:
        return [], []
    from ovisnb.data.media import open_media
    from ovisnb.data.record import Record

    record = Record.from_dict(record) if isinstance(record, dict) else record
    images, frames = open_media(record, image_folder)
    return images, frames or []


def _pieces(ids: list[int], tokenizer) -> dict[int, str]:
    """id -> escaped readable text of that one token: spaces as ·, newlines as ↵, bytes that are no
    whole character as hex. Added tokens and pieces that are not byte-level are shown as they are."""
    unique = sorted(set(ids))
    added = set(tokenizer.get_added_vocab().values())
    table = _byte_table()
    pieces = {}
    for token_id, token in zip(unique, tokenizer.convert_ids_to_tokens(unique)):
        if token is None:
            text = f"[id {token_id}: not in the tokenizer]"
        elif token_id in added or any(character not in table for character in token):
            text = token
        else:
            raw = bytes(table[character] for character in token)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                pieces[token_id] = f"⟨{raw.hex(' ')}⟩"
                continue
        pieces[token_id] = escape("".join(map(_visible, text)))
    return pieces


def _visible(character: str) -> str:
    """A character as it is, or a visible stand-in for white space and unprintable ones."""
    stand_in = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}.get(character)
    if stand_in:
        return stand_in
    return character if character.isprintable() else f"⟨U+{ord(character):04X}⟩"


@cache
def _byte_table() -> dict[str, int]:
    """Byte-level BPE's printable character -> byte (Radford et al. 2019, GPT-2's published encoder):
    printable Latin-1 bytes stand for themselves, the other 68 are numbered on from U+0100."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(byte): byte for byte in themselves} | {chr(256 + n): byte for n, byte in enumerate(others)}
